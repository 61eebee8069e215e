"""``model.generate()`` in its modes: the compiled model gives the tokens of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.models import build, pair, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about settings
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam": {"num_beams": 3},
    "beam sample": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked prefill": {"prefill_chunk_size": 2},
}


def generated(model: Any, arguments: dict[str, torch.Tensor], **settings: Any) -> Any:
    """Tokens, from the same seed each time."""
    torch.manual_seed(3)
    return model.generate(**arguments, max_new_tokens=6, **settings)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_tokens_of_the_original(family: str, mode: str) -> None:
    model, compiled = pair(family)
    arguments = tokens(2, 5, padded=True, labels=False)
    expected = generated(model, arguments, **MODES[mode])
    assert torch.equal(generated(compiled, arguments, **MODES[mode]), expected)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_assisted_decoding(family: str) -> None:
    model, compiled = pair(family)
    arguments = tokens(1, 8, labels=False)
    expected = generated(model, arguments)
    assert torch.equal(generated(compiled, arguments, prompt_lookup_num_tokens=2), expected)
    assistant = build(family, num_hidden_layers=2)
    assert torch.equal(generated(compiled, arguments, assistant_model=assistant), expected)
    assert torch.equal(generated(model, arguments, assistant_model=compiled), expected)


def test_generation_that_transformers_compiles_itself() -> None:
    model, compiled = pair("olmoe")
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, dynamic=True, backend="aot_eager")
    config._compile_all_devices = True
    arguments = tokens(1, 5, labels=False)
    expected = generated(model, arguments)
    found = generated(compiled, arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    torch._dynamo.reset()

"""``experts_implementation="moec"``."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moec
from moec.integrations.hf import experts_forward, own_forward
from tests.models import assert_equal_gradients, build, gradients, relative_error, tokens

FAMILIES = ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"]


class Branching(nn.Module):
    """An activation that looks at its values."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2 if value.sum() > 0 else value


def served(model: Any) -> list[Any]:
    """The regions that were made for a model's experts."""
    holders = [vars(module).get("_moec_interface") for module in model.modules()]
    return [holder.region for holder in holders if holder is not None]


def assert_equal_steps(model: Any, expected: Any) -> None:
    """Logits and gradients of one step."""
    for length in (1, 7):
        found, ours = gradients(model, tokens(2, length))
        wanted, theirs = gradients(expected, tokens(2, length))
        assert relative_error(found.logits, wanted.logits) <= 1e-5
        assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family: str) -> None:
    model, reference = build(family), build(family)
    model.set_experts_implementation("moec")
    assert_equal_steps(model, reference)
    regions = served(model)
    assert len(regions) == 2
    assert {region.status for region in regions} == {"compiled"}
    assert len({id(region.session) for region in regions}) == 1
    assert len(regions[0].session.captures) == 1, "equal experts are captured once"
    model.set_experts_implementation("eager")
    assert_equal_steps(model, reference)


def test_a_model_made_from_a_configuration() -> None:
    reference = build("mixtral")
    config = copy.deepcopy(reference.config)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moec").eval()
    assert model.config._experts_implementation == "moec"
    model.load_state_dict(reference.state_dict())
    assert_equal_steps(model, reference)
    assert len(served(model)) == 2


def test_other_dtypes_and_replaced_weights_are_noticed() -> None:
    model, reference = build("olmoe"), build("olmoe")
    model.set_experts_implementation("moec")
    assert_equal_steps(model, reference)
    for other in (model, reference):
        other.double()
        for parameter in other.parameters():
            parameter.data = parameter.data * 1.2
    found, expected = model(**tokens(2, 7)).logits, reference(**tokens(2, 7)).logits
    assert relative_error(found, expected) <= 1e-12


def test_copies_and_pickles_start_afresh() -> None:
    model, reference = build("olmoe"), build("olmoe")
    model.set_experts_implementation("moec")
    assert_equal_steps(model, reference)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not served(twin)
        for parameter in twin.model.layers[0].mlp.experts.parameters():
            parameter.requires_grad_(False)
        _, found = gradients(twin, tokens(2, 7))
        assert not [n for n in found if "layers.0.mlp.experts" in n]
        assert len(found) == len(gradients(reference, tokens(2, 7))[1]) - 2


def test_whole_blocks_can_be_compiled_on_top() -> None:
    reference = build("olmoe")
    model = build("olmoe", experts_implementation="moec")
    compiled = moec.compile(model, strict=True)
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}
    assert_equal_steps(compiled, reference)


def test_experts_that_cannot_be_read_run_their_own_loop() -> None:
    model, reference = build("olmoe"), build("olmoe")
    model.set_experts_implementation("moec")

    for each in (model, reference):
        each.model.layers[0].mlp.experts.act_fn = Branching()
    with pytest.warns(UserWarning, match="stays as it was.*reads a value of a tensor"):
        found = model(**tokens(2, 5)).logits
    assert relative_error(found, reference(**tokens(2, 5)).logits) <= 1e-5


def test_experts_split_over_processes_keep_their_own_loop() -> None:
    experts = build("mixtral").model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    idx = torch.tensor([[0, 4], [1, 2], [4, 4], [3, 0], [2, 4]])  # 4: an expert of another process
    expected = own_forward(type(experts))(experts, x, idx, weights)
    torch.testing.assert_close(experts_forward(experts, x, idx, weights), expected)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals
def test_inside_torch_compile() -> None:
    torch._dynamo.reset()
    reference = build("olmoe")
    model = build("olmoe", experts_implementation="moec")
    call: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 5, 33):
        with torch._dynamo.config.patch(error_on_recompile=length != 9):
            output = call(**tokens(2, length))
        model.zero_grad()
        output.loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        wanted, theirs = gradients(reference, tokens(2, length))
        assert relative_error(output.logits, wanted.logits) <= 1e-5
        assert_equal_gradients(found, theirs, 1e-4)
    assert {region.status for region in served(model)} == {"compiled"}
    torch._dynamo.reset()


def test_nothing_keeps_a_model_alive() -> None:
    model = build("olmoe", experts_implementation="moec")
    model(**tokens(2, 5)).loss.backward()
    compiled = moec.compile(build("olmoe"))
    compiled(**tokens(2, 5)).loss.backward()
    experts = weakref.ref(model.model.layers[0].mlp.experts)
    block = weakref.ref(compiled.model.layers[0].mlp)
    del model, compiled
    gc.collect()
    assert (experts(), block()) == (None, None)


def test_import_moec_stays_light() -> None:
    code = (
        "import moec, sys; print([m for m in sys.modules if m in ('transformers', 'accelerate')])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"

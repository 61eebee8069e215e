"""Tiny models of five Hugging Face MoE families, and what the tests do with them.

Every weight is random, biases and the routers' correction terms too, and limits are low enough to
act: initial values such as zero biases would hide mistakes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moec
from moec.api import regions

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "experts_implementation": "eager",
}


def _mixtral(**changes: Any) -> Any:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**{**_COMMON, **settings, **changes}))


def _qwen3_moe(**changes: Any) -> Any:
    settings = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_COMMON, **settings, **changes}))


def _olmoe(**changes: Any) -> Any:
    settings = {"num_experts": 8, "num_experts_per_tok": 2}
    return OlmoeForCausalLM(OlmoeConfig(**{**_COMMON, **settings, **changes}))


def _deepseek_v3(**changes: Any) -> Any:
    settings = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**_COMMON, **settings, **changes}))


def _gpt_oss(**changes: Any) -> Any:
    settings = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "swiglu_limit": 0.5,  # low, so that many values are cut off
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return GptOssForCausalLM(GptOssConfig(**{**_COMMON, **settings, **changes}))


FAMILIES: dict[str, Callable[..., Any]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def build(family: str, **changes: Any) -> Any:
    """A tiny model with the family's own class; ``changes`` go to its configuration."""
    torch.manual_seed(0)
    model = FAMILIES[family](**changes)
    randomize(model)
    model.generation_config.eos_token_id = None  # so that every generation has the asked length
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every parameter and every correction bias a value that matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2 and "bias" not in name:
            parameter.add_(0.1 * noise)  # a norm's gain or a sink: near its own value
        else:
            parameter.copy_(noise * (0.5 if "embed" in name else 0.15))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


@functools.cache
def pair(family: str) -> tuple[Any, Any]:
    """A model and its compiled form, shared by tests that leave both as they are."""
    model = build(family)
    return model, moec.compile(model)


def tokens(
    batch: int, length: int, *, padded: bool = False, labels: bool = True
) -> dict[str, torch.Tensor]:
    """Arguments of a language model: ids, and a mask with padding on the left of the last row."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, : length // 2] = 0
        ids = ids.masked_fill(mask == 0, 0)
    arguments = {"input_ids": ids, "attention_mask": mask}
    if labels:
        arguments["labels"] = ids.masked_fill(mask == 0, -100)
    return arguments


def gradients(
    model: nn.Module, arguments: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model's output and the gradient of each parameter that got one."""
    model.zero_grad(set_to_none=True)
    output = model(**arguments)
    # A single token has no next one to predict, hence no loss of its own.
    loss = output.loss if arguments["input_ids"].shape[1] > 1 else output.logits.square().mean()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return output, found


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest element."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    return difference / max(expected.detach().double().abs().max().item(), 1e-300)


def assert_equal_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Every gradient, relative to its own largest element.

    What is zero in mathematics (a query's gradient where there is one key) is rounding noise in
    eager too: a millionth of the model's largest gradient. It must be as small in both.
    """
    assert actual.keys() == expected.keys()
    noise = 1e-6 * max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        if gradient.abs().max().item() <= noise:
            assert actual[name].abs().max().item() <= noise, name
            continue
        error = relative_error(actual[name], gradient)
        assert error <= tolerance, f"{name}: {error:.1e}"


def blocks(compiled: nn.Module) -> Iterator[tuple[str, Any]]:
    """The compiled blocks of a model by path."""
    for region in regions(compiled):
        yield region.name, compiled.get_submodule(region.name)


def artifacts(compiled: nn.Module) -> set[Any]:
    """Every artifact that serves a region of the model."""
    return {artifact for region in regions(compiled) for artifact in region.artifacts}

"""Models with low-rank adapters on their experts, and what merged weights would compute."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models import build

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
RANK, ALPHA = 4, 6


def settings(rank: int = RANK, **changes: Any) -> LoraConfig:
    """Adapters on the stacked weights of all experts."""
    given = {"target_modules": [], "target_parameters": list(EXPERTS), **changes}
    return LoraConfig(r=rank, lora_alpha=ALPHA, **given)


def adapted(family: str, *, rank: int = RANK, **changes: Any) -> Any:
    """A tiny model in PEFT's wrapper, its adapters with random weights."""
    model = get_peft_model(build(family, **changes), settings(rank))
    randomize_adapters(model)
    return model


@torch.no_grad()
def randomize_adapters(model: nn.Module) -> None:
    """Give all adapters weights that matter: PEFT starts with zeros in one of the two factors."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def merged_delta(a: torch.Tensor, b: torch.Tensor, shape: torch.Size, scale: float) -> torch.Tensor:
    """What an adapter adds to stacked weights: ``a`` is ``[E*r, in]``, ``b`` is ``[out, r*E]``."""
    experts = shape[0]
    first = a.reshape(experts, -1, a.shape[1])
    second = b.reshape(b.shape[0], -1, experts)
    delta = scale * torch.einsum("ore,eri->eoi", second, first)
    return delta if delta.shape == shape else delta.transpose(1, 2)

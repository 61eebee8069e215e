"""transformers' own MoE blocks at published sizes, with random weights, and inputs for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from .reference import clear_choices

ROTATION = 4
# Three times the spacing of bf16 numbers from 2 to 4, where these routers' K-th logits lie.
LOGIT_MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block's class and size: hidden H, intermediate I, experts E, chosen K."""

    build: Callable[[Any], Any]
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    normalise: bool

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass."""
        routed = 6 * tokens * self.top_k * self.hidden * self.intermediate
        return routed + 2 * tokens * self.hidden * self.experts


def olmoe(shape: Shape) -> Any:
    """OLMoE's block."""
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalise,
    )
    config._experts_implementation = "eager"
    return OlmoeSparseMoeBlock(config)


def qwen3(shape: Shape) -> Any:
    """Qwen3-MoE's block."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalise,
    )
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config)


def mixtral(shape: Shape) -> Any:
    """Mixtral's block."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


SHAPES = {
    "olmoe": Shape(olmoe, 2048, 1024, 64, 8, normalise=False),
    "qwen3-30b-a3b": Shape(qwen3, 2048, 768, 128, 8, normalise=True),
    "mixtral-8x7b": Shape(mixtral, 4096, 14336, 8, 2, normalise=True),
    # For a look at the script itself, on any machine; left out unless asked for.
    "tiny": Shape(olmoe, 64, 32, 8, 2, normalise=False),
}
DEFAULT_SHAPES = ("olmoe", "qwen3-30b-a3b", "mixtral-8x7b")


def random_block(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """A block whose activations and logits are of order one."""
    with torch.device(device):
        block = shape.build(shape).to(dtype)
    torch.nn.init.normal_(block.gate.weight, std=1.5 * shape.hidden**-0.5)
    torch.nn.init.normal_(block.experts.gate_up_proj, std=shape.hidden**-0.5)
    torch.nn.init.normal_(block.experts.down_proj, std=shape.intermediate**-0.5)
    return block


def random_inputs(block: Any, shape: Shape, tokens: int) -> list[Tensor]:
    """ROTATION inputs [1, T, H] on which every correct implementation routes alike."""
    wanted = tokens * ROTATION
    found: list[Tensor] = []
    like = block.gate.weight
    while sum(map(len, found)) < wanted:
        candidates = torch.randn(tokens, shape.hidden, device=like.device, dtype=like.dtype)
        found.append(clear_choices(like.detach(), candidates, shape.top_k, LOGIT_MARGIN))
    return list(torch.cat(found)[:wanted].view(ROTATION, 1, tokens, shape.hidden))

"""SonicMoE's kernels on the weights of one of transformers' blocks, to be measured beside moec.

It needs the package sonic-moe on a Hopper GPU. Its first call at a shape compiles and tunes for a
minute or two. It wants the rows of gate and up to alternate, so it has a weight of its own for
them; the gradient of that weight is put back in order only to be checked.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from .reference import relative_error

PACKAGES = ("sonic-moe", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")
TOLERANCE = 0.02  # of two results in bf16, in norm


def is_installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("sonicmoe") is not None


def alternated(gate_up: Tensor) -> Tensor:
    """Experts' matrices [E, 2I, H], gate before up, with their rows in turns."""
    experts, rows, hidden = gate_up.shape
    return gate_up.view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(gate_up.shape)


def in_order(gate_up: Tensor) -> Tensor:
    """The inverse of :func:`alternated`."""
    experts, rows, hidden = gate_up.shape
    return gate_up.view(experts, rows // 2, 2, hidden).transpose(1, 2).reshape(gate_up.shape)


class SonicMoE(nn.Module):
    """The block's router and experts by SonicMoE: a softmax over all experts before the choice."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        # its first call takes for granted that CUDA is in use
        torch.zeros(1, device=block.gate.weight.device)
        from sonicmoe import moe_TC_softmax_topk_layer
        from sonicmoe.enums import ActivationType

        self.layer, self.activation = moe_TC_softmax_topk_layer, ActivationType.SWIGLU
        self.top_k = int(block.gate.top_k)
        self.gate = block.gate.weight
        self.gate_up = nn.Parameter(alternated(block.experts.gate_up_proj.detach()))
        self.down = block.experts.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output [1, T, H]."""
        output: Tensor = self.layer(
            hidden.view(-1, hidden.shape[-1]),
            self.gate,
            self.gate_up.permute(1, 2, 0),
            None,
            self.down.permute(1, 2, 0),
            None,
            self.top_k,
            torch.cuda.current_stream().cuda_stream,
            self.activation,
            is_softmax_over_topk=False,
        )[0]
        return output.view(hidden.shape)


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise if another implementation's output or gradients, by name, are others than expected.

    Raises:
        ValueError: it names what differs, and by how much.
    """
    for name, value in expected.items():
        error = relative_error(actual[name], value.double())
        if not error <= TOLERANCE:  # a NaN is refused too
            raise ValueError(f"{name} differs from grouped_mm's by {error:.1e} in norm")

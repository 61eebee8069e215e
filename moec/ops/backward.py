"""PyTorch's own backward kernels as one op: for gradients that must round as autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.ir.opdef import defop
from moec.ir.types import Type
from moec.ops.shapes import require

aten = torch.ops.aten


def softmax(g: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """Of the gradient and the result."""
    return aten._softmax_backward_data(g, y, dim, y.dtype)


def log_sigmoid(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of the gradient and the argument; the forward kernel makes what the backward one needs."""
    _, buffer = aten.log_sigmoid_forward(x)
    return aten.log_sigmoid_backward(g, x, buffer)


def gelu(g: torch.Tensor, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Of the gradient and the argument."""
    return aten.gelu_backward(g, x, approximate=approximate)


def softplus(
    g: torch.Tensor, x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0
) -> torch.Tensor:
    """Of the gradient and the argument."""
    return aten.softplus_backward(g, x, beta, threshold)


# of the gradient, and of the argument or the result of the function
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax,
    "sigmoid": aten.sigmoid_backward,
    "tanh": aten.tanh_backward,
    "silu": aten.silu_backward,
    "log_sigmoid": log_sigmoid,
    "gelu": gelu,
    "softplus": softplus,
}


def backward(g: torch.Tensor, saved: torch.Tensor, of: str, **options: Any) -> torch.Tensor:
    """The gradient with respect to the argument of the function ``of``."""
    return KERNELS[of](g.contiguous(), saved.contiguous(), **options)


@defop("t.backward")
class Backward:
    """The gradient through the function ``of`` by PyTorch's own kernel, from the gradient of its
    result and what it saved: its argument or its result. Other attributes are the function's own.
    """

    def infer(
        g: Type,
        saved: Type,
        *,
        of: str,
        dim: int | None = None,
        approximate: str | None = None,
        beta: float | None = None,
        threshold: float | None = None,
    ) -> Type:
        require(of in KERNELS, f"no backward kernel of {of!r}; there are {', '.join(KERNELS)}")
        require(g == saved, f"the gradient {g} and what was saved, {saved}, differ")
        return g

    def eval(g: torch.Tensor, saved: torch.Tensor, *, of: str, **options: Any) -> torch.Tensor:
        return backward(g, saved, of, **options)

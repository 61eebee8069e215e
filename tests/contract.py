"""A small block whose experts have stacked weights and the experts contract, to build tests on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INNER, EXPERTS = 16, 8, 4


class Experts(nn.Module):
    """Two products an expert; called with tokens, indices and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)

    def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in idx.unique():  # type: ignore[no-untyped-call]
            token, place = torch.where(idx == number)
            inner = F.silu(F.linear(x[token], self.up[number]))
            rows = F.linear(inner, self.down[number]) * w[token, place, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class Block(nn.Module):
    """Softmax, then the two best experts of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Experts()

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices ``[T, K]`` of tokens ``[.., H]``."""
        weights, chosen = self.gate(x.reshape(-1, HIDDEN)).softmax(-1).topk(2)
        return weights, chosen

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.route(x)
        return self.experts(x.reshape(-1, HIDDEN), chosen, weights).view(x.shape)


def outputs_and_gradients(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a call's result, and the gradients of parameters and arguments by name."""
    module.zero_grad(set_to_none=True)
    leaves = {f"argument {i}": _leaf(a) for i, a in enumerate(args)}
    leaves |= {k: _leaf(a) for k, a in kwargs.items()}
    positional = [leaves[f"argument {i}"] for i in range(len(args))]
    result = module(*positional, **{k: leaves[k] for k in kwargs})
    found = result if isinstance(result, tuple | list) else [result]
    tensors = [t for t in found if isinstance(t, torch.Tensor)]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in tensors]
    loss = torch.stack([(t * w).sum() for t, w in zip(tensors, weights, strict=True)]).sum()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    arguments = {
        n: a.grad for n, a in leaves.items() if isinstance(a, torch.Tensor) and a.grad is not None
    }
    return tensors, {**parameters, **arguments}


def _leaf(value: Any) -> Any:
    """A tensor that collects a gradient, if it is one of floats."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().clone().requires_grad_()


def assert_same(module: nn.Module, compiled: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Both give the same results and gradients for a call."""
    expected, expected_gradients = outputs_and_gradients(module, *args, **kwargs)
    expected_gradients = {n: g.clone() for n, g in expected_gradients.items()}
    actual, actual_gradients = outputs_and_gradients(compiled, *args, **kwargs)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    nonzero = {n for n, g in expected_gradients.items() if g.any()}
    assert nonzero <= actual_gradients.keys()
    for name, gradient in actual_gradients.items():
        wanted = expected_gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, msg=f"gradient of {name}")

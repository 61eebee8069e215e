"""Blocks whose experts disagree, share storage or are otherwise not what one expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HIDDEN = 8
EXPERTS = 4


class Expert(nn.Module):
    """Two products with an activation between."""

    def __init__(
        self,
        inner: int = 12,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.silu,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, inner, bias=bias)
        self.down = nn.Linear(inner, HIDDEN, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.activation(self.up(x)))


class Loop(nn.Module):
    """A block that loops over a list of experts."""

    def __init__(self, experts: list[nn.Module] | None = None, choices: int = 2) -> None:
        super().__init__()
        made = [Expert() for _ in range(EXPERTS)] if experts is None else experts
        self.router = nn.Linear(HIDDEN, max(len(made), 1), bias=False)
        self.experts = nn.ModuleList(made)
        self.choices = choices

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


class Stacked(nn.Module):
    """Experts with stacked weights, called with tokens, indices and weights."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 6, experts: int = EXPERTS) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * 0.3)

    def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> Any:
        out = torch.zeros_like(x)
        for number in range(self.gate_up.shape[0]):
            token, place = torch.where(idx == number)
            if token.numel() == 0:
                continue
            gate, up = functional.linear(x[token], self.gate_up[number]).chunk(2, -1)
            rows = functional.linear(functional.silu(gate) * up, self.down[number])
            out.index_add_(0, token, rows * w[token, place, None])
        return out


class Block(nn.Module):
    """A router and stacked experts."""

    def __init__(self, experts: nn.Module | None = None, choices: int = 2) -> None:
        super().__init__()
        self.experts = Stacked() if experts is None else experts
        first = next(self.experts.parameters())
        self.router = nn.Linear(int(first.shape[-1]), int(first.shape[0]), bias=False)
        self.choices = choices

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        w, idx = self.router(flat).softmax(-1).topk(self.choices)
        return self.experts(flat, idx, w).view(x.shape)

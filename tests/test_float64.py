"""Models in float64: as exact as float64, where the router works in float32, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.api import regions
from moec.exact_gradients import has_smaller_floats
from tests.contract import HIDDEN, Block, outputs_and_gradients
from tests.models import build, gradients, relative_error, tokens

# In float64 without a float32 part (gpt_oss) and with one; grouped_mm does not take float64.
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_family_has_float64s_accuracy(family: str, implementation: str) -> None:
    model = build(family).double()
    other = build(family, experts_implementation=implementation).double()
    compiled = moec.compile(other)
    assert {r.status for r in regions(compiled)} == {"compiled"}
    for length in (1, 2, 17):
        expected, wanted = gradients(model, tokens(2, length))
        wanted = {n: g.clone() for n, g in wanted.items()}
        actual, found = gradients(compiled, tokens(2, length))
        assert relative_error(actual.logits, expected.logits) <= 1e-12
        largest = max(g.abs().max().item() for g in wanted.values())
        for name, gradient in wanted.items():
            scale = max(gradient.abs().max().item(), 1e-3 * largest)
            error = (found[name] - gradient).abs().max().item() / scale
            assert error <= 1e-12, f"{name} at length {length}: {error:.1e}"


class Rounded(Block):
    """Scores by a function in float32, spread and normalised there."""

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.score = score
        self.scale = nn.Parameter(torch.rand(1) + 0.5)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(x.reshape(-1, HIDDEN)).float()
        weights, chosen = self.score(logits).topk(3)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return (weights * 1.7 * self.scale.float()).to(x.dtype), chosen


def _normed(x: torch.Tensor) -> torch.Tensor:
    """As a router that begins with a norm."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).softmax(-1)


SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    "logsumexp": lambda x: (
        torch.nn.functional.logsigmoid(x) - x.logsumexp(-1, keepdim=True)
    ).exp(),
    "tanh": lambda x: x.tanh() + 2,
    "normed": _normed,
    "gelu": lambda x: torch.nn.functional.gelu(x) + 2,
    "silu": lambda x: torch.nn.functional.silu(x) + 2,
}


@pytest.mark.parametrize("name", SCORES)
def test_float32_scores_round_as_in_eager(name: str) -> None:
    block = Rounded(SCORES[name]).double()
    compiled = moec.compile(block)
    (region,) = regions(compiled)
    assert region.status == "compiled"
    assert region.first is not None
    assert region.first.graph is not None
    assert has_smaller_floats(region.first.graph)
    for size in ((1, 1), (2, 7), (1, 33)):
        x = torch.randn(*size, HIDDEN, dtype=torch.float64)
        expected, wanted = outputs_and_gradients(block, x)
        wanted = {n: g.clone() for n, g in wanted.items()}
        actual, found = outputs_and_gradients(compiled, x)
        assert relative_error(actual[0], expected[0]) <= 1e-14
        for key, gradient in wanted.items():
            assert relative_error(found[key], gradient) <= 1e-13, key


class Broken(Block):
    """Its own code fails on some sizes."""

    def forward(self, x: torch.Tensor) -> Any:
        if x.numel() > 20 * HIDDEN:
            raise ValueError("too long for this block")
        return super().forward(x)


def test_a_block_whose_own_code_fails_is_reported_not_raised() -> None:
    found = moec.explain(Broken()).regions[0]
    assert found.status == "experts only"
    assert "too long for this block" in found.reason or "works only where" in found.reason


def test_a_model_that_stays_in_float64_equals_one_that_went_there() -> None:
    block = Block()
    compiled = moec.compile(copy.deepcopy(block)).double()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), block.double()(x), rtol=1e-13, atol=1e-13)

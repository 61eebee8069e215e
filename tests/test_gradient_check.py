"""Blocks whose gradients are not those of their operations are not compiled as if they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.api import regions
from tests.contract import HIDDEN, Block, Experts, assert_same


class Threefold(torch.autograd.Function):
    """The same number with three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 3


class Detached(Block):
    """The router learns nothing from the result."""

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = super().route(x)
        return weights.detach(), chosen


class WithoutGradients(Block):
    """Routes without gradients."""

    @torch.no_grad()
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().route(x)


class Straight(Block):
    """A gradient of the block's own making."""

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = super().route(x)
        return Threefold.apply(weights), chosen  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", [Detached, WithoutGradients, Straight])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_blocks_own_making_are_kept(kind: type[Block], training: bool) -> None:
    block = kind().train(training)
    compiled = moec.compile(block)
    (region,) = regions(compiled)
    assert region.status == "experts only"
    assert "the gradient of" in region.reason
    assert_same(block, compiled, torch.randn(2, 3, HIDDEN))


class ChosenWithoutGradients(Block):
    """Only the choice is made without gradients, which has none in any case."""

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.gate(x.reshape(-1, HIDDEN)).sigmoid()
        with torch.no_grad():
            chosen = (scores.detach() + 0.1).topk(2).indices
        return scores.gather(1, chosen), chosen


def test_a_choice_without_gradients_is_compiled() -> None:
    block = ChosenWithoutGradients()
    compiled = moec.compile(block)
    assert regions(compiled)[0].status == "compiled"
    assert_same(block, compiled, torch.randn(2, 3, HIDDEN))


class StraightExperts(Experts):
    """The experts' own gradient is another one."""

    def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return super().forward(Threefold.apply(x), idx, w)  # type: ignore[no-untyped-call]


def test_experts_with_a_gradient_of_their_own_are_left_alone() -> None:
    block = Block()
    block.experts = StraightExperts()
    with pytest.warns(UserWarning, match="stays as it was"):
        compiled = moec.compile(block)
    assert regions(compiled)[0].status == "left as it was"
    assert_same(block, compiled, torch.randn(2, 3, HIDDEN))

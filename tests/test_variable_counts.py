"""Numbers that follow from data: one artifact serves every number of tokens, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.api import regions
from moec.manager import PassManager
from moec.pipeline import RAISE
from tests.styles_variable import HIDDEN, STYLES, ChoiceMajor, Listed, MarginMask, SwitchKept

SHAPES = ((2, 7), (1, 1), (1, 2), (3, 5), (1, 16), (1, 17), (5, 13), (1, 257), (2, 601))
FLAT = pytest.mark.parametrize("style", STYLES, ids=lambda s: s.__name__)


def values(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = net(x)
    loss = (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum()
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [out, *found]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        scale = max(1.0, other.detach().abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12 * scale)


@FLAT
def test_one_artifact_for_every_number_of_tokens(style: Any) -> None:
    net = style().double()
    compiled = moec.compile(net)
    (region,) = regions(compiled)
    assert (region.status, region.reason) == ("compiled", "")
    for shape in SHAPES:
        x = torch.randn(*shape, HIDDEN, dtype=torch.float64) * 2
        assert_close(values(compiled, x), values(net, x))
    with torch.no_grad():
        assert compiled(torch.zeros(2, 0, HIDDEN, dtype=torch.float64)).shape == (2, 0, HIDDEN)
        ties = torch.zeros(1, 33, HIDDEN, dtype=torch.float64)
        assert_close([compiled(ties)], [net(ties)])
        one = torch.randn(HIDDEN, dtype=torch.float64).expand(3, 30, HIDDEN).contiguous()
        assert_close([compiled(one)], [net(one)])
    assert len(region.session.captures) == 1
    assert len(region.session.artifacts) == 2, "training and inference"
    raised = PassManager(RAISE).run(region.history[0][1])
    kinds = {op.kind for op in raised.ops}
    marks = {"moe.select", "moe.limit", "moe.dispatch_picks", "t.sort", "t.index_add"}
    assert STYLES[style] <= kinds and (marks & kinds) <= STYLES[style] | {"moe.select"}
    assert ("moe.dispatch" in kinds) == (not STYLES[style] & {*marks, "t.scatter_add"} - _ROUTED)


_ROUTED = {"moe.select", "moe.limit", "t.sort"}


class OtherCapacity(Listed):
    """The capacity of a small number of tokens is computed in another way."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = flat.shape[0] // 4 if flat.shape[0] > 1000 else flat.shape[0] // 2
        return _switch(self, flat, capacity).view(x.shape)


class OddFactor(Listed):
    """A factor that floating-point numbers only approximate."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        return _switch(self, flat, int(1.1 * flat.shape[0] / 4)).view(x.shape)


def _switch(block: Listed, flat: torch.Tensor, capacity: int) -> torch.Tensor:
    weight, chosen = block.gate(flat).softmax(-1).max(-1)
    mask = nn.functional.one_hot(chosen, 4)
    kept = (mask.cumsum(0) * mask).sum(-1) <= capacity
    out = torch.zeros_like(flat)
    for number, expert in enumerate(block.experts):
        token = torch.where((chosen == number) & kept)[0]
        out[token] = expert(flat[token]) * weight[token, None]
    return out


@pytest.mark.parametrize(
    ("block", "reason"),
    [(OtherCapacity, "depends on the number of tokens"), (OddFactor, "floating-point rounding")],
)
def test_what_no_expression_of_the_sizes_tells_is_left_alone(block: Any, reason: str) -> None:
    net = block()
    with pytest.warns(UserWarning, match=reason):
        compiled = moec.compile(net)
    x = torch.randn(2, 700, HIDDEN)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("style", [MarginMask, SwitchKept, ChoiceMajor])
def test_sizes_of_the_block_are_not_taken_for_numbers_of_tokens(style: Any) -> None:
    """Experts, or choices, as many as the first recording has tokens in an axis."""
    net = style().double()
    net.gate = nn.Linear(HIDDEN, 4, bias=False).double()
    net.choices, net.other = min(net.choices, 3), 21
    compiled = moec.compile(net)
    assert [r.status for r in regions(compiled)] == ["compiled"]
    x = torch.randn(3, 50, HIDDEN, dtype=torch.float64)
    assert_close(values(compiled, x), values(net, x))

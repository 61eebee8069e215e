"""User-written blocks that mix, pick or dispatch without a loop over chosen experts: compiled, once
for every number of tokens, and equal to eager forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import moec
from moec.api import regions
from tests.styles_dense import EXPERTS, HIDDEN, STYLES, ByTask, HeadWeights, IntCapacity, Shared

SHAPES = ((2, 7), (1, 1), (3, 40), (1, 2), (1, 33), (4, 4), (0, 3))


class Net(nn.Module):
    """A block between two layers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(HIDDEN, HIDDEN), block

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        return self.block(self.before(x), *others)


def assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    pairs = zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = float(theirs.detach().norm()) if theirs.numel() else 0.0
        assert float((ours - theirs).detach().norm()) <= tolerance * max(scale, 1e-6)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or ``None`` if it fails."""
    try:
        return call()
    except (RuntimeError, IndexError, ZeroDivisionError):
        return None


def assert_same_function(net: nn.Module, compiled: nn.Module, arguments: Any, tol: float) -> None:
    """Values and the gradient of everything are those of ``net``."""
    x, *others = arguments
    results = []
    for one in (net, compiled):
        one.zero_grad(set_to_none=True)
        own = x.clone().requires_grad_()
        out = outcome(lambda one=one, own=own: one(own, *others))  # type: ignore[misc]
        if out is None:
            assert one is net  # the compiled form need not fail where eager does
            return
        leaves = tree_flatten(out)[0]
        sum(((t * torch.cos(t.detach() + 1)).sum() for t in leaves), torch.zeros(())).backward()
        grads: dict[str, Any] = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        results.append((out, own.grad, {n: g.clone() for n, g in grads.items() if g is not None}))
    (out, dx, grads), (ours, ours_dx, ours_grads) = results
    assert_equal(ours, out, tol)
    assert_equal(ours_dx, dx, 5 * tol)
    for name, grad in grads.items():
        assert_equal(ours_grads[name], grad, 5 * tol)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.__name__)
def test_compiled_once_and_equal_to_eager(style: type[nn.Module]) -> None:
    torch.manual_seed(3)
    net = Net(style())
    compiled = moec.compile(copy.deepcopy(net))
    (region,) = regions(compiled)
    assert region.status == "compiled", region.reason
    for seed, shape in enumerate(SHAPES):
        torch.manual_seed(seed)
        assert_same_function(net, compiled, (torch.randn(*shape, HIDDEN),), 1e-5)
    net.eval(), compiled.eval()
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(*shape, HIDDEN)
            expected = outcome(lambda x=x: net(x))  # type: ignore[misc]
            if expected is not None:
                assert_equal(compiled(x), expected, 1e-5)
    assert len(region.artifacts) == 2  # training and inference, for all shapes


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.__name__)
def test_equal_in_float64(style: type[nn.Module]) -> None:
    if style.__name__ == "GShardTopTwo":
        pytest.skip("computes its weights in float32 and mixes them with float64 tokens")
    torch.manual_seed(4)
    net = Net(style()).double()
    compiled = moec.compile(copy.deepcopy(net))
    assert [r.status for r in regions(compiled)] == ["compiled"]
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    assert_same_function(net, compiled, (x,), 1e-12)


def test_an_argument_may_name_the_expert() -> None:
    torch.manual_seed(5)
    net = Net(ByTask())
    compiled = moec.compile(copy.deepcopy(net))
    (region,) = regions(compiled)
    assert region.status == "compiled", region.reason
    for batch, length in ((2, 7), (1, 1), (5, 3), (4, 4)):
        task = torch.randint(EXPERTS, (batch,))
        x = torch.randn(batch, length, HIDDEN)
        assert_same_function(net, compiled, (x, task), 1e-5)
    assert len(region.artifacts) == 1


def test_int_of_a_share_of_the_tokens_stays_open() -> None:
    torch.manual_seed(6)
    net = Net(IntCapacity(1.25))
    compiled = moec.compile(copy.deepcopy(net))
    (region,) = regions(compiled)
    assert region.status == "compiled", region.reason
    for shape in ((2, 7), (1, 3), (3, 40)):
        assert_same_function(net, compiled, (torch.randn(*shape, HIDDEN),), 1e-5)


def test_a_share_that_rounding_decides_is_left_alone() -> None:
    net = Net(IntCapacity(1.1))
    with pytest.warns(UserWarning, match=r"IntCapacity.* stays as it was: .*rounding decides"):
        compiled = moec.compile(copy.deepcopy(net))
    x = torch.randn(2, 9, HIDDEN)
    assert_equal(compiled(x), net(x), 1e-6)


def test_experts_called_with_rows_and_their_numbers_are_compiled() -> None:
    torch.manual_seed(7)
    net = Net(Shared())
    compiled = moec.compile(copy.deepcopy(net))
    found = regions(compiled)
    assert [r.name for r in found] == ["block.first", "block.last"]
    assert {r.status for r in found} == {"compiled"}
    for shape in ((2, 7), (1, 1), (3, 40)):
        assert_same_function(net, compiled, (torch.randn(*shape, HIDDEN),), 1e-5)
    assert [len(r.artifacts) for r in found] == [1, 1]


def test_weights_by_head_are_no_experts() -> None:
    net = Net(HeadWeights())
    with pytest.warns(UserWarning, match="found no MoE block"):
        compiled = moec.compile(net)
    assert not regions(compiled)

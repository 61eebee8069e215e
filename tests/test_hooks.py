"""Hooks on a block and inside it see what they see in eager, and compiled code returns without
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

import moec
from moec.api import regions
from tests.contract import HIDDEN, Block, Experts, assert_same, outputs_and_gradients

PLACES = ("", "gate", "experts")
Register = Callable[[nn.Module, list[torch.Tensor]], RemovableHandle]


def _tensors(*values: Any) -> list[torch.Tensor]:
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return [v.detach().clone() for v in flat if isinstance(v, torch.Tensor)]


def _forward(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
    return module.register_forward_hook(lambda m, i, o: seen.extend(_tensors(i, o)))


def _pre(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda m, i: seen.extend(_tensors(i)))


def _changing(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
    """A hook that puts another result in place."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.extend(_tensors(inputs, output))
        return output * 0.5

    return module.register_forward_hook(hook)


def _backward(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
    return module.register_full_backward_hook(lambda m, i, o: seen.extend(_tensors(i, o)))


def _pre_backward(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
    return module.register_full_backward_pre_hook(lambda m, o: seen.extend(_tensors(o)))


KINDS = (_forward, _pre, _changing, _backward, _pre_backward)


@contextmanager
def own_code() -> Iterator[list[int]]:
    """Counts the runs of the block's own router while the context lasts."""
    runs: list[int] = []
    route = Block.route

    def counted(self: Block, x: torch.Tensor) -> Any:
        runs.append(1)
        return route(self, x)

    with patch.object(Block, "route", counted):
        yield runs


def _same_with_hook(block: Block, compiled: nn.Module, place: str, kind: Register) -> None:
    x = torch.randn(2, 3, HIDDEN)
    records: list[list[torch.Tensor]] = []
    found = []
    for module in (block, compiled):
        seen: list[torch.Tensor] = []
        handle = kind(module.get_submodule(place), seen)
        outputs, gradients = outputs_and_gradients(module, x)
        found.append((outputs, {n: g.clone() for n, g in gradients.items()}))
        handle.remove()
        records.append(seen)
    assert len(records[0]) == len(records[1]) > 0
    for ours, theirs in zip(records[1], records[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_and_change_what_they_do_in_eager(place: str, kind: Register) -> None:
    block = Block()
    compiled = moec.compile(block)
    _same_with_hook(block, compiled, place, kind)
    with own_code() as runs:
        compiled(torch.randn(2, 3, HIDDEN))
    assert not runs  # the hook is gone: compiled again
    assert regions(compiled)[0].status == "compiled"


@pytest.mark.parametrize("place", PLACES)
def test_hooks_from_before_compile_go_on_hearing(place: str) -> None:
    block = Block()
    seen: list[torch.Tensor] = []
    _forward(block.get_submodule(place), seen)
    compiled = moec.compile(block)
    assert not seen  # not from trial runs
    x = torch.randn(2, 3, HIDDEN)
    compiled(x)
    ours = list(seen)
    seen.clear()
    block(x)
    torch.testing.assert_close(ours, seen)
    assert ours


def test_only_a_hook_inside_stops_the_compiled_router() -> None:
    compiled = moec.compile(Block())
    x = torch.randn(2, 3, HIDDEN)
    for place, expected in (("", 0), ("gate", 1), ("experts", 1)):
        handle = _forward(compiled.get_submodule(place), [])
        with own_code() as runs:
            compiled(x)
        assert len(runs) == expected, place
        handle.remove()


def test_a_hook_on_every_module_sees_those_inside() -> None:
    block = Block()
    compiled = moec.compile(block)
    x = torch.randn(2, 3, HIDDEN)
    kinds: list[str] = []
    with register_module_forward_hook(lambda m, i, o: kinds.append(type(m).__name__)):
        compiled(x)
    assert sorted(kinds) == ["Block", "Experts", "Linear"]


class Biased(Block):
    """Chooses by scores plus a bias that balances the experts' load."""

    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(4))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.gate(x.reshape(-1, HIDDEN)).sigmoid()
        chosen = (scores + self.bias).topk(2).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen


def test_a_balancing_bias_is_read_at_every_call() -> None:
    block = Biased().train()
    compiled = moec.compile(block)
    x = torch.randn(2, 9, HIDDEN)
    before = compiled(x)
    block.bias.add_(torch.tensor([3.0, -3.0, 0.0, 2.0]))  # in place
    assert_same(block, compiled, x)
    assert not torch.equal(compiled(x), before)
    block.bias = torch.tensor([-3.0, 3.0, 1.0, -2.0])  # another tensor
    assert_same(block, compiled, x)
    compiled.get_buffer("bias").zero_()
    torch.testing.assert_close(compiled(x), before)
    assert regions(compiled)[0].status == "compiled"


class Counting(Biased):
    """Updates the bias in its own forward, by the load that it saw."""

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.route(x)
        if self.training:
            load = torch.zeros(4).scatter_add_(0, chosen.reshape(-1), torch.ones(chosen.numel()))
            self.bias += 0.5 * (load.mean() - load).sign()
        return self.experts(x.reshape(-1, HIDDEN), chosen, weights).view(x.shape)


def test_a_bias_that_forward_updates_is_updated() -> None:
    block, other = Counting(), Counting()
    other.load_state_dict(block.state_dict())
    compiled = moec.compile(other.train())
    for _ in range(4):
        x = torch.randn(2, 9, HIDDEN)
        torch.testing.assert_close(compiled(x), block.train()(x))
        assert torch.equal(block.bias, other.bias)
        assert torch.equal(block.bias, compiled.get_buffer("bias"))
    block.eval()
    compiled.eval()
    assert_same(block, compiled, torch.randn(2, 9, HIDDEN))
    assert regions(compiled)[0].status == "compiled"


class Noisy(Block):
    """Adds noise to the router's scores and scales its input at random while it trains."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> Any:
        if self.training and self.in_place:
            x *= torch.empty_like(x).uniform_(0.9, 1.1)
        elif self.training:
            x = x * torch.empty_like(x).uniform_(0.9, 1.1)
        return super().forward(x)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(x.reshape(-1, HIDDEN))
        if self.training:
            logits = logits + torch.randn_like(logits)
        weights, chosen = logits.softmax(-1).topk(2)
        return weights, chosen


@pytest.mark.parametrize("in_place", [False, True])
def test_noise_in_training_is_the_same_under_the_same_seed(in_place: bool) -> None:
    block = Noisy(in_place).train()
    compiled = moec.compile(block)
    (region,) = regions(compiled)
    assert region.status == "experts only"
    assert ("in place" if in_place else "draws random numbers") in region.reason
    x = torch.randn(2, 9, HIDDEN)
    found = []
    for module in (block, compiled, compiled):
        module.zero_grad()
        torch.manual_seed(5)
        tokens = x.clone().requires_grad_()
        module(tokens * 1).square().sum().backward()
        after = torch.rand(3)  # the generator is where it would be
        found.append([tokens.grad, after, *(p.grad for p in block.parameters())])
        found[-1] = [t.clone() for t in found[-1] if t is not None]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    block.eval()
    compiled.eval()
    assert_same(block, compiled, x)
    assert region.status == "compiled"
    assert isinstance(compiled.get_submodule("experts"), Experts)

"""A call like the one before goes a short way; any change of what it rests on, the long one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import moec
from moec.errors import CallError
from moec.steady import Steady


def block() -> Any:
    """A small block of transformers' own."""
    config = OlmoeConfig(hidden_size=32, intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    made = OlmoeSparseMoeBlock(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call that is served the short way."""
    served: list[int] = []
    serve = Steady.serve

    def counting(self: Steady, x: torch.Tensor) -> Any:
        served.append(1)
        return serve(self, x)

    monkeypatch.setattr(Steady, "serve", counting)
    return served


def test_equal_calls_take_the_short_way_at_every_length(counted: list[int]) -> None:
    own = block()
    compiled = moec.compile(copy.deepcopy(own))
    with torch.no_grad():
        compiled(torch.randn(2, 5, 32))
        assert not counted
        for shape in ((2, 5, 32), (1, 1, 32), (4, 0, 32), (1, 70, 32)):
            x = torch.randn(*shape)
            torch.testing.assert_close(compiled(x), own(x))
    assert len(counted) == 4


def set_top_k(module: Any) -> None:
    module.gate.top_k = 1


def other_data(module: Any) -> None:
    module.gate.weight.data = module.gate.weight.data.flip(0)


def other_parameter(module: Any) -> None:
    module.gate.weight = nn.Parameter(module.gate.weight.detach().flip(0))


def to_double(module: Any) -> None:
    module.double()


def add_hook(module: Any) -> None:
    module.gate.register_forward_hook(lambda m, i, o: (o[0], o[1] * 2, o[2]))


def in_place(module: Any) -> None:
    with torch.no_grad():
        module.experts.down_proj.mul_(2)


CHANGES: list[Callable[[Any], None]] = [
    set_top_k,
    other_data,
    other_parameter,
    to_double,
    add_hook,
    in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_is_seen(change: Callable[[Any], None]) -> None:
    own = block()
    compiled = moec.compile(copy.deepcopy(own))
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        change(own)
        change(compiled)
        x = x.to(own.gate.weight.dtype)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), own(x))


def test_gradients_and_autocast_have_ways_of_their_own() -> None:
    own = block()
    compiled = moec.compile(copy.deepcopy(own))
    x = torch.randn(2, 3, 32)
    for _ in range(3):
        with torch.no_grad():
            assert not compiled(x).requires_grad
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert compiled(x).dtype == own(x).dtype
        y = compiled(x)
        assert y.requires_grad
        y.sum().backward()
    own(x).sum().backward()
    torch.testing.assert_close(compiled.gate.weight.grad, 3 * own.gate.weight.grad)
    compiled.requires_grad_(False)
    assert not compiled(x).requires_grad


def test_a_wrong_width_is_refused_the_short_way_too() -> None:
    compiled = moec.compile(block())
    with torch.no_grad():
        compiled(torch.randn(2, 3, 32))
        with pytest.raises(CallError, match=r"got shape \(6, 31\)"):
            compiled(torch.randn(2, 3, 31))

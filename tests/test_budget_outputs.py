"""Planned steps whose gradients come from the loss, though the model returns more than that."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.budget.capture import captured_step
from moec.errors import CompileError

from .models import assert_equal_gradients, build, tokens
from .test_budget import measured_peak, planned, step_of, unplanned_peak

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:moec. found no MoE block"),
]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Each makes a scalar of a model's loss and logits
LOSSES: dict[str, Loss] = {
    "the loss": lambda loss, logits: loss,
    "both": lambda loss, logits: loss + logits.square().mean(),
    "logits alone": lambda loss, logits: logits.square().mean(),
}


class _Noisy(nn.Module):
    """A loss beside what it comes from, with dropout or without."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.second(nn.functional.dropout(self.first(x).relu(), self.dropout))
        return y.square().mean(), y


def gradients(model: nn.Module, batch: Any, loss: Loss) -> dict[str, torch.Tensor]:
    """What each parameter gets."""
    model.zero_grad()
    output = model(**batch)
    torch.autograd.backward(loss(*output[:2]))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("of", ["loss", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_whatever_they_come_from(name: str, of: str) -> None:
    model, batch = _Noisy(0.0), {"x": torch.randn(5, 8)}
    expected = gradients(model, batch, LOSSES[name])
    compiled = planned(model, "1TiB", gradients_of=of)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [gradients(compiled, batch, LOSSES[name]) for _ in range(2)]
    for actual in found:
        assert_equal_gradients(actual, expected)
    said = [w for w in caught if "gradients_of='all'" in str(w.message)]
    assert len(said) == (of == "loss" and name != "the loss")
    has_all = of == "all" or name != "the loss"  # the second time in any case
    assert step_of(compiled).is_repeatable == (not has_all)


def test_a_language_model_s_logits_have_their_gradient() -> None:
    model, batch = build("olmoe"), tokens(2, 9, padded=True)
    expected = gradients(model, batch, LOSSES["both"])
    with pytest.warns(UserWarning, match="outside the plan"):
        found = gradients(planned(model, "1TiB"), batch, LOSSES["both"])
    assert_equal_gradients(found, expected, 1e-4)


def test_no_gradient_of_the_logits_is_held() -> None:
    model, batch = build("olmoe"), tokens(3, 40)
    peaks, measured = {}, {}
    for of in ("all", "loss"):
        compiled = planned(model, "1TiB", gradients_of=of)
        gradients(compiled, batch, LOSSES["the loss"])
        peaks[of] = unplanned_peak(step_of(compiled))
        measured[of] = measured_peak(compiled, batch)
    logits = 3 * 40 * model.config.vocab_size * 4
    assert peaks["all"] - peaks["loss"] >= logits
    assert measured["all"] - measured["loss"] >= 0.9 * logits


def test_a_captured_step_has_the_gradient_of_the_loss_alone() -> None:
    compiled, batch = moec.compile(build("olmoe")), tokens(2, 9)
    (of_loss,) = captured_step(compiled, (), batch).tangents
    del batch["labels"]
    others = captured_step(compiled, (), batch).tangents  # of logits, keys and values
    assert of_loss.meta["val"].dim() == 0 and others
    assert all(node.meta["val"].dim() for node in others)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_that_draws_random_numbers_keeps_all_gradients(dropout: float) -> None:
    model, x = _Noisy(dropout), torch.randn(5, 8)
    assert len(captured_step(model, (x,), {}).tangents) == (2 if dropout else 1)
    compiled = planned(model, "1TiB")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if dropout else "ignore")
        loss, y = compiled(x)
        (loss + y.sum()).backward()
    # y = hidden @ w.t() + b, so that b's gradient needs nothing that was drawn but y
    expected = (2 * y / y.numel() + 1).sum(0)
    torch.testing.assert_close(compiled.second.bias.grad, expected)


def test_nobody_writes_to_what_the_backward_pass_reads() -> None:
    loss, y = planned(_Noisy(0.0), "1TiB")(torch.randn(5, 8))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_cut_off_has_its_gradient_under_autocast() -> None:
    model, x = _Noisy(0.0), torch.randn(5, 8)
    found = []
    for module in (model, planned(model, "1TiB")):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)[1]
        assert y.dtype == torch.bfloat16
        with contextlib.nullcontext() if module is model else pytest.warns(match="outside the"):
            found.append(torch.autograd.grad(y.sum(), list(model.parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_an_input_gets_the_gradient_of_what_was_cut_off() -> None:
    model, x = _Noisy(0.0), torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x)[1].sum(), x)
    with pytest.warns(UserWarning, match="outside the plan"):
        (found,) = torch.autograd.grad(planned(model, "1TiB")(x)[1].sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_option_is_checked() -> None:
    with pytest.raises(CompileError, match="'gradients_of' is 'loss' or 'all', got 'logits'"):
        planned(nn.Linear(2, 2), "1GiB", gradients_of="logits")

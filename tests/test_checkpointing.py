"""Activation checkpointing, autocast, hooks and inference mode around compiled blocks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils import checkpoint

import moec
from tests.models import assert_equal_gradients, build, gradients, pair, relative_error, tokens

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss"]


def hidden(result: Any) -> torch.Tensor:
    """The tokens among a block's results."""
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found


def assert_equal_steps(compiled: Any, model: Any, length: int = 7) -> None:
    """Logits and gradients of one step."""
    found, ours = gradients(compiled, tokens(2, length))
    wanted, theirs = gradients(model, tokens(2, length))
    assert relative_error(found.logits, wanted.logits) <= 1e-5
    assert_equal_gradients(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*use_cache.*", "ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_training_call_may_be_inside_a_checkpoint(family: str, reentrant: bool) -> None:
    model = build(family)
    compiled = moec.compile(model, strict=True)  # captured for evaluation, not for training
    for each in (model, compiled):
        each.train()
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for length in (7, 1, 12):
        assert_equal_steps(compiled, model, length)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_around_one_block(family: str, selective: bool) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        choices = checkpoint.CheckpointPolicy
        is_product = op is torch.ops.aten.mm.default
        return choices.MUST_SAVE if is_product else choices.PREFER_RECOMPUTE

    def step(model: Any) -> dict[str, Any]:
        block, settings = model.model.layers[1].mlp, dict[str, Any]()
        if selective:
            make = checkpoint.create_selective_checkpoint_contexts
            settings["context_fn"] = functools.partial(make, policy)
        tokens_ = x.clone().requires_grad_()
        result = checkpoint.checkpoint(block, tokens_, use_reentrant=False, **settings)
        hidden(result).square().sum().backward()  # type: ignore[no-untyped-call]
        found = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
        block.zero_grad(set_to_none=True)
        return {"x": tokens_.grad, "y": hidden(result), **found}

    x, model = torch.randn(2, 5, 32), build(family).train()
    assert_equal_gradients(step(moec.compile(model, strict=True)), step(model))


def test_what_is_captured_does_not_depend_on_where_the_first_call_is() -> None:
    model = build("olmoe")
    compiled = moec.compile(model, strict=True)
    for each in (model, compiled):
        each.train()
    with torch.inference_mode(), torch.device("meta"):
        compiled.model.layers[0].mlp(torch.randn(1, 3, 32, device="cpu"))
    assert_equal_steps(compiled, model)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_autocast_may_be_switched_between_calls(family: str) -> None:
    model, compiled = pair(family)
    x = torch.randn(2, 5, 32)
    for enabled in (False, True, False, True):
        found = []
        for each in (model, compiled):
            block = each.model.layers[1].mlp
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                y = hidden(block(x))
            y.float().square().sum().backward()  # type: ignore[no-untyped-call]
            found.append((y, block.experts.down_proj.grad))
            each.zero_grad(set_to_none=True)
        (expected, gradient), (actual, ours) = found
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) <= (2e-2 if enabled else 1e-5)
        assert relative_error(ours, gradient) <= (5e-2 if enabled else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_a_block_see_what_they_saw(family: str) -> None:
    def seen(model: Any) -> list[torch.Tensor]:
        noted: list[torch.Tensor] = []
        block = model.model.layers[1].mlp
        handles = [
            block.register_forward_pre_hook(lambda _, args: noted.append(args[0].detach())),
            block.register_forward_hook(lambda _, args, out: noted.append(hidden(out).detach())),
            block.register_full_backward_hook(lambda _, into, out: noted.append(into[0])),
        ]
        model(**tokens(2, 7)).loss.backward()
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return noted

    model, compiled = pair(family)
    expected = seen(model)
    assert len(expected) == 3
    for actual, wanted in zip(seen(compiled), expected, strict=True):
        assert relative_error(actual, wanted) <= 1e-5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any) -> None:
    model, compiled = pair("deepseek_v3")
    with context():
        found, expected = compiled(**tokens(2, 7)), model(**tokens(2, 7))
    assert relative_error(found.logits, expected.logits) <= 1e-5
    assert not found.logits.requires_grad
    assert_equal_steps(compiled, model)

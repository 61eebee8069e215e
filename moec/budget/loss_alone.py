"""Steps whose gradients come from a loss alone, though the model returns more than that.

A model of transformers returns its logits beside the loss. To a tracer both have gradients, so
that autograd would fill one of the size of the logits with zeros, and hold it through the backward
pass. Where a model returns a scalar, the other outputs are therefore cut off in the graph that is
planned. Should a gradient arrive at one of them nevertheless, it is computed by running the model's
code again: right, but slower and outside the plan, which a warning says, and later steps are
planned with gradients of all outputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Call = Callable[..., Sequence[Any]]


class DrawsRandomNumbers(Exception):
    """A step cannot be run again: it would draw other random numbers."""


def with_loss_alone(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """A tracer's graph whose outputs besides scalars have no gradient, and which those are: none,
    and the graph as it is, where no scalar is returned.
    """
    (end,) = module.graph.find_nodes(op="output")
    outputs = end.args[0]
    if not isinstance(outputs, (tuple, list)):
        return module, ()
    has_gradient = [i for i, node in enumerate(outputs) if _has_gradient(node)]
    cut = tuple(i for i in has_gradient if _value(outputs[i]).dim())
    if not cut or len(cut) == len(has_gradient):
        return module, ()
    made = copy.copy(module)
    made.graph = copy.deepcopy(module.graph)
    (end,) = made.graph.find_nodes(op="output")
    returned = list(end.args[0])
    with made.graph.inserting_before(end):
        for place in cut:
            node = returned[place]
            returned[place] = made.graph.call_method("detach", (node,))
            returned[place].meta["example_value"] = _value(node).detach()
    end.args = (type(outputs)(returned),)
    made.recompile()
    return made, cut


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _has_gradient(node: Any) -> bool:
    value = _value(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def with_other_gradients(
    run: Call, module: Call, cut: Sequence[int], wanted: Callable[[], None]
) -> Call:
    """``run``, the compiled form of what :func:`with_loss_alone` made of ``module``, with gradients
    for all outputs; ``wanted`` is called if there is one for those that were cut off.
    """

    def call(*inputs: Any) -> Sequence[Any]:
        outputs = list(run(*inputs))
        if torch.is_grad_enabled():
            others = [outputs[place] for place in cut]
            joined = _Others.apply(  # type: ignore[no-untyped-call]
                (module, tuple(cut), wanted), len(cut), *others, *inputs
            )
            for place, output in zip(cut, joined, strict=True):
                outputs[place] = output
        return outputs

    return call


def _is_plain(value: Any) -> bool:
    """Whether a value is a number; a tracer makes tensors of those that vary."""
    if not isinstance(value, torch.Tensor):
        return True
    return value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad


def _again(value: Any) -> Callable[[], Any]:
    """What makes a number once more, without a tensor to hold."""
    if not isinstance(value, torch.Tensor):
        return lambda: value
    return functools.partial(torch.tensor, value.item(), dtype=value.dtype)


def _autocast_on(device: str) -> dict[str, Any]:
    """The state of autocast at a call; the backward pass has one of its own."""
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


class _Others(torch.autograd.Function):
    """Outputs as they are; their gradients come from running the module that made them."""

    @staticmethod
    def forward(ctx: Any, about: Any, count: int, *values: Any) -> tuple[torch.Tensor, ...]:
        ctx.about = about
        ctx.set_materialize_grads(False)
        inputs = values[count:]
        ctx.save_for_backward(*(v for v in inputs if not _is_plain(v)))
        ctx.plain = [_again(v) if _is_plain(v) else None for v in inputs]
        ctx.wanted = [isinstance(v, torch.Tensor) and v.requires_grad for v in inputs]
        ctx.autocast = _autocast_on(values[0].device.type)
        # views: the backward pass may read the same memory, and must see that it was written to
        return tuple(v.detach() for v in values[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * (2 + len(gradients))
        given = [(place, g) for place, g in enumerate(gradients) if g is not None]
        if not given:
            return (*nothing, *(None for _ in ctx.wanted))
        module, cut, wanted_after_all = ctx.about
        wanted_after_all()
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved).detach().requires_grad_(wanted) if plain is None else plain()
            for plain, wanted in zip(ctx.plain, ctx.wanted, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = module(*inputs)
        leaves = [v for v, wanted in zip(inputs, ctx.wanted, strict=True) if wanted]
        found = iter(
            torch.autograd.grad(
                [outputs[cut[place]] for place, _ in given],
                leaves,
                [g for _, g in given],
                allow_unused=True,
            )
        )
        return (*nothing, *(next(found) if wanted else None for wanted in ctx.wanted))


__all__ = ["DrawsRandomNumbers", "with_loss_alone", "with_other_gradients"]

"""Comparing a captured region's gradients with those of the module that it was read from.

Equal results do not mean equal gradients: code may detach a value, compute without gradients, or
have an ``autograd.Function`` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moec.autodiff import differentiate
from moec.call_form import CallForm, graph_inputs
from moec.capture.reference import own_results
from moec.errors import CaptureError
from moec.interp import run
from moec.ir.graph import Graph

# Gradients of half-precision code differ by rounding alone; a missing path differs by all of it.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}
LARGEST = 2**20  # elements of a weight whose gradient is compared: stacks of experts would cost
FLOOR = 1e-3  # of the largest gradient: below it there is only rounding


def compare_gradients(
    module: nn.Module,
    graph: Graph,
    weights: Sequence[str],
    data: Sequence[torch.Tensor],
    form: CallForm | None,
) -> None:
    """Raise :class:`CaptureError` unless ``graph`` has the gradients of ``module`` for a call with
    ``data``.

    Compared are those of the data and of the smaller weights that require one. ``form`` is the form
    of a block's call; experts have none. Where the module's own code fails with gradients, there is
    nothing to compare.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = [tensors[path] for path in weights]
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in data]
    small = [t for t in values if t.requires_grad and t.numel() <= LARGEST]
    wanted = [t for t in (*inputs, *small) if t.requires_grad]
    try:
        seeds, expected = _of_module(module, inputs, wanted, form)
    except (CaptureError, RuntimeError):  # it ran without gradients: see compare()
        return
    with torch.no_grad(), torch.autocast(data[0].device.type, enabled=False):
        chosen = {id(t) for t in wanted}
        found = _of_graph(graph, [*inputs, *values], chosen, seeds, form, len(data))
    _compare(module, graph, [*inputs, *values], chosen, expected, found)


def _of_module(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    wanted: list[torch.Tensor],
    form: CallForm | None,
) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """Gradients with respect to the results, drawn at random, and those that follow from them."""
    generator = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        # not the leaves themselves: a module may change its input in place
        results = own_results(module, [t * 1 if t.requires_grad else t for t in inputs], form)
        floats = [t for t in results if t.is_floating_point()]
        seeds = [_seed(t, generator) for t in floats]
        return seeds, _gradients(floats, wanted, seeds)


def _seed(result: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(result.shape, generator=generator).to(result.device, result.dtype)


def _gradients(
    results: list[torch.Tensor], wanted: list[torch.Tensor], seeds: list[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The gradients by autograd, zero where nothing flows, by the identity of the tensor."""
    pairs = zip(results, seeds, strict=True)
    reached = [(r, s) for r, s in pairs if r.requires_grad]
    if not reached:
        return {id(t): torch.zeros_like(t) for t in wanted}
    found: Sequence[torch.Tensor | None] = torch.autograd.grad(
        [r for r, _ in reached], wanted, [s for _, s in reached], allow_unused=True
    )
    return {
        id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)
    }


def _of_graph(
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    chosen: set[int],
    seeds: Sequence[torch.Tensor],
    form: CallForm | None,
    count: int,
) -> list[torch.Tensor]:
    """The gradients by the graph's own rules, for the chosen inputs in order."""
    pairs = list(zip(graph.inputs, tensors, strict=True))
    joint = differentiate(graph, [v for v, t in pairs if id(t) in chosen])
    data = list(tensors[:count])
    if form is not None:
        data = graph_inputs(form, [v.type.rank for v in graph.inputs], data)
    binding = [t.detach() for t in (*data, *tensors[count:])]
    shaped = [
        s.reshape(-1, *s.shape[s.dim() - v.type.rank + 1 :]) if s.dim() > v.type.rank else s
        for s, v in zip(seeds, joint.cotangents, strict=True)
    ]
    returned = run(joint, [*binding, *shaped])
    return list(returned[len(graph.outputs) :])


def _compare(
    module: nn.Module,
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    chosen: set[int],
    expected: dict[int, torch.Tensor],
    found: Sequence[torch.Tensor],
) -> None:
    named = [
        (v.hint, expected[id(t)])
        for v, t in zip(graph.inputs, tensors, strict=True)
        if id(t) in chosen
    ]
    floor = FLOOR * max((float(g.double().norm()) for _, g in named), default=0.0)
    for (name, theirs), ours in zip(named, found, strict=True):
        if not theirs.isfinite().all():
            continue  # weights that nobody has set yet: nothing to compare
        difference = (ours.reshape(-1).double() - theirs.reshape(-1).double()).norm()
        error = float(difference) / max(float(theirs.double().norm()), floor, 1e-30)
        if not error <= _tolerance(theirs):
            raise CaptureError(
                f"the gradient of {name} is not what its operations have: "
                f"{type(module).__name__} detaches a value, computes without gradients or has "
                f"an autograd.Function of its own (relative difference {error:.1e})"
            )


def _tolerance(value: torch.Tensor) -> float:
    device = value.device.type
    dtypes = [value.dtype]
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(TOLERANCE.get(dtype, 1e-3) for dtype in dtypes)


__all__ = ["compare_gradients"]

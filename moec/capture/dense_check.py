"""Comparing a block without a loop with its captured form, zero tokens included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moec.capture.arguments import Extra, axis_names
from moec.capture.check import EQUAL, SCALES, SIZES, compare_call
from moec.ir.graph import Graph
from moec.ir.types import DTYPES


def compare_dense(
    module: nn.Module,
    graph: Graph,
    weights: Sequence[str],
    rank: int,
    extras: Sequence[Extra],
    doubtful: Sequence[tuple[int, ...]] = (),
) -> None:
    """Raise :class:`CaptureError` unless interpreting ``graph`` gives what ``module`` gives, at
    several sizes and scales, among them the sizes ``doubtful`` that the tracer left out.

    Sizes at which the module itself fails are left out; more than zero and one tokens must run.
    """
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = [tensors[path].detach() for path in weights]
    with torch.no_grad():
        for leading, x in _tokens(graph, rank, doubtful):
            sizes = dict(zip(axis_names(rank), leading, strict=True))
            generator = torch.Generator().manual_seed(sum(leading))
            data = [x.to(device), *(e.example(sizes, generator).to(device) for e in extras)]
            listed = any(e.kind == "sizes" for e in extras)
            call = [x.to(device), data[1].tolist()] if listed else data
            if _fails(module, call) and max(leading) <= 1:
                continue  # the module's own code runs there, and fails as before
            compare_call(module, graph, data, inputs, None, call)


def _tokens(
    graph: Graph, rank: int, doubtful: Sequence[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    hidden, dtype = int(graph.inputs[0].type.shape[-1]), DTYPES[graph.inputs[0].type.dtype]
    generator = torch.Generator().manual_seed(0)
    zero = tuple(0 for _ in range(rank - 1))
    for leading in (zero, *SIZES[rank], *doubtful):
        for scale in SCALES:
            yield leading, (torch.randn(*leading, hidden, generator=generator) * scale).to(dtype)
    row = torch.randn(hidden, generator=generator).to(dtype)
    yield EQUAL[rank], row.expand(*EQUAL[rank], hidden).contiguous()


def _fails(module: nn.Module, call: Sequence[object]) -> bool:
    try:
        module(*call)
    except Exception:  # what a user's code raises on few tokens is up to that code
        return True
    return False

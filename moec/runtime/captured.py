"""Calls as CUDA graphs, captured from a stream: for ``mode="reduce-overhead"``.

A captured call reads its tokens at one place and writes its results at another, so a call copies
its tokens in, replays, and copies the results out. Routing is computed on the device, so one
capture serves every routing. Numbers of tokens share captures: the rows up to the next power of two
are zeros, which changes no other row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir.graph import Graph, Op, walk
from moec.ir.opdef import opdef
from moec.runtime.tapes import may_repeat

# Above so many tokens a GPU is busy for longer than Python takes to launch.
MOST_TOKENS = 512
# Captures of one artifact; each holds the memory of its results.
MOST_CAPTURES = 512
Forward = Callable[..., tuple[tuple[torch.Tensor, ...], Any]]


@dataclass(frozen=True)
class Capture:
    """One captured call: what it reads, what it wrote, and how to do it again."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def __call__(self, given: Sequence[torch.Tensor], rows: int) -> tuple[torch.Tensor, ...]:
        """The outputs for other tokens, ``rows`` of them."""
        for place, tensor in zip(self.inputs, given, strict=True):
            if place.shape[0] == rows:
                place.copy_(tensor)
            else:
                place[:rows].copy_(tensor)
                place[rows:].zero_()
        self.graph.replay()
        size = self.inputs[0].shape[0]
        return tuple([_cut(o, size, rows).clone() for o in self.outputs])


def _cut(tensor: torch.Tensor, size: int, rows: int) -> torch.Tensor:
    is_of_rows = size != rows and tensor.dim() > 0 and tensor.shape[0] == size
    return tensor[:rows] if is_of_rows else tensor


class Captures:
    """The captures of one artifact, by size, weights and stream; each thread has its own."""

    def __init__(self, varying: Sequence[int], padded: bool, most: int | None = None) -> None:
        """``varying`` are the inputs of tokens; ``padded``: more rows change no row; ``most``: how
        many rows the code takes, if there is a limit.
        """
        self.varying, self.padded = tuple(varying), padded
        self.most = MOST_TOKENS if most is None else most
        self._kept = threading.local()

    def size_for(self, rows: int) -> int:
        """The rows of the capture that serves a call: a power of two, or as many as the code
        takes.
        """
        return min(1 << (rows - 1).bit_length(), self.most) if self.padded else rows

    def call(
        self, forward: Forward, inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs of a call on a GPU; ``None`` if it has to be made as always."""
        x = inputs[0]
        rows = x.shape[0]
        if not may_repeat(x) or not 0 < x.shape[:-1].numel() <= MOST_TOKENS:
            return None
        size = self.size_for(rows)
        given = [inputs[i] for i in self.varying]
        fixed = [t for i, t in enumerate(inputs) if i not in self.varying]
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        key = stream, size, *[t.shape[1:] for t in given], *[t.data_ptr() for t in fixed]
        kept: dict[Any, Capture] = self._kept.__dict__
        if key not in kept:
            if len(kept) >= MOST_CAPTURES:
                kept.clear()
            kept[key] = self._capture(forward, inputs, size)
        return kept[key](given, rows)

    def _capture(self, forward: Forward, inputs: Sequence[torch.Tensor], size: int) -> Capture:
        device = inputs[0].device
        mine = list(inputs)
        for i in self.varying:
            mine[i] = inputs[i].new_zeros((size, *inputs[i].shape[1:]))
        with torch.cuda.device(device), torch.no_grad():
            side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                forward(*mine)  # kernels are compiled and libraries set up outside the capture
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = forward(*mine)[0]
        return Capture(graph, tuple(mine[i] for i in self.varying), outputs)


# Ops that keep each token's rows to themselves.
_ALONE = frozenset(
    "moe.activate moe.select moe.weight moe.dispatch moe.gather moe.grouped_mm moe.combine "
    "moe.expert_rows moe.permute moe.unpermute moe.row_scale moe.row_dot t.linear t.full".split()
)
# Ops that do so where they work along another axis than the first.
_ALONG = frozenset(
    "t.split t.merge t.slice t.concat t.gather t.topk t.softmax t.log_softmax t.sum t.mean t.amax "
    "t.norm t.reshape t.expand".split()
)


def rows_are_alone(graph: Graph) -> bool:
    """Whether each token's results are the same whatever other tokens there are.

    True only where every op is known not to mix them; capacities and statistics over tokens do.
    """
    first = graph.inputs[0].type
    of_tokens = all(v.type.rank and v.type.shape[0] == first.shape[0] for v in graph.outputs)
    return first.rank == 2 and of_tokens and all(map(_is_alone, walk(graph)))


def _is_alone(op: Op) -> bool:
    if op.kind.startswith("kern.") or op.kind in _ALONE or opdef(op.kind).pointwise:
        return True
    if all(isinstance(v.type.elements, int) for v in op.operands):
        return True
    if op.kind not in _ALONG:
        return False
    rank = op.operands[0].type.rank
    along = op.attrs.get("dims", (op.attrs["dim"],) if "dim" in op.attrs else ())
    kept = all(v.type.rank and v.type.shape[0] == op.operands[0].type.shape[0] for v in op.results)
    return kept and all(d % rank != 0 for d in along)


__all__ = ["Capture", "Captures", "rows_are_alone"]

"""What declared inputs say of the tokens of regions: ranges, relied on while calls keep to them.

Where a model's inputs have at most 8 * 4096 tokens, so have its regions, mostly: a block of image
patches may have more. So each call is checked, and the first one beyond the limits makes its
structure be compiled for the range that its own code has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from moec import logs
from moec.arguments import dim_sizes
from moec.declared import Declared
from moec.declared_check import CheckInputs
from moec.ir.dims import Range
from moec.ir.graph import Graph
from moec.ir.prove import bounds


def token_limits(declared: Declared, ranks: Mapping[str, int]) -> dict[str, int]:
    """The largest B, S and T of regions, if their tokens are those of the declared inputs: ``T =
    B*S`` where both are declared.

    ``ranks`` says how many axes of an input are of tokens; without it, the declared ones are.
    """
    found: dict[str, list[int | None]] = {}
    for name in dict.fromkeys(a.input for a in declared.axes):
        own = {a.axis: a.size for a in declared.axes if a.input == name}
        highs = {axis: bounds(size, declared.ranges)[1] for axis, size in own.items()}
        for symbol, high in _limits(highs, ranks.get(name, max(highs) + 1)):
            found.setdefault(symbol, []).append(high)
    return {
        symbol: max(h for h in highs if h is not None)
        for symbol, highs in found.items()
        if None not in highs
    }


def _limits(highs: Mapping[int, int | None], rank: int) -> Iterator[tuple[str, int | None]]:
    """What the largest sizes of an input's axes of tokens say of B, S and T."""
    if rank == 2:
        yield from ((symbol, highs[axis]) for axis, symbol in enumerate("BS") if axis in highs)
    if all(axis in highs for axis in range(rank)):
        known = [h for h in highs.values() if h is not None]
        yield "T", math.prod(known) if len(known) == len(highs) else None


def narrowed(graph: Graph, limits: Mapping[str, int]) -> Graph:
    """The graph with ranges of its dims that end at the limits, where those are lower."""
    ranges = {name: _cut(range_, limits.get(name)) for name, range_ in graph.ranges.items()}
    return graph if ranges == dict(graph.ranges) else replace(graph, ranges=ranges)


def _cut(range_: Range, limit: int | None) -> Range:
    low, high = range_
    return range_ if limit is None or (high is not None and high <= limit) else (low, limit)


class Limits:
    """The limits of a model's regions; ``exceeded`` are structures that have other tokens."""

    def __init__(self, check: CheckInputs) -> None:
        self.check = check
        self.exceeded: set[str] = set()
        self._narrowed: dict[str, Graph] = {}

    @property
    def tokens(self) -> dict[str, int]:
        """The largest B, S and T, as far as known."""
        return token_limits(self.check.declared, self.check.ranks)

    def narrowed(self, graph: Graph) -> Graph:
        """The graph within the limits; itself where a call went beyond them."""
        if graph.fingerprint in self.exceeded:
            return graph
        if graph.fingerprint not in self._narrowed:
            self._narrowed[graph.fingerprint] = narrowed(graph, self.tokens)
        return self._narrowed[graph.fingerprint]

    def for_call(self, graph: Graph, inputs: Sequence[torch.Tensor], name: str) -> Graph:
        """The graph that serves a call of a region: within the limits, if the call is."""
        narrow = self.narrowed(graph)
        if narrow is graph:
            return graph
        for symbol, size in dim_sizes(graph, inputs).items():
            high = narrow.ranges[symbol][1] if symbol in narrow.ranges else None
            if high is not None and size > high:
                self.exceeded.add(graph.fingerprint)
                logs.RECOMPILES.info(
                    "%s: %s = %d, more than the %d of the declared inputs: its tokens are others, "
                    "and it is compiled for all sizes",
                    name,
                    symbol,
                    size,
                    high,
                )
                return graph
        return narrow


__all__ = ["Limits", "narrowed", "token_limits"]

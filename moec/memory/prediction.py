"""What a compiled graph holds in memory, for every number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moec.codegen.host import Program, partition
from moec.errors import DimError
from moec.ir.dims import Dim, Range, apply, symbols
from moec.ir.graph import Graph
from moec.memory.buffers import GRANULES, Buffer, Held, Layout, Moment, rounded
from moec.memory.envelope import Piece, pieces
from moec.memory.host import Timeline, host_functions, walked
from moec.runtime.artifact import Artifact

# Where a dim has no upper bound
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Peak:
    """The most that is held at once: the largest of some moments.

    ``ranges`` are those of the graph's dims.
    """

    moments: tuple[Moment, ...]
    granule: int
    ranges: Mapping[str, Range]

    def at(self, **sizes: int) -> int:
        """Bytes at these sizes, each allocation rounded up as the allocator does."""
        return max((self._bytes(m, sizes) for m in self.moments), default=0)

    def moment_at(self, **sizes: int) -> Moment:
        """The moment of the peak at these sizes."""
        return max(self.moments, key=lambda m: self._bytes(m, sizes))

    def _bytes(self, moment: Moment, sizes: Mapping[str, int]) -> int:
        return sum(_number(size, self.granule, sizes) for size in moment.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """The dims that the peak depends on."""
        found = {n for m in self.moments for size in m.sizes for n in symbols(size)}
        return tuple(sorted(found))

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The peak as polynomials over ranges of its dim, from 1 on: without tokens it is less.

        Raises:
            DimError: it depends on several dims.
        """
        if len(self.names) > 1:
            raise DimError(f"the peak depends on several dims: {', '.join(self.names)}")
        name = self.names[0] if self.names else "T"
        low, high = self.ranges.get(name, (0, None))
        top = _UNBOUNDED if high is None else high
        return pieces(self.moments, self.granule, name, max(low, 1), max(top, 1))


def _number(size: Dim, granule: int, sizes: Mapping[str, int]) -> int:
    count = int(apply(size, sizes))
    return -(-count // granule) * granule


@dataclass(frozen=True)
class Prediction:
    """What a graph's emitted program holds beyond what its caller does: inputs, weights, and the
    gradients of outputs.

    ``forward`` and ``backward`` are peaks of the two passes, ``held`` what is kept between them.
    ``step`` is the peak of both, where the caller keeps the outputs. Without a backward pass
    ``step`` is ``forward``.
    """

    graph: Graph
    target: str
    balanced: bool
    forward: Peak
    step: Peak
    backward: Peak | None = None
    held: Peak | None = None
    gradients: Peak | None = None


def predict(
    subject: Artifact | Graph, target: str | None = None, *, balanced: bool = False
) -> Prediction:
    """The memory of an artifact, or of a graph after the passes of ``target`` (``triton``).

    Routing is the worst there is, all rows with one expert; with ``balanced`` every expert has its
    share. Only expressions for the CPU differ: emitted kernels have room for any routing.

    Raises:
        CodegenError: a line of the emitted program that nothing is known about.
    """
    graph = subject.graph if isinstance(subject, Artifact) else subject
    chosen = target or (subject.target if isinstance(subject, Artifact) else "triton")
    granule, program = GRANULES[chosen], partition(graph)
    functions = host_functions(graph, chosen)
    ahead = walked(functions[0], [Held() for _ in graph.inputs], balanced=balanced)
    outputs, saved = (_buffers(group) for group in ahead.returned)

    def peak(moments: Iterable[Moment]) -> Peak:
        return Peak(_without_dominated(tuple(moments)), granule, graph.ranges)

    forward = peak(ahead.moments)
    if len(functions) == 1:
        return Prediction(graph, chosen, balanced, forward, forward)
    arguments = _arguments(program, ahead.returned[1])
    behind = walked(functions[1], arguments, _buffers(arguments), balanced=balanced)
    gradients = _buffers(behind.returned[0])
    backward = [*behind.moments, _at_the_end(program, behind)]
    both = [*ahead.moments, *(m.with_buffers(outputs) for m in backward)]
    return Prediction(
        graph,
        chosen,
        balanced,
        forward,
        peak(both),
        peak(backward),
        peak([Moment(None, saved)]),
        peak([Moment(None, gradients)]),
    )


def _buffers(group: Sequence[Held]) -> frozenset[Buffer]:
    return frozenset[Buffer]().union(*(h.buffers for h in group))


def _arguments(program: Program, saved: Sequence[Held]) -> list[Held]:
    """The arguments of ``backward``, which autograd keeps until it returns.

    It makes zeros for outputs that nothing reads.
    """
    inputs = [Held() for _ in program.backward_inputs]
    zeros = [
        Held(frozenset([Buffer(c.hint, c.type)])) for c in program.graph.cotangents[1:]
    ]
    return [*inputs, *saved, *([Held()] if program.graph.cotangents else []), *zeros]


def _at_the_end(program: Program, behind: Timeline) -> Moment:
    """Autograd keeps the gradients; it copies those whose elements are not in rows, and those that
    it got for another input, too.
    """
    (found,) = behind.returned
    copies = [
        Buffer(f"grad {v.hint}", v.type)
        for i, v in enumerate(program.graph.inputs)
        if found[i].layout is not Layout.ROWS or any(found[i] is h for h in found[:i] if h.buffers)
    ]
    return Moment(None, _buffers(found) | frozenset(copies), is_backward=True)


def _without_dominated(moments: tuple[Moment, ...]) -> tuple[Moment, ...]:
    """The moments that hold something which no other does."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: -len(m.live)):
        if not any(_holds(other, moment) for other in kept):
            kept.append(moment)
    places = {id(m): i for i, m in enumerate(moments)}
    return tuple(sorted(kept, key=lambda m: places[id(m)]))


def _holds(other: Moment, moment: Moment) -> bool:
    return moment.live <= other.live and moment.scratch in (0, other.scratch)


__all__ = ["Peak", "Prediction", "predict"]

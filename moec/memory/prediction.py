"""What a compiled graph holds in memory, for every number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moec.codegen.host import Function, Program, partition
from moec.errors import DimError
from moec.ir.dims import Dim, Range, apply, substitute, symbols
from moec.ir.graph import Graph, Value
from moec.memory.buffers import GRANULES, Buffer, Held, Layout, Moment
from moec.memory.envelope import Piece, pieces
from moec.memory.host import Timeline, host_functions, walked
from moec.runtime.artifact import Artifact

# What the allocator leaves in a block rather than split it off, in bytes
_REST = 1 << 20
# Where a dim has no upper bound
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Peak:
    """The most that is held at once: the largest of some moments.

    ``ranges`` are those of the graph's dims, ``fixed`` sizes that some have; each allocation is
    rounded up to ``granule`` bytes.
    """

    moments: tuple[Moment, ...]
    granule: int
    ranges: Mapping[str, Range]
    fixed: Mapping[str, int] = field(default_factory=dict)

    def at(self, **sizes: int) -> int:
        """Bytes at these sizes of the dims, as ``at(T=4096)``."""
        return max((self._bytes(m, sizes) for m in self.moments), default=0)

    def at_most(self, **sizes: int) -> int:
        """The same, where each allocation above 1 MiB gets a block of up to 1 MiB more.

        PyTorch's caching allocator for CUDA splits no rest of that size off, unless it has
        ``expandable_segments``.
        """
        known = {**self.fixed, **sizes}
        held = ([_number(s, self.granule, known) for s in m.sizes] for m in self.moments)
        return max((sum(n + (_REST if n > _REST else 0) for n in m) for m in held), default=0)

    def moment_at(self, **sizes: int) -> Moment:
        """The moment of the peak at these sizes."""
        return max(self.moments, key=lambda m: self._bytes(m, sizes))

    def _bytes(self, moment: Moment, sizes: Mapping[str, int]) -> int:
        known = {**self.fixed, **sizes}
        return sum(_number(size, self.granule, known) for size in moment.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """The dims that the peak depends on."""
        found = {n for m in self.moments for s in m.sizes for n in symbols(s)}
        return tuple(sorted(found - self.fixed.keys()))

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The peak as polynomials over ranges of its dim, from 1 on: without tokens it is less.

        Raises:
            DimError: it depends on several dims; see :meth:`where`.
        """
        name, (low, top) = self._name(), self.span
        sizes = {m: [substitute(s, self.fixed) for s in m.sizes] for m in self.moments}
        return pieces(sizes, self.granule, name, max(low, 1), max(top, 1))

    def where(self, sizes: Mapping[str, int]) -> Peak:
        """The peak where some dims have these sizes."""
        return replace(self, fixed={**self.fixed, **sizes})

    def largest(self, budget: int) -> int | None:
        """The greatest size of its dim at which the peak is at most ``budget`` bytes; ``None`` if
        the least is too much.

        Raises:
            DimError: it depends on several dims; see :meth:`where`.
        """
        name = self._name()
        return largest(lambda size: self.at(**{name: size}), budget, *self.span)

    @property
    def span(self) -> tuple[int, int]:
        """The least and the greatest size of its dim; :class:`DimError` if it has several."""
        low, high = self.ranges.get(self._name(), (0, None))
        return low, _UNBOUNDED if high is None else high

    def _name(self) -> str:
        if len(self.names) > 1:
            names = ", ".join(self.names)
            raise DimError(f"the peak depends on the dims {names}; give sizes of all but one")
        return self.names[0] if self.names else "T"


def _number(size: Dim, granule: int, sizes: Mapping[str, int]) -> int:
    return -(-int(apply(size, sizes)) // granule) * granule


def largest(at: Callable[[int], int], budget: int, low: int, high: int) -> int | None:
    """The greatest number from ``low`` to ``high`` where a growing function is at most
    ``budget``.
    """
    if at(low) > budget:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle) <= budget else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Prediction:
    """What a graph's emitted program holds beyond what its caller does: inputs, weights, and the
    gradients of the outputs.

    ``forward`` and ``backward`` are the peaks of the passes, ``held`` is what is kept between them,
    ``step`` the peak of both where the caller keeps the outputs, ``step_alone`` the same without
    the gradients of weights, which are there longer than a pass. A graph without a backward pass
    has only ``forward``; ``step`` and ``step_alone`` are the same then.

    The backward pass frees what is held as soon as it has been read, as autograd lets it unless the
    graph is retained; ``backward_kept`` is its peak where all of that stays.

    ``roles`` says what a buffer is to the caller: an output, a gradient, or held.
    """

    graph: Graph
    target: str
    balanced: bool
    forward: Peak
    step: Peak
    step_alone: Peak
    backward: Peak | None = None
    backward_kept: Peak | None = None
    held: Peak | None = None
    roles: Mapping[Buffer, str] = field(default_factory=dict)

    def where(self, sizes: Mapping[str, int]) -> Prediction:
        """The same where some dims have these sizes."""

        def there(peak: Peak | None) -> Peak | None:
            return None if peak is None else peak.where(sizes)

        return replace(
            self,
            forward=self.forward.where(sizes),
            step=self.step.where(sizes),
            step_alone=self.step_alone.where(sizes),
            backward=there(self.backward),
            backward_kept=there(self.backward_kept),
            held=there(self.held),
        )


def predict(
    subject: Artifact | Graph, target: str | None = None, *, balanced: bool = False
) -> Prediction:
    """The memory of an artifact, or of a graph after the passes for ``target`` ("triton").

    Routing is the worst there is, as many rows as can be with one expert; with ``balanced`` each
    has its share. Only expressions of the ``aten`` target differ: emitted kernels have room for any
    routing.

    Raises:
        CodegenError: nothing is known about a line of the emitted program.
    """
    graph = subject.graph if isinstance(subject, Artifact) else subject
    chosen = target or (subject.target if isinstance(subject, Artifact) else "triton")
    program, functions = partition(graph), host_functions(graph, chosen)

    def peak(moments: Iterable[Moment]) -> Peak:
        return Peak(_without_dominated(list(moments)), GRANULES[chosen], graph.ranges)

    ahead = walked(functions[0], [Held() for _ in graph.inputs], balanced=balanced)
    outputs, saved = map(_buffers, ahead.returned)
    forward = peak(ahead.moments)
    if len(functions) == 1:
        roles = dict.fromkeys(outputs, "output")
        return Prediction(graph, chosen, balanced, forward, forward, forward, roles=roles)
    zeros = _zeros(program)
    arguments = _arguments(program, ahead.returned[1], zeros)
    behind = walked(functions[1], arguments, zeros, balanced=balanced)
    backward = [*behind.moments, _at_the_end(program, behind).with_buffers(zeros)]
    step = [*ahead.moments, *(m.with_buffers(outputs) for m in backward)]
    gradients = _gradients(program, behind)
    lasting = {b for b in gradients if isinstance(b.bytes, int)}
    return Prediction(
        graph,
        chosen,
        balanced,
        forward,
        peak(step),
        peak(replace(m, live=m.live - lasting) for m in step),
        peak(backward),
        peak(m.with_buffers(saved) for m in backward),
        peak([Moment(None, saved)]),
        {**dict.fromkeys(saved, "held"), **dict.fromkeys(outputs, "output"), **gradients},
    )


def predict_parts(graph: Graph, target: str, parts: Sequence[Function]) -> list[Peak]:
    """The most that each part of a graph holds beyond what it takes, for the worst routing, where
    results that lie otherwise, or share memory with others, are copied in the end.

    Raises:
        CodegenError: nothing is known about a line of the emitted program.
    """
    peaks = []
    for function, part in zip(host_functions(graph, target, parts), parts, strict=True):
        seen = walked(function, [Held() for _ in part.reads])
        (found,) = seen.returned
        end = Moment(None, _buffers(found) | _copies(part.makes, found))
        moments = _without_dominated([*seen.moments, end])
        peaks.append(Peak(moments, GRANULES[target], graph.ranges))
    return peaks


def _copies(values: Sequence[Value], found: Sequence[Held]) -> frozenset[Buffer]:
    """What an operation copies so that its results are rows in memory of their own."""
    seen: set[Buffer] = set()
    copies = set()
    for value, held in zip(values, found, strict=True):
        is_own = held.buffers and held.buffers.isdisjoint(seen)
        if not is_own or held.layout is not Layout.ROWS:
            copies.add(Buffer(f"copy of {value.hint}", value.type))
        seen |= held.buffers
    return frozenset(copies)


def _buffers(group: Sequence[Held]) -> frozenset[Buffer]:
    return frozenset[Buffer]().union(*(h.buffers for h in group))


def _gradients(program: Program, behind: Timeline) -> dict[Buffer, str]:
    """The buffers of gradients, and whose they are."""
    found = zip(program.graph.inputs, behind.returned[0], strict=True)
    return {b: f"gradient of %{v.hint}" for v, held in found for b in held.buffers}


def _zeros(program: Program) -> list[Buffer]:
    """What autograd makes as gradients of outputs that nothing reads, and keeps until the end."""
    return [Buffer(c.hint, c.type) for c in program.graph.cotangents[1:]]


def _arguments(program: Program, saved: Sequence[Held], zeros: Sequence[Buffer]) -> list[Held]:
    """The arguments of ``backward``: inputs and the first gradient are the caller's."""
    inputs = [Held() for _ in program.backward_inputs]
    others = [Held(frozenset([z])) for z in zeros]
    return [*inputs, *saved, *([Held()] if program.graph.cotangents else []), *others]


def _at_the_end(program: Program, behind: Timeline) -> Moment:
    """Autograd keeps the gradients; it copies those whose elements are not in rows, and those that
    it got for another input, too.
    """
    (found,) = behind.returned
    copies = [
        Buffer(f"copy for {v.hint}", v.type)
        for i, v in enumerate(program.graph.inputs)
        if found[i].layout is not Layout.ROWS or any(found[i] is h for h in found[:i] if h.buffers)
    ]
    return Moment(None, _buffers(found) | frozenset(copies), is_backward=True)


def _without_dominated(moments: Sequence[Moment]) -> tuple[Moment, ...]:
    """The moments that hold something which no other does, in order."""
    kept: list[tuple[int, Moment]] = []
    for place, moment in sorted(enumerate(moments), key=lambda pair: -len(pair[1].live)):
        if not any(_holds(other, moment) for _, other in kept):
            kept.append((place, moment))
    return tuple(moment for _, moment in sorted(kept, key=lambda pair: pair[0]))


def _holds(other: Moment, moment: Moment) -> bool:
    return moment.live <= other.live and moment.scratch in (0, other.scratch)


__all__ = ["Peak", "Prediction", "largest", "predict", "predict_parts"]

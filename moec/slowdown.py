"""Which pass, rewrite or kernel made a graph slower: bisection by measured time.

The emitted module is timed after each pass that changed the graph, all of them in turns. A pass is
to blame only if it takes longer than before beyond the noise of this run (:mod:`moec.timing`), and
again in a second measurement; its rewrites are searched by halves like wrong ones. If no pass is to
blame, each kernel is timed against its own body.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.bisect import GuiltyPass, StepTest, Untested, attempt, find_rewrite, with_bodies
from moec.cost import op_cost
from moec.errors import MoecError, PassError
from moec.execute import Emitted, emitted, op_times
from moec.ir.dims import evaluate
from moec.ir.graph import Graph, Op, backward_ops
from moec.manager import PassCall, PassManager, Step
from moec.timing import Change, change, in_turns

_PRODUCTS = ("kern.grouped_gemm", "kern.grouped_outer")
# The arguments of a graph, its inputs and the cotangents of a joint one, on the device.
ArgumentsOf = Callable[[Graph], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class OpTime:
    """The median time of one op of an emitted module, with the bytes that it moves and its
    floating-point operations.
    """

    op: Op
    ms: float
    bytes: int
    flops: int
    is_backward: bool


@dataclass(frozen=True)
class PassTime:
    """The emitted module's time before and after a pass; ``reason`` says why there is none."""

    call: PassCall
    index: int
    before: Graph
    change: Change | None
    reason: str = ""


@dataclass(frozen=True)
class SlowKernel:
    """A kernel that takes longer than its body, emitted as separate ops."""

    op: Op
    change: Change


@dataclass(frozen=True)
class Slowdown:
    """What was measured of a graph: the time of its emitted module and of each of its ops, what
    each pass did to it, and who is to blame.
    """

    graph: Graph
    ms: float
    ops: tuple[OpTime, ...]
    passes: tuple[PassTime, ...] = ()
    guilty: GuiltyPass | None = None
    kernels: tuple[SlowKernel, ...] = ()

    @property
    def is_found(self) -> bool:
        """Whether a pass or a kernel is to blame."""
        return self.guilty is not None or bool(self.kernels)


@dataclass(frozen=True)
class Stopwatch:
    """How graphs are timed: for which target, on what, and how often.

    ``lower`` chooses tiles for kernels of a graph in the middle of its passes, which have none.
    """

    target: str
    arguments_of: ArgumentsOf
    sizes: Mapping[str, int]
    rounds: int | None = None
    lower: PassCall | None = None

    def times(self, graphs: Sequence[Graph]) -> list[list[float] | str]:
        """The samples of each graph's emitted module, taken in turns; a graph that does not run has
        a reason instead.
        """
        found: dict[int, list[float] | str] = {}
        with contextlib.ExitStack() as stack:
            running: dict[int, Callable[[], object]] = {}
            for place, graph in enumerate(graphs):
                try:
                    running[place] = self._ready(graph, stack)
                except Exception as error:  # emitters, kernel compilers, launches: of many kinds
                    found[place] = _words(error)
            device = self._device(graphs[0])
            samples = in_turns(list(running.values()), device, self.rounds)
            found.update(zip(running, samples, strict=True))
        return [found[place] for place in range(len(graphs))]

    def _ready(self, graph: Graph, stack: contextlib.ExitStack) -> Callable[[], object]:
        arguments = self.arguments_of(graph)
        program: Emitted = stack.enter_context(emitted(self.lowered(graph), self.target))
        program(arguments)  # fails here or not at all
        return lambda: program(arguments)

    def _device(self, graph: Graph) -> torch.device:
        return self.arguments_of(graph)[0].device

    def lowered(self, graph: Graph) -> Graph:
        """The graph with a tile for each kernel."""
        products = [op for op in graph.ops if op.kind in _PRODUCTS]
        if self.lower is None or all("template" in op.attrs for op in products):
            return graph
        return self.lower.definition.run(graph, **self.lower.options)

    def compare(self, before: Graph, after: Graph) -> Change:
        """The times of two graphs; :class:`~moec.bisect.Untested` where one does not run."""
        first, second = self.times([before, after])
        if isinstance(first, str) or isinstance(second, str):
            raise Untested(first if isinstance(first, str) else second)
        return change(first, second)

    def ops(self, graph: Graph) -> tuple[OpTime, ...]:
        """The time of each op of a graph's emitted module."""
        lowered = self.lowered(graph)
        behind = backward_ops(lowered)
        times = op_times(lowered, self.target, self.arguments_of(graph), self.rounds)
        return tuple(self._op_time(op, ms, op in behind) for op, ms in times.items())

    def _op_time(self, op: Op, ms: float, is_backward: bool) -> OpTime:
        cost = op_cost(op)
        moved, work = (evaluate(d, self.sizes) for d in (cost.bytes, cost.flops))
        return OpTime(op, ms, moved, work, is_backward)


def _words(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def find_slowdown(graph: Graph, calls: Sequence[PassCall], watch: Stopwatch) -> Slowdown:
    """Time a graph after each pass, and say which pass, rewrite or kernel made it slower.

    Raises :class:`~moec.errors.PassError` if the module that comes out does not run.
    """
    steps = _steps(graph, calls)
    passes, ms = _pass_times(graph, steps, watch)
    last = watch.lowered(steps[-1][1].after if steps else graph)
    guilty = _guilty(passes, watch)
    kernels = () if guilty is not None else _slow_kernels(last, watch)
    return Slowdown(last, ms, watch.ops(last), passes, guilty, kernels)


def _steps(graph: Graph, calls: Sequence[PassCall]) -> list[tuple[int, Step]]:
    manager = PassManager(calls)
    manager.run(graph)
    return [(i, step) for i, step in enumerate(manager.history) if step.changed]


def _pass_times(
    graph: Graph, steps: Sequence[tuple[int, Step]], watch: Stopwatch
) -> tuple[tuple[PassTime, ...], float]:
    """What each pass did to the time, and the time of the module in the end."""
    samples = watch.times([graph, *(step.after for _, step in steps)])
    last = samples[-1]
    if isinstance(last, str):
        raise PassError(f"@{graph.name}: the emitted module does not run: {last}")
    triples = zip(steps, samples, samples[1:], strict=False)
    passes = tuple(_pass_time(i, step, a, b) for (i, step), a, b in triples)
    return passes, sorted(last)[len(last) // 2]


def _pass_time(
    index: int, step: Step, before: list[float] | str, after: list[float] | str
) -> PassTime:
    found, reason = None, ""
    if bool(step.before.cotangents) != bool(step.after.cotangents):
        reason = "adds the backward pass"
    elif isinstance(before, str) or isinstance(after, str):
        reason = before if isinstance(before, str) else str(after)
    else:
        found = change(before, after)
    return PassTime(step.call, index, step.before, found, reason)


def _guilty(passes: Sequence[PassTime], watch: Stopwatch) -> GuiltyPass | None:
    """The pass that costs most, if a second measurement says so too."""
    slower = [(p.change.increase, p) for p in passes if p.change and p.change.is_slower]
    for _, one in sorted(slower, key=lambda pair: -pair[0]):
        with contextlib.suppress(Untested):
            step, problem = attempt(one.call, one.before, None, is_slower(watch))
            if problem and step is not None:
                rewrite = find_rewrite(one.call, one.before, _costs_most(step.after, watch))
                return GuiltyPass(one.call, one.index, one.before, problem, rewrite)
    return None


def is_slower(watch: Stopwatch) -> StepTest:
    """A test that objects to a pass that made the emitted module slower."""

    def test(step: Step) -> str:
        if not step.changed or bool(step.before.cotangents) != bool(step.after.cotangents):
            return ""
        found = watch.compare(step.before, step.after)
        return str(found) if found.is_slower else ""

    return test


def _costs_most(whole: Graph, watch: Stopwatch) -> StepTest:
    """A test that objects once a pass has done what costs more than half of what all of it costs.

    So the search ends at the rewrite that costs most. The three programs take turns.
    """

    def test(step: Step) -> str:
        if not step.changed:
            return ""
        before, after, full = watch.times([step.before, step.after, whole])
        if isinstance(before, str) or isinstance(after, str) or isinstance(full, str):
            raise Untested("a module does not run with some of the rewrites only")
        part, cost = change(before, after), change(before, full)
        return str(part) if 2 * part.increase > cost.increase else ""

    return test


def _slow_kernels(graph: Graph, watch: Stopwatch) -> tuple[SlowKernel, ...]:
    """The kernels that take longer than their bodies, the worst first."""
    kernels = [op for op in graph.ops if op.body is not None]
    found = []
    for op in kernels:
        with contextlib.suppress(Untested, MoecError):
            swapped = watch.compare(with_bodies(graph, {op}), graph)
            if swapped.is_slower and watch.compare(with_bodies(graph, {op}), graph).is_slower:
                found.append(SlowKernel(op, swapped))
    return tuple(sorted(found, key=lambda k: -k.change.increase))


# against another program
@dataclass(frozen=True)
class PlaceTime:
    """The time of all ops that come from one line of the model, in both programs."""

    place: str
    before: float
    after: float


@dataclass(frozen=True)
class Against:
    """A graph's emitted module against a baseline's: both times, and by line of the model."""

    graph: Graph
    baseline: Graph
    change: Change
    places: tuple[PlaceTime, ...]
    before: tuple[OpTime, ...]
    after: tuple[OpTime, ...]


def against(graph: Graph, baseline: Graph, watch: Stopwatch) -> Against:
    """Time two optimised graphs in turns, and say at which lines of the model they differ."""
    types = [[v.type for v in (*g.inputs, *g.cotangents)] for g in (baseline, graph)]
    if types[0] != types[1]:
        raise PassError(
            f"@{graph.name} and the baseline take different inputs: only programs that are called "
            "alike can be compared (both with --training, or neither)"
        )
    try:
        found = watch.compare(baseline, graph)
        found = watch.compare(baseline, graph) if found.is_slower else found  # twice, or not at all
    except Untested as error:
        raise PassError(f"@{graph.name}: one of the two modules does not run: {error}") from error
    baseline, graph = watch.lowered(baseline), watch.lowered(graph)
    before, after = watch.ops(baseline), watch.ops(graph)
    return Against(graph, baseline, found, _by_place(before, after), before, after)


def place_of(op: Op) -> str:
    """The line of the model that an op comes from."""
    return str(op.loc) if op.loc is not None else "made by a pass"


def _by_place(before: Sequence[OpTime], after: Sequence[OpTime]) -> tuple[PlaceTime, ...]:
    """Times summed by line of the model, the largest increase first."""
    sums: dict[str, list[float]] = {}
    for side, times in enumerate((before, after)):
        for one in times:
            sums.setdefault(place_of(one.op), [0.0, 0.0])[side] += one.ms
    rows = [PlaceTime(place, a, b) for place, (a, b) in sums.items()]
    return tuple(sorted(rows, key=lambda row: row.before - row.after))


__all__ = [
    "Against",
    "OpTime",
    "PassTime",
    "PlaceTime",
    "SlowKernel",
    "Slowdown",
    "Stopwatch",
    "against",
    "find_slowdown",
    "is_slower",
    "place_of",
]

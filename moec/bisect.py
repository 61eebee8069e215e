"""Bisection: the first pass that breaks a graph, the one rewrite in it, the one kernel.

A *test* says what is wrong with a graph, in words, or nothing; it raises :class:`Untested` where
it cannot say. The passes are tried in order on what the graph became; the rewrites of the guilty
pass are searched by halves, with fuel that ends after so many of them; kernels are tried one at a
time, all others replaced by their bodies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moec import fuel, interp
from moec.compare import Change, compare
from moec.errors import MoecError
from moec.execute import run_emitted
from moec.inputs import default_dims
from moec.ir.builder import Builder
from moec.ir.dims import evaluate
from moec.ir.graph import Graph, Op, Value
from moec.ir.types import DTYPES
from moec.ir.verify import verify
from moec.manager import PassCall, Step
from moec.observers import Check, difference, reference_gradients
from moec.routings import adversarial_inputs

# What the interpreter's verdict says.
CHANGED = "changed the meaning"
# Names and types of values, and numbers, say nothing about the kind of a failure.
_PARTICULARS = re.compile(r"%\w+|\w+\[[^\]]*\]|[(),:]|\b\d+\b")
# A size of dims that nobody named, besides the small ones
_MORE = 33
# What is wrong with what a pass did, in words; nothing if all is well.
StepTest = Callable[[Step], str]


class Untested(Exception):
    """A test that cannot say whether a graph is right: the search goes on without it."""


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a pass: the ``number``-th of ``total``, and the graph on either side of it.

    ``untested`` rewrites before it could not be tested: one of them may be to blame in its place.
    """

    number: int
    total: int
    what: str
    before: Graph
    after: Graph
    untested: int = 0

    @property
    def removed(self) -> tuple[Op, ...]:
        """The ops that it took away, and those of which it changed what they read."""
        return tuple(a for a, _ in self._changes() if a is not None)

    @property
    def added(self) -> tuple[Op, ...]:
        """The ops that it put in their place."""
        return tuple(b for _, b in self._changes() if b is not None)

    def _changes(self) -> list[tuple[Op | None, Op | None]]:
        """Before and after of what differs; not of ops that only read what was put in place."""
        lines = [d for d in compare(self.before, self.after) if d.change is not Change.SAME]
        new = {v for d in lines if d.before is None and d.after for v in d.after.results}
        return [
            (d.before, d.after)
            for d in lines
            if d.change is not Change.REWIRED or (d.after and not new & set(d.after.operands))
        ]


@dataclass(frozen=True)
class GuiltyPass:
    """The first pass that a test objects to: its place (from 0), what is wrong, and the rewrite
    (``None`` if the pass does not count its rewrites, or raised).

    ``untested`` are the passes right before it whose results could not be tested.
    """

    call: PassCall
    index: int
    before: Graph
    problem: str
    rewrite: Rewrite | None
    untested: tuple[PassCall, ...] = ()


@dataclass(frozen=True)
class GuiltyKernel:
    """A kernel whose results differ from its body's."""

    op: Op
    problem: str


def find_pass(
    graph: Graph, calls: Sequence[PassCall], test: StepTest
) -> tuple[GuiltyPass | None, Graph]:
    """The first pass that ``test`` objects to, or ``None``; and the graph as far as it came."""
    untested: list[PassCall] = []
    for index, call in enumerate(calls):
        try:
            step, problem = attempt(call, graph, None, test)
        except Untested:
            untested.append(call)
            graph = _graph_after(call, graph)
            continue
        if problem:
            rewrite = find_rewrite(call, graph, test)
            return GuiltyPass(call, index, graph, problem, rewrite, tuple(untested)), graph
        if step is not None and step.changed:
            untested = []
        graph = step.after if step is not None else graph
    return None, graph


def attempt(
    call: PassCall, graph: Graph, amount: int | None, test: StepTest
) -> tuple[Step | None, str]:
    """Run one pass with at most ``amount`` rewrites; the step (if it did not raise) and what is
    wrong.
    """
    try:
        with fuel.limit(amount) as record:
            after = call.definition.run(graph, **call.options)
        step = Step(call, graph, after, 0.0, len(record.spent))
        verify(after, dialects=call.definition.leaves, after=str(call))
    except MoecError as error:
        return None, str(error)
    return step, test(step)


def kind_of(problem: str) -> str:
    """What kind of failure words describe: the meaning changed, or an error (its first words)."""
    if CHANGED in problem:
        return CHANGED
    return " ".join(_PARTICULARS.sub(" ", problem).split()[:4])


def find_rewrite(call: PassCall, graph: Graph, test: StepTest) -> Rewrite | None:
    """The smallest number of rewrites with which the pass fails: the last of them is to blame."""
    total = _count(call, graph)
    if total == 0 or _verdict(call, graph, 0, test) is not False:
        return None
    good, bad = 0, total
    while bad - good > 1:
        tried = ((n, _verdict(call, graph, n, test)) for n in _from_middle(good, bad))
        amount, is_bad = next(((n, v) for n, v in tried if v is not None), (0, None))
        if is_bad is None:
            break  # nothing between the two can be tested
        good, bad = (good, amount) if is_bad else (amount, bad)
    with fuel.limit(bad) as record:
        after = _graph_after(call, graph)
    what = record.spent[-1] if record.spent else str(call)
    with fuel.limit(good):
        before = _graph_after(call, graph)
    return Rewrite(bad, total, what, before, after, untested=bad - good - 1)


def _verdict(call: PassCall, graph: Graph, amount: int, test: StepTest) -> bool | None:
    """Whether a pass fails with so many rewrites; ``None`` where that cannot be tested."""
    try:
        return bool(attempt(call, graph, amount, test)[1])
    except Untested:
        return None


def _from_middle(low: int, high: int) -> Iterator[int]:
    """The numbers between two, the one in the middle first, then its neighbours."""
    middle = (low + high) // 2
    yield from sorted(range(low + 1, high), key=lambda n: abs(n - middle))


def _count(call: PassCall, graph: Graph) -> int:
    with fuel.limit(None) as record:
        _graph_after(call, graph)
    return len(record.spent)


def _graph_after(call: PassCall, graph: Graph) -> Graph:
    """What a pass makes of a graph; the graph itself if it raises."""
    try:
        return call.definition.run(graph, **call.options)
    except MoecError:
        return graph


def same_meaning(dims: dict[str, int] | None = None, seed: int = 0) -> StepTest:
    """A test that interprets the graph before and after, in float64 on generated inputs."""
    checks = [Check(dims, seed)]

    def test(step: Step) -> str:
        if len(checks) == 1:  # more tokens, for what only some routings show
            checks.append(Check({**default_dims(step.before, _MORE), **(dims or {})}, seed + 1))
        try:
            for check in checks:
                check.after(step, 0)
            compares = step.changed and not step.call.definition.changes_meaning
            return _awkward_problem(step, seed) if compares else ""
        except MoecError as error:  # where the meaning changed, or an op's eval is not its type
            return str(error)

    return test


def _awkward_problem(step: Step, seed: int) -> str:
    """What a pass does wrong where tokens all go one way, or nowhere."""
    if len(step.after.cotangents) != len(step.before.cotangents):
        return ""  # differentiation is compared on random routings
    for routing, sizes, arguments in adversarial_inputs(step.before, seed):
        expected, got = (
            interp.run(g, arguments, float64=True, dims=sizes) for g in (step.before, step.after)
        )
        for value, a, b in zip(step.after.returned, expected, got, strict=True):
            problem = difference(a, b)
            if problem:
                return f"pass {step.call} {CHANGED}: %{value.hint} {problem}, routing {routing}"
    return ""


def same_results(inputs: Sequence[torch.Tensor], seed: int = 0) -> StepTest:
    """As :func:`same_meaning`, on these inputs of the first graph."""

    def test(step: Step) -> str:
        if not step.changed:
            return ""
        try:
            expected, got = _results(step, inputs, seed)
        except MoecError as error:  # an op's eval is not its type
            return str(error)
        for value, a, b in zip(step.after.returned, expected, got, strict=True):
            problem = difference(a, b)
            if problem:
                return f"pass {step.call} {CHANGED} on the given inputs: %{value.hint} {problem}"
        return ""

    return test


def _results(
    step: Step, inputs: Sequence[torch.Tensor], seed: int
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """What a graph before and after a pass gives for the same inputs, in float64."""
    arguments = [t.double() if t.is_floating_point() else t for t in inputs]
    before = [*arguments, *cotangents(step.before, arguments, seed, torch.float64)]
    after = [*arguments, *cotangents(step.after, arguments, seed, torch.float64)]
    got = interp.run(step.after, after, float64=True)
    if len(after) > len(before):
        return reference_gradients(step, before, after[len(before) :], {}), got
    return interp.run(step.before, before, float64=True), got


def cotangents(
    graph: Graph, inputs: Sequence[torch.Tensor], seed: int, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Random cotangents of a joint graph's outputs, in ``dtype`` or their own; none of another."""
    sizes = interp.bind_dims(replace(graph, cotangents=()), inputs)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for value in graph.cotangents:
        shape = tuple(evaluate(d, sizes) for d in value.type.shape)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append(drawn.to(inputs[0].device, dtype or DTYPES[value.type.dtype]))
    return found


# kernels
def find_kernels(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor], tolerance: float
) -> list[GuiltyKernel]:
    """The kernels of a lowered graph whose emitted code differs from their bodies.

    Each kernel runs alone, with every other one replaced by its body. Errors are relative to the
    largest element of the interpreter's float64 result.
    """
    expected = interp.run(graph, arguments, float64=True)
    plain = with_bodies(graph, {op for op in graph.ops if op.body is not None})
    if _difference(plain, target, arguments, expected, tolerance):
        return []  # wrong without any kernel: another op is to blame
    guilty = []
    for op in graph.ops:
        if op.body is None:
            continue
        others = {o for o in graph.ops if o.body is not None and o is not op}
        problem = _difference(with_bodies(graph, others), target, arguments, expected, tolerance)
        if problem:
            guilty.append(GuiltyKernel(op, problem))
    return guilty


def emitted_problem(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor], tolerance: float
) -> str:
    """What is wrong with a graph's emitted module as a whole, in words."""
    expected = interp.run(graph, arguments, float64=True)
    return _difference(graph, target, arguments, expected, tolerance)


def _difference(
    graph: Graph,
    target: str,
    arguments: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    tolerance: float,
) -> str:
    try:
        found = run_emitted(graph, target, arguments)
    except Exception as error:  # emitter, kernel compiler and launch raise errors of many kinds
        return f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for value, a, b in zip(graph.returned, expected, found, strict=True):
        size = relative_error(b, a)
        if not size <= tolerance:
            return f"%{value.hint} is off by {size:.2g} of its largest element"
    return ""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest element; NaN where only one of the two has it,
    infinite for other shapes.
    """
    if found.shape != expected.shape:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    a, b = found.double(), expected.double()
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(b), (a - b).abs())
    return float(gap.max()) / max(scale, 1e-30)


def with_bodies(graph: Graph, kernels: Collection[Op]) -> Graph:
    """The graph with some of its kernels replaced by the ops of their bodies."""
    builder = Builder(graph.ranges)
    mapping: dict[Value, Value] = {}
    for op in graph.ops:
        operands = [mapping.get(v, v) for v in op.operands]
        if op.body is None or op not in kernels:
            builder.ops.append(replace(op, operands=tuple(operands)))
        else:
            mapping.update(zip(op.results, builder.inline(op.body, operands), strict=True))
    return replace(
        graph,
        ops=tuple(builder.ops),
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )


__all__ = [
    "GuiltyKernel",
    "GuiltyPass",
    "Rewrite",
    "Untested",
    "attempt",
    "cotangents",
    "emitted_problem",
    "find_kernels",
    "find_pass",
    "find_rewrite",
    "kind_of",
    "same_meaning",
    "same_results",
    "with_bodies",
]

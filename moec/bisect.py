"""Bisection: the first pass that breaks a graph, the one rewrite in it, the one kernel.

A *test* says what is wrong with a graph, in words, or nothing. The passes are tried in order on
what the graph became; the rewrites of the guilty pass are searched by halves, with fuel that ends
after so many of them; kernels are tried one at a time, all others replaced by their bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moec import fuel, interp
from moec.errors import MoecError
from moec.execute import run_emitted
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value
from moec.ir.text import show
from moec.ir.verify import verify
from moec.manager import PassCall, Step
from moec.observers import Check

# What the interpreter's verdict says.
CHANGED = "changed the meaning"
# What is wrong with what a pass did, in words; nothing if all is well.
StepTest = Callable[[Step], str]


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a pass: the ``number``-th of ``total``, and the graph on either side of it."""

    number: int
    total: int
    what: str
    before: Graph
    after: Graph

    @property
    def removed(self) -> tuple[Op, ...]:
        """The ops that it took away."""
        return only_in(self.before, self.after)

    @property
    def added(self) -> tuple[Op, ...]:
        """The ops that it put in their place."""
        return only_in(self.after, self.before)


@dataclass(frozen=True)
class GuiltyPass:
    """The first pass that a test objects to: its place (from 0), what is wrong, and the rewrite
    (``None`` if the pass does not count its rewrites, or raised).
    """

    call: PassCall
    index: int
    before: Graph
    problem: str
    rewrite: Rewrite | None


@dataclass(frozen=True)
class GuiltyKernel:
    """A kernel whose results differ from its body's."""

    op: Op
    problem: str


def find_pass(
    graph: Graph, calls: Sequence[PassCall], test: StepTest
) -> tuple[GuiltyPass | None, Graph]:
    """The first pass that ``test`` objects to, or ``None``; and the graph as far as it came."""
    for index, call in enumerate(calls):
        step, problem = attempt(call, graph, None, test)
        if problem:
            return GuiltyPass(call, index, graph, problem, _rewrite(call, graph, test)), graph
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
        return step, test(step)
    except MoecError as error:
        return None, str(error)


def kind_of(problem: str) -> str:
    """What kind of failure words describe: the meaning changed, or an error (its first words)."""
    return CHANGED if CHANGED in problem else " ".join(problem.split()[:4])


def _rewrite(call: PassCall, graph: Graph, test: StepTest) -> Rewrite | None:
    """The smallest number of rewrites with which the pass fails: the last of them is to blame."""
    total = _count(call, graph)
    if total == 0 or attempt(call, graph, 0, test)[1]:
        return None
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if attempt(call, graph, middle, test)[1] else (middle, bad)
    with fuel.limit(bad) as record:
        after = _graph_after(call, graph)
    what = record.spent[-1] if record.spent else str(call)
    with fuel.limit(good):
        before = _graph_after(call, graph)
    return Rewrite(bad, total, what, before, after)


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
    check = Check(dims, seed)

    def test(step: Step) -> str:
        check.after(step, 0)  # raises where the meaning changed
        return ""

    return test


# kernels
def find_kernels(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor], tolerance: float
) -> list[GuiltyKernel]:
    """The kernels of a lowered graph whose emitted code differs from their bodies.

    Each kernel runs alone, with every other one replaced by its body. Errors are relative to the
    largest element of the interpreter's float64 result.
    """
    expected = interp.run(graph, arguments, float64=True)
    guilty = []
    for op in graph.ops:
        if op.body is None:
            continue
        problem = _difference(with_bodies(graph, keep=op), target, arguments, expected, tolerance)
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
    """The largest difference over the largest element; NaN where only one of the two has it."""
    if found.numel() == 0:
        return 0.0
    a, b = found.double(), expected.double()
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(b), (a - b).abs())
    return float(gap.max()) / max(scale, 1e-30)


def with_bodies(graph: Graph, keep: Op) -> Graph:
    """The graph with every kernel but one replaced by the ops of its body."""
    builder = Builder(graph.ranges)
    mapping: dict[Value, Value] = {}
    for op in graph.ops:
        operands = [mapping.get(v, v) for v in op.operands]
        if op.body is None or op is keep:
            kept = replace(op, operands=tuple(operands))
            builder.ops.append(kept)
        else:
            mapping.update(zip(op.results, builder.inline(op.body, operands), strict=True))
    return replace(
        graph,
        ops=tuple(builder.ops),
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )


def only_in(graph: Graph, other: Graph) -> tuple[Op, ...]:
    """The ops of a graph that the other has not: by kind, types and attributes, not by name."""
    there: dict[str, int] = {}
    for op in other.ops:
        there[_key(op)] = there.get(_key(op), 0) + 1
    alone = []
    for op in graph.ops:
        key = _key(op)
        if there.get(key, 0) > 0:
            there[key] -= 1
        else:
            alone.append(op)
    return tuple(alone)


def _key(op: Op) -> str:
    types = ", ".join(str(v.type) for v in (*op.operands, *op.results))
    body = show(op.body, locations=False) if op.body is not None else ""
    return f"{op.kind} {dict(op.attrs)} {types} {body}"


__all__ = [
    "GuiltyKernel",
    "GuiltyPass",
    "Rewrite",
    "attempt",
    "emitted_problem",
    "find_kernels",
    "find_pass",
    "kind_of",
    "same_meaning",
]

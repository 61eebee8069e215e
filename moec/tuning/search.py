"""Measured tuning: the tiles that the cost model puts first, each in its place in the whole block.

In a round each kernel has its next candidate, all of them at a time, and each is timed where it
stands, on rows that the block's own router chose. What wins is measured once more, together, and
kept only where it wins again.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moec.codegen.triton.choose import misfit
from moec.codegen.triton.tiles import Tile
from moec.inputs import default_dims
from moec.ir.builder import make_op
from moec.ir.dims import evaluate
from moec.ir.graph import Graph, Op
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.tuning.cost import H100, Candidate, Machine, ranked
from moec.tuning.file import Entry, Tuning, versions
from moec.tuning.kernels import Kernel, kernel_of

# Milliseconds of a graph's ops, in order, within so many seconds; or why there are none.
Measure = Callable[[Graph, float], Sequence[float] | str]
# Called with what was done, and what came of it.
Report = Callable[[str], None]
LEAST_GAIN = 0.01  # of a kernel's time: less is noise
# An entry holds for so many times fewer and more rows than it was measured with.
SPAN = 4


@dataclass(frozen=True)
class Wanted:
    """One kernel of a graph: its ops, the default, and other candidates, the best first."""

    kernel: Kernel
    ops: tuple[int, ...]
    default: Candidate
    others: tuple[Candidate, ...]
    rows: int


@dataclass
class Best:
    """The best that was measured of a kernel."""

    wanted: Wanted
    default_ms: float
    chosen: Candidate
    ms: float
    failed: list[str] = field(default_factory=list)

    def entry(self) -> Entry:
        """As a file has it."""
        w, c = self.wanted, self.chosen
        low, high = w.rows // SPAN, w.rows * SPAN
        times = round(self.ms, 5), round(self.default_ms, 5)
        return Entry(w.kernel, c.template, c.tile, *times, low, high)


def lowered(graph: Graph, training: bool, descriptors: bool, gluon: bool) -> Graph:
    """A block's graph with kernels, and tiles by rule."""
    if any(op.kind.startswith("kern.") for op in graph.ops):
        return graph
    return PassManager(pipeline("triton", training, descriptors, gluon=gluon)).run(graph)


def wanted(
    graph: Graph,
    sizes: Mapping[str, int],
    templates: Sequence[str],
    top: int,
    machine: Machine = H100,
) -> list[Wanted]:
    """The kernels of a lowered graph with ``top`` candidates each besides the default."""
    places: dict[Kernel, list[int]] = {}
    for place, op in enumerate(graph.ops):
        kernel = kernel_of(op)
        if kernel is not None and "template" in op.attrs:
            places.setdefault(kernel, []).append(place)
    found = []
    for kernel, ops in places.items():
        op, rows = graph.ops[ops[0]], evaluate(kernel.rows, sizes)
        default = Candidate(op.attrs["template"], Tile(*op.attrs["tile"]), 0.0)
        others = _fitting(op, kernel, ranked(kernel, templates, rows, machine), default, top)
        found.append(Wanted(kernel, tuple(ops), default, tuple(others), rows))
    return found


def _fitting(
    op: Op, kernel: Kernel, candidates: Iterable[Candidate], default: Candidate, top: int
) -> list[Candidate]:
    """The first candidates that a template takes, no two of one template and shape in a row."""
    found: list[Candidate] = []
    seen = {(default.template, default.tile)}
    for c in candidates:
        if len(found) == top:
            break
        if (c.template, c.tile) not in seen and _is_other(c, found):
            seen.add((c.template, c.tile))
            if not misfit(op, kernel, c.template, c.tile):
                found.append(c)
    return found


def _is_other(candidate: Candidate, found: Sequence[Candidate]) -> bool:
    """Whether a candidate differs from those before in more than its stages.

    The model knows little of stages and warps: at most two of one rows, columns and depth.
    """
    shape = (candidate.template, *candidate.tile.attribute[:3])
    return sum((f.template, *f.tile.attribute[:3]) == shape for f in found) < 2


def with_candidates(graph: Graph, chosen: Mapping[int, Candidate]) -> Graph:
    """A lowered graph whose ops at some places have other templates and tiles."""

    def changed(place: int, op: Op) -> Op:
        if place not in chosen:
            return op
        c = chosen[place]
        attrs = {**op.attrs, "template": c.template, "tile": c.tile.attribute}
        made = make_op(op.kind, op.operands, attrs, body=op.body, loc=op.loc)
        return replace(op, attrs=made.attrs)

    return graph.with_ops(tuple(changed(i, op) for i, op in enumerate(graph.ops)))


def tune_graph(
    graph: Graph, kernels: Sequence[Wanted], measure: Measure, deadline: float, report: Report
) -> list[Best]:
    """The best of each kernel of a lowered graph; empty if the graph itself does not run.

    ``deadline`` is a time of ``time.monotonic``; what was measured by then counts.
    """
    times = measure(graph, deadline - time.monotonic())
    if isinstance(times, str):
        report(f"@{graph.name} does not run: {times}")
        return []
    best = [Best(w, ms := _sum(times, w), w.default, ms) for w in kernels]
    report("the default")
    slowest = 0.0
    for turn in range(max((len(w.others) for w in kernels), default=0)):
        start = time.monotonic()
        if start + 3 * slowest >= deadline:  # room for a round and for what confirms it
            break
        _try_round(graph, best, turn, measure, deadline - 2 * slowest)
        slowest = max(slowest, time.monotonic() - start)
        report(f"candidate {turn + 1}")
    _confirm(graph, best, measure, deadline)
    return best


def _sum(times: Sequence[float], one: Wanted) -> float:
    """The time of a kernel, over the ops that are it, a run."""
    return sum(times[place] for place in one.ops) / len(one.ops)


def _try_round(
    graph: Graph, best: Sequence[Best], turn: int, measure: Measure, deadline: float
) -> None:
    """Time the next candidate of every kernel, all at a time; one by one where that fails."""
    trying = [b for b in best if turn < len(b.wanted.others)]
    if _try(graph, trying, turn, measure, deadline):
        return
    for one in trying if len(trying) > 1 else ():
        _try(graph, [one], turn, measure, deadline)


def _try(
    graph: Graph, trying: Sequence[Best], turn: int, measure: Measure, deadline: float
) -> bool:
    chosen = {p: b.wanted.others[turn] for b in trying for p in b.wanted.ops}
    if time.monotonic() >= deadline:
        return True
    times = measure(with_candidates(graph, chosen), deadline - time.monotonic())
    if isinstance(times, str):
        if len(trying) == 1:
            trying[0].failed.append(f"{trying[0].wanted.others[turn].tile}: {times}")
        return False
    for b in trying:
        ms = _sum(times, b.wanted)
        if ms < b.ms:
            b.chosen, b.ms = b.wanted.others[turn], ms
    return True


def _confirm(graph: Graph, best: Sequence[Best], measure: Measure, deadline: float) -> None:
    """Measure the default and all that won once more; what does not win again is dropped."""
    won = [b for b in best if b.chosen is not b.wanted.default]
    chosen = {p: b.chosen for b in won for p in b.wanted.ops}
    again = measure(graph, deadline - time.monotonic()) if won else ""
    both = measure(with_candidates(graph, chosen), deadline - time.monotonic()) if won else ""
    for b in won:
        if not isinstance(again, str) and not isinstance(both, str):
            b.default_ms, b.ms = _sum(again, b.wanted), _sum(both, b.wanted)
        if isinstance(both, str) or b.ms > (1 - LEAST_GAIN) * b.default_ms:
            b.chosen, b.ms = b.wanted.default, b.default_ms


def tuning_of(best: Iterable[Best], device: str) -> Tuning:
    """What was measured, as a file; of equal kernels the last."""
    entries = {(e.kernel, e.high): e for e in (b.entry() for b in best)}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Tuning(device, versions(), today, tuple(entries.values()))


def all_sizes(graph: Graph, tokens: int) -> dict[str, int]:
    """Sizes for every dim of a graph: the last is the tokens, the others are as small as they may
    be.
    """
    least = default_dims(graph, size=1)
    return {**least, **dict([*default_dims(graph, size=tokens).items()][-1:])}

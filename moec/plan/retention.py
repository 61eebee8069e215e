"""Exact plans by constraint programming: retention intervals (Moccasin, Bartan et al., ICML 2023).

Each node has up to ``copies`` optional intervals: it runs at the start, an output is held until
the end; one interval for each output, with one start. With a fixed order, first runs are at given
events, and between the first runs of two neighbours any earlier node may run again once, in the
given order, as in the paper. Without, every run has an event of its own, and all are different.
Solved with CP-SAT, from a hint.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from moec.plan.problem import Problem

# Durations that are not whole are scaled to whole numbers of this size; rounding down keeps the
# bound a bound.
_LARGEST = 10**7


@dataclass(frozen=True)
class _Run:
    """When a node runs, the last event at which each output is held, whether it runs at all."""

    start: Any
    ends: tuple[Any, ...]
    active: Any


@dataclass(frozen=True)
class Proof:
    """The best sequence (None if there is none), a time that no plan which runs each node at most
    ``most_runs`` times is below, and whether the sequence is proven the best of these.
    """

    sequence: list[int] | None
    bound: float
    complete: bool
    most_runs: int


def prove(
    problem: Problem,
    budget: int,
    fixed: bool,
    hint: Sequence[int] | None,
    deadline: float,
    copies: int = 2,
) -> Proof:
    """Solve until the deadline, from a hint that fits. Nodes that the hint runs more often than
    ``copies`` may run as often.
    """
    counts = Counter(hint or ())
    most = [max(copies, counts[v]) if node.rematable else 1 for v, node in enumerate(problem.nodes)]
    model = _Model(problem, budget, fixed, most)
    if hint is not None:
        model.hint(hint)
    sequence, bound, complete = model.solve(deadline)
    return Proof(sequence, bound, complete, copies)


class _Model:
    def __init__(self, problem: Problem, budget: int, fixed: bool, most: list[int]) -> None:
        self.problem = problem
        self.model = cp_model.CpModel()
        self.fixed = fixed
        self.place = {node: k for k, node in enumerate(problem.order)}
        count = len(problem.nodes)
        self.events = count * (count + 1) // 2 if fixed else sum(most)
        self.runs = [[self._run(v, copy) for copy in range(most[v])] for v in range(count)]
        self._order_copies()
        self._limit_memory(budget)
        for node, read in enumerate(problem.reads):
            for value in read:
                for run in self.runs[node]:
                    self._need(value, run)
        if not fixed:
            self.model.add_all_different([run.start for runs in self.runs for run in runs])
        self.scale = self._minimise()

    def _run(self, node: int, copy: int) -> _Run:
        model, name = self.model, f"{node}.{copy}"
        start = model.new_int_var_from_domain(self._starts(node, copy), f"start{name}")
        outputs = range(len(self.problem.nodes[node].outputs))
        ends = tuple(model.new_int_var(0, self.events, f"end{name}.{k}") for k in outputs)
        for end in ends:
            model.add(end >= start)
        active = model.new_constant(1) if copy == 0 else model.new_bool_var(f"active{name}")
        return _Run(start, ends, active)

    def _starts(self, node: int, copy: int) -> Any:
        if not self.fixed:
            return cp_model.Domain(0, self.events - 1)
        place = self.place[node]
        if copy == 0:
            return cp_model.Domain.from_values([_event(place, place)])
        stages = range(place + 1, len(self.place))
        return cp_model.Domain.from_values([_event(k, place) for k in stages] or [self.events])

    def _order_copies(self) -> None:
        for runs in self.runs:
            for one, other in itertools.pairwise(runs):
                self.model.add_implication(other.active, one.active)
                self.model.add(one.start < other.start).only_enforce_if(other.active)
                for end in one.ends:
                    self.model.add(end < other.start).only_enforce_if(other.active)

    def _limit_memory(self, budget: int) -> None:
        intervals: list[Any] = []
        sizes: list[int] = []
        for v, node in enumerate(self.problem.nodes):
            for k, run in enumerate(self.runs[v]):
                intervals += [self._interval(run, end, f"{v}.{k}") for end in run.ends]
                sizes += node.outputs
                if node.workspace:
                    intervals.append(
                        self.model.new_optional_fixed_size_interval_var(
                            run.start, 1, run.active, f"work{v}.{k}"
                        )
                    )
                    sizes.append(node.workspace)
        for value in self.problem.kept:
            self._keep(value)
        self.model.add_cumulative(intervals, sizes, budget - self.problem.resident)

    def _interval(self, run: _Run, end: Any, name: str) -> Any:
        """The time in which an output of a run is held."""
        length = self.model.new_int_var(1, self.events + 1, f"length{name}")
        stop = self.model.new_int_var(1, self.events + 1, f"stop{name}")
        self.model.add(stop == end + 1)
        return self.model.new_optional_interval_var(
            run.start, length, stop, run.active, f"held{name}"
        )

    def _copies(self, value: int) -> list[tuple[_Run, Any]]:
        """The runs that make a value, with the last event at which it is held."""
        owner = self.problem.owners[value]
        output = value - self.problem.made[owner].start
        return [(run, run.ends[output]) for run in self.runs[owner]]

    def _keep(self, value: int) -> None:
        copies = self._copies(value)
        held = [self.model.new_bool_var("") for _ in copies]
        self.model.add_exactly_one(held)
        for (run, end), chosen in zip(copies, held, strict=True):
            self.model.add_implication(chosen, run.active)
            self.model.add(end == self.events).only_enforce_if(chosen)

    def _need(self, value: int, run: _Run) -> None:
        served = []
        for other, end in self._copies(value):
            serves = self.model.new_bool_var("")
            self.model.add_implication(serves, other.active)
            self.model.add(other.start + 1 <= run.start).only_enforce_if(serves)
            self.model.add(run.start <= end).only_enforce_if(serves)
            served.append(serves)
        self.model.add_bool_or([*served, run.active.negated()])

    def _minimise(self) -> float:
        durations = [node.duration for node in self.problem.nodes]
        whole = all(float(d).is_integer() for d in durations)
        scale = 1.0 if whole else _LARGEST / max(durations)
        self.model.minimize(
            sum(
                int(d * scale) * run.active
                for d, runs in zip(durations, self.runs, strict=True)
                for run in runs[1:]
            )
        )
        return scale

    def hint(self, sequence: Sequence[int]) -> None:
        """Begin at this sequence."""
        events = self._events_of(sequence)
        last = self._last_uses(sequence)
        seen: Counter[int] = Counter()
        for k, node in enumerate(sequence):
            run = self.runs[node][seen[node]]
            self.model.add_hint(run.start, events[k])
            for end, use in zip(run.ends, last[k], strict=True):
                self.model.add_hint(end, events[use])
            # The first run is always there: a constant, which takes no hint.
            if seen[node]:
                self.model.add_hint(run.active, 1)
            seen[node] += 1
        for node, runs in enumerate(self.runs):
            for run in runs[seen[node] :]:
                self.model.add_hint(run.active, 0)

    def _events_of(self, sequence: Sequence[int]) -> list[int]:
        if not self.fixed:
            return list(range(len(sequence)))
        stages = []
        stage = len(self.place) - 1
        for node in reversed(sequence):
            stages.append(stage)
            if self.place[node] == stage and node not in sequence[: len(sequence) - len(stages)]:
                stage -= 1
        return [
            _event(k, self.place[node]) for k, node in zip(reversed(stages), sequence, strict=True)
        ]

    def _last_uses(self, sequence: Sequence[int]) -> list[list[int]]:
        """Of each execution: for each output, the last one that reads it."""
        latest: dict[int, int] = {}
        last = [[k] * len(self.problem.nodes[v].outputs) for k, v in enumerate(sequence)]
        for k, node in enumerate(sequence):
            for value in self.problem.reads[node]:
                owner = self.problem.owners[value]
                last[latest[owner]][value - self.problem.made[owner].start] = k
            latest[node] = k
        return last

    def solve(self, deadline: float) -> tuple[list[int] | None, float, bool]:
        """Run CP-SAT."""
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(deadline - time.monotonic(), 0.1)
        solver.parameters.num_workers = 2
        status = solver.solve(self.model)
        if status == cp_model.INFEASIBLE:
            return None, float("inf"), True
        bound = self.problem.least_time + max(solver.best_objective_bound, 0.0) / self.scale
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, bound, False
        events = [
            (solver.value(run.start), v)
            for v, runs in enumerate(self.runs)
            for run in runs
            if solver.value(run.active)
        ]
        return [v for _, v in sorted(events)], bound, status == cp_model.OPTIMAL


def _event(stage: int, place: int) -> int:
    """The event at which the node of a place may run in a stage."""
    return stage * (stage + 1) // 2 + place

"""One interface to the planners: the best plan within a budget that can be found in a given time,
with a lower bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from moec.byte_sizes import parse_bytes, split_unit
from moec.errors import BudgetError
from moec.plan.check import Replay, replay
from moec.plan.problem import Problem

# A plan of a time this much above the bound, as a share of it, is as good as optimal.
NEGLIGIBLE = 1e-9
# Sequences that the search begins with, at most
MOST_STARTS = 4
# The share of the time that an exact solution spends on search first
EXACT_SEARCH = 0.2
# The share of the time after which bounds and plans from them end, so that search has its turn
RELAXED_SHARE = 0.4
# More runs of a node than this are not proven for
MOST_COPIES = 6


@dataclass(frozen=True)
class Progress:
    """How far the planning is: the phase, the time of the best plan (infinite if there is none),
    the lower bound, and seconds since the start.
    """

    phase: str
    time: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """By how much the plan may be above the optimum, in percent of the bound."""
        return percent_above(self.time, self.bound)


@dataclass(frozen=True)
class Plan:
    """A plan that was replayed: ``sequence`` of nodes in order of execution, each output freed
    right after its last use; its ``peak`` in bytes; its ``time``; the ``bound`` that no plan is
    below; ``least_time``: of running every node once; ``history``: seconds and time of each
    better plan that was found on the way. ``proven_runs``: where CP-SAT proved that no plan is
    faster that runs each node at most so often (0: it proved nothing); with a fixed order, of those
    that between two first runs repeat in the given order.
    """

    sequence: tuple[int, ...]
    peak: int
    time: float
    bound: float
    least_time: float
    proven_runs: int = 0
    history: tuple[tuple[float, float], ...] = field(default=(), compare=False)

    @property
    def extra(self) -> float:
        """Total duration increase in percent: time beyond running every node once."""
        return percent_above(self.time, self.least_time)

    @property
    def gap(self) -> float:
        """By how much the plan may be above the optimum, in percentage points of ``extra``."""
        return self.extra - percent_above(self.bound, self.least_time)

    @property
    def is_optimal(self) -> bool:
        """Whether the bound proves that no plan is faster."""
        return self.time <= self.bound * (1 + NEGLIGIBLE)


def percent_above(value: float, base: float) -> float:
    """By how many percent a value is above a base."""
    if value == base:
        return 0.0
    return 100.0 * (value / base - 1.0) if base > 0 else math.inf


def solve(
    problem: Problem,
    budget: int,
    *,
    time_limit: float = 60.0,
    fixed_order: bool = False,
    exact: bool = False,
    seed: int = 0,
    gap: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
    starts: Sequence[Sequence[int]] = (),
) -> Plan:
    """The fastest plan that holds at most ``budget`` bytes, as far as ``time_limit`` seconds allow.

    ``fixed_order``: first executions stay in the order of the problem. ``exact``: spend the time
    on a proof (CP-SAT) instead of on further search. ``gap``: stop at a plan that is at most so
    many percentage points of ``extra`` above the bound. ``starts``: sequences to begin with, as the
    one of a :class:`~moec.errors.BudgetError`. The result is a function of the arguments where the
    time limit is not reached; where it is, of how far the search came.

    Ctrl-C (KeyboardInterrupt) ends the search; the best plan so far is returned if there is one.

    Raises:
        BudgetError: no plan was found; with the least budget that is known to suffice.
    """
    solver = _Solver(problem, budget, time_limit, fixed_order, seed, gap, progress)
    try:
        for sequence in starts:
            solver.offer(sequence)
        solver.run(exact)
    except KeyboardInterrupt:
        if solver.best is None:
            raise
    return solver.plan()


class _Solver:
    """The state of one call: the best plan, the bound, the least peak seen."""

    def __init__(
        self,
        problem: Problem,
        budget: int,
        time_limit: float,
        fixed: bool,
        seed: int,
        gap: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.fixed = fixed
        self.seed = seed
        self.gap = gap
        self.progress = progress
        self.start = time.monotonic()
        self.limit = time_limit
        self.deadline = self.start + time_limit
        self.bound = problem.least_time
        self.best: tuple[Replay, tuple[int, ...]] | None = None
        self.least_peak = math.inf
        self.least: tuple[int, ...] = ()
        self.history: list[tuple[float, float]] = []
        self.starts: list[tuple[int, ...]] = []
        self.proven_runs = 0

    def run(self, exact: bool) -> None:
        """The phases, until the plan is proven or time is up."""
        from moec.plan.exact import is_small
        from moec.plan.search import compile_search

        self.offer(self.problem.order)
        if self.is_done() or self.least_possible() > self.budget:
            return
        if is_small(self.problem):
            self.enumerate_states()
            return
        self.report("compile")
        compile_search()
        self.restart_clock()
        self.search(self.start + min(0.1 * self.limit, 1.0))
        if not self.is_done():
            self.relax()
        if not self.is_done():
            self.search(self.start + EXACT_SEARCH * self.limit if exact else self.deadline)
        if exact and not self.is_done():
            self.prove()

    def restart_clock(self) -> None:
        """Begin to count the time limit now."""
        self.start = time.monotonic()
        self.deadline = self.start + self.limit

    def is_done(self) -> bool:
        """Whether the search may end: the plan is as near the bound as asked, or there is none."""
        if self.best is None:
            return math.isinf(self.bound)
        enough = self.gap / 100 * self.problem.least_time
        return self.best[0].time <= self.bound * (1 + NEGLIGIBLE) + enough

    def least_possible(self) -> int:
        """Bytes that no plan can do without: the largest working set."""
        nodes = range(len(self.problem.nodes))
        return max((self.problem.working_set(v) for v in nodes), default=self.problem.resident)

    def offer(self, sequence: Sequence[int]) -> None:
        """Replay a sequence; keep it if it fits and is the fastest."""
        found = replay(self.problem, sequence)
        if found.peak < self.least_peak:
            self.least_peak, self.least = found.peak, tuple(sequence)
        if found.peak > self.budget:
            return
        if self.best is None or found.time < self.best[0].time:
            self.best = found, tuple(sequence)
            self.history.append((time.monotonic() - self.start, found.time))

    def report(self, phase: str) -> None:
        """Tell the caller how far it is."""
        if self.progress is not None:
            seconds = time.monotonic() - self.start
            best = self.best[0].time if self.best else math.inf
            self.progress(Progress(phase, best, self.bound, seconds))

    def enumerate_states(self) -> None:
        """Small graphs: the optimum."""
        from moec.plan.exact import cheapest_sequence

        sequence = cheapest_sequence(self.problem, self.budget, self.fixed)
        if sequence is None:
            self.bound = math.inf
            return
        self.offer(sequence)
        self.bound = self.problem.time_of(sequence)
        self.report("exact")

    def search(self, deadline: float) -> None:
        """Search on until a deadline; begins with the best plan."""
        from moec.plan.search import search

        best = [self.best[1]] if self.best else []
        starts = list(dict.fromkeys([*best, *reversed(self.starts)]))[:MOST_STARTS]
        found = search(
            self.problem,
            self.budget,
            fixed=self.fixed,
            seed=self.seed,
            starts=starts,
            deadline=deadline,
        )
        with closing(found):
            for candidate in found:
                self.offer(candidate.sequence)
                self.report("search")
                if self.is_done():
                    return

    def relax(self) -> None:
        """The lower bound of the gap relaxation, and plans rounded from its solutions."""
        from moec.plan.relaxed import relaxed

        self.report("bound")
        deadline = min(self.deadline, time.monotonic() + RELAXED_SHARE * self.limit)
        limits = self.limit, deadline
        for found in relaxed(self.problem, self.budget, self.fixed, *limits):
            self.bound = max(self.bound, found.bound)
            if found.sequence is not None:
                self.offer(found.sequence)
                self.starts.append(found.sequence)
            self.report("bound")
            if self.is_done():
                return

    def prove(self) -> None:
        """CP-SAT, from the best plan: first with two runs a node, then with more."""
        from moec.plan.retention import prove

        for copies in range(2, MOST_COPIES):
            self.report("exact")
            hint = self.best[1] if self.best else None
            found = prove(self.problem, self.budget, self.fixed, hint, self.deadline, copies)
            if found.sequence is not None:
                self.offer(found.sequence)
            if not found.complete or time.monotonic() > self.deadline:
                break
            self.proven_runs = copies
        self.report("exact")

    def plan(self) -> Plan:
        """The best plan, replayed once more against the budget."""
        if self.best is None:
            failure = self.failure()
            # The search for the least budget may find what the first did not.
            if self.best is None:
                raise failure
        found = replay(self.problem, self.best[1], self.budget)
        return Plan(
            self.best[1],
            found.peak,
            found.time,
            min(self.bound, found.time),
            self.problem.least_time,
            self.proven_runs,
            tuple(self.history),
        )

    def failure(self) -> BudgetError:
        """Why there is no plan, the least budget known, and what is large."""
        from moec.plan.exact import is_small, least_sequence
        from moec.plan.least import raised

        possible = self.least_possible()
        if is_small(self.problem):
            self.offer(least_sequence(self.problem, possible, int(self.least_peak), self.fixed))
        elif possible > self.budget or not math.isinf(self.bound):
            self.lower_peak(max(possible, self.budget))
        known = int(self.least_peak)
        if math.isinf(self.bound):
            possible = max(possible, self.budget + 1)
        deadline = time.monotonic() + 0.2 * self.limit
        possible = raised(self.problem, possible, known, deadline)
        reason = "no plan was found in the time limit"
        if possible > self.budget:
            reason = "there is no plan"
        values = enumerate(self.problem.sizes)
        outputs = [(size, self.problem.value_name(value)) for value, size in values]
        largest = sorted(outputs, key=lambda output: (-output[0], output[1]))[:5]
        sizes = "\n".join(f"  {size:>16} {name}" for size, name in largest)
        return BudgetError(
            f"{self.problem.name}: {reason} within {self.budget} bytes; the least budget known to"
            f" suffice is {known} bytes, and at least {possible} are needed."
            f" The largest outputs are:\n{sizes}",
            known,
            possible,
            self.least,
        )

    def lower_peak(self, limit: int) -> None:
        """Search for the least peak that can be met, for error messages."""
        from moec.plan.search import search

        deadline = max(self.deadline, time.monotonic() + 0.2 * self.limit)
        found = search(self.problem, limit, fixed=self.fixed, seed=self.seed, deadline=deadline)
        with closing(found):
            for candidate in found:
                self.offer(candidate.sequence)
                if candidate.over == 0:
                    return


def least_peak(problem: Problem, time_limit: float = 5.0, fixed_order: bool = False) -> int:
    """The least budget for which a plan is found in the time limit."""
    try:
        return solve(problem, 0, time_limit=time_limit, fixed_order=fixed_order).peak
    except BudgetError as error:
        return error.least_known


def budget_of(problem: Problem, text: str) -> int:
    """Bytes of a budget as users write it: "123", "40GiB", "1.5GB", or "80%" of the peak of the
    given order.

    Raises:
        PlanError: it is none of these.
    """
    value, unit = split_unit(text)
    if unit == "%":
        return int(value / 100 * replay(problem, problem.order).peak)
    return parse_bytes(text)


__all__ = ["Plan", "Progress", "budget_of", "least_peak", "percent_above", "solve"]

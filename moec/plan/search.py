"""The scalable planner: rounds of annealing, each longer than the last, until time is up.

A round anneals twice, side by side: from the given order, and from the best plan so far. A round
is deterministic; how many there are depends on the time limit only.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from moec.plan.annealing import anneal
from moec.plan.changes import new_search
from moec.plan.problem import Node, Problem, make_problem
from moec.plan.sequence import OVER, Arrays, State, arrays_of, build, empty_state, nodes_of

# Changes for each node in the first round, and how much longer each round is than the last
FIRST_ROUND = 40
GROWTH = 1.5
# Temperatures in mean durations: at the start of a search, of an improvement, at the end
HOT, WARM, COLD = 3.0, (0.1, 0.5, 0.02), 0.003
# Initial prices of a byte above the budget, in turns: of the time at which a mean output that is
# above it for ten places costs a mean duration. The tighter the budget, the more helps.
PRICES = (1.0, 10.0, 30.0)
# Rounds without improvement after which the search ends
PATIENCE = 14


@dataclass(frozen=True)
class Candidate:
    """A sequence; ``over`` is the sum over steps of what is above the budget, ``price`` the price
    of a byte above it when the search ended.
    """

    over: int
    time: float
    price: float
    sequence: tuple[int, ...]

    @property
    def cost(self) -> tuple[int, float]:
        """What is compared: what does not fit first."""
        return self.over, self.time


def search(
    problem: Problem,
    budget: int,
    *,
    fixed: bool = False,
    seed: int = 0,
    starts: Sequence[Sequence[int]] = (),
    deadline: float = math.inf,
) -> Generator[Candidate, None, None]:
    """The best candidate after each round; ends when nothing was found for long, or at the
    deadline (of ``time.monotonic``).

    ``starts``: more sequences to begin with than the given order. A candidate with ``over`` of
    zero fits. Closing the iterator ends the search.
    """
    searcher = _Searcher(problem, budget, fixed)
    given = searcher.measure(problem.order)
    others = [searcher.measure(start) for start in starts]
    best = min(given, *others, key=lambda c: c.cost) if others else given
    moves = FIRST_ROUND * len(problem.nodes)
    stale = number = 0
    with ThreadPoolExecutor(2) as threads:
        while stale < PATIENCE and time.monotonic() < deadline:
            first = 2 * number + 2 + 1000003 * seed
            warm = WARM[number % len(WARM)]
            # From scratch in every second round, from the other starts in turns between.
            again = others[number // 2 % len(others)] if others and number % 2 == 0 else None
            fresh = replace(given, price=given.price * PRICES[number % len(PRICES)])
            jobs = [
                threads.submit(
                    searcher.run, again or fresh, first, moves, WARM[0] if again else None
                ),
                threads.submit(searcher.run, best, first + 1, moves, warm),
            ]
            try:
                wait(jobs, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))
            finally:
                # Also on Ctrl-C: the threads end at once, with what they have.
                searcher.stop[0] = any(not job.done() for job in jobs)
            found = min((job.result() for job in jobs), key=lambda c: c.cost)
            stale = 0 if found.cost < best.cost else stale + 1
            best = min(best, found, key=lambda c: c.cost)
            yield best
            moves, number = int(moves * GROWTH), number + 1


class _Searcher:
    """A problem and a budget, ready for compiled code."""

    def __init__(self, problem: Problem, budget: int, fixed: bool) -> None:
        count = len(problem.nodes)
        self.arrays: Arrays = arrays_of(problem)
        self.count = count
        self.budget = budget
        self.fixed = fixed
        self.least = problem.least_time
        self.unit = problem.least_time / count or 1.0
        mean_size = max(sum(node.size for node in problem.nodes) / count, 1.0)
        self.price = self.unit / mean_size / 10
        self.stop = np.zeros(1, np.bool_)

    def measure(self, sequence: Sequence[int]) -> Candidate:
        """A sequence as a candidate."""
        state = self._state(sequence)
        over, spent = int(state.totals[OVER]), float(state.time[0])
        return Candidate(over, spent, self.price, tuple(sequence))

    def _state(self, sequence: Sequence[int]) -> State:
        capacity = max(8 * self.count, 2 * len(sequence)) + 64
        state = empty_state(self.count + 1, capacity, self.budget)
        build(self.arrays, state, np.array(sequence, np.int32))
        return state

    def run(self, start: Candidate, seed: int, moves: int, warm: float | None) -> Candidate:
        """Anneal from a candidate: from ``warm`` on with its price, or from the start."""
        state = self._state(start.sequence)
        found = new_search(len(state.at), seed, start.price, self.fixed, self.stop)
        found.price[1] = self.price
        hot, settled = (HOT, 0.5) if warm is None else (warm, 0.0)
        anneal(
            self.arrays,
            state,
            found,
            moves,
            hot * self.unit,
            COLD * self.unit,
            settled,
            self.least,
        )
        if np.isfinite(found.best_time[0]):
            nodes = found.best[: found.best_length[0]]
            return Candidate(0, float(found.best_time[0]), float(found.price[0]), _tuple(nodes))
        over, spent = int(state.totals[OVER]), float(state.time[0])
        return Candidate(over, spent, float(found.price[0]), _tuple(nodes_of(state)))


def _tuple(nodes: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(node) for node in nodes)


def compile_search() -> None:
    """Have numba compile the search, or load it from its cache: half a minute at the first use
    of an installation, so that no time limit should count it.
    """
    nodes = [Node("first", 1, 1.0), Node("second", 1, 1.0)]
    searcher = _Searcher(make_problem("compile", nodes, [(0, 1)]), 1, False)
    searcher.run(searcher.measure((0, 1)), 1, 1, None)

"""The scalable planner: rounds of annealing, each longer than the last, until time is up.

A round anneals twice, side by side: from the given order, and from the best plan so far. Where
nothing fits yet, it anneals twice from the given order, and what comes of it *descends*: short
annealings, each within a little less than the last one reached. Where there is time for many rounds
(a small graph, a long limit), both annealings of a round are followed by cooler ones. A round is
deterministic; how many there are depends on the time limit only.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from moec.plan.annealing import anneal
from moec.plan.changes import new_search
from moec.plan.problem import Node, Problem, make_problem
from moec.plan.sequence import (
    LENGTH,
    MOST_RUNS,
    Arrays,
    State,
    arrays_of,
    build,
    empty_state,
    nodes_of,
)

# Changes for each node in the first round, how much longer each round is than the last, and in the
# longest: many searches of this length find more than one that is longer.
FIRST_ROUND = 50
GROWTH = 2.0
LONGEST_ROUND = 2000
# With time for fewer rounds than this left, one is made of it, planned for a share of the time
ROUNDS_LEFT, SAFE_SHARE = 2.0, 0.9
# How a search begins, in turns: the temperature in mean durations, and the price of a byte above
# the budget, in units of that at which a mean output above it for ten places costs a mean
# duration. Loose budgets gain from the first, tight ones from the others.
FRESH = ((3.0, 1.0), (1.0, 30.0), (3.0, 30.0), (1.0, 10.0))
# Temperatures at which the best plan is improved, in turns; a price with which it is shaken up, as
# is one that does not fit; and the temperature at the end of all
WARM, SHAKEN, COLD = (0.1, 0.5, 0.02), (1.0, 10.0), 0.003
# A descent, after rounds of at least so many changes for each node: the changes for each node in
# one of its annealings, and what these are drawn from, their temperatures, prices and shares of the
# least peak; after how many of them in vain it ends. It may take so many times the changes of the
# annealing before it, and more only where its peak is near the least one known.
LEAST_ROUND, SHORT, IN_VAIN = 200, 40, 40
DESCENT = (0.01, 0.03, 0.1), (100.0, 1000.0), (0.9985, 0.997, 0.995)
LENGTHS, NEAR = (2, 8), 1.02
# With so many seconds for each node (some 10000 changes) searches that begin anew descend, too, and
# what fits is polished: where one ends depends on how it began more than on how long it is. Such
# rounds have no more changes than this for each node. Polishing is annealing at these temperatures,
# each with random numbers of its own.
EXPLORED, EXPLORING_ROUND = 0.03, 1000
POLISH, SEEDS = (0.5, 0.1), 7919
# Rounds without improvement after which the search ends
PATIENCE = 8


@dataclass(frozen=True)
class Candidate:
    """A sequence; ``over`` is how far its peak is above the budget, ``price`` that of a byte above
    it when the search ended.
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
    searcher = Searcher(problem, budget, fixed)
    others = [searcher.measure(start) for start in starts]
    best = min([searcher.given, *others], key=lambda c: c.cost)
    count = len(problem.nodes)
    moves = FIRST_ROUND * count
    stale = number = 0
    began = time.monotonic()
    explores = deadline - began > EXPLORED * count
    longest = EXPLORING_ROUND if explores else LONGEST_ROUND
    with ThreadPoolExecutor(2) as threads:
        while stale < PATIENCE and time.monotonic() < deadline:
            first = 2 * number + 2 + 1000003 * seed
            jobs = searcher.jobs(number, best, others)
            if explores:
                jobs = searcher.explored(jobs)
            runs = [threads.submit(searcher.run, j, first + k, moves) for k, j in enumerate(jobs)]
            try:
                wait(runs, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))
            finally:
                # Also on Ctrl-C: the threads end at once, with what they have.
                searcher.stop[0] = any(not run.done() for run in runs)
            found = min((run.result() for run in runs), key=lambda c: c.cost)
            stale = 0 if found.cost < best.cost else stale + 1
            best = min(best, found, key=lambda c: c.cost)
            yield best
            now = time.monotonic()
            rate, began = moves / max(now - began, 1e-3), now
            moves, number = min(int(moves * GROWTH), longest * count), number + 1
            moves = last_round(moves, rate, deadline - now)


def last_round(moves: int, rate: float, seconds: float) -> int:
    """The changes of a round; those that ``seconds`` allow, at a rate per second, if there would be
    no full round after it: one that is cut off never cools down.
    """
    return moves if moves * ROUNDS_LEFT < rate * seconds else int(rate * seconds * SAFE_SHARE) + 1


@dataclass(frozen=True)
class Job:
    """One annealing: from a candidate, at a temperature in mean durations and a price, which is
    adapted after a share of the changes. Where ``least`` is given, what does not fit descends, for
    long if it comes near that peak.
    """

    start: Candidate
    hot: float
    price: float
    settled: float
    least: int = 0
    polish: tuple[float, ...] = ()


class Searcher:
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
        self.given = self.measure(problem.order)

    def measure(self, sequence: Sequence[int]) -> Candidate:
        """A sequence as a candidate."""
        state = self._state(sequence, self.budget)
        return Candidate(self._over(state), float(state.time[0]), self.price, tuple(sequence))

    def _over(self, state: State) -> int:
        peak = int(state.memory[: state.totals[LENGTH]].max())
        return max(peak - self.budget, 0)

    def _state(self, sequence: Sequence[int], limit: int) -> State:
        capacity = max(8 * self.count, 2 * len(sequence)) + 64
        most_runs = max(MOST_RUNS, *Counter(sequence).values())
        state = empty_state(self.arrays, capacity, limit, most_runs)
        build(self.arrays, state, np.array(sequence, np.int32))
        return state

    def jobs(self, number: int, best: Candidate, others: Sequence[Candidate]) -> tuple[Job, Job]:
        """What a round anneals: the given order, or at first every second time one of the other
        starts; and the best candidate.
        """
        others_left = others[number // 2 :] if number % 2 == 0 else ()
        if others_left:
            explore = Job(others_left[0], WARM[0], others_left[0].price, 0.0)
        else:
            explore = self._fresh(number)
        if best.over:
            least = self.budget + best.over
            other = self._fresh(number + 1) if number % 2 else self._shaken(best)
            return replace(explore, least=least), replace(other, least=least)
        turn = number % (len(WARM) + 1)
        if turn == len(WARM):
            return explore, self._shaken(best)
        return explore, Job(best, WARM[turn], best.price, 0.0)

    def explored(self, jobs: tuple[Job, Job]) -> tuple[Job, Job]:
        """Jobs of a round where there is time: the first descends, too, and both are polished."""
        explore, improve = jobs
        explore = replace(explore, least=explore.least or 1, polish=POLISH)
        return explore, replace(improve, polish=POLISH)

    def _shaken(self, best: Candidate) -> Job:
        return Job(best, SHAKEN[0], self.price * SHAKEN[1], 0.0)

    def _fresh(self, number: int) -> Job:
        hot, factor = FRESH[number % len(FRESH)]
        return Job(self.given, hot, self.price * factor, 0.5)

    def run(self, job: Job, seed: int, moves: int) -> Candidate:
        """Anneal, descend and polish, as the job asks for it."""
        found = self._anneal(job, self.budget, seed, moves)
        if job.least > 0 and moves >= LEAST_ROUND * self.count:
            found = self._descend(found, job.least, seed, moves)
        for turn, hot in enumerate(job.polish):
            if not found.over:
                warm = Job(found, hot, found.price, 0.0)
                again = self._anneal(warm, self.budget, seed + SEEDS * (turn + 1), moves)
                found = min(found, again, key=lambda c: c.cost)
        return found

    def _anneal(self, job: Job, limit: int, seed: int, moves: int) -> Candidate:
        """The fastest sequence that was met within a limit of bytes, or else the last one."""
        state = self._state(job.start.sequence, limit)
        found = new_search(len(state.at), seed, job.price, self.fixed, self.stop)
        found.price[1] = self.price
        hot, cold = job.hot * self.unit, COLD * self.unit
        anneal(self.arrays, state, found, moves, hot, min(hot, cold), job.settled, self.least)
        fits = np.isfinite(found.best_time[0])
        nodes = found.best[: found.best_length[0]] if fits else nodes_of(state)
        return replace(self.measure(_tuple(nodes)), price=float(found.price[0]))

    def _descend(self, best: Candidate, least: int, seed: int, moves: int) -> Candidate:
        """Candidates of ever lower peak, until one fits the budget or no lower one is found."""
        choices = random.Random(seed)
        few, most = (length * moves for length in LENGTHS)
        made = in_vain = 0
        while best.over and in_vain < IN_VAIN and not self.stop[0]:
            peak = self.budget + best.over
            if made > (most if peak < NEAR * least else few):
                break
            hot, price, share = map(choices.choice, DESCENT)
            job = Job(best, hot, self.price * price, 0.0)
            limit = max(self.budget, int(share * peak))
            found = self._anneal(job, limit, choices.randrange(1 << 31), SHORT * self.count)
            made += SHORT * self.count
            in_vain = 0 if found.over < best.over else in_vain + 1
            best = min(best, found, key=lambda c: c.over)
        return best


def _tuple(nodes: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(node) for node in nodes)


def compile_search() -> None:
    """Have numba compile the search, or load it from its cache: half a minute at the first use
    of an installation, so that no time limit should count it.
    """
    nodes = [Node("first", 1, 1.0), Node("second", 1, 1.0)]
    searcher = Searcher(make_problem("compile", nodes, [(0, 1)]), 1, False)
    searcher.run(Job(searcher.given, 1.0, 1.0, 0.0), 1, 1)

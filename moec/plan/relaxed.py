"""Bounds, and plans near them: the gap relaxation, solved and rounded in three steps.

The linear program gives a bound within milliseconds for each layer of a model; the integer program
of the same rows closes most of what is left. Where its rounded plan does not quite fit, the order
of that plan is taken as given: then the relaxation knows which nodes come between others, and
rounding it gives plans that fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moec.plan.bounds import Relaxation
from moec.plan.check import replay
from moec.plan.gaps import gaps_of
from moec.plan.problem import Problem
from moec.plan.rounding import rounded

# What the relaxation runs again to this degree is repeated.
THRESHOLD = 0.5
# How many repetitions may go before their turn, in the two roundings of a solution
AHEAD = (0, 4)
# Shares of the time limit for each linear and integer program, and the most seconds for the latter
LINEAR_SHARE, INTEGER_SHARE = 0.3, 0.4
MOST_SECONDS = 5.0
# Solutions whose rounded plan needs this much more than the budget say little about plans.
PROMISING = 1.3


@dataclass(frozen=True)
class Relaxed:
    """A time that no plan is below (infinite: there is no plan), and a sequence that may not fit,
    if there is any, with its peak.
    """

    bound: float
    sequence: tuple[int, ...] | None = None
    peak: int = 0


def relaxed(
    problem: Problem, budget: int, fixed: bool, limit: float, deadline: float = math.inf
) -> Iterator[Relaxed]:
    """Bounds and sequences, better ones later; ``limit``: seconds that the planning may take, of
    which this is a part, until a deadline (of ``time.monotonic``).
    """
    found = []
    for one in _solutions(problem, budget, fixed, limit, deadline):
        yield one
        found.append(one)
    # Of the last solution
    nearest = min(found[-len(AHEAD) :], key=lambda one: one.peak)
    if nearest.sequence is None or not budget < nearest.peak <= PROMISING * budget:
        return
    ordered = replace(problem, order=tuple(dict.fromkeys(nearest.sequence)))
    for one in () if fixed else _solutions(ordered, budget, True, limit, deadline):
        # Its bound is for this order only.
        yield replace(one, bound=nearest.bound)


def _solutions(
    problem: Problem, budget: int, fixed: bool, limit: float, deadline: float
) -> Iterator[Relaxed]:
    relaxation = Relaxation(gaps_of(problem, fixed), budget)
    seconds = LINEAR_SHARE * limit
    best = 0.0
    while True:
        start = time.monotonic()
        seconds = min(seconds, deadline - start)
        best = max(best, relaxation.solve(seconds))
        if math.isinf(best):
            yield Relaxed(best)
            return
        near = False
        for ahead in (None,) if fixed else AHEAD:
            sequence = tuple(rounded(relaxation.gaps, relaxation.solution, THRESHOLD, ahead))
            peak = replay(problem, sequence).peak
            near = near or peak <= PROMISING * budget
            yield Relaxed(best, sequence, peak)
        stopped = time.monotonic() - start > seconds
        if relaxation.integral or stopped or not near or not relaxation.rows:
            return
        relaxation, seconds = relaxation.integer(), min(INTEGER_SHARE * limit, MOST_SECONDS)

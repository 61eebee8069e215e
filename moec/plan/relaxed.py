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
from moec.plan.gaps import Gaps, gaps_of
from moec.plan.problem import Problem
from moec.plan.rounding import rounded

# What the relaxation runs again to this degree is repeated.
THRESHOLD = 0.5
# Shares of the time limit for each linear and integer program, and the most seconds for the latter
LINEAR_SHARE, INTEGER_SHARE = 0.3, 0.25
MOST_SECONDS = 5.0
# Solutions whose rounded plan needs this much more than the budget say little about plans.
PROMISING = 1.3


@dataclass(frozen=True)
class Relaxed:
    """A time that no plan is below (infinite: there is no plan), and a sequence that may not fit,
    if there is any.
    """

    bound: float
    sequence: tuple[int, ...] | None


def relaxed(problem: Problem, budget: int, fixed: bool, limit: float) -> Iterator[Relaxed]:
    """Bounds and sequences, better ones later; ``limit``: seconds that the planning may take."""
    last = None
    for last in _solutions(gaps_of(problem, fixed), budget, fixed, limit):
        yield last
    if fixed or last is None or last.sequence is None:
        return
    peak = replay(problem, last.sequence).peak
    if budget < peak <= PROMISING * budget:
        order = tuple(dict.fromkeys(last.sequence))
        ordered = gaps_of(replace(problem, order=order), True)
        for found in _solutions(ordered, budget, True, limit):
            # Its bound is for this order only.
            yield Relaxed(last.bound, found.sequence)


def _solutions(gaps: Gaps, budget: int, fixed: bool, limit: float) -> Iterator[Relaxed]:
    relaxation = Relaxation(gaps, budget)
    seconds = LINEAR_SHARE * limit
    best = 0.0
    while True:
        start = time.monotonic()
        best = max(best, relaxation.solve(seconds))
        if math.isinf(best):
            yield Relaxed(best, None)
            return
        sequence = rounded(gaps, relaxation.solution, THRESHOLD, fixed)
        yield Relaxed(best, tuple(sequence))
        near = replay(gaps.problem, [*sequence, gaps.problem.order[-1]]).peak <= PROMISING * budget
        stopped = time.monotonic() - start > seconds
        if relaxation.integral or stopped or not near or not relaxation.rows:
            return
        relaxation, seconds = relaxation.integer(), min(INTEGER_SHARE * limit, MOST_SECONDS)

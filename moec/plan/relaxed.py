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
    """A time that no plan is below (infinite: there is no plan), and a sequence that fits or nearly
    fits, if there is any, with its peak.
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
    last = Relaxed(0.0)
    for last in _solutions(problem, budget, fixed, limit, deadline):
        yield last
    if fixed or last.sequence is None or last.peak <= budget or time.monotonic() > deadline:
        return
    ordered = replace(problem, order=tuple(dict.fromkeys(last.sequence)))
    for found in _solutions(ordered, budget, True, limit, deadline):
        # Its bound is for this order only.
        yield replace(found, bound=last.bound)


def _solutions(
    problem: Problem, budget: int, fixed: bool, limit: float, deadline: float
) -> Iterator[Relaxed]:
    """Of the linear and the integer program: plans, the one of the least peak last."""
    relaxation = Relaxation(gaps_of(problem, fixed), budget)
    seconds = LINEAR_SHARE * limit
    bound = 0.0
    while True:
        start = time.monotonic()
        seconds = min(seconds, deadline - start)
        bound = max(bound, relaxation.solve(seconds))
        found = () if math.isinf(bound) else _rounded(relaxation, problem, bound, fixed, deadline)
        near = [one for one in found if one.peak <= PROMISING * budget]
        yield from sorted(near, key=lambda one: -one.peak) or [Relaxed(bound)]
        stopped = time.monotonic() - start > seconds
        if relaxation.integral or stopped or not near or not relaxation.rows:
            return
        relaxation, seconds = relaxation.integer(), min(INTEGER_SHARE * limit, MOST_SECONDS)


def _rounded(
    relaxation: Relaxation, problem: Problem, bound: float, fixed: bool, deadline: float
) -> Iterator[Relaxed]:
    gaps, solution = relaxation.gaps, relaxation.solution
    for ahead in (None,) if fixed else AHEAD:
        sequence = tuple(rounded(gaps, solution, THRESHOLD, ahead, deadline))
        yield Relaxed(bound, sequence, replay(problem, sequence).peak)

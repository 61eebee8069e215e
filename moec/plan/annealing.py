"""Simulated annealing over sequences: repeat, drop, move executions until the cost stops falling.

The energy is the total time plus a price per byte and place above the limit. In the second half
the price rises while few sequences fit and falls while many do, so that the search ends on the
border of what fits. Compiled with numba; given its seed, a run is deterministic.
"""

from __future__ import annotations

import numba
import numpy as np

from moec.plan.changes import Search, draw, energy, undo
from moec.plan.repeats import drop, exchange, relocate, repeat
from moec.plan.sequence import LENGTH, OVER, Arrays, State
from moec.plan.shifts import GROUP_SHARE, shift_group, shift_run

njit = numba.njit(cache=True, nogil=True)

# The share of changes that are of the order
ORDER_SHARE = 0.4
# After how many changes the price is adapted, by how much at most, and towards which share of
# sequences that fit
PERIOD = 256
PRICE_STEP = 0.1
FITTED_SHARE = 0.1


@njit
def propose(graph: Arrays, state: State, search: Search, slack: float) -> bool:
    """Make a random change; whether anything was changed."""
    chance = draw(search)
    if chance < ORDER_SHARE:
        if draw(search) < GROUP_SHARE and not search.fixed:
            return shift_group(graph, state, search)
        return shift_run(graph, state, search)
    chance = (chance - ORDER_SHARE) / (1.0 - ORDER_SHARE)
    if chance < 0.45:
        return repeat(graph, state, search, slack)
    if chance < 0.75:
        return drop(graph, state, search, slack)
    if chance < 0.9:
        return exchange(graph, state, search, slack)
    return relocate(graph, state, search)


@njit
def keep_best(state: State, search: Search) -> None:
    """Remember the sequence if it fits and is the cheapest so far."""
    if state.totals[OVER] > 0 or state.time[0] >= search.best_time[0] - 1e-9 * abs(state.time[0]):
        return
    search.best_time[0] = state.time[0]
    search.best_length[0] = state.totals[LENGTH] - 1
    for k in range(state.totals[LENGTH] - 1):
        search.best[k] = state.node[state.at[k]]


@njit
def adapt_price(search: Search, fitted: float) -> None:
    """Raise the price while too few sequences fit, lower it while too many do."""
    factor = 1.0 + PRICE_STEP * (FITTED_SHARE - fitted)
    low, high = search.price[1] * 1e-2, search.price[1] * 2e3
    search.price[0] = min(max(search.price[0] * factor, low), high)


@njit
def anneal(
    graph: Arrays,
    state: State,
    search: Search,
    moves: int,
    hot: float,
    cold: float,
    settled: float,
    target: float,
) -> int:
    """Make ``moves`` changes while the temperature falls from ``hot`` to ``cold`` (in units of
    time); the price is adapted after a share of ``settled`` of them. Ends early when a sequence of
    ``target`` time is found. The number of changes made.
    """
    fitted = 0
    for step in range(moves):
        if search.stop[0]:
            return step
        temperature = hot * (cold / hot) ** (step / moves)
        before = energy(state, search)
        slack = -temperature * np.log(1.0 - draw(search))
        if propose(graph, state, search, slack):
            if energy(state, search) - before > slack:
                undo(graph, state, search)
            search.totals[0] = 0
            keep_best(state, search)
            if search.best_time[0] <= target:
                return step + 1
        fitted += state.totals[OVER] == 0
        if step % PERIOD == PERIOD - 1:
            if step >= moves * settled:
                adapt_price(search, fitted / PERIOD)
            fitted = 0
    return moves

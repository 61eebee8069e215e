"""What the search remembers, and changes that can be taken back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from moec.plan.sequence import FREE, MOST_RUNS, OVER, Arrays, State, insert, move, remove

njit = numba.njit(cache=True, nogil=True)

# What a change of the sequence was, in the log from which it is undone
INSERTED, REMOVED, MOVED = range(3)


class Search(NamedTuple):
    """``log``: the changes since the last accepted sequence, ``totals[0]`` of them; ``totals[1]``:
    the latest mark; ``random``: the generator's state; ``price``: of a byte above the limit at one
    place, now and at first; ``fixed``: first runs keep their order; ``best``: the cheapest
    sequence found that fits, ``best_time`` its time, ``best_length`` its length;
    ``stop[0]``: set from outside to end the search.
    """

    log: Any
    totals: Any
    random: Any
    price: Any
    fixed: bool
    mark: Any
    best: Any
    best_time: Any
    best_length: Any
    stop: Any


def new_search(capacity: int, seed: int, price: float, fixed: bool, stop: Any) -> Search:
    """A search that has found nothing yet."""
    return Search(
        np.zeros((256, 3), np.int32),
        np.zeros(2, np.int64),
        np.array([seed * 2654435761 % 2**32 + 88172645463325252], np.uint64),
        np.array([price, price], np.float64),
        fixed,
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int32),
        np.array([np.inf]),
        np.zeros(1, np.int64),
        stop,
    )


@njit
def draw(search: Search) -> float:
    """A number in [0, 1), by xorshift64*."""
    x = search.random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    search.random[0] = x
    return np.float64((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@njit
def draw_below(search: Search, count: int) -> int:
    """A number in 0 .. count - 1."""
    return min(int(draw(search) * count), count - 1)


@njit
def note(search: Search, kind: int, first: int, second: int) -> None:
    """Add to the log."""
    k = search.totals[0]
    search.log[k, 0] = kind
    search.log[k, 1] = first
    search.log[k, 2] = second
    search.totals[0] = k + 1


@njit
def do_insert(graph: Arrays, state: State, search: Search, node: int, place: int) -> int:
    """Insert, and note it."""
    note(search, INSERTED, node, place)
    return insert(graph, state, node, place)


@njit
def do_remove(graph: Arrays, state: State, search: Search, run: int) -> None:
    """Remove, and note it."""
    note(search, REMOVED, state.node[run], state.place[run])
    remove(graph, state, run)


@njit
def do_move(graph: Arrays, state: State, search: Search, run: int, target: int) -> None:
    """Move, and note it."""
    note(search, MOVED, state.place[run], target)
    move(graph, state, run, target)


@njit
def undo(graph: Arrays, state: State, search: Search) -> None:
    """Take back what the log holds."""
    for k in range(search.totals[0] - 1, -1, -1):
        kind, first, second = search.log[k, 0], search.log[k, 1], search.log[k, 2]
        if kind == INSERTED:
            remove(graph, state, state.at[second])
        elif kind == REMOVED:
            insert(graph, state, first, second)
        else:
            move(graph, state, state.at[second], first)
    search.totals[0] = 0


@njit
def may_repeat(graph: Arrays, state: State, search: Search, node: int) -> bool:
    """Whether another run of a node is allowed and there is room for it."""
    if graph.once[node] or state.count[node] >= MOST_RUNS:
        return False
    return state.totals[FREE] > 0 and search.totals[0] < len(search.log) - 2


@njit
def new_stamp(search: Search) -> int:
    """A mark that no node has."""
    search.totals[1] += 1
    return search.totals[1]


@njit
def energy(state: State, search: Search) -> float:
    """What the search lowers: time, and the price of what does not fit."""
    return state.time[0] + search.price[0] * state.totals[OVER]

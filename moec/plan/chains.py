"""Repeating a node with what it needs, where that is worth it: the cost is estimated first.

An input that is idle until the place of the repetition is held until then, or repeated before it,
and so are its inputs, whichever costs less at the present price of memory. The estimate takes
microseconds, so that the many chains that cost too much are never built.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from moec.plan.changes import Search, do_insert, draw, may_repeat, new_stamp
from moec.plan.sequence import (
    FREE,
    LIMIT,
    Arrays,
    State,
    held_across,
    last_use,
    run_before,
)

njit = numba.njit(cache=True, nogil=True)

# The most nodes that are repeated together
MOST_CHAINED = 64
# What holding an input counts, against repeating it; how likely it is repeated whatever it costs
HELD_WEIGHT = 0.5
CHAINED_ANYWAY = 0.02
# Estimates are too high where several values share the room; up to this much more is tried.
PATIENT = 2.0


@njit
def burden(
    state: State, first: int, final: int, size: int, low: int = 0, high: int = -1, less: int = 0
) -> int:
    """By how much holding ``size`` bytes more between two places raises what is above the limit,
    where ``less`` bytes fewer will be held between ``low`` and ``high``.
    """
    found = 0
    for k in range(first, final + 1):
        above = state.memory[k] - state.totals[LIMIT]
        if low <= k <= high:
            above -= less
        found += min(size, max(0, above + size))
    return found


@njit
def repeat_chain(
    graph: Arrays, state: State, search: Search, node: int, place: int, before: int, most: float
) -> bool:
    """Run a node at a place, what it makes being idle since ``before``, with what must be repeated
    for it; nothing if that seems to cost more than ``most``. Whether it was done.
    """
    group = np.empty(MOST_CHAINED, np.int32)
    count = gather(graph, state, search, group, node, place, before, PATIENT * most)
    if count > 1:
        put_in_order(graph, search, group, count)
    for k in range(count):
        do_insert(graph, state, search, group[k], place + k)
    return count > 0


@njit
def put_in_order(graph: Arrays, search: Search, group: Any, count: int) -> None:
    """Order a group by depth first search: what a node needs comes right before it."""
    stamp = search.totals[1]
    found, waiting = np.empty(count, np.int32), np.empty(count, np.int32)
    waiting[0] = group[0]
    depth, done = 1, 0
    while depth > 0:
        top, needed = waiting[depth - 1], -1
        for k in range(graph.input_start[top], graph.input_start[top + 1]):
            if search.mark[graph.input_node[k]] == stamp:
                needed = graph.input_node[k]
                break
        if needed >= 0:
            waiting[depth] = needed
            depth += 1
        else:
            search.mark[top] = 0
            found[done] = top
            done += 1
            depth -= 1
    group[:count] = found


@njit
def gather(
    graph: Arrays,
    state: State,
    search: Search,
    group: Any,
    node: int,
    place: int,
    before: int,
    most: float,
) -> int:
    """Fill ``group`` with a node and what to repeat for it; how many; 0 if it costs too much."""
    stamp = new_stamp(search)
    search.mark[node] = stamp
    group[0] = node
    count, head = 1, 0
    room = min(len(group), state.totals[FREE], len(search.log) - 2 - search.totals[0])
    released = graph.total[node]
    crowding = held_across(graph, state, place) - released - state.totals[LIMIT]
    while head < count:
        reader = group[head]
        head += 1
        for k in range(graph.input_start[reader], graph.input_start[reader + 1]):
            source, value = graph.input_node[k], graph.input_value[k]
            made = run_before(state, source, place)
            if search.mark[source] == stamp or is_held(graph, state, made, k, place):
                continue
            idle = state.place[last_use(graph, state, made, value, place)] + 1
            size = graph.size[value]
            held = burden(state, idle, place, size, before + 1, place - 1, released)
            if count < room and idle < place and is_cheap(graph, state, search, source, held):
                search.mark[source] = stamp
                group[count] = source
                count += 1
                crowded = max(0, crowding + graph.total[source])
                most -= graph.duration[source] + search.price[0] * crowded
            else:
                most -= search.price[0] * held
            if most < 0.0:
                return 0
    return count


@njit
def is_held(graph: Arrays, state: State, made: int, k: int, place: int) -> bool:
    """Whether the k-th input is held at a place anyhow."""
    return bool(state.place[state.last[made, graph.input_output[k]]] >= place)


@njit
def is_cheap(graph: Arrays, state: State, search: Search, node: int, held: int) -> bool:
    """Whether to run a node again rather than to hold what it made, at random where it is near."""
    if not may_repeat(graph, state, search, node):
        return False
    again = graph.duration[node] * (0.5 + draw(search))
    return HELD_WEIGHT * search.price[0] * held > again or draw(search) < CHAINED_ANYWAY

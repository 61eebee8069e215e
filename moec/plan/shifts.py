"""Random changes of the order: one run, or one with all that must come along."""

from __future__ import annotations

import numba
import numpy as np

from moec.plan.changes import Search, do_move, draw, draw_below, new_stamp
from moec.plan.sequence import LENGTH, Arrays, State, held_until, next_use

njit = numba.njit(cache=True, nogil=True)

# The most runs that are moved together, and the share of such moves
MOST_MOVED = 100
GROUP_SHARE = 0.2


@njit
def window(graph: Arrays, state: State, run: int) -> tuple[int, int]:
    """The first and the last place where a run may be executed, its uses staying its own."""
    place, node = state.place[run], state.node[run]
    first = 0
    for k in range(graph.input_start[node], graph.input_start[node + 1]):
        made = state.runs[graph.input_node[k], 0]
        first = max(first, state.place[made] + 1)
    final = state.totals[LENGTH] - 2
    for k in range(state.count[node]):
        other = state.runs[node, k]
        if state.place[other] < place:
            first = max(first, held_until(graph, state, other) + 1)
        elif state.place[other] > place:
            final = min(final, state.place[other] - 1)
            break
    if held_until(graph, state, run) > place:
        final = min(final, next_use(graph, state, node, place) - 1)
    return first, final


@njit
def shift_run(graph: Arrays, state: State, search: Search) -> bool:
    """Execute a random run elsewhere."""
    run = state.at[draw_below(search, state.totals[LENGTH] - 1)]
    place = state.place[run]
    if search.fixed and run == state.runs[state.node[run], 0]:
        return False
    first, final = window(graph, state, run)
    if final <= first:
        return False
    target = choose_target(search, place, first, final)
    if target == place:
        return False
    do_move(graph, state, search, run, target)
    return True


@njit
def choose_target(search: Search, place: int, first: int, final: int) -> int:
    """A place of a window: near, at an end, or anywhere."""
    chance = draw(search)
    if chance < 0.45:
        step = 1 + int(-np.log(1.0 - draw(search)) * 4)
        target = place + (step if draw(search) < 0.5 else -step)
        return min(max(target, first), final)
    if chance < 0.6:
        return final
    if chance < 0.7:
        return first
    return first + draw_below(search, final - first + 1)


@njit
def shift_group(graph: Arrays, state: State, search: Search) -> bool:
    """Execute a random run far earlier with what it needs, or far later with what needs it."""
    run = state.at[draw_below(search, state.totals[LENGTH] - 1)]
    place = state.place[run]
    distance = 2 + int(state.totals[LENGTH] * 0.3 * draw(search) ** 3)
    if draw(search) < 0.5:
        target = max(place - distance, 0)
        return target < place and pull(graph, state, search, place, target)
    target = min(place + distance, state.totals[LENGTH] - 2)
    return target > place and push(graph, state, search, place, target)


@njit
def pull(graph: Arrays, state: State, search: Search, place: int, target: int) -> bool:
    """Move the run at a place, and what it needs from between, to an earlier place."""
    group = np.empty(MOST_MOVED, np.int32)
    stamp = new_stamp(search)
    count = 0
    search.mark[state.node[state.at[place]]] = stamp
    for k in range(place, target - 1, -1):
        node = state.node[state.at[k]]
        if search.mark[node] != stamp:
            continue
        if count == MOST_MOVED:
            return False
        search.mark[node] = 0
        group[count] = state.at[k]
        count += 1
        for j in range(graph.input_start[node], graph.input_start[node + 1]):
            source = graph.input_node[j]
            # What has run before the target need not come along.
            if state.place[state.runs[source, 0]] >= target:
                search.mark[source] = stamp
    for k in range(count - 1, -1, -1):
        if not shifted(graph, state, search, group[k], target + count - 1 - k):
            break
    return True


@njit
def push(graph: Arrays, state: State, search: Search, place: int, target: int) -> bool:
    """Move the run at a place, and what needs it from between, to a later place."""
    group = np.empty(MOST_MOVED, np.int32)
    stamp = new_stamp(search)
    count = 0
    for k in range(place, target + 1):
        node = state.node[state.at[k]]
        moved = k == place
        for j in range(graph.input_start[node], graph.input_start[node + 1]):
            moved = moved or search.mark[graph.input_node[j]] == stamp
        if not moved:
            continue
        if count == MOST_MOVED:
            return False
        search.mark[node] = stamp
        group[count] = state.at[k]
        count += 1
    for k in range(count - 1, -1, -1):
        if not shifted(graph, state, search, group[k], target - (count - 1 - k)):
            break
    return True


@njit
def shifted(graph: Arrays, state: State, search: Search, run: int, target: int) -> bool:
    """Move a run if its window has the target; whether it now is there."""
    first, final = window(graph, state, run)
    if target < first or target > final:
        return False
    if target != state.place[run]:
        do_move(graph, state, search, run, target)
    return True

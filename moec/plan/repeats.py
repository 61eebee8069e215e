"""Random changes of what is repeated: repeat, drop, exchange, relocate."""

from __future__ import annotations

import numba
import numpy as np

from moec.plan.chains import burden, repeat_chain
from moec.plan.changes import (
    Search,
    do_insert,
    do_remove,
    draw,
    draw_below,
    energy,
    may_repeat,
)
from moec.plan.sequence import (
    LENGTH,
    LIMIT,
    OVER,
    Arrays,
    State,
    held_until,
    last_use,
    next_read,
    run_before,
)

njit = numba.njit(cache=True, nogil=True)

# How often a random choice is tried
TRIES = 30
# Shares of random choices; found by trial on random layered graphs.
CROWDED_SHARE = 0.8
EARLY_SHARE = 0.2


@njit
def relief(state: State, first: int, final: int, size: int) -> int:
    """By how much holding ``size`` bytes less between two places lowers what is above the limit."""
    limit = state.totals[LIMIT]
    found = 0
    for k in range(first, final + 1):
        found += max(0, min(size, state.memory[k] - limit))
    return found


@njit
def crowded_place(state: State, search: Search) -> int:
    """A place that holds more than the limit, the next after a random one; -1 if there is none."""
    length = state.totals[LENGTH]
    start = draw_below(search, length)
    if state.totals[OVER] == 0:
        return -1
    for k in range(length):
        place = start + k if start + k < length else start + k - length
        if state.memory[place] > state.totals[LIMIT]:
            return place
    return -1


@njit
def gain_of(graph: Arrays, state: State, run: int, value: int, before: int, after: int) -> int:
    """By how much a repetition at ``after`` lowers what is above the limit: ``value``, an output of
    ``run``, is not read between ``before`` and there; other outputs may be idle, too.
    """
    found = relief(state, before + 1, after - 1, graph.size[value])
    first = graph.made_start[state.node[run]]
    for other in range(first, graph.made_start[state.node[run] + 1]):
        if other != value and state.place[state.last[run, other - first]] >= after:
            idle = state.place[last_use(graph, state, run, other, after)] + 1
            found += relief(state, idle, after - 1, graph.size[other])
    return found


@njit
def idle_at(graph: Arrays, state: State, search: Search, place: int) -> tuple[int, int, int, float]:
    """A random run of which an output is held at a place without being read there: its node, the
    last use before, the next use, what its repetition costs at best; -1 for the node if few tries
    find none.
    """
    for _ in range(TRIES if place > 0 else 0):
        run = state.at[draw_below(search, place)]
        node = state.node[run]
        value = random_output(graph, search, node)
        if value < 0 or graph.once[node]:
            continue
        if state.place[state.last[run, value - graph.made_start[node]]] <= place:
            continue
        before = state.place[last_use(graph, state, run, value, place + 1)]
        if before == place:
            continue
        after = next_read(graph, state, value, place)
        gain = search.price[0] * gain_of(graph, state, run, value, before, after)
        return node, before, after, graph.duration[node] - gain
    return -1, 0, 0, np.inf


@njit
def random_output(graph: Arrays, search: Search, node: int) -> int:
    """A value that a node makes; -1 if there is none."""
    first = graph.made_start[node]
    count = graph.made_start[node + 1] - first
    if count > 1:
        return first + draw_below(search, count)
    return first if count == 1 else -1


@njit
def random_gap(graph: Arrays, state: State, search: Search) -> tuple[int, int, int, float]:
    """The same of a random input of a random run."""
    after = draw_below(search, state.totals[LENGTH])
    reader = state.node[state.at[after]]
    inputs = graph.input_start[reader + 1] - graph.input_start[reader]
    if inputs == 0:
        return -1, 0, 0, np.inf
    k = graph.input_start[reader] + draw_below(search, inputs)
    node, value = graph.input_node[k], graph.input_value[k]
    run = run_before(state, node, after)
    before = state.place[last_use(graph, state, run, value, after)]
    gain = search.price[0] * gain_of(graph, state, run, value, before, after)
    return node, before, after, graph.duration[node] - gain


@njit
def repeat(graph: Arrays, state: State, search: Search, slack: float) -> bool:
    """Run a node again before its next use, perhaps with its inputs; whether anything was done."""
    place = crowded_place(state, search)
    if place >= 0 and draw(search) < CROWDED_SHARE:
        node, before, after, cost = idle_at(graph, state, search, place)
    else:
        node, before, after, cost = random_gap(graph, state, search)
    if node < 0 or after - before < 2 or cost > slack:
        return False
    if not may_repeat(graph, state, search, node):
        return False
    target = after
    if draw(search) < EARLY_SHARE:
        target = before + 1 + draw_below(search, after - before)
    return repeat_chain(graph, state, search, node, target, before, slack - cost)


@njit
def random_repetition(graph: Arrays, state: State, search: Search) -> int:
    """A run that is not its node's first; -1 if few tries find none."""
    for _ in range(30):
        node = state.node[state.at[draw_below(search, state.totals[LENGTH])]]
        if state.count[node] > 1:
            return state.runs[node, 1 + draw_below(search, state.count[node] - 1)]
    return -1


@njit
def drop(graph: Arrays, state: State, search: Search, slack: float) -> bool:
    """Take out a repetition and what was repeated for it only."""
    run = random_repetition(graph, state, search)
    if run < 0:
        return False
    saved = graph.duration[state.node[run]]
    if held_until(graph, state, run) > state.place[run]:
        cost = search.price[0] * cost_without(graph, state, run)
        # Its inputs may go too, which may make room for much of that.
        if cost - 4 * saved > 3 * slack + 10 * saved and draw(search) < 0.9:
            return False
    drop_run(graph, state, search, run)
    return True


@njit
def cost_without(graph: Arrays, state: State, run: int) -> int:
    """By how much taking out a run raises what is above the limit: its outputs that are read are
    held since the run before, of the same node.
    """
    place, node = state.place[run], state.node[run]
    earlier = run_before(state, node, place)
    found = 0
    start = graph.made_start[node]
    for value in range(start, graph.made_start[node + 1]):
        if state.last[run, value - start] != run:
            first = state.place[state.last[earlier, value - start]] + 1
            found += burden(state, first, place - 1, graph.size[value])
    return found


@njit
def drop_run(graph: Arrays, state: State, search: Search, run: int) -> None:
    """Remove a run and, of its inputs, the runs that nothing reads any more."""
    waiting = np.empty(64, np.int32)
    waiting[0] = state.node[run]
    do_remove(graph, state, search, run)
    count, head = 1, 0
    while head < count:
        reader = waiting[head]
        head += 1
        for k in range(graph.input_start[reader], graph.input_start[reader + 1]):
            source = graph.input_node[k]
            for j in range(state.count[source] - 1, int(search.fixed) - 1, -1):
                made = state.runs[source, j]
                if state.count[source] == 1 or held_until(graph, state, made) > state.place[made]:
                    continue
                if search.totals[0] < len(search.log) - 2 and count < len(waiting):
                    do_remove(graph, state, search, made)
                    waiting[count] = source
                    count += 1


@njit
def exchange(graph: Arrays, state: State, search: Search, slack: float) -> bool:
    """Take out a repetition and repeat another node where that made memory scarce."""
    run = random_repetition(graph, state, search)
    if run < 0:
        return False
    start = energy(state, search)
    drop_run(graph, state, search, run)
    for _ in range(2):
        place = crowded_place(state, search)
        if place < 0:
            break
        node, before, after, cost = idle_at(graph, state, search, place)
        if node < 0 or after - before < 2 or cost > 0.0:
            break
        if energy(state, search) + cost - start > slack + graph.duration[node]:
            break
        if not may_repeat(graph, state, search, node):
            break
        room = start + slack - energy(state, search) - cost + graph.duration[node]
        if not repeat_chain(graph, state, search, node, after, before, room):
            break
        if energy(state, search) - start <= slack:
            break
    return True


@njit
def relocate(graph: Arrays, state: State, search: Search) -> bool:
    """Take out a repetition and run its node somewhere else instead."""
    run = random_repetition(graph, state, search)
    if run < 0:
        return False
    node, place = state.node[run], state.place[run]
    do_remove(graph, state, search, run)
    users = graph.user_start[node + 1] - graph.user_start[node]
    if users == 0:
        return True
    user = graph.user_node[graph.user_start[node] + draw_below(search, users)]
    target = state.place[state.runs[user, draw_below(search, state.count[user])]]
    if abs(target - place) > 0:
        do_insert(graph, state, search, node, target)
    return True

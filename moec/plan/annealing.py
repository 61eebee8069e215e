"""Simulated annealing over sequences: repeat, drop, move executions until the cost stops falling.

The energy is the total time plus a price per byte and place above the limit. The price rises while
the sequence does not fit and falls while it does, so that the search runs along the border of what
fits. Compiled with numba; given its seed, a run is deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from moec.plan.sequence import (
    FREE,
    LENGTH,
    LIMIT,
    MOST_RUNS,
    OVER,
    Arrays,
    State,
    insert,
    last_use,
    move,
    next_use,
    remove,
    run_before,
)

njit = numba.njit(cache=True, nogil=True)

# What a change of the sequence was, in the log from which it is undone
INSERTED, REMOVED, MOVED = range(3)
# Deepest chain of inputs that are repeated together
DEEPEST = 6
MOST_MOVED = 100


class Search(NamedTuple):
    """``log``: the changes since the last accepted sequence, ``totals[0]`` of them; ``random``:
    the generator's state; ``price``: of a byte above the limit at one place; ``best``: the
    cheapest sequence found that fits, ``best_time`` its time, ``best_length`` its length.
    """

    log: Any
    totals: Any
    random: Any
    price: Any
    mark: Any
    best: Any
    best_time: Any
    best_length: Any


def new_search(capacity: int, seed: int, price: float) -> Search:
    """A search that has found nothing yet."""
    return Search(
        np.zeros((256, 3), np.int32),
        np.zeros(40, np.int64),
        np.array([seed * 2654435761 % 2**32 + 88172645463325252], np.uint64),
        np.array([price, 0.1, price, 0.45, 0.3, 0.15, 0.1, 0.8, 0.2, 0.04, 3, 30, 1.0, .2], np.float64),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int32),
        np.array([np.inf]),
        np.zeros(1, np.int64),
    )


# randomness
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


# changes, with the means to undo them
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


# what a change would cost at most
@njit
def relief(state: State, first: int, final: int, size: int) -> int:
    """By how much holding ``size`` bytes less between two places lowers what is above the limit."""
    limit = state.totals[LIMIT]
    found = 0
    for k in range(first, final + 1):
        found += max(0, min(size, state.memory[k] - limit))
    return found


@njit
def burden(state: State, first: int, final: int, size: int) -> int:
    """By how much holding ``size`` bytes more between two places raises what is above it."""
    limit = state.totals[LIMIT]
    found = 0
    for k in range(first, final + 1):
        found += min(size, max(0, state.memory[k] + size - limit))
    return found


# repeating
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
def idle_at(
    graph: Arrays, state: State, search: Search, place: int
) -> tuple[int, int, int, float]:
    """Of few random runs whose output is held at a place without being read there, the one whose
    repetition promises most: its node, the last use before, the next use, the cost at best; -1
    for the node if there is none.
    """
    best, first, final, least = -1, 0, 0, np.inf
    tries = int(search.price[10])
    for _ in range(int(search.price[11]) if place > 0 else 0):
        run = state.at[draw_below(search, place)]
        node = state.node[run]
        if state.place[state.last[run]] <= place or graph.once[node] or node == best:
            continue
        before = state.place[last_use(graph, state, run, place + 1)]
        if before == place:
            continue
        after = next_use(graph, state, node, place)
        gain = search.price[0] * relief(state, before + 1, after - 1, graph.size[node])
        if graph.duration[node] - gain < least:
            best, first, final, least = node, before, after, graph.duration[node] - gain
        tries -= 1
        if tries == 0:
            break
    return best, first, final, least


@njit
def random_gap(
    graph: Arrays, state: State, search: Search
) -> tuple[int, int, int, float]:
    """The same of a random input of a random run."""
    after = draw_below(search, state.totals[LENGTH])
    reader = state.node[state.at[after]]
    inputs = graph.input_start[reader + 1] - graph.input_start[reader]
    if inputs == 0:
        return -1, 0, 0, np.inf
    node = graph.input_node[graph.input_start[reader] + draw_below(search, inputs)]
    run = run_before(state, node, after)
    before = state.place[last_use(graph, state, run, after)]
    gain = search.price[0] * relief(state, before + 1, after - 1, graph.size[node])
    return node, before, after, graph.duration[node] - gain


@njit
def repeat(graph: Arrays, state: State, search: Search, slack: float) -> bool:
    """Run a node again before its next use, perhaps with its inputs; whether anything was done."""
    place = crowded_place(state, search)
    if place >= 0 and draw(search) < search.price[7]:
        node, before, after, cost = idle_at(graph, state, search, place)
    else:
        node, before, after, cost = random_gap(graph, state, search)
    if node < 0 or after - before < 2 or cost > slack:
        return False
    if not may_repeat(graph, state, search, node):
        return False
    target = after
    if draw(search) < search.price[8]:
        target = before + 1 + draw_below(search, after - before)
    repeat_at(graph, state, search, node, target)
    return True


@njit
def repeat_at(graph: Arrays, state: State, search: Search, node: int, place: int) -> None:
    """Insert a run; inputs that were idle for long are, by chance, repeated before it."""
    waiting = np.empty(64, np.int32)
    waiting[0] = do_insert(graph, state, search, node, place)
    count, head = 1, 0
    while head < count:
        run = waiting[head]
        head += 1
        reader = state.node[run]
        for k in range(graph.input_start[reader], graph.input_start[reader + 1]):
            source = graph.input_node[k]
            if count >= len(waiting) or not may_repeat(graph, state, search, source):
                continue
            at = state.place[run]
            made = run_before(state, source, at)
            idle = at - state.place[last_use(graph, state, made, at)]
            if idle > 2 and state.last[made] == run and draw(search) < search.price[6]:
                waiting[count] = do_insert(graph, state, search, source, at)
                count += 1


# dropping
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
    place, node = state.place[run], state.node[run]
    saved = graph.duration[node]
    if state.last[run] != run:
        earlier = run_before(state, node, place)
        first = state.place[state.last[earlier]] + 1
        cost = search.price[0] * burden(state, first, place - 1, graph.size[node])
        # Its inputs may go too, which may make room for much of that.
        if cost - 4 * saved > 3 * slack + 10 * saved and draw(search) < 0.9:
            return False
    drop_run(graph, state, search, run)
    return True


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
            for j in range(state.count[source] - 1, -1, -1):
                made = state.runs[source, j]
                if state.last[made] != made or state.count[source] == 1:
                    continue
                if search.totals[0] < len(search.log) - 2 and count < len(waiting):
                    do_remove(graph, state, search, made)
                    waiting[count] = source
                    count += 1


# moving
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
            first = max(first, state.place[state.last[other]] + 1, state.place[other] + 1)
        elif state.place[other] > place:
            final = min(final, state.place[other] - 1)
            break
    if state.last[run] != run:
        final = min(final, next_use(graph, state, node, place) - 1)
    return first, final


@njit
def shift_run(graph: Arrays, state: State, search: Search) -> bool:
    """Execute a random run elsewhere."""
    run = state.at[draw_below(search, state.totals[LENGTH] - 1)]
    place = state.place[run]
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
def new_stamp(search: Search) -> int:
    """A mark that no node has."""
    search.totals[30] += 1
    return search.totals[30]


@njit
def shifted(graph: Arrays, state: State, search: Search, run: int, target: int) -> bool:
    """Move a run if its window has the target; whether it now is there."""
    first, final = window(graph, state, run)
    if target < first or target > final:
        return False
    if target != state.place[run]:
        do_move(graph, state, search, run, target)
    return True


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
        if energy(state, search) + cost - start > slack + search.price[12]*graph.duration[node]:
            break
        if not may_repeat(graph, state, search, node):
            break
        repeat_at(graph, state, search, node, after)
        if energy(state, search) - start <= slack:
            break
    return True


@njit
def energy(state: State, search: Search) -> float:
    """What the search lowers: time, and the price of what does not fit."""
    return state.time[0] + search.price[0] * state.totals[OVER]


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


# the search
@njit
def propose(graph: Arrays, state: State, search: Search, slack: float, reorder: float) -> bool:
    """Make a random change; whether anything was changed."""
    chance = draw(search)
    search.totals[1] = 0
    if chance < reorder:
        if draw(search) < search.price[13]:
            search.totals[1]=5
            return shift_group(graph,state,search)
        return shift_run(graph, state, search)
    chance = (chance - reorder) / (1.0 - reorder)
    if chance < search.price[3]:
        search.totals[1] = 1
        return repeat(graph, state, search, slack)
    if chance < search.price[3]+search.price[4]:
        search.totals[1] = 2
        return drop(graph, state, search, slack)
    if chance < search.price[3]+search.price[4]+search.price[5]:
        search.totals[1] = 3
        return exchange(graph, state, search, slack)
    search.totals[1] = 4
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
    factor = 1.0 + search.price[9] * (search.price[1] - fitted)
    low, high = search.price[2] * 1e-2, search.price[2] * 1e4
    search.price[0] = min(max(search.price[0] * factor, low), high)


@njit
def anneal(
    graph: Arrays,
    state: State,
    search: Search,
    moves: int,
    hot: float,
    cold: float,
    reorder: float,
    target: float,
) -> int:
    """Make ``moves`` changes while the temperature falls from ``hot`` to ``cold`` (in units of
    time), a share of ``reorder`` of them being moves; end early at ``target`` time. The moves made.
    """
    fitted = 0
    for step in range(moves):
        temperature = hot * (cold / hot) ** (step / moves)
        before = state.time[0] + search.price[0] * state.totals[OVER]
        slack = -temperature * np.log(1.0 - draw(search))
        did = propose(graph, state, search, slack, reorder)
        search.totals[2+4*search.totals[1]]+=1
        if did:
            search.totals[3+4*search.totals[1]]+=1
            after = state.time[0] + search.price[0] * state.totals[OVER]
            if after - before > slack:
                undo(graph, state, search)
            else:
                search.totals[4+4*search.totals[1]]+=1
                if after<before:
                    search.totals[5+4*search.totals[1]]+=1
            search.totals[0] = 0
            keep_best(state, search)
            if search.best_time[0] <= target:
                return step + 1
        fitted += state.totals[OVER] == 0
        if step % 256 == 255:
            adapt_price(search, fitted / 256.0)
            fitted = 0
    return moves

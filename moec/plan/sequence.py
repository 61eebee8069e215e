"""A sequence of executions and its memory, changed in place by one insertion, removal or move.

A plan is a sequence of nodes, each at least once; an output is read from the latest run that made
it and freed after its last use. So any insertion of a node whose inputs ran before is valid: only
memory can fail. The state below is a function of the sequence alone; each change updates it in time
proportional to the intervals that it touches, which is what makes a local search of millions of
changes possible. Compiled with numba.

A *run* is one execution, a number that stays while the sequence changes. ``place[run]`` is its
place, ``last[run, k]`` the last run that reads its k-th output (itself if none). ``memory[place]``
is what is held during that execution. The last run is of an extra node without cost or output that
reads what must be kept. *Values* are numbered as in the problem.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from moec.plan.problem import Problem

njit = numba.njit(cache=True, nogil=True)

# Fields of State.totals
LENGTH, LIMIT, OVER, FREE = range(4)
# More repetitions of one node than this are not tried.
MOST_RUNS = 24


class Arrays(NamedTuple):
    """A problem for compiled code; one node more than the problem has, the end.

    ``total``: bytes of all outputs of each node; ``made_start``: its first value; ``size``: of each
    value. Of each input of a node: ``input_value``, the node that makes it and as which output.
    ``user_node``: the users of each node; ``reader_node``: the readers of each value.
    """

    total: Any
    workspace: Any
    duration: Any
    once: Any
    made_start: Any
    size: Any
    input_start: Any
    input_value: Any
    input_node: Any
    input_output: Any
    user_start: Any
    user_node: Any
    reader_start: Any
    reader_node: Any
    resident: int


class State(NamedTuple):
    """A sequence; ``totals`` are its length, the limit in bytes, the sum over places of what is
    held above the limit, and the number of unused runs in ``free``; ``time`` is its total time.
    """

    at: Any
    place: Any
    node: Any
    last: Any
    runs: Any
    count: Any
    memory: Any
    free: Any
    totals: Any
    time: Any


def arrays_of(problem: Problem) -> Arrays:
    """The problem as arrays."""
    ended = problem.ended
    made_start, _ = _compressed(ended.made)
    input_start, input_value = _compressed(ended.reads)
    input_node = np.array(ended.owners, np.int32)[input_value]
    return Arrays(
        np.array([node.size for node in ended.nodes], np.int64),
        np.array([node.workspace for node in ended.nodes], np.int64),
        np.array([node.duration for node in ended.nodes], np.float64),
        np.array([not node.rematable for node in ended.nodes], np.bool_),
        made_start,
        np.array(ended.sizes, np.int64),
        input_start,
        input_value,
        input_node,
        input_value - made_start[input_node],
        *_compressed(ended.users),
        *_compressed(ended.readers),
        ended.resident,
    )


def _compressed(lists: Any) -> tuple[Any, Any]:
    starts = np.cumsum([0, *map(len, lists)])
    return starts.astype(np.int32), np.array([v for one in lists for v in one], np.int32)


def empty_state(graph: Arrays, capacity: int, limit: int, most_runs: int = MOST_RUNS) -> State:
    """A state of no runs, for sequences of ``capacity`` runs, of one node at most ``most_runs``."""
    nodes = len(graph.total)
    totals = np.array([0, limit, 0, capacity], np.int64)
    return State(
        np.zeros(capacity, np.int32),
        np.zeros(capacity, np.int32),
        np.zeros(capacity, np.int32),
        np.zeros((capacity, np.diff(graph.made_start).max()), np.int32),
        np.zeros((nodes, most_runs), np.int32),
        np.zeros(nodes, np.int32),
        np.zeros(capacity, np.int64),
        np.arange(capacity - 1, -1, -1, dtype=np.int32),
        totals,
        np.zeros(1, np.float64),
    )


@njit
def build(graph: Arrays, state: State, sequence: Any) -> None:
    """Fill an empty state with a valid sequence (without the end)."""
    end = len(graph.total) - 1
    append(graph, state, end)
    for node in sequence:
        insert(graph, state, node, state.totals[LENGTH] - 1)
    # The end came first, so its inputs were not there to be attached.
    attach_inputs(graph, state, state.at[state.totals[LENGTH] - 1])


@njit
def append(graph: Arrays, state: State, node: int) -> None:
    """Add the first run: that of the end."""
    state.totals[FREE] -= 1
    run = state.free[state.totals[FREE]]
    state.at[0] = run
    state.place[run] = 0
    state.node[run] = node
    state.runs[node, 0] = run
    state.count[node] = 1
    state.memory[0] = graph.resident
    state.totals[LENGTH] = 1
    state.totals[OVER] = excess(state, graph.resident)


@njit
def excess(state: State, amount: int) -> int:
    """How far an amount is above the limit."""
    return max(amount - state.totals[LIMIT], 0)


@njit
def add_memory(state: State, first: int, final: int, amount: int) -> None:
    """Hold ``amount`` more bytes at the places from ``first`` to ``final``, both included."""
    limit = state.totals[LIMIT]
    memory = state.memory
    change = 0
    for k in range(first, final + 1):
        before = memory[k]
        after = before + amount
        memory[k] = after
        change += max(after - limit, 0) - max(before - limit, 0)
    state.totals[OVER] += change


@njit
def run_before(state: State, node: int, place: int) -> int:
    """The latest run of a node before a place; -1 if there is none."""
    for k in range(state.count[node] - 1, -1, -1):
        run = state.runs[node, k]
        if state.place[run] < place:
            return run
    return -1


@njit
def last_use(graph: Arrays, state: State, run: int, value: int, before: int) -> int:
    """The last run before a place that reads a value which ``run`` made; ``run`` if none."""
    found, best = run, state.place[run]
    for k in range(graph.reader_start[value], graph.reader_start[value + 1]):
        reader = run_before(state, graph.reader_node[k], before)
        if reader >= 0 and state.place[reader] > best:
            found, best = reader, state.place[reader]
    return found


@njit
def next_read(graph: Arrays, state: State, value: int, after: int) -> int:
    """The first place after ``after`` where a value is read; the sequence's length if none."""
    start, stop = graph.reader_start[value], graph.reader_start[value + 1]
    return first_run(state, graph.reader_node[start:stop], after)


@njit
def next_use(graph: Arrays, state: State, node: int, after: int) -> int:
    """The first place after ``after`` that reads from a node; the sequence's length if none."""
    start, stop = graph.user_start[node], graph.user_start[node + 1]
    return first_run(state, graph.user_node[start:stop], after)


@njit
def first_run(state: State, nodes: Any, after: int) -> int:
    """The first place after ``after`` of any of these nodes; the sequence's length if none."""
    best = state.totals[LENGTH]
    for user in nodes:
        for j in range(state.count[user]):
            place = state.place[state.runs[user, j]]
            if place > after:
                best = min(best, place)
                break
    return best


@njit
def held_until(graph: Arrays, state: State, run: int) -> int:
    """The place of the last run that reads any output of a run; its own if none."""
    node = state.node[run]
    found = state.place[run]
    for k in range(graph.made_start[node + 1] - graph.made_start[node]):
        found = max(found, state.place[state.last[run, k]])
    return found


@njit
def attach_inputs(graph: Arrays, state: State, run: int) -> None:
    """Hold the inputs of a run until it."""
    place = state.place[run]
    node = state.node[run]
    for k in range(graph.input_start[node], graph.input_start[node + 1]):
        made = run_before(state, graph.input_node[k], place)
        if made < 0:
            continue
        output = graph.input_output[k]
        until = state.place[state.last[made, output]]
        if until < place:
            add_memory(state, until + 1, place, graph.size[graph.input_value[k]])
            state.last[made, output] = run


@njit
def detach_inputs(graph: Arrays, state: State, run: int) -> None:
    """Hold the inputs of a run no longer than others need them."""
    place = state.place[run]
    node = state.node[run]
    for k in range(graph.input_start[node], graph.input_start[node + 1]):
        made = run_before(state, graph.input_node[k], place)
        output = graph.input_output[k]
        if state.last[made, output] == run:
            value = graph.input_value[k]
            last = last_use(graph, state, made, value, place)
            state.last[made, output] = last
            add_memory(state, state.place[last] + 1, place, -graph.size[value])


@njit
def insert(graph: Arrays, state: State, node: int, place: int) -> int:
    """Run a node at a place, what was there and after it one later; the new run."""
    crossing = held_across(graph, state, place)
    run = open_place(state, place)
    state.node[run] = node
    state.memory[place] = crossing + graph.total[node] + graph.workspace[node]
    state.totals[OVER] += excess(state, state.memory[place])
    state.time[0] += graph.duration[node]
    earlier = run_before(state, node, place)
    list_run(state, node, run, place)
    take_over(graph, state, run, earlier)
    attach_inputs(graph, state, run)
    return run


@njit
def take_over(graph: Arrays, state: State, run: int, earlier: int) -> None:
    """Have a new run serve what reads its outputs after it, in the place of an earlier run."""
    place, node = state.place[run], state.node[run]
    first = graph.made_start[node]
    for value in range(first, graph.made_start[node + 1]):
        k = value - first
        state.last[run, k] = run
        if earlier >= 0 and state.place[state.last[earlier, k]] > place:
            state.last[run, k] = state.last[earlier, k]
            last = last_use(graph, state, earlier, value, place)
            state.last[earlier, k] = last
            add_memory(state, state.place[last] + 1, place, -graph.size[value])


@njit
def held_across(graph: Arrays, state: State, place: int) -> int:
    """What is held both before and during the execution at a place, without its own needs."""
    node = state.node[state.at[place]]
    return state.memory[place] - graph.total[node] - graph.workspace[node]


@njit
def open_place(state: State, place: int) -> int:
    """Shift the sequence by one from a place on; the unused run that is put there."""
    length = state.totals[LENGTH]
    for k in range(length, place, -1):
        moved = state.at[k - 1]
        state.at[k] = moved
        state.place[moved] = k
        state.memory[k] = state.memory[k - 1]
    state.totals[LENGTH] = length + 1
    state.totals[FREE] -= 1
    run = state.free[state.totals[FREE]]
    state.at[place] = run
    state.place[run] = place
    return run


@njit
def list_run(state: State, node: int, run: int, place: int) -> None:
    """Put a run among those of its node, by place."""
    k = state.count[node]
    while k > 0 and state.place[state.runs[node, k - 1]] > place:
        state.runs[node, k] = state.runs[node, k - 1]
        k -= 1
    state.runs[node, k] = run
    state.count[node] += 1


@njit
def remove(graph: Arrays, state: State, run: int) -> None:
    """Take a run out; an earlier run of its node must serve what reads it."""
    place = state.place[run]
    node = state.node[run]
    detach_inputs(graph, state, run)
    hand_back(graph, state, run)
    state.totals[OVER] -= excess(state, state.memory[place])
    state.time[0] -= graph.duration[node]
    unlist_run(state, node, run)
    close_place(state, place)


@njit
def hand_back(graph: Arrays, state: State, run: int) -> None:
    """Have the run before, of the same node, serve what reads the outputs of a run."""
    place, node = state.place[run], state.node[run]
    first = graph.made_start[node]
    for value in range(first, graph.made_start[node + 1]):
        k = value - first
        if state.last[run, k] != run:
            earlier = run_before(state, node, place)
            until = state.place[state.last[earlier, k]]
            add_memory(state, until + 1, place - 1, graph.size[value])
            state.last[earlier, k] = state.last[run, k]


@njit
def unlist_run(state: State, node: int, run: int) -> None:
    """Forget a run of a node."""
    k = 0
    while state.runs[node, k] != run:
        k += 1
    state.count[node] -= 1
    for j in range(k, state.count[node]):
        state.runs[node, j] = state.runs[node, j + 1]


@njit
def close_place(state: State, place: int) -> None:
    """Shift the sequence back over a place; its run becomes unused."""
    state.free[state.totals[FREE]] = state.at[place]
    state.totals[FREE] += 1
    length = state.totals[LENGTH] - 1
    state.totals[LENGTH] = length
    for k in range(place, length):
        moved = state.at[k + 1]
        state.at[k] = moved
        state.place[moved] = k
        state.memory[k] = state.memory[k + 1]


@njit
def move(graph: Arrays, state: State, run: int, target: int) -> None:
    """Execute a run at another place, between which nothing reads or runs its node."""
    place = state.place[run]
    node = state.node[run]
    held = read_bytes(graph, state, run)
    detach_inputs(graph, state, run)
    state.totals[OVER] -= excess(state, state.memory[place])
    if target > place:
        add_memory(state, place + 1, target, -held)
        for k in range(place, target):
            shift(state, k + 1, k)
        crossing = held_across(graph, state, target + 1) - held
    else:
        crossing = held_across(graph, state, target)
        add_memory(state, target, place - 1, held)
        for k in range(place, target, -1):
            shift(state, k - 1, k)
    state.at[target] = run
    state.place[run] = target
    state.memory[target] = crossing + graph.total[node] + graph.workspace[node]
    state.totals[OVER] += excess(state, state.memory[target])
    attach_inputs(graph, state, run)


@njit
def read_bytes(graph: Arrays, state: State, run: int) -> int:
    """Bytes of those outputs of a run that are read."""
    node = state.node[run]
    first = graph.made_start[node]
    found = 0
    for value in range(first, graph.made_start[node + 1]):
        if state.last[run, value - first] != run:
            found += graph.size[value]
    return found


@njit
def shift(state: State, source: int, target: int) -> None:
    """Copy what is at one place to its neighbour."""
    moved = state.at[source]
    state.at[target] = moved
    state.place[moved] = target
    state.memory[target] = state.memory[source]


@njit
def nodes_of(state: State) -> Any:
    """The sequence of nodes, without the end."""
    found = np.empty(state.totals[LENGTH] - 1, np.int32)
    for k in range(len(found)):
        found[k] = state.node[state.at[k]]
    return found

"""Exact plans of small graphs: the cheapest path through the states of the memory.

A state is the set of outputs held and the set of nodes that ran; running a node costs its
duration, freeing an output nothing. The first complete state that is reached cheapest is optimal
over all orders and all repetitions.
"""

from __future__ import annotations

import heapq

from moec.plan.problem import Problem

# More nodes and outputs than this have too many states.
MOST_NODES = 9
MOST_VALUES = 12


def is_small(problem: Problem) -> bool:
    """Whether all states can be gone through."""
    return len(problem.nodes) <= MOST_NODES and len(problem.sizes) <= MOST_VALUES


def cheapest_sequence(problem: Problem, budget: int, fixed: bool = False) -> list[int] | None:
    """The sequence of least time within the budget; None if there is none.

    Two nodes of equal time are tried by number, so the result is deterministic. ``fixed``: first
    runs are in the given order.
    """
    nodes = range(len(problem.nodes))
    everything = (1 << len(nodes)) - 1
    kept = sum(1 << value for value in problem.kept)
    start = (0, 0)
    costs = {start: 0.0}
    came: dict[tuple[int, int], tuple[tuple[int, int], int | None]] = {}
    queue = [(0.0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        if cost > costs[state]:
            continue
        held, done = state
        if done == everything and held & kept == kept:
            return _path(came, state)
        for after, step, price in _steps(problem, budget, held, done, fixed):
            if cost + price < costs.get(after, float("inf")):
                costs[after] = cost + price
                came[after] = (state, step)
                heapq.heappush(queue, (cost + price, after))
    return None


def least_sequence(problem: Problem, low: int, high: int, fixed: bool = False) -> list[int]:
    """The sequence that needs the fewest bytes: at least ``low``; ``high`` are known to suffice."""
    best = None
    while low < high:
        middle = (low + high) // 2
        found = cheapest_sequence(problem, middle, fixed)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best or cheapest_sequence(problem, high, fixed) or list(problem.order)


def _steps(
    problem: Problem, budget: int, held: int, done: int, fixed: bool
) -> list[tuple[tuple[int, int], int | None, float]]:
    """The states after running a node (given) or freeing an output (None), with the costs."""
    found: list[tuple[tuple[int, int], int | None, float]] = []
    for value in range(len(problem.sizes)):
        if held >> value & 1:
            found.append(((held & ~(1 << value), done), None, 0.0))
    for v, node in enumerate(problem.nodes):
        made = sum(1 << value for value in problem.made[v])
        first = not done >> v & 1
        if not first and (not node.rematable or held & made == made):
            continue
        if fixed and first and v != problem.order[done.bit_count()]:
            continue
        inputs = all(held >> value & 1 for value in problem.reads[v])
        needed = problem.resident + _bytes(problem, held | made) + node.workspace
        if inputs and needed <= budget:
            found.append(((held | made, done | 1 << v), v, node.duration))
    return found


def _bytes(problem: Problem, held: int) -> int:
    return sum(size for value, size in enumerate(problem.sizes) if held >> value & 1)


def _path(
    came: dict[tuple[int, int], tuple[tuple[int, int], int | None]], state: tuple[int, int]
) -> list[int]:
    steps = []
    while state in came:
        state, step = came[state]
        if step is not None:
            steps.append(step)
    return steps[::-1]

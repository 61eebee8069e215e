"""A lower bound on the budget: going backwards from one output, what had to be held at once.

To hold a set of outputs, one of them was made last: the others were held then, with its inputs.
So the sets from which a set can have come are known, and each needs a certain number of bytes. If
no path of sets within a budget leads back to the empty set, no plan fits the budget: any order and
any number of repetitions were allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from moec.plan.problem import Problem

# Sets that are looked at from one node, at most
MOST_SETS = 3000


def is_excluded(problem: Problem, budget: int, deadline: float = math.inf) -> bool:
    """Whether it is proven, by the deadline (of ``time.monotonic``), that no plan fits a budget."""
    search = _Backwards(problem, budget - problem.resident)
    for node in range(len(problem.nodes)):
        if time.monotonic() > deadline:
            return False
        if search.excludes(node):
            return True
    return False


def raised(problem: Problem, low: int, high: int, deadline: float) -> int:
    """Bytes that every plan needs: ``low``, or more, up to ``high``, as far as it can be proven by
    the deadline.
    """
    while low < high and time.monotonic() < deadline:
        middle = (low + high) // 2
        if is_excluded(problem, middle, deadline):
            low = middle + 1
        else:
            high = middle
    return low


class _Backwards:
    def __init__(self, problem: Problem, room: int) -> None:
        self.room = room
        self.problem = problem
        self.made = [sum(1 << value for value in made) for made in problem.made]
        self.read = [sum(1 << value for value in read) for read in problem.reads]

    def excludes(self, node: int) -> bool:
        """Whether a node cannot run."""
        start = self.read[node]
        if not self.has_room(node, start):
            return True
        seen, waiting = {start}, [start]
        while waiting:
            if len(seen) > MOST_SETS:
                return False
            held = waiting.pop()
            if not held:
                return False
            for before in self.origins(held):
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)
        return True

    def origins(self, held: int) -> list[int]:
        """The sets that can have been held just before one of these outputs was made last."""
        owners = {self.problem.owners[value]: None for value in _members(held)}
        found = []
        for node in owners:
            before = held & ~self.made[node] | self.read[node]
            if self.has_room(node, before):
                found.append(before)
        return found

    def has_room(self, node: int, held: int) -> bool:
        """Whether a node can run while these outputs are held."""
        sizes = self.problem.sizes
        total = sum(sizes[value] for value in _members(held | self.made[node]))
        return total + self.problem.nodes[node].workspace <= self.room


def _members(held: int) -> Iterator[int]:
    while held:
        bit = held & -held
        held ^= bit
        yield bit.bit_length() - 1

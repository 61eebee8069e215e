"""A lower bound on the budget: going backwards from one output, what had to be held at once.

To hold a set of outputs, one of them was made last: the others were held then, with its inputs.
So the sets from which a set can have come are known, and each needs a certain number of bytes. If
no path of sets within a budget leads back to the empty set, no plan fits the budget: any order and
any number of repetitions were allowed.
"""

from __future__ import annotations

import math
import time

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
        self.nodes = problem.nodes
        self.inputs = [sum(1 << source for source in inputs) for inputs in problem.inputs]

    def excludes(self, node: int) -> bool:
        """Whether the output of a node cannot be made."""
        start = 1 << node
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
        found = []
        rest = held
        while rest:
            bit = rest & -rest
            rest ^= bit
            node = bit.bit_length() - 1
            before = (held ^ bit) | self.inputs[node]
            if self.bytes(before | bit) + self.nodes[node].workspace <= self.room:
                found.append(before)
        return found

    def bytes(self, held: int) -> int:
        """What a set of outputs takes."""
        total = 0
        while held:
            bit = held & -held
            held ^= bit
            total += self.nodes[bit.bit_length() - 1].size
        return total

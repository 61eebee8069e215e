"""Plans from the solution of the gap relaxation: what runs again in a gap, and what is held."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from moec.plan.problem import Problem


def rounded(
    problem: Problem,
    chains: Sequence[Sequence[int]],
    again: Sequence[Sequence[float]],
    threshold: float,
) -> list[int]:
    """A sequence in the given order in which a node runs again where the relaxation runs it again
    to at least the threshold; inputs that are not held then are repeated too.

    ``chains[u]``: the users of u that divide its gaps, the end among them; ``again[u][i]``: how
    often u runs again in gap i. The sequence is valid; whether it fits is not looked at.
    """
    builder = _Builder(problem.ended, chains, again, threshold)
    for node in problem.ended.order:
        builder.run(node)
    # Without the end
    return builder.sequence[:-1]


class _Builder:
    """Builds a sequence; ``held`` are the values that are there without running anything again."""

    def __init__(
        self,
        problem: Problem,
        chains: Sequence[Sequence[int]],
        again: Sequence[Sequence[float]],
        threshold: float,
    ) -> None:
        self.problem = problem
        self.place = {node: k for k, node in enumerate(problem.order)}
        self.chains = [[self.place[user] for user in chain] for chain in chains]
        self.sums = [list(itertools.accumulate(one, initial=0.0)) for one in again]
        self.threshold = threshold
        self.reads = [sorted(self.place[v] for v in readers) for readers in problem.readers]
        self.held: set[int] = set()
        self.sequence: list[int] = []

    def run(self, node: int) -> None:
        """Run a node for the first time."""
        self.provide(node)
        self.sequence.append(node)
        self.held.update(self.problem.made[node])
        for value in (*self.problem.made[node], *self.problem.reads[node]):
            self.leave(value, self.place[node])

    def provide(self, node: int) -> None:
        """Repeat what makes the inputs that are not held, and what that takes."""
        waiting = [(node, iter(self.problem.reads[node]))]
        while waiting:
            top, inputs = waiting[-1]
            value = next((w for w in inputs if w not in self.held), None)
            if value is not None:
                owner = self.problem.owners[value]
                waiting.append((owner, iter(self.problem.reads[owner])))
                continue
            waiting.pop()
            if top != node:
                self.sequence.append(top)
                self.held.update(self.problem.made[top])

    def leave(self, value: int, place: int) -> None:
        """After a use: hold the value until the next, or not."""
        owner = self.problem.owners[value]
        if not self.problem.nodes[owner].rematable:
            return
        later = bisect.bisect_right(self.reads[value], place)
        if later == len(self.reads[value]):
            self.held.discard(value)
            return
        first = bisect.bisect_right(self.chains[owner], place)
        final = bisect.bisect_left(self.chains[owner], self.reads[value][later])
        again = self.sums[owner][final + 1] - self.sums[owner][first]
        if again >= self.threshold:
            self.held.discard(value)

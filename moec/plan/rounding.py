"""Plans from the solution of the gap relaxation: what runs again in a gap, and what is held."""

from __future__ import annotations

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

    ``chains[u]``: the users of u that divide its gaps; ``again[u][i]``: how often u runs again in
    gap i. The sequence is valid; whether it fits is not looked at.
    """
    builder = _Builder(problem, chains, again, threshold)
    for node in problem.order:
        builder.run(node)
    return builder.sequence


class _Builder:
    def __init__(
        self,
        problem: Problem,
        chains: Sequence[Sequence[int]],
        again: Sequence[Sequence[float]],
        threshold: float,
    ) -> None:
        self.problem = problem
        self.gap_ends = [{user: k + 1 for k, user in enumerate(chain)} for chain in chains]
        self.again = again
        self.threshold = threshold
        self.waiting = [len(users) for users in problem.users]
        self.held: set[int] = set()
        self.sequence: list[int] = []

    def run(self, node: int) -> None:
        """Run a node for the first time."""
        self.provide(node)
        self.sequence.append(node)
        self.held.add(node)
        self.leave(node, 0)
        for source in self.problem.inputs[node]:
            self.waiting[source] -= 1
            self.leave(source, self.gap_ends[source].get(node, -1))

    def provide(self, node: int) -> None:
        """Repeat the inputs that are not held, and what they take."""
        waiting = [(node, iter(self.problem.inputs[node]))]
        while waiting:
            top, inputs = waiting[-1]
            source = next((s for s in inputs if s not in self.held), None)
            if source is not None:
                waiting.append((source, iter(self.problem.inputs[source])))
                continue
            waiting.pop()
            if top != node:
                self.sequence.append(top)
                self.held.add(top)

    def leave(self, node: int, gap: int) -> None:
        """At the start of a gap: hold the output over it, or not."""
        over = self.waiting[node] == 0
        pinned = not self.problem.nodes[node].rematable or self.problem.nodes[node].keep
        if not pinned and (over or (gap >= 0 and self.again[node][gap] >= self.threshold)):
            self.held.discard(node)

"""Plans from the solution of the gap relaxation: what runs again in a gap, and what is held."""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Iterable, Sequence

from moec.plan.gaps import Gaps


def rounded(
    gaps: Gaps,
    again: Sequence[Sequence[float]],
    threshold: float,
    ahead: int | None = None,
    deadline: float = math.inf,
) -> list[int]:
    """A sequence in which a node runs again where the relaxation runs it again to at least the
    threshold; inputs that are not held then are repeated too.

    ``again[u][i]``: how often u runs again in gap i. First runs are in the given order; with
    ``ahead``, a node goes before its turn if it frees at least as much as is made for it, and at
    most so many nodes must run again for it; not after the deadline (of ``time.monotonic``), since
    it takes long. The sequence is valid; whether it fits is not looked at.
    """
    builder = _Builder(gaps, again, threshold)
    for node in gaps.problem.order:
        if node not in builder.done:
            builder.run(node)
        if time.monotonic() > deadline:
            ahead = None
        while ahead is not None and (relief := builder.relief(ahead)) is not None:
            builder.run(relief)
    # Without the end
    return builder.sequence[:-1]


class _Builder:
    """Builds a sequence; ``held`` are the values that are there without running anything again."""

    def __init__(self, gaps: Gaps, again: Sequence[Sequence[float]], threshold: float) -> None:
        self.gaps = gaps
        self.problem = gaps.problem
        self.threshold = threshold
        self.place = {node: k for k, node in enumerate(self.problem.order)}
        self.chains = [[self.place[user] for user in chain] for chain in gaps.chains]
        self.sums = [list(itertools.accumulate(one, initial=0.0)) for one in again]
        # The gap that each node is in, and the places of those that have yet to read each value
        self.gap = [0] * len(self.chains)
        self.unread = [sorted(self.place[v] for v in of) for of in self.problem.readers]
        self.done: set[int] = set()
        self.held: set[int] = set()
        self.sequence: list[int] = []
        # Nodes that may be of relief, since something that they read was made or read
        self.near: set[int] = set()

    def run(self, node: int) -> None:
        """Run a node for the first time."""
        self.provide(node)
        self.append(node)
        self.done.add(node)
        self.near.discard(node)
        for owner, gap in self.gaps.begun[node]:
            self.gap[owner] = gap
        for value in self.problem.reads[node]:
            self.unread[value].remove(self.place[node])
        for value in (*self.problem.reads[node], *self.problem.made[node]):
            # What cannot run again stays as long as anything may need it.
            rematable = self.problem.nodes[self.problem.owners[value]].rematable
            if rematable and not self.stays(value, self.unread[value]):
                self.held.discard(value)
            self.consider(value)

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
                self.append(top)

    def append(self, node: int) -> None:
        """Run a node with all that it reads."""
        self.sequence.append(node)
        self.held.update(self.problem.made[node])
        for value in self.problem.made[node]:
            self.consider(value)

    def consider(self, value: int) -> None:
        """Remember the readers of a value that have not run."""
        self.near.update(self.problem.order[place] for place in self.unread[value])

    def stays(self, value: int, unread: Sequence[int]) -> bool:
        """Whether a value is held until the first of these places, where it is read next."""
        owner = self.problem.owners[value]
        if not self.problem.nodes[owner].rematable or not unread:
            return bool(unread)
        first = self.gap[owner]
        final = max(first, bisect.bisect_left(self.chains[owner], unread[0]))
        return self.sums[owner][final + 1] - self.sums[owner][first] < self.threshold

    def relief(self, ahead: int) -> int | None:
        """The first node, by place, that can run now and then frees at least what it makes."""
        end = len(self.problem.nodes) - 1
        found = [v for v in self.near if v != end and self.is_ready(v) and self.relieves(v, ahead)]
        return min(found, key=self.place.__getitem__, default=None)

    def is_ready(self, node: int) -> bool:
        """Whether all that a node reads was made."""
        return self.done.issuperset(self.problem.inputs[node])

    def relieves(self, node: int, ahead: int) -> bool:
        """Whether the first run of a node frees at least what it makes, with what is repeated for
        it, and nothing that is needed to repeat others.
        """
        again = self.missing(node, ahead)
        if len(again) > ahead:
            return False
        left = [
            value
            for value in self.problem.reads[node]
            if not self.stays(value, _without(self.unread[value], self.place[node]))
        ]
        made = {value for other in (node, *again) for value in self.problem.made[other]}
        more = (w for w in made - self.held if _without(self.unread[w], self.place[node]))
        relief = self.bytes(self.held.intersection(left)) - self.bytes(more)
        return relief >= 0 and not any(map(self.is_needed_again, left))

    def missing(self, node: int, most: int) -> set[int]:
        """The nodes that must run again for one; where they are more than ``most``, not all."""
        found: set[int] = set()
        waiting = [node]
        while waiting and len(found) <= most:
            read = self.problem.reads[waiting.pop()]
            owners = {self.problem.owners[value] for value in read if value not in self.held}
            waiting += owners - found
            found |= owners
        return found

    def is_needed_again(self, value: int) -> bool:
        """Whether something must run again that reads a value, as far as can be said now: it ran,
        and what it made is not held but will be read, or needed in the same way.
        """
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            for user in self.problem.readers[waiting.pop()]:
                dropped = [w for w in self.problem.made[user] if w not in self.held]
                if user not in self.done or user in seen:
                    continue
                if any(self.unread[w] for w in dropped):
                    return True
                seen.add(user)
                waiting += dropped
        return False

    def bytes(self, values: Iterable[int]) -> int:
        """The sum of the sizes of these values."""
        return sum(self.problem.sizes[value] for value in values)


def _without(places: Sequence[int], place: int) -> list[int]:
    return [other for other in places if other != place]

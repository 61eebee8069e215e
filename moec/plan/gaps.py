"""When an output can be made again: the gaps between the first runs of its node's users.

"Before" is what holds in every order of first runs, or in the given one. The users of a node that
come one after another in every order divide time into gaps, the first of which begins with the
node's own first run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.plan.problem import Problem


@dataclass(frozen=True)
class Spans:
    """Of one value: the nodes v at whose first run it is not read but needed later, and for each of
    these the first and the last gap in which its owner could run again before that.
    """

    rows: Any
    first: Any
    final: Any


@dataclass(frozen=True)
class Gaps:
    """A problem with an end, and where its values can be made again.

    ``before[u, v]``: u first runs before v. ``chains``: for each node the users that divide its
    gaps. ``spans``: of each value. ``crossing``: for each node v, the values that are not read at
    its first run but needed later, with the last gap before that. ``begun``: for each node, the
    gaps that its first run begins, as pairs of the node that they are of and their number.
    """

    problem: Problem
    before: Any
    chains: tuple[tuple[int, ...], ...]
    spans: tuple[Spans, ...]
    crossing: tuple[tuple[Any, Any], ...]
    begun: tuple[tuple[tuple[int, int], ...], ...]


def gaps_of(problem: Problem, fixed: bool = False) -> Gaps:
    """The gaps in every order, or in the given one."""
    ended = problem.ended
    before = before_matrix(ended, fixed)
    chains = tuple(_longest_chain(users, before) for users in ended.users)
    spans = tuple(
        _spans(before, owner, np.array(readers, int), np.array(chains[owner], int))
        for owner, readers in zip(ended.owners, ended.readers, strict=True)
    )
    return Gaps(ended, before, chains, spans, _by_row(spans, len(ended.nodes)), _begun(chains))


def before_matrix(problem: Problem, fixed: bool) -> Any:
    """``[u, v]``: u first runs before v, in every order, or in the given one; the last node, the
    end, is after all others.
    """
    count = len(problem.nodes)
    past = np.zeros((count, count), bool)
    if fixed:
        place = np.empty(count, np.int64)
        place[list(problem.order)] = np.arange(count)
        return place[:, None] < place[None, :]
    for node in problem.order:
        for source in problem.inputs[node]:
            past[node] |= past[source]
            past[node, source] = True
    past[-1, :-1] = True
    return np.ascontiguousarray(past.T)


def _spans(before: Any, owner: int, readers: Any, chain: Any) -> Spans:
    crossed = before[owner] & before[:, readers].any(axis=1)
    crossed[readers] = False
    rows = np.flatnonzero(crossed)
    past = before[chain[:, None], rows].sum(axis=0) + np.isin(rows, chain)
    reached = len(chain) - (before[readers[:, None], chain] | (readers[:, None] == chain)).sum(
        axis=1
    )
    later = before[rows[:, None], readers]
    final = np.where(later, reached, len(chain)).min(axis=1, initial=len(chain))
    return Spans(rows, past, final)


def _longest_chain(readers: Sequence[int], before: Any) -> tuple[int, ...]:
    """A longest totally ordered subset, in order."""
    ordered = sorted(readers, key=lambda user: (int(before[:, user].sum()), user))
    among = before[np.ix_(np.array(ordered, int), np.array(ordered, int))]
    length = np.ones(len(ordered), int)
    previous = np.full(len(ordered), -1)
    for k in range(len(ordered)):
        options = np.where(among[:k, k], length[:k], 0)
        if options.any():
            previous[k] = int(options.argmax())
            length[k] = options.max() + 1
    chain, k = [], int(length.argmax()) if ordered else -1
    while k >= 0:
        chain.append(ordered[k])
        k = int(previous[k])
    return tuple(chain[::-1])


def _begun(chains: Sequence[Sequence[int]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    found: list[list[tuple[int, int]]] = [[] for _ in chains]
    for node, chain in enumerate(chains):
        for gap, start in enumerate(chain):
            found[start].append((node, gap + 1))
    return tuple(map(tuple, found))


def _by_row(spans: Sequence[Spans], count: int) -> tuple[tuple[Any, Any], ...]:
    """For each of the nodes, the values that are needed later, with the last gap before that."""
    none = np.zeros(0, int)
    values = np.repeat(np.arange(len(spans)), [len(s.rows) for s in spans])
    rows = np.concatenate([none, *(s.rows for s in spans)])
    final = np.concatenate([none, *(s.final for s in spans)])
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(count + 1))
    return tuple((values[order[a:b]], final[order[a:b]]) for a, b in itertools.pairwise(ends))

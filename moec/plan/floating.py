"""Conditions of the integer relaxation on operations that nothing reads, as a weight's gradient.

Such a node has no place among the others: no order says that it ran before another node, so that
its results are held there, nor that it runs after it, so that its inputs are. But one of the two
is so. For a node ``row`` that shares an input with it, and the first that waits for ``row``, the
integer program chooses between them:

    it ran before ``row``: at both its results are held, or it runs again later;
    it runs between the two: beside what it needs, so is what the next one and those after it read;
    it runs after both: at both its inputs are held, or made again later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moec.plan.gaps import Gaps

if TYPE_CHECKING:
    from moec.plan.bounds import Relaxation

# Nodes that are placed about one row, at most
MOST_NODES = 8


def place_floating(relaxation: Relaxation, row: int) -> None:
    """Place what floats about a row: the conditions on it, and on the next row."""
    for node in _floating(relaxation.gaps, row):
        early = _placed(relaxation, node, row)
        following = _following(relaxation.gaps, row)
        if following is None:
            continue
        if following not in relaxation.rows:
            relaxation.add_row(following)
        late = _placed(relaxation, node, following)
        in_turn = relaxation.solver.Constraint(0.0, relaxation.infinity)
        in_turn.SetCoefficient(late, 1.0)
        in_turn.SetCoefficient(early, -1.0)
        _run_between(relaxation, node, row, following)


def _floating(gaps: Gaps, row: int) -> list[int]:
    """Nodes that nothing but the end reads, in no order with a row, with an input in common."""
    problem, before = gaps.problem, gaps.before
    end = len(problem.nodes) - 1
    here = {*problem.reads[row], *problem.made[row]}
    found = []
    for node in problem.inputs[end]:
        shared = sum(problem.sizes[v] for v in problem.reads[node] if v in here)
        is_free = node != row and not before[node, row] and not before[row, node]
        if is_free and shared and problem.users[node] == (end,):
            found.append((-shared, node))
    return [node for _, node in sorted(found)[:MOST_NODES]]


def _following(gaps: Gaps, row: int) -> int | None:
    """The first of the nodes that wait for a row; ``None`` if that is the end."""
    users = gaps.problem.users[row]
    first = min(users, key=lambda user: (int(gaps.before[:, user].sum()), user), default=None)
    return None if first == len(gaps.problem.nodes) - 1 else first


def _placed(relaxation: Relaxation, node: int, row: int) -> Any:
    """Whether a node first runs before another; with what is held there in each case."""
    known = relaxation.early.get((node, row))
    if known is not None:
        return known
    early = relaxation.solver.IntVar(0.0, 1.0, f"early_{node}_{row}")
    relaxation.early[node, row] = early
    _results_are_held(relaxation, node, row)
    problem, before = relaxation.problem, relaxation.gaps.before
    for value in problem.reads[node]:
        owner = problem.owners[value]
        if before[owner, row] and not relaxation.has(row, value):
            either = relaxation.solver.Constraint(1.0, relaxation.infinity)
            either.SetCoefficient(early, 1.0)
            either.SetCoefficient(relaxation.held_at(value, row), 1.0)
            either.SetCoefficient(relaxation.runs_late(owner, row), 1.0)
    relaxation.explain()
    return early


def _results_are_held(relaxation: Relaxation, node: int, row: int) -> None:
    """What a node leaves to the end is held at a row if it ran before, or it runs again after."""
    about = relaxation.problem.nodes[node]
    kept = sum(size for size, is_kept in zip(about.outputs, about.keep, strict=True) if is_kept)
    held = relaxation.solver.IntVar(0.0, 1.0, f"kept_{node}_{row}")
    relaxation.rows[row].SetCoefficient(held, kept / relaxation.unit)
    either = relaxation.solver.Constraint(0.0, relaxation.infinity)
    either.SetCoefficient(held, 1.0)
    either.SetCoefficient(relaxation.runs_late(node, row), 1.0)
    either.SetCoefficient(relaxation.early[node, row], -1.0)


def _run_between(relaxation: Relaxation, node: int, row: int, following: int) -> None:
    """What a node that runs between two others finds held fits, beside its own."""
    solver, unit = relaxation.solver, relaxation.unit
    across = list(_across(relaxation.gaps, node, row, following))
    room = float(relaxation.room[node])
    excess = sum(float(relaxation.size[value]) for value, _ in across) - room
    if excess <= 0:
        return
    early, late = relaxation.early[node, row], relaxation.early[node, following]
    fits = solver.Constraint(-relaxation.infinity, (room + excess) / unit)
    fits.SetCoefficient(early, -excess / unit)
    fits.SetCoefficient(late, excess / unit)
    for value, reader in across:
        held = solver.IntVar(0.0, 1.0, f"between_{value}_{node}_{row}")
        fits.SetCoefficient(held, float(relaxation.size[value]) / unit)
        either = solver.Constraint(1.0, relaxation.infinity)
        either.SetCoefficient(held, 1.0)
        relaxation.add_again(either, relaxation.problem.owners[value], row, reader)


def _across(gaps: Gaps, node: int, row: int, following: int) -> Iterator[tuple[int, int]]:
    """Values that are made by the end of one row and read from another on, with a reader."""
    problem, before = gaps.problem, gaps.before
    values = {*map(int, gaps.crossing[following][0]), *problem.reads[following]}
    for value in sorted(values - {*problem.reads[node], *problem.made[node]}):
        owner = problem.owners[value]
        if not problem.sizes[value] or not (owner == row or before[owner, row]):
            continue
        readers = problem.readers[value]
        if following in readers:
            yield value, following
        else:
            later = [r for r in readers if before[following, r]]
            yield value, min(later, key=lambda r: (int(before[:, r].sum()), r))

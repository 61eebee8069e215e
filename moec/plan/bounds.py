"""Lower bounds on the time of any plan within a budget: a relaxation to gaps between uses.

While node v runs for the first time, everything it depends on has run and nothing that depends on
it has. So an output u that v's past made and v's future reads is either held then, or u runs again
between v and that reader. The users of u that come one after another in every order divide time
into *gaps*; ``again[u, i]`` says how often u runs again in gap i. The linear program

    minimise    sum duration[u] * again[u, i]
    such that   at the first run of v, for every v: held outputs and v's own needs fit the budget;
                u is held at v, or runs again in the gaps that lie between v and the next reader;
                u runs again after v only if each input is held at v or runs again in between

holds for every plan, so its optimum is a lower bound. With the order of first runs given, the
relation "before" is total and the gaps are those between consecutive users. Only the rows that a
solution violates are added.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from moec.plan.problem import Problem

# Rows that are added at once, and how much of the budget a row may be violated by
ROWS_AT_ONCE = 8
TOLERANCE = 1e-6
# More conditions on inputs than this are left out, which keeps the bound a bound.
MOST_CONDITIONS = 60000


@dataclass(frozen=True)
class Gaps:
    """Of one node: the users that are totally ordered, and for each row v where its output is
    needed later, the first and the last gap in which it could run again before that.
    """

    chain: tuple[int, ...]
    rows: Any
    first: Any
    final: Any


def before_matrix(problem: Problem, fixed: bool) -> Any:
    """``[u, v]``: u first runs before v, in every order, or in the given one."""
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
    return np.ascontiguousarray(past.T)


def gaps_of(problem: Problem, before: Any) -> list[Gaps]:
    """The gaps of every node."""
    return [_gaps(problem, before, node) for node in range(len(problem.nodes))]


def _gaps(problem: Problem, before: Any, node: int) -> Gaps:
    users = np.array(problem.users[node], int)
    chain = np.array(_longest_chain(users.tolist(), before), int)
    crossed = before[node] & before[:, users].any(axis=1)
    crossed[users] = False
    rows = np.flatnonzero(crossed)
    past = before[chain[:, None], rows].sum(axis=0) + np.isin(rows, chain)
    reached = len(chain) - (before[users[:, None], chain] | (users[:, None] == chain)).sum(axis=1)
    later = before[rows[:, None], users]
    final = np.where(later, reached, len(chain)).min(axis=1, initial=len(chain))
    return Gaps(tuple(chain.tolist()), rows, past, final)


def _longest_chain(readers: list[int], before: Any) -> list[int]:
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
    return chain[::-1]


@dataclass
class Relaxation:
    """The linear program, grown row by row."""

    problem: Problem
    budget: int
    fixed: bool = False
    rows: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = before_matrix(self.problem, self.fixed)
        self.gaps = gaps_of(self.problem, self.before)
        self.size = np.array([node.size for node in self.problem.nodes], float)
        self.room = np.array(
            [self.budget - self.problem.working_set(v) for v in range(len(self.gaps))], float
        )
        self.crossing = _by_row(self.gaps)
        # In units of the mean, numbers stay near one.
        self.unit = max(float(self.size.mean()), 1.0)
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.solver.SetSolverSpecificParametersAsString("use_dual_simplex: true")
        self.infinity = self.solver.infinity()
        self.again = [self._again(v) for v in range(len(self.gaps))]
        # How often each node runs again in each of its gaps, when it was solved last
        self.solution = [[0.0] * len(again) for again in self.again]
        self.held: dict[tuple[int, int], Any] = {}
        self.at_row: dict[int, list[int]] = {}
        self._add_inputs()

    def _again(self, node: int) -> list[Any]:
        about = self.problem.nodes[node]
        most = self.infinity if about.rematable else 0.0
        found = []
        for gap in range(len(self.gaps[node].chain) + 1):
            variable = self.solver.NumVar(0.0, most, f"again_{node}_{gap}")
            self.solver.Objective().SetCoefficient(variable, about.duration)
            found.append(variable)
        return found

    def _add_inputs(self) -> None:
        """Running again in a gap takes the inputs: held at its start, or running again in it."""
        for node, gaps in enumerate(self.gaps):
            for gap in range(1, len(gaps.chain) + 1):
                start = gaps.chain[gap - 1]
                end = gaps.chain[gap] if gap < len(gaps.chain) else None
                for source in self.problem.inputs[node]:
                    if source not in self.problem.inputs[start] and source != start:
                        self._need(node, gap, source, start, end)

    def _need(self, node: int, gap: int, source: int, start: int, end: int | None) -> None:
        if self.solver.NumConstraints() > MOST_CONDITIONS:
            return
        row = self.solver.Constraint(0.0, self.infinity)
        row.SetCoefficient(self.again[node][gap], -1.0)
        row.SetCoefficient(self._held(source, start), 1.0)
        self._add_again(row, source, start, end)

    def _add_again(self, row: Any, node: int, start: int, end: int | None) -> None:
        """Add to a row how often a node runs again between two first runs, at most."""
        before, chain = self.before, self.gaps[node].chain
        for gap, variable in enumerate(self.again[node]):
            over = gap < len(chain) and (chain[gap] == start or before[chain[gap], start])
            later = gap > 0 and end is not None
            later = later and (chain[gap - 1] == end or before[end, chain[gap - 1]])
            if not over and not later:
                row.SetCoefficient(variable, 1.0)

    def _held(self, node: int, row: int) -> Any:
        """Whether a node's output is held at the first run of another."""
        if (node, row) not in self.held:
            variable = self.solver.NumVar(0.0, 1.0, f"held_{node}_{row}")
            self.held[node, row] = variable
            if row in self.rows:
                self.rows[row].SetCoefficient(variable, self.size[node] / self.unit)
            span = self._span(node, row)
            if span is not None:
                constraint = self.solver.Constraint(1.0, self.infinity)
                constraint.SetCoefficient(variable, 1.0)
                for gap in range(span[0], span[1] + 1):
                    constraint.SetCoefficient(self.again[node][gap], 1.0)
            self.at_row.setdefault(row, []).append(node)
        return self.held[node, row]

    def _span(self, node: int, row: int) -> tuple[int, int] | None:
        gaps = self.gaps[node]
        k = np.searchsorted(gaps.rows, row)
        if k == len(gaps.rows) or gaps.rows[k] != row:
            return None
        return int(gaps.first[k]), int(gaps.final[k])

    def add_row(self, row: int) -> None:
        """What is held at the first run of a node fits the budget; what is not held there and
        needed later runs again after it, from inputs that are held there or run again as well.
        """
        constraint = self.solver.Constraint(-self.infinity, self.room[row] / self.unit)
        self.rows[row] = constraint
        for node in self.at_row.get(row, ()):
            variable = self.held[node, row]
            constraint.SetCoefficient(variable, self.size[node] / self.unit)
        for node, final in zip(*self.crossing[row], strict=True):
            self._held(int(node), row)
            self._add_inputs_at(row, int(node), int(final))

    def _add_inputs_at(self, row: int, node: int, final: int) -> None:
        chain = self.gaps[node].chain
        for source in self.problem.inputs[node]:
            if source == row or source in self.problem.inputs[row]:
                continue
            if self.solver.NumConstraints() > MOST_CONDITIONS:
                return
            need = self.solver.Constraint(1.0, self.infinity)
            need.SetCoefficient(self._held(node, row), 1.0)
            need.SetCoefficient(self._held(source, row), 1.0)
            self._add_again(need, source, row, chain[final] if final < len(chain) else None)

    def load(self) -> Any:
        """How far each row that is not there yet is above what fits."""
        sums = [np.cumsum([0.0, *again]) for again in self.solution]
        above = -self.room
        for node, gaps in enumerate(self.gaps):
            again = sums[node][gaps.final + 1] - sums[node][gaps.first]
            above[gaps.rows] += self.size[node] * np.clip(1.0 - again, 0.0, None)
        above[list(self.rows)] = -np.inf
        return above

    def solve(self, seconds: float) -> float:
        """The bound: a time that no plan within the budget is below; infinity if there is none."""
        deadline = time.monotonic() + seconds
        if self.room.min(initial=0.0) < 0:
            return float("inf")
        bound = 0.0
        above = self._unrelieved()
        while above.max(initial=0.0) > TOLERANCE * max(self.budget, 1):
            for row in np.argsort(-above, kind="stable")[:ROWS_AT_ONCE]:
                if above[row] > TOLERANCE * self.budget:
                    self.add_row(int(row))
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.solver.SetTimeLimit(int(1000 * left) + 1)
            status = self.solver.Solve()
            if status == pywraplp.Solver.INFEASIBLE:
                return float("inf")
            if status != pywraplp.Solver.OPTIMAL:
                break
            bound = self.solver.Objective().Value()
            self.solution = [[v.solution_value() for v in again] for again in self.again]
            above = self.load()
        return self.problem.least_time + max(bound, 0.0) * (1 - 1e-9)

    def chains(self) -> list[tuple[int, ...]]:
        """The users that divide the gaps of each node."""
        return [gaps.chain for gaps in self.gaps]

    def _unrelieved(self) -> Any:
        above = -self.room
        for node, gaps in enumerate(self.gaps):
            above[gaps.rows] += self.size[node]
        return above


def _by_row(gaps: list[Gaps]) -> list[tuple[Any, Any]]:
    """For each row, the nodes that are needed later, with the last gap before that."""
    nodes = np.repeat(np.arange(len(gaps)), [len(g.rows) for g in gaps])
    rows = np.concatenate([g.rows for g in gaps]) if gaps else np.zeros(0, int)
    final = np.concatenate([g.final for g in gaps]) if gaps else rows
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(len(gaps) + 1))
    return [(nodes[order[a:b]], final[order[a:b]]) for a, b in itertools.pairwise(ends)]

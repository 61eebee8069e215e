"""Lower bounds on the time of any plan within a budget: a relaxation to gaps between uses.

While node v runs for the first time, everything it depends on has run and nothing that depends on
it has. So an output of u that v's past made and v's future reads is either held then, or u runs
again between v and that reader. The users of u that come one after another in every order divide
time into *gaps*; ``again[u, i]`` says whether u runs again in gap i. The linear program

    minimise    sum duration[u] * again[u, i]
    such that   at the first run of v, for every v: held outputs and v's own needs fit the budget;
                an output is held at v, or its node runs again in the gaps that lie between v and
                the next reader, once for all its outputs;
                u runs again after v only if each input is held at v or made again in between

holds for every plan, so its optimum is a lower bound. With the order of first runs given, the
relation "before" is total and the gaps are those between consecutive users. Only the rows that a
solution violates are added.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
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
class Spans:
    """Of one value: the nodes v at whose first run it is not read but needed later, and for each of
    these the first and the last gap in which its owner could run again before that.
    """

    rows: Any
    first: Any
    final: Any


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


def spans_of(problem: Problem, before: Any, chains: Sequence[Sequence[int]]) -> list[Spans]:
    """The spans of every value; ``chains``: for each node, users in the order they come in."""
    return [
        _spans(before, owner, np.array(readers, int), np.array(chains[owner], int))
        for owner, readers in zip(problem.owners, problem.readers, strict=True)
    ]


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


def _longest_chain(readers: Sequence[int], before: Any) -> list[int]:
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
        self.problem = self.problem.ended
        nodes = range(len(self.problem.nodes))
        self.before = before_matrix(self.problem, self.fixed)
        # The users that divide the gaps of each node
        self.chains = [_longest_chain(self.problem.users[v], self.before) for v in nodes]
        self.spans = spans_of(self.problem, self.before, self.chains)
        self.size = np.array(self.problem.sizes, float)
        self.room = np.array([self.budget - self.problem.working_set(v) for v in nodes], float)
        self.crossing = _by_row(self.spans, len(nodes))
        # In units of the mean, numbers stay near one.
        self.unit = max(float(self.size.sum()) / max(len(self.size), 1), 1.0)
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.solver.SetSolverSpecificParametersAsString("use_dual_simplex: true")
        self.infinity = self.solver.infinity()
        self.again = [self._again(v) for v in nodes]
        # How often each node runs again in each of its gaps, when it was solved last
        self.solution = [[0.0] * len(again) for again in self.again]
        self.held: dict[tuple[int, int], Any] = {}
        self.at_row: dict[int, list[int]] = {}
        self._add_inputs()

    def _again(self, node: int) -> list[Any]:
        about = self.problem.nodes[node]
        most = self.infinity if about.rematable else 0.0
        found = []
        for gap in range(len(self.chains[node]) + 1):
            variable = self.solver.NumVar(0.0, most, f"again_{node}_{gap}")
            self.solver.Objective().SetCoefficient(variable, about.duration)
            found.append(variable)
        return found

    def _add_inputs(self) -> None:
        """Running again in a gap takes the inputs: held at its start, or running again in it."""
        for node, chain in enumerate(self.chains):
            for gap in range(1, len(chain) + 1):
                start = chain[gap - 1]
                end = chain[gap] if gap < len(chain) else None
                for value in self.problem.reads[node]:
                    if not self._has(start, value):
                        self._need(node, gap, value, start, end)

    def _has(self, node: int, value: int) -> bool:
        """Whether a value is held while a node runs, since it reads or makes it."""
        return value in self.problem.reads[node] or value in self.problem.made[node]

    def _need(self, node: int, gap: int, value: int, start: int, end: int | None) -> None:
        if self.solver.NumConstraints() > MOST_CONDITIONS:
            return
        row = self.solver.Constraint(0.0, self.infinity)
        row.SetCoefficient(self.again[node][gap], -1.0)
        row.SetCoefficient(self._held(value, start), 1.0)
        self._add_again(row, self.problem.owners[value], start, end)

    def _add_again(self, row: Any, node: int, start: int, end: int | None) -> None:
        """Add to a row how often a node runs again between two first runs, at most."""
        before, chain = self.before, self.chains[node]
        for gap, variable in enumerate(self.again[node]):
            over = gap < len(chain) and (chain[gap] == start or before[chain[gap], start])
            later = gap > 0 and end is not None
            later = later and (chain[gap - 1] == end or before[end, chain[gap - 1]])
            if not over and not later:
                row.SetCoefficient(variable, 1.0)

    def _held(self, value: int, row: int) -> Any:
        """Whether a value is held at the first run of a node."""
        if (value, row) not in self.held:
            variable = self.solver.NumVar(0.0, 1.0, f"held_{value}_{row}")
            self.held[value, row] = variable
            if row in self.rows:
                self.rows[row].SetCoefficient(variable, self.size[value] / self.unit)
            span = self._span(value, row)
            if span is not None:
                constraint = self.solver.Constraint(1.0, self.infinity)
                constraint.SetCoefficient(variable, 1.0)
                for gap in range(span[0], span[1] + 1):
                    constraint.SetCoefficient(self.again[self.problem.owners[value]][gap], 1.0)
            self.at_row.setdefault(row, []).append(value)
        return self.held[value, row]

    def _span(self, value: int, row: int) -> tuple[int, int] | None:
        spans = self.spans[value]
        k = np.searchsorted(spans.rows, row)
        if k == len(spans.rows) or spans.rows[k] != row:
            return None
        return int(spans.first[k]), int(spans.final[k])

    def add_row(self, row: int) -> None:
        """What is held at the first run of a node fits the budget; what is not held there and
        needed later runs again after it, from inputs that are held there or run again as well.
        """
        constraint = self.solver.Constraint(-self.infinity, self.room[row] / self.unit)
        self.rows[row] = constraint
        for value in self.at_row.get(row, ()):
            variable = self.held[value, row]
            constraint.SetCoefficient(variable, self.size[value] / self.unit)
        for value, final in zip(*self.crossing[row], strict=True):
            self._held(int(value), row)
            self._add_inputs_at(row, int(value), int(final))

    def _add_inputs_at(self, row: int, value: int, final: int) -> None:
        owner = self.problem.owners[value]
        chain = self.chains[owner]
        for source in self.problem.reads[owner]:
            if self._has(row, source):
                continue
            if self.solver.NumConstraints() > MOST_CONDITIONS:
                return
            need = self.solver.Constraint(1.0, self.infinity)
            need.SetCoefficient(self._held(value, row), 1.0)
            need.SetCoefficient(self._held(source, row), 1.0)
            end = chain[final] if final < len(chain) else None
            self._add_again(need, self.problem.owners[source], row, end)

    def load(self) -> Any:
        """How far each row that is not there yet is above what fits."""
        sums = [np.cumsum([0.0, *again]) for again in self.solution]
        above = -self.room
        for value, spans in enumerate(self.spans):
            of_owner = sums[self.problem.owners[value]]
            again = of_owner[spans.final + 1] - of_owner[spans.first]
            above[spans.rows] += self.size[value] * np.clip(1.0 - again, 0.0, None)
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

    def _unrelieved(self) -> Any:
        above = -self.room
        for value, spans in enumerate(self.spans):
            above[spans.rows] += self.size[value]
        return above


def _by_row(spans: list[Spans], count: int) -> list[tuple[Any, Any]]:
    """For each of the nodes, the values that are needed later, with the last gap before that."""
    none = np.zeros(0, int)
    values = np.repeat(np.arange(len(spans)), [len(s.rows) for s in spans])
    rows = np.concatenate([none, *(s.rows for s in spans)])
    final = np.concatenate([none, *(s.final for s in spans)])
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(count + 1))
    return [(values[order[a:b]], final[order[a:b]]) for a, b in itertools.pairwise(ends)]

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
solution violates are added. Its variables are 0 or 1 in every plan: solved as an integer program
(branch and bound, SCIP) it gives a better bound, and a solution that says what to repeat; it also
places what nothing reads (:mod:`moec.plan.floating`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from moec.plan.floating import place_floating
from moec.plan.gaps import Gaps

# How much of the budget a row may be violated by
TOLERANCE = 1e-6
# More conditions on inputs than this are left out, which keeps the bound a bound.
MOST_CONDITIONS = 60000
# What the integer solver's tolerances may add to its bound, as a share of the bound
INTEGER_TOLERANCE = 1e-7


@dataclass
class Relaxation:
    """The program, grown row by row; ``integral``: variables are 0 or 1, not between."""

    gaps: Gaps
    budget: int
    integral: bool = False
    rows: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problem = self.gaps.problem
        nodes = range(len(self.problem.nodes))
        self.size = np.array(self.problem.sizes, float)
        self.room = np.array([self.budget - self.problem.working_set(v) for v in nodes], float)
        # In units of the mean, numbers stay near one.
        self.unit = max(float(self.size.sum()) / max(len(self.size), 1), 1.0)
        self.solver = pywraplp.Solver.CreateSolver("SCIP" if self.integral else "GLOP")
        if not self.integral:
            self.solver.SetSolverSpecificParametersAsString("use_dual_simplex: true")
        self.infinity = self.solver.infinity()
        self.again = [self._again(v) for v in nodes]
        # How often each node runs again in each of its gaps, when it was solved last
        self.solution = [[0.0] * len(again) for again in self.again]
        self.held: dict[tuple[int, int], Any] = {}
        # Whether a node runs again after a row, and of which of these nothing is said yet
        self.late: dict[tuple[int, int], Any] = {}
        self.unexplained: list[tuple[int, int]] = []
        # Whether a node that nothing reads first runs before another
        self.early: dict[tuple[int, int], Any] = {}

    def integer(self) -> Relaxation:
        """The integer program of the same rows."""
        other = Relaxation(self.gaps, self.budget, True)
        other.solution = self.solution
        for row in self.rows:
            other.add_row(row)
        for row in self.rows:
            place_floating(other, row)
        return other

    def _again(self, node: int) -> list[Any]:
        about = self.problem.nodes[node]
        most = float(about.rematable)
        found = []
        for gap in range(len(self.gaps.chains[node]) + 1):
            variable = self._variable(most, f"again_{node}_{gap}")
            self.solver.Objective().SetCoefficient(variable, about.duration)
            found.append(variable)
        return found

    def _variable(self, most: float, name: str) -> Any:
        make = self.solver.IntVar if self.integral else self.solver.NumVar
        return make(0.0, most, name)

    def _add_inputs(self, start: int) -> None:
        """Running again in a gap takes the inputs: held at its start, or running again in it.

        Only needed where the memory at the start is limited: elsewhere holding costs nothing.
        """
        for node, gap in self.gaps.begun[start]:
            chain = self.gaps.chains[node]
            end = chain[gap] if gap < len(chain) else None
            for value in self.problem.reads[node]:
                if not self.has(start, value):
                    self._need(node, gap, value, start, end)

    def has(self, node: int, value: int) -> bool:
        """Whether a value is held while a node runs, since it reads or makes it."""
        return value in self.problem.reads[node] or value in self.problem.made[node]

    def _need(self, node: int, gap: int, value: int, start: int, end: int | None) -> None:
        if self.solver.NumConstraints() > MOST_CONDITIONS:
            return
        row = self.solver.Constraint(0.0, self.infinity)
        row.SetCoefficient(self.again[node][gap], -1.0)
        row.SetCoefficient(self.held_at(value, start), 1.0)
        self.add_again(row, self.problem.owners[value], start, end)
        self._made_late(0.0, self.again[node][gap], -1.0, value, start)

    def add_again(self, row: Any, node: int, start: int, end: int | None) -> None:
        """Add to a row how often a node runs again between two first runs, at most."""
        before, chain = self.gaps.before, self.gaps.chains[node]
        for gap, variable in enumerate(self.again[node]):
            over = gap < len(chain) and (chain[gap] == start or before[chain[gap], start])
            later = gap > 0 and end is not None
            later = later and (chain[gap - 1] == end or before[end, chain[gap - 1]])
            if not over and not later:
                row.SetCoefficient(variable, 1.0)

    def held_at(self, value: int, row: int) -> Any:
        """Whether a value is held at the first run of a node."""
        if (value, row) not in self.held:
            variable = self._variable(1.0, f"held_{value}_{row}")
            self.held[value, row] = variable
            self.rows[row].SetCoefficient(variable, self.size[value] / self.unit)
            span = self._span(value, row)
            if span is not None:
                constraint = self.solver.Constraint(1.0, self.infinity)
                constraint.SetCoefficient(variable, 1.0)
                for gap in range(span[0], span[1] + 1):
                    constraint.SetCoefficient(self.again[self.problem.owners[value]][gap], 1.0)
        return self.held[value, row]

    def _span(self, value: int, row: int) -> tuple[int, int] | None:
        spans = self.gaps.spans[value]
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
        self._add_inputs(row)
        for value, final in zip(*self.gaps.crossing[row], strict=True):
            self.held_at(int(value), row)
            self._add_inputs_at(row, int(value), int(final))
        self.explain()

    def _add_inputs_at(self, row: int, value: int, final: int) -> None:
        owner = self.problem.owners[value]
        chain = self.gaps.chains[owner]
        for source in self.problem.reads[owner]:
            if self.has(row, source):
                continue
            if self.solver.NumConstraints() > MOST_CONDITIONS:
                return
            need = self.solver.Constraint(1.0, self.infinity)
            need.SetCoefficient(self.held_at(value, row), 1.0)
            need.SetCoefficient(self.held_at(source, row), 1.0)
            end = chain[final] if final < len(chain) else None
            self.add_again(need, self.problem.owners[source], row, end)
            self._made_late(1.0, self.held_at(value, row), 1.0, source, row)

    def _made_late(self, least: float, other: Any, factor: float, value: int, row: int) -> None:
        """A value is held at a row or made again after it, unless ``factor * other`` is ``least``.

        Of a value that no first run reads later, no other condition says what making it takes.
        """
        if self._span(value, row) is None:
            either = self.solver.Constraint(least, self.infinity)
            either.SetCoefficient(other, factor)
            either.SetCoefficient(self.held_at(value, row), 1.0)
            either.SetCoefficient(self.runs_late(self.problem.owners[value], row), 1.0)

    def runs_late(self, node: int, row: int) -> Any:
        """Whether a node runs again after the first run of another."""
        if (node, row) not in self.late:
            most = float(self.problem.nodes[node].rematable)
            self.late[node, row] = self._variable(most, f"late_{node}_{row}")
            self.unexplained.append((node, row))
        return self.late[node, row]

    def explain(self) -> None:
        """Say of every node that may run again late what that takes."""
        while self.unexplained:
            self._explain(*self.unexplained.pop())

    def _explain(self, node: int, row: int) -> None:
        """What running again after a row takes: a gap in which to, and the inputs."""
        if self.solver.NumConstraints() > MOST_CONDITIONS:
            return
        late = self.late[node, row]
        runs = self.solver.Constraint(0.0, self.infinity)
        runs.SetCoefficient(late, -1.0)
        self.add_again(runs, node, row, None)
        for value in self.problem.reads[node]:
            if not self.has(row, value):
                self._made_late(0.0, late, -1.0, value, row)

    def load(self) -> Any:
        """How far each row that is not there yet is above what fits."""
        sums = [np.cumsum([0.0, *again]) for again in self.solution]
        above = -self.room
        for value, spans in enumerate(self.gaps.spans):
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
        tolerance = TOLERANCE * max(self.budget, 1)
        solved = not self.rows
        while (above := self.load()).max(initial=0.0) > tolerance or not solved:
            for row in np.argsort(-above, kind="stable")[: 1 + len(self.rows) // 4]:
                if above[row] > tolerance and row not in self.rows:
                    self.add_row(int(row))
                    if self.integral:
                        place_floating(self, int(row))
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.solver.SetTimeLimit(int(1000 * left) + 1)
            status = self.solver.Solve()
            if status == pywraplp.Solver.INFEASIBLE:
                return float("inf")
            if status not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
                break
            bound = max(bound, self._bound(status))
            solved = True
            self.solution = [[v.solution_value() for v in again] for again in self.again]
            if status == pywraplp.Solver.FEASIBLE:
                break
        return self.problem.least_time + bound * (1 - 1e-9)

    def _bound(self, status: int) -> float:
        objective = self.solver.Objective()
        if self.integral:
            return float(objective.BestBound()) * (1 - INTEGER_TOLERANCE)
        return float(objective.Value()) if status == pywraplp.Solver.OPTIMAL else 0.0

"""How good plans of graph files are, and how soon: extra time, bound, gap, seconds.

    python -m benchmarks.planning graph.json ... --budgets 90,80,70,60,50 --time-limit 20

Seconds are wall-clock from the start of the planning; beside them stands the processor time of
the whole planning, since other work on the machine slows the former. "within 1%" is when the total
time of the best plan was first within 1% of the final one. Every plan is replayed.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moec.errors import BudgetError
from moec.plan import Plan, Problem, budget_of, read_problem, replay, solve

from .report import describe, environment, markdown_table, write_json

HEADS = ("graph", "n", "budget", "extra %", "bound %", "gap", "within 1% (s)", "process time (s)")


@dataclass(frozen=True)
class Row:
    """One graph at one budget; percentages of the time of running everything once."""

    graph: str
    nodes: int
    budget: str
    extra: float
    bound: float
    near: float
    seconds: float

    def cells(self) -> Sequence[str]:
        """The row of the table; without a plan, the least budget known is in ``budget``."""
        figures = (self.extra, self.bound, self.extra - self.bound)
        shown = ["-" if math.isinf(f) or math.isnan(f) else f"{f:.3f}" for f in figures]
        near = "-" if math.isinf(self.near) else f"{self.near:.2f}"
        return (self.graph, str(self.nodes), self.budget, *shown, near, f"{self.seconds:.1f}")


def near_final(plan: Plan) -> float:
    """Seconds until a plan was within 1% of the final time."""
    return next(seconds for seconds, spent in plan.history if spent <= 1.01 * plan.time)


def measure(problem: Problem, share: str, options: argparse.Namespace) -> Row:
    """Plan once."""
    budget = budget_of(problem, f"{share}%")
    start = time.process_time()
    extra = bound = near = math.inf
    text = f"{share}%"
    try:
        plan = solve(
            problem,
            budget,
            time_limit=options.time_limit,
            fixed_order=options.fixed_order,
            exact=options.exact,
        )
    except BudgetError as error:
        peak = replay(problem, problem.order).peak
        text += f" (known: {100 * error.least_known / peak:.1f}%)"
    else:
        extra, bound, near = plan.extra, plan.extra - plan.gap, near_final(plan)
    seconds = time.process_time() - start
    return Row(problem.name, len(problem.nodes), text, extra, bound, near, seconds)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--budgets", default="90,80,70,60,50")
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, help="T, where sizes depend on it")
    parser.add_argument("--fixed-order", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    facts = environment("cpu")
    print(describe(facts), flush=True)
    rows = []
    for path in options.graphs:
        problem = read_problem(path.read_text(), str(path), options.tokens)
        for share in options.budgets.split(","):
            rows.append(measure(problem, share, options))
            print("  ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    print(markdown_table(HEADS, [row.cells() for row in rows]))
    write_json(options.json, {"environment": facts, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

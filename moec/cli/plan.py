"""``moec plan``: the fastest plan of a graph within a memory budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moec.cli.console import read_text, say, write_result
from moec.errors import PlanError

if TYPE_CHECKING:
    from moec.plan import Plan, Problem
    from moec.plan import Progress as Step

GraphFile = Annotated[
    Path,
    typer.Argument(metavar="GRAPH", help="A graph as JSON; - is stdin.", show_default=False),
]


def plan(
    graph: GraphFile,
    budget: Annotated[
        str,
        typer.Option(
            help="Bytes, a size such as 40GiB, or a share of the given order's peak: 80%.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The schedule to write; stdout if absent.", show_default=False
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds of planning.")] = 60.0,
    fixed_order: Annotated[
        bool, typer.Option("--fixed-order", help="Keep the given order of first executions.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Spend the time on a proof of optimality.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="T, where sizes depend on it.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random search.")] = 0,
) -> None:
    """Plan which operations to repeat, and in which order, so that memory stays within a budget.

    GRAPH holds operations with output sizes and durations (docs/planning.md describes the format).
    The schedule is a sequence of operations; each output is freed right after its last use. Ctrl-C
    ends the search and gives the best plan so far. Exit code 0: a plan within the budget; 1: none
    was found, the message has the least budget known to suffice; 2: wrong usage.

    \b
    Examples:
      moec plan graph.json --budget 80% -o schedule.json
      moec plan graph.json --budget 40GiB --time-limit 10 --tokens 8192
    """
    from moec.plan import budget_of, read_problem, schedule_json, solve

    problem = read_problem(read_text(graph), str(graph), tokens)
    try:
        limit = budget_of(problem, budget)
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    with _shown(problem, time_limit) as show:
        found = solve(
            problem,
            limit,
            time_limit=time_limit,
            fixed_order=fixed_order,
            exact=exact,
            seed=seed,
            progress=show,
        )
    say(summary(found, limit))
    facts = {
        "budget": limit,
        "peak": found.peak,
        "time": found.time,
        "bound": found.bound,
        "tdi_percent": found.extra,
        "gap_points": found.gap,
    }
    write_result(schedule_json(problem.name, found.sequence, facts), output)


def summary(found: Plan, budget: int) -> str:
    """A plan in a line."""
    proof = "optimal" if found.is_optimal else f"at most {found.gap:.3f} points above the optimum"
    if found.proven_runs and not found.is_optimal:
        proof += f", optimal among plans that run no node more than {found.proven_runs} times"
    return (
        f"peak {found.peak} of {budget} bytes, extra time {found.extra:.3f}% ({proof}),"
        f" {len(found.sequence)} executions"
    )


@contextlib.contextmanager
def _shown(problem: Problem, time_limit: float) -> Iterator[Callable[[Step], None]]:
    """A bar on a terminal, over the time limit: best cost, bound and gap; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("planning", total=time_limit or 1.0)

        def show(step: Step) -> None:
            bar.update(task, completed=step.seconds, description=described(step, problem))

        yield show


def described(step: Step, problem: Problem) -> str:
    """The state of the planning in a line."""
    from moec.plan.solve import percent_above

    bound = percent_above(step.bound, problem.least_time)
    if math.isinf(step.time):
        return f"{step.phase}: no plan yet, bound +{bound:.3f}%"
    best = percent_above(step.time, problem.least_time)
    return f"{step.phase}: best +{best:.3f}%, bound +{bound:.3f}%, gap {best - bound:.3f}"

"""``moec plan``: the memory of a model's blocks, or the fastest plan of a graph within a budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moec.cli.console import read_text, say, write_result
from moec.cli.dims import Dims, read_dims
from moec.cli.graphs import Passes, Target, read_sizes
from moec.errors import CompileError, PlanError

if TYPE_CHECKING:
    from moec.plan import Plan, Problem
    from moec.plan import Progress as Step

Subject = Annotated[
    str,
    typer.Argument(
        metavar="GRAPH|MODEL",
        help="A model as moec explain takes it; a file of IR text, NAME.moe; or, with --budget, a"
        " graph of operations as JSON (- is stdin).",
        show_default=False,
    ),
]


def plan(
    subject: Subject,
    dims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="S=128 ...",
            help="MODEL: sizes of dims, where a block has several.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes, a size such as 40GiB, or a share of the peak without a plan: 80%.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The schedule to write; of a GRAPH stdout if absent.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds of planning.")] = 60.0,
    fixed_order: Annotated[
        bool,
        typer.Option("--fixed-order", help="GRAPH: keep the given order of first executions."),
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="GRAPH: spend the time on a proof of optimality.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="GRAPH: of the random search.")] = 0,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="T, where sizes depend on it; MODEL --budget: of all sequences (4096).",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="MODEL --budget: how many sequences of equal length.")
    ] = 1,
    reserve: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="MODEL --budget: what is held beside the step, as the state of an optimizer.",
        ),
    ] = "0",
    largest: Annotated[
        bool,
        typer.Option("--largest", help="MODEL --budget: say how long sequences may be at most."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="MODEL --budget: memory over the step, NAME.html, .png or .svg.",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="MODEL --budget: what moec calibrate measured of the device; moec's own guesses"
            " if absent.",
            show_default=False,
        ),
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="MODEL: say how many tokens fit into so many bytes, or into 80GiB.",
            show_default=False,
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training/--inference", help="MODEL: with the backward pass or not.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="MODEL: f64, f32, bf16 or f16; the configuration's own if absent.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Target, typer.Option(help="MODEL: the target whose program is counted.")
    ] = Target.triton,
    passes: Passes = None,
    dim: Dims = None,
) -> None:
    """Say what a model's MoE blocks hold in memory; or plan a step within a memory budget.

    Of a MODEL, or a file of IR text: the peak bytes of a block as polynomials in the number of
    tokens, forward, backward and for a whole step, and what is held between the passes; what makes
    the peak; with --fits, how many tokens fit, for a block and for the model. A graph with kernels
    or gradients is taken as it is, another one after the passes. Nothing is run but the blocks
    themselves, on few random tokens.

    With --budget, the training step of a MODEL (a language model of transformers) is captured as
    one graph of operations, without running it: which to repeat, and in which order, so that it
    needs no more memory; what is held and what runs again, by the lines of the model's code.

    A GRAPH holds operations with output sizes and durations (docs/planning.md
    describes the format). The schedule is a sequence of operations; each output is freed right
    after its last use. Ctrl-C ends the search and gives the best plan so far. Exit code 0: a plan
    within the budget; 1: none was found, the message has the least budget known to suffice; 2:
    wrong usage.

    \b
    Examples:
      moec plan mixtral --training --dtype bf16 --fits 80GiB
      moec plan olmoe --tokens 8192
      moec plan olmoe --dim input_ids:0=B[1..8] --dim input_ids:1=S[1..4096]
      moec plan olmoe --dtype bf16 --budget 60GiB --tokens 16384 --report step.html
      moec plan graph.json --budget 80% -o schedule.json
      moec plan graph.json --budget 40GiB --time-limit 10 --tokens 8192
    """
    if budget is None:
        from moec.cli.plan_memory import TOKENS, Question, budget_of, plan_memory

        shown = TOKENS if tokens is None else (tokens,)
        sizes = read_sizes(dims or [])
        asked = Question(target.value, training, passes, sizes, shown, budget_of(fits))
        asked = replace(asked, dynamic=read_dims(dim))
        try:
            plan_memory(subject, dtype, asked)
        except CompileError as error:
            if subject.endswith(".json"):
                error.add_note("to plan a graph of operations, give --budget")
            raise
        return
    if (subject != "-" and not subject.endswith(".json")) or _is_configuration(subject):
        from moec.cli.plan_step import StepQuestion, plan_step

        _check_of_step(dims, fits, dim, tokens or 4096, batch)
        asked_step = StepQuestion(
            *(budget, 4096 if tokens is None else tokens, batch, target.value, dtype, reserve),
            *(time_limit, largest, report, output, rates),
        )
        plan_step(subject, asked_step)
        return
    _check_of_graph(dims, fits, dtype, dim, rates)
    options = Options(time_limit, fixed_order, exact, seed)
    write_result(_schedule(Path(subject), budget, tokens, options), output)


def _is_configuration(subject: str) -> bool:
    """Whether a file is the configuration of a model, by the name that transformers gives it."""
    return Path(subject).name == "config.json"


def _check_of_step(dims: object, fits: object, dim: object, tokens: int, batch: int) -> None:
    """Refuse what goes without --budget, and sequences of different lengths."""
    if dims or fits or dim:
        raise typer.BadParameter("--fits, --dim and sizes of dims do not go with --budget")
    if tokens < batch or tokens % batch:
        raise typer.BadParameter(f"--tokens {tokens} are not {batch} sequences of equal length")


@dataclass(frozen=True)
class Options:
    """How a graph is planned."""

    time_limit: float
    fixed_order: bool
    exact: bool
    seed: int


def _check_of_graph(*of_models: object) -> None:
    """Refuse what is for models."""
    if any(of_models):
        raise typer.BadParameter(
            "--fits, --dtype, --dim, --rates and sizes of dims are for models, not --budget"
        )


def _schedule(graph: Path, budget: str, tokens: int | None, options: Options) -> str:
    """The schedule of the best plan, whose summary goes to stderr."""
    from moec.plan import budget_of, read_problem, schedule_json, solve

    problem = read_problem(read_text(graph), str(graph), tokens)
    try:
        limit = budget_of(problem, budget)
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    with progress_bar(problem, options.time_limit) as show:
        found = solve(
            problem,
            limit,
            time_limit=options.time_limit,
            fixed_order=options.fixed_order,
            exact=options.exact,
            seed=options.seed,
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
    return schedule_json(problem.name, found.sequence, facts)


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
def progress_bar(problem: Problem, time_limit: float) -> Iterator[Callable[[Step], None]]:
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

"""``moec plan MODEL --budget``: the training step of a model within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moec.byte_sizes import parse_bytes, split_unit
from moec.cli.console import say, working, write_result
from moec.cli.plan_memory import dtype_of
from moec.errors import PlanError

if TYPE_CHECKING:
    from moec.budget.model_plan import CapturedModel


@dataclass(frozen=True)
class StepQuestion:
    """What is asked of a model: its budget, on ``batch`` sequences that have ``tokens`` tokens in
    all, with ``reserve`` for what others hold; ``largest``: how long they may be at most;
    ``rates``: a file of what the device does in a second.
    """

    budget: str
    tokens: int
    batch: int
    target: str
    dtype: str | None
    reserve: str
    seconds: float
    largest: bool
    report: Path | None
    output: Path | None
    rates: Path | None


def plan_step(spec: str, asked: StepQuestion) -> None:
    """Print the plan of a model's step; write the schedule and the report that are asked for."""
    from moec.budget.model_plan import capture_model
    from moec.budget.rates_file import calibration_for
    from moec.budget.summary import summary_lines
    from moec.capture.model_spec import load_layers
    from moec.cli.plan import progress_bar
    from moec.plan import schedule_json

    _check_report(asked.report)
    dtype, reserve = dtype_of(asked.dtype), _size("--reserve", asked.reserve)
    path = None if asked.rates is None else str(asked.rates)
    device = calibration_for("cuda" if asked.target == "triton" else "cpu", path, say)
    with working(f"building {spec}"):
        model = load_layers(spec, dtype).model
    with working("capturing the step"):
        length = asked.tokens // asked.batch
        captured = capture_model(model, asked.batch, length, asked.target, reserve, device)
    step = captured.at()
    budget = _budget(asked.budget, step.unplanned.peak)
    if asked.largest:
        typer.echo(_largest(captured, asked.batch, budget, asked.seconds))
        return
    with progress_bar(step.planned.problem, asked.seconds) as show:
        plan = step.solved(budget, asked.seconds, show)
    typer.echo("\n".join(summary_lines(step, plan, budget)))
    if asked.report is not None:
        from moec.report.step import write_report

        with working(f"drawing {asked.report}"):
            write_report(asked.report, step, plan, budget)
        say(f"wrote {asked.report}")
    if asked.output is not None:
        facts = {"budget": budget, "peak": plan.peak, "time": plan.time, "bound": plan.bound}
        write_result(schedule_json(step.name, plan.sequence, facts), asked.output)


def _largest(captured: CapturedModel, batch: int, budget: int, seconds: float) -> str:
    """How long sequences may be, with a plan and without."""
    from moec.budget.model_plan import largest_length
    from moec.budget.text import shown_bytes

    with working("looking for the largest length"):
        planned = largest_length(captured, budget, seconds)
        free = largest_length(captured, budget, 0.0)
    return (
        f"{captured.name} within {shown_bytes(budget)}: {batch} x {planned} tokens;"
        f" without a plan {batch} x {free}"
    )


def _check_report(path: Path | None) -> None:
    if path is not None and path.suffix not in (".html", ".png", ".svg"):
        raise typer.BadParameter(f"--report {path}: give a name that ends in .html, .png or .svg")


def _size(option: str, text: str) -> int:
    return _read(option, lambda: parse_bytes(text))


def _budget(text: str, peak: int) -> int:
    def read() -> int:
        value, unit = split_unit(text)
        return int(value / 100 * peak) if unit == "%" else parse_bytes(text)

    return _read("--budget", read)


def _read(option: str, read: Callable[[], int]) -> int:
    try:
        return read()
    except PlanError as error:
        raise typer.BadParameter(f"{option}: {error}") from error


__all__ = ["StepQuestion", "plan_step"]

"""Train a small OLMoE model eager, with grouped_mm and compiled by moec, side by side.

Run from the project's root: `make demo`, or `python -m examples.train_olmoe --steps 10`.
Exit status 1: the compiled model's losses left the eager model's.
"""

import statistics
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.rule import Rule
from rich.table import Table

import moec
import moec.ir

from .small_olmoe import (
    BATCH,
    LENGTH,
    SHAPE,
    Trainee,
    batches,
    make_trainees,
    train_together,
    worst_difference,
)

# Rounding differs between the three and training enlarges it from step to step; grouped_mm, which
# computes the same function as eager, ends below 1e-6.
TOLERANCE = 1e-4
# The first steps fill caches and, in a fresh process, choose kernels.
WARM_UP = 3

console = Console()


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="training steps of each model")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Train three copies of a small OLMoE model and compare them."""
    torch.set_num_threads(threads)
    introduce(steps)
    with console.status("compiling"):
        trainees = make_trainees()
    compiled = trainees[-1].model
    console.print(moec.explain(compiled).text, highlight=False, markup=False, soft_wrap=True)
    run(trainees, steps)
    show_losses(trainees, steps)
    show_costs(trainees)
    show_fusion(compiled)
    show_kernels(compiled)
    sys.exit(judge(trainees))


def introduce(steps: int) -> None:
    """Say what is about to run."""
    console.print(
        f"OLMoE: {SHAPE['num_hidden_layers']} layers, hidden {SHAPE['hidden_size']}, "
        f"{SHAPE['num_experts']} experts, {SHAPE['num_experts_per_tok']} per token; "
        f"{steps} AdamW steps of {BATCH} x {LENGTH} bytes of text, float32, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}",
        highlight=False,
    )


def run(trainees: list[Trainee], steps: int) -> None:
    """Train, with a progress bar where there is a terminal to show it."""
    progress = train_together(trainees, batches(steps))
    for _ in track(progress, "training", steps, console=console, disable=not console.is_terminal):
        pass


def show_losses(trainees: list[Trainee], steps: int) -> None:
    """Print the loss of each model at some steps, and how far each curve leaves eager's."""
    table = Table(title="loss (same batches, same initial weights)", title_justify="left")
    table.add_column("step", justify="right")
    for trainee in trainees:
        table.add_column(trainee.name, justify="right")
    for step in sorted({1, steps, *range(steps // 4, steps, steps // 4)}):
        table.add_row(str(step), *(f"{trainee.losses[step - 1]:.6f}" for trainee in trainees))
    differences = [worst_difference(item.losses, trainees[0].losses) for item in trainees]
    table.add_section()
    table.add_row("max rel. diff.", *(f"{value:.1e}" for value in differences))
    console.print(table)


def show_costs(trainees: list[Trainee]) -> None:
    """Print time and memory of a step for each model, and both relative to eager."""
    table = Table(title="cost of a training step", title_justify="left")
    for column in ("", "median ms", "eager / this", "peak MiB", "this / eager"):
        table.add_column(column, justify="right" if column else "left")
    batch = next(batches(1, seed=1))
    times = [1e3 * statistics.median(trainee.seconds[WARM_UP:]) for trainee in trainees]
    peaks = [trainee.peak_bytes(batch) / 2**20 for trainee in trainees]
    for trainee, milliseconds, peak in zip(trainees, times, peaks, strict=True):
        speed, share = times[0] / milliseconds, peak / peaks[0]
        row = (f"{milliseconds:.0f}", f"{speed:.2f}x", f"{peak:.0f}", f"{share:.2f}x")
        table.add_row(trainee.name, *row)
    console.print(table)
    console.print(
        "peak: what a step allocates (activations, gradients, temporaries), from the\n"
        "CPU allocator's events; parameters and optimizer state are not in it"
    )


def show_fusion(compiled: torch.nn.Module) -> None:
    """Print the first region's IR before and after the fusing passes."""
    history = moec.regions(compiled)[0].history
    fusing = [at for at, (name, _) in enumerate(history) if name.startswith("fuse")]
    if not fusing:
        console.print(f"No pass fused anything; passes: {', '.join(name for name, _ in history)}")
        return
    for title, at in (("before fusion", fusing[0] - 1), ("after fusion", fusing[-1])):
        name, graph = history[at]
        console.print(Rule(f"IR {title} (after {name})", align="left"))
        console.print(moec.ir.show(graph), highlight=False, markup=False, soft_wrap=True)


def show_kernels(compiled: torch.nn.Module) -> None:
    """Print where the emitted modules lie; equal regions share one."""
    console.print(Rule("emitted modules", align="left"))
    found = [item for region in moec.regions(compiled) for item in region.artifacts]
    for line in dict.fromkeys(f"{item.path}  ({item.target}, {item.mode})" for item in found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def judge(trainees: list[Trainee]) -> int:
    """The exit status: 0 if the compiled model learned as the eager one did."""
    difference = worst_difference(trainees[-1].losses, trainees[0].losses)
    if difference <= TOLERANCE:
        console.print(f"[green]same losses[/] (max relative difference {difference:.1e})")
        return 0
    console.print(f"[red]losses differ[/]: {difference:.1e} > {TOLERANCE:.0e}")
    return 1


if __name__ == "__main__":
    typer.run(main)

"""Train a small OLMoE model eager, with grouped_mm and compiled by moec, side by side.

Run from the project's root: `make demo`, or `python -m examples.train_olmoe --steps 10`.
Exit status 1: the compiled model's losses left the eager model's.
"""

import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import moec
from moec.codegen import emit_module
from moec.ir import Graph, show
from moec.ir.graph import backward_ops, forward_ops
from moec.manager import PassManager
from moec.pipeline import pipeline

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
# On a busy machine training ends early rather than late.
SECONDS = 110
OUT = Path("out/demo")

console = Console(highlight=False)


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="training steps of each model")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    seconds: Annotated[int, typer.Option(help="begin no further step after so long")] = SECONDS,
) -> None:
    """Train three copies of a small OLMoE model and compare them."""
    torch.set_num_threads(threads)
    shutil.rmtree(OUT, ignore_errors=True)
    introduce(steps)
    with console.status("compiling"):
        trainees = make_trainees(options={"dump": OUT / "passes"})
    compiled = trainees[-1].model
    heading("What moec found")
    say(moec.explain(compiled).text)
    train(trainees, steps, seconds)
    show_losses(trainees)
    show_costs(trainees)
    show_block(compiled)
    show_files(compiled)
    sys.exit(judge(trainees))


def say(text: str) -> None:
    """Print text as it is, in lines as long as they are."""
    console.print(text, markup=False, soft_wrap=True)


def heading(text: str) -> None:
    """Print a heading, the same on a terminal and in a file."""
    console.print(f"\n[bold]{text}\n{'-' * len(text)}[/]")


def introduce(steps: int) -> None:
    """Say what is about to run."""
    say(
        f"OLMoE language model: {SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']}, "
        f"{SHAPE['num_experts']} experts, {SHAPE['num_experts_per_tok']} for each token\n"
        f"training: up to {steps} AdamW steps of {BATCH} x {LENGTH} bytes of text, on the CPU\n"
        f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def train(trainees: list[Trainee], steps: int, seconds: float) -> None:
    """Train: with a progress bar on a terminal, with a line now and then elsewhere."""
    heading("Training: one step of each model in turn, on the same batches")
    begin = time.perf_counter()
    columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps)
        for done in train_together(trainees, batches(steps)):
            bar.update(task, completed=done)
            if not console.is_terminal and (done == 1 or done % 10 == 0):
                say(f"step {done} of {steps}")
            if done > WARM_UP and time.perf_counter() - begin > seconds:
                break
    taken = f"{time.perf_counter() - begin:.0f} s"
    early = "" if done == steps else f"; stopped early, {seconds} s were over (a busy machine?)"
    say(f"{done} steps of each in {taken}{early}")


def show_losses(trainees: list[Trainee]) -> None:
    """Print the loss of each model at some steps, and how far each curve leaves eager's."""
    heading("Losses: all three learn the same")
    steps = len(trainees[0].losses)
    table = plain_table("step", *(trainee.name for trainee in trainees))
    for step in sorted({1, steps, *range(max(1, steps // 5), steps, max(1, steps // 5))}):
        table.add_row(str(step), *(f"{trainee.losses[step - 1]:.6f}" for trainee in trainees))
    differences = [worst_difference(item.losses, trainees[0].losses) for item in trainees]
    table.add_row("largest relative difference", *(f"{value:.0e}" for value in differences))
    console.print(table)


def show_costs(trainees: list[Trainee]) -> None:
    """Print time and memory of a step for each model, next to eager's and grouped_mm's."""
    heading("Cost of a training step")
    batch = next(batches(1, seed=1))
    times = [statistics.median(trainee.seconds[WARM_UP:]) for trainee in trainees]
    peaks = [trainee.peak_bytes(batch) / 2**20 for trainee in trainees]
    table = plain_table("", "median ms", "x eager", "x grouped_mm", "peak MiB", "of eager's")
    for trainee, seconds, peak in zip(trainees, times, peaks, strict=True):
        speeds = (f"{times[0] / seconds:.2f}", f"{times[1] / seconds:.2f}")
        memory = (f"{peak:.0f}", f"{100 * peak / peaks[0]:.0f}%")
        table.add_row(trainee.name, f"{1e3 * seconds:.0f}", *speeds, *memory)
    console.print(table)
    say(
        "x: how many times as fast. The whole step is timed: attention and AdamW cost all three\n"
        "the same. peak: the most that a step has allocated at once (activations, gradients,\n"
        "temporaries) by the CPU allocator's events; weights and optimizer state not counted"
    )


def plain_table(*columns: str) -> Table:
    """A table without lines, numbers to the right; it looks the same in a file."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def show_block(compiled: torch.nn.Module) -> None:
    """Print one block's IR: as captured, as it ran here, and as a GPU would run it."""
    history = moec.regions(compiled)[0].history
    (_, captured), (_, ran) = history[0], history[-1]
    fused = PassManager(pipeline("triton", training=False)).run(captured)
    heading(f"One MoE block as captured: {len(captured.ops)} operations, T tokens")
    say(body(captured))
    backward = len(backward_ops(ran))
    heading(f"What ran here, forward (target aten; {backward} more operations run backward)")
    say(body(forward_part(ran)))
    heading("The same block fused for a GPU, forward (target triton; not run here)")
    say(body(fused))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "triton_kernels.py").write_text(emit_module(fused, "triton"), encoding="utf-8")


def forward_part(graph: Graph) -> Graph:
    """A joint graph without its backward part."""
    ahead = forward_ops(graph)
    ops = tuple(op for op in graph.ops if op in ahead)
    return replace(graph, ops=ops, cotangents=(), gradients=())


def body(graph: Graph) -> str:
    """A graph's operations as text, one a line."""
    return "\n".join(show(graph, locations=False).splitlines()[1:-1])


def show_files(compiled: torch.nn.Module) -> None:
    """Print where the emitted modules and the IR lie; equal regions share one module."""
    heading("Files")
    emitted = [item for region in moec.regions(compiled) for item in region.artifacts]
    for path in dict.fromkeys(item.path for item in emitted):
        say(f"{path}\n    the program of all {SHAPE['num_hidden_layers']} blocks that just ran")
    say(f"{OUT / 'triton_kernels.py'}\n    the Triton kernels of the fused block")
    say(f"{OUT / 'passes'}/\n    the IR after each pass, both directions, with the model's lines")


def judge(trainees: list[Trainee]) -> int:
    """The exit status: 0 if the compiled model learned as the eager one did."""
    difference = worst_difference(trainees[-1].losses, trainees[0].losses)
    if difference <= TOLERANCE:
        console.print(f"\n[green]Same losses[/] (largest relative difference {difference:.0e}).")
        return 0
    console.print(f"\n[red]Losses differ[/]: {difference:.1e} > {TOLERANCE:.0e}.")
    return 1


if __name__ == "__main__":
    typer.run(main)

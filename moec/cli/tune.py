"""``moec tune``: tiles for a model's kernels, by constraints, a cost model and measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from moec.cli.console import print_table, progress, read_graphs, say, working
from moec.cli.models import distinct
from moec.cli.plan_memory import dtype_of
from moec.errors import CaptureError, CompileError
from moec.files import write_whole
from moec.ir import Graph
from moec.targets import has_descriptors, has_gluon
from moec.tuning.file import Tuning, show_tuning
from moec.tuning.search import (
    Best,
    Wanted,
    all_sizes,
    lowered,
    tune_graph,
    tuning_of,
    wanted,
)
from moec.tuning.timing import Timer

TOKENS = 16384


def tune(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model as moec explain takes it, or a file of IR text, NAME.moe.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The tuning file; rewritten after each block."),
    ] = Path("tuning.json"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a call.")] = TOKENS,
    inference: Annotated[
        bool, typer.Option("--inference", help="Forward alone; training is the default.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; bf16 if absent.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates of each kernel to measure.")] = 6,
    seconds: Annotated[float, typer.Option(min=1.0, help="At most so long in all.")] = 300.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cost model's ranking and measure nothing.")
    ] = False,
) -> None:
    """Choose tiles for the kernels of a model's MoE blocks, and measure the best on this GPU.

    Tiles that memory, registers or sizes rule out are not considered; a cost model ranks the rest;
    the first few of each kernel are timed in their place in the block, on rows that its own router
    chose. The file that is written is for moec.compile's option "tuning".

    \b
    Examples:
      moec tune olmoe --dry-run
      moec tune olmoe --seconds 300 -o olmoe.json
    """
    graphs = _graphs(subject, dtype)
    is_here = torch.cuda.is_available()
    device = torch.device("cuda")
    descriptors, gluon = (not is_here or f(device) for f in (has_descriptors, has_gluon))
    templates = (*(["gluon"] if gluon else []), *(["tma"] if descriptors else []), "pointer")
    jobs = []
    for graph in graphs:
        ready = lowered(graph, not inference, descriptors, gluon)
        kernels = wanted(ready, all_sizes(ready, tokens), templates, top)
        jobs.append((ready, kernels, tokens))
        if dry_run or not is_here:
            print_ranking(ready, kernels)
    if dry_run:
        return
    if not is_here:
        raise CompileError(
            "moec tune measures on a GPU, and there is none here; above is what the cost model"
            " would try on an H100 (--dry-run prints it alone)"
        )
    run_jobs(jobs, seconds, output)


def _graphs(subject: str, dtype: str | None) -> list[Graph]:
    """The graphs of a file, or of a model's distinct blocks."""
    from moec.capture.model_spec import load
    from moec.capture.regions import find_regions

    if subject == "-" or subject.endswith(".moe"):
        if dtype is not None:
            raise typer.BadParameter("--dtype is for models; the graphs of a file have theirs")
        return read_graphs(Path(subject))
    with working(f"building {subject}"):
        loaded = load(subject, dtype_of(dtype or "bf16"))
    if loaded.note:
        say(f"{subject}: {loaded.note}")
    with working("looking for regions"):
        groups = distinct(find_regions(loaded.model))
    if not groups:
        raise CaptureError(f"{subject} has no MoE block that could be captured")
    return [graph for graph, _ in groups]


def print_ranking(graph: Graph, kernels: Sequence[Wanted]) -> None:
    """The default of each kernel, and what would be tried, with the cost model's times."""
    for one in kernels:
        typer.echo(f"@{graph.name}: {one.kernel}, {one.rows} rows")
        typer.echo(f"  by rule: {one.default.template}, {one.default.tile}")
        for c in one.others:
            typer.echo(f"  {c.ms:.3f} ms by the cost model: {c.template}, {c.tile}")


def run_jobs(
    jobs: Sequence[tuple[Graph, Sequence[Wanted], int]], seconds: float, output: Path
) -> Tuning:
    """Measure graph by graph, each with its kernels and number of tokens, within so many seconds;
    the file is written after each.
    """
    deadline, found = time.monotonic() + seconds, list[Best]()
    tuning = tuning_of(found, torch.cuda.get_device_name())
    steps = sum(1 + max((len(w.others) for w in kernels), default=0) for _, kernels, _ in jobs)
    with progress("measuring", steps) as step, Timer({}) as timer:
        for place, (graph, kernels, tokens) in enumerate(jobs):
            share = (deadline - time.monotonic()) / (len(jobs) - place)
            timer.sizes = all_sizes(graph, tokens)
            report = _reporter(step, graph)
            found += tune_graph(graph, kernels, timer, time.monotonic() + share, report)
            tuning = tuning_of(found, tuning.device)
            write_whole(output.resolve(), show_tuning(tuning).encode())
    print_best(found)
    say(f"wrote {output}: {len(tuning.entries)} kernels")
    return tuning


def _reporter(step: Callable[[str], None], graph: Graph) -> Callable[[str], None]:
    def report(words: str) -> None:
        step(f"@{graph.name}: {words}")
        if "does not run" in words:
            say(words)

    return report


def print_best(found: Sequence[Best]) -> None:
    """What was measured, kernel by kernel."""
    rows = [
        (
            str(b.wanted.kernel),
            f"{b.default_ms:.3f}",
            f"{b.ms:.3f}",
            b.chosen.template,
            str(b.chosen.tile),
        )
        for b in found
    ]
    print_table(("kernel", "ms by rule", "ms", "template", "tile"), rows)
    for b in found:
        for words in b.failed:
            say(f"{b.wanted.kernel}: {words}")

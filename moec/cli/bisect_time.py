"""``moec bisect --metric time``: which pass or kernel is slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from moec.cli.console import graphs_in, read_text, working
from moec.cli.graphs import Target
from moec.errors import PassError
from moec.execute import on_device_of
from moec.inputs import default_dims, random_inputs
from moec.ir.graph import Graph, walk
from moec.manager import PassCall, PassManager, parse_pipeline
from moec.pipeline import pipeline as default_pipeline
from moec.reproducer import pipeline_of
from moec.slowdown import Stopwatch, against, find_slowdown
from moec.slowdown_text import against_text, slowdown_text
from moec.targets import has_descriptors

# Tokens, where no size is given: enough that products take longer than their calls.
TOKENS = 1024

Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="PASSES|FILE",
        help="time: compare with this pipeline, or with the graph of this .moe file (as it is, if"
        " it has kernels; else after the same passes).",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        min=5,
        help="time: samples of each time; by what one takes, if absent.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Request:
    """What is timed: for which target, at which sizes, against what."""

    sizes: dict[str, int]
    target: str
    training: bool
    pipeline: str | None
    seed: int
    baseline: str | None
    rounds: int | None

    @property
    def device(self) -> torch.device:
        """The device that the target's modules run on here."""
        on_gpu = self.target == "triton" and torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")

    def calls(self, pipeline: str | None) -> list[PassCall]:
        """The passes that are named, or the target's on this machine."""
        if pipeline is not None:
            return parse_pipeline(pipeline)
        descriptors = has_descriptors(self.device)
        return parse_pipeline(default_pipeline(self.target, self.training, descriptors))

    def all_sizes(self, graph: Graph) -> dict[str, int]:
        """A size for every dim of a graph."""
        return {**default_dims(graph, size=TOKENS), **self.sizes}

    def heading(self, graph: Graph) -> str:
        """What was measured, where and how."""
        sizes = ", ".join(f"{n}={s}" for n, s in self.all_sizes(graph).items())
        part = "forward and backward" if self.training or graph.cotangents else "forward"
        return f"@{graph.name}, {sizes}, {part}, {self.target} on {device_words(self.device)}"


def device_words(device: torch.device) -> str:
    """The device as a person calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"


def time_graphs(
    file: str,
    sizes: dict[str, int],
    target: Target,
    training: bool,
    passes: str | None,
    name: str | None,
    seed: int,
    baseline: str | None,
    rounds: int | None,
) -> bool:
    """Time the graphs of a file and print what was found; whether anything was."""
    text = read_text(Path(file))
    named = passes if passes is not None else pipeline_of(text)
    asked = Request(sizes, target.value, training, named, seed, baseline, rounds)
    found = [
        _timed(graph, asked, _drawn(graph, asked)) for graph in graphs_in(text, Path(file), name)
    ]
    return any(found)


def _drawn(graph: Graph, asked: Request) -> Callable[[Graph], Sequence[torch.Tensor]]:
    """Generated inputs; those of a joint graph go on where those of the other end."""

    def draw(one: Graph) -> Sequence[torch.Tensor]:
        dims = {**asked.all_sizes(one), **asked.all_sizes(graph)}
        drawn = random_inputs(one, dims, seed=asked.seed)
        return on_device_of(asked.target, drawn, is_timed=True)

    kept: dict[int, Sequence[torch.Tensor]] = {}

    def arguments(one: Graph) -> Sequence[torch.Tensor]:
        count = len(one.cotangents)
        return kept.setdefault(count, draw(one)) if count not in kept else kept[count]

    return arguments


def time_model(
    spec: str,
    sizes: dict[str, int],
    target: Target,
    training: bool,
    passes: str | None,
    name: str | None,
    seed: int,
    baseline: str | None,
    rounds: int | None,
) -> bool:
    """Time the distinct blocks of a model, each with its own weights and beside its own code."""
    from moec.cli.models import load_model
    from moec.model_bisect import arguments_of, blocks_of

    asked = Request(sizes, target.value, training, passes, seed, baseline, rounds)
    model = load_model(spec)
    with working("looking for regions"):
        blocks = [
            b
            for b in blocks_of(model, None, seed, sizes.get("T", TOKENS))
            if b.found.graph is not None and name in (None, b.found.graph.name)
        ]
    if not blocks:
        raise PassError(f"{spec} has no MoE block that could be captured")
    found = []
    for block in blocks:
        typer.echo(block.heading)
        arguments = arguments_of(block, asked.target, seed, is_timed=True)
        found.append(_timed(block.graph, asked, arguments))
    return any(found)


def _timed(
    graph: Graph, asked: Request, arguments: Callable[[Graph], Sequence[torch.Tensor]]
) -> bool:
    calls = asked.calls(asked.pipeline)
    lower = next((c for c in calls if c.definition.name == "lower"), None)
    watch = Stopwatch(asked.target, arguments, asked.all_sizes(graph), asked.rounds, lower)
    with working(f"@{graph.name}: the times of {len(calls)} passes"):
        if asked.baseline is None:
            slow = find_slowdown(graph, calls, watch)
            text, is_found = slowdown_text(slow, asked.heading(graph)), slow.is_found
        else:
            optimised = PassManager(calls).run(graph)
            before = _baseline(graph, asked, calls)
            compared = against(optimised, before, watch)
            text = against_text(compared, asked.heading(graph))
            is_found = compared.change.is_slower
    typer.echo(text)
    return is_found


def _baseline(graph: Graph, asked: Request, calls: Sequence[PassCall]) -> Graph:
    """The graph of a file (the one of the same name if it has several), or of other passes."""
    given = asked.baseline or ""
    if not given.endswith(".moe"):
        return PassManager(asked.calls(given)).run(graph)
    path = Path(given)
    found = graphs_in(read_text(path), path, None)
    chosen = next((g for g in found if g.name == graph.name), found[0])
    has_kernels = any(op.kind.startswith("kern.") for op in walk(chosen))
    return chosen if has_kernels else PassManager(calls).run(chosen)


__all__ = ["Baseline", "Rounds", "time_graphs", "time_model"]

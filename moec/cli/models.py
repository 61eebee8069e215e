"""``moec trace``: from a model to its regions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from moec import pipeline
from moec.cli.console import progress, say, working, write_result
from moec.cli.dims import Dims, read_dims, within
from moec.declared import declare
from moec.errors import CaptureError
from moec.ir import Graph, show
from moec.manager import PassManager

if TYPE_CHECKING:
    from moec.capture.regions import FoundRegion

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face config.json or its folder, an architecture (mixtral,"
        " OlmoeForCausalLM), both with random weights and without a download; or module:factory,"
        " a function without arguments that returns an nn.Module.",
        show_default=False,
    ),
]


def trace(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write; stdout if absent.", show_default=False
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Write joint forward-backward graphs.")
    ] = False,
    dim: Dims = None,
) -> None:
    """Write the MoE blocks of a model as IR text.

    One graph for each distinct block. Blocks that cannot be captured are named on stderr with the
    reason. If none can, that is an error.

    \b
    Examples:
      moec trace mixtral -o mixtral.moe
      moec trace mixtral --dim input_ids:0=B[1..8] --dim input_ids:1=S[1..16384]
      moec trace mypackage.models:build --training | moec opt - --target aten
    """
    from moec.capture.regions import find_regions

    dynamic = read_dims(dim)
    built = load_model(model)
    declared = declare(built, dynamic)
    with working("looking for regions"):
        found = within(built, dynamic, find_regions(built))
    groups = distinct(found)
    _report_left_alone(found)
    if not groups:
        raise CaptureError(f"{model} has no MoE block that could be captured")
    dims = f"// {declared}\n" if dynamic else ""
    texts = [
        _heading(names) + dims + show(_joint(g) if training else g) for g, names in _track(groups)
    ]
    write_result("\n".join(texts), output)
    if output is not None:
        say(f"wrote {output}: {len(groups)} distinct of {len(found)} regions")


def load_model(spec: str) -> torch.nn.Module:
    """The model that a MODEL argument names, with a line about what it is on stderr."""
    from moec.capture.model_spec import load

    with working(f"building {spec}"):
        loaded = load(spec)
    if loaded.note:
        say(f"{spec}: {loaded.note}")
    return loaded.model


def distinct(found: Iterable[FoundRegion]) -> list[tuple[Graph, list[str]]]:
    """One graph for each fingerprint, with the names of the regions that share it."""
    groups: dict[str, tuple[Graph, list[str]]] = {}
    for region in found:
        if region.graph is not None:
            groups.setdefault(region.fingerprint, (region.graph, []))[1].append(region.name)
    return list(groups.values())


def _track(groups: list[tuple[Graph, list[str]]]) -> Iterable[tuple[Graph, list[str]]]:
    with progress("regions", len(groups)) as step:
        for graph, names in groups:
            yield graph, names
            step(graph.name)


def _report_left_alone(found: Iterable[FoundRegion]) -> None:
    by_reason: dict[str, list[str]] = {}
    for region in found:
        if region.graph is None:
            by_reason.setdefault(region.reason, []).append(region.name)
    for reason, names in by_reason.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"left as it is: {names[0]}{others}: {reason}")


def _joint(graph: Graph) -> Graph:
    return PassManager(f"{pipeline.RAISE}, {pipeline.GRAD}").run(graph)


def _heading(names: list[str]) -> str:
    others = f" and {len(names) - 1} equal: {', '.join(names[1:])}" if len(names) > 1 else ""
    return f"// {names[0]}{others}\n"

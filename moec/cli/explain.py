"""``moec explain``: what became of a model's blocks; what a pass or a kernel did, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.console import read_graphs, working
from moec.cli.dims import Dims, read_dims, within
from moec.cli.graphs import Passes, Target, Training, require_pass
from moec.cli.models import distinct, load_model
from moec.declared import Dynamic
from moec.errors import CaptureError
from moec.explaining import PassReport, explain_kernels, explain_passes, find_kernels
from moec.ir import Graph
from moec.ir.graph import walk
from moec.manager import PassCall, parse_pipeline
from moec.pipeline import pipeline as default_pipeline

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face config.json or its folder, an architecture (mixtral,"
        " OlmoeForCausalLM), both with random weights and without a download; module:factory, a"
        " function without arguments that returns an nn.Module; or a file of IR text, NAME.moe.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Subject:
    """A graph to explain, and the regions whose it is."""

    graph: Graph
    names: Sequence[str] = ()

    @property
    def head(self) -> str:
        """``@MixtralSparseMoeBlock: model.layers.0.mlp and 31 equal``."""
        if not self.names:
            return f"@{self.graph.name}"
        others = f" and {len(self.names) - 1} equal" if len(self.names) > 1 else ""
        return f"@{self.graph.name}: {self.names[0] or 'the model'}{others}"


def explain(
    model: Model,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only this region, pass by pass: its path in the model, or a graph's name.",
            show_default=False,
        ),
    ] = None,
    pass_: Annotated[
        str | None,
        typer.Option(
            "--pass",
            metavar="PASS",
            help="Which of the pass's rules fired, which nearly did, and why not.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|all",
            help="What the kernel fuses and what not, its template and tile, bytes and operations.",
            show_default=False,
        ),
    ] = None,
    passes: Passes = None,
    target: Annotated[
        Target, typer.Option(help="The target whose passes and kernels are explained.")
    ] = Target.triton,
    training: Training = False,
    dim: Dims = None,
) -> None:
    """Say what becomes of each block of a model, and why; or what a pass or a kernel does.

    Without options: the MoE blocks found, compiled as a whole, their experts only, or left as they
    are and for what reason. With --region, --pass or --kernel: what the compiler's rules did to the
    blocks, and what they nearly did. Nothing is run but the blocks themselves, on random tokens.

    \\b
    Examples:
      moec explain mixtral
      moec explain mixtral --pass raise-router
      moec explain mixtral --kernel all --training
      moec explain block.moe --region block -p "raise-router, dce"
      moec explain mypackage.models:build --region layers.3.mlp
    """
    is_file = model == "-" or model.endswith(".moe")
    dynamic = read_dims(dim)
    if is_file and dynamic:
        raise typer.BadParameter("--dim is for a model; a file of IR text has its ranges in it")
    if not is_file and region is None and pass_ is None and kernel is None:
        typer.echo(_of_model(model, dynamic))
        return
    found = _in_file(model) if is_file else _in_model(model, dynamic)
    calls = parse_pipeline(default_pipeline(target.value, training) if passes is None else passes)
    if pass_ is not None:
        require_pass("--pass", pass_, calls)
    texts = [_text(one, calls, pass_, kernel, target.value) for one in _chosen(found, region)]
    typer.echo("\n\n".join(texts))


def _of_model(model: str, dynamic: Dynamic) -> str:
    from moec.api import explain as explain_model

    built = load_model(model)
    with working("looking for regions"):
        return str(explain_model(built, dynamic or True))


def _in_file(path: str) -> list[Subject]:
    return [Subject(graph) for graph in read_graphs(Path(path))]


def _in_model(model: str, dynamic: Dynamic) -> list[Subject]:
    from moec.capture.regions import find_regions

    built = load_model(model)
    with working("looking for regions"):
        found = within(built, dynamic, find_regions(built))
    subjects = [Subject(graph, names) for graph, names in distinct(found)]
    if not subjects:
        reasons = "; ".join(dict.fromkeys(f"{r.name}: {r.reason}" for r in found))
        raise CaptureError(
            f"{model} has no MoE block that could be captured{': ' if reasons else ''}{reasons}"
        )
    return subjects


def _chosen(found: Sequence[Subject], region: str | None) -> Sequence[Subject]:
    if region is None:
        return found
    name = region.removeprefix("@")
    chosen = [s for s in found if name in (s.graph.name, *s.names)]
    if not chosen:
        there = ", ".join(n for s in found for n in (s.names or [f"@{s.graph.name}"]))
        raise CaptureError(f"no region {region!r}; there are {there}")
    return chosen


def _text(
    subject: Subject, calls: Sequence[PassCall], pass_: str | None, kernel: str | None, target: str
) -> str:
    """What is said about one graph."""
    lowered = any(op.kind.startswith("kern.") for op in walk(subject.graph))
    reports = explain_passes(subject.graph, [] if lowered and pass_ is None else calls)
    parts = [subject.head]
    if pass_ is not None:
        parts += [str(r) for r in reports if r.step.call.definition.name == pass_]
    elif kernel is None:
        parts += [str(r) for r in reports if r.step.changed or _has_near_miss(r)]
    if kernel is not None or pass_ is None:
        parts += _kernels(subject.graph, reports, kernel, target)
    return "\n".join(parts)


def _has_near_miss(report: PassReport) -> bool:
    return "nearly fired" in str(report)


def _kernels(
    graph: Graph, reports: Sequence[PassReport], kernel: str | None, target: str
) -> list[str]:
    kernels = explain_kernels(reports[-1].step.after if reports else graph, reports, target)
    if kernel is None:
        return [f"kernels: {', '.join(k.name for k in kernels) or 'none'} (--kernel says more)"]
    return [str(k) for k in (kernels if kernel == "all" else find_kernels(kernels, kernel))]

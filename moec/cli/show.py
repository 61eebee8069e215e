"""``moec show``: a graph as text, as a picture's source, or as a report in one HTML file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.console import graphs_in, read_text, say, working, write_result
from moec.cli.graphs import Name, Output, Target, read_sizes
from moec.cli.models import load_model
from moec.inputs import check_dims, default_dims
from moec.ir import Graph
from moec.ir import show as text_of
from moec.manager import PassManager
from moec.pipeline import pipeline as default_pipeline
from moec.reproducer import pipeline_of

# Tokens of a table of memory, where no size is given.
TOKENS = 4096


class Format(StrEnum):
    """How a graph is shown."""

    text = "text"
    dot = "dot"
    mermaid = "mermaid"
    memory = "memory"
    html = "html"


def show(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="FILE|MODEL",
            help="A file of IR text (.moe; - is stdin), or a model as moec explain takes it.",
            show_default=False,
        ),
    ],
    dims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="T=4096 ...",
            help="memory: sizes of dims; 4096 if absent.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.html,
    output: Output = None,
    target: Annotated[
        Target, typer.Option(help="html, memory: the target whose passes are shown.")
    ] = Target.triton,
    training: Annotated[
        bool, typer.Option("--training", help="html, memory: with the backward pass.")
    ] = False,
    graph: Name = None,
) -> None:
    """Show graphs: as text, as Graphviz or Mermaid source, as a table of memory, or as a report.

    The report is one HTML file that works offline: the passes, the graph after each with its
    differences, memory over the ops, each kernel beside its body, the model's source lines.

    memory lists what makes the peak and what is held between forward and backward, in bytes for
    every size and at the given ones. A graph with kernels or gradients is taken as it is, another
    one after the passes.

    \b
    Examples:
      moec show mixtral --training -o report.html
      moec show mixtral T=8192 --training --format memory
      moec show a.moe --format mermaid
      moec show a.moe --format dot | dot -Tsvg > a.svg
    """
    sizes = read_sizes(dims or [])
    if sizes and format is not Format.memory:
        raise typer.BadParameter("sizes of dims are for --format memory")
    is_file = subject == "-" or subject.endswith(".moe")
    if is_file:
        text = read_text(Path(subject))
        found = graphs_in(text, Path(subject), graph)
        result = _of_graphs(text, found, format, target, training, sizes)
    else:
        result = _of_model(subject, format, target, training, sizes)
    write_result(result, output)
    if output is not None:
        say(f"wrote {output}: {len(result.encode()) / 1024:.0f} KiB")


def _of_graphs(
    text: str,
    graphs: list[Graph],
    format: Format,
    target: Target,
    training: bool,
    sizes: dict[str, int],
) -> str:
    if format is Format.html:
        from moec.report import report_of_graphs

        return report_of_graphs(graphs, target.value, training, pipeline_of(text))
    if format is Format.memory:
        return _memory(graphs, target, training, pipeline_of(text), sizes)
    return _drawn(graphs, format)


def _of_model(
    spec: str, format: Format, target: Target, training: bool, sizes: dict[str, int]
) -> str:
    model = load_model(spec)
    with working("looking for regions"):
        if format is Format.html:
            from moec.report import report_of_model

            return report_of_model(model, target.value, training)
        from moec.capture.regions import find_regions

        found = {r.fingerprint: r.graph for r in find_regions(model) if r.graph is not None}
    graphs = list(found.values())
    if format is Format.memory:
        return _memory(graphs, target, training, None, sizes)
    return _drawn(graphs, format)


def _memory(
    graphs: list[Graph], target: Target, training: bool, passes: str | None, sizes: dict[str, int]
) -> str:
    from moec.report.memory import memory_use
    from moec.report.memory_text import memory_text

    named = default_pipeline(target.value, training) if passes is None else passes
    texts = []
    for graph in graphs:
        is_made = bool(graph.cotangents) or any(op.kind.startswith("kern.") for op in graph.ops)
        made = graph if is_made else PassManager(named).run(graph)
        all_sizes = {**default_dims(made, size=TOKENS), **sizes}
        check_dims(made, all_sizes)
        use = memory_use(made, all_sizes)
        texts.append(f"@{graph.name}: no ops" if use is None else memory_text(use))
    return "\n\n".join(texts) + "\n"


def _drawn(graphs: list[Graph], format: Format) -> str:
    from moec.drawing import dot, mermaid

    draw = {Format.text: text_of, Format.dot: dot, Format.mermaid: mermaid}[format]
    return "\n".join(draw(graph) for graph in graphs)

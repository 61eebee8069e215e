"""``moec show``: a graph as text, as a picture's source, or as a report in one HTML file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.console import graphs_in, read_text, say, working, write_result
from moec.cli.graphs import Name, Output, Target
from moec.cli.models import load_model
from moec.ir import Graph
from moec.ir import show as text_of
from moec.reproducer import pipeline_of


class Format(StrEnum):
    """How a graph is shown."""

    text = "text"
    dot = "dot"
    mermaid = "mermaid"
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
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.html,
    output: Output = None,
    target: Annotated[
        Target, typer.Option(help="html: the target whose passes are shown.")
    ] = Target.triton,
    training: Annotated[
        bool, typer.Option("--training", help="html: with the backward pass.")
    ] = False,
    graph: Name = None,
) -> None:
    """Show graphs: as text, as Graphviz or Mermaid source, or as a report.

    The report is one HTML file that works offline: the passes, the graph after each with its
    differences, memory over the ops, each kernel beside its body, the model's source lines.

    \b
    Examples:
      moec show mixtral --training -o report.html
      moec show a.moe --format mermaid
      moec show a.moe --format dot | dot -Tsvg > a.svg
    """
    is_file = subject == "-" or subject.endswith(".moe")
    if is_file:
        text = read_text(Path(subject))
        result = _of_graphs(text, graphs_in(text, Path(subject), graph), format, target, training)
    else:
        result = _of_model(subject, format, target, training)
    write_result(result, output)
    if output is not None:
        say(f"wrote {output}: {len(result.encode()) / 1024:.0f} KiB")


def _of_graphs(
    text: str, graphs: list[Graph], format: Format, target: Target, training: bool
) -> str:
    if format is Format.html:
        from moec.report import report_of_graphs

        return report_of_graphs(graphs, target.value, training, pipeline_of(text))
    return _drawn(graphs, format)


def _of_model(spec: str, format: Format, target: Target, training: bool) -> str:
    model = load_model(spec)
    with working("looking for regions"):
        if format is Format.html:
            from moec.report import report_of_model

            return report_of_model(model, target.value, training)
        from moec.capture.regions import find_regions

        found = {r.fingerprint: r.graph for r in find_regions(model) if r.graph is not None}
    return _drawn(list(found.values()), format)


def _drawn(graphs: list[Graph], format: Format) -> str:
    from moec.drawing import dot, mermaid

    draw = {Format.text: text_of, Format.dot: dot, Format.mermaid: mermaid}[format]
    return "\n".join(draw(graph) for graph in graphs)

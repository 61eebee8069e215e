"""``moec diff``: what differs between two graphs, op by op."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.console import read_graphs
from moec.compare import Change, Difference, compare, is_same
from moec.errors import ParseError
from moec.ir import Graph
from moec.ir.text import Names, show_op

_SIGNS = {Change.REMOVED: "-", Change.ADDED: "+", Change.REWIRED: "~", Change.SAME: " "}


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A file of IR text.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Print the ops that are the same, too.")
    ] = False,
) -> None:
    """Compare two graphs by structure.

    Ops are matched by what they are, so renamed values and moved source lines do not count. "-" is
    an op of A alone, "+" one of B alone, "~" the same op on other operands. Graphs of files with
    several are paired by name. Exit code 0: the same; 1: they differ.

    \b
    Examples:
      moec diff steps/00-input.moe steps/04-raise-router.moe
      moec diff --all a.moe b.moe
    """
    pairs = _paired(read_graphs(first), read_graphs(second), first, second)
    if not all([_print(a, b, everything) for a, b in pairs]):
        raise typer.Exit(1)


def _paired(
    before: list[Graph], after: list[Graph], first: Path, second: Path
) -> list[tuple[Graph, Graph]]:
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    there = {g.name: g for g in after}
    missing = {g.name for g in before} ^ there.keys()
    if missing:
        names = ", ".join(f"@{n}" for n in sorted(missing))
        raise ParseError(f"{first} and {second} do not hold the same graphs: {names} in one only")
    return [(g, there[g.name]) for g in before]


def _print(before: Graph, after: Graph, everything: bool) -> bool:
    """Print one comparison; whether the graphs are the same."""
    same, lines = is_same(before, after), compare(before, after)
    counts = {c: sum(line.change is c for line in lines) for c in Change}
    words = ", ".join(f"{n} {c.value}" for c, n in counts.items() if n)
    typer.echo(f"@{after.name}: {len(before.ops)} -> {len(after.ops)} ops ({words or 'no ops'})")
    texts = {**_texts(before), **_texts(after)}
    for line in lines:
        if everything or line.change is not Change.SAME:
            typer.echo(f"{_SIGNS[line.change]} {texts[id(_shown(line))]}")
    if not same and all(line.change is Change.SAME for line in lines):
        typer.echo("~ inputs or returned values differ")
    return same


def _shown(line: Difference) -> object:
    return line.after if line.after is not None else line.before


def _texts(graph: Graph) -> dict[int, str]:
    """Each op as a line with the names of its own graph."""
    names = Names()
    for value in (*graph.inputs, *graph.cotangents):
        names.add(value)
    return {id(op): show_op(op, names) for op in graph.ops}

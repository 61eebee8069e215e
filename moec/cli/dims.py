"""``--dim input_ids:1=S[1..131072]``: what is declared of a model's inputs on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from torch import nn

from moec.cli.console import say
from moec.declared import Dim, Dynamic, declare, dim
from moec.errors import DimError
from moec.ir import Graph
from moec.ir.dims import parse_dim, symbols

if TYPE_CHECKING:
    from moec.capture.regions import FoundRegion

Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="INPUT:AXIS=DIM[LOW..HIGH]",
        help="Name and bound an axis of a model's input: input_ids:1=S[1..4096], mask:1=S, x:0=B*S;"
        " may be repeated. Regions get the range of T = B*S where both axes are declared.",
        show_default=False,
    ),
]
_FORM = re.compile(r"(\w+):(\d{1,2})=([^\[\]]+)(?:\[(\d{1,18})\.\.(\d{1,18})?\])?")


def read_dims(words: Sequence[str] | None) -> dict[str, dict[int, Dim]]:
    """``["input_ids:1=S[1..4096]"]`` as :func:`moec.compile` takes it; anything else is wrong
    usage.
    """
    found: dict[str, dict[int, Dim]] = {}
    for word in words or ():
        match = _FORM.fullmatch(word.replace(" ", ""))
        if match is None:
            raise typer.BadParameter(
                f"--dim {word!r}: write an input, its axis and a dim, as in input_ids:1=S[1..4096]"
            )
        name, axis, size, low, high = match.groups()
        axes = found.setdefault(name, {})
        if int(axis) in axes:
            raise typer.BadParameter(f"--dim {word!r}: {name} axis {axis} is declared twice")
        axes[int(axis)] = _dim(word, size, low, high)
    return found


def _dim(word: str, text: str, low: str | None, high: str | None) -> Dim:
    try:
        size = parse_dim(text)
        if low is None:
            return Dim(size, tuple((name, (0, None)) for name in sorted(symbols(size))))
        if symbols(size) != {text}:
            raise DimError(f"{text} is no name; a range belongs to one")
        return dim(text, min=int(low), max=None if high is None else int(high))
    except DimError as error:
        raise typer.BadParameter(f"--dim {word!r}: {error}") from None


def within(model: nn.Module, dynamic: Dynamic, found: Iterable[FoundRegion]) -> list[FoundRegion]:
    """Regions of a model whose graphs keep to what is declared of its inputs."""
    from moec.declared_limits import narrowed, token_limits

    limits = token_limits(declare(model, dynamic), {})
    if dynamic and "T" not in limits:
        say("T of the regions keeps its own range: no input has both axes declared and bounded")

    def cut(graph: Graph | None) -> Graph | None:
        return None if graph is None else narrowed(graph, limits)

    return [replace(region, graph=cut(region.graph)) for region in found]


__all__ = ["Dims", "read_dims", "within"]

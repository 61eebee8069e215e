"""``docs/support.md``: what becomes of every MoE family of the installed transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from moec.families.discover import Family, families, transformers
from moec.families.row import Row, row_of

NOTE = "<!-- Written by `python -m moec.docs support` from tiny models of each family. -->"
_HEADS = (
    "family",
    "compiled",
    "equals eager",
    "router",
    "experts",
    "what is not compiled, and why",
)
_INTRODUCTION = """
Every family of Hugging Face models with experts, as found in the configurations of transformers
{version}. Of each a tiny model with random weights is built, compiled, and compared with itself:
the output, and the gradient of every parameter, in float32 on the CPU. A family's default
configuration decides which router and experts it shows; `moec doctor config.json` says the same
of a checkpoint. "Router" lists the operations that its code was raised to; "tensor operations"
run as they are, around the compiled experts. Sizes are of the tiny model, and mean nothing.
""".strip()


def chosen(only: Collection[str] = ()) -> list[Family]:
    """All families, or those named.

    Raises :class:`KeyError` with the names that no family has.
    """
    known = {family.name: family for family in families()}
    unknown = sorted(set(only) - known.keys())
    if unknown:
        raise KeyError(", ".join(unknown))
    return [known[name] for name in sorted(only)] if only else list(known.values())


def rows(only: Collection[str] = (), seen: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The rows of the families; ``seen`` is called with each when it is done."""
    found = []
    for family in chosen(only):
        found.append(row_of(family))
        seen(found[-1])
    return found


def page(found: Sequence[Row]) -> str:
    """The page of these rows."""
    counts: dict[str, int] = {}
    for row in found:
        counts[row.compiled] = counts.get(row.compiled, 0) + 1
    differing = [row.family for row in found if row.same != "yes"]
    summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    counted = f"{len(found)} families: {summary}. Different from eager: {_listed(differing)}."
    introduction = _INTRODUCTION.format(version=transformers().__version__)
    head = f"| {' | '.join(_HEADS)} |\n|{' --- |' * len(_HEADS)}"
    table = "\n".join([head, *map(line, found)])
    return "\n\n".join(["# Support", NOTE, introduction, counted, table]) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def line(row: Row) -> str:
    """A row as a line of Markdown."""
    cells = (row.family, row.compiled, row.same, row.router, row.experts, row.reason)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rows_in(text: str) -> list[Row]:
    """The rows of a page, read back."""
    lines = [one for one in text.splitlines() if one.startswith("| ")]
    return [_row(one) for one in lines if not one.startswith(("| family |", "| ---"))]


def _row(text: str) -> Row:
    cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
    family, compiled, same, router, experts, reason = cells
    return Row(family, router, experts, compiled, same, reason)


def with_rows(text: str, found: Sequence[Row]) -> str:
    """A page's text with some of its rows replaced."""
    new = {row.family: row for row in found}
    return page([new.get(row.family, row) for row in rows_in(text)])

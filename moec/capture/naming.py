"""Names of values: the user's own variables, read off the source line that computed them."""

from __future__ import annotations

import linecache
import operator
import re

from torch import fx

_ASSIGNMENT = re.compile(
    r"^\s*(?P<names>[A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)*)\s*(?::[^=]+)?[-+*/]?=(?!=)"
)


def name_nodes(graph: fx.Graph) -> None:
    """Give the last value that each source line computes the name that the line assigns to."""
    named: set[tuple[str, int]] = set()
    for node in reversed(list(graph.nodes)):
        place = None if node.target is operator.getitem else _place(node)
        if place is None or place in named:
            continue
        named.add(place)
        names = assigned_names(*place)
        if len(names) == 1:
            node.meta["hint"] = names[0]
        elif names:
            node.meta["hints"] = names


def assigned_names(path: str, line: int) -> tuple[str, ...]:
    """The variables that a source line assigns to; empty if it assigns to none."""
    match = _ASSIGNMENT.match(linecache.getline(path, line))
    return tuple(n.strip() for n in match["names"].split(",") if n.strip() != "_") if match else ()


def _place(node: fx.Node) -> tuple[str, int] | None:
    """The file and line of a node."""
    known = node.meta.get("place")
    if known is not None:
        return tuple(known)
    for text in reversed((node.meta.get("stack_trace") or "").splitlines()):
        text = text.strip()
        if text.startswith('File "') and "/torch/" not in text:
            path, rest = text[6:].split('"', 1)
            number = rest.split("line ", 1)[-1].split(",", 1)[0]
            return (path, int(number)) if number.isdigit() else None
    return None

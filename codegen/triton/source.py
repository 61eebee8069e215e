"""Text of the functions of the libraries of device functions, read without importing Triton."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

_FILES = (
    Path(__file__).with_name("library.py"),
    Path(__file__).with_name("counts_library.py"),
    Path(__file__).parents[1] / "gluon" / "library.py",
)


@functools.cache
def _library() -> dict[str, tuple[str, frozenset[str]]]:
    """Each name's text, and the other names that it uses."""
    found = {name: body for path in _FILES for name, body in _functions(path.read_text())}
    uses = {
        name: frozenset(
            n.id
            for n in ast.walk(ast.parse(body))
            if isinstance(n, ast.Name) and n.id in found and n.id != name
        )
        for name, body in found.items()
    }
    return {name: (body, uses[name]) for name, body in found.items()}


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each function and constant."""
    lines = text.split("\n")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            yield node.name, "\n".join(lines[first : node.end_lineno])
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.get_source_segment(text, node) or ""


def names() -> frozenset[str]:
    """Every name of the library; nothing else in an emitted module may be called so."""
    return frozenset(_library())


def texts(wanted: set[str]) -> list[str]:
    """The texts of the wanted functions and of what they use, in the library's order."""
    needed, stack = set[str](), list(wanted)
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += _library()[name][1]
    return [body for name, (body, _) in _library().items() if name in needed]

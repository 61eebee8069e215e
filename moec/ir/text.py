"""Printing graphs as text. The grammar (one syntax for every op)::

file   := graph*
graph  := "graph" "@" NAME "(" inputs [";" inputs] ")" ["where" ranges] "{" op* return "}"
inputs := "%" NAME ":" type, ...              after ";" come the cotangents of a joint graph
ranges := INT "<=" NAME ["<=" INT], ...
op     := results "=" KIND "(" operands ")" ["{" attributes "}"] ":" types ["[" graph "]"]
          ["//" place]
return := "return" results ["grad" results-or-"none"]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import sympy

from moec.errors import IRError
from moec.ir.dims import show_dim
from moec.ir.graph import Graph, Op, Value

_IDENTIFIER = re.compile(r"[^A-Za-z_0-9]")
MAX_NAME = 200


class Names:
    """Unique printed names of values, from their hints."""

    def __init__(self) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}  # the last number that a hint was given

    def add(self, value: Value) -> str:
        """Give a value its name: the hint, or the hint with the first free number."""
        base = identifier(value.hint)
        name, count = base, self._counts.get(base, 0)
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        self._counts[base] = count
        self._names[value] = name
        return name

    def __getitem__(self, value: Value) -> str:
        if value not in self._names:
            raise IRError(f"{value!r} is used but never defined in its graph")
        return self._names[value]


def identifier(text: str) -> str:
    """``text`` as a name that the grammar can read."""
    name = _IDENTIFIER.sub("_", text[:MAX_NAME]) or "v"
    return "v" + name if name[0].isdigit() else name


def show_attribute(value: Any) -> str:
    """Text of one attribute value."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return _show_float(value)
        case str():
            return json.dumps(value)
        case sympy.Expr():
            return show_dim(value)
        case tuple() | list():
            return "[" + ", ".join(map(show_attribute, value)) + "]"
    raise IRError(f"an attribute cannot be a {type(value).__name__}: {value!r}")


def _show_float(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(float(value))


def show(graph: Graph | Sequence[Graph], *, locations: bool = True) -> str:
    """The text of a graph, or of several; :func:`moec.ir.parser.parse` reads it back."""
    if not isinstance(graph, Graph):
        return "\n".join(show(g, locations=locations) for g in graph)
    return "\n".join(_graph_lines(graph, "", locations)) + "\n"


def _graph_lines(graph: Graph, indent: str, locations: bool) -> list[str]:
    names = Names()
    inputs = ", ".join(f"%{names.add(v)}: {v.type}" for v in graph.inputs)
    cotangents = ", ".join(f"%{names.add(v)}: {v.type}" for v in graph.cotangents)
    head = f"graph @{identifier(graph.name)}({inputs}{'; ' if cotangents else ''}{cotangents})"
    ranges = ", ".join(
        f"{lo} <= {n}" + ("" if hi is None else f" <= {hi}") for n, (lo, hi) in graph.ranges.items()
    )
    lines = [indent + head + (f" where {ranges}" if ranges else "") + " {"]
    for op in graph.ops:
        lines += _op_lines(op, names, indent + "  ", locations)
    lines += [f"{indent}  {_return_line(graph, names)}".rstrip(), indent + "}"]
    return lines


def _return_line(graph: Graph, names: Names) -> str:
    line = "return " + ", ".join(f"%{names[v]}" for v in graph.outputs)
    if graph.gradients:
        line += " grad " + ", ".join(
            "none" if g is None else f"%{names[g]}" for g in graph.gradients
        )
    return line


def show_op(op: Op, names: Names) -> str:
    """One line for an op, without its body and place."""
    operands = ", ".join(f"%{names[v]}" for v in op.operands)
    results = ", ".join(f"%{names.add(v)}" for v in op.results)
    attrs = ", ".join(f"{k}={show_attribute(v)}" for k, v in op.attrs.items())
    types = ", ".join(str(v.type) for v in op.results)
    return f"{results} = {op.kind}({operands})" + (f" {{{attrs}}}" if attrs else "") + f" : {types}"


def _op_lines(op: Op, names: Names, indent: str, locations: bool) -> list[str]:
    line = indent + show_op(op, names)
    place = f"  // {op.loc}" if locations and op.loc is not None else ""
    if op.body is None:
        return [line + place]
    return [line + " [" + place, *_graph_lines(op.body, indent + "  ", locations), indent + "]"]

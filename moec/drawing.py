"""Graphs as pictures' sources: Graphviz and Mermaid text."""

from __future__ import annotations

from moec.ir.graph import Graph, Value
from moec.ir.text import Names, show_op


def dot(graph: Graph) -> str:
    """A graph for Graphviz: ops are boxes, edges carry types."""
    lines = [f"digraph {_quoted(graph.name)} {{", "  node [shape=box, fontname=monospace];"]
    lines += [
        f"  {name} [{_dot_attributes(label, shape)}];" for name, label, shape in _nodes(graph)
    ]
    lines += [f"  {a} -> {b} [label={_quoted(label)}];" for a, b, label in _edges(graph)]
    return "\n".join([*lines, "}"]) + "\n"


def mermaid(graph: Graph) -> str:
    """A graph for Mermaid, which Markdown pages on code hosts draw."""
    lines = ["flowchart TD"]
    for name, label, shape in _nodes(graph):
        left, right = ("([", "])") if shape == "ellipse" else ("[", "]")
        lines.append(f'  {name}{left}"{_escaped(label)}"{right}')
    lines += [f'  {a} -->|"{_escaped(label)}"| {b}' for a, b, label in _edges(graph)]
    return "\n".join(lines) + "\n"


def _nodes(graph: Graph) -> list[tuple[str, str, str]]:
    """Name, label and shape: inputs, ops, and what is returned."""
    names = Names()
    found = []
    for i, value in enumerate((*graph.inputs, *graph.cotangents)):
        found.append((f"in{i}", f"%{names.add(value)}: {value.type}", "ellipse"))
    for i, op in enumerate(graph.ops):
        text = show_op(op, names).split(" = ", 1)[1]
        attrs = text[text.index("{") : text.index("}") + 1] if op.attrs else ""
        found.append((f"op{i}", f"{op.kind} {attrs}".strip(), "box"))
    for i, value in enumerate(graph.returned):
        found.append((f"out{i}", f"return %{names[value]}", "ellipse"))
    return found


def _edges(graph: Graph) -> list[tuple[str, str, str]]:
    made: dict[Value, str] = {v: f"in{i}" for i, v in enumerate((*graph.inputs, *graph.cotangents))}
    found = []
    for i, op in enumerate(graph.ops):
        found += [(made[v], f"op{i}", str(v.type)) for v in dict.fromkeys(op.operands)]
        made.update((v, f"op{i}") for v in op.results)
    found += [(made[v], f"out{i}", str(v.type)) for i, v in enumerate(graph.returned)]
    return found


def _dot_attributes(label: str, shape: str) -> str:
    return f"label={_quoted(label)}" + (", shape=ellipse" if shape == "ellipse" else "")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


__all__ = ["dot", "mermaid"]

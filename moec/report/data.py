"""What the report's page shows, as plain data."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.codegen import emit_module
from moec.compare import Change, compare
from moec.cost import saved_values
from moec.errors import MoecError
from moec.inputs import default_dims
from moec.ir.dims import evaluate, show_dim
from moec.ir.graph import Graph, Op, Value, backward_ops
from moec.ir.text import Names, show, show_op
from moec.manager import Step
from moec.report.memory import in_order, lifetimes, live_bytes

TOKENS = (1, 128, 4096, 65536)
# Lines of the model's source shown before and after the one that an op comes from.
_AROUND = 5


@dataclass(frozen=True)
class Subject:
    """A graph on its way through the passes: ``start`` is captured or read, ``steps`` follow.

    ``sources`` maps the names of source files to their texts, as far as they are known.
    """

    title: str
    target: str
    start: Graph
    steps: Sequence[Step]
    notes: Sequence[str] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def end(self) -> Graph:
        """The graph after all passes."""
        return self.steps[-1].after if self.steps else self.start


def subject_data(subject: Subject) -> dict[str, Any]:
    """One subject as JSON-able data."""
    emitted = _emitted(subject.end, subject.target)
    return {
        "title": subject.title,
        "target": subject.target,
        "notes": list(subject.notes),
        "fingerprint": subject.start.fingerprint,
        "stages": [_first(subject.start), *(_stage(s) for s in subject.steps)],
        "memory": {
            "start": _memory(subject.start),
            "end": _memory(subject.end),
        },
        "kernels": _kernels(subject.end, subject.target, emitted),
        "emitted": emitted,
        "sources": _snippets(subject),
    }


def _first(graph: Graph) -> dict[str, Any]:
    texts = _texts(graph)
    lines = [_line(Change.SAME, op, texts) for op in graph.ops]
    about = "What was captured, or read from the file."
    return {
        "name": "input",
        "doc": about,
        **_frame(graph),
        "ms": 0.0,
        "rewrites": 0,
        "lines": lines,
    }


def _stage(step: Step) -> dict[str, Any]:
    texts = {**_texts(step.before), **_texts(step.after)}
    lines = []
    for difference in compare(step.before, step.after):
        op = difference.after if difference.after is not None else difference.before
        if op is not None:
            lines.append(_line(difference.change, op, texts))
    return {
        "name": str(step.call),
        "doc": _first_sentence(step.call.definition.doc),
        **_frame(step.after),
        "ms": round(step.seconds * 1e3, 2),
        "rewrites": step.rewrites,
        "lines": lines if step.changed else None,
    }


def _first_sentence(doc: str) -> str:
    """The first sentence of a docstring, as plain text."""
    words = " ".join(doc.split("\n\n")[0].split()).replace("`", "")
    first, dot, _ = words.partition(". ")
    return first + dot.strip()


def _frame(graph: Graph) -> dict[str, Any]:
    """A graph's first and last lines, and its size."""
    text = show(graph, locations=False).rstrip("\n").split("\n")
    return {"head": text[0], "tail": text[-2:], "ops": len(graph.ops)}


def _texts(graph: Graph) -> dict[int, str]:
    names = Names()
    for value in (*graph.inputs, *graph.cotangents):
        names.add(value)
    return {id(op): show_op(op, names) for op in graph.ops}


def _line(change: Change, op: Op, texts: Mapping[int, str]) -> list[str]:
    """Change, text, place in the model, and the body of a kernel."""
    body = show(op.body, locations=False) if op.body is not None else ""
    return [str(change), texts[id(op)], str(op.loc) if op.loc is not None else "", body]


def _memory(graph: Graph) -> dict[str, Any]:
    """Live bytes at each op at some numbers of tokens, and the values that they are made of."""
    sizes = {tokens: _sizes(graph, tokens) for tokens in TOKENS}
    texts = _texts(graph)
    behind = backward_ops(graph)
    ops = in_order(graph)
    return {
        "part": "forward and backward" if graph.cotangents else "forward",
        "ops": [[texts[id(op)], str(op.loc or ""), int(op in behind)] for op in ops],
        "bytes": {tokens: live_bytes(graph, sizes[tokens]) for tokens in TOKENS},
        "values": _memory_values(graph, texts, sizes),
    }


def _sizes(graph: Graph, tokens: int) -> dict[str, int]:
    known = {n: max(tokens, low) for n, (low, _) in graph.ranges.items()}
    return {**default_dims(graph, size=tokens), **known}


def _memory_values(
    graph: Graph, texts: Mapping[int, str], sizes: Mapping[int, Mapping[str, int]]
) -> list[list[Any]]:
    """Name, type, bytes for every size, first and last op, bytes at each number of tokens, and
    whether a value is held for the backward pass.
    """
    held = set(saved_values(graph)) if graph.cotangents else set()
    names = dict(_value_names(graph, texts))
    return [
        [
            names[value],
            str(value.type),
            show_dim(value.type.bytes),
            first,
            last,
            [evaluate(value.type.bytes, sizes[tokens]) for tokens in TOKENS],
            int(value in held),
        ]
        for value, (first, last) in lifetimes(graph).items()
    ]


def _value_names(graph: Graph, texts: Mapping[int, str]) -> Iterable[tuple[Value, str]]:
    """Each result of an op with the name that the graph's text gives it."""
    for op in graph.ops:
        yield from zip(op.results, texts[id(op)].split(" = ", 1)[0].split(", "), strict=True)


def _emitted(graph: Graph, target: str) -> str:
    try:
        return emit_module(graph, target)
    except MoecError as error:
        return f"# not emitted: {error}"


def _kernels(graph: Graph, target: str, emitted: str) -> list[dict[str, str]]:
    """Each kernel's body beside its emitted functions."""
    if target != "triton" or emitted.startswith("# not emitted"):
        return []
    from moec.codegen.triton import TritonEmitter

    emitter, functions = TritonEmitter(graph), _functions(emitted)
    found = []
    for op, kernel in emitter.kernels.items():
        if op.body is not None:
            names = [kernel.name, *(f"{kernel.name}_{part}" for part in ("tile", "sums"))]
            source = "\n\n".join(functions[n] for n in names if n in functions)
            body = show(op.body, locations=False)
            place = str(op.loc or "")
            one = {"name": kernel.name, "op": op.kind, "body": body, "source": source}
            found.append({**one, "place": place})
    return found


def _functions(text: str) -> dict[str, str]:
    """The source of each function of a module, decorators included."""
    lines, found = text.split("\n"), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def _snippets(subject: Subject) -> dict[str, str]:
    """The model's source around each line that an op comes from, by place."""
    graphs = [subject.start, *(s.after for s in subject.steps)]
    places = {op.loc for graph in graphs for op in graph.ops if op.loc is not None}
    found = {}
    for place in places:
        text = subject.sources.get(place.file)
        if text is not None:
            found[str(place)] = _around(text.split("\n"), place.line)
    return found


def _around(lines: Sequence[str], number: int) -> str:
    low, high = max(number - _AROUND, 1), min(number + _AROUND, len(lines))
    return "\n".join(_numbered(lines[i - 1], i, i == number) for i in range(low, high + 1))


def _numbered(line: str, number: int, is_here: bool) -> str:
    return f"{'>' if is_here else ' '} {number:5} {line}"


def all_data(
    title: str, subjects: Iterable[Subject], versions: str, left: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The whole page's data; ``left`` are the blocks that were not captured, by reason."""
    return {
        "title": title,
        "versions": versions,
        "left": [[list(places), reason] for reason, places in left.items()],
        "subjects": [subject_data(subject) for subject in subjects],
    }


__all__ = ["Subject", "all_data"]

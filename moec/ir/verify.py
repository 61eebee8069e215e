"""The verifier: re-infer every op and compare, and check scoping, phases and dialects."""

from __future__ import annotations

from collections.abc import Collection

from moec.errors import IRError
from moec.ir.builder import infer_types
from moec.ir.dims import symbols
from moec.ir.graph import Graph, Op, Value
from moec.ir.text import Names, show_op
from moec.ir.types import Type


def verify(graph: Graph, *, dialects: Collection[str] | None = None, after: str = "") -> Graph:
    """Return ``graph`` if it is well formed, otherwise raise :class:`IRError` naming op and source
    line.

    ``dialects`` restricts the prefixes that may occur (bodies of ``kern.`` ops hold the other two).
    """
    names = Names()
    defined: set[Value] = set()
    for value in (*graph.inputs, *graph.cotangents):
        _define(value, defined, names, graph)
    for op in graph.ops:
        _check_op(op, defined, names, graph, dialects, after)
    for value in graph.returned:
        if value not in defined:
            raise IRError(
                f"@{graph.name} returns {value!r}, which is never defined" + _after(after)
            )
    check_frame(graph, after)
    return graph


def check_frame(graph: Graph, after: str = "") -> None:
    """What a graph must hold as a whole, beyond each op for itself."""
    for op in graph.ops:
        for inner in op.body.ops if op.body is not None else ():
            if inner.body is not None:
                raise IRError(f"@{graph.name}: {inner.kind} stands inside {op.kind}{_after(after)}")
    _check_joint(graph, after)
    _check_dims(graph, after)


def _define(value: Value, defined: set[Value], names: Names, graph: Graph) -> None:
    if value in defined:
        raise IRError(f"@{graph.name}: {value!r} is defined twice")
    defined.add(value)
    names.add(value)


def _check_op(
    op: Op,
    defined: set[Value],
    names: Names,
    graph: Graph,
    dialects: Collection[str] | None,
    after: str,
) -> None:
    where = f"{op.loc}: " if op.loc else f"@{graph.name}: "

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise IRError(where + message + _after(after))

    for value in op.operands:
        check(value in defined, f"{op.kind}: operand {value!r} is not defined before its use")
    check(
        dialects is None or op.kind.split(".")[0] in dialects,
        f"{op.kind}: only {', '.join(sorted(dialects or ()))} ops may be left here",
    )
    if op.body is not None:
        verify(op.body, dialects=("t", "moe"), after=after)
    inferred = _inferred(op, where, after)
    for value in op.results:
        check(value not in defined, f"{op.kind}: result {value!r} is defined twice")
        defined.add(value)
    line = show_op(op, names)
    declared = tuple(v.type for v in op.results)
    check(
        declared == inferred,
        f"{op.kind} gives {', '.join(map(str, inferred))}, "
        f"declared {', '.join(map(str, declared))}\n  in  {line}",
    )


def _inferred(op: Op, where: str, after: str) -> tuple[Type, ...]:
    try:
        return infer_types(op.kind, [v.type for v in op.operands], op.attrs, op.body)
    except IRError as error:
        raise IRError(f"{where}{error}{_after(after)}") from error


def _check_joint(graph: Graph, after: str) -> None:
    if not graph.cotangents and not graph.gradients:
        return
    floats = [v for v in graph.outputs if v.type.is_float]
    if len(graph.cotangents) != len(floats) or len(graph.gradients) != len(graph.inputs):
        raise IRError(
            f"@{graph.name}: a joint graph has one cotangent per float output "
            "and one gradient per input" + _after(after)
        )
    for kind, pairs in (
        ("cotangent", zip(graph.cotangents, floats, strict=True)),
        ("gradient", zip(graph.gradients, graph.inputs, strict=True)),
    ):
        for got, wanted in pairs:
            if got is not None and got.type != wanted.type:
                raise IRError(
                    f"@{graph.name}: the {kind} of %{wanted.hint}: {wanted.type} "
                    f"has type {got.type}" + _after(after)
                )


def _check_dims(graph: Graph, after: str) -> None:
    known = set(graph.ranges)
    for value in (*graph.inputs, *graph.cotangents):
        for d in value.type.shape:
            known |= symbols(d)
    for op in graph.ops:
        for value in op.results:
            free = {n for d in value.type.shape for n in symbols(d)} - known
            if free:
                raise IRError(
                    f"@{graph.name}: %{value.hint} has the unknown dims {', '.join(sorted(free))}"
                    + _after(after)
                )


def _after(name: str) -> str:
    return f"\n  after pass {name}" if name else ""

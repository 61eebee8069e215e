"""Reverse-mode differentiation in the IR: a forward graph becomes a joint graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moec.errors import IRError
from moec.exact_gradients import gradient_rule
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value


def differentiate(graph: Graph, wanted: Collection[Value], exact: bool = False) -> Graph:
    """The joint graph: the forward ops, then one ``vjp`` an op in reverse.

    ``wanted`` are the inputs whose gradients are needed (selective differentiation: nothing is
    computed or kept for the others). Each float output gets a cotangent input ``d_<name>`` of its
    type. ``exact``: what a float64 graph computes in a smaller dtype gets the gradients that
    autograd has, to the bit.
    """
    if graph.cotangents:
        raise IRError(f"@{graph.name} has gradients already")
    builder = Builder(graph.ranges)
    builder.ops.extend(graph.ops)
    floats = [v for v in graph.outputs if v.type.is_float]
    cotangents = [Value(v.type, f"d_{v.hint}") for v in floats]
    needed = _needed(graph, wanted)
    gradients: dict[Value, Value] = {}
    for value, cotangent in zip(floats, cotangents, strict=True):
        _accumulate(builder, gradients, value, cotangent)
    for op in reversed(graph.ops):
        _differentiate_op(builder, op, needed, gradients, exact)
    results = [
        _gradient_of_input(builder, v, gradients) if v in wanted and v.type.is_float else None
        for v in graph.inputs
    ]
    return builder.graph(graph.name, graph.inputs, graph.outputs, cotangents, results)


def _needed(graph: Graph, wanted: Collection[Value]) -> set[Value]:
    """Values through which a wanted input influences others."""
    needed = set(wanted)
    for op in graph.ops:
        if any(v in needed for v in op.operands):
            needed.update(v for v in op.results if v.type.is_float)
    return needed


def _differentiate_op(
    b: Builder, op: Op, needed: set[Value], gradients: dict[Value, Value], exact: bool
) -> None:
    cotangents = [gradients.get(r) for r in op.results]
    wanted = [v in needed and v.type.is_float for v in op.operands]
    if not any(c is not None for c in cotangents) or not any(wanted):
        return
    vjp = gradient_rule(op, exact)
    if vjp is None:
        raise IRError(f"{op.loc or op.kind}: {op.kind} has no gradient")
    b.loc = op.loc
    mark = len(b.ops)
    found = vjp(b, op, *cotangents)
    for value, want, gradient in zip(op.operands, wanted, found, strict=True):
        if want and gradient is not None:
            _accumulate(b, gradients, value, gradient)
    b.ops[mark:] = [replace(o, loc=op.loc) for o in b.ops[mark:]]


def _accumulate(b: Builder, gradients: dict[Value, Value], value: Value, gradient: Value) -> None:
    if gradient.type != value.type:
        raise IRError(f"the gradient of %{value.hint}: {value.type} came out as {gradient.type}")
    known = gradients.get(value)
    gradients[value] = (
        gradient if known is None else b("t.add", known, gradient, hint=f"d_{value.hint}")
    )


def _gradient_of_input(b: Builder, value: Value, gradients: dict[Value, Value]) -> Value:
    known = gradients.get(value)
    return b.full(value.type, 0.0) if known is None else known

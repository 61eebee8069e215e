"""Common-subexpression elimination."""

from __future__ import annotations

from typing import Any

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value
from moec.ir.text import show_attribute
from moec.manager import register
from moec.rewrite import transform


def key_of(op: Op) -> tuple[Any, ...]:
    """Two ops with equal keys compute the same results."""
    attrs = tuple((k, show_attribute(v)) for k, v in op.attrs.items())
    return op.kind, op.operands, attrs, op.body.fingerprint if op.body is not None else ""


@register("cse")
def cse(graph: Graph) -> Graph:
    """Compute equal expressions once.

    Ops have no effects, so equal kind, operands, attributes and body mean an equal result.
    """
    seen: dict[tuple[Any, ...], tuple[Value, ...]] = {}

    def share(builder: Builder, op: Op) -> tuple[Value, ...] | None:
        key = key_of(op)
        if key in seen:
            return seen[key]
        seen[key] = op.results
        return None

    return transform(graph, share, "cse")

"""Fuse the ordered combine with pointwise work on its tokens."""

from __future__ import annotations

from moec.ir.graph import Graph, Op
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Neighbourhood, constants_of, fuse, grow, not_pointwise


@register("fuse-combine")
def fuse_combine(graph: Graph) -> Graph:
    """Make each combine a kernel, with the additions and casts that follow it.

    Rows are added in the order of the choices, without atomics: the same bits every run.
    """
    while True:
        anchor = next((op for op in graph.ops if op.kind == "moe.combine"), None)
        if anchor is None:
            return graph
        fused = _fuse_one(graph, anchor)
        if fused is graph:
            return graph
        graph = fused


def _fuse_one(graph: Graph, anchor: Op) -> Graph:
    shape = anchor.result.type.shape

    def refuse(op: Op) -> str:
        if not opdef(op.kind).pointwise:
            return not_pointwise(op)
        fits = all(v.type.shape in (shape, ()) for v in (*op.operands, *op.results))
        return "" if fits else "it works on values of another shape"

    around = Neighbourhood(graph)
    members = grow(around, anchor, refuse, lambda op: "only what follows joins")
    return fuse(graph, members, "combine", duplicated=constants_of(around, members))

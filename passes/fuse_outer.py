"""Fuse gathers with weight-gradient products, and make bias gradients kernels."""

from __future__ import annotations

from moec.ir.graph import Graph, Op
from moec.manager import register
from moec.passes.clusters import Neighbourhood, fuse


@register("fuse-outer")
def fuse_outer(graph: Graph) -> Graph:
    """Make each weight-gradient product a kernel that gathers its rows itself.

    A gather on either side is copied into the kernel, so the gathered rows are never stored.
    """
    while True:
        anchor = next((op for op in graph.ops if op.kind == "moe.grouped_outer"), None)
        if anchor is None:
            return graph
        fused = _fuse_one(graph, anchor)
        if fused is graph:
            return graph
        graph = fused


def _fuse_one(graph: Graph, anchor: Op) -> Graph:
    made = Neighbourhood(graph).made
    gathers = [
        op
        for op in (made.get(v) for v in anchor.operands[:2])
        if op is not None and op.kind == "moe.gather"
    ]
    return fuse(graph, [anchor], "grouped_outer", duplicated=gathers)

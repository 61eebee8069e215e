"""Fuse runs of pointwise work that no product took in."""

from __future__ import annotations

from moec.ir.graph import Graph, Op
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import (
    Neighbourhood,
    constants_of,
    fuse,
    fuse_each,
    grow,
    not_pointwise,
)
from moec.reasons import decline


@register("fuse-pointwise")
def fuse_pointwise(graph: Graph, *, min_ops: int = 2) -> Graph:
    """Make runs of at least ``min_ops`` pointwise ops of one shape a kernel.

    What is left after the other fuse passes: the activation of a shared expert, for example.
    """
    return fuse_each(graph, _is_candidate, lambda g, op: _fuse_one(g, op, min_ops))


def _is_candidate(op: Op) -> bool:
    return opdef(op.kind).pointwise and op.result.type.rank == 2 and op.result.type.dtype != "bool"


def _fuse_one(graph: Graph, anchor: Op, min_ops: int) -> Graph:
    shape = anchor.result.type.shape

    def refuse(op: Op) -> str:
        if not opdef(op.kind).pointwise:
            return not_pointwise(op)
        fits = all(v.type.shape in (shape, ()) for v in (*op.operands, *op.results))
        return "" if fits else "it works on values of another shape"

    if refuse(anchor):
        return graph
    around = Neighbourhood(graph)
    members = grow(around, anchor, refuse, refuse)
    if len(members) < min_ops:
        decline("fuse pointwise", anchor, "fewer than {} such ops follow each other", min_ops)
        return graph
    return fuse(graph, members, "pointwise", duplicated=constants_of(around, members))

"""Fuse work on the same rows, for targets that run it block by block of rows in the cache."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Neighbourhood, constants_of, fuse, fuse_each, grow
from moec.passes.fuse_gemm import not_row_work
from moec.reasons import decline


@register("fuse-rows")
def fuse_rows(graph: Graph, *, min_ops: int = 2) -> Graph:
    """Make runs of at least ``min_ops`` ops on the same rows one unit.

    Pointwise work, splits, merges, row scales and row sums join. The ``aten`` target runs such a
    unit on blocks of rows that stay in the cache, so each value is read from memory once.
    """
    return fuse_each(graph, _is_candidate, lambda g, op: _fuse_one(g, op, min_ops))


def _is_candidate(op: Op) -> bool:
    shape = op.results[0].type.shape
    symbolic = len(shape) == 2 and not isinstance(shape[0], int)
    return symbolic and isinstance(shape[1], int) and shape[1] > 1 and opdef(op.kind).pointwise


def _fuse_one(graph: Graph, anchor: Op, min_ops: int) -> Graph:
    rows, width = anchor.results[0].type.shape

    def refuse(op: Op) -> str:
        if op.kind == "t.full" or _is_wide_reshape(op):
            return "it is not done block by block"
        return not_row_work(op, rows, int(width))

    def refuse_source(op: Op) -> str:
        on_rows = all(_has_rows(v, rows) for v in op.results)
        return refuse(op) or ("" if on_rows else "it does not work on the same rows")

    around = Neighbourhood(graph)
    members = [] if refuse(anchor) else grow(around, anchor, refuse, refuse_source)
    if len(members) < min_ops:
        decline("fuse pointwise", anchor, "fewer than {} such ops follow each other", min_ops)
        return graph
    scalars = [op for op in constants_of(around, members) if op.result.type.rank == 0]
    return fuse(graph, members, "pointwise", duplicated=scalars)


def _has_rows(value: Value, rows: object) -> bool:
    return value.type.rank > 0 and value.type.shape[0] == rows


def _is_wide_reshape(op: Op) -> bool:
    """Only a column and a vector of the rows are reshaped block by block."""
    return op.kind == "t.reshape" and any(
        v.type.rank == 2 and v.type.shape[1] != 1 for v in (*op.operands, *op.results)
    )

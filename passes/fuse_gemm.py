"""Fuse gathers, biases and pointwise work with products over ragged rows."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Neighbourhood, constants_of, fuse, grow, not_pointwise

_ROW_WORK = {"t.split", "t.merge", "moe.row_scale", "moe.row_dot", "t.reshape", "t.full"}
_ROW_LOADS = {"moe.permute", "moe.expert_rows", "t.full"}


@register("fuse-gemm")
def fuse_gemm(graph: Graph, *, max_ops: int = 64) -> Graph:
    """Make each grouped product a kernel: gather before it, pointwise work after it.

    The gather of rows becomes the prologue; biases, splits, activations, row scales and row sums on
    the product's tile become the epilogue, as long as they work on the same rows and the same
    columns. ``max_ops`` bounds the ops of one kernel.
    """
    while True:
        anchor = next((op for op in graph.ops if op.kind == "moe.grouped_mm"), None)
        if anchor is None:
            return graph
        fused = _fuse_one(graph, anchor, max_ops)
        if fused is graph:
            return graph
        graph = fused


def _fuse_one(graph: Graph, anchor: Op, max_ops: int) -> Graph:
    around = Neighbourhood(graph)
    rows = anchor.result.type.shape[0]
    width = _domain_width(around, anchor)

    def refuse(op: Op) -> str:
        return not_row_work(op, rows, width)

    def refuse_source(op: Op) -> str:
        problem = "" if op.kind in _ROW_LOADS else refuse(op)
        return problem or ("" if _on_rows(op, rows) else "it does not work on the same rows")

    members = grow(around, anchor, refuse, refuse_source, max_ops)
    gather = around.made.get(anchor.operands[0])
    prologue = [gather] if gather is not None and gather.kind == "moe.gather" else []
    constants = constants_of(around, members)
    return fuse(graph, members, "grouped_gemm", duplicated=[*prologue, *constants])


def _on_rows(op: Op, rows: object) -> bool:
    return all(v.type.rank == 0 or v.type.shape[0] == rows for v in op.results)


def _domain_width(around: Neighbourhood, anchor: Op) -> int:
    """The number of columns on which the epilogue works: a part's, if the product is read by a
    split.
    """
    width = int(anchor.result.type.shape[1])
    for op in around.readers.get(anchor.result, []):
        if op.kind == "t.split" and op.operands[0] is anchor.result:
            return width // int(op.attrs["parts"])
    return width


def not_row_work(op: Op, rows: object, width: int) -> str:
    """Why an op does not work on rows of the tile; empty if it does: pointwise, a split or merge, a
    row scale or a row sum.
    """
    if not (opdef(op.kind).pointwise or op.kind in _ROW_WORK):
        return not_pointwise(op)
    parts = int(op.attrs.get("parts", len(op.operands))) if op.kind in ("t.split", "t.merge") else 1
    values = (*op.operands, *op.results)
    fits = all(_fits(v, rows, width, parts) for v in values)
    return "" if fits else "it works on other rows, or on other columns, than the tile"


def _fits(value: Value, rows: object, width: int, parts: int) -> bool:
    shape = value.type.shape
    if len(shape) == 0:
        return True
    if shape[0] != rows or len(shape) > 2:
        return False
    return len(shape) == 1 or shape[1] in (1, width, parts * width)

"""Dense products in a form whose order of additions does not depend on the number of tokens."""

from __future__ import annotations

from moec.ir.builder import Builder
from moec.ir.dims import Dim, canon, product
from moec.ir.graph import Graph, Op, Value
from moec.manager import register
from moec.rewrite import transform


@register("batch-invariant")
def batch_invariant(graph: Graph) -> Graph:
    """Make products of tokens with one matrix grouped products of one group.

    A library chooses its kernel, and with it the order of additions, by the number of rows; the
    kernels of grouped products add in one order, whatever comes with a row. Products over the
    tokens themselves, which give gradients of weights, stay.
    """

    def rule(b: Builder, op: Op) -> Value | None:
        if op.kind not in ("t.linear", "t.matmul") or not has_fixed_matrix(op):
            return None
        x, matrix = op.operands[:2]
        rows = canon(product(x.type.shape[:-1]))
        flat = b("t.reshape", x, shape=(rows, x.type.shape[-1])) if x.type.rank != 2 else x
        stacked = b("t.reshape", matrix, shape=(1, *matrix.type.shape), hint=matrix.hint)
        offsets = _whole(b, rows)
        turned = op.kind == "t.matmul"
        y: Value = b(
            "moe.grouped_mm", flat, stacked, offsets, transposed=turned, hint=op.result.hint
        )
        if len(op.operands) == 3:
            bias = b("t.reshape", op.operands[2], shape=(1, matrix.type.shape[0]))
            y = b("t.add", y, b("moe.expert_rows", bias, offsets, rows=rows), hint=op.result.hint)
        shape = op.result.type.shape
        if len(shape) != 2:
            y = b("t.reshape", y, shape=shape, hint=op.result.hint)
        return y

    return transform(graph, rule, "batch-invariant")


def _whole(b: Builder, rows: Dim) -> Value:
    """The offsets of all rows, made once."""
    known = (o for o in b.ops if o.kind == "moe.one_group" and o.attrs["rows"] == rows)
    found: Value = next((o.result for o in known), None) or b(
        "moe.one_group", rows=rows, hint="whole"
    )
    return found


def has_fixed_matrix(op: Op) -> bool:
    """Whether an op multiplies rows, whose number is open, with one matrix of known sizes."""
    x, matrix = (v.type for v in op.operands[:2])
    known = matrix.rank == 2 and isinstance(matrix.elements, int) and matrix.elements > 0
    is_open = any(not isinstance(d, int) for d in x.shape[:-1])
    return known and is_open and x.is_float and isinstance(x.shape[-1], int)

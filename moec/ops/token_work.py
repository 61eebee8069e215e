"""Work along one token's own numbers: what kernels that hold a block of tokens can do."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value

_ALONG = {"t.sum", "t.amax", "t.cumsum", "t.softmax"}
_PARTS = {"t.slice", "t.split", "t.concat", "t.reshape", "t.expand"}
# ops whose results hold indices of experts if these operands do
CARRIERS = {"t.cast": (0,), "t.reshape": (0,), "t.where": (1, 2)}


def is_along(op: Op) -> bool:
    """Whether an op works along the last axis of tokens' numbers, or moves single ones."""
    if op.kind in _PARTS:
        return all(v.type.rank in (1, 2) for v in (*op.operands, *op.results))
    if op.kind == "moe.activate":
        return bool(op.attrs.get("groups", 1) == 1)
    dims = op.attrs.get("dims", (op.attrs.get("dim", -1),))
    return op.kind in _ALONG and op.operands[0].type.rank == 2 and set(dims) <= {-1, 1}


def reaching_dispatch(graph: Graph) -> frozenset[Value]:
    """The values whose numbers, where they stay what they are, name experts in a dispatch."""
    reach: set[Value] = {op.operands[0] for op in graph.ops if op.kind == "moe.dispatch"}
    for op in reversed(graph.ops):
        if any(v in reach for v in op.results):
            carried = (0,) if op.kind == "moe.limit" else CARRIERS.get(op.kind, ())
            reach.update(op.operands[place] for place in carried)
    return frozenset(reach)


__all__ = ["CARRIERS", "is_along", "reaching_dispatch"]

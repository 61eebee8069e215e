"""Rows of no expert: kernels leave them unwritten, so nobody may read them.

They exist only where a pair may go to no expert (capacity limits, variable numbers of choices).
Whatever reads rows by expert or by pair never sees them; for any other reader the product runs as
PyTorch expressions, which write zeros there.
"""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value, producers, users
from moec.ir.opdef import opdef

# readers by expert or by pair: kind -> operands that may hold unwritten rows
_SINKS: dict[str, tuple[int, ...]] = {
    "moe.combine": (0,),
    "moe.unpermute": (0,),
    "moe.group_sum": (0,),
    "moe.grouped_mm": (0,),
    "moe.grouped_outer": (0, 1),
}
_BY_EXPERT = ("kern.grouped_gemm", "kern.grouped_outer")
_ROW_BY_ROW = ("t.reshape", "t.split", "t.merge", "moe.row_scale", "moe.row_dot", "kern.pointwise")
_ALWAYS_AN_EXPERT = ("topk", "first", "group_limited", "topk_per_group")


def leak(graph: Graph, op: Op) -> str:
    """Who would read rows that the kernel of a product leaves unwritten; empty if nobody does."""
    if op.body is None or not _may_have_none(graph, op):
        return ""
    readers, stack, seen = users(graph), list(op.results), set[Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in graph.returned:
            return "the result of the graph"
        for reader in readers.get(value, []):
            if _is_sink(reader, value):
                continue
            if reader.kind not in _ROW_BY_ROW and not opdef(reader.kind).pointwise:
                return reader.kind
            stack += reader.results
    return ""


def _is_sink(reader: Op, value: Value) -> bool:
    if reader.kind in _BY_EXPERT:
        return True
    if reader.kind == "kern.pointwise" and reader.body is not None:
        return _is_unpermuted(reader, reader.body, value)
    if reader.kind == "kern.combine" and reader.body is not None:
        (anchor,) = (o for o in reader.body.ops if o.kind == "moe.combine")
        inner = dict(zip(reader.operands, reader.body.inputs, strict=True))
        return anchor.operands[0] is inner[value]
    at = [i for i, v in enumerate(reader.operands) if v is value]
    return all(i in _SINKS.get(reader.kind, ()) for i in at)


def _is_unpermuted(reader: Op, body: Graph, value: Value) -> bool:
    """Whether a kernel takes the rows of pairs and no others."""
    inside = users(body)
    inputs = [i for i, v in zip(body.inputs, reader.operands, strict=True) if v is value]
    taken = [(op, i) for i in inputs for op in inside.get(i, [])]
    return bool(taken) and all(o.kind == "moe.unpermute" and o.operands[0] is i for o, i in taken)


def _may_have_none(graph: Graph, op: Op) -> bool:
    """Whether some pair may go to no expert."""
    if op.body is None:
        return True
    (product,) = (o for o in op.body.ops if o.kind == "moe.grouped_mm")
    outer = dict(zip(op.body.inputs, op.operands, strict=True))
    made = producers(graph)
    source = made.get(outer.get(product.operands[2], product.operands[2]))
    if source is None:
        return True
    if source.kind in ("moe.dispatch_picks", "moe.one_group"):
        return False
    inside = producers(source.body) if source.body is not None else made
    dispatches = [o for o in (source.body or graph).ops if o.kind == "moe.dispatch"]
    given = dict(zip(source.body.inputs, source.operands, strict=True)) if source.body else {}
    selects = [_source(o.operands[0], {**made, **inside}, given) for o in dispatches]
    return not selects or any(
        s is None or s.kind != "moe.select" or s.attrs.get("mode", "topk") not in _ALWAYS_AN_EXPERT
        for s in selects
    )


def _source(index: Value, made: dict[Value, Op], given: dict[Value, Value]) -> Op | None:
    """What made indices; rounding moves choices and gives up none."""
    op = made.get(given.get(index, index))
    while op is not None and op.kind == "moe.round_tokens":
        op = made.get(op.operands[0])
    return op

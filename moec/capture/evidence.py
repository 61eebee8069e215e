"""Whether a captured graph weighs or picks experts, or only holds weights of a like shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moec.errors import CaptureError
from moec.ir.graph import Graph, Op, Value

# Ops that bring scores, or what is computed from them, together with what they weigh or pick.
_MIXING = {
    "t.mul",
    "t.matmul",
    "t.linear",
    "t.where",
    "t.take",
    "t.gather",
    "t.index_add",
    "moe.grouped_mm",
    "moe.dispatch",
}


def refuse_without_scores(graph: Graph, data: int, sizes: Collection[int]) -> None:
    """Raise :class:`CaptureError` unless scores of experts, or an argument that names them, decide
    what is computed.

    ``data`` is the number of inputs that are no weights; scores have an axis of one of ``sizes``.
    """
    scores = [*graph.inputs[1:data], *_scores(graph, data, sizes)]
    if not any(_mixes(graph, value, sizes) for value in scores):
        raise CaptureError("nothing in it weighs or picks its experts")


def _scores(graph: Graph, data: int, sizes: Collection[int]) -> list[Value]:
    """Values computed from the tokens with an axis for the experts."""
    depends: set[Value] = set(graph.inputs[:data])
    found = []
    for op in graph.ops:
        if not any(v in depends for v in op.operands):
            continue
        depends.update(op.results)
        found += [r for r in op.results if r.type.rank and set(r.type.shape[-2:]) & set(sizes)]
    return found


def _mixes(graph: Graph, source: Value, sizes: Collection[int]) -> bool:
    """Whether what follows from ``source`` meets something else in a product or a selection."""
    follows = {source}
    for op in graph.ops:
        if not any(v in follows for v in op.operands):
            continue
        if op.kind in _MIXING and _meets(op, follows, graph.inputs, sizes):
            return True
        follows.update(op.results)
    return False


def _meets(
    op: Op, follows: Collection[Value], inputs: Sequence[Value], sizes: Collection[int]
) -> bool:
    others = [v for v in op.operands if v not in follows]
    if op.kind == "t.take" and op.operands[0] in inputs:
        return op.operands[0].type.shape[0] in sizes
    if op.kind == "t.linear":
        return False  # another layer
    return any(v.type.is_float and v.type.rank > 1 for v in others)


__all__ = ["refuse_without_scores"]

"""Recompute cheap forward values in the backward pass instead of keeping them."""

from __future__ import annotations

from moec.fuel import spend
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, backward_ops, producers
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.redone_scores import redone_scores
from moec.reasons import decline, fired

CHEAP = {
    "moe.gather",
    "moe.permute",
    "moe.row_scale",
    "moe.expert_rows",
    "t.split",
    "t.merge",
    "t.slice",
    "t.reshape",
    "t.permute",
    "t.expand",
    "t.full",
    "t.stack",
}


def is_cheap(op: Op) -> bool:
    """Whether an op costs less to redo than its result costs to keep."""
    return op.kind in CHEAP or opdef(op.kind).pointwise


@register("recompute")
def recompute(graph: Graph) -> Graph:
    """Redo pointwise work, gathers and reshapes in the backward pass.

    What is kept between forward and backward is then the results of products, of reductions and of
    routing. Indices, weights and the permutation are always kept: a recomputed value can never
    route differently. The scores of all experts are not kept: their gradient needs them, but they
    follow from logits, and these, where that is little work beside the experts', from tokens and
    router. Must come after the last common-subexpression elimination, which would undo it.
    """
    return _Recomputation(graph).run() if graph.cotangents else graph


class _Recomputation:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made = producers(graph)
        self.backward = backward_ops(graph)
        self.builder = Builder(graph.ranges)
        self.again: dict[Value, Value] = {}
        self.scores = redone_scores(graph, self.backward)

    def run(self) -> Graph:
        """Forward ops first, then the backward ops, each after the cheap forward values that it
        reads again.
        """
        self.builder.ops.extend(op for op in self.graph.ops if op not in self.backward)
        for op in self.graph.ops:
            if op in self.backward:
                self.builder.ops.append(self.on_recomputed(op))
        return self.graph.with_ops(self.builder.ops) if self.again else self.graph

    def on_recomputed(self, op: Op) -> Op:
        """A backward op on recomputed operands."""
        operands = tuple(self.value(v) for v in op.operands)
        return (
            op
            if operands == op.operands
            else Op(op.kind, operands, op.results, op.attrs, op.body, op.loc)
        )

    def value(self, value: Value) -> Value:
        """The value to use in the backward pass: itself, or its recomputation."""
        op = self.made.get(value)
        if op is None or op in self.backward:
            return value
        if not is_cheap(op) and op not in self.scores:
            decline(
                "redo", op, "kept, {} bytes: redoing {} takes longer", value.type.bytes, op.kind
            )
            return value
        if value not in self.again:
            if not spend(f"recompute: {op!r}"):
                return value
            fired("redo", op, "{} bytes are not kept", value.type.bytes)
            copied = self.builder.copy(op, [self.value(v) for v in op.operands])
            self.again.update(zip(op.results, copied.results, strict=True))
        return self.again[value]

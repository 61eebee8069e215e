"""Fuse the whole routing: scores, selection, weights and dispatch."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Neighbourhood, fuse, grow

_ROUTING = {"moe.activate", "moe.select", "moe.weight"}


@register("fuse-routing")
def fuse_routing(graph: Graph, *, max_experts: int = 1024) -> Graph:
    """Make the routing one kernel: logits in; indices, weights, offsets and permutation out.

    Anchored at ``moe.dispatch``. What comes before it joins as far as it is routing or pointwise
    work on ``[T, E]`` or ``[T, K]``; a router that was not recognised stays tensor ops, and the
    kernel is the dispatch alone. ``max_experts`` bounds the row that one program holds in
    registers.
    """
    for anchor in [op for op in graph.ops if op.kind == "moe.dispatch"]:
        graph = _fuse_one(graph, anchor, max_experts)
    return graph


def _fuse_one(graph: Graph, anchor: Op, max_experts: int) -> Graph:
    around = Neighbourhood(graph)
    tokens, choices = anchor.operands[0].type.shape
    experts = anchor.attrs["experts"]

    def fits(value: Value) -> bool:
        shape = value.type.shape
        return shape in ((), (experts,), (tokens, experts), (tokens, choices), (tokens, 1))

    def accept(op: Op) -> bool:
        routes = op.kind in _ROUTING or opdef(op.kind).pointwise
        return routes and experts <= max_experts and all(map(fits, (*op.operands, *op.results)))

    select = around.made.get(anchor.operands[0])
    if select is None or select.kind != "moe.select" or not accept(select):
        return fuse(graph, [anchor], "routing")
    members = _closure(around, anchor, accept)
    return fuse(graph, members, "routing", duplicated=_constants(around, members))


def _closure(around: Neighbourhood, anchor: Op, accept: object) -> list[Op]:
    """The selection with what feeds and follows it; scores stay readable from outside."""
    select = around.made[anchor.operands[0]]
    members = grow(around, select, accept, lambda op: False)  # type: ignore[arg-type]
    for op in _score_ops(around, members, accept):
        members.append(op)
    again = [op for op in around.graph.ops if op in members or op is anchor]
    weights = [
        op
        for op in around.graph.ops
        if op.kind == "moe.weight"
        and op not in again
        and accept(op)
        and op.operands[1] in select.results
    ]  # type: ignore[operator]
    return [op for op in around.graph.ops if op in again or op in weights]


def _score_ops(around: Neighbourhood, members: list[Op], accept: object) -> list[Op]:
    found: list[Op] = []
    stack = [v for m in members for v in m.operands]
    while stack:
        op = around.made.get(stack.pop())
        if op is None or op in members or op in found or op.kind == "t.full" or not accept(op):  # type: ignore[operator]
            continue
        if (op in around.backward) == (members[0] in around.backward):
            found.append(op)
            stack.extend(op.operands)
    return found


def _constants(around: Neighbourhood, members: list[Op]) -> list[Op]:
    made = (around.made.get(v) for m in members for v in m.operands)
    return [op for op in made if op is not None and op.kind == "t.full" and op not in members]

"""Fuse the whole routing: scores, selection, weights and dispatch."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Accept, Neighbourhood, constants_of, fuse, grow

_ROUTING = {"moe.activate", "moe.select", "moe.weight"}


@register("fuse-routing")
def fuse_routing(graph: Graph, *, max_experts: int = 1024) -> Graph:
    """Make the routing one kernel: logits in; indices, weights, offsets and permutation out.

    Anchored at ``moe.dispatch``. What comes before it joins as far as it is routing or pointwise
    work on ``[T, E]`` or ``[T, K]``; a router that was not recognised stays tensor ops, and the
    kernel is the dispatch alone. ``max_experts`` bounds the row that one program holds in
    registers.
    """
    while True:
        anchor = next((op for op in graph.ops if op.kind == "moe.dispatch"), None)
        if anchor is None:
            return graph
        fused = _fuse_one(graph, anchor, max_experts)
        if fused is graph:
            return graph
        graph = fused


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
    members = _closure(around, anchor, select, accept)
    return fuse(graph, members, "routing", duplicated=constants_of(around, members))


def _closure(around: Neighbourhood, anchor: Op, select: Op, accept: Accept) -> list[Op]:
    """The selection with what feeds and follows it; scores stay readable from outside."""
    members = [*grow(around, select, accept, lambda op: False), anchor]
    for op in _score_ops(around, members, accept):
        if around.convex([*members, op]):
            members.append(op)
    for op in around.graph.ops:
        weighs = op.kind == "moe.weight" and op.operands[1] in select.results
        if weighs and op not in members and accept(op) and around.convex([*members, op]):
            members.append(op)
    return members


def _score_ops(around: Neighbourhood, members: list[Op], accept: Accept) -> list[Op]:
    """What makes the scores, nearest first."""
    found: list[Op] = []
    stack = [v for m in members for v in m.operands]
    while stack:
        op = around.made.get(stack.pop(0))
        known = op is None or op in members or op in found or op.kind == "t.full"
        if op is None or known or not accept(op):
            continue
        if (op in around.backward) == (members[0] in around.backward):
            found.append(op)
            stack.extend(op.operands)
    return found

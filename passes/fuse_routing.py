"""Fuse the whole routing: scores, selection, weights and dispatch."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.clusters import Neighbourhood, Refuse, constants_of, fuse, grow, not_pointwise
from moec.reasons import decline

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

    def refuse(op: Op) -> str:
        if op.kind not in _ROUTING and not opdef(op.kind).pointwise:
            return not_pointwise(op)
        if experts > max_experts:
            return "a row of that many experts does not fit into registers (max-experts)"
        fitting = all(map(fits, (*op.operands, *op.results)))
        return "" if fitting else "it works on other values than [T, E], [T, K], [T, 1] and [E]"

    select = around.made.get(anchor.operands[0])
    problem = _problem_of_selection(select) or (refuse(select) if select is not None else "")
    if problem or select is None:
        decline("fuse routing", anchor, "the kernel is the dispatch alone: {}", problem)
        return fuse(graph, [anchor], "routing")
    members = _closure(around, anchor, select, refuse)
    return fuse(graph, members, "routing", duplicated=constants_of(around, members))


def _problem_of_selection(select: Op | None) -> str:
    if select is None:
        return "its indices are an input"
    return "" if select.kind == "moe.select" else f"its indices come from {select.kind}"


def _closure(around: Neighbourhood, anchor: Op, select: Op, refuse: Refuse) -> list[Op]:
    """The selection with what feeds and follows it; scores stay readable from outside."""
    members = [*grow(around, select, refuse, lambda op: "only what follows joins"), anchor]
    for op in _score_ops(around, members, refuse):
        if around.convex([*members, op]):
            members.append(op)
    for op in around.graph.ops:
        weighs = op.kind == "moe.weight" and op.operands[1] in select.results
        if weighs and op not in members and not refuse(op) and around.convex([*members, op]):
            members.append(op)
    return members


def _score_ops(around: Neighbourhood, members: list[Op], refuse: Refuse) -> list[Op]:
    """What makes the scores, nearest first."""
    found: list[Op] = []
    stack = [v for m in members for v in m.operands]
    while stack:
        op = around.made.get(stack.pop(0))
        known = op is None or op in members or op in found or op.kind == "t.full"
        if op is None or known:
            continue
        problem = refuse(op)
        if problem:
            decline("join", op, problem, near=members[0])
            continue
        if (op in around.backward) == (members[0] in around.backward):
            found.append(op)
            stack.extend(op.operands)
    return found

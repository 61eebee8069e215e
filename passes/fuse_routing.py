"""Fuse the whole routing: scores, selection, weights and dispatch."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.ops.token_work import CARRIERS, is_along
from moec.passes.clusters import Neighbourhood, Refuse, constants_of, fuse, grow, not_pointwise
from moec.reasons import decline

_ROUTING = {"moe.activate", "moe.select", "moe.weight"}


@register("fuse-routing")
def fuse_routing(graph: Graph, *, max_experts: int = 1024) -> Graph:
    """Make the routing one kernel: logits in; indices, weights, offsets and permutation out.

    Anchored at ``moe.dispatch``. What comes before it joins as far as it is routing, pointwise
    work, or work along one token's numbers, on ``[T, E]``, ``[T, K]`` or ``[T, 1]``; a router that
    was not recognised stays tensor ops, and the kernel is the dispatch alone. ``max_experts``
    bounds the row that one program holds in registers.
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
        wide = ((tokens, experts), (tokens, choices), (tokens, 1), (tokens,))
        return value.type.shape in ((), (experts,), *wide)

    def refuse(op: Op) -> str:
        if op.kind not in _ROUTING and not opdef(op.kind).pointwise and not is_along(op):
            return not_pointwise(op)
        if experts > max_experts:
            return "a row of that many experts does not fit into registers (max-experts)"
        fitting = all(map(fits, (*op.operands, *op.results)))
        return "" if fitting else "it works on other values than [T, E], [T, K], [T, 1] and [E]"

    limit = around.made.get(anchor.operands[0])
    ends = [anchor] if limit is None or limit.kind != "moe.limit" else [limit, anchor]
    made = _index_ops(around, ends, refuse)
    if isinstance(made, str):
        decline("fuse routing", anchor, "the kernel is the dispatch alone: {}", made)
        return fuse(graph, ends, "routing")
    members = _closure(around, ends, made, refuse)
    numbers = [op for op in graph.ops if _is_numbers(op, experts) and op not in members]
    duplicated = [*constants_of(around, members), *(op for op in numbers if _read(op, members))]
    return fuse(graph, members, "routing", duplicated=duplicated)


def _is_numbers(op: Op, experts: int) -> bool:
    """Whether an op makes the numbers of the experts."""
    plain = op.attrs.get("start", 0) == 0 and op.attrs.get("step", 1) == 1
    return op.kind == "t.arange" and plain and op.attrs["size"] == experts


def _read(op: Op, members: list[Op]) -> bool:
    return any(op.result in m.operands for m in members)


def _index_ops(around: Neighbourhood, ends: list[Op], refuse: Refuse) -> list[Op] | str:
    """The ops from the selection to the indices that the last ops read (the dispatch, or a capacity
    and the dispatch), in order; or why they cannot join.

    Where every expert has a mark of its own, there is no selection.
    """
    index, experts = ends[0].operands[0], ends[-1].attrs["experts"]
    if index not in around.made:
        return "its indices are an input"
    found: list[Op] = []
    pending = [index]
    while pending:
        op = around.made.get(pending.pop())
        if op is None or op in found or op.kind in ("t.full", "t.arange"):
            continue
        problem = refuse(op)
        if problem:
            if op is around.made[index]:
                return problem if op.kind == "moe.select" else f"its indices come from {op.kind}"
            continue
        found.append(op)
        pending += op.operands if op.kind != "moe.select" else ()
    selects = _selects_of(around, index)
    if len(selects) > 1:
        return "its indices come from several selections"
    if not selects and (len(ends) > 1 or not _is_marks(around, index, experts)):
        return f"its indices come from {around.made[index].kind}"
    if not around.convex([*found, *ends]):
        return "its indices also depend on what other tokens chose"
    order = {op: i for i, op in enumerate(around.graph.ops)}
    return sorted(found, key=order.__getitem__)


def _selects_of(around: Neighbourhood, index: Value) -> list[Op]:
    """The selections whose experts indices name."""
    pending, found = [index], dict[Op, None]()
    while pending:
        op = around.made.get(pending.pop())
        if op is not None and op.kind == "moe.select":
            found[op] = None
        elif op is not None:
            pending += [op.operands[place] for place in CARRIERS.get(op.kind, ())]
    return list(found)


def _is_marks(around: Neighbourhood, index: Value, experts: int) -> bool:
    """Whether there is a place for each expert, which holds it or none."""
    op = around.made.get(index)
    while op is not None and op.kind == "t.cast":
        op = around.made.get(op.operands[0])
    if op is None or op.kind != "t.where" or index.type.shape[1] != experts:
        return False
    kinds = set()
    for value in op.operands[1:]:
        source = around.made.get(value)
        while source is not None and source.kind == "t.cast":
            source = around.made.get(source.operands[0])
        numbers = source is not None and _is_numbers(source, experts)
        constant = source is not None and source.kind == "t.full"
        kinds.add("experts" if numbers else "constant" if constant else "")
    return kinds == {"constant", "experts"}


def _closure(around: Neighbourhood, ends: list[Op], index: list[Op], refuse: Refuse) -> list[Op]:
    """What makes the indices with what feeds and follows it; scores stay readable from outside."""
    first = next(iter(_selects_of(around, ends[0].operands[0])), index[-1])
    members = [*grow(around, first, refuse, lambda op: "only what follows joins"), *ends]
    members += [op for op in index if op not in members]
    for op in _score_ops(around, members, refuse):
        if around.convex([*members, op]):
            members.append(op)
    for op in around.graph.ops:
        weighs = op.kind == "moe.weight" and op.operands[1] in first.results
        if weighs and op not in members and not refuse(op) and around.convex([*members, op]):
            members.append(op)
    return members


def _score_ops(around: Neighbourhood, members: list[Op], refuse: Refuse) -> list[Op]:
    """What makes the scores, nearest first."""
    found: list[Op] = []
    stack = [v for m in members for v in m.operands]
    while stack:
        op = around.made.get(stack.pop(0))
        known = op is None or op in members or op in found or op.kind in ("t.full", "t.arange")
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

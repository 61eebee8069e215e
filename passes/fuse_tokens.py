"""Fuse a router's backward pass: small work on each token's scores and choices."""

from __future__ import annotations

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.manager import register
from moec.ops.token_work import is_along
from moec.passes.clusters import Neighbourhood, constants_of, fuse, grow


@register("fuse-tokens")
def fuse_tokens(graph: Graph, *, max_experts: int = 1024) -> Graph:
    """Make what turns gradients of routing weights into gradients of scores one kernel.

    Anchored at a ``t.scatter_add`` into ``[T, E]``. Pointwise work, sums over a token's numbers,
    gathers of scores by index and the gradients' way back from rows to pairs join it.
    ``max_experts`` bounds the row that one program holds in registers.
    """
    tried: set[Op] = set()
    while True:
        anchor = next((o for o in graph.ops if o not in tried and _spreads(o, max_experts)), None)
        if anchor is None:
            return graph
        tried.add(anchor)
        graph = _fuse_one(graph, anchor)


def _spreads(op: Op, most: int) -> bool:
    if op.kind != "t.scatter_add" or op.result.type.rank != 2 or not op.result.type.is_float:
        return False
    experts, choices = op.result.type.shape[1], op.operands[1].type.shape[-1]
    sizes = isinstance(experts, int) and isinstance(choices, int) and 1 < choices < experts <= most
    return sizes and op.attrs.get("dim") in (-1, 1)


def _fuse_one(graph: Graph, anchor: Op) -> Graph:
    around = Neighbourhood(graph)
    zeros = around.made.get(anchor.operands[0])
    if zeros is None or zeros.kind != "t.full" or zeros.attrs["value"] != 0:
        return graph
    tokens, experts = anchor.result.type.shape
    choices = anchor.operands[1].type.shape[1]
    shapes = ((), (tokens,), (tokens, 1), (tokens, experts), (tokens, choices))

    def fits(value: Value) -> bool:
        return value.type.shape in shapes

    def accept(op: Op) -> str:
        return "" if joins(op) else "it is no small work on each token's numbers"

    def joins(op: Op) -> bool:
        if op.kind == "moe.unpermute":
            return op.operands[0].type.rank == 1 and fits(op.result)
        if is_along(op):
            return all(map(fits, (*op.operands, *op.results)))
        if op.kind == "t.gather":
            return op.attrs["dim"] in (-1, 1) and all(map(fits, (*op.operands, op.result)))
        return opdef(op.kind).pointwise and all(map(fits, (*op.operands, *op.results)))

    members = grow(around, anchor, accept, accept)
    if len(members) < 2:
        return graph
    return fuse(graph, members, "pointwise", duplicated=constants_of(around, members))

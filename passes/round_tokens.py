"""Put token rounding behind selections: a routing that knows of the kernels' tiles."""

from __future__ import annotations

from typing import Any

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, producers
from moec.manager import register
from moec.ops.token_rounding import ROUNDS
from moec.reasons import decline
from moec.rewrite import transform

_MODES = ("topk", "first", "group_limited", "margin", "threshold")


@register("round-tokens", changes_meaning=True)
def round_tokens(graph: Graph, *, tile: int = 1, rounds: int = ROUNDS) -> Graph:
    """Let experts have a multiple of ``tile`` tokens, by other choices for a few of them.

    Changes the routing, so it is for training, where it is asked for. Each selection that a
    dispatch reads gets a ``moe.round_tokens`` behind it, and everything that read the indices reads
    the new ones: weights, and so gradients, are those of the rounded routing. A tile of 1 leaves
    the graph as it is.
    """
    if tile == 1:
        return graph
    made = producers(graph)
    wanted = {_selection(made, op) for op in graph.ops if op.kind == "moe.dispatch"} - {None}

    def rule(b: Builder, op: Op) -> Value | None:
        if op.kind != "moe.select" or op.result not in wanted:
            return None
        attrs: dict[str, Any] = {"tile": tile, "rounds": rounds}
        if op.attrs.get("mode") == "group_limited":
            attrs["groups"] = op.attrs["groups"]
        index = b("moe.select", *op.operands, hint=op.result.hint, **op.attrs)
        choice = b("t.add", *op.operands, hint="choice") if len(op.operands) > 1 else op.operands[0]
        rounded: Value = b("moe.round_tokens", index, choice, hint=op.result.hint, **attrs)
        return rounded

    return transform(graph, rule, "round-tokens")


def _selection(made: dict[Value, Op], dispatch: Op) -> Value | None:
    """The indices of the selection that a dispatch reads, if they can be rounded."""
    op = made.get(dispatch.operands[0])
    while op is not None and op.kind == "t.cast":
        op = made.get(op.operands[0])
    if op is not None and op.kind == "moe.round_tokens":
        return None
    if op is None or op.kind != "moe.select":
        source = "an input" if op is None else f"made by {op.kind}"
        decline("round tokens", dispatch, "its indices are {}, not a selection", source)
        return None
    if op.attrs.get("mode", "topk") not in _MODES:
        decline("round tokens", dispatch, "each choice has experts of its own")
        return None
    return op.result

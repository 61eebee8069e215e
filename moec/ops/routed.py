"""Gradients of pairs that a router left without an expert."""

from __future__ import annotations

from typing import Any

from moec.ir.graph import Value
from moec.ir.types import Type


def of_routed(b: Any, x: Value, inverse: Value) -> Value:
    """Numbers of pairs ``[T, K]``, zero for a pair without a row: what goes back to the rows of no
    expert must be zero, or it would count where a weight is shared by all rows.
    """
    if all_routed(b, inverse):
        return x
    unrouted = b("t.lt", inverse, other=0.0)
    masked: Value = b("t.where", unrouted, b.full(Type(x.type.dtype, ()), 0.0), x, hint=x.hint)
    return masked


def all_routed(b: Any, inverse: Value) -> bool:
    """Whether the router is known to choose an expert in every place."""
    op = b.made_by(inverse)
    while op is not None and op.kind in ("moe.dispatch", "t.cast", "moe.round_tokens"):
        op = b.made_by(op.operands[0])
    if op is None:
        return False
    whole = ("topk", "first", "group_limited", "topk_per_group")
    return op.kind == "t.topk" or (
        op.kind == "moe.select" and op.attrs.get("mode", "topk") in whole
    )


__all__ = ["all_routed", "of_routed"]

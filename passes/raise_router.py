"""Recognise routers: tensor ops around a dispatch become ``moe.`` routing ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, users
from moec.manager import register
from moec.rewrite import Definitions, fixpoint, transform

Lookup = Callable[[Value], Op | None]
RouterRule = Callable[[Builder, Op, Lookup], Any]


def _made_by(find: Lookup, value: Value, *kinds: str) -> Op | None:
    op = find(value)
    return op if op is not None and op.kind in kinds else None


def _is_last_axis(op: Op) -> bool:
    return op.attrs.get("dim", -1) in (-1, op.operands[0].type.rank - 1)


def _plain_weight(find: Lookup, value: Value) -> Op | None:
    op = _made_by(find, value, "moe.weight")
    return (
        op
        if op is not None
        and op.attrs.get("norm", "none") == "none"
        and op.attrs.get("scale", 1.0) == 1.0
        else None
    )


def select_from_topk(b: Builder, op: Op, find: Lookup) -> Any:
    """top-k of scores, of scores plus a bias, or of scores limited to the best groups, is a
    selection.
    """
    choice = op.operands[0]
    if choice.type.rank != 2 or not _is_last_axis(op) or not op.attrs.get("largest", True):
        return None
    limited = _limited_groups(find, choice)
    scores, attrs = (choice, {}) if limited is None else limited
    operands, plain = [scores], limited is None
    biased = _made_by(find, scores, "t.add")
    if (
        biased is not None
        and len(biased.operands) == 2
        and biased.operands[1].type.shape == (scores.type.shape[1],)
    ):
        operands, plain = list(biased.operands), False
    idx = b("moe.select", *operands, k=op.attrs["k"], hint="idx", **attrs)
    values = b(
        "moe.weight" if plain else "t.gather",
        scores,
        idx,
        hint=op.results[0].hint,
        **({} if plain else {"dim": -1}),
    )
    return values, b("t.cast", idx, dtype="i64", hint=op.results[1].hint)


def _limited_groups(find: Lookup, value: Value) -> tuple[Value, dict[str, Any]] | None:
    """Scores and attributes if ``value`` is ``where(not in a best group, fill, scores)``."""
    where = _made_by(find, value, "t.where")
    fill = None if where is None else _made_by(find, where.operands[1], "t.full")
    if where is None or fill is None:
        return None
    negated = _made_by(find, where.operands[0], "t.logical_not")
    mask = (
        _skip(find, negated.operands[0], "t.cast", "t.reshape", "t.expand")
        if negated is not None
        else None
    )
    scattered = _made_by(find, mask, "t.scatter") if mask is not None else None
    if (
        scattered is None
        or scattered.attrs.get("value") != 1.0
        or not _is_zero(find, scattered.operands[0])
    ):
        return None
    return _group_choice(find, scattered.operands[1], where.operands[2], fill.attrs["value"])


def _group_choice(
    find: Lookup, index: Value, scores: Value, fill: float
) -> tuple[Value, dict[str, Any]] | None:
    best = _made_by(find, _skip(find, index, "t.cast"), "t.topk")
    if best is None:
        return None
    scored = _made_by(find, best.operands[0], "t.sum", "t.amax")
    if (
        scored is None
        or scored.attrs["dims"] not in ((-1,), (2,))
        or scored.attrs.get("keepdim", False)
    ):
        return None
    source = scored.operands[0]
    if scored.kind == "t.sum":
        two = _made_by(find, source, "t.topk")
        if two is None or two.attrs["k"] != 2 or source is not two.results[0]:
            return None
        source = two.operands[0]
    if _skip(find, source, "t.reshape") is not _skip(find, scores, "t.reshape"):
        return None
    score = "sum_top2" if scored.kind == "t.sum" else "max"
    groups = source.type.shape[1]
    return scores, {
        "mode": "group_limited",
        "groups": groups,
        "topk_groups": best.attrs["k"],
        "group_score": score,
        "mask_value": fill,
    }


def _skip(find: Lookup, value: Value, *kinds: str) -> Value:
    op = _made_by(find, value, *kinds)
    return value if op is None else _skip(find, op.operands[0], *kinds)


def _is_zero(find: Lookup, value: Value) -> bool:
    op = _made_by(find, value, "t.full")
    return op is not None and op.attrs["value"] == 0


def weight_from_gather(b: Builder, op: Op, find: Lookup) -> Any:
    """Scores gathered at the selected experts are weights."""
    index = _skip(find, op.operands[1], "t.cast")
    if (
        _made_by(find, index, "moe.select") is None
        or not _is_last_axis(op)
        or op.operands[0].type.rank != 2
    ):
        return None
    return b("moe.weight", op.operands[0], index, hint=op.result.hint)


def weight_from_activation(b: Builder, op: Op, find: Lookup) -> Any:
    """softmax or sigmoid of the selected logits."""
    weight = _plain_weight(find, op.operands[0])
    if weight is None or weight.attrs.get("source", "gather") != "gather" or not _is_last_axis(op):
        return None
    return b("moe.weight", *weight.operands, source=op.kind[2:], hint=op.result.hint)


def weight_normalised(b: Builder, op: Op, find: Lookup) -> Any:
    """Weights divided by their sum, by their sum plus eps, or by their sum held above eps."""
    if len(op.operands) != 2:
        return None
    weight = _plain_weight(find, op.operands[0])
    bottom, norm, eps = op.operands[1], "sum", 0.0
    outer = _made_by(find, bottom, "t.add", "t.clamp")
    if outer is not None and len(outer.operands) == 1:
        eps = outer.attrs.get("other") if outer.kind == "t.add" else outer.attrs.get("min")
        norm = "sum" if outer.kind == "t.add" else "clamp_min"
        if eps is None or "max" in outer.attrs:
            return None
        bottom = outer.operands[0]
    total = _made_by(find, bottom, "t.sum")
    if (
        weight is None
        or total is None
        or total.operands[0] is not op.operands[0]
        or not total.attrs.get("keepdim")
    ):
        return None
    if total.attrs["dims"] not in ((-1,), (1,)):
        return None
    attrs = {k: v for k, v in weight.attrs.items() if k == "source"}
    return b(
        "moe.weight", *weight.operands, norm=norm, eps=float(eps), hint=op.result.hint, **attrs
    )


def weight_scaled(b: Builder, op: Op, find: Lookup) -> Any:
    """Weights times a constant."""
    weight = _made_by(find, op.operands[0], "moe.weight")
    if weight is None or len(op.operands) != 1 or weight.attrs.get("scale", 1.0) != 1.0:
        return None
    attrs = {k: v for k, v in weight.attrs.items() if k != "scale"}
    return b(
        "moe.weight", *weight.operands, scale=float(op.attrs["other"]), hint=op.result.hint, **attrs
    )


RULES: dict[str, tuple[RouterRule, ...]] = {
    "t.topk": (select_from_topk,),
    "t.gather": (weight_from_gather,),
    "t.softmax": (weight_from_activation,),
    "t.sigmoid": (weight_from_activation,),
    "t.div": (weight_normalised,),
    "t.mul": (weight_scaled,),
}


@register("raise-router")
def raise_router(graph: Graph) -> Graph:
    """Raise the tensor ops of a router to ``moe.activate``, ``moe.select`` and ``moe.weight``.

    Only top-k whose indices reach a dispatch take part. What no rule recognises stays tensor ops
    around the dispatch: right, only less fused.
    """
    routed = _values_reaching_dispatch(graph)
    raised = fixpoint(graph, lambda g: _apply(g, routed), "raise-router")
    return _raise_activation(raised)


def _values_reaching_dispatch(graph: Graph) -> frozenset[Value]:
    reach: set[Value] = {op.operands[0] for op in graph.ops if op.kind == "moe.dispatch"}
    for op in reversed(graph.ops):
        if op.kind in ("t.cast", "t.reshape") and op.result in reach:
            reach.add(op.operands[0])
    return frozenset(reach)


def _apply(graph: Graph, routed: frozenset[Value]) -> Graph:
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Any:
        if op.kind == "t.topk" and op.results[1] not in routed:
            return None
        for router_rule in RULES.get(op.kind, ()):
            found = router_rule(builder, op, lambda v: definitions.of(builder, v))
            if found is not None:
                return found
        return None

    return transform(graph, rule, "raise-router")


def _raise_activation(graph: Graph) -> Graph:
    """Scores that a selection or a weight reads, made by softmax, sigmoid or sqrt(softplus) of
    logits.
    """
    readers = users(graph)
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Any:
        if op.kind not in ("t.softmax", "t.sigmoid", "t.sqrt") or op.result.type.rank != 2:
            return None
        if not any(
            r.kind in ("moe.select", "moe.weight") and r.operands[0] is op.result
            for r in readers.get(op.result, [])
        ):
            return None
        if op.kind == "t.sqrt":
            inner = definitions.of(builder, op.operands[0])
            plain = inner is not None and inner.kind == "t.softplus" and not inner.attrs
            return (
                builder("moe.activate", inner.operands[0], fn="sqrtsoftplus", hint=op.result.hint)
                if plain and inner
                else None
            )
        if not _is_last_axis(op):
            return None
        return builder("moe.activate", op.operands[0], fn=op.kind[2:], hint=op.result.hint)

    return transform(graph, rule, "raise-router")

"""Recognise routers: tensor ops around a dispatch become ``moe.`` routing ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, users
from moec.manager import register
from moec.ops.token_work import reaching_dispatch
from moec.reasons import chose, decline
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


def select_from_argmax(b: Builder, op: Op, find: Lookup) -> Any:
    """The first place of the largest of a token's scores, as imported, is a selection of one."""
    scores = _argmax_of(find, op)
    if scores is None:
        return None
    idx = b("moe.select", scores, k=1, mode="first", hint="idx")
    return b("t.cast", idx, dtype="i64", hint=op.result.hint)


def _argmax_of(find: Lookup, op: Op) -> Value | None:
    """The scores whose largest is at the place that counts what comes before it: running sums of
    "is the largest, or NaN" that are still 0.
    """
    if op.attrs["dims"] not in ((-1,), (1,)) or not op.attrs.get("keepdim"):
        return None
    before = _made_by(find, _skip(find, op.operands[0], "t.cast"), "t.eq")
    if before is None or len(before.operands) != 1 or before.attrs["other"] != 0:
        return None
    so_far = _made_by(find, before.operands[0], "t.cumsum")
    found = so_far and _made_by(find, _skip(find, so_far.operands[0], "t.cast"), "t.logical_or")
    if so_far is None or not found or not _is_last_axis(so_far):
        return None
    largest, odd = (find(v) for v in found.operands)
    scores = odd.operands[0] if odd is not None and odd.kind == "t.ne" else None
    if scores is None or odd is None or odd.operands != (scores, scores) or scores.type.rank != 2:
        return None
    top = None if largest is None or largest.kind != "t.eq" else largest.operands
    made = None if top is None or len(top) != 2 else _made_by(find, top[1], "t.amax")
    if top is None or top[0] is not scores or made is None or made.operands[0] is not scores:
        return None
    kept = made.attrs.get("keepdim") and made.attrs["dims"] in ((-1,), (1,))
    return scores if kept else None


def select_from_sort(b: Builder, op: Op, find: Lookup) -> Any:
    """All of a token's scores, the largest first, are a selection of all experts."""
    scores = op.operands[0]
    experts = scores.type.shape[-1]
    if scores.type.rank != 2 or not isinstance(experts, int) or not _is_last_axis(op):
        return decline("select-from-sort", op, "it sorts no [tokens, experts] by expert")
    if not op.attrs.get("descending"):
        return decline("select-from-sort", op, "the smallest scores come first")
    idx = b("moe.select", scores, k=experts, mode="first", hint="idx")
    values = b("moe.weight", scores, idx, hint=op.results[0].hint)
    return values, b("t.cast", idx, dtype="i64", hint=op.results[1].hint)


def select_from_topk(b: Builder, op: Op, find: Lookup) -> Any:
    """top-k of scores, of scores plus a bias, or of scores limited to the best groups, is a
    selection.
    """
    choice = op.operands[0]
    if choice.type.rank != 2:
        return decline(_SELECT, op, "its scores {} are no [tokens, experts]", choice)
    if not _is_largest(op):
        return decline(_SELECT, op, "it takes the smallest, or along another axis than the last")
    limited = _limited_groups(find, choice)
    scores, attrs = limited or (choice, {})
    operands = _scores_and_bias(find, scores)
    idx = b("moe.select", *operands, k=op.attrs["k"], hint="idx", **attrs)
    hint = op.results[0].hint
    if limited is None and len(operands) == 1:
        values = b("moe.weight", scores, idx, hint=hint)
    else:  # the values are those that were compared, so they are no weights
        values = b("t.gather", choice, idx, dim=-1, hint=hint)
    return values, b("t.cast", idx, dtype="i64", hint=op.results[1].hint)


def _is_largest(op: Op) -> bool:
    return _is_last_axis(op) and bool(op.attrs.get("largest", True))


def _scores_and_bias(find: Lookup, scores: Value) -> list[Value]:
    """The scores, or the scores and the selection bias whose sum they are."""
    total = _made_by(find, scores, "t.add")
    if total is None or len(total.operands) != 2:
        return [scores]
    x, y = total.operands
    for plain, bias in ((x, y), (y, x)):
        if plain.type == scores.type and bias.type.shape == (scores.type.shape[1],):
            return [plain, bias]
    decline("selection-bias", total, "neither term is one number for each expert")
    return [scores]


def _limited_groups(find: Lookup, value: Value) -> tuple[Value, dict[str, Any]] | None:
    """Scores and attributes if ``value`` is ``where(not in a best group, fill, scores)``."""
    where = _made_by(find, value, "t.where")
    fill = None if where is None else _constant(find, where.operands[1])
    if where is None:
        return None
    if fill is None or where.operands[2].type != value.type:
        decline(_GROUPS, where, "what takes the place of left-out scores is no constant")
        return None
    negated = _made_by(find, where.operands[0], "t.logical_not")
    if negated is None:
        decline(_GROUPS, where, "its condition is no t.logical_not of a mask of groups")
        return None
    mask = _group_mask(find, negated.operands[0])
    if mask is None:
        words = "its mask is no scatter of ones at groups, repeated for their experts"
        decline(_GROUPS, where, words)
        return None
    found = _group_choice(find, mask, where.operands[2], fill)
    if found is None:
        decline(_GROUPS, where, "its groups are not the best by maximum or by sum of the best two")
    return found


def _constant(find: Lookup, value: Value) -> float | None:
    op = _made_by(find, _skip(find, value, "t.cast", "t.expand", "t.reshape"), "t.full")
    return None if op is None else float(op.attrs["value"])


def _group_mask(find: Lookup, mask: Value) -> Op | None:
    """The scatter of ones at the best groups ``[T, G]`` that ``mask`` repeats for their experts."""
    value, shapes = mask, [mask.type.shape]
    op = _made_by(find, value, "t.cast", "t.reshape", "t.expand")
    while op is not None:
        value = op.operands[0]
        shapes.append(value.type.shape)
        op = _made_by(find, value, "t.cast", "t.reshape", "t.expand")
    op = _made_by(find, value, "t.scatter")
    if op is None or op.attrs.get("value") != 1 or _constant(find, op.operands[0]) != 0:
        return None
    if value.type.rank != 2 or op.attrs["dim"] not in (-1, 1):
        return None
    (tokens, experts), groups = mask.type.shape, value.type.shape[1]
    if not isinstance(experts, int) or not isinstance(groups, int) or experts % groups:
        return None
    column, whole = (tokens, groups, 1), (tokens, groups, experts // groups)
    # each group's flag becomes a column and is repeated along it; any other way mixes groups up
    wanted = [(tokens, experts), whole, column, (tokens, groups)]
    return op if _without_repeats(shapes) == _without_repeats(wanted) else None


def _without_repeats(shapes: list[Any]) -> list[Any]:
    return [s for s, last in zip(shapes, [None, *shapes], strict=False) if s != last]


def _group_choice(
    find: Lookup, mask: Op, scores: Value, fill: float
) -> tuple[Value, dict[str, Any]] | None:
    """The attributes of a selection limited to the groups that ``mask`` marks."""
    index = _skip(find, mask.operands[1], "t.cast")
    best = _made_by(find, index, "t.topk")
    if best is None or index is not best.results[1] or not _is_largest(best):
        return None
    found = _group_score(find, best.operands[0])
    (tokens, experts), groups = scores.type.shape, mask.result.type.shape[1]
    if found is None or found[0].type.shape != (tokens, groups, _per_group(experts, groups)):
        return None
    if _skip(find, found[0], "t.reshape") is not _skip(find, scores, "t.reshape"):
        return None
    return scores, {
        "mode": "group_limited",
        "groups": groups,
        "topk_groups": best.attrs["k"],
        "group_score": found[1],
        "mask_value": fill,
    }


def _per_group(experts: Any, groups: Any) -> int:
    return int(experts) // int(groups)


def _group_score(find: Lookup, value: Value) -> tuple[Value, str] | None:
    """The scores by group whose maximum, or sum of the two largest, ``value`` is."""
    op = _made_by(find, value, "t.sum", "t.amax")
    if op is None or op.attrs["dims"] not in ((-1,), (2,)) or op.attrs.get("keepdim", False):
        return None
    source = op.operands[0]
    if op.kind == "t.amax":
        return source, "max"
    two = _made_by(find, source, "t.topk")
    if two is None or two.attrs["k"] != 2 or source is not two.results[0] or not _is_largest(two):
        return None
    return two.operands[0], "sum_top2"


def _skip(find: Lookup, value: Value, *kinds: str) -> Value:
    op = _made_by(find, value, *kinds)
    return value if op is None else _skip(find, op.operands[0], *kinds)


def weight_from_gather(b: Builder, op: Op, find: Lookup) -> Any:
    """Scores gathered at the selected experts are weights."""
    index = _skip(find, op.operands[1], "t.cast")
    if _made_by(find, index, "moe.select") is None:
        return decline("weight-from-gather", op, "its index {} is no selection of experts", index)
    if not _is_last_axis(op) or op.operands[0].type.rank != 2:
        return decline("weight-from-gather", op, "it does not gather experts of [tokens, experts]")
    return b("moe.weight", op.operands[0], index, hint=op.result.hint)


def weight_from_activation(b: Builder, op: Op, find: Lookup) -> Any:
    """softmax or sigmoid of the selected logits."""
    weight = _plain_weight(find, op.operands[0])
    if weight is None:
        return _decline_weight("weight-from-activation", op, find)
    if weight.attrs.get("source", "gather") != "gather" or not _is_last_axis(op):
        return decline(
            "weight-from-activation", op, "its weights went through an activation before"
        )
    return b("moe.weight", *weight.operands, source=op.kind[2:], hint=op.result.hint)


def weight_normalised(b: Builder, op: Op, find: Lookup) -> Any:
    """Weights divided by their sum, by their sum plus eps, or by their sum held above eps."""
    weight = _plain_weight(find, op.operands[0])
    if weight is None:
        return _decline_weight(_NORMALISED, op, find)
    if len(op.operands) != 2:
        return decline(_NORMALISED, op, "its divisor is a constant")
    total, norm, eps = _bottom(find, op.operands[1])
    made = _made_by(find, total, "t.sum")
    if made is None:
        return decline(_NORMALISED, op, "its divisor {} is no sum", total)
    if made.operands[0] is not op.operands[0]:
        return decline(_NORMALISED, op, "its divisor {} sums other values than it divides", total)
    if not made.attrs.get("keepdim") or made.attrs["dims"] not in ((-1,), (1,)):
        return decline(_NORMALISED, op, "its divisor {} is no sum over a token's choices", total)
    attrs: dict[str, Any] = {k: v for k, v in weight.attrs.items() if k == "source"}
    return b("moe.weight", *weight.operands, norm=norm, eps=eps, hint=op.result.hint, **attrs)


def _bottom(find: Lookup, value: Value) -> tuple[Value, str, float]:
    """A divisor: the sum in it, how the sum is kept from zero, and by how much."""
    op = _made_by(find, value, "t.add", "t.clamp")
    if op is None or len(op.operands) != 1:
        return value, "sum", 0.0
    if op.kind == "t.add":
        return op.operands[0], "sum", float(op.attrs["other"])
    if op.attrs.get("min") is None or op.attrs.get("max") is not None:
        return value, "sum", 0.0
    return op.operands[0], "clamp_min", float(op.attrs["min"])


def weight_scaled(b: Builder, op: Op, find: Lookup) -> Any:
    """Weights times a constant."""
    weight = _made_by(find, op.operands[0], "moe.weight")
    if weight is None:
        return None
    if len(op.operands) != 1 or weight.attrs.get("scale", 1.0) != 1.0:
        return decline(
            "weight-scaled", op, "it is no product with a constant, or is the second such product"
        )
    attrs = {k: v for k, v in weight.attrs.items() if k != "scale"}
    return b(
        "moe.weight", *weight.operands, scale=float(op.attrs["other"]), hint=op.result.hint, **attrs
    )


def _decline_weight(rule: str, op: Op, find: Lookup) -> None:
    """Note that weights were normalised or scaled before, if that is what hinders a rule."""
    if _made_by(find, op.operands[0], "moe.weight") is not None:
        decline(rule, op, "its weights were normalised or scaled before")


_SELECT, _GROUPS, _NORMALISED = "select-from-topk", "limit-groups", "weight-normalised"
RULES: dict[str, tuple[RouterRule, ...]] = {
    "t.topk": (select_from_topk,),
    "t.sort": (select_from_sort,),
    "t.sum": (select_from_argmax,),
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
    routed = reaching_dispatch(graph)
    raised = fixpoint(graph, lambda g: _apply(g, routed), "raise-router")
    return _raise_activation(raised)


def _apply(graph: Graph, routed: frozenset[Value]) -> Graph:
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Any:
        if op.kind in ("t.topk", "t.sort") and op.results[1] not in routed:
            return decline(_SELECT, op, "its indices reach no dispatch")
        for router_rule in RULES.get(op.kind, ()):
            found = router_rule(builder, op, lambda v: definitions.of(builder, v))
            if found is not None:
                chose(router_rule.__name__.replace("_", "-"))
                return found
        return None

    return transform(graph, rule, "raise-router")


def _raise_activation(graph: Graph) -> Graph:
    """Scores that a selection or a weight reads, made by an activation of logits."""
    readers = users(graph)
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Any:
        routers = [r for v in op.results for r in readers.get(v, []) if r.operands[0] is v]
        if not any(r.kind in ("moe.select", "moe.weight") for r in routers):
            return None
        found = _activation(op, lambda v: definitions.of(builder, v))
        if found is None:
            return _decline_activation(op)
        chose("score-activation")
        return builder("moe.activate", found[0], fn=found[1], hint=op.result.hint)

    return transform(graph, rule, "raise-router")


def _decline_activation(op: Op) -> None:
    if not op.kind.startswith("moe."):
        known = "softmax and sigmoid over experts, and the root of softplus"
        decline("score-activation", op, "{} makes the scores; known are {}", op.kind, known)


def _activation(op: Op, find: Lookup) -> tuple[Value, str] | None:
    """The logits and the name of the activation that makes scores of them."""
    if op.kind in ("t.softmax", "t.sigmoid") and op.result.type.rank == 2 and _is_last_axis(op):
        return op.operands[0], op.kind[2:]
    inner = _made_by(find, op.operands[0], "t.softplus") if op.kind == "t.sqrt" else None
    if inner is None or inner.attrs.get("beta", 1) != 1 or inner.attrs.get("threshold", 20) != 20:
        return None
    return inner.operands[0], "sqrtsoftplus"

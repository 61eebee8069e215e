"""Algebraic simplification: rules that are true for every input, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

from moec.ir.builder import Builder
from moec.ir.dims import canon
from moec.ir.graph import Graph, Op, Value, users
from moec.ir.types import FLOATS, SIZES
from moec.manager import register
from moec.rewrite import Definitions, fixpoint, transform

Simplification = Callable[[Builder, Op, Op | None], Value | None]
_EXACT = {
    ("bf16", "f32"),
    ("f16", "f32"),
    ("bf16", "f64"),
    ("f16", "f64"),
    ("f32", "f64"),
    ("i32", "i64"),
    ("i8", "i32"),
    ("u8", "i32"),
}


def same_shape(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """A reshape or expand to the shape that the operand has."""
    return op.operands[0] if op.operands[0].type.shape == op.result.type.shape else None


def reshape_of_reshape(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """Two reshapes in a row are the last one."""
    if inner is None or inner.kind != "t.reshape":
        return None
    value: Value = b("t.reshape", inner.operands[0], shape=op.attrs["shape"], hint=op.result.hint)
    return value


def identity_permute(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """A permutation that changes nothing, or two that are one."""
    dims = op.attrs["dims"]
    if dims == tuple(range(len(dims))):
        return op.operands[0]
    if inner is not None and inner.kind == "t.permute":
        first = inner.attrs["dims"]
        value: Value = b(
            "t.permute", inner.operands[0], dims=tuple(first[d] for d in dims), hint=op.result.hint
        )
        return value
    return None


def exact_cast(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """A cast to the same dtype, or back from a dtype that holds every number of the first."""
    x = op.operands[0]
    if x.type.dtype == op.result.type.dtype:
        return x
    if inner is not None and inner.kind == "t.cast":
        source = inner.operands[0]
        if source.type == op.result.type and (source.type.dtype, x.type.dtype) in _EXACT:
            return source
    return None


def double_negation(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """``-(-x)`` is ``x``."""
    return inner.operands[0] if inner is not None and inner.kind == op.kind else None


def times_one(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """``x * 1`` and ``x / 1`` are ``x``."""
    return op.operands[0] if op.attrs.get("other") == 1.0 else None


def product_of_transposed(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """A product with transposed weights is the other layout of the product."""
    made = b.made_by(op.operands[1])
    if made is None or made.kind != "t.permute" or made.attrs["dims"] != (0, 2, 1):
        return None
    flipped = not op.attrs.get("transposed", False)
    value: Value = b(
        "moe.grouped_mm",
        op.operands[0],
        made.operands[0],
        op.operands[2],
        transposed=flipped,
        hint=op.result.hint,
    )
    return value


RULES: dict[str, tuple[Simplification, ...]] = {
    "t.reshape": (same_shape, reshape_of_reshape),
    "t.expand": (same_shape,),
    "t.permute": (identity_permute,),
    "t.cast": (exact_cast,),
    "t.neg": (double_negation,),
    "t.logical_not": (double_negation,),
    "t.mul": (times_one,),
    "t.div": (times_one,),
    "moe.grouped_mm": (product_of_transposed,),
}


@register("simplify")
def simplify(graph: Graph) -> Graph:
    """Remove casts, reshapes and arithmetic that change nothing, and gather slices into splits.

    Every rule is exact: the result has the same bits.
    """
    return fixpoint(graph, lambda g: slices_to_splits(_apply_rules(g)), "simplify")


def _apply_rules(graph: Graph) -> Graph:
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Value | None:
        for simplification in RULES.get(op.kind, ()):
            inner = definitions.of(builder, op.operands[0])
            found = simplification(builder, op, inner)
            if found is not None:
                return found
        return None

    return transform(graph, rule, "simplify")


def slices_to_splits(graph: Graph) -> Graph:
    """Slices of the last axis that together are the whole become one ``t.split``."""
    for value, readers in users(graph).items():
        found = _split_of(value, [op for op in readers if op.kind == "t.slice"])
        if found is not None:
            return _replace_slices(graph, value, *found)
    return graph


def _split_of(value: Value, slices: list[Op]) -> tuple[str, dict[Value, int]] | None:
    size = value.type.shape[-1] if value.type.rank else 0
    if not isinstance(size, int):
        return None
    for parts in (2, 3, 4):
        if size % parts:
            continue
        for layout, place in (("concat", _concat_place), ("interleave", _interleave_place)):
            places = {op.result: place(op, value, size, parts) for op in slices}
            members = {v: p for v, p in places.items() if p is not None}
            if set(members.values()) == set(range(parts)):
                return layout, members
    return None


def _is_last(op: Op, value: Value) -> bool:
    return op.attrs["dim"] in (-1, value.type.rank - 1)


def _concat_place(op: Op, value: Value, size: int, parts: int) -> int | None:
    width = size // parts
    start, stop, step = op.attrs["start"], op.attrs["stop"], op.attrs.get("step", 1)
    aligned = _is_last(op, value) and step == 1 and start % width == 0 and stop == start + width
    return start // width if aligned else None


def _interleave_place(op: Op, value: Value, size: int, parts: int) -> int | None:
    start, stop, step = op.attrs["start"], op.attrs["stop"], op.attrs.get("step", 1)
    whole = (
        _is_last(op, value)
        and step == parts
        and start < parts
        and canon(op.result.type.shape[-1]) == size // parts
    )
    return start if whole and stop >= size - parts + start + 1 else None


def _replace_slices(graph: Graph, value: Value, layout: str, members: dict[Value, int]) -> Graph:
    results: dict[int, Value] = {}
    parts = len(set(members.values()))

    def rule(builder: Builder, op: Op) -> Value | None:
        if op.kind != "t.slice" or op.result not in members:
            return None
        if not results:
            hints = [v.hint for v in sorted(members, key=lambda v: members[v])]
            made = builder("t.split", value, parts=parts, layout=layout, hint=hints)
            results.update(enumerate(made))
        return results[members[op.result]]

    return transform(graph, rule, "simplify")


def exactly_held(source: str, target: str) -> bool:
    """Whether every number of ``source`` is a number of ``target``."""
    return source == target or (source, target) in _EXACT


__all__ = ["FLOATS", "SIZES", "exactly_held", "simplify"]

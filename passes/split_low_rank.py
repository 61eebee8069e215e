"""Products with ``W + B A``: the low-rank part by itself, instead of a sum as large as ``W``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value
from moec.manager import register
from moec.reasons import decline
from moec.rewrite import transform


@dataclass(frozen=True)
class Term:
    """A part of a sum of stacked matrices: ``scale * left @ right``, or ``scale * left`` alone."""

    left: Value
    right: Value | None = None
    scale: float = 1.0


@register("split-low-rank")
def split_low_rank(graph: Graph) -> Graph:
    """Make a grouped product with ``W + s * B A`` the sum of one with ``W`` and two narrow ones.

    Neither the sum, nor in the backward pass its gradient, is built then: both are as large as all
    experts' weights. A term counts as low-rank if its factors hold fewer numbers than it does, so
    the narrow products cost less than one with the term. Casts of a term become casts of its
    factors.
    """

    def rule(b: Builder, op: Op) -> Value | None:
        if op.kind != "moe.grouped_mm":
            return None
        terms = _terms(b, op.operands[1])
        if all(term.right is None for term in terms):
            return None
        return _sum_of_products(b, op, terms)

    return transform(graph, rule, "split-low-rank")


def _terms(b: Builder, value: Value) -> list[Term]:
    """The terms whose sum a stacked weight is; itself, if it is no sum with a low-rank term."""
    made = b.made_by(value)
    if made is None:
        return [Term(value)]
    if made.kind == "t.matmul":
        if _is_low_rank(*made.operands):
            return [Term(made.operands[0], made.operands[1])]
        decline("low-rank-term", made, "its factors hold as many numbers as the product, or more")
    if made.kind not in _LINEAR or any(v.type.rank != 3 for v in made.operands):
        return [Term(value)]
    if any(v.type.elements != value.type.elements for v in made.operands):  # one is spread
        decline("low-rank-sum", made, "a term is repeated to the size of the weights")
        return [Term(value)]
    inside = [_terms(b, v) for v in made.operands]
    found = _LINEAR[made.kind](b, made, *inside)
    low_rank = any(t.right is not None for terms in inside for t in terms)
    if low_rank and not found:
        decline("low-rank-sum", made, "it cannot be taken into the terms of its operands")
    return found if any(t.right is not None for t in found) else [Term(value)]


def _is_low_rank(left: Value, right: Value) -> bool:
    """Whether the factors of stacked matrices hold fewer numbers than their product."""
    if left.type.rank != 3 or right.type.rank != 3 or left.type.shape[0] != right.type.shape[0]:
        return False
    rows, rank, columns = (*left.type.shape[1:], right.type.shape[2])
    known = all(isinstance(size, int) for size in (rows, rank, columns))
    return known and int(rank) * (int(rows) + int(columns)) <= int(rows) * int(columns)


def _sum(b: Builder, op: Op, *inside: list[Term]) -> list[Term]:
    if len(inside) == 1:  # plus a number
        return []
    second = [replace(t, scale=-t.scale) for t in inside[1]] if op.kind == "t.sub" else inside[1]
    return [*inside[0], *second]


def _scaled(b: Builder, op: Op, *inside: list[Term]) -> list[Term]:
    if len(inside) != 1:  # a product of two matrices, number by number
        return []
    by = -1.0 if op.kind == "t.neg" else float(op.attrs["other"])
    by = 1 / by if op.kind == "t.div" and by else by
    return [replace(t, scale=t.scale * by) for t in inside[0]] if by else []


def _cast(b: Builder, op: Op, terms: list[Term]) -> list[Term]:
    """A cast of each term; none where a term without factors would be as large as the sum."""
    dtype = op.attrs["dtype"]
    uncast = [replace(t, left=_uncast(b, t.left, dtype)) if t.right is None else t for t in terms]
    if any(t.right is None and t.left.type.dtype != dtype for t in uncast):
        return []
    return [t if t.right is None else _with_dtype(b, t, dtype) for t in uncast]


def _uncast(b: Builder, value: Value, dtype: str) -> Value:
    """What a value was before a widening from ``dtype``, if it was one."""
    made = b.made_by(value)
    widened = made is not None and made.kind == "t.cast"
    if made is None or not widened or made.operands[0].type.dtype != dtype:
        return value
    return made.operands[0]


def _with_dtype(b: Builder, term: Term, dtype: str) -> Term:
    right = None if term.right is None else _in_dtype(b, term.right, dtype)
    return replace(term, left=_in_dtype(b, term.left, dtype), right=right)


def _in_dtype(b: Builder, value: Value, dtype: str) -> Value:
    if value.type.dtype == dtype:
        return value
    cast: Value = b("t.cast", value, dtype=dtype, hint=value.hint)
    return cast


def _transposed(b: Builder, op: Op, terms: list[Term]) -> list[Term]:
    if op.attrs["dims"] != (0, 2, 1):
        return []
    return [
        replace(
            t,
            left=_swap(b, t.left if t.right is None else t.right),
            right=None if t.right is None else _swap(b, t.left),
        )
        for t in terms
    ]


def _swap(b: Builder, value: Value) -> Value:
    swapped: Value = b("t.permute", value, dims=(0, 2, 1), hint=value.hint)
    return swapped


_LINEAR: dict[str, Callable[..., list[Term]]] = {
    "t.add": _sum,
    "t.sub": _sum,
    "t.mul": _scaled,
    "t.div": _scaled,
    "t.neg": _scaled,
    "t.cast": _cast,
    "t.permute": _transposed,
}


def _sum_of_products(b: Builder, op: Op, terms: Sequence[Term]) -> Value:
    x, _, offsets = op.operands
    transposed = bool(op.attrs.get("transposed", False))
    rest = _added(b, [t for t in terms if t.right is None])
    result = None if rest is None else _product(b, x, rest, offsets, transposed, op.result.hint)
    for term in terms:
        if term.right is not None:
            narrow = _narrow(b, op, term, transposed)
            result = narrow if result is None else b("t.add", result, narrow, hint=op.result.hint)
    if result is None:
        raise AssertionError("a sum has a term")
    return result


def _added(b: Builder, terms: Sequence[Term]) -> Value | None:
    """The terms without factors as one matrix."""
    result = None
    for term in terms:
        value = term.left if term.scale == 1 else b("t.mul", term.left, other=term.scale)
        result = value if result is None else b("t.add", result, value, hint=value.hint)
    return result


def _narrow(b: Builder, op: Op, term: Term, transposed: bool) -> Value:
    """``s * (x A') B'``: through the rank, the scale on the narrow rows."""
    x, _, offsets = op.operands
    term = _with_dtype(b, term, x.type.dtype)
    if term.right is None:
        raise AssertionError("a low-rank term has two factors")
    first, second = (term.left, term.right) if transposed else (term.right, term.left)
    inner = _product(b, x, first, offsets, transposed, "low_rank")
    if term.scale != 1:
        inner = b("t.mul", inner, other=term.scale, hint="low_rank")
    return _product(b, inner, second, offsets, transposed, "low_rank_rows")


def _product(b: Builder, x: Value, w: Value, offsets: Value, transposed: bool, hint: str) -> Value:
    product: Value = b("moe.grouped_mm", x, w, offsets, transposed=transposed, hint=hint)
    return product


__all__ = ["Term", "split_low_rank"]

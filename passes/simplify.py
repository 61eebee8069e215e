"""Algebraic simplification: rules that are true for every input, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.exact_gradients import has_smaller_floats
from moec.ir.builder import Builder
from moec.ir.dims import canon
from moec.ir.graph import Graph, Op, Value, users
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.dce import dce
from moec.rewrite import Definitions, fixpoint, transform

Simplification = Callable[[Builder, Op, Op | None], Value | Sequence[Value] | None]
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


def permute_of_ones(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """A permutation of what was reshaped to have axes of size 1 goes without them: an einsum makes
    such axes.
    """
    x, dims = op.operands[0], op.attrs["dims"]
    kept = [d for d in range(x.type.rank) if x.type.shape[d] != 1]
    if inner is None or inner.kind != "t.reshape" or len(kept) == x.type.rank:
        return None
    order = tuple(kept.index(d) for d in dims if d in kept)
    plain = b("t.reshape", x, shape=tuple(x.type.shape[d] for d in kept), hint=x.hint)
    permuted = b("t.permute", plain, dims=order, hint=op.result.hint)
    value: Value = b("t.reshape", permuted, shape=op.result.type.shape, hint=op.result.hint)
    return value


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


def split_of_merge(b: Builder, op: Op, inner: Op | None) -> Sequence[Value] | None:
    """Parts that were merged are the parts."""
    if inner is None or inner.kind != "t.merge" or len(inner.operands) != len(op.results):
        return None
    same = inner.attrs.get("layout", "concat") == op.attrs.get("layout", "concat")
    return inner.operands if same else None


def merge_of_split(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """All parts of a split, merged in order, are what was split."""
    if inner is None or inner.kind != "t.split" or inner.results != op.operands:
        return None
    same = inner.attrs.get("layout", "concat") == op.attrs.get("layout", "concat")
    return inner.operands[0] if same else None


def merge_of_sums(b: Builder, op: Op, inner: Op | None) -> Value | None:
    """Sums by expert of the parts, merged, are the sums of the merged parts: the bias gradient then
    reads what the weight gradient reads.
    """
    sums = [b.made_by(v) for v in op.operands]
    if inner is None or any(s is None or s.kind != "moe.group_sum" for s in sums):
        return None
    rows = [s.operands[0] for s in sums if s is not None and s.operands[1] is inner.operands[1]]
    if len(rows) != len(sums):
        return None
    merged = b("t.merge", *rows, layout=op.attrs.get("layout", "concat"))
    value: Value = b("moe.group_sum", merged, inner.operands[1], hint=op.result.hint)
    return value


RULES: dict[str, tuple[Simplification, ...]] = {
    "t.reshape": (same_shape, reshape_of_reshape),
    "t.expand": (same_shape,),
    "t.permute": (identity_permute, permute_of_ones),
    "t.cast": (exact_cast,),
    "t.neg": (double_negation,),
    "t.logical_not": (double_negation,),
    "t.split": (split_of_merge,),
    "t.merge": (merge_of_split, merge_of_sums),
    "t.mul": (times_one,),
    "t.div": (times_one,),
    "moe.grouped_mm": (product_of_transposed,),
}


@register("simplify")
def simplify(graph: Graph) -> Graph:
    """Remove casts, reshapes and arithmetic that change nothing, gather slices into splits, and
    move splits in front of pointwise work.

    Every rule is exact: the result has the same bits.
    """
    return fixpoint(graph, lambda g: splits_first(slices_to_splits(_apply_rules(g))), "simplify")


def _apply_rules(graph: Graph) -> Graph:
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Value | Sequence[Value] | None:
        for simplification in RULES.get(op.kind, ()):
            inner = definitions.of(builder, op.operands[0])
            found = simplification(builder, op, inner)
            if found is not None:
                return found
        return None

    return transform(graph, rule, "simplify")


def splits_first(graph: Graph) -> Graph:
    """The split of pointwise work, or of a bias's rows, that nothing else reads becomes the same
    work on the parts: there it fits behind the product that it follows.

    The gradient of what was spread over the parts is then summed part by part: not where it has to
    round as autograd's (see :mod:`moec.exact_gradients`).
    """
    if has_smaller_floats(graph):
        return graph
    readers = users(dce(graph))
    definitions = Definitions(graph)
    returned = set(graph.returned)

    def rule(builder: Builder, op: Op) -> Sequence[Value] | None:
        if op.kind != "t.split":
            return None
        inner = definitions.of(builder, op.operands[0])
        if inner is None or len(inner.results) != 1:
            return None
        # an op that this walk made is read by what takes its place: left for the next round
        alone = len(readers.get(inner.result, ())) == 1 and inner.result not in returned
        return _on_parts(builder, op, inner) if alone else None

    return transform(graph, rule, "simplify")


def _on_parts(b: Builder, split: Op, inner: Op) -> Sequence[Value] | None:
    """``inner`` on the parts of its operands; ``None`` if it is not the same on each column."""
    count, size = len(split.results), inner.result.type.shape[-1]
    if inner.kind == "moe.expert_rows":
        columns: tuple[Value, ...] = inner.operands[:1]
    elif opdef(inner.kind).pointwise:
        wide = (v for v in inner.operands if v.type.rank and v.type.shape[-1] == size)
        columns = tuple(dict.fromkeys(wide))
    else:
        return None
    if size == 1 or not columns:
        return None
    parts = {
        v: b("t.split", v, **split.attrs, hint=[r.hint for r in split.results]) for v in columns
    }
    return [
        b(
            inner.kind,
            *(parts[v][i] if v in parts else v for v in inner.operands),
            **inner.attrs,
            hint=split.results[i].hint,
        )
        for i in range(count)
    ]


def slices_to_splits(graph: Graph) -> Graph:
    """Slices of the last axis that together are the whole become one ``t.split``."""
    while True:
        new = _first_split(graph)
        if new is graph:
            return graph
        graph = new


def _first_split(graph: Graph) -> Graph:
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

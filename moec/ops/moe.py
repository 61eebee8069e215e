"""The ``moe.`` dialect: routing, dispatch, grouped products and combine.

Shapes: ``T`` tokens, ``E`` experts, ``K`` choices a token, ``A = K*T`` rows. An expert index of
``E`` means "no expert": such pairs come last in ``perm``, have ``inverse`` -1 and add nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.dims import Dim, canon
from moec.ir.graph import Op, Value
from moec.ir.opdef import defop
from moec.ir.prove import divisible
from moec.ir.types import DTYPES, Type
from moec.ops import routing
from moec.ops.routed import all_routed, of_routed
from moec.ops.shapes import require, same_dtype


def _in_groups(scores: Type, groups: int) -> bool:
    experts = scores.shape[-1]
    return isinstance(experts, int) and groups > 0 and experts % groups == 0


@defop("moe.activate")
class Activate:
    """Scores of router logits: ``fn`` is softmax, sigmoid, sqrtsoftplus or identity, over the last
    axis.

    ``groups`` splits the experts into that many prototypes with a softmax each (M6-T).
    """

    def infer(logits: Type, *, fn: str, groups: int = 1) -> Type:
        require(fn in routing.ACTIVATIONS, f"fn {fn!r} is none of {', '.join(routing.ACTIVATIONS)}")
        require(logits.is_float, f"needs floats, got {logits}")
        require(_in_groups(logits, groups), f"{groups} groups of {logits.shape[-1]} experts")
        return logits

    def eval(logits: torch.Tensor, *, fn: str, groups: int = 1) -> torch.Tensor:
        return routing.activate(logits, fn, groups)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (routing.activate_gradient(b, op, g),)


def _check_groups(scores: Type, groups: int, topk_groups: int, group_score: str) -> None:
    experts = scores.shape[-1]
    require(
        _in_groups(scores, groups) and 0 < topk_groups <= groups,
        f"{topk_groups} of {groups} groups of {experts} experts",
    )
    require(group_score in ("max", "sum_top2"), f"unknown group_score {group_score!r}")
    require(group_score == "max" or experts >= 2 * groups, "sum_top2 needs groups of two or more")


@defop("moe.select")
class Select:
    """Expert indices ``i32[T, K]`` from scores ``[T, E]`` and an optional selection bias ``[E]``;
    no gradient.

    ``mode``: topk; group_limited (only the ``topk_groups`` best of ``groups`` groups take part, a
    group's score being its ``group_score``: max or sum_top2; others get ``mask_value``);
    topk_per_group (the best of each prototype); margin (the second only if within ``theta`` of the
    first); threshold (all above ``theta``, at most ``k``). Places without an expert hold ``E``.
    Among equal scores any may win; generated kernels take the lowest index.
    """

    def infer(
        scores: Type,
        bias: Type | None = None,
        *,
        k: int,
        mode: str = "topk",
        groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "sum_top2",
        mask_value: float = float("-inf"),
        theta: float = 0.0,
    ) -> Type:
        require(scores.rank == 2, f"scores must be [T, E], got {scores}")
        require(mode in routing.MODES, f"mode {mode!r} is none of {', '.join(routing.MODES)}")
        require(0 < k <= scores.shape[-1], f"k = {k} of {scores.shape[-1]} experts")
        require(
            bias is None or bias.shape == scores.shape[1:], f"the bias {bias} for scores {scores}"
        )
        if mode == "topk_per_group":
            require(_in_groups(scores, k), f"{k} groups of {scores.shape[-1]} experts")
        if mode == "group_limited":
            _check_groups(scores, groups, topk_groups, group_score)
        return Type("i32", (scores.shape[0], k))

    def eval(
        scores: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        k: int,
        mode: str = "topk",
        **options: Any,
    ) -> torch.Tensor:
        choice = scores if bias is None else scores + bias
        return routing.select(choice, k, mode, options).int()


@defop("moe.weight")
class Weight:
    """Combine weights ``[T, K]`` of the chosen experts.

    ``source``: gather (the scores at idx), softmax or sigmoid of those; ``norm``: none, sum
    (``/(sum + eps)``) or clamp_min (``/max(sum, eps)``); then times ``scale``. ``no expert`` weighs
    0.
    """

    def infer(
        scores: Type,
        idx: Type,
        *,
        source: str = "gather",
        norm: str = "none",
        eps: float = 0.0,
        scale: float = 1.0,
    ) -> Type:
        require(source in ("gather", "softmax", "sigmoid"), f"unknown source {source!r}")
        require(norm in ("none", "sum", "clamp_min"), f"unknown norm {norm!r}")
        require(scores.is_float and scores.rank == 2, f"scores must be floats [T, E], got {scores}")
        require(
            idx.rank == 2 and idx.shape[0] == scores.shape[0] and idx.dtype in ("i32", "i64"),
            f"idx must be integers [T, K], got {idx} for scores {scores}",
        )
        return scores.with_shape(*idx.shape)

    def eval(
        scores: torch.Tensor,
        idx: torch.Tensor,
        *,
        source: str = "gather",
        norm: str = "none",
        eps: float = 0.0,
        scale: float = 1.0,
    ) -> torch.Tensor:
        return routing.weight(scores, idx.long(), source, norm, eps, scale)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None]:
        return routing.weight_gradient(b, op, g), None


@defop("moe.limit")
class Limit:
    """Capacity: indices beyond the first ``capacity`` pairs of an expert become ``E`` (dropped).

    ``order`` gives slots choice by choice ("choice_major") or token by token ("token_major").
    """

    def infer(idx: Type, *, experts: int, capacity: Dim, order: str = "choice_major") -> Type:
        require(order in ("choice_major", "token_major"), f"unknown order {order!r}")
        require(idx.dtype == "i32" and idx.rank == 2, f"idx must be i32[T, K], got {idx}")
        return idx

    def eval(
        idx: torch.Tensor, *, experts: int, capacity: int, order: str = "choice_major"
    ) -> torch.Tensor:
        return routing.limit(idx, experts, capacity, order)


@defop("moe.dispatch")
class Dispatch:
    """The order of rows by expert: ``perm: i32[A]``, ``offsets: i32[E+1]``, ``inverse: i32[T, K]``.

    ``perm[p]`` is the pair (token * K + choice) of row ``p``; pairs of one expert keep their order
    (stable). ``inverse`` is the row of each pair, -1 for none: where the index is no
    expert's, below 0 or ``E`` and above.
    """

    def infer(idx: Type, *, experts: int) -> tuple[Type, Type, Type]:
        require(idx.dtype == "i32" and idx.rank == 2, f"idx must be i32[T, K], got {idx}")
        return Type("i32", (canon(idx.elements),)), Type("i32", (experts + 1,)), idx

    def eval(idx: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, ...]:
        return routing.dispatch(idx, experts)


def _row_types(perm: Type, inverse: Type) -> Dim:
    require(
        perm.rank == 1 and inverse.rank == 2 and _match(perm.elements, inverse),
        f"perm {perm} and inverse {inverse} do not match",
    )
    return perm.shape[0]


def _match(rows: Dim, inverse: Type) -> bool:
    """Whether there is a row a pair, or as many rows for each expert (of experts' picks)."""
    experts = inverse.shape[1]
    return rows == inverse.elements or (isinstance(experts, int) and divisible(rows, experts))


@defop("moe.gather")
class Gather:
    """The token of each row: ``x[perm // K]``, ``[A, H]``."""

    def infer(x: Type, perm: Type, inverse: Type) -> Type:
        require(
            x.rank >= 1 and x.shape[0] == inverse.shape[0],
            f"{x} does not have one row per token of {inverse}",
        )
        return x.with_shape(_row_types(perm, inverse), *x.shape[1:])

    def eval(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, perm // max(inverse.shape[1], 1))

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        _, perm, inverse = op.operands
        return b("moe.combine", g, perm, inverse), None, None


@defop("moe.permute")
class Permute:
    """A number per pair ``[T, K]`` in the order of the rows ``[A]``."""

    def infer(x: Type, perm: Type, inverse: Type) -> Type:
        require(x.shape == inverse.shape, f"{x} is not one number per pair of {inverse}")
        return x.with_shape(_row_types(perm, inverse))

    def eval(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1).index_select(0, perm)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        _, perm, inverse = op.operands
        return b("moe.unpermute", g, perm, inverse), None, None


@defop("moe.unpermute")
class Unpermute:
    """A number per row ``[A]`` back in the order of the pairs ``[T, K]``; 0 for a pair without a
    row.
    """

    def infer(x: Type, perm: Type, inverse: Type) -> Type:
        require(x.shape == perm.shape, f"{x} is not one number per row of {perm}")
        _row_types(perm, inverse)
        return x.with_shape(*inverse.shape)

    def eval(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return routing.rows_of_pairs(x, inverse)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        _, perm, inverse = op.operands
        return b("moe.permute", of_routed(b, g, inverse), perm, inverse), None, None


@defop("moe.combine")
class Combine:
    """``y[t] = sum_k w[t, k] * rows[inverse[t, k]]`` in the order of k; without ``w`` a plain sum.

    Sums in float32 (float64 for float64 rows) and rounds once, to ``dtype`` (default: the rows').
    """

    def infer(
        rows: Type, perm: Type, inverse: Type, w: Type | None = None, *, dtype: str | None = None
    ) -> Type:
        _row_types(perm, inverse)
        require(
            rows.rank == 2 and rows.shape[0] == perm.shape[0],
            f"rows {rows} do not match perm {perm}",
        )
        require(
            w is None or w.shape == inverse.shape, f"weights {w} do not match inverse {inverse}"
        )
        return Type(dtype or rows.dtype, (inverse.shape[0], rows.shape[1]))

    def eval(
        rows: torch.Tensor,
        perm: torch.Tensor,
        inverse: torch.Tensor,
        w: torch.Tensor | None = None,
        *,
        dtype: str | None = None,
    ) -> torch.Tensor:
        return routing.combine(rows, inverse, w, DTYPES[dtype] if dtype else rows.dtype)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        rows, perm, inverse = op.operands[:3]
        spread = b(
            "moe.gather",
            b("t.cast", g, dtype=rows.type.dtype) if g.type.dtype != rows.type.dtype else g,
            perm,
            inverse,
        )
        if len(op.operands) == 3 and all_routed(b, inverse):
            return spread, None, None
        w = (
            op.operands[3]
            if len(op.operands) == 4
            else b.full(g.type.with_shape(*inverse.type.shape), 1.0)
        )
        routed = of_routed(b, w, inverse)
        column = b("moe.permute", routed, perm, inverse)
        column = b("t.reshape", column, shape=(perm.type.shape[0], 1))
        d_rows = b("moe.row_scale", spread, column)
        if len(op.operands) == 3:
            return d_rows, None, None
        dots = b("moe.row_dot", rows, spread, dtype=w.type.dtype)
        return d_rows, None, None, b("moe.unpermute", dots, perm, inverse)


@defop("moe.row_scale")
class RowScale:
    """Rows ``[A, N]`` times a number each, ``[A, 1]`` of any float dtype; the result keeps the
    rows' dtype.
    """

    def infer(rows: Type, scale: Type) -> Type:
        require(
            rows.rank == 2 and scale.shape == (rows.shape[0], 1),
            f"{scale} is not one number per row of {rows}",
        )
        return rows

    def eval(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (rows * scale).to(rows.dtype)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, Value]:
        rows, scale = op.operands
        dots = b("moe.row_dot", rows, g, dtype=scale.type.dtype)
        return b("moe.row_scale", g, scale), b("t.reshape", dots, shape=scale.type.shape)


@defop("moe.row_dot")
class RowDot:
    """The inner product of each row of ``a`` with the same row of ``b``, ``[A]``, summed in
    float32, given as ``dtype``.
    """

    def infer(a: Type, b: Type, *, dtype: str) -> Type:
        require(a.shape == b.shape and a.rank == 2, f"{a} and {b} differ in shape or are no rows")
        return Type(dtype, (a.shape[0],))

    def eval(a: torch.Tensor, b: torch.Tensor, *, dtype: str) -> torch.Tensor:
        return (routing.accurate(a) * routing.accurate(b)).sum(-1).to(DTYPES[dtype])

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, Value]:
        x, y = op.operands
        column = b("t.reshape", g, shape=(g.type.shape[0], 1))
        pairs = ((y, x.type.dtype), (x, y.type.dtype))
        dx, dy = (
            b("moe.row_scale", v if v.type.dtype == d else b("t.cast", v, dtype=d), column)
            for v, d in pairs
        )
        return dx, dy


@defop("moe.grouped_mm")
class GroupedMM:
    """Each expert's rows times its matrix: ``x: [A, N_in]``, ``offsets: i32[E+1]``, result ``[A,
    N_out]``.

    ``w`` is ``[E, N_out, N_in]``, or ``[E, N_in, N_out]`` if ``transposed``. Rows of no expert give
    zeros.
    """

    def infer(x: Type, w: Type, offsets: Type, *, transposed: bool = False) -> Type:
        require(x.rank == 2 and w.rank == 3, f"needs x [A, N] and w [E, ., .], got {x} and {w}")
        inner, outer = (w.shape[1], w.shape[2]) if transposed else (w.shape[2], w.shape[1])
        require(x.shape[1] == inner, f"inner dimensions differ: {x.shape[1]} and {inner}")
        require(
            offsets.shape == (canon(w.shape[0] + 1),), f"offsets {offsets} for {w.shape[0]} experts"
        )
        same_dtype(x, w)
        return x.with_shape(x.shape[0], outer)

    def eval(
        x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, *, transposed: bool = False
    ) -> torch.Tensor:
        return routing.grouped_mm(x, w, offsets, transposed)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        x, w, offsets = op.operands
        transposed = bool(op.attrs.get("transposed", False))
        dx = b("moe.grouped_mm", g, w, offsets, transposed=not transposed)
        pair = (x, g) if transposed else (g, x)
        return dx, b("moe.grouped_outer", *pair, offsets), None

    def cost(op: Op) -> tuple[Dim, Dim]:
        x, w, _ = (v.type for v in op.operands)
        return canon(x.bytes + w.bytes + op.result.type.bytes), canon(
            2 * x.elements * op.result.type.shape[1]
        )


@defop("moe.grouped_outer")
class GroupedOuter:
    """Per expert ``a_rows.T @ b_rows``: ``a: [A, M]``, ``b: [A, N]``, result ``[E, M, N]``; zero
    for an empty expert.
    """

    def infer(a: Type, b: Type, offsets: Type) -> Type:
        require(
            a.rank == 2 and b.rank == 2 and a.shape[0] == b.shape[0],
            f"needs two matrices of equal rows, got {a} and {b}",
        )
        return Type(same_dtype(a, b), (canon(offsets.shape[0] - 1), a.shape[1], b.shape[1]))

    def eval(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return routing.grouped_outer(a, b, offsets)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        rows, columns, offsets = op.operands
        d_rows = b("moe.grouped_mm", columns, g, offsets)
        return d_rows, b("moe.grouped_mm", rows, g, offsets, transposed=True), None

    def cost(op: Op) -> tuple[Dim, Dim]:
        a, b, _ = (v.type for v in op.operands)
        return canon(a.bytes + b.bytes + op.result.type.bytes), canon(2 * a.elements * b.shape[1])


@defop("moe.expert_rows")
class ExpertRows:
    """The expert's vector for each row: ``b: [E, N]`` gives ``[A, N]`` (a bias)."""

    def infer(b: Type, offsets: Type, *, rows: Dim) -> Type:
        require(
            offsets.shape == (canon(b.shape[0] + 1),), f"offsets {offsets} for {b.shape[0]} experts"
        )
        return b.with_shape(rows, *b.shape[1:])

    def eval(b: torch.Tensor, offsets: torch.Tensor, *, rows: int) -> torch.Tensor:
        return b.index_select(0, routing.expert_of_rows(offsets, rows))

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None]:
        return b("moe.group_sum", g, op.operands[1]), None


@defop("moe.group_sum")
class GroupSum:
    """The sum of each expert's rows: ``x: [A, N]`` gives ``[E, N]``."""

    def infer(x: Type, offsets: Type) -> Type:
        require(x.rank == 2 and offsets.rank == 1, f"needs x [A, N], got {x} and {offsets}")
        return x.with_shape(canon(offsets.shape[0] - 1), *x.shape[1:])

    def eval(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return routing.group_sum(x, offsets)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None]:
        x, offsets = op.operands
        return b("moe.expert_rows", g, offsets, rows=x.type.shape[0]), None

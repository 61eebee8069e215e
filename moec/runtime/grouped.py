"""The ``moe.`` ops as library calls: what modules emitted for the ``aten`` target run.

No per-token work in Python: grouped products are one library call an expert on the CPU, and one in
all where PyTorch has a grouped kernel. ``w`` may be a tuple of one matrix an expert (see
:func:`stack`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moec.ops import routing
from moec.ops.backward import backward as _backward
from moec.ops.routing import combine as _combine
from moec.ops.routing import dispatch as _dispatch
from moec.ops.routing import dispatch_picks as _dispatch_picks
from moec.ops.token_rounding import ROUNDS
from moec.ops.token_rounding import round_tokens as _round_tokens
from moec.token_rounding import note

# Up to so many rows, products are rounded before they are added, as in eager's loop over experts;
# beyond, the fused sum saves an intermediate as large as all rows.
FEW_ROWS = 64

Weights = torch.Tensor | Sequence[torch.Tensor]


def backward(g: torch.Tensor, saved: torch.Tensor, *, of: str, **options: Any) -> torch.Tensor:
    """See ``t.backward``."""
    return _backward(g, saved, of, **options)


def activate(logits: torch.Tensor, *, fn: str, groups: int = 1) -> torch.Tensor:
    """See ``moe.activate``."""
    return routing.activate(logits, fn, groups)


def select(
    scores: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    k: int,
    mode: str = "topk",
    **options: Any,
) -> torch.Tensor:
    """See ``moe.select``."""
    return routing.select(scores if bias is None else scores + bias, k, mode, options).int()


def weight(
    scores: torch.Tensor,
    idx: torch.Tensor,
    *,
    source: str = "gather",
    norm: str = "none",
    eps: float = 0.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """See ``moe.weight``."""
    return routing.weight(scores, idx.long(), source, norm, eps, scale)


def limit(
    idx: torch.Tensor, *, experts: int, capacity: int, order: str = "choice_major"
) -> torch.Tensor:
    """See ``moe.limit``."""
    return routing.limit(idx, experts, capacity, order)


def round_tokens(
    idx: torch.Tensor, choice: torch.Tensor, *, tile: int, groups: int = 1, rounds: int = ROUNDS
) -> torch.Tensor:
    """See ``moe.round_tokens``."""
    rounded = _round_tokens(idx, choice, tile, groups, rounds)
    note(idx, rounded, choice.shape[1], tile)
    return rounded


def dispatch(idx: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``moe.dispatch``."""
    return _dispatch(idx, experts)


def dispatch_picks(
    picks: torch.Tensor, *, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``moe.dispatch_picks``."""
    return _dispatch_picks(picks, tokens)


def one_group(rows: int, device: torch.device) -> torch.Tensor:
    """See ``moe.one_group``."""
    return torch.arange(2, dtype=torch.int32, device=device).mul_(rows)


def gather(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """See ``moe.gather``."""
    return x.index_select(0, perm // max(inverse.shape[1], 1))


def permute(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """See ``moe.permute``."""
    return x.reshape(-1).index_select(0, perm)


def unpermute(x: torch.Tensor, perm: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """See ``moe.unpermute``."""
    return routing.rows_of_pairs(x, inverse)


def combine(
    rows: torch.Tensor,
    perm: torch.Tensor,
    inverse: torch.Tensor,
    w: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See ``moe.combine``; without an ``[T, K, H]`` intermediate on the CPU."""
    if rows.device.type != "cpu" or not rows.shape[0]:
        return _combine(rows, inverse, w, dtype or rows.dtype)
    if rows.dtype in (torch.bfloat16, torch.float16):
        return _combine_in_turn(rows, perm, inverse, w, dtype or rows.dtype)
    if inverse.numel() > rows.shape[0]:  # experts' picks: most places are empty
        return _combine_in_turn(rows, perm, inverse, w, dtype or rows.dtype)
    if rows.shape[0] <= FEW_ROWS:
        return _combine(rows, inverse, w, dtype or rows.dtype)
    weights = None if w is None else w.to(rows.dtype)
    if perm.shape[0] and int(inverse.min()) < 0:
        weights = torch.ones_like(inverse, dtype=rows.dtype) if weights is None else weights
        weights = weights.masked_fill(inverse < 0, 0)
        inverse = inverse.clamp(min=0)
    summed = torch.nn.functional.embedding_bag(
        inverse, rows, mode="sum", per_sample_weights=weights
    )
    return summed.to(dtype or rows.dtype)


def _combine_in_turn(
    rows: torch.Tensor,
    perm: torch.Tensor,
    inverse: torch.Tensor,
    w: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows added one expert after the other, each sum rounded: what eager's loop does, to the bit.

    In half precision another order moves results by more than all else that differs, enough for
    the next layer's router to choose another expert.
    """
    tokens, choices = inverse.shape
    pairs = perm.long()
    scaled = rows if w is None else rows * w.reshape(-1, 1)[pairs]
    kept = (inverse.reshape(-1)[pairs] >= 0).unsqueeze(-1)
    added = torch.where(kept, scaled, 0).to(dtype)
    total = torch.zeros(tokens, rows.shape[1], dtype=dtype)
    return total.index_add_(0, pairs // choices, added)


def row_scale(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See ``moe.row_scale``."""
    return (rows * scale).to(rows.dtype)


def row_dot(a: torch.Tensor, b: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """See ``moe.row_dot``."""
    return (routing.accurate(a) * routing.accurate(b)).sum(-1).to(dtype)


def stack(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Separate matrices of the experts: kept apart, since grouped products take them one by one."""
    return parts


def grouped_mm(
    x: torch.Tensor, w: Weights, offsets: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    """See ``moe.grouped_mm``."""
    first = w[0]
    out = x.new_empty(x.shape[0], first.shape[1] if transposed else first.shape[0])
    bounds = offsets.tolist()
    for e, (low, high) in enumerate(itertools.pairwise(bounds)):
        if high > low:
            torch.mm(x[low:high], w[e] if transposed else w[e].t(), out=out[low:high])
    if bounds[-1] < x.shape[0]:
        out[bounds[-1] :].zero_()
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See ``moe.grouped_outer``."""
    bounds = offsets.tolist()
    out = a.new_empty(len(bounds) - 1, a.shape[1], b.shape[1])
    for e, (low, high) in enumerate(itertools.pairwise(bounds)):
        if high > low:
            torch.mm(a[low:high].t(), b[low:high], out=out[e])
        else:
            out[e].zero_()
    return out


def expert_rows(b: Weights, offsets: torch.Tensor, *, rows: int) -> torch.Tensor:
    """See ``moe.expert_rows``."""
    table = b if isinstance(b, torch.Tensor) else torch.stack(tuple(b))
    return table.index_select(0, routing.expert_of_rows(offsets, rows))


def group_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """See ``moe.group_sum``."""
    return routing.group_sum(x, offsets)


def unslice(
    x: torch.Tensor, *, dim: int, start: int, stop: int, size: int, step: int = 1
) -> torch.Tensor:
    """See ``t.unslice``."""
    from moec.ir.opdef import opdef

    result: torch.Tensor = opdef("t.unslice").eval(
        x, dim=dim, start=start, stop=stop, size=size, step=step
    )
    return result


def one_hot(index: torch.Tensor, *, classes: int) -> torch.Tensor:
    """See ``t.one_hot``."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).long()

"""The meaning of the ``moe.`` ops in plain PyTorch, and the gradients of scores and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.graph import Op, Value
from moec.ir.types import Type

ACTIVATIONS = ("softmax", "sigmoid", "sqrtsoftplus", "identity")
_SOFTPLUS_THRESHOLD = 20.0  # PyTorch's default: softplus(x) is x above it
MODES = ("topk", "first", "group_limited", "topk_per_group", "margin", "threshold")


def accurate(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype in which sums are accumulated: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def grouped(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Scores ``[T, E]`` as ``[T, groups, E / groups]``."""
    return scores.reshape(*scores.shape[:-1], groups, scores.shape[-1] // groups)


def activate(logits: torch.Tensor, fn: str, groups: int) -> torch.Tensor:
    """Scores of logits ``[T, E]``."""
    if fn == "identity":
        return logits
    if fn == "sigmoid":
        return logits.sigmoid()
    if fn == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return grouped(logits, groups).softmax(-1).flatten(-2) if groups > 1 else logits.softmax(-1)


def activate_gradient(b: Any, op: Op, g: Value) -> Value:
    """The gradient of :func:`activate` with respect to the logits."""
    fn, groups, scores = op.attrs["fn"], op.attrs.get("groups", 1), op.result
    if fn == "identity":
        return g
    if fn == "sigmoid":
        # in the order of PyTorch's own gradient: the same bits in a float32 part of a float64 model
        return b("t.mul", b("t.mul", g, b("t.add", b("t.neg", scores), other=1.0)), scores)
    if fn == "sqrtsoftplus":
        return b("t.div", _softplus_slope(b, op.operands[0], g), b("t.mul", scores, other=2.0))
    shape = scores.type.shape
    split = (*shape[:-1], groups, shape[-1] // groups)
    weighted = b("t.mul", g, scores)
    parts = b("t.reshape", weighted, shape=split) if groups > 1 else weighted
    total = b("t.sum", parts, dims=(-1,), keepdim=True)
    if groups > 1:
        total = b("t.reshape", b("t.expand", total, shape=split), shape=shape)
    return b("t.sub", weighted, b("t.mul", scores, total))


def _softplus_slope(b: Any, logits: Value, g: Value) -> Value:
    """``g`` times the slope of the softplus, which is the identity above PyTorch's threshold."""
    steep = b("t.mul", g, b("t.sigmoid", logits))
    return b("t.where", b("t.gt", logits, other=_SOFTPLUS_THRESHOLD), g, steep)


def select(choice: torch.Tensor, k: int, mode: str, options: Mapping[str, Any]) -> torch.Tensor:
    """Indices ``[T, k]`` by mode; ``E`` where a place holds no expert."""
    experts = choice.shape[-1]
    if mode == "topk_per_group":
        groups = grouped(choice, k)
        return groups.argmax(-1) + torch.arange(k, device=choice.device) * groups.shape[-1]
    if mode == "group_limited":
        choice = limit_groups(choice, options)
    if mode == "first":
        if k == 1:
            return choice.argmax(-1, keepdim=True)
        return torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :k]
    values, idx = torch.topk(choice, k, dim=-1)
    if mode == "margin":
        idx = idx.masked_fill(values[:, :1] - values > options.get("theta", 0.0), experts)
    if mode == "threshold":
        idx = idx.masked_fill(values <= options.get("theta", 0.0), experts)
    return idx


def limit_groups(choice: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Scores with the experts outside the best groups set to ``mask_value``."""
    groups = grouped(choice, options["groups"])
    if options.get("group_score", "sum_top2") == "max":
        group_scores = groups.amax(-1)
    else:
        group_scores = groups.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(options.get("topk_groups", 1), dim=-1, sorted=False).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    return groups.masked_fill(
        ~keep.unsqueeze(-1), options.get("mask_value", float("-inf"))
    ).flatten(-2)


def weight(
    scores: torch.Tensor, idx: torch.Tensor, source: str, norm: str, eps: float, scale: float
) -> torch.Tensor:
    """Combine weights ``[T, K]``; see ``moe.weight``."""
    none = idx >= scores.shape[-1]
    w = scores.gather(-1, idx.masked_fill(none, 0))
    if source == "softmax":
        # a place without an expert takes no part; a row of only such places must not be 0 / 0
        w = w.masked_fill(none, -math.inf).masked_fill(none.all(-1, keepdim=True), 0).softmax(-1)
    w = w.sigmoid() if source == "sigmoid" else w
    w = w.masked_fill(none, 0)
    total = w.sum(-1, keepdim=True)
    if norm == "sum":
        w = w / (total + eps) if eps else w / total
    elif norm == "clamp_min":
        w = w / total.clamp(min=eps)
    w = w.masked_fill(none, 0)
    return w * scale if scale != 1.0 else w


def weight_gradient(b: Any, op: Op, g: Value) -> Value:
    """The gradient of :func:`weight` with respect to the scores."""
    scores, idx = op.operands
    attrs = op.attrs
    if attrs.get("scale", 1.0) != 1.0:
        g = b("t.mul", g, other=attrs["scale"])
    none = _no_expert(b, idx, scores.type.shape[-1])
    if none is not None:
        idx = b("t.clamp", idx, max=scores.type.shape[-1] - 1)
    picked = b("t.gather", scores, idx, dim=-1)
    g = _source_gradient(b, attrs, picked, none, g)
    if none is not None:
        g = _masked(b, none, g, 0.0)
    return b("t.scatter_add", b.full(scores.type, 0.0), idx, g, dim=-1)


def _source_gradient(
    b: Any, attrs: Mapping[str, Any], picked: Value, none: Value | None, g: Value
) -> Value:
    """The gradient through norm and source, given that with respect to the weights."""
    source, norm, eps = attrs.get("source", "gather"), attrs.get("norm", "none"), attrs.get("eps")
    raw = picked
    if source == "softmax":
        raw = b("t.softmax", _masked(b, none, picked, -math.inf), dim=-1)
    elif source == "sigmoid":
        raw = b("t.sigmoid", picked)
    raw = _masked(b, none, raw, 0.0)
    g = _norm_gradient(b, raw, g, norm, eps or 0.0)
    if source == "softmax":
        weighted = b("t.mul", g, raw)
        return b("t.sub", weighted, b("t.mul", raw, b("t.sum", weighted, dims=(-1,), keepdim=True)))
    if source == "sigmoid":
        return b("t.mul", b("t.mul", g, b("t.add", b("t.neg", raw), other=1.0)), raw)
    return g


def _no_expert(b: Any, idx: Value, experts: Any) -> Value | None:
    """Where ``idx`` holds no expert; ``None`` if a selection made it that always finds one."""
    made = b.made_by(idx)
    while made is not None and made.kind in ("t.cast", "moe.round_tokens"):
        made = b.made_by(made.operands[0])
    if made is not None and made.kind == "moe.select":
        if made.attrs.get("mode", "topk") not in ("margin", "threshold"):
            return None
    none: Value = b("t.ge", idx, other=experts)
    return none


def _masked(b: Any, none: Value | None, x: Value, value: float) -> Value:
    if none is None:
        return x
    masked: Value = b("t.where", none, b.full(Type(x.type.dtype, ()), value), x)
    return masked


def _norm_gradient(b: Any, raw: Value, g: Value, norm: str, eps: float) -> Value:
    if norm == "none":
        return g
    total = b("t.sum", raw, dims=(-1,), keepdim=True)
    bottom = total
    if norm == "clamp_min" or eps:
        bottom = b("t.add", total, other=eps) if norm == "sum" else b("t.clamp", total, min=eps)
    inner = b("t.sum", b("t.mul", g, b("t.div", raw, bottom)), dims=(-1,), keepdim=True)
    if norm == "clamp_min":
        inner = b(
            "t.where", b("t.ge", total, other=eps), inner, b.full(Type(g.type.dtype, ()), 0.0)
        )
    return b("t.div", b("t.sub", g, inner), bottom)


def limit(idx: torch.Tensor, experts: int, capacity: int, order: str) -> torch.Tensor:
    """Indices with those beyond an expert's capacity set to ``experts``."""
    flat = (idx.t() if order == "choice_major" else idx).reshape(-1)
    hits = F.one_hot(flat.long(), experts + 1)
    slot = (hits.cumsum(0) * hits).sum(-1)
    kept = torch.where((slot <= capacity) & (flat < experts), flat, experts)
    return (
        kept.reshape(idx.t().shape).t().contiguous()
        if order == "choice_major"
        else kept.reshape(idx.shape)
    )


def dispatch(idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``perm``, ``offsets``, ``inverse`` of indices ``[T, K]`` by one stable sort.

    An index that names no expert, ``E`` and above or below 0, gives a pair without a row.
    """
    flat = idx.reshape(-1)
    flat = flat.masked_fill(flat < 0, experts)
    ordered, perm = torch.sort(flat, stable=True)
    offsets = torch.searchsorted(
        ordered, torch.arange(experts + 1, device=idx.device, dtype=flat.dtype)
    ).int()
    inverse = torch.empty_like(perm).scatter_(
        0, perm, torch.arange(perm.shape[0], device=idx.device)
    )
    inverse = inverse.masked_fill(flat >= experts, -1)
    return perm.int(), offsets, inverse.int().reshape(idx.shape)


def dispatch_picks(
    picks: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``perm``, ``offsets`` and ``inverse`` of experts' picks ``[E, C]``."""
    experts, count = picks.shape
    expert = torch.arange(experts, dtype=torch.int32, device=picks.device)
    perm = (picks * experts + expert.unsqueeze(-1)).reshape(-1)
    offsets = torch.arange(experts + 1, dtype=torch.int32, device=picks.device) * count
    inverse = torch.full((tokens * experts,), -1, dtype=torch.int32, device=picks.device)
    rows = torch.arange(perm.shape[0], dtype=torch.int32, device=picks.device)
    return perm, offsets, inverse.scatter_(0, perm.long(), rows).view(tokens, experts)


def rows_of_pairs(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``rows[inverse]``, zero where ``inverse`` is -1."""
    flat = inverse.reshape(-1)
    if rows.shape[0] == 0:
        return rows.new_zeros(*inverse.shape, *rows.shape[1:])
    found = rows.index_select(0, flat.clamp(min=0))
    none = (flat < 0).reshape(-1, *[1] * (rows.dim() - 1))
    return found.masked_fill(none, 0).reshape(*inverse.shape, *rows.shape[1:])


def combine(
    rows: torch.Tensor, inverse: torch.Tensor, w: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``sum_k w[t, k] * rows[inverse[t, k]]``, accumulated in float32 or float64."""
    parts = accurate(rows_of_pairs(rows, inverse))
    if w is not None:
        parts = parts * accurate(w.masked_fill(inverse < 0, 0)).unsqueeze(-1)
    return parts.sum(1).to(dtype)


def grouped_mm(
    x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """One product per non-empty expert."""
    out = x.new_zeros(x.shape[0], w.shape[2] if transposed else w.shape[1])
    bounds = offsets.tolist()
    for e, (low, high) in enumerate(pairwise(bounds)):
        if high > low:
            out[low:high] = x[low:high] @ (w[e] if transposed else w[e].t())
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``a_rows.T @ b_rows`` per expert."""
    bounds = offsets.tolist()
    out = a.new_zeros(len(bounds) - 1, a.shape[1], b.shape[1])
    for e, (low, high) in enumerate(pairwise(bounds)):
        if high > low:
            out[e] = a[low:high].t() @ b[low:high]
    return out


def group_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The sum of each expert's rows."""
    bounds = offsets.tolist()
    return torch.stack([accurate(x[low:high]).sum(0) for low, high in pairwise(bounds)]).to(x.dtype)


def expert_of_rows(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The expert of each row (the last one for rows of no expert)."""
    index = torch.searchsorted(
        offsets[1:].contiguous(),
        torch.arange(rows, device=offsets.device, dtype=offsets.dtype),
        right=True,
    )
    return index.clamp(max=offsets.shape[0] - 2)

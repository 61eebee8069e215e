"""What an experts module is called with beside its tokens: indices and weights, or masks.

An index form says for each of a token's choices which expert it is. A mask form marks, for each
choice or for all of them at once, the experts that are chosen; it becomes indices in which "no
expert" stands for what is not marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moec.errors import CaptureError
from moec.ir.builder import Builder
from moec.ir.dims import Dim, canon
from moec.ir.graph import Value
from moec.ir.types import Type


@dataclass(frozen=True)
class Form:
    """A way to call experts. ``routing`` and ``weights`` name the axes of the two arguments:
    T tokens, K choices, E experts.

    ``choices`` is how often each token chooses in a recording.
    """

    routing: str
    weights: str
    choices: int = 1

    @property
    def is_mask(self) -> bool:
        """Whether the experts are marked, not numbered."""
        return self.routing.endswith("E")

    def route(self, rows: int, expert: int, experts: int) -> torch.Tensor:
        """The routing of a recording: every token to one expert."""
        return as_routing(self, torch.full((rows, self.choices), expert), experts)

    def shapes(self, tokens: Dim, choices: int, experts: int) -> tuple[tuple[Dim, ...], ...]:
        """The shapes of routing and weights; a mask for all choices at once has weights of one
        choice.
        """
        each = choices if "K" in self.routing else 1
        sizes: dict[str, Dim] = {"T": tokens, "K": each, "E": experts}
        return tuple(tuple(sizes[a] for a in axes) for axes in (self.routing, self.weights))


INDICES = Form("TK", "TK")
# Some loops do not run if each token chooses once only: here each chooses the same expert twice.
TWICE = Form("TK", "TK", 2)
# Each expert names its tokens, C of them.
PICKS, TURNED_PICKS = Form("EC", "EC"), Form("CE", "CE")
# Every expert on every token: the weights are also the routing.
ALL = Form("", "TE")
FORMS = (INDICES, TWICE, Form("TKE", "TK"), Form("TE", "TK"), Form("TE", "TE"))


def as_routing(form: Form, idx: torch.Tensor, experts: int) -> torch.Tensor:
    """Indices ``[T, K]`` as the routing argument of a form."""
    if not form.is_mask:
        return idx
    mask = F.one_hot(idx, experts)
    return mask if "K" in form.routing else mask.amax(1)


def planned(
    b: Builder, form: Form, routing: Value, w: Value, experts: int, tokens: Dim
) -> tuple[tuple[Value, Value, Value], Value]:
    """The order of the rows of a call and its weights ``[T, K]``."""
    hints = ("perm", "offsets", "inverse")
    if form != PICKS:
        idx, w = as_indices(b, form, routing, w, experts)
        return b("moe.dispatch", idx, experts=experts, hint=hints), w
    plan = b("moe.dispatch_picks", _narrow(b, routing), tokens=tokens, hint=hints)
    perm, _, inverse = plan
    rows = _reshaped(b, w, perm.type.shape)
    return plan, b("moe.unpermute", rows, perm, inverse, hint=w.hint)


def as_indices(
    b: Builder, form: Form, routing: Value, w: Value, experts: int
) -> tuple[Value, Value]:
    """Indices ``i32[T, K]`` and weights ``[T, K]`` of a call; ``experts`` means "no expert"."""
    if form == ALL:
        return _every(b, w), w
    if not form.is_mask:
        return _narrow(b, routing), w
    tokens = routing.type.shape[0]
    bound = choices_bound(b, routing)
    idx = _marked(b, routing, bound, experts)
    if form.weights == "TE" and bound == experts:
        pass  # a weight for each place
    elif form.weights == "TE":
        w = b("t.gather", w, b("t.clamp", idx, max=experts - 1), dim=-1, hint=w.hint)
    elif w.type.shape != idx.type.shape:
        column = b("t.reshape", w, shape=(*w.type.shape, 1)) if idx.type.rank == 3 else w
        w = b("t.expand", column, shape=idx.type.shape, hint=w.hint)
    pairs = (tokens, _pairs(idx.type.shape))
    return (
        _narrow(b, _reshaped(b, idx, pairs)),
        _reshaped(b, w, pairs),
    )


def _every(b: Builder, w: Value) -> Value:
    """Indices of all experts for each token."""
    ones = b.full(Type("i64", w.type.shape), 1)
    return _narrow(b, b("t.sub", b("t.cumsum", ones, dim=1), other=1, hint="idx"))


def _pairs(shape: Sequence[Dim]) -> Dim:
    count: Dim = 1
    for size in shape[1:]:
        count = canon(count * size)
    return count


def _reshaped(b: Builder, value: Value, shape: tuple[Dim, ...]) -> Value:
    if value.type.shape == shape:
        return value
    made: Value = b("t.reshape", value, shape=shape, hint=value.hint)
    return made


def _narrow(b: Builder, idx: Value) -> Value:
    if idx.type.dtype == "i32":
        return idx
    made: Value = b("t.cast", idx, dtype="i32", hint="idx")
    return made


def _marked(b: Builder, mask: Value, bound: int, experts: int) -> Value:
    """The marked experts of each row of a mask, at most ``bound``, then "no expert".

    Where all may be marked, each has a place of its own.
    """
    if mask.type.shape[-1] != experts:
        raise CaptureError(f"a mask of type {mask.type} for {experts} experts")
    if bound == experts:
        marked = mask if mask.type.dtype == "bool" else b("t.ne", mask, other=0.0)
        numbers = b("t.arange", size=experts, dtype="i32")
        return b("t.where", marked, numbers, b.full(Type("i32", ()), experts), hint="idx")  # type: ignore[no-any-return]
    marks = b("t.cast", b("t.ne", _numbers(b, mask), other=0.0), dtype="f32")
    found, place = b("t.topk", marks, k=bound, hint=("found", "place"))
    none = b("t.eq", found, other=0.0)
    idx: Value = b("t.where", none, b.full(Type("i64", ()), experts), place, hint="idx")
    return idx


def _numbers(b: Builder, mask: Value) -> Value:
    if mask.type.dtype != "bool":
        return mask
    made: Value = b("t.cast", mask, dtype="i32")
    return made


def choices_bound(b: Builder, value: Value) -> int:
    """How many elements along the last axis can differ from zero, at most."""
    size = value.type.shape[-1] if value.type.rank else 1
    if not isinstance(size, int):
        raise CaptureError(f"a mask of type {value.type}")
    return min(size, _bound(b, value, size))


def _bound(b: Builder, value: Value, size: int) -> int:
    op = b.made_by(value)
    if op is None:
        return size
    inputs = [v for v in op.operands if v.type.rank and v.type.shape[-1] == size]
    bounds = [_bound(b, v, size) for v in inputs if op.kind in _NARROWING | _JOINING]
    if op.kind == "t.one_hot":
        return 1
    if op.kind == "t.scatter" and op.attrs["dim"] in (-1, value.type.rank - 1):
        places = op.operands[1].type.shape[-1]
        return _bound(b, op.operands[0], size) + (places if isinstance(places, int) else size)
    if op.kind == "t.full" and op.attrs["value"] == 0:
        return 0
    if op.kind in _NARROWING and bounds:
        return min(bounds)
    if op.kind in _JOINING and len(bounds) == len(op.operands):
        return sum(bounds)
    if op.kind == "t.sum" and inputs:
        return _bound_of_sum(b, inputs[0], op.attrs["dims"], size)
    return size


def _bound_of_sum(b: Builder, value: Value, dims: Sequence[int], size: int) -> int:
    rank, terms = value.type.rank, 1
    for axis in dims:
        count = value.type.shape[axis]
        if axis % rank == rank - 1 or not isinstance(count, int):
            return size
        terms *= count
    return terms * _bound(b, value, size)


# Zero wherever one of the operands is zero; and zero wherever all are.
_NARROWING = {"t.mul", "t.logical_and", "t.cast", "t.neg", "t.abs", "t.reshape", "t.expand"}
_JOINING = {"t.add", "t.sub", "t.logical_or", "t.maximum"}

__all__ = [
    "ALL",
    "FORMS",
    "INDICES",
    "PICKS",
    "TURNED_PICKS",
    "TWICE",
    "Form",
    "as_indices",
    "as_routing",
    "choices_bound",
    "planned",
]

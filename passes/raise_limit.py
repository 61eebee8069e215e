"""Recognise the capacity of experts: running counts of what was chosen, compared with a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moec.ir.builder import Builder
from moec.ir.dims import Dim, canon
from moec.ir.graph import Graph, Op, Value, producers
from moec.manager import register
from moec.ops.token_work import reaching_dispatch
from moec.rewrite import transform

# What a value tells of each pair of a token and a choice. With an axis for the experts: HOT is 1 at
# the chosen expert, RUNNING counts how often each was chosen up to here, ON_HOT is that count at
# the chosen expert alone, INSIDE says whether the count is within the capacity, KEPT is HOT where
# it is. Without: INDEX is the expert, SLOT the count at it, KEEP whether it is within the capacity,
# PLACE the expert where it is.
HOT, RUNNING, ON_HOT, INSIDE, KEPT = "hot", "running", "on hot", "inside", "kept"
INDEX, SLOT, KEEP, PLACE = "index", "slot", "keep", "place"
_BY_EXPERT = (HOT, RUNNING, ON_HOT, INSIDE, KEPT)
_EXACT = ("i32", "i64", "f32", "f64", "bool")  # in which counts of pairs are exact


@dataclass(frozen=True)
class Form:
    """What a value tells of the pairs of ``index``: i32[T, K].

    ``turned``: pairs are listed choice by choice; ``by_choice``: they were counted so. Counts begin
    at ``1 + offset``; ``capacity`` is the number of pairs that an expert takes, ``negated`` marks
    the pairs beyond it.
    """

    kind: str
    index: Value
    experts: int
    turned: bool = False
    by_choice: bool = False
    offset: int = 0
    capacity: Dim | None = None
    negated: bool = False

    @property
    def limit(self) -> tuple[Value, Dim | None, bool]:
        """What the limit is of, and which."""
        return self.index, self.capacity, self.by_choice

    def fits(self, shape: tuple[Dim, ...]) -> bool:
        """Whether a shape lists the pairs in this order, with what each has."""
        tokens, choices = self.index.type.shape
        listed = (choices, tokens) if self.turned else (tokens, choices)
        pairs = {
            listed,
            (canon(tokens * choices),),
            *((tokens, 1), (1, tokens), (tokens,))[: 3 if choices == 1 else 0],
        }
        rests = ((self.experts,),) if self.kind in _BY_EXPERT else ((), (1,))
        return any(shape == (*p, *rest) for p in pairs for rest in rests)


@register("raise-limit")
def raise_limit(graph: Graph) -> Graph:
    """Raise the capacity of experts to ``moe.limit``.

    A pair counts if, among those that chose the same expert, no more than the capacity come before
    it: a running sum over one-hot choices, token by token or choice by choice, compared with a
    number or with one that follows from the sizes. Where such pairs lose their expert before a
    dispatch, that is ``moe.limit``, and masks of them follow from it. Counts in float32 are taken
    as exact.
    """
    forms = _Forms(graph)
    routed = reaching_dispatch(graph)
    limits = {
        form.limit
        for op in graph.ops
        if op.kind == "t.where" and op.result in routed
        for form in [forms.limited(op)]
        if form is not None
    }
    if not limits:
        return graph
    return transform(graph, lambda b, op: _rewritten(b, op, forms, limits), "raise-limit")


def _rewritten(b: Builder, op: Op, forms: _Forms, limits: set[Any]) -> Any:
    """An op whose results follow from a limit, made from it."""
    limited = forms.limited(forms.made[op.results[0]])
    if limited is not None and limited.limit in limits:
        index = _cast(b, _limit(b, limited), op.result.type.dtype)
        return _shaped(b, index, op.result)
    found = [forms.known.get(v) for v in op.results]
    first = found[0]
    if first is None or first.limit not in limits or first.kind not in (KEEP, KEPT):
        return None
    if op.kind not in forms.deciding:
        return None
    made = [_kept(b, first, op.results[0])]
    if len(op.results) == 2:  # top-k of marks: the second result is the expert where there is one
        place = b("t.clamp", _limit(b, first), max=first.experts - 1)
        made.append(_shaped(b, _cast(b, place, op.results[1].type.dtype), op.results[1]))
    return made


def _limit(b: Builder, form: Form) -> Value:
    order = "choice_major" if form.by_choice else "token_major"
    made: Value = b(
        "moe.limit",
        form.index,
        experts=form.experts,
        capacity=form.capacity,
        order=order,
        hint=form.index.hint,
    )
    return made


def _kept(b: Builder, form: Form, like: Value) -> Value:
    """Which pairs have a place, in the form and the layout of ``like``."""
    index = _limit(b, form)
    if form.turned and index.type.shape[1] != 1:
        index = b("t.permute", index, dims=(1, 0))
    if form.kind == KEPT:
        marks = b("t.one_hot", index, classes=form.experts)
    else:
        marks = b("t.ge" if form.negated else "t.lt", index, other=form.experts)
    return _cast(b, _shaped(b, marks, like), like.type.dtype)


def _shaped(b: Builder, value: Value, like: Value) -> Value:
    if value.type.shape == like.type.shape:
        return value
    made: Value = b("t.reshape", value, shape=like.type.shape, hint=value.hint)
    return made


def _cast(b: Builder, value: Value, dtype: str) -> Value:
    if value.type.dtype == dtype:
        return value
    made: Value = b("t.cast", value, dtype=dtype, hint=value.hint)
    return made


class _Forms:
    """What is known of the values of a graph."""

    deciding = frozenset({"t.lt", "t.le", "t.gt", "t.ge", "t.mul", "t.logical_and", "t.topk"})

    def __init__(self, graph: Graph) -> None:
        self.made = producers(graph)
        self.known: dict[Value, Form] = {}
        for op in graph.ops:
            for value, form in self._learn(op):
                if value.type.dtype in _EXACT and form.fits(value.type.shape):
                    self.known[value] = form

    def limited(self, op: Op) -> Form | None:
        """The form of the mask if an op takes pairs' experts from them by it."""
        if op.kind != "t.where":
            return None
        keep, *branches = (self.known.get(v) for v in op.operands)
        if keep is None or keep.kind != KEEP or (keep.turned and keep.index.type.shape[1] != 1):
            return None
        none, index = branches if keep.negated else branches[::-1]
        place = 1 if keep.negated else 2
        same = index is not None and index.kind in (INDEX, PLACE) and index.index is keep.index
        listed = replace(keep, kind=INDEX).fits(op.result.type.shape)
        if not same or none is not None or index is None or index.turned or not listed:
            return None
        return keep if self._number(op.operands[place]) == keep.experts else None

    def _number(self, value: Value) -> Dim | None:
        """A number in a tensor without axes, or a size."""
        op = self.made.get(value)
        while op is not None and op.kind in ("t.cast", "t.expand", "t.reshape"):
            op = self.made.get(op.operands[0])
        if op is not None and op.kind == "t.size":
            return canon(op.attrs["size"])
        if op is None or op.kind != "t.full" or float(op.attrs["value"]) % 1:
            return None
        return int(op.attrs["value"])

    def _learn(self, op: Op) -> Iterator[tuple[Value, Form]]:
        if op.kind == "moe.select":
            yield op.result, Form(INDEX, op.result, int(op.operands[0].type.shape[-1]))
            return
        learned = _LEARN.get(op.kind)
        if learned is not None:
            form = learned(self, op)
            if form is not None:
                yield op.results[0], form
                if op.kind == "t.topk":
                    yield op.results[1], replace(form, kind=PLACE)

    def of(self, op: Op, place: int = 0) -> Form | None:
        """What is known of an operand."""
        return self.known.get(op.operands[place]) if place < len(op.operands) else None


def _same(forms: _Forms, op: Op) -> Form | None:
    """A cast, or the same pairs in the same order in another shape."""
    return forms.of(op)


def _turn(forms: _Forms, op: Op) -> Form | None:
    """Tokens and choices change places."""
    form, dims = forms.of(op), tuple(op.attrs["dims"])
    if form is None or dims[:2] != (1, 0) or dims[2:] != tuple(range(2, len(dims))):
        return None
    choices = form.index.type.shape[1]
    return form if choices == 1 else replace(form, turned=not form.turned)


def _one_hot(forms: _Forms, op: Op) -> Form | None:
    form = forms.of(op)
    hot = form is not None and form.kind == INDEX and op.attrs["classes"] == form.experts
    return replace(form, kind=HOT) if form is not None and hot else None


def _scattered(forms: _Forms, op: Op) -> Form | None:
    """Ones at the chosen experts of zeros, as ``one_hot`` is recorded."""
    form = forms.of(op, 1)
    if form is None or form.kind != INDEX or op.operands[1].type.shape[-1] != 1:
        return None
    last = op.attrs["dim"] in (-1, op.result.type.rank - 1)
    ones = op.attrs.get("value") == 1 and forms._number(op.operands[0]) == 0
    return replace(form, kind=HOT) if last and ones else None


def _running(forms: _Forms, op: Op) -> Form | None:
    form = forms.of(op)
    if form is None or form.kind != HOT or op.attrs["dim"] % op.result.type.rank != 0:
        return None
    counted = replace(form, kind=RUNNING, by_choice=form.turned)
    return counted if op.result.type.rank == 2 else None


def _shifted(forms: _Forms, op: Op) -> Form | None:
    """Counts from zero in place of one."""
    form = forms.of(op)
    if form is None or form.kind not in (RUNNING, SLOT) or len(op.operands) != 1:
        return None
    by = op.attrs["other"] if op.kind == "t.add" else -op.attrs["other"]
    return replace(form, offset=form.offset + int(by)) if float(by) % 1 == 0 else None


def _product(forms: _Forms, op: Op) -> Form | None:
    """Counts at the chosen experts alone, or the chosen experts that have a place."""
    if len(op.operands) != 2:
        return None
    pair = [forms.of(op, 0), forms.of(op, 1)]
    for hot, other in (pair, pair[::-1]):
        if hot is None or other is None or hot.kind != HOT or other.negated:
            continue
        kinds = {RUNNING: ON_HOT, INSIDE: KEPT}
        same = (hot.index, hot.turned) == (other.index, other.turned)
        if same and other.kind in kinds:
            return replace(other, kind=kinds[other.kind])
    return None


def _summed(forms: _Forms, op: Op) -> Form | None:
    """One number a pair of what is zero but for the chosen expert."""
    form = forms.of(op)
    kinds = {ON_HOT: SLOT, KEPT: KEEP}
    last = [d % op.operands[0].type.rank for d in op.attrs["dims"]]
    if form is None or form.kind not in kinds or last != [op.operands[0].type.rank - 1]:
        return None
    return replace(form, kind=kinds[form.kind])


def _gathered(forms: _Forms, op: Op) -> Form | None:
    """The count at the chosen expert."""
    form, index = forms.of(op), forms.of(op, 1)
    if form is None or index is None or form.kind != RUNNING or index.kind != INDEX:
        return None
    last = op.attrs["dim"] in (-1, op.result.type.rank - 1)
    same = (form.index, form.turned) == (index.index, index.turned)
    return replace(form, kind=SLOT) if last and same else None


def _compared(forms: _Forms, op: Op) -> Form | None:
    """Counts compared with a limit."""
    form = forms.of(op)
    if form is None:
        return None
    if form.kind in (KEEP, KEPT) and op.kind == "t.gt":
        return form if op.attrs.get("other") == 0 else None
    if form.kind not in (SLOT, RUNNING, ON_HOT):
        return None
    number = forms._number(op.operands[1]) if len(op.operands) == 2 else _whole(op.attrs["other"])
    if number is None:
        return None
    below = op.kind in ("t.lt", "t.ge")  # of a count c + offset: c + offset < n is c <= n - ...
    capacity = canon(number - form.offset - (1 if below else 0))
    negated = op.kind in ("t.gt", "t.ge")
    kind = KEEP if form.kind == SLOT else INSIDE
    if form.kind == ON_HOT and negated:
        return None  # zero elsewhere, so false there
    return replace(form, kind=kind, offset=0, capacity=capacity, negated=negated)


def _whole(number: float) -> int | None:
    return int(number) if float(number) % 1 == 0 else None


def _negated(forms: _Forms, op: Op) -> Form | None:
    form = forms.of(op)
    return None if form is None or form.kind != KEEP else replace(form, negated=not form.negated)


def _equal(forms: _Forms, op: Op) -> Form | None:
    """A truth value compared with zero."""
    form = forms.of(op)
    if form is None or form.kind not in (KEEP, KEPT) or op.attrs.get("other") != 0:
        return None
    if op.kind == "t.ne":
        return form
    return replace(form, negated=not form.negated) if form.kind == KEEP else None


def _marked(forms: _Forms, op: Op) -> Form | None:
    """The only mark of a token with one choice, and where it is."""
    form = forms.of(op)
    one = form is not None and form.kind == KEPT and form.index.type.shape[1] == 1
    last = op.attrs.get("dim", -1) in (-1, op.operands[0].type.rank - 1)
    plain = op.attrs["k"] == 1 and last and op.attrs.get("largest", True)
    return replace(form, kind=KEEP) if form is not None and one and plain else None


_LEARN: dict[str, Any] = {
    "t.cast": _same,
    "t.reshape": _same,
    "t.permute": _turn,
    "t.one_hot": _one_hot,
    "t.scatter": _scattered,
    "t.cumsum": _running,
    "t.add": _shifted,
    "t.sub": _shifted,
    "t.mul": _product,
    "t.logical_and": _product,
    "t.sum": _summed,
    "t.gather": _gathered,
    **dict.fromkeys(("t.lt", "t.le", "t.gt", "t.ge"), _compared),
    "t.logical_not": _negated,
    "t.eq": _equal,
    "t.ne": _equal,
    "t.topk": _marked,
}

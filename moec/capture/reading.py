"""Reading an experts module: which form it is called in, and what groups of experts it has.

Most modules have one body for all experts. Where some experts compute something else (nothing, the
token itself), the experts are read in groups, each with a body of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

import torch
from torch import fx, nn

from moec import share
from moec.capture.counts import expert_counts, expert_keys, hidden_sizes
from moec.capture.experts import ExpertsBody, Span, read_span, record
from moec.capture.explained import with_ancestors
from moec.capture.forms import FORMS, INDICES, PICKS, Form, as_indices
from moec.capture.wrappers import core_of, plain_forward
from moec.errors import CaptureError
from moec.ir.builder import Builder
from moec.ir.graph import Value
from moec.ir.types import Type
from moec.structure import structure_key

_ROWS = 5
_MOST_GROUPS = 16  # each has a dispatch of its own


@dataclass(frozen=True)
class ExpertGroups:
    """Experts of several kinds, one after the other: the body of each kind, in order."""

    bodies: Sequence[ExpertsBody]
    experts: int
    hidden: int
    form: Form

    def inline(
        self,
        b: Builder,
        x: Value,
        idx: Value,
        w: Value,
        weight: Callable[[str], Value],
        form: Form | None = None,
    ) -> Value:
        """As :meth:`ExpertsBody.inline`: the sum over the groups, each with its own choices."""
        if form == PICKS:
            parts = [self._picking(b, body, x, idx, w, weight) for body in self.bodies]
        else:
            idx, w = as_indices(b, form or self.form, idx, w, self.experts)
            parts = [self._part(b, body, x, idx, w, weight) for body in self.bodies]
        total = parts[0]
        for part in parts[1:]:
            total = b("t.add", total, part, hint="routed")
        return total

    def _picking(
        self,
        b: Builder,
        body: ExpertsBody,
        x: Value,
        picks: Value,
        w: Value,
        weight: Callable[[str], Value],
    ) -> Value:
        """The part of a group's experts, which pick their tokens."""
        stop = body.first + body.experts
        own, weights = (b("t.slice", v, dim=0, start=body.first, stop=stop) for v in (picks, w))
        return body.inline(b, x, own, weights, weight, PICKS)

    def _part(
        self,
        b: Builder,
        body: ExpertsBody,
        x: Value,
        idx: Value,
        w: Value,
        weight: Callable[[str], Value],
    ) -> Value:
        local = b("t.sub", idx, other=body.first) if body.first else idx
        inside = b(
            "t.logical_and",
            b("t.ge", idx, other=body.first),
            b("t.lt", idx, other=body.first + body.experts),
        )
        none = b.full(Type("i32", ()), body.experts)
        return body.inline(b, x, b("t.where", inside, local, none, hint="idx"), w, weight)


def read_experts(module: nn.Module, path: str = "") -> ExpertsBody | ExpertGroups:
    """The body of an experts module; :class:`CaptureError` says why if there is none.

    The module's forward takes tokens ``[T, H]`` and then indices and weights, or masks and
    weights, in one of :data:`moec.capture.forms.FORMS`.
    """
    core = core_of(module) or module
    counts = expert_counts(core)
    if share.is_on_gpu(module) and _is_stacked(core, counts[0]):
        with contextlib.suppress(CaptureError):
            return _first_read(
                module, core, product(counts[:1], hidden_sizes(core), (INDICES,)), path
            )
    trial = share.trial_copy(module)
    core = core_of(trial) or trial
    return _first_read(trial, core, product(counts, hidden_sizes(core), FORMS), path)


def _is_stacked(module: nn.Module, experts: int) -> bool:
    """Whether a module holds stacked weights alone: then its indices are below ``experts``."""
    shapes = [p.shape for p in module.parameters()]
    return any(len(s) == 3 for s in shapes) and all(s[:1] == (experts,) for s in shapes)


def _first_read(
    module: nn.Module, core: nn.Module, tried: Iterable[tuple[int, int, Form]], path: str
) -> ExpertsBody | ExpertGroups:
    """The body by the first number of experts, width of tokens and form with which it is read."""
    refusals: list[CaptureError] = []
    reasons: dict[int, str] = {}
    for experts, hidden, form in tried:
        span = Span(0, experts, experts, form, hidden)
        try:
            with plain_forward(core):
                return _read(module, span, path)
        except CaptureError as error:
            refusals.append(error)
        except Exception as error:  # code that is no experts' may raise anything on such a call
            reasons.setdefault(hidden, f"{hidden}: {type(error).__name__}: {error}"[:200])
    if refusals:
        raise refusals[0]
    reason = "; ".join(reasons.values())
    raise CaptureError(f"{type(module).__name__} ran with no hidden size ({reason})")


def _read(module: nn.Module, span: Span, path: str) -> ExpertsBody | ExpertGroups:
    if not _differ(module, span.total):
        try:
            return read_span(module, span, path)
        except CaptureError:
            if len(_groups(module, span)) < 2:
                raise
    spans = _groups(module, span)
    if len(spans) > _MOST_GROUPS:
        raise CaptureError(
            f"{type(module).__name__} has {len(spans)} kinds of experts in turn; at most "
            f"{_MOST_GROUPS} are compiled, so put equal ones next to each other"
        )
    bodies = [read_span(module, group, path) for group in spans if _adds(module, group)]
    if not bodies:
        raise CaptureError(f"{type(module).__name__}: no expert gives anything")
    bodies = [replace(body, form=_plain(body.form)) for body in bodies]
    return ExpertGroups(bodies, span.total, span.hidden, span.form)


def _differ(module: nn.Module, experts: int) -> bool:
    """Whether a list's members are of several kinds."""
    for owner in module.modules():
        keys = expert_keys(owner, experts)
        if keys is not None and not isinstance(owner, nn.ParameterList):
            return len({structure_key(owner.get_submodule(k)) for k in keys}) > 1
    return False


def _plain(form: Form) -> Form:
    """The form in which a group is called: by indices, as often as in its recording."""
    return replace(INDICES, choices=form.choices)


def _groups(module: nn.Module, span: Span) -> list[Span]:
    """Runs of neighbouring experts that do the same operations."""
    signatures = [_signature(module, span, expert) for expert in range(span.total)]
    spans, first = [], 0
    for _, members in groupby(signatures):
        stop = first + len(list(members))
        spans.append(replace(span, first=first, stop=stop))
        first = stop
    return spans


def _signature(module: nn.Module, span: Span, expert: int) -> tuple[str, ...]:
    """The operations behind one expert's result, with the sizes of what they give."""
    recorder, out = record(module, span, expert, _ROWS)
    node = recorder.node_of(out)
    if node is None:
        return ()
    kept = with_ancestors(node)
    return tuple(
        f"{n.target if n.op != 'placeholder' else ''} {_shape(n.meta.get('val'))} {_numbers(n)}"
        for n in recorder.graph.nodes
        if n in kept
    )


def _numbers(node: fx.Node) -> list[float]:
    """The settings of an op: a number of an expert is an integer."""
    return [a for a in node.args if isinstance(a, float)]


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else ""


def _adds(module: nn.Module, span: Span) -> bool:
    """Whether the experts of a group give anything: some are there to do nothing."""
    recorder, out = record(module, span, span.first, _ROWS)
    return recorder.node_of(out) is not None and bool(out.any())


__all__ = ["ExpertGroups", "read_experts"]

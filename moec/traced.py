"""Calls of a region inside torch.compile and torch.export: the artifact's op, chosen while
tracing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moec.call_form import (
    CallForm,
    TensorForm,
    flattened,
    graph_inputs,
    parameters,
    without_defaults,
)

if TYPE_CHECKING:
    from moec.region import Region

# A number must not keep a model alive: the model's modules hold their regions.
_REGIONS: weakref.WeakValueDictionary[str, Region] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def number(region: Region) -> str:
    """A number for a region, as text: tracers take that for a constant, and may vary a number."""
    n = str(next(_NUMBERS))
    _REGIONS[n] = region
    return n


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _names(region: str) -> tuple[str, ...]:
    """The parameters of the module's forward."""
    return parameters(type(_REGIONS[region].candidate.module))[0]


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _limits(region: str) -> tuple[tuple[str, int], ...]:
    """The largest B, S and T that the declared inputs of the model give."""
    limits = _REGIONS[region].session.limits
    return () if limits is None else tuple(limits.tokens.items())


def _is_within_limits(region: str, x: torch.Tensor) -> bool:
    """Whether the tracer knows that the tokens keep to the limits of the declared inputs."""
    limits = _limits(region)
    sizes = {"T": x.shape[0]} if x.dim() == 2 else {"B": x.shape[0], "S": x.shape[1]}
    if x.dim() == 3:
        sizes["T"] = x.shape[0] * x.shape[1]
    return len(limits) > 0 and all(
        [statically_known_true(sizes[n] <= high) for n, high in limits if n in sizes]
    )


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(
    region: str,
    training: bool,
    dtype: str,
    rank: int,
    choices: int,
    weight_dtype: str,
    grad: bool,
    data_grad: int,
    tokens: str,
    tensors: tuple[tuple[str, str, str, tuple[int, ...]], ...],
    plain: tuple[tuple[str, Any], ...],
    settings: tuple[Any, ...],
    is_within_limits: bool,
) -> tuple[Any, ...] | None:
    """Compile for a call's mode while the tracer waits; constants that describe the op.

    ``settings`` are there for the tracer alone: it traces again once one has another value.
    """
    from moec.runtime.library import op_name

    owner = _REGIONS[region]
    further = tuple(TensorForm(n, getattr(torch, d), where, rest) for n, d, where, rest in tensors)
    form = CallForm(tokens, further, without_defaults(type(owner.candidate.module), dict(plain)))
    with torch._guards.tracing(None):  # a capture traces too: its guards are not the caller's
        prepared = owner.prepare(
            training,
            getattr(torch, dtype),
            rank,
            choices,
            getattr(torch, weight_dtype),
            grad,
            data_grad,
            form,
            is_within_limits,
        )
    if prepared is None:
        return None
    found, artifact = prepared
    name = op_name(artifact)
    owner.traced[name] = found.form, found.result
    ranks = tuple(
        v.type.rank
        for v in artifact.graph.inputs[: len(artifact.graph.inputs) - len(found.weights)]
    )
    return name, found.weights, ranks, len(artifact.graph.outputs)


def call_traced(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], region: Any
) -> Any:
    """As ``Region.call``, in terms that torch.compile and torch.export can trace."""
    if region.kind in ("model", "inputs"):  # the tracer is about to see the whole
        return NotImplemented
    if region.candidate.dense is not None and region.candidate.dense.extra:
        return NotImplemented
    given = dict(zip(_names(region.number), args, strict=False))
    given.update(kwargs)
    if len(given) != len(args) + len(kwargs):
        return NotImplemented
    named = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    plain = {n: v for n, v in given.items() if n not in named}
    if region.kind == "experts":
        named = {n: named[n] for n in _names(region.number) if n in named}
    if not _can_be_traced(region.kind, named, plain):
        return NotImplemented
    data = list(named.values())
    settings = tuple(
        [_compared(_attribute(module, p), then) for p, then in region.settings.items()]
    )
    if region.kind == "experts":
        return run_experts(module, region.number, data, settings)
    x = data[0]
    further = _forms(named, x)
    if further is None:
        return NotImplemented
    first = list(named)[0]  # noqa: RUF015 (next(iter()) is not traced)
    prepared = _prepare(
        region.number,
        module.training,
        str(x.dtype).split(".")[-1],
        x.dim(),
        0,
        str(x.dtype).split(".")[-1],
        torch.is_grad_enabled(),
        sum(1 << i for i, t in enumerate(data) if t.requires_grad),
        "" if first == _names(region.number)[0] else first,
        further,
        tuple(plain.items()),
        settings,
        _is_within_limits(region.number, x),
    )
    if prepared is None:
        return NotImplemented
    name, weights, ranks, count = prepared
    form, result = region.traced[name]
    inputs = [*graph_inputs(form, ranks, data), *(_attribute(module, path) for path in weights)]
    outputs = getattr(torch.ops.moec, name)(inputs)[:count]
    return result.build(outputs, x.shape[:-1])


def _compared(now: Any, then: Any) -> Any:
    """A setting as something that a tracer can take for a constant: it may vary floats, so those
    are compared with what they were, which makes it trace again once they differ.
    """
    if isinstance(then, float):
        return 1 if now == then else 0  # a branch: a comparison alone may stay open
    if type(now) is int:
        return range(now).stop  # a number where the tracer would vary it
    if isinstance(then, dict):
        return tuple([(k, _compared(now[k], then[k])) if k in now else k for k in then]), len(now)
    if isinstance(then, tuple | list):
        return tuple([_compared(a, b) for a, b in zip(now, then, strict=False)]), len(now)
    return now


def run_experts(
    module: nn.Module, region: str, data: Sequence[torch.Tensor], settings: tuple[Any, ...] = ()
) -> Any:
    """The result of an experts region's op for tokens, indices and weights, or
    ``NotImplemented``.
    """
    x, _, w = data
    prepared = _prepare(
        region,
        module.training,
        str(x.dtype).split(".")[-1],
        x.dim(),
        w.shape[-1],
        str(w.dtype).split(".")[-1],
        torch.is_grad_enabled(),
        sum(1 << i for i, t in enumerate(data) if t.requires_grad),
        "",
        (),
        (),
        settings,
        _is_within_limits(region, x),
    )
    if prepared is None:
        return NotImplemented
    name, weights, ranks, _ = prepared
    flat = [flattened(t, rank) for t, rank in zip(data, ranks, strict=True)]
    out = getattr(torch.ops.moec, name)([*flat, *(_attribute(module, p) for p in weights)])[0]
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


def _can_be_traced(kind: str, named: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether a call has the form of what is captured and no number that a tracer may vary."""
    if kind == "experts":
        return len(named) == 3 and not plain
    tokens = list(named.values())[:1]
    first = len(tokens) > 0 and tokens[0].is_floating_point() and tokens[0].dim() > 1
    return first and all(v is None or isinstance(v, bool | str) for v in plain.values())


def _forms(named: Mapping[str, Any], x: torch.Tensor) -> tuple[Any, ...] | None:
    """What ``TensorForm`` holds for each tensor but the first; ``None`` if one has none of the
    tokens' axes.
    """
    lead = x.dim() - 1
    found = []
    for name, tensor in list(named.items())[1:]:
        if tensor.dim() < lead or tensor.shape[:lead] != x.shape[:lead]:
            return None
        kind = str(tensor.dtype).split(".")[-1]
        rest = tuple(len(range(s)) for s in tensor.shape[lead:])  # numbers, not symbols
        found.append((name, kind, "tokens", rest))
    return tuple(found)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value

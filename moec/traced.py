"""Calls of a region inside torch.compile and torch.export: the artifact's op, chosen while
tracing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree

if TYPE_CHECKING:
    from moec.region import Region

_REGIONS: dict[int, Region] = {}
_NUMBERS = itertools.count()


def number(region: Region) -> int:
    """A number for a region: tracers can take it as a constant."""
    n = next(_NUMBERS)
    _REGIONS[n] = region
    return n


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(
    region: int,
    training: bool,
    dtype: str,
    rank: int,
    choices: int,
    weight_dtype: str,
    grad: bool,
    data_grad: int,
) -> tuple[Any, ...] | None:
    """Compile for a call's mode while the tracer waits; constants that describe the op."""
    from moec.runtime.library import op_name

    owner = _REGIONS[region]
    prepared = owner.prepare(
        training,
        getattr(torch, dtype),
        rank,
        choices,
        getattr(torch, weight_dtype),
        grad,
        data_grad,
    )
    if prepared is None:
        return None
    found, artifact = prepared
    flatten = tuple(
        v.type.rank
        for v in artifact.graph.inputs[: len(artifact.graph.inputs) - len(found.weights)]
    )
    return (
        op_name(artifact),
        found.weights,
        flatten,
        tuple(bool(r) for r in found.results),
        len(artifact.graph.outputs),
    )


def call_traced(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """As ``Region.call``, in terms that torch.compile and torch.export can trace."""
    data = [*args, *kwargs.values()]
    region: Any = module._moec_region
    wanted = 3 if region.kind == "experts" else 1
    if region.candidate.dense is not None and region.candidate.dense.extra:
        return NotImplemented
    if len(data) != wanted or not all(isinstance(v, torch.Tensor) for v in data):
        return NotImplemented
    if len(kwargs) > 1:  # their order would have to be looked up, which tracers cannot do
        return NotImplemented
    x = data[0]
    choices = data[1].shape[-1] if wanted == 3 else 0
    weight_dtype = data[2].dtype if wanted == 3 else x.dtype
    grads = sum(1 << i for i, t in enumerate(data) if t.requires_grad)
    prepared = _prepare(
        region.number,
        module.training,
        str(x.dtype).split(".")[-1],
        x.dim(),
        choices,
        str(weight_dtype).split(".")[-1],
        torch.is_grad_enabled(),
        grads,
    )
    if prepared is None:
        return NotImplemented
    name, weights, ranks, lead, count = prepared
    inputs = [
        t.reshape(-1, t.shape[-1]) if t.dim() > r else t for t, r in zip(data, ranks, strict=True)
    ]
    inputs += [_attribute(module, path) for path in weights]
    outputs = getattr(torch.ops.moec, name)(inputs)[:count]
    shaped = [
        o.reshape(*x.shape[:-1], o.shape[-1]) if like else o
        for o, like in zip(outputs, lead, strict=True)
    ]
    tree = region.first.tree
    return _pytree.tree_unflatten(shaped, tree) if tree is not None else shaped[0]


def _attribute(module: nn.Module, path: str) -> torch.Tensor:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]

"""The products and attention of a captured step: the kind of work, how much, and of which dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from moec.budget.rates import ATTENTION, ATTENTION_BACKWARD, PRODUCTS
from moec.ir.types import NAMES


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one operation; ``kind`` and ``dtype`` say at which rate."""

    kind: str
    dtype: str
    flops: float


def work_of(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Work | None:
    """The work of an operation on tensors of these shapes; ``None`` if it only moves bytes."""
    name, packet = str(target), getattr(target, "overloadpacket", None)
    if "scaled_dot_product" in name:
        return Work(_kind(name), dtype_of(args), _of_attention(target, args, kwargs))
    if packet not in flop_registry:
        return None
    flops = float(flop_registry[packet](*args, **kwargs, out_val=result))
    return Work(_kind(name), dtype_of(args), flops)


def _kind(name: str) -> str:
    if "attention" not in name:
        return PRODUCTS
    return ATTENTION_BACKWARD if "backward" in name else ATTENTION


def _of_attention(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Operations of attention, for any of PyTorch's kernels: those of the products of queries and
    keys and of scores and values, which the backward pass has three and two of; half as many where
    no query sees a later key.
    """
    arguments = [a.name for a in target._schema.arguments]
    given = {**dict(zip(arguments, args, strict=False)), **kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    pairs = 2.0 * query[..., 0].numel() * key.shape[-2]
    times = (3, 2) if "backward" in str(target) else (1, 1)
    flops = pairs * (times[0] * query.shape[-1] + times[1] * value.shape[-1])
    return float(flops / 2 if given.get("is_causal") else flops)


def dtype_of(arguments: Any) -> str:
    """The name of the dtype of the largest tensor of floating point among some; "f32" if there is
    none that has a name.
    """
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    named = [t for t in tensors if t.is_floating_point() and t.dtype in NAMES]
    return NAMES[max(named, key=torch.numel).dtype] if named else "f32"


__all__ = ["Work", "dtype_of", "work_of"]

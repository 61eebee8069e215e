"""Constant tensors of a recording as IR: one number everywhere, or the numbers from 0 up."""

from __future__ import annotations

import torch

from moec.capture.recorder import ConstantPair, Sizes
from moec.errors import CaptureError
from moec.ir.builder import Builder
from moec.ir.graph import Value
from moec.ir.types import Type, dtype_name


def constant_value(b: Builder, sizes: Sizes, pair: ConstantPair) -> Value:
    """The constant that is ``pair`` at the sizes of the two recordings."""
    first, second = pair.first, pair.second
    shape = tuple(sizes.dim(m, n) for m, n in zip(first.shape, second.shape, strict=True))
    type_ = Type(dtype_name(first.dtype), shape)
    numbers = torch.cat([first.flatten(), second.flatten()])
    if numbers.numel() and bool((numbers == numbers[0]).all()):
        return b.full(type_, numbers[0].item())
    if _counts(first) and _counts(second):
        running = b("t.cumsum", b.full(Type("i64", shape), 1), dim=0)
        return _cast(b, b("t.sub", running, other=1), type_.dtype)
    raise CaptureError(f"the block builds a constant tensor of type {type_} in forward")


def _counts(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and torch.equal(
        tensor.cpu().double(), torch.arange(tensor.numel()).double()
    )


def _cast(b: Builder, value: Value, dtype: str) -> Value:
    if value.type.dtype == dtype:
        return value
    casted: Value = b("t.cast", value, dtype=dtype)
    return casted


__all__ = ["constant_value"]

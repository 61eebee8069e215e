"""What a capture depends on beyond its module, and what a call must be like to be served."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.call_form import (
    TOKENS_ALONE,
    CallForm,
)
from moec.capture.arguments import Extra
from moec.capture.check import autocast_dtype
from moec.ir.graph import Graph

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mode:
    """What a capture depends on beyond the module's structure."""

    training: bool
    dtype: torch.dtype
    rank: int
    autocast: torch.dtype | None
    choices: int = 0
    weight_dtype: torch.dtype | None = None
    form: CallForm = TOKENS_ALONE
    device: torch.device = _CPU
    extras: tuple[Extra, ...] = ()


def types_below(module: nn.Module) -> list[type]:
    return [getattr(m, "_moec_original", type(m)) for m in module.modules()]


def is_out_of_range(graph: Graph, idx: torch.Tensor) -> bool:
    """Whether an index names neither an expert nor "none", seen only where it costs nothing.

    What the module's own code does then, an error mostly, is up to that code. On a GPU nobody can
    look without waiting; there such a pair adds nothing.
    """
    experts = _experts_of(graph)
    if experts is None or idx.device.type != "cpu" or idx.numel() == 0:
        return False
    low, high = torch.aminmax(idx)
    return bool(low < 0) or int(high) > experts


@functools.cache
def _experts_of(graph: Graph) -> int | None:
    """How many experts the indices of an experts module name; ``None`` if it is called with masks
    or has groups of experts.
    """
    counts = [int(op.attrs["experts"]) for op in graph.ops if op.kind == "moe.dispatch"]
    by_index = graph.inputs[1].type.dtype == "i64" and graph.inputs[1].type.rank == 2
    return counts[0] if by_index and len(counts) == 1 else None


def is_empty(module: nn.Module) -> bool:
    """Whether a module's weights, all of them, have no values yet."""
    weights = list(module.parameters())
    return bool(weights) and all(p.is_meta for p in weights)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module inside has hooks: they must see their own inputs and outputs."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]  # those of every module in the process
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Emitted code has its casts written out."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def capture_autocast(mode: Mode) -> Iterator[None]:
    """Capture under the caller's autocast, without its cache of cast weights."""
    if mode.autocast is None:
        yield
        return
    with torch.autocast(mode.device.type, dtype=mode.autocast, cache_enabled=False):
        yield


__all__ = [
    "Mode",
    "capture_autocast",
    "has_hooks",
    "is_empty",
    "is_out_of_range",
    "no_autocast",
    "types_below",
]

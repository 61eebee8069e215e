"""Bytes that an operation needs beyond its arguments and results, seen on the device itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from moec.memory.buffers import GRANULES
from moec.memory.tracked import track
from moec.surroundings import isolated

Workspace = Callable[[fx.Node, tuple[Any, ...], Mapping[str, Any]], int]
aten = torch.ops.aten
_GRANULE = GRANULES["aten"]

# Products have no workspace of their own but the library's, which stays.
_WITHOUT = frozenset([aten.mm, aten.bmm, aten.addmm, aten.embedding])


def workspace_on(device: torch.device) -> Workspace:
    """What gives the workspace of operations of a device: on a GPU each kind is tried once. On the
    CPU, whose allocator tells nothing, attention is taken to need its queries once more, in
    float32.
    """
    if device.type != "cuda":
        return _assumed
    known: dict[Any, int] = {}

    def workspace(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        if getattr(node.target, "overloadpacket", None) in _WITHOUT:
            return 0
        key = (node.target, _signature((args, kwargs)))
        if key not in known:
            known[key] = _tried(node.target, args, kwargs, device)
        return known[key]

    return workspace


def _signature(tree: Any) -> str:
    def described(value: Any) -> Any:
        is_tensor = isinstance(value, torch.Tensor)
        return (value.shape, value.stride(), value.dtype) if is_tensor else value

    return repr([described(leaf) for leaf in pytree.tree_leaves(tree)])


def _tried(target: Any, args: Any, kwargs: Any, device: torch.device) -> int:
    def real(value: Any) -> Any:
        return _filled(value, device) if isinstance(value, torch.Tensor) else value

    def run() -> int:
        with torch.no_grad():
            inputs, named = pytree.tree_map(real, (args, kwargs))
            return _seen(target, inputs, named, device)

    # The tracer that asks must not see the trial.
    return isolated(run, device)


def workspace_of_call(
    call: Callable[..., torch.Tensor], args: Sequence[Any], device: torch.device
) -> int | None:
    """What a call needs beyond its arguments, meta tensors that say their layout, and its result;
    on the CPU it is not known while somebody else profiles.
    """
    if device.type == "cuda":
        return _tried(call, tuple(args), {}, device)
    if torch.autograd.profiler._is_profiler_enabled:
        return None
    with torch.no_grad(), _disable_current_modes():  # not in a thread: profilers start in one
        real = [_filled(a, device) if isinstance(a, torch.Tensor) else a for a in args]
        tracked = track(lambda: call(*real))
    own: int = tracked.result.untyped_storage().nbytes()
    return max(0, tracked.peak(_GRANULE) - -(-own // _GRANULE) * _GRANULE)


def _assumed(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if "scaled_dot_product" not in str(node.target):
        return 0
    queries: torch.Tensor = args[0]
    return queries.numel() * max(queries.element_size(), 4)  # sums are of float32


def _filled(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same layout: ones, and zeros where it may be an index."""
    empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return empty.fill_(1 if like.is_floating_point() else 0)


def _seen(target: Any, args: Any, kwargs: Any, device: torch.device) -> int:
    target(*args, **kwargs)  # libraries take their own workspaces at the first call
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = target(*args, **kwargs)
    size = torch.cuda.memory_allocated(device) - before
    del result
    return max(0, torch.cuda.max_memory_allocated(device) - before - size)


__all__ = ["Workspace", "workspace_of_call", "workspace_on"]

"""Comparing a captured region with the module that it was read from, before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from moec.errors import CaptureError
from moec.interp import run
from moec.ir.graph import Graph

SIZES = {3: ((1, 1), (2, 3), (1, 33), (3, 17)), 2: ((1,), (6,), (33,), (51,))}
SCALES = (1.0, 30.0)  # limits such as clamps show only far from zero
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def compare(module: nn.Module, graph: Graph, weights: Sequence[str], hidden: int, dtype: torch.dtype, rank: int) -> None:
    """Raise :class:`CaptureError` unless interpreting ``graph`` gives what ``module`` gives, at several sizes and scales.

    ``module`` runs on random tokens ``[..., hidden]`` without gradients. On the meta device nothing can
    be compared.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    inputs = [tensors[path].detach() for path in weights]
    generator = torch.Generator().manual_seed(0)
    with _quiet_state(device):
        for leading in SIZES[rank]:
            for scale in SCALES:
                x = (torch.randn(*leading, hidden, generator=generator) * scale).to(device, dtype)
                _compare_once(module, graph, inputs, x)


@contextlib.contextmanager
def _quiet_state(device: torch.device) -> Iterator[None]:
    """Leave random states as they are."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _compare_once(module: nn.Module, graph: Graph, inputs: list[torch.Tensor], x: torch.Tensor) -> None:
    expected = [t for t in tree_flatten(module(x))[0] if isinstance(t, torch.Tensor)]
    flat = x.reshape(-1, x.shape[-1]) if graph.inputs[0].type.rank == 2 else x
    with torch.autocast(x.device.type, enabled=False):
        found = run(graph, [flat, *inputs])
    for ours, theirs in zip(found, expected, strict=True):
        error = _relative(ours, theirs)
        if not error <= TOLERANCE.get(theirs.dtype, 1e-4):
            raise CaptureError(f"the captured form differs from {type(module).__name__} on tokens of shape {tuple(x.shape)} by {error:.1e}")


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.numel() != theirs.numel():
        return float("inf")
    difference = ours.reshape(-1).double() - theirs.reshape(-1).double()
    scale = theirs.double().norm().item()
    return float(difference.norm().item() / max(scale, 1e-30)) if scale or difference.any() else 0.0


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Attributes and versions of tensors, to see whether a call changes its module."""
    state: dict[str, Any] = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if not key.startswith("_") and not isinstance(value, nn.Module):
                state[f"{name}.{key}"] = value if isinstance(value, int | float | str | bool) else id(value)
        for key, tensor in child.named_buffers(recurse=False):
            state[f"{name}.{key} (buffer)"] = tensor._version
    return state


def refuse_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise :class:`CaptureError` if a call changed its module: a compiled call would not."""
    changed = sorted(k.lstrip(".") for k in before.keys() | after.keys() if before.get(k) != after.get(k) and not k.endswith(".forward"))
    if changed:
        raise CaptureError(f"forward changes {', '.join(changed[:3])} of the module, which a compiled call would not; return the value instead")

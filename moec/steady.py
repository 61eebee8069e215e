"""A call like the one before: what must hold for it, checked in a few microseconds.

The long way of a call sorts arguments, looks for hooks, compares settings and finds the artifact.
What it finds hardly ever changes between two calls in the same mode, so the facts that it depends
on are kept as objects, and the next call compares identities.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad, profiler

from moec.capture.found import FoundRegion
from moec.guards import Guard
from moec.inputs import dim_names
from moec.ir.graph import Graph
from moec.runtime.artifact import Artifact
from moec.runtime.tape import Tape

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
Mode = tuple[bool, bool, bool]
_MOST_SIZES = 4096


class Steady:
    """One served call of a block with tokens alone, as conditions and what serves the next."""

    def __init__(
        self,
        module: nn.Module,
        x: torch.Tensor,
        found: FoundRegion,
        artifact: Artifact,
        weights: Sequence[torch.Tensor],
        guard: Guard,
        name: str,
    ) -> None:
        self.artifact, self.name, self.result = artifact, name, found.result
        self.rank = found.graph.inputs[0].type.rank if found.graph is not None else 0
        self.dtype, self.index, self.axes = x.dtype, x.get_device(), x.dim()
        self.width, self.kind = x.shape[-1], x.device.type
        self.most = _most_elements(artifact.graph, x.shape[-1])
        self.unchanged = guard.unchanged
        self.hooks = [getattr(m, h) for m in module.modules() if m is not module for h in _HOOKS]
        self.hooks += [getattr(torch.nn.modules.module, h) for h in _GLOBAL_HOOKS]
        self.weights = tuple(weights)
        places = _places(module, found.weights)
        self.kept = [(*p, w, *_facts(w)) for p, w in zip(places, weights, strict=True)]
        is_training = torch.is_grad_enabled()
        self.wanted = [w.requires_grad for w in weights] if is_training else []
        self.tapes: dict[torch.Size, Tape] = {}

    @staticmethod
    def mode(module: nn.Module, x: torch.Tensor) -> Mode:
        """What a call has of its own: another mode has another steady call."""
        return module.training, torch.is_grad_enabled(), x.requires_grad

    def holds(self, x: torch.Tensor) -> bool:
        """Whether a call with these tokens would be served as the one before."""
        if (
            x.dtype is not self.dtype
            or x.get_device() != self.index
            or x.device.type != self.kind
            or x.layout is not torch.strided
            or x.dim() != self.axes
            or x.numel() > self.most
            or any(self.hooks)
            or torch.is_autocast_enabled(self.kind)
        ):
            return False
        for owner, name, weight, dtype, count in self.kept:
            same = owner.get(name) is weight and weight.dtype is dtype
            if not same or weight.numel() != count or weight.get_device() != self.index:
                return False
        return self.unchanged() and (not self.wanted or self._wants_the_same())

    def _wants_the_same(self) -> bool:
        """Whether the same weights require gradients."""
        return [w.requires_grad for w in self.weights] == self.wanted

    def serve(self, x: torch.Tensor) -> Any:
        """The result of the call; ``NotImplemented`` for tokens of another width."""
        shape = x.shape
        tape = self.tapes.get(shape)
        if tape is not None and tape.may_be_used() and x.is_contiguous():
            outputs = tape((x, *self.weights), shape, self.result.axes)
            if outputs is not None:
                return self.result.assemble(outputs)
        if shape[-1] != self.width:
            return NotImplemented
        self._look_for_tape(x, shape)
        tokens = x if x.dim() == self.rank else x.flatten(0, -2)
        return self.result.build(self.artifact([tokens, *self.weights], self.name), shape[:-1])

    def _look_for_tape(self, x: torch.Tensor, shape: torch.Size) -> None:
        """Keep the recording of a call with as many tokens, if there is one by now."""
        count = x.numel() // max(self.width, 1)
        few = self.artifact.few if count <= self.artifact.few_tokens else None
        serving = self.artifact if few is None or few.made is None else few.made
        if serving.tapes is None:
            return
        size = (count, self.width)
        tape = serving.tapes.known(x, size if self.rank == 2 else tuple(shape))
        if tape is not None and len(self.tapes) < _MOST_SIZES:
            self.tapes[shape] = tape


def is_plain_call(args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a call has tokens alone and nothing around it that looks at its operations."""
    return (
        len(args) == 1
        and not kwargs
        and type(args[0]) is torch.Tensor
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not profiler._is_profiler_enabled
    )


def steady_call(
    module: nn.Module,
    x: torch.Tensor,
    found: FoundRegion,
    artifact: Artifact,
    weights: Sequence[torch.Tensor],
    guard: Guard,
    name: str,
) -> Steady | None:
    """The conditions of a call that was served; ``None`` if they are more than these."""
    places = list(_places(module, found.weights))
    held = [owner.get(n) for owner, n in places]
    plain = len(places) == len(weights) and all(map(is_, held, weights))
    settled = guard.is_plain and guard.unchanged()
    if not plain or not settled or found.writes or x.dim() not in found.ranks:
        return None
    return Steady(module, x, found, artifact, weights, guard, name)


def _places(module: nn.Module, paths: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """The dicts in which weights lie; one that lies elsewhere has an empty dict."""
    found: list[tuple[dict[str, Any], str]] = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        holder = module.get_submodule(owner)
        kept = (vars(holder)["_parameters"], vars(holder)["_buffers"])
        found.append((next((d for d in kept if name in d), {}), name))
    return found


def _most_elements(graph: Graph, width: int) -> int:
    """Up to how many elements the tokens surely keep to the ranges of a graph's dims."""
    highs = [graph.ranges.get(n, (0, None))[1] for n in dim_names(graph)]
    return min((h for h in highs if h is not None), default=sys.maxsize // width) * width


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What may change of a tensor that stays the same object."""
    return tensor.dtype, tensor.numel()


SteadyCalls = dict[Mode, Steady]
__all__ = ["Steady", "SteadyCalls", "is_plain_call", "steady_call"]

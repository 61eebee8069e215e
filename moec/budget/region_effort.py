"""What a compiled region takes as one operation of a captured step: from its own program."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from moec.codegen.host import partition
from moec.codegen.parts import FREE
from moec.cost import op_cost
from moec.ir.dims import apply
from moec.ir.graph import Op, Value
from moec.memory import Prediction, predict
from moec.memory.buffers import GRANULES
from moec.runtime.artifact import Artifact
from moec.runtime.library import pass_of
from moec.runtime.part_ops import PartOp, part_of


@dataclass(frozen=True)
class RegionEffort:
    """What each kernel computes and moves, in floating-point operations and bytes; and bytes that
    are needed only meanwhile.
    """

    kernels: tuple[tuple[float, float], ...]
    workspace: int

    @property
    def flops(self) -> float:
        """Operations of all kernels."""
        return sum(flops for flops, _ in self.kernels)


def region_effort(node: fx.Node, arguments: Sequence[Any]) -> RegionEffort | None:
    """The effort of a node that is a pass of a compiled region, or a part of one; ``None`` if it is
    something else.

    ``arguments`` are the node's, with tensors of definite shapes.
    """
    (tensors,) = arguments if len(arguments) == 1 else ((),)
    part = part_of(node.target)
    if part is not None:
        return _part_effort(part, tensors)
    found = pass_of(node.target)
    if found is None:
        return None
    artifact, is_backward = found
    program = partition(artifact.graph)
    sizes = _binding(artifact.signature(is_backward)[0], tensors)
    workspace = _workspace(artifact, is_backward, sizes)
    return _effort(program.backward if is_backward else program.forward, sizes, tensors, workspace)


def _part_effort(part: PartOp, tensors: Sequence[torch.Tensor]) -> RegionEffort:
    """The effort of a part of a pass."""
    function, granule = part.part.function, GRANULES[part.artifact.target]
    sizes = _binding(function.reads, tensors)
    workspace = part.peak.at(**sizes) - _total(function.makes, sizes, granule)
    return _effort(function.ops, sizes, tensors, max(0, workspace))


def _effort(
    ops: Sequence[Op],
    sizes: Mapping[str, int],
    tensors: Sequence[torch.Tensor],
    workspace: int,
) -> RegionEffort:
    costs = [op_cost(op) for op in ops if op.kind not in FREE]
    kernels = ((float(apply(c.flops, sizes)), float(apply(c.bytes, sizes))) for c in costs)
    return RegionEffort(tuple(kernels), workspace + sum(map(_copied, tensors)))


def _binding(declared: Sequence[Value], tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value, tensor in zip(declared, tensors, strict=True):
        for size, actual in zip(value.type.shape, tensor.shape, strict=True):
            if isinstance(size, sympy.Symbol):
                found.setdefault(size.name, int(actual))
    return found


def _copied(tensor: torch.Tensor) -> int:
    """Kernels take rows without gaps; other tensors are copied first. A tensor with more elements
    than memory stands for one without gaps, where a model is only planned.
    """
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    stands_for_another = sum(steps) + 1 < tensor.numel()
    if tensor.is_contiguous() or stands_for_another:
        return 0
    return tensor.numel() * tensor.element_size()


def _workspace(artifact: Artifact, is_backward: bool, sizes: Mapping[str, int]) -> int:
    """The peak of a pass without what it takes and what it returns, for the worst routing."""
    about, graph = _prediction(artifact), artifact.graph
    granule = GRANULES[artifact.target]
    if not is_backward:
        _, results = artifact.signature(is_backward)
        return max(0, about.forward.at(**sizes) - _total(results, sizes, granule))
    if about.backward_kept is None or about.held is None:
        raise RuntimeError(f"@{graph.name} has no backward pass")
    gradients = [g for g in graph.gradients if g is not None]
    peak = about.backward_kept.at(**sizes) - about.held.at(**sizes)
    return max(0, peak - _total(gradients, sizes, granule))


def _total(values: Sequence[Value], sizes: Mapping[str, int], granule: int) -> int:
    found = (int(apply(v.type.bytes, sizes)) for v in values)
    return sum(-(-size // granule) * granule for size in found)


@functools.lru_cache(maxsize=64)
def _prediction(artifact: Artifact) -> Prediction:
    return predict(artifact)


__all__ = ["RegionEffort", "region_effort"]

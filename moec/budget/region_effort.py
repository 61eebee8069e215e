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
from moec.cost import Cost, op_cost
from moec.ir.dims import apply
from moec.ir.graph import Op, Value
from moec.memory import Prediction, predict
from moec.memory.buffers import GRANULES
from moec.runtime.artifact import Artifact
from moec.runtime.library import pass_of


@dataclass(frozen=True)
class RegionEffort:
    """Operations of products, bytes moved, and bytes that are needed only meanwhile."""

    flops: float
    moved: float
    workspace: int


def region_effort(node: fx.Node, arguments: Sequence[Any]) -> RegionEffort | None:
    """The effort of a node that is a pass of a compiled region; ``None`` if it is something else.

    ``arguments`` are the node's, with tensors of definite shapes.
    """
    found = pass_of(node.target)
    if found is None:
        return None
    artifact, is_backward = found
    program = partition(artifact.graph)
    (tensors,) = arguments
    declared: Sequence[Value] = artifact.graph.inputs
    if is_backward:
        inputs = [artifact.graph.inputs[i] for i in program.backward_inputs]
        declared = [*inputs, *program.saved, *artifact.graph.cotangents]
    sizes = _binding(declared, tensors)
    cost = _cost(program.backward if is_backward else program.forward)
    return RegionEffort(
        float(apply(cost.flops, sizes)),
        float(apply(cost.bytes, sizes)),
        _workspace(artifact, is_backward, sizes) + sum(map(_copied, tensors)),
    )


def _binding(declared: Sequence[Value], tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value, tensor in zip(declared, tensors, strict=True):
        for size, actual in zip(value.type.shape, tensor.shape, strict=True):
            if isinstance(size, sympy.Symbol):
                found.setdefault(size.name, int(actual))
    return found


def _cost(ops: Sequence[Op]) -> Cost:
    return sum(map(op_cost, ops), Cost())


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
        results = [*graph.outputs, *artifact.program_saved]
        return max(0, about.forward.at(**sizes) - _total(results, sizes, granule))
    if about.backward is None or about.held is None:
        raise RuntimeError(f"@{graph.name} has no backward pass")
    gradients = [g for g in graph.gradients if g is not None]
    peak = about.backward.at(**sizes) - about.held.at(**sizes)
    return max(0, peak - _total(gradients, sizes, granule))


def _total(values: Sequence[Value], sizes: Mapping[str, int], granule: int) -> int:
    found = (int(apply(v.type.bytes, sizes)) for v in values)
    return sum(-(-size // granule) * granule for size in found)


@functools.lru_cache(maxsize=64)
def _prediction(artifact: Artifact) -> Prediction:
    return predict(artifact)


__all__ = ["RegionEffort", "region_effort"]

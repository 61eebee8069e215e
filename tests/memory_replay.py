"""Running emitted programs while PyTorch's CPU allocator is watched; kernels may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moec.ir import Graph
from moec.memory.tracked import Tracked, track
from moec.runtime.artifact import Artifact, _Differentiable, build
from moec.runtime.kernel import Kernel


class NoKernel:
    """Launches nothing."""

    def __getitem__(self, grid: Sequence[int]) -> Any:
        return lambda *arguments, **options: None


def built(graph: Graph, target: str, folder: Path) -> Artifact:
    """The module emitted for a lowered graph, without its kernels: only host lines run."""
    compiled = build(graph, target, "training" if graph.cotangents else "inference", (), folder)
    leave_kernels_out(compiled.forward)
    return compiled


def leave_kernels_out(function: Any) -> None:
    """Let an emitted function, and all of its module, launch nothing."""
    names: dict[str, Any] = function.__globals__
    names.update({k: NoKernel() for k, v in names.items() if isinstance(v, Kernel)})


def tracked_step(compiled: Artifact, arguments: Sequence[torch.Tensor]) -> Tracked:
    """Forward, and backward for a joint graph; ``arguments`` end with the cotangents.

    The outputs are kept, as a caller would.
    """
    count = len(compiled.graph.inputs)
    if compiled.backward is None:
        return track(lambda: compiled.forward(*arguments[:count]))
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in arguments[:count]]
    cotangents = list(arguments[count:])

    def step() -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...]
        outputs = _Differentiable.apply(compiled, *leaves)  # type: ignore[no-untyped-call]
        floats = [o for o in outputs if o.is_floating_point()]
        pairs = {id(o): (o, c) for o, c in zip(floats, cotangents, strict=True)}
        differentiable = [(o, c) for o, c in pairs.values() if o.requires_grad]
        torch.autograd.backward([o for o, _ in differentiable], [c for _, c in differentiable])
        return outputs

    return track(step)

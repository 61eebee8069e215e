"""Parts of an artifact's passes as ``torch.library`` ops: ``moec::region_N_forward_1(Tensor[]
inputs) -> Tensor[]``. They are made where a plan asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec import cache
from moec.codegen.module import emit_part_module
from moec.codegen.parts import Part, cut
from moec.memory.prediction import Peak, predict_parts
from moec.runtime.artifact import Artifact
from moec.runtime.library import contiguous, define, fake_results, op_name, owned


@dataclass(frozen=True, eq=False)
class PartOp:
    """A part of a pass as an op of torch, which runs the emitted function ``run``; ``peak`` is what
    it holds beyond what it takes.
    """

    artifact: Artifact
    part: Part
    peak: Peak
    run: Callable[..., tuple[torch.Tensor, ...]]
    op: Any


@dataclass(frozen=True)
class PartOps:
    """The ops of both passes of an artifact, in order; none for a pass that is one op."""

    forward: tuple[PartOp, ...]
    backward: tuple[PartOp, ...]


_OF_ARTIFACTS: dict[Artifact, PartOps] = {}
_BY_NAME: dict[str, PartOp] = {}


def part_ops(artifact: Artifact) -> PartOps:
    """The ops that the passes of a training artifact are cut into; made at the first call."""
    if artifact not in _OF_ARTIFACTS:
        _OF_ARTIFACTS[artifact] = _made(artifact)
    return _OF_ARTIFACTS[artifact]


def part_of(target: Any) -> PartOp | None:
    """The part that an op runs; ``None`` if it is another op."""
    name = getattr(target, "name", None)
    return _BY_NAME.get(name().split(".")[0]) if callable(name) else None


def _made(artifact: Artifact) -> PartOps:
    parts = cut(artifact.graph, artifact.target)
    if not parts.functions:
        return PartOps((), ())
    graph, target = artifact.graph, artifact.target
    source = emit_part_module(graph, target, parts.functions)
    path = cache.store(source, f"{graph.name}_{target}_parts".lower(), artifact.path.parent)
    module = cache.load(path, source)
    peaks = predict_parts(graph, target, parts.functions)
    both = (*parts.forward, *parts.backward)
    made = [
        _registered(artifact, part, peak, getattr(module, part.function.name))
        for part, peak in zip(both, peaks, strict=True)
    ]
    count = len(parts.forward)
    return PartOps(tuple(made[:count]), tuple(made[count:]))


def _registered(
    artifact: Artifact, part: Part, peak: Peak, run: Callable[..., tuple[torch.Tensor, ...]]
) -> PartOp:
    name, function = f"{op_name(artifact)}_{part.function.name}", part.function

    def body(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return owned(run(*contiguous(inputs)), inputs)

    def fake(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return fake_results(artifact.graph, function.reads, function.makes, inputs)

    define(name, body, fake)
    op = getattr(torch.ops.moec, name).default
    found = _BY_NAME[f"moec::{name}"] = PartOp(artifact, part, peak, run, op)
    return found


__all__ = ["PartOp", "PartOps", "part_of", "part_ops"]

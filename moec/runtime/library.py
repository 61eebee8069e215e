"""Artifacts as ``torch.library`` ops: what tracers (torch.compile, torch.export) see of a region.

One op an artifact, ``moec::region_N(Tensor[] inputs) -> Tensor[]``, with a fake and an autograd
registration; a training op returns the outputs and then the values that its backward needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from moec.ir.dims import apply
from moec.ir.graph import Graph, Value
from moec.ir.types import DTYPES
from moec.runtime.artifact import Artifact
from moec.runtime.ranges import is_profiled

_SCHEMA = "(Tensor[] inputs) -> Tensor[]"
_COUNT = itertools.count()
_NAMES: dict[int, str] = {}
_KEPT: list[Artifact] = []
_PASSES: dict[str, tuple[Artifact, bool]] = {}


def op_name(artifact: Artifact) -> str:
    """The name in ``torch.ops.moec`` of an artifact's op; registered at the first call."""
    if id(artifact) not in _NAMES:
        name = f"region_{next(_COUNT)}"
        _KEPT.append(artifact)  # the op refers to it for the life of the process
        (_register_training if artifact.backward is not None else _register_inference)(
            artifact, name
        )
        _NAMES[id(artifact)] = name
        _PASSES[f"moec::{name}"] = artifact, False
        _PASSES[f"moec::{name}_backward"] = artifact, True
    return _NAMES[id(artifact)]


def pass_of(target: Any) -> tuple[Artifact, bool] | None:
    """The artifact of which an op is a pass, and whether it is the backward pass; ``None`` if it is
    another op.
    """
    name = getattr(target, "name", None)
    return _PASSES.get(name().split(".")[0]) if callable(name) else None


def contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def define(
    name: str,
    body: Callable[[Sequence[torch.Tensor]], Any],
    fake: Callable[[Sequence[torch.Tensor]], Any],
) -> Any:
    def run(inputs: Sequence[torch.Tensor]) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):  # the casts are written out
            return body(inputs)

    op = torch.library.custom_op(f"moec::{name}", run, mutates_args=(), schema=_SCHEMA)
    op.register_fake(fake)
    return op


def _named(artifact: Artifact) -> Artifact:
    """The artifact for a call; equal regions share an op, so a profiler sees their class's name."""
    return artifact.in_ranges("") if is_profiled() else artifact


def _register_inference(artifact: Artifact, name: str) -> None:
    graph = artifact.graph

    def body(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        run = _named(artifact).forward
        return owned(run(*contiguous(inputs))[0], inputs)

    define(name, body, lambda inputs: fake_results(graph, graph.inputs, graph.outputs, inputs))


def _register_training(artifact: Artifact, name: str) -> None:
    graph, count = artifact.graph, len(artifact.graph.outputs)
    taken, made = artifact.signature(False)
    arguments, returned = artifact.signature(True)

    def forward(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs, kept = _named(artifact).forward(*contiguous(inputs))
        return owned([*outputs, *kept], inputs)

    def backward(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        run = _named(artifact).backward
        if run is None:
            raise RuntimeError("an inference artifact has no backward")
        return owned([g for g in run(contiguous(inputs)) if g is not None], inputs)

    op = define(name, forward, lambda inputs: fake_results(graph, taken, made, inputs))
    backward_op = define(
        f"{name}_backward",
        backward,
        lambda inputs: fake_results(graph, arguments, returned, inputs),
    )

    def setup_context(ctx: Any, inputs: Any, output: Sequence[torch.Tensor]) -> None:
        (tensors,) = inputs
        ctx.save_for_backward(*(tensors[i] for i in artifact.backward_inputs), *output[count:])
        ctx.shapes = [o.shape for o in output[:count]]

    def differentiate(ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> Any:
        tensors = ctx.saved_tensors
        like = tensors[0]
        floats = [
            torch.zeros(shape, dtype=DTYPES[o.type.dtype], device=like.device) if c is None else c
            for c, o, shape in zip(cotangents, graph.outputs, ctx.shapes, strict=False)
            if o.type.is_float
        ]
        found = iter(backward_op([*tensors, *floats]))
        return [None if g is None else next(found) for g in graph.gradients]

    op.register_autograd(differentiate, setup_context=setup_context)


def owned(tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results of an op must not share memory with its inputs or with each other."""
    seen = {t.untyped_storage().data_ptr() for t in inputs}
    owned = []
    for tensor in tensors:
        pointer = tensor.untyped_storage().data_ptr()
        owned.append(tensor.clone() if pointer in seen else tensor.contiguous())
        seen.add(pointer)
    return owned


def fake_results(
    graph: Graph,
    declared: Sequence[Value],
    results: Sequence[Value],
    inputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Empty results of the right types for (fake) inputs."""
    binding: dict[str, Any] = {}
    for value, tensor in zip(declared, inputs, strict=True):
        for size, actual in zip(value.type.shape, tensor.shape, strict=True):
            if isinstance(size, sympy.Symbol):
                binding.setdefault(size.name, actual)
    like = inputs[0]
    return [
        like.new_empty([apply(d, binding) for d in v.type.shape], dtype=DTYPES[v.type.dtype])
        for v in results
    ]

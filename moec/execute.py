"""Running a graph's emitted module on given inputs, beside the interpreter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch

from moec.ir.graph import Graph
from moec.runtime.artifact import build


def run_emitted(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Emit a graph for a target and run it once: outputs, then the gradients that exist.

    ``arguments`` are the inputs, then one cotangent for each output of a joint graph (those of
    integer outputs are ignored), as for :func:`moec.interp.run`.

    Raises whatever the emitter, the kernel compiler or a launch raises.
    """
    inputs, cotangents = arguments[: len(graph.inputs)], arguments[len(graph.inputs) :]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        artifact = build(graph, target, "execute", (), folder)
        outputs, saved = artifact.forward(*(t.contiguous() for t in inputs))
        if artifact.backward is None:
            return outputs
        kept = (inputs[i] for i in artifact.backward_inputs)
        gradients = artifact.backward(*kept, *saved, *cotangents)
    wanted = [g is not None for g in graph.gradients]
    found = (g for g, is_wanted in zip(gradients, wanted, strict=True) if is_wanted)
    return (*outputs, *(g for g in found if g is not None))


__all__ = ["run_emitted"]

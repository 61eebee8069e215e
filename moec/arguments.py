"""Checking the tensors of a call against the types of a graph's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.errors import CallError
from moec.ir.graph import Graph, Value
from moec.ir.types import DTYPES


def fits(graph: Graph, weights: Sequence[torch.Tensor]) -> bool:
    """Whether weights, the last inputs of a graph, have the dtypes and shapes that it was captured
    with.
    """
    declared = graph.inputs[len(graph.inputs) - len(weights) :]
    return all(
        t.dtype == DTYPES[v.type.dtype] and _has_shape(v, t)
        for v, t in zip(declared, weights, strict=True)
    )


def _has_shape(value: Value, tensor: torch.Tensor) -> bool:
    return tensor.dim() == value.type.rank and all(
        not isinstance(d, int) or d == s
        for d, s in zip(value.type.shape, tensor.shape, strict=True)
    )


def check_inputs(name: str, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse wrong dtypes, shapes and devices before anything runs, naming the input."""
    device = inputs[0].device
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        if not _has_shape(value, tensor):
            raise CallError(
                f"{name}: %{value.hint} must be {value.type}, got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != DTYPES[value.type.dtype]:
            raise CallError(
                f"{name}: %{value.hint} must be {value.type}, got {tensor.dtype}; cast it, "
                "or compile the model in that dtype"
            )
        if tensor.device != device:
            raise CallError(
                f"{name}: %{value.hint} is on {tensor.device}, the tokens are on {device}; "
                "move the model or the input"
            )


__all__ = ["check_inputs", "fits"]

"""Checking the tensors of a call against the types of a graph's inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from moec.errors import CallError
from moec.ir.dims import show_dim
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


def dim_sizes(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """The sizes of a graph's symbols in the tensors of a call."""
    return {name: size for name, (size, _) in _found(graph, inputs).items()}


def _found(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, tuple[int, Value]]:
    """The size of each symbol, and the first input that has it."""
    found: dict[str, tuple[int, Value]] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        for name, axis in _symbols(value):
            found.setdefault(name, (tensor.shape[axis], value))
    return found


@functools.lru_cache(maxsize=4096)
def _symbols(value: Value) -> tuple[tuple[str, int], ...]:
    """The symbols in a value's shape, and their axes."""
    plain = (d if isinstance(d, int) else show_dim(d) for d in value.type.shape)
    return tuple((d, i) for i, d in enumerate(plain) if isinstance(d, str) and d.isidentifier())


def _check_sizes(name: str, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse symbols that are outside their ranges, or have two sizes."""
    found = _found(graph, inputs)
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        for symbol, axis in _symbols(value):
            size, first = found[symbol]
            if tensor.shape[axis] != size:
                raise CallError(
                    f"{name}: %{first.hint} has {symbol} = {size}, but %{value.hint} has {symbol} "
                    f"= {tensor.shape[axis]} (its axis {axis}); both must be equal"
                )
    for symbol, (size, value) in found.items():
        low, high = graph.ranges.get(symbol, (0, None))
        if size < low or (high is not None and size > high):
            most = "" if high is None else f" <= {high}"
            raise CallError(
                f"{name}: %{value.hint} has {symbol} = {size}, but the compiled code is right for "
                f"{low} <= {symbol}{most}; call it in parts"
            )


def check_inputs(name: str, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse wrong dtypes, shapes and devices before anything runs, naming the input."""
    name = name or f"@{graph.name}"
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
    _check_sizes(name, graph, inputs)


__all__ = ["check_inputs", "dim_sizes", "fits"]

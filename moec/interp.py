"""The interpreter: the meaning of a graph, by each op's own ``eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch

from moec.errors import IRError
from moec.ir.dims import evaluate, symbols
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.ir.types import DTYPES, FLOATS, Type


def bind_dims(graph: Graph, arguments: Sequence[torch.Tensor]) -> dict[str, int]:
    """The sizes of the symbols, read off the arguments' shapes and checked against the ranges."""
    binding: dict[str, int] = {}
    values = (*graph.inputs, *graph.cotangents)
    if len(arguments) != len(values):
        raise IRError(f"@{graph.name} takes {len(values)} tensors, got {len(arguments)}")
    for value, tensor in zip(values, arguments, strict=True):
        if tensor.dim() != value.type.rank:
            raise IRError(
                f"@{graph.name}: %{value.hint} is {value.type}, got shape {tuple(tensor.shape)}"
            )
        for declared, size in zip(value.type.shape, tensor.shape, strict=True):
            if isinstance(declared, sympy.Symbol):
                binding.setdefault(declared.name, int(size))
    for value, tensor in zip(values, arguments, strict=True):
        expected = tuple(
            evaluate(d, binding) if symbols(d) <= binding.keys() else int(s)
            for d, s in zip(value.type.shape, tensor.shape, strict=True)
        )
        if expected != tuple(tensor.shape):
            raise IRError(
                f"@{graph.name}: %{value.hint} is {value.type} = {expected} here, "
                f"got shape {tuple(tensor.shape)}"
            )
    for name, (low, high) in graph.ranges.items():
        if name in binding and not (
            low <= binding[name] and (high is None or binding[name] <= high)
        ):
            raise IRError(
                f"@{graph.name}: {name} = {binding[name]} is outside its range "
                f"[{low}, {'inf' if high is None else high}]"
            )
    return binding


def run(
    graph: Graph,
    arguments: Sequence[torch.Tensor],
    *,
    float64: bool = False,
    dims: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Interpret a graph; returns its outputs, then the gradients that exist.

    With ``float64`` every float is computed in float64 and dtype casts round nothing: the
    reference. Each result is checked against its declared type.
    """
    values = (*graph.inputs, *graph.cotangents)
    if float64:
        arguments = [a.double() if a.is_floating_point() else a for a in arguments]
    binding = {**(dims or {}), **bind_dims(graph, arguments)}
    env: dict[Value, torch.Tensor] = dict(zip(values, arguments, strict=True))
    with _made_on(arguments):
        for op in graph.ops:
            results = run_op(op, [env[v] for v in op.operands], binding, float64=float64)
            for value, result in zip(op.results, results, strict=True):
                _check(op, value.type, result, binding, float64)
                env[value] = result
    return tuple(env[v] for v in graph.returned)


def _made_on(arguments: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
    """Where ops that read no tensor make theirs; the CPU needs no context, which would be slow."""
    device = arguments[0].device if arguments else torch.device("cpu")
    is_plain = device == torch.get_default_device() == torch.device("cpu")
    return nullcontext() if is_plain else device


def run_op(
    op: Op, operands: Sequence[torch.Tensor], binding: Mapping[str, int], *, float64: bool = False
) -> tuple[torch.Tensor, ...]:
    """Evaluate one op; a body is interpreted."""
    if op.body is not None:
        return run(op.body, operands, float64=float64, dims=binding)
    attrs = {k: bind_attribute(v, binding) for k, v in op.attrs.items()}
    if float64 and attrs.get("dtype") in FLOATS:
        attrs["dtype"] = "f64"
    result = opdef(op.kind).eval(*operands, **attrs)
    results = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    # PyTorch rounds some functions otherwise on strided memory: equal graphs must give equal bits
    return tuple(r.contiguous() for r in results)


def bind_attribute(value: Any, binding: Mapping[str, int]) -> Any:
    """An attribute with its dims replaced by sizes."""
    if isinstance(value, sympy.Expr):
        return evaluate(value, binding)
    if isinstance(value, tuple):
        return tuple(bind_attribute(v, binding) for v in value)
    return value


def _check(
    op: Op, declared: Type, result: torch.Tensor, binding: Mapping[str, int], float64: bool
) -> None:
    dtype = torch.float64 if float64 and declared.is_float else DTYPES[declared.dtype]
    shape = tuple(evaluate(d, binding) for d in declared.shape)
    if result.dtype != dtype or tuple(result.shape) != shape:
        raise IRError(
            f"{op.loc or op.kind}: {op.kind} is declared {declared} "
            f"but its eval gave {result.dtype} {tuple(result.shape)}"
        )

"""Each op of a graph alone: is its gradient right, is its emitted code?

An op is tried on the values that it gets in the graph, as a graph of its own, so that what is wrong
about it cannot hide behind other ops, nor they be blamed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec import interp
from moec.autodiff import differentiate
from moec.bisect import cotangents, emitted_problem
from moec.errors import MoecError
from moec.exact_gradients import gradient_rule
from moec.ir.dims import symbols
from moec.ir.graph import Graph, Op, Value
from moec.manager import PassCall, Step, find_pass
from moec.observers import difference, reference_gradients


@dataclass(frozen=True)
class GuiltyOp:
    """An op that is wrong by itself, and what is wrong with it, in words."""

    op: Op
    problem: str


def wrong_gradients(
    graph: Graph, arguments: Sequence[torch.Tensor], *, exact: bool = False, seed: int = 0
) -> list[GuiltyOp]:
    """The ops of a forward graph whose ``vjp`` differs from PyTorch's differentiation of their
    ``eval``, in float64 on what ``arguments`` give them.
    """
    guilty = []
    for op, values in _with_values(graph, arguments, float64=True):
        if gradient_rule(op, exact) is None or not any(v.type.is_float for v in op.operands):
            continue
        problem = _gradient_problem(alone(graph, op), op, values, exact, seed)
        if problem:
            guilty.append(GuiltyOp(op, problem))
    return guilty


def _gradient_problem(
    single: Graph, op: Op, values: Mapping[Value, torch.Tensor], exact: bool, seed: int
) -> str:
    wanted = [v for v in dict.fromkeys(op.operands) if v.type.is_float]
    inputs = [values[v] for v in single.inputs]
    try:
        joint = differentiate(single, wanted, exact)
        added = cotangents(joint, inputs, seed, torch.float64)
        _leave_out_unrouted(op, values, added)
        step = Step(PassCall(find_pass("grad")), single, joint, 0.0, 0)
        expected = reference_gradients(step, [t.clone() for t in inputs], added, {})
        got = interp.run(joint, [*inputs, *added], float64=True)
    except MoecError as error:
        return str(error)
    for value, a, b in zip(joint.returned, expected, got, strict=True):
        problem = difference(a, b)
        if problem:
            return f"its gradient %{value.hint} {problem}"
    return ""


def _leave_out_unrouted(
    op: Op, values: Mapping[Value, torch.Tensor], added: Sequence[torch.Tensor]
) -> None:
    """Rows of no expert hold anything and nothing may read them: their gradients are zero."""
    if op.kind in ("moe.gather", "moe.permute"):
        routed = int((values[op.operands[2]] >= 0).sum())
    elif op.kind == "moe.expert_rows":
        routed = int(values[op.operands[1]][-1])
    else:
        return
    for tensor in added:
        tensor[routed:] = 0


def wrong_code(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor], tolerance: float
) -> list[GuiltyOp]:
    """The ops of a lowered graph whose emitted code differs from the interpreter, on what
    ``arguments`` give them; kernels are ops, too.
    """
    guilty = []
    for op, values in _with_values(graph, arguments, float64=False):
        single = alone(graph, op)
        inputs = [values[v] for v in single.inputs]
        problem = emitted_problem(single, target, inputs, tolerance)
        if problem:
            guilty.append(GuiltyOp(op, problem))
    return guilty


def alone(graph: Graph, op: Op) -> Graph:
    """The graph of one op: its operands are inputs, and those of the graph's inputs that give its
    sizes.
    """
    inputs = list(dict.fromkeys(op.operands))
    known = {d.name for v in inputs for d in v.type.shape if not isinstance(d, int) and d.is_Symbol}
    shapes = [d for v in (*op.operands, *op.results) for d in v.type.shape]
    missing = {n for d in shapes for n in symbols(d)} - known
    for value in (*graph.inputs, *graph.cotangents):
        names = {d.name for d in value.type.shape if not isinstance(d, int) and d.is_Symbol}
        if names & missing:
            inputs.append(value)
            missing -= names
    return Graph(op.kind.split(".")[-1], tuple(inputs), (op,), op.results, graph.ranges)


def _with_values(
    graph: Graph, arguments: Sequence[torch.Tensor], *, float64: bool
) -> Iterator[tuple[Op, dict[Value, torch.Tensor]]]:
    """Every op, with the values of all that was computed before it."""
    if float64:
        arguments = [a.double() if a.is_floating_point() else a for a in arguments]
    sizes = interp.bind_dims(graph, arguments)
    values = dict(zip((*graph.inputs, *graph.cotangents), arguments, strict=True))
    for op in graph.ops:
        results = interp.run_op(op, [values[v] for v in op.operands], sizes, float64=float64)
        yield op, values
        values.update(zip(op.results, results, strict=True))


__all__ = ["GuiltyOp", "alone", "wrong_code", "wrong_gradients"]

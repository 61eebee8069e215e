"""What ops cost: bytes moved, floating-point operations, and bytes kept for the backward pass.

All figures are dims, so they hold for every number of tokens. An op's own ``cost`` overrides the
default: operands read once, results written once, and one operation per element of pointwise work.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.dims import Dim, canon
from moec.ir.graph import Graph, Op, Value, backward_ops
from moec.ir.opdef import opdef


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations."""

    bytes: Dim = 0
    flops: Dim = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(canon(self.bytes + other.bytes), canon(self.flops + other.flops))


def op_cost(op: Op) -> Cost:
    """The cost of one op; a kernel moves what enters and leaves it and computes its body."""
    declaration = opdef(op.kind)
    if declaration.cost is not None:
        return Cost(*declaration.cost(op))
    if op.body is not None:
        return Cost(_moved(op), graph_cost(op.body).flops)
    work = sum((v.type.elements for v in op.results), 0) if declaration.pointwise else 0
    return Cost(_moved(op), canon(work))


def graph_cost(graph: Graph) -> Cost:
    """The sum over a graph's ops."""
    return sum(map(op_cost, graph.ops), Cost())


def _moved(op: Op) -> Dim:
    return total_bytes([*dict.fromkeys(op.operands), *op.results])


def total_bytes(values: list[Value]) -> Dim:
    """The size of all values together."""
    return canon(sum((v.type.bytes for v in values), 0))


def saved_values(graph: Graph) -> list[Value]:
    """What a joint graph keeps between the passes: forward results that backward ops read.

    Inputs are not among them: the caller holds those anyway.
    """
    backward = backward_ops(graph)
    made = {v for op in graph.ops if op not in backward for v in op.results}
    read = (v for op in graph.ops if op in backward for v in op.operands)
    gradients = (g for g in graph.gradients if g is not None)
    return [v for v in dict.fromkeys([*read, *gradients]) if v in made]


def saved_bytes(graph: Graph) -> Dim:
    """The size of :func:`saved_values`."""
    return total_bytes(saved_values(graph))

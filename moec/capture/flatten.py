"""Flatten batch and sequence into one token axis, where a graph provably treats them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.errors import MoecError
from moec.ir.builder import Builder
from moec.ir.dims import Dim, dim, product, substitute, symbols
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.ir.types import Type

_LAST_AXIS = {"t.linear", "t.split", "t.merge", "t.one_hot"}
_BY_AXIS = {
    "t.softmax",
    "t.logsumexp",
    "t.sum",
    "t.mean",
    "t.amax",
    "t.cumsum",
    "t.topk",
    "t.gather",
    "t.scatter",
    "t.scatter_add",
    "t.slice",
}


class _NotFlat(MoecError):
    """An op that works on the batch or the sequence axis alone."""


def flatten_tokens(graph: Graph) -> Graph | None:
    """The graph on tokens ``[T, H]`` instead of ``[B, S, H]``, or ``None`` if an op needs both
    axes.

    Leading axes ``(B, S)`` become ``T = B*S`` in every value; ops must be pointwise, work on the
    last axis, or be reshapes between the two forms. Row-major order makes that the same
    computation.
    """
    try:
        return _Flatten(graph).run()
    except MoecError:
        return None


class _Flatten:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.batch, self.sequence, self.tokens = dim("B"), dim("S"), dim("T")
        ranges = {k: v for k, v in graph.ranges.items() if k not in ("B", "S")}
        self.builder = Builder({**ranges, "T": graph.ranges["B"]})
        self.mapping: dict[Value, Value] = {}

    def run(self) -> Graph:
        inputs = [self.input(v) for v in self.graph.inputs]
        for op in self.graph.ops:
            self.builder.loc = op.loc
            results = self.op(op)
            self.mapping.update(zip(op.results, results, strict=True))
        return self.builder.graph(
            self.graph.name, inputs, [self.mapping[v] for v in self.graph.outputs]
        )

    def input(self, value: Value) -> Value:
        new = Value(Type(value.type.dtype, self.shape(value.type.shape)), value.hint)
        self.mapping[value] = new if new.type != value.type else value
        return self.mapping[value]

    def shape(self, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        if tuple(shape[:2]) == (self.batch, self.sequence):
            shape = (self.tokens, *shape[2:])
        return tuple(self.size(d) for d in shape)

    def size(self, value: Dim) -> Dim:
        if isinstance(value, int) or not symbols(value) & {"B", "S"}:
            return value
        quotient = substitute(value, {"B": self.tokens, "S": 1})
        if substitute(quotient, {"T": product((self.batch, self.sequence))}) != value:
            raise _NotFlat(str(value))
        return quotient

    def is_leading(self, value: Value) -> bool:
        return value.type.shape[:2] == (self.batch, self.sequence)

    def op(self, op: Op) -> tuple[Value, ...]:
        operands = [self.mapping[v] for v in op.operands]
        if op.kind in ("t.reshape", "t.expand", "t.full"):
            made = self.builder(
                op.kind,
                *operands,
                hint=op.result.hint,
                **{**op.attrs, "shape": self.shape(op.attrs["shape"])},
            )
            return (made,)
        attrs = {k: self.size(v) if symbols(v) else v for k, v in op.attrs.items()}
        if any(self.is_leading(v) for v in (*op.operands, *op.results)):
            attrs |= self.checked(op)
        found = self.builder(
            op.kind, *operands, hint=[r.hint for r in op.results], body=op.body, **attrs
        )
        return found if isinstance(found, tuple) else (found,)

    def checked(self, op: Op) -> dict[str, Any]:
        """Refuse an op that could tell batch from sequence; its axes counted from the back."""
        if opdef(op.kind).pointwise and all(
            v.type.rank in (0, 1) or self.is_leading(v) for v in op.operands
        ):
            return {}
        if op.kind in _LAST_AXIS:
            return {}
        if op.kind == "t.take" and not self.is_leading(op.operands[0]):
            return {}
        rank = op.operands[0].type.rank
        if op.kind in _BY_AXIS and all(self.is_leading(v) for v in op.operands):
            axes = op.attrs.get("dims", (op.attrs.get("dim", -1),))
            if all(a in (-1, rank - 1) for a in axes) and rank > 2:
                return {"dims": (-1,)} if "dims" in op.attrs else {"dim": -1}
        raise _NotFlat(op.kind)

"""Gradients that round as autograd's: for the parts of a float64 graph that are in a smaller dtype.

A model in float64 may still take its router's scores in float32. Another order of the same
arithmetic there would differ by float32's rounding, in a model whose other numbers agree to 1e-16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.ir.types import FLOATS
from moec.ops.shapes import axis, reduce_to, reduced

Vjp = Callable[..., Sequence[Value | None]]


def has_smaller_floats(graph: Graph) -> bool:
    """Whether a graph on float64 tokens computes something in a smaller dtype."""
    if not graph.inputs or graph.inputs[0].type.dtype != "f64":
        return False
    return any(_is_smaller(v) for op in graph.ops for v in op.results)


def has_smaller_rows(graph: Graph) -> bool:
    """Whether a graph on float64 tokens computes something on the experts' rows in a smaller
    dtype.
    """
    rows = {op.results[0].type.shape[0] for op in graph.ops if op.kind == "moe.dispatch"}
    made = (v for op in graph.ops for v in op.results if v.type.shape[:1] and _is_smaller(v))
    return has_smaller_floats(graph) and any(v.type.shape[0] in rows for v in made)


def _is_smaller(value: Value) -> bool:
    return value.type.dtype in FLOATS and value.type.dtype != "f64"


def gradient_rule(op: Op, exact: bool) -> Vjp | None:
    """The gradient of an op: PyTorch's own formula where ``exact`` and its dtype is a smaller
    one.
    """
    if exact and op.kind in _EXACT and _is_smaller(op.results[0]) and not _counts_tokens(op):
        return _EXACT[op.kind]
    return opdef(op.kind).vjp


def _counts_tokens(op: Op) -> bool:
    """Whether an op is a mean over a number of elements that is not known."""
    shape = op.operands[0].type.shape
    return op.kind == "t.mean" and not all(isinstance(shape[d], int) for d in op.attrs["dims"])


def _kernel(of: str, saves: str) -> Vjp:
    def vjp(b: Any, op: Op, g: Value) -> list[Value | None]:
        saved = op.result if saves == "result" else op.operands[0]
        return [b("t.backward", g, saved, of=of, **op.attrs)]

    return vjp


def _div(b: Any, op: Op, g: Value) -> list[Value | None]:
    """``g / y`` and ``-g * ((x / y) / y)``; a number as divisor has no gradient."""
    if len(op.operands) == 1:
        return [b("t.div", g, other=op.attrs["other"])]
    x, y = op.operands
    of_divisor = b("t.mul", b("t.neg", g), b("t.div", op.result, y))
    return [reduce_to(b, b("t.div", g, y), x.type), reduce_to(b, of_divisor, y.type)]


def _mean(b: Any, op: Op, g: Value) -> list[Value | None]:
    """The gradient over all elements, divided by their number."""
    shape = op.operands[0].type.shape
    kept = reduced(shape, op.attrs["dims"], True)
    spread = b("t.expand", b("t.reshape", g, shape=kept), shape=shape)
    count = 1
    for d in op.attrs["dims"]:
        count *= int(shape[axis(d, len(shape))])
    return [b("t.div", spread, other=float(count))]


_EXACT: dict[str, Vjp] = {
    "t.softmax": _kernel("softmax", "result"),
    "t.sigmoid": _kernel("sigmoid", "result"),
    "t.tanh": _kernel("tanh", "result"),
    "t.silu": _kernel("silu", "argument"),
    "t.log_sigmoid": _kernel("log_sigmoid", "argument"),
    "t.gelu": _kernel("gelu", "argument"),
    "t.softplus": _kernel("softplus", "argument"),
    "t.div": _div,
    "t.mean": _mean,
}

__all__ = ["gradient_rule", "has_smaller_floats", "has_smaller_rows"]

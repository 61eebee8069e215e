"""What an op does in a few words: the name of its range in a profiler's trace."""

from __future__ import annotations

from moec.ir.graph import Op
from moec.ir.opdef import opdef

# Results of these are views, or next to nothing.
VIEWS = {"t.reshape", "t.permute", "t.expand", "t.split", "t.slice", "t.full", "t.size"}
# By the value that says what they are about: the place of the weights among the operands.
_PRODUCTS = {"t.linear": 1, "t.matmul": 1, "moe.grouped_mm": 1}
_ARITHMETIC = {"t.add", "t.sub", "t.mul", "t.div", "t.neg", "t.cast", "t.merge", "t.where"}
_MOST_WORDS = 6


def label(op: Op) -> str:
    """The weights, activations and row movements of an op or of its body: ``gather+up_proj+silu``.

    Where there is nothing but arithmetic, the arithmetic.
    """
    ops = [op] if op.body is None else list(op.body.ops)
    telling = [o for o in ops if o.kind not in VIEWS | _ARITHMETIC]
    words = list(dict.fromkeys(_word(o) for o in telling or ops if o.kind not in VIEWS))
    return "+".join(words[:_MOST_WORDS]) or op.kind


def _word(op: Op) -> str:
    if op.kind in _PRODUCTS:
        return op.operands[_PRODUCTS[op.kind]].hint
    if op.kind == "moe.grouped_outer":
        return op.result.hint
    if op.kind == "t.backward":
        return f"{op.attrs['of']}_backward"
    if op.kind == "moe.activate":
        return str(op.attrs["fn"])
    return op.kind.partition(".")[2]


def has_range(op: Op) -> bool:
    """Whether an op is worth a range of its own."""
    return op.body is not None or (op.kind not in VIEWS and not _is_scalar(op))


def _is_scalar(op: Op) -> bool:
    return opdef(op.kind).pointwise and all(v.type.rank == 0 for v in op.results)

"""Finding the last multiplication of rows by the weights of their routing: the combine does it."""

from __future__ import annotations

from moec.ir.builder import Builder
from moec.ir.graph import Value


def split_weight(b: Builder, added: Value, dtype: str) -> tuple[Value, Value | None]:
    """``added`` without a last multiplication by the row weights, if it has one."""
    value = added
    op = b.made_by(value)
    # A float64 model is held to float64's rounding: what its code rounds on the way stays rounded.
    while op is not None and op.kind == "t.cast" and dtype != "f64":
        value = op.operands[0]
        op = b.made_by(value)
    if op is None or op.kind != "t.mul" or len(op.operands) != 2:
        return added, None
    for rows, column in (op.operands, op.operands[::-1]):
        if _is_weight_column(b, column) and rows.type.rank == 2:
            return _uncast(b, rows, added), column
    return added, None


def _is_weight_column(b: Builder, value: Value) -> bool:
    op = b.made_by(value)
    while op is not None and op.kind in ("t.cast", "t.reshape"):
        op = b.made_by(op.operands[0])
    return op is not None and op.kind == "moe.permute"


def _uncast(b: Builder, rows: Value, added: Value) -> Value:
    """Undo a widening before the weighting: the combine sums in float32 in any case."""
    op = b.made_by(rows)
    widened = (
        op is not None and op.kind == "t.cast" and op.operands[0].type.dtype == added.type.dtype
    )
    return op.operands[0] if widened and op is not None else rows


__all__ = ["split_weight"]

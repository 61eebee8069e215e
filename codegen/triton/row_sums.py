"""Sums of the numbers of each row, in one order however many rows there are."""

from __future__ import annotations

from collections.abc import Mapping

from moec.codegen.triton.context import Context, only_if, remarks, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.tiles import power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import Dim, Range, canon, ceildiv, product, python_source
from moec.ir.graph import Op

LIBRARY = "sum_rows"
ROWS, BLOCK = 8, 512


def is_row_sum(op: Op) -> bool:
    """Whether an op is a sum, mean or inner product of each row's numbers."""
    x = op.operands[0].type if op.operands else None
    if x is None or not x.is_float or x.rank < 2 or not isinstance(x.shape[-1], int):
        return False
    if op.kind == "moe.row_dot":
        return x.shape[-1] > 0
    last = op.attrs.get("dims") in ((-1,), (x.rank - 1,))
    return op.kind in ("t.sum", "t.mean") and last and x.shape[-1] > 0


def _rows(op: Op) -> Dim:
    return canon(product(op.operands[0].type.shape[:-1]))


def ask_row_sum(op: Op, ranges: Mapping[str, Range]) -> Facts:
    """What the kernel needs of sizes.

    Raises:
        Unsupported: it cannot have that.
    """
    facts = Facts(op, ranges)
    facts.programs(ceildiv(_rows(op), ROWS))
    return facts


def emit_row_sum(writer: Writer, op: Op, context: Context, facts: Facts) -> None:
    """Write the host lines."""
    context.contiguous(writer, op.operands)
    x, columns = op.operands[0], int(op.operands[0].type.shape[-1])
    names = [context.names[v] for v in op.operands]
    y, rows = context.allocate(writer, op.result), python_source(_rows(op))
    remarks(writer, facts.limits)
    divisor = columns if op.kind == "t.mean" else 1
    wide = x.type.dtype == "f64"
    sizes = f"N={columns}, DOT={len(names) == 2}, DIVISOR={divisor}, DOUBLE={wide}"
    sizes += f", BR={ROWS}, BN={min(BLOCK, power_of_two(columns))}"
    with writer.block(f"if {only_if(_rows(op))}:"):
        inner = f"{names[0]}, {names[-1]}, {y}, {rows}, {sizes}"
        write(writer, f"{LIBRARY}[(triton.cdiv({rows}, {ROWS}),)]({inner})")


__all__ = ["LIBRARY", "ask_row_sum", "emit_row_sum", "is_row_sum"]

"""Bias gradients: the sum of each expert's rows, without waiting for the host."""

from __future__ import annotations

from collections.abc import Mapping

from moec.codegen import aten
from moec.codegen.triton.context import Context, only_if, remarks, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.tiles import power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import Range
from moec.ir.graph import Op

SHARES = 8  # programs that share an expert's rows: one expert may have them all
ROWS, BLOCK = 16, 256
LIBRARY = "sum_groups"


def ask(op: Op, ranges: Mapping[str, Range]) -> Facts:
    """What the kernel needs of sizes.

    Raises:
        Unsupported: it cannot have that.
    """
    facts, columns = Facts(op, ranges), int(op.result.type.shape[1])
    facts.rows(op.operands[0].type.shape[0])
    facts.columns(columns, min(BLOCK, power_of_two(columns)))
    return facts


def emit_group_sum(writer: Writer, op: Op, context: Context, facts: Facts) -> None:
    """Write the host lines of ``moe.group_sum``."""
    x, offsets = op.operands
    context.contiguous(writer, op.operands)
    experts, columns = int(op.result.type.shape[0]), int(op.result.type.shape[1])
    dtype = "f64" if x.type.dtype == "f64" else "f32"
    block = min(BLOCK, power_of_two(columns))
    partial, result = context.names.fresh("partial"), context.names.add(op.result)
    size = f"({SHARES}, {experts}, {columns})"
    remarks(writer, facts.limits)
    writer.line(f"{partial} = torch.zeros({size}, dtype={aten.dtype(dtype)}, device=device)")
    sizes = f"E={experts}, N={columns}, SHARES={SHARES}, BR={ROWS}, BN={block}"
    inner = f"{context.names[x]}, {context.names[offsets]}, {partial}, {sizes}"
    grid = f"({experts * SHARES}, {-(-columns // block)})"
    with writer.block(f"if {only_if(x.type.shape[0])}:"):
        write(writer, f"{LIBRARY}[{grid}]({inner})")
    writer.line(f"{result} = {partial}.sum(0).to({aten.dtype(op.result.type.dtype)})")
    writer.line(f"del {partial}")

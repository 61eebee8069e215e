"""Bias gradients: the sum of each expert's rows, without waiting for the host."""

from __future__ import annotations

from moec.codegen import aten
from moec.codegen.triton.context import Context, only_if, write
from moec.codegen.triton.tiles import power_of_two
from moec.codegen.writer import Writer
from moec.ir.graph import Op

SHARES = 8  # programs that share an expert's rows: one expert may have them all
ROWS = 16
LIBRARY = "sum_groups"


def emit_group_sum(writer: Writer, op: Op, context: Context) -> None:
    """Write the host lines of ``moe.group_sum``."""
    x, offsets = op.operands
    context.contiguous(writer, op.operands)
    experts, columns = int(op.result.type.shape[0]), int(op.result.type.shape[1])
    dtype = "f64" if x.type.dtype == "f64" else "f32"
    block = min(256, power_of_two(columns))
    partial, result = context.names.fresh("partial"), context.names.add(op.result)
    size = f"({SHARES}, {experts}, {columns})"
    writer.line(f"{partial} = torch.zeros({size}, dtype={aten.dtype(dtype)}, device=device)")
    sizes = f"E={experts}, N={columns}, SHARES={SHARES}, BR={ROWS}, BN={block}"
    inner = f"{context.names[x]}, {context.names[offsets]}, {partial}, {sizes}"
    grid = f"({experts * SHARES}, {-(-columns // block)})"
    with writer.block(f"if {only_if(x.type.shape[0])}:"):
        write(writer, f"{LIBRARY}[{grid}]({inner})")
    writer.line(f"{result} = {partial}.sum(0).to({aten.dtype(op.result.type.dtype)})")
    writer.line(f"del {partial}")

"""Products of few tokens with one matrix, as kernels of ours: then a whole call is launches."""

from __future__ import annotations

from collections.abc import Mapping

from moec.codegen.triton.context import Context, only_if, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.tiles import FEW_ROWS
from moec.codegen.writer import Writer
from moec.ir.dims import Range, python_source
from moec.ir.graph import Op
from moec.ir.types import SIZES

LIBRARY = "few_linear"
_COLUMNS = 16
_BYTES = 512  # of a row that are read at a time


def is_few_linear(op: Op) -> bool:
    """Whether an op is a product ``[T, K] x [N, K]`` that the kernel takes."""
    if op.kind != "t.linear":
        return False
    x, w = op.operands[0].type, op.operands[1].type
    dtypes = {v.type.dtype for v in (*op.operands, *op.results)}
    plain = len(dtypes) == 1 and dtypes <= {"bf16", "f16", "f32"} and w.rank == 2
    return plain and x.rank == 2 and isinstance(w.elements, int) and w.elements > 0


def ask(op: Op, ranges: Mapping[str, Range]) -> Facts:
    """What the kernel, all of whose indices have 32 bits, needs of sizes.

    Raises:
        Unsupported: it cannot have that.
    """
    facts, (n, k) = Facts(op, ranges), (int(d) for d in op.operands[1].type.shape)
    depth = _BYTES // SIZES[op.result.type.dtype]
    rows = op.operands[0].type.shape[0] + FEW_ROWS
    facts.word(rows * (k + depth), "places in rows of few tokens")
    facts.word(rows * (n + _COLUMNS), "places in results of few tokens")
    facts.word((n + _COLUMNS) * (k + depth), "places in one matrix")
    facts.columns(n, _COLUMNS)
    return facts


def emit_few_linear(writer: Writer, op: Op, context: Context) -> None:
    """Write the host lines."""
    context.contiguous(writer, op.operands)
    names = [context.names[v] for v in op.operands]
    y = context.allocate(writer, op.result)
    rows = op.operands[0].type.shape[0]
    n, k = (int(d) for d in op.operands[1].type.shape)
    depth = _BYTES // SIZES[op.result.type.dtype]
    bias = names[2] if len(names) == 3 else y
    sizes = f"N={n}, K={k}, BIAS={len(names) == 3}, BM={FEW_ROWS}, BN={_COLUMNS}, BK={depth}"
    grid = f"(triton.cdiv({python_source(rows)}, {FEW_ROWS}), {-(-n // _COLUMNS)})"
    with writer.block(f"if {only_if(rows)}:"):
        inner = f"{names[0]}, {names[1]}, {bias}, {y}, {python_source(rows)}, {sizes}"
        write(writer, f"{LIBRARY}[{grid}]({inner}, num_stages=3)")


__all__ = ["LIBRARY", "ask", "emit_few_linear", "is_few_linear"]

"""Products of few tokens with one matrix, as kernels of ours: then a whole call is launches."""

from __future__ import annotations

from moec.codegen.triton.context import Context, only_if, write
from moec.codegen.triton.tiles import FEW_ROWS
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Graph, Op
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
    return plain and x.rank == 2 and isinstance(w.elements, int) and 0 < w.elements < 2**31


def has_few_linear(graph: Graph) -> bool:
    """Whether a graph has such a product."""
    return any(map(is_few_linear, graph.ops))


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


__all__ = ["LIBRARY", "emit_few_linear", "has_few_linear", "is_few_linear"]

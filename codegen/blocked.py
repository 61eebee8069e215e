"""Row work of the ``aten`` target: a loop over blocks of rows that stay in the cache."""

from __future__ import annotations

from moec.codegen import aten
from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Graph, Op, Value

BLOCK_ELEMENTS = 1 << 17  # of one value in a block: half a megabyte in float32, about an L2 cache


def emit_blocked(writer: Writer, op: Op, names: PythonNames) -> bool:
    """Write a ``kern.pointwise`` op as a loop over row blocks; other ops are not handled."""
    if op.kind != "kern.pointwise" or op.body is None:
        return False
    rows = op.results[0].type.shape[0]
    for result in op.results:
        kind = aten.dtype(result.type.dtype)
        size = aten.shape(result.type.shape)
        name = names.add(result)
        writer.line(f"{name} = torch.empty({size}, dtype={kind}, device=device)")
    count = python_source(rows)
    with writer.block(f"for low in range(0, {count}, {block_rows(op)}):"):
        writer.line(f"high = low + {block_rows(op)}")
        _emit_body(writer, op, op.body, names)
    return True


def block_rows(op: Op) -> int:
    """Rows of a block: a power of two, so that the widest value of a part fills the cache."""
    widths = [int(v.type.shape[1]) for v in (*op.operands, *op.results) if v.type.rank == 2]
    rows = max(1, BLOCK_ELEMENTS // max(min(widths, default=1), 1))
    return 1 << min(max(rows.bit_length() - 1, 4), 16)


def _emit_body(writer: Writer, op: Op, body: Graph, names: PythonNames) -> None:
    local: dict[Value, str] = {}
    for parameter, argument in zip(body.inputs, op.operands, strict=True):
        local[parameter] = names[argument]
        if parameter.type.rank:
            local[parameter] = names.fresh(f"{parameter.hint}_rows")
            writer.line(f"{local[parameter]} = {names[argument]}[low:high]")
    last = {v: inner for inner in body.ops for v in (*inner.operands, *inner.results)}
    for inner in body.ops:
        arguments = [local[v] for v in inner.operands]
        for v in inner.results:
            local[v] = names.fresh(f"{v.hint}_rows")
            names.values[local[v]] = v
        targets = ", ".join(local[v] for v in inner.results)
        writer.line(f"{targets} = {_expression(inner, arguments)}")
        _emit_stores(writer, op, body, inner, local, names)
        # the next ones take its memory while that is in the cache
        dead = [
            local[v]
            for v in dict.fromkeys((*inner.operands, *inner.results))
            if last[v] is inner and v not in body.inputs
        ]
        if dead:
            writer.line(f"del {', '.join(dead)}")
    for result, value in zip(op.results, body.outputs, strict=True):
        if value in body.inputs:
            writer.line(f"{names[result]}[low:high] = {local[value]}")
    rows = [local[v] for v in body.inputs if v.type.rank]
    if rows:  # a view left after the loop would keep all rows
        writer.line(f"del {', '.join(rows)}")


def _emit_stores(
    writer: Writer, op: Op, body: Graph, inner: Op, local: dict[Value, str], names: PythonNames
) -> None:
    """Write the results of the kernel that an op of its body makes."""
    for result, value in zip(op.results, body.outputs, strict=True):
        if value in inner.results:
            writer.line(f"{names[result]}[low:high] = {local[value]}")


def _expression(op: Op, arguments: list[str]) -> str:
    if op.kind == "t.reshape":
        rest = ", ".join(str(d) for d in op.result.type.shape[1:])
        return f"{arguments[0]}.reshape(-1{', ' + rest if rest else ''})"
    return aten.expression(op, arguments)

"""Separate matrices of the experts, for a target whose grouped products take them one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.ir.graph import Graph, Op, Value, users

# Readers that take a tuple of matrices or vectors, and at which place
_TAKES_PARTS = {"moe.grouped_mm": 1, "moe.expert_rows": 0}


def kept_apart(graph: Graph, saved: Sequence[Value]) -> frozenset[Op]:
    """The stacks that nothing needs as one tensor: these are never copied together."""
    readers = users(graph)
    leaves = {*graph.returned, *saved}
    return frozenset(
        op
        for op in graph.ops
        if op.kind == "t.stack"
        and op.result not in leaves
        and all(_takes_parts(reader, op.result) for reader in readers.get(op.result, ()))
    )


def _takes_parts(reader: Op, stack: Value) -> bool:
    place = _TAKES_PARTS.get(reader.kind)
    return place is not None and [i for i, v in enumerate(reader.operands) if v is stack] == [place]


def emit_stack(writer: Writer, op: Op, names: PythonNames, apart: Collection[Op]) -> bool:
    """Write a stack that stays a tuple; other ops are not handled."""
    if op not in apart:
        return False
    parts = ", ".join(names[v] for v in op.operands)
    writer.line(f"{names.add(op.result)} = moe.stack({parts})")
    return True


__all__ = ["emit_stack", "kept_apart"]

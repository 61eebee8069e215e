"""Emitting a whole module for a target."""

from __future__ import annotations

from collections.abc import Callable

from moec.codegen.blocked import emit_blocked
from moec.codegen.expert_lists import emit_stack, kept_apart
from moec.codegen.host import EmitOp, emit_aten, emit_host, partition
from moec.codegen.names import RESERVED, PythonNames
from moec.codegen.requirements import of_ops
from moec.codegen.writer import Writer
from moec.errors import CodegenError
from moec.inputs import dim_names
from moec.ir.graph import Graph, Op
from moec.ir.text import identifier, show

TARGETS = ("triton", "aten")


def emit_module(
    graph: Graph,
    target: str = "triton",
    after_op: Callable[[Op], str] | None = None,
    *,
    ranges: bool = False,
) -> str:
    """Python source of a module with ``forward`` (and ``backward`` for a joint graph).

    ``forward(*inputs)`` returns ``(outputs, saved)``; ``backward`` takes the inputs listed in
    ``BACKWARD_INPUTS``, the saved values and the cotangents, and returns one gradient (or
    ``None``) an input. Deterministic: equal graphs give equal text. ``after_op`` gives a line to
    write after the lines of each op, for measurements.

    With ``ranges`` the functions take the name of a region first, and each op's lines are a range
    in a profiler's trace; the kernels are left out, for those of the plain module to be used.
    """
    if target not in TARGETS:
        raise CodegenError(f"unknown target {target!r}; targets: {', '.join(TARGETS)}")
    clash = sorted(RESERVED & {*graph.ranges, *dim_names(graph)})
    if clash:
        raise CodegenError(
            f"@{identifier(graph.name)}: emitted code uses the name {clash[0]!r} itself; give that"
            " dim another name"
        )
    writer = Writer()
    program = partition(graph)
    _emit_header(writer, graph, target)
    if ranges:
        writer.lines("from moec.runtime import ranges", "")
    if target == "triton":
        from moec.codegen.triton import TritonEmitter

        emitter = TritonEmitter(graph)
        if not ranges:
            emitter.emit_kernels(writer)
        follow = _followed(emitter.emit_op, after_op)
        found = [*of_ops(graph), *emitter.requirements]
        emit_host(writer, program, follow, target, emitter.names, ranges, found)
    else:
        apart = kept_apart(graph, program.saved)

        def emit_op(out: Writer, op: Op, names: PythonNames) -> bool:
            return emit_stack(out, op, names, apart) or emit_blocked(out, op, names)

        follow, found = _followed(emit_op, after_op), of_ops(graph)
        emit_host(writer, program, follow, target, ranges=ranges, found=found)
    return writer.text()


def _followed(emit_op: EmitOp, after_op: Callable[[Op], str] | None) -> EmitOp:
    """``emit_op`` with a line after each op."""
    if after_op is None:
        return emit_op

    def emit(writer: Writer, op: Op, names: PythonNames) -> bool:
        if not emit_op(writer, op, names):
            emit_aten(writer, op, names)
        writer.line(after_op(op))
        return True

    return emit


def _emit_header(writer: Writer, graph: Graph, target: str) -> None:
    writer.line(f'"""@{identifier(graph.name)} for the {target} target, emitted by moec.')
    writer.line("")
    for line in (
        show(graph, locations=False)
        .rstrip()
        .replace("\\", "\\\\")
        .replace('"""', "'''")
        .split("\n")
    ):
        writer.line(line)
    writer.line('"""')
    writer.lines("", "import torch", "import torch.nn.functional as F")
    if target == "triton":
        writer.lines("import triton", "import triton.language as tl")
    libraries = ", ".join(["grouped as moe", "guards", *(["launch"] if target == "triton" else [])])
    writer.lines("", f"from moec.runtime import {libraries}", "")

"""Emitting a whole module for a target."""

from __future__ import annotations

import symtable
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from moec.codegen.blocked import emit_blocked
from moec.codegen.expert_lists import emit_stack, kept_apart
from moec.codegen.host import EmitOp, Function, emit_aten, emit_functions, emit_host, partition
from moec.codegen.names import RESERVED, PythonNames
from moec.codegen.requirements import Requirement, of_ops
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

    ``forward(*inputs)`` returns ``(outputs, saved)``; ``backward`` takes a list of the inputs at
    ``BACKWARD_INPUTS``, the saved values and the cotangents, empties it, and returns one gradient
    (or ``None``) an input. Deterministic: equal graphs give equal text. ``after_op`` gives a line
    to write after the lines of each op, for measurements.

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
    writer, emitter = Writer(), emitter_of(graph, target)
    _emit_header(writer, graph, target)
    if ranges:
        writer.lines("from moec.runtime import ranges", "")
    else:
        emitter.emit_kernels(writer)
    follow = _followed(emitter.emit_op, after_op)
    found = [*of_ops(graph), *emitter.requirements]
    emit_host(writer, partition(graph), follow, target, emitter.names, ranges, found)
    source = writer.text()
    _refuse_unknown_sizes(graph, source, ("forward", "backward"))
    return source


def emit_part_module(graph: Graph, target: str, functions: Sequence[Function]) -> str:
    """Python source of a module with some functions of ops of a graph, the kernels of all its ops
    among them: those that :func:`emit_module` writes.
    """
    writer, emitter = Writer(), emitter_of(graph, target, [f.ops for f in functions])
    _emit_header(writer, graph, target)
    emitter.emit_kernels(writer)
    found = [*of_ops(graph), *emitter.requirements]
    emit_functions(writer, graph, functions, emitter.emit_op, emitter.names, found)
    source = writer.text()
    _refuse_unknown_sizes(graph, source, [f.name for f in functions])
    return source


def _refuse_unknown_sizes(graph: Graph, source: str, hosts: Collection[str]) -> None:
    """Refuse code that reads a size which no tensor that it is given has as an axis."""
    names = {*graph.ranges, *dim_names(graph)}
    for table in symtable.symtable(source, "emitted", "exec").get_children():
        unknown = _read_by(table, hosts) & names
        if unknown:
            raise CodegenError(
                f"@{identifier(graph.name)}: {table.get_name()} needs the size {min(unknown)!r},"
                " which no tensor that it is given has as an axis"
            )


def _read_by(table: symtable.SymbolTable, hosts: Collection[str]) -> set[str]:
    """What one of some functions reads that it does not bind."""
    is_host = isinstance(table, symtable.Function) and table.get_name() in hosts
    return set(table.get_globals()) if is_host else set()  # type: ignore[attr-defined]


class Emitter(Protocol):
    """What writes the kernels of a graph, and the lines of each op; ``names`` are those that no
    value may take, ``requirements`` what the kernels rest on.
    """

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def requirements(self) -> Sequence[Requirement]: ...

    def emit_kernels(self, writer: Writer) -> None: ...

    def emit_op(self, writer: Writer, op: Op, names: PythonNames) -> bool: ...


def emitter_of(graph: Graph, target: str, functions: Sequence[Sequence[Op]] = ()) -> Emitter:
    """The emitter of a graph for a target; ``functions`` are the ops of each function that is to be
    written, in order: by default of ``forward`` and ``backward``.
    """
    if target == "triton":
        from moec.codegen.triton import TritonEmitter

        return TritonEmitter(graph, functions)
    return _AtenEmitter(kept_apart(graph, partition(graph).saved))


@dataclass(frozen=True)
class _AtenEmitter:
    """Expressions, but for stacks that stay apart and row work by blocks."""

    apart: frozenset[Op]
    names: frozenset[str] = frozenset()
    requirements: tuple[Requirement, ...] = ()

    def emit_kernels(self, writer: Writer) -> None:
        """There are none."""

    def emit_op(self, writer: Writer, op: Op, names: PythonNames) -> bool:
        """Write the lines of an op; false if it is left to its PyTorch expression."""
        return emit_stack(writer, op, names, self.apart) or emit_blocked(writer, op, names)


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

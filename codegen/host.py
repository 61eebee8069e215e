"""The host part of an emitted module: ``forward`` and ``backward`` as plain PyTorch, one op a
line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from moec.codegen import aten
from moec.codegen.labels import has_range, label
from moec.codegen.names import PythonNames
from moec.codegen.requirements import Requirement, emit_checks
from moec.codegen.writer import Writer
from moec.inputs import dim_names
from moec.ir.dims import symbols
from moec.ir.graph import Graph, Op, Value, backward_ops, forward_ops

# The name of the list that ``backward`` takes: inputs, saved values, cotangents
HELD = "held"
EmitOp = Callable[[Writer, Op, PythonNames], bool]


@dataclass(frozen=True)
class Program:
    """A graph cut in two: what runs forward, what runs backward, and the values kept between."""

    graph: Graph
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    saved: tuple[Value, ...]
    backward_inputs: tuple[int, ...]

    @property
    def arguments(self) -> tuple[Value, ...]:
        """What ``backward`` takes."""
        inputs = (self.graph.inputs[i] for i in self.backward_inputs)
        return (*inputs, *self.saved, *self.graph.cotangents)


@dataclass(frozen=True)
class Function:
    """Some ops of a graph as a function of their own: it takes ``reads`` and returns ``makes``."""

    name: str
    reads: tuple[Value, ...]
    ops: tuple[Op, ...]
    makes: tuple[Value, ...]


def partition(graph: Graph) -> Program:
    """Cut a graph at the outputs; constants are rebuilt on either side rather than kept."""
    ahead, behind = forward_ops(graph), backward_ops(graph)
    forward = tuple(op for op in graph.ops if op in ahead)
    backward = [op for op in graph.ops if op in behind]
    constants = {v: op for op in forward if op.kind == "t.full" for v in op.results}
    made = {v for op in forward for v in op.results}
    read = list(
        dict.fromkeys(
            [v for op in backward for v in op.operands]
            + [g for g in graph.gradients if g is not None]
        )
    )
    again = [constants[v] for v in read if v in constants]
    saved = tuple(v for v in read if v in made and v not in constants)
    behind_all = (*dict.fromkeys(again), *backward)
    given = {v for v in graph.inputs if v in read}
    sizes = [v for op in behind_all for v in op.results]
    given |= set(that_bind(sizes, [*given, *saved, *graph.cotangents], graph.inputs))
    needed = tuple(i for i, v in enumerate(graph.inputs) if v in given)
    return Program(graph, forward, behind_all, saved, needed)


def that_bind(
    values: Sequence[Value], known: Sequence[Value], others: Sequence[Value]
) -> list[Value]:
    """Those of ``others`` that give the sizes which ``values`` have and no known one has as an
    axis, as far as any does.
    """
    needed = {s for v in values for d in v.type.shape for s in symbols(d)}
    missing = needed - _bound(known)
    giving = ([v for v in others if name in _bound([v])] for name in sorted(missing))
    return [found[0] for found in giving if found]


def _bound(values: Sequence[Value]) -> set[str]:
    """The names of the sizes that are axes of values."""
    sizes = (d for v in values for d in v.type.shape)
    return {d.name for d in sizes if isinstance(d, sympy.Symbol)}


def emit_host(
    writer: Writer,
    program: Program,
    emit_op: EmitOp,
    target: str,
    reserved: frozenset[str] = frozenset(),
    ranges: bool = False,
    found: Sequence[Requirement] = (),
) -> None:
    """Write ``forward``, and ``backward`` for a joint graph, with what the runtime reads about
    them.

    No value is called by a name in ``reserved``: those of the module's kernels. ``forward`` first
    checks what was ``found`` to be required. With ``ranges`` the
    functions take the name of a region first, and name it and the op around each op's lines.
    """
    graph = program.graph
    training = bool(graph.cotangents)
    writer.line(f"SAVED = {tuple(v.hint for v in program.saved)!r}")
    writer.line(f"BACKWARD_INPUTS = {program.backward_inputs!r}")
    writer.lines("", "")
    taken = _taken(graph, reserved)
    first = ["region"] if ranges else []
    emit_op = _ranged(emit_op) if ranges else emit_op
    _emit_forward(writer, program, emit_op, training, PythonNames(taken), first, found)
    if training:
        writer.lines("", "")
        _emit_backward(writer, program, emit_op, PythonNames(taken), first)


def emit_functions(
    writer: Writer,
    graph: Graph,
    functions: Sequence[Function],
    emit_op: EmitOp,
    reserved: frozenset[str] = frozenset(),
    found: Sequence[Requirement] = (),
) -> None:
    """Write functions of ops of a graph; the first one checks what was ``found`` to be required."""
    for place, function in enumerate(functions):
        names = PythonNames(_taken(graph, reserved))
        writer.lines("", "")
        with writer.block(f"def {function.name}({_signature([], function.reads, names)}):"):
            _bind(writer, function.reads, names)
            emit_checks(writer, graph, () if place else found)
            _emit_ops(writer, function.ops, set(function.makes), names, emit_op)
            writer.line(f"return {_tuple(function.makes, names.__getitem__)}")


def _taken(graph: Graph, reserved: frozenset[str]) -> frozenset[str]:
    return reserved | frozenset(graph.ranges) | frozenset(dim_names(graph))


def _ranged(emit_op: EmitOp) -> EmitOp:
    """As ``emit_op``, with a range around the lines of each op that does more than look."""

    def emit(writer: Writer, op: Op, names: PythonNames) -> bool:
        if not has_range(op):
            return emit_op(writer, op, names)
        with writer.block(f"with ranges.of(region, {label(op)!r}):"):
            if not emit_op(writer, op, names):
                emit_aten(writer, op, names)
        return True

    return emit


def _signature(first: Sequence[str], values: Sequence[Value], names: PythonNames) -> str:
    return ", ".join([*first, *(names.add(v) for v in values)])


def _emit_forward(
    writer: Writer,
    program: Program,
    emit_op: EmitOp,
    training: bool,
    names: PythonNames,
    first: Sequence[str],
    found: Sequence[Requirement],
) -> None:
    graph = program.graph
    with writer.block(f"def forward({_signature(first, graph.inputs, names)}):"):
        writer.line(f'"""{", ".join(f"{names[v]}: {v.type}" for v in graph.inputs)}."""')
        _bind(writer, graph.inputs, names)
        emit_checks(writer, graph, found)
        keep = {*graph.outputs, *program.saved, *graph.inputs}
        _emit_ops(writer, program.forward, keep, names, emit_op)
        outputs = _tuple(graph.outputs, names.__getitem__)
        writer.line(
            f"return {outputs}, {_tuple(program.saved, names.__getitem__)}"
            if training
            else f"return {outputs}, ()"
        )


def _emit_backward(
    writer: Writer,
    program: Program,
    emit_op: EmitOp,
    names: PythonNames,
    first: Sequence[str],
) -> None:
    graph = program.graph
    with writer.block(f"def backward({', '.join([*first, HELD])}):"):
        writer.line('"""Gradients of the inputs, in their order; None where none is needed.')
        writer.lines("", f"The list {HELD} is emptied: what was in it is freed on the way.", '"""')
        arguments = _tuple(program.arguments, names.add)
        writer.line(f"{arguments} = {HELD}")
        writer.line(f"{HELD}.clear()")
        _bind(writer, program.arguments, names)
        keep = {g for g in graph.gradients if g is not None}
        _emit_ops(writer, program.backward, keep, names, emit_op)
        returned = ", ".join("None" if g is None else names[g] for g in graph.gradients)
        writer.line(f"return ({returned},)")


def _tuple(values: Sequence[Value], name: Callable[[Value], str]) -> str:
    inner = ", ".join(map(name, values))
    return f"({inner},)" if values else "()"


def _bind(writer: Writer, values: Sequence[Value], names: PythonNames) -> None:
    """Bind the symbols to sizes, and ``device``."""
    bound: set[str] = set()
    for value in values:
        for axis, size in enumerate(value.type.shape):
            if isinstance(size, sympy.Symbol) and size.name not in bound:
                bound.add(size.name)
                writer.line(f"{size.name} = {names[value]}.shape[{axis}]")
    writer.line(f"device = {names[values[0]]}.device")


def _emit_ops(
    writer: Writer, ops: Sequence[Op], keep: set[Value], names: PythonNames, emit_op: EmitOp
) -> None:
    last = {v: op for op in ops for v in (*op.operands, *op.results)}
    place = ""
    for op in ops:
        if op.loc is not None and str(op.loc) != place:
            place = str(op.loc)
            writer.line(f"# {place}")
        if not emit_op(writer, op, names):
            emit_aten(writer, op, names)
        dead = [
            v for v in dict.fromkeys((*op.operands, *op.results)) if last[v] is op and v not in keep
        ]
        if dead:
            writer.line(f"del {', '.join(names[v] for v in dead)}")


def emit_aten(writer: Writer, op: Op, names: PythonNames) -> None:
    """One op as a PyTorch expression."""
    arguments = [names[v] for v in op.operands]
    targets = ", ".join(names.add(v) for v in op.results)
    writer.line(f"{targets} = {aten.expression(op, arguments)}")

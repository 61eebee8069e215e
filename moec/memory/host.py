"""The emitted program as something to walk through: what it holds at each allocation.

The program is read as it is emitted, statement by statement, so what is deleted where, and which
names are left, is known from it and written down nowhere else. Kernels allocate nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moec.codegen.host import HELD, Function, emit_functions, emit_host, partition
from moec.codegen.module import emitter_of
from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.errors import CodegenError
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Op, Value
from moec.ir.types import Type
from moec.memory import sizes
from moec.memory.buffers import Buffer, Held, Layout, Moment
from moec.memory.expressions import Site, is_copy, is_view, layout, scratch


@dataclass(frozen=True)
class HostFunction:
    """``forward``, ``backward`` or a part of either in an emitted module.

    ``values`` says what each name stands for, ``makers`` the op that makes it, in whichever body.
    """

    code: ast.FunctionDef
    graph: Graph
    target: str
    values: Mapping[str, Value]
    makers: Mapping[Value, Op]

    @property
    def arguments(self) -> list[str]:
        """The names of what it takes: its parameters, or what is in the list that it empties."""
        taken = filter(None, map(_arguments, self.code.body))
        return next(taken, [a.arg for a in self.code.args.args])


def _arguments(statement: ast.stmt) -> list[str] | None:
    """The names that the list of arguments is taken apart into, if a statement does that."""
    match statement:
        case ast.Assign(targets=[ast.Tuple(elts=elements)], value=ast.Name(id=name)):
            return _names(elements) if name == HELD else None
    return None


@dataclass(frozen=True)
class Timeline:
    """The allocations of a call in order, and what each group of its results keeps."""

    moments: tuple[Moment, ...]
    returned: tuple[tuple[Held, ...], ...]


def host_functions(graph: Graph, target: str, parts: Sequence[Function] = ()) -> list[HostFunction]:
    """The functions that a lowered graph is emitted as: one, or two for a joint graph; or one for
    each of ``parts``.
    """
    bodies = [part.ops for part in parts]
    emitter, writer = emitter_of(graph, target, bodies), Writer()
    names: list[PythonNames] = []
    places = {op: place for place, op in enumerate(graph.ops)}

    def emit(out: Writer, op: Op, given: PythonNames) -> bool:
        if given not in names:
            names.append(given)
        out.line(str(places[op]))  # a statement that marks the lines of the op
        return emitter.emit_op(out, op, given)

    if parts:
        emit_functions(writer, graph, parts, emit, emitter.names)
    else:
        program = partition(graph)
        bodies = [program.forward, program.backward]
        emit_host(writer, program, emit, target, emitter.names)
    makers = dict(_makers(graph))
    functions = [f for f in ast.parse(writer.text()).body if isinstance(f, ast.FunctionDef)]
    found = []
    for code, ops in zip(functions, bodies, strict=False):
        values = names.pop(0).values if ops else {}
        found.append(HostFunction(code, graph, target, values, makers))
    return found


def _makers(graph: Graph) -> Iterator[tuple[Value, Op]]:
    for op in graph.ops:
        yield from ((v, op) for v in op.results)
        if op.body is not None:
            yield from _makers(op.body)


def walked(
    function: HostFunction,
    arguments: Sequence[Held],
    pinned: Iterable[Buffer] = (),
    *,
    balanced: bool = False,
) -> Timeline:
    """The timeline of a call; ``pinned`` are buffers that somebody else keeps during it."""
    frame = _Frame(function, dict(zip(function.arguments, arguments, strict=True)), balanced)
    frame.run([s for s in function.code.body if _arguments(s) is None])
    kept = frozenset(pinned)
    is_backward = function.code.name == "backward"
    moments = (replace(m, live=m.live | kept, is_backward=is_backward) for m in frame.moments)
    return Timeline(tuple(moments), frame.returned)


class _Frame:
    """The state of a call while it is walked through."""

    def __init__(self, function: HostFunction, names: dict[str, Held], balanced: bool) -> None:
        self.function, self.names = function, names
        self.fullest = _fullest(function.makers, balanced)
        self.numbers: dict[str, Dim] = {}
        self.block: tuple[Dim, Dim] | None = None  # in a loop: all rows, and those of a block
        self.op: Op | None = None
        self.moments: list[Moment] = []
        self.returned: tuple[tuple[Held, ...], ...] = ()

    def run(self, statements: Sequence[ast.stmt]) -> None:
        """Statements in order."""
        for statement in statements:
            match statement:
                case ast.Expr(value=ast.Constant(value=int() as place)):
                    self.op = self.function.graph.ops[place]
                case ast.Expr() | ast.Assign(targets=[ast.Subscript()]):
                    pass  # a docstring, a launch, or what is written into a buffer that is there
                case ast.Assign(targets=[ast.Name() | ast.Tuple() as target], value=value):
                    self._assign([n.id for n in getattr(target, "elts", [target])], value)
                case ast.Delete(targets=targets):
                    for name in _names(targets):
                        del self.names[name]
                case ast.If(body=body, orelse=orelse):  # without rows less is made than with some
                    self.run([*body, *orelse])
                case ast.For(iter=ast.Call(args=[_, count, size]), body=body):
                    self._loop(self._number(count), self._number(size), body)
                case ast.Return(value=ast.Tuple(elts=groups)):
                    self._return(groups)
                case _:
                    raise _unknown(statement)

    def _loop(self, count: Dim, size: Dim, body: Sequence[ast.stmt]) -> None:
        """The first block of rows, which is as large as any; nothing is left of it."""
        self.block = count, sizes.least(count, size)
        self.run(body)
        self.block = None

    def _return(self, groups: Sequence[ast.expr]) -> None:
        if self.function.code.name != "forward":
            groups = [ast.Tuple(elts=list(groups))]
        self.returned = tuple(
            tuple(self.names[e.id] if isinstance(e, ast.Name) else Held() for e in group.elts)
            for group in groups
            if isinstance(group, ast.Tuple)
        )

    # assignments
    def _assign(self, targets: list[str], value: ast.expr) -> None:
        """Bind names to what an expression makes."""
        match value:
            case ast.Attribute(attr="device") | ast.Subscript(value=ast.Attribute(attr="shape")):
                pass  # sizes go by their names
            case ast.BinOp(left=ast.Name(id="low")):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id="triton"))):
                self.numbers[targets[0]] = self._number(value)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="empty" | "zeros")):
                self._allocate(targets[0], self._type(targets[0], value))
            case (
                ast.Subscript(value=ast.Name(id=name), slice=ast.Slice(lower=ast.Name()))
                | ast.Call(func=ast.Attribute(attr="aligned"), args=[ast.Name(id=name)])
            ):  # rows of a block; what lies well, as all but inputs do
                self.names[targets[0]] = self.names[name]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="launch"), attr=function)):
                numbers = [self._number(a) for a in value.args[:-1]]
                self._allocate(targets[0], sizes.made_by(function, numbers))
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="contiguous")):
                self._copy(targets[0], name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="moe"), attr="stack")):
                kept = frozenset[Buffer]().union(*(h.buffers for h in self._read(value)))
                self.names[targets[0]] = Held(kept)
            case _ if targets[0] in self.function.values:
                self._express(targets, value)
            case _:
                raise _unknown(value)

    def _allocate(self, name: str, type_: Type) -> None:
        buffer = Buffer(name, type_, self.op)
        self._note([buffer])
        self.names[name] = Held(frozenset([buffer]))

    def _copy(self, name: str, source: str) -> None:
        """Rows without gaps: a copy where they are not, and nobody knows for a view of one row."""
        held = self.names[source]
        if held.layout is Layout.ROWS:
            self.names[name] = held
            return
        self._allocate(f"{name}", self.function.values[source].type)
        if held.layout is Layout.GAPS:
            self.names[name] = Held(self.names[name].buffers | held.buffers)

    def _express(self, targets: list[str], value: ast.expr) -> None:
        """The results of an op that is written as a PyTorch expression."""
        read, values = self._read(value), [self.function.values[t] for t in targets]
        op = self.function.makers[values[0]]
        layouts = [h.layout for h in read]
        layouts += layouts[-1:] * (len(op.operands) - len(read))  # one that is read twice
        site = Site(
            op,
            tuple(self._there(v.type) for v in op.operands),
            tuple(self._there(v.type) for v in values),
            tuple(layouts),
            self.function.target,
            self.fullest,
        )
        kept = read[0].buffers if is_view(site) else frozenset()
        made = [Buffer(t, type_, self.op) for t, type_ in zip(targets, site.outputs, strict=True)]
        made = made if is_copy(site) else []
        self._note(made, scratch(site))
        for place, target in enumerate(targets):
            own = {made[place]} if made else set()
            self.names[target] = Held(kept | own, layout(site))

    def _note(self, made: Sequence[Buffer], while_running: Dim = 0) -> None:
        """A moment, unless nothing is allocated."""
        if made or while_running:
            live = frozenset(made).union(*(h.buffers for h in self.names.values()))
            self.moments.append(Moment(self.op, live, while_running))

    # what expressions say
    def _read(self, value: ast.expr) -> list[Held]:
        """The tensors that an expression reads, in order."""
        return [self.names[n] for n in _names([value]) if n in self.names]

    def _there(self, type_: Type) -> Type:
        """A type where the program is: in a loop, of the rows of a block."""
        if self.block is None or type_.shape[:1] != self.block[:1]:
            return type_
        return type_.with_shape(self.block[1], *type_.shape[1:])

    def _type(self, name: str, call: ast.Call) -> Type:
        """The type of a new buffer: that of its value, or as it is written out."""
        if name in self.function.values:
            return self.function.values[name].type
        shape = call.args[0]
        if not isinstance(shape, ast.Tuple):
            raise _unknown(call)
        dtype = next(k.value for k in call.keywords if k.arg == "dtype")
        numbers = tuple(self._number(e) for e in shape.elts)
        return Type(sizes.dtype_called(ast.unparse(dtype)), numbers)

    def _number(self, node: ast.expr) -> Dim:
        return sizes.number(node, self.numbers)


def _fullest(makers: Mapping[Value, Op], balanced: bool) -> dict[Dim, Dim]:
    """How many rows of each dispatch the fullest expert has: its share, or as many as there can be,
    which is one of each token where a selection chooses distinct experts.
    """
    found = {}
    for op in makers.values():
        if op.kind == "moe.dispatch":
            rows, (idx,) = op.results[0].type.shape[0], op.operands
            made = makers.get(idx)
            while made is not None and made.kind in ("t.cast", "moe.limit", "moe.round_tokens"):
                made = makers.get(made.operands[0])
            if balanced:
                found[rows] = sizes.divided("ceildiv", rows, int(op.attrs["experts"]))
            elif made is not None and made.kind in ("moe.select", "t.topk"):
                found[rows] = idx.type.shape[0]
    return found


def _names(nodes: Sequence[ast.expr]) -> list[str]:
    """The names in expressions, in order, each once."""
    found = [n.id for node in nodes for n in _in_order(node) if isinstance(n, ast.Name)]
    return list(dict.fromkeys(found))


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _unknown(node: ast.AST) -> CodegenError:
    return CodegenError(f"no rule for what this line allocates: {ast.unparse(node)}")


__all__ = ["HostFunction", "Timeline", "host_functions", "walked"]

"""Emitted kernels read as programs on intervals: which operation of 32 bits can overflow?"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.widths import (
    LIMITS,
    WORD,
    Abstract,
    Bool,
    Int,
    Other,
    Pointer,
    Span,
    broadcast,
    chosen,
    combine,
    combined,
    compared,
    inserted,
    join,
    number,
    one,
    shape_of,
    summed,
)
from tests.widths_loops import COMPARED, Env, Loop, refine

_SIGNS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}
_BITS = {"int64": 64, "int32": 32, "int1": 32}
_NO_CALL = Other()


@dataclass(frozen=True)
class Fault:
    """An operation that can give what its width cannot hold."""

    kernel: str
    source: str
    what: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.source}: {self.what}"


@dataclass
class Kernels:
    """The functions of an emitted module, run on intervals."""

    functions: Mapping[str, ast.FunctionDef]
    constants: Mapping[str, int]
    trusted: dict[tuple[str, str], int] = field(default_factory=dict)
    faults: dict[Fault, None] = field(default_factory=dict)
    peaks: dict[str, Span] = field(default_factory=dict)  # of the numbers of 32 bits, by kernel
    grid: tuple[Span, ...] = ()
    kernel: str = ""
    stack: list[str] = field(default_factory=list)
    silent: int = 0  # how many loops are still being settled

    def launch(
        self, name: str, grid: tuple[Span, ...], arguments: list[Abstract], named: Env
    ) -> None:
        """Run a kernel for all programs of a grid."""
        self.grid, self.kernel = grid, name
        for axis, size in enumerate(grid):
            most = WORD if axis == 0 else 2**16 - 1
            if size.high > most:
                self.fault(None, f"a grid of up to {size.high} programs along axis {axis}")
        self.call(name, arguments, named)

    def call(self, name: str, arguments: list[Abstract], named: Env) -> Abstract:
        """Run a function of the module."""
        node = self.functions[name]
        parameters = node.args.args
        env: Env = {}
        first = len(parameters) - len(node.args.defaults)
        for parameter, default in zip(parameters[first:], node.args.defaults, strict=True):
            env[parameter.arg] = self.value(default, {})
        env |= dict(zip((p.arg for p in parameters), arguments, strict=False)) | named
        for parameter in parameters:
            env[parameter.arg] = self.typed(parameter, env[parameter.arg])
        self.stack.append(name)
        try:
            result = self.block(node.body, env)
        finally:
            self.stack.pop()
        return _NO_CALL if result is None else result

    def typed(self, parameter: ast.arg, value: Abstract) -> Abstract:
        """An argument in the type of its parameter; without one Triton looks at the value."""
        if not isinstance(value, Int) or not value.bits or len(self.stack) > 0:
            return value
        if parameter.annotation is not None and ast.unparse(parameter.annotation) == "tl.int64":
            return replace(value, bits=64)
        if value.span.high > WORD:
            self.fault(None, f"{parameter.arg} of up to {value.span.high} in 32 bits")
        return replace(value, span=value.span.inside(-WORD - 1, WORD))

    def fault(self, node: ast.AST | None, what: str) -> None:
        """Note an operation that is wrong for some sizes."""
        if not self.silent:
            source = ast.unparse(node) if node is not None else "launch"
            self.faults[Fault(self.kernel, source, what)] = None

    # statements
    def block(self, body: list[ast.stmt], env: Env) -> Abstract | None:
        """Run statements; what they return, if they do."""
        returned: Abstract | None = None
        for statement in body:
            result = self.statement(statement, env)
            if result is not None:
                returned = result if returned is None else join(returned, result)
                if not _goes_on(statement):
                    break
        return returned

    def statement(self, node: ast.stmt, env: Env) -> Abstract | None:
        match node:
            case ast.Return(value=None):
                return _NO_CALL
            case ast.Return(value=value) if value is not None:
                return self.value(value, env)
            case ast.Assign(targets=[target], value=value):
                self.assign(target, self.value(value, env), env)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self.assign(target, self.value(value, env), env)
            case ast.AugAssign(target=ast.Name() as target, op=op, value=value):
                result = self.binary(node, op, env[target.id], self.value(value, env))
                self.assign(target, result, env)
            case ast.Expr(value=value):
                self.value(value, env)
            case ast.If():
                return self.branch(node, env)
            case ast.For() | ast.While():
                Loop(self, node, env).run()
            case _:
                raise NotImplementedError(ast.unparse(node))
        return None

    def assign(self, target: ast.expr, value: Abstract, env: Env) -> None:
        if isinstance(target, ast.Tuple):
            parts = value if isinstance(value, tuple) else [Other()] * len(target.elts)
            for inner, part in zip(target.elts, parts, strict=True):
                self.assign(inner, part, env)
            return
        assert isinstance(target, ast.Name)
        env[target.id] = self.limited(target.id, value)

    def limited(self, name: str, value: Abstract) -> Abstract:
        """A variable within what is known of it and proved apart: see :mod:`tests.widths_host`."""
        most = self.trusted.get((self.stack[-1], name))
        if most is None or not isinstance(value, Int):
            return value
        return replace(value, span=value.span.inside(0, most))

    def branch(self, node: ast.If, env: Env) -> Abstract | None:
        test = self.value(node.test, env)
        if isinstance(test, bool):
            return self.block(node.body if test else node.orelse, env)
        one_way, other_way = dict(env), dict(env)
        refine(node.test, one_way, self, True)
        refine(node.test, other_way, self, False)
        results = [self.block(node.body, one_way), self.block(node.orelse, other_way)]
        ends = [r is not None for r in results]
        live = [e for e, ended in zip((one_way, other_way), ends, strict=True) if not ended]
        for name in {n for e in live for n in e} if live else ():
            values = [e[name] for e in live if name in e]
            env[name] = values[0] if len(values) == 1 else join(*values)
        found = [r for r in results if r is not None]
        return None if not found else found[0] if len(found) == 1 else join(*found)

    # expressions
    def value(self, node: ast.expr, env: Env) -> Abstract:
        """The value of an expression."""
        handler = getattr(self, f"{type(node).__name__.lower()}_", None)
        if handler is None:
            raise NotImplementedError(ast.unparse(node))
        return handler(node, env)

    def constant_(self, node: ast.Constant, env: Env) -> Abstract:
        if isinstance(node.value, bool):
            return node.value
        return number(node.value) if isinstance(node.value, int) else Other()

    def name_(self, node: ast.Name, env: Env) -> Abstract:
        return self.named(node.id, env)

    def tuple_(self, node: ast.Tuple | ast.List, env: Env) -> Abstract:
        return tuple(self.value(e, env) for e in node.elts)

    list_ = tuple_

    def unaryop_(self, node: ast.UnaryOp, env: Env) -> Abstract:
        operand = self.value(node.operand, env)
        if isinstance(node.op, ast.USub):
            return self.binary(node, ast.Sub(), number(0), operand)
        return operand

    def binop_(self, node: ast.BinOp, env: Env) -> Abstract:
        return self.binary(node, node.op, self.value(node.left, env), self.value(node.right, env))

    def compare_(self, node: ast.Compare, env: Env) -> Abstract:
        (other,) = node.comparators
        return self.compare(node.ops[0], self.value(node.left, env), self.value(other, env))

    def boolop_(self, node: ast.BoolOp, env: Env) -> Abstract:
        return Bool(broadcast(*(shape_of(self.value(v, env)) for v in node.values)))

    def ifexp_(self, node: ast.IfExp, env: Env) -> Abstract:
        test = self.value(node.test, env)
        if isinstance(test, bool):
            return self.value(node.body if test else node.orelse, env)
        return join(self.value(node.body, env), self.value(node.orelse, env))

    def subscript_(self, node: ast.Subscript, env: Env) -> Abstract:
        return self.subscript(self.value(node.value, env), node.slice)

    def attribute_(self, node: ast.Attribute, env: Env) -> Abstract:
        if node.attr in _BITS or node.attr.startswith(("float", "bfloat")):
            return node.attr
        self.value(node.value, env)
        return Other()

    def call_(self, node: ast.Call, env: Env) -> Abstract:
        return self.called(node, env)

    def named(self, name: str, env: Env) -> Abstract:
        if name in env:
            return env[name]
        if name in self.constants:
            return number(self.constants[name])
        return self.functions.get(name, Other())

    def subscript(self, value: Abstract, index: ast.expr) -> Abstract:
        if isinstance(value, tuple) and isinstance(index, ast.Constant):
            return value[int(ast.unparse(index))]
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        return inserted(value, [isinstance(i, ast.Constant) for i in items])

    def compare(self, op: ast.cmpop, a: Abstract, b: Abstract) -> Abstract:
        if isinstance(a, Int) and isinstance(b, Int) and not a.bits | b.bits:
            sign = {ast.Eq: "__eq__", ast.NotEq: "__ne__", ast.Gt: "__gt__", ast.Lt: "__lt__"}
            if type(op) in sign and a.span.is_one and b.span.is_one:
                return bool(getattr(a.span.low, sign[type(op)])(b.span.low))
        if isinstance(a, str) and isinstance(b, str):
            return a == b
        return compared(COMPARED[type(op)], a, b)

    def binary(self, node: ast.AST, op: ast.operator, a: Abstract, b: Abstract) -> Abstract:
        """An operation, with the check of its width."""
        shape = broadcast(shape_of(a), shape_of(b))
        for pointer, other in ((a, b), (b, a)):
            if isinstance(pointer, Pointer) and isinstance(other, Int):
                place = combine("+", pointer.place, other.span)
                return Pointer(pointer.tensor, place, shape)
            assert not isinstance(pointer, Pointer), f"no offset: {ast.unparse(node)}"
        if isinstance(a, Bool) and isinstance(b, Bool):
            return Bool(shape, a.single | b.single if isinstance(op, ast.BitAnd) else frozenset())
        if not isinstance(a, Int) or not isinstance(b, Int):
            return Other(shape)
        return self.arithmetic(node, op, a, b)

    def arithmetic(self, node: ast.AST, op: ast.operator, a: Int, b: Int) -> Int:
        bits, shape = max(a.bits, b.bits), broadcast(a.shape, b.shape)
        if type(op) not in _SIGNS:
            return Int(bits, Span(*LIMITS[bits or 64]), shape)
        for x in (a, b):
            low, high = LIMITS.get(bits, (x.span.low, x.span.high))
            if not x.bits and not low <= x.span.low <= x.span.high <= high:
                self.fault(node, f"a number that {bits} bits cannot hold")
        if isinstance(op, ast.FloorDiv | ast.Mod) and b.span.low <= 0 <= b.span.high:
            self.fault(node, "a division by what can be 0")
        return self.checked(node, combined(_SIGNS[type(op)], a, b, shape))

    def checked(self, node: ast.AST, value: Int) -> Int:
        """A result as its width holds it."""
        if not value.bits:
            return value
        low, high = LIMITS[value.bits]
        if value.span.low < low or value.span.high > high:
            span = f"[{value.span.low}, {value.span.high}]"
            self.fault(node, f"{span} in {value.bits} bits")
            return replace(value, span=value.span.inside(low, high))
        if value.bits == 32 and not self.silent:
            peak = self.peaks.setdefault(self.kernel, value.span)
            self.peaks[self.kernel] = peak.join(value.span)
        return value

    def called(self, node: ast.Call, env: Env) -> Abstract:
        name = _called(node)
        if name.endswith("where"):
            return self.where(node, env)
        arguments = [self.value(a, env) for a in node.args]
        named = {k.arg: self.value(k.value, env) for k in node.keywords if k.arg is not None}
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            return self.picked(node.func.id, arguments, named)
        if name.endswith("warp_specialize"):
            for group in arguments[0]:
                self.call(group[0].name, list(group[1]), {})
            return Other()
        known = _CALLS.get(name.rpartition(".")[2])
        owner = self.owner(node, env)
        return Other() if known is None else known(self, node, owner, arguments, named)

    def owner(self, node: ast.Call, env: Env) -> Abstract:
        """The value of whose method a call is; ``None`` for functions of tl and gl."""
        if isinstance(node.func, ast.Attribute) and not (
            isinstance(node.func.value, ast.Name) and node.func.value.id in ("tl", "gl")
        ):
            return self.value(node.func.value, env)
        return None

    def picked(self, name: str, arguments: list[Abstract], named: Env) -> Abstract:
        """A call of a function of the module.

        What ``pick_tile`` gives is proved apart: a tile of each axis; past the last piece of work,
        a row tile that is looked up but not read, and a column tile of no use.
        """
        result = self.call(name, arguments, named)
        if name != "pick_tile":
            return result
        work, tiles_m, tiles_n, group = (a.span for a in arguments)
        past = work.high // max(tiles_n.low, 1) + group.high
        return (
            replace(result[0], span=Span(0, max(0, tiles_m.high - 1, past))),
            replace(result[1], span=Span(0, max(0, tiles_n.high - 1))),
        )

    def where(self, node: ast.Call, env: Env) -> Abstract:
        """Each side is computed for all lanes, but counts only where it is chosen."""
        condition, a, b = node.args
        envs = [dict(env), dict(env)]
        for side, holds in zip(envs, (True, False), strict=True):
            refine(condition, side, self, holds)
        picked = self.value(condition, env)
        return chosen(picked, self.value(a, envs[0]), self.value(b, envs[1]))


def _goes_on(node: ast.stmt) -> bool:
    """Whether what comes after a statement that may return is reached."""
    return isinstance(node, ast.If) and not (node.orelse and isinstance(node.body[-1], ast.Return))


@functools.cache
def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def _axis(arguments: list[Abstract], named: Env) -> int:
    found = arguments[1] if len(arguments) > 1 else named.get("axis", number(0))
    return int(found.span.low)


def _load(k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env) -> Abstract:
    if owner is not None and any(isinstance(i, Int) and i.bits > 32 for i in _flat(a)):
        k.fault(node, "a place of 64 bits for the copy engine")
    if owner is not None or not isinstance(a[0], Pointer):
        return Other(shape_of(a[0]) if a and owner is None else ())
    tensor, place, shape = a[0].tensor, a[0].place, a[0].shape
    if not tensor.bits:
        return Other(shape)
    span = tensor.contents(place)
    if isinstance(named.get("other"), Int):
        span = span.join(named["other"].span)
    origin = (tensor, ast.unparse(node.args[0])) if tensor.ascending else None
    return Int(tensor.bits, span, shape, tensor.total, origin=origin)


def _flat(values: list[Abstract]) -> list[Abstract]:
    return [x for v in values for x in (v if isinstance(v, tuple) else (v,))]


def _cast(k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env) -> Abstract:
    bits = _BITS.get(a[0], 0) if isinstance(a[0], str) else 0
    if bits and isinstance(owner, Bool):
        return Int(bits, Span(0, 1), owner.shape)
    if bits and isinstance(owner, Int) and "bitcast" not in named:
        return (
            k.checked(node, replace(owner, bits=bits))
            if bits < owner.bits
            else replace(owner, bits=bits)
        )
    if bits and "bitcast" in named:
        return Int(bits, Span(*LIMITS[bits]), shape_of(owner))
    return Other(shape_of(owner))


def _filled(k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env) -> Abstract:
    sizes = tuple(s.span.high for s in a[0]) if isinstance(a[0], tuple) else ()
    kind, value = a[-1], a[1] if len(a) == 3 else number(0)
    if isinstance(kind, str) and kind in _BITS and isinstance(value, Int):
        return Bool(sizes) if kind == "int1" else Int(_BITS[kind], value.span, sizes)
    return Other(sizes)


def _reduced(
    k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env
) -> Abstract:
    axis, name = _axis(a, named), _called(node).rpartition(".")[2]
    shape = tuple(s for i, s in enumerate(shape_of(a[0])) if i != axis)
    if not isinstance(a[0], Int):
        return Other(shape)
    if name == "sum":
        return k.checked(node, summed(a[0], axis))
    if name == "cumsum":
        return k.checked(node, replace(summed(a[0], axis), shape=a[0].shape, total=None))
    return Int(a[0].bits, a[0].span, shape)


def _extreme(
    k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env
) -> Abstract:
    name, shape = _called(node).rpartition(".")[2], broadcast(*map(shape_of, a[:2]))
    if not all(isinstance(x, Int) for x in a[:2]):
        return Other(shape)
    span, bits = combine(name[:3], a[0].span, a[1].span), max(a[0].bits, a[1].bits)
    totals = [x.total for x in a[:2] if x.total is not None and x.shape == shape]
    smaller = name == "minimum" and span.low >= 0
    return Int(bits, span, shape, min(totals) if totals and smaller else None)


def _program(
    k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env
) -> Abstract:
    axis = a[0].span.low if a else 0
    size = k.grid[axis] if axis < len(k.grid) else one(1)
    if _called(node).endswith("num_programs"):
        return Int(32, Span(max(size.low, 1), max(size.high, 1)))
    return Int(32, Span(0, max(0, min(size.high, WORD) - 1)))


def _arange(k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env) -> Abstract:
    count = a[1].span.high - a[0].span.low
    span = Span(a[0].span.low, a[1].span.high - 1)
    return Int(32, span, (count,), distinct=frozenset({0}))


def _gathered(
    k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env
) -> Abstract:
    return replace(a[0], shape=shape_of(a[1]), total=None) if isinstance(a[0], Int) else Other()


def _reshaped(
    k: Kernels, node: ast.Call, owner: Abstract, a: list[Abstract], named: Env
) -> Abstract:
    if isinstance(owner, Int) and all(isinstance(size, Int) for size in a):
        shape = tuple(size.span.high for size in a)
        return Int(owner.bits, owner.span, shape, owner.total)
    return Bool(tuple(s.span.high for s in a)) if isinstance(owner, Bool) else Other()


_CALLS: dict[str, Callable[[Kernels, ast.Call, Any, list[Any], Env], Any]] = {
    "load": _load,
    "store": _load,
    "to": _cast,
    "zeros": _filled,
    "full": _filled,
    "sum": _reduced,
    "cumsum": _reduced,
    "min": _reduced,
    "max": _reduced,
    "minimum": _extreme,
    "maximum": _extreme,
    "program_id": _program,
    "num_programs": _program,
    "arange": _arange,
    "gather": _gathered,
    "reshape": _reshaped,
}

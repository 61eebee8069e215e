"""Building graphs: every op is type-checked as it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy

from moec.errors import IRError, MoecError
from moec.ir.dims import Range, canon
from moec.ir.graph import Graph, Location, Op, Value
from moec.ir.opdef import OpDef, opdef
from moec.ir.types import Type

# what an infer runs into when operands are too many, too few, or of other ranks than it expects
_NOT_FITTING = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def infer_types(
    kind: str, operands: Sequence[Type], attrs: Mapping[str, Any], body: Graph | None
) -> tuple[Type, ...]:
    """The result types of an op, or an :class:`IRError` that says what does not fit."""
    declaration = opdef(kind)
    _check_attributes(declaration, attrs)
    if declaration.has_body != (body is not None):
        raise IRError(f"{kind}: {'needs a body' if declaration.has_body else 'takes no body'}")
    extra = {"body": body} if declaration.has_body else {}
    try:
        result = declaration.infer(*operands, **attrs, **extra)
    except (MoecError, *_NOT_FITTING) as error:
        raise IRError(f"{kind}({', '.join(map(str, operands))}): {error}") from error
    return (result,) if isinstance(result, Type) else tuple(result)


def _check_attributes(declaration: OpDef, attrs: Mapping[str, Any]) -> None:
    unknown = sorted(attrs.keys() - declaration.attrs.keys())
    missing = sorted(declaration.required - attrs.keys())
    words = [f"unknown attribute {a!r}" for a in unknown]
    words += [f"missing attribute {a!r}" for a in missing]
    for name in sorted(attrs.keys() & declaration.attrs.keys()):
        if not is_attribute(attrs[name], declaration.attrs[name]):
            words.append(f"attribute {name!r} is {attrs[name]!r}, no {declaration.attrs[name]}")
    if words:
        known = ", ".join(sorted(declaration.attrs)) or "none"
        raise IRError(
            f"{declaration.kind}: {'; '.join(words)} (attributes of {declaration.kind}: {known})"
        )


def is_attribute(value: Any, wanted: str) -> bool:
    """Whether a value has the type that an op's ``infer`` writes for its attribute."""
    wanted = wanted.removesuffix(" | None")
    if wanted.startswith("tuple["):
        item = wanted[len("tuple[") : -len(", ...]")]
        return isinstance(value, tuple) and all(is_attribute(v, item) for v in value)
    if isinstance(value, bool):
        return wanted in ("bool", "float")  # t.full of truth values
    kinds: dict[str, Any] = {"int": int, "float": int | float, "str": str, "Dim": int | sympy.Expr}
    return wanted in kinds and isinstance(value, kinds[wanted])


def normal_attribute(value: Any) -> Any:
    """An attribute in canonical form: tuples for lists, canonical dims."""
    if isinstance(value, list | tuple):
        return tuple(normal_attribute(v) for v in value)
    return canon(value) if isinstance(value, sympy.Expr) else value


def make_op(
    kind: str,
    operands: Sequence[Value],
    attrs: Mapping[str, Any] | None = None,
    *,
    hints: Sequence[str] = (),
    body: Graph | None = None,
    loc: Location | None = None,
) -> Op:
    """A checked op with fresh results."""
    attrs = {k: normal_attribute(v) for k, v in (attrs or {}).items() if v is not None}
    types = infer_types(kind, [v.type for v in operands], attrs, body)
    default = kind.split(".")[-1]
    names = [hints[i] if i < len(hints) else default for i in range(len(types))]
    results = tuple(Value(t, n) for t, n in zip(types, names, strict=True))
    return Op(kind, tuple(operands), results, attrs, body, loc)


class Builder:
    """Collects ops in order; ``b("t.add", x, y)`` returns the result (a tuple if there are
    several).
    """

    def __init__(self, ranges: Mapping[str, Range] | None = None) -> None:
        self.ops: list[Op] = []
        self.ranges: dict[str, Range] = dict(ranges or {})
        self.loc: Location | None = None
        self._constants: dict[tuple[Any, ...], Value] = {}

    def __call__(
        self,
        kind: str,
        *operands: Value,
        hint: str | Sequence[str] = (),
        body: Graph | None = None,
        **attrs: Any,
    ) -> Any:
        hints = (hint,) if isinstance(hint, str) else tuple(hint)
        op = make_op(kind, operands, attrs, hints=hints, body=body, loc=self.loc)
        self.ops.append(op)
        return op.result if len(op.results) == 1 else op.results

    def full(self, type_: Type, value: float) -> Value:
        """A constant tensor; equal ones are shared."""
        key = (type_, repr(value))  # 0.0 == -0.0, but they are two constants
        if key not in self._constants:
            self._constants[key] = self(
                "t.full",
                value=value,
                dtype=type_.dtype,
                shape=type_.shape,
                hint="zeros" if value == 0 else "full",
            )
        return self._constants[key]

    def made_by(self, value: Value) -> Op | None:
        """The op built so far that made ``value``; ``None`` for an input."""
        return next((op for op in reversed(self.ops) if value in op.results), None)

    def mark(self) -> int:
        """A point to which :meth:`rollback` can return."""
        return len(self.ops)

    def rollback(self, mark: int) -> None:
        """Forget every op built since ``mark``."""
        gone = {v for op in self.ops[mark:] for v in op.results}
        del self.ops[mark:]
        self._constants = {k: v for k, v in self._constants.items() if v not in gone}

    def inline(self, graph: Graph, arguments: Sequence[Value]) -> tuple[Value, ...]:
        """Append a graph's ops with its inputs bound to ``arguments``; returns its outputs."""
        if len(arguments) != len(graph.inputs):
            raise IRError(f"@{graph.name} takes {len(graph.inputs)} inputs, got {len(arguments)}")
        mapping = dict(zip(graph.inputs, arguments, strict=True))
        for op in graph.ops:
            copied = self.copy(op, [mapping[v] for v in op.operands])
            mapping.update(zip(op.results, copied.results, strict=True))
        return tuple(mapping[v] for v in graph.outputs)

    def copy(self, op: Op, operands: Iterable[Value]) -> Op:
        """Append the same op on other operands; the types are inferred anew."""
        new = make_op(
            op.kind,
            tuple(operands),
            op.attrs,
            hints=[r.hint for r in op.results],
            body=op.body,
            loc=op.loc,
        )
        self.ops.append(new)
        return new

    def graph(
        self,
        name: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        cotangents: Sequence[Value] = (),
        gradients: Sequence[Value | None] = (),
    ) -> Graph:
        """The finished graph."""
        return Graph(
            name,
            tuple(inputs),
            tuple(self.ops),
            tuple(outputs),
            self.ranges,
            tuple(cotangents),
            tuple(gradients),
        )

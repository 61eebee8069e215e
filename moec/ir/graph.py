"""The data model: frozen values, ops and graphs in straight-line single-assignment form."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from moec.ir.dims import Range
from moec.ir.types import Type
from moec.printable import printable


@dataclass(frozen=True)
class Location:
    """Where in the user's model an op comes from."""

    file: str
    line: int
    module: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}" + (f" ({self.module})" if self.module else "")
        return printable(" ".join(text.split()))  # it stands in comments of emitted code


@dataclass(frozen=True, eq=False)
class Value:
    """A value: its type and a hint for its name. Two values are the same only if they are the same
    object.
    """

    type: Type
    hint: str = "v"

    def __repr__(self) -> str:
        return f"%{self.hint}: {self.type}"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: ``results = kind(operands) {attrs} [body]``."""

    kind: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    body: Graph | None = None
    loc: Location | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "attrs", MappingProxyType({k: self.attrs[k] for k in sorted(self.attrs)})
        )

    @property
    def result(self) -> Value:
        """The only result of an op that has one."""
        (value,) = self.results
        return value

    def __repr__(self) -> str:
        operands = ", ".join(map(repr, self.operands))
        return f"{', '.join(map(repr, self.results))} = {self.kind}({operands})"


@dataclass(frozen=True, eq=False)
class Graph:
    """A straight-line program.

    ``ranges`` bounds the symbols of the types (a symbol without a range is any nonnegative
    integer). A joint forward-backward graph also has ``cotangents`` (inputs: one gradient per
    output) and ``gradients`` (results: one per input, ``None`` where none is needed or exists).
    """

    name: str
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    cotangents: tuple[Value, ...] = ()
    gradients: tuple[Value | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", MappingProxyType(dict(sorted(self.ranges.items()))))

    def with_ops(self, ops: tuple[Op, ...] | list[Op]) -> Graph:
        """The same graph with other ops."""
        return replace(self, ops=tuple(ops))

    @property
    def returned(self) -> tuple[Value, ...]:
        """Every value that leaves the graph: outputs, then the gradients that exist."""
        return self.outputs + tuple(g for g in self.gradients if g is not None)

    def __eq__(self, other: object) -> bool:
        from moec.ir.text import show

        return isinstance(other, Graph) and show(self, locations=False) == show(
            other, locations=False
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A stable hash of the graph's meaning: equal graphs have equal fingerprints in every
        process.
        """
        from moec.ir.text import show

        return hashlib.sha256(show(self, locations=False).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"<graph @{self.name}: {len(self.ops)} ops>"


def producers(graph: Graph) -> dict[Value, Op]:
    """The op that makes each value (inputs are absent)."""
    return {value: op for op in graph.ops for value in op.results}


def users(graph: Graph) -> dict[Value, list[Op]]:
    """The ops that read each value, in order; returning a value is no use here."""
    found: dict[Value, list[Op]] = {}
    for op in graph.ops:
        for value in dict.fromkeys(op.operands):
            found.setdefault(value, []).append(op)
    return found


def walk(graph: Graph) -> Iterator[Op]:
    """Every op, bodies included, each body after the op that owns it."""
    for op in graph.ops:
        yield op
        if op.body is not None:
            yield from walk(op.body)


def forward_ops(graph: Graph) -> set[Op]:
    """The ops that the outputs need: the forward pass of a joint graph."""
    live: set[Value] = set(graph.outputs)
    found: set[Op] = set()
    for op in reversed(graph.ops):
        if any(v in live for v in op.results):
            live.update(op.operands)
            found.add(op)
    return found


def backward_ops(graph: Graph) -> set[Op]:
    """The ops that only gradients need; recomputed values are among them."""
    return set(graph.ops) - forward_ops(graph)

"""Body ops on a tile of rows: what becomes the prologue and the epilogue of a grouped product.

A value of a body varies along rows ``r`` (``[A]`` or ``[A, 1]``), columns ``c`` (a vector of the
tile's expert), both, or neither. Values of several parts (gate and up) are kept as their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen.triton.kernel import (
    KernelText,
    Term,
    Unsupported,
    is_pointwise,
)
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Op, Value, producers

TILE = ("r", "c")


@dataclass(frozen=True)
class Parts:
    """A value of several parts side by side ("concat") or alternating ("interleave")."""

    terms: tuple[Term, ...]
    layout: str


@dataclass(frozen=True)
class Domain:
    """The names under which a kernel knows its rows and columns."""

    rows: Dim
    columns: int
    cut: bool  # whether the last tile has fewer columns
    column: str = "column"
    row: str = "row"
    inside: str = "inside"  # rows of this expert
    wide: str = "wide"  # the columns of both parts where they alternate
    live: str = "inside[:, None]"  # the mask of a tile
    live_wide: str = "inside[:, None]"  # of a tile of two alternating parts

    @property
    def column_mask(self) -> str:
        """The mask of a vector of columns, as a further argument of a load."""
        return f", mask={self.column} < {self.columns}, other=0.0" if self.cut else ""


@dataclass
class RowBody:
    """Writes the ops of a body into a kernel, each operand loaded where it is first read."""

    text: KernelText
    graph: Graph
    domain: Domain
    env: dict[Value, Term] = field(default_factory=dict)
    parts: dict[Value, Parts] = field(default_factory=dict)
    dots: list[tuple[Op, Term]] = field(default_factory=list)
    pairs: dict[Value, str] = field(default_factory=dict)

    def run(self, ops: Sequence[Op]) -> None:
        """Write ops in order."""
        for op in ops:
            if op.results[0] not in self.env and op.results[0] not in self.parts:
                self.write(op)

    def term(self, value: Value) -> Term:
        """A value as text: known, loaded now, or computed now."""
        if value not in self.env:
            op = producers(self.graph).get(value)
            if op is not None:
                self.write(op)
            else:
                self.env[value] = self.load(value)
        if value not in self.env:
            raise Unsupported(f"{value!r} has several parts but is read as a whole")
        return self.env[value]

    def write(self, op: Op) -> None:
        """Write one op."""
        handler = _HANDLERS.get(op.kind)
        if handler is not None:
            handler(self, op)
        elif is_pointwise(op):
            terms = [self.term(v) for v in op.operands]
            self.env[op.result] = self.text.pointwise(op, terms, TILE)
        else:
            raise Unsupported(f"{op.kind} is no work on rows")

    # loads
    def load(self, value: Value) -> Term:
        """An operand of the kernel on this tile."""
        shape = value.type.shape
        name = self.text.parameter(value)
        if not shape:
            return self.text.let(value.hint, self.text.held(value.type, f"tl.load({name})"))
        if shape[0] == self.domain.rows and len(shape) == (1 if len(shape) == 1 else 2):
            if len(shape) == 1 or shape[1] == 1:
                return self.load_row(value, name)
            if shape[1] == self.domain.columns:
                return self.load_tile(value, name)
        raise Unsupported(f"{value!r} does not fit the rows of the tile")

    def load_row(self, value: Value, name: str) -> Term:
        """A number a row."""
        load = f"tl.load({name} + {self.domain.row}, mask={self.domain.inside}, other=0)"
        return self.text.let(value.hint, self.text.held(value.type, load), ("r",))

    def load_tile(self, value: Value, name: str) -> Term:
        """A tile of a matrix with the domain's columns."""
        at = f"{self.domain.row}[:, None] * {self.domain.columns} + {self.domain.column}[None, :]"
        load = f"tl.load({name} + {at}, mask={self.domain.live}, other=0)"
        return self.text.let(value.hint, self.text.held(value.type, load), TILE)

    def load_parts(self, value: Value, hints: Sequence[str], layout: str) -> Parts:
        """The same tile of every part of a matrix."""
        name, count = self.text.parameter(value), len(hints)
        row = f"{self.domain.row}[:, None] * {count * self.domain.columns}"
        if layout == "interleave" and count == 2:
            at = f"{name} + {row} + {self.domain.wide}[None, :]"
            load = f"tl.load({at}, mask={self.domain.live_wide}, other=0)"
            both = self.text.let(value.hint, self.text.held(value.type, load), TILE)
            return Parts(self.split_wide(both, hints), layout)
        terms = []
        for i, hint in enumerate(hints):
            at = f"{row} + {self.part_column(i, count, layout)}[None, :]"
            load = f"tl.load({name} + {at}, mask={self.domain.live}, other=0)"
            terms.append(self.text.let(hint, self.text.held(value.type, load), TILE))
        return Parts(tuple(terms), layout)

    def part_column(self, i: int, count: int, layout: str) -> str:
        """The columns of part ``i`` in a matrix of all parts."""
        column = self.domain.column
        if layout == "interleave":
            return f"({column} * {count} + {i})"
        return f"({i * self.domain.columns} + {column})" if i else column

    def expert(self) -> str:
        """The tile's expert."""
        return "expert"

    def split_wide(self, both: Term, hints: Sequence[str]) -> tuple[Term, ...]:
        """The two parts of a tile in which they alternate."""
        first, second = (self.text.names.fresh(h) for h in hints)
        self.text.line(f"{first}, {second} = {both.text}.reshape(BM, BN, 2).split()")
        return Term(first, TILE), Term(second, TILE)

    def pair(self, perm: Value) -> str:
        """The (token, choice) pair of each row; loaded at the first use."""
        if perm not in self.pairs:
            at = f"{self.text.parameter(perm)} + {self.domain.row}"
            load = f"tl.load({at}, mask={self.domain.inside}, other=0)"
            self.pairs[perm] = self.text.let("pair", load).text
        return self.pairs[perm]


def _full(body: RowBody, op: Op) -> None:
    body.env[op.result] = body.text.literal(op)


def _reshape(body: RowBody, op: Op) -> None:
    """Only between ``[A]`` and ``[A, 1]``."""
    term = body.term(op.operands[0])
    if "c" in term.axes or op.result.type.shape not in ((body.domain.rows,), (body.domain.rows, 1)):
        raise Unsupported(f"a reshape of {op.operands[0]!r}")
    body.env[op.result] = term


def _split(body: RowBody, op: Op) -> None:
    source, layout = op.operands[0], op.attrs.get("layout", "concat")
    hints = [r.hint for r in op.results]
    if source not in body.parts:
        _make_parts(body, op, source, hints, layout)
    found = body.parts[source]
    if len(found.terms) != len(op.results) or found.layout != layout:
        raise Unsupported(f"two different splits of {source!r}")
    body.env.update(zip(op.results, found.terms, strict=True))


def _make_parts(body: RowBody, op: Op, source: Value, hints: list[str], layout: str) -> None:
    made = producers(body.graph).get(source)
    if made is not None:
        body.write(made)
    elif source.type.shape == (body.domain.rows, len(hints) * body.domain.columns):
        body.parts[source] = body.load_parts(source, hints, layout)
    if source not in body.parts:
        raise Unsupported(f"a split of {source!r}")


def _merge(body: RowBody, op: Op) -> None:
    terms = tuple(body.term(v) for v in op.operands)
    body.parts[op.result] = Parts(terms, op.attrs.get("layout", "concat"))


def _row_scale(body: RowBody, op: Op) -> None:
    rows, scale = (body.term(v) for v in op.operands)
    text = f"{rows.on(TILE)} * {scale.on(TILE)}"
    body.env[op.result] = body.text.let(op.result.hint, text, TILE)


def _row_dot(body: RowBody, op: Op) -> None:
    """The sum over this tile's columns; the host adds the tiles up."""
    a, b = (body.term(v) for v in op.operands)
    if {*a.axes, *b.axes} != set(TILE):
        raise Unsupported("an inner product of something that is no tile")
    product = f"{a.on(TILE)} * {b.on(TILE)}"
    if body.domain.cut:
        product = (
            f"tl.where(({body.domain.column} < {body.domain.columns})[None, :], {product}, 0.0)"
        )
    total = body.text.let(op.result.hint, f"tl.sum({product}, 1)", ("r",))
    body.dots.append((op, total))


def _permute(body: RowBody, op: Op) -> None:
    numbers, perm = op.operands[:2]
    pair, name = body.pair(perm), body.text.parameter(numbers)
    load = body.text.held(numbers.type, f"tl.load({name} + {pair})")
    body.env[op.result] = body.text.let(op.result.hint, load, ("r",))


def _gather(body: RowBody, op: Op) -> None:
    x, perm, inverse = op.operands
    if op.result.type.shape != (body.domain.rows, body.domain.columns):
        raise Unsupported(f"a gather of {x!r}")
    pair, name = body.pair(perm), body.text.parameter(x)
    token, why = body.text.facts.widened(
        f"({pair} // {inverse.type.shape[1]})", x.type.shape[0] * body.domain.columns
    )
    at = f"{token}[:, None] * {body.domain.columns} + {body.domain.column}[None, :]"
    load = body.text.held(x.type, f"tl.load({name} + {at}, mask={body.domain.live}, other=0)")
    body.env[op.result] = body.text.let(op.result.hint, load, TILE, why)


def _expert_rows(body: RowBody, op: Op) -> None:
    table = op.operands[0]
    if table in producers(body.graph):
        raise Unsupported("a bias that the kernel computes")
    name, shape = body.text.parameter(table), table.type.shape
    axes: tuple[str, ...] = ()
    if len(shape) == 1 or shape[1] == 1:
        load = f"tl.load({name} + {body.expert()})"
    elif shape[1] == body.domain.columns:
        at = f"{body.expert()} * {shape[1]} + {body.domain.column}"
        load, axes = f"tl.load({name} + {at}{body.domain.column_mask})", ("c",)
    else:
        _expert_parts(body, op, name)
        return
    body.env[op.result] = body.text.let(op.result.hint, body.text.held(table.type, load), axes)


def _expert_parts(body: RowBody, op: Op, name: str) -> None:
    """A vector of all parts, read as its parts by a split."""
    table = op.operands[0]
    readers = [o for o in body.graph.ops if op.result in o.operands and o.kind == "t.split"]
    if not readers or table.type.shape[1] != len(readers[0].results) * body.domain.columns:
        raise Unsupported(f"the bias {table!r}")
    split, terms = readers[0], []
    layout = split.attrs.get("layout", "concat")
    for i, result in enumerate(split.results):
        column = body.part_column(i, len(split.results), layout)
        at = f"{name} + {body.expert()} * {table.type.shape[1]} + {column}"
        load = f"tl.load({at}{body.domain.column_mask})"
        terms.append(body.text.let(result.hint, body.text.held(table.type, load), ("c",)))
    body.parts[op.result] = Parts(tuple(terms), layout)


_HANDLERS = {
    "t.full": _full,
    "t.reshape": _reshape,
    "t.split": _split,
    "t.merge": _merge,
    "moe.row_scale": _row_scale,
    "moe.row_dot": _row_dot,
    "moe.permute": _permute,
    "moe.gather": _gather,
    "moe.expert_rows": _expert_rows,
}

"""The epilogue of a product on one tile, with matrices read and written by the copy engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen.triton.kernel import Term, Unsupported
from moec.codegen.triton.products import RowProduct, is_of_rows
from moec.codegen.triton.rows import TILE, Parts, RowBody
from moec.ir.graph import Op, Value, producers
from moec.ir.types import SIZES

PLACE = ("start", "size", "row", "column")


@dataclass(frozen=True)
class Access:
    """How a matrix of rows is cut by the copy engine: its inner shape and the block of it."""

    inner: tuple[int, ...]
    block: tuple[int, ...]


@dataclass
class TileBody(RowBody):
    """A device function that does the epilogue on BC columns; numbers a row are its arguments."""

    product: RowProduct = None  # type: ignore[assignment]  # always given; a field after defaults
    chunk: int = 0
    accesses: dict[Value, Access] = field(default_factory=dict)

    def place(self) -> str:
        """The place of the tile, as arguments of a load or store."""
        return ", ".join(self.text.parameter(p) for p in PLACE)

    def expert(self) -> str:
        """The tile's expert."""
        return self.text.parameter("expert")

    def access(self, value: Value, inner: tuple[int, ...], block: tuple[int, ...]) -> None:
        """Note how a matrix is cut: always in one way."""
        if not value.type.is_float:
            raise Unsupported(f"{value!r} is not of floats")
        self.text.facts.aligned(inner[-1] * SIZES[value.type.dtype])
        if self.accesses.setdefault(value, Access(inner, block)) != Access(inner, block):
            raise Unsupported(f"{value!r} is read in two ways")

    def write(self, op: Op) -> None:
        """Write an op; what is a number a row is computed once, outside."""
        if op.kind == "moe.gather":
            self._read_gathered(op)
        elif not self._is_outside(op):
            super().write(op)

    def _is_outside(self, op: Op | None) -> bool:
        p = self.product
        inner = op is None or op.kind in ("moe.row_dot", "t.full") or op in p.finish
        return not inner and all(
            is_of_rows(v, p.rows, p.columns) for v in (op.results if op else ())
        )

    def term(self, value: Value) -> Term:
        """A value as text; numbers a row are arguments."""
        if value not in self.env and self._is_outside(producers(self.graph).get(value)):
            self.env[value] = Term(self.text.parameter(value), ("r",))
        return super().term(value)

    def _read_gathered(self, op: Op) -> None:
        """The tile of rows that the product gathers, where inner and outer widths are equal."""
        same = op is self.product.gather and op.result.type.shape[1] == self.domain.columns
        if not same:
            raise Unsupported("another gather after the product")
        name = self.text.parameter("gathered", f"{op.operands[0].hint}_rows")
        load = f"{self.text.use('load_rows')}({name}, {self.place()}, BM, BC)"
        held = self.text.held(op.result.type, load)
        self.env[op.result] = self.text.let(op.result.hint, held, TILE)

    # loads
    def load_row(self, value: Value, name: str) -> Term:
        """A number a row: an argument."""
        return Term(name, ("r",))

    def load_tile(self, value: Value, name: str) -> Term:
        """A tile of a matrix of rows."""
        self.access(value, (self.domain.columns,), (self.chunk,))
        load = f"{self.text.use('load_rows')}({name}, {self.place()}, BM, BC)"
        return self.text.let(value.hint, self.text.held(value.type, load), TILE)

    def load_parts(self, value: Value, hints: Sequence[str], layout: str) -> Parts:
        """The same tile of both parts."""
        if len(hints) != 2:
            raise Unsupported(f"{len(hints)} parts")
        name, width = self.text.parameter(value), self.domain.columns
        first, second = (self.text.names.fresh(h) for h in hints)
        if layout == "concat":
            self.access(value, (2, width), (2, self.chunk))
            load = f"{self.text.use('load_parts')}({name}, {self.place()}, BM, BC)"
        else:
            self.access(value, (2 * width,), (2 * self.chunk,))
            place = self.place().replace("column", "2 * column")
            tile = f"{self.text.use('load_rows')}({name}, {place}, BM, 2 * BC)"
            load = f"{self.text.held(value.type, tile)}.reshape(BM, BC, 2).split()"
        self.text.line(f"{first}, {second} = {load}")
        return Parts((Term(first, TILE), Term(second, TILE)), layout)

    # stores
    def store(self, value: Value) -> None:
        """A result of the kernel."""
        out = self.text.parameter(value, f"{value.hint}_out")
        if value in self.parts:
            self._store_parts(value, out, self.parts[value])
            return
        self.access(value, (self.domain.columns,), (self.chunk,))
        term = self.term(value)
        tile = term.on(TILE)
        if term.axes != TILE:
            tile = f"tl.zeros((BM, BC), {self.text.dtype}) + {tile}"
        self.text.line(f"{self.text.use('store_rows')}({out}, {self.place()}, {tile}, BM, BC)")

    def _store_parts(self, value: Value, out: str, parts: Parts) -> None:
        width, tiles = self.domain.columns, [t.on(TILE) for t in parts.terms]
        if parts.layout == "interleave" and len(tiles) == 2:
            self.access(value, (2 * width,), (2 * self.chunk,))
            both = f"tl.join({tiles[0]}, {tiles[1]}).reshape(BM, 2 * BC)"
            place = self.place().replace("column", "2 * column")
            self.text.line(f"{self.text.use('store_rows')}({out}, {place}, {both}, BM, 2 * BC)")
            return
        if parts.layout == "interleave":
            raise Unsupported(f"{len(tiles)} alternating parts")
        # loaded as both parts at once, stored one by one: two ways, two descriptors
        self.access(value, (len(tiles), width), (1, self.chunk))
        start, size, row, column = (self.text.parameter(p) for p in PLACE)
        for i, tile in enumerate(tiles):
            place = f"{start}, {size}, {row}, {i}, {column}"
            self.text.line(f"{self.text.use('store_part')}({out}, {place}, {tile}, BM, BC)")

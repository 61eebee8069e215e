"""The epilogue of a product on one tile, in Gluon.

Where it reads matrices of rows, these come as a further stage for each chunk of columns, and the
results take their place there until the copy engine has stored them. Otherwise the results pass one
by one through a piece of shared memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen.triton.descriptor_tile import TileBody
from moec.codegen.triton.kernel import Term, Unsupported
from moec.codegen.triton.rows import TILE, Parts
from moec.ir.graph import Op, Value

BLOCKS = 3  # that a stage holds
_NOT_HERE = ("moe.gather", "moe.expert_rows", "moe.permute")


@dataclass(frozen=True)
class Read:
    """A matrix of rows that the epilogue reads: its first column is that of the tile and this."""

    value: Value
    column: int


@dataclass
class StageBody(TileBody):
    """A device function that does the epilogue on a chunk of columns."""

    in_stage: bool = False
    reads: list[Read] = field(default_factory=list)
    stores: list[tuple[str, str, str]] = field(default_factory=list)  # tile, out, column
    puts: int = 0  # results that pass through a slot

    def write(self, op: Op) -> None:
        """Write an op."""
        if op.kind in _NOT_HERE:
            raise Unsupported(f"{op.kind} in an epilogue")
        super().write(op)

    # loads
    def _load_block(self, value: Value, column: int, hint: str) -> Term:
        if value.type.dtype != self.product.weights.type.dtype:
            raise Unsupported(f"{value!r} is not of the weights' dtype")
        self.reads.append(Read(value, column))
        if len(self.reads) > BLOCKS:
            raise Unsupported("more matrices than a stage holds")
        block = self.text.parameter(f"block_{len(self.reads)}")
        first = next(q.name for q in self.text.parameters if q.value == "part 0")
        load = f"{self.text.use('take_buffer')}({block}, {first})"
        return self.text.let(hint, load, TILE)

    def load_tile(self, value: Value, name: str) -> Term:
        """A tile of a matrix of rows."""
        self._forget(name)
        return self._load_block(value, 0, value.hint)

    def load_parts(self, value: Value, hints: Sequence[str], layout: str) -> Parts:
        """The same tile of both parts."""
        if layout != "concat":
            raise Unsupported(f"parts that {layout}")
        width = self.domain.columns
        terms = [self._load_block(value, i * width, hint) for i, hint in enumerate(hints)]
        return Parts(tuple(terms), layout)

    def _forget(self, name: str) -> None:
        """The loading warps read a matrix; this function only sees its block."""
        self.text.parameters[:] = [q for q in self.text.parameters if q.name != name]

    # stores
    def store(self, value: Value) -> None:
        """A result of the kernel."""
        if value.type.dtype != self.product.weights.type.dtype:
            raise Unsupported(f"{value!r} is not of the weights' dtype")
        out = self.text.parameter(value, f"{value.hint}_out")
        if value not in self.parts:
            self._store_tile(self.term(value), out, 0)
            return
        if self.parts[value].layout != "concat":
            raise Unsupported("parts that alternate")
        for i, term in enumerate(self.parts[value].terms):
            self._store_tile(term, out, i * self.domain.columns)

    def _store_tile(self, term: Term, out: str, first: int) -> None:
        if term.axes != TILE:
            raise Unsupported("a result that is not computed element by element")
        column = self.text.parameter("column")
        column = f"{first} + {column}" if first else column
        if self.in_stage:
            self.stores.append((term.text, out, column))
            return
        slots, turn, end, row = (self.text.parameter(n) for n in ("slots", "turn", "end", "row"))
        put = self.text.use("put_rows")
        turn = f"{turn} + {self.puts}" if self.puts else turn
        self.text.line(f"{put}({term.text}, {out}, {slots}, {turn}, {end}, {row}, {column})")
        self.puts += 1

    def finish(self) -> None:
        """Send what took the place of the stage's blocks."""
        if len(self.stores) > BLOCKS:
            raise Unsupported("more results than a stage holds")
        for i, (tile, _, _) in enumerate(self.stores, 1):
            block = self.text.parameter(f"block_{i}")
            self.text.line(f"{self.text.use('fill_buffer')}({block}, {tile})")
        if self.stores:
            self.text.line("fence_async_shared()")
        for i, (_, out, column) in enumerate(self.stores, 1):
            end, row = self.text.parameter("end"), self.text.parameter("row")
            send = self.text.use("send_buffer")
            self.text.line(f"{send}(block_{i}, {out}, {end}, {row}, {column})")

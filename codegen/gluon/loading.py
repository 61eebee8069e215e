"""The warps that load: the stages of a product over ragged rows, and what its epilogue reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.codegen.gluon.text import LANES
from moec.codegen.gluon.tile import Read
from moec.codegen.triton.kernel import KernelText, explained
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.triton.products import RowProduct
from moec.codegen.triton.tiles import Tile, times
from moec.codegen.writer import Writer

BYTES = 2  # of a number
ARRIVE = "arrive_copied(ready.index(stage), increment_count=False)"


@dataclass(frozen=True)
class Loading:
    """Writes the function; ``chunk`` columns of what ``reads`` names fill a stage."""

    product: RowProduct
    tile: Tile
    chunk: int
    reads: Sequence[Read]
    text: KernelText

    @property
    def tiles_n(self) -> int:
        """The number of column tiles."""
        return -(-self.product.columns // self.tile.columns)

    @property
    def wide(self) -> int:
        """The columns of a tile, all parts together."""
        return self.product.parts * self.tile.columns

    @property
    def chunks(self) -> str:
        """The number of chunks of a tile that lie inside the result."""
        most = self.tile.columns // self.chunk
        if self.text.facts.divides(self.tile.columns, self.product.columns):
            return str(most)
        return f"tl.minimum({most}, {self.product.columns // self.chunk} - n * {most})"

    def start(self) -> list[str]:
        """How many pieces of work there are."""
        places = self.text.parameter("places")
        return [f"tiles = gl.load({places})", f"pieces = {times('tiles', self.tiles_n)}"]

    def place(self, prefix: str, work: str) -> list[str]:
        """Which rows of which expert a piece of work is, and which columns."""
        names = ", ".join(f"{prefix}{n}" for n in ("expert", "row", "end"))
        return [
            f"{prefix}m, {prefix}n = pick_tile({work}, tiles, {self.tiles_n}, {self.tile.group})",
            f"{names} = row_place(places, {prefix}m, {work} < pieces)",
        ]

    def next_place(self) -> list[str]:
        """Look up the next piece of work while this one is done."""
        return [
            "# the next tile's place is on its way while this one is worked on",
            "next_work = work + gl.num_programs(0)",
            *self.place("next_", "next_work"),
        ]

    def advance(self) -> list[str]:
        """Go on to the next piece of work."""
        return [f"{name} = next_{name}" for name in ("m", "n", "expert", "row", "end", "work")]

    def lines(self) -> list[str]:
        """The body of the function."""
        w, p = Writer(), self.product
        x = p.gather.operands[0] if p.gather is not None else p.anchor.operands[0]
        rows = self.text.parameter("rows", x.hint)
        if p.gather is not None:
            w.line(f"lanes: gl.constexpr = {LANES}")
            w.line("slot = gl.arange(0, BM, layout=gl.SliceLayout(1, lanes))")
            w.line("depth = gl.arange(0, BK, layout=gl.SliceLayout(0, lanes))")
        w.lines(*self.start(), "filled = 0", "work = gl.program_id(0)", *self.place("", "work"))
        w.lines(*self._pairs(""))
        with w.block("while work < pieces:"):
            w.lines(*self.next_place(), *self._tokens(rows), *self._pairs("next_"))
            with w.block(f"for k in range(0, {p.depth}, BK):"):
                w.lines(*self._stage(rows))
            if self.reads:
                with w.block(f"for c in range({self.chunks}):"):
                    w.lines(*self._read())
            w.lines(*self.advance())
        return w.text().rstrip("\n").split("\n")

    def _pairs(self, prefix: str) -> list[str]:
        """The (token, choice) pairs of a tile's rows, where rows are gathered.

        A tile's last row stands for those past it: one token for all tiles would be one place that
        all programs read at a time.
        """
        if self.product.gather is None:
            return []
        perm = self.text.parameter(self.product.gather.operands[1])
        row, end = f"{prefix}row", f"{prefix}end"
        last = f"gl.maximum(gl.minimum(slot, {end} - {row} - 1), 0)"
        return [f"pair = gl.load({perm} + {row} + {last})"]

    def _tokens(self, rows: str) -> list[str]:
        """Where a tile's rows lie."""
        gather = self.product.gather
        if gather is None:
            return []
        choices = int(gather.operands[2].type.shape[1])
        at = f"{rows} + token[:, None] * {self.product.depth} + depth[None, :]"
        reach = gather.operands[0].type.shape[0] * self.product.depth
        pair, why = self.text.facts.widened(f"(pair // {choices})", reach, "gl.int64")
        return [*explained(f"token = {pair}", why, WIDTH - 12), f"at = {at}"]

    def _stage(self, rows: str) -> list[str]:
        """Fill one stage for the product."""
        gathered = self.product.gather is not None
        moved = (self.wide + (0 if gathered else self.tile.rows)) * self.tile.depth * BYTES
        lines = ["stage = wait_empty(empty, filled, STAGES)"]
        lines += [f"mbarrier.expect(ready.index(stage), {moved})", *self._weights()]
        if gathered:
            lines += ["copy_rows(left.index(stage), at + k)", ARRIVE]
        else:
            lines.append(f"copy_block({rows}, [row, k], ready.index(stage), left.index(stage))")
        return [*lines, "filled += 1"]

    def _weights(self) -> list[str]:
        p, columns = self.product, self.tile.columns
        weights, to = self.text.parameter(p.weights), "right.index(stage)"
        if p.transposed:
            places = [(f"[expert * {p.depth} + k, n * {self.wide}]", to)]
        elif p.parts == 1:
            places = [(f"[expert * {p.columns} + n * {columns}, k]", to)]
        else:
            places = [
                (
                    f"[(expert * {p.parts} + {i}) * {p.columns} + n * {columns}, k]",
                    f"{to}.slice({i * columns}, {columns})",
                )
                for i in range(p.parts)
            ]
        calls = [f"copy_block({weights}, {at}, ready.index(stage), {to})" for at, to in places]
        return [line for call in calls for line in wrapped(call, WIDTH - 12)]

    def _read(self) -> list[str]:
        """Fill a stage with a chunk of columns of what the epilogue reads."""
        moved = len(self.reads) * self.tile.rows * self.chunk * BYTES
        lines = ["stage = wait_empty(empty, filled, STAGES)"]
        lines.append(f"column = n * {self.tile.columns} + c * {self.chunk}")
        lines.append(f"mbarrier.expect(ready.index(stage), {moved})")
        for i, read in enumerate(self.reads):
            name = self.text.parameter(read.value)
            column = f"{read.column} + column" if read.column else "column"
            call = f"copy_block({name}, [row, {column}], ready.index(stage), left.index(stage))"
            if i:
                place = f"right, stage, row, {column}, ready, {i - 1}, BM"
                call = f"load_blocks({name}, {place})"
            lines += wrapped(call, WIDTH - 12)
        if self.product.gather is not None:
            lines.append(ARRIVE)
        return [*lines, "filled += 1"]

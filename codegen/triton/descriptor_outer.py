"""Weight gradients for Hopper: both sides loaded by the copy engine, which stops at the expert."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.grouped_outer import OuterProduct, analyse, place_lines
from moec.codegen.triton.kernel import KernelText, Unsupported, compute_dtype, documentation
from moec.codegen.triton.tiles import Tile, outer_tile, tile_of
from moec.codegen.writer import Writer
from moec.ir.graph import Op, Value
from moec.ir.types import SIZES


@dataclass
class DescriptorOuter:
    """One kernel; see the module."""

    op: Op
    name: str
    product: OuterProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        self.product = analyse(self.op)
        dtype, (m, n) = self.product.anchor.result.type.dtype, self.product.sizes
        if dtype not in ("bf16", "f16"):
            raise Unsupported("a dtype that the copy engine does not take")
        self.facts = Facts.of(self.op)
        self.copied = self.facts.aligned(m * SIZES[dtype], n * SIZES[dtype])
        self.tile = tile_of(self.op.attrs.get("tile"), outer_tile(dtype, m, n, "tma"))
        self.text = KernelText(compute_dtype(self.product.body), self.facts)
        self._write()

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of tiles of one expert's result, down and across."""
        m, n = self.product.sizes
        return -(-m // self.tile.rows), -(-n // self.tile.columns)

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        gathers = any(self.product.gather(side) is not None for side in (0, 1))
        used = {"pick_tile", "halves", "load_rows"}
        return used | ({"spread_rows"} if gathers else set())

    def _write(self) -> None:
        t, (down, across) = self.text, self.tiles
        pieces = self.product.experts * down * across
        self.facts.rows(self.product.rows)
        self.facts.pieces(pieces)
        self.facts.copied(
            self.product.anchor.result, int(self.product.sizes[0]) * self.product.sizes[1]
        )
        for side in (0, 1):
            if (gather := self.product.gather(side)) is not None:
                self.facts.spread(gather.operands[0])
        t.constants.update(BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth)
        left, right = t.parameter("left_rows"), t.parameter("right_rows")
        offsets = t.parameter(self.product.anchor.operands[2])
        out = t.parameter(self.product.anchor.result, f"{self.op.result.hint}_out")
        work = f"tl.program_id(0), {pieces}, tl.num_programs(0)"
        with t.block(f"for work in range({work}):"):
            t.lines.lines(*place_lines("work", down, across))
            t.line(f"start = tl.load({offsets} + expert)")
            t.line(f"size = tl.load({offsets} + expert + 1) - start")
            t.line("# accumulate over the expert's rows; none leaves zeros")
            t.line("acc = tl.zeros((BM, BN), tl.float32)")
            with t.block("for k in range(0, size, BK):"):
                t.line(f"left = load_rows({left}, start, size, k, m * BM, BK, BM)")
                t.line(f"right = load_rows({right}, start, size, k, n * BN, BK, BN)")
                t.line("acc = tl.dot(left.T, right, acc)")
            t.line("one, two = halves(acc, BM, BN)")
            for tile, column in (("one", "n * BN"), ("two", "n * BN + BN // 2")):
                value = f"{tile}.to({out}.dtype).reshape(1, BM, BN // 2)"
                t.line(f"{out}.store([expert, m * BM, {column}], {value})")

    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        tile = f"tile: {self.tile.rows} x {self.tile.columns}, {self.tile.depth} rows deep"
        self.text.write(
            writer, self.name, documentation(self.op, [tile, self.copied, *self.facts.limits])
        )

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        outer = dict(zip(self.product.body.inputs, self.op.operands, strict=True))
        made = {n: self._side(writer, context, outer, i) for i, n in enumerate(_SIDES)}
        result = context.allocate(writer, self.op.result)
        programs = self.product.experts * self.tiles[0] * self.tiles[1]
        with writer.block(f"if {only_if(self.product.rows)}:"):
            inner = [*self._arguments(context, made), f"num_warps={self.tile.warps}"]
            inner.append(f"num_stages={self.tile.stages}")
            grid = f"launch.persistent({programs}, device)"
            write(writer, f"{self.name}[{grid}]({', '.join(inner)})")
        with writer.block("else:"):
            writer.line(f"{result}.zero_()")
        for side in (0, 1):
            gather = self.product.gather(side)
            if gather is not None:
                context.release(writer, outer[gather.operands[0]], outer[gather.operands[1]])

    def _side(self, writer: Writer, context: Context, outer: dict[Value, Value], side: int) -> str:
        gather = self.product.gather(side)
        if gather is None:
            return context.names[outer[self.product.anchor.operands[side]]]
        x, perm, inverse = (outer[v] for v in gather.operands)
        return context.gathered(writer, x, perm, inverse)

    def _arguments(self, context: Context, made: dict[str, str]) -> list[str]:
        (m, n), tile, lines = self.product.sizes, self.tile, []
        named = arguments(self.text, self.op, context, made)
        for q, name in zip(self.text.parameters, named, strict=True):
            if q.value == "left_rows":
                lines.append(f"launch.ragged({name}, {(m,)}, {(tile.depth, tile.rows)})")
            elif q.value == "right_rows":
                lines.append(f"launch.ragged({name}, {(n,)}, {(tile.depth, tile.columns)})")
            elif q.value is self.product.anchor.result:
                lines.append(f"launch.matrix({name}, {(1, tile.rows, tile.columns // 2)})")
            else:
                lines.append(name)
        return lines


_SIDES = ("left_rows", "right_rows")

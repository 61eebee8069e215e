"""Weight gradients: a product per expert whose inner dimension is the expert's rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.grouped_gemm import precision
from moec.codegen.triton.kernel import (
    KernelText,
    Unsupported,
    compute_dtype,
    documentation,
)
from moec.codegen.triton.tiles import GROUP, Tile, outer_tile, tile_of
from moec.codegen.writer import Writer
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Op, producers


@dataclass(frozen=True)
class OuterProduct:
    """The two sides of a ``kern.grouped_outer``: each a matrix of rows, or tokens to gather."""

    body: Graph
    anchor: Op

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.anchor.result.type.shape[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of one expert's result."""
        _, m, n = self.anchor.result.type.shape
        return int(m), int(n)

    @property
    def rows(self) -> Dim:
        """The number of rows."""
        return self.anchor.operands[0].type.shape[0]

    def gather(self, side: int) -> Op | None:
        """The gather on a side."""
        return producers(self.body).get(self.anchor.operands[side])


def analyse(op: Op) -> OuterProduct:
    """The product; :class:`Unsupported` if the body holds anything but gathers besides."""
    if op.body is None:
        raise Unsupported("no body")
    others = [o for o in op.body.ops if o.kind != "moe.grouped_outer"]
    anchors = [o for o in op.body.ops if o.kind == "moe.grouped_outer"]
    if len(anchors) != 1 or any(o.kind != "moe.gather" for o in others):
        raise Unsupported("work besides the product")
    return OuterProduct(op.body, anchors[0])


@dataclass
class PointerOuter:
    """The portable template: one program a tile of one expert's result."""

    op: Op
    name: str
    product: OuterProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        self.product = analyse(self.op)
        m, n = self.product.sizes
        default = outer_tile(self.product.anchor.result.type.dtype, m, n, "pointer")
        self.tile = tile_of(self.op.attrs.get("tile"), default)
        self.facts = Facts.of(self.op)
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
        return {"pick_tile"}

    def _write(self) -> None:
        t, (m, n), (down, across) = self.text, self.product.sizes, self.tiles
        rows, experts = self.product.rows, self.product.experts
        self.facts.rows(rows)
        self.facts.programs(experts * down * across)
        size = (m + self.tile.rows) * (n + self.tile.columns)
        self.facts.word(size, "places in one expert's matrix")
        t.constants.update(BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth)
        sides = [self._side(0, "left", "at_m", m), self._side(1, "right", "at_n", n)]
        offsets = t.parameter(self.product.anchor.operands[2])
        out = t.parameter(self.product.anchor.result, f"{self.op.result.hint}_out")
        t.lines.lines(*place_lines("tl.program_id(0)", down, across))
        matrix, why = self.facts.widened("expert", experts * m * n)
        t.line(f"end = tl.load({offsets} + expert + 1)")
        t.line("at_m = m * BM + tl.arange(0, BM)", self.facts.divides(self.tile.rows, m))
        t.line("at_n = n * BN + tl.arange(0, BN)", self.facts.divides(self.tile.columns, n))
        t.line("# accumulate over the expert's rows; none leaves zeros")
        t.line(f"acc = tl.zeros((BM, BN), {t.dtype})")
        with t.block(f"for first in range(tl.load({offsets} + expert), end, BK):"):
            t.line("row = first + tl.arange(0, BK)")
            t.line("inside = row < end")
            for lines in sides:
                for line, fact in lines:
                    t.line(line, fact)
            t.line(f"acc = tl.dot(tl.trans(left), right, acc{precision(self._dtype)})")
        t.line("# store")
        conditions = [f"({a} < {s}){i}" for a, s, i, c in self._edges() if c]
        mask = f", mask={' & '.join(conditions)}" if conditions else ""
        at = f"{matrix} * {m * n} + at_m[:, None] * {n} + at_n[None, :]"
        t.line(f"tl.store({out} + {at}, acc{mask})", why)
        t.sort(self.product.body)

    @property
    def _dtype(self) -> str:
        return self.product.anchor.result.type.dtype

    def _edges(self) -> list[tuple[str, int, str, bool]]:
        m, n = self.product.sizes
        return [
            ("at_m", m, "[:, None]", not self.facts.divides(self.tile.rows, m)),
            ("at_n", n, "[None, :]", not self.facts.divides(self.tile.columns, n)),
        ]

    def _side(self, side: int, name: str, at: str, width: int) -> list[tuple[str, str]]:
        """The lines that load a side's rows, and the facts that they rest on."""
        gather, value = self.product.gather(side), self.product.anchor.operands[side]
        reach = (self.product.rows + self.tile.depth) * width
        lines = list[tuple[str, str]]()
        rows, why = ("", "") if gather is not None else self.facts.widened("row", reach)
        if gather is not None:
            value, perm, inverse = gather.operands
            pair = f"tl.load({self.text.parameter(perm)} + row, mask=inside, other=0)"
            lines = [(f"token = {pair} // {inverse.type.shape[1]}", "")]
            rows, why = self.facts.widened("token", value.type.shape[0] * width)
        whole = self.facts.divides(self.tile.rows if side == 0 else self.tile.columns, width)
        mask = "inside[:, None]" + ("" if whole else f" & ({at} < {width})[None, :]")
        pointer = f"{self.text.parameter(value)} + {rows}[:, None] * {width} + {at}[None, :]"
        return [*lines, (f"{name} = tl.load({pointer}, mask={mask}, other=0.0)", why)]

    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        tile = f"tile: {self.tile.rows} x {self.tile.columns}, {self.tile.depth} rows deep"
        self.text.write(writer, self.name, documentation(self.op, [tile, *self.facts.limits]))

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        result = context.allocate(writer, self.op.result)
        inner = ", ".join(arguments(self.text, self.op, context, {}))
        options = f"num_warps={self.tile.warps}, num_stages={self.tile.stages}"
        programs = self.product.experts * self.tiles[0] * self.tiles[1]
        with writer.block(f"if {only_if(self.product.rows)}:"):
            write(writer, f"{self.name}[({programs},)]({inner}, {options})")
        with writer.block("else:"):
            writer.line(f"{result}.zero_()")


def place_lines(work: str, down: int, across: int) -> list[str]:
    """The lines that say which tile of which expert a piece of work is."""
    if down * across == 1:
        return [f"expert = {work}", "m, n = 0, 0"]
    tile = f"pick_tile({work} % {down * across}, {down}, {across}, {GROUP})"
    return [f"expert = {work} // {down * across}", f"m, n = {tile}"]

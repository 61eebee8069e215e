"""Weight gradients for Hopper in Gluon: a product per expert over its rows; see the package."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moec.codegen.gluon.loading import BYTES
from moec.codegen.gluon.text import (
    COPYING,
    ISSUING,
    LANES,
    MULTIPLYING,
    REGISTERS,
    STAGES,
    define,
    gluon_text,
    partition,
    used,
)
from moec.codegen.requirements import WORD
from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.facts import Facts, tile_bound
from moec.codegen.triton.grouped_outer import OuterProduct, analyse
from moec.codegen.triton.kernel import (
    KernelText,
    Unsupported,
    compute_dtype,
    documentation,
    explained,
)
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.triton.tiles import Tile, has_order, tile_of
from moec.codegen.writer import Writer
from moec.ir.graph import Op

TILE = Tile(128, 256, 64, 4, STAGES)
LONGEST = 8192
_SIDES = ("left", "right")


@dataclass
class GluonOuter:
    """The functions of one kernel; see the module."""

    op: Op
    name: str
    product: OuterProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        self.product = analyse(self.op)
        self.tile = tile_of(self.op.attrs.get("tile"), TILE)
        self.facts = Facts.of(self.op)
        self._check()
        self.copied = self._ask()
        self.text = t = gluon_text(compute_dtype(self.product.body), self.facts)
        self.names = [t.parameter(f"{side}_rows") for side in _SIDES]
        if self.gathered is not None:
            gather = self.product.gather(self.gathered)
            self.perm = t.parameter(gather.operands[1])  # type: ignore[union-attr]
        self.offsets = t.parameter(self.product.anchor.operands[2])
        self.out = t.parameter(self.product.anchor.result, f"{self.op.result.hint}_out")
        self.load_lines = self._loading()
        self.multiply_lines = self._multiplying()

    def _check(self) -> None:
        dtype, (m, n) = self.product.anchor.result.type.dtype, self.product.sizes
        if dtype not in ("bf16", "f16"):
            raise Unsupported("a dtype that the copy engine does not take")
        self.facts.aligned(m * BYTES, n * BYTES)
        if m < self.tile.rows or n < self.tile.columns:
            raise Unsupported("matrices that do not fill the tile")
        if replace(self.tile, group=TILE.group) != TILE or not has_order(self.tile):
            raise Unsupported("another tile")
        if max(m, n) > LONGEST:
            raise Unsupported("matrices so large that the other templates keep up")
        sides = [s for s in (0, 1) if self.product.gather(s) is not None]
        if len(sides) > 1:
            raise Unsupported("two gathered sides")
        if any(v.type.dtype != dtype for v in self.product.anchor.operands[:2]):
            raise Unsupported("several dtypes")
        self.gathered = sides[0] if sides else None

    def _ask(self) -> str:
        """What numbers of rows, tiles and stages need; the docstring's line on rows."""
        p, (m, n), (down, across) = self.product, self.product.sizes, self.tiles
        self.facts.rows(p.rows)
        self.facts.pieces(self._pieces)
        self.facts.copied(p.anchor.result, m * n)
        stages = down * across * tile_bound(p.rows, p.experts, self.tile.depth)
        self.facts.limit(stages, WORD, "stages counted in 32 bits")
        return self.facts.aligned(m * BYTES, n * BYTES)

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of tiles of one expert's result, down and across."""
        m, n = self.product.sizes
        return -(-m // self.tile.rows), -(-n // self.tile.columns)

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        used = {"pick_tile", "halves", "barriers", "wait_empty", "wait_ready", "free_last"}
        return used | {"put_matrix", "RAGGED"}

    def _place(self, w: Writer) -> None:
        """Which tile of which expert a piece of work is."""
        down, across = self.tiles
        w.line(f"expert = work // {down * across}")
        w.line(f"m, n = pick_tile(work % {down * across}, {down}, {across}, {self.tile.group})")
        w.line(f"start = gl.load({self.offsets} + expert)")
        w.line(f"size = gl.load({self.offsets} + expert + 1) - start")

    @property
    def _pieces(self) -> int:
        return self.product.experts * self.tiles[0] * self.tiles[1]

    def _loading(self) -> list[str]:
        w, pieces = Writer(), self._pieces
        if self.gathered is not None:
            w.line(f"lanes: gl.constexpr = {LANES}")
            w.line("slot = gl.arange(0, BK, layout=gl.SliceLayout(1, lanes))")
        w.line("filled = 0")
        with w.block(f"for work in range(gl.program_id(0), {pieces}, gl.num_programs(0)):"):
            self._place(w)
            if self.gathered is not None:
                self._gather_start(w)
            with w.block("for k in range(0, size, BK):"):
                if self.gathered is not None:
                    self._gather_step(w)
                self._stage(w)
        return w.text().rstrip("\n").split("\n")

    def _gather_start(self, w: Writer) -> None:
        size, at = ("BM", "m * BM") if self.gathered == 0 else ("BN", "n * BN")
        w.line(f"pair = gl.load({self.perm} + start + slot, mask=slot < size, other=0)")
        w.line(f"column = {at} + gl.arange(0, {size}, layout=gl.SliceLayout(0, lanes))")

    def _gather_step(self, w: Writer) -> None:
        side = self.gathered or 0
        gather, width = self.product.gather(side), self.product.sizes[side]
        choices = int(gather.operands[2].type.shape[1])  # type: ignore[union-attr]
        reach = gather.operands[0].type.shape[0] * width  # type: ignore[union-attr]
        token, why = self.facts.widened(f"(pair // {choices})", reach, "gl.int64")
        w.lines(*explained(f"token = {token}", why, WIDTH - 12))
        w.line(f"at = {self.names[side]} + token[:, None] * {width} + column[None, :]")
        whole = self.facts.divides((self.tile.rows, self.tile.columns)[side], width)
        columns = "" if whole else f" & (column < {width})[None, :]"
        w.line(f"live = (slot < size - k)[:, None]{columns}")
        w.line("# the next step's rows, while this one's stage is waited for")
        load = f"gl.load({self.perm} + start + k + BK + slot, mask=slot < size - k - BK, other=0)"
        w.line(f"pair = {load}")

    def _stage(self, w: Writer) -> None:
        """Fill one stage; rows past the expert's end are zeros."""
        sizes = (self.tile.rows, self.tile.columns)
        moved = sum(sizes[s] for s in (0, 1) if s != self.gathered) * self.tile.depth * 2
        w.line("stage = wait_empty(empty, filled, STAGES)")
        w.line(f"mbarrier.expect(ready.index(stage), {moved})")
        for side, (name, place) in enumerate(zip(self.names, ("m * BM", "n * BN"), strict=True)):
            buffer = f"{_SIDES[side]}.index(stage)"
            if side == self.gathered:
                continue
            at = f"[RAGGED, start + size, k - size + RAGGED, {place}]"
            copy = f"copy_block({name}, {at}, ready.index(stage), {buffer})"
            w.lines(*wrapped(copy, WIDTH - 12))
        if self.gathered is not None:
            size = ("BM", "BN")[self.gathered]
            buffer = f"{_SIDES[self.gathered]}.index(stage).reshape((BK, {size}))"
            copy = f"copy_rows({buffer}, at, mask=live)"
            w.lines(*wrapped(copy, WIDTH - 12))
            w.line("arrive_copied(ready.index(stage), increment_count=False)")
        w.line("filled += 1")

    def _multiplying(self) -> list[str]:
        w, pieces = Writer(), self._pieces
        form = "version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]"
        w.lines(*wrapped(f"tall: gl.constexpr = gl.NVMMADistributedLayout({form})", WIDTH - 4))
        w.line("HALF: gl.constexpr = BM // 2  # the rows of one group of warps")
        w.line("taken = 0")
        with w.block(f"for work in range(gl.program_id(0), {pieces}, gl.num_programs(0)):"):
            self._place(w)
            w.line("acc = gl.zeros((HALF, BN), gl.float32, layout=tall)")
            with w.block("for k in range(0, size, BK):"):
                w.line("stage = wait_ready(ready, taken, STAGES)")
                w.line("a = left.index(stage).reshape((BK, BM)).slice(WG * HALF, HALF, 1)")
                w.line("b = right.index(stage).reshape((BK, BN))")
                w.line("acc = warpgroup_mma(a.permute((1, 0)), b, acc, is_async=True)")
                w.line("acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))")
                w.line("free_last(empty, taken, k > 0, STAGES)")
                w.line("taken += 1")
            w.line("acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))")
            w.line("free_last(empty, taken, size > 0, STAGES)")
            w.line("one, two = halves(acc, HALF, BN)")
            w.line("row = m * BM + WG * HALF")
            w.line(f"put_matrix(one, {self.out}, slots, expert, row, n * BN)")
            w.line(f"put_matrix(two, {self.out}, slots, expert, row, n * BN + BN // 2)")
        w.line("tma.store_wait(0)")
        return w.text().rstrip("\n").split("\n")

    def define(self, writer: Writer) -> None:
        """Write the functions."""
        shared, sizes = ["left", "right"], ["BM", "BN", "BK", "STAGES"]
        constants = [f"{s}: gl.constexpr" for s in sizes]
        load = [*used(self.text.parameters, self.load_lines), *shared, "ready", "empty"]
        docs = ["Fill the stages, tile after tile."]
        define(writer, f"{self.name}_load", [*load, *constants], docs, self.load_lines)
        multiply = [*used(self.text.parameters, self.multiply_lines), *shared, "slots"]
        multiply += ["ready", "empty"]
        docs = ["Multiply half of each tile's rows; an expert without rows leaves zeros."]
        wide = [*multiply, *constants, "WG: gl.constexpr"]
        define(writer, f"{self.name}_multiply", wide, docs, self.multiply_lines)
        self._define_kernel(writer, multiply, load, sizes)

    def _define_kernel(
        self, writer: Writer, multiply: list[str], load: list[str], sizes: list[str]
    ) -> None:
        w, tile, copies = Writer(), self.tile, self.gathered is not None
        form = "swizzle_byte_width=128, element_bitwidth=16, rank=4"
        w.line(f"form: gl.constexpr = gl.NVMMASharedLayout({form})")
        memory = f"gl.allocate_shared_memory({self.out}.dtype, "
        for name, size in (("left", "BM"), ("right", "BN")):
            w.line(f"{name} = {memory}[STAGES, 1, 1, BK, {size}], form)")
        for i in (0, 1):
            shape = f"[1] + {self.out}.block_type.shape, {self.out}.layout"
            w.lines(*wrapped(f"slots_{i} = {memory}{shape})", WIDTH - 4))
        w.line(f"ready, empty = barriers({129 if copies else 1}, STAGES)")
        with w.block("gl.warp_specialize("):
            w.line("[")
            for i in (0, 1):
                inner = [f"slots_{i}" if n == "slots" else n for n in multiply]
                partition(w, f"{self.name}_multiply", [*inner, *sizes, str(i)])
            partition(w, f"{self.name}_load", [*load, *sizes])
            w.lines("],", f"[4, {4 if copies else 1}],")
            w.line(f"[{MULTIPLYING}, {COPYING if copies else ISSUING}],")
        w.line(")")
        values = (tile.rows, tile.columns, tile.depth, tile.stages)
        constants = [f"{s}: gl.constexpr = {v}" for s, v in zip(sizes, values, strict=True)]
        size = f"tile: {tile.rows} x {tile.columns}, {tile.depth} rows deep"
        docs = documentation(self.op, [size, self.copied, *self.facts.limits])
        names = [*(q.name for q in self.text.parameters), *constants]
        define(writer, self.name, names, docs, w.text().rstrip("\n").split("\n"), launched=True)

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        outer = dict(zip(self.product.body.inputs, self.op.operands, strict=True))
        made = {}
        for side, name in enumerate(_SIDES):
            gather = self.product.gather(side)
            value = gather.operands[0] if gather else self.product.anchor.operands[side]
            made[f"{name}_rows"] = context.names[outer[value]]
        result = context.allocate(writer, self.op.result)
        with writer.block(f"if {only_if(self.product.rows)}:"):
            inner = [*self._arguments(context, made), "num_warps=4", f"maxnreg={REGISTERS}"]
            grid = f"launch.persistent({self._pieces}, device)"
            write(writer, f"{self.name}[{grid}]({', '.join(inner)})")
        with writer.block("else:"):
            writer.line(f"{result}.zero_()")

    def _arguments(self, context: Context, made: dict[str, str]) -> list[str]:
        sizes, tile, lines = self.product.sizes, self.tile, []
        named = arguments(self.text, self.op, context, made)
        blocks = (tile.rows, tile.columns)
        for q, name in zip(self.text.parameters, named, strict=True):
            side = next((i for i, s in enumerate(_SIDES) if q.value == f"{s}_rows"), None)
            if side is not None and side == self.gathered:
                lines.append(f"launch.aligned({name})")
            elif side is not None:
                block = (tile.depth, blocks[side])
                lines.append(f"launch.ragged_blocks({name}, {(sizes[side],)}, {block})")
            elif q.value is self.product.anchor.result:
                lines.append(f"launch.blocks({name}, {(1, tile.rows // 2, tile.columns // 2)})")
            else:
                lines.append(name)
        return lines

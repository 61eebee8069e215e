"""Products over ragged rows for Hopper: the copy engine loads and stores, one program a processor.

Rows are gathered beforehand (:meth:`Context.gathered`); each program takes tile after tile in one
flattened loop, so that the stores of a tile drain under the loads of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from moec.codegen.triton.context import Context, RowList, arguments, only_if, write
from moec.codegen.triton.descriptor_tile import PLACE, TileBody
from moec.codegen.triton.facts import Facts, tile_bound
from moec.codegen.triton.kernel import (
    KernelText,
    Parameter,
    Term,
    Unsupported,
    assigned,
    compute_dtype,
    documentation,
    fresh_names,
)
from moec.codegen.triton.products import RowProduct, analyse, is_of_rows
from moec.codegen.triton.rows import TILE, Domain, Parts, RowBody
from moec.codegen.triton.sums import RowSums
from moec.codegen.triton.tiles import GROUP, SHARED_BYTES, Tile, row_tile, tile_of, times
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Op, Value
from moec.ir.types import SIZES


@dataclass
class DescriptorGemm:
    """One kernel and the device function of its epilogue; see the module."""

    op: Op
    name: str
    product: RowProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)
    sums: RowSums | None = field(init=False)

    def __post_init__(self) -> None:
        self.product = p = analyse(self.op)
        _check(p)
        self.tile = tile_of(self.op.attrs.get("tile"), row_tile(p, "tma"))
        self.facts = Facts.of(self.op)
        self._ask()
        self.text = KernelText(compute_dtype(p.body), self.facts)
        self.sums = RowSums(p, self.name, self.tiles_n, self.facts) if p.dots else None
        few = 32 if p.reads > 2 else 64  # measured: what does not spill
        self._write_tile(min(self.tile.columns, few if p.reads else 128))
        while self._shared_bytes() > SHARED_BYTES and self.chunk > 16:
            self._write_tile(self.chunk // 2)
        self._write()

    @property
    def tiles_n(self) -> int:
        """The number of column tiles."""
        return -(-self.product.columns // self.tile.columns)

    @property
    def library(self) -> set[str]:
        """The library functions that kernels and launch use."""
        extra = self.sums.text.used if self.sums is not None else set()
        used = self.text.used | self.body.text.used | extra | {"pick_tile", "list_row_tiles"}
        return used | ({"spread_rows"} if self.product.gather is not None else set())

    def _shared_bytes(self) -> int:
        """The shared memory of a program: the stages of the product, the blocks of the epilogue."""
        t, size = self.tile, SIZES[self.product.weights.type.dtype]
        stage = (t.rows + self.product.parts * t.columns) * t.depth * size
        blocks = [(v, prod(a.block)) for v, a in self.body.accesses.items()]
        return t.stages * stage + sum(t.rows * n * SIZES[v.type.dtype] for v, n in blocks)

    def _ask(self) -> None:
        """What numbers of rows, tiles and elements need."""
        p, tile = self.product, self.tile
        self.facts.row_tiles(p.rows, self._experts, tile.rows)
        self.facts.pieces(tile_bound(p.rows, self._experts, tile.rows) * self.tiles_n)
        self.facts.copied(p.weights, p.depth * p.columns * p.parts)
        if p.gather is not None:
            self.facts.spread(p.gather.operands[0])
        for op in p.body.ops:
            if op.kind == "moe.expert_rows":
                self.facts.word(op.operands[0].type.elements, "places in a table of the experts")

    # the epilogue
    def _write_tile(self, chunk: int) -> None:
        """The device function: the body's ops on BM rows and BC columns."""
        p, self.chunk = self.product, chunk
        cut = not self.facts.divides(chunk, p.columns)
        self.domain = Domain(p.rows, p.columns, cut, "columns")
        text = KernelText(self.text.dtype, self.facts, fresh_names((*PLACE, "expert", "acc")))
        self.body = body = TileBody(text, p.body, self.domain, product=p, chunk=chunk)
        body.text.constants.update(BM=self.tile.rows, BC=self.chunk)
        names = self._part_hints()
        terms = tuple(Term(body.text.parameter(f"part {i}", n), TILE) for i, n in enumerate(names))
        if p.split is None:
            body.env[p.anchor.result] = terms[0]
        else:
            body.parts[p.anchor.result] = Parts(terms, p.layout)
            body.env.update(zip(p.split.results, terms, strict=True))
        biased = any(op.kind == "moe.expert_rows" for op in p.epilogue)
        if biased or (self.domain.cut and p.dots):
            column = body.text.parameter("column")
            body.text.line(f"columns = {column} + tl.arange(0, BC)")
        wanted = [v for v in p.body.outputs if v not in p.finished and not self._of_rows(v)]
        self._store_ready(wanted)
        for op in p.epilogue:
            if op is not p.split:
                body.run([op])
                self._store_ready(wanted)  # at once: fewer values live at a time
        if body.dots:
            body.text.line(f"return {', '.join(t.text for _, t in body.dots)}")
        body.text.sort(p.body)

    def _store_ready(self, wanted: list[Value]) -> None:
        ready = [v for v in wanted if v in self.body.env or v in self.body.parts]
        for value in ready:
            wanted.remove(value)
            self.body.store(value)

    def _part_hints(self) -> list[str]:
        split = self.product.split
        return [v.hint for v in split.results] if split is not None else ["acc"]

    # the kernel
    def _write(self) -> None:
        t, p = self.text, self.product
        t.constants.update(BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth)
        x = p.gather.operands[0] if p.gather is not None else p.anchor.operands[0]
        t.parameter("rows", f"{x.hint}_rows" if p.gather is not None else x.hint)
        t.parameter(p.weights)
        t.parameter(p.offsets)
        tiles = t.parameter("tiles", "row_tiles")
        t.line(f"tiles = tl.load({tiles})")
        t.line("last = tl.program_id(0) - tl.num_programs(0)")
        count = times("tiles", self.tiles_n)
        work = f"tl.program_id(0), {count}, tl.num_programs(0), flatten=True"
        with t.block(f"for work in tl.range({work}):"):
            t.line(f"m, n = pick_tile(work, tiles, {self.tiles_n}, {GROUP})")
            t.line(f"expert = tl.load({tiles} + 2 * m + 2)")
            t.line(f"row = tl.load({tiles} + 2 * m + 3)")
            self._write_product()
            t.line(
                "# the epilogue finds its place again: the next tile's loads need not wait for it"
            )
            t.line("last += tl.num_programs(0)")
            t.line(f"m, n = pick_tile(last, tiles, {self.tiles_n}, {GROUP})")
            t.line(f"expert = tl.load({tiles} + 2 * m + 2)")
            t.line(f"start = tl.load({t.parameter(p.offsets)} + expert)")
            t.line(f"size = tl.load({t.parameter(p.offsets)} + expert + 1) - start")
            t.line(f"row = tl.load({tiles} + 2 * m + 3) - start")
            self._write_epilogue()
        t.sort(p.body)

    def _write_product(self) -> None:
        t, p, both = self.text, self.product, self.product.parts == 2
        rows, weights = t.parameter("rows"), t.parameter(p.weights)
        columns = "2 * BN" if both else "BN"
        t.line(f"acc = tl.zeros((BM, {columns}), tl.float32)")
        at = f"n * {columns}" if p.layout == "interleave" or not both else "n * BN"
        part = "0, " if both and p.layout == "concat" else ""
        with t.block(f"for k in range(0, {p.depth}, BK):"):
            t.line(f"left = {rows}.load([row, k])")
            if p.transposed:
                t.line(f"right = {weights}.load([expert, k, {part}{at}]).reshape(BK, {columns})")
                t.line("acc = tl.dot(left, right, acc)")
            else:
                t.line(f"right = {weights}.load([expert, {part}{at}, k]).reshape({columns}, BK)")
                t.line("acc = tl.dot(left, right.T, acc)")

    def _write_epilogue(self) -> None:
        t, p = self.text, self.product
        rows = RowBody(t, p.body, Domain(p.rows, p.columns, False, row="here"))
        outer = [v for v in p.body.outputs if v not in p.finished and self._of_rows(v)]
        if p.dots or outer or any(self._is_row_argument(q) for q in self.body.text.parameters):
            t.line("inside = row + tl.arange(0, BM) < size")
            here, most = "(start + row + tl.arange(0, BM))", p.rows + self.tile.rows
            t.line(*assigned("here", self.facts.widened(here, most * self.tiles_n)))
        pieces = self._pieces()
        extra = {
            q.name: self._argument(q, rows)
            for q in self.body.text.parameters
            if q.name not in PLACE
        }
        for i, piece in enumerate(pieces):
            self._call(i, piece, extra)
        for value in outer:
            out = t.parameter(value, f"{value.hint}_out")
            value_text = rows.term(value).on(("r",))
            t.line(f"tl.store({out} + here, {value_text}, mask=inside & (n == 0))")
        for i, (op, _) in enumerate(self.body.dots):
            partial = t.parameter(f"partial_{p.dots.index(op)}", "partial")
            at = f"{partial} + {times('here', self.tiles_n)} + n"
            t.line(f"tl.store({at}, dot_{i}, mask=inside)")

    def _of_rows(self, value: Value) -> bool:
        return is_of_rows(value, self.product.rows, self.product.columns)

    def _is_row_argument(self, q: Parameter) -> bool:
        return not isinstance(q.value, str) and self._of_rows(q.value)

    def _argument(self, q: Parameter, rows: RowBody) -> str:
        """What the kernel passes for a parameter of the epilogue."""
        if isinstance(q.value, str):
            return self.text.parameter(q.value) if q.value == "gathered" else q.value
        if self._of_rows(q.value):
            return rows.term(q.value).text
        return self.text.parameter(q.value, q.name)

    def _pieces(self) -> list[list[str]]:
        """Cut the accumulator into the parts of each chunk of columns; no data moves."""
        t, p = self.text, self.product
        parts = ["acc"]
        if p.parts == 2:
            parts = [t.names.fresh(h) for h in self._part_hints()]
            cut = "acc.reshape(BM, BN, 2).split()"
            if p.layout == "concat":
                cut = f"{t.use('halves')}(acc, BM, 2 * BN)"
            t.line(f"{', '.join(parts)} = {cut}")
        width, pieces = self.tile.columns, [[part] for part in parts]
        while width > self.chunk:
            pieces = [[h for piece in part for h in self._halve(piece, width)] for part in pieces]
            width //= 2
        return [list(group) for group in zip(*pieces, strict=True)]

    def _halve(self, piece: str, width: int) -> list[str]:
        names = [self.text.names.fresh(f"{piece}_{i}") for i in (1, 2)]
        self.text.line(f"{', '.join(names)} = {self.text.use('halves')}({piece}, BM, {width})")
        return names

    def _call(self, i: int, piece: list[str], extra: dict[str, str]) -> None:
        """The epilogue on one chunk of columns."""
        column = f"n * BN + {i * self.chunk}" if i else "n * BN"
        values = []
        for q in self.body.text.parameters:
            if isinstance(q.value, str) and q.value.startswith("part "):
                values.append(piece[int(q.value.split()[1])])
            else:
                values.append(column if q.value == "column" else extra.get(q.name, q.name))
        call = f"{self.name}_tile({', '.join(values)})"
        dots = [f"dot_{j}" for j in range(len(self.body.dots))]
        if not dots:
            self.text.line(call)
        elif i == 0:
            self.text.line(f"{', '.join(dots)} = {call}")
        elif len(dots) == 1:
            self.text.line(f"dot_0 += {call}")
        else:
            more = [f"more_{j}" for j in range(len(dots))]
            self.text.line(f"{', '.join(more)} = {call}")
            self.text.lines.lines(*(f"{d} += {m}" for d, m in zip(dots, more, strict=True)))

    # the module
    def row_list(self, outer: Mapping[Value, Value]) -> RowList:
        """The list of row tiles that it reads; ``outer`` is what the body's inputs are."""
        return RowList(outer[self.product.offsets], self.tile.rows)

    def define(self, writer: Writer) -> None:
        """Write the kernels."""
        tile = f"tile: {self.tile.rows} rows x {self.tile.columns} columns x {self.tile.depth} deep"
        docs = [f"Epilogue on {self.chunk} columns of a tile."]
        self.body.text.write(writer, f"{self.name}_tile", docs, launched=False)
        docs = [tile, self._copied, *self.facts.limits]
        self.text.write(writer, self.name, documentation(self.op, docs))
        if self.sums is not None:
            self.sums.define(writer)

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        p, op = self.product, self.op
        context.contiguous(writer, op.operands)
        outer = dict(zip(p.body.inputs, op.operands, strict=True))
        tiles = context.row_list(writer, self.row_list(outer), p.rows)
        made = {"tiles": tiles}
        made["rows"] = made["gathered"] = self._rows(writer, context, outer)
        for value in op.results:
            context.allocate(writer, value)
        partial = self.sums.allocate(writer, context) if self.sums is not None else {}
        made.update(partial)
        sizes = f"{python_source(p.rows)}, {self._experts}, {self.tile.rows}, {self.tiles_n}"
        with writer.block(f"if {only_if(p.rows)}:"):
            inner = [*self._arguments(context, made), f"num_warps={self.tile.warps}"]
            inner.append(f"num_stages={self.tile.stages}")
            grid = f"launch.persistent_rows({sizes}, device)"
            write(writer, f"{self.name}[{grid}]({', '.join(inner)})")
            if self.sums is not None:
                self.sums.launch(writer, op, context, made)
        if partial:
            writer.line(f"del {', '.join(partial.values())}")
        if p.gather is not None:
            x, perm, _ = p.gather.operands
            context.release(writer, outer[x], outer[perm])

    @property
    def _copied(self) -> str:
        """The docstring's line on what the copy engine asks of rows."""
        p, size = self.product, SIZES[self.product.weights.type.dtype]
        others = [a.inner[-1] * SIZES[v.type.dtype] for v, a in self.body.accesses.items()]
        return self.facts.aligned(p.depth * size, p.columns * size, *others)

    @property
    def _experts(self) -> int:
        return int(self.product.weights.type.shape[0])

    def _rows(self, writer: Writer, context: Context, outer: dict[Value, Value]) -> str:
        """The name of the rows to multiply."""
        gather = self.product.gather
        if gather is None:
            return context.names[outer[self.product.anchor.operands[0]]]
        x, perm, inverse = (outer[v] for v in gather.operands)
        return context.gathered(writer, x, perm, inverse)

    def _arguments(self, context: Context, made: dict[str, str]) -> list[str]:
        """The launch's arguments, matrices as descriptors."""
        named = arguments(self.text, self.op, context, made)
        return [
            self._passed(q.value, name) for q, name in zip(self.text.parameters, named, strict=True)
        ]

    def _passed(self, value: Value | str, name: str) -> str:
        p, tile = self.product, self.tile
        if value == "rows":
            return f"launch.matrix({name}, {(tile.rows, tile.depth)})"
        if value == "gathered":
            return f"launch.ragged({name}, {(p.columns,)}, {(tile.rows, self.chunk)})"
        if value is p.weights:
            shape, block = self._weight_blocks()
            return f"launch.matrix({name}, {block}, shape={shape})"
        if isinstance(value, str) or value not in self.body.accesses:
            return name
        access = self.body.accesses[value]
        return f"launch.ragged({name}, {access.inner}, {(tile.rows, *access.block)})"

    def _weight_blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape under which the weights are read, and the block of it."""
        p, bn, bk = self.product, self.tile.columns, self.tile.depth
        columns: tuple[int, ...] = (p.parts * p.columns,)
        block: tuple[int, ...] = (p.parts * bn,)
        if p.parts == 2 and p.layout == "concat":
            columns, block = (2, p.columns), (2, bn)
        if p.transposed:
            return (self._experts, p.depth, *columns), (1, bk, *block)
        return (self._experts, *columns, p.depth), (1, *block, bk)


def _check(p: RowProduct) -> None:
    """What the copy engine asks of sizes, and what this template leaves to the other."""
    if p.weights.type.dtype not in ("bf16", "f16"):
        raise Unsupported(f"a product of {p.weights.type.dtype} by descriptors")
    if p.parts > 2:
        raise Unsupported(f"{p.parts} parts")
    if p.prologue and p.gather is None:
        raise Unsupported("work before the product")
    size = SIZES[p.weights.type.dtype]
    Facts.of(p.op).aligned(p.depth * size, p.columns * size)

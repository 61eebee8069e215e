"""Products over ragged rows, the portable template: pointers, masks and one program a tile.

The rows to multiply may be gathered as they are loaded; the body's other ops become work on the
tile of the product (the epilogue), whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, RowList, arguments, only_if, write
from moec.codegen.triton.facts import Facts, tile_bound
from moec.codegen.triton.kernel import KernelText, Term, assigned, compute_dtype, documentation
from moec.codegen.triton.products import RowProduct, analyse
from moec.codegen.triton.rows import TILE, Domain, Parts, RowBody
from moec.codegen.triton.sums import RowSums
from moec.codegen.triton.tiles import GROUP, Tile, row_tile, tile_of, times
from moec.codegen.writer import Writer
from moec.ir.dims import Dim, python_source
from moec.ir.graph import Op, Value


@dataclass
class PointerGemm:
    """One kernel; see the module."""

    op: Op
    name: str
    product: RowProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)
    sums: RowSums | None = field(init=False)

    def __post_init__(self) -> None:
        self.product = analyse(self.op)
        p = self.product
        self.tile = tile_of(self.op.attrs.get("tile"), row_tile(p, "pointer"))
        self.facts = Facts.of(self.op)
        self._ask()
        self.text = KernelText(compute_dtype(p.body), self.facts)
        self.sums = RowSums(p, self.name, self.tiles_n, self.facts) if p.dots else None
        cut = not self.facts.divides(self.tile.columns, p.columns)
        masks = ("live", "live_wide") if cut else ("inside[:, None]",) * 2
        self.domain = Domain(p.rows, p.columns, cut, live=masks[0], live_wide=masks[1])
        self._write()

    @property
    def tiles_n(self) -> int:
        """The number of column tiles."""
        return -(-self.product.columns // self.tile.columns)

    @property
    def wide(self) -> bool:
        """Whether two alternating parts are computed as one tile of twice the columns."""
        return self.product.parts == 2 and self.product.layout == "interleave"

    @property
    def library(self) -> set[str]:
        """The library functions that kernel and launch use."""
        extra = self.sums.text.used if self.sums is not None else set()
        return self.text.used | extra | {"pick_tile", "list_row_tiles"}

    def _ask(self) -> None:
        """What numbers of rows, tiles and elements need."""
        p, tile = self.product, self.tile
        self.facts.row_tiles(p.rows, _experts(p), tile.rows)
        self.facts.programs(tile_bound(p.rows, _experts(p), tile.rows) * self.tiles_n)
        matrix = p.parts * (p.columns + tile.columns) * (p.depth + tile.depth)
        self.facts.word(matrix, "places in one expert's matrix")

    # the kernel
    def _write(self) -> None:
        self.text.constants.update(BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth)
        self._write_place()
        products = self._write_product()
        self._write_epilogue(products)
        self.text.sort(self.product.body)

    def _write_place(self) -> None:
        """Which rows of which expert, and which columns."""
        t = self.text
        offsets = t.parameter(self.product.offsets)
        tiles = t.parameter("tiles", "row_tiles")
        t.line(f"tiles = tl.load({tiles})  # the grid is an upper bound of them")
        with t.block(f"if tl.program_id(0) >= {times('tiles', self.tiles_n)}:"):
            t.line("return")
        t.line(f"m, n = pick_tile(tl.program_id(0), tiles, {self.tiles_n}, {GROUP})")
        load = f"tl.load({tiles} + 2 * m + 2)"
        t.line(*assigned("expert", self.facts.widened(load, self._largest_table())))
        row = (self.product.rows + self.tile.rows) * self._longest_row()
        wide, why = self.facts.widened("row", row)
        rows = f"row = tl.load({tiles} + 2 * m + 3) + tl.arange(0, BM)"
        t.line(rows, why if wide == "row" else "")
        t.line(f"inside = row < tl.load({offsets} + expert + 1)  # the last tile may be cut")
        if wide != "row":
            t.line(f"row = {wide}", why)
        whole = self.facts.divides(self.tile.columns, self.product.columns)
        t.line("column = n * BN + tl.arange(0, BN)", whole)
        if self.domain.cut:
            columns = self.product.columns
            t.line(f"live = inside[:, None] & (column < {columns})[None, :]  # so may columns")
        layouts = {op.attrs.get("layout") for op in self.product.epilogue if op.kind in _BOTH}
        if self.wide or "interleave" in layouts:
            t.line("wide = n * 2 * BN + tl.arange(0, 2 * BN)  # both parts alternate")
            if self.domain.cut:
                t.line(f"live_wide = inside[:, None] & (wide < {2 * columns})[None, :]")
        t.line("depth = tl.arange(0, BK)", self.facts.divides(self.tile.depth, self.product.depth))

    def _largest_table(self) -> Dim:
        """The most elements of what is read at an expert's place."""
        tables = [op.operands[0] for op in self.product.body.ops if op.kind == "moe.expert_rows"]
        return max(int(v.type.elements) for v in (self.product.weights, *tables))

    def _longest_row(self) -> int:
        """The most numbers of what is read or written at a row's place."""
        body = self.product.body
        rows = [
            v for v in (*body.inputs, *body.outputs) if v.type.shape[:1] == (self.product.rows,)
        ]
        return max([self.tiles_n, *(int(v.type.shape[1]) for v in rows if v.type.rank == 2)])

    def _write_product(self) -> list[str]:
        """The accumulation; the names of the accumulators."""
        t, p = self.text, self.product
        t.line("# accumulate")
        cut = not self.facts.divides(self.tile.depth, p.depth)
        body = RowBody(t, p.body, Domain(p.rows, p.depth, cut, "at"))
        load_left = self._left(body)
        right = self._right()
        accumulate = "tl.float64" if p.weights.type.dtype == "f64" else "tl.float32"
        columns = "2 * BN" if self.wide else "BN"
        names = [h if h == "acc" else t.names.fresh(h) for h in self._hints()]
        for name in names:
            t.line(f"{name} = tl.zeros((BM, {columns}), {accumulate})")
        with t.block(f"for k in range(0, {p.depth}, BK):"):
            load_left()
            for name, (at, mask) in zip(names, right, strict=True):
                step = "k" if not p.transposed else f"k * {p.columns * p.parts}"
                t.line(f"right = tl.load({at} + {step}{mask})")
                t.line(f"{name} = tl.dot(left, right, {name}{precision(p.weights.type.dtype)})")
        return names

    def _hints(self) -> list[str]:
        if self.wide or self.product.split is None:
            return ["acc"]
        return [v.hint for v in self.product.split.results]

    def _left(self, body: RowBody) -> Callable[[], None]:
        """The lines before the loop, and a function that writes those in it."""
        p = self.product
        mask = f", mask=(k + depth < {p.depth})[None, :], other=0.0" if body.domain.cut else ""
        gather = p.gather
        if p.prologue and gather is None:
            return lambda: self._computed_left(body)
        if gather is not None:
            x, perm, inverse = gather.operands
            pair = body.pair(perm)
            token, reach = f"({pair} // {inverse.type.shape[1]})", x.type.shape[0] * p.depth
            self.text.line(*assigned("token", self.facts.widened(token, reach)))
            rows = "token"
        else:
            x, rows = p.anchor.operands[0], "tl.where(inside, row, 0)"
        name = self.text.parameter(x)
        self.text.line(f"left_at = {name} + {rows}[:, None] * {p.depth} + depth[None, :]")
        return lambda: self.text.line(f"left = tl.load(left_at + k{mask})")

    def _computed_left(self, body: RowBody) -> None:
        """Rows that are work on other rows: computed as they are loaded."""
        p = self.product
        self.text.line("at = k + depth")
        fresh = RowBody(self.text, p.body, body.domain)
        fresh.run(p.prologue)
        value = fresh.term(p.anchor.operands[0]).on(TILE)
        dtype = {"f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16"}
        kind = dtype.get(p.weights.type.dtype, "tl.bfloat16")
        live = f"inside[:, None] & (at < {p.depth})[None, :]"
        self.text.line(f"left = tl.where({live}, {value}, 0.0).to({kind})")

    def _right(self) -> list[tuple[str, str]]:
        """Address and mask of the weights of each accumulator."""
        p, t = self.product, self.text
        name, total = t.parameter(p.weights), p.columns * p.parts
        t.line(f"matrix = {name} + expert * {total * p.depth}")
        found = []
        for i in range(1 if self.wide else p.parts):
            column, width = self._right_columns(i)
            stride = (1, total) if p.transposed else (p.depth, 1)
            columns, depth = _scaled(column, stride[0]), _scaled("depth", stride[1])
            at = t.let("right_at", f"matrix + {columns}[None, :] + {depth}[:, None]")
            found.append((at.text, self._right_mask(column, width)))
        return found

    def _right_columns(self, i: int) -> tuple[str, int]:
        p = self.product
        if self.wide:
            return "wide", 2 * p.columns
        body = RowBody(self.text, p.body, self.domain)
        return body.part_column(i, p.parts, p.layout), p.columns

    def _right_mask(self, column: str, width: int) -> str:
        p, conditions = self.product, []
        if not self.facts.divides(self.tile.depth, p.depth):
            conditions.append(f"(k + depth < {p.depth})[:, None]")
        if not self.facts.divides(self.tile.columns, p.columns):
            inner = f"wide < {width}" if self.wide else f"column < {width}"
            conditions.append(f"({inner})[None, :]")
        return f", mask={' & '.join(conditions)}, other=0.0" if conditions else ""

    def _write_epilogue(self, names: list[str]) -> None:
        p = self.product
        body = RowBody(self.text, p.body, self.domain)
        if len(p.epilogue) > (1 if p.split else 0):
            self.text.line("# epilogue")
        whole = self._bind(body, names)
        body.run([op for op in p.epilogue if op is not p.split])
        self.text.line("# store")
        for value in p.body.outputs:
            if value not in p.finished:
                self._store(body, value, whole if value is p.anchor.result else None)
        for op, total in body.dots:
            partial = self.text.parameter(f"partial_{p.dots.index(op)}", "partial")
            at = f"{times('row', self.tiles_n)} + n"
            self.text.line(f"tl.store({partial} + {at}, {total.text}, mask=inside)")

    def _bind(self, body: RowBody, names: list[str]) -> str | None:
        """Give the product's value to the epilogue; the name of the tile of both parts."""
        p = self.product
        if p.split is None:
            body.env[p.anchor.result] = Term(names[0], TILE)
            return None
        if self.wide:
            terms = body.split_wide(Term(names[0], TILE), [v.hint for v in p.split.results])
        else:
            terms = tuple(Term(n, TILE) for n in names)
        body.parts[p.anchor.result] = Parts(terms, p.layout)
        body.env.update(zip(p.split.results, terms, strict=True))
        return names[0] if self.wide else None

    def _store(self, body: RowBody, value: Value, whole: str | None) -> None:
        """One result of the kernel."""
        out = self.text.parameter(value, f"{value.hint}_out")
        if value in body.parts:
            self._store_parts(body, out, body.parts[value], whole)
            return
        term = body.term(value)
        if value.type.rank == 1 or (value.type.shape[1] == 1 and self.product.columns != 1):
            with self.text.block("if n == 0:"):
                self.text.line(f"tl.store({out} + row, {term.on(('r',))}, mask=inside)")
            return
        at = f"row[:, None] * {self.product.columns} + column[None, :]"
        tile = (
            term.on(TILE) if term.axes else f"tl.zeros((BM, BN), {body.text.dtype}) + {term.text}"
        )
        self.text.line(f"tl.store({out} + {at}, {tile}, mask={self.domain.live})")

    def _store_parts(self, body: RowBody, out: str, parts: Parts, whole: str | None) -> None:
        count, width = len(parts.terms), self.product.columns
        row = f"row[:, None] * {count * width}"
        texts = [t.on(TILE) for t in parts.terms]
        if parts.layout == "interleave" and count == 2:
            both = whole or f"tl.join({texts[0]}, {texts[1]}).reshape(BM, 2 * BN)"
            at, mask = f"{row} + wide[None, :]", self.domain.live_wide
            self.text.line(f"tl.store({out} + {at}, {both}, mask={mask})")
            return
        for i, tile in enumerate(texts):
            at = f"{row} + {body.part_column(i, count, parts.layout)}[None, :]"
            self.text.line(f"tl.store({out} + {at}, {tile}, mask={self.domain.live})")

    # the module
    def row_list(self, outer: Mapping[Value, Value]) -> RowList:
        """The list of row tiles that it reads; ``outer`` is what the body's inputs are."""
        return RowList(outer[self.product.offsets], self.tile.rows)

    def define(self, writer: Writer) -> None:
        """Write the kernels."""
        tile = f"tile: {self.tile.rows} rows x {self.tile.columns} columns x {self.tile.depth} deep"
        self.text.write(writer, self.name, documentation(self.op, [tile, *self.facts.limits]))
        if self.sums is not None:
            self.sums.define(writer)

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        p, op = self.product, self.op
        context.contiguous(writer, op.operands)
        outer = dict(zip(p.body.inputs, op.operands, strict=True))
        tiles = context.row_list(writer, self.row_list(outer), p.rows)
        made = {"tiles": tiles}
        for value in op.results:
            context.allocate(writer, value)
        if self.sums is not None:
            made.update(self.sums.allocate(writer, context))
        sizes = f"{python_source(p.rows)}, {_experts(p)}, {self.tile.rows}, {self.tiles_n}"
        options = f"num_warps={self.tile.warps}, num_stages={self.tile.stages}"
        inner = ", ".join(arguments(self.text, op, context, made))
        with writer.block(f"if {only_if(p.rows)}:"):
            write(writer, f"{self.name}[launch.row_grid({sizes})]({inner}, {options})")
            if self.sums is not None:
                self.sums.launch(writer, op, context, made)
        if self.sums is not None:
            writer.line(f"del {', '.join(v for k, v in made.items() if k.startswith('partial'))}")


_BOTH = ("t.split", "t.merge")


def _experts(p: RowProduct) -> int:
    return int(p.weights.type.shape[0])


def _scaled(text: str, by: int) -> str:
    return text if by == 1 else f"({text} * {by})"


def precision(dtype: str) -> str:
    """Further arguments of ``tl.dot`` for a dtype: neither operands nor the sum are rounded."""
    exact = {"f32": ', input_precision="ieee"', "f64": ", out_dtype=tl.float64"}
    return exact.get(dtype, "")

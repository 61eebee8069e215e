"""Products over ragged rows for Hopper in Gluon; see the package."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from moec.codegen.gluon.loading import BYTES, Loading
from moec.codegen.gluon.text import (
    COPYING,
    ISSUING,
    MATRIX,
    MULTIPLYING,
    REGISTERS,
    SLOTS,
    STAGES,
    define,
    gluon_text,
    partition,
    used,
)
from moec.codegen.gluon.tile import StageBody
from moec.codegen.requirements import WORD
from moec.codegen.triton.context import Context, RowList, arguments, only_if, write
from moec.codegen.triton.facts import Facts, tile_bound
from moec.codegen.triton.kernel import (
    KernelText,
    Parameter,
    Term,
    Unsupported,
    compute_dtype,
    documentation,
)
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.triton.products import RowProduct, analyse, is_of_rows
from moec.codegen.triton.rows import TILE, Domain, Parts, RowBody
from moec.codegen.triton.sums import RowSums
from moec.codegen.triton.tiles import Tile, has_order, tile_of, times
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Op, Value
from moec.ir.prove import divisible

ROWS, DEPTH, COLUMNS = 128, 64, 256
CHUNK = 64  # columns that the epilogue works on at a time
MOST_COLUMNS, MOST_COLUMNS_ALONE, LONGEST = 2048, 768, 8192
LARGEST = 1 << 22  # numbers of a matrix whose rows are not gathered
_PLACE = ("end", "row", "column")


@dataclass
class GluonGemm:
    """The functions of one kernel: loading, multiplying, the epilogue on a chunk of columns."""

    op: Op
    name: str
    product: RowProduct = field(init=False)
    tile: Tile = field(init=False)
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)
    sums: RowSums | None = field(init=False)

    def __post_init__(self) -> None:
        self.product = p = analyse(self.op)
        self.tile = tile_of(self.op.attrs.get("tile"), gluon_tile(p))
        _check(p, self.tile)
        self.facts = Facts.of(self.op)
        self.in_stage = p.reads > 0
        self.copied = self._ask()
        self.text = gluon_text(compute_dtype(p.body), self.facts)
        self.text.parameter("places")
        self.sums = RowSums(p, self.name, self.tiles_n, self.facts) if p.dots else None
        if not self.facts.divides(CHUNK, p.columns):
            raise Unsupported("columns that are no multiple of a chunk's")
        self._write_tile()
        self.loading = Loading(p, self.tile, CHUNK, self.body.reads, self.text)
        self.load_lines = self.loading.lines()
        self._write_multiply()
        self.text.sort(p.body)

    @property
    def tiles_n(self) -> int:
        """The number of column tiles."""
        return -(-self.product.columns // self.tile.columns)

    @property
    def library(self) -> set[str]:
        """The library functions that kernels and launch use."""
        extra = self.sums.text.used if self.sums is not None else set()
        names = {"pick_tile", "halves", "list_row_places", "barriers", "multiply", "row_place"}
        staged = {"stage_buffers", "load_blocks", "wait_ready", "free_last"}
        names |= self.text.used | self.body.text.used | extra | {"wait_empty"}
        return names | (staged if self.in_stage else set())

    def _ask(self) -> str:
        """What numbers of rows, tiles and stages need; the docstring's line on rows."""
        p, experts = self.product, int(self.product.weights.type.shape[0])
        self.facts.row_tiles(p.rows, experts, ROWS, numbers=3)
        self.facts.copied(p.weights, p.depth * p.columns * p.parts)
        stages = p.depth // DEPTH + self.tile.columns // CHUNK
        pieces = tile_bound(p.rows, experts, ROWS) * self.tiles_n
        self.facts.pieces(pieces)
        self.facts.limit(pieces * stages, WORD, "stages counted in 32 bits")
        return self.facts.aligned(p.depth * BYTES, p.columns * BYTES)

    # the epilogue
    def _write_tile(self) -> None:
        p = self.product
        text = gluon_text(self.text.dtype, self.facts, (*_PLACE, "acc", "slots", "turn", *_BLOCKS))
        domain = Domain(p.rows, p.columns, False)
        self.body = body = StageBody(
            text, p.body, domain, product=p, chunk=CHUNK, in_stage=self.in_stage
        )
        hints = self._hints()
        terms = tuple(Term(text.parameter(f"part {i}", h), TILE) for i, h in enumerate(hints))
        if p.split is None:
            body.env[p.anchor.result] = terms[0]
        else:
            body.parts[p.anchor.result] = Parts(terms, p.layout)
            body.env.update(zip(p.split.results, terms, strict=True))
        wanted = [v for v in p.body.outputs if v not in p.finished]
        if any(self._of_rows(v) for v in wanted):
            raise Unsupported("numbers a row as results")
        self._run(wanted)
        body.finish()
        if body.dots:
            text.line(f"return {', '.join(t.text for _, t in body.dots)}")
        text.sort(p.body)
        lines = text.lines.text()
        if "tl.full(" in lines or "tl.zeros(" in lines:
            raise Unsupported("constants that need a layout")
        text.used |= {"sigmoid"} if "tl.sigmoid(" in lines else set()
        self.tile_lines = lines.replace("tl.sigmoid(", "sigmoid(").rstrip("\n").split("\n")

    def _run(self, wanted: list[Value]) -> None:
        """The ops, each result stored as soon as it is there: fewer values live at a time."""
        body = self.body
        for op in (None, *self.product.epilogue):
            if op is not None and op is not self.product.split:
                body.run([op])
            for value in [v for v in wanted if v in body.env or v in body.parts]:
                wanted.remove(value)
                body.store(value)

    def _hints(self) -> list[str]:
        split = self.product.split
        return [v.hint for v in split.results] if split is not None else ["acc"]

    def _of_rows(self, value: Value) -> bool:
        return is_of_rows(value, self.product.rows, self.product.columns)

    # the warps that multiply
    def _write_multiply(self) -> None:
        t, p = self.text, self.product
        lines, outer = t.lines, RowBody(t, p.body, Domain(p.rows, p.columns, False, row="here"))
        for name, columns in (("tall", self.loading.wide), ("narrow", CHUNK)):
            form = f"version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, {columns}, 16]"
            t.line(f"{name}: gl.constexpr = gl.NVMMADistributedLayout({form})")
        t.line("HALF: gl.constexpr = BM // 2  # the rows of one group of warps")
        lines.lines(*self.loading.start())
        lines.lines("taken = 0", *([] if self.in_stage else ["turn = 0"]))
        lines.lines("work = gl.program_id(0)", *self.loading.place("", "work"))
        with t.block("while work < pieces:"):
            lines.lines(*self.loading.next_place())
            t.line("row += WG * HALF")
            rowwise = [q for q in self.body.text.parameters if self._is_row_argument(q)]
            if rowwise or p.dots:
                t.line("here = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, narrow))")
                t.line("inside = here < end")
                most = (p.rows + ROWS) * self.tiles_n
                here, why = self.facts.widened("here", most, "gl.int64")
                if here != "here":
                    t.line(f"here = {here}", why)
            extra = {q.name: outer.term(q.value).text for q in rowwise}  # type: ignore[arg-type]
            t.line(f"acc = gl.zeros((HALF, {self.loading.wide}), gl.float32, layout=tall)")
            steps = f"{p.depth // DEPTH}, {p.transposed}, WG * HALF, HALF, STAGES"
            t.line(f"acc, taken = multiply(left, right, ready, empty, acc, taken, {steps})")
            self._write_epilogue(extra)
            lines.lines(*self.loading.advance())
        t.line("tma.store_wait(0)")
        self.multiply_lines = lines.text().rstrip("\n").split("\n")

    def _is_row_argument(self, q: Parameter) -> bool:
        return not isinstance(q.value, str) and self._of_rows(q.value)

    def _write_epilogue(self, extra: dict[str, str]) -> None:
        t, p = self.text, self.product
        pieces = self._pieces()
        column = f"n * {self.tile.columns}"
        if p.dots and not self.in_stage:
            raise Unsupported("a sum of columns without a matrix to read")
        if len(pieces) == 1:
            self._call(pieces[0], column, extra)
            return
        for i in range(len(p.dots)):
            t.line(f"dot_{i} = gl.zeros((HALF,), gl.float32, layout=gl.SliceLayout(1, narrow))")
        whole = not self.in_stage and self.facts.divides(self.tile.columns, p.columns)
        with t.block(f"for c in {'gl.static_range' if whole else 'range'}({self.loading.chunks}):"):
            if self.in_stage:
                t.line("stage = wait_ready(ready, taken, STAGES)")
                t.line("block_1, block_2, block_3 = stage_buffers(left, right, stage, BM, WG)")
            self._call(pieces[0], f"{column} + c * {CHUNK}", extra)
            if self.in_stage:
                t.line("# the stage before is free when its results have been read")
                t.line(f"tma.store_wait({len(self.body.stores)})")
                t.line("free_last(empty, taken, c > 0, STAGES)")
                t.line("taken += 1")
            for one, other in itertools.pairwise(pieces):
                for a, b in zip(one, other, strict=True):
                    t.line(f"{a} = {b}")
        if self.in_stage:
            t.line("tma.store_wait(0)")
            t.line("free_last(empty, taken, True, STAGES)")
        for i, (op, _) in enumerate(self.body.dots):
            partial = t.parameter(f"partial_{p.dots.index(op)}", "partial")
            t.line(f"gl.store({partial} + {times('here', self.tiles_n)} + n, dot_{i}, mask=inside)")

    def _pieces(self) -> list[list[str]]:
        """Cut the accumulator into the parts of each chunk of columns; no data moves."""
        t, p = self.text, self.product
        parts, width = [["acc"]], self.loading.wide
        if p.parts == 2:
            parts = [[n] for n in self._halve("acc", width, self._hints())]
            width //= 2
        while width > CHUNK:
            parts = [[h for piece in part for h in self._halve(piece, width, ())] for part in parts]
            width //= 2
        for name in (n for part in parts for n in part):
            t.line(f"{name} = gl.convert_layout({name}, narrow)")
        return [list(group) for group in zip(*parts, strict=True)]

    def _halve(self, piece: str, width: int, hints: tuple[str, ...] | list[str]) -> list[str]:
        wanted = hints or [f"{piece}_{i}" for i in (1, 2)]
        names = [self.text.names.fresh(h) for h in wanted]
        self.text.line(f"{', '.join(names)} = halves({piece}, HALF, {width})")
        return names

    def _call(self, piece: list[str], column: str, extra: dict[str, str]) -> None:
        """The epilogue on one chunk of columns."""
        values = []
        for q in self.body.text.parameters:
            if isinstance(q.value, str) and q.value.startswith("part "):
                values.append(piece[int(q.value.split()[1])])
            elif q.value == "column":
                values.append(column)
            elif isinstance(q.value, str):
                values.append(q.name)
            else:
                values.append(extra.get(q.name) or self.text.parameter(q.value, q.name))
        call = f"{self.name}_tile({', '.join(values)})"
        dots = [f"dot_{i}" for i in range(len(self.body.dots))]
        if dots and len(dots) == 1:
            call = f"dot_0 += {call}"
        elif dots:
            call = f"{', '.join(f'more_{i}' for i in range(len(dots)))} = {call}"
        self.text.line(call)
        if len(dots) > 1:
            self.text.lines.lines(*(f"dot_{i} += more_{i}" for i in range(len(dots))))
        if self.body.puts % SLOTS:
            self.text.line(f"turn = (turn + {self.body.puts}) % {SLOTS}")

    # the module
    def row_list(self, outer: Mapping[Value, Value]) -> RowList:
        """The list of row tiles that it reads; ``outer`` is what the body's inputs are."""
        return RowList(outer[self.product.offsets], ROWS, has_ends=True)

    def define(self, writer: Writer) -> None:
        """Write the functions."""
        names = [q.name for q in self.body.text.parameters]
        docs = [f"Epilogue on {CHUNK} columns of a tile."]
        define(writer, f"{self.name}_tile", names, docs, self.tile_lines)
        shared = ["left", "right", *([] if self.in_stage else ["slots"]), "ready", "empty"]
        multiply = [*used(self.text.parameters, self.multiply_lines), *shared]
        load = [*used(self.text.parameters, self.load_lines), "left", "right", "ready", "empty"]
        sizes = ["BM: gl.constexpr", "STAGES: gl.constexpr"]
        docs = ["Fill the stages, tile after tile."]
        deep = (
            [sizes[0], "BK: gl.constexpr", sizes[1]]
            if self._copies or self.in_stage
            else [
                "BK: gl.constexpr",
                sizes[1],
            ]
        )
        define(writer, f"{self.name}_load", [*load, *deep], docs, self.load_lines)
        docs = ["Multiply half of each tile's rows, and work on the result."]
        wide = [*multiply, *sizes, "WG: gl.constexpr"]
        define(writer, f"{self.name}_multiply", wide, docs, self.multiply_lines)
        self._define_kernel(writer, multiply, load, bool(self._copies or self.in_stage))
        if self.sums is not None:
            self.sums.define(writer)

    @property
    def _copies(self) -> bool:
        """Whether rows are gathered, by asynchronous copies."""
        return self.product.gather is not None

    def _define_kernel(
        self, writer: Writer, multiply: list[str], load: list[str], tall: bool
    ) -> None:
        t, p, w = self.text, self.product, Writer()
        weights = t.parameter(p.weights)
        w.line(f"form: gl.constexpr = {MATRIX}")
        memory = f"gl.allocate_shared_memory({weights}.dtype, "
        w.line(f"left = {memory}[STAGES, BM, BK], form)")
        shape = f"BK, {self.loading.wide}" if p.transposed else f"{self.loading.wide}, BK"
        w.line(f"right = {memory}[STAGES, {shape}], form)")
        if not self.in_stage:
            out = next(q.name for q in self.body.text.parameters if q.name.endswith("_out"))
            for i in (0, 1):
                shape = f"[{SLOTS}] + {out}.block_type.shape, {out}.layout"
                w.lines(*wrapped(f"slots_{i} = {memory}{shape})", WIDTH - 4))
        w.line(f"ready, empty = barriers({129 if self._copies else 1}, STAGES)")
        with w.block("gl.warp_specialize("):
            w.line("[")
            for i in (0, 1):
                inner = [f"slots_{i}" if n == "slots" else n for n in multiply]
                partition(w, f"{self.name}_multiply", [*inner, "BM", "STAGES", str(i)])
            sizes = ["BM", "BK", "STAGES"] if tall else ["BK", "STAGES"]
            partition(w, f"{self.name}_load", [*load, *sizes])
            w.line("],")
            w.line(f"[4, {4 if self._copies else 1}],")
            w.line(f"[{MULTIPLYING}, {COPYING if self._copies else ISSUING}],")
        w.line(")")
        tile = f"tile: {ROWS} rows x {self.tile.columns} columns x {DEPTH} deep"
        sizes_ = {"BM": ROWS, "BK": DEPTH, "STAGES": self.tile.stages}
        names = [q.name for q in t.parameters] + [
            f"{k}: gl.constexpr = {v}" for k, v in sizes_.items()
        ]
        lines = w.text().rstrip("\n").split("\n")
        docs = documentation(self.op, [tile, self.copied, *self.facts.limits])
        define(writer, self.name, names, docs, lines, launched=True)

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        p, op = self.product, self.op
        context.contiguous(writer, op.operands)
        outer = dict(zip(p.body.inputs, op.operands, strict=True))
        rows = p.gather.operands[0] if p.gather is not None else p.anchor.operands[0]
        made = {"places": context.row_list(writer, self.row_list(outer), p.rows)}
        made["rows"] = context.names[outer[rows]]
        for value in op.results:
            context.allocate(writer, value)
        partial = self.sums.allocate(writer, context) if self.sums is not None else {}
        made.update(partial)
        experts = int(p.weights.type.shape[0])
        sizes = f"{python_source(p.rows)}, {experts}, {ROWS}, {self.tiles_n}"
        with writer.block(f"if {only_if(p.rows)}:"):
            inner = [*self._arguments(context, made), "num_warps=4", f"maxnreg={REGISTERS}"]
            grid = f"launch.persistent_rows({sizes}, device)"
            write(writer, f"{self.name}[{grid}]({', '.join(inner)})")
            if self.sums is not None:
                self.sums.launch(writer, op, context, made)
        if partial:
            writer.line(f"del {', '.join(partial.values())}")

    def _arguments(self, context: Context, made: dict[str, str]) -> list[str]:
        """The launch's arguments, matrices as descriptors."""
        named = arguments(self.text, self.op, context, made)
        return [
            self._passed(q.value, name) for q, name in zip(self.text.parameters, named, strict=True)
        ]

    def _passed(self, value: Value | str, name: str) -> str:
        p = self.product
        if value == "rows":
            blocks = f"launch.blocks({name}, {(ROWS, DEPTH)})"
            return f"launch.aligned({name})" if self._copies else blocks
        if value is p.weights:
            experts = int(p.weights.type.shape[0])
            if p.transposed:
                shape, block = (experts * p.depth, p.columns), (DEPTH, self.loading.wide)
            else:
                shape = experts * p.parts * p.columns, p.depth
                block = self.tile.columns, DEPTH
            return f"launch.blocks({name}, {block}, {shape})"
        if isinstance(value, str) or self._of_rows(value) or value.type.rank != 2:
            return name
        if any(read.value is value for read in self.body.reads):
            return f"launch.blocks({name}, {(ROWS, CHUNK)})"
        if value in p.body.outputs:
            inner = (int(value.type.shape[1]),)
            return f"launch.ragged_blocks({name}, {inner}, {(ROWS // 2, CHUNK)})"
        return name


_BLOCKS = ("block_1", "block_2", "block_3")


def gluon_tile(p: RowProduct) -> Tile:
    """The one tile that these kernels have: measured best at every size tried on an H100."""
    return Tile(ROWS, COLUMNS // p.parts, DEPTH, 4, STAGES)


def _check(p: RowProduct, tile: Tile) -> None:
    """What the template asks of sizes, and what it leaves to the others."""
    if p.weights.type.dtype not in ("bf16", "f16"):
        raise Unsupported(f"a product of {p.weights.type.dtype} by tensor cores")
    if p.parts > 2 or (p.parts == 2 and (p.layout != "concat" or p.transposed)):
        raise Unsupported("parts that are not rows of the weights")
    if p.prologue and p.gather is None:
        raise Unsupported("work before the product")
    if not divisible(p.depth, DEPTH) or p.columns * p.parts < COLUMNS:
        raise Unsupported("matrices that do not fill the tile")
    _check_worth(p)
    sizes = tile.rows, tile.columns * p.parts, tile.depth
    if sizes != (ROWS, COLUMNS, DEPTH) or tile.stages != STAGES or not has_order(tile):
        raise Unsupported("another tile")


def _check_worth(p: RowProduct) -> None:
    """Sizes at which the other templates were as fast or faster on an H100 (2026-11-23).

    Each tile of columns gathers the rows again, a tenth slower than the copy engine loads gathered
    ones, so that copying them once wins where there are many tiles; the fewer results a kernel
    stores, the sooner.
    """
    kept = sum(v.type.rank == 2 for v in p.body.outputs) > 1
    if p.gather is not None and p.columns > (MOST_COLUMNS if kept else MOST_COLUMNS_ALONE):
        raise Unsupported("more tiles of columns than gathering again is worth")
    large = p.gather is None and p.depth * p.columns * p.parts > LARGEST
    if large or max(p.depth, p.columns) > LONGEST:
        raise Unsupported("a product so long that the other templates keep up")

"""Inner products of rows: partial sums a column tile, added in a fixed order by a second kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import KernelText, Term, compute_dtype
from moec.codegen.triton.products import RowProduct
from moec.codegen.triton.rows import Domain, RowBody
from moec.codegen.triton.tiles import power_of_two, times
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Op

BLOCK = 128


@dataclass
class RowSums:
    """The kernel that finishes the inner products of a product's epilogue."""

    product: RowProduct
    name: str
    tiles_n: int
    facts: Facts
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        p, t = self.product, KernelText(compute_dtype(self.product.body), self.facts)
        self.text = t
        t.constants.update(BLOCK=BLOCK)
        t.integers.append(t.names.fresh("rows"))
        most = (p.rows + BLOCK) * power_of_two(self.tiles_n)
        block, why = self.facts.widened("tl.program_id(0)", most)
        t.line(f"row = {block} * BLOCK + tl.arange(0, BLOCK)", why)
        t.line(f"inside = row < {t.integers[0]}")
        body = RowBody(t, p.body, Domain(p.rows, p.columns, False))
        for i, op in enumerate(p.dots):
            body.env[op.result] = self._total(i, op.result.hint)
        body.run(p.finish)
        for value in p.body.outputs:
            if value in p.finished:
                out = t.parameter(value, f"{value.hint}_out")
                t.line(f"tl.store({out} + row, {body.term(value).on(('r',))}, mask=inside)")
        t.sort(p.body)

    def _total(self, i: int, hint: str) -> Term:
        t = self.text
        partial, tiles = t.parameter(f"partial_{i}", "partial"), self.tiles_n
        padded = power_of_two(tiles)
        t.line(f"n = tl.arange(0, {padded})")
        cut = f" & (n < {tiles})[None, :]" if padded != tiles else ""
        at = f"{partial} + {times('row[:, None]', tiles)} + n[None, :]"
        load = f"tl.load({at}, mask=inside[:, None]{cut}, other=0)"
        return t.let(hint, f"tl.sum({load}, 1)", ("r",))

    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        docs = ["Add the column tiles' shares of each row's inner product, in their order."]
        self.text.write(writer, f"{self.name}_sums", docs)

    def allocate(self, writer: Writer, context: Context) -> dict[str, str]:
        """Write lines that make room for the shares."""
        dtype = "f64" if self.text.dtype == "tl.float64" else "f32"
        made = {}
        for i, _ in enumerate(self.product.dots):
            name = context.names.fresh("partial")
            made[f"partial_{i}"] = context.empty(
                writer, name, (self.product.rows, self.tiles_n), dtype
            )
        return made

    def launch(self, writer: Writer, op: Op, context: Context, made: dict[str, str]) -> None:
        """Write the launch."""
        rows = python_source(self.product.rows)
        inner = ", ".join([*arguments(self.text, op, context, made), rows])
        write(writer, f"{self.name}_sums[(triton.cdiv({rows}, {BLOCK}),)]({inner})")

"""The ordered sum of each token's rows, with pointwise work on its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.elementwise import VectorBody
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import (
    KernelText,
    Term,
    Unsupported,
    assigned,
    compute_dtype,
    documentation,
    needed_ops,
)
from moec.codegen.triton.tiles import UNROLLED, power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import python_source
from moec.ir.graph import Op


@dataclass
class Combine:
    """One program a token and block of columns; see the module."""

    op: Op
    name: str
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        if self.op.body is None:
            raise Unsupported("no body")
        self.body = self.op.body
        found = [o for o in self.body.ops if o.kind == "moe.combine"]
        if len(found) != 1 or any(v not in self.body.inputs for v in found[0].operands):
            raise Unsupported("a combine of rows that the kernel computes")
        self.anchor = found[0]
        self.columns = int(self.anchor.result.type.shape[1])
        asked = self.op.attrs.get("tile")
        self.block = int(asked[0]) if asked else min(1024, power_of_two(self.columns))
        self.facts = Facts.of(self.op)
        self.text = KernelText(compute_dtype(self.body), self.facts)
        self._write()

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        return self.text.used

    def _write(self) -> None:
        t, tokens = self.text, self.anchor.result.type.shape[0]
        t.constants.update(BH=self.block)
        whole = self.facts.divides(self.block, self.columns)
        body = VectorBody(t, self.body, f"token * {self.columns} + column", self._mask(not whole))
        self.facts.programs(tokens)
        self.facts.columns(self.columns, self.block)
        widest = max(self.columns, int(self.anchor.operands[2].type.shape[1]))
        t.line(*assigned("token", self.facts.widened("tl.program_id(0)", tokens * widest)))
        t.line("column = tl.program_id(1) * BH + tl.arange(0, BH)", whole)
        self._write_sum(body)
        rest = needed_ops(self.body, self.body.outputs, {self.anchor.result})
        body.run([o for o in rest if o is not self.anchor])
        for value in self.body.outputs:
            body.store(value)
        t.sort(self.body)

    def _mask(self, cut: bool) -> str:
        return f", mask=column < {self.columns}" if cut else ""

    def _write_sum(self, body: VectorBody) -> None:
        t, (rows, _, inverse) = self.text, self.anchor.operands[:3]
        source, at = t.parameter(rows), t.parameter(inverse)
        choices = int(inverse.type.shape[1])
        total = t.names.fresh(self.anchor.result.hint)
        t.line(f"{total} = tl.zeros((BH,), {t.dtype})")
        loop = "tl.static_range" if choices <= UNROLLED else "range"
        with t.block(f"for k in {loop}({choices}):"):
            load = f"tl.load({at} + token * {choices} + k)"
            self.facts.rows(rows.type.shape[0])
            reach = rows.type.shape[0] * self.columns
            t.line(*assigned("row", self.facts.widened(load, reach)))
            live = f"column < tl.where(row >= 0, {self.columns}, 0)"  # -1: a pair without a row
            load = f"tl.load({source} + row * {self.columns} + column, mask={live}, other=0.0)"
            value = f"{load}.to({t.dtype})"
            if len(self.anchor.operands) == 4:
                weights = t.parameter(self.anchor.operands[3])
                t.line(f"weight = tl.load({weights} + token * {choices} + k).to({t.dtype})")
                # 0 * NaN: a pair without a row adds nothing whatever its weight
                value = f"{value} * tl.where(row >= 0, weight, 0.0)"
            t.line(f"{total} += {value}")
        body.env[self.anchor.result] = Term(total, ("c",))

    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        tile = f"tile: one token x {self.block} columns"
        self.text.write(writer, self.name, documentation(self.op, [tile, *self.facts.limits]))

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        for value in self.op.results:
            context.allocate(writer, value)
        tokens = self.anchor.result.type.shape[0]
        inner = ", ".join(arguments(self.text, self.op, context, {}))
        grid = f"({python_source(tokens)}, {-(-self.columns // self.block)})"
        with writer.block(f"if {only_if(tokens)}:"):
            write(writer, f"{self.name}[{grid}]({inner}, num_warps=4)")

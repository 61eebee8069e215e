"""Runs of pointwise work on tensors of one shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.elementwise import VectorBody
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import KernelText, Unsupported, compute_dtype, documentation
from moec.codegen.writer import Writer
from moec.ir.dims import ceildiv, python_source
from moec.ir.graph import Op

BLOCK = 1024


@dataclass
class Pointwise:
    """One program a block of elements; see the module."""

    op: Op
    name: str
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)

    def __post_init__(self) -> None:
        if self.op.body is None:
            raise Unsupported("no body")
        self.body = self.op.body
        shape = self.body.outputs[0].type.shape
        values = [*self.body.inputs, *(v for o in self.body.ops for v in o.results)]
        if any(v.type.shape not in (shape, ()) for v in values):
            raise Unsupported("tensors of several shapes")
        asked = self.op.attrs.get("tile")
        self.block = int(asked[0]) if asked else BLOCK
        self.count = self.op.results[0].type.elements
        self.facts = Facts.of(self.op)
        self.whole = self.facts.divides(self.block, self.count)
        self.text = KernelText(compute_dtype(self.body), self.facts)
        self._write()

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        return self.text.used

    def _write(self) -> None:
        t = self.text
        t.constants.update(BLOCK=self.block)
        self.facts.programs(ceildiv(self.count, self.block))
        block, why = self.facts.widened("tl.program_id(0)", self.count + self.block)
        t.line(f"at = {block} * BLOCK + tl.arange(0, BLOCK)", f"{why}; {self.whole}".rstrip("; "))
        body = VectorBody(t, self.body, "at", self._mask("64" in why))
        body.run(self.body.ops)
        for value in self.body.outputs:
            body.store(value)
        t.sort(self.body)

    def _mask(self, wide: bool) -> str:
        """The mask of the last block, with the parameter that it needs."""
        if self.whole:
            return ""
        count = self.text.names.fresh("count")
        self.text.integers.append(count)
        self.text.wide |= {count} if wide else set()
        return f", mask=at < {count}"

    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        self.text.write(writer, self.name, documentation(self.op, self.facts.limits))

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        for value in self.op.results:
            context.allocate(writer, value)
        source = python_source(self.count)
        given = [] if self.whole else [source]
        inner = ", ".join([*arguments(self.text, self.op, context, {}), *given])
        launch = f"{self.name}[(triton.cdiv({source}, {self.block}),)]({inner})"
        if isinstance(self.count, int):
            write(writer, launch)
            return
        with writer.block(f"if {only_if(self.count)}:"):
            write(writer, launch)

"""Pointwise bodies on a vector of positions: of combined tokens, or of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen.triton.kernel import KernelText, Term, Unsupported, is_pointwise
from moec.ir.graph import Graph, Op, Value, producers

VECTOR = ("c",)


@dataclass
class VectorBody:
    """Writes pointwise ops on tensors of one shape; ``at`` is the position, ``mask`` its mask."""

    text: KernelText
    graph: Graph
    at: str
    mask: str
    env: dict[Value, Term] = field(default_factory=dict)

    def run(self, ops: Sequence[Op]) -> None:
        """Write ops in order."""
        for op in ops:
            if op.kind == "t.full":
                self.env[op.result] = self.text.literal(op)
            elif is_pointwise(op):
                terms = [self.term(v) for v in op.operands]
                self.env[op.result] = self.text.pointwise(op, terms, VECTOR)
            else:
                raise Unsupported(f"{op.kind} is not pointwise")

    def term(self, value: Value) -> Term:
        """A value as text; an operand of the kernel is loaded at its first use."""
        if value not in self.env:
            if value in producers(self.graph):
                raise Unsupported(f"{value!r} is used before it is made")
            name, axes = self.text.parameter(value), VECTOR if value.type.rank else ()
            load = f"tl.load({name} + {self.at}{self.mask})" if axes else f"tl.load({name})"
            held = self.text.held(value.type, load)
            self.env[value] = self.text.let(value.hint, held, axes)
        return self.env[value]

    def store(self, value: Value) -> None:
        """Write a result."""
        out, term = self.text.parameter(value, f"{value.hint}_out"), self.term(value)
        self.text.line(f"tl.store({out} + {self.at}, {term.text}{self.mask})")

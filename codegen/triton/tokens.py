"""Small work on each token's scores and choices: a router's backward pass in one kernel.

Values vary along tokens ``t``, experts ``e`` and choices ``k``; a program has a block of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moec.codegen.triton.context import Context, arguments, only_if, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import (
    KernelText,
    Term,
    Unsupported,
    assigned,
    compute_dtype,
    documentation,
    is_pointwise,
)
from moec.codegen.triton.tiles import UNROLLED, power_of_two
from moec.codegen.triton.token_values import CHOSEN, SCORES, TOKEN_OPS
from moec.codegen.writer import Writer
from moec.ir.dims import Dim, python_source
from moec.ir.graph import Op, Value

ORDER = ("t", "e", "k")
PAIRS, ELEMENTS = 128, 4096  # of choices, and of scores, that a program holds


def tokens_of_block(
    facts: Facts, text: str, tokens: Dim, sizes: Mapping[str, int]
) -> tuple[str, str]:
    """The numbers of a block's tokens, in the width that their scores and choices need."""
    facts.word(tokens + sizes["BT"], "tokens are numbered in 32 bits")
    return facts.widened(text, (tokens + sizes["BT"]) * max(sizes["EP"], sizes["KP"]))


@dataclass
class Tokens:
    """The kernel; see the module."""

    op: Op
    name: str
    facts: Facts = field(init=False)
    text: KernelText = field(init=False)
    env: dict[Value, Term] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.op.body is None:
            raise Unsupported("no body")
        self.body = self.op.body
        spreads = [o for o in self.body.ops if o.kind == "t.scatter_add"]
        if not spreads:
            raise Unsupported("tensors of several shapes")
        self.rows, self.experts = spreads[0].result.type.shape
        self.choices = int(spreads[0].operands[1].type.shape[1])
        self.padded = power_of_two(int(self.experts)), power_of_two(self.choices)
        asked = self.op.attrs.get("tile")
        most = max(1, min(ELEMENTS // self.padded[0], PAIRS // self.padded[1]))
        self.tokens = min(int(asked[0]), most) if asked else most
        self.facts = Facts.of(self.op)
        self.text = KernelText(compute_dtype(self.body), self.facts)
        self._write()

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        return self.text.used

    def _write(self) -> None:
        t = self.text
        t.constants.update(BT=self.tokens, EP=self.padded[0], KP=self.padded[1])
        count = t.names.fresh("tokens")
        t.integers.append(count)
        token = "(tl.program_id(0) * BT + tl.arange(0, BT))"
        t.line(*assigned("token", tokens_of_block(self.facts, token, self.rows, t.constants)))
        t.line("expert = tl.arange(0, EP)")
        t.line("slot = tl.arange(0, KP)")
        t.line(f"live = token < {count}")
        t.line(f"inside = live[:, None] & (expert < {self.experts})[None, :]")
        t.line(f"chosen = live[:, None] & (slot < {self.choices})[None, :]")
        for op in self.body.ops:
            self._op(op)
        for value in self.body.outputs:
            out, term = t.parameter(value, f"{value.hint}_out"), self.term(value)
            at, mask = self._place(term.axes)
            t.line(f"tl.store({out} + {at}, {term.text}, mask={mask})")
        t.sort(self.body)

    def _place(self, axes: tuple[str, ...]) -> tuple[str, str]:
        """Position and mask of a value of a block."""
        if axes == SCORES:
            return f"token[:, None] * {self.experts} + expert[None, :]", "inside"
        if axes == CHOSEN:
            return f"token[:, None] * {self.choices} + slot[None, :]", "chosen"
        if axes == ("t",):
            return "token", "live"
        raise Unsupported("a result that is no token's")

    def extent(self, axes: tuple[str, ...]) -> tuple[str, int, int]:
        """The index along a value's second axis, its size, and how many lanes it has."""
        if axes == SCORES:
            return "expert", int(self.experts), self.padded[0]
        return "slot", self.choices, self.padded[1]

    def _axes(self, value: Value) -> tuple[str, ...]:
        known = {self.experts: SCORES, self.choices: CHOSEN, 1: ("t",)}
        shape = value.type.shape
        if not shape:
            return ()
        if shape == (self.rows,):
            return ("t",)
        if len(shape) != 2 or shape[0] != self.rows or shape[1] not in known:
            raise Unsupported(f"{value!r} is no token's")
        return known[shape[1]]

    def term(self, value: Value) -> Term:
        """A value: known, or loaded now."""
        if value not in self.env:
            if value not in self.body.inputs:
                raise Unsupported(f"{value!r} is used before it is made")
            axes, name = self._axes(value), self.text.parameter(value)
            at, mask = self._place(axes) if axes else ("0", "")
            load = f"tl.load({name} + {at}{f', mask={mask}, other=0' if mask else ''})"
            self.env[value] = self.text.let(value.hint, self.text.held(value.type, load), axes)
        return self.env[value]

    @property
    def _loop(self) -> str:
        """How the choices are gone through."""
        return "tl.static_range" if self.choices <= UNROLLED else "range"

    # ops
    def _op(self, op: Op) -> None:
        handler = {
            "t.full": self._full,
            "t.gather": self._gather,
            "t.scatter_add": self._spread,
            "moe.unpermute": self._unpermute,
        }.get(op.kind, self._pointwise)
        handler(op)

    def _full(self, op: Op) -> None:
        self.env[op.result] = self.text.literal(op)

    def _pointwise(self, op: Op) -> None:
        if op.kind in TOKEN_OPS:
            self.env.update(zip(op.results, TOKEN_OPS[op.kind](self, op), strict=True))
            return
        if not is_pointwise(op):
            raise Unsupported(f"{op.kind} on tokens")
        terms = [self.term(v) for v in op.operands]
        if {"e", "k"} <= {a for t in terms for a in t.axes}:
            raise Unsupported("experts and choices in one operation")
        self.env[op.result] = self.text.pointwise(op, terms, ORDER)

    def _gather(self, op: Op) -> None:
        source, index = self._uncast(op.operands[0]), op.operands[1]
        if source not in self.body.inputs or self._axes(source) != SCORES:
            self.env[op.result] = self._picked(op)
            return
        name, at = self.text.parameter(source), self.term(index).text
        load = f"tl.load({name} + token[:, None] * {self.experts} + {at}, mask=chosen, other=0)"
        held = self.text.held(source.type, load)
        self.env[op.result] = self.text.let(op.result.hint, held, CHOSEN)

    def _uncast(self, value: Value) -> Value:
        """What floats were converted from: a kernel holds all floats in one dtype."""
        made = {r: op for op in self.body.ops for r in op.results}
        while value in made and made[value].kind == "t.cast" and value.type.is_float:
            if not made[value].operands[0].type.is_float:
                break
            value = made[value].operands[0]
        return value

    def _picked(self, op: Op) -> Term:
        """Computed scores at each choice's expert."""
        source, index = (self.term(v) for v in op.operands)
        if source.axes != SCORES or index.axes != CHOSEN:
            raise Unsupported("a gather of something else")
        t = self.text
        picked = t.let(op.result.hint, f"tl.zeros((BT, KP), {t.dtype})", CHOSEN)
        with t.block(f"for k in {self._loop}({self.choices}):"):
            t.line("here = slot[None, :] == k")
            t.line(f"best = tl.sum(tl.where(here, {index.text}, 0), 1)[:, None]")
            found = f"tl.where(expert[None, :] == best, {source.text}, 0.0)"
            t.line(f"hit = tl.sum({found}, 1)[:, None]")
            t.line(f"{picked.text} = tl.where(here, hit, {picked.text})")
        return picked

    def _spread(self, op: Op) -> None:
        """Each choice's number at its expert; numbers of one expert are added."""
        index, values = self.term(op.operands[1]), self.term(op.operands[2])
        if values.axes != CHOSEN or index.axes != CHOSEN:
            raise Unsupported("a scatter of something else")
        t = self.text
        total = t.let(op.result.hint, f"tl.zeros((BT, EP), {t.dtype})", SCORES)
        with t.block(f"for k in {self._loop}({self.choices}):"):
            t.line("here = slot[None, :] == k")
            t.line(f"best = tl.sum(tl.where(here, {index.text}, 0), 1)[:, None]")
            t.line(f"hit = tl.sum(tl.where(here, {values.text}, 0.0), 1)[:, None]")
            t.line(f"{total.text} += tl.where(expert[None, :] == best, hit, 0.0)")
        self.env[op.result] = total

    def _unpermute(self, op: Op) -> None:
        rows, _, inverse = op.operands
        if rows not in self.body.inputs:
            raise Unsupported("rows that the kernel computes")
        self.facts.rows(rows.type.shape[0])
        name, at = self.text.parameter(rows), self.term(inverse).text
        load = f"tl.load({name} + {at}, mask=chosen & ({at} >= 0), other=0)"
        self.env[op.result] = self.text.let(op.result.hint, self.text.held(rows.type, load), CHOSEN)

    # the module
    def define(self, writer: Writer) -> None:
        """Write the kernel."""
        tile = f"tile: {self.tokens} tokens"
        self.text.write(writer, self.name, documentation(self.op, [tile, *self.facts.limits]))

    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        for value in self.op.results:
            context.allocate(writer, value)
        source = python_source(self.rows)
        inner = ", ".join([*arguments(self.text, self.op, context, {}), source])
        with writer.block(f"if {only_if(self.rows)}:"):
            write(writer, f"{self.name}[(triton.cdiv({source}, {self.tokens}),)]({inner})")

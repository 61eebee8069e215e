"""The kernel of the scores: activation, selection and weights of a block of tokens.

Values vary along tokens ``t``, experts ``e`` and choices ``k``. What decides which choices count
(those close to the best, above a threshold, up to a sum of probabilities) is work on a token's own
numbers like any other; a place that holds no expert has the number of experts.
"""

from __future__ import annotations

import math

import sympy

from moec.codegen.triton.expressions import number
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import (
    KernelText,
    Term,
    Unsupported,
    assigned,
    compute_dtype,
    is_pointwise,
    needed_ops,
)
from moec.codegen.triton.selection import Selection
from moec.codegen.triton.tiles import FEW_ROWS, UNROLLED, power_of_two
from moec.codegen.triton.token_values import CHOSEN, SCORES, TOKEN_OPS, TOKENS, filled, softmax
from moec.codegen.triton.tokens import tokens_of_block
from moec.ir.graph import Graph, Op, Value
from moec.ops.token_work import CARRIERS

ORDER = ("t", "e", "k")
PAIRS = 128
_ALWAYS_AN_EXPERT = ("topk", "first", "group_limited")


class Scores:
    """Writes the kernel; :class:`Unsupported` if the body holds what it cannot express.

    ``places``: one program does all of the dispatch, too.
    """

    def __init__(
        self,
        body: Graph,
        dispatch: Op,
        tile: tuple[int, ...] | None,
        facts: Facts,
        places: bool = False,
        limit: Op | None = None,
    ) -> None:
        self.body, self.dispatch, self.places, self.limit = body, dispatch, places, limit
        self.index: Value = (dispatch if limit is None else limit).operands[0]
        if places and limit is not None:
            raise Unsupported("a capacity in one program")
        self.select = index_select(body, self.index)
        self.experts = int(dispatch.attrs["experts"])
        self.choices = int(self.index.type.shape[1])
        self.may_have_none = _may_have_none(self.select, self.index)
        self.buckets = self.experts + (1 if self.may_have_none else 0)
        self.lanes = power_of_two(self.buckets)
        self.tokens = tile[0] if tile else tokens_a_program(self.choices, self.experts)
        self.dtype = compute_dtype(body)
        self.text = KernelText(self.dtype, facts)
        if self.select is not None and self.select.attrs["k"] != self.choices:
            raise Unsupported("indices of some of the choices")
        self.env: dict[Value, Term] = {}
        self.picked: dict[Value, Term] = {}
        self.least = -(2**63) if self.dtype == "tl.float64" else -(2**31)
        self._write()

    # the kernel
    def _write(self) -> None:
        t = self.text
        padded = power_of_two(self.choices)
        t.constants.update(BT=self.tokens, EP=self.lanes, KP=padded)
        count = t.names.fresh("tokens")
        t.integers += [count] if self.places else [count, t.names.fresh("blocks")]
        t.line("block = tl.program_id(0)")
        rows, token = self.index.type.shape[0], "(block * BT + tl.arange(0, BT))"
        t.line(*assigned("token", tokens_of_block(t.facts, token, rows, t.constants)))
        t.line("expert = tl.arange(0, EP)")
        t.line("slot = tl.arange(0, KP)")
        experts = f" & (expert < {self.experts})[None, :]" if self.lanes != self.experts else ""
        choices = f" & (slot < {self.choices})[None, :]" if padded != self.choices else ""
        t.line(f"inside = (token < {count})[:, None]{experts}")
        t.line(f"chosen = (token < {count})[:, None]{choices}")
        early = self._early()
        t.line("# score")
        for op in early:
            self._op(op)
        if self.select is not None:
            self.picked = Selection(self, self.select).write()
        for op in needed_ops(self.body, self.body.outputs, set(self.env)):
            if op not in (self.dispatch, self.limit, *early):
                self._op(op)
        self._write_counts()
        self._write_stores()

    def _early(self) -> list[Op]:
        """The ops that the selection and the weights start from."""
        if self.select is None:
            return []
        sources = [*self.select.operands]
        sources += [op.operands[0] for op in self.body.ops if op.kind == "moe.weight"]
        found = needed_ops(self.body, sources, set())
        if self.select in found:
            raise Unsupported("scores that depend on the selection")
        return found

    def _write_counts(self) -> None:
        """How many of the block's pairs go to each expert."""
        t, index = self.text, self.term(self.index)
        if self.limit is not None:
            self._write_counts_by_choice(index)
            return
        if not self.may_have_none:
            t.line(f"count = tl.sum(((key == {self.least}) & inside).to(tl.int32), 0)")
            return
        if index.axes == SCORES:
            self._check_marks()
            t.line(f"hit = inside & ({index.text} == expert[None, :])")
            t.line("count = tl.sum(hit.to(tl.int32), 0)")
            pairs = "tl.sum(inside.to(tl.int32), 1)"
            t.line(f"none = tl.sum({pairs}, 0) - tl.sum(count, 0)")
            t.line(f"count = tl.where(expert == {self.experts}, none, count)")
            return
        odd = f"({index.text} < 0) | ({index.text} > {self.experts})"
        text = f"tl.where({odd}, {self.experts}, {index.text}).to(tl.int32)"
        index = t.let("expert_of", text, CHOSEN)
        t.line("count = tl.zeros((EP,), tl.int32)")
        loop = "tl.static_range" if self.choices <= UNROLLED else "range"
        with t.block(f"for k in {loop}({self.choices}):"):
            t.line(f"best = tl.sum(tl.where((slot == k)[None, :], {index.text}, 0), 1)")
            live = f"(token < {t.integers[0]})[:, None]"
            t.line(f"hit = (best[:, None] == expert[None, :]) & {live}")
            t.line("count += tl.sum(hit.to(tl.int32), 0)")

    def _write_counts_by_choice(self, index: Term) -> None:
        """How many pairs go to each expert, as first choices, second ones and so on; or in all."""
        t, groups = self.text, self.groups
        if index.axes != CHOSEN:
            raise Unsupported("a capacity for marks")
        histogram, blocks = t.parameter("histogram"), t.integers[1]
        t.line("count = tl.zeros((EP,), tl.int32)")
        loop = "tl.static_range" if self.choices <= UNROLLED else "range"
        live = f"(token < {t.integers[0]})[:, None]"
        with t.block(f"for k in {loop}({self.choices}):"):
            t.line(f"best = tl.sum(tl.where((slot == k)[None, :], {index.text}, 0), 1)")
            t.line(f"hit = (best[:, None] == expert[None, :]) & {live}")
            t.line("count += tl.sum(hit.to(tl.int32), 0)")
            if groups > 1:
                at = f"{histogram} + (expert * {groups} + k) * ({blocks} + 1) + block"
                t.line(f"tl.store({at}, count, mask=expert < {self.experts})")
                t.line("count = tl.zeros((EP,), tl.int32)")

    @property
    def groups(self) -> int:
        """In how many groups pairs get their places under a capacity."""
        return groups_of(self.limit, self.choices)

    def _check_marks(self) -> None:
        """Refuse indices with a place for each expert that may name another one there."""
        made = {r: op for op in self.body.ops for r in op.results}
        op = made.get(_uncast(self.body, self.index))
        branches = [self.env.get(_uncast(self.body, v)) for v in op.operands[1:]] if op else []
        texts = {b.text for b in branches if b is not None}
        if op is None or op.kind != "t.where" or texts != {"expert", str(self.experts)}:
            raise Unsupported("indices by expert that are no marks")

    def _write_stores(self) -> None:
        t = self.text
        t.line("# store")
        for value in self.body.outputs:
            made_later = (
                self.dispatch.results
                if self.limit is None
                else (*self.dispatch.results, self.limit.result)
            )
            if value in made_later or value is self.index:
                continue
            out, term = t.parameter(value, f"{value.hint}_out"), self.term(value)
            at, mask = self._place(term.axes)
            t.line(f"tl.store({out} + {at}, {term.text}, mask={mask})")
        index = self.env[self.index]
        at, mask = self._place(index.axes)
        name = self.index if self.index in self.body.outputs else "index"
        out = t.parameter(name, f"{self.index.hint}_out")
        t.line(f"tl.store({out} + {at}, {index.text}, mask={mask})")
        if self.places:
            self._write_places(index)
            t.sort(self.body)
            return
        if self.groups == 1:
            histogram, blocks = t.parameter("histogram"), t.integers[1]
            at = f"{histogram} + expert * ({blocks} + 1) + block"
            lanes = self.buckets if self.limit is None else self.experts
            t.line(f"tl.store({at}, count, mask=expert < {lanes})")
        t.sort(self.body)

    def _write_places(self, index: Term) -> None:
        """Place the pairs: there is one program, so it has seen them all."""
        t = self.text
        t.used.add("place_few")
        t.line("# dispatch")
        names = [t.parameter(n) for n in ("perm", "offsets", "inverse", "tiles")]
        place, size, lanes = self.extent(index.axes)
        mask = "inside" if index.axes == SCORES else "chosen"
        live = f"({mask} & ({place} < {lanes})[None, :])"
        t.line(f"pair = (token[:, None] * {size} + {place}[None, :]).to(tl.int32)")
        pairs = f"BT * {'EP' if index.axes == SCORES else 'KP'}"
        e = index.text
        if self.may_have_none:
            e = t.let("expert_of", f"tl.where({live}, {e}, {self.experts}).to(tl.int32)").text
        flat = [f"{n}.reshape({pairs})" for n in (e, "pair", live)]
        inner = ", ".join([*flat, "count", *names])
        t.line(f"place_few({inner}, {self.experts}, EP, {pairs}, {FEW_ROWS})")

    def extent(self, axes: tuple[str, ...]) -> tuple[str, int, int]:
        """The index along a value's second axis, its size, and how many lanes it has."""
        if axes == SCORES:
            return "expert", self.experts, self.lanes
        return "slot", self.choices, power_of_two(self.choices)

    def _place(self, axes: tuple[str, ...]) -> tuple[str, str]:
        """Position and mask of a value of a block."""
        if axes == SCORES:
            return f"token[:, None] * {self.experts} + expert[None, :]", "inside"
        if axes == CHOSEN:
            return f"token[:, None] * {self.choices} + slot[None, :]", "chosen"
        if axes == TOKENS:
            return "token", f"token < {self.text.integers[0]}"
        if axes == ("e",):
            return "expert", f"expert < {self.experts}"
        raise Unsupported("a result that is neither of tokens nor of choices")

    # ops
    def term(self, value: Value) -> Term:
        """A value: known, or loaded now."""
        if value not in self.env:
            if value not in self.body.inputs:
                raise Unsupported(f"{value!r} is used before it is made")
            self.env[value] = self._load(value)
        return self.env[value]

    def _load(self, value: Value) -> Term:
        axes = self._axes(value)
        name = self.text.parameter(value)
        if not axes:
            return self.text.let(value.hint, self.text.held(value.type, f"tl.load({name})"))
        at, mask = self._place(axes)
        load = f"tl.load({name} + {at}, mask={mask}, other=0)"
        return self.text.let(value.hint, self.text.held(value.type, load), axes)

    def _axes(self, value: Value) -> tuple[str, ...]:
        shape = value.type.shape
        if not shape:
            return ()
        if shape == (self.experts,):
            return ("e",)
        if shape == self.index.type.shape[:1]:
            return TOKENS
        known = {1: TOKENS, self.choices: CHOSEN, self.experts: SCORES}
        if len(shape) != 2 or isinstance(shape[1], sympy.Expr) or shape[1] not in known:
            raise Unsupported(f"{value!r} is of no tokens")
        return known[shape[1]]

    def _op(self, op: Op) -> None:
        if op.results[0] in self.env:
            return
        if op.kind == "t.full":
            self.env[op.result] = self.text.literal(op)
        elif op.kind == "moe.select":
            self.env[op.result] = self._best(op)
        elif op.kind == "moe.weight":
            self.env[op.result] = self._weight(op)
        elif is_pointwise(op):
            self.env[op.result] = self._pointwise(op)
        elif op.kind in TOKEN_OPS:
            self.env.update(zip(op.results, TOKEN_OPS[op.kind](self, op), strict=True))
        else:
            raise Unsupported(f"{op.kind} in a routing kernel")

    def _pointwise(self, op: Op) -> Term:
        terms = [self.term(v) for v in op.operands]
        if {"e", "k"} <= {a for t in terms for a in t.axes}:
            raise Unsupported("experts and choices in one operation")
        return self.text.pointwise(op, terms, ORDER)

    def _best(self, op: Op) -> Term:
        """The first of the best experts: a selection that only says how good the best is."""
        x = self.term(op.operands[0])
        plain = op.attrs["k"] == 1 and op.attrs.get("mode", "topk") in ("topk", "first")
        if not plain or len(op.operands) > 1 or x.axes != SCORES:
            raise Unsupported("a second selection")
        self.text.used |= {"order_of", "first_best"}
        key = f"order_of({x.text})"
        if self.lanes != self.experts:
            key = f"tl.where((expert < {self.experts})[None, :], {key}, {self.least})"
        return self.text.let(op.result.hint, f"first_best({key}, expert, EP)", TOKENS)

    def _weight(self, op: Op) -> Term:
        chosen = _uncast(self.body, op.operands[1])
        if self.select is None or chosen is not self.select.result:
            best = self.env.get(chosen)
            if best is None or best.axes != TOKENS or set(op.attrs) - {"source"}:
                raise Unsupported("weights of another selection")
            source = self.term(op.operands[0])
            hit = f"expert[None, :] == {best.text}[:, None]"
            found = f"tl.sum(tl.where({hit}, {source.text}, 0.0), 1)"
            return self.text.let(op.result.hint, found, TOKENS)
        none = ""
        if self.select.attrs.get("mode", "topk") not in _ALWAYS_AN_EXPERT:
            none = f"{self.env[self.select.result].text} >= {self.experts}"
        w = self._normalised(op, self._source(op, none))
        scale = float(op.attrs.get("scale", 1.0))
        if scale != 1.0:
            scaled = f"{w.text} * {number(scale, self.dtype)}"
            w = self.text.let(op.result.hint, scaled, CHOSEN)
        return self._without(w, none, "0.0")  # a sum of nothing gives 0 / 0

    def _source(self, op: Op, none: str) -> Term:
        """The numbers that weights are made of; ``none`` says where a place holds no expert."""
        w, source, hint = self.picked[op.operands[0]], op.attrs.get("source"), op.result.hint
        if source == "softmax":
            return self._without(softmax(self, self._without(w, none, -math.inf), hint), none, 0.0)
        if source == "sigmoid":
            w = self.text.let(hint, f"tl.sigmoid({w.text})", CHOSEN)
        return self._without(w, none, 0.0)

    def _without(self, w: Term, none: str, value: float | str) -> Term:
        if not none:
            return w
        text = value if isinstance(value, str) else number(value, self.dtype)
        return self.text.let(w.text, f"tl.where({none}, {text}, {w.text})", CHOSEN)

    def _normalised(self, op: Op, w: Term) -> Term:
        norm, t = op.attrs.get("norm", "none"), self.text
        if norm == "none":
            return w
        eps = number(float(op.attrs.get("eps", 0.0)), self.dtype)
        total = t.let("total", f"tl.sum({filled(self, w, '0.0')}, 1)[:, None]").text
        if norm == "clamp_min":
            total = f"tl.where({total} < {eps}, {eps}, {total})"
        elif op.attrs.get("eps", 0.0):
            total = f"({total} + {eps})"
        return t.let(op.result.hint, f"{w.text} / {total}", CHOSEN)


def tokens_a_program(choices: int, experts: int) -> int:
    """Tokens a program: as many as it can rank pairs and hold scores of."""
    return max(1, min(PAIRS // power_of_two(choices), 4096 // power_of_two(experts)))


def groups_of(limit: Op | None, choices: int) -> int:
    """In how many groups the pairs get their places: one a choice, or one."""
    by_choice = limit is not None and limit.attrs.get("order", "choice_major") == "choice_major"
    return choices if by_choice else 1


def _uncast(body: Graph, value: Value) -> Value:
    made = {r: op for op in body.ops for r in op.results}
    while value in made and made[value].kind == "t.cast":
        value = made[value].operands[0]
    return value


def index_select(body: Graph, index: Value) -> Op | None:
    """The selection whose experts the indices name; none where every expert has a mark."""
    made = {r: op for op in body.ops for r in op.results}
    pending, found = [index], set[Op]()
    while pending:
        op = made.get(pending.pop())
        if op is not None and op.kind == "moe.select":
            found.add(op)
        elif op is not None:
            pending += [op.operands[place] for place in CARRIERS.get(op.kind, ())]
    if len(found) > 1:
        raise Unsupported(f"{len(found)} selections")
    return next(iter(found), None)


def _may_have_none(select: Op | None, index: Value) -> bool:
    """Whether a place may hold no expert."""
    plain = select is not None and index is select.result
    return not plain or select is None or select.attrs.get("mode", "topk") not in _ALWAYS_AN_EXPERT

"""The kernel of the scores: activation, selection and weights of a block of tokens.

Values vary along tokens ``t``, experts ``e`` and choices ``k``. Selection is repeated
maximum-taking over keys that sort as the scores do, NaN first; the lowest index wins ties.
"""

from __future__ import annotations

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
from moec.codegen.triton.tiles import FEW_ROWS, power_of_two
from moec.codegen.triton.tokens import tokens_of_block
from moec.ir.graph import Graph, Op, Value

ORDER = ("t", "e", "k")
SCORES, CHOSEN = ("t", "e"), ("t", "k")
PAIRS = 128


class Scores:
    """Writes the kernel; :class:`Unsupported` if the body holds what it cannot express."""

    def __init__(
        self,
        body: Graph,
        dispatch: Op,
        tile: tuple[int, ...] | None,
        facts: Facts,
        places: bool = False,
    ) -> None:
        self.body, self.dispatch, self.places = body, dispatch, places
        self.select = _only_select(body, dispatch)
        self.index: Value = self.select.result
        self.experts = int(dispatch.attrs["experts"])
        self.choices = int(self.index.type.shape[1])
        self.tokens = tile[0] if tile else tokens_a_program(self.choices, self.experts)
        self.dtype = compute_dtype(body)
        self.text = KernelText(self.dtype, facts)
        self.env: dict[Value, Term] = {}
        self.picked: dict[Value, Term] = {}
        self.least = -(2**63) if self.dtype == "tl.float64" else -(2**31)
        self._write()

    # the kernel
    def _write(self) -> None:
        t = self.text
        size, padded = power_of_two(self.experts), power_of_two(self.choices)
        t.constants.update(BT=self.tokens, EP=size, KP=padded)
        count = t.names.fresh("tokens")
        t.integers += [count] if self.places else [count, t.names.fresh("blocks")]
        t.line("block = tl.program_id(0)")
        rows, token = self.index.type.shape[0], "(block * BT + tl.arange(0, BT))"
        t.line(*assigned("token", tokens_of_block(t.facts, token, rows, t.constants)))
        t.line("expert = tl.arange(0, EP)")
        t.line("slot = tl.arange(0, KP)")
        experts = f" & (expert < {self.experts})[None, :]" if size != self.experts else ""
        choices = f" & (slot < {self.choices})[None, :]" if padded != self.choices else ""
        t.line(f"inside = (token < {count})[:, None]{experts}")
        t.line(f"chosen = (token < {count})[:, None]{choices}")
        early = self._early()
        t.line("# score")
        for op in early:
            self._op(op)
        self._write_selection()
        for op in needed_ops(self.body, self.body.outputs, set(self.env)):
            if op is not self.dispatch and op not in early:
                self._op(op)
        self._write_stores()

    def _early(self) -> list[Op]:
        """The ops that the selection and the weights start from."""
        sources = [*self.select.operands]
        sources += [op.operands[0] for op in self.body.ops if op.kind == "moe.weight"]
        found = needed_ops(self.body, sources, set())
        if self.select in found:
            raise Unsupported("scores that depend on the selection")
        return found

    def _write_stores(self) -> None:
        t = self.text
        t.line("# store")
        for value in self.body.outputs:
            if value in self.dispatch.results or value is self.index:
                continue
            out, term = t.parameter(value, f"{value.hint}_out"), self._term(value)
            at, mask = self._place(term.axes)
            t.line(f"tl.store({out} + {at}, {term.text}, mask={mask})")
        at, mask = self._place(CHOSEN)
        index = self.index if self.index in self.body.outputs else "index"
        name = t.parameter(index, f"{self.index.hint}_out")
        t.line(f"tl.store({name} + {at}, {self.env[self.index].text}, mask={mask})")
        if self.places:
            self._write_places()
            t.sort(self.body)
            return
        histogram, blocks = t.parameter("histogram"), t.integers[1]
        at = f"{histogram} + expert * ({blocks} + 1) + block"
        t.line(f"tl.store({at}, count, mask=expert < {self.experts})")
        t.sort(self.body)

    def _write_places(self) -> None:
        """Place the pairs: there is one program, so it has seen them all."""
        t, padded = self.text, power_of_two(self.choices)
        t.used.add("place_few")
        t.line("# dispatch")
        names = [t.parameter(n) for n in ("perm", "offsets", "inverse", "tiles")]
        index = self.env[self.index].text
        live = f"(chosen & (slot < {padded})[None, :])"
        t.line(f"pair = (token[:, None] * {self.choices} + slot[None, :]).to(tl.int32)")
        pairs = "BT * KP"
        flat = [f"{n}.reshape({pairs})" for n in (index, "pair", live)]
        inner = ", ".join([*flat, "count", *names])
        t.line(f"place_few({inner}, {self.experts}, EP, {pairs}, {FEW_ROWS})")

    def _place(self, axes: tuple[str, ...]) -> tuple[str, str]:
        """Position and mask of a value of a block."""
        if axes == SCORES:
            return f"token[:, None] * {self.experts} + expert[None, :]", "inside"
        if axes == CHOSEN:
            return f"token[:, None] * {self.choices} + slot[None, :]", "chosen"
        if axes == ("t",):
            return "token", f"token < {self.text.integers[0]}"
        if axes == ("e",):
            return "expert", f"expert < {self.experts}"
        raise Unsupported("a result that is neither of tokens nor of choices")

    # ops
    def _term(self, value: Value) -> Term:
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
        known = {1: ("t",), self.choices: CHOSEN, self.experts: SCORES}
        if len(shape) != 2 or isinstance(shape[1], sympy.Expr) or shape[1] not in known:
            raise Unsupported(f"{value!r} is of no tokens")
        return known[shape[1]]

    def _op(self, op: Op) -> None:
        if op.results[0] in self.env:
            return
        if op.kind == "t.full":
            self.env[op.result] = self.text.literal(op)
        elif op.kind == "moe.activate":
            self.env[op.result] = self._activate(op)
        elif op.kind == "moe.weight":
            self.env[op.result] = self._weight(op)
        elif is_pointwise(op):
            self.env[op.result] = self._pointwise(op)
        else:
            raise Unsupported(f"{op.kind} in a routing kernel")

    def _pointwise(self, op: Op) -> Term:
        terms = [self._term(v) for v in op.operands]
        if {"e", "k"} <= {a for t in terms for a in t.axes}:
            raise Unsupported("experts and choices in one operation")
        return self.text.pointwise(op, terms, ORDER)

    def _activate(self, op: Op) -> Term:
        x, fn = self._term(op.operands[0]), op.attrs["fn"]
        if x.axes != SCORES or op.attrs.get("groups", 1) != 1:
            raise Unsupported("a softmax of groups")
        if fn == "identity":
            return x
        if fn == "softmax":
            return self._softmax(x, op.result.hint, SCORES)
        if fn == "sigmoid":
            return self.text.let(op.result.hint, f"tl.sigmoid({x.text})", SCORES)
        soft = f"{self.text.use('log1p')}(tl.exp({x.text}))"
        text = f"tl.sqrt(tl.where({x.text} > 20.0, {x.text}, {soft}))"
        return self.text.let(op.result.hint, text, SCORES)

    def _softmax(self, x: Term, hint: str, axes: tuple[str, ...]) -> Term:
        t = self.text
        index, count = ("expert", self.experts) if axes == SCORES else ("slot", self.choices)
        if count != power_of_two(count):
            low = f'tl.where(({index} < {count})[None, :], {x.text}, float("-inf"))'
            x = t.let("shifted", low, axes)
        power = t.let("power", f"tl.exp({x.text} - tl.max({x.text}, 1)[:, None])", axes).text
        return t.let(hint, f"{power} / tl.sum({power}, 1)[:, None]", axes)

    def _weight(self, op: Op) -> Term:
        t, hint = self.text, op.result.hint
        source, norm = op.attrs.get("source", "gather"), op.attrs.get("norm", "none")
        w = self.picked[op.operands[0]]
        if _uncast(self.body, op.operands[1]) is not self.index:
            raise Unsupported("weights of another selection")
        if source == "softmax":
            w = self._softmax(w, hint, CHOSEN)
        elif source == "sigmoid":
            w = t.let(hint, f"tl.sigmoid({w.text})", CHOSEN)
        eps = number(float(op.attrs.get("eps", 0.0)), self.dtype)
        if norm != "none":
            summed = w.text
            if self.choices != power_of_two(self.choices):
                summed = f"tl.where((slot < {self.choices})[None, :], {w.text}, 0.0)"
            total = t.let("total", f"tl.sum({summed}, 1)[:, None]").text
            if norm == "clamp_min":
                total = f"tl.where({total} < {eps}, {eps}, {total})"
            elif op.attrs.get("eps", 0.0):
                total = f"({total} + {eps})"
            w = t.let(hint, f"{w.text} / {total}", CHOSEN)
        scale = float(op.attrs.get("scale", 1.0))
        return w if scale == 1.0 else t.let(hint, f"{w.text} * {number(scale, self.dtype)}", CHOSEN)

    # selection
    def _write_selection(self) -> None:
        t, mode = self.text, self.select.attrs.get("mode", "topk")
        if mode not in ("topk", "group_limited"):
            raise Unsupported(f"selection by {mode}")
        t.line("# select, the best first; the lowest index among equal ones")
        t.used.add("order_of")
        choice = self._choice()
        if mode == "group_limited":
            t.used.add("first_best")
            choice = self._limit_groups(choice)
        self._write_rounds(choice)

    def _choice(self) -> Term:
        terms = [self._term(v) for v in self.select.operands]
        if terms[0].axes != SCORES:
            raise Unsupported("a selection of something that is no scores")
        if len(terms) == 1:
            return terms[0]
        return self.text.let("choice", f"{terms[0].text} + {terms[1].on(SCORES)}", SCORES)

    def _keys(self, choice: Term, index: str, count: int, padded: int) -> str:
        key = f"order_of({choice.text})"
        if count != padded:
            key = f"tl.where(({index} < {count})[None, :], {key}, {self.least})"
        return key

    def _write_rounds(self, choice: Term) -> None:
        """K rounds: take the best, note its index and its scores, put it last."""
        t = self.text
        t.line(f"key = {self._keys(choice, 'expert', self.experts, power_of_two(self.experts))}")
        index = t.let(self.index.hint, "tl.zeros((BT, KP), tl.int32)", CHOSEN)
        t.names.fresh("count")
        t.names.fresh("top")
        sources = {op.operands[0]: None for op in self.body.ops if op.kind == "moe.weight"}
        for value in sources:
            self.picked[value] = t.let("picked", f"tl.zeros((BT, KP), {self.dtype})", CHOSEN)
        with t.block(f"for k in tl.static_range({self.choices}):"):
            t.line("top = tl.max(key, 1)[:, None]")
            t.line("best = tl.min(tl.where(key == top, expert[None, :], EP), 1)[:, None]")
            t.line("hit = expert[None, :] == best")
            t.line(f"key = tl.where(hit, {self.least}, key)")
            t.line("here = slot[None, :] == k")
            t.line(f"{index.text} = tl.where(here, best, {index.text})")
            for value, term in self.picked.items():
                source = self._term(value).text
                found = f"tl.sum(tl.where(hit, {source}, 0.0), 1)[:, None]"
                if source == choice.text:  # the key tells the score
                    found = f"{t.use('value_of')}(top)"
                t.line(f"{term.text} = tl.where(here, {found}, {term.text})")
        t.line(f"count = tl.sum(((key == {self.least}) & inside).to(tl.int32), 0)")
        self.env[self.index] = index

    def _limit_groups(self, choice: Term) -> Term:
        """The scores with those of all but the best groups set to the mask value."""
        t, attrs = self.text, self.select.attrs
        groups, kept = int(attrs.get("groups", 1)), int(attrs.get("topk_groups", 1))
        size, padded = self.experts // groups, power_of_two(groups)
        t.line(f"family = expert // {size}  # only experts of the best groups take part")
        t.line(f"families = tl.arange(0, {padded})")
        key = t.let("order", self._keys(choice, "expert", self.experts, power_of_two(self.experts)))
        rank = t.let("family_score", f"tl.zeros((BT, {padded}), {self.dtype})")
        with t.block(f"for g in tl.static_range({groups}):"):
            t.line(f"member = tl.where((family == g)[None, :], {key.text}, {self.least})")
            value = self._family_score(choice, attrs.get("group_score", "sum_top2"))
            t.line(f"{rank.text} = tl.where(families[None, :] == g, {value}, {rank.text})")
        t.line(f"family_key = {self._keys(rank, 'families', groups, padded)}")
        t.line("allowed = tl.zeros((BT, EP), tl.int1)")
        with t.block(f"for g in tl.static_range({kept}):"):
            t.line(f"best = first_best(family_key, families, {padded})[:, None]")
            t.line(f"family_key = tl.where(families[None, :] == best, {self.least}, family_key)")
            t.line("allowed = allowed | (family[None, :] == best)")
        masked = number(float(attrs.get("mask_value", float("-inf"))), self.dtype)
        return t.let("limited", f"tl.where(allowed, {choice.text}, {masked})", SCORES)

    def _family_score(self, choice: Term, kind: str) -> str:
        t = self.text
        pick = f"tl.sum(tl.where(hit, {choice.text}, 0.0), 1)[:, None]"
        t.line("hit = expert[None, :] == first_best(member, expert, EP)[:, None]")
        if kind == "max":
            return pick
        t.line(f"first = {pick}")
        t.line(f"member = tl.where(hit, {self.least}, member)")
        t.line("hit = expert[None, :] == first_best(member, expert, EP)[:, None]")
        return f"first + {pick}"


def tokens_a_program(choices: int, experts: int) -> int:
    """Tokens a program: as many as it can rank pairs and hold scores of."""
    return max(1, min(PAIRS // power_of_two(choices), 4096 // power_of_two(experts)))


def _uncast(body: Graph, value: Value) -> Value:
    made = {r: op for op in body.ops for r in op.results}
    while value in made and made[value].kind == "t.cast":
        value = made[value].operands[0]
    return value


def _only_select(body: Graph, dispatch: Op) -> Op:
    selects = [op for op in body.ops if op.kind == "moe.select"]
    if len(selects) != 1 or dispatch.operands[0] is not selects[0].result:
        raise Unsupported(f"{len(selects)} selections")
    return selects[0]

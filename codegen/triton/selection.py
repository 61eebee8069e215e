"""Selection inside a routing kernel: the best choices of a block of tokens.

Repeated maximum-taking over keys that sort as the scores do, NaN first; the lowest index wins ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.codegen.triton.expressions import number
from moec.codegen.triton.kernel import Term, Unsupported
from moec.codegen.triton.tiles import UNROLLED, power_of_two
from moec.codegen.triton.token_values import CHOSEN, SCORES, column
from moec.ir.graph import Op, Value

if TYPE_CHECKING:
    from moec.codegen.triton.scores import Scores

_MODES = ("topk", "first", "group_limited", "margin", "threshold")


@dataclass
class Selection:
    """Writes the lines of one ``moe.select`` into the kernel of the scores.

    ``picked`` are the scores of the choices, for each value that weights are taken from.
    """

    scores: Scores
    select: Op

    def write(self) -> dict[Value, Term]:
        """Write the lines; the index is then known to the kernel."""
        t, mode = self.scores.text, self.select.attrs.get("mode", "topk")
        if mode not in _MODES:
            raise Unsupported(f"selection by {mode}")
        t.line("# select, the best first; the lowest index among equal ones")
        t.used.add("order_of")
        choice = self._choice()
        if mode == "group_limited":
            t.used.add("first_best")
            choice = self._limit_groups(choice)
        index, picked, best = self._write_rounds(choice, mode in ("margin", "threshold"))
        if best is not None:
            index = self._drop(index, best, mode)
        self.scores.env[self.select.result] = index
        return picked

    def _choice(self) -> Term:
        terms = [self.scores.term(v) for v in self.select.operands]
        if terms[0].axes != SCORES:
            raise Unsupported("a selection of something that is no scores")
        if len(terms) == 1:
            return terms[0]
        return self.scores.text.let("choice", f"{terms[0].text} + {terms[1].on(SCORES)}", SCORES)

    def _keys(self, choice: Term, index: str, count: int, padded: int) -> str:
        key = f"order_of({choice.text})"
        if count != padded:
            key = f"tl.where(({index} < {count})[None, :], {key}, {self.scores.least})"
        return key

    def _write_rounds(
        self, choice: Term, with_best: bool
    ) -> tuple[Term, dict[Value, Term], Term | None]:
        """K rounds: take the best, note its index and its scores, put it last.

        The index; the picked scores by value; and, if asked for, the numbers that were compared.
        """
        t, choices = self.scores.text, self.scores.choices
        t.line(f"key = {self._keys(choice, 'expert', self.scores.experts, self.scores.lanes)}")
        zeros = f"tl.zeros((BT, KP), {self.scores.dtype})"
        index = t.let(self.select.result.hint, "tl.zeros((BT, KP), tl.int32)", CHOSEN)
        sources = {op.operands[0]: None for op in self.scores.body.ops if op.kind == "moe.weight"}
        picked = {value: t.let("picked", zeros, CHOSEN) for value in sources}
        best = t.let("compared", zeros, CHOSEN) if with_best else None
        loop = "tl.static_range" if choices <= UNROLLED else "range"
        with t.block(f"for k in {loop}({choices}):"):
            t.line("top = tl.max(key, 1)[:, None]")
            t.line("best = tl.min(tl.where(key == top, expert[None, :], EP), 1)[:, None]")
            t.line("hit = expert[None, :] == best")
            t.line(f"key = tl.where(hit, {self.scores.least}, key)")
            t.line("here = slot[None, :] == k")
            t.line(f"{index.text} = tl.where(here, best, {index.text})")
            for term, source in [(p, self.scores.term(v).text) for v, p in picked.items()]:
                self._note(term, source, choice)
            if best is not None:
                self._note(best, choice.text, choice)
        return index, picked, best

    def _note(self, term: Term, source: str, choice: Term) -> None:
        """Note the chosen one of the scores in the place of this round."""
        found = f"tl.sum(tl.where(hit, {source}, 0.0), 1)[:, None]"
        if source == choice.text:  # the key tells the score
            found = f"{self.scores.text.use('value_of')}(top)"
        self.scores.text.line(f"{term.text} = tl.where(here, {found}, {term.text})")

    def _drop(self, index: Term, best: Term, mode: str) -> Term:
        """Places that are too far from the best one, or too low, hold no expert."""
        t, theta = self.scores.text, float(self.select.attrs.get("theta", 0.0))
        bound = number(theta, self.scores.dtype)
        if mode == "margin":
            first = column(self.scores, best, 0, "first").on(CHOSEN)
            far = f"{first} - {best.text} > {bound}"
        else:
            far = f"{best.text} <= {bound}"
        text = f"tl.where({far}, {self.scores.experts}, {index.text})"
        return t.let(self.select.result.hint, text, CHOSEN)

    def _limit_groups(self, choice: Term) -> Term:
        """The scores with those of all but the best groups set to the mask value."""
        t, attrs = self.scores.text, self.select.attrs
        groups, kept = int(attrs.get("groups", 1)), int(attrs.get("topk_groups", 1))
        size, padded = self.scores.experts // groups, power_of_two(groups)
        t.line(f"family = expert // {size}  # only experts of the best groups take part")
        t.line(f"families = tl.arange(0, {padded})")
        key = t.let("order", self._keys(choice, "expert", self.scores.experts, self.scores.lanes))
        rank = t.let("family_score", f"tl.zeros((BT, {padded}), {self.scores.dtype})")
        with t.block(f"for g in tl.static_range({groups}):"):
            t.line(f"member = tl.where((family == g)[None, :], {key.text}, {self.scores.least})")
            value = self._family_score(choice, attrs.get("group_score", "sum_top2"))
            t.line(f"{rank.text} = tl.where(families[None, :] == g, {value}, {rank.text})")
        t.line(f"family_key = {self._keys(rank, 'families', groups, padded)}")
        t.line("allowed = tl.zeros((BT, EP), tl.int1)")
        with t.block(f"for g in tl.static_range({kept}):"):
            t.line(f"best = first_best(family_key, families, {padded})[:, None]")
            put_last = f"tl.where(families[None, :] == best, {self.scores.least}, family_key)"
            t.line(f"family_key = {put_last}")
            t.line("allowed = allowed | (family[None, :] == best)")
        masked = number(float(attrs.get("mask_value", float("-inf"))), self.scores.dtype)
        return t.let("limited", f"tl.where(allowed, {choice.text}, {masked})", SCORES)

    def _family_score(self, choice: Term, kind: str) -> str:
        t = self.scores.text
        pick = f"tl.sum(tl.where(hit, {choice.text}, 0.0), 1)[:, None]"
        t.line("hit = expert[None, :] == first_best(member, expert, EP)[:, None]")
        if kind == "max":
            return pick
        t.line(f"first = {pick}")
        t.line(f"member = tl.where(hit, {self.scores.least}, member)")
        t.line("hit = expert[None, :] == first_best(member, expert, EP)[:, None]")
        return f"first + {pick}"

"""Experts that choose their tokens: rows taken by a top-k over tokens become grouped products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, producers
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.expert_layout import MOVES, Frame, frame_of, moved_order
from moec.reasons import decline
from moec.rewrite import fixpoint, transform

_BY_EXPERT = (0, 1, 2)  # experts, then their picks, then features


@register("dispatch-picks")
def dispatch_picks(graph: Graph) -> Graph:
    """Make expert choice grouped products over as many rows as the experts pick.

    The places of a top-k along the axis of tokens, one for each expert, say which rows of the
    tokens an expert gets; what it computes of them is added up at the same places. That is one
    product over ragged rows each and a sum in a fixed order, without atomics.
    """
    return fixpoint(graph, _first, "dispatch-picks")


def _first(graph: Graph) -> Graph:
    for topk in graph.ops:
        if topk.kind == "t.topk" and _is_by_token(topk):
            found = _Cone(graph, topk).sum()
            if found is not None:
                return _rewritten(graph, found)
    return graph


def _is_by_token(op: Op) -> bool:
    """Whether a top-k picks, for each expert, from an axis of unknown size."""
    scores = op.operands[0].type
    axis = op.attrs.get("dim", -1) % scores.rank if scores.rank == 2 else None
    if axis is None or isinstance(scores.shape[axis], int):
        return False
    return isinstance(scores.shape[1 - axis], int)


@dataclass(frozen=True)
class _Sum:
    """The addition of all rows at the tokens that they are of."""

    cone: _Cone
    op: Op
    rows: Value


@dataclass
class _Cone:
    """What follows from one top-k: values with a row for each pick, and the order of their axes.

    ``index`` are the numbers of the tokens, ``scores`` what follows from the scores alone.
    """

    graph: Graph
    topk: Op
    frame: Frame = field(init=False)
    made: dict[Value, Op] = field(init=False)
    known: dict[Value, tuple[int, ...]] = field(default_factory=dict)
    index: set[Value] = field(default_factory=set)
    scores: set[Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made = producers(self.graph)
        shape, axis = self.topk.results[1].type.shape, self.axis
        self.frame = frame_of(self.graph, int(shape[1 - axis]), shape[axis])
        order = _BY_EXPERT if axis == 1 else (1, 0, 2)
        self.known = dict.fromkeys(self.topk.results, order)
        self.scores, self.index = {self.topk.results[0]}, {self.topk.results[1]}

    @property
    def axis(self) -> int:
        """The axis of the picks."""
        return int(self.topk.attrs.get("dim", -1)) % 2

    @property
    def tokens(self) -> object:
        """The number of tokens."""
        return self.topk.operands[0].type.shape[self.axis]

    def sum(self) -> _Sum | None:
        """The first addition of rows that the top-k decides."""
        for op in self.graph.ops[self.graph.ops.index(self.topk) + 1 :]:
            if self._adds(op):
                return _Sum(self, op, op.operands[2])
            learned = dict(self._learn(op))
            self.known.update(learned)
            reads = [v for v in op.operands if v in self.known and v not in self.index]
            if reads and not learned:
                decline("picked-rows", op, "it is not seen how its result follows from the picks")
        return None

    def _adds(self, op: Op) -> bool:
        """Whether an op adds rows to zeros at the tokens that they are of."""
        if op.kind not in ("t.index_add", "t.scatter_add") or op.attrs.get("dim", 0) != 0:
            return False
        base, place, rows = op.operands
        zeros = self.made.get(base)
        whole = zeros is not None and zeros.kind == "t.full" and zeros.attrs["value"] == 0
        known = place in self.index and rows in self.known and rows not in self.index
        same = known and self.known[place][:2] == self.known[rows][:2]
        return bool(whole and same and base.type.shape[0] == self.tokens and _is_flat(rows))

    def _learn(self, op: Op) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """The order of an op's results, if it is known what they are."""
        if op.kind in MOVES or op.kind == "t.cast":
            yield from self._learn_move(op)
        elif op.kind in ("t.take", "t.gather"):
            yield from self._learn_rows(op)
        elif op.kind == "t.matmul":
            yield from self._learn_product(op)
        elif op.kind == "t.split":
            order = self.known.get(op.operands[0])
            if order is not None and order[2] == 2 and op.operands[0] not in self.index:
                yield from ((v, order) for v in op.results)
        elif opdef(op.kind).pointwise:
            yield from self._learn_pointwise(op)

    def _learn_move(self, op: Op) -> Iterator[tuple[Value, tuple[int, ...]]]:
        source = op.operands[0]
        order = self.known.get(source)
        if order is None:
            return
        moved = order if op.kind == "t.cast" else moved_order(self.frame, op, order)
        if moved is not None:
            for group in (self.index, self.scores):
                group.update(op.results if source in group else ())
            yield op.result, moved

    def _learn_rows(self, op: Op) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """The rows of the tokens that the experts picked."""
        x, place = op.operands
        order = self.known.get(place)
        if place not in self.index or x.type.rank != 2 or x.type.shape[0] != self.tokens:
            return
        whole = op.kind == "t.take" or (op.attrs["dim"] == 0 and place.type.rank == 2)
        if whole and order is not None and order[2] == 2 and x not in self.known:
            yield op.result, order

    def _learn_product(self, op: Op) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """Each expert's rows times its matrix."""
        x, w = op.operands
        by_expert = w.type.rank == 3 and w.type.shape[0] == self.frame.experts
        whole = x.type.shape[:2] == (self.frame.experts, self.frame.tokens)
        if by_expert and whole and w not in self.known and x.type.rank == 3:
            if self.known.get(x) == _BY_EXPERT and x not in self.index and _is_fixed(w):
                yield op.result, _BY_EXPERT

    def _learn_pointwise(self, op: Op) -> Iterator[tuple[Value, tuple[int, ...]]]:
        wide = [v for v in op.operands if v.type.rank]
        rows = [v for v in wide if v in self.known]
        if not rows or any(v in self.index for v in rows):
            return
        orders = {self.known[v] for v in rows}
        others = [v for v in wide if v not in self.known]
        fits = all(self._fits(v, op.result) for v in rows)
        if len(orders) == 1 and fits and all(self.is_vector(v, op.result) for v in others):
            if all(v in self.scores for v in rows) and not others:
                self.scores.update(op.results)
            yield op.result, orders.pop()

    def _fits(self, value: Value, result: Value) -> bool:
        """Whether an operand has the result's axes, or one feature in place of its last axis."""
        if value.type.shape == result.type.shape:
            return True
        same = value.type.shape[:-1] == result.type.shape[:-1] and value.type.shape[-1] == 1
        return same and self.frame.features(value) == 1

    def is_vector(self, value: Value, result: Value) -> bool:
        """Whether a value is one vector an expert, ``[E, 1, N]``, beside rows ``[E, C, N]``."""
        features = result.type.shape[-1]
        return (
            result.type.rank == 3
            and result.type.shape[:2] == (self.frame.experts, self.frame.tokens)
            and value.type.shape == (self.frame.experts, 1, features)
        )


def _is_flat(rows: Value) -> bool:
    return rows.type.rank == 2


def _is_fixed(value: Value) -> bool:
    """Whether a value has no axis of unknown size, as weights have none."""
    return all(isinstance(d, int) for d in value.type.shape)


def _rewritten(graph: Graph, found: _Sum) -> Graph:
    def rule(b: Builder, op: Op) -> Value | None:
        return _Rows(b, found.cone).combined(found) if op.results == found.op.results else None

    return transform(graph, rule, "dispatch-picks")


class _Rows:
    """Builds the same work on rows ``[E*C, N]``, those of an expert next to each other."""

    def __init__(self, b: Builder, cone: _Cone) -> None:
        self.b, self.cone = b, cone
        picks = self._by_expert(cone.topk.results[1])
        picks = b("t.cast", picks, dtype="i32", hint="picks")
        self.plan = b(
            "moe.dispatch_picks", picks, tokens=cone.tokens, hint=("perm", "offsets", "inverse")
        )
        self.perm, self.offsets, self.inverse = self.plan
        self.rows: dict[Value, Value] = {}

    def _by_expert(self, value: Value) -> Value:
        """A result of the top-k as ``[E, C]``."""
        if self.cone.axis == 1:
            return value
        turned: Value = self.b("t.permute", value, dims=(1, 0), hint=value.hint)
        return turned

    def combined(self, found: _Sum) -> Value:
        """The sum of the rows of each token, in the order of the experts."""
        rows, weights = self._weighted(found.rows)
        operands = [self.of(rows), self.perm, self.inverse]
        if weights is not None:
            column = self.of(weights)
            flat = self.b("t.reshape", column, shape=self.perm.type.shape, hint=column.hint)
            operands.append(self.b("moe.unpermute", flat, self.perm, self.inverse, hint="w"))
        dtype = found.op.result.type.dtype
        made: Value = self.b("moe.combine", *operands, dtype=dtype, hint="routed")
        return made

    def _weighted(self, value: Value) -> tuple[Value, Value | None]:
        """Rows and the score by which each is multiplied last."""
        op = self.cone.made[value]
        while op.kind in MOVES and op.operands[0].type.elements == op.result.type.elements:
            op = self.cone.made[op.operands[0]]
        if op.kind != "t.mul" or len(op.operands) != 2:
            return value, None
        for rows, weights in (op.operands, op.operands[::-1]):
            score = weights in self.cone.scores and self.cone.frame.features(weights) == 1
            if score and rows in self.cone.known and rows not in self.cone.scores:
                return rows, weights
        return value, None

    def of(self, value: Value) -> Value:
        """A value's rows, ``[E*C, N]``."""
        if value not in self.rows:
            if value in self.cone.topk.results:
                shape = (self.perm.type.shape[0], 1)
                column = self.b("t.reshape", self._by_expert(value), shape=shape, hint=value.hint)
                self.rows[value] = column
            else:
                self._computed(self.cone.made[value])
        return self.rows[value]

    def _computed(self, op: Op) -> None:
        """Build an op on rows."""
        hints = [r.hint for r in op.results]
        if op.kind in ("t.take", "t.gather"):
            x = op.operands[0]
            self.rows[op.result] = self.b("moe.gather", x, self.perm, self.inverse, hint="xs")
        elif op.kind in MOVES:
            self.rows[op.result] = self._widened(self.of(op.operands[0]), op.result)
        elif op.kind == "t.matmul":
            x, w = op.operands
            self.rows[op.result] = self.b(
                "moe.grouped_mm", self.of(x), w, self.offsets, transposed=True, hint=hints
            )
        else:
            operands = [self._operand(v) for v in op.operands]
            made = self.b(op.kind, *operands, hint=hints, **op.attrs)
            results = (made,) if isinstance(made, Value) else made
            self.rows.update(zip(op.results, results, strict=True))

    def _operand(self, value: Value) -> Value:
        if value.type.rank == 0:
            return value
        if value in self.cone.known:
            return self.of(value)
        shape = (value.type.shape[0], value.type.shape[2])
        table = self.b("t.reshape", value, shape=shape, hint=value.hint)
        rows = self.perm.type.shape[0]
        spread: Value = self.b("moe.expert_rows", table, self.offsets, rows=rows, hint=value.hint)
        return spread

    def _widened(self, rows: Value, like: Value) -> Value:
        """Rows with as many features as a value has."""
        shape = (rows.type.shape[0], self.cone.frame.features(like))
        if rows.type.shape == shape:
            return rows
        wide: Value = self.b("t.expand", rows, shape=shape)
        return wide

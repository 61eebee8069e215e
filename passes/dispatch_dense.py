"""Dense to sparse: all experts on all tokens, most of it times zero, becomes dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moec.interp import run_op
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, producers
from moec.ir.opdef import opdef
from moec.manager import register
from moec.passes.expert_layout import (
    MOVES,
    Frame,
    frame_of,
    moved_order,
    repeated_tokens,
)
from moec.reasons import decline
from moec.rewrite import fixpoint, transform


@register("dispatch-dense")
def dispatch_dense(graph: Graph) -> Graph:
    """Compute only the chosen experts where the others provably add zero.

    Scores that a scatter puts at top-k places of a constant are zero elsewhere (after a sigmoid of
    minus infinity, say). Where they multiply an expert's input, and every step from there maps zero
    to zero, or its output, the sum over all experts is one over the chosen. Finite values are taken
    for granted: a zero times an infinite output of an expert that was not chosen is not NaN.
    """
    return fixpoint(graph, _first, "dispatch-dense")


def _first(graph: Graph) -> Graph:
    for scatter in graph.ops:
        for found in _sums(graph, scatter):
            return _rewritten(graph, found)
    return graph


@dataclass(frozen=True)
class _Known:
    """A value with all experts and tokens: its order, and what it holds where no expert is chosen.

    ``tokens`` is set for tokens that are repeated for every expert; ``score`` says that the value
    comes from the scores alone.
    """

    order: tuple[int, ...]
    rest: float | None
    tokens: Value | None = None
    score: bool = False


@dataclass
class _Cone:
    """What is known of the values that follow from one scatter, or are repeated tokens."""

    graph: Graph
    scatter: Op
    frame: Frame
    made: dict[Value, Op]
    known: dict[Value, _Known] = field(default_factory=dict)

    def of(self, value: Value) -> _Known | None:
        """What is known of an operand; repeated tokens are found when asked for."""
        if value not in self.known:
            found = repeated_tokens(self.frame, value, self.made)
            if found is not None:
                self.known[value] = _Known(found[1], None, tokens=found[0])
        return self.known.get(value)


@dataclass(frozen=True)
class _Sum:
    """A sum over all experts: of ``rows``, times the scores ``weights`` if they are apart."""

    cone: _Cone
    op: Op
    rows: Value
    weights: Value | None = None


def _sums(graph: Graph, scatter: Op) -> Iterator[_Sum]:
    """Sums over all experts whose terms are zero where ``scatter`` put nothing."""
    if scatter.kind != "t.scatter":
        return
    problem = _no_scores(graph, scatter)
    if problem:
        decline("scattered-scores", scatter, problem)
        return
    made = producers(graph)
    tokens, experts = scatter.result.type.shape
    cone = _Cone(graph, scatter, frame_of(graph, int(experts), tokens), made)
    base = made[scatter.operands[0]].attrs["value"]
    cone.known[scatter.result] = _Known((1, 0, 2), float(base), score=True)
    for op in graph.ops[graph.ops.index(scatter) + 1 :]:
        found = _sum_of(cone, op)
        if found is not None:
            yield found
        learned = dict(_learn(cone, op))
        cone.known.update(learned)
        if found is None and not learned:
            _decline_step(cone, op)


def _decline_step(cone: _Cone, op: Op) -> None:
    """Note where the trail of values from the scores ends."""
    followed = [v for v in op.operands if v in cone.known and cone.known[v].tokens is None]
    if followed:
        decline(
            "dense-sum",
            op,
            "reads {}, which has all experts, but it is not seen how its result follows, or that it"
            " is zero where no expert is chosen",
            followed[0],
        )


def _no_scores(graph: Graph, op: Op) -> str:
    """Why a scatter does not put scores at distinct places of a constant ``[T, E]``; empty if it
    does.
    """
    if len(op.operands) != 3 or op.result.type.rank != 2:
        return "it does not scatter values into [tokens, experts]"
    made = producers(graph)
    base, index = made.get(op.operands[0]), made.get(op.operands[1])
    while index is not None and index.kind == "t.cast":
        index = made.get(index.operands[0])
    if index is None or index.kind != "t.topk" or not _last(index):
        return "its places come from no top-k over the experts, so they may repeat"
    if base is None or base.kind != "t.full":
        return "it scatters into values that are no constant"
    along = _last(op) and isinstance(op.result.type.shape[1], int)
    return "" if along else "it does not scatter along the experts"


def _last(op: Op) -> bool:
    return op.attrs.get("dim", -1) in (-1, op.operands[0].type.rank - 1)


def _learn(cone: _Cone, op: Op) -> Iterator[tuple[Value, _Known]]:
    """What an op's results are, if its operands are known."""
    if op.kind in MOVES:
        yield from _learn_move(cone, op)
    elif op.kind == "t.matmul":
        yield from _learn_product(cone, op)
    elif op.kind == "t.split":
        known = cone.known.get(op.operands[0])
        if known is not None and _features_last(cone, op.operands[0], known):
            for result in op.results:
                yield result, _Known(known.order, known.rest)
    elif opdef(op.kind).pointwise:
        yield from _learn_pointwise(cone, op)


def _learn_move(cone: _Cone, op: Op) -> Iterator[tuple[Value, _Known]]:
    known = cone.known.get(op.operands[0])
    if known is None or known.tokens is not None:
        return
    order = moved_order(cone.frame, op, known.order)
    if order is not None:
        yield op.result, _Known(order, known.rest, score=known.score)


def _learn_product(cone: _Cone, op: Op) -> Iterator[tuple[Value, _Known]]:
    """Every expert's rows times its matrix."""
    x, w = op.operands
    if not _is_weight(cone, w) or w.type.rank != 3 or w.type.shape[0] != cone.frame.experts:
        return
    known = cone.of(x)
    if known is not None and known.order == (0, 1, 2) and _is_stack(cone, x):
        yield op.result, _Known(known.order, 0.0 if known.rest == 0 else None)


def _is_weight(cone: _Cone, value: Value) -> bool:
    """Whether a value is an input, turned or cast."""
    op = cone.made.get(value)
    while op is not None and op.kind in ("t.permute", "t.cast"):
        value = op.operands[0]
        op = cone.made.get(value)
    return op is None


def _is_stack(cone: _Cone, x: Value) -> bool:
    return x.type.rank == 3 and x.type.shape[:2] == (cone.frame.experts, cone.frame.tokens)


def _features_last(cone: _Cone, value: Value, known: _Known) -> bool:
    features = cone.frame.features(value)
    return known.order[2] == 2 and value.type.shape[-1] == features


def _learn_pointwise(cone: _Cone, op: Op) -> Iterator[tuple[Value, _Known]]:
    if not any(v in cone.known for v in op.operands):
        return
    wide = [v for v in op.operands if v.type.rank]
    vectors = [v for v in wide if v not in cone.known and _is_vector(cone, v, op.result)]
    operands = [cone.of(v) for v in wide if v not in vectors]
    known = [k for k in operands if k is not None]
    if len(known) < len(operands) or len({k.order for k in known}) != 1:
        return
    if not all(_fits(cone, v, op.result) for v in wide if v not in vectors):
        return
    unknown = [v for v in op.operands if v.type.rank == 0 or v in vectors]
    numbers = [None if v in unknown else cone.known[v].rest for v in op.operands]
    score = all(k.score for k in known) and len(op.operands) == 1
    yield op.result, _Known(known[0].order, _rest(op, numbers), score=score)


def _fits(cone: _Cone, value: Value, result: Value) -> bool:
    """Whether an operand has the result's axes, or one feature in place of its last axis."""
    if value.type.shape == result.type.shape:
        return True
    same = value.type.shape[:-1] == result.type.shape[:-1] and value.type.shape[-1] == 1
    return same and cone.frame.features(value) == 1 and cone.frame.features(result) is not None


def _is_vector(cone: _Cone, value: Value, result: Value) -> bool:
    """Whether a weight is one vector an expert, ``[E, 1, N]``, beside rows ``[E, T, N]``."""
    size = (cone.frame.experts, cone.frame.tokens)
    return (
        result.type.rank == 3
        and result.type.shape[:2] == size
        and value.type.shape == (cone.frame.experts, 1, result.type.shape[2])
        and value not in cone.known
        and _is_weight(cone, value)
    )


def _rest(op: Op, numbers: list[float | None]) -> float | None:
    """What an op gives where its operands hold these numbers."""
    if op.kind == "t.mul" and 0.0 in numbers:
        return 0.0
    if any(n is None for n in numbers):
        return None
    given = [torch.tensor(n, dtype=torch.float64) for n in numbers]
    (result,) = run_op(op, given, {}, float64=True)
    return float(result)


def _sum_of(cone: _Cone, op: Op) -> _Sum | None:
    """The sum over all experts that an op takes of values that are zero but for the chosen."""
    if op.kind == "t.sum":
        rows = op.operands[0]
        known = cone.known.get(rows)
        if known is None or known.rest != 0 or known.score or rows.type.rank != 3:
            return None
        axis = known.order.index(0)
        own = rows.type.shape[axis] == cone.frame.experts
        summed = [d % 3 for d in op.attrs["dims"]] == [axis]
        return _Sum(cone, op, rows) if own and summed and _three_axes(cone, rows, known) else None
    return _weighted_sum(cone, op) if op.kind == "t.matmul" else None


def _three_axes(cone: _Cone, value: Value, known: _Known) -> bool:
    """Whether a value has one axis each for experts, tokens and features."""
    sizes = (cone.frame.experts, cone.frame.tokens, cone.frame.features(value))
    return value.type.shape == tuple(sizes[a] for a in known.order)


def _weighted_sum(cone: _Cone, op: Op) -> _Sum | None:
    """``[T, 1, E] @ [T, E, N]``, or ``[T, N, E] @ [T, E, 1]``."""
    for weights, rows, order in (
        (op.operands[0], op.operands[1], (1, 0, 2)),
        (op.operands[1], op.operands[0], (1, 2, 0)),
    ):
        score, known = cone.known.get(weights), cone.known.get(rows)
        if score is None or known is None or not score.score or score.rest != 0:
            continue
        by_token = weights.type.shape[0] == rows.type.shape[0] == cone.frame.tokens
        flat = score.order in ((1, 0, 2), (1, 2, 0)) and cone.frame.features(weights) == 1
        if by_token and flat and known.order == order and _three_axes(cone, rows, known):
            return _Sum(cone, op, rows, weights)
    return None


def _rewritten(graph: Graph, found: _Sum) -> Graph:
    def rule(b: Builder, op: Op) -> Value | None:
        if op.results != found.op.results:
            return None
        made = _Rows(b, found.cone).combined(found)
        same = made.type.shape == op.result.type.shape
        return made if same else b("t.reshape", made, shape=op.result.type.shape)

    return transform(graph, rule, "dispatch-dense")


class _Rows:
    """Builds the same work on the rows of the chosen experts alone."""

    def __init__(self, b: Builder, cone: _Cone) -> None:
        self.b, self.cone = b, cone
        index, source = cone.scatter.operands[1:]
        idx = index if index.type.dtype == "i32" else b("t.cast", index, dtype="i32", hint="idx")
        self.perm, self.offsets, self.inverse = b(
            "moe.dispatch", idx, experts=cone.frame.experts, hint=("perm", "offsets", "inverse")
        )
        self.pairs: dict[Value, Value] = {cone.scatter.result: source}
        self.rows: dict[Value, Value] = {}

    def combined(self, found: _Sum) -> Value:
        """The sum over the chosen experts, ``[T, N]``."""
        rows = self.of(found.rows)
        weights = [] if found.weights is None else [self.pair(found.weights)]
        dtype = found.op.result.type.dtype
        made: Value = self.b(
            "moe.combine", rows, self.perm, self.inverse, *weights, dtype=dtype, hint="routed"
        )
        return made

    def pair(self, value: Value) -> Value:
        """Scores, one for each pair of a token and its choice."""
        if value not in self.pairs:
            op = self.cone.made[value]
            inner = self.pair(op.operands[0])
            moved = op.kind in MOVES
            self.pairs[value] = inner if moved else self.b(op.kind, inner, **op.attrs)
        return self.pairs[value]

    def of(self, value: Value) -> Value:
        """A value's rows, ``[A, N]``, or ``[A, 1]`` where it has one feature."""
        if value not in self.rows:
            known = self.cone.known[value]
            if known.tokens is not None:
                self.rows[value] = self.b(
                    "moe.gather", known.tokens, self.perm, self.inverse, hint="xs"
                )
            elif known.score:
                column = self.b("moe.permute", self.pair(value), self.perm, self.inverse)
                shape = (self.perm.type.shape[0], 1)
                column = self.b("t.reshape", column, shape=shape, hint="ws")
                self.rows[value] = self.widened(column, value)
            else:
                self.computed(self.cone.made[value])
        return self.rows[value]

    def widened(self, rows: Value, like: Value) -> Value:
        """Rows with as many features as a value has."""
        shape = (rows.type.shape[0], self.cone.frame.features(like))
        return rows if rows.type.shape == shape else self.b("t.expand", rows, shape=shape)

    def computed(self, op: Op) -> None:
        """Build an op on rows."""
        hints = [r.hint for r in op.results]
        if op.kind in MOVES:
            self.rows[op.result] = self.widened(self.of(op.operands[0]), op.result)
        elif op.kind == "t.matmul":
            x, w = op.operands
            self.rows[op.result] = self.b(
                "moe.grouped_mm", self.of(x), w, self.offsets, transposed=True, hint=hints
            )
        else:
            operands = [self.operand(v) for v in op.operands]
            made = self.b(op.kind, *operands, hint=hints, **op.attrs)
            results = (made,) if isinstance(made, Value) else made
            self.rows.update(zip(op.results, results, strict=True))

    def operand(self, value: Value) -> Value:
        """An operand of pointwise work: a number, rows, or each row's vector of its expert."""
        if value.type.rank == 0:
            return value
        if value in self.cone.known:
            return self.of(value)
        table = (value.type.shape[0], value.type.shape[2])
        vectors = self.b("t.reshape", value, shape=table, hint=value.hint)
        rows = self.perm.type.shape[0]
        spread: Value = self.b("moe.expert_rows", vectors, self.offsets, rows=rows)
        return spread

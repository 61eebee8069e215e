"""How the experts and tokens of a value lie in memory: proved by moving numbered elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.interp import run_op
from moec.ir.dims import Dim, canon, evaluate, symbols
from moec.ir.graph import Graph, Op, Value

# Ops that move and repeat elements and change none.
MOVES = {"t.reshape", "t.permute", "t.expand"}
# Orders of the axes experts (0), tokens (1) and features (2), flattened in the value's own shape.
ORDERS = ((0, 1, 2), (1, 0, 2), (1, 2, 0))
_SIZES = ((3, 5), (7, 2))


@dataclass(frozen=True)
class Frame:
    """The experts and the tokens that a set of values has an axis for."""

    experts: int
    tokens: Dim
    bindings: tuple[Mapping[str, int], ...]

    def features(self, value: Value) -> int | None:
        """The number of features of a value with all experts and tokens."""
        for count in dict.fromkeys([1, *(s for s in value.type.shape if isinstance(s, int))]):
            if canon(self.experts * self.tokens * count) == value.type.elements:
                return int(count)
        return None

    def numbered(self, binding: Mapping[str, int], features: int) -> torch.Tensor:
        """A tensor ``[E, T, N]`` with a number of its own in each place."""
        tokens = evaluate(self.tokens, binding)
        return torch.arange(self.experts * tokens * features).reshape(
            self.experts, tokens, features
        )

    def laid_out(
        self, full: torch.Tensor, order: Sequence[int], value: Value, binding: Mapping[str, int]
    ) -> torch.Tensor:
        """``[E, T, N]`` in the form that a value has."""
        return full.permute(tuple(order)).reshape([evaluate(d, binding) for d in value.type.shape])


def frame_of(graph: Graph, experts: int, tokens: Dim) -> Frame:
    """The frame of a graph's values with sizes to try layouts at."""
    names = sorted({n for v in graph.inputs for d in v.type.shape for n in symbols(d)})
    bindings = tuple(
        {n: sizes[i % len(sizes)] + i // len(sizes) for i, n in enumerate(names)}
        for sizes in _SIZES
    )
    return Frame(experts, tokens, bindings)


def moved_order(frame: Frame, op: Op, order: Sequence[int]) -> tuple[int, ...] | None:
    """The order of a move's result, given that of its operand; ``None`` if it is none of these."""
    before, after = frame.features(op.operands[0]), frame.features(op.result)
    if before is None or after is None or (before != after and before != 1):
        return None
    for candidate in ORDERS:
        if all(_moves_to(frame, op, order, candidate, b, before, after) for b in frame.bindings):
            return candidate
    return None


def _moves_to(
    frame: Frame,
    op: Op,
    order: Sequence[int],
    candidate: Sequence[int],
    binding: Mapping[str, int],
    before: int,
    after: int,
) -> bool:
    full = frame.numbered(binding, before)
    (found,) = run_op(op, [frame.laid_out(full, order, op.operands[0], binding)], binding)
    wide = full.expand(-1, -1, after) if after != before else full
    return torch.equal(found, frame.laid_out(wide, candidate, op.result, binding))


def repeated_tokens(
    frame: Frame, value: Value, made: Mapping[Value, Op]
) -> tuple[Value, tuple[int, ...]] | None:
    """The tokens ``[T, N]`` that ``value`` repeats for every expert, and its order."""
    moves: list[Op] = []
    source = value
    while source in made and made[source].kind in MOVES:
        if _is_matrix(frame, source):
            break
        moves.append(made[source])
        source = made[source].operands[0]
    if not moves or not _is_matrix(frame, source):
        return None
    for order in ORDERS:
        if all(_repeats(frame, source, moves, order, b) for b in frame.bindings):
            return source, order
    return None


def _is_matrix(frame: Frame, value: Value) -> bool:
    return value.type.rank == 2 and canon(value.type.shape[0]) == frame.tokens


def _repeats(
    frame: Frame,
    source: Value,
    moves: Sequence[Op],
    order: Sequence[int],
    binding: Mapping[str, int],
) -> bool:
    features = source.type.shape[1]
    if not isinstance(features, int) or frame.features(moves[0].result) != features:
        return False
    rows = torch.arange(evaluate(frame.tokens, binding) * features).reshape(-1, features)
    found = rows
    for op in reversed(moves):
        (found,) = run_op(op, [found], binding)
    full = rows.expand(frame.experts, -1, -1)
    return torch.equal(found, frame.laid_out(full, order, moves[0].result, binding))

"""Expert choice: the order of rows where experts choose their tokens."""

from __future__ import annotations

import torch

from moec.ir.dims import Dim, canon
from moec.ir.opdef import defop
from moec.ir.types import Type
from moec.ops import routing
from moec.ops.shapes import require


@defop("moe.dispatch_picks")
class DispatchPicks:
    """The order of rows where each of ``E`` experts picks ``C`` of the ``T`` tokens: ``perm:
    i32[E*C]``, ``offsets: i32[E+1]``, ``inverse: i32[T, E]``.

    ``picks: i32[E, C]`` are token numbers, distinct for an expert. Row ``e*C + c`` is token
    ``picks[e, c]``, and ``perm`` its pair (token * E + e): a token has a place for each expert.
    ``inverse`` is -1 where an expert did not pick the token. Every row has an expert, ``C`` each.
    """

    def infer(picks: Type, *, tokens: Dim) -> tuple[Type, Type, Type]:
        require(picks.dtype == "i32" and picks.rank == 2, f"picks must be i32[E, C], got {picks}")
        experts = picks.shape[0]
        require(isinstance(experts, int), f"the number of experts of {picks} is no constant")
        rows = Type("i32", (canon(picks.elements),))
        return rows, Type("i32", (int(experts) + 1,)), Type("i32", (tokens, experts))

    def eval(picks: torch.Tensor, *, tokens: int) -> tuple[torch.Tensor, ...]:
        return routing.dispatch_picks(picks, tokens)


__all__ = ["DispatchPicks"]

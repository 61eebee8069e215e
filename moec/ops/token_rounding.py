"""Token rounding: choices moved between experts until the experts' counts fill whole tiles.

That routing should know of tiles is SonicMoE's idea: there an expert drops its
weakest tokens, or takes its best ones among those that did not choose it. Here a choice moves from
an expert with a few tokens too many to one with a few too few, so every token keeps its number of
choices, there are as many rows as before, and one change serves two experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moec.ir.opdef import defop
from moec.ir.types import Type
from moec.ops import routing
from moec.ops.shapes import require

ROUNDS = 6  # at 24,576 random tokens and 128 experts five are enough
_FAR = float("inf")


@defop("moe.round_tokens")
class RoundTokens:
    """Indices ``i32[T, K]`` some of which name other experts than before, so that as many experts
    as possible have a multiple of ``tile`` tokens; no gradient.

    ``choice: [T, E]`` is what the experts were selected by. The experts with the largest remainders
    are to have as many more as fill their last tile; the others to lose their remainder; as many go
    up as leaves the total what it is, and of what is left over (fewer than a tile) the largest
    remainders of the others stay. A choice moves from one of these to one of those if the token has
    not chosen that yet, and where ``groups`` is above 1, only within the groups of experts that the
    token uses. In each of ``rounds`` every token offers its best move, the one that loses the least
    of ``choice``; experts let go, and take, those that lose least, the first tokens among equal
    ones. What cannot be placed stays, and so do places without an expert (``E``).
    """

    def infer(idx: Type, choice: Type, *, tile: int, groups: int = 1, rounds: int = ROUNDS) -> Type:
        require(idx.dtype == "i32" and idx.rank == 2, f"idx must be i32[T, K], got {idx}")
        require(
            choice.is_float and choice.rank == 2 and choice.shape[0] == idx.shape[0],
            f"choice must be floats [T, E], got {choice} for idx {idx}",
        )
        experts = choice.shape[1]
        require(isinstance(experts, int), f"the number of experts of {choice} is no constant")
        require(tile >= 1 and rounds >= 0, f"a tile of {tile} rows, {rounds} rounds")
        require(groups >= 1 and int(experts) % groups == 0, f"{groups} groups of {experts} experts")
        return idx

    def eval(
        idx: torch.Tensor,
        choice: torch.Tensor,
        *,
        tile: int,
        groups: int = 1,
        rounds: int = ROUNDS,
    ) -> torch.Tensor:
        return round_tokens(idx, choice, tile, groups, rounds)


def round_tokens(
    idx: torch.Tensor, choice: torch.Tensor, tile: int, groups: int, rounds: int
) -> torch.Tensor:
    """The meaning of ``moe.round_tokens``; sizes do not depend on data, nothing waits."""
    experts = choice.shape[1]
    index = torch.where((idx < 0) | (idx > experts), experts, idx).long()
    give, need = shares(_counts(index, experts), tile)
    scores = F.pad(routing.accurate(choice), (0, 1), value=-_FAR)  # the last: of no expert
    for _ in range(rounds):
        place, target, loss = _moves(index, scores, give, need, groups)
        source = index.gather(1, place)
        order = loss.argsort(stable=True)
        leaves = (loss < _FAR) & _first(
            torch.where(loss < _FAR, source[:, 0], experts), order, give
        )
        moved = leaves & _first(torch.where(leaves, target, experts), order, need)
        index.scatter_(1, place, torch.where(moved, target, source[:, 0]).unsqueeze(1))
        give = give - _counts(torch.where(moved, source[:, 0], experts), experts)
        need = need - _counts(torch.where(moved, target, experts), experts)
    return index.int()


def _counts(index: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each of ``experts + 1`` numbers occurs; that of no expert counts as 0."""
    flat = index.reshape(-1)
    zeros = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
    counts = zeros.scatter_add_(0, flat, torch.ones_like(flat))
    counts[experts:] = 0
    return counts


def shares(counts: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens each expert is to give and to take, ``[E + 1]`` each, of equal sums."""
    rest = counts % tile
    order = rest.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    total = rest.sum()
    is_up = rank < total // tile
    need = torch.where(is_up, tile - rest, 0)
    others = torch.where(is_up, 0, rest)[order]
    before = others.cumsum(0) - others
    stays = (total % tile - before).clamp(min=0).minimum(others)
    return torch.where(is_up, 0, rest - stays[rank]), need


def _moves(
    index: torch.Tensor, scores: torch.Tensor, give: torch.Tensor, need: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's best move: the place ``[T, 1]``, the expert ``[T]`` and the loss ``[T]``."""
    held = scores.gather(1, index).masked_fill(give[index] <= 0, _FAR)
    place = held.argmin(1, keepdim=True)
    taken = scores.masked_fill(need <= 0, -_FAR).scatter_(1, index, -_FAR)
    if groups > 1:
        taken.masked_fill_(~_in_groups(index, scores.shape[1] - 1, groups), -_FAR)
    target = taken.argmax(1, keepdim=True)
    loss = held.gather(1, place) - taken.gather(1, target)
    return place, target.squeeze(1), loss.squeeze(1)


def _in_groups(index: torch.Tensor, experts: int, groups: int) -> torch.Tensor:
    """Which experts ``[T, E + 1]`` are in a group that the token uses."""
    size = experts // groups
    used = torch.zeros(len(index), groups + 1, dtype=torch.bool, device=index.device)
    used.scatter_(1, index // size, True)
    return F.pad(used[:, :groups].repeat_interleave(size, 1), (0, 1))


def _first(group: torch.Tensor, order: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """Which tokens are among the first ``quota`` of their group, in an order of all tokens."""
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    size = torch.zeros_like(quota).scatter_add_(0, group, torch.ones_like(group))
    rank = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[ordered]
    found = torch.empty(len(order), dtype=torch.bool, device=order.device)
    return found.scatter_(0, order, rank < quota[ordered])


__all__ = ["ROUNDS", "RoundTokens", "round_tokens", "shares"]

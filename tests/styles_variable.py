"""Blocks in which the number of a token's experts, or of an expert's tokens, follows from data."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, WIDTH, EXPERTS = 16, 24, 4
Tensor = torch.Tensor


class Mlp(nn.Module):
    """One expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.up(x)))


class Listed(nn.Module):
    """A router and a list of experts."""

    choices = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Mlp() for _ in range(EXPERTS)])

    def loop(self, x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
        """The sum over experts of a weight for each place where ``chosen`` names it."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * w[token, place, None])
        return out


class Stacked(nn.Module):
    """A router and stacked two-layer experts."""

    choices = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)
        self.b1 = nn.Parameter(torch.randn(EXPERTS, 1, WIDTH) / 4)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)

    def ffn(self, x: Tensor) -> Tensor:
        """Rows by expert, ``[E, C, H]``."""
        return torch.bmm(F.gelu(torch.bmm(x, self.w1) + self.b1), self.w2)


# as many experts as are good enough


class MarginMask(Listed):
    """A mask of the choices close to the best, read by the loop; weights over those kept."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(flat).softmax(-1).topk(self.choices, dim=-1)
        keep = values >= values[:, :1] - 0.1
        w = values * keep
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where((chosen == number) & keep)
            out.index_add_(0, token, expert(flat[token]) * w[token, place, None])
        return out.view(x.shape)


class MarginSentinel(Listed):
    """Choices too far from the best become "no expert"; weights are a softmax of those kept."""

    choices = 3

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        logits, chosen = self.gate(flat).topk(self.choices, dim=-1)
        drop = logits[:, :1] - logits > 0.3
        w = logits.masked_fill(drop, -math.inf).softmax(-1)
        return self.loop(flat, w, chosen.masked_fill(drop, EXPERTS)).view(x.shape)


class OneOrTwo(Listed):
    """A second expert only where the two best are close: two masks an expert."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        two = (values[:, 0] - values[:, 1]) <= 0.1
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            first = chosen[:, 0] == number
            second = (chosen[:, 1] == number) & two
            out[first] += expert(flat[first]) * values[first, 0, None]
            out[second] += expert(flat[second]) * values[second, 1, None]
        return out.view(x.shape)


class MarginOfAll(Listed):
    """All experts close to the best, without a top-k."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        p = self.gate(flat).softmax(-1)
        mask = p >= p.max(dim=-1, keepdim=True).values - 0.1
        w = p * mask
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = mask[:, number].nonzero().squeeze(-1)
            out.index_add_(0, token, expert(flat[token]) * w[token, number, None])
        return out.view(x.shape)


class Threshold(Listed):
    """All experts above a score; tokens may have none."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        p = self.gate(flat).softmax(-1)
        mask = p > 0.3
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where(mask[:, number])[0]
            out.index_add_(0, token, expert(flat[token]) * p[token, number, None])
        return out.view(x.shape)


class TopP(Listed):
    """The best experts up to a sum of probabilities."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        values, chosen = torch.sort(self.gate(flat).softmax(-1), dim=-1, descending=True)
        keep = values.cumsum(-1) - values < 0.6
        w = values * keep
        w = w / w.sum(-1, keepdim=True)
        return self.loop(flat, w, torch.where(keep, chosen, EXPERTS)).view(x.shape)


class TopPShifted(Listed):
    """As sampling code writes it: the mask moved by one, and scattered back."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        p = self.gate(flat).softmax(-1)
        values, order = torch.sort(p, dim=-1, descending=True)
        mask = values.cumsum(-1) > 0.6
        mask[:, 1:] = mask[:, :-1].clone()
        mask[:, 0] = False
        w = p.masked_fill(mask.scatter(1, order, mask), 0.0)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where(w[:, number] > 0)[0]
            out.index_add_(0, token, expert(flat[token]) * w[token, number, None])
        return out.view(x.shape)


class MarginEinsum(Stacked):
    """Every expert on every token; gates that are zero for choices too far from the best."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        p = self.gate(flat).softmax(-1)
        values, chosen = p.topk(self.choices, -1)
        w = values * (values >= values[:, :1] - 0.1)
        gates = torch.zeros_like(p).scatter(1, chosen, w / w.sum(-1, keepdim=True))
        outputs = self.ffn(flat.expand(EXPERTS, -1, -1))
        return torch.einsum("te,eth->th", gates, outputs).view(x.shape)


# no more tokens than an expert takes


class SwitchMask(Listed):
    """Top-1; a mask by expert that the loop reads."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = math.ceil(1.25 * flat.shape[0] / EXPERTS)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        mask = F.one_hot(chosen, EXPERTS)
        mask = mask * (mask.cumsum(0) <= capacity)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = mask[:, number].nonzero().squeeze(-1)
            out[token] = expert(flat[token]) * weight[token, None]
        return out.view(x.shape)


class SwitchKept(Listed):
    """Top-1; the place in the expert is compared with a capacity of at least one token."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = max(int(1.25 * flat.shape[0] / EXPERTS), 1)
        p = self.gate(flat).softmax(-1)
        chosen = p.argmax(-1)
        mask = F.one_hot(chosen, EXPERTS)
        kept = (mask.cumsum(0) * mask).sum(-1) <= capacity
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where((chosen == number) & kept)[0]
            out[token] = expert(flat[token]) * p[token, number, None]
        return out.view(x.shape)


class TokenMajor(Listed):
    """Top-2, places token by token."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = math.ceil(1.25 * self.choices * flat.shape[0] / EXPERTS)
        values, chosen = self.gate(flat).softmax(-1).topk(self.choices, -1)
        w = values / values.sum(-1, keepdim=True)
        hot = F.one_hot(chosen.reshape(-1), EXPERTS)
        place = (hot.cumsum(0) - 1).gather(1, chosen.reshape(-1, 1)).view(chosen.shape)
        keep = place < capacity
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where((chosen == number) & keep)
            out.index_add_(0, token, expert(flat[token]) * w[token, choice, None])
        return out.view(x.shape)


class ChoiceMajor(Listed):
    """Top-2, first choices before second ones; weights over those kept."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = -(-5 * self.choices * flat.shape[0] // (4 * EXPERTS))
        values, chosen = self.gate(flat).softmax(-1).topk(self.choices, -1)
        hot = F.one_hot(chosen.t().reshape(-1), EXPERTS)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1).view(self.choices, -1).t()
        w = values * (place < capacity)
        w = w / w.sum(-1, keepdim=True).clamp(min=1e-9)
        return self.loop(flat, w, chosen.masked_fill(place >= capacity, EXPERTS)).view(x.shape)


class BestFirst(Listed):
    """Top-1, the surest tokens first."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = math.ceil(1.25 * flat.shape[0] / EXPERTS)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        order = weight.argsort(descending=True, stable=True)
        hot = F.one_hot(chosen[order], EXPERTS)
        place = (hot.cumsum(0) * hot).sum(-1)
        kept = torch.zeros_like(place).scatter(0, order, (place <= capacity).long())
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where((chosen == number) & (kept > 0))[0]
            out[token] = expert(flat[token]) * weight[token, None]
        return out.view(x.shape)


class Slots(Stacked):
    """Top-1; tokens added to slots of a buffer, whose last row takes what is dropped."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = math.ceil(1.25 * flat.shape[0] / EXPERTS)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        hot = F.one_hot(chosen, EXPERTS)
        place = (hot.cumsum(0) * hot).sum(-1) - 1
        slot = torch.where(place < capacity, chosen * capacity + place, EXPERTS * capacity)
        buffer = flat.new_zeros(EXPERTS * capacity + 1, HIDDEN).index_add(0, slot, flat)
        rows = self.ffn(buffer[:-1].view(EXPERTS, capacity, HIDDEN)).reshape(-1, HIDDEN)
        rows = torch.cat([rows, rows.new_zeros(1, HIDDEN)])
        return (rows[slot] * weight[:, None]).view(x.shape)


class Contract(nn.Module):
    """Stacked experts in a module of their own, called with tokens, indices and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)

    def forward(self, x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, place = torch.where(chosen == number)
            if token.numel() == 0:
                continue
            rows = F.linear(F.silu(F.linear(x[token], self.w1[number])), self.w2[number])
            out.index_add_(0, token, rows * w[token, place, None])
        return out


class CapacityAroundContract(nn.Module):
    """A capacity in the block around such experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), Contract()

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        capacity = max(math.ceil(1.25 * 2 * flat.shape[0] / EXPERTS), 4)
        values, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        hot = F.one_hot(chosen.t().reshape(-1), EXPERTS)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1).view(2, -1).t()
        drop = place >= capacity
        w = values.masked_fill(drop, 0.0)
        return self.experts(flat, chosen.masked_fill(drop, EXPERTS), w).view(x.shape)


# experts that choose their tokens


class ChoiceByLoop(Listed):
    """Columns of a top-k over the tokens, in a loop."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        values, picks = self.gate(flat).softmax(-1).topk(math.ceil(2 * len(flat) / EXPERTS), dim=0)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = picks[:, number]
            out.index_add_(0, token, expert(flat[token]) * values[:, number, None])
        return out.view(x.shape)


class ChoiceInPlace(Listed):
    """As many tokens as there are at most, added at their index."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        count = min(max(1, int(2 * flat.shape[0] / EXPERTS)), flat.shape[0])
        values, picks = torch.topk(self.gate(flat).softmax(-1).t(), k=count, dim=1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = expert(flat[picks[number]])
            out[picks[number]] += values[number].unsqueeze(-1) * rows
        return out.view(x.shape)


class ChoiceStacked(Stacked):
    """Gathered rows, products of all experts, and one addition."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        count = math.ceil(2 * flat.shape[0] / EXPERTS)
        values, picks = torch.topk(self.gate(flat).softmax(-1).t(), count, dim=-1)
        rows = self.ffn(flat[picks]) * values.unsqueeze(-1)
        out = torch.zeros_like(flat).index_add(0, picks.reshape(-1), rows.reshape(-1, HIDDEN))
        return out.view(x.shape)


class ChoiceScattered(Stacked):
    """The same by gather and scatter_add of whole rows, from a top-k along the first axis."""

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        count = math.ceil(2 * flat.shape[0] / EXPERTS)
        values, picks = torch.topk(self.gate(flat).softmax(-1), count, dim=0)
        place = picks.t().reshape(-1, 1).expand(-1, HIDDEN)
        rows = self.ffn(torch.gather(flat, 0, place).view(EXPERTS, count, HIDDEN))
        rows = rows * values.t().unsqueeze(-1)
        return torch.zeros_like(flat).scatter_add(0, place, rows.reshape(-1, HIDDEN)).view(x.shape)


class ChoiceBySequence(Stacked):
    """Experts choose among the tokens of each sequence."""

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        count = math.ceil(2 * length / EXPERTS)
        values, picks = torch.topk(self.gate(x).softmax(-1).transpose(1, 2), count, dim=-1)
        place = picks.unsqueeze(-1).expand(-1, -1, -1, HIDDEN)
        rows = torch.gather(x.unsqueeze(1).expand(-1, EXPERTS, -1, -1), 2, place)
        hidden = F.gelu(torch.einsum("bech,ehf->becf", rows, self.w1))
        rows = torch.einsum("becf,efh->bech", hidden, self.w2) * values.unsqueeze(-1)
        place = picks.reshape(batch, -1, 1).expand(-1, -1, HIDDEN)
        return torch.zeros_like(x).scatter_add(1, place, rows.reshape(batch, -1, HIDDEN))


# style -> what its router becomes: ops of the raised graph that no other may stand for
STYLES: dict[type[nn.Module], set[str]] = {
    MarginMask: {"moe.select"},
    MarginSentinel: {"moe.select"},
    OneOrTwo: {"moe.select"},
    MarginOfAll: {"t.arange"},
    Threshold: {"t.arange"},
    TopP: {"moe.select"},
    TopPShifted: {"t.sort"},
    MarginEinsum: {"moe.select"},
    SwitchMask: {"moe.select", "moe.limit"},
    SwitchKept: {"moe.select", "moe.limit"},
    TokenMajor: {"moe.select", "moe.limit"},
    ChoiceMajor: {"moe.select", "moe.limit"},
    BestFirst: {"moe.select", "t.sort"},
    CapacityAroundContract: {"moe.select", "moe.limit"},
    Slots: {"t.index_add"},
    ChoiceByLoop: {"moe.dispatch_picks"},
    ChoiceInPlace: {"moe.dispatch_picks"},
    ChoiceStacked: {"moe.dispatch_picks"},
    ChoiceScattered: {"moe.dispatch_picks"},
    ChoiceBySequence: {"t.scatter_add"},
}

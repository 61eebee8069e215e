"""Blocks without a loop over chosen experts, as users write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, WIDTH, EXPERTS = 16, 24, 4


def stacked(*shape: int) -> nn.Parameter:
    """A weight of unit scale for products over its second axis."""
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-2]))


class Stacked(nn.Module):
    """A gate and stacked two-layer experts."""

    def __init__(self, choices: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1, self.w2 = stacked(EXPERTS, HIDDEN, WIDTH), stacked(EXPERTS, WIDTH, HIDDEN)
        self.choices = choices

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        """Rows by expert, ``[E, C, H]``."""
        return torch.bmm(F.gelu(torch.bmm(x, self.w1)), self.w2)


class SwitchCapacity(Stacked):
    """Top-1 by einsum over one-hot slots; tokens beyond an expert's capacity are dropped."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        scores = F.softmax(self.gate(tokens), dim=-1)
        capacity = max(math.ceil(tokens.shape[0] * 1.25 / EXPERTS), 2)
        value, chosen = scores.max(dim=-1)
        mask = F.one_hot(chosen, EXPERTS)
        place = (torch.cumsum(mask, dim=0) - 1) * mask
        mask = mask * (place < capacity)
        slots = F.one_hot((place * mask).sum(-1), capacity).to(x.dtype)
        combine = value[:, None, None] * mask[:, :, None].to(x.dtype) * slots[:, None, :]
        sorted_tokens = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), tokens)
        return torch.einsum("sec,ecm->sm", combine, self.experts(sorted_tokens)).view_as(x)


class GShardTopTwo(Stacked):
    """Top-2 by einsum, second choices after all first ones, weights renormalised."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        tokens = x.reshape(batch * length, HIDDEN)
        scores = self.gate(tokens).softmax(dim=1)
        capacity = max(4, 2 * batch * length // EXPERTS)
        first = F.one_hot(scores.argmax(dim=1), num_classes=EXPERTS)
        without = scores.masked_fill(first.bool(), float("-inf"))
        second = F.one_hot(without.argmax(dim=1), num_classes=EXPERTS)
        place_one = torch.cumsum(first, dim=0) - 1
        place_two = torch.cumsum(second, dim=0) - 1 + first.sum(dim=0, keepdim=True)
        first, second = first * (place_one < capacity), second * (place_two < capacity)
        weight_one = torch.einsum("se,se->s", scores, first.float())
        weight_two = torch.einsum("se,se->s", scores, second.float())
        total = (weight_one + weight_two).clamp(min=1e-9)
        combine: Any = sum(
            torch.einsum(
                "s,se,sc->sec",
                weight / total,
                mask.float(),
                F.one_hot((place * mask).sum(dim=1), num_classes=capacity).float(),
            )
            for weight, mask, place in (
                (weight_one, first, place_one),
                (weight_two, second, place_two),
            )
        )
        inside = torch.einsum("sec,sm->ecm", torch.gt(combine, 0).float(), tokens)
        return torch.einsum("sec,ecm->sm", combine, self.experts(inside)).reshape(x.shape)


class DenseGate(Stacked):
    """Every expert on every token, weighted by all scores."""

    def forward(self, x: torch.Tensor) -> Any:
        hidden = F.silu(torch.einsum("bsh,ehf->bsef", x, self.w1))
        outputs = torch.einsum("bsef,efh->bseh", hidden, self.w2)
        return (self.gate(x).softmax(-1).unsqueeze(-1) * outputs).sum(dim=2)


class ScatteredGate(Stacked):
    """Every expert on every token, weights zero for those not chosen."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(tokens).topk(self.choices, dim=-1)
        weights = torch.zeros_like(self.gate(tokens)).scatter(-1, chosen, values.softmax(-1))
        everywhere = tokens.expand(EXPERTS, -1, -1)
        outputs = self.experts(everywhere)
        return torch.einsum("te,eth->th", weights, outputs).view_as(x)


class WeightedInputs(nn.Module):
    """Every expert on every token, weighted before the expert; the weight is a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1, self.w3 = (stacked(EXPERTS, HIDDEN, WIDTH) for _ in range(2))
        self.w2 = stacked(EXPERTS, WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        logits = self.gate(tokens)
        values, chosen = torch.topk(logits, 2, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, values).sigmoid()
        inside = tokens.repeat(EXPERTS, 1) * scores.t().reshape(-1, 1)
        inside = inside.view(EXPERTS, -1, HIDDEN)
        outputs = (F.silu(inside @ self.w1) * (inside @ self.w3)) @ self.w2
        return outputs.sum(dim=0).view_as(x), logits


class GatheredWeights(Stacked):
    """Each token's own weights, gathered by index."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(tokens).softmax(-1).topk(self.choices, dim=-1)
        hidden = F.relu(torch.einsum("th,tkhf->tkf", tokens, self.w1[chosen]))
        outputs = torch.einsum("tkf,tkfh->tkh", hidden, self.w2[chosen])
        return torch.einsum("tk,tkh->th", values, outputs).view_as(x)


class SoftMixture(nn.Module):
    """All experts of a list, stacked and averaged by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, HIDDEN))
            for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> Any:
        weights = torch.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return torch.matmul(outputs, weights.unsqueeze(-1)).squeeze(-1)


class MergedWeights(nn.Module):
    """One layer a sequence, its weights averaged by what the router makes of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.weight, self.bias = stacked(EXPERTS, HIDDEN, HIDDEN), stacked(EXPERTS, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.router(x.mean(dim=1)).softmax(dim=-1)
        weight = torch.einsum("be,eij->bij", scores, self.weight)
        return torch.baddbmm((scores @ self.bias).unsqueeze(1), x, weight)


class LoraExperts(nn.Module):
    """A frozen layer and low-rank experts beside it, mixed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.lora_a, self.lora_b = stacked(EXPERTS, HIDDEN, 3), stacked(EXPERTS, 3, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.router(x).softmax(dim=-1)
        low = torch.einsum("...h,ehr->...er", x, self.lora_a)
        return self.base(x) + 2.0 * torch.einsum("...er,erh,...e->...h", low, self.lora_b, scores)


class SoftSlots(nn.Module):
    """Slots that are averages of all tokens, and tokens that are averages of all slots."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(HIDDEN, EXPERTS, slots))
        self.scale = nn.Parameter(torch.ones(()))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Linear(WIDTH, HIDDEN))
            for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> Any:
        phi = self.scale * F.normalize(self.phi, dim=0)
        logits = torch.einsum("bsd,dep->bsep", F.normalize(x, dim=-1), phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bsep,bsd->bepd", dispatch, x)
        outputs = torch.stack([f(slots[:, e]) for e, f in enumerate(self.experts)], dim=1)
        return torch.einsum("bsep,bepd->bsd", combine, outputs)


class ExpertChoice(Stacked):
    """Every expert takes its best tokens, as many as its share of all."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        count = tokens.shape[0]
        capacity = min(count, max(1, 2 * count // EXPERTS))
        scores = self.gate(tokens).softmax(dim=-1)
        values, chosen = torch.topk(scores.t(), capacity, dim=-1)
        outputs = self.experts(tokens[chosen]) * values.unsqueeze(-1)
        out = torch.zeros_like(tokens)
        out = out.index_add(0, chosen.reshape(-1), outputs.reshape(-1, HIDDEN))
        return out.view_as(x)


class ProductKeys(nn.Module):
    """A memory of values found by the best pairs of two sets of keys, with two heads."""

    def __init__(self, keys: int = 6, heads: int = 2, best: int = 3) -> None:
        super().__init__()
        self.heads, self.best, self.count = heads, best, keys
        self.query = nn.Linear(HIDDEN, heads * 2 * 8)
        self.keys = nn.Parameter(torch.randn(heads, 2, keys, 8) / 2)
        self.values = nn.Embedding(keys * keys, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        query = self.query(x).view(-1, self.heads, 2, 8)
        scores = torch.einsum("thpd,hpkd->pthk", query, self.keys)
        values, places = scores.topk(self.best, dim=-1)
        pairs = (values[0].unsqueeze(-1) + values[1].unsqueeze(-2)).flatten(-2)
        index = (places[0].unsqueeze(-1) * self.count + places[1].unsqueeze(-2)).flatten(-2)
        top, where = pairs.topk(self.best, dim=-1)
        rows = self.values(index.gather(-1, where))
        return (top.softmax(-1).unsqueeze(-1) * rows).sum(dim=(1, 2)).view_as(x)


class MaskedDense(nn.Module):
    """Every expert on every token; a mask keeps the outputs of those chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = torch.where(chosen == number, weights, 0.0).sum(dim=-1, keepdim=True)
            out = out + torch.where(weight > 0, expert(x) * weight, torch.zeros_like(x))
        return out


class SplitByCounts(nn.Module):
    """Rows sorted by expert, split by their numbers, one product an expert, joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(tokens).topk(2, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen, EXPERTS).sum(dim=(0, 1)).tolist()
        rows = torch.split(tokens[order // 2], counts)
        joined = torch.cat(
            [
                F.relu(F.linear(r, self.up[e], self.bias[e])) @ self.down[e].t()
                for e, r in enumerate(rows)
            ]
        )
        weighted = joined * values.softmax(-1).flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, order // 2, weighted).view_as(x)


class ByTask(nn.Module):
    """The expert is an argument: the number of a sequence's task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(HIDDEN, HIDDEN)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> Any:
        shared = torch.relu(self.shared(x))
        out = torch.zeros_like(shared)
        for number, expert in enumerate(self.experts):
            out = out + expert(shared) * (task == number).view(-1, 1, 1)
        return out


class IntCapacity(Stacked):
    """Slots for a share of the tokens, rounded down by ``int``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        capacity = max(int(self.factor * tokens.shape[0] / EXPERTS), 1)
        scores = self.gate(tokens).softmax(dim=-1)
        values, chosen = scores.t().topk(capacity, dim=-1)
        picks = F.one_hot(chosen, num_classes=tokens.shape[0]).to(x.dtype)
        inside = torch.einsum("ect,th->ech", picks, tokens)
        outputs = self.experts(inside)
        return torch.einsum("ect,ec,ech->th", picks, values, outputs).view_as(x)


class ByNumbers(nn.Module):
    """A stacked layer called with sorted rows and how many belong to each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)

    def forward(self, rows: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        parts: Any = torch.split(rows, numbers)
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(parts)])


class Shared(nn.Module):
    """Two layers around work of the block's own that share one routing, in methods."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.first, self.last = ByNumbers(), ByNumbers()

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.reshape(-1, HIDDEN)
        value, chosen = self.gate(tokens).softmax(-1).max(dim=-1)
        order = chosen.argsort()
        numbers = torch.bincount(chosen, minlength=EXPERTS).tolist()
        rows = self.last(torch.tanh(self.first(tokens[order], numbers)), numbers)
        out = torch.empty_like(tokens).index_copy(0, order, rows * value[order].unsqueeze(-1))
        return out.view_as(x)


class HeadWeights(nn.Module):
    """No MoE: attention with a weight for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (stacked(EXPERTS, HIDDEN, 8) for _ in range(3))
        self.out = nn.Linear(EXPERTS * 8, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        query, key, value = (
            torch.einsum("bsh,ehd->besd", x, w) for w in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


STYLES: list[type[nn.Module]] = [
    SwitchCapacity,
    GShardTopTwo,
    DenseGate,
    ScatteredGate,
    WeightedInputs,
    GatheredWeights,
    SoftMixture,
    MergedWeights,
    LoraExperts,
    SoftSlots,
    ExpertChoice,
    ProductKeys,
    MaskedDense,
    SplitByCounts,
]

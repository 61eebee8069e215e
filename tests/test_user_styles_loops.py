"""MoE layers in the styles that people write: each is compiled whole and equal to its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

import moec
from moec.api import regions

HIDDEN, INNER, EXPERTS = 16, 24, 6
LENGTHS = ((2, 7), (1, 1), (3, 33), (1, 2))


class Mlp(nn.Module):
    """Two layers with biases and a dropout that never drops."""

    def __init__(self, inner: int = INNER, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, inner), nn.Linear(inner, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.dropout(F.gelu(self.up(x))))


class Glu(nn.Module):
    """A gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.out = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


def relu_sequence() -> nn.Module:
    """An expert that is a sequence."""
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, HIDDEN))


class Routed(nn.Module):
    """A router, a list of experts and two choices."""

    expert: Any = Mlp
    choices = 2
    experts: Any

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([self.expert() for _ in range(EXPERTS)])

    def route(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = self.gate(flat).softmax(-1).topk(self.choices, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen


class MaskAndIndexAdd(Routed):
    """A boolean mask over all choices of a token, its weights summed."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for number in range(EXPERTS):
            mask = chosen == number
            token = mask.any(dim=-1).nonzero().flatten()
            weight = (weights * mask).sum(dim=-1)[token]
            out.index_add_(0, token, self.experts[number](flat[token]) * weight[:, None])
        return out.view(x.shape)


class WhereAssign(Routed):
    """Places by where, rows added by an assignment."""

    expert = Glu

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.view(-1, x.size(-1))
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out[token] += weights[token, place].unsqueeze(-1) * expert(flat[token])
        return out.view_as(x)


class MaskAny(Routed):
    """Top-1; experts without tokens are skipped."""

    expert = staticmethod(relu_sequence)

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.gate(x).sigmoid()
        weight, chosen = scores.max(dim=-1)
        out = torch.zeros_like(x)
        for number in range(EXPERTS):
            mask = chosen == number
            if mask.any():
                out[mask] = self.experts[number](x[mask]) * weight[mask].unsqueeze(-1)
        return out


class TokenByToken(Routed):
    """A Python loop over tokens and their choices."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        rows = []
        for token in range(flat.shape[0]):
            total = torch.zeros_like(flat[token])
            for place in range(self.choices):
                expert = self.experts[int(chosen[token, place])]
                total = total + weights[token, place] * expert(flat[token])
            rows.append(total)
        return torch.stack(rows).view(x.shape)


class TokenByTokenInPlace(Routed):
    """As above, adding into the rows of a result."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for token in range(flat.shape[0]):
            for place in range(self.choices):
                expert = self.experts[chosen[token, place].item()]
                out[token] += weights[token, place] * expert(flat[token : token + 1])[0]
        return out.view(x.shape)


class ChoiceByChoice(Routed):
    """A loop over the choices, then over the experts."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for place in range(self.choices):
            for number, expert in enumerate(self.experts):
                token = (chosen[:, place] == number).nonzero(as_tuple=True)[0]
                if len(token) == 0:
                    continue
                out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


class SortedSplit(Routed):
    """Tokens sorted by expert, split by counts, put back by the inverse order."""

    expert = Glu

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        parts = torch.split(flat[order // self.choices], counts)
        done = torch.cat([e(part) for e, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(-1, self.choices, HIDDEN) * weights.unsqueeze(-1)).sum(1).view(x.shape)


class SortedSlices(Routed):
    """The sorted tokens in slices from one running count to the next; results scattered."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        order = chosen.view(-1).argsort()
        ends = chosen.view(-1).bincount(minlength=EXPERTS).cumsum(0).tolist()
        tokens = order // self.choices
        out = torch.zeros_like(flat)
        start = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if start == end:
                continue
            token = tokens[start:end]
            rows = expert(flat[token]) * weights.view(-1, 1)[order[start:end]]
            out = out.scatter_add(0, token[:, None].expand(-1, HIDDEN), rows)
            start = end
        return out.view(x.shape)


class Dispatcher(Routed):
    """The gates of all experts, mostly zero; tokens by the places that are not."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        values, chosen = self.gate(flat).topk(self.choices, dim=1)
        gates = torch.zeros(flat.shape[0], EXPERTS).scatter(1, chosen, values.softmax(1))
        places, order = gates.nonzero().sort(dim=0)
        _, expert_index = torch.split(places, 1, dim=1)
        token = gates.nonzero()[order[:, 1], 0]
        sizes = (gates > 0).sum(0).tolist()
        kept = gates[token].gather(1, expert_index)
        parts = torch.split(flat[token], sizes, dim=0)
        done = torch.cat([self.experts[e](parts[e]) for e in range(EXPERTS)], 0) * kept
        return torch.zeros_like(flat).index_add(0, token, done).view(x.shape)


class EveryExpert(Routed):
    """A soft mixture: all experts on all tokens."""

    def forward(self, x: torch.Tensor) -> Any:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)


class ThresholdGates(Routed):
    """Scores below the k-th largest are set to zero; every expert on every token."""

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.gate(x).softmax(-1)
        least = scores.topk(self.choices, dim=-1).values[..., -1:]
        gates = scores * (scores >= least)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return torch.einsum("bse,bseh->bsh", gates, outputs)


class Stacked(nn.Module):
    """A loop over stacked weights in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number in range(EXPERTS):
            token, place = torch.where(chosen == number)
            inner = F.silu(F.linear(flat[token], self.up[number]))
            rows = F.linear(inner, self.down[number])
            out.index_add_(0, token, rows * weights[token, place, None])
        return out.view(x.shape)


class Capacity(Routed):
    """Top-1; tokens beyond an expert's capacity keep their own value."""

    limit = 4

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        mask = F.one_hot(chosen, EXPERTS)
        mask = mask * (mask.cumsum(0) <= self.limit)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = mask[:, number].nonzero().squeeze(-1)
            out[token] = expert(flat[token]) * weight[token, None]
        kept = mask.sum(-1, keepdim=True).bool()
        return torch.where(kept, out, flat).view(x.shape)


class LargeCapacity(Capacity):
    """A limit that no trial reaches."""

    limit = 1000


class PositionInExpert(Routed):
    """Top-2 with capacity, dropped choices marked in the indices."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        hot = F.one_hot(chosen.t().reshape(-1), EXPERTS)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1).view(self.choices, -1).t()
        keep = place < 5
        chosen = chosen.masked_fill(~keep, -1)
        weights = weights * keep
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, choice, None])
        return out.view(x.shape)


class ByPosition(Routed):
    """Token number modulo the number of experts: no router at all."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        chosen = torch.arange(flat.shape[0], device=x.device) % EXPERTS
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = (chosen == number).nonzero().flatten()
            out[token] = expert(flat[token])
        return out.view(x.shape)


class ByTable(Routed):
    """A fixed table of buckets: the bucket is found from signs of a projection."""

    table: torch.Tensor
    planes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        del self.gate
        self.register_buffer("table", torch.randint(EXPERTS, (16,)))
        self.register_buffer("planes", torch.randn(HIDDEN, 4))

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        bits = (flat @ self.planes > 0).long()
        bucket = bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2] + 8 * bits[:, 3]
        chosen = self.table[bucket]
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where(chosen == number)[0]
            out[token] = expert(flat[token])
        return out.view(x.shape)


class Container(nn.Module):
    """Holds a router and experts, and has no code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([relu_sequence() for _ in range(EXPERTS)])


class Nested(nn.Module):
    """The experts are in a container inside."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Container()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        flat = self.norm(x).reshape(-1, HIDDEN)
        weights, chosen = self.moe.router(flat).topk(2, dim=-1)
        weights = weights.softmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.moe.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return x + out.view(x.shape)


class ManyWidths(Routed):
    """Experts of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Mlp(8 * (1 + e % 3)) for e in range(EXPERTS)])

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


class Zero(nn.Module):
    """An expert that gives nothing."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.zeros_like(x)


class Constant(nn.Module):
    """An expert that mixes a vector of its own into the token."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(HIDDEN))
        self.mix = nn.Linear(HIDDEN, 2, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        part = self.mix(x).softmax(-1)
        return part[:, :1] * x + part[:, 1:] * self.vector


class CheapExperts(ManyWidths):
    """Three experts, then the token itself, nothing, and two with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 7)
        self.experts = nn.ModuleList(
            [Mlp(), Mlp(), Mlp(), nn.Identity(), Zero(), Constant(), Constant()]
        )


class MaskedExperts(nn.ModuleList):
    """A list that is called with the tokens, a mask of the experts and the gates."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, gates: torch.Tensor) -> Any:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token = mask[:, number].nonzero(as_tuple=True)[0]
            out.index_add_(0, token, expert(x[token]) * gates[token, number, None])
        return out


class CalledWithMask(nn.Module):
    """Experts in a module of their own, called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = MaskedExperts([Mlp() for _ in range(EXPERTS)])

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        scores = self.gate(flat).softmax(-1)
        mask = F.one_hot(scores.topk(2, dim=-1).indices, EXPERTS).sum(1)
        return self.experts(flat, mask, scores * mask).view(x.shape)


class FlatExperts(nn.Module):
    """All experts' weights in one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.width = EXPERTS, INNER
        self.rise = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * 0.2)
        self.fall = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * 0.2)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Any:
        out = torch.zeros_like(x)
        for number in range(self.count):
            token, place = torch.where(chosen == number)
            if token.numel() == 0:
                continue
            rise = self.rise.view(self.count, self.width, HIDDEN)[number]
            fall = self.fall.view(self.count, self.width, HIDDEN)[number]
            rows = F.relu(x[token] @ rise.t()) @ fall
            out.index_add_(0, token, rows * weights[token, place, None])
        return out


class FlatWeights(nn.Module):
    """A block around such experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS), FlatExperts()

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        return self.experts(flat, chosen, weights).view(x.shape)


class RemembersDtype(MaskAny):
    """Leaves plain values on itself."""

    def forward(self, x: torch.Tensor) -> Any:
        self.last_dtype, self.calls_have = x.dtype, "tokens"
        self.gate = self.gate.to(x.dtype)
        return super().forward(x)


class Net(nn.Module):
    """Two such layers in a residual network."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


def values(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = net(x)
    loss = (out * torch.arange(out.numel()).view_as(out).cos()).sum()
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [out, *found]


def assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(tree_flatten(ours)[0], tree_flatten(theirs)[0], strict=True):
        scale = max(1.0, other.detach().abs().max().item())
        torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance * scale)


STYLES = [
    MaskAndIndexAdd,
    WhereAssign,
    MaskAny,
    TokenByToken,
    TokenByTokenInPlace,
    ChoiceByChoice,
    SortedSplit,
    SortedSlices,
    Dispatcher,
    EveryExpert,
    ThresholdGates,
    Stacked,
    Capacity,
    LargeCapacity,
    PositionInExpert,
    ByPosition,
    ByTable,
    Nested,
    ManyWidths,
    CheapExperts,
    CalledWithMask,
    FlatWeights,
    RemembersDtype,
]


@pytest.mark.parametrize("block", STYLES)
def test_compiled_and_equal_to_its_own_code(block: Any) -> None:
    torch.manual_seed(3)
    net = Net(block)
    compiled = moec.compile(net)
    assert [(r.status, r.reason) for r in regions(compiled)] == [("compiled", "")] * 2
    for mode in (True, False):
        net.train(mode)
        compiled.train(mode)
        for batch, length in LENGTHS:
            x = torch.randn(batch, length, HIDDEN)
            assert_equal(values(compiled, x), values(net, x))
            if not mode:
                with torch.no_grad():
                    assert_equal(compiled(x), net(x))


@pytest.mark.parametrize("block", [SortedSplit, Capacity, ThresholdGates, CheapExperts])
def test_double_precision(block: Any) -> None:
    net = Net(block).double()
    compiled = moec.compile(net)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    assert_equal(values(compiled, x), values(net, x), 1e-12)


def test_capacity_drops_the_same_tokens_at_any_number() -> None:
    net = Net(LargeCapacity)
    compiled = moec.compile(net)
    x = torch.randn(HIDDEN).expand(1, 1500, HIDDEN).contiguous()
    assert_equal(compiled(x), net(x))


def test_what_a_forward_leaves_on_its_module_is_left_by_the_compiled_one_too() -> None:
    net = Net(RemembersDtype)
    compiled = moec.compile(net)
    assert "calls_have" not in vars(compiled.layers[0])
    compiled(torch.randn(2, 3, HIDDEN))
    assert compiled.layers[0].last_dtype is torch.float32
    assert compiled.layers[0].calls_have == "tokens"


class Noisy(Routed):
    """Noise on the router's logits in training."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        logits = self.gate(flat)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(logits)
        weights, chosen = logits.topk(self.choices, dim=-1)
        weights = weights.softmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


def test_noise_in_training_is_the_same_under_the_same_seed() -> None:
    net = Net(Noisy).eval()
    compiled = moec.compile(net)
    assert [r.status for r in regions(compiled)] == ["compiled", "compiled"]
    x = torch.randn(2, 9, HIDDEN)
    assert_equal(values(compiled, x), values(net, x))
    net.train()
    compiled.train()
    torch.manual_seed(5)
    expected = values(net, x)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="Noisy.* stays as it was"):
        actual = values(compiled, x)
    assert_equal(actual, expected)


class SlicedCapacity(Routed):
    """Slices of the sorted tokens, each at most a limit long that no trial reaches."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        order = chosen.argsort()
        ends = chosen.bincount(minlength=EXPERTS).cumsum(0).tolist()
        out, start = torch.zeros_like(flat), 0
        for expert, end in zip(self.experts, ends, strict=True):
            token = order[start : min(end, start + 1000)]
            out[token] = expert(flat[token]) * weight[token, None]
            start = end
        return out.view(x.shape)


class CountedBranch(WhereAssign):
    """Another function for an expert that has many tokens."""

    def forward(self, x: torch.Tensor) -> Any:
        chosen = self.route(x.view(-1, HIDDEN))[1]
        scale = 2.0 if (chosen == 0).sum() > 1000 else 1.0
        return super().forward(x) * scale


class CountsCalls(WhereAssign):
    """Leaves a number on itself that differs from call to call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (SlicedCapacity, "uses aten.slice.Tensor to pick or add up tokens"),
        (CountedBranch, "CountedBranch reads a value of a tensor as a Python number"),
        (CountsCalls, "forward changes calls"),
    ],
)
def test_left_alone_with_a_reason(block: Any, reason: str) -> None:
    net = Net(block)
    with pytest.warns(UserWarning, match=reason):
        compiled = moec.compile(net)
    assert {r.status for r in regions(compiled)} == {"left as it was"}
    x = torch.randn(HIDDEN).expand(1, 1500, HIDDEN).contiguous()
    assert_equal(compiled(x), net(x))

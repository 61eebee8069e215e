"""Blocks as users write them: loops over lists of experts, compiled or left alone, never wrong."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

import moec
from moec.api import regions

HIDDEN = 16
SHAPES = ((2, 7), (1, 1), (3, 40), (1, 2))


class Plain(nn.Module):
    """Two layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(x)))


class Gated(nn.Module):
    """A gated unit without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 24, bias=False)
        self.up = nn.Linear(HIDDEN, 24, bias=False)
        self.down = nn.Linear(24, HIDDEN, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def normed() -> nn.Module:
    """A sequence with a norm inside."""
    return nn.Sequential(
        nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 24), nn.GELU(), nn.Linear(24, HIDDEN)
    )


class Block(nn.Module):
    """What the blocks below have in common: a router, experts and the number of choices."""

    expert: Any = Gated
    experts: Any
    bias: Any
    calls: Any

    def __init__(self, experts: int = 6, choices: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.experts = nn.ModuleList([self.expert() for _ in range(experts)])
        self.choices = choices


class WhereIndexAdd(Block):
    def forward(self, x: torch.Tensor) -> Any:
        batch, length, width = x.shape
        flat = x.view(-1, width)
        weights, chosen = F.softmax(self.router(flat), dim=-1).topk(self.choices, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(batch, length, width)


class SkipEmpty(Block):
    """Experts with biases; those without tokens are skipped."""

    expert = Plain

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.router(flat), self.choices)
        weights = weights.softmax(-1)
        out = flat.new_zeros(flat.shape)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            out[token] += weights[token, place].unsqueeze(-1) * expert(flat[token])
        return out.reshape(x.shape)


class BooleanMasks(Block):
    """One pass a choice, tokens picked by boolean masks."""

    expert = staticmethod(normed)

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = F.softmax(self.router(flat), dim=-1).topk(self.choices)
        out = torch.zeros_like(flat)
        for choice in range(self.choices):
            for number, expert in enumerate(self.experts):
                mask = chosen[:, choice] == number
                if mask.any():
                    out[mask] += weights[mask, choice].unsqueeze(1) * expert(flat[mask])
        return out.reshape(x.shape)


class OneHot(Block):
    """The form that Mixtral made popular, with the router's logits as a second result."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, width = x.shape
        x = x.view(-1, width)
        logits = self.router(x)
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.choices)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros((batch * length, width), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for number in range(len(self.experts)):
            place, token = torch.where(mask[number])
            rows = x[None, token].reshape(-1, width)
            rows = self.experts[number](rows) * weights[token, place, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out.reshape(batch, length, width), logits


class DenseGates(Block):
    """Every expert on every token, weighted by gates that are mostly zero."""

    def forward(self, x: torch.Tensor) -> Any:
        scores = torch.sigmoid(self.router(x))
        weights, chosen = scores.topk(self.choices, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, weights)
        out: Any = 0
        for number, expert in enumerate(self.experts):
            out = out + gates[..., number : number + 1] * expert(x)
        return out


class Switch(Block):
    """One expert a token, for flat tokens."""

    expert = Plain

    def forward(self, x: torch.Tensor) -> Any:
        probabilities = self.router(x).softmax(-1)
        weight, chosen = probabilities.max(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token = torch.where(chosen == number)[0]
            out[token] = expert(x[token]) * weight[token].unsqueeze(-1)
        return out


class ArgmaxSwitch(Block):
    """As above with argmax and gather, on tokens with batch and length."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.flatten(0, 1)
        probabilities = F.softmax(self.router(flat), dim=-1)
        chosen = torch.argmax(probabilities, dim=-1)
        weight = probabilities.gather(1, chosen.unsqueeze(-1))
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.sum() > 0:
                out[mask] = expert(flat[mask]) * weight[mask]
        return out.view_as(x)


class SigmoidWithBias(Block):
    """Selection by biased scores, weights from the scores; a shared expert with a gate."""

    def __init__(self) -> None:
        super().__init__(experts=8, choices=3)
        self.shared, self.shared_gate = Gated(), nn.Linear(HIDDEN, 1)
        self.register_buffer("bias", torch.randn(8))

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.view(-1, HIDDEN)
        scores = self.router(flat.float()).sigmoid()
        chosen = torch.topk(scores + self.bias, self.choices, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        out = torch.zeros_like(flat)
        for number in range(len(self.experts)):
            token, place = torch.where(chosen == number)
            out.index_add_(
                0, token, self.experts[number](flat[token]) * weights[token, place, None]
            )
        shared = self.shared(flat) * torch.sigmoid(self.shared_gate(flat))
        return (out + shared).view(x.shape)


class Dictionary(Block):
    """Experts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Plain() for e in range(6)})

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
        out = torch.zeros_like(flat)
        for number in range(6):
            token, place = torch.where(chosen == number)
            rows = self.experts[f"expert_{number}"](flat[token])
            out.index_add_(0, token, rows * weights[token, place, None])
        return out.reshape(x.shape)


class ByChoice(Block):
    """Only the experts that some token chose, found by unique."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            out = out.index_add(
                0, token, self.experts[number](flat[token]) * weights[token, place, None]
            )
        return out.view(x.shape)


class Net(nn.Module):
    """Two such blocks in a residual network."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(2)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> Any:
        others = []
        for layer in self.layers:
            first, *rest = tree_flatten(layer(x))[0]
            x = x + first
            others += rest
        return [self.head(x), *others]


def output_and_gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, and the gradient of the input and of every parameter (zero where there is none)."""
    x = x.clone().requires_grad_()
    outputs = net(x)
    loss = sum((o * torch.arange(o.numel()).view_as(o).cos()).sum() for o in outputs)
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*outputs, *found]


def assert_equal(
    actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(1.0, theirs.detach().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)


def shapes(block: type) -> list[tuple[int, ...]]:
    flat = block is Switch
    return [(batch * length,) if flat else (batch, length) for batch, length in SHAPES]


COMPILED = [
    WhereIndexAdd,
    SkipEmpty,
    BooleanMasks,
    OneHot,
    DenseGates,
    Switch,
    ArgmaxSwitch,
    SigmoidWithBias,
    Dictionary,
    ByChoice,
]


@pytest.mark.parametrize("block", COMPILED)
def test_compiled_completely_and_equal_to_eager(block: Any) -> None:
    net = Net(block)
    compiled = moec.compile(net)
    assert [r.status for r in regions(compiled)] == ["compiled", "compiled"]
    session = regions(compiled)[0].session
    for shape in shapes(block):
        x = torch.randn(*shape, HIDDEN)
        assert_equal(output_and_gradients(compiled, x), output_and_gradients(net, x), 1e-5)
    assert len(session.captures) <= 2, "both layers share one capture"
    assert len(session.artifacts) <= 2  # the first layer's input may need no gradient


@pytest.mark.parametrize("block", [WhereIndexAdd, DenseGates, BooleanMasks])
def test_double_precision(block: Any) -> None:
    net = Net(block).double()
    compiled = moec.compile(net)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    assert_equal(output_and_gradients(compiled, x), output_and_gradients(net, x), 1e-12)


def test_no_tokens() -> None:
    net = Net(WhereIndexAdd)
    compiled = moec.compile(net)
    x = torch.randn(2, 0, HIDDEN)
    assert compiled(x)[0].shape == (2, 0, 3)
    gradients = output_and_gradients(compiled, x)[1:]
    assert all(not g.any() for g in gradients)


def test_one_expert_gets_every_token() -> None:
    net = Net(SkipEmpty)
    with torch.no_grad():
        for layer in cast(Any, net.layers):
            layer.router.weight.zero_()
            layer.router.weight[2:4] = torch.eye(HIDDEN)[:2] * 1e-3
    compiled = moec.compile(net)
    x = torch.rand(1, 9, HIDDEN) + 1.0
    assert_equal(output_and_gradients(compiled, x), output_and_gradients(net, x), 1e-5)


# Experts that differ, and capacities; then blocks that must stay as they are.


class OtherExperts(WhereIndexAdd):
    """Experts that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Plain(), Gated(), Plain(), Gated(), Plain(), Gated()])


class OtherSettings(WhereIndexAdd):
    """Experts of one class with other settings."""

    def __init__(self) -> None:
        super().__init__()
        slopes = (0.1, 0.2, 0.1, 0.3, 0.1, 0.1)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(s)) for s in slopes]
        )


class Capacity(Block):
    """Tokens beyond an expert's capacity are dropped, in order."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        mask = F.one_hot(chosen, len(self.experts))
        kept = (mask.cumsum(0) * mask) <= 4
        mask = mask * kept
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = mask[:, number].nonzero().squeeze(-1)
            out[token] = expert(flat[token]) * weight[token, None]
        return out.view(x.shape)


class LargeCapacity(WhereIndexAdd):
    """Drops tokens of an expert that has more than a thousand: no trial is that large."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            token, place = token[:1000], place[:1000]
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


class CountedCapacity(Capacity):
    """As above, counting with a cumulative sum."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        mask = F.one_hot(chosen, len(self.experts))
        mask = mask * (mask.cumsum(0) <= 1000)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = mask[:, number].nonzero().squeeze(-1)
            out[token] = expert(flat[token]) * weight[token, None]
        return out.view(x.shape)


class StoresAttribute(WhereIndexAdd):
    """Leaves its loss on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        self.loss = self.router(x).logsumexp(-1).square().mean()
        return super().forward(x)


class CountsCalls(WhereIndexAdd):
    """Counts in a buffer, as load balancing does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


class KeepsList(WhereIndexAdd):
    """Appends to a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(x.shape[1])
        return super().forward(x)


class BranchOnValues(WhereIndexAdd):
    """Another function for large tokens."""

    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        if x.abs().max() > 1e4:
            return out * 2
        return out


class BranchOnWeights(WhereIndexAdd):
    """Another function where the router is sure."""

    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        if self.router(x).softmax(-1).max() > 0.999999:
            return out * 2
        return out


class NumberFromWeight(WhereIndexAdd):
    """Reads a parameter as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * self.scale.item()


class Normalized(Block):
    """The sum of the experts' outputs is used in two ways that no sum over choices explains."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices)
        largest = torch.full_like(flat, -1e9)
        for number, expert in enumerate(self.experts):
            token = torch.where(chosen == number)[0]
            rows = torch.maximum(largest[token], expert(flat[token]))
            largest = largest.index_copy(0, token, rows)
        return largest.view(x.shape) * weights.sum(-1).view(*x.shape[:-1], 1)


@pytest.mark.parametrize("block", [OtherExperts, Capacity, CountedCapacity])
def test_experts_that_differ_and_capacities_are_compiled(block: Any) -> None:
    net = Net(block)
    compiled = moec.compile(net)
    assert [r.status for r in regions(compiled)] == ["compiled", "compiled"]
    for shape in SHAPES:
        x = torch.randn(*shape, HIDDEN)
        assert_equal(output_and_gradients(compiled, x), output_and_gradients(net, x), 1e-5)


LEFT = [
    (OtherSettings, None),
    (LargeCapacity, "uses aten.slice.Tensor to pick or add up tokens"),
    (StoresAttribute, "forward changes loss"),
    (CountsCalls, r"forward changes calls \(buffer\)"),
    (KeepsList, "forward changes seen"),
    (BranchOnValues, r"test_loops\.py:\d+: BranchOnValues reads a value"),
    (BranchOnWeights, "BranchOnWeights reads a value"),
    (NumberFromWeight, "NumberFromWeight reads a value"),
    (Normalized, None),
]


@pytest.mark.parametrize(("block", "reason"), LEFT)
def test_left_alone_with_one_warning_and_right(block: Any, reason: str | None) -> None:
    net = Net(block)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = moec.compile(net)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    for name, value in before.items():
        assert torch.equal(value, net.state_dict()[name]), f"compiling changed {name}"
    if reason is not None:
        assert re.search(reason, messages[0]), messages
    assert not any(r.status == "compiled" for r in regions(compiled))
    twin = copy.deepcopy(net)
    for shape in SHAPES:
        for scale in (1.0, 1e6):
            x = torch.randn(*shape, HIDDEN) * scale
            assert_equal(compiled(x), twin(x), 1e-6)
    for ours, theirs in zip(compiled.layers, cast(Any, twin).layers, strict=True):
        if block is StoresAttribute:
            torch.testing.assert_close(ours.loss, theirs.loss)
        if block is KeepsList:
            assert ours.seen == theirs.seen
        if block is CountsCalls:
            assert torch.equal(ours.calls, theirs.calls)


class Dropping(nn.Module):
    """An expert with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.dropout(F.relu(self.up(x))))


class WithDropout(WhereIndexAdd):
    expert = Dropping


def test_dropout_is_compiled_for_evaluation_only() -> None:
    net = Net(WithDropout).eval()
    compiled = moec.compile(net)
    assert [r.status for r in regions(compiled)] == ["compiled", "compiled"]
    x = torch.randn(2, 9, HIDDEN)
    assert_equal(compiled(x), net(x), 1e-5)
    net.train()
    compiled.train()
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="WithDropout.* stays as it was"):
        actual = compiled(x)
    assert_equal(actual, expected, 1e-6)
    assert_equal(compiled.eval()(x), net.eval()(x), 1e-5)


class SliceOfLayers(nn.Module):
    """No MoE: a list of equal layers run one after the other, and a matrix with as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def test_layers_are_no_experts() -> None:
    net = SliceOfLayers()
    with pytest.warns(UserWarning, match="moec: "):
        compiled = moec.compile(net)
    x = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(compiled(x), net(x))

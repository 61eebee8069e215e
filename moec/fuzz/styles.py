"""A MoE block whose parts are options: router, experts in many styles of code, what is around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


@dataclass(frozen=True)
class StyleOptions:
    """What a block is made of, and how its code is written."""

    style: str = "indices"  # a key of EXPERTS
    experts: int = 4
    choices: int = 2
    hidden: int = 6
    inner: int = 8
    score: str = "softmax"  # softmax, sigmoid; "late": of the chosen logits
    norm: str = "none"  # none, sum, eps, clamp: how weights are divided by their sum
    scale: float = 1.0
    groups: int = 1  # only experts of the best half of so many groups take part
    selection_bias: bool = False
    gate_bias: bool = False
    upcast: bool = False  # the softmax in float32, unless the model is in float64
    gated: bool = True
    fused: bool = True  # gate and up are one matrix
    interleaved: bool = False  # whose columns alternate
    transposed: bool = False  # stacked weights are [E, in, out]
    biases: bool = False
    activation: str = "silu"
    weights_first: bool = False  # tokens are weighted before the experts
    shared: str = "none"  # none, plain, gated: an expert for all tokens
    returns: str = "y"  # y, logits, loss
    residual: bool = False
    norm_first: bool = False
    dtype: str = "float32"

    @property
    def is_valid(self) -> bool:
        """Whether there is such a block."""
        per_group = self.experts // self.groups
        return self.choices <= self.experts and self.choices <= per_group * max(self.groups // 2, 1)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _clamped(x: Tensor) -> Tensor:
    x = x.clamp(max=1.5)
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu_squared,
    "clamped": _clamped,
    "mish": _mish,
    "tanh": torch.tanh,
}


class Mlp(nn.Module):
    """One expert with weights of its own."""

    def __init__(self, o: StyleOptions) -> None:
        super().__init__()
        self.o = o
        self.act = ACTIVATIONS[o.activation]
        wide = 2 * o.inner if o.gated and o.fused else o.inner
        self.up = nn.Linear(o.hidden, wide, bias=o.biases)
        if o.gated and not o.fused:
            self.gate = nn.Linear(o.hidden, o.inner, bias=o.biases)
        self.down = nn.Linear(o.inner, o.hidden, bias=o.biases)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if not self.o.gated:
            inner = self.act(up)
        elif self.o.fused:
            gate, up = _halves(up, self.o.interleaved)
            inner = self.act(gate) * up
        else:
            inner = self.act(self.gate(x)) * up
        out: Tensor = self.down(inner)
        return out


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


class Stacked(nn.Module):
    """Experts whose weights are stacked in one tensor each."""

    def __init__(self, o: StyleOptions) -> None:
        super().__init__()
        self.o = o
        self.num_experts = o.experts
        self.act = ACTIVATIONS[o.activation]
        self.up = self._weight(o.hidden, 2 * o.inner if o.gated and o.fused else o.inner)
        if o.gated and not o.fused:
            self.gate = self._weight(o.hidden, o.inner)
        self.down = self._weight(o.inner, o.hidden)
        if o.biases:
            self.up_bias = nn.Parameter(torch.zeros(o.experts, self._out(self.up)))
            self.down_bias = nn.Parameter(torch.zeros(o.experts, o.hidden))

    def _weight(self, wide: int, out: int) -> nn.Parameter:
        shape = (wide, out) if self.o.transposed else (out, wide)
        return nn.Parameter(torch.empty(self.o.experts, *shape))

    def _out(self, weight: Tensor) -> int:
        return weight.shape[2 if self.o.transposed else 1]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rows times one expert's matrix."""
        return x @ weight if self.o.transposed else F.linear(x, weight)

    def expert(self, x: Tensor, number: Any) -> Tensor:
        """One expert on some rows."""
        up = self.product(x, self.up[number])
        if self.o.biases:
            up = up + self.up_bias[number]
        if not self.o.gated:
            inner = self.act(up)
        elif self.o.fused:
            gate, up = _halves(up, self.o.interleaved)
            inner = self.act(gate) * up
        else:
            inner = self.act(self.product(x, self.gate[number])) * up
        out = self.product(inner, self.down[number])
        return out + self.down_bias[number] if self.o.biases else out


class ByIndices(Stacked):
    """A loop over the experts that were hit, adding at indices."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(idx, self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for number in hit:
            number = number[0]
            place, token = torch.where(mask[number])
            rows = self.expert(x[token], number) * w[token, place, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class ByRange(Stacked):
    """A loop over all experts, with boolean masks."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, place = torch.where(idx == number)
            if token.numel() == 0:
                continue
            out[token] += self.expert(x[token], number) * w[token, place].unsqueeze(-1)
        return out


class BySorting(Stacked):
    """Tokens sorted by expert, a slice for each, and back again."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        choices = idx.shape[1]
        order = idx.reshape(-1).argsort(stable=True)
        counts = torch.bincount(idx.reshape(-1), minlength=self.num_experts).tolist()
        rows, start, parts = x[order // choices], 0, []
        for number, count in enumerate(counts):
            if count:
                parts.append(self.expert(rows[start : start + count], number))
            start += count
        out = torch.cat(parts) if parts else rows
        back = torch.empty_like(out)
        back[order] = out
        return (back.view(*idx.shape, -1) * w.unsqueeze(-1)).sum(1).to(x.dtype)


class Dense(Stacked):
    """Every expert on every token, and a matrix of weights with zeros in it."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(x.shape[0], self.num_experts, dtype=w.dtype, device=x.device)
        dense = dense.scatter(1, idx, w)
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            out = out + self.expert(x, number) * dense[:, number, None]
        return out


class Listed(nn.Module):
    """A list of experts, looped over with indices."""

    def __init__(self, o: StyleOptions) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp(o) for _ in range(o.experts))

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(idx == number)
            out.index_add_(0, token, (expert(x[token]) * w[token, place, None]).to(out.dtype))
        return out


class ListedMasks(Listed):
    """A list of experts, with masks that leave the others' rows alone."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (idx == number).any(dim=-1)
            if not chosen.any():
                continue
            weight = (w * (idx == number)).sum(-1)[chosen]
            out[chosen] = out[chosen] + expert(x[chosen]) * weight.unsqueeze(-1)
        return out


EXPERTS: dict[str, Callable[[StyleOptions], nn.Module]] = {
    "indices": ByIndices,
    "range": ByRange,
    "sorting": BySorting,
    "dense": Dense,
    "list": Listed,
    "list masks": ListedMasks,
}


class MoeBlock(nn.Module):
    """Router, experts, and what is around them."""

    def __init__(self, o: StyleOptions) -> None:
        super().__init__()
        self.options = o
        self.selection_bias: Tensor
        self.gate = nn.Linear(o.hidden, o.experts, bias=o.gate_bias)
        self.register_buffer("selection_bias", torch.zeros(o.experts))
        self.experts = EXPERTS[o.style](o)
        if o.shared != "none":
            self.shared_expert = Mlp(o)
        if o.shared == "gated":
            self.shared_gate = nn.Linear(o.hidden, 1, bias=False)
        if o.norm_first:
            self.norm = nn.LayerNorm(o.hidden)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, indices and weights."""
        o, logits = self.options, self.gate(x)
        late = o.score.startswith("late ")
        scores = logits if late else self._activated(logits, o.score)
        choice = scores + self.selection_bias if o.selection_bias else scores
        if o.groups > 1:
            choice = self._limited(choice)
        idx = torch.topk(choice, o.choices, dim=-1).indices
        w = scores.gather(1, idx)
        if late:
            w = self._activated(w, o.score.removeprefix("late "))
        return logits, idx, self._scaled(w).to(x.dtype)

    def _activated(self, logits: Tensor, score: str) -> Tensor:
        if self.options.upcast and logits.dtype != torch.float64:
            logits = logits.float()
        return logits.softmax(-1) if score == "softmax" else logits.sigmoid()

    def _limited(self, choice: Tensor) -> Tensor:
        """Scores with those outside the best groups at minus infinity."""
        groups, per_group = self.options.groups, self.options.experts // self.options.groups
        parts = choice.view(-1, groups, per_group)
        best = parts.topk(2, dim=-1).values.sum(-1).topk(groups // 2, dim=-1).indices
        mask = torch.zeros(parts.shape[:2], dtype=choice.dtype, device=choice.device)
        mask = mask.scatter(1, best, 1.0)
        mask = mask.unsqueeze(-1).expand(-1, groups, per_group).reshape(choice.shape)
        return choice.masked_fill(~mask.bool(), float("-inf"))

    def _scaled(self, w: Tensor) -> Tensor:
        total = w.sum(-1, keepdim=True)
        if self.options.norm == "sum":
            w = w / total
        elif self.options.norm == "eps":
            w = w / (total + 1e-6)
        elif self.options.norm == "clamp":
            w = w / total.clamp(min=1e-3)
        return w * self.options.scale if self.options.scale != 1.0 else w

    def forward(self, hidden: Tensor) -> Any:
        o = self.options
        x = hidden.reshape(-1, o.hidden)
        if o.norm_first:
            x = self.norm(x)
        logits, idx, w = self.route(x)
        if o.weights_first and o.choices == 1:
            y = self.experts(x * w, idx, torch.ones_like(w))
        else:
            y = self.experts(x, idx, w)
        if o.shared != "none":
            y = y + self._shared(x)
        y = y.view(hidden.shape)
        y = y + hidden if o.residual else y
        return {"y": y, "logits": (y, logits), "loss": (y, self._balance(logits, idx))}[o.returns]

    def _shared(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared_expert(x)
        return torch.sigmoid(self.shared_gate(x)) * y if self.options.shared == "gated" else y

    def _balance(self, logits: Tensor, idx: Tensor) -> Tensor:
        """The usual loss that keeps the load even."""
        if self.options.returns != "loss":
            return logits.sum()
        share = F.one_hot(idx, self.options.experts).to(logits.dtype).mean((0, 1))
        return (share * logits.softmax(-1).mean(0)).sum() * self.options.experts


__all__ = ["ACTIVATIONS", "EXPERTS", "MoeBlock", "StyleOptions"]

"""Random valid MoE blocks as graphs: routers, selections, expert layouts, activations, dtypes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.ir import Builder, Graph, Location, Type, Value, dim
from moec.ir.dims import canon, ceildiv
from moec.ir.types import DTYPES

T = dim("T")
ROUTINGS = ("random", "empty", "one")


@dataclass(frozen=True)
class Options:
    """What a block is made of."""

    router: str = "softmax"  # softmax, sigmoid, sqrtsoftplus, or topk_softmax: top-k of logits
    raised: bool = True  # moe. routing ops, else the t. ops of a captured router
    biased: bool = False  # a bias takes part in the selection only
    groups: int = 1  # group-limited selection if above 1
    group_score: str = "sum_top2"
    norm: str = "none"
    scale: float = 1.0
    experts: int = 4
    choices: int = 2
    hidden: int = 6
    inner: int = 4
    form: str = "concat"  # concat, interleave, separate (two products) or ungated
    transposed: bool = False
    biases: bool = False
    activation: str = "silu"
    shared: bool = False
    dtype: str = "f32"
    mode: str = "topk"  # with raised: margin, threshold or topk_per_group, without groups
    capacity: float = 0.0  # rows an expert takes at most, in parts of the mean; 0: no limit


@dataclass(frozen=True)
class Block:
    """A block's graph and what it was made of."""

    graph: Graph
    options: Options

    def arguments(
        self, tokens: int, routing: str = "random", seed: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Inputs for so many tokens; ``routing`` may leave an expert empty or use only ``K``."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(self._argument(v, tokens, routing, generator) for v in self.graph.inputs)

    def _argument(
        self, value: Value, tokens: int, routing: str, generator: torch.Generator
    ) -> torch.Tensor:
        shape = [tokens if d == T else int(d) for d in value.type.shape]
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if value.hint == "x":
            tensor[:, :1] = 1.0  # so that the router's first column is a bias
        if value.hint == "router" and routing == "empty":
            tensor[0, 0] = -8.0
        if value.hint == "router" and routing == "one":
            tensor[: self.options.choices, 0] = 8.0
        return tensor.to(DTYPES[value.type.dtype])


def gpt_oss(b: Builder, gate: Value, up: Value | None) -> Value:
    """The clamped gate of gpt-oss."""
    gate = b("t.clamp", gate, max=7.0)
    glu = b("t.mul", gate, b("t.sigmoid", b("t.mul", gate, other=1.702)))
    return glu if up is None else _times(b, _plus_one(b, b("t.clamp", up, min=-7.0, max=7.0)), glu)


def _plus_one(b: Builder, x: Value) -> Value:
    value: Value = b("t.add", x, other=1.0)
    return value


def _times(b: Builder, x: Value, y: Value | None) -> Value:
    value: Value = x if y is None else b("t.mul", x, y)
    return value


def _named(name: str, **attrs: Any) -> Callable[[Builder, Value, Value | None], Value]:
    return lambda b, gate, up: _times(b, b(f"t.{name}", gate, **attrs), up)


def _squared_relu(b: Builder, gate: Value, up: Value | None) -> Value:
    return _times(b, b("t.pow", b("t.relu", gate), exponent=2.0), up)


def _exotic(b: Builder, gate: Value, up: Value | None) -> Value:
    """No model's: a mixture of the remaining pointwise ops."""
    bell = b("t.exp", b("t.neg", b("t.mul", gate, gate)))
    soft = b("t.rsqrt", b("t.add", b("t.softplus", gate), other=0.5))
    low = b("t.where", b("t.lt", gate, other=-0.5), b("t.erf", gate), b("t.tanh", gate))
    return _times(b, b("t.sub", b("t.add", bell, soft), b("t.div", low, other=3.0)), up)


ACTIVATIONS: dict[str, Callable[[Builder, Value, Value | None], Value]] = {
    "silu": _named("silu"),
    "gelu": _named("gelu"),
    "gelu_tanh": _named("gelu", approximate="tanh"),
    "relu": _named("relu"),
    "squared_relu": _squared_relu,
    "gpt_oss": gpt_oss,
    "exotic": _exotic,
}


class _Inputs:
    """Collects the inputs of a block in order."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def __call__(self, name: str, dtype: str, *shape: Any) -> Value:
        self.values.append(Value(Type(dtype, shape), name))
        return self.values[-1]


def build(options: Options) -> Block:
    """The block with these options."""
    b, inputs = Builder({"T": (0, 131072)}), _Inputs()
    o = options
    x = inputs("x", o.dtype, T, o.hidden)
    b.loc = Location("model.py", 10, "layers.3.router")
    idx, w = _route(b, inputs, o, x)
    b.loc = Location("model.py", 20, "layers.3.experts")
    perm, offsets, inverse = b(
        "moe.dispatch", idx, experts=o.experts, hint=("perm", "offsets", "inverse")
    )
    rows = b("moe.gather", x, perm, inverse, hint="rows")
    a = _activated(b, inputs, o, rows, offsets)
    ys = _product(b, inputs, o, "down", a, o.hidden, offsets)
    y = b("moe.combine", ys, perm, inverse, w, hint="y")
    if o.shared:
        b.loc = None
        y = b("t.add", y, _shared(b, inputs, o, x), hint="y")
    return Block(b.graph("block", inputs.values, [y]), options)


def _product(
    b: Builder, inputs: _Inputs, o: Options, name: str, x: Value, width: int, offsets: Value
) -> Value:
    shape = (x.type.shape[1], width) if o.transposed else (width, x.type.shape[1])
    w = inputs(f"w_{name}", o.dtype, o.experts, *shape)
    y: Value = b("moe.grouped_mm", x, w, offsets, transposed=o.transposed, hint=name)
    if not o.biases:
        return y
    bias = inputs(f"b_{name}", o.dtype, o.experts, width)
    rows = b("moe.expert_rows", bias, offsets, rows=x.type.shape[0])
    biased: Value = b("t.add", y, rows, hint=name)
    return biased


def _activated(b: Builder, inputs: _Inputs, o: Options, rows: Value, offsets: Value) -> Value:
    activation = ACTIVATIONS[o.activation]
    if o.form == "ungated":
        return activation(b, _product(b, inputs, o, "up", rows, o.inner, offsets), None)
    if o.form == "separate":
        gate, up = (_product(b, inputs, o, n, rows, o.inner, offsets) for n in ("gate", "up"))
        return activation(b, gate, up)
    h = _product(b, inputs, o, "h", rows, 2 * o.inner, offsets)
    if o.raised:
        return activation(b, *b("t.split", h, parts=2, layout=o.form, hint=("gate", "up")))
    gate, up = (_half(b, o, h, i) for i in range(2))
    return activation(b, gate, up)


def _half(b: Builder, o: Options, h: Value, i: int) -> Value:
    width = o.inner
    place = (i, 2 * width, 2) if o.form == "interleave" else (i * width, (i + 1) * width, 1)
    start, stop, step = place
    value: Value = b("t.slice", h, dim=-1, start=start, stop=stop, step=step)
    return value


def _shared(b: Builder, inputs: _Inputs, o: Options, x: Value) -> Value:
    gate, up = (
        b("t.linear", x, inputs(f"shared_{n}", o.dtype, o.inner, o.hidden)) for n in ("gate", "up")
    )
    down = inputs("shared_down", o.dtype, o.hidden, o.inner)
    value: Value = b("t.linear", ACTIVATIONS[o.activation](b, gate, up), down, hint="shared")
    return value


def _route(b: Builder, inputs: _Inputs, o: Options, x: Value) -> tuple[Value, Value]:
    """Indices and weights."""
    logits = b("t.linear", x, inputs("router", o.dtype, o.experts, o.hidden), hint="logits")
    if o.dtype != "f32":
        logits = b("t.cast", logits, dtype="f32", hint="logits")
    bias = inputs("selection_bias", "f32", o.experts) if o.biased else None
    idx, w = (_raised if o.raised else _captured)(b, o, logits, bias)
    return idx, w if o.dtype == "f32" else b("t.cast", w, dtype=o.dtype, hint="w")


def _raised(b: Builder, o: Options, logits: Value, bias: Value | None) -> tuple[Value, Value]:
    late = o.router == "topk_softmax"
    scores = logits if late else b("moe.activate", logits, fn=o.router, hint="scores")
    attrs: dict[str, Any] = {}
    if o.groups > 1:
        attrs = {
            "mode": "group_limited",
            "groups": o.groups,
            "topk_groups": max(o.groups // 2, 1),
            "group_score": o.group_score,
        }
    elif o.mode != "topk":
        attrs = {"mode": o.mode, "theta": 0.2 if o.mode != "topk_per_group" else None}
    operands = [scores] if bias is None else [scores, bias]
    idx = b("moe.select", *operands, k=o.choices, hint="idx", **attrs)
    if o.capacity:
        part = canon(ceildiv(round(4 * o.capacity) * o.choices * T, 4 * o.experts))
        idx = b("moe.limit", idx, experts=o.experts, capacity=part, hint="idx")
    source = "softmax" if late else "gather"
    eps = {"none": 0.0, "sum": 1e-20, "clamp_min": 1e-6}[o.norm]
    w = b("moe.weight", scores, idx, source=source, norm=o.norm, eps=eps, scale=o.scale, hint="w")
    return idx, w


def _captured(b: Builder, o: Options, logits: Value, bias: Value | None) -> tuple[Value, Value]:
    """The router in tensor ops, as the models write it."""
    scores = _scores(b, o, logits)
    choice = scores if bias is None else b("t.add", scores, bias, hint="choice")
    plain = choice is scores and o.groups == 1
    choice = limited_to_groups(b, o, choice) if o.groups > 1 else choice
    values, idx = b("t.topk", choice, k=o.choices, hint=("top_values", "top_index"))
    w = values if plain else b("t.gather", scores, idx, dim=1, hint="w")
    if o.router == "topk_softmax":
        w = b("t.softmax", w, dim=1)
    if o.norm != "none":
        total = b("t.sum", w, dims=(-1,), keepdim=True)
        keep: dict[str, tuple[str, dict[str, Any]]] = {
            "sum": ("t.add", {"other": 1e-20}),
            "clamp_min": ("t.clamp", {"min": 1e-6}),
        }
        kind, number = keep[o.norm]
        w = b("t.div", w, b(kind, total, **number))
    if o.scale != 1.0:
        w = b("t.mul", w, other=o.scale)
    return b("t.cast", idx, dtype="i32", hint="idx"), w


def _scores(b: Builder, o: Options, logits: Value) -> Value:
    if o.router == "topk_softmax":
        return logits
    if o.router == "sqrtsoftplus":
        value: Value = b("t.sqrt", b("t.softplus", logits), hint="scores")
        return value
    attrs: dict[str, Any] = {"dim": -1} if o.router == "softmax" else {}
    value = b(f"t.{o.router}", logits, hint="scores", **attrs)
    return value


def limited_to_groups(b: Builder, o: Options, choice: Value) -> Value:
    """The scores with those outside the best half of the groups set to minus infinity."""
    size = o.experts // o.groups
    parts = b("t.reshape", choice, shape=(T, o.groups, size))
    if o.group_score == "max":
        group_scores = b("t.amax", parts, dims=(-1,))
    else:
        group_scores = b("t.sum", b("t.topk", parts, k=2, dim=-1)[0], dims=(-1,))
    best = b("t.topk", group_scores, k=max(o.groups // 2, 1), dim=-1, sorted=False)[1]
    zeros = b("t.full", value=0.0, dtype="f32", shape=(T, o.groups))
    mask = b("t.scatter", zeros, best, dim=1, value=1.0)
    column = b("t.reshape", mask, shape=(T, o.groups, 1))
    spread = b("t.expand", column, shape=(T, o.groups, size))
    flat = b("t.reshape", spread, shape=(T, o.experts))
    outside = b("t.logical_not", b("t.cast", flat, dtype="bool"))
    fill = b("t.full", value=float("-inf"), dtype="f32")
    value: Value = b("t.where", outside, fill, choice, hint="choice")
    return value


def random_options(seed: int, *, raised: bool | None = None) -> Options:
    """Options of a random block."""
    r = random.Random(seed)
    experts = r.choice((1, 3, 4, 8))
    grouped = experts == 8 and r.random() < 0.6
    choices = r.choice(sorted({1, min(2, experts), min(3, experts), 4 if grouped else experts}))
    return Options(
        router=r.choice(("softmax", "sigmoid", "sqrtsoftplus", "topk_softmax")),
        raised=r.random() < 0.5 if raised is None else raised,
        biased=r.random() < 0.4,
        groups=r.choice((2, 4)) if grouped else 1,
        group_score=r.choice(("sum_top2", "max")),
        norm=r.choice(("none", "sum", "clamp_min")),
        scale=r.choice((1.0, 2.5)),
        experts=experts,
        choices=choices,
        hidden=r.choice((3, 6, 8)),
        inner=r.choice((1, 4, 5)),
        form=r.choice(("concat", "interleave", "separate", "ungated")),
        transposed=r.random() < 0.5,
        biases=r.random() < 0.5,
        activation=r.choice(sorted(ACTIVATIONS)),
        shared=r.random() < 0.3,
        dtype=r.choice(("f32", "f32", "bf16", "f16", "f64")),
    )


def any_options(seed: int) -> Options:
    """Options of a random block, with routers whose number of experts a token varies."""
    plain = random_options(seed)
    r = random.Random(f"any {seed}")
    modes = ["topk", "topk", "margin", "threshold"]
    if plain.experts % plain.choices == 0:
        modes.append("topk_per_group")
    single = plain.groups == 1
    return replace(
        plain,
        mode=r.choice(modes) if plain.raised and single else "topk",
        capacity=r.choice((0.5, 1.25)) if plain.raised and r.random() < 0.25 else 0.0,
    )


def random_block(seed: int, *, raised: bool | None = None) -> Block:
    """A random block."""
    return build(random_options(seed, raised=raised))

"""Every op: documented, its types agree with its meaning, and its gradient with PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moec.autodiff import differentiate
from moec.errors import IRError
from moec.interp import run
from moec.ir import Builder, Graph, Type, Value, dim, parse, verify
from moec.ir.opdef import all_ops
from moec.ir.types import DTYPES
from moec.ops import routing
from moec.runtime.launch import row_tile_bound

T = dim("T")
A = 2 * T
EXPERTS, CHOICES = 4, 2


@dataclass(frozen=True)
class Case:
    """One use of an op: operands by type, or by name for routing data; attributes; input range."""

    kind: str
    operands: Sequence[Any] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    span: tuple[float, float] = (-2.0, 2.0)

    def __str__(self) -> str:
        shapes = ",".join(str(v) for v in self.operands)
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items())
        return f"{self.kind}({shapes}){attrs}".replace(" ", "")


def f64(*shape: Any) -> Type:
    return Type("f64", shape)


# what dispatch gives; "pairs" are indices that may hold EXPERTS, "no expert"
ROUTED = {
    "perm": Type("i32", (A,)),
    "offsets": Type("i32", (EXPERTS + 1,)),
    "inverse": Type("i32", (T, CHOICES)),
    "pairs": Type("i32", (T, CHOICES)),
}
BOOL, MATRIX, ROWS = Type("bool", (T, 4)), f64(T, 4), f64(A, 4)
INDEX = Type("i64", (T, 2))

UNARY = ["neg", "abs", "sign", "exp", "erf", "sigmoid", "tanh", "relu", "silu", "floor"]
UNARY += ["log_sigmoid"]
POSITIVE = ["log", "log1p", "sqrt", "rsqrt", "reciprocal"]
BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]
CASES = [
    *(Case(f"t.{name}", [MATRIX]) for name in UNARY),
    *(Case(f"t.{name}", [MATRIX], span=(0.3, 2.0)) for name in POSITIVE),
    *(Case(f"t.{name}", [MATRIX, MATRIX], span=(0.3, 2.0)) for name in BINARY),
    *(Case(f"t.{name}", [MATRIX, f64(4)], span=(0.3, 2.0)) for name in BINARY),
    *(Case(f"t.{name}", [f64(T, 1), MATRIX], span=(0.3, 2.0)) for name in BINARY),
    *(Case(f"t.{name}", [f64(), f64(3, 1, 4)], span=(0.3, 2.0)) for name in BINARY),
    *(Case(f"t.{name}", [MATRIX], {"other": 0.7}) for name in BINARY),
    *(Case(f"t.{name}", [MATRIX, f64(T, 1)]) for name in COMPARE),
    *(Case(f"t.{name}", [MATRIX], {"other": 0.5}) for name in COMPARE),
    Case("t.add", [INDEX], {"other": 3}),
    Case("t.logical_not", [BOOL]),
    Case("t.logical_and", [BOOL, Type("bool", (4,))]),
    Case("t.logical_or", [BOOL, BOOL]),
    Case("t.gelu", [MATRIX]),
    Case("t.gelu", [MATRIX], {"approximate": "tanh"}),
    Case("t.softplus", [MATRIX]),
    Case("t.softplus", [MATRIX], {"beta": 2.0, "threshold": 1.5}),
    Case("t.clamp", [MATRIX], {"min": -0.5, "max": 0.7}),
    Case("t.clamp", [MATRIX], {"max": 0.7}),
    Case("t.clamp", [MATRIX], {"min": 0.1}),
    Case("t.clamp", [INDEX], {"max": 1}),
    Case("t.pow", [MATRIX], {"exponent": 2.0}),
    Case("t.pow", [MATRIX], {"exponent": 0.0}),
    Case("t.pow", [MATRIX], {"exponent": 2.5}, span=(0.3, 2.0)),
    Case("t.cast", [MATRIX], {"dtype": "f64"}),
    Case("t.cast", [MATRIX], {"dtype": "i32"}),
    Case("t.where", [BOOL, MATRIX, MATRIX]),
    Case("t.where", [Type("bool", (T, 1)), f64(4), f64()]),
    Case("t.full", [], {"value": 1.5, "dtype": "f64", "shape": (3, 2)}),
    Case("t.reshape", [f64(T, 4)], {"shape": (2 * T, 2)}),
    Case("t.permute", [f64(T, 2, 3)], {"dims": (2, 0, 1)}),
    Case("t.expand", [f64(T, 1, 3)], {"shape": (2, T, 4, 3)}),
    Case("t.slice", [f64(T, 7)], {"dim": -1, "start": 1, "stop": 6, "step": 2}),
    Case("t.slice", [f64(T, 7)], {"dim": 1, "start": 3, "stop": 3}),
    Case("t.unslice", [f64(T, 3)], {"dim": 1, "start": 1, "stop": 6, "step": 2, "size": 7}),
    Case("t.split", [f64(T, 6)], {"parts": 3}),
    Case("t.split", [f64(T, 6)], {"parts": 2, "layout": "interleave"}),
    Case("t.merge", [MATRIX, MATRIX, MATRIX]),
    Case("t.merge", [MATRIX, MATRIX], {"layout": "interleave"}),
    Case("t.concat", [f64(T, 2), f64(T, 3)], {"dim": 1}),
    Case("t.concat", [f64(T, 2), f64(3, 2)], {"dim": 0}),
    Case("t.stack", [MATRIX, MATRIX]),
    Case("t.sum", [f64(T, 2, 3)], {"dims": (0, -1)}),
    Case("t.sum", [f64(T, 2, 3)], {"dims": (1,), "keepdim": True}),
    Case("t.sum", [BOOL], {"dims": (0,)}),
    Case("t.mean", [f64(T, 2, 3)], {"dims": (1, 2)}),
    Case("t.amax", [f64(T, 2, 3)], {"dims": (1, 2)}),
    Case("t.logsumexp", [f64(T, 2, 3)], {"dims": (-1,), "keepdim": True}),
    Case("t.logsumexp", [f64(T, 2, 3)], {"dims": (1, 2)}),
    Case("t.softmax", [MATRIX], {"dim": -1}),
    Case("t.softmax", [f64(T, 2, 3)], {"dim": 1}),
    Case("t.cumsum", [MATRIX], {"dim": 0}),
    Case("t.topk", [MATRIX], {"k": 3}),
    Case("t.topk", [f64(3, 4)], {"k": 2, "dim": 0, "largest": False}),
    Case("t.gather", [MATRIX, INDEX], {"dim": -1}),
    Case("t.take", [f64(4, 3), INDEX]),
    Case("t.take", [f64(5), Type("i64", (T, 1))]),
    Case("t.backward", [MATRIX, MATRIX], {"of": "softmax", "dim": -1}),
    Case("t.backward", [MATRIX, MATRIX], {"of": "softplus", "beta": 2.0, "threshold": 1.5}),
    Case("t.backward", [MATRIX, MATRIX], {"of": "gelu", "approximate": "tanh"}),
    *(
        Case("t.backward", [MATRIX, MATRIX], {"of": of})
        for of in ("sigmoid", "tanh", "silu", "log_sigmoid")
    ),
    Case("t.scatter_add", [MATRIX, INDEX, f64(T, 2)], {"dim": 1}),
    Case("t.scatter", [MATRIX, Type("i64", (T, 1)), f64(T, 1)], {"dim": 1}),
    Case("t.scatter", [MATRIX, INDEX], {"dim": 1, "value": 2.0}),
    Case("t.one_hot", [INDEX], {"classes": 3}),
    Case("t.take", [f64(3, 4), INDEX]),
    Case("t.take", [f64(3, T), Type("i64", (2,))]),
    Case("t.index_add", [f64(3, 4), Type("i64", (2,)), f64(2, 4)]),
    Case("t.sort", [MATRIX], {"dim": 1, "descending": True}),
    Case("t.sort", [f64(3, T)], {"dim": 0}),
    Case("t.norm", [MATRIX], {"dim": -1}),
    Case("t.arange", [], {"size": 2 * T, "dtype": "i64", "start": 3, "step": 2}),
    Case("t.size", [], {"size": T, "dtype": "f64"}),
    Case("t.quotient", [INDEX], {"mode": "floor", "other": 2}),
    Case("t.quotient", [INDEX], {"mode": "trunc", "other": 3}),
    Case("t.remainder", [INDEX], {"other": 2}),
    Case("t.mean", [f64(T, 3)], {"dims": (0,)}),
    Case("t.linear", [f64(T, 4), f64(3, 4)]),
    Case("t.linear", [f64(T, 2, 4), f64(3, 4), f64(3)]),
    Case("t.linear", [f64(4), f64(3, 4), f64(3)]),
    Case("t.matmul", [f64(T, 4), f64(4, 3)]),
    Case("t.matmul", [f64(2, T, 4), f64(4, 3)]),
    Case("t.matmul", [f64(2, 1, 3, 4), f64(5, 4, T)]),
    *(Case("moe.activate", [MATRIX], {"fn": fn}) for fn in routing.ACTIVATIONS),
    Case("moe.activate", [MATRIX], {"fn": "softmax", "groups": 2}),
    Case("moe.select", [MATRIX], {"k": 2}),
    Case("moe.select", [MATRIX, f64(4)], {"k": 2, "mode": "margin", "theta": 0.5}),
    Case("moe.select", [MATRIX], {"k": 2, "mode": "threshold", "theta": 0.2}),
    Case("moe.select", [MATRIX], {"k": 2, "mode": "topk_per_group"}),
    Case("moe.select", [f64(T, 8)], {"k": 2, "mode": "group_limited", "groups": 4}),
    *(
        Case("moe.weight", [MATRIX, "pairs"], {"source": s, "norm": n, "eps": 0.1, "scale": 1.5})
        for s in ("gather", "softmax", "sigmoid")
        for n in ("none", "sum", "clamp_min")
    ),
    Case("moe.limit", ["pairs"], {"experts": EXPERTS, "capacity": 2}),
    Case("moe.limit", ["pairs"], {"experts": EXPERTS, "capacity": T, "order": "token_major"}),
    Case("moe.one_group", [], {"rows": T}),
    Case("moe.round_tokens", ["pairs", MATRIX], {"tile": 2, "groups": 2}),
    Case("moe.dispatch", ["pairs"], {"experts": EXPERTS}),
    Case("moe.dispatch_picks", [Type("i32", (3, 2))], {"tokens": 4}),
    Case("moe.gather", [MATRIX, "perm", "inverse"]),
    Case("moe.permute", [f64(T, CHOICES), "perm", "inverse"]),
    Case("moe.unpermute", [f64(A), "perm", "inverse"]),
    Case("moe.combine", [ROWS, "perm", "inverse"]),
    Case("moe.combine", [ROWS, "perm", "inverse", f64(T, CHOICES)]),
    Case("moe.row_scale", [ROWS, f64(A, 1)]),
    Case("moe.row_dot", [ROWS, ROWS], {"dtype": "f64"}),
    Case("moe.grouped_mm", [ROWS, f64(EXPERTS, 3, 4), "offsets"]),
    Case("moe.grouped_mm", [ROWS, f64(EXPERTS, 4, 3), "offsets"], {"transposed": True}),
    Case("moe.grouped_outer", [ROWS, f64(A, 3), "offsets"]),
    Case("moe.expert_rows", [f64(EXPERTS, 3), "offsets"], {"rows": A}),
    Case("moe.group_sum", [ROWS, "offsets"]),
]
BY_NAME = [pytest.param(case, id=str(case)) for case in CASES]


def routed(tokens: int, dropped: bool) -> dict[str, torch.Tensor]:
    """A dispatch of random pairs, some of which have no expert if ``dropped``."""
    pairs = torch.rand(tokens, EXPERTS + dropped).argsort(-1)[:, :CHOICES].int()
    perm, offsets, inverse = routing.dispatch(pairs, EXPERTS)
    return {"pairs": pairs, "perm": perm, "offsets": offsets, "inverse": inverse}


def tensor(type_: Type, tokens: int, span: tuple[float, float]) -> torch.Tensor:
    shape = [int(d.subs({T: tokens})) if not isinstance(d, int) else d for d in type_.shape]
    if type_.dtype == "bool":
        return torch.rand(shape) < 0.5
    if not type_.is_float:
        # distinct along the last axis: a scatter to equal places has no definite result
        return torch.rand([*shape[:-1], 3]).argsort(-1)[..., : shape[-1]].to(DTYPES[type_.dtype])
    low, high = span
    return torch.rand(shape, dtype=DTYPES[type_.dtype]) * (high - low) + low


def graph_of(case: Case) -> Graph:
    b = Builder()
    types = [ROUTED[v] if isinstance(v, str) else v for v in case.operands]
    inputs = [Value(t, f"in{i}") for i, t in enumerate(types)]
    results = b(case.kind, *inputs, **case.attrs)
    outputs = [results] if isinstance(results, Value) else list(results)
    # ties the name T to a size where no operand does
    return b.graph("g", [*inputs, Value(Type("bool", (T,)), "tokens")], outputs)


def arguments(case: Case, tokens: int, data: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = [data[v] if isinstance(v, str) else tensor(v, tokens, case.span) for v in case.operands]
    return [*found, torch.ones(tokens, dtype=torch.bool)]


def test_every_op_has_a_case_and_a_docstring() -> None:
    ops = all_ops()
    tested = {case.kind for case in CASES}
    assert set(ops) - tested == {k for k in ops if k.startswith("kern.")}
    for kind, declaration in ops.items():
        assert len(declaration.doc) > 10 and declaration.doc[0].strip(), kind


@pytest.mark.parametrize("case", BY_NAME)
def test_types_agree_with_the_meaning(case: Case) -> None:
    """``run`` compares each result with its declared type."""
    graph = graph_of(case)
    verify(graph)
    for tokens in (0, 1, 5):
        for float64 in (False, True):
            run(graph, arguments(case, tokens, routed(tokens, True)), float64=float64)


DIFFERENTIABLE = [
    pytest.param(case, id=str(case)) for case in CASES if all_ops()[case.kind].vjp is not None
]


def live_rows(value: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of no expert hold anything, in gradients too: what reads rows does not look at them."""
    rows = int(data["inverse"].numel())
    if value.shape[:1] != (rows,):
        return value
    return value * (torch.arange(rows) < data["offsets"][-1]).reshape(-1, *[1] * (value.dim() - 1))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients_agree_with_autograd(case: Case, tokens: int) -> None:
    if tokens == 0 and case.kind == "t.amax":
        pytest.skip("PyTorch has no maximum of nothing")
    graph = graph_of(case)
    joint = verify(differentiate(graph, [v for v in graph.inputs if v.type.is_float]))
    for dropped in (False, True):
        check_gradients(case, joint, tokens, dropped)


def check_gradients(case: Case, joint: Graph, tokens: int, dropped: bool) -> None:
    data = routed(tokens, dropped)
    given = arguments(case, tokens, data)
    leaves = [g.clone().requires_grad_(g.is_floating_point()) for g in given]
    outputs = [o for o in run(graph_of(case), leaves) if o.is_floating_point()]
    if not any(o.requires_grad for o in outputs):
        return
    cotangents = [live_rows(torch.randn_like(o), data) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    actual = run(joint, [*given, *cotangents])[len(joint.outputs) :]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(live_rows(a, data), live_rows(e, data), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum"])
def test_numbers_must_fit_the_dtype(name: str) -> None:
    b = Builder()
    for x in (Value(INDEX, "i"), Value(BOOL, "b")):
        with pytest.raises(IRError, match="needs floats"):
            b(f"t.{name}", x, other=0.5)


def test_selection_among_equal_scores_takes_distinct_experts() -> None:
    scores = torch.zeros(5, EXPERTS)
    for mode in ("topk", "group_limited", "margin"):
        attrs = {"groups": 2, "topk_groups": 1, "theta": 1.0}
        idx = routing.select(scores, 2, mode, attrs)
        assert all(len(set(row)) == 2 for row in idx.tolist())
        assert idx.min() >= 0 and idx.max() < EXPERTS


def test_selection_modes() -> None:
    scores = torch.tensor([[0.1, 0.6, 0.5, 0.0], [0.9, 0.0, 0.1, 0.2]])
    assert routing.select(scores, 2, "margin", {"theta": 0.2}).tolist() == [[1, 2], [0, 4]]
    assert routing.select(scores, 2, "threshold", {"theta": 0.3}).tolist() == [[1, 2], [0, 4]]
    assert routing.select(scores, 2, "topk_per_group", {}).tolist() == [[1, 2], [0, 3]]
    best = routing.limit_groups(scores, {"groups": 2, "topk_groups": 1, "group_score": "max"})
    assert best.isinf().tolist() == [[False, False, True, True], [False, False, True, True]]


def test_capacity_drops_by_the_order_of_choices_or_tokens() -> None:
    idx = torch.tensor([[0, 1], [1, 0], [1, 2]], dtype=torch.int32)
    assert routing.limit(idx, 3, 1, "choice_major").tolist() == [[0, 3], [1, 3], [3, 2]]
    assert routing.limit(idx, 3, 1, "token_major").tolist() == [[0, 1], [3, 3], [3, 2]]


def test_a_token_without_any_expert_weighs_nothing() -> None:
    scores = torch.randn(2, EXPERTS)
    idx = torch.tensor([[EXPERTS, EXPERTS], [1, EXPERTS]])
    for source in ("gather", "softmax", "sigmoid"):
        for norm in ("none", "sum"):
            w = routing.weight(scores, idx, source, norm, 0.0, 1.0)
            assert w[0].tolist() == [0.0, 0.0] and w[1, 1] == 0.0
            if norm == "sum" or source == "softmax":
                assert w[1, 0] == 1.0


def dropping_block() -> Graph:
    """A block that drops pairs beyond a capacity, with everything that rows pass through."""
    return parse(
        """
graph @drop(%x: f64[T, 4], %r: f64[4, 4], %w1: f64[4, 3, 4], %b1: f64[4, 3], %w2: f64[4, 4, 3]) {
  %logits = t.linear(%x, %r) : f64[T, 4]
  %scores = moe.activate(%logits) {fn="softmax"} : f64[T, 4]
  %all = moe.select(%scores) {k=2} : i32[T, 2]
  %idx = moe.limit(%all) {experts=4, capacity=2} : i32[T, 2]
  %w = moe.weight(%scores, %idx) {norm="sum", eps=0.1} : f64[T, 2]
  %perm, %off, %inv = moe.dispatch(%idx) {experts=4} : i32[2*T], i32[5], i32[T, 2]
  %xs = moe.gather(%x, %perm, %inv) : f64[2*T, 4]
  %ws = moe.permute(%w, %perm, %inv) : f64[2*T]
  %col = t.reshape(%ws) {shape=[2*T, 1]} : f64[2*T, 1]
  %h = moe.grouped_mm(%xs, %w1, %off) : f64[2*T, 3]
  %rows = moe.expert_rows(%b1, %off) {rows=2*T} : f64[2*T, 3]
  %hb = t.add(%h, %rows) : f64[2*T, 3]
  %a = t.silu(%hb) : f64[2*T, 3]
  %aw = moe.row_scale(%a, %col) : f64[2*T, 3]
  %ys = moe.grouped_mm(%aw, %w2, %off) : f64[2*T, 4]
  %y = moe.combine(%ys, %perm, %inv) : f64[T, 4]
  %dots = moe.row_dot(%ys, %xs) {dtype="f64"} : f64[2*T]
  %back = moe.unpermute(%dots, %perm, %inv) : f64[T, 2]
  return %y, %back
}"""
    )


def naive_drop(x: Any, r: Any, w1: Any, b1: Any, w2: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same block, one pair at a time."""
    scores = (x @ r.t()).softmax(-1)
    chosen = scores.topk(2, dim=-1).indices
    used, kept = [0] * EXPERTS, torch.zeros_like(chosen, dtype=torch.bool)
    for k in range(2):
        for t in range(x.shape[0]):
            used[chosen[t, k]] += 1
            kept[t, k] = used[chosen[t, k]] <= 2
    picked = scores.gather(1, chosen) * kept
    w = picked / (picked.sum(-1, keepdim=True) + 0.1)
    y, back = 0 * x, 0 * w
    for t in range(x.shape[0]):
        for k in range(2):
            if kept[t, k]:
                e = chosen[t, k]
                a = torch.nn.functional.silu(w1[e] @ x[t] + b1[e]) * w[t, k]
                y[t] = y[t] + w2[e] @ a
                back[t, k] = back[t, k] + (w2[e] @ a) @ x[t]
    return y, back


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_dropped_pairs_add_nothing_forward_and_backward(tokens: int) -> None:
    graph = dropping_block()
    shapes = [(tokens, 4), (4, 4), (4, 3, 4), (4, 3), (4, 4, 3)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected = naive_drop(*leaves)
    cotangents = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(expected, leaves, cotangents, materialize_grads=True)
    joint = verify(differentiate(graph, graph.inputs))
    actual = run(joint, [*(v.detach() for v in leaves), *cotangents])
    torch.testing.assert_close(actual, (*expected, *wanted), rtol=1e-9, atol=1e-12)


def test_selective_differentiation_builds_only_what_is_wanted() -> None:
    graph = dropping_block()
    joint = differentiate(graph, graph.inputs[:1])
    assert [g is not None for g in joint.gradients] == [True, False, False, False, False]
    with pytest.raises(IRError, match="has gradients already"):
        differentiate(joint, graph.inputs)


def test_operations_without_gradient_say_so() -> None:
    graph = parse(
        "graph @g(%x: f32[T]) { %y = t.unslice(%x) {dim=0, start=0, stop=T, size=2*T} : f32[2*T]"
        " // m.py:4\n return %y }"
    )
    with pytest.raises(IRError, match=r"m\.py:4: t\.unslice has no gradient"):
        differentiate(graph, graph.inputs)


def test_interpreter_checks_arguments() -> None:
    graph = parse("graph @g(%x: f32[T, 2*T]) where 1 <= T <= 3 { return %x }")
    for shape, message in (((2,), "got shape"), ((2, 3), "here, got"), ((4, 8), "outside its")):
        with pytest.raises(IRError, match=message):
            run(graph, [torch.zeros(shape)])
    with pytest.raises(IRError, match="takes 1 tensors, got 0"):
        run(graph, [])


@pytest.mark.parametrize("pairs", [0, 1, 5, 64])
def test_row_tile_bound_is_tight(pairs: int) -> None:
    for experts in (1, 3, 8):
        for tile in (1, 4, 16):
            bound = row_tile_bound(pairs, experts, tile)
            used = min(experts, pairs)
            worst = [1] * (used - 1) + [pairs - used + 1] if used else []
            # the worst case has one row more than a whole number of tiles in every group
            assert sum(math.ceil(r / tile) for r in worst) <= bound
            assert bound * tile <= pairs + used * (tile - 1)

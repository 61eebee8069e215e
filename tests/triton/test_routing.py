"""Routing kernels: order of rows, pairs without an expert, ties, NaN, groups, fallbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moec.ir import Builder, Graph, Type, Value, dim
from moec.ir.dims import ceildiv, evaluate
from moec.manager import PassManager
from moec.ops import routing

from .emitted import built, run

T = dim("T")


def dispatch_graph(experts: int, choices: int) -> Graph:
    """Indices in, the order of rows out."""
    b, index = Builder(), Value(Type("i32", (T, choices)), "index")
    outputs = b("moe.dispatch", index, experts=experts, hint=("perm", "offsets", "inverse"))
    return fused(b.graph("dispatch", [index], outputs))


def router_graph(experts: int, choices: int, fn: str = "softmax", **select: Any) -> Graph:
    """Logits in; scores, indices, weights and the order of rows out."""
    b, logits = Builder(), Value(Type("f32", (T, experts)), "logits")
    scores = b("moe.activate", logits, fn=fn, hint="scores")
    index = b("moe.select", scores, k=choices, hint="index", **select)
    weights = b("moe.weight", scores, index, norm="sum", eps=1e-20, hint="weights")
    outputs = b("moe.dispatch", index, experts=experts, hint=("perm", "offsets", "inverse"))
    return fused(b.graph("router", [logits], [scores, index, weights, *outputs]))


def fused(graph: Graph) -> Graph:
    """The graph with its routing as one kernel."""
    new = PassManager("fuse-routing").run(graph)
    assert [op.kind for op in new.ops] == ["kern.routing"]
    return new


def check_order(index: torch.Tensor, experts: int, results: list[torch.Tensor]) -> None:
    """perm is a stable order by expert; pairs without one come last and have no row."""
    perm, offsets, inverse = results
    flat = index.flatten().long()
    order = torch.sort(flat, stable=True).indices
    assert torch.equal(perm.long(), order)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    assert torch.equal(offsets.long(), torch.cat([torch.zeros(1).long(), counts.cumsum(0)]))
    rows = torch.empty_like(flat)
    rows[order] = torch.arange(len(flat))
    assert torch.equal(inverse.flatten().long(), torch.where(flat < experts, rows, -1))


@pytest.mark.parametrize("experts, choices", [(8, 2), (5, 3), (130, 6), (1, 1)])
def test_dispatch_with_pairs_without_an_expert(experts: int, choices: int, tmp_path: Path) -> None:
    module = built(dispatch_graph(experts, choices), tmp_path)
    for tokens in (0, 1, 64, 150):
        index = torch.randint(0, experts + 1, (tokens, choices), dtype=torch.int32)
        check_order(index, experts, run(module, [index]))
    for value in (0, experts):
        index = torch.full((70, choices), value, dtype=torch.int32)
        check_order(index, experts, run(module, [index]))


@pytest.mark.parametrize("fn", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
@pytest.mark.parametrize("experts, choices", [(8, 2), (12, 5), (4, 4), (3, 1)])
def test_scores_and_selection(fn: str, experts: int, choices: int, tmp_path: Path) -> None:
    module = built(router_graph(experts, choices, fn), tmp_path)
    for tokens in (0, 1, 41, 130):
        logits = torch.randn(tokens, experts) * 4
        scores, index, weights, *order = run(module, [logits])
        x = logits.double()
        wanted = {
            "softmax": x.softmax(-1),
            "sigmoid": x.sigmoid(),
            "sqrtsoftplus": torch.nn.functional.softplus(x).sqrt(),
            "identity": x,
        }[fn]
        best = torch.sort(wanted, dim=-1, descending=True, stable=True)
        assert torch.equal(index.long(), best.indices[:, :choices])
        top = best.values[:, :choices]
        torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-6)
        expected = top / (top.sum(-1, keepdim=True) + 1e-20)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-4)
        check_order(index, experts, order)


def test_ties_and_nan_and_infinity(tmp_path: Path) -> None:
    module = built(router_graph(6, 3, "identity"), tmp_path)
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [
            [1.0, 1, 1, 1, 1, 1],
            [0.0, -0.0, 0, 2, 2, 0],
            [1.0, nan, 5, nan, 2, 3],
            [nan] * 6,
            [-inf] * 6,
            [inf, nan, inf, 1, -inf, 0],
        ]
    )
    index = run(module, [logits])[1]
    assert index.tolist() == [[0, 1, 2], [3, 4, 0], [1, 3, 2], [0, 1, 2], [0, 1, 2], [1, 0, 2]]


@pytest.mark.parametrize("group_score", ["max", "sum_top2"])
@pytest.mark.parametrize("experts, groups, kept", [(8, 4, 2), (12, 3, 1), (20, 5, 3)])
@pytest.mark.parametrize("mask_value", [float("-inf"), 0.0])
def test_groups(
    group_score: str, experts: int, groups: int, kept: int, mask_value: float, tmp_path: Path
) -> None:
    options = {"groups": groups, "topk_groups": kept, "group_score": group_score}
    graph = router_graph(
        experts, 2, "sigmoid", mode="group_limited", mask_value=mask_value, **options
    )
    module = built(graph, tmp_path)
    assert "no kernel" not in module.path.read_text()
    logits = torch.randn(67, experts)
    index = run(module, [logits])[1]
    families = logits.sigmoid().reshape(67, groups, -1)
    count = 1 if group_score == "max" else 2
    best = families.topk(count, -1).values.sum(-1).topk(kept, -1).indices
    keep = torch.zeros(67, groups, dtype=torch.bool).scatter(1, best, True)
    limited = families.masked_fill(~keep[..., None], mask_value).flatten(1)
    assert torch.equal(index.long(), limited.topk(2, -1).indices)


def test_one_choice_in_each_group_is_an_expression(tmp_path: Path) -> None:
    module = built(router_graph(6, 2, "softmax", mode="topk_per_group"), tmp_path)
    assert "not in the kernel: selection by" in module.path.read_text()
    logits = torch.randn(50, 6)
    _, index, weights, *order = run(module, [logits])
    assert weights.isfinite().all()
    check_order(index, 6, order)


@pytest.mark.parametrize("mode, theta", [("margin", 0.1), ("threshold", 0.15), ("first", 0.0)])
@pytest.mark.parametrize("experts, choices", [(8, 2), (5, 3), (4, 4)])
def test_as_many_experts_as_are_good_enough(
    mode: str, theta: float, experts: int, choices: int, tmp_path: Path
) -> None:
    module = built(router_graph(experts, choices, mode=mode, theta=theta), tmp_path)
    assert "not in the kernel" not in module.path.read_text()
    for tokens in (0, 1, 41, 130):
        logits = torch.randn(tokens, experts)
        _, index, weights, *order = run(module, [logits])
        scores = logits.double().softmax(-1)
        top = torch.sort(scores, dim=-1, descending=True, stable=True)
        values, wanted = top.values[:, :choices], top.indices[:, :choices]
        far = {"margin": values[:, :1] - values > theta, "threshold": values <= theta}
        none = far.get(mode, torch.zeros_like(values, dtype=torch.bool))
        assert torch.equal(index.long(), wanted.masked_fill(none, experts))
        kept = values.masked_fill(none, 0)
        shares = (kept / kept.sum(-1, keepdim=True)).nan_to_num()
        torch.testing.assert_close(weights.double(), shares, rtol=1e-3, atol=1e-4)
        check_order(index, experts, order)


def test_no_expert_is_good_enough(tmp_path: Path) -> None:
    module = built(router_graph(4, 2, mode="threshold", theta=0.9), tmp_path)
    _, index, weights, perm, offsets, inverse = run(module, [torch.zeros(70, 4)])
    assert (index == 4).all() and not weights.any() and not offsets.any() and (inverse == -1).all()
    assert torch.equal(perm, torch.arange(140, dtype=torch.int32))


def limited_graph(experts: int, choices: int, capacity: Any, order: str, scores: bool) -> Graph:
    """Logits or indices in; what each expert takes, and the order of rows, out."""
    b = Builder()
    type_ = Type("f32", (T, experts)) if scores else Type("i32", (T, choices))
    given = Value(type_, "logits" if scores else "index")
    index = b("moe.select", given, k=choices, hint="index") if scores else given
    limits = {"experts": experts, "capacity": capacity, "order": order}
    limited = b("moe.limit", index, hint="limited", **limits)
    outputs = b("moe.dispatch", limited, experts=experts, hint=("perm", "offsets", "inverse"))
    return fused(
        b.graph("limited", [given], [index, limited, *outputs] if scores else [limited, *outputs])
    )


@pytest.mark.parametrize("order", ["token_major", "choice_major"])
@pytest.mark.parametrize(
    "experts, choices, capacity", [(4, 1, 9), (3, 2, ceildiv(5 * T, 8)), (8, 5, 7)]
)
@pytest.mark.parametrize("scores", [True, False], ids=["scores", "indices"])
def test_capacity(
    order: str, experts: int, choices: int, capacity: Any, scores: bool, tmp_path: Path
) -> None:
    module = built(limited_graph(experts, choices, capacity, order, scores), tmp_path)
    assert "not in the kernel" not in module.path.read_text()
    for tokens in (0, 1, 33, 150):
        logits = torch.randn(tokens, experts) + 2 * torch.eye(experts)[0]
        given = torch.randint(-1, experts + 1, (tokens, choices), dtype=torch.int32)
        results = run(module, [logits if scores else given])
        index, limited, *order_ = results if scores else [given, *results]
        index = index.masked_fill(index < 0, experts)
        slots = evaluate(capacity, {"T": tokens})
        assert torch.equal(limited, routing.limit(index, experts, slots, order))
        check_order(limited, experts, order_)

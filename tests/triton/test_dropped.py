"""Pairs without an expert, from a capacity limit, through whole blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec import interp
from moec.ir import Builder, Graph, Type, Value, dim

from .emitted import SMALL, SMALL_TMA, built, cotangents, error, lowered, run

T = dim("T")


def limited_block(dtype: str, *, leaky: bool = False) -> Graph:
    """Three pairs an expert at most; ``leaky`` also gives the sum over all rows."""
    b = Builder({"T": (0, 4096)})
    x = Value(Type(dtype, (T, 16)), "x")
    logits = Value(Type("f32", (T, 4)), "logits")
    up, down = Value(Type(dtype, (4, 24, 16)), "up"), Value(Type(dtype, (4, 16, 24)), "down")
    scores = b("moe.activate", logits, fn="softmax", hint="scores")
    index = b("moe.select", scores, k=2, hint="index")
    index = b("moe.limit", index, experts=4, capacity=3, hint="kept")
    weights = b("moe.weight", scores, index, norm="sum", hint="weights")
    perm, offsets, inverse = b(
        "moe.dispatch", index, experts=4, hint=("perm", "offsets", "inverse")
    )
    rows = b("moe.gather", x, perm, inverse, hint="rows")
    act = b("t.silu", b("moe.grouped_mm", rows, up, offsets, hint="h"), hint="act")
    out = b("moe.grouped_mm", act, down, offsets, hint="out")
    y = b("moe.combine", out, perm, inverse, weights, dtype=dtype, hint="y")
    outputs = [y, b("t.sum", out, dims=(0,), hint="total")] if leaky else [y]
    return b.graph("limited", [x, logits, up, down], outputs)


def data_for(graph: Graph, dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    """Inputs and cotangents."""
    x = torch.randn(tokens, 16).to(dtype)
    weights = [torch.randn(4, 24, 16).to(dtype), torch.randn(4, 16, 24).to(dtype)]
    return [x, torch.randn(tokens, 4), *weights, *cotangents(graph, tokens)]


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("dtype, options", [("f32", SMALL), ("bf16", SMALL), ("bf16", SMALL_TMA)])
def test_dropped_pairs(tokens: int, dtype: str, options: str, tmp_path: Path) -> None:
    graph = lowered(limited_block(dtype), options)
    kind = torch.float32 if dtype == "f32" else torch.bfloat16
    data = data_for(graph, kind, tokens)
    exact = interp.run(graph, data, float64=True)
    for actual, wanted in zip(run(built(graph, tmp_path), data), exact, strict=True):
        assert error(actual, wanted) <= (1e-5 if dtype == "f32" else 2e-2)


def test_rows_without_an_expert_are_zero_for_who_reads_them(tmp_path: Path) -> None:
    graph = lowered(limited_block("f32", leaky=True), SMALL)
    module = built(graph, tmp_path)
    assert "rows without an expert are read by t.sum" in module.path.read_text()
    data = data_for(graph, torch.float32, 40)
    exact = interp.run(graph, data, float64=True)
    for actual, wanted in zip(run(module, data), exact, strict=True):
        assert error(actual, wanted) <= 1e-5

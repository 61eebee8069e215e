"""Routers in tensor ops, as models write them, must become routing ops with equal numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moec.interp import run
from moec.ir import Graph, dim, parse
from moec.pipeline import RAISE
from tests.graphs import (
    DEEPSEEK_V3,
    GPT_OSS,
    MIXTRAL,
    Options,
    assert_same,
    build,
    passed,
    random_options,
    random_size,
)

T = dim("T")


def raised_ops(options: Options) -> dict[str, dict[str, Any]]:
    graph = passed(RAISE, build(replace(options, activation="squared_relu")).graph)
    left = {"t.topk", "t.softmax", "t.sigmoid", "t.gather", "t.sum", "t.div", "t.where"}
    assert not left & {op.kind for op in graph.ops}
    kinds = ("moe.activate", "moe.select", "moe.weight")
    return {op.kind: dict(op.attrs) for op in graph.ops if op.kind in kinds}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_routers_of_models_are_recognised(dtype: str) -> None:
    found = {
        name: raised_ops(replace(options, dtype=dtype))
        for name, options in {
            "mixtral": replace(MIXTRAL, norm="sum"),
            "olmoe": replace(MIXTRAL, norm="none"),
            "deepseek_v3": DEEPSEEK_V3,
            "gpt_oss": GPT_OSS,
        }.items()
    }
    softmax, plain = {"fn": "softmax"}, {"k": 2}
    assert found["olmoe"] == {"moe.activate": softmax, "moe.select": plain, "moe.weight": {}}
    assert found["mixtral"] == {
        "moe.activate": softmax,
        "moe.select": plain,
        "moe.weight": {"norm": "sum", "eps": 1e-20},
    }
    assert found["gpt_oss"] == {"moe.select": plain, "moe.weight": {"source": "softmax"}}
    limited = {
        "mode": "group_limited",
        "groups": 4,
        "topk_groups": 2,
        "group_score": "sum_top2",
        "mask_value": float("-inf"),
    }
    assert found["deepseek_v3"] == {
        "moe.activate": {"fn": "sigmoid"},
        "moe.select": {**plain, **limited},
        "moe.weight": {"norm": "sum", "eps": 1e-20, "scale": 2.5},
    }


@pytest.mark.parametrize("seed", range(40))
def test_random_routers_are_recognised_with_equal_numbers(seed: int) -> None:
    options = random_options(seed, raised=False)
    found = raised_ops(options)
    as_raised = replace(options, raised=True)
    wanted = {
        op.kind: dict(op.attrs)
        for op in build(as_raised).graph.ops
        if op.kind in ("moe.activate", "moe.select", "moe.weight")
    }
    assert {k: meaningful(v) for k, v in found.items()} == {
        k: meaningful(v) for k, v in wanted.items()
    }
    given = build(options).arguments(*random_size(seed), seed)
    expected = run(build(options).graph, given, float64=True)
    actual = run(passed(RAISE, build(options).graph), given, float64=True)
    assert_same(actual, expected, exact=True)


def meaningful(attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes without those that are at their defaults."""
    defaults = {"source": "gather", "norm": "none", "eps": 0.0, "scale": 1.0}
    defaults["mask_value"] = float("-inf")
    return {k: v for k, v in attrs.items() if defaults.get(k) != v}


def routed(text: str) -> Graph:
    """A graph that ends in a dispatch of ``%idx``; ``%s`` are scores of 8 experts."""
    return parse(
        "graph @g(%s: f32[T, 8], %b: f32[8], %c: f32[T, 1]) {\n"
        + text
        + """
  %small = t.cast(%idx) {dtype="i32"} : i32[T, 1]
  %perm, %off, %inv = moe.dispatch(%small) {experts=8} : i32[T], i32[9], i32[T, 1]
  return %perm, %inv\n}"""
    )


LIMIT = """
  %parts = t.reshape(%s) {shape=[T, 4, 2]} : f32[T, 4, 2]
  %best = t.amax(%parts) {dims=[-1]} : f32[T, 4]
  %v, %at = t.topk(%best) {k=2, dim=-1, largest=true} : f32[T, 2], i64[T, 2]
  %zeros = t.full() {dtype="f32", shape=[T, 4], value=0.0} : f32[T, 4]
  %mask = t.scatter(%zeros, %at) {dim=1, value=1.0} : f32[T, 4]
  %column = t.reshape(%mask) {shape=[T, 4, 1]} : f32[T, 4, 1]
  %spread = t.expand(%column) {shape=[T, 4, 2]} : f32[T, 4, 2]
  %flat = t.reshape(%spread) {shape=[T, 8]} : f32[T, 8]
  %bool = t.cast(%flat) {dtype="bool"} : bool[T, 8]
  %not = t.logical_not(%bool) : bool[T, 8]
  %inf = t.full() {dtype="f32", shape=[], value=-inf} : f32[]
  %choice = t.where(%not, %inf, %s) : f32[T, 8]
  %top, %idx = t.topk(%choice) {k=1, dim=-1} : f32[T, 1], i64[T, 1]"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("dim=-1, largest=true", "dim=-1, largest=false"),
        ("value=1.0", "value=2.0"),
        ("shape=[T, 4], value=0.0", "shape=[T, 4], value=1.0"),
        ("[T, 4, 1]", "[T, 1, 4]"),
        ("t.logical_not(%bool)", "t.logical_or(%bool, %bool)"),
        ("%inf, %s)", "%inf, %flat)"),
        ("t.scatter(%zeros, %at) {dim=1", "t.scatter(%zeros, %at) {dim=0"),
        ("{k=1, dim=-1}", "{k=1, dim=-1, largest=false}"),
    ],
)
def test_near_misses_of_group_limits_stay_as_they_are(old: str, new: str) -> None:
    text = LIMIT.replace(old, new, 1) if old else LIMIT
    if "[T, 1, 4]" in new:  # groups interleaved instead of one after the other
        text = text.replace("[T, 4, 1]", "[T, 1, 4]").replace(
            "%spread = t.expand(%column) {shape=[T, 4, 2]} : f32[T, 4, 2]",
            "%spread = t.expand(%column) {shape=[T, 2, 4]} : f32[T, 2, 4]",
        )
    graph = routed(text)
    raised = passed(RAISE, graph)
    modes = [op.attrs.get("mode") for op in raised.ops if op.kind == "moe.select"]
    assert modes == (["group_limited"] if not old else []) or modes == [None]
    given = [torch.randn(9, 8), torch.randn(8), torch.randn(9, 1)]
    if "dim=0" not in new:
        assert_same(run(raised, given), run(graph, given), exact=True)


@pytest.mark.parametrize("bias", ["%b, %s", "%s, %b", "%c, %b"])
def test_selection_bias_on_either_side(bias: str) -> None:
    graph = routed(
        f"  %sum = t.add({bias}) : f32[T, 8]\n  %v, %idx = t.topk(%sum) {{k=1}} : "
        "f32[T, 1], i64[T, 1]"
    )
    raised = passed(RAISE, graph)
    (select,) = [op for op in raised.ops if op.kind == "moe.select"]
    assert len(select.operands) == (1 if "%c" in bias else 2)
    given = [torch.randn(9, 8), torch.randn(8), torch.randn(9, 1)]
    assert_same(run(raised, given), run(graph, given), exact=True)

"""All experts on all tokens becomes dispatch where the others provably add zero, and only there."""

from __future__ import annotations

import pytest
import torch

from moec.interp import run
from moec.ir import Graph, parse, verify
from moec.ir.graph import walk
from moec.manager import PassManager

HEAD = """graph @g(%x: f32[T, 6], %gate: f32[4, 6], %w1: f32[4, 6, 8], %w2: f32[4, 8, 6]) {
  %logits = t.linear(%x, %gate) : f32[T, 4]
  %values, %chosen = t.topk(%logits) {k=2} : f32[T, 2], i64[T, 2]
"""
BEFORE = """
  %base = t.full() {value=BASE, dtype="f32", shape=[T, 4]} : f32[T, 4]
  %put = t.scatter(%base, %chosen, %values) {dim=1} : f32[T, 4]
  %scores = t.sigmoid(%put) : f32[T, 4]
  %everywhere = t.expand(%x) {shape=[4, T, 6]} : f32[4, T, 6]
  %turned = t.permute(%scores) {dims=[1, 0]} : f32[4, T]
  %column = t.reshape(%turned) {shape=[4, T, 1]} : f32[4, T, 1]
  %inside = t.mul(%everywhere, %column) : f32[4, T, 6]
  %hidden = t.matmul(%inside, %w1) : f32[4, T, 8]
  %active = ACT(%hidden) : f32[4, T, 8]
  %out = t.matmul(%active, %w2) : f32[4, T, 6]
  %y = t.sum(%out) {dims=[0]} : f32[T, 6]
  return %y
}
"""
AFTER = """
  %base = t.full() {value=0.0, dtype="f32", shape=[T, 4]} : f32[T, 4]
  %weights = t.softmax(%values) {dim=-1} : f32[T, 2]
  %put = t.scatter(%base, %chosen, %weights) {dim=1} : f32[T, 4]
  %everywhere = t.expand(%x) {shape=[4, T, 6]} : f32[4, T, 6]
  %hidden = t.matmul(%everywhere, %w1) : f32[4, T, 8]
  %active = t.sigmoid(%hidden) : f32[4, T, 8]
  %out = t.matmul(%active, %w2) : f32[4, T, 6]
  %row = t.reshape(%put) {shape=[T, 1, 4]} : f32[T, 1, 4]
  %rows = t.permute(%out) {dims=[1, 0, 2]} : f32[T, 4, 6]
  %sum = t.matmul(%row, %rows) : f32[T, 1, 6]
  %y = t.reshape(%sum) {shape=[T, 6]} : f32[T, 6]
  return %y
}
"""


def before(base: str = "-inf", activation: str = "t.silu") -> str:
    """A block that weighs the experts' inputs."""
    return HEAD + BEFORE.replace("BASE", base).replace("ACT", activation)


def passed(text: str) -> tuple[Graph, Graph]:
    """A graph, and what the pass makes of it."""
    graph = parse(text)
    return graph, verify(PassManager("dispatch-dense, dce").run(graph))


def kinds(graph: Graph) -> set[str]:
    return {op.kind for op in walk(graph)}


@pytest.mark.parametrize("text", [before(), before(activation="t.relu"), HEAD + AFTER])
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_only_the_chosen_experts_are_computed(text: str, tokens: int) -> None:
    graph, sparse = passed(text)
    assert "moe.dispatch" in kinds(sparse) and "t.matmul" not in kinds(sparse)
    torch.manual_seed(tokens)
    data = [torch.randn(s) for s in ((tokens, 6), (4, 6), (4, 6, 8), (4, 8, 6))]
    torch.testing.assert_close(run(sparse, data), run(graph, data))


@pytest.mark.parametrize(
    "text",
    [
        before(base="0.0"),  # a sigmoid of zero is a half
        before(activation="t.sigmoid"),  # an expert gives something for zero
        before()
        .replace("t.topk(%logits) {k=2}", "t.sort(%logits) {dim=-1}")
        .replace("%values, %chosen = ", "%v, %c = ")
        .replace(
            "f32[T, 2], i64[T, 2]",
            "f32[T, 4], i64[T, 4]\n"
            "  %values = t.slice(%v) {dim=1, start=0, stop=2} : f32[T, 2]\n"
            "  %chosen = t.slice(%c) {dim=1, start=0, stop=2} : i64[T, 2]",
        ),  # not known to be distinct
        before().replace("{dims=[0]} : f32[T, 6]", "{dims=[1]} : f32[4, 6]"),  # over the tokens
        before()
        .replace("%turned = t.permute(%scores) {dims=[1, 0]} : f32[4, T]\n", "")
        .replace("t.reshape(%turned)", "t.reshape(%scores)"),  # scores of other tokens
    ],
    ids=["base", "activation", "repeats", "axis", "mixed"],
)
def test_near_misses_stay_dense(text: str) -> None:
    graph, sparse = passed(text)
    assert "moe.dispatch" not in kinds(sparse) and len(sparse.ops) == len(graph.ops)

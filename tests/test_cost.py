"""The cost model, against what the kernels of one block move and keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.emitted_check import SHAPES, block_graph
from moec import cost
from moec.cost import Cost
from moec.ir import Builder, Graph, Type, Value, dim
from moec.ir.dims import evaluate
from moec.manager import PassManager
from moec.memory import predict
from moec.pipeline import pipeline
from tests.graphs import OLMOE, Options, build

T = dim("T")


def trained(options: Options) -> Graph:
    return PassManager(pipeline("triton", training=True)).run(build(options).graph)


def test_costs_of_single_ops() -> None:
    b = Builder()
    x, y = Value(Type("bf16", (T, 8)), "x"), Value(Type("bf16", (8,)), "y")
    b("t.add", x, y)
    b("t.mul", x, x)
    b("t.sum", x, dims=(1,))
    w, offsets = Value(Type("bf16", (4, 6, 8)), "w"), Value(Type("i32", (5,)), "offsets")
    b("moe.grouped_mm", x, w, offsets)
    b("moe.grouped_outer", x, x, offsets)
    costs = [cost.op_cost(op) for op in b.ops]
    assert costs[0] == Cost(32 * T + 16, 8 * T)
    assert costs[1] == Cost(32 * T, 8 * T)
    assert costs[2] == Cost(18 * T, 0)
    assert costs[3] == Cost(28 * T + 2 * 4 * 6 * 8, 2 * T * 6 * 8)
    assert costs[4] == Cost(32 * T + 2 * 4 * 8 * 8, 2 * T * 8 * 8)
    total = cost.graph_cost(b.graph("g", [x, y, w, offsets], []))
    assert total == costs[0] + costs[1] + costs[2] + costs[3] + costs[4]


def test_saved_bytes_of_a_block_are_its_hidden_rows_and_its_routing() -> None:
    """``4*A*I`` for the rows before the activation in bf16; nothing of width ``H`` is kept."""
    for hidden, inner, choices, experts in ((16, 8, 2, 4), (64, 8, 3, 8), (8, 32, 1, 4)):
        redone = experts <= 0.02 * 9 * choices * inner  # the router's product beside the experts'
        options = replace(
            OLMOE, dtype="bf16", hidden=hidden, inner=inner, choices=choices, experts=experts
        )
        pairs = choices * T
        scores = 0 if redone else 2 * experts * T  # the logits, in bf16
        weights, indices, order, inverse = 4 * pairs, 4 * pairs, 4 * pairs, 4 * pairs
        routing = scores + weights + indices + order + inverse + 4 * (experts + 1)
        assert cost.saved_bytes(trained(options)) == 4 * pairs * inner + routing


@pytest.mark.parametrize("name", SHAPES)
def test_at_published_sizes_no_scores_are_kept(name: str) -> None:
    """``4*A*I + 16*A`` bytes, and the offsets: a share of a thousandth, say."""
    shape = SHAPES[name]
    text = pipeline("triton", True, True, gluon=True)
    held = predict(PassManager(text).run(block_graph(shape)), "triton").held
    assert held is not None
    pairs = shape.choices * 16384
    wanted = 4 * pairs * shape.inner + 16 * pairs
    assert wanted <= held.at(T=16384) <= 1.001 * wanted


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("x+router+gate_up+down", set()), ("x", {"logits"}), ("x+down", {"logits"})],
    ids=["all", "frozen", "tokens not read"],
)
def test_logits_are_done_again_only_from_what_is_read_anyway(wanted: str, kept: set[str]) -> None:
    text = pipeline("triton", True).replace("grad,", f"grad{{wanted={wanted}}},")
    graph = PassManager(text).run(block_graph(SHAPES["olmoe"]))
    wide = {v.hint for v in cost.saved_values(graph) if v.type.shape[-1] == 64}
    assert wide == kept


def test_saved_bytes_count_results_handed_through() -> None:
    graph = trained(OLMOE)
    saved = {v.hint for v in cost.saved_values(graph)}
    assert saved == {"h", "scores", "idx", "w", "perm", "offsets", "inverse"}
    assert not saved & {v.hint for v in graph.inputs}


def test_kernels_compute_the_same_and_move_less() -> None:
    block = build(OLMOE)
    plain = cost.graph_cost(block.graph)
    fused = cost.graph_cost(PassManager(pipeline("triton", training=False)).run(block.graph))
    assert fused.flops == plain.flops
    for tokens in (1, 100):
        size = {"T": tokens}
        assert evaluate(fused.bytes, size) < evaluate(plain.bytes, size)


def test_training_costs_twice_the_products_again() -> None:
    """Two products of the forward pass; backward has two by inputs and two by weights."""
    forward = cost.graph_cost(build(OLMOE).graph).flops
    assert evaluate(cost.graph_cost(trained(OLMOE)).flops, {"T": 1000}) > 2 * evaluate(
        forward, {"T": 1000}
    )


def test_weights_of_one_of_several_results_are_taken_as_they_are() -> None:
    b = Builder({"T": (0, 99)})
    x, router = Value(Type("f32", (T, 8)), "x"), Value(Type("f32", (8, 8)), "router")
    scores, _ = b("t.split", b("t.linear", x, router), parts=2, hint=("scores", "rest"))
    idx = b("moe.select", scores, k=2, hint="idx")
    graph = b.graph("halves", [x, router], [b("moe.weight", scores, idx, norm="sum")])
    joint = PassManager("grad, recompute, dce").run(graph)
    assert {v.hint for v in cost.saved_values(joint)} == {"linear", "idx"}

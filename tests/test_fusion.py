"""Which kernels fusion must give, and what they keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.cost import saved_values
from moec.interp import run
from moec.ir import Builder, Graph, Op, Type, Value, dim, verify
from moec.ir.graph import backward_ops
from moec.pipeline import RAISE, pipeline
from tests.graphs import (
    GPT_OSS,
    OLMOE,
    assert_same,
    build,
    passed,
)

T = dim("T")


def kernels(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.kind.startswith("kern.")]


def body_kinds(op: Op) -> list[str]:
    assert op.body is not None
    return [inner.kind for inner in op.body.ops]


def test_olmoe_training_is_ten_kernels() -> None:
    graph = passed(pipeline("triton", training=True), build(OLMOE).graph)
    found = [op.kind[5:] for op in kernels(graph)]
    assert sorted(found) == sorted(
        ["routing"]
        + ["grouped_gemm"] * 4
        + ["grouped_outer"] * 2
        + ["combine"] * 2
        + ["pointwise"]  # the router's backward pass
    )
    backward = backward_ops(graph)
    forward = [op for op in kernels(graph) if op not in backward]
    assert [op.kind[5:] for op in forward] == ["routing", "grouped_gemm", "grouped_gemm", "combine"]
    _, up, down, _ = forward
    assert body_kinds(up) == ["moe.gather", "moe.grouped_mm", "t.split", "t.silu", "t.mul"]
    assert [(v.type.shape[1]) for v in up.results] == [8, 4]
    assert body_kinds(down) == ["moe.grouped_mm"]
    back, into = [op for op in kernels(graph) if op in backward and op.kind == "kern.grouped_gemm"]
    assert body_kinds(back)[0] == "moe.gather" and "t.merge" in body_kinds(back)
    assert [v.type for v in back.results] == [
        Type("f32", (2 * T,)),
        Type("f32", (2 * T, 4)),
        Type("f32", (2 * T, 8)),
    ]
    assert body_kinds(into) == ["moe.grouped_mm"]
    for op in kernels(graph):
        if op.kind == "kern.grouped_outer":
            assert sorted(body_kinds(op)) == ["moe.gather", "moe.grouped_outer"]
    # nothing as wide as the hidden size and as long as the pairs is made outside a kernel
    assert not [op for op in graph.ops if op.kind == "moe.gather"]


def test_olmoe_keeps_only_hidden_rows_and_routing() -> None:
    for options in (OLMOE, replace(OLMOE, raised=False), replace(OLMOE, dtype="bf16")):
        graph = passed(pipeline("triton", training=True), build(options).graph)
        types = sorted(str(v.type) for v in saved_values(graph))
        dtype = options.dtype
        wanted = [f"{dtype}[2*T, 8]", f"{dtype}[T, 4]", "f32[T, 2]", "i32[T, 2]", "i32[T, 2]"]
        assert types == sorted([*wanted, "i32[2*T]", "i32[5]"])


def test_gpt_oss_biases_splits_and_clamps_are_epilogues() -> None:
    for training in (False, True):
        graph = passed(pipeline("triton", training=training), build(GPT_OSS).graph)
        up, down = [op for op in kernels(graph) if op.kind == "kern.grouped_gemm"][:2]
        assert body_kinds(up)[:3] == ["moe.gather", "moe.grouped_mm", "t.split"]
        assert body_kinds(up).count("t.clamp") == 2
        assert body_kinds(up).count("moe.expert_rows") == 2
        assert up.results[-1].type.shape == (2 * T, 4)
        assert body_kinds(down) == ["moe.grouped_mm", "moe.expert_rows", "t.add"]
        if not training:
            assert len(up.results) == 1
            assert len(kernels(graph)) == 4
    assert [op.kind[5:] for op in kernels(graph)].count("grouped_gemm") == 4
    backward = backward_ops(graph)
    back = next(op for op in kernels(graph) if op in backward)
    assert [len(v.type.shape) for v in back.results] == [1, 2, 2]
    assert {"t.merge", "moe.row_dot", "t.clamp", "moe.expert_rows"} <= set(body_kinds(back))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "squared_relu", "exotic"])
@pytest.mark.parametrize("form", ["concat", "interleave", "ungated"])
@pytest.mark.parametrize("biases", [False, True])
def test_any_activation_is_one_epilogue(activation: str, form: str, biases: bool) -> None:
    options = replace(OLMOE, activation=activation, form=form, biases=biases, raised=False)
    forward = passed(pipeline("triton", training=False), build(options).graph)
    assert [op.kind[5:] for op in kernels(forward)] == [
        *("routing", "grouped_gemm", "grouped_gemm", "combine")
    ]
    assert {op.kind for op in forward.ops if op not in kernels(forward)} <= {"t.linear", "t.split"}
    joint = passed(pipeline("triton", training=True), build(options).graph)
    found = [op.kind[5:] for op in kernels(joint)]
    assert found.count("grouped_gemm") == 4 and found.count("pointwise") == 1
    wide = [op.kind for op in joint.ops if any(v.type.shape == (2 * T, 4) for v in op.results)]
    assert set(wide) == {"kern.grouped_gemm"}


def test_a_kernel_never_waits_for_itself() -> None:
    """Work that leaves a cluster and comes back keeps the cluster from growing around it."""
    b = Builder()
    x, w, offsets = (
        Value(t, n)
        for t, n in (
            (Type("f32", (T, 4)), "x"),
            (Type("f32", (2, 4, 4)), "w"),
            (Type("i32", (3,)), "offsets"),
        )
    )
    h = b("moe.grouped_mm", x, w, offsets)
    a = b("t.silu", h)
    outside = b("t.cumsum", a, dim=1)
    y = b("t.mul", h, outside)
    graph = b.graph("g", [x, w, offsets], [b("t.add", y, a)])
    fused = verify(passed("fuse-gemm, fuse-pointwise", graph))
    assert [op.kind for op in fused.ops] == ["kern.grouped_gemm", "t.cumsum", "kern.pointwise"]
    given = [torch.randn(5, 4), torch.randn(2, 4, 4), torch.tensor([0, 2, 5], dtype=torch.int32)]
    assert_same(run(fused, given), run(graph, given), exact=True)


def test_routing_leaves_out_what_it_cannot_compute() -> None:
    """A score that also goes another way round than through routing ops."""
    b = Builder()
    logits = Value(Type("f32", (T, 4)), "logits")
    scores = b("moe.activate", logits, fn="softmax")
    odd = b("t.add", scores, b("t.cumsum", scores, dim=1))
    idx = b("moe.select", odd, k=2)
    outputs = [b("moe.weight", scores, idx), *b("moe.dispatch", idx, experts=4)]
    more = b("moe.dispatch", idx, experts=4)
    graph = b.graph("g", [logits], [*outputs, *more])
    fused = verify(passed("fuse-routing", graph))
    assert [op.kind for op in fused.ops].count("kern.routing") == 2
    given = [torch.randn(6, 4)]
    assert_same(run(fused, given), run(graph, given), exact=True)


def test_dead_work_is_no_kernel() -> None:
    b = Builder()
    x, w = Value(Type("f32", (T, 4)), "x"), Value(Type("f32", (2, 4, 4)), "w")
    offsets = Value(Type("i32", (3,)), "offsets")
    b("moe.grouped_mm", x, w, offsets)
    graph = b.graph("g", [x, w, offsets], [x])
    assert passed("fuse-gemm", graph).ops == ()


def test_max_ops_bounds_a_kernel() -> None:
    options = replace(OLMOE, activation="exotic")
    for limit in (1, 4, 9):
        graph = passed(f"{RAISE}, fuse-gemm{{max-ops={limit}}}", build(options).graph)
        sizes = [len(body_kinds(op)) for op in kernels(graph)]
        assert all(size <= limit + 1 for size in sizes)  # the gather is copied in, not fused

"""Predicted memory against what PyTorch's allocator sees, and the expressions of it."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.codegen import aten
from moec.errors import CodegenError, DimError
from moec.fuzz.blocks import Options
from moec.fuzz.graphs import random_graph
from moec.inputs import random_inputs
from moec.ir import Graph, Type, dim
from moec.ir.dims import ceildiv, evaluate
from moec.ir.parser import parse
from moec.manager import PassManager
from moec.memory import Peak, predict
from moec.memory.buffers import Buffer, Moment
from moec.memory.model import ModelMemory, Part
from moec.memory.sizes import least
from moec.memory.tracked import track
from moec.pipeline import pipeline
from tests.graphs import MODELS, OLMOE, build
from tests.memory_replay import built, tracked_step
from tests.models import FAMILIES

pytestmark = pytest.mark.usefixtures("without_onednn")

BLOCKS = {"olmoe": OLMOE, **MODELS}
T = dim("T")


def lowered(options: Options, target: str, training: bool, descriptors: bool = False) -> Graph:
    """A block after the passes."""
    return PassManager(pipeline(target, training, descriptors)).run(build(options).graph)


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels would write is zero: valid indices."""
    monkeypatch.setattr(torch, "empty", torch.zeros)


@pytest.mark.usefixtures("zeroed")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", BLOCKS)
def test_host_lines_of_kernels_allocate_what_is_predicted(
    name: str, descriptors: bool, training: bool, tmp_path: Path
) -> None:
    # f16: on the CPU products of bf16 take memory that they do not take on a GPU
    options = replace(BLOCKS[name], hidden=64, inner=32, experts=8, dtype="f16")
    graph = lowered(options, "triton", training, descriptors)
    predicted, compiled = predict(graph), built(graph, "triton", tmp_path)
    for tokens in (0, 1, 2, 7, 33, 64, 100, 509, 1024, 2048):
        real = tracked_step(compiled, random_inputs(graph, {"T": tokens})).peak(512)
        assert real <= predicted.step.at(T=tokens) <= 1.05 * real, tokens


@pytest.mark.usefixtures("zeroed")
def test_kernels_that_add_in_one_order_allocate_what_is_predicted(tmp_path: Path) -> None:
    options = replace(OLMOE, hidden=64, inner=32, experts=8, dtype="f16")
    graph = PassManager(pipeline("triton", True, repro=True)).run(build(options).graph)
    predicted, compiled = predict(graph), built(graph, "triton", tmp_path)
    for tokens in (0, 1, 33, 509):
        real = tracked_step(compiled, random_inputs(graph, {"T": tokens})).peak(512)
        assert real <= predicted.step.at(T=tokens) <= 1.05 * real, tokens


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_library_calls_allocate_what_is_predicted(
    name: str, training: bool, tmp_path: Path
) -> None:
    options = replace(BLOCKS[name], hidden=256, inner=128, experts=8)
    graph = lowered(options, "aten", training)
    predicted, compiled = predict(graph, "aten"), built(graph, "aten", tmp_path)
    for tokens in (383, 384, 509, 511, 512, 513, 640, 1024, 1031, 2048):
        real = tracked_step(compiled, random_inputs(graph, {"T": tokens})).peak(64)
        assert real <= predicted.step.at(T=tokens) <= 1.05 * real, tokens


def routed(options: Options, graph: Graph, tokens: int, routing: str) -> list[torch.Tensor]:
    """Arguments for a routing, cotangents too."""
    given = build(options).arguments(tokens, routing)
    return [*given, *random_inputs(graph, {"T": tokens})[len(given) :]]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_no_routing_exceeds_the_prediction(dtype: str, tmp_path: Path) -> None:
    options = replace(OLMOE, hidden=128, inner=64, experts=8, biases=True, dtype=dtype)
    graph = lowered(options, "aten", True)
    worst, balanced = predict(graph, "aten"), predict(graph, "aten", balanced=True)
    compiled = built(graph, "aten", tmp_path)
    for tokens in (1, 40, 700):
        bound = worst.step.at(T=tokens)
        assert balanced.step.at(T=tokens) <= bound
        for routing in ("random", "empty", "one"):
            arguments = routed(options, graph, tokens, routing)
            assert tracked_step(compiled, arguments).peak(64) <= bound


def test_products_in_bf16_need_more_where_one_expert_has_many_rows() -> None:
    text = """graph @g(%x: bf16[2*T, 64], %w: bf16[8, 32, 64], %idx: i32[T, 2]) {
      %perm, %offsets, %inverse = moe.dispatch(%idx) {experts=8} : i32[2*T], i32[9], i32[T, 2]
      %y = moe.grouped_mm(%x, %w, %offsets) : bf16[2*T, 32]
      return %y }"""
    worst, balanced = (predict(parse(text), "aten", balanced=b) for b in (False, True))
    rows = (2 * 1024, 2 * 1024 // 8)
    assert worst.step.at(T=1024) - balanced.step.at(T=1024) == (rows[0] - rows[1]) * 32 * 4


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_never_allocate_more_than_is_predicted(seed: int, tmp_path: Path) -> None:
    for training in (False, True):
        graph = PassManager(pipeline("aten", training)).run(random_graph(seed))
        predicted, compiled = predict(graph, "aten"), built(graph, "aten", tmp_path)
        for tokens in (0, 1, 70):
            arguments = random_inputs(graph, {"T": tokens}, seed=seed)
            assert tracked_step(compiled, arguments).peak(64) <= predicted.step.at(T=tokens)


def test_a_compiled_model_allocates_what_is_predicted() -> None:
    torch.manual_seed(0)
    block = FAMILIES["olmoe"]().model.layers[0].mlp
    fast: Any = moec.compile(block)
    x = torch.randn(1, 300, 32, requires_grad=True)
    gradient = torch.randn_like(x)

    def step() -> object:
        y = fast(x)
        y.backward(gradient)
        return y

    step()  # compiles
    block.zero_grad()
    x.grad = None
    (artifact,) = moec.regions(fast)[0].artifacts
    real = track(step).peak(64)
    assert real <= predict(artifact).step.at(T=300) <= 1.25 * real


def test_a_line_that_nothing_is_known_about_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse("graph @g(%x: f32[T]) { %y = t.exp(%x) : f32[T]  return %y }")
    monkeypatch.setitem(aten.TABLE, "t.exp", lambda op, a: f"{a[0]}; other = {a[0]} if T else 1")
    with pytest.raises(CodegenError, match=r"no rule for what this line allocates: .* if T"):
        predict(graph, "aten")


# the peak as pieces
def peak_of(*sums: Sequence[Any], ranges: Any = None) -> Peak:
    """A peak whose moments hold buffers of these numbers of bytes."""
    moments = [
        Moment(None, frozenset(Buffer("b", Type("u8", (size,))) for size in sizes))
        for sizes in sums
    ]
    return Peak(tuple(moments), 512, {"T": (0, None)} if ranges is None else ranges)


PEAKS = {
    "one": peak_of([8 * T]),
    "two lines": peak_of([100 * T, 7], [60 * T, 100_000]),
    "three lines": peak_of([T, 90_000], [40 * T, 60_000], [100 * T]),
    "a square": peak_of([T**2], [1000 * T, 50]),
    "rounded": peak_of([4 * ceildiv(8 * T, 128), 3 * T], [2 * T + 1000]),
    "a block": peak_of([64 * least(4096, 2 * T), 8 * T], [100 * T]),
    "bounded": peak_of([3 * T], [T + 5000], ranges={"T": (3, 4000)}),
}


@pytest.mark.parametrize("name", PEAKS)
def test_pieces_bound_the_peak_and_break_where_it_does(name: str) -> None:
    peak = PEAKS[name]
    pieces = peak.pieces
    low, high = peak.ranges["T"]
    assert pieces[0].low == max(low, 1)
    assert pieces[-1].high == (2**31 - 1 if high is None else high)
    assert all(a.high + 1 == b.low for a, b in itertools.pairwise(pieces))
    for piece in pieces:
        around = {piece.low, piece.low + 1, piece.high - 1, piece.high, piece.low + 777}
        for tokens in (t for t in around if piece.low <= t <= piece.high):
            exact, bound = peak.at(T=tokens), evaluate(piece.expression, {"T": tokens})
            slack = 512 * max(len(m.live) for m in peak.moments)
            assert exact <= bound <= 1.01 * exact + slack + tokens, tokens


def test_two_lines_meet_in_one_piece_each() -> None:
    first, second = PEAKS["two lines"].pieces
    assert str(first.expression).startswith("60*T") and str(second.expression).startswith("100*T")
    assert abs(first.high - 2500) < 30


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.parametrize("budget", [0, 6000, 123_456, 10**9])
def test_the_largest_size_is_the_last_that_fits(name: str, budget: int) -> None:
    peak = PEAKS[name]
    found, (low, high) = peak.largest(budget), peak.ranges["T"]
    if found is None:
        assert peak.at(T=low) > budget
    else:
        assert peak.at(T=found) <= budget
        assert found == high or peak.at(T=found + 1) > budget


def test_a_peak_in_several_dims_needs_sizes_of_all_but_one() -> None:
    graph = parse("graph @g(%x: f32[B, S]) { %y = t.exp(%x) : f32[B, S]  return %y }")
    peak = predict(graph, "aten").step
    assert peak.at(B=2, S=1024) == 8192 + 128
    with pytest.raises(DimError, match="the dims B, S; give sizes of all but one"):
        _ = peak.pieces
    fixed = predict(graph, "aten").where({"S": 1024}).step
    assert [str(p.expression) for p in fixed.pieces] == ["4096*B + 128"]
    assert fixed.largest(2**20) == 255


# models
def test_a_model_holds_parameters_gradients_all_blocks_and_one_pass() -> None:
    options = replace(OLMOE, hidden=64, inner=32)
    step, forward = (predict(lowered(options, "triton", training)) for training in (True, False))
    training = ModelMemory(1000, (Part(step, 3),))
    inference = ModelMemory(1000, (Part(forward, 3),))
    assert step.held is not None
    tokens = {"T": 100}
    kept = step.held.at(**tokens) + 100 * 64 * 4  # with the tokens themselves
    assert training.held_at(100) == 3 * kept
    others = 2 * kept + 100 * 64 * 4  # what the block that runs holds is in its own peak
    assert training.at(100) == 2000 + others + step.step_alone.at(**tokens)
    assert inference.at(100) == 1000 + forward.step.at(**tokens) + 100 * 64 * 4
    most = training.largest(10**8)
    assert most is not None and training.at(most) <= 10**8 < training.at(most + 1)
    assert training.largest(100) is None


def test_a_step_alone_is_without_weight_gradients() -> None:
    found = predict(lowered(replace(OLMOE, hidden=64, inner=32), "triton", True))
    assert found.backward is not None
    weights = sum(v.type.bytes for v in found.graph.inputs if isinstance(v.type.bytes, int))
    whole = weights + found.step_alone.at(T=500)
    assert found.step_alone.at(T=500) <= found.step.at(T=500) <= whole
    assert found.step_alone.at(T=1) < found.step.at(T=1)


def test_the_backward_pass_frees_the_first_product_before_it_ends() -> None:
    found = predict(lowered(replace(OLMOE, hidden=256, inner=64), "triton", True))
    assert found.backward is not None and found.backward_kept is not None
    first = next(b for b in found.roles if b.name == "h").bytes
    less = found.backward_kept.at(T=4096) - found.backward.at(T=4096)
    assert less >= evaluate(first, {"T": 4096})


def test_a_retained_graph_keeps_what_is_held(tmp_path: Path) -> None:
    graph = lowered(replace(OLMOE, hidden=16, inner=8, experts=4), "aten", True)
    compiled = built(graph, "aten", tmp_path)
    leaves = [a.requires_grad_() for a in random_inputs(graph, {"T": 40})[: len(graph.inputs)]]
    output = compiled(leaves)[0]
    first, second = (
        torch.autograd.grad(output.sum(), leaves, retain_graph=again) for again in (True, False)
    )
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), leaves)


def test_the_gradient_of_two_inputs_in_one_is_copied(tmp_path: Path) -> None:
    text = "graph @g(%x: f32[T], %a: f32[3], %b: f32[3]) { %s = t.add(%a, %b) : f32[3]  return %s }"
    graph = PassManager("grad, dce").run(parse(text))
    compiled = built(graph, "aten", tmp_path)
    real = tracked_step(compiled, random_inputs(graph, {"T": 4})).peak(64)
    assert real <= predict(graph, "aten").step.at(T=4)


def test_at_most_counts_a_rest_of_a_block_for_each_large_tensor() -> None:
    peak = peak_of([4 * T, 2 * T, 100])
    assert peak.at_most(T=2**10) == peak.at(T=2**10)
    assert peak.at_most(T=2**19) == peak.at(T=2**19) + 2**20
    assert peak.at_most(T=2**20) == peak.at(T=2**20) + 2 * 2**20


def test_a_loop_over_blocks_of_rows_keeps_none_of_them() -> None:
    found = predict(lowered(OLMOE, "aten", False), "aten").forward
    last = [m for m in found.moments if m.op is not None and m.op.results[0].hint == "down"]
    assert last and all(b.name != "h" for m in last for b in m.live)

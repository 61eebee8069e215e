"""Lowered with ``repro``: a token has the same bits alone, among others, and at another place."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moec import interp
from moec.capture.block import MAX_TOKENS
from moec.codegen import emit_module
from moec.errors import InvarianceError, PassError
from moec.ir import Builder, Graph, Type, Value, dim
from moec.manager import PassManager
from moec.pipeline import pipeline
from tests.graphs import GPT_OSS, Options, build

from .emitted import built, check, cotangents, error, run
from .test_families import sized

BLOCKS = {
    "softmax": ("olmoe", "f32"),
    "groups": ("deepseek_v3", "bf16"),
    "shared": ("nemotron", "f32"),
    "biases": ("gpt_oss", "bf16"),
}
# small tiles: the interpreter runs one after the other, and 300 tokens fill many
SMALL = "lower{repro=true,block-m=64,block-n=64,block-k=32,block=64}"


def lowered(graph: Graph, training: bool = True, options: str = "") -> Graph:
    """A graph after the pipeline of ``numerics="repro"``."""
    ranged = dataclasses.replace(graph, ranges={n: (0, MAX_TOKENS) for n in graph.ranges})
    text = pipeline("triton", training, repro=True) + (f", {options}" if options else "")
    return PassManager(text).run(ranged)


def of_tokens(value: Value) -> bool:
    """Whether a value has a row a token."""
    return any(not isinstance(d, int) for d in value.type.shape)


def rows_of(graph: Graph, arguments: Sequence[torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
    """The arguments for some of the tokens."""
    values = (*graph.inputs, *graph.cotangents)
    return [a[rows] if of_tokens(v) else a for a, v in zip(arguments, values, strict=True)]


def check_bits(graph: Graph, folder: Path, arguments: Sequence[torch.Tensor], count: int) -> None:
    """Compare every result of tokens in a batch with that in parts of it, to the bit."""
    module = built(graph, folder)
    results = [*graph.outputs, *(g for g in graph.gradients if g is not None)]
    kept = [i for i, v in enumerate(results) if of_tokens(v)]
    assert len(kept) == 1 + bool(graph.cotangents)
    whole = run(module, arguments)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    for rows in ([0], [count - 1], order[:7], order[7:71], order[:128]):
        part = run(module, rows_of(graph, arguments, rows))
        for i in kept:
            assert torch.equal(part[i], whole[i][rows]), (len(rows), results[i].hint)


@pytest.mark.parametrize("name", BLOCKS)
def test_tokens_have_the_same_bits_in_any_batch(name: str, tmp_path: Path) -> None:
    block = sized(*BLOCKS[name])
    graph = lowered(block.graph, options=SMALL)
    check_bits(graph, tmp_path, [*block.arguments(300), *cotangents(graph, 300)], 300)


@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_so_they_have_without_gradients_and_with_the_tiles_of_the_rules(
    name: str, tmp_path: Path
) -> None:
    block = sized(*BLOCKS[name])
    graph = lowered(block.graph, training=False)
    check_bits(graph, tmp_path, block.arguments(96), 96)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron"])
def test_results_are_right(name: str, tmp_path: Path) -> None:
    block = sized(name, "f32")
    graph = lowered(block.graph, options=SMALL)
    module = built(graph, tmp_path)
    for tokens, routing in ((0, "random"), (1, "random"), (17, "one"), (19, "empty")):
        check(block, graph, module, tokens, routing)


def test_no_product_of_tokens_is_left_to_the_library() -> None:
    text = emit_module(lowered(sized("deepseek_v3", "bf16").graph), "triton")
    forward, backward = text.split("def forward(")[1].split("def backward(")
    assert "F.linear" not in forward and " @ " not in forward
    assert "x = launch.aligned(x)" in forward and "d_y = launch.aligned(d_y)" in backward
    products = [line for line in backward.split("\n") if " @ " in line]
    assert products and all("permute" in line for line in products)  # of weights: over the tokens


def gated(dtype: str = "f32") -> Graph:
    """A shared expert with a gate of one column, a bias, and sums of rows that are in no kernel."""
    tokens, b = dim("T"), Builder({"T": (0, MAX_TOKENS)})
    x = Value(Type(dtype, (tokens, 24)), "x")
    gate, w = Value(Type(dtype, (1, 24)), "gate"), Value(Type(dtype, (20, 24)), "w")
    bias = Value(Type(dtype, (20,)), "bias")
    mean = b("t.mean", b("t.mul", x, x), dims=(-1,), keepdim=True, hint="mean")
    normal = b("t.mul", x, b("t.rsqrt", mean), hint="normal")
    weight = b("t.sigmoid", b("t.linear", normal, gate, hint="weight"))
    y = b("t.mul", b("t.silu", b("t.linear", normal, w, bias)), weight, hint="y")
    return b.graph("gated", [x, gate, w, bias], [y])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_sums_of_rows_and_products_with_one_column(dtype: str, tmp_path: Path) -> None:
    graph = lowered(gated(dtype), options=SMALL)
    module, generator = built(graph, tmp_path), torch.Generator().manual_seed(0)
    shapes = [[70 if not isinstance(d, int) else d for d in v.type.shape] for v in graph.inputs]
    data = [torch.randn(s, generator=generator) for s in shapes]
    data = [t.bfloat16() if dtype == "bf16" else t for t in data]
    everything = [*data, *cotangents(graph, 70)]
    limit = 1e-5 if dtype == "f32" else 2e-2
    for actual, wanted in zip(
        run(module, everything), interp.run(graph, everything, float64=True), strict=True
    ):
        assert error(actual, wanted) <= limit
    whole = run(module, everything)
    alone = run(module, rows_of(graph, everything, [41]))
    assert torch.equal(alone[0], whole[0][[41]]) and torch.equal(alone[1], whole[1][[41]])


def test_gradients_of_weights_have_the_same_bits_every_run(tmp_path: Path) -> None:
    block = sized("deepseek_v3", "bf16")
    graph = lowered(block.graph, options=SMALL)
    module, data = built(graph, tmp_path), [*block.arguments(40), *cotangents(graph, 40)]
    assert all(map(torch.equal, run(module, data), run(module, data)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(capacity=1.25), "which tokens an expert still takes depends on the others"),
        (dataclasses.replace(GPT_OSS, experts=2048, choices=4), "number of tokens"),
    ],
    ids=["capacity", "too many experts for a program"],
)
def test_what_depends_on_the_batch_is_refused(options: Options, reason: str) -> None:
    with pytest.raises(InvarianceError, match=f'numerics "repro".*{reason}'):
        emit_module(lowered(build(options).graph, training=False), "triton")


def test_tiles_for_few_tokens_are_refused() -> None:
    with pytest.raises(PassError, match="few and repro exclude each other"):
        PassManager("lower{few=true,repro=true}").run(sized("olmoe", "f32").graph)

"""Blocks of the model families, forward and backward, against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moec import interp
from moec.ir import Graph
from moec.runtime.artifact import Artifact
from tests.graphs import ACTIVATIONS, MODELS, Block, Options, build

from .emitted import (
    SMALL,
    SMALL_TMA,
    built,
    check,
    cotangents,
    error,
    lowered,
    run,
    send_all_to_one,
)

FAMILIES = {
    "olmoe": Options(norm="none"),
    "nemotron": Options(form="ungated", activation="squared_relu", router="sigmoid", shared=True),
    **MODELS,
}
SIZES = [(0, "random"), (1, "random"), (7, "empty"), (15, "one"), (16, "one"), (17, "one")]


def sized(name: str, dtype: str, hidden: int = 40, inner: int = 24) -> Block:
    """A family's block, of sizes that fill several tiles and not the last."""
    return build(dataclasses.replace(FAMILIES[name], dtype=dtype, hidden=hidden, inner=inner))


def compiled(block: Block, options: str, folder: Path) -> tuple[Graph, Artifact]:
    """Lowered graph and module."""
    graph = lowered(block.graph, options)
    return graph, built(graph, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name: str, tmp_path: Path) -> None:
    block = sized(name, "f32")
    graph, module = compiled(block, SMALL, tmp_path)
    for tokens, routing in [*SIZES, (33, "random")]:
        check(block, graph, module, tokens, routing)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [SMALL, SMALL_TMA], ids=["pointer", "tma"])
def test_bfloat16(name: str, options: str, tmp_path: Path) -> None:
    block = sized(name, "bf16")
    graph, module = compiled(block, options, tmp_path)
    for tokens, routing in [(0, "random"), (1, "random"), (17, "one"), (33, "empty")]:
        check(block, graph, module, tokens, routing)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [SMALL, SMALL_TMA], ids=["pointer", "tma"])
def test_equal_widths(name: str, options: str, tmp_path: Path) -> None:
    """Where hidden and inner sizes are equal, more fits into the products' kernels."""
    block = sized(name, "bf16", 24, 24)
    graph, module = compiled(block, options, tmp_path)
    assert "# no kernel" not in module.path.read_text()
    templates = {op.attrs["template"] for op in graph.ops if "template" in op.attrs}
    assert templates == {"tma" if "descriptors" in options else "pointer"}
    check(block, graph, module, 19, "random")


@pytest.mark.parametrize("dtype", ["f16", "f64"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    block = sized("gpt_oss", dtype, 20, 12)
    graph, module = compiled(block, SMALL, tmp_path)
    check(block, graph, module, 19, "random")


@pytest.mark.parametrize("options", [SMALL, SMALL_TMA], ids=["pointer", "tma"])
def test_default_tiles(options: str, tmp_path: Path) -> None:
    block = sized("olmoe", "bf16", 72, 40)
    descriptors = "descriptors=true" if "descriptors" in options else "descriptors=false"
    graph, module = compiled(block, descriptors, tmp_path)
    check(block, graph, module, 70, "random")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["concat", "interleave"])
def test_activations(activation: str, form: str, tmp_path: Path) -> None:
    options = Options(activation=activation, form=form, hidden=20, inner=12, biases=True)
    block = build(options)
    graph, module = compiled(block, SMALL, tmp_path)
    check(block, graph, module, 19, "random")


@pytest.mark.parametrize("options", [SMALL, SMALL_TMA], ids=["pointer", "tma"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["concat", "interleave", "ungated", "separate"])
def test_layouts(form: str, transposed: bool, options: str, tmp_path: Path) -> None:
    wanted = Options(form=form, transposed=transposed, biases=True, hidden=16, inner=24)
    block = build(dataclasses.replace(wanted, dtype="bf16"))
    graph, module = compiled(block, options, tmp_path)
    wanted_template = "tma" if "descriptors" in options else "pointer"
    products = [op for op in graph.ops if op.kind in ("kern.grouped_gemm", "kern.grouped_outer")]
    assert {op.attrs["template"] for op in products} == {wanted_template}
    check(block, graph, module, 21, "empty")


@pytest.mark.parametrize("choices", [1, 3, 4])
def test_all_experts(choices: int, tmp_path: Path) -> None:
    block = build(Options(choices=choices, norm="sum", hidden=20, inner=12))
    graph, module = compiled(block, SMALL, tmp_path)
    check(block, graph, module, 11, "random")


def test_empty_experts_have_zero_gradients(tmp_path: Path) -> None:
    block = sized("olmoe", "f32", 16, 8)
    graph, module = compiled(block, SMALL, tmp_path)
    data = [*block.arguments(9), *cotangents(graph, 9)]
    send_all_to_one(block, data)
    results = run(module, data)
    weights = [r for r in results if r.dim() == 3]
    assert weights and all(bool((w[2:] == 0).all()) for w in weights)
    nothing = [*block.arguments(0), *cotangents(graph, 0)]
    assert all(not r.any() for r in run(module, nothing))


def test_the_same_bits_every_run(tmp_path: Path) -> None:
    block = sized("deepseek_v3", "f32", 16, 8)
    graph, module = compiled(block, SMALL, tmp_path)
    data = [*block.arguments(37), *cotangents(graph, 37)]
    assert all(torch.equal(a, b) for a, b in zip(run(module, data), run(module, data), strict=True))


def test_strided_inputs_through_autograd(tmp_path: Path) -> None:
    block = sized("olmoe", "f32", 16, 8)
    graph, module = compiled(block, SMALL, tmp_path)
    data = [*block.arguments(13), *cotangents(graph, 13)]
    exact = interp.run(graph, data, float64=True)
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in data[:-1]]
    leaves = [t.requires_grad_() for t in strided]
    (output,) = module(leaves)
    gradients = torch.autograd.grad(output, leaves, data[-1].t().contiguous().t())
    for actual, wanted in zip((output, *gradients), exact, strict=True):
        assert error(actual.detach(), wanted) <= 1e-5

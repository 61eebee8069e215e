"""Every pass on random blocks: same meaning, valid, readable."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from moec import fuel
from moec.interp import run
from moec.ir import Graph, dim, parse, show, verify
from moec.ir.graph import walk
from moec.manager import all_passes
from moec.pipeline import FUSE, GRAD, KEEP, RAISE, pipeline
from tests.graphs import (
    DEEPSEEK_V3,
    GPT_OSS,
    OLMOE,
    ROUTINGS,
    TOKENS,
    Options,
    assert_same,
    build,
    passed,
    random_block,
    random_size,
)

T = dim("T")
SEEDS = range(14)
# passes whose results must have the same bits
EXACT = {"cse", "dce", "simplify", "recompute"}
JOINT = f"{RAISE}, {GRAD}"


@functools.cache
def joint_block(seed: int) -> Graph:
    """A random block's joint graph before fusion."""
    return passed(JOINT, random_block(seed).graph)


def tensors(graph: Graph, seed: int) -> list[torch.Tensor]:
    """Arguments of a random block's graph, cotangents included, for a random number of tokens."""
    block = replace(random_block(seed), graph=graph)
    tokens, routing = random_size(seed)
    given = list(block.arguments(tokens, routing, seed))
    return given + [torch.randn(tokens, int(v.type.shape[1])) for v in graph.cotangents]


@pytest.mark.parametrize("name", sorted(all_passes()))
@pytest.mark.parametrize("seed", SEEDS)
def test_passes_keep_the_meaning(name: str, seed: int) -> None:
    graphs = [random_block(seed).graph]
    if name != "grad":
        graphs.append(joint_block(seed))
    for graph in graphs:
        after = verify(passed(name, graph))
        given = tensors(graph, seed)
        if name == "grad":
            expected = run(graph, given, float64=True)
            d_outputs = [torch.randn_like(e) for e in expected]
            actual = run(after, [*given, *d_outputs], float64=True)[: len(expected)]
        else:
            expected, actual = (run(g, given, float64=True) for g in (graph, after))
        assert_same(actual, expected, exact=name in EXACT)
        assert parse(show(after)) == after
        if name in EXACT and graph.cotangents == ():
            assert_same(run(after, given), run(graph, given), exact=True)
        assert passed(name, after) == after


def with_autograd(
    graph: Graph, given: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]]:
    """Outputs in float64, random cotangents, and the gradients of float inputs by autograd."""
    leaves = [g.double().requires_grad_() if g.is_floating_point() else g for g in given]
    outputs = run(graph, leaves, float64=True)
    cotangents = [torch.randn_like(o) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True)
    return tuple(o.detach() for o in outputs), cotangents, list(gradients)


@pytest.mark.parametrize("target", ["aten", "triton"])
@pytest.mark.parametrize("seed", range(16))
def test_training_pipelines_give_the_gradients_of_autograd(seed: int, target: str) -> None:
    block = random_block(100 + seed)
    graph = verify(passed(pipeline(target, training=True), block.graph))
    given = block.arguments(*random_size(seed), seed)
    outputs, cotangents, gradients = with_autograd(block.graph, given)
    assert_same(
        run(graph, [*given, *cotangents], float64=True), [*outputs, *gradients], exact=False
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("options", [OLMOE, DEEPSEEK_V3, GPT_OSS], ids=["olmoe", "dsv3", "gptoss"])
def test_sizes_and_routings(options: Options, tokens: int, routing: str) -> None:
    block = build(options)
    graph = passed(pipeline("triton", training=True), block.graph)
    given = block.arguments(tokens, routing)
    outputs, cotangents, gradients = with_autograd(block.graph, given)
    assert_same(
        run(graph, [*given, *cotangents], float64=True), [*outputs, *gradients], exact=False
    )


@pytest.mark.parametrize("seed", range(10))
def test_inference_pipelines_keep_the_meaning(seed: int) -> None:
    block = random_block(200 + seed)
    given = block.arguments(*random_size(seed), seed)
    expected = run(block.graph, given, float64=True)
    for target in ("aten", "triton"):
        graph = verify(passed(pipeline(target, training=False), block.graph))
        assert_same(run(graph, given, float64=True), expected, exact=False)


def test_frozen_inputs_get_no_gradient_and_save_nothing() -> None:
    block = build(OLMOE)
    wanted = f"{RAISE}, grad{{wanted=x}}, simplify, cse, dce, adjoint, simplify, cse, dce"
    graph = verify(passed(f"{wanted}, {KEEP}, {FUSE}", block.graph))
    assert [g is not None for g in graph.gradients] == [True, False, False, False]
    assert not any(op.kind == "moe.grouped_outer" for op in walk(graph))
    only_router = passed(f"{RAISE}, grad{{wanted=router}}, dce", block.graph)
    assert not any("grouped_outer" in op.kind for op in only_router.ops)


@pytest.mark.parametrize("name", sorted(set(all_passes()) - {"grad", "dce"}))
def test_without_fuel_nothing_changes(name: str) -> None:
    graph = joint_block(3)
    with fuel.limit(0):
        assert passed(name, graph) is graph


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_every_amount_of_fuel_gives_a_right_program(seed: int) -> None:
    """Bisection stops a pass after any rewrite: what it leaves must mean the same."""
    graph = joint_block(seed)
    given = tensors(graph, seed)
    expected = run(graph, given, float64=True)
    for name in ("simplify", "recompute", "adjoint", "fuse-routing", "fuse-gemm", "fuse-pointwise"):
        for amount in (1, 2, 5):
            with fuel.limit(amount):
                after = verify(passed(name, graph))
            assert_same(run(after, given, float64=True), expected, exact=False)

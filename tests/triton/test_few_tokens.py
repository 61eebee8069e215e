"""Kernels for few tokens, and recorded calls, against the interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.emitted_check import Shape, block_graph
from moec import interp
from moec.artifact_lines import artifact_lines
from moec.codegen.triton.routing import most_few_tokens
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact, Once, build
from moec.runtime.tape import record
from tests.graphs import random_block, random_size

from .emitted import built, check, lowered
from .test_families import FAMILIES, sized

SHAPES = (
    Shape(32, 16, 8, 2),
    Shape(48, 80, 5, 3),  # neither a power of two nor a multiple of a tile
    Shape(16, 16, 1, 1),
    Shape(32, 16, 4, 4),  # every token to every expert
    Shape(16, 32, 64, 8),
)


def few(shape: Shape) -> Artifact:
    """The block lowered for few tokens."""
    manager = PassManager(pipeline("triton", False) + ", lower{few=true}")
    return build(manager.run(block_graph(shape, "f32")), "triton", "few", manager.history)


def data(shape: Shape, tokens: int, same: bool = False) -> list[torch.Tensor]:
    """Random tokens, or one token many times: then all go to the same experts."""
    h, i, e = shape.hidden, shape.inner, shape.experts
    x = torch.randn(tokens, h)
    x = x[:1].expand(tokens, h).contiguous() if same else x
    weights = torch.randn(e, 2 * i, h) / h**0.5, torch.randn(e, h, i) / i**0.5
    return [x, torch.randn(e, h) / h**0.5, *weights]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_tokens_are_right_up_to_the_most_that_they_may_be(shape: Shape) -> None:
    graph, artifact = block_graph(shape, "f32"), few(shape)
    most = min(most_few_tokens(artifact.graph), 40)
    for tokens in (0, 1, 2, most):
        for same in (False, True) if tokens else (False,):
            inputs = data(shape, tokens, same)
            expected = interp.run(graph, inputs, float64=True, dims={"T": tokens})[0]
            found = artifact(inputs)[0]
            assert (found - expected).norm() <= 1e-5 * (expected.norm() + 1e-9), (tokens, same)


def test_more_tokens_than_one_program_takes_are_refused_by_the_choice_of_artifact() -> None:
    assert most_few_tokens(few(Shape(16, 32, 64, 8)).graph) == 16
    assert most_few_tokens(block_graph(Shape(16, 32, 64, 8))) == 0  # nothing is fused in it


def test_explain_lists_the_ranges_of_tokens_and_their_kernels() -> None:
    small = few(SHAPES[0])
    artifact = replace(small, few=Once(lambda _: small), few_tokens=64)
    lines = list(artifact_lines(artifact))
    assert "0 to 64 tokens: compiled at the first such call" in lines[1]
    assert artifact.few is not None and artifact.few.get([]) is small
    lines = list(artifact_lines(artifact))
    assert "%act by pointer, tile 16 x 16 x 32" in lines[1]
    assert lines[2].startswith("    65 tokens and more: ")


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_recorded_call_gives_what_the_call_gives_for_other_numbers(tokens: int) -> None:
    shape = SHAPES[0]
    forward = few(shape).forward
    first, second = data(shape, tokens), data(shape, tokens)
    outputs, tape = record(forward, first)
    assert torch.equal(outputs[0], forward(*first)[0][0])
    assert tape is not None
    again = tape(second)
    assert again is not None and torch.equal(again[0], forward(*second)[0][0])
    in_batch = tape(second, torch.Size((1, tokens, shape.hidden)), (1,))
    assert in_batch is not None and in_batch[0].shape == (1, tokens, shape.hidden)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_families(name: str, dtype: str, tmp_path: Path) -> None:
    block = sized(name, dtype)
    graph = lowered(block.graph, "few=true", training=False)
    most = most_few_tokens(graph)
    assert most > 0
    module = built(graph, tmp_path)
    for tokens, routing in ((0, "random"), (1, "random"), (min(most, 7), "empty"), (2, "one")):
        check(block, graph, module, tokens, routing)


@pytest.mark.parametrize("seed", range(12))
def test_random_blocks(seed: int, tmp_path: Path) -> None:
    block = random_block(seed + 50)
    graph = lowered(block.graph, "few=true", training=False)
    tokens, routing = random_size(seed)
    most = most_few_tokens(graph)
    check(block, graph, built(graph, tmp_path), min(tokens, most), routing)

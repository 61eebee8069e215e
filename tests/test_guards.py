"""What is not proved of sizes is checked before anything runs, with the reason and the place."""

from __future__ import annotations

import re
import timeit
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.emitted_check import Shape, block_graph
from moec.capture.block import MAX_TOKENS
from moec.codegen.module import emit_module
from moec.codegen.requirements import WORD, Requirement, needed, power
from moec.errors import CallError, CodegenError
from moec.ir import Graph, dim, parse
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime import guards
from moec.runtime.artifact import build
from tests.graphs import OLMOE
from tests.graphs import build as block_of

T = dim("T")


def ranged(graph: Graph, low: int, high: int | None) -> Graph:
    """A graph whose tokens are declared to be in a range."""
    return replace(graph, ranges={"T": (low, high)})


def lowered(graph: Graph, target: str) -> Graph:
    """A graph after the whole pipeline, for training."""
    return PassManager(pipeline(target, True)).run(graph)


def on_nothing(graph: Graph, tokens: int) -> list[torch.Tensor]:
    """Inputs of so many tokens that hold no memory."""
    shapes = [[d if isinstance(d, int) else tokens for d in v.type.shape] for v in graph.inputs]
    kinds = [DTYPES[v.type.dtype] for v in graph.inputs]
    return [torch.empty(s, dtype=k, device="meta") for s, k in zip(shapes, kinds, strict=True)]


@pytest.mark.parametrize(
    "target, tokens, limit",
    [("aten", 2**30, "2147483647"), ("triton", 2**29, "1073676288"), ("triton", 2**40, "10736762")],
)
def test_too_many_tokens_are_refused_before_anything_runs(
    target: str, tokens: int, limit: str, tmp_path: Path
) -> None:
    graph = lowered(ranged(block_of(OLMOE).graph, 0, MAX_TOKENS), target)
    compiled = build(graph, target, "training", (), tmp_path)
    with pytest.raises(CallError) as error:
        compiled.forward(*on_nothing(graph, tokens))
    for part in (f"2*T <= {limit}", f"2*T = {2 * tokens}", " at model.py:"):
        assert part in str(error.value)


@pytest.mark.parametrize("target", ["aten", "triton"])
def test_the_declared_range_is_checked(target: str, tmp_path: Path) -> None:
    graph = lowered(ranged(block_of(OLMOE).graph, 0, 5000), target)
    compiled = build(graph, target, "training", (), tmp_path)
    with pytest.raises(CallError, match=r"the declared range: T <= 5000 must hold, but T = 5001"):
        compiled.forward(*on_nothing(graph, 5001))


def test_one_check_stands_before_the_first_launch() -> None:
    text = emit_module(lowered(ranged(block_of(OLMOE).graph, 0, MAX_TOKENS), "triton"), "triton")
    forward = text.split("def forward", 1)[1].split("def backward")[0]
    assert forward.count("guards.") == text.count("guards.at_most") == 1
    assert forward.index("guards.") < forward.index("torch.empty") < forward.index("launch.")


def test_what_the_range_proves_is_not_checked_again() -> None:
    text = emit_module(lowered(ranged(block_of(OLMOE).graph, 0, 131072), "triton"), "triton")
    assert re.findall(r"guards\..*", text) == [
        "guards.at_most(T, 131072, 'T', 'the declared range')"
    ]


@pytest.mark.parametrize("target", ["aten", "triton"])
def test_what_no_size_meets_names_the_op_of_the_model(target: str) -> None:
    graph = lowered(ranged(block_of(OLMOE).graph, 2**30, MAX_TOKENS), target)
    reason = (
        r"@block: moe\.dispatch at model\.py:20 \(layers\.3\.experts\): pairs are numbered in"
        r" 32 bits, so 2\*T <= 2\^31 - 1, but it is at least 2147483648"
    )
    with pytest.raises(CodegenError, match=reason):
        emit_module(graph, target)


def test_matrices_too_large_for_a_template_are_left_to_pytorch() -> None:
    graph = lowered(block_graph(Shape(65536, 65536, 2, 1)), "triton")
    text = emit_module(graph, "triton")
    assert text.count("# no kernel: places in one expert's matrix: ") == 6


def test_a_limit_that_another_implies_is_dropped() -> None:
    rows, tokens = Requirement(8 * T, 2**30, "rows"), Requirement(T + 127, WORD, "tokens")
    ranges: dict[str, Any] = {"T": (0, None)}
    assert needed([tokens, rows, rows], ranges) == [rows]
    assert needed([rows, Requirement(8 * T, 2**20, "fewer")], ranges)[0].limit == 2**20
    assert needed([rows, tokens], {"T": (0, 1000)}) == []


@pytest.mark.parametrize(
    "number, text",
    [(65535, "65535"), (2**31 - 1, "2^31 - 1"), (2**30 - 2**16, "2^30 - 2^16"), (2**40, "2^40")],
)
def test_large_numbers_read_well(number: int, text: str) -> None:
    assert power(number) == text


def test_numbers_that_are_no_round_ones_stay() -> None:
    assert power(123456789) == "123456789"


def test_a_check_costs_less_than_a_microsecond() -> None:
    statement = "at_most(8 * T, 1073676288, '8*T', 'rows')"
    space = {"at_most": guards.at_most, "T": 4096}
    assert min(timeit.repeat(statement, globals=space, number=10_000)) / 10_000 < 1e-6


def test_graphs_without_kernels_or_rows_check_nothing() -> None:
    text = (
        "graph @g(%x: f32[T, 8]) where 0 <= T <= 9 {\n  %y = t.exp(%x) : f32[T, 8]\n  return %y\n}"
    )
    graph = PassManager(pipeline("aten", False)).run(parse(text))
    assert "guards." not in emit_module(graph, "aten")

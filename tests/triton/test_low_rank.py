"""Narrow grouped products: experts with a low-rank adapter, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec import interp
from moec.capture.regions import capture, find_candidates
from moec.ir import Graph
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import GRAD, RAISE
from tests.lora import adapted

from .emitted import SMALL, SMALL_TMA, built, cotangents, error, lowered, run


def adapted_block(family: str, rank: int, dtype: torch.dtype) -> Graph:
    """The graph of the first block of a model with adapters on its experts."""
    model = adapted(family, rank=rank).to(dtype)
    graph = capture(next(iter(find_candidates(model)))).graph
    assert graph is not None
    return graph


def arguments(graph: Graph, tokens: int) -> list[torch.Tensor]:
    """Random inputs of a graph."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [[tokens if not isinstance(d, int) else d for d in v.type.shape] for v in graph.inputs]
    return [
        (0.25 * torch.randn(shape, generator=generator)).to(DTYPES[v.type.dtype])
        for shape, v in zip(shapes, graph.inputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "rank", "dtype", "options"),
    [
        ("olmoe", 8, torch.float32, SMALL),
        ("olmoe", 8, torch.bfloat16, SMALL_TMA),
        ("gpt_oss", 4, torch.bfloat16, SMALL),
    ],
    ids=str,
)
def test_ranks_below_a_tile(
    family: str, rank: int, dtype: torch.dtype, options: str, tmp_path: Path
) -> None:
    graph = adapted_block(family, rank, dtype)
    joint = PassManager(f"{RAISE}, {GRAD}").run(graph)
    module = built(lowered(graph, options), tmp_path)
    for tokens in (0, 1, 19):
        given = [*arguments(graph, tokens), *cotangents(joint, tokens)]
        exact, rounded = (interp.run(joint, given, float64=wide) for wide in (True, False))
        for actual, e, r in zip(run(module, given), exact, rounded, strict=True):
            limit = 1e-5 if dtype is torch.float32 else 4e-3 + 1.5 * error(r, e)
            assert error(actual, e) <= limit

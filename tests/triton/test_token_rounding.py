"""Kernels behind a rounded routing: their inputs are what the rounding gives, rows as ever."""

import dataclasses
from pathlib import Path

import pytest

from moec.capture.block import MAX_TOKENS
from moec.ir import Graph
from moec.manager import PassManager
from moec.pipeline import pipeline

from .emitted import SMALL, built, check
from .test_families import sized


def lowered(graph: Graph) -> Graph:
    """A graph after the pipeline, with small tiles, and experts that fill tiles of 8 rows."""
    ranged = dataclasses.replace(graph, ranges={n: (0, MAX_TOKENS) for n in graph.ranges})
    text = f"{pipeline('triton', True, token_rounding=8)}, lower{{{SMALL}}}"
    return PassManager(text).run(ranged)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_families(name: str, tmp_path: Path) -> None:
    block = sized(name, "f32")
    graph = lowered(block.graph)
    assert any(op.kind == "moe.round_tokens" for op in graph.ops)
    module = built(graph, tmp_path)
    assert "# no kernel" not in module.path.read_text()
    for tokens, routing in ((0, "random"), (1, "random"), (37, "empty"), (17, "one")):
        check(block, graph, module, tokens, routing)

"""Random blocks, sizes and routings, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.graphs import random_block, random_size

from .emitted import SMALL, SMALL_TMA, built, check, lowered


@pytest.mark.parametrize("seed", range(32))
def test_random_block(seed: int, tmp_path: Path) -> None:
    block = random_block(seed)
    graph = lowered(block.graph, SMALL_TMA if seed % 2 else SMALL)
    tokens, routing = random_size(seed)
    check(block, graph, built(graph, tmp_path), tokens, routing)

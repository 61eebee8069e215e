"""Parts of passes with kernels give the bits of the passes."""

from pathlib import Path

import pytest
import torch

from moec.runtime.part_ops import part_ops
from tests.test_budget_parts import check_bits

from .emitted import SMALL, SMALL_TMA, built, cotangents, lowered
from .test_dropped import data_for, limited_block
from .test_families import sized


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [("olmoe", "bf16", SMALL_TMA), ("gpt_oss", "f32", SMALL), ("deepseek_v3", "f32", SMALL)],
)
def test_parts_give_the_bits_of_the_passes(
    name: str, dtype: str, options: str, tmp_path: Path
) -> None:
    block = sized(name, dtype)
    graph = lowered(block.graph, options)
    artifact = built(graph, tmp_path)
    ops = part_ops(artifact)
    # two products read the gathered rows of one gradient, by descriptors
    assert len(ops.forward) == 2 and len(ops.backward) == (3 if options == SMALL_TMA else 4)
    for tokens in (0, 1, 23):
        arguments = block.arguments(tokens, "one" if tokens > 1 else "random")
        check_bits(artifact, [*arguments, *cotangents(graph, tokens)])


def test_rows_of_no_expert_stay_unwritten(tmp_path: Path) -> None:
    graph = lowered(limited_block("f32"))
    artifact = built(graph, tmp_path)
    assert len(part_ops(artifact).forward) == 2
    check_bits(artifact, data_for(graph, torch.float32, 23))

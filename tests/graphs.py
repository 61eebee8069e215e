"""What tests of passes and kernels share: random blocks, and blocks of known models."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from moec.fuzz.blocks import (
    ACTIVATIONS,
    ROUTINGS,
    Block,
    Options,
    T,
    build,
    gpt_oss,
    limited_to_groups,
    random_block,
    random_options,
)
from moec.ir import Graph
from moec.manager import PassManager

TOKENS = (0, 1, 7, 63, 65)


def random_size(seed: int) -> tuple[int, str]:
    """A number of tokens and a routing."""
    r = random.Random(seed)
    return r.choice(TOKENS), r.choice(ROUTINGS)


OLMOE = Options(norm="sum")
GPT_OSS = Options(
    router="topk_softmax",
    raised=False,
    form="interleave",
    transposed=True,
    biases=True,
    activation="gpt_oss",
)
DEEPSEEK_V3 = Options(
    router="sigmoid",
    raised=False,
    biased=True,
    groups=4,
    norm="sum",
    scale=2.5,
    experts=8,
    choices=2,
    shared=True,
)
MIXTRAL = Options(raised=False, norm="sum")
MODELS = {"mixtral": MIXTRAL, "deepseek_v3": DEEPSEEK_V3, "gpt_oss": GPT_OSS}


def passed(text: str, graph: Graph) -> Graph:
    """The graph after a pipeline."""
    return PassManager(text).run(graph)


def assert_same(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, exact: bool
) -> None:
    """Equal bits if ``exact``; otherwise equal but for the rounding of float64."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if exact:
            assert torch.equal(a, e)
        else:
            scale = float(e.abs().max()) if e.numel() else 0.0
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12 * (1 + scale))


__all__ = [
    "ACTIVATIONS",
    "DEEPSEEK_V3",
    "GPT_OSS",
    "MIXTRAL",
    "MODELS",
    "OLMOE",
    "ROUTINGS",
    "TOKENS",
    "Block",
    "Options",
    "T",
    "assert_same",
    "build",
    "gpt_oss",
    "limited_to_groups",
    "passed",
    "random_block",
    "random_options",
    "random_size",
]

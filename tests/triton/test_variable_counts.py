"""Numbers that follow from data, in kernels: what users' blocks become, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec import interp
from moec.api import regions
from moec.ir import Graph
from tests.styles_variable import (
    HIDDEN,
    ChoiceMajor,
    ChoiceStacked,
    MarginSentinel,
    OneOrTwo,
    SwitchMask,
    Threshold,
    TopP,
)

from .emitted import SMALL, built, cotangents, error, lowered, run

FEW = f"few=true,{SMALL}"


def captured(style: Any) -> Graph:
    """The graph of a block."""
    (region,) = regions(moec.compile(style()))
    return region.history[0][1]


def data_for(graph: Graph, tokens: int) -> list[torch.Tensor]:
    """Inputs and cotangents; weights are small, tokens are not."""
    data = [torch.randn(tokens, HIDDEN) * 2]
    data += [torch.randn([int(d) for d in v.type.shape]) * 0.4 for v in graph.inputs[1:]]
    return [*data, *cotangents(graph, tokens)]


@pytest.mark.parametrize(
    ("style", "options"),
    [
        (MarginSentinel, SMALL),
        (MarginSentinel, FEW),
        (OneOrTwo, SMALL),
        (Threshold, SMALL),
        (Threshold, FEW),
        (TopP, SMALL),
        (SwitchMask, SMALL),
        (SwitchMask, FEW),
        (ChoiceMajor, SMALL),
        (ChoiceStacked, SMALL),
    ],
)
def test_equal_to_the_interpreter(style: Any, options: str, tmp_path: Path) -> None:
    graph = lowered(captured(style), options)
    module = built(graph, tmp_path)
    text = module.path.read_text()
    assert "no kernel" not in text
    assert ("not in the kernel" in text) == (style is SwitchMask and options == FEW)
    for tokens in (0, 1, 17) if options == FEW else (0, 1, 17, 70):
        data = data_for(graph, tokens)
        exact = interp.run(graph, data, float64=True)
        for actual, wanted in zip(run(module, data), exact, strict=True):
            assert error(actual, wanted) <= 1e-5


def test_experts_of_which_some_get_no_token_and_one_all(tmp_path: Path) -> None:
    graph = lowered(captured(Threshold), SMALL)
    module = built(graph, tmp_path)
    data = data_for(graph, 40)
    gate = next(i for i, v in enumerate(graph.inputs) if v.hint == "gate")
    data[0][:, 0], data[gate] = 1.0, torch.zeros_like(data[gate])
    for scores in ([2.0, 0, 0, 0], [0.0, 0, 0, 0]):  # one expert above the threshold, or none
        data[gate][:, 0] = torch.tensor(scores)
        exact = interp.run(graph, data, float64=True)
        for actual, wanted in zip(run(module, data), exact, strict=True):
            assert error(actual, wanted) <= 1e-5

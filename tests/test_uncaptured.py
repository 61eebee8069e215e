"""Models whose step is no single graph: what a budget says about them, and its advice works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.budget.model_plan import capture_model
from moec.errors import CompileError

from .models import assert_equal_gradients, build, gradients, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Asking(nn.Linear):
    """Its code depends on a value."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = super().forward(input)
        if result.sum().item() > 0:
            return result
        return -result


def asking(*layers: int) -> Any:
    """A model some of whose layers are no graph."""
    model = build("olmoe").train()
    for layer in layers:
        model.model.layers[layer].self_attn.o_proj = _Asking(32, 32)
    return model


PLACE = (
    r"no single graph. The tracer stopped in model.layers.0.self_attn.o_proj \(_Asking\) at"
    r" test_uncaptured.py:\d+ `if result.sum\(\).item\(\) > 0:`"
)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile itself
def test_the_error_names_the_part_and_its_advice_works() -> None:
    model, batch = asking(0), tokens(3, 40)
    with pytest.raises(CompileError, match=PLACE) as caught:
        moec.compile(model, memory_budget="4MiB")(**batch)
    advice = re.search(r"model\.set_submodule\(.*\)", str(caught.value))
    assert advice is not None and "'model.layers.1'" in advice[0]
    expected, reference = gradients(model, batch)
    budget = "2MiB"
    eval(advice[0].replace("...", "budget"), {"moec": moec, "model": model, "budget": budget})
    output, found = gradients(model, batch)
    torch.testing.assert_close(output.loss, expected.loss)
    assert_equal_gradients(found, reference)
    assert "args[0].shape[1] <= 40: peak" in str(moec.explain(model.model.layers[1]))


def test_the_command_says_the_same() -> None:
    with pytest.raises(CompileError, match=f"{PLACE}(?s:.*)set_submodule"):
        capture_model(asking(0), 3, 40, "triton")


def test_where_every_layer_is_like_it_no_layer_is_advised() -> None:
    with pytest.raises(CompileError, match=PLACE) as caught:
        capture_model(asking(0, 1), 3, 40, "triton")
    assert "model.layers.1'" not in str(caught.value)

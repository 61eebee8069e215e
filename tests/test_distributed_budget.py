"""Layers with a memory budget each, sharded by FSDP2 over two processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed import WORLD
from tests.distributed_budget import LAYERS, small, train
from tests.test_distributed import launched

pytest.importorskip("torch.distributed")


@functools.cache
def results() -> tuple[dict[str, Any], ...]:
    """What each of the two processes found."""
    return launched("distributed_budget.py")


def test_budgets_change_no_loss() -> None:
    expected = train(small(), list(range(WORLD)))
    for found in results():
        assert found["losses"] == pytest.approx(expected, rel=1e-6)
        assert len(found["extras"]) == LAYERS, "one plan for each layer"
        assert min(found["extras"]) > 0, "the budget needs some operations to run again"


def test_a_budget_for_the_whole_of_a_model_in_sharded_parts_is_refused() -> None:
    for found in results():
        words = found["refusal"]
        assert "the weights of model.layers.0, model.layers.1 while it runs" in words
        assert "set_submodule('model.layers.0', fully_shard(moec.compile(" in words

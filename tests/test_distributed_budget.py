"""Steps under a memory budget in two processes: DDP, and FSDP2 around a model and around layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed import WORLD
from tests.distributed_budget import model_of, train
from tests.test_distributed import launched

pytest.importorskip("torch.distributed")


@functools.cache
def results() -> tuple[dict[str, Any], ...]:
    """What each of the two processes found."""
    return launched("distributed_budget.py")


@functools.cache
def expected(layers: int) -> list[float]:
    """The losses of one process with all rows, without a budget."""
    return train(model_of(layers), list(range(WORLD)))


@pytest.mark.parametrize("way, layers", [("ddp", 1), ("fsdp whole", 1), ("fsdp parts", 2)])
def test_a_budget_changes_no_loss(way: str, layers: int) -> None:
    for found in results():
        assert found[way] == pytest.approx(expected(layers), rel=1e-6)
        assert len(found[f"{way} extra"]) == layers, "one plan for each model or layer"
        assert min(found[f"{way} extra"]) > 0, "the budget needs some operations to run again"


def test_a_budget_for_the_whole_of_a_model_in_sharded_parts_is_refused() -> None:
    for found in results():
        words = found["refusal"]
        assert "the weights of model.layers.0, model.layers.1 while it runs" in words
        assert "set_submodule('model.layers.0', fully_shard(moec.compile(" in words

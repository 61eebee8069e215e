"""Trial calls for modules on a GPU go to a copy on the CPU; here every module counts as such."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import moec
from moec import share
from moec.api import regions
from moec.families.discover import families
from moec.families.inputs import inputs_for
from moec.families.row import comparison, tiny_model

from .models import build


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "is_on_gpu", lambda model: True)


def test_a_copy_shares_nothing_and_is_equal() -> None:
    compiled = moec.compile(build("mixtral"))
    block = compiled.model.layers[0].mlp
    copied = share.trial_copy(block)
    x = torch.randn(2, 3, 32)
    assert torch.equal(copied(x), block(x))
    pointers = {p.data_ptr() for p in block.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in copied.parameters())


@pytest.mark.parametrize(
    "name", ["mixtral", "gemma4", "dbrx", "switch_transformers", "nllb_moe", "jetmoe"]
)
def test_families_are_compiled_by_trials_on_copies(name: str) -> None:
    model: Any = tiny_model(next(f for f in families() if f.name == name)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = moec.compile(model)
    assert comparison(model, compiled) == "yes"
    compiled(**inputs_for(model))
    found = [r for region in regions(compiled) for r in (region, region.inner) if r is not None]
    assert any(r.artifacts for r in found)
    assert "left as it was" not in {r.status for r in regions(compiled)}

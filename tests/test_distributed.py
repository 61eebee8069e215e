"""Two processes on the CPU: FSDP2 and DDP train a compiled model as they train the original."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import FAMILIES, STEPS, WORLD, loss_of, tiny
from tests.models import tokens

pytest.importorskip("torch.distributed")
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def results() -> tuple[dict[str, Any], ...]:
    """What each of the two processes found."""
    return launched("distributed.py")


def launched(script: str) -> tuple[dict[str, Any], ...]:
    """What each process of a script found."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests" / script)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), folder],
                env=settings,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(WORLD)
        ]
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert [p.returncode for p in processes] == [0] * WORLD, printed[0][-3000:]
        return tuple(
            json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(WORLD)
        )


@functools.cache
def single_process(family: str) -> list[float]:
    """Losses and gradient norms of one process with all rows."""
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(STEPS):
        loss = loss_of(model, tokens(2 * WORLD, 5 + 2 * step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.item(), norm.item()]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_fsdp_trains_with_the_losses_of_the_original(name: str) -> None:
    expected = single_process(FAMILIES[name])
    for found in results():
        assert found[f"{name} statuses"] == ["compiled"]
        assert found["plain"] == pytest.approx(single_process("olmoe"), rel=1e-6)
        for way in ("compiled before", "compiled after"):
            assert found[f"{name} {way}"] == pytest.approx(expected, rel=1e-6), way


def test_a_sharded_state_dict_is_saved_and_loaded() -> None:
    assert max(found["state dict"] for found in results()) < 1e-9


def test_a_block_called_while_its_weights_are_sharded_is_refused() -> None:
    for found in results():
        assert "layers.1.mlp" in found["alone"]
        assert "DTensors here: sharded. Call the model that fully_shard was given" in found["alone"]


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_trains_with_the_losses_of_the_original(unused: bool) -> None:
    for found in results():
        assert found[f"ddp compiled {unused}"] == pytest.approx(found["ddp plain"], rel=1e-6)
        assert found[f"ddp compiled {unused}"] == pytest.approx(single_process("olmoe"), rel=1e-6)
        assert found[f"ddp counts {unused}"] == [1], "each parameter's gradient comes once"

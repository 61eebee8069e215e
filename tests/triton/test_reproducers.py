"""A kernel that does not compile leaves a file on which a fresh process fails in the same way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.inputs import random_inputs
from moec.ir import parse
from moec.pipeline import pipeline
from moec.reproducer import emission_of
from moec.session import Session
from tests.test_observers import BLOCK

ROOT = Path(__file__).resolve().parents[2]


def with_odd_tiles(target: str, *options: Any) -> str:
    """The usual passes, but tiles have rows that are no power of two."""
    return pipeline(target, *options).replace("lower{", "lower{block-m=48,")


def test_a_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.session.choose_target", lambda asked, device: "triton")
    monkeypatch.setattr("moec.session.pipeline", with_odd_tiles)
    graph = parse(BLOCK)
    session = Session(cache=str(tmp_path))
    inputs = random_inputs(graph, {"T": 3})
    with pytest.warns(UserWarning, match="kernels of @block do not compile here") as caught:
        made = session.artifact(graph, None, torch.device("cpu"), inputs)
    assert made is not None and made.target == "aten"
    messages = [str(w.message) for w in caught]
    path = next(p for p in tmp_path.glob("moec-repro-*.moe") if "try" in p.read_text())
    assert any(f"moec emit {path}" in m for m in messages)
    emission = emission_of(path.read_text())
    assert emission is not None and str(emission) == "triton, try"
    found = subprocess.run(
        [sys.executable, "-m", "moec", "emit", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert found.returncode == 1
    reason = next(t for t in path.read_text().splitlines() if "power of 2" in t)
    assert reason.removeprefix("//").strip() in found.stderr

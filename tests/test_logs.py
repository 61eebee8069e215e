"""Logs: one line a decision, on the loggers that MOEC_LOGS and TORCH_LOGS turn on."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

import moec
from moec import logs
from moec.errors import CompileError
from moec.log_captures import what_is_new
from moec.mode import Mode
from tests.test_api import HIDDEN, Block, Net
from tests.test_observers import BLOCK

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """Turn every log off after a test."""
    yield
    for name in logs.NAMES:
        logger = logging.getLogger(f"moec.{name}")
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        logger.handlers.clear()


def logged(names: str) -> str:
    """What a first call, one with gradients, and one in another dtype log."""
    written = io.StringIO()
    with redirect_stderr(written):
        logs.configure(names)
        compiled = moec.compile(Net(Block(), Block()))
        x = torch.randn(2, 30, HIDDEN)
        with torch.no_grad():
            compiled(x)
        compiled(x).sum().backward()
        compiled.layers[0].scale = 2.0
        compiled.eval()
        with torch.no_grad():
            compiled(x)
    return written.getvalue()


def test_each_log_has_its_lines() -> None:
    text = logged("all")
    lines = {name: [t for t in text.splitlines() if f"[moec.{name}]" in t] for name in logs.NAMES}
    assert any("layers.0 (Block): captured as block, " in t for t in lines["regions"])
    assert any("layers.1 (Block): shares the capture" in t for t in lines["regions"])
    assert any("layers.0 (inference): 06 raise-router: " in t for t in lines["passes"])
    assert any("layers.0: training, aten, compiled in " in t for t in lines["kernels"])
    assert any("compiled again: with gradients" in t for t in lines["recompiles"])
    assert any(
        "layers.0: captured again: training False, not True" in t for t in lines["recompiles"]
    )


def test_a_log_of_one_name_has_nothing_else() -> None:
    assert {t.split("]")[0] for t in logged("regions").splitlines()} == {"[moec.regions"}


def test_a_plus_adds_the_graphs_and_the_code() -> None:
    assert "def forward(" in logged("+kernels")


def test_nothing_is_logged_unasked() -> None:
    assert not logged("")


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "passes, kernel")
    with pytest.raises(
        CompileError, match=r"MOEC_LOGS: unknown log 'kernel'; logs are all, or reg"
    ):
        moec.compile(Net(Block()))


def test_what_is_new_about_a_mode_is_named() -> None:
    mode = Mode(True, torch.float32, 3, None)
    other = Mode(True, torch.bfloat16, 2, None)
    assert what_is_new(other, mode) == "dtype bfloat16, not float32; rank 2, not 3"


@pytest.mark.parametrize(
    ("variables", "wanted", "missing"),
    [
        ({"TORCH_LOGS": "moec"}, "@block: 06 raise-router: ", "graph @block"),
        ({"TORCH_LOGS": "+moec"}, "graph @block", ""),
        ({"MOEC_LOGS": "passes"}, "[moec.passes] @block: 06 raise-router: ", "graph @block"),
    ],
)
def test_the_environment_turns_logs_on(
    tmp_path: Path, variables: dict[str, str], wanted: str, missing: str
) -> None:
    (tmp_path / "block.moe").write_text(BLOCK)
    trace = {"TORCH_TRACE": str(tmp_path / "trace")}
    found = subprocess.run(
        [sys.executable, "-m", "moec", "opt", "block.moe", "--target", "aten", "-o", "out.moe"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables, **trace, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    assert wanted in found.stderr
    assert not missing or missing not in found.stderr
    (file,) = (tmp_path / "trace").iterdir()
    entries = file.read_text()
    for name in ("moec_block_00_input", "moec_block_06_raise_router"):
        assert f'"artifact": {{"name": "{name}", "encoding": "string"}}' in entries
    assert "moe.select" in entries

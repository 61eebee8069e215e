"""The steps of the benchmark of wide indices, at sizes for the interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import wide_cases
from benchmarks.wide_cases import CASES, Result, Setting, results
from benchmarks.wide_index import Running, outcome, rows_of


@pytest.mark.parametrize("name", ["weights-few", "pointwise-pointer", "rows-pointer"])
def test_kernels_are_right_in_parts(name: str) -> None:
    case = CASES[name]
    found = list(results(case, Setting(case.template, "cpu", small=True), lambda: None))
    assert len(found) >= 2 and all(r.right and r.kernels for r in found), found


def test_wrong_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wide_cases.run

    def wrong(made: Any, inputs: Any, dy: Any) -> list[torch.Tensor]:
        found = plain(made, inputs, dy)
        if len(found[0]) > 30:  # the call of all tokens
            found[0][-2:] = found[0][:2]
        return found

    monkeypatch.setattr(wide_cases, "run", wrong)
    setting = Setting("pointer", "cpu", small=True)
    found = {r.what: r.right for r in results(CASES["rows-pointer"], setting, lambda: None)}
    assert [found[n] for n in ("y", "y, last", "d_x", "d_x, last")] == [False, False, True, True]


def test_nothing_and_nan_are_wrong(tmp_path: Path) -> None:
    assert not Result("case", "y", 1, float("nan"), 1.0).right
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    (tmp_path / "log").write_text("first\nOutOfMemoryError: no\n")
    one = Running(CASES["rows-pointer"], process, tmp_path, time.monotonic())
    (row,) = rows_of(outcome(one))
    assert row[1] == "ended with 3: OutOfMemoryError: no" and row[-1] == "WRONG"

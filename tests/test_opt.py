"""Options of moec opt: what is printed, and where the pipeline ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moec.cli.app import app
from moec.ir import parse
from tests.test_observers import BLOCK


def opt(folder: Path, *words: str) -> Result:
    """``moec opt`` on the block, with three passes of which the first and the last change it."""
    (folder / "block.moe").write_text(BLOCK)
    passes = ["-p", "raise-router, cse, simplify"]
    return CliRunner().invoke(app, ["opt", str(folder / "block.moe"), *passes, *words])


def test_what_a_pass_gets_is_printed_on_stderr(tmp_path: Path) -> None:
    found = opt(tmp_path, "--print-before", "raise-router")
    assert parse(found.stderr) == parse(BLOCK)
    assert parse(found.stdout) != parse(BLOCK)


@pytest.mark.parametrize(("stop", "passes"), [("raise-router", 1), ("cse", 2), ("1", 1), ("0", 0)])
def test_no_pass_runs_after_the_last(tmp_path: Path, stop: str, passes: int) -> None:
    found = opt(tmp_path, "--stop-after", stop, "--stats")
    assert found.exit_code == 0, found.output
    assert len(found.stderr.splitlines()) == 1 + passes
    assert parse(found.stdout).name == "block"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop-after", "dce"], "--stop-after dce: this pipeline does not run it"),
        (["--stop-after", "4"], "--stop-after 4: this pipeline has 3 passes"),
        (["--print-before", "soup"], "unknown pass 'soup'"),
    ],
)
def test_a_pass_that_does_not_run_is_a_mistake(
    tmp_path: Path, words: list[str], message: str
) -> None:
    found = opt(tmp_path, *words)
    assert found.exit_code == 1
    assert message in found.stderr

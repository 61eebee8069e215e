"""What fails while compiling leaves one file, and a fresh process fails on it in the same way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moec import manager
from moec.cli.app import app
from moec.errors import CodegenError, ParseError
from moec.ir import parse
from moec.reproducer import Emission, check_of, emission_of, pipeline_of
from moec.session import Session
from tests.broken_passes import PASSES
from tests.test_observers import BLOCK

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def broken_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Passes with faults, and a folder of its own."""
    manager.all_passes()
    for name, definition in PASSES.items():
        monkeypatch.setitem(manager._PASSES, name, definition)
    monkeypatch.chdir(tmp_path)


def replayed(command: str, path: Path) -> str:
    """What a fresh process prints on stderr; it must fail."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.broken_passes", command, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=path.parent,
    )
    assert found.returncode == 1, found.stdout
    return found.stderr


def compile_with(passes: str, folder: Path) -> tuple[str, Path]:
    """The warning of a compilation that fails, and the file that it names."""
    session = Session(cache=str(folder), passes=passes)
    with pytest.warns(UserWarning, match="could not be compiled") as caught:
        assert session.artifact(parse(BLOCK), None, torch.device("cpu"), name="mlp") is None
    (message,) = (str(w.message) for w in caught)
    (path,) = folder.glob("moec-repro-*.moe")
    assert f"moec {'emit' if '// emit' in path.read_text() else 'opt'} {path}" in message
    return message, path


@pytest.mark.parametrize(
    ("passes", "command", "line", "words"),
    [
        ("cse, raises, dce", "opt", "// run: raises", "KeyError: 'a bug'"),
        (
            "cse, malformed, dce",
            "opt",
            "// run: malformed",
            r"not defined before its use\n  after pass malformed",
        ),
        ("raise-router, fuse-gemm, dce", "emit", "// emit: aten", "has no form of kern"),
    ],
)
def test_a_failed_compilation_fails_again_in_a_fresh_process(
    tmp_path: Path, passes: str, command: str, line: str, words: str
) -> None:
    message, path = compile_with(passes, tmp_path)
    assert path.read_text().startswith(f"{line}\n// moec ")
    again = replayed(command, path)
    assert re.search(words, message), message
    assert re.search(words, again), again


def test_a_failed_check_fails_again_at_the_same_sizes(tmp_path: Path) -> None:
    Path("block.moe").write_text(BLOCK)
    found = CliRunner().invoke(app, ["opt", "block.moe", "-p", "cse, wrong", "--check-each"])
    assert found.exit_code == 1
    (path,) = tmp_path.glob("moec-repro-*.moe")
    assert check_of(path.read_text()) == ({"T": 5}, 0)
    again = replayed("opt", path)
    line = next(t for t in found.stderr.splitlines() if "changed the meaning" in t)
    assert line in again


def test_a_reproducer_holds_no_values_and_no_home(tmp_path: Path) -> None:
    _, path = compile_with("cse, raises", tmp_path)
    text = path.read_text()
    assert parse(text) == parse(BLOCK)
    assert not re.search(r"tensor\(|\d\.\d{4}", text)
    assert str(Path.home()) not in text


def test_an_error_of_the_file_system_is_no_reproducer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise CodegenError("no library") from OSError("disk full")

    monkeypatch.setattr("moec.session.build", fails)
    session = Session(cache=str(tmp_path))
    with pytest.warns(UserWarning, match="No reproducer was written"):
        assert session.artifact(parse(BLOCK), None, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("// run: cse\ngraph", None),
        ("// emit: aten\ngraph", Emission("aten")),
        ("//  emit:  triton, try \ngraph", Emission("triton", trial=True)),
    ],
)
def test_the_line_of_an_emission(text: str, found: Emission | None) -> None:
    assert emission_of(text) == found
    assert found is None or emission_of(f"// emit: {found}") == found


def test_the_line_of_a_check() -> None:
    assert check_of("// run: cse\n// check: seed=3, T=0") == ({"T": 0}, 3)
    assert check_of("// run: cse") is None
    assert pipeline_of("// check: seed=3\n// run: cse") == "cse"


@pytest.mark.parametrize("line", ["// check: T", "// check: T=1;2", "// check: T=" + "9" * 30])
def test_a_malformed_check_is_refused(line: str) -> None:
    with pytest.raises(ParseError, match="write // check: seed=0, T=33"):
        check_of(line)


@pytest.mark.parametrize("line", ["// emit: cuda", "// emit: aten, run"])
def test_a_malformed_emission_is_refused(line: str) -> None:
    with pytest.raises(ParseError, match="cannot read"):
        emission_of(line)


def test_emit_tries_a_module(tmp_path: Path) -> None:
    Path("block.moe").write_text(BLOCK)
    found = CliRunner().invoke(app, ["emit", "block.moe", "--target", "aten", "--try"])
    assert found.exit_code == 0
    assert "def forward" in found.stdout

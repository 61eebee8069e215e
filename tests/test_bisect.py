"""Bisection names planted faults: a wrong rewrite, a pass that is wrong as a whole, a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from moec import manager
from moec.cli.app import app
from moec.codegen import blocked, module
from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.errors import PassError
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op
from moec.ir.parser import parse
from moec.ir.text import show
from moec.manager import PassManager
from moec.reduce import reduce
from moec.rewrite import transform

from .graphs import Options, build, random_block


def _sigmoid_for_silu(graph: Graph) -> Graph:
    """Wrong at the silu only; its other rewrites keep the meaning."""

    def rule(b: Builder, op: Op) -> Any:
        if op.kind == "t.mul":
            return b("t.mul", *reversed(op.operands))
        return b("t.sigmoid", *op.operands) if op.kind == "t.silu" else None

    return transform(graph, rule, "wrong-rewrite")


def _tanh_for_silu(graph: Graph) -> Graph:
    """Wrong without asking for fuel."""
    ops = [replace(op, kind="t.tanh") if op.kind == "t.silu" else op for op in graph.ops]
    return graph.with_ops(ops)


@pytest.fixture(autouse=True)
def _planted() -> Iterator[None]:
    manager.all_passes()
    manager.register("wrong-rewrite")(_sigmoid_for_silu)
    manager.register("wrong-whole")(_tanh_for_silu)
    yield
    del manager._PASSES["wrong-rewrite"], manager._PASSES["wrong-whole"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("block.moe").write_text(show(build(Options(raised=False)).graph))
    return "block.moe"


def moec(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_the_guilty_rewrite_is_found_among_right_ones(file: str) -> None:
    result = moec("bisect", file, "-p", "simplify, cse, wrong-rewrite, dce")
    assert result.exit_code == 1
    assert "pass 3 of 4 is wrong: wrong-rewrite" in result.stdout
    assert "t.silu" in result.stdout.split("\n  - ")[1].split("\n")[0]
    assert "t.sigmoid" in result.stdout.split("\n  + ")[1].split("\n")[0]


def test_a_pass_that_is_wrong_as_a_whole_is_named(file: str) -> None:
    result = moec("bisect", file, "-p", "simplify, wrong-whole, dce")
    assert result.exit_code == 1
    assert "pass 2 of 3 is wrong: wrong-whole" in result.stdout
    assert "as a whole" in result.stdout


@pytest.mark.parametrize("training", [[], ["--training"]])
def test_a_right_pipeline_is_right(file: str, training: list[str]) -> None:
    result = moec("bisect", file, "T=9", *training)
    assert result.exit_code == 0, result.output
    assert "the aten module are right" in result.stdout


def test_a_wrong_kernel_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = blocked.emit_blocked

    def wrong(writer: Writer, op: Op, names: PythonNames) -> bool:
        done = emit(writer, op, names)
        if done:
            writer.line(f"{names[op.results[0]]} *= 1.01")
        return done

    monkeypatch.setattr(module, "emit_blocked", wrong)
    result = moec("bisect", file)
    assert result.exit_code == 1
    assert "the passes are right, the aten module is not" in result.stdout
    assert "kernel" in result.stdout and "kern.pointwise" in result.stdout


def test_a_command_decides(file: str) -> None:
    absent = "grep -q t.softmax"  # fails once the router is raised
    result = moec("bisect", file, "--cmd", absent)
    assert result.exit_code == 1
    assert "is wrong: raise-router" in result.stdout
    assert "grep exits with status 1" in result.stdout


def test_a_command_that_fails_from_the_start_is_refused(file: str) -> None:
    result = moec("bisect", file, "--cmd", "false")
    assert result.exit_code == 1
    assert "before any pass" in result.stderr


def test_reduce_leaves_one_op_and_a_test_that_fails(file: str) -> None:
    result = moec(
        "reduce", file, "-p", "simplify, wrong-whole", "-o", "small.moe", "--test", "t.py"
    )
    assert result.exit_code == 0, result.output
    text = Path("small.moe").read_text()
    assert text.startswith("// run: wrong-whole\n")
    assert [op.kind for op in parse(text).ops] == ["t.silu"]
    namespace: dict[str, Any] = {}
    exec(compile(Path("t.py").read_text(), "t.py", "exec"), namespace)
    with pytest.raises(PassError, match="changed the meaning"):
        namespace["test_block"]()


def test_reduce_by_a_command(file: str) -> None:
    result = moec("reduce", file, "--cmd", "sh -c '! grep -q t.silu {}'")
    assert result.exit_code == 0, result.output
    assert [op.kind for op in parse(result.stdout).ops] == ["t.silu"]


def test_reduce_says_that_nothing_fails(file: str) -> None:
    result = moec("reduce", file, "-p", "cse")
    assert result.exit_code == 1
    assert "nothing fails" in result.stderr


@pytest.mark.parametrize("seed", range(6))
def test_reduced_joint_graphs_still_fail(seed: int) -> None:
    graph = PassManager("grad").run(random_block(seed).graph)
    there = [op.kind for op in graph.ops]
    wanted = there[len(there) // 2]

    def fails(one: Graph) -> bool:
        return any(op.kind == wanted for op in one.ops)

    small = reduce(graph, fails)
    assert [op.kind for op in small.ops] == [wanted]
    assert parse(show(small)) == small

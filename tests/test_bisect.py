"""Bisection names planted faults: a wrong rewrite, a pass that is wrong as a whole, a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import moec as moec_package
from moec import fuel, manager, model_bisect
from moec.bisect import Untested, find_rewrite
from moec.capture import regions
from moec.capture.found import FoundRegion
from moec.cli.app import app
from moec.codegen import blocked, module
from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.errors import PassError
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op
from moec.ir.parser import parse
from moec.ir.text import show
from moec.manager import PassCall, PassDef, PassManager, Step
from moec.model_bisect import bisect_model
from moec.reduce import reduce
from moec.rewrite import transform

from .graphs import Options, build, random_block
from .models import build as build_model


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


# commands, with the statuses of git bisect run
def _script(text: str) -> str:
    Path("check.sh").write_text(text)
    return "sh check.sh {}"


def test_status_125_skips_a_pass_and_says_so(file: str) -> None:
    # untested while the router is half raised, bad once the experts are a kernel
    check = _script("grep -q kern. $1 && exit 1; grep -q moe.select $1 && exit 125; exit 0")
    passes = "simplify, raise-router, cse, dce, fuse-rows"
    result = moec("bisect", file, "-p", passes, "--cmd", check)
    assert result.exit_code == 1
    assert "pass 5 of 5 is wrong: fuse-rows" in result.stdout
    assert "or one of the passes before it that could not be tested: raise-router" in result.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grep -q moe.select $1 && exit 127; exit 0", "exits with status 127"),
        ("grep -q moe.select $1 && kill -9 $$; exit 0", "was ended by signal 9"),
        ("exit 125", "cannot be tested before any pass"),
    ],
)
def test_other_statuses_stop_the_search(file: str, text: str, words: str) -> None:
    result = moec("bisect", file, "--cmd", _script(text))
    assert result.exit_code == 1
    assert words in result.stderr
    assert "is wrong" not in result.stdout


@pytest.mark.parametrize("untested", [0, 3, 4, 5])
def test_rewrites_that_cannot_be_tested_are_passed_over(untested: int) -> None:
    def eight(graph: Graph) -> Graph:
        """Spends eight units."""
        spent = sum(fuel.spend(str(i)) for i in range(8))
        return replace(graph, name=f"after{spent}")

    def test(step: Step) -> str:
        number = int(step.after.name.removeprefix("after"))
        if number == untested:
            raise Untested
        return "bad" if number >= 5 else ""

    call = PassCall(PassDef("eight", eight, frozenset({"t", "moe"})))
    found = find_rewrite(call, build(Options()).graph, test)
    if untested == 0:
        assert found is None  # whether the pass without rewrites is right is not known
    else:
        assert found is not None
        assert found.number - found.untested <= 5 <= found.number


# models
def test_a_right_model_is_right_on_given_inputs() -> None:
    model = build_model("olmoe")
    tokens = torch.randint(1, 60, (2, 9))
    found = bisect_model(moec_package.compile(model), {"input_ids": tokens}, training=True)
    assert not found.is_wrong
    assert len(found.blocks) == 1
    text = str(found)
    assert "the IR equals the module in float64, on 18 given tokens" in text
    assert "model.layers.0.mlp (OlmoeSparseMoeBlock) and 1 equal" in text


@pytest.mark.parametrize("training", [False, True])
def test_the_guilty_rewrite_is_found_from_a_model(training: bool) -> None:
    grad = "grad, " if training else ""
    passes = f"simplify, {grad}cse, wrong-rewrite, dce"
    found = bisect_model(build_model("mixtral"), training=training, passes=passes)
    assert found.is_wrong
    assert "is wrong: wrong-rewrite" in str(found)
    assert "t.silu" in str(found).split("\n    - ")[1].split("\n")[0]


def test_a_capture_that_is_wrong_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = regions.capture_whole

    def wrong(*arguments: Any, **options: Any) -> FoundRegion:
        found = capture(*arguments, **options)
        return replace(found, graph=found.graph and _tanh_for_silu(found.graph))

    monkeypatch.setattr(regions, "capture_whole", wrong)
    found = bisect_model(build_model("olmoe"))
    assert found.is_wrong
    assert "capture is wrong: %routed of the IR differs from the module's" in str(found)


def test_a_wrong_gradient_of_a_capture_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("olmoe")
    own = type(model.model.layers[0].mlp).forward

    def detached(self: Any, hidden_states: torch.Tensor) -> Any:
        return own(self, hidden_states.detach() + 0 * hidden_states)

    blocks = model_bisect.blocks_of(model)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", detached)
    monkeypatch.setattr(model_bisect, "blocks_of", lambda *_: blocks)
    assert not bisect_model(model).is_wrong
    assert "the gradient of %" in str(bisect_model(model, training=True))


def test_the_command_takes_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_model("olmoe").config.save_pretrained("olmoe")
    result = moec("bisect", "olmoe", "--training")
    assert result.exit_code == 0, result.output
    assert "capture is right" in result.stdout
    assert "the aten module are right" in result.stdout
    assert moec("bisect", "olmoe", "T=4").exit_code == 1


def test_a_model_without_blocks_is_said() -> None:
    found = bisect_model(torch.nn.Linear(2, 2))
    assert not found.is_wrong
    assert str(found) == "Linear: no MoE block found"

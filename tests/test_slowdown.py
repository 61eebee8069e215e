"""Bisection by time names planted slow code, and only that; memory tables add up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from moec import manager
from moec.cli.app import app
from moec.codegen import blocked, emit_module, module
from moec.codegen.names import PythonNames
from moec.codegen.writer import Writer
from moec.execute import op_times, run_emitted
from moec.fuel import spend
from moec.inputs import random_inputs
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op
from moec.ir.text import show
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.timing import change, in_turns

from .graphs import Options, build
from .models import build as build_model

BUSY = "sum(range(200_000))"  # some milliseconds


def moec(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("block.moe").write_text(show(build(Options(raised=False)).graph))
    return "block.moe"


def _sums_in_between(graph: Graph) -> Graph:
    """Right, but slow at one of its rewrites: the silu's result is negated 400 times."""
    builder = Builder(graph.ranges)
    mapping: dict[Any, Any] = {}
    for op in graph.ops:
        copied = builder.copy(op, [mapping.get(v, v) for v in op.operands])
        mapping.update(zip(op.results, copied.results, strict=True))
        if op.kind in ("t.silu", "t.mul") and spend(f"slow: {op!r}"):
            value = copied.result
            for _ in range(200 if op.kind == "t.silu" else 1):
                value = builder("t.neg", builder("t.neg", value))
            mapping[op.result] = value
    return replace(
        graph, ops=tuple(builder.ops), outputs=tuple(mapping.get(v, v) for v in graph.outputs)
    )


@pytest.fixture
def _planted() -> Iterator[None]:
    manager.all_passes()
    manager.register("slow-rewrite")(_sums_in_between)
    yield
    del manager._PASSES["slow-rewrite"]


@pytest.mark.usefixtures("_planted")
def test_the_slow_pass_and_its_rewrite_are_named(file: str) -> None:
    passes = "simplify, raise-router, slow-rewrite, dce"
    result = moec("bisect", file, "T=2048", "--metric", "time", "-p", passes)
    assert result.exit_code == 1, result.output
    assert "<- slower" in result.stdout
    assert "pass 3 made it slower" in result.stdout
    rewrite = result.stdout.split("\n  rewrite ")[1].splitlines()[0]
    assert "slow: " in rewrite and "t.silu" in rewrite


@pytest.mark.usefixtures("file")
def test_the_slow_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    emit = blocked.emit_blocked

    def slow(writer: Writer, op: Op, names: PythonNames) -> bool:
        done = emit(writer, op, names)
        if done:
            writer.line(BUSY)
        return done

    monkeypatch.setattr(module, "emit_blocked", slow)
    fused = PassManager(pipeline("aten", training=False)).run(build(Options(raised=False)).graph)
    Path("fused.moe").write_text(show(fused))
    result = moec("bisect", "fused.moe", "T=256", "--metric", "time", "-p", "", "--rounds", "7")
    assert result.exit_code == 1, result.output
    assert "a kernel is slower than its body" in result.stdout
    assert "kern.pointwise" in result.stdout.split("slower than its body")[1].splitlines()[0]


@pytest.mark.usefixtures("_planted")
def test_a_baseline_says_at_which_line_of_the_model(file: str) -> None:
    base = "simplify, raise-router, dce"
    slow = ("-p", "simplify, raise-router, slow-rewrite, dce")
    result = moec("bisect", file, "T=2048", "--metric", "time", *slow, "--baseline", base)
    assert result.exit_code == 1, result.output
    assert "baseline -> now" in result.stdout and "slower at" in result.stdout
    Path("before.moe").write_text(show(PassManager(base).run(build(Options(raised=False)).graph)))
    result = moec(
        "bisect", file, "T=64", "--metric", "time", "-p", base, "--baseline", "before.moe"
    )
    assert "not slower than the baseline beyond noise" in result.stdout


def test_a_baseline_with_other_inputs_is_refused(file: str) -> None:
    result = moec("bisect", file, "--metric", "time", "--baseline", "simplify, grad")
    assert result.exit_code == 1
    assert "take different inputs" in result.stderr


@pytest.mark.parametrize("words", [["--rounds", "9"], ["--metric", "time", "--cmd", "true"]])
def test_options_that_do_not_fit_are_wrong_usage(file: str, words: list[str]) -> None:
    assert moec("bisect", file, *words).exit_code == 2


def test_a_block_of_a_model_is_timed_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_model("olmoe").config.save_pretrained("olmoe")
    words = ("T=64", "--training", "--metric", "time", "--rounds", "5")
    result = moec("bisect", "olmoe", *words)
    assert "model.layers.0.mlp (OlmoeSparseMoeBlock) and 1 equal" in result.stdout, result.output
    assert "@OlmoeSparseMoeBlock, T=64, forward and backward, aten on the CPU" in result.stdout
    assert "modeling_olmoe.py" in result.stdout


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_ops_are_timed_where_they_stand(tokens: int, training: bool) -> None:
    graph = PassManager(pipeline("aten", training)).run(build(Options()).graph)
    arguments = random_inputs(graph, {"T": tokens})
    times = op_times(graph, "aten", arguments, rounds=2)
    assert set(times) == set(graph.ops)
    assert all(ms >= 0 for ms in times.values())
    assert len(run_emitted(graph, "aten", arguments)) == len(graph.returned)


@pytest.mark.parametrize("target", ["aten", "triton"])
def test_every_op_of_a_module_can_be_followed_by_a_mark(target: str) -> None:
    graph = PassManager(pipeline(target, training=True)).run(build(Options()).graph)
    text = emit_module(graph, target, lambda op: f"mark({graph.ops.index(op)})")
    compile(text, "emitted", "exec")
    assert all(f"    mark({place})\n" in text for place in range(len(graph.ops)))


def test_times_of_interpreted_kernels_are_refused(file: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = moec("bisect", file, "--metric", "time", "--target", "triton")
    assert result.exit_code == 1
    assert "no GPU here to run Triton kernels on; choose --target aten" in result.stderr


# measurement
def test_noise_is_no_change_and_a_change_is_none_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (1 + 0.3 * torch.rand(2, 200, 31, generator=generator)).tolist()
    blamed = sum(change(a, b).is_slower for a, b in zip(*noise, strict=True))
    assert blamed <= 2
    slower = [change(a, [t * 1.25 for t in b]) for a, b in zip(*noise, strict=True)]
    assert sum(c.is_slower for c in slower) >= 198
    assert all(abs(c.ratio - 0.25) < 0.2 for c in slower)


def test_a_few_disturbed_rounds_do_not_count() -> None:
    before = [1.0 + 0.001 * i for i in range(21)]
    after = [t + (50.0 if i % 7 == 0 else 0.0) for i, t in enumerate(before)]
    assert not change(before, after).is_slower


def test_calls_take_turns() -> None:
    order: list[str] = []
    device = torch.device("cpu")

    calls = [functools.partial(order.append, name) for name in "ab"]
    samples = in_turns(calls, device, rounds=5)
    assert "".join(name for name, _ in itertools.groupby(order)).endswith("ab" * 5)
    assert [len(s) for s in samples] == [5, 5]

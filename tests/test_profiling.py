"""Names in a profiler's trace, the time of compilation as a trace, and what a model keeps of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moec
from moec.cli.app import app
from moec.codegen.labels import has_range, label
from moec.errors import CompileError
from moec.ir import parse
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.library import op_name
from moec.session import Session
from tests.test_api import HIDDEN, Block, Net
from tests.test_observers import BLOCK


def profiled(call: Any) -> tuple[Any, list[Any]]:
    """The result of a call, and the ranges of moec in its profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, [e for e in profile.events() if e.name.startswith("moec: ")]


# ranges
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_a_profile_names_layers_and_ops(tokens: int) -> None:
    compiled = moec.compile(Net(Block(), Block()))
    x = torch.randn(2, tokens, HIDDEN)
    with torch.no_grad():
        plain = compiled(x)
        found, events = profiled(lambda: compiled(x))
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    names = [e.name for e in events]
    for layer in ("layers.0", "layers.1"):
        assert f"moec: {layer} forward" in names
        assert f"moec: {layer} dispatch" in names
    whole = next(e for e in events if e.name == "moec: layers.0 forward")
    inside = next(e for e in events if e.name == "moec: layers.0 dispatch")
    assert whole.time_range.start <= inside.time_range.start
    assert inside.time_range.end <= whole.time_range.end


def test_a_profile_names_the_backward_pass_and_changes_no_gradient() -> None:
    compiled = moec.compile(Net(Block()))
    x = torch.randn(2, 30, HIDDEN, requires_grad=True)

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        return found

    plain = gradient()
    found, events = profiled(gradient)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert "moec: layers.0 backward" in [e.name for e in events]


def test_without_a_profiler_no_second_module_is_made(tmp_path: Path) -> None:
    compiled = moec.compile(Net(Block()), options={"cache": tmp_path})
    with torch.no_grad():
        compiled(torch.randn(2, 3, HIDDEN))
        assert len(list(tmp_path.glob("*.py"))) == 1
        profiled(lambda: compiled(torch.randn(2, 3, HIDDEN)))
        assert len(list(tmp_path.glob("*_ranges_*.py"))) == 1


def test_the_op_of_a_tracer_is_named_after_the_structure() -> None:
    graph = parse(BLOCK)
    artifact = Session().artifact(graph, None, torch.device("cpu"))
    assert artifact is not None
    inputs = [torch.randn(5, *(int(d) for d in v.type.shape[1:])) for v in graph.inputs[:1]]
    inputs += [torch.randn(*map(int, v.type.shape)) for v in graph.inputs[1:]]
    op = getattr(torch.ops.moec, op_name(artifact))
    _, events = profiled(lambda: op(inputs))
    assert "moec: @block forward" in [e.name for e in events]


def test_labels_say_what_a_kernel_fuses() -> None:
    lowered = PassManager(pipeline("triton", training=False)).run(parse(BLOCK))
    labels = [label(op) for op in lowered.ops if has_range(op)]
    assert labels[0] == "router"
    assert "gather+up+silu" in labels
    assert labels[-1] == "combine"


def test_ranges_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("no space")

    compiled = moec.compile(Net(Block()), options={"cache": tmp_path})
    with torch.no_grad():
        plain = compiled(torch.ones(1, 3, HIDDEN))
        monkeypatch.setattr("moec.cache.write_whole", full)
        with pytest.warns(UserWarning, match="kept in memory only"):
            found, events = profiled(lambda: compiled(torch.ones(1, 3, HIDDEN)))
    torch.testing.assert_close(found, plain)
    assert "moec: layers.0 forward" in [e.name for e in events]
    assert len(events) > 1


# the time of compilation
def complete_events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, all of them complete ones with sane times."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    for event in events:
        assert event["ph"] == "X" and event["dur"] >= 0 and event["ts"] > 0
        assert {"name", "cat", "pid", "tid", "args"} <= event.keys()
    return events


def test_a_trace_has_captures_regions_passes_and_emissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "compile.json"
    compiled = moec.compile(Net(Block()), options={"trace": path})
    compiled(torch.randn(2, 30, HIDDEN)).sum().backward()
    events = complete_events(path)
    assert {e["cat"] for e in events} == {"capture", "region", "pass", "emit"}
    found = [e for e in events if e["cat"] == "region"]
    inside = [e for e in events if e["cat"] in ("pass", "emit")]
    assert [(e["name"], e["args"]["mode"]) for e in found] == [
        ("layers.0", "training"),
        ("layers.0", "training-few"),
    ]
    assert all(any(is_within(e, region) for region in found) for e in inside)


def is_within(event: dict[str, Any], other: dict[str, Any]) -> bool:
    begins, ends = event["ts"] - other["ts"], event["ts"] + event["dur"]
    return begins >= 0 and bool(ends <= other["ts"] + other["dur"] + 1)


def test_opt_writes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "block.moe").write_text(BLOCK)
    path = tmp_path / "trace.json"
    words = ["opt", str(tmp_path / "block.moe"), "-p", "cse, dce", "--trace", str(path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [e["name"] for e in complete_events(path)] == ["cse", "dce"]


def test_a_trace_that_cannot_be_written_stops_no_model(tmp_path: Path) -> None:
    path = tmp_path / "new" / "compile.json"
    with pytest.warns(UserWarning, match=r"the trace .*compile\.json cannot be written"):
        compiled = moec.compile(Net(Block()), options={"trace": path})
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        with torch.no_grad():
            compiled(torch.randn(1, 3, HIDDEN))
    assert moec.regions(compiled)[0].artifacts


@pytest.mark.parametrize("value", [3, "."])
def test_a_trace_must_be_a_file(value: object) -> None:
    with pytest.raises(CompileError, match="option 'trace' is a file's path"):
        moec.compile(Net(Block()), options={"trace": value})


# history and dumps
def test_history_has_every_graph_of_every_compilation() -> None:
    compiled = moec.compile(Net(Block(), Block()))
    assert moec.history(compiled) == []
    x = torch.randn(2, 30, HIDDEN, requires_grad=True)
    compiled(x).sum().backward()
    compiled(x[:, :2]).sum().backward()
    found = moec.history(compiled)
    assert [(c.regions, c.mode, c.target) for c in found] == [
        (("layers.0", "layers.1"), "training", "aten"),
        (("layers.0", "layers.1"), "training-few", "aten"),
    ]
    for one in found:
        pairs = zip(one.steps[:-1], one.steps[1:], strict=True)
        assert all(a.after is b.before for a, b in pairs)
        assert "-> " in str(one)


def test_history_takes_little_memory() -> None:
    graph = parse(BLOCK)
    tracemalloc.start()
    manager = PassManager(pipeline("triton", training=True))
    manager.run(graph)
    kept, _ = tracemalloc.get_traced_memory()
    steps = len(manager.history)
    tracemalloc.stop()
    assert steps > 20
    assert kept < 500_000  # bytes, of all graphs of one compilation together


def test_the_environment_sets_the_default_of_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_DUMP", str(tmp_path / "dump"))
    for options in ({}, {}, {"dump": None}):  # a second model overwrites nothing
        with torch.no_grad():
            moec.compile(Net(Block()), options=options)(torch.randn(1, 3, HIDDEN))
    folders = sorted(p.name for p in (tmp_path / "dump" / "layers.0").iterdir())
    assert folders == ["inference", "inference-2"]

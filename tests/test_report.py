"""The report holds what it shows, is one file, and the pictures' sources name every op."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moec.cli.app import app
from moec.codegen.host import partition
from moec.drawing import dot, mermaid
from moec.ir.dims import evaluate
from moec.ir.text import show
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.report import report_of_graphs, report_of_model
from moec.report.memory import MemoryUse, expression, live_bytes, memory_use
from moec.report.memory_text import size_text

from .graphs import Options, build, random_block
from .models import build as build_model


def data_of(page: str) -> Any:
    """The data inside a page."""
    (text,) = re.findall(r"^const data = (.*);$", page, re.MULTILINE)
    return json.loads(text)


@pytest.fixture(scope="module")
def olmoe() -> str:
    return report_of_model(build_model("olmoe"), "triton", training=True)


def test_the_report_of_a_model_has_stages_kernels_memory_and_sources(olmoe: str) -> None:
    (subject,) = data_of(olmoe)["subjects"]
    names = [stage["name"] for stage in subject["stages"]]
    assert names[0] == "input" and "grad" in names and any(n.startswith("lower") for n in names)
    assert subject["notes"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    kernels = subject["kernels"]
    assert len(kernels) >= 6
    assert all("@triton.jit" in k["source"] and k["body"].startswith("graph @") for k in kernels)
    assert any("router_logits" in text for text in subject["sources"].values())
    assert set(subject["memory"]["end"]["bytes"]) == {"1", "128", "4096", "65536"}


def test_a_stage_that_changed_something_lists_every_op_once(olmoe: str) -> None:
    (subject,) = data_of(olmoe)["subjects"]
    for stage in subject["stages"]:
        if stage["lines"] is not None:
            there = [line for line in stage["lines"] if line[0] != "removed"]
            assert len(there) == stage["ops"]


def test_the_page_is_whole_without_a_network_and_small(olmoe: str) -> None:
    frame = re.sub(r"^const data = .*;$", "", olmoe, flags=re.MULTILINE)
    assert not re.search(r"(src|href)\s*=|@import|fetch\(|https?://(?!www\.w3\.org)", frame)
    assert len(olmoe.encode()) < 2_000_000


def test_nothing_in_a_graph_can_end_the_script() -> None:
    graph = build(Options()).graph
    hostile = type(graph)("</script><script>alert(1)", graph.inputs, graph.ops, graph.outputs)
    page = report_of_graphs([hostile], "aten")
    assert page.count("</script>") == 1


@pytest.mark.parametrize("seed", range(6))
def test_live_bytes_begin_and_end_with_what_is_there(seed: int) -> None:
    graph = PassManager("grad, dce").run(random_block(seed).graph)
    sizes = {name: 7 for name in graph.ranges}
    live = live_bytes(graph, sizes)
    assert len(live) == len(graph.ops) and min(live) >= 0
    made = {v for op in graph.ops for v in op.results}
    kept = [v for v in dict.fromkeys(graph.returned) if v in made]
    assert live[-1] >= sum(evaluate(v.type.bytes, sizes) for v in kept)


@pytest.mark.parametrize("draw", [dot, mermaid])
def test_pictures_name_every_op(draw: Any) -> None:
    graph = PassManager("grad").run(build(Options()).graph)
    text = draw(graph)
    for i, op in enumerate(graph.ops):
        assert re.search(rf"\bop{i}\b.*{re.escape(op.kind)}", text)


@pytest.mark.parametrize("format", ["text", "dot", "mermaid", "html"])
def test_the_command_shows_files(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.moe"
    path.write_text(show(build(Options()).graph))
    result = CliRunner().invoke(app, ["show", str(path), "--format", format])
    assert result.exit_code == 0, result.output
    assert "moe.combine" in result.stdout


def _memory(training: bool, target: str = "aten", tokens: int = 64) -> MemoryUse:
    graph = PassManager(pipeline(target, training)).run(build(Options()).graph)
    use = memory_use(graph, {"T": tokens})
    assert use is not None
    return use


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_what_lives_at_the_peak_makes_the_peak(training: bool, tokens: int) -> None:
    use = _memory(training, tokens=tokens)
    assert use.peak == max(live_bytes(use.graph, use.sizes)) == use.bytes(use.alive)
    assert evaluate(expression(use.alive), use.sizes) == use.peak
    assert bool(use.held) == training
    assert list(use.alive) == sorted(use.alive, key=lambda v: -use.bytes([v]))


@pytest.mark.parametrize("target", ["aten", "triton"])
def test_what_is_held_is_what_the_emitted_program_saves(target: str) -> None:
    use = _memory(True, target)
    assert set(use.held) == set(partition(use.graph).saved)


def test_memory_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.moe"
    path.write_text(show(build(Options()).graph))
    words = ["show", str(path), "T=100", "--training", "--format", "memory"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    use = _memory(True, "triton", 100)
    assert f"peak: {size_text(use.peak)}" in result.stdout
    assert f"held between forward and backward: {size_text(use.bytes(use.held))}" in result.stdout
    assert "gradients returned" in result.stdout
    assert CliRunner().invoke(app, ["show", str(path), "T=1"]).exit_code == 2


def test_a_graph_without_ops_has_no_peak() -> None:
    graph = build(Options()).graph
    assert memory_use(replace(graph, ops=(), outputs=graph.inputs[:1]), {"T": 3}) is None


def test_blocks_that_were_not_captured_are_listed() -> None:
    with torch.device("meta"):
        model = build_model("olmoe")
    (left,) = data_of(report_of_model(model, "triton"))["left"]
    assert len(left[0]) == 2 and left[0][0].startswith("model.layers.0.mlp")
    assert left[1]

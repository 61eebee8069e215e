"""``moec plan MODEL --budget``: the step of a model, planned without running it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from typer.testing import CliRunner

from moec.budget import fused as fused_module
from moec.budget.effort import Efforts
from moec.budget.groups import Group, groups_of
from moec.budget.joined import with_light_repeats
from moec.budget.model_plan import CapturedModel, ModelStep, capture_model, largest_length
from moec.budget.problem import BOUNDARY
from moec.budget.rates import RATES
from moec.budget.sizes import planned_sizes
from moec.budget.steps import Captured
from moec.budget.summary import held_between, repeated, summary_lines
from moec.budget.values import tensors_of
from moec.cli import app
from moec.errors import BudgetError, CompileError
from moec.plan import check
from moec.report.step import write_report

from .models import build, tokens
from .test_budget import planned, step_of


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    torch._dynamo.reset()
    return capture_model(build("olmoe"), 2, 48, "triton")


@pytest.fixture(scope="module")
def step(captured: CapturedModel) -> ModelStep:
    """The step on the length that it was captured with."""
    return captured.at()


@pytest.fixture(scope="module")
def tight(step: ModelStep) -> Any:
    """A plan for a budget that needs repetitions, and the budget."""
    budget = int(0.75 * step.unplanned.peak)
    return step.solved(budget, 2.0), budget


def test_the_problem_is_that_of_the_target(step: ModelStep) -> None:
    assert step.sizes == {"input_ids.shape[0]": 2, "input_ids.shape[1]": 48}
    assert step.parameters == sum(p.nbytes for p in build("olmoe").parameters())
    problem = step.planned.problem
    assert all(size % 512 == 0 for node in problem.nodes for size in node.outputs)
    assert problem.resident >= step.parameters
    boundary = problem.nodes[step.planned.boundary]
    assert boundary.name == BOUNDARY and not boundary.rematable


def names_of(step: Any) -> list[str]:
    """The nodes of a problem; compiled regions have numbers of their own, and lines by target."""
    return [re.sub(r"region_\d+|:\d+", "", node.name) for node in step.planned.problem.nodes]


def groups_at(captured: Captured) -> list[tuple[str, ...]]:
    """The groups of light operations that are compiled for a GPU, by the operations in them."""
    module = fx.GraphModule(nn.Module(), captured.graph)
    read = with_light_repeats(module, captured.forward_count, planned_sizes(captured.graph))
    found = groups_of(read).values()
    return [tuple(node.name for node in (*g.tensors, *g.nodes)) for g in found]


def test_groups_are_those_that_a_call_compiles(
    captured: CapturedModel, step: ModelStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncompiled(group: Group) -> Any:
        return lambda *arguments: group.run(arguments)

    monkeypatch.setattr(fused_module, "compiled", uncompiled)
    torch._dynamo.reset()
    called = planned(build("olmoe").train(), "1GiB", fuse_groups=True)
    ids = tokens(2, 48)["input_ids"]
    called(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert names_of(step_of(called)) == names_of(step)
    count = len(step_of(called).fused)
    assert count == len(groups_at(captured.captured)) > 30
    assert step.basis.startswith(f"{count} groups of light operations compiled; rates of an H100")


def test_groups_are_the_same_on_another_device(captured: CapturedModel) -> None:
    before = groups_at(captured.captured)
    fakes = {id(t): t for node in captured.captured.graph.nodes for t in tensors_of(node)}
    tensors: list[Any] = list(fakes.values())
    devices = [tensor.fake_device for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.fake_device = torch.device("cuda")
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert groups_at(captured.captured) == before
    finally:
        for tensor, device in zip(tensors, devices, strict=True):
            tensor.fake_device = device


def test_a_group_may_need_as_much_again_as_it_reads_and_makes(captured: CapturedModel) -> None:
    sizes = planned_sizes(captured.captured.graph)
    read, efforts = captured._executed(sizes)
    alone = Efforts(read.memories, sizes, RATES["cuda"])
    for step, workspace in efforts.compiled.items():
        assert workspace is not None and 0 <= workspace <= alone.of(step).workspace
        assert efforts.of(step).seconds < alone.of(step).seconds, "one kernel, not several"
    one_by_one = replace(captured, target="aten").at()
    assert one_by_one.basis.startswith("operations one by one")


def test_the_summary_counts_what_the_plan_does(step: ModelStep, tight: Any) -> None:
    plan, budget = tight
    problem = step.planned.problem
    assert check.replay(problem, plan.sequence, budget).peak <= budget
    again = repeated(step, plan.sequence)
    assert sum(i.count for i in again) == len(plan.sequence) - len(problem.nodes) > 0
    extra = sum(i.seconds for i in again)
    assert extra == pytest.approx(plan.time - problem.least_time)
    free = sum(i.bytes for i in held_between(step, problem.order))
    assert 0 < sum(i.bytes for i in held_between(step, plan.sequence)) < free
    text = "\n".join(summary_lines(step, plan, budget))
    assert f"assumed       {step.basis}" in text
    assert plan.is_optimal or "the best found in time, at most" in text
    assert "model.layers.*.mlp: first projection (modeling_olmoe.py:" in text
    assert "traced.py" not in text, "places are the model's, not moec's"


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg"])
def test_the_report_is_one_file(step: ModelStep, tight: Any, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"step{suffix}"
    write_report(path, step, *tight)
    data = path.read_bytes()
    assert 5_000 < len(data) < 2_000_000
    if suffix == ".html":
        text = data.decode()
        assert "<svg" in text and "Runs again" in text and "http-equiv" not in text
        assert "<script" not in text and text.count("<table>") == 2


def test_an_impossible_budget_is_refused_with_the_least_known(step: ModelStep) -> None:
    with pytest.raises(BudgetError) as caught:
        step.solved(step.parameters, 2.0)
    known = caught.value.least_known
    assert step.parameters < known <= step.unplanned.peak
    text = str(caught.value)
    assert text.count("\n") == 6, "the five largest, and what it is for"
    assert "input_ids.shape[1] = 48 and the worst routing" in text
    assert f"{step.planned.problem.resident} bytes" in text
    assert "\n" + 12 * " " in text and "(modeling_olmoe.py:" in text
    assert step.solved(known, 2.0).peak <= known


def test_a_model_whose_inputs_are_not_known_is_refused() -> None:
    with pytest.raises(CompileError, match="no language model"):
        capture_model(nn.Linear(4, 4), 1, 8, "triton")


def test_the_largest_length_grows_with_a_plan(captured: CapturedModel) -> None:
    budget = captured.at(200).unplanned.peak
    free = largest_length(captured, budget, 0.0, unit=8)
    planned = largest_length(captured, budget, 1.0, unit=8)
    assert 200 <= free < planned
    assert captured.at(free + 8).unplanned.peak > budget
    assert captured.at(planned).solved(budget, 30.0, gap=math.inf).peak <= budget
    assert largest_length(captured, captured.parameters, 1.0) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "7", "--batch", "2"], "not 2 sequences"),
        (["--report", "step.pdf"], "ends in .html"),
        (["--reserve", "lots"], "--reserve"),
        (["--fits", "8GiB"], "do not go with --budget"),
        (["--rates"], "requires an argument"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_built(
    arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["plan", "olmoe", "--budget", "80%", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())

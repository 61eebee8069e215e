"""Passes of compiled regions as parts: the same bits, memory as predicted, freedom for plans."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.errors import BudgetError
from moec.fuzz.graphs import random_graph
from moec.inputs import random_inputs
from moec.ir import Value
from moec.manager import PassManager
from moec.memory.tracked import track
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact
from moec.runtime.part_ops import PartOp, part_ops

from .graphs import MODELS, OLMOE
from .memory_replay import built, leave_kernels_out
from .models import build
from .test_budget import SLACK, planned, step_of, unplanned_peak
from .test_memory import lowered, routed

BLOCKS = {"olmoe": OLMOE, **MODELS}


pytestmark = pytest.mark.usefixtures("fresh_dynamo", "without_onednn")


def executed(
    parts: Sequence[PartOp], known: Mapping[Value, torch.Tensor]
) -> dict[Value, torch.Tensor]:
    """What parts make, one after the other, from values that are known."""
    values = dict(known)
    for part in parts:
        function = part.part.function
        found = part.op([values[v] for v in function.reads])
        values.update(zip(function.makes, found, strict=True))
    return values


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare to the bit; rows that no kernel writes are NaN in both."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def check_bits(artifact: Artifact, arguments: Sequence[torch.Tensor]) -> None:
    """Compare the parts of a step with its passes, to the bit."""
    ops, graph = part_ops(artifact), artifact.graph
    count = len(graph.inputs)
    outputs, saved = artifact.forward(*arguments[:count])
    known = dict(zip((*graph.inputs, *graph.cotangents), arguments, strict=True))
    taken, results = artifact.signature(False)
    both = dict(zip(results, (*outputs, *saved), strict=True))
    if ops.forward:
        found = executed(ops.forward, {v: known[v] for v in taken})
        for value, expected in both.items():
            assert_same(found[value], expected)
    if ops.backward and artifact.backward is not None:
        taken, results = artifact.signature(True)
        given = {**known, **both}
        gradients = artifact.backward([given[v] for v in taken])
        found = executed(ops.backward, {v: given[v] for v in taken})
        kept = [g for g in gradients if g is not None]
        for value, gradient in zip(results, kept, strict=True):
            assert_same(found[value], gradient)


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_give_the_bits_of_the_passes(name: str, tmp_path: Path) -> None:
    graph = lowered(BLOCKS[name], "aten", True)
    artifact = built(graph, "aten", tmp_path)
    ops = part_ops(artifact)
    assert len(ops.forward) == 2 and len(ops.backward) >= 2
    for tokens in (0, 1, 40):
        for routing in ("random", "empty", "one") if tokens else ("random",):
            check_bits(artifact, routed(BLOCKS[name], graph, tokens, routing))


@pytest.mark.parametrize("seed", range(6))
def test_parts_of_random_programs(seed: int, tmp_path: Path) -> None:
    graph = PassManager(pipeline("aten", True)).run(random_graph(seed))
    artifact = built(graph, "aten", tmp_path)
    for tokens in (0, 1, 33):
        arguments = random_inputs(graph, {"T": tokens}, seed=seed)
        check_bits(artifact, arguments)
        check_memory(artifact, arguments, tokens, 64)


def check_memory(
    artifact: Artifact,
    arguments: Sequence[torch.Tensor],
    tokens: int,
    granule: int,
    near: float | None = None,
) -> None:
    """Compare what each part allocates with what is predicted: at least as much, and at most
    ``near`` times that.
    """
    graph, ops = artifact.graph, part_ops(artifact)
    values = dict(zip((*graph.inputs, *graph.cotangents), arguments, strict=True))
    outputs, saved = artifact.forward(*arguments[: len(graph.inputs)])
    values.update(zip(artifact.signature(False)[1], (*outputs, *saved), strict=True))
    for part in (*ops.forward, *ops.backward):
        function = part.part.function
        inputs = [values[v].contiguous() for v in function.reads]
        seen = track(functools.partial(part.op, inputs))
        values.update(zip(function.makes, seen.result, strict=True))
        real, predicted = seen.peak(granule), part.peak.at(T=tokens)
        assert real <= predicted, (function.name, tokens)
        assert near is None or predicted <= near * real, (function.name, tokens)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_parts_allocate_what_is_predicted(name: str, tmp_path: Path) -> None:
    options = replace(BLOCKS[name], hidden=128, inner=64, experts=8)
    graph = lowered(options, "aten", True)
    artifact = built(graph, "aten", tmp_path)
    for tokens, near in ((1, None), (383, 1.25), (1024, 1.1)):
        check_memory(artifact, routed(options, graph, tokens, "one"), tokens, 64, near)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_parts_with_kernels_allocate_what_is_predicted(
    name: str, descriptors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what kernels would write: valid indices
    options = replace(BLOCKS[name], hidden=64, inner=32, experts=8, dtype="f16")
    graph = lowered(options, "triton", True, descriptors)
    artifact = built(graph, "triton", tmp_path)
    ops = part_ops(artifact)
    for part in (*ops.forward, *ops.backward):
        leave_kernels_out(part.run)
    for tokens, near in ((0, None), (1, None), (33, 1.1), (509, 1.01)):
        check_memory(artifact, random_inputs(graph, {"T": tokens}), tokens, 512, near)


class Blocks(nn.Module):
    """MoE blocks in a row, which are most of the step."""

    def __init__(self) -> None:
        super().__init__()
        changes = {"num_hidden_layers": 3, "num_experts_per_tok": 4, "intermediate_size": 64}
        self.blocks = nn.ModuleList(layer.mlp for layer in build("olmoe", **changes).model.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def stepped(compiled: Any, x: torch.Tensor) -> None:
    """One step."""
    compiled(x).square().sum().backward()


def gradients(compiled: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of one step."""
    compiled.zero_grad()
    stepped(compiled, x)
    return {n: p.grad for n, p in compiled.named_parameters() if p.grad is not None}


def test_a_tight_plan_runs_first_parts_again() -> None:
    model, x = Blocks(), torch.randn(1, 200, 32)
    free = planned(model, "1TiB")
    expected = gradients(free, x)
    problem, peak = step_of(free).planned.problem, unplanned_peak(step_of(free))
    model.zero_grad()
    with pytest.raises(BudgetError) as caught:
        planned(model, peak // 2)(x)
    for budget in (int(0.95 * peak), caught.value.least_known):
        compiled = planned(model, budget)
        found = gradients(compiled, x)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        plan = step_of(compiled).plan
        counts = Counter(plan.sequence)
        again = [problem.nodes[node].name for node, count in counts.items() if count > 1]
        assert again and all("first projection (modeling_olmoe.py:" in name for name in again)
        compiled.zero_grad()
        seen = track(functools.partial(stepped, compiled, x))
        assert seen.peak(64) + problem.resident <= plan.peak + SLACK


@pytest.mark.parametrize("tokens", [0, 1])
def test_steps_of_no_token_and_of_one(tokens: int) -> None:
    model, x = Blocks(), torch.randn(1, tokens, 32)
    expected = gradients(moec.compile(model), x)
    found = gradients(planned(model, "1TiB"), x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)

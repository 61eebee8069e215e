"""Training under a memory budget: what is executed, and models as people train them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

import moec
from moec.budget.capture import captured_step
from moec.budget.effort import RATES, Efforts
from moec.budget.problem import step_problem
from moec.budget.schedule import scheduled, split
from moec.budget.sizes import planned_sizes
from moec.budget.values import Memories
from moec.plan import budget_of, solve

from .models import build, tokens


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def executed(graph: fx.Graph) -> Counter[str]:
    """How often each kind of operation that makes memory is in a graph."""
    memories = Memories(graph)
    nodes = (n for n in graph.nodes if n.op == "call_function" and any(memories.made_by(n)))
    return Counter(str(n.target) for n in nodes)


def test_the_passes_execute_what_was_planned_and_no_more() -> None:
    captured = captured_step(moec.compile(build("olmoe")), (), tokens(3, 40))
    sizes = planned_sizes(captured.graph)
    efforts = Efforts(captured.memories, sizes, RATES["cpu"])
    planned = step_problem("olmoe", captured, sizes, efforts.of, 64)
    problem = planned.problem
    plan = solve(problem, budget_of(problem, "75%"), time_limit=2)
    expected: Counter[str] = Counter()
    for step in filter(None, (planned.steps[number] for number in plan.sequence)):
        made = (n for n in step.nodes if any(captured.memories.made_by(n)))
        expected.update(str(n.target) for n in made)
    found = scheduled(captured, planned, plan.sequence)
    module = captured.graph.owning_module or nn.Module()
    ahead, behind = split(module, found, captured.forward_count)
    assert plan.extra > 0
    assert executed(ahead.graph) + executed(behind.graph) == expected


class _Comparing(nn.Module):
    """Its code compares a size, which narrows what the tracer takes for possible."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.relu() if x.shape[0] < 100 else y


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_a_size_that_the_model_compares_is_not_a_declared_one() -> None:
    compiled: Any = moec.compile(_Comparing(), memory_budget="1GiB")
    compiled(torch.randn(7, 16)).sum().backward()
    assert "x.shape[0] <= 7" in str(moec.explain(compiled))

"""Training under a memory budget: the bound holds, and the numbers do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.compiled import model_scope_of
from moec.errors import BudgetError, CompileError
from moec.memory.tracked import track
from moec.plan import replay

from .models import build, tokens

# What PyTorch's own code around the step allocates: the loss's gradient, flags
SLACK = 1024


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def planned(model: nn.Module, budget: int | str, **options: Any) -> Any:
    """A model with a budget, planned in little time."""
    return moec.compile(model, memory_budget=budget, options={"plan_seconds": 2, **options})


def step_of(compiled: nn.Module) -> Any:
    """The one step that was planned."""
    scope: Any = model_scope_of(compiled)
    (found,) = scope.steps.values()
    return found.step


def trained(model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), grads


def measured_peak(model: nn.Module, batch: Any) -> int:
    """What a step allocates on the CPU, each allocation rounded up as the plan does."""

    def step() -> Any:
        output = model(**batch)
        output.loss.backward()
        return output

    model.zero_grad()
    return track(step).peak(64)


def unplanned_peak(step: Any) -> int:
    """The peak of the step in the order in which it was captured."""
    problem = step.planned.problem
    return replay(problem, problem.order).peak


@pytest.mark.parametrize(
    ("family", "share"), [("olmoe", 0.7), ("gpt_oss", 0.8), ("deepseek_v3", 0.8)]
)
def test_the_peak_is_within_the_budget_and_gradients_have_the_same_bits(
    family: str, share: float
) -> None:
    model, batch = build(family), tokens(3, 40)
    free = planned(model, "1TiB")
    loss, grads = trained(free, batch)
    assert step_of(free).plan.extra == 0
    budget = int(share * unplanned_peak(step_of(free)))
    tight = planned(model, budget)
    tight_loss, tight_grads = trained(tight, batch)
    step = step_of(tight)
    assert step.plan.extra > 0 and step.plan.peak <= budget
    assert torch.equal(loss, tight_loss)
    assert grads.keys() == tight_grads.keys()
    assert all(torch.equal(grads[n], tight_grads[n]) for n in grads)
    resident = step.planned.problem.resident
    assert measured_peak(tight, batch) + resident <= step.plan.peak + SLACK
    assert measured_peak(free, batch) > measured_peak(tight, batch)


def test_the_step_equals_the_model_s_own() -> None:
    model, batch = build("mixtral"), tokens(2, 33)
    loss, grads = trained(model, batch)
    found_loss, found = trained(planned(model, "1TiB"), batch)
    torch.testing.assert_close(found_loss, loss)
    for name, grad in grads.items():
        scale = grad.abs().max().clamp(min=1e-6)
        assert (found[name] - grad).abs().max() < 1e-4 * scale, name


class _Layers(nn.Module):
    """Layers without an MoE block: a budget is for them, too. Dropout cannot be repeated."""

    def __init__(self) -> None:
        super().__init__()
        layer = [nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 16)]
        self.layers = nn.Sequential(*[m for _ in range(4) for m in layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_random_numbers_are_drawn_once() -> None:
    model, x = _Layers(), torch.randn(64, 16)

    def gradients(compiled: Any) -> list[torch.Tensor | None]:
        model.zero_grad()
        torch.manual_seed(0)
        compiled(x).square().mean().backward()
        return [p.grad for p in model.parameters()]

    free = planned(model, "1GiB")
    expected = gradients(free)
    tight = planned(model, int(0.8 * unplanned_peak(step_of(free))))
    found = gradients(tight)
    assert step_of(tight).plan.extra > 0
    for grad, reference in zip(found, expected, strict=True):
        assert grad is not None and reference is not None and torch.equal(grad, reference)
    names = [n.name for n in step_of(tight).planned.problem.nodes if not n.rematable]
    assert len(names) >= 5, "four dropouts and the boundary"


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_plans_serve_classes_of_sizes() -> None:
    model = _Layers().eval()
    compiled = planned(model, "1GiB")
    for rows in (33, 40, 37, 41):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), model(x))
    scope: Any = model_scope_of(compiled)
    assert len(scope.steps) == 2, "33 to 40, and 41 to 48"
    assert "x.shape[0] <= 40" in str(moec.explain(compiled))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert scope.served == 4, "without gradients nothing is planned"


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_gradients_that_are_added_to_count() -> None:
    model = _Layers()
    compiled = planned(model, "1MiB")
    x = torch.randn(8, 16)
    for _ in range(2):
        compiled(x).sum().backward()
    scope: Any = model_scope_of(compiled)
    first, second = (c.step for c in scope.steps.values())
    grads = sum(p.nbytes for p in model.parameters())
    assert second.reserve - first.reserve >= grads


def test_an_impossible_budget_names_the_least_and_what_is_large() -> None:
    compiled = planned(build("olmoe"), "300KiB")
    with pytest.raises(BudgetError, match="worst routing") as caught:
        compiled(**tokens(3, 40))
    error = caught.value
    assert error.least_known > 300 * 1024
    assert str(error).count("\n") >= 5 and "model.layers.0.mlp" in str(error)
    enough = planned(build("olmoe"), error.least_known)
    enough(**tokens(3, 40)).loss.backward()


def test_what_the_caller_holds_is_not_counted_as_released() -> None:
    compiled = planned(build("olmoe"), "1GiB")
    compiled(**tokens(3, 40)).loss.backward()
    nodes = step_of(compiled).planned.problem.nodes
    (logits,) = (n for n in nodes if n.name == "lm_head: mm")
    assert logits.keep == (True,) and not logits.rematable


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if y.sum().item() > 0 else -y


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_a_step_that_is_no_single_graph_is_refused() -> None:
    compiled = planned(_Branching(), "1GiB")
    with pytest.raises(CompileError, match=r"(?s)no single graph.*memory_budget"):
        compiled(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_budget": "much"}, "memory_budget.*no size"),
        ({"memory_budget": True}, "memory_budget is bytes"),
        ({"memory_budget": -1}, "memory_budget is bytes"),
        ({"memory_budget": "1GiB", "options": {"reserve": "x"}}, "reserve"),
        ({"memory_budget": "1GiB", "options": {"plan_seconds": 0}}, "plan_seconds"),
        ({"options": {"reserve": "1GiB"}}, "goes with memory_budget"),
    ],
)
def test_what_is_no_budget_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(build("olmoe"), **settings)


def test_a_lone_block_has_no_budget() -> None:
    with pytest.raises(CompileError, match="one MoE block"):
        planned(build("olmoe").model.layers[0].mlp, "1GiB")

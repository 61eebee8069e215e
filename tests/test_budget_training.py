"""Training under a memory budget: what is executed, and models as people train them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.distributed.fsdp import fully_shard

import moec
from moec.budget.capture import captured_step
from moec.budget.effort import Efforts
from moec.budget.problem import step_problem
from moec.budget.rates import RATES
from moec.budget.schedule import scheduled, split
from moec.budget.sizes import planned_sizes
from moec.budget.values import Memories
from moec.plan import budget_of, solve

from .models import assert_equal_gradients, build, tokens
from .test_budget import planned, step_of, trained, unplanned_peak

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def tight_budget(free: nn.Module) -> int:
    """A budget that needs recomputation, from a step that was planned without a bound."""
    step = step_of(free)
    resident: int = step.planned.problem.resident
    return resident + int(0.85 * (unplanned_peak(step) - resident))


def losses(model: nn.Module, steps: int) -> list[float]:
    """Those of a training with AdamW, in which each step adds the gradients of two batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(steps):
        for half in range(2):
            loss = model(**tokens(3, 40 - 2 * step - half)).loss
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_training_with_accumulated_gradients_has_the_same_losses() -> None:
    model = build("olmoe")
    # gradients that are added to, and both moments of AdamW
    reserve = 3 * sum(p.nbytes for p in model.parameters())
    budget: int | str = "1TiB"
    found = []
    for _ in range(2):
        compiled = planned(build("olmoe"), budget, reserve=reserve)
        found.append(losses(compiled, 3))
        budget = tight_budget(compiled)
    assert step_of(compiled).plan.extra > 0
    assert found[0] == found[1] and found[0][-1] < found[0][0]


def _whole() -> Any:
    return build("olmoe", num_hidden_layers=1)


def _checkpointed() -> Any:
    model = _whole().train()
    model.gradient_checkpointing_enable()
    return model


def _frozen() -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(_whole(), settings).train()


def _autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def held_between(step: Any) -> set[str]:
    """The names of what the backward pass of a step takes from the forward pass."""
    problem, order = step.planned.problem, step.planned.problem.order
    crossing = order.index(step.planned.boundary)
    ahead = set(order[:crossing])
    read = {v for node in order[crossing + 1 :] for v in problem.reads[node]}
    return {problem.value_name(v) for v in read if problem.owners[v] in ahead}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize(
    ("make", "around"),
    [
        (_checkpointed, contextlib.nullcontext),
        (_frozen, contextlib.nullcontext),
        (_whole, _autocast),
    ],
    ids=["checkpointed", "frozen", "autocast"],
)
def test_ways_to_train(make: Callable[[], Any], around: Callable[[], Any]) -> None:
    model, batch = make(), tokens(3, 40)

    def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with around():
            return trained(model, batch)

    loss, grads = run(model)
    free = planned(model, "1TiB")
    free_loss, free_grads = run(free)
    tight = planned(model, tight_budget(free))
    tight_loss, tight_grads = run(tight)
    assert step_of(tight).plan.extra > 0
    assert torch.equal(free_loss, tight_loss)
    assert all(torch.equal(free_grads[n], tight_grads[n]) for n in free_grads)
    tolerance = 1e-5 if around is contextlib.nullcontext else 0.05
    torch.testing.assert_close(free_loss, loss, rtol=tolerance, atol=0.0)
    assert_equal_gradients(free_grads, grads, tolerance)
    names = held_between(step_of(free))
    assert not any("__dict__" in name for name in names), "places are modules' paths"
    rows = [name for name in names if "post_attention_layernorm: mul" in name]
    assert bool(rows) == (make is not _frozen), "frozen experts need no input for their gradient"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(  # type: ignore[attr-defined]  # it is in its documentation
        str(tmp_path / "store"), 1
    )
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_data_parallel_training_in_one_graph() -> None:
    # parameters of several buckets, at which DDP would have the tracer cut the graph
    compiled = planned(build("olmoe", num_hidden_layers=1, vocab_size=20000), "1GiB")
    batch = tokens(3, 40)
    wrapped = nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)
    found_loss, found = trained(wrapped, batch)
    loss, grads = trained(compiled, batch)
    assert len(step_of(compiled).planned.problem.nodes) > 50, "and so one plan has all"
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(found[f"module.{name}"], grads[name]) for name in grads)


def stepped(model: nn.Module) -> list[float]:
    """The losses of a few steps under autocast, the last after three updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(4):
        with _autocast():
            loss = model(**tokens(3, 40)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.usefixtures("one_process")
def test_a_model_that_is_sharded_as_one_unit_has_the_same_losses_under_autocast() -> None:
    free = planned(_whole(), "1TiB")
    losses = stepped(free)
    sharded: Any = fully_shard(planned(_whole(), tight_budget(free)))
    assert stepped(sharded) == losses and len(set(losses)) == 4
    assert step_of(sharded).plan.extra > 0
    assert losses == pytest.approx(stepped(_whole()), rel=0.02)


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_losses_may_be_added_and_gradients_asked_for_twice() -> None:
    model, x, z = _Comparing(), torch.randn(7, 16), torch.randn(7, 16)
    compiled = planned(model, "1GiB")

    def gradient(loss: torch.Tensor, **how: Any) -> torch.Tensor:
        loss.backward(**how)  # type: ignore[no-untyped-call]
        found = model.linear.weight.grad
        model.zero_grad()
        assert found is not None
        return found

    with torch._functorch.config.patch(donated_buffer=False):  # as torch.compile asks for
        loss = compiled(x).square().sum()
        once = gradient(loss, retain_graph=True)
        assert torch.equal(gradient(loss), once)
    both = gradient(compiled(x).square().sum() + compiled(z).square().sum())
    torch.testing.assert_close(both - once, gradient(compiled(z).square().sum()))

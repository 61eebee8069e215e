"""Frozen experts: what the allocator says is held between the passes, against the formulas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model

import moec
from moec.cost import saved_values
from moec.ir.dims import apply
from moec.ir.graph import Graph, Value
from moec.memory.tracked import track

from .lora import EXPERTS, randomize_adapters, settings
from .models import artifacts, build, tokens
from .test_budget import planned, step_of
from .test_budget_training import held_between

GRANULE = 64
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": r".*self_attn\.q(_b)?_proj", "target_parameters": None},
    "gate_up": {"target_parameters": [EXPERTS[0]]},
    "down": {"target_parameters": [EXPERTS[1]]},
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def adapted(family: str, adapters: str, **changes: Any) -> Any:
    """A model of which only adapters are trained."""
    model = get_peft_model(build(family, **changes), settings(**ADAPTERS[adapters]))
    randomize_adapters(model)
    return model


def rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


def total(tensors: Sequence[torch.Tensor]) -> int:
    """What tensors hold, each memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(map(rounded, storages.values()))


def held_by(block: Any, leaf: torch.Tensor) -> int:
    """The bytes that live between the passes of a block, without its result. Its input is made
    meanwhile, so it is among them exactly if the block keeps it.
    """

    def forward() -> Any:
        return block(leaf.clone())

    seen = track(forward)
    outputs = seen.result if isinstance(seen.result, tuple) else (seen.result,)
    return seen.held(GRANULE) - total(outputs)


def formula(graph: Graph, tokens: int) -> int:
    """What a graph keeps by moec.cost beside its outputs, each value rounded up."""
    kept = [v for v in saved_values(graph) if v not in graph.outputs]
    return sum(rounded(int(apply(v.type.bytes, {"T": tokens}))) for v in kept)


def leading_to(graph: Graph, wanted: Sequence[Value]) -> set[Value]:
    """What some values are computed from."""
    needed = set(wanted)
    for op in reversed(graph.ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
    return needed


def first_block(model: Any) -> Any:
    return model.get_base_model().model.layers[0].mlp


def served(model: Any, block: Any, leaf: torch.Tensor) -> Any:
    """The artifact that serves a training step of a block, which is run."""
    out = block(leaf)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    artifact = next(a for a in artifacts(model) if a.mode == "training")
    is_few = leaf.shape[:-1].numel() <= artifact.few_tokens
    return artifact.few.get((leaf,)) if is_few else artifact


@pytest.mark.parametrize(
    ("family", "adapters", "keeps_input"),
    [
        ("olmoe", "attention", False),
        ("olmoe", "gate_up", True),
        ("olmoe", "down", False),
        ("gpt_oss", "attention", False),
        ("deepseek_v3", "attention", False),
    ],
)
def test_nothing_is_held_for_frozen_weights(family: str, adapters: str, keeps_input: bool) -> None:
    model = moec.compile(adapted(family, adapters))
    block = first_block(model)
    if family == "deepseek_v3":
        block = model.get_base_model().model.layers[1].mlp
    for shape in ((0, 4), (1, 1), (3, 7), (1, 33), (3, 40)):
        leaf = torch.randn(*shape, 32, requires_grad=True)
        graph = served(model, block, leaf).graph
        expected = formula(graph, shape[0] * shape[1]) + keeps_input * rounded(leaf.nbytes)
        assert held_by(block, leaf) == expected
    gradients = [g for g in graph.gradients if g is not None]
    assert set(saved_values(graph)) <= leading_to(graph, gradients)
    trained = {v.hint for v, g in zip(graph.inputs, graph.gradients, strict=True) if g is not None}
    assert all("lora" in hint or hint == "hidden_states" for hint in trained)


def crossing_bytes(step: Any) -> int:
    """What a planned step holds between the passes with the forward's outputs, by its problem."""
    problem, order = step.planned.problem, step.plan.sequence
    crossing = order.index(step.planned.boundary)
    ahead = set(order[:crossing])
    taken: set[int] = set(problem.reads[step.planned.boundary])
    for node in order[crossing + 1 :]:
        taken |= {v for v in problem.reads[node] if problem.owners[v] in ahead}
        ahead.discard(node)
    return sum(problem.sizes[v] for v in taken)


def test_a_planned_model_holds_what_its_plan_says() -> None:
    batch, held, names = tokens(3, 40), [], []
    for trains_all in (True, False):
        model = adapted("olmoe", "attention", num_hidden_layers=1).train()
        for parameter in model.parameters():
            parameter.requires_grad_(trains_all or parameter.requires_grad)
        compiled = planned(model, "1TiB")
        compiled(**batch).loss.backward()
        compiled.zero_grad()
        seen = track(functools.partial(compiled, **batch))
        held.append(seen.held(GRANULE))
        names.append(held_between(step_of(compiled)))
        expected = crossing_bytes(step_of(compiled))
        assert abs(held[-1] - expected) <= 256, "a loss, a count"
    assert held[1] < held[0]
    rows = [any("post_attention_layernorm: mul" in name for name in found) for found in names]
    assert rows == [True, False], "the experts' input is for their gradients alone"

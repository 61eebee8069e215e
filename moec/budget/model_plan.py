"""Planning the training step of a model that is not run: on this machine, for a GPU elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import moec
from moec.api import regions
from moec.budget.capture import captured_step
from moec.budget.effort import RATES, Efforts
from moec.budget.labels import size_names
from moec.budget.measure import workspace_on
from moec.budget.problem import StepProblem, step_problem
from moec.budget.sizes import planned_sizes
from moec.errors import CompileError
from moec.memory.buffers import GRANULES
from moec.memory.model import bytes_of_parameters
from moec.plan import Plan, Progress, Replay, replay, solve


@dataclass(frozen=True)
class ModelStep:
    """The step of a model as a planning problem; ``sizes`` are those of its inputs, ``parameters``
    bytes; ``unplanned`` is the step in the order in which it was captured.
    """

    name: str
    planned: StepProblem
    sizes: Mapping[str, int]
    parameters: int
    unplanned: Replay

    def solved(
        self,
        budget: int,
        seconds: float,
        progress: Callable[[Progress], None] | None = None,
    ) -> Plan:
        """The best plan within a budget in bytes; :class:`BudgetError` if none is found."""
        return solve(self.planned.problem, budget, time_limit=seconds, progress=progress)


def step_of_model(
    model: nn.Module, batch: int, length: int, target: str, reserve: int = 0
) -> ModelStep:
    """The step of a causal language model of Hugging Face, on ``batch`` sequences of ``length``
    tokens, with its MoE blocks compiled for ``target``.

    Weights that share memory count in full. ``reserve``: bytes that are held beside the step's.

    Raises:
        CompileError: it takes no tokens and labels, or its step is no single graph.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise CompileError(
            f"{type(model).__name__} is no language model of transformers, so its inputs are not"
            " known; compile it with memory_budget= and look at moec.explain after a step"
        )
    config.use_cache = False
    compiled = moec.compile(model.train())
    for region in regions(compiled):
        region.session.planned_target = target
    ids = torch.zeros(batch, length, dtype=torch.int64)
    captured = captured_step(compiled, (), {"input_ids": ids, "labels": ids})
    sizes = planned_sizes(captured.graph)
    kind = "cuda" if target == "triton" else "cpu"
    efforts = Efforts(captured.memories, sizes, RATES[kind], workspace_on(torch.device("cpu")))
    parameters = bytes_of_parameters(model)
    hidden = parameters - sum(_storages(model).values())
    found = step_problem(
        type(model).__name__, captured, sizes, efforts.of, GRANULES[target], reserve + hidden
    )
    names = size_names(captured.graph)
    shown = {names[symbol]: size for symbol, size in sizes.items()}
    order = replay(found.problem, found.problem.order)
    return ModelStep(type(model).__name__, found, shown, parameters, order)


def _storages(model: nn.Module) -> dict[Any, int]:
    """The memory that parameters really take, by its address."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return {s.data_ptr(): min(s.nbytes(), bytes_of_parameters(model)) for s in storages}


__all__ = ["ModelStep", "step_of_model"]

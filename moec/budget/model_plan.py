"""Planning the training step of a model that is not run: on this machine, for a GPU elsewhere."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

import moec
from moec.api import regions
from moec.budget.capture import captured_step
from moec.budget.effort import Efforts
from moec.budget.groups import groups_of
from moec.budget.joined import cut_for_kernels, joined
from moec.budget.labels import size_names
from moec.budget.measure import workspace_on
from moec.budget.problem import Sizes, StepProblem, step_problem
from moec.budget.rates_file import Calibration, calibration_for
from moec.budget.sizes import planned_sizes
from moec.budget.steps import Captured, read_joint
from moec.budget.text import for_sizes
from moec.errors import BudgetError, CompileError
from moec.memory.buffers import GRANULES
from moec.memory.model import bytes_of_parameters
from moec.plan import Plan, Progress, Replay, replay, solve

# The axis of the tokens that sequences are long along
LENGTH = "input_ids.shape[1]"


@dataclass(frozen=True)
class ModelStep:
    """The step of a model as a planning problem; ``sizes`` are those of its inputs, ``parameters``
    bytes; ``unplanned`` is the step in the order in which it was captured; ``basis`` says what is
    assumed of how it is executed; ``known`` are plans of least peak that were found.
    """

    name: str
    planned: StepProblem
    sizes: Mapping[str, int]
    parameters: int
    unplanned: Replay
    basis: str
    known: list[Sequence[int]] = field(default_factory=list, compare=False, repr=False)

    def solved(
        self,
        budget: int,
        seconds: float,
        progress: Callable[[Progress], None] | None = None,
        gap: float = 0.0,
    ) -> Plan:
        """The best plan within a budget in bytes that is found in so many seconds, or the first
        that is at most ``gap`` percent of the step's time above the bound.

        Raises:
            BudgetError: none was found.
        """
        problem = self.planned.problem
        try:
            return solve(
                problem,
                budget,
                time_limit=seconds,
                gap=gap,
                progress=progress,
                starts=self.known,
            )
        except BudgetError as error:
            self.known.append(error.sequence)
            raise for_sizes(error, self.sizes, "=", problem.resident) from error


@dataclass(frozen=True)
class CapturedModel:
    """A model's step, captured for all lengths of its sequences; ``parameters`` in bytes, of which
    ``shared`` take no memory here; ``reserve``: bytes that are held beside the step's; ``device``:
    what the step is planned for does in a second.
    """

    name: str
    captured: Captured
    target: str
    parameters: int
    shared: int
    reserve: int
    device: Calibration

    def at(self, length: int | None = None) -> ModelStep:
        """The step on sequences of a length; without one, of the length it was captured with."""
        names = size_names(self.captured.graph)
        sizes = planned_sizes(self.captured.graph)
        if length is not None:
            sizes.update({symbol: length for symbol, name in names.items() if name == LENGTH})
        captured, efforts = self._executed(sizes)
        found = self._problem(captured, sizes, efforts)
        order = replay(found.problem, found.problem.order)
        shown = {names[symbol]: size for symbol, size in sizes.items() if symbol in names}
        basis = _basis(len(efforts.compiled), self.device)
        return ModelStep(self.name, found, shown, self.parameters, order, basis)

    def _executed(self, sizes: Sizes) -> tuple[Captured, Efforts]:
        """The steps as they are executed for the target, and their efforts: on a GPU groups of
        light operations are compiled, which groups there are follows from the graph alone.
        """
        rates, workspace = self.device.rates, workspace_on(torch.device("cpu"))
        if self.target != "triton":
            return self.captured, Efforts(self.captured.memories, sizes, rates, workspace)
        passes, count = self._passes, self.captured.forward_count
        if passes is None:
            found = read_joint(self.captured.graph, count, sizes)
        else:
            found = joined(*passes, count, sizes)
        alone = Efforts(found.memories, sizes, rates, workspace)
        compiled = {step: alone.assumed(step) for step in groups_of(found)}
        return found, Efforts(found.memories, sizes, rates, workspace, compiled)

    @functools.cached_property
    def _passes(self) -> tuple[fx.Graph, fx.Graph] | None:
        graph = self.captured.graph
        return cut_for_kernels(
            graph.owning_module or nn.Module(), graph, self.captured.forward_count
        )

    def _problem(self, captured: Captured, sizes: Sizes, efforts: Efforts) -> StepProblem:
        reserve, granule = self.reserve + self.shared, GRANULES[self.target]
        return step_problem(self.name, captured, sizes, efforts.of, granule, reserve)


def _basis(groups: int, device: Calibration) -> str:
    """What is assumed of the execution, in words."""
    how = f"{groups} groups of light operations compiled" if groups else "operations one by one"
    return f"{how}; rates of {device.device}{f' ({device.date})' if device.date else ''}"


def capture_model(
    model: nn.Module,
    batch: int,
    length: int,
    target: str,
    reserve: int = 0,
    device: Calibration | None = None,
    in_parts: bool = True,
) -> CapturedModel:
    """The step of a causal language model of Hugging Face, on ``batch`` sequences of ``length``
    tokens, with its MoE blocks compiled for ``target``; ``in_parts``: what each pass of a block is
    in it, several operations or one.

    Weights that share memory count in full. ``reserve``: bytes that are held beside the step's;
    ``device``: whose rates times are modelled from, moec's guesses if absent.

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
    inputs = {"input_ids": ids, "labels": ids}
    captured = captured_step(compiled, (), inputs, in_parts, is_fused=target == "triton")
    parameters = bytes_of_parameters(model)
    shared = parameters - sum(_storages(model).values())
    held = parameters, shared, reserve
    known = device or calibration_for("cuda" if target == "triton" else "cpu", None, warnings.warn)
    return CapturedModel(type(model).__name__, captured, target, *held, known)


def _storages(model: nn.Module) -> dict[Any, int]:
    """The memory that parameters really take, by its address."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return {s.data_ptr(): s.nbytes() for s in storages}


def largest_length(
    model: CapturedModel, budget: int, seconds: float, unit: int = 128, most: int = 1 << 22
) -> int:
    """The greatest multiple of ``unit`` for which a plan within ``budget`` bytes is found in
    ``seconds`` (0: without planning); 0 if there is none. Memory grows with the length, so it is
    found by bisection.
    """
    low, high = 0, 1
    while high * unit < most and _fits(model, high * unit, budget, seconds):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(model, middle * unit, budget, seconds):
            low = middle
        else:
            high = middle
    return low * unit


def _fits(model: CapturedModel, length: int, budget: int, seconds: float) -> bool:
    step = model.at(length)
    if step.unplanned.peak <= budget or seconds <= 0:
        return step.unplanned.peak <= budget
    problem = step.planned.problem
    if max(map(problem.working_set, range(len(problem.nodes)))) > budget:
        return False
    try:
        return step.solved(budget, seconds, gap=math.inf).peak <= budget
    except BudgetError:
        return False


__all__ = ["CapturedModel", "ModelStep", "capture_model", "largest_length"]

"""The Dynamo backend of a training step under a memory budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from moec.budget.boxed import boxed_function
from moec.budget.effort import Efforts
from moec.budget.fused import Fused, fused_steps
from moec.budget.joined import with_light_repeats
from moec.budget.labels import size_names
from moec.budget.light_loss import with_light_losses
from moec.budget.loss_alone import DrawsRandomNumbers, with_loss_alone, with_other_gradients
from moec.budget.measure import workspace_on
from moec.budget.parts import cut_regions
from moec.budget.problem import StepProblem, step_problem
from moec.budget.rates_file import calibration_on
from moec.budget.schedule import scheduled, split
from moec.budget.sizes import planned_sizes
from moec.budget.steps import Step, draws_random_numbers, read_joint
from moec.budget.text import plan_lines
from moec.causal_masks import with_causal_attention
from moec.errors import BudgetError, MoecError
from moec.memory.buffers import GRANULES
from moec.plan import Plan, replay, solve

# In points of the step's time: what is left to find then is less than what times are known to.
SMALL_GAP = 0.02


class PlannedStep:
    """A backend of ``torch.compile`` that plans the step that it is given.

    ``budget``: bytes of the step with all that the caller holds; ``reserve``: bytes that others
    hold; ``is_declared``: the caller declared ranges of sizes; ``fuse``: compile groups of light
    operations, ``None`` where the device is a GPU; ``rates``: a file of what the device does in a
    second; ``warn`` is told what cannot be compiled or used; ``otherwise``: where a model returns a
    scalar, gradients are planned to come from there, and this is called when one does not; ``None``
    plans for all. After a capture ``planned`` and ``plan`` say what was found; ``error`` is what
    went wrong, which Dynamo would hide in its own.
    """

    def __init__(
        self,
        name: str,
        budget: int,
        reserve: int = 0,
        time_limit: float = 20.0,
        is_declared: bool = False,
        fuse: bool | None = None,
        rates: str | None = None,
        warn: Callable[[str], None] = warnings.warn,
        otherwise: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.budget, self.reserve = name, budget, reserve
        self.time_limit, self.is_declared = time_limit, is_declared
        self.fuse, self.rates, self.warn, self.otherwise = fuse, rates, warn, otherwise
        self.is_repeatable = False  # a step that draws random numbers is none
        self.fused: Mapping[Step, Fused] = {}
        self.planned: StepProblem | None = None
        self.plan: Plan | None = None
        self.sizes: Mapping[str, int] = {}
        self.error: MoecError | None = None

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        module = with_causal_attention(module)
        if self.otherwise is None:
            return self._compiled(module, inputs)
        made, cut = with_loss_alone(module)
        self.is_repeatable = bool(cut)
        try:
            run = self._compiled(made, inputs)
        except DrawsRandomNumbers:
            self.is_repeatable = False
            return self._compiled(module, inputs)
        return with_other_gradients(run, module, cut, self.otherwise) if cut else run

    def _compiled(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=_as_written,
            bw_compiler=_as_written,
            inference_compiler=_as_written,
            partition_fn=self._partition,
        )(module, inputs)
        return compiled

    def lines(self) -> list[str]:
        """What was planned, in words."""
        if self.planned is None or self.plan is None:
            return []
        problem = self.planned.problem
        return list(plan_lines(self.plan, self.sizes, replay(problem, problem.order).peak))

    def _partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            return self._planned_passes(joint, num_fwd_outputs)
        except MoecError as error:
            self.error = error
            raise

    def _planned_passes(
        self, joint: fx.GraphModule, forward_outputs: int
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        cut_regions(joint.graph)
        sizes = planned_sizes(joint.graph, self.is_declared)
        device = _device_of(joint.graph.find_nodes(op="placeholder"))
        kind = "cuda" if device.type == "cuda" else "cpu"
        is_fused = kind == "cuda" if self.fuse is None else self.fuse
        if is_fused:
            with_light_losses(joint.graph)
            captured = with_light_repeats(joint, forward_outputs, sizes)
        else:
            captured = read_joint(joint.graph, forward_outputs)
        if self.is_repeatable and any(map(draws_random_numbers, captured.graph.nodes)):
            raise DrawsRandomNumbers
        names = size_names(joint.graph)
        # an input may be a view of a tensor with sizes of its own
        self.sizes = {
            names[s].replace("._base", ""): size for s, size in sizes.items() if s in names
        }
        if is_fused:
            self.fused = fused_steps(captured, sizes, device, self.warn)
        workspace = workspace_on(device)
        rates = calibration_on(device, self.rates, self.warn).rates
        compiled = {step: fused.workspace for step, fused in self.fused.items()}
        efforts = Efforts(captured.memories, sizes, rates, workspace, compiled)
        granule = GRANULES["triton" if kind == "cuda" else "aten"]
        self.planned = step_problem(self.name, captured, sizes, efforts.of, granule, self.reserve)
        self.plan = self._solved(self.planned)
        found = scheduled(captured, self.planned, self.plan.sequence, self.fused)
        return split(joint, found, forward_outputs)

    def _solved(self, planned: StepProblem) -> Plan:
        try:
            return solve(planned.problem, self.budget, time_limit=self.time_limit, gap=SMALL_GAP)
        except BudgetError as error:
            sizes = ", ".join(f"{name} <= {size}" for name, size in self.sizes.items())
            text = f"{error}\nThis is for {sizes or 'these sizes'} and the worst routing."
            known = error.least_known, error.least_possible, error.sequence
            raise BudgetError(text, *known) from error


def _device_of(inputs: Sequence[fx.Node]) -> torch.device:
    values = (n.meta.get("val") for n in inputs)
    return next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))


def _as_written(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    return boxed_function(module)


__all__ = ["PlannedStep"]

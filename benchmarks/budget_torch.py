"""Recomputation by torch's activation_memory_budget and by moec, at equal peaks.

    python -m benchmarks.budget_torch --layers 4 --tokens 4096 --json results.json

Captures the joint graph of a model's training step once (bfloat16, one sequence) and lets torch's
partitioner cut it into a forward and a backward graph for each fraction and solver, then plans it
with moec within each peak that torch reached. Nothing is run, so no GPU is needed. The loss is in
both as moec writes it, without a tensor of the logits' size in float32.

Both are measured by the same replay of the two graphs that would run: operations are grouped into
kernels as moec groups them, so light operations that torch recomputes inside a kernel cost it what
the kernel reads; every result is freed after its last use; sizes, workspaces and times are those of
moec's model of an H100. The peak includes parameters, gradients, logits and their gradient. "extra"
is the time beyond the faster of both without a budget. The solver ilp needs scipy; it is skipped
without.

torch gets the graph as it is captured, each pass of an MoE block a single operation ("whole"), and
also as moec plans it, where a pass is several ("parts"). torch counts only built-in operations in
its budget unless ``is_non_builtin_to_include`` is set: then it gets from moec the flops of a block,
by ``register_flop_formula`` ("counted"); without ("free"), it takes their recomputation for free.
All are measured. All its other settings are the defaults; it has its own estimate of times (flops).
"""

import argparse
import copy
import importlib.util
import itertools
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import register_flop_formula

from moec.budget.effort import Efforts
from moec.budget.groups import groups_of
from moec.budget.joined import joined, with_light_repeats
from moec.budget.measure import workspace_on
from moec.budget.model_plan import CapturedModel, ModelStep, capture_model
from moec.budget.parts import cut_regions
from moec.budget.problem import StepProblem, step_problem
from moec.budget.rates import RATES
from moec.budget.region_effort import region_effort
from moec.budget.schedule import scheduled, split
from moec.budget.sizes import planned_sizes
from moec.budget.steps import Captured
from moec.budget.values import size_at
from moec.capture.model_spec import load_layers
from moec.errors import BudgetError
from moec.plan import replay
from moec.runtime.library import pass_of
from moec.runtime.part_ops import part_of

from .report import describe, environment, markdown_table, version_of, write_json

SHAPES = {"olmoe": {"intermediate_size": 1024}}  # of the model as published
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
HEADS = ("torch: blocks, solver, fraction", "peak GiB", "torch ms", "moec ms", "ratio", "gap ms")


@dataclass(frozen=True)
class Measured:
    """Two graphs in sequence: bytes at the peak, parameters and inputs among them, and seconds."""

    peak: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """torch's result for some settings, and moec's plan within its peak; extra times in seconds."""

    settings: str
    peak: int
    torch_extra: float
    moec_peak: int
    moec_extra: float
    moec_gap: float

    @property
    def ratio(self) -> float:
        """moec's extra time relative to torch's."""
        return self.moec_extra / self.torch_extra if self.torch_extra > 0 else math.nan

    def cells(self) -> Sequence[str]:
        """The row of the table."""
        times = (f"{1e3 * t:.2f}" for t in (self.torch_extra, self.moec_extra))
        ratio = "-" if math.isnan(self.ratio) else f"{self.ratio:.2f}"
        return (self.settings, gib(self.peak), *times, ratio, f"{1e3 * self.moec_gap:.2f}")


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.3f}"


def captured_model(name: str, layers: int, tokens: int) -> CapturedModel:
    """A model of that many layers on one sequence, its blocks whole; it is never run."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, num_hidden_layers=layers, **SHAPES.get(name, {}))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = load_layers(folder, torch.bfloat16).model
    return capture_model(model, 1, tokens, "triton", in_parts=False)


def in_parts(captured: Captured) -> fx.GraphModule:
    """The same step with the passes of blocks as their parts."""
    graph = copy.deepcopy(captured.graph)
    cut_regions(graph)
    module = captured.graph.owning_module
    return fx.GraphModule(torch.nn.Module() if module is None else module, graph)


class Comparison:
    """One captured step, what it is measured with, and moec's plans by their budgets."""

    def __init__(self, model: CapturedModel, seconds: float) -> None:
        self.module, self.seconds = in_parts(model.captured), seconds
        self.graphs = {"whole": model.captured.graph, "parts": self.module.graph}
        self.sizes = planned_sizes(self.module.graph)
        self.captured = with_light_repeats(self.module, model.captured.forward_count, self.sizes)
        self.reserve = model.shared
        planned = self._problem(self.captured)
        order = replay(planned.problem, planned.problem.order)
        self.step: ModelStep = replace(model.at(), planned=planned, unplanned=order)
        self.resident = planned.problem.resident
        self.plans: dict[int, tuple[Measured, float]] = {}

    def measured(self, ahead: fx.GraphModule, behind: fx.GraphModule) -> Measured:
        """Replay two graphs."""
        joint = joined(ahead.graph, behind.graph, self.captured.forward_count, self.sizes)
        problem = self._problem(joint).problem
        found = replay(problem, problem.order)
        return Measured(found.peak, found.time)

    def _problem(self, joint: Captured) -> StepProblem:
        """The problem of a joint graph whose groups of light operations are one kernel each."""
        about = joint.memories, self.sizes, RATES["cuda"], workspace_on(torch.device("cpu"))
        alone = Efforts(*about)
        efforts = Efforts(*about, {step: alone.assumed(step) for step in groups_of(joint)})
        return step_problem("", joint, self.sizes, efforts.of, 512, self.reserve)

    def by_torch(self, fraction: float, solver: str, counted: bool, blocks: str) -> Measured:
        """torch's cut of the joint graph."""
        joint = fx.GraphModule(self.module, copy.deepcopy(self.graphs[blocks]))
        settings: dict[str, Any] = {
            "activation_memory_budget": fraction,
            "activation_memory_budget_solver": solver,
            "is_non_builtin_to_include": counted,
        }
        with functorch_config.patch(settings):
            ahead, behind = min_cut_rematerialization_partition(
                joint, None, num_fwd_outputs=self.captured.forward_count
            )
        return self.measured(ahead, behind)

    def by_moec(self, budget: int) -> tuple[Measured, float]:
        """moec's plan within a budget, and by how many seconds it may be above the optimum."""
        if budget not in self.plans:
            self.plans[budget] = self._planned(budget)
        return self.plans[budget]

    def _planned(self, budget: int) -> tuple[Measured, float]:
        plan = self.step.solved(budget, self.seconds)
        found = scheduled(self.captured, self.step.planned, plan.sequence)
        measured = self.measured(*split(self.module, found, self.captured.forward_count))
        if measured.peak > budget:
            raise RuntimeError(f"the plan's graphs need {measured.peak} bytes, not {budget}")
        return measured, plan.gap / 100 * plan.least_time

    def least_of_moec(self, known: int) -> int:
        """The least peak for which moec found a plan, by bisection from a peak that it reaches."""
        problem = self.step.planned.problem
        low = max(map(problem.working_set, range(len(problem.nodes))))
        while known - low > known // 500:
            middle = (low + known) // 2
            try:
                known = self.step.solved(middle, self.seconds).peak
            except BudgetError as error:
                low, known = middle, min(known, error.least_known)
        return known

    def gradients(self) -> int:
        """Bytes of the gradients of parameters, which are held at the end of every step."""
        return self._bytes_of(self.captured.gradients)

    def outputs(self) -> int:
        """Bytes of what the forward pass returns, the logits above all, which the caller holds."""
        return self._bytes_of(self.captured.forward_outputs)

    def _bytes_of(self, nodes: Iterable[fx.Node]) -> int:
        memories = {memory for node in nodes for memory in self.captured.memories.of(node)}
        return sum(size_at(memory.size, self.sizes) for memory in memories)


def give_flops_of_regions(graph: fx.Graph) -> None:
    """Tell torch's flop counter what a pass of a compiled block, or a part of one, computes."""
    targets = {n.target: n for n in graph.nodes if pass_of(n.target) or part_of(n.target)}
    for target, node in targets.items():

        def flops(*args: Any, out_val: Any = None, node: fx.Node = node, **kwargs: Any) -> int:
            effort = region_effort(node, args)
            return 0 if effort is None else int(effort.flops)

        packet: Any = target
        register_flop_formula(packet.overloadpacket, get_raw=True)(flops)


def torch_results(
    comparison: Comparison, solvers: Sequence[str]
) -> Iterator[tuple[tuple[str, str, float], Measured]]:
    """What torch finds, with its settings."""
    settings = itertools.product(("whole", "parts"), (True, False), solvers, FRACTIONS)
    for blocks, counted, solver, fraction in settings:
        about = (f"{blocks} {'counted' if counted else 'free'}", solver, fraction)
        yield about, comparison.by_torch(fraction, solver, counted, blocks)


def rows_of(comparison: Comparison, found: dict[tuple[str, str, float], Measured]) -> list[Row]:
    """A row for each distinct result of torch, the largest peak first."""
    free, _ = comparison.by_moec(2**50)
    zero = min(free.seconds, *(m.seconds for m in found.values()))
    rows = []
    for measured in sorted(set(found.values()), key=lambda m: (-m.peak, m.seconds)):
        settings = named([about for about, other in found.items() if other == measured])
        ours, gap = comparison.by_moec(measured.peak)
        extra, our_extra = measured.seconds - zero, ours.seconds - zero
        rows.append(Row(settings, measured.peak, extra, ours.peak, our_extra, gap))
        print("  ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    return rows


def named(settings: Sequence[tuple[str, str, float]]) -> str:
    """Settings with one result: "whole counted dp 0.4 0.5; parts free dp ilp 0.1"."""
    by_fractions: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for blocks, solver in dict.fromkeys((b, s) for b, s, _ in settings):
        fractions = tuple(sorted(f for b, s, f in settings if (b, s) == (blocks, solver)))
        by_fractions.setdefault((blocks, fractions), []).append(solver)
    parts = (
        f"{blocks} {' '.join(solvers)} {' '.join(map(str, fractions))}"
        for (blocks, fractions), solvers in by_fractions.items()
    )
    return "; ".join(parts)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="olmoe", help="an architecture's name")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--time-limit", type=float, default=20.0, help="of each plan, in seconds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    solvers = ["dp", "greedy", *(["ilp"] if importlib.util.find_spec("scipy") else [])]
    facts = environment("cpu") | {"scipy": version_of("scipy")}
    print(describe(facts), flush=True)
    model = captured_model(options.model, options.layers, options.tokens)
    comparison = Comparison(model, options.time_limit)
    for graph in comparison.graphs.values():
        give_flops_of_regions(graph)
    found = dict(torch_results(comparison, solvers))
    rows = rows_of(comparison, found)
    least_planned = min(row.moec_peak for row in rows)
    least = {"torch": rows[-1].peak, "moec": comparison.least_of_moec(least_planned)}
    held = {
        "parameters and inputs": comparison.resident,
        "gradients": comparison.gradients(),
        "outputs": comparison.outputs(),
    }
    print(markdown_table(HEADS, [row.cells() for row in rows]))
    print_least(least, held)
    about = {k: v for k, v in vars(options).items() if k != "json"}
    figures = {"held": held, "least": least, "rows": [asdict(r) for r in rows]}
    write_json(options.json, {"environment": facts, "options": about, **figures})
    return 0


def print_least(least: dict[str, int], held: dict[str, int]) -> None:
    """The lowest peaks, and what of them is above the bytes that the caller holds at the end."""
    whole = {who: gib(size) for who, size in least.items()}
    print(f"\nlowest peak, GiB: {whole}, ratio {least['moec'] / least['torch']:.3f}")
    fixed = 0
    for what, size in held.items():
        fixed += size
        beyond = {who: least[who] - fixed for who in least}
        print(f"above these and {what}: ratio {beyond['moec'] / beyond['torch']:.3f}")
    print(f"of it held: { {what: gib(size) for what, size in held.items()} }")


if __name__ == "__main__":
    sys.exit(main())

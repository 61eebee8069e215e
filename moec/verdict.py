"""Whether a graph is right at every stage: passes, then the emitted module, then its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moec.bisect import (
    GuiltyKernel,
    GuiltyPass,
    StepTest,
    emitted_problem,
    find_kernels,
    find_pass,
)
from moec.bisect_text import kernel_lines, pass_lines, single_lines
from moec.ir.graph import Graph
from moec.manager import PassCall
from moec.single_ops import GuiltyOp, wrong_code, wrong_gradients

# Relative to the largest element; by the coarsest float among the graph's values.
_TOLERANCES = {"f64": 1e-9, "f32": 1e-4, "f16": 2e-2, "bf16": 5e-2}
Arguments = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a graph: a pass, or the emitted module (``problem``) and its kernels.

    ``graph`` is the graph after all passes, or before the guilty one.
    """

    graph: Graph
    count: int
    target: str
    guilty: GuiltyPass | None = None
    problem: str = ""
    kernels: tuple[GuiltyKernel, ...] = ()
    ops: tuple[GuiltyOp, ...] = ()  # whose gradient, or whose emitted code, is wrong by itself

    @property
    def name(self) -> str:
        """The graph's name as its text has it."""
        return f"@{self.graph.name}"

    @property
    def is_wrong(self) -> bool:
        """Whether anything was found."""
        return self.guilty is not None or bool(self.problem)

    def __str__(self) -> str:
        if self.guilty is not None:
            lines = pass_lines(self.name, self.guilty, self.count)
            return "\n".join([*lines, *single_lines(self.graph, self.ops)])
        if self.problem:
            lines = kernel_lines(self.name, self.target, self.problem, self.graph, self.kernels)
            return "\n".join([*lines, *single_lines(self.graph, self.ops)])
        return f"{self.name}: {self.count} passes and the {self.target} module are right"


def judge(
    graph: Graph,
    calls: Sequence[PassCall],
    target: str,
    test: StepTest,
    arguments_of: Callable[[Graph], Sequence[Arguments]],
) -> Verdict:
    """Search the passes with ``test``; if all are right, compare the emitted module with the
    interpreter, on each set of arguments that ``arguments_of`` gives for the graph after them, up
    to the first that shows a difference.
    """
    guilty, last = find_pass(graph, calls, test)
    if guilty is not None:
        ops = _wrong_gradients(guilty, arguments_of)
        return Verdict(last, len(calls), target, guilty, ops=ops)
    allowed = tolerance(last)
    for arguments in arguments_of(last):
        problem = emitted_problem(last, target, arguments, allowed)
        if problem:
            kernels = find_kernels(last, target, arguments, allowed)
            ops = () if kernels else tuple(wrong_code(last, target, arguments, allowed))
            return Verdict(last, len(calls), target, None, problem, tuple(kernels), ops)
    return Verdict(last, len(calls), target)


def _wrong_gradients(
    guilty: GuiltyPass, arguments_of: Callable[[Graph], Sequence[Arguments]]
) -> tuple[GuiltyOp, ...]:
    """Where differentiation is to blame: the ops whose own gradient is wrong."""
    if guilty.call.definition.name != "grad":
        return ()
    exact = bool(guilty.call.options.get("exact", False))
    arguments = [t.cpu() for t in arguments_of(guilty.before)[0]]
    return tuple(wrong_gradients(guilty.before, arguments, exact=exact))


def tolerance(graph: Graph) -> float:
    """How far the emitted module may be from the float64 result, relative to its largest element:
    by the coarsest float that the graph computes in.
    """
    values = [*graph.inputs, *(v for op in graph.ops for v in op.results)]
    return max((_TOLERANCES.get(v.type.dtype, 0.0) for v in values), default=0.0)


__all__ = ["Verdict", "judge", "tolerance"]

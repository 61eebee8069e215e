"""A captured step as a planning problem: what is executed, what it holds, how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from moec.budget.labels import label
from moec.budget.steps import Captured, Step
from moec.budget.values import Memory, size_at
from moec.plan import Node, Problem, make_problem

Sizes = Mapping[sympy.Symbol, int]
# What the caller makes between the passes
BOUNDARY = "gradients of the outputs"


@dataclass(frozen=True)
class Effort:
    """What one execution of a step takes: seconds, and bytes beyond its inputs and results."""

    seconds: float
    workspace: int


@dataclass(frozen=True)
class StepProblem:
    """The planning problem of a captured step at given sizes; node ``i`` is ``steps[i]``, but for
    ``boundary``, the node between the passes: it reads the forward's outputs and makes the
    gradients that the caller gives.
    """

    problem: Problem
    steps: tuple[Step | None, ...]
    boundary: int


def step_problem(
    name: str,
    captured: Captured,
    sizes: Sizes,
    effort: Callable[[Step], Effort],
    granule: int,
    reserve: int = 0,
) -> StepProblem:
    """The problem at these sizes of the symbols, every allocation rounded up to ``granule`` bytes.

    What the caller holds through the step is there all the time: parameters, buffers and inputs
    (``captured.inputs``), and ``reserve`` bytes. The caller holds the forward's outputs to the end,
    too, and autograd the gradients that it gives. What makes such an output runs once: to run again
    would not release what the caller holds.
    """
    steps = _in_order(captured)
    boundary = steps.index(None)
    number = {m: (i, k) for i, s in enumerate(steps) if s for k, m in enumerate(s.makes)}
    tangents = _memory_of(captured, captured.tangents)
    number.update({m: (boundary, k) for k, m in enumerate(tangents)})
    outputs = _memory_of(captured, captured.forward_outputs)
    kept = {*outputs, *tangents, *_memory_of(captured, captured.gradients)}
    given = set(outputs)

    def held(memory: Memory) -> int:
        return -(-size_at(memory.size, sizes) // granule) * granule

    nodes, edges = [], []
    for i, step in enumerate(steps):
        makes = tangents if step is None else step.makes
        reads = outputs if step is None else step.reads
        about = Effort(0.0, 0) if step is None else effort(step)
        nodes.append(
            Node(
                BOUNDARY if step is None else label(step.main, step.is_backward),
                tuple(held(m) for m in makes),
                about.seconds,
                about.workspace,
                tuple(m in kept for m in makes),
                step is not None and step.may_repeat and given.isdisjoint(makes),
            )
        )
        edges += [(number[m], i) for m in reads if m in number]
    resident = reserve + sum(held(m) for m in _memory_of(captured, captured.inputs))
    found = make_problem(name, nodes, edges, range(len(nodes)), resident)
    return StepProblem(found, tuple(steps), boundary)


def _in_order(captured: Captured) -> list[Step | None]:
    """The steps as they were captured, the boundary as ``None`` before the first that needs it."""
    steps: list[Step | None] = list(captured.steps)
    first = next((i for i, s in enumerate(captured.steps) if s.is_backward), len(steps))
    steps.insert(first, None)
    return steps


def _memory_of(captured: Captured, nodes: Sequence[fx.Node]) -> list[Memory]:
    """The memory of some nodes, each once."""
    return list(dict.fromkeys(_each(captured, nodes)))


def _each(captured: Captured, nodes: Sequence[fx.Node]) -> Iterator[Memory]:
    for node in nodes:
        yield from captured.memories.of(node)


__all__ = ["BOUNDARY", "Effort", "Sizes", "StepProblem", "step_problem"]

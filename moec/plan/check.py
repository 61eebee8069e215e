"""Replay of a plan by code that shares nothing with the planner.

The replay is a machine with a memory: it executes the steps one by one, refuses a step whose
inputs are not held, and counts bytes as they come and go. An execution makes all outputs of its
node anew, in the place of copies that are still held; those that nothing reads before the next
execution of the node are freed right after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moec.errors import PlanError
from moec.plan.problem import Problem


@dataclass(frozen=True)
class Replay:
    """What a plan needs: peak bytes and the step at which they are reached, total time, how many
    executions are repetitions, and the bytes that are held during each step.
    """

    peak: int
    peak_step: int
    time: float
    recomputations: int
    held: tuple[int, ...]


def replay(problem: Problem, sequence: Sequence[int], budget: int | None = None) -> Replay:
    """Execute ``sequence``, each output of an execution being freed right after its last use.

    Raises:
        PlanError: a step names no node, its inputs are not held, it repeats a node that may run
            only once, a node never runs, or more than ``budget`` bytes are held.
    """
    held: dict[int, int] = {}
    bytes_at = []
    runs = [0] * len(problem.nodes)
    releases = _releases(problem, sequence)
    for step, node in enumerate(sequence):
        _check_step(problem, step, node, held, runs[node])
        runs[node] += 1
        held |= {value: problem.sizes[value] for value in problem.made[node]}
        bytes_at.append(problem.resident + sum(held.values()) + problem.nodes[node].workspace)
        if budget is not None and bytes_at[-1] > budget:
            raise PlanError(
                f"step {step} ({problem.nodes[node].name}) holds {bytes_at[-1]} bytes;"
                f" the budget is {budget}"
            )
        for freed in releases[step]:
            del held[freed]
    _check_end(problem, runs, held)
    peak = max(bytes_at, default=problem.resident)
    time = math.fsum(problem.nodes[node].duration for node in sequence)
    step = bytes_at.index(peak) if bytes_at else 0
    return Replay(peak, step, time, len(sequence) - len(problem.nodes), tuple(bytes_at))


def _check_step(problem: Problem, step: int, node: int, held: dict[int, int], runs: int) -> None:
    about = problem.nodes[node]
    missing = [value for value in problem.reads[node] if value not in held]
    if missing:
        raise PlanError(
            f"step {step} ({about.name}) needs {problem.value_name(missing[0])}, which is not held"
        )
    if runs and not about.rematable:
        raise PlanError(f"step {step} repeats {about.name}, which may run only once")


def _releases(problem: Problem, sequence: Sequence[int]) -> list[list[int]]:
    """After which step each output is freed: found from the end, where the first reader met is
    the last one.
    """
    releases: list[list[int]] = [[] for _ in sequence]
    needed = set(problem.kept)
    for step in range(len(sequence) - 1, -1, -1):
        node = sequence[step]
        if not 0 <= node < len(problem.nodes):
            raise PlanError(f"step {step} names node {node}; there are {len(problem.nodes)}")
        releases[step] += [value for value in problem.made[node] if value not in needed]
        needed -= set(problem.made[node])
        releases[step] += [value for value in problem.reads[node] if value not in needed]
        needed |= set(problem.reads[node])
    return releases


def _check_end(problem: Problem, runs: Sequence[int], held: dict[int, int]) -> None:
    for v, node in enumerate(problem.nodes):
        if not runs[v]:
            raise PlanError(f"{node.name} never runs")
    for value in problem.kept:
        if value not in held:
            raise PlanError(f"{problem.value_name(value)} must be held at the end and is not")

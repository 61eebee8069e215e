"""What a plan does with a step: what is held between the passes, and what runs again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moec.budget.labels import source_line
from moec.budget.model_plan import ModelStep
from moec.budget.text import shown_bytes
from moec.plan import Plan
from moec.plan.solve import percent_above

_LAYER = re.compile(r"\.\d+(?=[.:]|$)")


@dataclass(frozen=True)
class Item:
    """Operations of equal places in the layers: how many, how many bytes of results, and seconds of
    all of them; ``place`` is a line of the model's code.
    """

    name: str
    count: int
    bytes: int
    seconds: float
    place: str


def repeated(step: ModelStep, sequence: Sequence[int]) -> list[Item]:
    """What runs again, the longest first."""
    seen: set[int] = set()
    again: list[int] = []
    for node in sequence:
        (again.append if node in seen else seen.add)(node)
    return sorted(_items(step, again), key=lambda item: (-item.seconds, item.name))


def held_between(step: ModelStep, sequence: Sequence[int]) -> list[Item]:
    """What the backward pass takes from the forward pass, the largest first; what is held at the
    end anyway is not listed.
    """
    problem, boundary = step.planned.problem, step.planned.boundary
    crossing = sequence.index(boundary)
    ahead = set(sequence[:crossing])
    taken: dict[int, None] = {}
    for node in sequence[crossing + 1 :]:
        taken.update(dict.fromkeys(v for v in problem.reads[node] if problem.owners[v] in ahead))
        ahead.discard(node)
    return sorted(_values(step, list(taken)), key=lambda item: (-item.bytes, item.name))


def _items(step: ModelStep, nodes: Sequence[int]) -> Iterator[Item]:
    problem = step.planned.problem
    counts = Counter(_grouped(problem.nodes[v].name) for v in nodes)
    for name, count in counts.items():
        own = [v for v in nodes if _grouped(problem.nodes[v].name) == name]
        size = sum(problem.nodes[v].size for v in own)
        seconds = sum(problem.nodes[v].duration for v in own)
        yield Item(name, count, size, seconds, _place(step, own[0]))


def _values(step: ModelStep, values: Sequence[int]) -> Iterator[Item]:
    problem = step.planned.problem
    groups: dict[str, list[int]] = {}
    for value in values:
        groups.setdefault(_grouped(problem.nodes[problem.owners[value]].name), []).append(value)
    for name, own in groups.items():
        size = sum(problem.sizes[v] for v in own)
        yield Item(name, len(own), size, 0.0, _place(step, problem.owners[own[0]]))


def _grouped(name: str) -> str:
    """A name without the numbers of layers."""
    return _LAYER.sub(".*", name)


def _place(step: ModelStep, node: int) -> str:
    about = step.planned.steps[node]
    return "" if about is None else source_line(about.main)


def summary_lines(step: ModelStep, plan: Plan, budget: int, most: int = 8) -> Iterator[str]:
    """A plan as text: peaks, times, what is held and what runs again."""
    dims = ", ".join(f"{name} = {size}" for name, size in step.sizes.items())
    count = len(step.planned.problem.nodes)
    yield f"{step.name}: {dims}; {count} operations, parameters {shown_bytes(step.parameters)}"
    least = step.planned.problem.least_time
    yield f"  as captured   peak {shown_bytes(step.unplanned.peak):>11}   {1e3 * least:.1f} ms"
    proof = "the least possible"
    if not plan.is_optimal:
        proof = f"the best found in time, at most {plan.gap:.3f} points too much"
    yield (
        f"  planned       peak {shown_bytes(plan.peak):>11}   {1e3 * plan.time:.1f} ms,"
        f" {percent_above(plan.time, least):.2f}% more ({proof})"
    )
    yield f"  budget             {shown_bytes(budget):>11}"
    yield f"  assumed       {step.basis}"
    yield from _table("held between the passes", held_between(step, plan.sequence), most, False)
    yield from _table("runs again", repeated(step, plan.sequence), most, True)


def _table(title: str, items: Sequence[Item], most: int, timed: bool) -> Iterator[str]:
    if not items:
        return
    yield f"  {title}:"
    for item in items[:most]:
        time = f" {1e3 * item.seconds:8.2f} ms" if timed else ""
        place = f"  {item.place}" if item.place not in item.name else ""
        yield f"    {item.count:4} x {shown_bytes(item.bytes):>11}{time}  {item.name}{place}"
    if len(items) > most:
        yield f"    and {len(items) - most} more"


__all__ = ["Item", "held_between", "repeated", "summary_lines"]

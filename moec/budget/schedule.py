"""A captured step with its executions in the order of a plan, repetitions written out."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.budget.fused import Fused
from moec.budget.numbers import Numbers
from moec.budget.problem import StepProblem
from moec.budget.steps import Captured, Step, draws_random_numbers, is_tangent
from moec.budget.values import Memory, is_number
from moec.budget.views import drop_idle_views
from moec.errors import PlanError

_ENDS = frozenset(["placeholder", "output"])


@dataclass(frozen=True)
class Scheduled:
    """A joint graph in the order of a plan. ``saved`` are its nodes that the backward pass takes
    from the forward pass, ``numbers`` the sizes that it may need.
    """

    graph: fx.Graph
    saved: tuple[fx.Node, ...]
    numbers: tuple[fx.Node, ...]


def scheduled(
    captured: Captured,
    planned: StepProblem,
    sequence: Sequence[int],
    fused: Mapping[Step, Fused] | None = None,
) -> Scheduled:
    """The joint graph that executes ``sequence``, nodes of the planning problem; steps that are in
    ``fused`` as one call each.

    Raises:
        PlanError: a size is read from an intermediate result.
    """
    writer = _Writer(captured, fused or {})
    for number in sequence:
        step = planned.steps[number]
        if step is None:
            writer.cross()
        else:
            writer.execute(step)
    return writer.finish()


class _Writer:
    """Copies nodes into a new graph; ``now`` is the latest copy of each that may be read."""

    def __init__(self, captured: Captured, fused: Mapping[Step, Fused]) -> None:
        self.captured, self.fused, self.graph = captured, fused, fx.Graph()
        self.numbers = Numbers(self.graph)
        self.now: dict[fx.Node, Any] = {}
        self.shown: dict[Memory, list[fx.Node]] = {}
        self.outputs: list[Any] = []
        self.ahead: dict[fx.Node, None] = {}
        for node in captured.graph.nodes:
            for memory in captured.memories.of(node):
                self.shown.setdefault(memory, []).append(node)
            if node.op in ("placeholder", "get_attr"):
                self.now[node] = self._copied(node, self.now)
                self.numbers.bind(self.now[node])
            elif is_number(node):
                self.now[node] = self._number(node)

    def _number(self, node: fx.Node) -> Any:
        """A size, from sizes of inputs; one that is read from a result equals some of such."""
        if all(s in self.now for s in node.all_input_nodes):
            copy = self._copied(node, self.now)
            self.numbers.bind(copy)
            return copy
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            raise PlanError(f"{node.name} is computed on the host from a result ({node.target})")
        return self.numbers.written(value.node.expr)

    def _copied(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        return self.graph.node_copy(node, lambda source: copies[source])

    def execute(self, step: Step) -> None:
        """Run the operations of a step; what they made before is no longer read."""
        fused = self.fused.get(step)
        own = self._written(step) if fused is None else {step.main: self._called(fused, step.main)}
        for memory in step.makes:
            for node in self.shown[memory]:
                self.now.pop(node, None)
        made = set(step.makes)
        self.now.update((n, c) for n, c in own.items() if made.issuperset(self._memory(n)))

    def _written(self, step: Step) -> dict[fx.Node, fx.Node]:
        own: dict[fx.Node, fx.Node] = {}
        for node in step.nodes:
            sources = {s: own[s] if s in own else self._current(s) for s in node.all_input_nodes}
            own[node] = self._copied(node, sources)
        return own

    def _called(self, fused: Fused, result: fx.Node) -> fx.Node:
        call = self.graph.call_function(fused.run, tuple(map(self._current, fused.inputs)))
        call.meta = dict(result.meta)
        return call

    def _memory(self, node: fx.Node) -> Sequence[Memory]:
        return self.captured.memories.of(node)

    def _current(self, node: fx.Node) -> fx.Node:
        """The copy of a node that may be read now; views are made as they are needed."""
        if node not in self.now:
            sources = {s: self._current(s) for s in node.all_input_nodes}
            self.now[node] = self._copied(node, sources)
        current: fx.Node = self.now[node]
        return current

    def _returned(self, first: int, final: int | None) -> list[Any]:
        (output,) = self.captured.graph.find_nodes(op="output")
        values = output.args[0][first:final]
        return [self._current(v) if isinstance(v, fx.Node) else v for v in values]

    def cross(self) -> None:
        """End the forward pass; the backward pass takes memory from it, and makes its own views."""
        self.outputs = self._returned(0, self.captured.forward_count)
        self.ahead = dict.fromkeys(self.graph.nodes)
        for node in [n for n in self.now if self._is_view(n)]:
            del self.now[node]

    def _is_view(self, node: fx.Node) -> bool:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return self._is_view(node.args[0])
        return node.op == "call_function" and self.captured.memories.is_view(node)

    def finish(self) -> Scheduled:
        """Return the gradients, and find what crosses from one pass to the other."""
        behind = self._returned(self.captured.forward_count, None)
        (given,) = self.captured.graph.find_nodes(op="output")
        output = self.graph.output((*self.outputs, *behind))
        output.meta.update(given.meta)
        saved = [n for n in self.ahead if self._is_saved(n, output, behind)]
        numbers = [n for n in self.ahead if is_number(n)]
        return Scheduled(self.graph, tuple(saved), tuple(numbers))

    def _is_saved(self, node: fx.Node, output: fx.Node, behind: Sequence[object]) -> bool:
        if is_number(node) or node.op == "get_attr" or is_tangent(node):
            return False
        reads = any(u not in self.ahead and u is not output for u in node.users)
        return reads or node in behind


def split(
    module: torch.nn.Module, found: Scheduled, forward_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward pass, as AOTAutograd calls them.

    AOTAutograd gives each pass all that can be computed from its inputs, and what is marked as
    drawing random numbers stays though nothing reads it: attention ran in both. Only the forward
    pass may draw what nobody reads.
    """
    from torch._functorch.partitioners import _extract_fwd_bwd_modules

    joint = fx.GraphModule(module, found.graph)
    ahead, behind = _extract_fwd_bwd_modules(
        joint, list(found.saved), list(found.numbers), num_fwd_outputs=forward_outputs
    )
    ahead.graph.eliminate_dead_code(lambda n: n.op in _ENDS or draws_random_numbers(n))
    behind.graph.eliminate_dead_code(lambda n: n.op in _ENDS)
    drop_idle_views(ahead.graph)
    drop_idle_views(behind.graph)
    return ahead, behind


__all__ = ["Scheduled", "scheduled", "split"]

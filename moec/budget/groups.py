"""Groups of light operations as functions of their own: what can be compiled as one unit."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from moec.budget.numbers import evaluated
from moec.budget.steps import Captured, Step, is_light
from moec.budget.values import is_number, tensors_of


@dataclass(frozen=True)
class Group:
    """The light operations of a step as a function of ``tensors`` and of the sizes that ``symbols``
    (inputs of the graph) bind; ``nodes`` are in order, the last one is the result. Views of what
    the operations read are in it, too.
    """

    nodes: tuple[fx.Node, ...]
    tensors: tuple[fx.Node, ...]
    symbols: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The node whose tensor the function returns."""
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The arguments of the function."""
        return self.tensors + self.symbols

    def run(self, arguments: Sequence[Any]) -> Any:
        """The result for values of the inputs, one operation after another."""
        values = dict(zip(self.inputs, arguments, strict=True))
        numbers = {n.meta["val"].node.expr: values[n] for n in self.symbols}

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            given = node.meta["val"]
            is_symbolic = isinstance(given, torch.SymInt)
            return evaluated(given.node.expr, numbers) if is_symbolic else given

        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[self.result]

    def key(self) -> str:
        """Equal for groups of which one compiled function does: operations, attributes, layouts."""
        names = {n: f"%{i}" for i, n in enumerate(self.tensors + self.nodes)}

        def named(node: fx.Node) -> str:
            return names[node] if node in names else f"({node.meta['val']})"

        lines = [_layout(n) for n in self.tensors]
        for node in self.nodes:
            arguments = fx.map_arg((node.args, node.kwargs), named)
            lines.append(f"{node.target} {arguments!r} {_layout(node)}")
        return "\n".join([*lines, *(str(s.meta["val"]) for s in self.symbols)])


def _layout(node: fx.Node) -> str:
    """How a tensor lies in memory."""
    value: torch.Tensor = node.meta["val"]
    places = tuple(value.shape), tuple(value.stride()), value.storage_offset()
    return f"{value.dtype} {value.device} {places}"


def groups_of(captured: Captured) -> dict[Step, Group]:
    """The steps of several light operations, each as a function."""
    finder = _Finder(captured)
    found = {step: finder.group(step) for step in captured.steps}
    return {step: group for step, group in found.items() if group is not None}


class _Finder:
    def __init__(self, captured: Captured) -> None:
        self.memories = captured.memories
        self.place = {node: place for place, node in enumerate(captured.graph.nodes)}
        self.binds = _bound(captured.inputs)

    def group(self, step: Step) -> Group | None:
        """The function of a step; ``None`` for a heavy step, for a single operation, which is one
        kernel as it is, and for what no kernel can be made of.
        """
        computing = [n for n in step.nodes if not self.memories.is_view(n)]
        if len(computing) < 2 or not all(map(is_light, computing)):
            return None
        nodes = self._with_views(step)
        own = set(nodes)
        outside = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in own)
        tensors = tuple(s for s in outside if not is_number(s))
        symbols = _symbols([*nodes, *outside])
        if not _is_plain([*nodes, *tensors]) or not symbols <= self.binds.keys():
            return None
        binding = sorted((self.binds[s] for s in symbols), key=self.place.__getitem__)
        return Group(tuple(nodes), tensors, tuple(binding))

    def _with_views(self, step: Step) -> Sequence[fx.Node]:
        """The nodes of a step with the views that lead to them from other memory."""
        found = set(step.nodes)
        waiting = [s for n in step.nodes for s in n.all_input_nodes]
        while waiting:
            node = waiting.pop()
            if node not in found and self._is_free(node):
                found.add(node)
                waiting += node.all_input_nodes
        return sorted(found, key=self.place.__getitem__)

    def _is_free(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is operator.getitem or is_number(node):
            return False
        return isinstance(node.meta.get("val"), torch.Tensor) and self.memories.is_view(node)


def _bound(inputs: Iterable[fx.Node]) -> Mapping[sympy.Symbol, fx.Node]:
    """The inputs that are sizes, by their symbols."""
    sizes = ((n.meta.get("val"), n) for n in inputs)
    exprs = ((v.node.expr, n) for v, n in sizes if isinstance(v, torch.SymInt))
    return {expr: n for expr, n in exprs if isinstance(expr, sympy.Symbol)}


def _symbols(nodes: Iterable[fx.Node]) -> set[sympy.Symbol]:
    """The symbols of tensors' layouts and of numbers."""
    values: list[Any] = []
    for node in nodes:
        values += tensors_of(node) or [node.meta.get("val")]
    return {s for value in values if not isinstance(value, float) for s in free_symbols(value)}


def _is_plain(nodes: Iterable[fx.Node]) -> bool:
    """Whether all of some nodes are single tensors, of one device."""
    values: list[Any] = [n.meta.get("val") for n in nodes]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return False
    return len({v.device for v in values}) == 1


__all__ = ["Group", "groups_of"]

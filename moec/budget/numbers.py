"""Sizes in a graph, computed on the host from the sizes of its inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from moec.errors import PlanError

_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    Max: torch.sym_max,
    Min: torch.sym_min,
    sympy.Pow: operator.pow,
}


def evaluated(expression: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression of sizes from the values of its symbols, numbers of a tracer among them, two
    operands at a time.

    Raises:
        PlanError: it has an operation that sizes do not have, or another symbol.
    """
    if expression.is_Integer:
        return int(expression)
    if expression in values:
        return values[expression]
    function = _OPERATORS.get(expression.func)
    if function is None:
        raise PlanError(f"the size {expression} cannot be computed from {sorted(map(str, values))}")
    return functools.reduce(function, (evaluated(part, values) for part in expression.args))


class Numbers:
    """Writes sizes into a graph; ``symbols`` are the nodes that bind the symbols."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.known: dict[sympy.Expr, fx.Node] = {}

    def bind(self, node: fx.Node) -> None:
        """Remember what size a node of the graph is."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.known.setdefault(value.node.expr, node)

    def written(self, expression: sympy.Expr) -> fx.Node | int:
        """A node of the graph that computes an expression, or a number.

        Raises:
            PlanError: it has symbols that no input binds, or an operation that sizes do not have.
        """
        if expression.is_Integer:
            return int(expression)
        if expression in self.known:
            return self.known[expression]
        function = _OPERATORS.get(expression.func)
        if function is None:
            raise PlanError(f"the size {expression} is read from a result, not from inputs")
        parts = [self.written(part) for part in expression.args]
        found = functools.reduce(functools.partial(self._applied, function), parts)
        self.known[expression] = found  # type: ignore[assignment]
        return found

    def _applied(self, function: Any, left: Any, right: Any) -> Any:
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return function(left, right)
        node = self.graph.call_function(function, (left, right))
        values = [v.meta["val"] if isinstance(v, fx.Node) else v for v in (left, right)]
        node.meta["val"] = function(*values)
        return node


__all__ = ["Numbers", "evaluated"]

"""The sizes for which a step is planned: a plan serves all smaller ones."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx


def rounded_up(size: int) -> int:
    """The next size of which only the three leading bits are not zero: at most a quarter more."""
    if size < 8:
        return size
    unit = 1 << (size.bit_length() - 3)
    return -(-size // unit) * unit


def class_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """What calls must have in common that one plan serves: shapes, rounded up."""
    return tuple(tuple(map(rounded_up, t.shape)) for t in tensors)


def planned_sizes(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """For each symbol of the sizes of a graph's inputs the largest that the plan is to serve: the
    end of its declared range, else the size of this call, rounded up.
    """
    found: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found[value.node.expr] = _largest(value)
    return found


def _largest(size: torch.SymInt) -> int:
    node = size.node
    top = node.shape_env.bound_sympy(node.expr).upper
    if top.is_Integer and int(top) < 2**31:
        return int(top)
    return rounded_up(int(node.hint))


__all__ = ["class_of", "planned_sizes", "rounded_up"]

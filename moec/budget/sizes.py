"""The sizes for which a step is planned: a plan serves all smaller ones."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

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


def planned_sizes(graph: fx.Graph, is_declared: bool = False) -> dict[sympy.Symbol, int]:
    """For each symbol of the sizes of a graph's inputs the largest that the plan is to serve: the
    end of its range where ranges were declared, else the size of this call, rounded up. The tracer
    narrows ranges also by what the model's code compares, which says nothing of what is to come.
    """
    found: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found[value.node.expr] = _largest(value, is_declared)
    for node in graph.find_nodes(op="placeholder"):
        found.update(_of_bases(node, found))
    return found


def _of_bases(node: fx.Node, known: Container[sympy.Symbol]) -> Mapping[sympy.Symbol, int]:
    """The sizes of the tensor that an input is a view of, which may have symbols of their own."""
    value = node.meta.get("val")
    size: Any = value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0
    if not isinstance(size, torch.SymInt):
        return {}
    env = size.node.shape_env
    hint = getattr(env, "guarding_hint_or_throw", env.size_hint)  # its name since PyTorch 2.13
    own = (s for s in size.node.expr.free_symbols if s not in known)
    return {s: rounded_up(int(hint(s))) for s in own}


def _largest(size: torch.SymInt, is_declared: bool) -> int:
    node = size.node
    top = node.shape_env.bound_sympy(node.expr).upper
    end = int(top) if top.is_Integer else 2**63
    return end if is_declared and end < 2**31 else min(end, rounded_up(int(node.hint)))


__all__ = ["class_of", "planned_sizes", "rounded_up"]

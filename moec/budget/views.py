"""Views that show what is there already: each is a call on the host less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moec.budget.values import viewed


def drop_idle_views(graph: fx.Graph) -> None:
    """Read a view's source, or the source of that, where it has the very same layout: ``detach``,
    slices of the whole, a transposition of a transposition. What the graph returns stays.
    """
    (output,) = graph.find_nodes(op="output")
    for node in list(graph.nodes):
        same = next((s for s in _sources(node) if _layout(s) == _layout(node)), None)
        if same is not None and output not in node.users:
            node.replace_all_uses_with(same)
    for node in reversed(list(graph.nodes)):
        if not node.users and viewed(node) is not None:
            graph.erase_node(node)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is a view of, and what that is a view of."""
    source = _seen_through(node)
    while source is not None:
        yield source
        source = _seen_through(source)


def _seen_through(node: fx.Node) -> fx.Node | None:
    one = isinstance(node.meta.get("val"), torch.Tensor)
    return viewed(node) if node.op == "call_function" and one else None


def _layout(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return node  # many at once, which are no view of each other
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    exprs = tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in numbers)
    return value.dtype, value.is_conj(), value.is_neg(), exprs


__all__ = ["drop_idle_views"]

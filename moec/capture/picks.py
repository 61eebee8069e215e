"""Recorded values in which each expert names its tokens: the best along the axis of tokens."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moec.capture.forms import PICKS, TURNED_PICKS, Form

aten = torch.ops.aten
_SAME = {aten.clone.default, aten._to_copy.default, aten.detach.default, aten.slice.Tensor}
_ORDERS = {aten.topk, aten.sort}


def distinct_picks(nodes: Sequence[fx.Node], experts: int) -> Iterator[tuple[fx.Node, Form]]:
    """Nodes that hold token numbers by expert, ``[E, C]`` or ``[C, E]``, and which of these; an
    expert's are different ones by the way that they were made.
    """
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.dim() != 2:
            continue
        for form, axis in ((PICKS, 1), (TURNED_PICKS, 0)):
            if value.shape[1 - axis] == experts and _is_order(node, axis):
                yield node, form


def _is_order(node: fx.Node, axis: int) -> bool:
    """Whether a value is the places of a top-k or a sort along an axis, or a part of them."""
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem:
        packet = getattr(source.target, "overloadpacket", None)
        is_order = bool(node.args[1] == 1) and packet in _ORDERS
        return is_order and _axis(source) % 2 == axis
    if node.target in (aten.argsort.default, aten.argsort.stable):
        return _axis(node) % 2 == axis
    if node.target in _SAME:
        return _is_order(source, axis)
    turned = node.target is aten.t.default or (
        node.target in (aten.transpose.int, aten.permute.default)
        and sorted(d % 2 for d in _numbers(node.args[1:])) == [0, 1]
    )
    return turned and _is_order(source, 1 - axis if _swaps(node) else axis)


def _swaps(node: fx.Node) -> bool:
    """Whether a move of two axes changes their order; only a permutation may leave it."""
    return node.target is not aten.permute.default or _numbers(node.args[1:])[0] % 2 == 1


def _numbers(arguments: Sequence[Any]) -> list[int]:
    return [n for a in arguments for n in (a if isinstance(a, list | tuple) else [a])]


def _axis(node: fx.Node) -> int:
    """The axis of a top-k or a sort; the last by default."""
    names: dict[Any, int] = {aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1}
    place = names.get(node.target, len(node.args))
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", -1)
    return int(given)


__all__ = ["distinct_picks"]

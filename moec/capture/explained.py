"""Whether a loop over experts does no more than its sum over choices says.

A match found by numbers holds for the tokens that were tried. What the loop's own ops could do on
others (drop tokens beyond a capacity, branch on values) is read off the ops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from moec.capture.experts import read_reason
from moec.errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """Nodes of one recording: what the loop reads and the value that it computes."""

    x: fx.Node
    idx: fx.Node
    w: fx.Node
    result: fx.Node


def refuse_unexplained(module: nn.Module, reads: Sequence[fx.Node], match: Match) -> None:
    """Raise :class:`CaptureError` if the loop does something that the sum over choices need not do.

    Values may become Python numbers (``reads``) to see which experts have tokens: such a number
    follows from the indices alone, or from which of the weights are zero.
    """
    for node in reads:
        if not _follows_from(node, match):
            raise CaptureError(read_reason(module, node))
    kept = with_ancestors(match.x) | with_ancestors(match.idx) | with_ancestors(match.w)
    for node in with_ancestors(match.result) - kept:
        if not _is_routing(node):
            place = node.meta.get("location")
            where = f"{place[0]}:{place[1]}: " if place else ""
            raise CaptureError(
                f"{where}{type(module).__name__} uses {node.target} to pick or add up tokens; "
                "what it does on other tokens than those tried is not known"
            )


def _follows_from(read: fx.Node, match: Match) -> bool:
    stops = {n for n in with_ancestors(match.idx) if _is_integer(n)}
    pending = [(read, False)]
    seen: set[tuple[fx.Node, bool]] = set()  # values are read on many ways: once each is enough
    while pending:
        node, only_zero = pending.pop()
        if (node, only_zero) in seen:
            continue
        seen.add((node, only_zero))
        if node in stops or (only_zero and node is match.w):
            continue
        if not node.all_input_nodes:
            return False  # the tokens, a weight or a buffer
        only_zero = only_zero or _compares_with_zero(node)
        pending += [(operand, only_zero) for operand in node.all_input_nodes]
    return True


def with_ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _compares_with_zero(node: fx.Node) -> bool:
    comparison = node.target in (aten.gt.Scalar, aten.ne.Scalar)
    return bool(comparison and node.args[1] == 0)


# Ops that pick, move, weight and add up rows whatever their number: none can drop some of them.
_ROUTING = {
    aten.add,
    aten.any,
    aten.argsort,
    aten.bincount,
    aten.bitwise_or,
    aten.cat,
    aten.clone,
    aten._to_copy,
    aten.eq,
    aten.expand,
    aten.floor_divide,
    aten.gather,
    aten.index,
    aten.index_add,
    aten.index_copy,
    aten.index_put,
    aten.index_select,
    aten.logical_or,
    aten.masked_select,
    aten.mul,
    aten.nonzero,
    aten.permute,
    aten.remainder,
    aten.reshape,
    aten.scatter,
    aten.scatter_add,
    aten.select,
    aten.sort,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.stack,
    aten.sum,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten._unique2,
    aten._unsafe_view,
    aten.unsqueeze,
    aten.view,
}


def _is_routing(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.slice:
        return _is_slice_of_features(node)
    if node.op == "placeholder" or packet is None:  # an expert's call, or a part of a tuple
        return node.op == "placeholder" or not isinstance(node.target, torch._ops.OpOverload)
    return packet in _ROUTING or _compares_with_zero(node)


def _is_slice_of_features(node: fx.Node) -> bool:
    """Whether a slice leaves the number of rows as it was."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    axis = node.args[1] if len(node.args) > 1 else 0
    return isinstance(value, torch.Tensor) and value.dim() > 1 and axis in (-1, value.dim() - 1)


__all__ = ["Match", "refuse_unexplained", "with_ancestors"]

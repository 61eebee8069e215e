"""Whether a loop over experts does no more than its sum over choices says.

A match found by numbers holds for the tokens that were tried. What the loop's own ops could do on
others (drop tokens beyond a capacity, branch on values) is read off the ops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moec.capture.branches import limits_counts
from moec.capture.experts import read_reason
from moec.capture.forms import INDICES, Form
from moec.errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """Nodes of one recording: what the loop reads and the value that it computes.

    ``routing`` and ``w`` (none: ones) have a form; ``keep`` marks the indices that count.
    ``by_expert``: beside indices, the weights have a column for each expert.
    """

    x: fx.Node
    routing: fx.Node
    w: fx.Node | None
    result: fx.Node
    form: Form = INDICES
    keep: fx.Node | None = None
    by_expert: bool = False

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """All that the loop reads."""
        nodes = (self.x, self.routing, self.w, self.keep)
        return tuple(node for node in nodes if node is not None)


def refuse_unexplained(module: nn.Module, reads: Sequence[fx.Node], match: Match) -> None:
    """Raise :class:`CaptureError` if the loop does something that the sum over choices need not do.

    Values may become Python numbers (``reads``) to see which experts have tokens: such a number
    follows from the indices alone, or from which of the weights are zero.
    """
    for node in reads:
        if not _follows_from(node, match):
            raise CaptureError(read_reason(module, node))
    tiled: dict[fx.Node, bool] = {}
    kept = set().union(*(with_ancestors(node) for node in match.sources))
    for node in with_ancestors(match.result) - kept:
        if not _is_routing(node) and not _is_tile(module, node, tiled):
            place = node.meta.get("location")
            where = f"{place[0]}:{place[1]}: " if place else ""
            raise CaptureError(
                f"{where}{type(module).__name__} uses {node.target} to pick or add up tokens; "
                "what it does on other tokens than those tried is not known"
            )


def _is_tile(module: nn.Module, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a slice is one of those that cut a value in parts, one after the other, and nothing
    in the source could make one of them shorter.
    """
    if node.target is not aten.slice.Tensor:
        return False
    source: Any = node.args[0]
    if source not in known:
        known[source] = _tiles(source) and not limits_counts(module)
    return known[source]


def _tiles(source: fx.Node) -> bool:
    bounds: list[tuple[int, int]] = []
    size = source.meta["val"].shape[0]
    for user in source.users:
        if user.target is aten.slice.Tensor:
            given: list[Any] = list(user.args[1:4])
            axis, start, stop = [*given, *[0, 0, size][len(given) :]]
            if axis != 0:
                return False
            bounds.append((start or 0, stop))
    bounds = sorted(set(bounds))
    ends = [0, *(stop for _, stop in bounds)]
    return bounds[-1][1] == size and [start for start, _ in bounds] == ends[:-1]


def _follows_from(read: fx.Node, match: Match) -> bool:
    routing = [n for n in (match.routing, match.keep) if n is not None]
    stops = {n for r in routing for n in with_ancestors(r) if _is_integer(n)}
    zeros = {match.w, match.routing}
    pending = [(read, False)]
    seen: set[tuple[fx.Node, bool]] = set()  # values are read on many ways: once each is enough
    while pending:
        node, only_zero = pending.pop()
        if (node, only_zero) in seen:
            continue
        seen.add((node, only_zero))
        if node in stops or (only_zero and node in zeros):
            continue
        if not node.all_input_nodes or _compares_with_number(node):
            return False  # the tokens, a weight or a buffer; or a limit
        only_zero = only_zero or _compares_with_zero(node)
        pending += [(operand, only_zero) for operand in node.all_input_nodes]
    return True


def _compares_with_number(node: fx.Node) -> bool:
    """Whether an op asks for more than whether there is any: a count may have a limit."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.lt, aten.le, aten.gt, aten.ge) and not isinstance(node.args[1], fx.Node):
        return node.args[1] not in (0, 1)
    return False


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
    aten.as_strided_scatter,
    aten.bmm,
    aten.bitwise_and,
    aten.bincount,
    aten.bitwise_or,
    aten.cat,
    aten.clone,
    aten.copy,
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
    aten.logical_and,
    aten.logical_or,
    aten.masked_select,
    aten.mm,
    aten.mul,
    aten.nonzero,
    aten.permute,
    aten.remainder,
    aten.reshape,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
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
    if packet is aten.scatter_reduce and node.args[4] != "sum":
        return False
    return packet in _ROUTING or _compares_with_zero(node)


def _is_slice_of_features(node: fx.Node) -> bool:
    """Whether a slice leaves the number of rows as it was, or picks a single one."""
    if node.meta["val"].shape[0] == 1:
        return True
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    axis = node.args[1] if len(node.args) > 1 else 0
    return isinstance(value, torch.Tensor) and value.dim() > 1 and axis in (-1, value.dim() - 1)


__all__ = ["Match", "refuse_unexplained", "with_ancestors"]

"""Rows split by how many belong to each expert: ``split(sizes)``, one product an expert, ``cat``.

The sizes come from a tensor of counts through ``tolist()``. The parts are put off until they are
joined again; if the work on every part is the same but for the expert's weights, it becomes grouped
products over all rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.capture.importer import ExpertSlice, Importer
from moec.errors import CaptureError
from moec.ir.dims import Dim
from moec.ir.graph import Value

aten = torch.ops.aten
_ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_ITEMS = {aten.item.default, aten._local_scalar_dense.default}


@dataclass(frozen=True)
class Part:
    """The rows of one expert: part ``index`` of ``rows``, split by the node ``counts``."""

    rows: Value
    counts: fx.Node
    index: int


@dataclass(frozen=True)
class PutOff:
    """A value computed from the rows of one expert, imported when the parts are joined."""

    node: fx.Node


class RaggedImporter(Importer):
    """Imports a graph in which rows may be split by counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts: dict[Any, Dim] = {}  # the tracer's symbols: the first stands for all rows
        self.inside = False

    def call(self, node: fx.Node) -> Any:
        """Import one call, or put it off."""
        if node.target in _ASSERTIONS or isinstance(
            node.meta.get("val"), torch.SymBool | torch.SymFloat
        ):
            return None
        if node.target is aten.split_with_sizes.default and not self.inside:
            parts = self.parts(node)
            if parts is not None:
                return parts
        if not self.inside and any(self.is_put_off(n) for n in node.all_input_nodes):
            return self.join(node) if node.target is aten.cat.default else self.put_off(node)
        return super().call(node)

    def is_put_off(self, node: fx.Node) -> bool:
        """Whether a node is a part, or computed from one."""
        return isinstance(self.env.get(node), Part | PutOff)

    def put_off(self, node: fx.Node) -> Any:
        """An operation on a part; a part of a tuple stays a part."""
        return PutOff(node)

    def parts(self, node: fx.Node) -> tuple[Part, ...] | None:
        """The parts of a split by counts; ``None`` for a split by plain sizes."""
        sizes: Any = node.args[1]
        places = [_count(s) for s in sizes]
        if not any(places):
            return None
        known = [p for p in places if p is not None]
        axis = node.args[2] if len(node.args) > 2 else 0
        whole = [index for _, index in known] == list(range(len(sizes)))
        if not whole or len({counts for counts, _ in known}) != 1 or axis != 0:
            raise CaptureError("rows split by numbers that are not one count an expert")
        counts, rows = known[0][0], self.value(self.env[node.args[0]])  # type: ignore[index]
        if counts.meta["val"].shape != (len(sizes),):
            raise CaptureError("rows split by some of the counts")
        for index, size in enumerate(sizes):
            for symbol in size.meta["val"].node.expr.free_symbols:
                self.counts[symbol] = rows.type.shape[0] if index == 0 else 0
        return tuple(Part(rows, counts, index) for index in range(len(sizes)))

    def join(self, node: fx.Node) -> Value:
        """The joined parts: the work of the first, on the rows of all."""
        branches: Any = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else 0
        if axis != 0 or not all(self.is_put_off(n) for n in branches):
            raise CaptureError("parts of rows joined with something else")
        common = _Common(self, len(branches))
        common.compare(list(branches))
        first = common.part
        if first is None or first.counts.meta["val"].shape != (len(branches),):
            raise CaptureError("not every part of the rows is joined")
        self.set_offsets(first)
        self.env.update(common.leaves(self))
        self.inside = True
        for inner in common.order():
            self.env[inner] = super().call(inner)
        self.inside = False
        made = self.value(self.env[branches[0]])
        self.env.update(dict.fromkeys(common.order()))
        return made

    def set_offsets(self, part: Part) -> None:
        """Where each expert's rows begin."""
        counts = self.value(self.env[part.counts])
        counts = self.cast(counts, "i64")
        ends = self.b("t.cumsum", counts, dim=0)
        zero = self.b("t.slice", self.b("t.sub", ends, ends), dim=0, start=0, stop=1)
        bounds = self.b("t.concat", zero, ends, dim=0)
        self.offsets = self.b("t.cast", bounds, dtype="i32", hint="offsets")
        self.rows = part.rows.type.shape[0]


def _count(size: Any) -> tuple[fx.Node, int] | None:
    """The tensor of counts and the place in it of a number that became a Python one."""
    if not isinstance(size, fx.Node) or size.target not in _ITEMS:
        return None
    source: Any = size.args[0]
    if source.target is operator.getitem and source.args[0].target is aten.unbind.int:
        return source.args[0].args[0], int(source.args[1])
    if source.target is aten.select.int:
        return source.args[0], int(source.args[2])
    return None


class _Common:
    """What the work on all parts has in common, and the weights in which it differs."""

    def __init__(self, owner: RaggedImporter, count: int) -> None:
        self.owner, self.count = owner, count
        self.part: Part | None = None
        self.rows: dict[fx.Node, Value] = {}
        self.weights: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.inner: dict[fx.Node, None] = {}

    def compare(self, nodes: Sequence[fx.Node]) -> None:
        """Compare corresponding nodes of all parts."""
        first = nodes[0]
        if first in self.inner or first in self.rows:
            return
        if all(n is first for n in nodes) and not self.owner.is_put_off(first):
            return
        if isinstance(self.owner.env.get(first), Part):
            self.same_part(nodes)
        elif all(self.owner.is_put_off(n) for n in nodes):
            self.same_call(nodes)
        else:
            self.weights[first] = tuple(nodes)

    def same_part(self, nodes: Sequence[fx.Node]) -> None:
        parts = [self.owner.env.get(n) for n in nodes]
        kept = [p for p in parts if isinstance(p, Part)]
        if [p.index for p in kept] != list(range(self.count)):
            raise CaptureError("the parts of the rows are joined in another order")
        if len({(p.rows, p.counts) for p in kept}) != 1:
            raise CaptureError("the parts come from several splits")
        if self.part is not None and self.part.counts is not kept[0].counts:
            raise CaptureError("the parts come from splits by different counts")
        self.part = kept[0]
        self.rows[nodes[0]] = kept[0].rows

    def same_call(self, nodes: Sequence[fx.Node]) -> None:
        if len({n.target for n in nodes}) != 1 or len({len(n.args) for n in nodes}) != 1:
            raise CaptureError("the experts do not compute the same")
        for arguments in zip(*(n.args for n in nodes), strict=True):
            self.same_argument(arguments)
        for key in nodes[0].kwargs:
            self.same_argument([n.kwargs.get(key) for n in nodes])
        self.inner[nodes[0]] = None

    def same_argument(self, arguments: Sequence[Any]) -> None:
        if all(isinstance(a, fx.Node) for a in arguments):
            if not isinstance(arguments[0].meta.get("val"), torch.SymInt):
                self.compare(arguments)
        elif all(isinstance(a, list | tuple) for a in arguments):
            for members in zip(*arguments, strict=True):
                self.same_argument(members)
        elif any(a != arguments[0] for a in arguments):
            raise CaptureError("a number in the work on the rows depends on the expert")

    def leaves(self, owner: RaggedImporter) -> Mapping[fx.Node, Any]:
        """The rows, and each weight that differs as a stack with one part an expert."""
        stacks = {first: ExpertSlice(_stack(owner, nodes)) for first, nodes in self.weights.items()}
        return {**self.rows, **stacks}

    def order(self) -> list[fx.Node]:
        """The nodes of the first part's work, in the order of the graph."""
        return list(self.inner)


def _stack(owner: RaggedImporter, nodes: Sequence[fx.Node]) -> Value:
    """The stacked weight whose parts the nodes are, or the nodes' values stacked."""
    if all(n.target is aten.select.int for n in nodes):
        places = [n.args[1:] for n in nodes]
        same = len({n.args[0] for n in nodes}) == 1
        if same and places == [(0, index) for index in range(len(nodes))]:
            whole: Value = owner.value(owner.env[nodes[0].args[0]])  # type: ignore[index]
            if whole.type.shape[0] == len(nodes):
                return whole
    values = [owner.value(owner.env[n]) for n in nodes]
    made: Value = owner.b("t.stack", *values, hint=values[0].hint)
    return made


__all__ = ["Part", "PutOff", "RaggedImporter"]

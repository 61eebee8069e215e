"""Compiled regions in a captured step: each pass as the parts that a plan may order and repeat."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.codegen.parts import Part
from moec.ir.graph import Value
from moec.runtime.library import fake_results, pass_of
from moec.runtime.part_ops import PartOp, part_ops


def cut_regions(graph: fx.Graph) -> None:
    """Put parts in the place of each pass of a compiled region, where it has several."""
    for node in list(graph.nodes):
        found = pass_of(node.target)
        if found is not None:
            artifact, is_backward = found
            parts = part_ops(artifact)
            ops = parts.backward if is_backward else parts.forward
            if ops:
                _Cut(graph, node, *artifact.signature(is_backward)).replace(ops)


class _Cut:
    """A node, a pass that takes and returns lists of tensors, on its way to be several; ``values``
    are the nodes that a value of the program is known by.
    """

    def __init__(
        self, graph: fx.Graph, node: fx.Node, takes: Sequence[Value], results: Sequence[Value]
    ) -> None:
        self.graph, self.node = graph, node
        (arguments,) = node.args
        given: Any = arguments
        self.values: dict[Value, fx.Node] = dict(zip(takes, given, strict=True))
        # a value may be returned several times
        self.places = {v: iter([k for k, r in enumerate(results) if r is v]) for v in results}
        self.results: dict[object, fx.Node] = {}

    def replace(self, ops: Sequence[PartOp]) -> None:
        """Write the parts, let readers read what they make, and erase the node."""
        with self.graph.inserting_before(self.node):
            for op in ops:
                self._write(op)
        for user in list(self.node.users):
            user.replace_all_uses_with(self.results[user.args[1]])
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _write(self, op: PartOp) -> None:
        function = op.part.function
        read = [self.values[v] for v in function.reads]
        numbers = [next(self.places.get(v, iter(())), None) for v in function.makes]
        known: Sequence[torch.Tensor] = self.node.meta["val"]
        fakes = fake_results(op.artifact.graph, function.reads, function.makes, _tensors(read))
        made = [f if n is None else known[n] for f, n in zip(fakes, numbers, strict=True)]
        call = self._called(op.op, (read,), made, op.part)
        for place, (value, number) in enumerate(zip(function.makes, numbers, strict=True)):
            result = self._called(operator.getitem, (call, place), made[place], op.part)
            self.values.setdefault(value, result)
            self.results[number] = result

    def _called(self, target: Any, args: tuple[Any, ...], made: Any, part: Part) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {**self.node.meta, "val": made, "stack_trace": _trace(self.node.meta, part)}
        return node


def _tensors(nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
    return [node.meta["val"] for node in nodes]


def _trace(meta: Mapping[str, Any], part: Part) -> str:
    """Where in the model a part is from: the call of the block, and the line in it."""
    outer = str(meta.get("stack_trace") or "")
    if part.loc is None:
        return outer
    return f'{outer}\n  File "{part.loc.file}", line {part.loc.line}, in {part.loc.module}'


__all__ = ["cut_regions"]

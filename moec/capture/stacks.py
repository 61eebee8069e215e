"""Loops over stacked weights in a block's own code: what one expert computes, cut out of a
recording.

Everything that is computed from one expert's part of the weights and from the rows of its tokens
alone is that expert; the rest is the loop. What was recorded for one expert is then run with the
parts of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moec.capture.counts import takes_rows
from moec.capture.lists import PICKING, has_code
from moec.capture.recorder import Constant, Recorder
from moec.errors import CaptureError
from moec.structure import names_read

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.linear.default, aten.bmm.default)


def stacked_experts(module: nn.Module) -> int | None:
    """The number of experts whose stacked weights a module holds itself and picks rows for."""
    sizes = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    cls: Any = type(module)
    routes = not names_read(cls).isdisjoint(PICKING)
    if len(sizes) != 1 or not routes or not has_code(module) or not takes_rows(module):
        return None
    experts = int(sizes.pop())
    return experts if experts > 1 else None


@dataclass(frozen=True)
class Cut:
    """One expert in a recording: its number, the rows that it is called on, its operations in
    order, and the last of them.
    """

    expert: int
    rows: fx.Node
    nodes: Sequence[fx.Node]
    result: fx.Node


def cuts(recorder: Recorder, experts: int) -> list[Cut]:
    """Every expert's part of a recording; :class:`CaptureError` where one has no single result."""
    owner: dict[fx.Node, int] = {}
    rows: dict[int, fx.Node] = {}
    for node in recorder.graph.nodes:
        expert = _picked(node, experts)
        expert = _joined(node, owner, rows) if expert is None else expert
        if expert is not None:
            owner[node] = expert
    return [_cut(expert, rows[expert], owner) for expert in sorted(rows)]


def _picked(node: fx.Node, experts: int) -> int | None:
    """The expert whose part of a stacked weight a node is."""
    if node.target is not aten.select.int or node.args[1] != 0:
        return None
    source: Any = node.args[0]
    stacked = source.op == "placeholder" and source.meta["val"].shape[0] == experts
    return int(node.args[2]) % experts if stacked and source.target != "x" else None  # type: ignore[arg-type]


def _joined(node: fx.Node, owner: dict[fx.Node, int], rows: dict[int, fx.Node]) -> int | None:
    """The expert that an operation belongs to: all that it reads is the expert's, or the rows."""
    found = {owner[n] for n in node.all_input_nodes if n in owner}
    if len(found) != 1:
        return None
    expert = found.pop()
    outside = [n for n in node.all_input_nodes if n not in owner]
    if outside and expert not in rows and node.target in _PRODUCTS:
        rows[expert] = outside[0]
    same = all(expert in rows and _is_same(n, rows[expert]) for n in outside)
    return expert if same else None


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes read the same rows, perhaps picked twice."""
    if one is other:
        return True
    first, second = one.meta["val"], other.meta["val"]
    return one.target is other.target and first.shape == second.shape and torch.equal(first, second)


def _cut(expert: int, rows: fx.Node, owner: dict[fx.Node, int]) -> Cut:
    nodes = [n for n, number in owner.items() if number == expert]
    last = [n for n in nodes if any(user not in owner for user in n.users)]
    if len(last) != 1:
        raise CaptureError(f"expert {expert} gives {len(last)} values to the loop, not one")
    return Cut(expert, rows, nodes, last[0])


def collapse(recorder: Recorder, cut: Cut, target: Any) -> None:
    """Put one opaque call in place of an expert's operations."""
    graph, value = recorder.graph, cut.result.meta["val"]
    with graph.inserting_after(cut.result):
        call = graph.call_function(target, (cut.rows, cut.expert))
    call.meta.update(val=value, location=cut.result.meta.get("location"))
    for user in list(cut.result.users):
        if user not in cut.nodes:
            user.replace_input_with(cut.result, call)
    recorder.nodes.update({k: call for k, n in recorder.nodes.items() if n is cut.result})


class Part(nn.Module):
    """One expert of stacked weights as a module: a recorded expert, run with its part of them."""

    def __init__(self, owner: nn.Module, cut: Cut, expert: int) -> None:
        super().__init__()
        self.hidden_size = int(cut.rows.meta["val"].shape[-1])
        self.__dict__.update(owner=owner, cut=cut, expert=expert)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expert's output for rows ``[N, H]``."""
        cut: Any = self.cut
        env: dict[fx.Node, Any] = {}
        for node in cut.nodes:
            env[node] = self._run(node, env, x, int(cut.rows.meta["val"].shape[0]))
        result: torch.Tensor = env[cut.result]
        return result

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], x: torch.Tensor, rows: int) -> Any:
        def tensor(argument: fx.Node) -> Any:
            if argument in env:
                return env[argument]
            return self._weight(argument) if argument.op == "placeholder" else x

        args = [_argument(a, tensor, rows, x.shape[0]) for a in node.args]
        kwargs = {k: _argument(v, tensor, rows, x.shape[0]) for k, v in node.kwargs.items()}
        if node.target is aten.select.int and node.args[0].op == "placeholder":  # type: ignore[union-attr]
            args[2] = self.expert
        if not callable(node.target):
            raise CaptureError(f"{node.target} cannot be run again")
        return node.target(*args, **kwargs)

    def _weight(self, node: fx.Node) -> Any:
        owner, _, name = str(node.target).rpartition(".")
        block: Any = self.owner
        return getattr(block.get_submodule(owner), name)


def _argument(argument: Any, tensor: Callable[[fx.Node], Any], rows: int, wanted: int) -> Any:
    """An argument of a recorded call for another number of rows."""
    if isinstance(argument, fx.Node):
        return tensor(argument)
    if isinstance(argument, Constant):
        return argument.tensor
    if isinstance(argument, list | tuple):
        sizes = [wanted if a == rows and isinstance(a, int) else a for a in argument]
        return type(argument)(_argument(a, tensor, rows, wanted) for a in sizes)
    return argument


def template(found: Sequence[Cut], sizes: set[int]) -> Cut:
    """The expert to run for all others: its number of rows must be no other size."""
    for cut in found:
        if int(cut.rows.meta["val"].shape[0]) > 1 and cut.rows.meta["val"].shape[0] not in sizes:
            return cut
    raise CaptureError("no expert got a number of tokens that tells rows from other sizes")


__all__ = ["Cut", "Part", "collapse", "cuts", "stacked_experts", "template"]

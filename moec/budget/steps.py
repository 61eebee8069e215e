"""A captured training step as executions: each a heavy operation, or a group of light ones that
leads to one result.

Light operations (pointwise, reductions, casts) cost what they read and write. One whose result
nothing but a single group needs belongs to that group; its result is never kept. A cast belongs to
every group that reads it. Where groups are compiled, so does any pointwise operation that reads no
more bytes than it makes: then it costs nothing there, and less is kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from moec.budget.values import Memories, Memory, is_number, number_at, size_at
from moec.errors import PlanError

aten = torch.ops.aten

_REDUCTIONS = frozenset(
    [
        aten.sum,
        aten.mean,
        aten.amax,
        aten.amin,
        aten.var,
        aten._softmax,
        aten._log_softmax,
        aten._softmax_backward_data,
        aten._log_softmax_backward_data,
        aten.cumsum,
    ]
)
_COPIES = frozenset(
    [
        aten.clone,
        aten.cat,
        aten.full,
        aten.full_like,
        aten.zeros,
        aten.zeros_like,
        aten.ones,
        aten.ones_like,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
        aten.arange,
        aten.scalar_tensor,
        aten.slice_backward,
        aten.select_backward,
        aten.constant_pad_nd,
    ]
)
_CASTS = frozenset([aten._to_copy, torch.ops.prims.convert_element_type])


@dataclass(frozen=True, eq=False)
class Step:
    """What is executed at once: ``nodes`` in order, views among them. ``reads`` is what it takes
    from other executions, ``makes`` what others may take; parameters and inputs are in neither.

    ``is_backward``: it needs the gradient of the outputs; ``may_repeat``: another run gives the
    same bits and changes nothing else.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[Memory, ...]
    makes: tuple[Memory, ...]
    is_backward: bool
    may_repeat: bool

    @property
    def main(self) -> fx.Node:
        """The node that the step is for: a heavy operation, or the last of a group."""
        computed = [n for n in self.nodes if n.target is not operator.getitem]
        return computed[-1]


@dataclass(frozen=True)
class Captured:
    """A joint graph, read: its steps in order, its nodes' memory, the outputs of its two passes.
    Of what it returns the first ``forward_count`` are the forward's, of which some may be none.
    """

    graph: fx.Graph
    memories: Memories
    steps: tuple[Step, ...]
    forward_count: int
    forward_outputs: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]


def read_joint(
    graph: fx.Graph, forward_outputs: int, fused_at: Mapping[sympy.Symbol, int] | None = None
) -> Captured:
    """Read a joint graph of which the first ``forward_outputs`` outputs are the forward's;
    ``fused_at``: sizes of a step whose groups are compiled, ``None`` if they run one by one.

    Raises:
        PlanError: an operation changes its input, which no plan may run again or move.
    """
    (output,) = graph.find_nodes(op="output")
    returned = list(output.args[0])
    placeholders = graph.find_nodes(op="placeholder")
    tangents = tuple(n for n in placeholders if is_tangent(n))
    memories = Memories(graph)
    ahead = _nodes(returned[:forward_outputs])
    behind = _nodes(returned[forward_outputs:])
    steps = _Grouping(graph, memories, tangents, {*ahead, *behind}, fused_at).steps()
    inputs = tuple(n for n in placeholders if not is_tangent(n))
    return Captured(graph, memories, tuple(steps), forward_outputs, ahead, behind, inputs, tangents)


def _nodes(values: Sequence[object]) -> tuple[fx.Node, ...]:
    return tuple(v for v in values if isinstance(v, fx.Node))


def is_tangent(node: fx.Node) -> bool:
    """Whether a placeholder is the gradient of an output, by the name that AOTAutograd gives it."""
    return node.op == "placeholder" and "tangents" in str(node.target)


class _Grouping:
    """Which nodes are executed together."""

    def __init__(
        self,
        graph: fx.Graph,
        memories: Memories,
        tangents: Sequence[fx.Node],
        returned: set[fx.Node],
        fused_at: Mapping[sympy.Symbol, int] | None,
    ) -> None:
        self.memories, self.returned, self.fused_at = memories, returned, fused_at
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self.operations = [node for node in graph.nodes if self._is_operation(node)]
        for node in self.operations:
            _check_has_no_effect(node)
        self.behind = _behind(graph, tangents)
        self.root_of = self._roots()

    def steps(self) -> Iterator[Step]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.operations:
            for root in self.root_of[node]:
                members.setdefault(root, []).append(node)
        for root in sorted(members, key=self.place.__getitem__):
            yield self._step(root, members[root])

    def _step(self, root: fx.Node, members: Sequence[fx.Node]) -> Step:
        nodes, made = self._with_views(members), set(members)
        reads: dict[Memory, None] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                reads.update(dict.fromkeys(self.memories.of(source)))
        external = [m for m in reads if m.maker not in made and not _is_resident(m.maker)]
        makes = tuple(self.memories.made_by(root))
        may_repeat = not draws_random_numbers(root)
        return Step(tuple(nodes), tuple(external), makes, root in self.behind, may_repeat)

    def _with_views(self, members: Sequence[fx.Node]) -> list[fx.Node]:
        """Operations, their results one by one, and the views that lead from one to another."""
        found: set[fx.Node] = set()
        own = set(members)
        for node in members:
            found.add(node)
            found.update(u for u in node.users if u.target is operator.getitem)
            waiting = [s for s in node.all_input_nodes if self.memories.is_view(s)]
            while waiting:
                view = waiting.pop()
                makers = {m.maker for m in self.memories.of(view)}
                if view not in found and makers & own and view.op == "call_function":
                    found.add(view)
                    waiting += [s for s in view.all_input_nodes if self.memories.is_view(s)]
        return sorted(found, key=self.place.__getitem__)

    def _is_operation(self, node: fx.Node) -> bool:
        if node.op != "call_function" or is_number(node):
            return False
        return node.target is not operator.getitem and not self.memories.is_view(node)

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """The operations that read what an operation makes, and the outputs that show it."""
        found: set[fx.Node] = set()
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            if user.op == "output" or user in self.returned:
                found.add(user)
            if user.op == "call_function" and self._passes_on(user):
                waiting += user.users
            elif user.op == "call_function" and not is_number(user):
                found.add(user)
        return found

    def _passes_on(self, node: fx.Node) -> bool:
        return node.target is operator.getitem or self.memories.is_view(node)

    def _roots(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The groups of each operation, named by their last one."""
        roots: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in reversed(self.operations):
            readers = self._readers(node)
            inside = is_light(node) and node not in self.returned
            inside = inside and all(r in roots and is_light(r) for r in readers)
            groups = {root for r in readers for root in roots.get(r, ())} if inside else set()
            if not groups or (len(groups) > 1 and not self._is_repeated(node, readers)):
                roots[node] = (node,)
            else:
                roots[node] = tuple(sorted(groups, key=self.place.__getitem__))
        return roots

    def _is_repeated(self, node: fx.Node, readers: Iterable[fx.Node]) -> bool:
        """Whether every group that reads an operation has it: a cast, or what is no more to read
        than its result is, and is computed for no more elements.
        """
        if is_cast(node) or self.fused_at is None:
            return is_cast(node)
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return False
        reads = {m for source in node.all_input_nodes for m in self._before_casts(source)}
        (made,) = self.memories.of(node)
        bytes_read = sum(size_at(m.size, self.fused_at) for m in reads)
        elements = _elements(node, self.fused_at)
        is_broadcast = any(
            torch.Tag.pointwise in getattr(r.target, "tags", ())
            and _elements(r, self.fused_at) > elements
            for r in readers
        )
        return bytes_read <= size_at(made.size, self.fused_at) and not is_broadcast

    def _before_casts(self, node: fx.Node) -> Iterator[Memory]:
        """The memory that a group reads for a node; casts are made in the group."""
        for memory in self.memories.of(node):
            if memory.maker.op == "call_function" and is_cast(memory.maker):
                yield from self._before_casts(memory.maker.all_input_nodes[0])
            else:
                yield memory


def _elements(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> int:
    return math.prod(number_at(size, sizes) for size in node.meta["val"].shape)


def _is_resident(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "placeholder" and not is_tangent(node))


def _behind(graph: fx.Graph, tangents: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that need the gradient of an output."""
    found = set(tangents)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_light(node: fx.Node) -> bool:
    """Whether an operation costs what it reads and writes, and can be one kernel with others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or isinstance(node.meta.get("val"), tuple):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    packet = target.overloadpacket
    return torch.Tag.pointwise in target.tags or packet in _REDUCTIONS | _COPIES | _CASTS


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of a light operation's result follows from one of each source."""
    made_of_nothing = not any(
        isinstance(s.meta.get("val"), torch.Tensor) for s in node.all_input_nodes
    )
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return is_light(node) and (is_pointwise or is_cast(node) or made_of_nothing)


def is_cast(node: fx.Node) -> bool:
    """Whether an operation only changes the number format."""
    return getattr(node.target, "overloadpacket", None) in _CASTS


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; attention without dropout draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments: Any = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    defaults = {a.name: a.default_value for a in arguments}
    return bool(given.get("dropout_p", defaults.get("dropout_p", 1.0)) != 0.0)


def _check_has_no_effect(node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        where = node.meta.get("stack_trace", "").strip().splitlines()
        raise PlanError(
            f"{node.target} changes its input{': ' + where[-1].strip() if where else ''}; a step"
            " under a memory budget may run operations again, so none may have an effect"
        )


__all__ = [
    "Captured",
    "Step",
    "draws_random_numbers",
    "is_cast",
    "is_elementwise",
    "is_light",
    "is_tangent",
    "read_joint",
]

"""What a graph holds in memory: at each op, at the peak, and between forward and backward.

Inputs are not counted: the caller holds those. Nor is what an op needs only while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.cost import saved_values, total_bytes
from moec.ir.dims import Dim, evaluate
from moec.ir.graph import Graph, Op, Value, backward_ops


@dataclass(frozen=True)
class MemoryUse:
    """The peak of a graph at some sizes: the op where it is, its place among all, what lives there;
    what is held between forward and backward; what is returned. Values are in order of size.
    """

    graph: Graph
    sizes: Mapping[str, int]
    peak: int
    place: int
    op: Op
    alive: tuple[Value, ...]
    held: tuple[Value, ...]

    def bytes(self, values: Sequence[Value]) -> int:
        """The size of values at these sizes."""
        return sum(evaluate(v.type.bytes, self.sizes) for v in values)

    @property
    def is_backward(self) -> bool:
        """Whether the peak is in the backward pass."""
        return self.op in backward_ops(self.graph)


def memory_use(graph: Graph, sizes: Mapping[str, int]) -> MemoryUse | None:
    """Where the peak is and what makes it; ``None`` for a graph without ops."""
    if not graph.ops:
        return None
    ops = in_order(graph)
    live = live_bytes(graph, sizes)
    place = max(range(len(live)), key=lambda i: live[i])
    alive = [v for v, (low, high) in lifetimes(graph).items() if low <= place <= high]
    held = saved_values(graph) if graph.cotangents else []
    return MemoryUse(
        graph,
        sizes,
        live[place],
        place,
        ops[place],
        by_size(alive, sizes),
        by_size(held, sizes),
    )


def by_size(values: Sequence[Value], sizes: Mapping[str, int]) -> tuple[Value, ...]:
    """The largest first."""
    return tuple(sorted(values, key=lambda v: -evaluate(v.type.bytes, sizes)))


def in_order(graph: Graph) -> tuple[Op, ...]:
    """The ops as they run: those of the forward pass before all of the backward pass."""
    behind = backward_ops(graph)
    return (*(o for o in graph.ops if o not in behind), *(o for o in graph.ops if o in behind))


def lifetimes(graph: Graph) -> dict[Value, tuple[int, int]]:
    """The places of the ops between which each value lives, inputs not among them.

    A value lives from the op that makes it to its last reader; what the graph returns, to the end.
    """
    made: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for place, op in enumerate(in_order(graph)):
        made.update((v, place) for v in op.results)
        last.update((v, place) for v in (*op.operands, *op.results))
    last.update((v, len(graph.ops) - 1) for v in graph.returned)
    return {value: (place, last[value]) for value, place in made.items()}


def live_bytes(graph: Graph, sizes: Mapping[str, int]) -> list[int]:
    """Bytes of the values that exist while each op runs, in the order in which they run."""
    changes = [0] * (len(graph.ops) + 1)
    for value, (low, high) in lifetimes(graph).items():
        size = evaluate(value.type.bytes, sizes)
        changes[low] += size
        changes[high + 1] -= size
    live, total = [], 0
    for change in changes[:-1]:
        total += change
        live.append(total)
    return live


def expression(values: Sequence[Value]) -> Dim:
    """The bytes of values for every size."""
    return total_bytes(list(values))


__all__ = ["MemoryUse", "expression", "in_order", "lifetimes", "live_bytes", "memory_use"]

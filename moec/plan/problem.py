"""The planning problem: nodes with sizes and durations, edges, and the order they were given in.

Memory is counted as in Checkmate (Jain et al., MLSys 2020) and Moccasin (Bartan et al., ICML
2023): while a node runs, its inputs and its outputs are held at once, and its workspace beside
them; an output stays until its last use. An operation may have several outputs, each with readers
and a lifetime of its own. Running it again makes all of them anew: each use reads what the latest
run before it made, so a copy of an earlier run is of no use from the next run on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from moec.errors import PlanError

# Sums of sizes are kept in 64 bits; four bits are left for sums of sums.
LARGEST_TOTAL = 2**59


@dataclass(frozen=True, init=False)
class Node:
    """One operation.

    ``outputs``: bytes of each of its outputs, of which there may be none; ``duration``: time of one
    execution, in any unit; ``workspace``: bytes that are needed only while it runs; ``keep``: for
    each output, whether it must still be held at the end; ``rematable``: it may run more than once.

    A number is taken for the one output of the usual operation, a bool for all outputs:
    ``Node("relu", 4, 1.0, keep=True)``.
    """

    name: str
    outputs: tuple[int, ...]
    duration: float
    workspace: int
    keep: tuple[bool, ...]
    rematable: bool

    def __init__(
        self,
        name: str,
        outputs: int | Sequence[int],
        duration: float,
        workspace: int = 0,
        keep: bool | Sequence[bool] = False,
        rematable: bool = True,
    ) -> None:
        sizes = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        kept = (keep,) * len(sizes) if isinstance(keep, bool) else tuple(keep)
        fields = (name, sizes, duration, workspace, kept, rematable)
        for field, value in zip(self.__dataclass_fields__, fields, strict=True):
            object.__setattr__(self, field, value)

    @property
    def size(self) -> int:
        """Bytes of all its outputs."""
        return sum(self.outputs)


# An end of an edge: an output of a node, or a node, which stands for its first output
Source: TypeAlias = int | tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """A directed acyclic graph of nodes; ``order`` is a topological order of it.

    All outputs are numbered, node by node: they are the *values*. ``reads[v]`` are the values that
    node ``v`` reads, each once. Where every node has one output, its value has the node's number.
    ``resident`` bytes are held all the time.
    """

    name: str
    nodes: tuple[Node, ...]
    reads: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    resident: int = 0

    @cached_property
    def made(self) -> tuple[range, ...]:
        """The values that each node makes."""
        ends = [0, *itertools.accumulate(len(node.outputs) for node in self.nodes)]
        return tuple(itertools.starmap(range, itertools.pairwise(ends)))

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The node that makes each value."""
        return tuple(node for node, values in enumerate(self.made) for _ in values)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each value."""
        return tuple(size for node in self.nodes for size in node.outputs)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The values that must be held at the end."""
        flags = (keep for node in self.nodes for keep in node.keep)
        return tuple(itertools.compress(range(len(self.sizes)), flags))

    @cached_property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that each node reads from, each once."""
        return tuple(tuple(dict.fromkeys(self.owners[w] for w in read)) for read in self.reads)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that read from each node, each once."""
        return _transposed(self.inputs, len(self.nodes))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that read each value."""
        return _transposed(self.reads, len(self.sizes))

    @cached_property
    def ended(self) -> Problem:
        """The problem with one node more, the end, which costs nothing and reads what is kept."""
        end = Node("end", (), 0.0, rematable=False)
        order = (*self.order, len(self.nodes))
        return replace(self, nodes=(*self.nodes, end), reads=(*self.reads, self.kept), order=order)

    @property
    def least_time(self) -> float:
        """The time of running every node once."""
        return math.fsum(node.duration for node in self.nodes)

    def working_set(self, node: int) -> int:
        """Bytes that the execution of a node needs whatever the plan."""
        read = sum(self.sizes[value] for value in self.reads[node])
        return self.resident + read + self.nodes[node].size + self.nodes[node].workspace

    def time_of(self, sequence: Sequence[int]) -> float:
        """The time of running these nodes."""
        return math.fsum(self.nodes[node].duration for node in sequence)

    def value_name(self, value: int) -> str:
        """What a value is called: its node's name, and which output where there are several."""
        owner = self.owners[value]
        several = len(self.nodes[owner].outputs) > 1
        output = f" (output {value - self.made[owner].start})" if several else ""
        return self.nodes[owner].name + output


def _transposed(lists: Sequence[Sequence[int]], count: int) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(count)]
    for place, one in enumerate(lists):
        for item in one:
            found[item].append(place)
    return tuple(map(tuple, found))


def make_problem(
    name: str,
    nodes: Sequence[Node],
    edges: Sequence[tuple[Source, int]],
    order: Sequence[int] | None = None,
    resident: int = 0,
) -> Problem:
    """A checked problem; without ``order``, the topological order of least node numbers.

    An edge is ``((source, output), user)``, or ``(source, user)`` for the source's first output.

    Raises:
        PlanError: for a size or duration that is negative, not finite or too large, an edge that
            leads nowhere, a cycle (which it names), or an order that is no topological order.
    """
    _check_numbers(name, nodes, resident)
    starts = [0, *itertools.accumulate(len(node.outputs) for node in nodes)]
    reads: list[dict[int, None]] = [{} for _ in nodes]
    for place, (end, user) in enumerate(edges):
        source, output = (end, 0) if isinstance(end, int) else end
        _check_edge(f"{name}: edges[{place}]", nodes, source, output, user)
        reads[user][starts[source] + output] = None
    problem = Problem(name, tuple(nodes), tuple(map(tuple, reads)), (), resident)
    first = _topological_order(problem)
    given = tuple(first if order is None else order)
    _check_order(name, given, problem.inputs)
    return replace(problem, order=given)


def _check_edge(where: str, nodes: Sequence[Node], source: int, output: int, user: int) -> None:
    for end in (source, user):
        if not 0 <= end < len(nodes):
            raise PlanError(f"{where} names node {end}; there are {len(nodes)}")
    count = len(nodes[source].outputs)
    if not 0 <= output < count:
        raise PlanError(f"{where} names output {output} of node {source}, which has {count}")


def _check_numbers(name: str, nodes: Sequence[Node], resident: int) -> None:
    total = resident
    for place, node in enumerate(nodes):
        where = f"{name}: nodes[{place}] ({node.name})"
        least = min(*node.outputs, node.workspace, 0)
        if least < 0:
            raise PlanError(f"{where}: a size is negative: {least}")
        if len(node.keep) != len(node.outputs):
            raise PlanError(
                f"{where}: keep has {len(node.keep)} values for {len(node.outputs)} outputs"
            )
        if not (math.isfinite(node.duration) and node.duration >= 0):
            raise PlanError(f"{where}: a duration of {node.duration} is not finite and positive")
        total += node.size + node.workspace
    if resident < 0:
        raise PlanError(f"{name}: the resident bytes are negative: {resident}")
    if total > LARGEST_TOTAL:
        raise PlanError(f"{name}: the sizes sum to {total}; at most {LARGEST_TOTAL} can be planned")
    if not math.isfinite(math.fsum(node.duration for node in nodes)):
        raise PlanError(f"{name}: the durations sum to more than a float can hold")


def _topological_order(problem: Problem) -> list[int]:
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(problem.nodes)))
    graph.add_edges_from((u, v) for v, sources in enumerate(problem.inputs) for u in sources)
    try:
        return list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible as error:
        cycle = [u for u, _ in nx.find_cycle(graph)]
        names = " -> ".join(problem.nodes[v].name for v in [*cycle, cycle[0]])
        raise PlanError(f"{problem.name}: the graph has a cycle: {names}") from error


def _check_order(name: str, order: Sequence[int], inputs: Sequence[Sequence[int]]) -> None:
    if sorted(order) != list(range(len(inputs))):
        raise PlanError(f"{name}: order must hold each of the {len(inputs)} nodes once")
    place = {node: index for index, node in enumerate(order)}
    for node, sources in enumerate(inputs):
        for source in sources:
            if place[source] > place[node]:
                raise PlanError(f"{name}: order has node {node} before its input {source}")

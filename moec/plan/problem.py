"""The planning problem: nodes with sizes and durations, edges, and the order they were given in.

Memory is counted as in Checkmate (Jain et al., MLSys 2020) and Moccasin (Bartan et al., ICML
2023): while a node runs, its inputs and its output are held at once, and its workspace beside
them; an output stays until its last use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moec.errors import PlanError

# Sums of sizes are kept in 64 bits; four bits are left for sums of sums.
LARGEST_TOTAL = 2**59


@dataclass(frozen=True)
class Node:
    """One operation.

    ``size``: bytes of its output; ``duration``: time of one execution, in any unit;
    ``workspace``: bytes that are needed only while it runs; ``keep``: the output must still be
    held at the end; ``rematable``: it may run more than once.
    """

    name: str
    size: int
    duration: float
    workspace: int = 0
    keep: bool = False
    rematable: bool = True


@dataclass(frozen=True)
class Problem:
    """A directed acyclic graph of nodes; ``order`` is a topological order of it.

    ``inputs[v]`` are the nodes whose outputs node ``v`` reads, each once; ``resident`` bytes are
    held all the time.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    resident: int = 0

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that read each node's output."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for node, inputs in enumerate(self.inputs):
            for source in inputs:
                found[source].append(node)
        return tuple(map(tuple, found))

    @property
    def least_time(self) -> float:
        """The time of running every node once."""
        return math.fsum(node.duration for node in self.nodes)

    def working_set(self, node: int) -> int:
        """Bytes that the execution of a node needs whatever the plan."""
        read = sum(self.nodes[source].size for source in self.inputs[node])
        return self.resident + read + self.nodes[node].size + self.nodes[node].workspace

    def time_of(self, sequence: Sequence[int]) -> float:
        """The time of running these nodes."""
        return math.fsum(self.nodes[node].duration for node in sequence)


def make_problem(
    name: str,
    nodes: Sequence[Node],
    edges: Sequence[tuple[int, int]],
    order: Sequence[int] | None = None,
    resident: int = 0,
) -> Problem:
    """A checked problem; without ``order``, the topological order of least node numbers.

    Raises:
        PlanError: for a size or duration that is negative, not finite or too large, an edge that
            leads nowhere, a cycle (which it names), or an order that is no topological order.
    """
    inputs: list[dict[int, None]] = [{} for _ in nodes]
    for place, (source, user) in enumerate(edges):
        for end in (source, user):
            if not 0 <= end < len(nodes):
                raise PlanError(f"{name}: edges[{place}] names node {end}; there are {len(nodes)}")
        inputs[user][source] = None
    frozen = tuple(map(tuple, inputs))
    _check_numbers(name, nodes, resident)
    first = _topological_order(name, nodes, frozen)
    given = tuple(first if order is None else order)
    _check_order(name, given, frozen)
    return Problem(name, tuple(nodes), frozen, given, resident)


def _check_numbers(name: str, nodes: Sequence[Node], resident: int) -> None:
    total = resident
    for place, node in enumerate(nodes):
        where = f"{name}: nodes[{place}] ({node.name})"
        if node.size < 0 or node.workspace < 0:
            raise PlanError(f"{where}: a size is negative: {min(node.size, node.workspace)}")
        if not (math.isfinite(node.duration) and node.duration >= 0):
            raise PlanError(f"{where}: a duration of {node.duration} is not finite and positive")
        total += node.size + node.workspace
    if resident < 0:
        raise PlanError(f"{name}: the resident bytes are negative: {resident}")
    if total > LARGEST_TOTAL:
        raise PlanError(f"{name}: the sizes sum to {total}; at most {LARGEST_TOTAL} can be planned")
    if not math.isfinite(math.fsum(node.duration for node in nodes)):
        raise PlanError(f"{name}: the durations sum to more than a float can hold")


def _topological_order(
    name: str, nodes: Sequence[Node], inputs: tuple[tuple[int, ...], ...]
) -> list[int]:
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(nodes)))
    graph.add_edges_from((u, v) for v, sources in enumerate(inputs) for u in sources)
    try:
        return list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible as error:
        cycle = [u for u, _ in nx.find_cycle(graph)]
        names = " -> ".join(nodes[v].name for v in [*cycle, cycle[0]])
        raise PlanError(f"{name}: the graph has a cycle: {names}") from error


def _check_order(name: str, order: Sequence[int], inputs: Sequence[Sequence[int]]) -> None:
    if sorted(order) != list(range(len(inputs))):
        raise PlanError(f"{name}: order must hold each of the {len(inputs)} nodes once")
    place = {node: index for index, node in enumerate(order)}
    for node, sources in enumerate(inputs):
        for source in sources:
            if place[source] > place[node]:
                raise PlanError(f"{name}: order has node {node} before its input {source}")

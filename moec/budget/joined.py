"""A step as a partitioner of PyTorch cut it: light operations repeated where that saves traffic.

A group of light operations is one kernel. What a kernel of the backward pass can compute again from
what it reads anyway need be neither written by the forward pass nor held: PyTorch's min-cut
partitioner finds such repetitions. They are part of the graph that is planned then; which other
operations run again, and in which order all do, is the planner's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from moec.budget.steps import Captured, draws_random_numbers, read_joint
from moec.budget.values import is_number


def with_light_repeats(
    joint: fx.GraphModule, forward_outputs: int, fused_at: Mapping[sympy.Symbol, int] | None
) -> Captured:
    """A joint graph with light operations repeated in the backward pass, read as a step; see
    :func:`~moec.budget.steps.read_joint`.
    """
    passes = cut_for_kernels(joint, joint.graph, forward_outputs)
    if passes is None:
        return read_joint(joint.graph, forward_outputs, fused_at)
    found = joined(*passes, forward_outputs, fused_at)
    _take_meta(found.graph, joint.graph)
    return found


def cut_for_kernels(
    module: nn.Module, graph: fx.Graph, forward_outputs: int
) -> tuple[fx.Graph, fx.Graph] | None:
    """The forward and the backward graph of a joint one, as PyTorch's partitioner cuts it; ``None``
    for one that draws random numbers. ``module`` has what the graph refers to.
    """
    if any(map(draws_random_numbers, graph.nodes)):
        return None
    joint = fx.GraphModule(module, _copied(graph))
    with functorch_config.patch(activation_memory_budget=1.0):
        ahead, behind = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=forward_outputs
        )
    return ahead.graph, behind.graph


def _copied(graph: fx.Graph) -> fx.Graph:
    """The graph once more; the partitioner writes to what it is given."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    _take_meta(made, graph)
    return made


def _take_meta(graph: fx.Graph, given: fx.Graph) -> None:
    """What is known of each output is the same."""
    (output,), (known,) = graph.find_nodes(op="output"), given.find_nodes(op="output")
    output.meta.update(known.meta)


def joined(
    ahead: fx.Graph,
    behind: fx.Graph,
    forward_outputs: int,
    fused_at: Mapping[sympy.Symbol, int] | None = None,
) -> Captured:
    """The step that runs the forward graph, then the backward graph. Operations are grouped as
    those of a joint graph, but never across the border.

    Of what ``ahead`` returns, all after the first ``forward_outputs`` is saved for ``behind``,
    whose inputs bear the names of what they are.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    names = {n.name: n for n in ahead.nodes if n.op != "output"}
    inputs = [n for n in behind.find_nodes(op="placeholder") if str(n.target) not in names]
    for node in (*ahead.find_nodes(op="placeholder"), *inputs):
        copies[node] = graph.node_copy(node)
    results = _append(graph, ahead, copies)
    early = set(graph.nodes)
    for node in behind.find_nodes(op="placeholder"):
        if node not in copies:
            copies[node] = copies[names[str(node.target)]]
    gradients = _append(graph, behind, copies)
    saved = [node for node in dict.fromkeys(results[forward_outputs:]) if not is_number(node)]
    late = {node for node in graph.nodes if node not in early}
    given = results[:forward_outputs]
    # what is saved is read as an output, which keeps groups from crossing the border; then it is a
    # result like any other, freed after its last use
    output = graph.output((*given, *saved, *gradients))
    read = read_joint(graph, forward_outputs + len(saved), fused_at)
    output.args = ((*given, *gradients),)
    return dataclasses.replace(
        read,
        steps=tuple(dataclasses.replace(s, is_backward=s.main in late) for s in read.steps),
        forward_count=forward_outputs,
        forward_outputs=tuple(n for n in given if isinstance(n, fx.Node)),
    )


def _append(graph: fx.Graph, source: fx.Graph, copies: dict[fx.Node, Any]) -> list[Any]:
    """Copy a graph to the end of another but for its inputs; the copies of what it returns."""
    for node in source.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    (output,) = source.find_nodes(op="output")
    returned: Sequence[Any] = output.args[0]
    return [copies[v] if isinstance(v, fx.Node) else v for v in returned]


__all__ = ["cut_for_kernels", "joined", "with_light_repeats"]

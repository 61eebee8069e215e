"""A forward and a backward graph, as a partitioner made them, read as one planning problem."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from moec.budget.steps import Captured, read_joint
from moec.budget.values import is_number


def joined(ahead: fx.Graph, behind: fx.Graph, forward_outputs: int) -> Captured:
    """The step that runs the forward graph, then the backward graph. Operations are grouped as
    moec groups those of a joint graph, but never across the border.

    Of what ``ahead`` returns, all after the first ``forward_outputs`` is saved for ``behind``,
    whose inputs bear the names of what they are.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    results = _append(graph, ahead, copies, {})
    names = {node.name: copies[node] for node in ahead.nodes if node.op != "output"}
    early = set(graph.nodes)
    gradients = _append(graph, behind, copies, names)
    saved = [node for node in dict.fromkeys(results[forward_outputs:]) if not is_number(node)]
    late = [node for node in graph.nodes if node not in early]
    graph.output((*results[:forward_outputs], *saved, *gradients))
    return _with_border(graph, late, forward_outputs, len(saved))


def _append(
    graph: fx.Graph, source: fx.Graph, copies: dict[fx.Node, Any], known: dict[str, Any]
) -> list[Any]:
    """Copy a graph to the end of another; inputs that are known by name are not new. Returns the
    copies of what it returns.
    """
    for node in source.nodes:
        if node.op == "placeholder" and str(node.target) in known:
            copies[node] = known[str(node.target)]
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    (output,) = source.find_nodes(op="output")
    return [copies[v] if isinstance(v, fx.Node) else v for v in output.args[0]]


def _with_border(
    graph: fx.Graph, behind: Sequence[fx.Node], forward_outputs: int, saved: int
) -> Captured:
    """What is saved is read as an output, which keeps groups from crossing the border; then it is
    a result like any other, freed after its last use.
    """
    read = read_joint(graph, forward_outputs + saved)
    late = set(behind)
    steps = tuple(dataclasses.replace(s, is_backward=s.main in late) for s in read.steps)
    given = read.forward_outputs[: len(read.forward_outputs) - saved]
    return dataclasses.replace(
        read, steps=steps, forward_count=forward_outputs, forward_outputs=given
    )


__all__ = ["joined"]

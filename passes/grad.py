"""Differentiation as a pass."""

from __future__ import annotations

from moec.autodiff import differentiate
from moec.ir.graph import Graph
from moec.manager import register


@register("grad")
def grad(graph: Graph, *, wanted: str = "", exact: bool = False) -> Graph:
    """Turn a forward graph into a joint forward-backward graph.

    ``wanted`` lists the inputs to differentiate by name, joined with "+"; empty means every float
    input. Reverse mode, one ``vjp`` an op; a joint graph stays as it is. ``exact``: what a float64
    graph computes in a smaller dtype rounds in its gradient as it does in autograd.
    """
    if graph.cotangents:
        return graph
    names = set(filter(None, wanted.split("+")))
    inputs = [v for v in graph.inputs if v.type.is_float and (not names or v.hint in names)]
    return differentiate(graph, inputs, exact)

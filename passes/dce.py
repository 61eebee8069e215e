"""Dead-code elimination."""

from __future__ import annotations

from moec.ir.graph import Graph, Value
from moec.manager import register


@register("dce")
def dce(graph: Graph) -> Graph:
    """Drop ops whose results nothing uses.

    Keeps every input, so the graph's signature stays.
    """
    live: set[Value] = set(graph.returned)
    kept = []
    for op in reversed(graph.ops):
        if any(v in live for v in op.results):
            kept.append(op)
            live.update(op.operands)
    return graph if len(kept) == len(graph.ops) else graph.with_ops(kept[::-1])

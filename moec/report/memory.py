"""How many bytes live at each op of a graph, at some sizes."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir.dims import evaluate
from moec.ir.graph import Graph, Value


def live_bytes(graph: Graph, sizes: Mapping[str, int]) -> list[int]:
    """Bytes of the values that exist while each op runs, inputs not counted.

    A value lives from the op that makes it to its last reader; what the graph returns, to the end.
    """
    made: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for place, op in enumerate(graph.ops):
        made.update((v, place) for v in op.results)
        last.update((v, place) for v in (*op.operands, *op.results))
    last.update((v, len(graph.ops) - 1) for v in graph.returned)
    changes = [0] * (len(graph.ops) + 1)
    for value, place in made.items():
        size = evaluate(value.type.bytes, sizes)
        changes[place] += size
        changes[last[value] + 1] -= size
    live, total = [], 0
    for change in changes[:-1]:
        total += change
        live.append(total)
    return live


__all__ = ["live_bytes"]

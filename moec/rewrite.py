"""Rebuilding graphs: one forward walk, one decision an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moec.errors import PassError
from moec.fuel import spend
from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op, Value, producers
from moec.reasons import fired

# (builder, op on its new operands) -> the values in place of its results, or None to keep it
Rule = Callable[[Builder, Op], Sequence[Value] | Value | None]


def transform(graph: Graph, rule: Rule, name: str) -> Graph:
    """Walk the ops in order and let ``rule`` replace each; what it builds lands before the op's
    place.

    Returns the same object if nothing was replaced.
    """
    builder = Builder(graph.ranges)
    mapping: dict[Value, Value] = {}
    changed = False
    for op in graph.ops:
        current = _on_new_operands(op, mapping)
        builder.loc = op.loc
        mark = builder.mark()
        found = rule(builder, current)
        if found is None or not spend(f"{name}: {op!r}"):
            builder.rollback(mark)
            builder.ops.append(current)
            continue
        changed = True
        fired(name, op)
        values = (found,) if isinstance(found, Value) else tuple(found)
        _check_same(op, values, name)
        mapping.update(
            {old: new for old, new in zip(op.results, values, strict=True) if old is not new}
        )
    return _finish(graph, builder, mapping) if changed else graph


def _on_new_operands(op: Op, mapping: dict[Value, Value]) -> Op:
    if not any(v in mapping for v in op.operands):
        return op
    return replace(op, operands=tuple(mapping.get(v, v) for v in op.operands))


def _check_same(op: Op, values: Sequence[Value], name: str) -> None:
    if [v.type for v in values] != [r.type for r in op.results]:
        got = ", ".join(str(v.type) for v in values)
        raise PassError(f"pass {name}: {op!r} would become values of types {got}")


def _finish(graph: Graph, builder: Builder, mapping: dict[Value, Value]) -> Graph:
    return replace(
        graph,
        ops=tuple(builder.ops),
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )


def fixpoint(graph: Graph, rule: Callable[[Graph], Graph], name: str, limit: int = 50) -> Graph:
    """Apply a graph function until it changes nothing."""
    for _ in range(limit):
        new = rule(graph)
        if new is graph:
            return graph
        graph = new
    raise PassError(f"pass {name} did not settle within {limit} rounds")


class Definitions:
    """Lookup of the op that made a value while a graph is being rebuilt."""

    def __init__(self, graph: Graph) -> None:
        self._made = producers(graph)

    def of(self, builder: Builder, value: Value) -> Op | None:
        """The op that made ``value``, searching what was built so far first."""
        for op in reversed(builder.ops):
            if value in op.results:
                return op
        return self._made.get(value)


def topological(ops: Sequence[Op], available: Sequence[Value]) -> tuple[Op, ...]:
    """``ops`` in an order in which every operand is defined first; otherwise as close to given as
    possible.
    """
    defined = set(available)
    made = {v for op in ops for v in op.results}
    waiting, done = list(ops), []
    while waiting:
        ready = next(
            (op for op in waiting if all(v in defined or v not in made for v in op.operands)), None
        )
        if ready is None:
            raise PassError(f"ops depend on each other in a circle: {waiting[0]!r}")
        waiting.remove(ready)
        done.append(ready)
        defined.update(ready.results)
    return tuple(done)

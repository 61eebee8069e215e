"""Growing clusters of ops and turning them into one ``kern.`` op: the engine of the fuse passes."""

from __future__ import annotations

from collections.abc import Callable, Collection

from moec.fuel import spend
from moec.ir.builder import make_op
from moec.ir.graph import Graph, Op, Value, backward_ops, producers, users
from moec.rewrite import topological

Accept = Callable[[Op], bool]


class Neighbourhood:
    """Who makes and who reads what in a graph, and which ops run in the backward pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made = producers(graph)
        self.readers = users(graph)
        self.backward = backward_ops(graph)
        self.returned = set(graph.returned)

    def depends(self, value: Value, on: Collection[Op], through: Collection[Op]) -> bool:
        """Whether ``value`` needs an op of ``on`` by a path that leaves ``through``."""
        stack, seen = [value], set()
        while stack:
            op = self.made.get(stack.pop())
            if op is None or op in seen:
                continue
            seen.add(op)
            if op in on:
                return True
            stack.extend(op.operands)
        return False


def grow(around: Neighbourhood, anchor: Op, accept: Accept, accept_source: Accept) -> list[Op]:
    """The ops to fuse with ``anchor``: readers that ``accept`` takes and sources that only the
    cluster reads.

    A reader joins if everything else that it needs can be computed before the cluster (convexity)
    and runs in the same phase; a source joins, together with its other readers, if
    ``accept_source`` takes it and ``accept`` takes them.
    """
    members = [anchor]
    changed = True
    while changed:
        changed = False
        for op in _readers(around, members):
            if accept(op) and _same_phase(around, op, anchor) and _convex(around, op, members):
                members.append(op)
                changed = True
        for op in _sources(around, members):
            extra = _other_readers(around, op, members)
            joins = (
                accept_source(op)
                and _same_phase(around, op, anchor)
                and not any(v in around.returned for v in op.results)
            )
            if joins and all(
                accept(r) and _same_phase(around, r, anchor) and _convex(around, r, [*members, op])
                for r in extra
            ):
                members += [op, *(r for r in extra if r not in members)]
                changed = True
    order = {op: i for i, op in enumerate(around.graph.ops)}
    return sorted(members, key=order.__getitem__)


def _readers(around: Neighbourhood, members: list[Op]) -> list[Op]:
    found = [r for m in members for v in m.results for r in around.readers.get(v, [])]
    return [op for op in dict.fromkeys(found) if op not in members]


def _sources(around: Neighbourhood, members: list[Op]) -> list[Op]:
    found = [around.made[v] for m in members for v in m.operands if v in around.made]
    return [op for op in dict.fromkeys(found) if op not in members]


def _same_phase(around: Neighbourhood, op: Op, anchor: Op) -> bool:
    return (op in around.backward) == (anchor in around.backward)


def _convex(around: Neighbourhood, op: Op, members: list[Op]) -> bool:
    outside = [v for v in op.operands if around.made.get(v) not in members]
    return not any(around.depends(v, members, members) for v in outside)


def _other_readers(around: Neighbourhood, op: Op, members: list[Op]) -> list[Op]:
    found = [r for v in op.results for r in around.readers.get(v, []) if r not in members]
    return list(dict.fromkeys(found))


def fuse(graph: Graph, members: list[Op], kind: str, *, duplicated: Collection[Op] = ()) -> Graph:
    """Replace ``members`` by one ``kern.<kind>`` op whose body they are.

    ``duplicated`` ops are copied into the body but also stay outside for their other readers
    (dead-code elimination removes them if there are none).
    """
    around = Neighbourhood(graph)
    inside = [op for op in graph.ops if op in members or op in duplicated]
    if not spend(f"fuse {kind}: {', '.join(op.kind for op in inside)}"):
        return graph
    made = {v for op in inside for v in op.results}
    inputs = tuple(dict.fromkeys(v for op in inside for v in op.operands if v not in made))
    outputs = tuple(v for op in members for v in op.results if _escapes(around, v, members))
    kernel = _kernel_op(graph, kind, inside, inputs, outputs)
    rest = [op for op in graph.ops if op not in members]
    mapping = dict(zip(outputs, kernel.results, strict=True))
    ops = [
        _renamed(op, mapping)
        for op in [*_before(rest, graph, members), kernel, *_after(rest, graph, members)]
    ]
    new = graph.with_ops(topological(ops, (*graph.inputs, *graph.cotangents)))
    return _with_returned(new, mapping)


def _escapes(around: Neighbourhood, value: Value, members: list[Op]) -> bool:
    return value in around.returned or any(r not in members for r in around.readers.get(value, []))


def _kernel_op(
    graph: Graph, kind: str, inside: list[Op], inputs: tuple[Value, ...], outputs: tuple[Value, ...]
) -> Op:
    parameters = {v: Value(v.type, v.hint) for v in inputs}
    body_ops = tuple(_renamed(op, parameters) for op in inside)
    name = "_".join(dict.fromkeys(v.hint for v in outputs)) or kind
    body = Graph(name, tuple(parameters.values()), body_ops, outputs, graph.ranges)
    loc = next((op.loc for op in inside if op.loc is not None), None)
    return make_op(f"kern.{kind}", inputs, {}, hints=[v.hint for v in outputs], body=body, loc=loc)


def _renamed(op: Op, mapping: dict[Value, Value]) -> Op:
    if not any(v in mapping for v in op.operands):
        return op
    return Op(
        op.kind,
        tuple(mapping.get(v, v) for v in op.operands),
        op.results,
        op.attrs,
        op.body,
        op.loc,
    )


def _before(rest: list[Op], graph: Graph, members: list[Op]) -> list[Op]:
    first = min(graph.ops.index(m) for m in members)
    return [op for op in rest if graph.ops.index(op) < first]


def _after(rest: list[Op], graph: Graph, members: list[Op]) -> list[Op]:
    first = min(graph.ops.index(m) for m in members)
    return [op for op in rest if graph.ops.index(op) >= first]


def _with_returned(graph: Graph, mapping: dict[Value, Value]) -> Graph:
    from dataclasses import replace

    return replace(
        graph,
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )

"""Growing clusters of ops and turning them into one ``kern.`` op: the engine of the fuse passes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from moec.fuel import spend
from moec.ir.builder import make_op
from moec.ir.graph import Graph, Op, Value, backward_ops, producers, users
from moec.reasons import OWN_KERNEL, decline, fired, is_listening
from moec.rewrite import topological

# why an op cannot join a kernel; empty if it can
Refuse = Callable[[Op], str]


_ANCHORS = {
    "moe.grouped_mm",
    "moe.grouped_outer",
    "moe.dispatch",
    "moe.combine",
    "t.linear",
    "t.matmul",
}


def not_pointwise(op: Op) -> str:
    """Why an op that is not pointwise cannot join."""
    own = op.body is not None or op.kind in _ANCHORS
    return OWN_KERNEL if own else "it is not pointwise work"


class Neighbourhood:
    """Who makes and who reads what in a graph, and which ops run in the backward pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made = producers(graph)
        self.readers = users(graph)
        self.backward = backward_ops(graph)
        self.returned = set(graph.returned)

    def convex(self, members: Collection[Op]) -> bool:
        """Whether no path leaves ``members`` and comes back: only then can they run as one."""
        inside, after = set(members), set[Op]()
        for op in self.graph.ops:
            sources = {self.made[v] for v in op.operands if v in self.made}
            if op in inside:
                if sources & after:
                    return False
            elif sources & inside or sources & after:
                after.add(op)
        return True


def grow(
    around: Neighbourhood, anchor: Op, refuse: Refuse, refuse_source: Refuse, max_ops: int = 1 << 30
) -> list[Op]:
    """The ops to fuse with ``anchor``: readers that ``refuse`` takes and sources that only the
    cluster reads.

    A reader joins if it runs in the same phase; a source joins, together with its other readers, if
    ``refuse_source`` takes it and ``refuse`` takes them. What joins must leave the cluster convex
    and no larger than ``max_ops``.
    """
    cluster = _Cluster(around, anchor, refuse, refuse_source, max_ops)
    cluster.grow()
    if is_listening():
        cluster.explain()
    order = {op: i for i, op in enumerate(around.graph.ops)}
    return sorted(cluster.members, key=order.__getitem__)


class _Cluster:
    """Ops that become one kernel, while they are being collected."""

    def __init__(
        self,
        around: Neighbourhood,
        anchor: Op,
        refuse: Refuse,
        refuse_source: Refuse,
        max_ops: int,
    ) -> None:
        self.around, self.anchor, self.max_ops = around, anchor, max_ops
        self.refuse, self.refuse_source = refuse, refuse_source
        self.members = [anchor]

    def grow(self) -> None:
        """Take in readers and sources until none is left that may join."""
        changed = True
        while changed:
            before = len(self.members)
            for op in _readers(self.around, self.members):
                if not self.problem_of_reader(op):
                    self.members.append(op)
            for op in _sources(self.around, self.members):
                if not self.problem_of_source(op):
                    self.members += [m for m in self.with_readers(op) if m not in self.members]
            changed = len(self.members) > before

    def explain(self) -> None:
        """Note why each neighbour stays outside."""
        readers = _readers(self.around, self.members)
        for op in readers:
            decline("join", op, self.problem_of_reader(op), near=self.anchor)
        for op in _sources(self.around, self.members):
            if op not in readers and not self.refuse_source(op):
                decline("join", op, self.problem_of_source(op), near=self.anchor)

    def problem_of_reader(self, op: Op) -> str:
        """Why a reader cannot join; empty if it can."""
        return self.refuse(op) or self.problem_of_group([op])

    def problem_of_source(self, op: Op) -> str:
        """Why a source cannot join with its other readers; empty if it can."""
        if any(v in self.around.returned for v in op.results):
            return "its result is an output of the graph"
        problem = self.refuse_source(op)
        if problem:
            return problem
        group = self.with_readers(op)
        if any(map(self.refuse, group[1:])):
            return "another reader of its result cannot join"
        return self.problem_of_group(group)

    def with_readers(self, op: Op) -> list[Op]:
        """An op with those of its readers that are outside."""
        return [op, *_other_readers(self.around, op, self.members)]

    def problem_of_group(self, group: list[Op]) -> str:
        """Why ops that are fit cannot join all the same."""
        if len(self.members) + len(group) > self.max_ops:
            return "the kernel would have more ops than max-ops allows"
        backward = self.around.backward
        if any((op in backward) != (self.anchor in backward) for op in group):
            return "one of the two runs in the forward pass, the other in the backward pass"
        if not self.around.convex([*self.members, *group]):
            return "it also needs a result of work outside that needs one of the kernel's"
        return ""


def _readers(around: Neighbourhood, members: list[Op]) -> list[Op]:
    found = [r for m in members for v in m.results for r in around.readers.get(v, [])]
    return [op for op in dict.fromkeys(found) if op not in members]


def _sources(around: Neighbourhood, members: list[Op]) -> list[Op]:
    found = [around.made[v] for m in members for v in m.operands if v in around.made]
    return [op for op in dict.fromkeys(found) if op not in members]


def _other_readers(around: Neighbourhood, op: Op, members: list[Op]) -> list[Op]:
    found = [r for v in op.results for r in around.readers.get(v, []) if r not in members]
    return list(dict.fromkeys(found))


def fuse_each(
    graph: Graph, is_candidate: Callable[[Op], bool], fuse_one: Callable[[Graph, Op], Graph]
) -> Graph:
    """Let each candidate be an anchor, until none changes the graph."""
    before = None
    while graph is not before:  # dead work that went may have been what kept other work apart
        before, tried = graph, set[Op]()
        while anchor := next((o for o in graph.ops if is_candidate(o) and o not in tried), None):
            tried.add(anchor)
            graph = fuse_one(graph, anchor)
    return graph


def fuse(graph: Graph, members: list[Op], kind: str, *, duplicated: Collection[Op] = ()) -> Graph:
    """Replace ``members`` by one ``kern.<kind>`` op whose body they are.

    ``duplicated`` ops are copied into the body but also stay outside for their other readers
    (dead-code elimination removes them if there are none).
    """
    around = Neighbourhood(graph)
    members = [op for op in graph.ops if op in members]
    inside = [op for op in graph.ops if op in members or op in duplicated]
    if not spend(f"fuse {kind}: {', '.join(op.kind for op in inside)}"):
        return graph
    fired(f"fuse {kind}", members[0], "{}", _Kinds(inside))
    made = {v for op in inside for v in op.results}
    inputs = tuple(dict.fromkeys(v for op in inside for v in op.operands if v not in made))
    outputs = tuple(v for op in members for v in op.results if _escapes(around, v, members))
    if not outputs:  # dead code: a kernel without results would be one too
        return graph.with_ops([op for op in graph.ops if op not in members])
    kernel = _kernel_op(graph, kind, inside, inputs, outputs)
    first = min(i for i, op in enumerate(graph.ops) if op in members)
    rest = [
        [op for i, op in enumerate(graph.ops) if op not in members and (i < first) == earlier]
        for earlier in (True, False)
    ]
    mapping = dict(zip(outputs, kernel.results, strict=True))
    ops = [_renamed(op, mapping) for op in [*rest[0], kernel, *rest[1]]]
    new = graph.with_ops(topological(ops, (*graph.inputs, *graph.cotangents)))
    return _with_returned(new, mapping)


class _Kinds:
    """The kinds of ops as text, made only if somebody reads it."""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops

    def __str__(self) -> str:
        return ", ".join(op.kind for op in self.ops)


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


def _with_returned(graph: Graph, mapping: dict[Value, Value]) -> Graph:
    return replace(
        graph,
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )


def constants_of(around: Neighbourhood, members: list[Op]) -> list[Op]:
    """The ``t.full`` ops that ``members`` read: cheaper to make again than to pass."""
    made = dict.fromkeys(around.made[v] for m in members for v in m.operands if v in around.made)
    return [op for op in made if op.kind == "t.full" and op not in members]

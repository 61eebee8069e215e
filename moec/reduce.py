"""Reduction: a smaller graph on which the same failure stays.

Greedy delta debugging on graphs, with proposals from coarse to fine: forget that a graph is a joint
one, return fewer values or earlier ones, cut the graph (what was computed becomes an input),
replace an op by an operand of its type or a kernel by its body, halve sizes. A proposal that is a
valid graph and still fails is taken; the search ends when no proposal helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moec.errors import IRError, MoecError
from moec.ir.builder import Builder, make_op
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Op, Value
from moec.ir.text import identifier
from moec.ir.types import Type
from moec.ir.verify import verify

# Whether a graph still shows the failure.
Fails = Callable[[Graph], bool]
# Attributes that count things which types count too.
_SIZES = ("experts", "k", "parts", "groups")
_MOST_ROUNDS = 100


def reduce(graph: Graph, fails: Fails, progress: Callable[[Graph], object] = id) -> Graph:
    """A graph on which ``fails`` still holds and no proposal makes smaller.

    ``progress`` is told of each graph that is taken. ``graph`` itself must fail.
    """
    alive = _alive(graph)
    if not fails(_tidy(graph)) and fails(alive):
        graph = alive  # what fails is dead code, which proposals drop
    for _ in range(_MOST_ROUNDS):
        smaller = next((g for g in proposals(graph) if _size(g) < _size(graph) and fails(g)), None)
        if smaller is None:
            return graph
        graph = smaller
        progress(graph)
    return graph


def _size(graph: Graph) -> tuple[int, ...]:
    """What a reduction makes smaller, the most telling number first."""
    values = [*graph.inputs, *graph.cotangents, *(v for op in graph.ops for v in op.results)]
    numbers = sum(d for v in values for d in v.type.shape if isinstance(d, int))
    return (
        sum(1 + (len(op.body.ops) if op.body is not None else 0) for op in graph.ops),
        len(graph.returned),
        len(graph.inputs) + len(graph.cotangents),
        numbers,
    )


def proposals(graph: Graph) -> Iterator[Graph]:
    """Valid graphs that are simpler in one way each, the boldest first."""
    for make in (_plain, _fewer_results, _cuts, _earlier_results, _bypasses, _bodies, _sizes):
        for proposal in make(graph):
            tidy = _tidy(proposal)
            try:
                yield verify(tidy)
            except MoecError:
                continue


def _tidy(graph: Graph) -> Graph:
    """Without ops and inputs that nothing reads."""
    live = set(graph.returned)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if any(v in live for v in op.results):
            kept.append(op)
            live.update(op.operands)
    graph = graph.with_ops(kept[::-1])
    if graph.gradients or graph.cotangents:
        return graph  # gradients are listed by input
    return replace(graph, inputs=tuple(v for v in graph.inputs if v in live))


def _alive(graph: Graph) -> Graph:
    """The graph with everything returned that nothing reads."""
    if graph.gradients:
        return graph
    read = {v for op in graph.ops for v in op.operands}
    unread = (v for op in graph.ops for v in op.results if v not in read)
    return replace(graph, outputs=tuple(dict.fromkeys((*graph.outputs, *unread))))


def _plain(graph: Graph) -> Iterator[Graph]:
    """A joint graph as an ordinary one."""
    if graph.cotangents or graph.gradients:
        yield replace(
            graph,
            inputs=(*graph.inputs, *graph.cotangents),
            outputs=graph.returned,
            cotangents=(),
            gradients=(),
        )


def _fewer_results(graph: Graph) -> Iterator[Graph]:
    """One result alone; then all but one."""
    if graph.gradients:
        for i, gradient in enumerate(graph.gradients):
            if gradient is not None:
                fewer = [None if j == i else g for j, g in enumerate(graph.gradients)]
                yield replace(graph, gradients=tuple(fewer))
        return
    if len(graph.outputs) > 1:
        for value in graph.outputs:
            yield replace(graph, outputs=(value,))
        for i in range(len(graph.outputs)):
            yield replace(graph, outputs=graph.outputs[:i] + graph.outputs[i + 1 :])


def _cuts(graph: Graph) -> Iterator[Graph]:
    """Runs of ops become inputs: the first half, quarters, and so on to single ops."""
    count, length = len(graph.ops), len(graph.ops)
    while length > 1:
        length = (length + 1) // 2
        for start in range(0, count, length):
            yield _cut(graph, graph.ops[start : start + length])


def _cut(graph: Graph, ops: Sequence[Op]) -> Graph:
    """The graph with what some ops make given from outside."""
    gone = set(ops)
    rest = [op for op in graph.ops if op not in gone]
    read = {v for op in rest for v in op.operands} | set(graph.returned)
    given = [v for op in ops for v in op.results if v in read]
    gradients = (*graph.gradients, *(None for _ in given)) if graph.gradients else ()
    return replace(graph, inputs=(*graph.inputs, *given), ops=tuple(rest), gradients=gradients)


def _earlier_results(graph: Graph) -> Iterator[Graph]:
    """A result replaced by what it was made of."""
    if graph.gradients:
        return
    made = {v: op for op in graph.ops for v in op.results}
    for i, value in enumerate(graph.outputs):
        for operand in made[value].operands if value in made else ():
            yield replace(graph, outputs=(*graph.outputs[:i], operand, *graph.outputs[i + 1 :]))


def _bypasses(graph: Graph) -> Iterator[Graph]:
    """An op replaced by an operand of its type."""
    for op in graph.ops:
        if len(op.results) == 1:
            for operand in dict.fromkeys(op.operands):
                if operand.type == op.result.type:
                    yield _substituted(graph, op, {op.result: operand})


def _bodies(graph: Graph) -> Iterator[Graph]:
    """A kernel replaced by the ops of its body, or by a kernel around fewer of them."""
    for op in graph.ops:
        if op.body is not None:
            builder = Builder(graph.ranges)
            try:
                results = builder.inline(op.body, op.operands)
            except MoecError:
                continue
            plain = _substituted(graph, op, dict(zip(op.results, results, strict=True)))
            place = graph.ops.index(op)
            ops = (*plain.ops[:place], *builder.ops, *plain.ops[place:])
            yield plain.with_ops(ops)


def _substituted(graph: Graph, gone: Op, mapping: Mapping[Value, Value]) -> Graph:
    ops = [
        replace(op, operands=tuple(mapping.get(v, v) for v in op.operands))
        for op in graph.ops
        if op is not gone
    ]
    return replace(
        graph,
        ops=tuple(ops),
        outputs=tuple(mapping.get(v, v) for v in graph.outputs),
        gradients=tuple(None if g is None else mapping.get(g, g) for g in graph.gradients),
    )


# sizes
def _sizes(graph: Graph) -> Iterator[Graph]:
    """One number of the types, smaller wherever it stands."""
    values = (*graph.inputs, *graph.cotangents)
    there = {d for v in values for d in v.type.shape if isinstance(d, int) and d > 1}
    for old in sorted(there, reverse=True):
        for new in dict.fromkeys((1, 2, old // 2, old - 1)):
            if 0 < new < old:
                try:
                    yield _resized(graph, {old: new})
                except MoecError:
                    continue


def _resized(graph: Graph, sizes: Mapping[int, int]) -> Graph:
    """The graph on inputs of other sizes, every type inferred anew."""
    mapping = {
        v: Value(Type(v.type.dtype, tuple(_resized_dim(d, sizes) for d in v.type.shape)), v.hint)
        for v in (*graph.inputs, *graph.cotangents)
    }
    ops = []
    for op in graph.ops:
        attrs = {k: _resized_attribute(k, v, sizes) for k, v in op.attrs.items()}
        new = make_op(
            op.kind,
            [mapping[v] for v in op.operands],
            attrs,
            hints=[r.hint for r in op.results],
            body=None if op.body is None else _resized(op.body, sizes),
            loc=op.loc,
        )
        ops.append(new)
        if len(new.results) != len(op.results):
            raise IRError(f"{op.kind} has another number of results at other sizes")
        mapping.update(zip(op.results, new.results, strict=True))
    return Graph(
        graph.name,
        tuple(mapping[v] for v in graph.inputs),
        tuple(ops),
        tuple(mapping[v] for v in graph.outputs),
        graph.ranges,
        tuple(mapping[v] for v in graph.cotangents),
        tuple(None if g is None else mapping[g] for g in graph.gradients),
    )


def _resized_dim(value: Dim, sizes: Mapping[int, int]) -> Dim:
    return sizes.get(value, value) if isinstance(value, int) else value


def _resized_attribute(name: str, value: Any, sizes: Mapping[int, int]) -> Any:
    if name == "shape" and isinstance(value, tuple):
        return tuple(_resized_dim(d, sizes) for d in value)
    is_size = name in _SIZES and isinstance(value, int) and not isinstance(value, bool)
    return sizes.get(value, value) if is_size else value


# tests
def _in_quotes(text: str) -> str:
    """Text as it stands between triple quotes."""
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def source_of_test(graph: Graph, passes: str, text: str, words: str) -> str:
    """A test for pytest that fails as long as the passes are wrong on this graph."""
    name = identifier(graph.name.lower())
    quoted, said = (
        part.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') for part in (text, words)
    )
    return f'''"""{said}"""

from moec.ir import parse
from moec.manager import PassManager
from moec.observers import Check, Verify

GRAPH = """
{quoted}"""


def test_{name}() -> None:
    PassManager({passes!r}, [Verify(), Check()]).run(parse(GRAPH))
'''


__all__ = ["Fails", "proposals", "reduce", "source_of_test"]

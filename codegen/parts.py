"""The passes of a joint graph cut into parts, so that a plan can run some of a pass again.

The forward pass: what leads to the values that the backward pass reads, and the rest, which makes
the outputs. The backward pass: a part for each product with the experts' weights, so that what only
earlier ones read is free when later ones run.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moec.codegen.expert_lists import kept_apart
from moec.codegen.host import Function, partition, that_bind
from moec.ir.dims import apply, symbols
from moec.ir.graph import Graph, Location, Op, Value

# Made where they are read: views, and constants.
FREE = frozenset("t.split t.slice t.permute t.expand t.reshape t.full".split())
# Products with a matrix of each expert, and what they give
_PRODUCTS = {"moe.grouped_mm": "rows", "moe.grouped_outer": "weights"}
_FORWARD = ("first projection", "second projection")


@dataclass(frozen=True)
class Part:
    """A part of a pass as a function; ``title`` says what it computes, ``loc`` is the line of the
    model's code that its first product is from.
    """

    function: Function
    title: str
    loc: Location | None


@dataclass(frozen=True)
class Parts:
    """The parts of both passes, in order; a pass that is not cut has none."""

    forward: tuple[Part, ...]
    backward: tuple[Part, ...]

    @property
    def functions(self) -> tuple[Function, ...]:
        """All parts as functions of one module."""
        return tuple(part.function for part in (*self.forward, *self.backward))


def cut(graph: Graph, target: str) -> Parts:
    """The parts of a joint graph after the passes of a target.

    A pass stays whole where only one part of it would have a product of the experts.
    """
    program = partition(graph)
    apart = kept_apart(graph, program.saved) if target == "aten" else frozenset[Op]()
    returned = [g for g in graph.gradients if g is not None]
    ahead = _Pass("forward", program.forward, graph.inputs, (*graph.outputs, *program.saved), apart)
    behind = _Pass("backward", program.backward, program.arguments, returned, apart)
    return Parts(
        tuple(ahead.parts(ahead.leading_to(program.saved))),
        tuple(behind.parts(behind.by_products())),
    )


@dataclass(frozen=True)
class _Pass:
    """A pass: its ops, what it takes, and what it returns. Stacks that stay ``apart`` are free."""

    name: str
    ops: Sequence[Op]
    given: Sequence[Value]
    results: Sequence[Value]
    apart: Collection[Op]

    @functools.cached_property
    def free(self) -> frozenset[Op]:
        """The ops that every part which reads their results has."""
        found = (op for op in self.ops if op.kind in FREE or op in self.apart)
        return frozenset(op for op in found if set(op.results).isdisjoint(self.results))

    @functools.cached_property
    def makers(self) -> Mapping[Value, Op]:
        """The op of the pass that makes each value."""
        return {v: op for op in self.ops for v in op.results}

    def leading_to(self, values: Iterable[Value]) -> dict[Op, int]:
        """Part 0 for what some values are computed from, part 1 for the rest."""
        needed = set(values)
        for op in reversed(self.ops):
            if not needed.isdisjoint(op.results):
                needed.update(op.operands)
        return {op: int(needed.isdisjoint(op.results)) for op in self.ops}

    def by_products(self) -> dict[Op, int]:
        """A part for each product with what is computed from it; what no product leads to goes
        where it is read first. Products that share gathered rows in memory share a part.
        """
        place: dict[Op, int] = {}
        gathered: dict[tuple[Value, ...], int] = {}
        for op in self.ops:
            before = max((place[m] for m in self._sources(op) if m in place), default=-1)
            if is_product(op):
                keys = list(_gathered(op))
                shared = [gathered[k] for k in keys if gathered.get(k, -1) >= max(before, 0)]
                place[op] = max(shared, default=1 + max(place.values(), default=-1))
                gathered.update((k, place[op]) for k in keys)
            elif before >= 0:
                place[op] = before
        readers = _readers(self.ops)
        for op in reversed(self.ops):
            if op not in place:
                place[op] = min((place[r] for v in op.results for r in readers[v]), default=0)
        return place

    def _sources(self, op: Op) -> Iterator[Op]:
        return (self.makers[v] for v in op.operands if v in self.makers)

    def parts(self, place: Mapping[Op, int]) -> Iterator[Part]:
        """The parts, if there are several with a product."""
        with_product = {place[op] for op in self.ops if is_product(op)}
        if len(with_product) < 2 or not self.makers.keys() >= set(self.results):
            return
        members = [[op for op in self.ops if place[op] == k] for k in sorted(with_product)]
        groups = [self._with_free([op for op in ops if op not in self.free]) for ops in members]
        for k, ops in enumerate(groups):
            others = {v for g in groups if g is not ops for op in g for v in op.operands}
            products = [op for op in ops if is_product(op)]
            title = _FORWARD[k] if self.name == "forward" else _title(products)
            function = self._function(f"{self.name}_{k + 1}", ops, others, k == 0)
            yield Part(function, title, products[0].loc)

    def _with_free(self, ops: Sequence[Op]) -> list[Op]:
        """Ops in order, with the free ones that they read."""
        found, needed = set(ops), {v for op in ops for v in op.operands}
        for op in reversed(self.ops):
            if op in self.free and not needed.isdisjoint(op.results):
                found.add(op)
                needed.update(op.operands)
        return [op for op in self.ops if op in found]

    def _function(
        self, name: str, ops: Sequence[Op], others: Collection[Value], is_first: bool
    ) -> Function:
        """Ops as a function that makes results of the pass and what ``others`` are; the first one
        knows all sizes, which it may have to check.
        """
        made = dict.fromkeys(v for op in ops for v in op.results)
        own = [v for op in ops if op not in self.free for v in op.results]
        reads = list(dict.fromkeys(v for op in ops for v in op.operands if v not in made))
        sized = self.given if is_first else [*made, *reads]
        reads += that_bind(sized, reads, sorted(self.given, key=_size))
        results = [v for v in self.results if v in made]
        between = [v for v in own if v in others and v not in results]
        return Function(name, tuple(reads), tuple(ops), (*results, *between))


def _readers(ops: Sequence[Op]) -> dict[Value, list[Op]]:
    """The readers, among some ops, of what they make."""
    found: dict[Value, list[Op]] = {v: [] for op in ops for v in op.results}
    for op in ops:
        for value in op.operands:
            found.get(value, []).append(op)
    return found


def _size(value: Value) -> int:
    """Bytes of a value where the open sizes are large."""
    sizes = {name: 4096 for size in value.type.shape for name in symbols(size)}
    return int(apply(value.type.bytes, sizes))


def is_product(op: Op) -> bool:
    """Whether an op is or has a product with a matrix of each of several experts."""
    inner = (op, *(op.body.ops if op.body is not None else ()))
    return any(o.kind in _PRODUCTS and _matrices(o) != 1 for o in inner)


def _matrices(op: Op) -> object:
    stack = op.operands[1] if op.kind == "moe.grouped_mm" else op.result
    return stack.type.shape[0]


def _gathered(op: Op) -> Iterator[tuple[Value, ...]]:
    """The tokens and permutations of rows that the kernels of a function gather once, in memory:
    those that read by descriptors.
    """
    if op.body is None or op.attrs.get("template") != "tma":
        return
    outer = dict(zip(op.body.inputs, op.operands, strict=True))
    for inner in op.body.ops:
        if inner.kind == "moe.gather":
            yield tuple(outer[v] for v in inner.operands[:2])


def _title(products: Sequence[Op]) -> str:
    """What products of a backward pass give: "gradients of rows"."""
    inner = (o for op in products for o in (op, *(op.body.ops if op.body is not None else ())))
    found = dict.fromkeys(_PRODUCTS[o.kind] for o in inner if o.kind in _PRODUCTS)
    return f"gradients of {' and '.join(found)}"


__all__ = ["FREE", "Part", "Parts", "cut", "is_product"]

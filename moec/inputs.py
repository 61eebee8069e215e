"""Random inputs that any graph accepts: its readers say what an integer input may hold."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.errors import DimError
from moec.ir.dims import Dim, Range, canon, evaluate, symbols
from moec.ir.graph import Graph, Op, Value
from moec.ir.types import DTYPES, SIZES, Type
from moec.ops import routing

# Sizes for dims that nobody named: small, odd and distinct, so that mixed-up axes show.
_DEFAULT_SIZES = (5, 3, 7, 11, 13)
# Experts of a permutation that no op ties to a number of experts.
_FREE_EXPERTS = 4
# An input that nothing reads, or only arithmetic: 0 or 1.
_FREE_BOUND = 2
# Ops whose result holds the same numbers as these operands.
_CARRIERS: dict[str, tuple[int, ...]] = {
    "t.cast": (0,),
    "t.reshape": (0,),
    "t.expand": (0,),
    "t.permute": (0,),
    "t.slice": (0,),
    "t.where": (1, 2),
}


@dataclass(frozen=True)
class Role:
    """What a value must hold: ``kind`` and the number that bounds or scales it.

    "index": integers below ``bound``, distinct along ``axis``. "perm", "inverse" and "offsets":
    results of one dispatch of ``rows`` pairs ("offsets": to ``bound`` experts). "weight": floats
    divided by the root of ``bound``, the size that a product sums over, so that results keep unit
    scale. "free": any valid number.
    """

    kind: str
    bound: Dim = _FREE_BOUND
    axis: int = -1
    rows: Dim = 0


def _index(op: Op, place: int) -> Role:
    axis = int(op.attrs.get("dim", -1))
    return Role("index", op.operands[0].type.shape[axis], axis)


def _experts(op: Op, place: int) -> Role:
    return Role("index", op.attrs["experts"])


def _chosen(op: Op, place: int) -> Role:
    return Role("index", op.operands[0].type.shape[-1])


def _rows(op: Op, place: int) -> Role:
    return Role("index", op.operands[0].type.shape[0], 0)


def _classes(op: Op, place: int) -> Role:
    return Role("index", op.attrs["classes"])


def _perm(op: Op, place: int) -> Role:
    return Role("perm", rows=op.operands[place].type.elements)


def _inverse(op: Op, place: int) -> Role:
    return Role("inverse", rows=op.operands[1].type.elements)


def _picks(op: Op, place: int) -> Role:
    return Role("index", op.attrs["tokens"])


def _offsets(op: Op, place: int) -> Role:
    rows = op.attrs["rows"] if "rows" in op.attrs else op.operands[0].type.shape[0]
    return Role("offsets", canon(op.operands[place].type.elements - 1), rows=rows)


def _weight(op: Op, place: int) -> Role:
    """A second factor without a symbolic axis; one with tokens in it is an activation."""
    fixed = all(isinstance(d, int) for d in op.operands[place].type.shape)
    return Role("weight", op.operands[0].type.shape[-1] if fixed else 1)


# op kind -> the role of each operand that has one
_READERS: dict[str, dict[int, Callable[[Op, int], Role]]] = {
    "t.gather": {1: _index},
    "t.scatter": {1: _index},
    "t.scatter_add": {1: _index},
    "t.one_hot": {0: _classes},
    "t.take": {1: _rows},
    "t.index_add": {1: _rows},
    "t.linear": {1: _weight},
    "t.matmul": {1: _weight},
    "moe.dispatch": {0: _experts},
    "moe.limit": {0: _experts},
    "moe.dispatch_picks": {0: _picks},
    "moe.weight": {1: _chosen},
    "moe.gather": {1: _perm, 2: _inverse},
    "moe.permute": {1: _perm, 2: _inverse},
    "moe.unpermute": {1: _perm, 2: _inverse},
    "moe.combine": {1: _perm, 2: _inverse},
    "moe.grouped_mm": {1: _weight, 2: _offsets},
    "moe.grouped_outer": {2: _offsets},
    "moe.expert_rows": {1: _offsets},
    "moe.group_sum": {1: _offsets},
}


def roles(graph: Graph) -> dict[Value, Role]:
    """The role of every value that has one, derived from its readers; bodies count as readers."""
    found: dict[Value, Role] = {}
    for op in reversed(graph.ops):
        inner = roles(op.body) if op.body is not None else {}
        for place, value in enumerate(op.operands):
            role = _role_of_operand(op, place, found, inner)
            if role is not None:
                found[value] = _stricter(found.get(value), role)
    return found


def _role_of_operand(
    op: Op, place: int, found: Mapping[Value, Role], inner: Mapping[Value, Role]
) -> Role | None:
    if op.body is not None:
        return inner.get(op.body.inputs[place])
    if place in _READERS.get(op.kind, {}):
        return _READERS[op.kind][place](op, place)
    if place in _CARRIERS.get(op.kind, ()):
        return next((found[v] for v in op.results if v in found), None)
    return None


def _stricter(known: Role | None, new: Role) -> Role:
    """The stricter of two; ``new`` comes from an earlier reader.

    A result of a dispatch is stricter than an index, a smaller bound than a larger one. For a
    weight the first product counts, which is the forward one.
    """
    if known is None or known.kind == "weight" or (known.kind == "index" != new.kind):
        return new
    if new.kind == known.kind == "index" and isinstance(new.bound, int):
        smaller = not isinstance(known.bound, int) or new.bound < known.bound
        return new if smaller else known
    return known


def dim_names(graph: Graph) -> list[str]:
    """The symbols of a graph's inputs, in order of appearance."""
    values = (*graph.inputs, *graph.cotangents)
    return list(dict.fromkeys(n for v in values for d in v.type.shape for n in sorted(symbols(d))))


def default_dims(graph: Graph, size: int | None = None) -> dict[str, int]:
    """Sizes for all symbols, inside their ranges: ``size``, or small distinct ones."""
    sizes = _DEFAULT_SIZES if size is None else (size,)
    return {
        name: _clamped(sizes[i % len(sizes)], graph.ranges.get(name))
        for i, name in enumerate(dim_names(graph))
    }


def _clamped(size: int, bounds: Range | None) -> int:
    low, high = bounds or (0, None)
    return max(low, size if high is None else min(size, high))


def random_inputs(
    graph: Graph,
    dims: Mapping[str, int],
    *,
    seed: int = 0,
    float64: bool = False,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Tensors for a graph's inputs, then for its cotangents, the same for the same ``seed`` and
    ``device``, where floats are drawn.

    Floats have unit scale (weights: such that their product has), in the declared dtypes or all in
    float64. Integers are valid for the ops that read them: expert indices are distinct a token;
    ``perm``, ``inverse`` and ``offsets`` come from one dispatch of random indices.

    Raises:
        DimError: a symbol has no size in ``dims``, or one outside its range; or the tensors would
            not fit into this machine's memory.
    """
    check_dims(graph, dims)
    values = (*graph.inputs, *graph.cotangents)
    _check_memory(graph, values, dims, float64)
    maker = _Maker(graph, dims, seed, float64, device)
    return [maker.make(value).to(device) for value in values]


def check_dims(graph: Graph, dims: Mapping[str, int]) -> None:
    """Raise :class:`DimError` unless ``dims`` has a size inside its range for every symbol."""
    names = dim_names(graph)
    missing = [n for n in names if n not in dims]
    if missing:
        wanted = " ".join(f"{n}=33" for n in missing)
        raise DimError(
            f"@{graph.name} needs sizes for {', '.join(missing)}; say for example {wanted}"
        )
    for name in names:
        low, high = graph.ranges.get(name, (0, None))
        if dims[name] < low or (high is not None and dims[name] > high):
            top = "" if high is None else f" <= {high}"
            raise DimError(f"@{graph.name}: {name}={dims[name]} is outside {low} <= {name}{top}")


def _check_memory(
    graph: Graph, values: Sequence[Value], dims: Mapping[str, int], float64: bool
) -> None:
    def width(type_: Type) -> int:
        return 8 if float64 and type_.is_float else SIZES[type_.dtype]

    needed = sum(width(v.type) * evaluate(v.type.elements, dims) for v in values)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DimError(
            f"the inputs of @{graph.name} would take {needed / 1e9:.1f} GB, more than the"
            f" {there / 1e9:.1f} GB of this machine; give smaller dims"
        )


class _Maker:
    """Makes tensors one after the other; values that belong to one dispatch share it."""

    def __init__(
        self, graph: Graph, dims: Mapping[str, int], seed: int, float64: bool, device: str
    ) -> None:
        self.dims, self.float64 = dims, float64
        self.drawing = torch.Generator(device).manual_seed(seed + 1) if device != "cpu" else None
        self.roles = roles(graph)
        self.generator = torch.Generator().manual_seed(seed)
        self.choices: dict[int, int] = {}
        self.experts: dict[int, int] = {}
        self.picking: dict[int, int] = {}  # tokens of dispatches of experts' picks
        self.dispatches: dict[int, tuple[torch.Tensor, ...]] = {}
        for value in (*graph.inputs, *graph.cotangents):
            self.note(value)

    def note(self, value: Value) -> None:
        """Learn from one input how many choices and experts the dispatch of its rows has."""
        role = self.roles.get(value, Role("free"))
        if role.kind == "inverse":
            self.choices[self.size(role.rows)] = self.size(value.type.shape[-1])
            if self.size(value.type.elements) != self.size(role.rows):
                self.picking[self.size(role.rows)] = self.size(value.type.shape[0])
        if role.kind == "offsets":
            self.experts[self.size(role.rows)] = self.size(role.bound)

    def size(self, dim: Dim) -> int:
        return evaluate(dim, self.dims)

    def make(self, value: Value) -> torch.Tensor:
        """A tensor for one value."""
        role = self.roles.get(value, Role("free"))
        shape = tuple(self.size(d) for d in value.type.shape)
        if value.type.is_float:
            return self.floats(value.type, shape, role)
        if role.kind in ("perm", "offsets", "inverse"):
            perm, offsets, inverse = self.dispatch(self.size(role.rows))
            found = {"perm": perm, "offsets": offsets, "inverse": inverse}[role.kind]
            return found.reshape(shape).to(DTYPES[value.type.dtype])
        return self.index(shape, role).to(DTYPES[value.type.dtype])

    def floats(self, type_: Type, shape: tuple[int, ...], role: Role) -> torch.Tensor:
        dtype = torch.float64 if self.float64 else DTYPES[type_.dtype]
        inner = self.size(role.bound) if role.kind == "weight" else 1
        if self.drawing is not None:  # in the dtype itself: the largest weights fill half a GPU
            there = self.drawing.device
            drawn = torch.randn(shape, generator=self.drawing, dtype=dtype, device=there)
            return drawn.div_(math.sqrt(max(inner, 1)))
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (drawn / math.sqrt(max(inner, 1))).to(dtype)

    def index(self, shape: tuple[int, ...], role: Role) -> torch.Tensor:
        """Integers below the bound, distinct along the axis where the bound allows it."""
        bound = self.size(role.bound)
        axis = role.axis % len(shape) if shape else 0
        if role.kind != "index" or not shape or shape[axis] > bound:
            return torch.randint(max(bound, 1), shape, generator=self.generator)
        wide = (*shape[:axis], bound, *shape[axis + 1 :])
        order = torch.rand(wide, generator=self.generator, dtype=torch.float64).argsort(axis)
        return order.narrow(axis, 0, shape[axis]).contiguous()

    def dispatch(self, rows: int) -> tuple[torch.Tensor, ...]:
        """``perm``, ``offsets`` and ``inverse`` of random choices that make so many rows."""
        if rows not in self.dispatches:
            choices, experts = self.choices.get(rows, 1), self.experts.get(rows, _FREE_EXPERTS)
            if rows in self.picking:
                tokens = self.picking[rows]
                picks = self.index((choices, rows // max(choices, 1)), Role("index", tokens))
                self.dispatches[rows] = routing.dispatch_picks(picks.int(), tokens)
                return self.dispatches[rows]
            role = Role("index", experts)
            idx = self.index((rows // max(choices, 1), choices), role).int()
            self.dispatches[rows] = routing.dispatch(idx, experts)
        return self.dispatches[rows]

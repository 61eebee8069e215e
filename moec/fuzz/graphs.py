"""Random valid graphs: a MoE block, then ops of any kind on any of its values.

The block is random (see :mod:`moec.fuzz.blocks`). Around its values grow ops that a pass may meet:
pointwise work, reshapes that undo each other, halves that are put together again, an op twice,
sums, products with further weights, work on the rows of experts, a second projection. Ops are
drawn until one fits the values at hand; the types that an op infers decide what fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.errors import MoecError
from moec.fuzz.blocks import any_options, build
from moec.ir import Builder, Graph, Location, Type, Value
from moec.ir.graph import Op
from moec.ir.types import FLOATS

# Numbers that keep unit scale: functions with poles or steep ends get arguments away from them.
_TAME = ("abs", "sigmoid", "tanh", "silu", "gelu", "erf", "relu", "softplus", "neg", "log_sigmoid")
# Functions that undo themselves, or that change nothing a second time.
_FOLDING = ("neg", "relu", "abs")
_CONSTANTS = (0.0, 1.0, -1.0, 0.5, 2.0, 1.5)
_WIDTHS = (1, 2, 3, 5)
# Routers that may leave a choice without an expert; ops that make rows, and that leave them out
_DROPPING = ("margin", "threshold")
_MAKE_ROWS = ("moe.gather", "moe.permute", "moe.expert_rows", "moe.grouped_mm")
_READ_PAIRS = ("moe.gather", "moe.permute")
_END_ROWS = ("moe.combine", "moe.unpermute", "moe.group_sum", "moe.grouped_outer")


@dataclass
class _Growing:
    """A graph while ops are added: what there is, and what was added."""

    random: random.Random
    b: Builder
    inputs: list[Value]
    values: list[Value]
    grown: list[Value] = field(default_factory=list)

    def pick(self, wanted: Callable[[Value], bool]) -> Value:
        """A value of the wanted kind, new ones more often."""
        found = [v for v in self.values if wanted(v)]
        if not found:
            raise _NothingFits
        place = int(len(found) * max(self.random.random(), self.random.random()))
        return found[place]

    def weight(self, type_: Type, hint: str = "w") -> Value:
        """A new input."""
        value = Value(type_, f"{hint}{len(self.inputs)}")
        self.inputs.append(value)
        return value

    def dispatch(self) -> tuple[Value, Value, Value]:
        """perm, offsets and inverse of a dispatch."""
        found = [op for op in self.b.ops if op.kind == "moe.dispatch"]
        perm, offsets, inverse = self.random.choice(found).results
        return perm, offsets, inverse


class _NothingFits(Exception):
    """The values at hand do not suit the op that was drawn."""


# what grew: a value, or several
Grow = Callable[[_Growing], Any]


def _is_float(v: Value) -> bool:
    return v.type.is_float


def _is_matrix(v: Value) -> bool:
    """Floats with a fixed width."""
    return v.type.is_float and v.type.rank == 2 and isinstance(v.type.shape[1], int)


def _shaped_like(x: Value) -> Callable[[Value], bool]:
    return lambda v: v.type == x.type


def pointwise(g: _Growing) -> Any:
    """A function of one value that is tame anywhere."""
    x = g.pick(_is_float)
    return g.b(f"t.{g.random.choice(_TAME)}", x)


def composed(g: _Growing) -> Any:
    """A function of a function, of the few that undo each other or themselves."""
    x = g.pick(_is_float)
    inner = g.b(f"t.{g.random.choice(_FOLDING)}", x)
    return g.b(f"t.{g.random.choice(_FOLDING)}", inner)


def guarded(g: _Growing) -> Any:
    """A function with a pole, away from it."""
    x = g.pick(_is_float)
    safe = g.b("t.add", g.b("t.abs", x), other=0.5)
    kind = g.random.choice(("log", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "exp"))
    if kind == "pow":
        return g.b("t.pow", safe, exponent=g.random.choice((0.5, 2.0, 3.0)))
    return g.b("t.exp", g.b("t.neg", safe)) if kind == "exp" else g.b(f"t.{kind}", safe)


def clamped(g: _Growing) -> Any:
    """A clamp with one bound or two."""
    x = g.pick(_is_float)
    low, high = g.random.choice(((-1.0, 1.0), (None, 0.75), (-0.25, None)))
    return g.b("t.clamp", x, min=low, max=high)


def with_constant(g: _Growing) -> Any:
    """A value and a number, the neutral ones among them."""
    x = g.pick(_is_float)
    kind = g.random.choice(("add", "sub", "mul", "div", "maximum", "minimum"))
    other = g.random.choice(_CONSTANTS)
    return g.b(f"t.{kind}", x, other=other if kind != "div" or other else 2.0)


def combined(g: _Growing) -> Any:
    """Two values of one type, or one value twice."""
    x = g.pick(_is_float)
    y = g.pick(_shaped_like(x))
    return g.b(f"t.{g.random.choice(('add', 'sub', 'mul', 'maximum', 'minimum'))}", x, y)


def broadcast(g: _Growing) -> Any:
    """A matrix and a vector, a column or a number."""
    x = g.pick(_is_matrix)
    rows, columns = x.type.shape
    shape = g.random.choice(((columns,), (), (1, columns), (rows, 1)))
    small = g.pick(lambda v: v.type == Type(x.type.dtype, shape)) if shape == (rows, 1) else None
    y = small or g.weight(Type(x.type.dtype, shape), "vector")
    return g.b(f"t.{g.random.choice(('add', 'mul', 'sub'))}", *g.random.sample((x, y), 2))


def chosen(g: _Growing) -> Any:
    """One of two values by a comparison."""
    x = g.pick(_is_float)
    kind = g.random.choice(("lt", "le", "gt", "ge"))
    condition = g.b(f"t.{kind}", g.pick(_shaped_like(x)), other=g.random.choice((-0.5, 0.0, 0.25)))
    if g.random.random() < 0.3:
        condition = g.b("t.logical_not", condition)
    return g.b("t.where", condition, x, g.pick(_shaped_like(x)))


def cast(g: _Growing) -> Any:
    """Another float dtype, or there and back."""
    x = g.pick(_is_float)
    y = g.b("t.cast", x, dtype=g.random.choice(FLOATS))
    return g.b("t.cast", y, dtype=x.type.dtype) if g.random.random() < 0.6 else y


def reshaped(g: _Growing) -> Any:
    """A column more, one axis less, or there and back."""
    x = g.pick(lambda v: v.type.is_float and v.type.rank > 0)
    shape = g.random.choice(((*x.type.shape, 1), (1, *x.type.shape), (x.type.elements,)))
    y = g.b("t.reshape", x, shape=shape)
    return g.b("t.reshape", y, shape=x.type.shape) if g.random.random() < 0.6 else y


def permuted(g: _Growing) -> Any:
    """Axes in another order, there and back, or in a third one."""
    least = g.random.choice((2, 3))
    x = g.pick(lambda v: v.type.is_float and v.type.rank >= least)
    axes = range(x.type.rank)
    order, third = g.random.sample(axes, len(axes)), g.random.sample(axes, len(axes))
    back = tuple(order.index(i) for i in axes)
    y = g.b("t.permute", x, dims=tuple(order))
    after = g.random.choice((None, back, tuple(third)))
    return y if after is None else g.b("t.permute", y, dims=after)


def halves(g: _Growing) -> Any:
    """The parts of a matrix, by slices or a split; then work on each, then together again."""
    x = g.pick(lambda v: _is_matrix(v) and int(v.type.shape[1]) % 2 == 0)
    layout = g.random.choice(("concat", "interleave"))
    if g.random.random() < 0.1:
        return g.b("t.slice", x, dim=-1, start=g.random.randint(0, 1), stop=x.type.shape[1], step=2)
    parts = (
        _sliced(g, x, layout)
        if g.random.random() < 0.5
        else g.b("t.split", x, parts=2, layout=layout)
    )
    if g.random.random() < 0.3:
        return tuple(parts)
    worked = [g.b("t.silu", parts[0]), parts[1]] if g.random.random() < 0.5 else list(parts)
    merged = g.b("t.merge", *worked, layout=g.random.choice((layout, "concat")))
    if g.random.random() < 0.4:
        return g.b("t.split", merged, parts=2, layout=g.random.choice((layout, "concat")))
    return (merged, *parts)


def _sliced(g: _Growing, x: Value, layout: str) -> list[Value]:
    width = int(x.type.shape[1])
    places = (
        ((0, width // 2, 1), (width // 2, width, 1))
        if layout == "concat"
        else ((0, width, 2), (1, width, 2))
    )
    return [g.b("t.slice", x, dim=-1, start=a, stop=b, step=c) for a, b, c in places]


def joined(g: _Growing) -> Any:
    """Two matrices beside or on top of each other."""
    x = g.pick(_is_matrix)
    y = g.pick(_shaped_like(x))
    if g.random.random() < 0.3:
        return g.b("t.sum", g.b("t.stack", x, y), dims=(0,))
    return g.b("t.concat", x, y, dim=g.random.choice((0, 1, -1)))


def reduced(g: _Growing) -> Any:
    """A sum, mean, maximum or softmax over the columns."""
    x = g.pick(_is_matrix)
    kind = g.random.choice(("sum", "mean", "amax", "logsumexp", "softmax", "cumsum", "norm"))
    if kind in ("softmax", "cumsum", "norm"):
        return g.b(f"t.{kind}", x, dim=-1)
    return g.b(f"t.{kind}", x, dims=(g.random.choice((1, -1)),), keepdim=g.random.random() < 0.7)


def over_rows(g: _Growing) -> Any:
    """The sum over the tokens or rows."""
    x = g.pick(_is_matrix)
    return g.b("t.sum", x, dims=(0,), keepdim=g.random.random() < 0.5)


def ordered(g: _Growing) -> Any:
    """The largest, or all in order."""
    x = g.pick(_is_matrix)
    if g.random.random() < 0.5:
        return g.b("t.sort", x, dim=-1, descending=g.random.random() < 0.5)[0]
    k = g.random.randint(1, int(x.type.shape[1]))
    return g.b("t.topk", x, k=k, dim=-1, largest=g.random.random() < 0.7)[0]


def projected(g: _Growing) -> Any:
    """A product with a new weight, with a bias or without."""
    x = g.pick(_is_matrix)
    out, wide = g.random.choice(_WIDTHS), x.type.shape[1]
    w = g.weight(x.type.with_shape(out, wide))
    if g.random.random() < 0.3:
        return g.b("t.linear", x, w, g.weight(x.type.with_shape(out), "bias"))
    if g.random.random() < 0.3:
        return g.b("t.matmul", x, g.b("t.permute", w, dims=(1, 0)))
    return g.b("t.linear", x, w)


def repeated(g: _Growing) -> Any:
    """An op once more, on the same operands."""
    op = g.random.choice(g.b.ops)
    made: Value | Sequence[Value] = g.b(op.kind, *op.operands, body=op.body, **op.attrs)
    return made


def _rows(g: _Growing) -> Value:
    """Floats, one row a routed pair."""
    perm = g.dispatch()[0]
    return g.pick(lambda v: _is_matrix(v) and v.type.shape[0] == perm.type.shape[0])


def gathered(g: _Growing) -> Any:
    """The token's row for each routed pair."""
    perm, _, inverse = g.dispatch()
    x = g.pick(lambda v: _is_matrix(v) and v.type.shape[0] == inverse.type.shape[0])
    return g.b("moe.gather", x, perm, inverse)


def by_expert(g: _Growing) -> Any:
    """The rows times their experts' matrices."""
    rows, (_, offsets, _) = _rows(g), g.dispatch()
    transposed = g.random.random() < 0.5
    wide, out = rows.type.shape[1], g.random.choice(_WIDTHS)
    experts = int(offsets.type.shape[0]) - 1
    shape = (experts, wide, out) if transposed else (experts, out, wide)
    w = g.weight(rows.type.with_shape(*shape))
    if g.random.random() < 0.25:
        w, transposed = g.b("t.permute", w, dims=(0, 2, 1)), not transposed
    return g.b("moe.grouped_mm", rows, w, offsets, transposed=transposed)


def low_rank(g: _Growing) -> Any:
    """The rows times ``W + s * B A`` of each expert."""
    rows, (_, offsets, _) = _rows(g), g.dispatch()
    wide, out, rank = rows.type.shape[1], g.random.choice(_WIDTHS), 2
    experts = int(offsets.type.shape[0]) - 1
    w, up, down = (
        g.weight(rows.type.with_shape(experts, *shape))
        for shape in ((out, wide), (out, rank), (rank, wide))
    )
    delta = g.b("t.mul", g.b("t.matmul", up, down), other=0.5)
    return g.b("moe.grouped_mm", rows, g.b("t.add", w, delta), offsets)


def biased(g: _Growing) -> Any:
    """The rows plus their experts' vectors."""
    rows, (_, offsets, _) = _rows(g), g.dispatch()
    experts = int(offsets.type.shape[0]) - 1
    bias = g.weight(rows.type.with_shape(experts, rows.type.shape[1]), "bias")
    return g.b("t.add", rows, g.b("moe.expert_rows", bias, offsets, rows=rows.type.shape[0]))


def gathered_back(g: _Growing) -> Any:
    """The sum of a token's rows, weighted or not."""
    rows, (perm, _, inverse) = _rows(g), g.dispatch()
    if g.random.random() < 0.4:
        return g.b("moe.combine", rows, perm, inverse)
    w = g.pick(lambda v: v.type == rows.type.with_shape(*inverse.type.shape))
    return g.b("moe.combine", rows, perm, inverse, w)


def per_row(g: _Growing) -> Any:
    """A number a row: pairs in the order of the rows, inner products, scales."""
    rows, (perm, _, inverse) = _rows(g), g.dispatch()
    kind = g.random.choice(("permute", "row_dot", "row_scale", "there and back"))
    if kind == "row_dot":
        dots = g.b("moe.row_dot", rows, g.pick(_shaped_like(rows)), dtype=rows.type.dtype)
        return g.b("moe.unpermute", dots, perm, inverse)
    w = g.pick(lambda v: v.type.is_float and v.type.shape == inverse.type.shape)
    column = g.b("moe.permute", w, perm, inverse)
    if kind == "row_scale":
        return g.b("moe.row_scale", rows, g.b("t.reshape", column, shape=(*column.type.shape, 1)))
    return column if kind == "permute" else g.b("moe.unpermute", column, perm, inverse)


def per_expert(g: _Growing) -> Any:
    """A sum for each expert, where every row has one."""
    rows, (_, offsets, _) = _rows(g), g.dispatch()
    if _may_drop(g.b.ops):
        raise _NothingFits
    return g.b("moe.group_sum", rows, offsets)


def dispatched_again(g: _Growing) -> Any:
    """A second router on the same tokens."""
    scores = g.pick(lambda v: _is_matrix(v) and v.type.dtype in ("f32", "f64"))
    experts = int(scores.type.shape[1])
    k = g.random.randint(1, min(experts, 3))
    idx = g.b("moe.select", scores, k=k, hint="idx")
    w = g.b("moe.weight", scores, idx, norm=g.random.choice(("none", "clamp_min")), eps=1e-3)
    return (w, *g.b("moe.dispatch", idx, experts=experts, hint=("perm", "offsets", "inverse")))


# what may grow, and how often
GROWTH: dict[Grow, int] = {
    pointwise: 6,
    composed: 3,
    guarded: 3,
    clamped: 2,
    with_constant: 5,
    combined: 6,
    broadcast: 3,
    chosen: 3,
    cast: 3,
    reshaped: 4,
    permuted: 3,
    halves: 5,
    joined: 2,
    reduced: 4,
    over_rows: 1,
    ordered: 1,
    projected: 3,
    repeated: 5,
    gathered: 3,
    by_expert: 5,
    low_rank: 3,
    biased: 3,
    gathered_back: 5,
    per_row: 4,
    per_expert: 1,
    dispatched_again: 1,
}


def random_graph(seed: int, most: int = 16) -> Graph:
    """The graph of a seed, the same in every process: a block with up to ``most`` growths."""
    r = random.Random(f"graph {seed}")
    block = build(any_options(r.randrange(1 << 30))).graph
    b = Builder(block.ranges)
    b.ops.extend(block.ops)
    b.loc = Location("model.py", 40, "layers.3.extra")
    values = [*block.inputs, *(v for op in block.ops for v in op.results)]
    growing = _Growing(r, b, list(block.inputs), values)
    for _ in range(r.randint(0, most)):
        _grow(growing)
    return _returning(growing, block)


def _grow(g: _Growing) -> None:
    """One growth that fits, if one of a few draws does."""
    for _ in range(8):
        mark, inputs = g.b.mark(), list(g.inputs)
        growth = g.random.choices(list(GROWTH), list(GROWTH.values()))[0]
        try:
            made = growth(g)
        except (_NothingFits, MoecError):
            g.b.rollback(mark)
            g.inputs = inputs
            continue
        new = [made] if isinstance(made, Value) else list(made)
        g.values += [v for v in new if v not in g.values]
        g.grown += [v for v in new if v.type.is_float]
        return


def _returning(g: _Growing, block: Graph) -> Graph:
    """The graph with the block's results and some of what grew as results."""
    loose = _with_loose_rows(g.b.ops)
    grown = [v for v in g.grown if v not in loose]
    some = g.random.sample(grown, min(len(grown), g.random.randint(0, 3)))
    last = grown[-2:]
    kept = block.outputs if not last or g.random.random() < 0.8 else ()
    outputs = tuple(dict.fromkeys((*kept, *some, *last)))
    return g.b.graph("fuzz", g.inputs, outputs)


def _may_drop(ops: Sequence[Op]) -> bool:
    """Whether a router may leave a choice without an expert."""
    return any(op.kind == "moe.limit" or op.attrs.get("mode") in _DROPPING for op in ops)


def _with_loose_rows(ops: Sequence[Op]) -> set[Value]:
    """Values that hold rows of no expert, which a router may leave: anything may stand in them."""
    if not _may_drop(ops):
        return set()
    loose: set[Value] = set()
    dispatches = sum(op.kind == "moe.dispatch" for op in ops)
    ends = _END_ROWS if dispatches == 1 else ()  # another router's rows are not left out
    lost: set[Value] = set()  # rows taken for tokens or pairs: no op leaves them out again
    for op in ops:
        operands = set(op.operands)
        if lost & operands or (op.kind in _READ_PAIRS and op.operands[0] in loose):
            lost.update(op.results)
        elif op.kind in _MAKE_ROWS or (op.kind not in ends and loose & operands):
            loose.update(op.results)
    return loose | lost


__all__ = ["GROWTH", "random_graph"]

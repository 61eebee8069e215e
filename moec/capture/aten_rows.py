"""The table of ATen ops that blocks without an expert loop use: rows by index, order, whole
numbers and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.capture.aten import number, scalar
from moec.capture.importer import Importer, handles
from moec.errors import CaptureError
from moec.ir.dims import product
from moec.ir.graph import Value
from moec.ir.types import FLOATS

aten = torch.ops.aten
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@handles(aten.embedding.default)
def embedding(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    if len(args) > 2 and args[2] != -1:
        raise CaptureError("an embedding with a padding index, whose gradient is left out")
    return i.b("t.take", i.value(args[0]), i.value(args[1]), hint=i.hint(node))


@handles(aten.index_select.default)
def index_select(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, index = i.value(args[0]), i.value(args[2])
    axis = int(args[1]) % x.type.rank
    order = (axis, *(d for d in range(x.type.rank) if d != axis))
    if axis == 0:
        return i.b("t.take", x, index, hint=i.hint(node))
    rows = i.b("t.take", i.b("t.permute", x, dims=order), index)
    back = tuple(order.index(d) for d in range(x.type.rank))
    return i.b("t.permute", rows, dims=back, hint=i.hint(node))


@handles(aten.index.Tensor)
def index(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, indices = i.value(args[0]), [None if a is None else i.value(a) for a in args[1]]
    given = [v for v in indices if v is not None]
    if any(v.type.dtype == "bool" for v in given):
        raise CaptureError("rows picked by a mask: their number depends on data")
    first = indices.index(given[0])
    if any(v is None for v in indices[first : first + len(given)]):
        raise CaptureError("indices of axes that are not next to each other")
    if first and len(given) > 1:
        raise CaptureError("several indices behind the first axis")
    if first:
        return _index_behind(i, node, x, given[0], first)
    rows, place = _joined(i, x, given)
    return i.b("t.take", rows, place, hint=i.hint(node))


def _index_behind(i: Importer, node: fx.Node, x: Value, place: Value, axis: int) -> Value:
    """``x[:, .., place]``: the axis goes first and what it becomes goes back."""
    rank, width = x.type.rank, place.type.rank
    order = (axis, *(d for d in range(rank) if d != axis))
    rows = i.b("t.take", i.b("t.permute", x, dims=order), place)
    new = list(range(width))
    others = list(range(width, width + rank - 1))
    back = (*others[:axis], *new, *others[axis:])
    return i.b("t.permute", rows, dims=back, hint=i.hint(node))


def _joined(i: Importer, x: Value, indices: Sequence[Value]) -> tuple[Value, Value]:
    """Rows of the first axes as one, and one index for all of theirs."""
    place = _inside(i, indices[0], x.type.shape[0])
    for axis, one in enumerate(indices[1:], start=1):
        size = x.type.shape[axis]
        scaled = _times(i, place, size)
        place = i.b("t.add", scaled, _inside(i, one, size))
    count = len(indices)
    if count == 1:
        return x, place
    joined = (product(x.type.shape[:count]), *x.type.shape[count:])
    return i.b("t.reshape", x, shape=joined), place


def _times(i: Importer, value: Value, size: Any) -> Value:
    if isinstance(size, int):
        scaled: Value = i.b("t.mul", value, other=float(size))
        return scaled
    scaled = i.b("t.mul", value, i.b("t.size", size=size, dtype=value.type.dtype))
    return scaled


def _inside(i: Importer, place: Value, size: Any) -> Value:
    """An index counted from the front; -1 means the last."""
    made = i.b.made_by(place)
    while made is not None and made.kind in _MOVING:
        made = i.b.made_by(made.operands[0])
    if made is not None and made.kind in _NEVER_NEGATIVE:
        return place
    negative = i.b("t.lt", place, other=0.0)
    extent = i.b("t.size", size=size, dtype=place.type.dtype)
    found: Value = i.b("t.where", negative, i.b("t.add", place, extent), place)
    return found


_MOVING = {"t.permute", "t.reshape", "t.expand", "t.slice"}
_NEVER_NEGATIVE = {"t.topk", "t.sort", "t.arange"}


@handles(aten.index_add.default)
def index_add(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, axis, place, source = i.value(args[0]), int(args[1]), i.value(args[2]), i.value(args[3])
    if axis % x.type.rank != 0 or kwargs.get("alpha", 1) != 1:
        raise CaptureError("index_add along another axis than the first, or scaled")
    source = i.cast(source, x.type.dtype)
    return i.b("t.index_add", x, place, source, hint=i.hint(node))


@handles(aten.index_put.default)
def index_put(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    if not accumulate or len(args[1]) != 1:
        raise CaptureError("rows set by index, of which several may be the same")
    x, place, source = i.value(args[0]), i.value(args[1][0]), i.value(args[2])
    if place.type.dtype == "bool":
        raise CaptureError("rows picked by a mask: their number depends on data")
    count = product(place.type.shape)
    wide = i.b("t.expand", source, shape=(*place.type.shape, *x.type.shape[1:]))
    rows = i.b("t.reshape", wide, shape=(count, *x.type.shape[1:]))
    flat = i.b("t.reshape", _inside(i, place, x.type.shape[0]), shape=(count,))
    return i.b("t.index_add", x, flat, rows, hint=i.hint(node))


@handles(aten.sort.default, aten.sort.stable)
def sort(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    named = dict(kwargs)
    if node.target is aten.sort.default:
        named.update(zip(("dim", "descending"), args[1:], strict=False))
    return _sorted(i, node, args[0], named)


@handles(aten.argsort.default, aten.argsort.stable)
def argsort(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    named = dict(kwargs)
    if node.target is aten.argsort.default:
        named.update(zip(("dim", "descending"), args[1:], strict=False))
    places: Value = _sorted(i, node, args[0], named)[1]
    return places


def _sorted(i: Importer, node: fx.Node, x: Any, named: Kwargs) -> Any:
    dim, descending = int(named.get("dim", -1)), bool(named.get("descending", False))
    return i.b("t.sort", i.value(x), dim=dim, descending=descending, hint=i.hints(node, 2))


# whole numbers


@handles(aten.div.Tensor_mode, aten.div.Scalar_mode)
def rounded_division(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    mode = args[2] if len(args) > 2 else kwargs.get("rounding_mode")
    return _quotient(i, node, args, str(mode))


@handles(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return _quotient(i, node, args, "floor")


def _quotient(i: Importer, node: fx.Node, args: Args, mode: str) -> Value:
    x = i.value(args[0])
    if isinstance(args[1], Value):
        return i.b("t.quotient", x, args[1], mode=mode, hint=i.hint(node))
    if not isinstance(args[1], int):
        divisor = i.b("t.size", size=args[1], dtype=x.type.dtype)
        return i.b("t.quotient", x, divisor, mode=mode, hint=i.hint(node))
    return i.b("t.quotient", x, mode=mode, other=args[1], hint=i.hint(node))


@handles(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x = i.value(args[0])
    if isinstance(args[1], Value):
        return i.b("t.remainder", x, args[1], hint=i.hint(node))
    return i.b("t.remainder", x, other=int(number(args[1])), hint=i.hint(node))


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    start, step = (args[0], 1) if len(args) > 1 else (0, 1)
    step = args[2] if len(args) > 2 else step
    (size,) = i.shape_of(node)
    return i.b(
        "t.arange",
        size=size,
        dtype=i.dtype(node),
        start=int(start),
        step=int(step),
        hint=i.hint(node),
    )


# shapes


@handles(aten.repeat.default)
def repeat(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Copies of the whole along each axis: a new axis before each, broadcast and joined."""
    x, times = i.value(args[0]), list(args[1])
    shape = (*(1 for _ in range(len(times) - x.type.rank)), *x.type.shape)
    apart = [d for size in shape for d in (1, size)]
    wide = [d for size, n in zip(shape, times, strict=True) for d in (n, size)]
    spread = i.b("t.expand", i.b("t.reshape", x, shape=tuple(apart)), shape=tuple(wide))
    return i.b("t.reshape", spread, shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.repeat_interleave.self_int)
def repeat_interleave(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, times = i.value(args[0]), args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None:
        x, dim = i.b("t.reshape", x, shape=(x.type.elements,)), 0
    after = int(dim) % x.type.rank + 1
    shape = x.type.shape
    apart = i.b("t.reshape", x, shape=(*shape[:after], 1, *shape[after:]))
    spread = i.b("t.expand", apart, shape=(*shape[:after], times, *shape[after:]))
    return i.b("t.reshape", spread, shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.unbind.int)
def unbind(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> tuple[Value, ...]:
    x = i.value(args[0])
    axis = int(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.type.rank
    count = len(node.meta["val"])
    shape = (*x.type.shape[:axis], *x.type.shape[axis + 1 :])
    names = i.hints(node, count)
    parts = (i.b("t.slice", x, dim=axis, start=j, stop=j + 1) for j in range(count))
    return tuple(
        i.b("t.reshape", part, shape=shape, hint=h) for part, h in zip(parts, names, strict=True)
    )


@handles(aten.stack.default)
def stack(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dtype, parts = i.dtype(node), [i.value(a) for a in args[0]]
    axis = int(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (parts[0].type.rank + 1)
    shape = parts[0].type.shape
    column = (*shape[:axis], 1, *shape[axis:])
    columns = [i.b("t.reshape", i.cast(p, dtype), shape=column) for p in parts]
    return i.b("t.concat", *columns, dim=axis, hint=i.hint(node))


# reductions


@handles(aten.sum.default, aten.mean.default)
def reduce_all(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    kind = "t.sum" if node.target is aten.sum.default else "t.mean"
    wanted = i.dtype(node)
    x = i.value(args[0])
    x = i.cast(x, wanted) if wanted in FLOATS else x
    axes = tuple(range(x.type.rank))
    made = i.b(kind, x, dims=axes, hint=i.hint(node)) if axes else x
    return i.cast(made, wanted)


@handles(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, dim = i.cast(i.value(args[0]), i.dtype(node)), int(args[1])
    return i.b("t.sub", x, _log_sum(i, x, dim), hint=i.hint(node))


def _log_sum(i: Importer, x: Value, dim: int) -> Value:
    """The logarithm of the sum of exponentials along an axis, which is kept."""
    top = i.b("t.amax", x, dims=(dim,), keepdim=True)
    total = i.b("t.sum", i.b("t.exp", i.b("t.sub", x, top)), dims=(dim,), keepdim=True)
    result: Value = i.b("t.add", i.b("t.log", total), top)
    return result


@handles(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where_number(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dtype = i.dtype(node)
    sides = [i.cast(a, dtype) if isinstance(a, Value) else scalar(i, a, dtype) for a in args[1:3]]
    return i.b("t.where", i.value(args[0]), *sides, hint=i.hint(node))

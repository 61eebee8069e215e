"""The table of ATen ops: what each becomes in the IR. Pointwise ops and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moec.capture.importer import ExpertSlice, Importer, handles
from moec.errors import CaptureError
from moec.ir.dims import Dim, canon
from moec.ir.graph import Value
from moec.ir.prove import prove_at_most
from moec.ir.types import FLOATS, Type, dtype_name

aten = torch.ops.aten
Args = Sequence[Any]
Kwargs = Mapping[str, Any]

_UNARY: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.sign.default: "sign",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.log1p.default: "log1p",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.erf.default: "erf",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.floor.default: "floor",
    aten.log_sigmoid.default: "log_sigmoid",
}
_BINARY = {
    aten.add: "add",
    aten.sub: "sub",
    aten.mul: "mul",
    aten.div: "div",
    aten.maximum: "maximum",
    aten.minimum: "minimum",
}
_COMPARISON = {
    aten.eq: "eq",
    aten.ne: "ne",
    aten.lt: "lt",
    aten.le: "le",
    aten.gt: "gt",
    aten.ge: "ge",
}


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, o) for o in packet.overloads() if o in ("Tensor", "Scalar", "default")]


@handles(*_UNARY)
def unary(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x = i.cast(i.value(args[0]), i.dtype(node))
    return i.b(f"t.{_UNARY[node.target]}", x, hint=i.hint(node))


@handles(*(o for p in _BINARY for o in _overloads(p)))
def binary(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    name = _BINARY[node.target.overloadpacket]  # type: ignore[union-attr]
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None:
        raise CaptureError(f"{name} with {dict(kwargs)}")
    dtype = i.dtype(node)
    x, y = args[0], args[1]
    if isinstance(y, sympy.Expr):
        y = i.b("t.size", size=y, dtype=dtype)
    if not isinstance(y, Value | ExpertSlice):
        fill = number(y) if dtype in FLOATS else int(number(y))
        return i.b(f"t.{name}", i.cast(i.value(x), dtype), other=fill, hint=i.hint(node))
    if not isinstance(x, Value | ExpertSlice):
        x = i.b.full(Type(dtype, ()), number(x))
    return i.b(f"t.{name}", i.cast(i.value(x), dtype), i.cast(i.value(y), dtype), hint=i.hint(node))


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CaptureError(f"expected a number, got {value!r}")
    return float(value)


@handles(*(o for p in _COMPARISON for o in _overloads(p)))
def comparison(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    name = _COMPARISON[node.target.overloadpacket]  # type: ignore[union-attr]
    x, y = i.value(args[0]), args[1]
    if isinstance(y, sympy.Expr):
        y = i.b("t.size", size=y, dtype=x.type.dtype)
    if not isinstance(y, Value | ExpertSlice):
        return i.b(f"t.{name}", x, other=number(y), hint=i.hint(node))
    other = i.value(y)
    if other.type.dtype != x.type.dtype:
        common = dtype_name(torch.promote_types(_torch(x), _torch(other)))
        x, other = i.cast(x, common), i.cast(other, common)
    return i.b(f"t.{name}", x, other, hint=i.hint(node))


def _torch(value: Value) -> torch.dtype:
    from moec.ir.types import DTYPES

    return DTYPES[value.type.dtype]


@handles(aten.rsub.Scalar)
def rsub(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.add", i.b("t.neg", i.value(args[0])), other=number(args[1]), hint=i.hint(node))


@handles(aten.pow.Tensor_Scalar)
def power(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b(
        "t.pow",
        i.cast(i.value(args[0]), i.dtype(node)),
        exponent=number(args[1]),
        hint=i.hint(node),
    )


@handles(aten.square.default)
def square(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.pow", i.value(args[0]), exponent=2.0, hint=i.hint(node))


@handles(aten.gelu.default)
def gelu(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b(
        "t.gelu",
        i.value(args[0]),
        approximate=str(kwargs.get("approximate", "none")),
        hint=i.hint(node),
    )


@handles(aten.softplus.default)
def softplus(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    options: dict[str, Any] = dict(zip(("beta", "threshold"), map(float, args[1:]), strict=False))
    return i.b("t.softplus", i.value(args[0]), hint=i.hint(node), **options)


@handles(
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
    aten.hardtanh.default,
)
def clamp(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    bounds: dict[str, Any] = {
        "min": args[1] if len(args) > 1 else kwargs.get("min"),
        "max": args[2] if len(args) > 2 else kwargs.get("max"),
    }
    if node.target in (aten.clamp_max.default, aten.clamp_max.Tensor):
        bounds = {"min": None, "max": args[1]}
    if node.target is aten.hardtanh.default and len(args) == 1:
        bounds = {"min": -1.0, "max": 1.0}
    if any(isinstance(v, Value) for v in bounds.values()):
        return _clamp_by_tensors(i, node, i.value(args[0]), bounds)
    numbers: dict[str, Any] = {k: number(v) for k, v in bounds.items() if v is not None}
    return i.b("t.clamp", i.value(args[0]), hint=i.hint(node), **numbers)


def _clamp_by_tensors(i: Importer, node: fx.Node, x: Value, bounds: Mapping[str, Any]) -> Value:
    """The bound where the value is beyond it or the bound is NaN; by choice, since of a value equal
    to its bound the value gets all of the gradient.
    """
    for name, beyond in (("min", "t.lt"), ("max", "t.gt")):
        if bounds[name] is None:
            continue
        bound = bounds[name]
        bound = i.cast(bound, x.type.dtype) if isinstance(bound, Value) else _constant(i, x, bound)
        chosen = i.b("t.logical_or", i.b(beyond, x, bound), i.b("t.ne", bound, bound))
        x = i.b("t.where", chosen, bound, x, hint=i.hint(node))
    return x


def _constant(i: Importer, like: Value, value: Any) -> Value:
    return scalar(i, value, like.type.dtype)


def scalar(i: Importer, value: Any, dtype: str) -> Value:
    """A number, or a size, in a tensor without axes."""
    if isinstance(value, sympy.Expr):
        size: Value = i.b("t.size", size=value, dtype=dtype)
        return size
    full: Value = i.b.full(Type(dtype, ()), number(value))
    return full


@handles(
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default
)
def to_copy(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    if isinstance(args[0], ExpertSlice):
        return ExpertSlice(i.cast(args[0].stack, i.dtype(node)))
    return i.cast(args[0], i.dtype(node))


@handles(
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
def same(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    return args[0]


@handles(aten.dropout.default)
def dropout(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    if args[1] != 0 and args[2]:
        raise CaptureError("dropout inside a MoE block in training mode")
    return args[0]


@handles(aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)
def nothing(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> None:
    return None


@handles(aten.bitwise_not.default, aten.logical_not.default)
def negate(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.logical_not", i.cast(i.value(args[0]), "bool"), hint=i.hint(node))


@handles(aten.bitwise_and.Tensor, aten.logical_and.default)
def both(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.logical_and", i.value(args[0]), i.value(args[1]), hint=i.hint(node))


@handles(aten.bitwise_or.Tensor, aten.logical_or.default)
def either(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.logical_or", i.value(args[0]), i.value(args[1]), hint=i.hint(node))


@handles(aten.where.self)
def where(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dtype = i.dtype(node)
    return i.b(
        "t.where",
        i.value(args[0]),
        i.cast(i.value(args[1]), dtype),
        i.cast(i.value(args[2]), dtype),
        hint=i.hint(node),
    )


@handles(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x = i.value(args[0])
    dtype = x.type.dtype
    fill = i.cast(args[2], dtype) if isinstance(args[2], Value) else scalar(i, args[2], dtype)
    return i.b("t.where", i.value(args[1]), fill, x, hint=i.hint(node))


# shapes


@handles(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def reshape(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    if isinstance(args[0], ExpertSlice) and args[0].rank == 1:
        return args[0]  # a vector that gets axes of size 1 to broadcast over rows
    return i.b("t.reshape", i.value(args[0]), shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default)
def permute(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    x = args[0]
    rank = x.rank if isinstance(x, ExpertSlice) else x.type.rank
    order = _order(node.target, args, rank)
    if isinstance(x, ExpertSlice):
        shifted = (0, *(d + 1 for d in order))
        return ExpertSlice(i.b("t.permute", x.stack, dims=shifted, hint=x.stack.hint))
    return i.b("t.permute", x, dims=order, hint=i.hint(node))


def _order(target: Any, args: Args, rank: int) -> tuple[int, ...]:
    order = list(range(rank))
    if target is aten.permute.default:
        return tuple(int(d) % rank for d in args[1])
    if target is aten.transpose.int:
        a, b = int(args[1]) % rank, int(args[2]) % rank
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return tuple(reversed(order))


@handles(aten.expand.default, aten.broadcast_to.default)
def expand(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.expand", i.value(args[0]), shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.slice.Tensor)
def slice_(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    defaults = (0, None, None, 1)
    dim, start, stop, step = (*args[1:], *defaults[len(args) - 1 :])
    x = args[0].stack if isinstance(args[0], ExpertSlice) else i.value(args[0])
    axis = int(dim) % (x.type.rank - isinstance(args[0], ExpertSlice)) + isinstance(
        args[0], ExpertSlice
    )
    size = x.type.shape[axis]
    if _is_start(start, size) and (stop is None or _beyond(stop, size)) and step == 1:
        return args[0]
    low, high = _bounds(i, start or 0, size if stop is None else stop, size)
    made = i.b("t.slice", x, dim=axis, start=low, stop=high, step=int(step), hint=i.hint(node))
    return ExpertSlice(made) if isinstance(args[0], ExpertSlice) else made


def _bounds(i: Importer, start: Any, stop: Any, size: Dim) -> tuple[Dim, Dim]:
    """Where a slice begins and ends; of a token axis, if that is within it at every size."""
    if isinstance(size, int):
        low, high = _inside(int(start), size), _inside(int(stop), size)
        return low, max(low, high)
    low, high = (canon(b + size) if isinstance(b, int) and b < 0 else b for b in (start, stop))
    if not all(prove_at_most(a, b, i.b.ranges) for a, b in ((0, low), (low, high), (high, size))):
        raise CaptureError("a slice of a token axis")
    return low, high


def _is_start(start: Any, size: Any) -> bool:
    """Whether a slice begins at the first element: ``[-size:]`` does, too."""
    return start in (0, None) or (not isinstance(start, int) and bool(start + size == 0))


def _beyond(stop: Any, size: Any) -> bool:
    return bool(stop == size) or (isinstance(stop, int) and stop >= 2**62)


def _inside(bound: int, size: int) -> int:
    return min(max(bound + size if bound < 0 else bound, 0), size)


@handles(aten.select.int)
def select(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    if isinstance(args[0], ExpertSlice):
        raise CaptureError("an index into one expert's weight")
    x = i.value(args[0])
    axis, index = int(args[1]) % x.type.rank, int(args[2])
    size = x.type.shape[axis]
    if not isinstance(size, int):
        raise CaptureError("an index into a token axis")
    index = index + size if index < 0 else index
    one = i.b("t.slice", x, dim=axis, start=index, stop=index + 1)
    return i.b("t.reshape", one, shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
    x = args[0].stack if isinstance(args[0], ExpertSlice) else i.value(args[0])
    shift = int(isinstance(args[0], ExpertSlice))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axis = int(dim) % (x.type.rank - shift) + shift
    sizes = [int(v.shape[axis - shift]) for v in node.meta["val"]]
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    names = i.hints(node, len(sizes))
    parts = [
        i.b("t.slice", x, dim=axis, start=s, stop=s + n, hint=h)
        for s, n, h in zip(starts, sizes, names, strict=True)
    ]
    return tuple(ExpertSlice(p) if shift else p for p in parts)


@handles(aten.cat.default, aten.concat.default)
def concat(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dtype = i.dtype(node)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return i.b(
        "t.concat", *(i.cast(i.value(a), dtype) for a in args[0]), dim=int(dim), hint=i.hint(node)
    )


@handles(aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default)
def full(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    if node.target is aten.scalar_tensor.default:
        return scalar(i, args[0], i.dtype(node))
    known: dict[Any, float] = {aten.zeros.default: 0.0, aten.ones.default: 1.0}
    fill = known.get(node.target)
    if fill is None:
        fill = number(args[1])
    return i.b("t.full", value=fill, dtype=i.dtype(node), shape=i.shape_of(node), hint=i.hint(node))


@handles(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.new_empty.default,
)
def full_like(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    name = str(node.target)
    fill = (
        0.0
        if "zeros" in name or "empty" in name
        else 1.0
        if "ones" in name
        else number(args[2] if "new_full" in name else args[1])
    )
    return i.b("t.full", value=fill, dtype=i.dtype(node), shape=i.shape_of(node), hint=i.hint(node))

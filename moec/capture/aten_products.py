"""The rest of the table of ATen ops: reductions, indexing, norms and products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.capture.aten import number
from moec.capture.importer import ExpertSlice, Importer, handles
from moec.errors import CaptureError
from moec.ir.graph import Value
from moec.ir.types import FLOATS

aten = torch.ops.aten
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@handles(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
def reduce(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    kinds: dict[Any, str] = {aten.mean.dim: "t.mean", aten.amax.default: "t.amax"}
    kind = kinds.get(node.target, "t.sum")
    x = i.value(args[0])
    dims = args[1] if len(args) > 1 and args[1] else range(x.type.rank)
    dims = tuple(int(d) for d in (dims if isinstance(dims, list | tuple | range) else [dims]))
    keepdim = bool(args[2]) if len(args) > 2 else False
    wanted = i.dtype(node)
    x = i.cast(x, wanted) if wanted in FLOATS else x
    return i.cast(i.b(kind, x, dims=dims, keepdim=keepdim, hint=i.hint(node)), wanted)


@handles(aten.linalg_vector_norm.default)
def vector_norm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    defaults: tuple[Any, ...] = (None, 2, None, False)
    x, order, dims, keepdim = (*args, *defaults[len(args) :])[:4]
    return _norm(i, node, i.value(x), float(order), dims, bool(keepdim))


@handles(aten.norm.ScalarOpt_dim)
def norm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, order, dims, keepdim = (*args, False)[:4]
    return _norm(i, node, i.value(x), 2.0 if order is None else float(order), dims, bool(keepdim))


def _norm(i: Importer, node: fx.Node, x: Value, order: float, dims: Any, keepdim: bool) -> Value:
    """The norm of an order over axes, summed in float32 at least."""
    if order == 2 and dims is not None and len(dims) == 1:
        length = i.b("t.norm", x, dim=int(dims[0]), hint=i.hint(node))
        return length if keepdim else i.b("t.reshape", length, shape=i.shape_of(node))
    dims = tuple(dims) if dims else tuple(range(x.type.rank))
    size = i.b("t.abs", i.cast(x, "f64" if x.type.dtype == "f64" else "f32"))
    if order == math.inf:
        return i.cast(i.b("t.amax", size, dims=dims, keepdim=keepdim), i.dtype(node))
    if order <= 0:
        raise CaptureError(f"a norm of order {order}")
    powers = size if order == 1 else i.b("t.pow", size, exponent=order)
    total = i.b("t.sum", powers, dims=dims, keepdim=keepdim, hint=i.hint(node))
    if order == 2:
        total = i.b("t.sqrt", total, hint=i.hint(node))
    elif order != 1:
        total = i.b("t.pow", total, exponent=1.0 / order, hint=i.hint(node))
    result: Value = i.cast(total, i.dtype(node))
    return result


@handles(aten.native_layer_norm.default)
def native_layer_norm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> tuple[Value, ...]:
    return (_layer_norm(i, node, i.value(args[0]), args[1], args[2:4], float(args[4])),)


@handles(aten.layer_norm.default)
def layer_norm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, shape, *rest = args
    eps = float(rest[2]) if len(rest) > 2 else 1e-5
    return _layer_norm(i, node, i.value(x), shape, rest[:2], eps)


def _layer_norm(
    i: Importer, node: fx.Node, x: Value, shape: Any, affine: Sequence[Any], eps: float
) -> Value:
    """Normalise over the last axis, in float32 at least, as PyTorch's own kernels do."""
    if len(shape) != 1:
        raise CaptureError("a layer norm over several axes")
    dtype = x.type.dtype
    wide = i.cast(x, "f64" if dtype == "f64" else "f32")
    centred = i.b("t.sub", wide, i.b("t.mean", wide, dims=(-1,), keepdim=True))
    variance = i.b("t.mean", i.b("t.mul", centred, centred), dims=(-1,), keepdim=True)
    y = i.b("t.mul", centred, i.b("t.rsqrt", i.b("t.add", variance, other=eps)))
    for kind, term in zip(("t.mul", "t.add"), affine, strict=False):
        y = y if term is None else i.b(kind, y, i.cast(i.value(term), wide.type.dtype))
    result: Value = i.cast(y, dtype)
    return result


@handles(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b(
        "t.softmax", i.cast(i.value(args[0]), i.dtype(node)), dim=int(args[1]), hint=i.hint(node)
    )


@handles(aten.cumsum.default)
def cumsum(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.cumsum", i.value(args[0]), dim=int(args[1]), hint=i.hint(node))


@handles(aten.topk.default)
def topk(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    defaults: tuple[Any, ...] = (None, None, -1, True, True)
    _, k, dim, largest, ordered = (*args, *defaults[len(args) :])
    attrs: dict[str, Any] = {
        "dim": int(dim),
        "largest": bool(kwargs.get("largest", largest)),
        "sorted": bool(kwargs.get("sorted", ordered)),
    }
    attrs = {n: v for n, v in attrs.items() if v != {"dim": -1, "largest": True, "sorted": True}[n]}
    return i.b("t.topk", i.value(args[0]), k=k, hint=i.hints(node, 2), **attrs)


@handles(aten.max.dim)
def largest(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> tuple[Value, Value]:
    x, axis, keepdim = i.value(args[0]), int(args[1]), bool(args[2]) if len(args) > 2 else False
    index = _argmax(i, node, x, axis)
    value = i.b("t.gather", x, index, dim=axis, hint=i.hint(node))
    return (value, index) if keepdim else (_without(i, value, axis), _without(i, index, axis))


@handles(aten.argmax.default)
def argmax(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if axis is None:
        raise CaptureError("argmax over all axes")
    index = _argmax(i, node, i.value(args[0]), int(axis))
    keepdim = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
    return index if keepdim else _without(i, index, int(axis))


def _argmax(i: Importer, node: fx.Node, x: Value, axis: int) -> Value:
    """The first place of the largest value, or of the first NaN, with the axis kept.

    Top-k with k = 1 will not do: it takes another one of equal values (rows of zeros have them).
    """
    top = i.b("t.amax", x, dims=(axis,), keepdim=True)
    found = i.b("t.logical_or", i.b("t.eq", x, top), i.b("t.ne", x, x))
    so_far = i.b("t.cumsum", i.cast(found, "i64"), dim=axis)
    before = i.cast(i.b("t.eq", so_far, other=0.0), "i64")
    index: Value = i.b("t.sum", before, dims=(axis,), keepdim=True, hint=i.hint(node))
    return index


def _without(i: Importer, value: Value, axis: int) -> Value:
    shape = list(value.type.shape)
    del shape[axis]
    reshaped: Value = i.b("t.reshape", value, shape=tuple(shape), hint=value.hint)
    return reshaped


@handles(aten.logsumexp.default)
def logsumexp(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dims = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    keepdim = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
    dims = tuple(int(d) for d in dims)
    return i.b("t.logsumexp", i.value(args[0]), dims=dims, keepdim=keepdim, hint=i.hint(node))


@handles(aten.gather.default)
def gather(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.gather", i.value(args[0]), i.value(args[2]), dim=int(args[1]), hint=i.hint(node))


@handles(aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def scatter(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, dim, index, source = i.value(args[0]), int(args[1]), i.value(args[2]), args[3]
    if node.target is aten.scatter_add.default:
        return i.b("t.scatter_add", x, index, i.value(source), dim=dim, hint=i.hint(node))
    if isinstance(source, Value):
        return i.b("t.scatter", x, index, i.cast(source, x.type.dtype), dim=dim, hint=i.hint(node))
    return i.b("t.scatter", x, index, dim=dim, value=number(source), hint=i.hint(node))


@handles(aten.one_hot.default)
def one_hot(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    return i.b("t.one_hot", i.value(args[0]), classes=args[1], hint=i.hint(node))


# products


@handles(aten.linear.default)
def linear(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, w = i.value(args[0]), args[1]
    if isinstance(w, ExpertSlice):
        return _grouped(
            i, node, x, ExpertSlice(w.stack), args[2] if len(args) > 2 else None, transposed=False
        )
    biases = [i.value(a) for a in args[2:] if a is not None]
    return i.b("t.linear", x, w, *biases, hint=i.hint(node))


def _grouped(
    i: Importer, node: fx.Node, x: Value, w: ExpertSlice, bias: Any, *, transposed: bool
) -> Value:
    if i.offsets is None or w.rank != 2:
        raise CaptureError(f"a product with a weight of type {w.stack.type}")
    y: Value = i.b(
        "moe.grouped_mm", x, w.stack, i.offsets, transposed=transposed, hint=i.hint(node)
    )
    return y if bias is None else i.b("t.add", y, i.value(bias), hint=i.hint(node))


@handles(aten.mm.default, aten.matmul.default, aten.bmm.default)
def matmul(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    x, y = args[0], args[1]
    if isinstance(y, ExpertSlice):
        return _grouped(i, node, i.value(x), y, None, transposed=True)
    if isinstance(x, ExpertSlice):
        raise CaptureError("an expert's weight as the left factor of a product")
    weights = _turned(i, i.value(y))
    if weights is not None:
        return i.b("t.linear", x, weights, hint=i.hint(node))
    return i.b("t.matmul", x, y, hint=i.hint(node))


def _turned(i: Importer, value: Value) -> Value | None:
    """The matrix of which a value is the transpose: PyTorch multiplies by it without a copy, which
    rounds otherwise than a product with a copy.
    """
    op = i.b.made_by(value)
    turned = op is not None and op.kind == "t.permute" and op.attrs["dims"] == (1, 0)
    return op.operands[0] if op is not None and turned else None


@handles(aten.baddbmm.default)
def baddbmm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    added, x, y = map(i.value, args[:3])
    product = i.b("t.matmul", x, y)
    beta, alpha = (number(kwargs.get(name, 1)) for name in ("beta", "alpha"))
    scaled = product if alpha == 1 else i.b("t.mul", product, other=alpha)
    rest = added if beta == 1 else i.b("t.mul", added, other=beta)
    return i.b("t.add", rest, scaled, hint=i.hint(node))


@handles(aten.addmm.default)
def addmm(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise CaptureError(f"addmm with {dict(kwargs)}")
    bias, x, w = args[:3]
    if isinstance(w, ExpertSlice):
        return _grouped(i, node, i.value(x), w, bias, transposed=True)
    weights, x, bias = _turned(i, i.value(w)), i.value(x), i.value(bias)
    if weights is not None and bias.type.shape == weights.type.shape[:1]:
        return i.b("t.linear", x, weights, bias, hint=i.hint(node))
    return i.b("t.add", i.b("t.matmul", x, i.value(w)), bias, hint=i.hint(node))

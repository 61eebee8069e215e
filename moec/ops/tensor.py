"""The ``t.`` dialect beyond pointwise ops: shapes, reductions, indexing and dense products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.dims import Dim, canon, ceildiv, product, show_dim
from moec.ir.graph import Op, Value
from moec.ir.opdef import defop
from moec.ir.prove import prove_at_most
from moec.ir.types import DTYPES, Type
from moec.ops.shapes import axis, broadcast, reduce_to, reduced, require, same_dtype


@defop("t.full")
class Full:
    """A tensor of one number."""

    def infer(*, value: float, dtype: str, shape: tuple[Dim, ...] = ()) -> Type:
        return Type(dtype, shape)

    def eval(*, value: float, dtype: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        return torch.full(shape, value, dtype=DTYPES[dtype])


@defop("t.reshape")
class Reshape:
    """The same elements, in row-major order, in another shape."""

    def infer(x: Type, *, shape: tuple[Dim, ...]) -> Type:
        require(
            product(shape) == x.elements,
            f"{x} has {x.elements} elements, the shape {shape} has {product(shape)}",
        )
        return x.with_shape(*shape)

    def eval(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
        return x.reshape(shape)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (b("t.reshape", g, shape=op.operands[0].type.shape),)


@defop("t.permute")
class Permute:
    """Axes in another order."""

    def infer(x: Type, *, dims: tuple[int, ...]) -> Type:
        require(sorted(dims) == list(range(x.rank)), f"{dims} is no order of the axes of {x}")
        return x.with_shape(*(x.shape[d] for d in dims))

    def eval(x: torch.Tensor, *, dims: tuple[int, ...]) -> torch.Tensor:
        return x.permute(dims)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        dims = op.attrs["dims"]
        return (b("t.permute", g, dims=tuple(sorted(range(len(dims)), key=dims.__getitem__))),)


@defop("t.expand")
class Expand:
    """Broadcast to a shape."""

    def infer(x: Type, *, shape: tuple[Dim, ...]) -> Type:
        require(
            broadcast(x.shape, shape) == tuple(canon(s) for s in shape),
            f"{x} does not broadcast to {shape}",
        )
        return x.with_shape(*shape)

    def eval(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
        return x.expand(shape)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (reduce_to(b, g, op.operands[0].type),)


def _sliced(start: Dim, stop: Dim, size: Dim, step: int) -> Dim:
    """The number of elements from ``start`` up to ``stop`` by ``step`` of an axis of ``size``."""
    ordered = [prove_at_most(a, b, {}) for a, b in ((0, start), (start, stop), (stop, size))]
    require(
        step >= 1 and False not in ordered,
        f"{show_dim(start)}:{show_dim(stop)}:{step} is no slice of an axis of {show_dim(size)}",
    )
    return canon(ceildiv(canon(stop - start), step))


@defop("t.slice")
class Slice:
    """Every ``step``-th element of an axis from ``start`` up to ``stop``."""

    def infer(x: Type, *, dim: int, start: Dim, stop: Dim, step: int = 1) -> Type:
        d = axis(dim, x.rank)
        return x.with_shape(*x.shape[:d], _sliced(start, stop, x.shape[d], step), *x.shape[d + 1 :])

    def eval(x: torch.Tensor, *, dim: int, start: int, stop: int, step: int = 1) -> torch.Tensor:
        index = [slice(None)] * x.dim()
        index[dim] = slice(start, stop, step)
        return x[tuple(index)]

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        attrs = {k: op.attrs[k] for k in ("dim", "start", "stop", "step") if k in op.attrs}
        return (
            b(
                "t.unslice",
                g,
                size=op.operands[0].type.shape[axis(attrs["dim"], g.type.rank)],
                **attrs,
            ),
        )


@defop("t.unslice")
class Unslice:
    """The transpose of ``t.slice``: the elements back at their places of an axis of ``size``, zero
    elsewhere.
    """

    def infer(x: Type, *, dim: int, start: Dim, stop: Dim, size: Dim, step: int = 1) -> Type:
        d = axis(dim, x.rank)
        require(
            _sliced(start, stop, size, step) == x.shape[d],
            f"{x} is no slice {show_dim(start)}:{show_dim(stop)}:{step} along axis {d}",
        )
        return x.with_shape(*x.shape[:d], size, *x.shape[d + 1 :])

    def eval(
        x: torch.Tensor, *, dim: int, start: int, stop: int, size: int, step: int = 1
    ) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = size
        index = [slice(None)] * x.dim()
        index[dim] = slice(start, stop, step)
        out = x.new_zeros(shape)
        out[tuple(index)] = x
        return out


def _check_layout(layout: str) -> None:
    require(
        layout in ("concat", "interleave"), f"layout {layout!r} is neither concat nor interleave"
    )


@defop("t.split")
class Split:
    """The last axis in ``parts`` equal parts: one after the other ("concat") or alternating
    ("interleave").
    """

    def infer(x: Type, *, parts: int, layout: str = "concat") -> tuple[Type, ...]:
        size = x.shape[-1]
        require(
            isinstance(size, int) and 1 <= parts <= 64 and size % parts == 0,
            f"the last axis of {x} has no {parts} equal parts (at most 64)",
        )
        _check_layout(layout)
        return (x.with_shape(*x.shape[:-1], int(size) // parts),) * parts

    def eval(x: torch.Tensor, *, parts: int, layout: str = "concat") -> tuple[torch.Tensor, ...]:
        if layout == "concat":
            return x.tensor_split(parts, dim=-1)
        return tuple(x[..., i::parts] for i in range(parts))

    def vjp(b: Any, op: Op, *grads: Value | None) -> tuple[Value]:
        filled = [
            b.full(r.type, 0.0) if g is None else g for g, r in zip(grads, op.results, strict=True)
        ]
        return (b("t.merge", *filled, layout=op.attrs.get("layout", "concat")),)


@defop("t.merge")
class Merge:
    """The inverse of ``t.split``."""

    def infer(*parts: Type, layout: str = "concat") -> Type:
        require(len(set(parts)) == 1, f"parts differ: {', '.join(map(str, parts))}")
        _check_layout(layout)
        first = parts[0]
        return first.with_shape(*first.shape[:-1], canon(first.shape[-1] * len(parts)))

    def eval(*parts: torch.Tensor, layout: str = "concat") -> torch.Tensor:
        if layout == "concat":
            return torch.cat(parts, dim=-1)
        return torch.stack(parts, dim=-1).flatten(-2)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, ...]:
        return tuple(
            b("t.split", g, parts=len(op.operands), layout=op.attrs.get("layout", "concat"))
        )


@defop("t.stack")
class Stack:
    """Tensors of one type stacked along a new first axis."""

    def infer(*parts: Type) -> Type:
        require(len(set(parts)) == 1, f"parts differ: {', '.join(map(str, parts))}")
        return parts[0].with_shape(len(parts), *parts[0].shape)

    def eval(*parts: torch.Tensor) -> torch.Tensor:
        return torch.stack(parts)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, ...]:
        shape = op.operands[0].type.shape
        return tuple(
            b("t.reshape", b("t.slice", g, dim=0, start=i, stop=i + 1), shape=shape)
            for i in range(len(op.operands))
        )


@defop("t.concat")
class Concat:
    """Tensors one after the other along an axis."""

    def infer(*parts: Type, dim: int) -> Type:
        first = parts[0]
        d = axis(dim, first.rank)
        same_dtype(*parts)
        for p in parts:
            require(
                p.shape[:d] + p.shape[d + 1 :] == first.shape[:d] + first.shape[d + 1 :],
                f"{p} and {first} differ beyond axis {d}",
            )
        return first.with_shape(
            *first.shape[:d], canon(sum(p.shape[d] for p in parts)), *first.shape[d + 1 :]
        )

    def eval(*parts: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(parts, dim=dim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, ...]:
        d, start, grads = axis(op.attrs["dim"], g.type.rank), 0, []
        for v in op.operands:
            stop = canon(start + v.type.shape[d])
            grads.append(b("t.slice", g, dim=d, start=start, stop=stop))
            start = stop
        return tuple(grads)


def _expand_reduced(b: Any, op: Op, g: Value) -> Value:
    """A gradient of a reduction, broadcast back over the reduced axes."""
    shape = op.operands[0].type.shape
    kept = reduced(shape, op.attrs["dims"], True)
    return b("t.expand", b("t.reshape", g, shape=kept) if g.type.shape != kept else g, shape=shape)


@defop("t.sum")
class Sum:
    """The sum over axes (at least one)."""

    def infer(x: Type, *, dims: tuple[int, ...], keepdim: bool = False) -> Type:
        return Type(x.dtype if x.is_float else "i64", reduced(x.shape, dims, keepdim))

    def eval(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        return torch.sum(x, dim=dims, keepdim=keepdim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (_expand_reduced(b, op, g),)


@defop("t.mean")
class Mean:
    """The mean over axes."""

    def infer(x: Type, *, dims: tuple[int, ...], keepdim: bool = False) -> Type:
        require(x.is_float, f"needs a float, got {x}")
        return x.with_shape(*reduced(x.shape, dims, keepdim))

    def eval(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        return torch.mean(x, dim=dims, keepdim=keepdim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        shape = op.operands[0].type.shape
        count = product([shape[axis(d, len(shape))] for d in op.attrs["dims"]])
        spread = _expand_reduced(b, op, g)
        if not isinstance(count, int):
            return (b("t.div", spread, b("t.size", size=count, dtype=g.type.dtype)),)
        return (b("t.mul", spread, other=1.0 / float(count)),)


@defop("t.amax")
class Amax:
    """The largest element over axes; equal ones share the gradient."""

    def infer(x: Type, *, dims: tuple[int, ...], keepdim: bool = False) -> Type:
        return x.with_shape(*reduced(x.shape, dims, keepdim))

    def eval(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        return torch.amax(x, dim=dims, keepdim=keepdim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        x = op.operands[0]
        hit = b("t.cast", b("t.eq", x, _expand_reduced(b, op, op.result)), dtype=g.type.dtype)
        count = b("t.sum", hit, dims=op.attrs["dims"], keepdim=True)
        return (b("t.div", b("t.mul", hit, _expand_reduced(b, op, g)), count),)


@defop("t.logsumexp")
class LogSumExp:
    """``log(sum(exp(x)))`` over axes, without overflow."""

    def infer(x: Type, *, dims: tuple[int, ...], keepdim: bool = False) -> Type:
        require(x.is_float, f"needs a float, got {x}")
        return x.with_shape(*reduced(x.shape, dims, keepdim))

    def eval(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
        return torch.logsumexp(x, dim=dims, keepdim=keepdim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        below = b("t.sub", op.operands[0], _expand_reduced(b, op, op.result))
        return (b("t.mul", _expand_reduced(b, op, g), b("t.exp", below)),)


@defop("t.softmax")
class Softmax:
    """Softmax along an axis."""

    def infer(x: Type, *, dim: int) -> Type:
        axis(dim, x.rank)
        require(x.is_float, f"needs a float, got {x}")
        return x

    def eval(x: torch.Tensor, *, dim: int) -> torch.Tensor:
        return torch.softmax(x, dim=dim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        # in the order of PyTorch's own gradient: the same bits in a float32 part of a float64 model
        total = b("t.sum", b("t.mul", g, op.result), dims=(op.attrs["dim"],), keepdim=True)
        return (b("t.mul", b("t.sub", g, total), op.result),)


@defop("t.cumsum")
class Cumsum:
    """Running sums along an axis (integers give i64)."""

    def infer(x: Type, *, dim: int) -> Type:
        axis(dim, x.rank)
        return x if x.is_float else x.with_dtype("i64")

    def eval(x: torch.Tensor, *, dim: int) -> torch.Tensor:
        return torch.cumsum(x, dim=dim)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        """The running sums of ``g`` from the other end."""
        dim = op.attrs["dim"]
        total = b("t.sum", g, dims=(dim,), keepdim=True)
        before = b("t.sub", b("t.cumsum", g, dim=dim), g)
        return (b("t.sub", b("t.expand", total, shape=g.type.shape), before),)


@defop("t.linear")
class Linear:
    """``x @ w.T + bias`` over the last axis; ``w`` is ``[out, in]``."""

    def infer(x: Type, w: Type, bias: Type | None = None) -> Type:
        require(w.rank == 2 and x.rank >= 1, f"needs w of rank 2, got {w}")
        require(
            x.shape[-1] == w.shape[1], f"inner dimensions differ: {x.shape[-1]} and {w.shape[1]}"
        )
        same_dtype(x, w, *(() if bias is None else (bias,)))
        require(
            bias is None or bias.shape == w.shape[:1], f"the bias {bias} does not fit weights {w}"
        )
        return x.with_shape(*x.shape[:-1], w.shape[0])

    def eval(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, w, bias)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, ...]:
        x, w = op.operands[:2]
        rows = canon(product(x.type.shape[:-1]))
        flat_g = b("t.reshape", g, shape=(rows, g.type.shape[-1])) if g.type.rank != 2 else g
        flat_x = b("t.reshape", x, shape=(rows, x.type.shape[-1])) if x.type.rank != 2 else x
        dx = b("t.matmul", flat_g, w)
        dx = b("t.reshape", dx, shape=x.type.shape) if x.type.rank != 2 else dx
        dw = b("t.matmul", b("t.permute", flat_g, dims=(1, 0)), flat_x)
        return (dx, dw) if len(op.operands) == 2 else (dx, dw, b("t.sum", flat_g, dims=(0,)))


@defop("t.matmul")
class Matmul:
    """The matrix product over the last two axes, leading axes broadcast."""

    def infer(x: Type, y: Type) -> Type:
        require(x.rank >= 2 and y.rank >= 2, f"needs ranks of at least 2, got {x} and {y}")
        require(
            x.shape[-1] == y.shape[-2], f"inner dimensions differ: {x.shape[-1]} and {y.shape[-2]}"
        )
        return Type(
            same_dtype(x, y), (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        )

    def eval(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, y)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, Value]:
        x, y = op.operands
        dx = b("t.matmul", g, _transposed(b, y))
        dy = b("t.matmul", _transposed(b, x), g)
        return reduce_to(b, dx, x.type), reduce_to(b, dy, y.type)


def _transposed(b: Any, x: Value) -> Value:
    order = list(range(x.type.rank))
    order[-1], order[-2] = order[-2], order[-1]
    return b("t.permute", x, dims=tuple(order))

"""The ``t.`` ops that pick, add and order whole rows by a table of indices."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.dims import product
from moec.ir.graph import Op, Value
from moec.ir.opdef import defop
from moec.ir.types import Type
from moec.ops.shapes import axis, require, same_dtype


@defop("t.take")
class Take:
    """The rows of ``x`` at ``index``, along its first axis: ``out[i.., :] = x[index[i..], :]``."""

    def infer(x: Type, index: Type) -> Type:
        require(x.rank >= 1, f"{x} has no rows")
        require(index.dtype in ("i32", "i64"), f"an index must be i32 or i64, got {index}")
        return x.with_shape(*index.shape, *x.shape[1:])

    def eval(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, index.reshape(-1)).reshape(*index.shape, *x.shape[1:])

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None]:
        x, index = op.operands
        count = product(index.type.shape)
        rows = b("t.reshape", g, shape=(count, *x.type.shape[1:]))
        flat = b("t.reshape", index, shape=(count,))
        return b("t.index_add", b.full(x.type, 0.0), flat, rows), None


@defop("t.index_add")
class IndexAdd:
    """``x`` with the rows of ``src`` added at ``index``, along the first axis."""

    def infer(x: Type, index: Type, src: Type) -> Type:
        same_dtype(x, src)
        require(index.dtype in ("i32", "i64"), f"an index must be i32 or i64, got {index}")
        require(
            index.rank == 1 and src.shape == (index.shape[0], *x.shape[1:]),
            f"{src} is not one row of {x} for each of {index}",
        )
        return x

    def eval(x: torch.Tensor, index: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
        return torch.index_add(x, 0, index, src)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None, Value]:
        return g, None, b("t.take", g, op.operands[1])


@defop("t.sort")
class Sort:
    """The elements along an axis in order, and where they were (i64); equal ones keep their
    order.
    """

    def infer(x: Type, *, dim: int = -1, descending: bool = False) -> tuple[Type, Type]:
        axis(dim, x.rank)
        return x, x.with_dtype("i64")

    def eval(
        x: torch.Tensor, *, dim: int = -1, descending: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, places = torch.sort(x, dim=dim, descending=descending, stable=True)
        return values, places

    def vjp(
        b: Any, op: Op, values: Value | None, places: Value | None = None
    ) -> tuple[Value | None]:
        if values is None:
            return (None,)
        zeros = b.full(op.operands[0].type, 0.0)
        return (b("t.scatter_add", zeros, op.results[1], values, dim=op.attrs.get("dim", -1)),)


@defop("t.norm")
class Norm:
    """The Euclidean length along an axis, which is kept; a zero vector has no gradient."""

    def infer(x: Type, *, dim: int) -> Type:
        d = axis(dim, x.rank)
        require(x.is_float, f"needs a float, got {x}")
        return x.with_shape(*x.shape[:d], 1, *x.shape[d + 1 :])

    def eval(x: torch.Tensor, *, dim: int) -> torch.Tensor:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        x, length = op.operands[0], op.result
        zero = b("t.eq", length, other=0.0)
        safe = b("t.where", zero, b.full(length.type, 1.0), length)
        return (b("t.mul", x, b("t.div", g, safe)),)

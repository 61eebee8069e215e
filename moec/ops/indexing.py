"""The ``t.`` ops that select by index: top-k, gathers and scatters."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.dims import Dim
from moec.ir.graph import Op, Value
from moec.ir.opdef import defop
from moec.ir.types import Type
from moec.ops.shapes import axis, require, same_dtype


@defop("t.topk")
class TopK:
    """The ``k`` largest (or smallest) elements along an axis and their indices (i64); ties go to
    any of the equal ones.
    """

    def infer(
        x: Type, *, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Type, Type]:
        d = axis(dim, x.rank)
        values = x.with_shape(*x.shape[:d], k, *x.shape[d + 1 :])
        return values, values.with_dtype("i64")

    def eval(
        x: torch.Tensor, *, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.topk(x, k, dim=dim, largest=largest, sorted=sorted)
        return values, indices

    def vjp(
        b: Any, op: Op, values: Value | None, indices: Value | None = None
    ) -> tuple[Value | None]:
        if values is None:
            return (None,)
        zeros = b.full(op.operands[0].type, 0.0)
        return (b("t.scatter_add", zeros, op.results[1], values, dim=op.attrs.get("dim", -1)),)


def _check_index(x: Type, index: Type) -> None:
    require(index.rank == x.rank, f"{x} and the index {index} differ in rank")
    require(index.dtype in ("i32", "i64"), f"an index must be i32 or i64, got {index}")


@defop("t.gather")
class Gather:
    """``out[.., j, ..] = x[.., index[.., j, ..], ..]`` along an axis."""

    def infer(x: Type, index: Type, *, dim: int) -> Type:
        axis(dim, x.rank)
        _check_index(x, index)
        return x.with_shape(*index.shape)

    def eval(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
        return torch.gather(x, dim, index.long())

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None]:
        zeros = b.full(op.operands[0].type, 0.0)
        return b("t.scatter_add", zeros, op.operands[1], g, dim=op.attrs["dim"]), None


@defop("t.scatter_add")
class ScatterAdd:
    """``x`` with ``src`` added at ``index`` along an axis."""

    def infer(x: Type, index: Type, src: Type, *, dim: int) -> Type:
        same_dtype(x, src)
        axis(dim, x.rank)
        _check_index(x, index)
        require(index.shape == src.shape, f"index {index} and src {src} differ in shape")
        return x

    def eval(x: torch.Tensor, index: torch.Tensor, src: torch.Tensor, *, dim: int) -> torch.Tensor:
        return torch.scatter_add(x, dim, index.long(), src)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value, None, Value]:
        return g, None, b("t.gather", g, op.operands[1], dim=op.attrs["dim"])


@defop("t.scatter")
class Scatter:
    """``x`` with the elements at ``index`` along an axis set to ``src`` or to a ``value``."""

    def infer(
        x: Type, index: Type, src: Type | None = None, *, dim: int, value: float | None = None
    ) -> Type:
        require((src is None) != (value is None), "takes src or value")
        axis(dim, x.rank)
        _check_index(x, index)
        if src is not None:
            same_dtype(x, src)
            require(index.shape == src.shape, f"index {index} and src {src} differ in shape")
        return x

    def eval(
        x: torch.Tensor,
        index: torch.Tensor,
        src: torch.Tensor | None = None,
        *,
        dim: int,
        value: float | None = None,
    ) -> torch.Tensor:
        if src is not None:
            return torch.scatter(x, dim, index.long(), src)
        return torch.scatter(x, dim, index.long(), value or 0.0)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        index = op.operands[1]
        dx = b("t.scatter", g, index, dim=op.attrs["dim"], value=0.0)
        return (
            (dx, None)
            if len(op.operands) == 2
            else (dx, None, b("t.gather", g, index, dim=op.attrs["dim"]))
        )


@defop("t.one_hot")
class OneHot:
    """``i64[..., classes]`` with a one at each index; an index of ``classes`` or more has none."""

    def infer(index: Type, *, classes: Dim) -> Type:
        require(index.dtype in ("i32", "i64"), f"an index must be i32 or i64, got {index}")
        return Type("i64", (*index.shape, classes))

    def eval(index: torch.Tensor, *, classes: int) -> torch.Tensor:
        return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).long()

"""Shape rules shared by the ops: broadcasting, normal axes, and reducing a gradient to an operand's
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.errors import IRError
from moec.ir.dims import Dim, show_dim
from moec.ir.graph import Value
from moec.ir.types import Type


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The broadcast shape; sizes must be equal as expressions or 1."""
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    return tuple(_common(sizes, shapes) for sizes in zip(*padded, strict=True))


def _common(sizes: Sequence[Dim], shapes: Sequence[tuple[Dim, ...]]) -> Dim:
    distinct = {s for s in sizes if s != 1}
    if len(distinct) > 1:
        text = " and ".join("[" + ", ".join(map(show_dim, s)) + "]" for s in shapes)
        raise IRError(f"shapes {text} do not broadcast")
    return distinct.pop() if distinct else 1


def axis(dim: int, rank: int) -> int:
    """``dim`` counted from the front; an error if the rank has no such axis."""
    if not -rank <= dim < max(rank, 1):
        raise IRError(f"axis {dim} of a rank-{rank} tensor")
    return dim % rank if rank else 0


def reduced(shape: tuple[Dim, ...], dims: Sequence[int], keepdim: bool) -> tuple[Dim, ...]:
    """The shape after reducing ``dims``."""
    require(len(dims) > 0, "needs at least one axis")  # PyTorch takes none as all
    gone = {axis(d, len(shape)) for d in dims}
    if keepdim:
        return tuple(1 if i in gone else s for i, s in enumerate(shape))
    return tuple(s for i, s in enumerate(shape) if i not in gone)


def same_dtype(*types: Type) -> str:
    """The common dtype; promotion is explicit in the IR, so differing ones are an error."""
    dtypes = {t.dtype for t in types}
    if len(dtypes) != 1:
        raise IRError(
            f"operands have different dtypes: {', '.join(t.dtype for t in types)}; insert t.cast"
        )
    return dtypes.pop()


def require(condition: bool, message: str) -> None:
    """Raise :class:`IRError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise IRError(message)


def reduce_to(b: Any, gradient: Value, target: Type) -> Value:
    """Sum a gradient over the axes along which ``target`` was broadcast (transpose of
    broadcasting).
    """
    shape = gradient.type.shape
    if shape == target.shape:
        return gradient
    extra = len(shape) - target.rank
    dims = [
        i
        for i in range(len(shape))
        if i < extra or (target.shape[i - extra] == 1 and shape[i] != 1)
    ]
    summed: Value = b("t.sum", gradient, dims=tuple(dims), keepdim=False) if dims else gradient
    return (
        summed if summed.type.shape == target.shape else b("t.reshape", summed, shape=target.shape)
    )

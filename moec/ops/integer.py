"""The ``t.`` ops on whole numbers: counting, sizes as numbers, quotients and remainders."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.dims import Dim
from moec.ir.opdef import defop
from moec.ir.types import DTYPES, Type
from moec.ops.shapes import broadcast, require, same_dtype


@defop("t.arange")
class Arange:
    """``size`` numbers from ``start`` by ``step``."""

    def infer(*, size: Dim, dtype: str, start: int = 0, step: int = 1) -> Type:
        require(step != 0, "a step of 0")
        return Type(dtype, (size,))

    def eval(*, size: int, dtype: str, start: int = 0, step: int = 1) -> torch.Tensor:
        return torch.arange(start, start + size * step, step, dtype=DTYPES[dtype])


@defop("t.size")
class Size:
    """A dim as a number in a tensor without axes."""

    def infer(*, size: Dim, dtype: str) -> Type:
        return Type(dtype, ())

    def eval(*, size: int, dtype: str) -> torch.Tensor:
        return torch.full((), size, dtype=DTYPES[dtype])


def _integers(name: str, x: Type, y: Type | None, other: int | None) -> Type:
    require((y is None) != (other is None), "takes a second operand or other")
    types = (x,) if y is None else (x, y)
    require(not any(t.is_float for t in types), f"{name} of whole numbers, got {x}")
    return Type(same_dtype(*types), broadcast(*(t.shape for t in types)))


@defop("t.quotient")
class Quotient:
    """Whole numbers divided, rounded to ``mode``: floor or trunc."""

    def infer(x: Type, y: Type | None = None, *, mode: str, other: int | None = None) -> Type:
        require(mode in ("floor", "trunc"), f"mode {mode!r} is neither floor nor trunc")
        return _integers("a quotient", x, y, other)

    def eval(
        x: torch.Tensor, y: torch.Tensor | None = None, *, mode: str, other: int | None = None
    ) -> torch.Tensor:
        divisor: Any = other if y is None else y
        return torch.div(x, divisor, rounding_mode=mode)


@defop("t.remainder")
class Remainder:
    """What is left of a division rounded down."""

    def infer(x: Type, y: Type | None = None, *, other: int | None = None) -> Type:
        return _integers("a remainder", x, y, other)

    def eval(
        x: torch.Tensor, y: torch.Tensor | None = None, *, other: int | None = None
    ) -> torch.Tensor:
        divisor: Any = other if y is None else y
        return torch.remainder(x, divisor)

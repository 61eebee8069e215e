"""All rows as one group: with it, a plain product is a grouped one."""

from __future__ import annotations

import torch

from moec.ir.dims import Dim
from moec.ir.opdef import defop
from moec.ir.types import Type


@defop("moe.one_group")
class OneGroup:
    """The offsets ``i32[2]`` of one group that has all ``rows``: 0 and ``rows``."""

    def infer(*, rows: Dim) -> Type:
        return Type("i32", (2,))

    def eval(*, rows: int) -> torch.Tensor:
        return torch.arange(2, dtype=torch.int32) * rows


__all__ = ["OneGroup"]

"""Types of values: a dtype and a shape whose dims may be symbolic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moec.errors import IRError
from moec.ir.dims import Dim, canon, product, show_dim

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
SIZES: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
MAX_RANK, MAX_ELEMENTS = 64, (1 << 63) - 1
FLOATS = ("f64", "f32", "bf16", "f16")


def dtype_name(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype; :class:`IRError` for one that the IR does not have."""
    if dtype not in NAMES:
        raise IRError(f"the IR has no dtype for {dtype}; it has {', '.join(DTYPES)}")
    return NAMES[dtype]


@dataclass(frozen=True)
class Type:
    """``dtype[shape]``: the dtype's short name and dims in canonical form."""

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise IRError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", tuple(canon(d) for d in self.shape))
        sizes = [d for d in self.shape if isinstance(d, int)]
        if any(d < 0 for d in sizes):
            raise IRError(f"{self} has a negative size")
        if len(self.shape) > MAX_RANK or math.prod(max(d, 1) for d in sizes) > MAX_ELEMENTS:
            raise IRError(
                f"no tensor has {len(self.shape)} dims of these sizes (at most {MAX_RANK} dims, and"
                " fewer than 2^63 elements)"
            )

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether gradients can flow through values of this type."""
        return self.dtype in FLOATS

    @property
    def elements(self) -> Dim:
        """The number of elements."""
        return product(self.shape)

    @property
    def bytes(self) -> Dim:
        """The size of a contiguous tensor of this type in bytes."""
        return canon(self.elements * SIZES[self.dtype])

    def with_dtype(self, dtype: str) -> Type:
        """The same shape in another dtype."""
        return Type(dtype, self.shape)

    def with_shape(self, *shape: Dim) -> Type:
        """The same dtype in another shape."""
        return Type(self.dtype, shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(show_dim(d) for d in self.shape)}]"

"""Launching a compiled kernel through the CUDA driver, with its arguments already in place.

Triton's launch reads, checks and packs every argument anew. Here they lie in memory as the driver
wants them; a later launch changes the addresses that moved and is one call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# What Triton may assume of an address that it was compiled for.
ALIGNED = 16
# Memory for scratch and for profiling, which these kernels do not use: further arguments.
_EXTRA = 4
_SIGNED = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64}


@dataclass(frozen=True)
class Launch:
    """One launch: ``run(arguments)`` makes it; argument ``i`` lies at ``values[places[i]]``."""

    run: Callable[[tuple[Any, ...]], None]
    arguments: tuple[Any, ...]
    values: Any
    places: dict[int, int]


def prepared_launch(
    compiled: Any, grid: Sequence[int], numbers: Sequence[Any], stream: int
) -> Launch | None:
    """A launch of a kernel that Triton compiled; ``None`` if it needs more than addresses and
    integers.

    ``numbers`` are all arguments in order, addresses as integers; compile-time ones are left out.
    """
    metadata = compiled.metadata
    more = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if any(getattr(metadata, name, 0) for name in more) or metadata.num_ctas != 1:
        return None
    kinds = list(compiled.src.signature.values())
    if len(kinds) != len(numbers):
        return None
    passed = [i for i, kind in enumerate(kinds) if kind != "constexpr"]
    if not all(kinds[i].startswith("*") or kinds[i] in _SIGNED for i in passed):
        return None
    values = (ctypes.c_uint64 * (len(passed) + _EXTRA))()
    for place, i in enumerate(passed):
        values[place] = int(numbers[i]) & 0xFFFFFFFFFFFFFFFF
    start = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(values))(*(start + 8 * i for i in range(len(values))))
    sizes = [*grid, 1, 1][:3]
    arguments = (
        ctypes.c_void_p(compiled.function),
        *(ctypes.c_uint(n) for n in (*sizes, 32 * metadata.num_warps, 1, 1, metadata.shared)),
        ctypes.c_void_p(stream),
        pointers,
        None,
    )
    return Launch(_launch, arguments, values, {i: place for place, i in enumerate(passed)})


@functools.cache
def _driver() -> Callable[..., int]:
    """``cuLaunchKernel``."""
    function: Callable[..., int] = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    return function


def _launch(arguments: tuple[Any, ...]) -> None:
    code = _driver()(*arguments)
    if code:
        raise RuntimeError(f"CUDA error {code} from the launch of a kernel")


__all__ = ["ALIGNED", "Launch", "prepared_launch"]

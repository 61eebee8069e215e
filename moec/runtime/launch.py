"""What the host lines of modules emitted for Triton call."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moec.runtime.interpreter import correct_bfloat16

correct_bfloat16()


def row_tile_bound(rows: int, experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that the rows of all experts can need, however they fall."""
    return (rows + min(experts, rows) * (block - 1)) // block


def empty_row_tiles(
    rows: int, experts: int, block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the list of row tiles: their experts, their first rows, and their number."""
    bound = max(1, row_tile_bound(rows, experts, block))
    expert, row = (torch.empty(bound, dtype=torch.int32, device=device) for _ in range(2))
    return expert, row, torch.empty(1, dtype=torch.int32, device=device)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of programs that run at a time: one a processor."""
    if device.type != "cuda":
        return 3  # the interpreter: more than one, so that loops over tiles are exercised
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def persistent(pieces: int, device: torch.device) -> tuple[int]:
    """The grid of a kernel whose programs take piece after piece of work."""
    return (min(processors(device), pieces),)


def matrix(
    tensor: torch.Tensor, block: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> Any:
    """A descriptor of a whole tensor (seen in ``shape``) that is read or written in blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    seen = _aligned(tensor if shape is None else tensor.view(shape))
    return TensorDescriptor(seen, [*seen.shape], [*seen.stride()], [*block])


def ragged(tensor: torch.Tensor, inner: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """A descriptor of rows whose copies stop at the end of an expert.

    Row ``r`` of the expert that owns ``[start, start + size)`` is addressed as ``(2^30, start +
    size, 2^30 - size + r)``: addresses wrap at ``2^64``, so this is the row's own, and ``r >= size``
    lies outside the third dimension's extent. Reads there give zeros, writes do nothing.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = _aligned(tensor.view(-1, *inner))
    step = rows.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, 2**30, *rows.shape[1:]]
    return TensorDescriptor(rows, shape, [2**34 - step, step, *rows.stride()], [1, 1, *block])


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The copy engine starts at multiples of 16 bytes; only an input can be elsewhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

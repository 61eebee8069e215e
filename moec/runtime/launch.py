"""What the host lines of modules emitted for Triton call."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moec.runtime.interpreter import correct_bfloat16
from moec.runtime.kernel import Kernel as Kernel

correct_bfloat16()

_DESCRIPTORS: dict[Any, Any] = {}
_MOST_DESCRIPTORS = 4096


def row_tile_bound(rows: int, experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that the rows of all experts can need, however they fall."""
    return (rows + min(experts, rows) * (block - 1)) // block


def empty_row_tiles(rows: int, experts: int, block: int, device: torch.device) -> torch.Tensor:
    """Room for the list of row tiles: their number, then expert and first row of each."""
    bound = row_tile_bound(rows, experts, block)
    return torch.empty(2 + 2 * bound, dtype=torch.int32, device=device)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of programs that run at a time: one a processor."""
    if device.type != "cuda":
        return 3  # the interpreter: more than one, so that loops over tiles are exercised
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_grid(rows: int, experts: int, block: int, columns: int) -> tuple[int]:
    """The grid of a kernel with a program a tile: row tiles at most, times column tiles."""
    return (row_tile_bound(rows, experts, block) * columns,)


def persistent_rows(
    rows: int, experts: int, block: int, columns: int, device: torch.device
) -> tuple[int]:
    """The grid of a kernel whose programs take tile after tile; see :func:`row_grid`."""
    return persistent(row_tile_bound(rows, experts, block) * columns, device)


def persistent(pieces: int, device: torch.device) -> tuple[int]:
    """The grid of a kernel whose programs take piece after piece of work."""
    return (min(processors(device), pieces),)


def matrix(
    tensor: torch.Tensor, block: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> Any:
    """A descriptor of a whole tensor (seen in ``shape``) that is read or written in blocks."""
    seen = tuple(tensor.shape) if shape is None else shape
    return _descriptor(tensor, seen, _strides(seen), block)


def ragged(tensor: torch.Tensor, inner: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """A descriptor of rows whose copies stop at the end of an expert.

    Row ``r`` of the expert that owns ``[start, start + size)`` is addressed as ``(2^30, start +
    size, 2^30 - size + r)``: addresses wrap at ``2^64``, so this is the row's own, and ``r >=
    size`` lies outside the third dimension's extent. Reads there give zeros, writes do nothing.
    """
    strides = _strides((1, *inner))
    shape = (0x7FFF0000, 0x7FFF0000, 2**30, *inner)
    strides = (2**34 - strides[0], strides[0], *strides)
    return _descriptor(tensor, shape, strides, (1, 1, *block))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a row-major tensor."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _descriptor(
    tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> Any:
    """A descriptor, made once an address: it is nothing but numbers and keeps no memory alive."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if tensor.device.type != "cuda":
        return TensorDescriptor(tensor, [*shape], [*strides], [*block])
    if tensor.data_ptr() % 16:  # where the copy engine cannot start; only an input can lie there
        return TensorDescriptor(tensor.clone(), [*shape], [*strides], [*block])
    key = tensor.data_ptr(), tensor.dtype, shape, block
    found = _DESCRIPTORS.get(key)
    if found is None:
        if len(_DESCRIPTORS) >= _MOST_DESCRIPTORS:
            _DESCRIPTORS.clear()
        place = _Place(tensor.data_ptr(), tensor.dtype)
        found = _DESCRIPTORS[key] = TensorDescriptor(place, [*shape], [*strides], [*block])
    return found


class _Place:
    """Where a tensor lies: what a launch reads of a descriptor's tensor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        """The address."""
        return self._address

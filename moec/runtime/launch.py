"""What the host lines of modules emitted for Triton call."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moec.runtime.guards import MOST_PROCESSORS
from moec.runtime.interpreter import correct_bfloat16
from moec.runtime.kernel import Kernel as Kernel
from moec.runtime.recording import current

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


def empty_row_places(rows: int, experts: int, block: int, device: torch.device) -> torch.Tensor:
    """Room for the list of row tiles with their ends: their number, then three numbers of each."""
    bound = row_tile_bound(rows, experts, block)
    return torch.empty(1 + 3 * bound, dtype=torch.int32, device=device)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of programs that run at a time: one a processor."""
    if device.type != "cuda":
        return 3  # the interpreter: more than one, so that loops over tiles are exercised
    count = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return min(count, MOST_PROCESSORS)


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
    shape, strides = _ragged(inner)
    return _descriptor(tensor, shape, strides, (1, 1, *block))


@functools.cache
def _ragged(inner: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and strides of rows that stop at the end of an expert."""
    strides = _strides((1, *inner))
    return (0x7FFF0000, 0x7FFF0000, 2**30, *inner), (2**34 - strides[0], strides[0], *strides)


def blocks(
    tensor: torch.Tensor, block: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> Any:
    """As :func:`matrix`, for kernels in Gluon."""
    seen = tuple(tensor.shape) if shape is None else shape
    return _descriptor(tensor, seen, _strides(seen), block, gluon=True)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where 16 bytes can be copied at a time; only an input can lie elsewhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def ragged_blocks(tensor: torch.Tensor, inner: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """As :func:`ragged`, for kernels in Gluon."""
    shape, strides = _ragged(inner)
    return _descriptor(tensor, shape, strides, (1, 1, *block), gluon=True)


@functools.cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a row-major tensor."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _descriptor(
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    gluon: bool = False,
) -> Any:
    found = _descriptor_of(tensor, shape, strides, block, gluon)
    recording = current()
    if recording is not None:
        recording.describe(found, tensor)
    return found


def _descriptor_of(
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    gluon: bool,
) -> Any:
    """A descriptor, made once an address: it is nothing but numbers and keeps no memory alive."""
    if tensor.device.type != "cuda":
        return _make(tensor, shape, strides, block, gluon)
    if tensor.data_ptr() % 16:  # where the copy engine cannot start; only an input can lie there
        return _make(tensor.clone(), shape, strides, block, gluon)
    key = tensor.data_ptr(), tensor.dtype, shape, block, gluon
    found = _DESCRIPTORS.get(key)
    if found is None:
        if len(_DESCRIPTORS) >= _MOST_DESCRIPTORS:
            _DESCRIPTORS.clear()
        place = _Place(tensor.data_ptr(), tensor.dtype)
        found = _DESCRIPTORS[key] = _make(place, shape, strides, block, gluon)
    return found


def _make(
    base: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    gluon: bool,
) -> Any:
    if not gluon:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(base, [*shape], [*strides], [*block])
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    layout = NVMMASharedLayout.get_default_for([*block], bfloat16)  # of any 16-bit dtype
    return GluonDescriptor(base, [*shape], [*strides], [*block], layout)


class _Place:
    """Where a tensor lies: what a launch reads of a descriptor's tensor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        """The address."""
        return self._address

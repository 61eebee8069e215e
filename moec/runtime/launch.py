"""What the host lines of modules emitted for Triton call."""

from __future__ import annotations

import functools

import torch

from moec.runtime.interpreter import correct_products

correct_products()


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

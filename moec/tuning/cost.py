"""What a product should take with a tile: bytes, whole tiles, and waves over the processors.

The model only ranks; what is used was measured. Every row tile is as dear as a full one, an expert
ends half a tile early on average, and the last wave of tiles takes as long as the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moec.codegen.triton.tiles import SHARED_BYTES, Tile
from moec.ir.types import SIZES
from moec.tuning.kernels import OUTER, Kernel
from moec.tuning.space import shared_bytes, sums, tiles


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU: processors, floating-point operations and bytes a second, and bytes a second
    that its processors take from the second cache together.
    """

    processors: int = 132
    flops: float = 790e12
    bytes: float = 3.0e12
    cached: float = 10e12


# The share of the GPU's rate that the inner loop of each template reached on an H100, 2026-11-22.
RATES = {"gluon": 0.96, "tma": 0.87, "pointer": 0.62}
H100 = Machine()


@dataclass(frozen=True)
class Candidate:
    """A template and a tile, and the milliseconds that they should take."""

    template: str
    tile: Tile
    ms: float


def estimate(
    kernel: Kernel, template: str, tile: Tile, rows: int, machine: Machine = H100
) -> float:
    """Milliseconds of a product over so many rows, evenly spread over the experts."""
    size = SIZES[kernel.dtype]
    pieces, depth = _pieces(kernel, tile, rows)
    columns = kernel.parts * tile.columns
    steps = math.ceil(depth / tile.depth) * tile.depth
    rate = machine.flops / machine.processors * RATES[template] * (2 / size)
    work = 2 * tile.rows * columns * steps / rate * _stalls(kernel, tile)
    moved = ((tile.rows + columns) * steps + _outside(kernel, tile)) * size
    one = max(work, moved / (machine.cached / machine.processors))
    programs = machine.processors * _resident(kernel, template, tile)
    waves = math.ceil(pieces / programs) * programs / machine.processors
    parts = waves * one, _total_bytes(kernel, template, rows) / machine.bytes
    return 1e3 * (max(parts) + min(parts) / 4)  # the smaller is hidden for the most part


def _pieces(kernel: Kernel, tile: Tile, rows: int) -> tuple[float, float]:
    """How many tiles there are, and how deep each is."""
    across = math.ceil(kernel.columns / tile.columns)
    if kernel.kind == OUTER:
        down = math.ceil(kernel.depth / tile.rows)
        return kernel.experts * down * across, rows / kernel.experts
    return (rows / tile.rows + min(kernel.experts, rows) / 2) * across, kernel.depth


def _stalls(kernel: Kernel, tile: Tile) -> float:
    """How much longer an inner loop takes whose stages, steps or sides hide little."""
    sides = 1 + 16 / tile.rows + 16 / (kernel.parts * tile.columns)
    return (1 + 1 / (4 * tile.stages)) * (1 + 8 / tile.depth) * sides


def _outside(kernel: Kernel, tile: Tile) -> int:
    """The numbers that a tile's epilogue writes and reads."""
    return tile.rows * tile.columns * (kernel.parts + kernel.reads + 1)


def _resident(kernel: Kernel, template: str, tile: Tile) -> int:
    """How many programs a processor runs at a time."""
    if template != "pointer":
        return 1
    by_memory = SHARED_BYTES // max(shared_bytes(kernel, tile, template), 1)
    by_registers = 65536 // ((sums(kernel, tile) + 64) * 32 * tile.warps)
    return max(1, min(by_memory, by_registers))


def _total_bytes(kernel: Kernel, template: str, rows: int) -> float:
    """What comes from memory at least, and goes there."""
    wide = kernel.parts * kernel.columns
    numbers = rows * (kernel.depth + wide) + kernel.experts * kernel.depth * wide
    numbers += rows * kernel.columns * kernel.reads
    if kernel.gather and template == "tma":  # gathered rows are copied first
        numbers += 2 * rows * (kernel.columns if kernel.gather == "right" else kernel.depth)
    return float(numbers * SIZES[kernel.dtype])


def ranked(
    kernel: Kernel, templates: Iterable[str], rows: int, machine: Machine = H100
) -> list[Candidate]:
    """All possible tiles of some templates, the one that should be fastest first."""
    found = [
        Candidate(template, tile, estimate(kernel, template, tile, rows, machine))
        for template in templates
        for tile in tiles(kernel, template)
    ]
    return sorted(found, key=lambda c: (c.ms, c.template, c.tile.attribute))

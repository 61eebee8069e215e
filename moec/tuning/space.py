"""Which tiles a product can have: what memory, registers and sizes allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from moec.codegen.gluon.grouped_gemm import COLUMNS, DEPTH, ROWS
from moec.codegen.gluon.grouped_outer import TILE as GLUON_OUTER
from moec.codegen.gluon.text import STAGES
from moec.codegen.triton.tiles import GROUP, SHARED_BYTES, Tile, power_of_two
from moec.ir.types import SIZES
from moec.tuning.kernels import GEMM, OUTER, Kernel

TEMPLATES = ("gluon", "tma", "pointer")
SIDES, DEPTHS = (16, 32, 64, 128, 256), (16, 32, 64, 128)
WARPS, STAGE_COUNTS = (4, 8), (2, 3, 4, 5)
GROUPS = (GROUP, 2 * GROUP, 4 * GROUP)  # row tiles of a group, in Gluon
MOST_SUMS = 128  # registers of a thread that hold sums: half of all
LEAST_ROWS = 64  # of tensor cores that a group of warps shares
MOST_BLOCK = 256  # of an axis of what the copy engine moves


def stage_bytes(kernel: Kernel, tile: Tile) -> int:
    """The shared memory of one stage: a piece of both factors."""
    columns = kernel.parts * tile.columns
    return (tile.rows + columns) * tile.depth * SIZES[kernel.dtype]


def shared_bytes(kernel: Kernel, tile: Tile, template: str) -> int:
    """The least shared memory of a program, its result on the way out included.

    By the copy engine, weight gradients leave half a tile at a time, other results 16 columns.
    """
    out = 0
    if template == "tma":
        out = tile.rows * (tile.columns // 2 if kernel.kind == OUTER else 16) * SIZES[kernel.dtype]
    return tile.stages * stage_bytes(kernel, tile) + out


def sums(kernel: Kernel, tile: Tile) -> int:
    """The registers of a thread that hold the tile's sums."""
    width = 2 if kernel.dtype == "f64" else 1
    return tile.rows * tile.columns * kernel.parts * width // (32 * tile.warps)


def refusal(kernel: Kernel, template: str, tile: Tile) -> str:
    """Why a kernel cannot have a tile in a template, in words; empty if it can."""
    if template not in TEMPLATES:
        return f"no template {template!r}"
    if template == "gluon":
        return _gluon_refusal(kernel, tile)
    if not _is_in_space(tile):
        return f"{tile}: none of the sizes that are built"
    return _size_refusal(kernel, tile) or _room_refusal(kernel, template, tile)


def _gluon_refusal(kernel: Kernel, tile: Tile) -> str:
    if replace(tile, group=GROUP) != gluon_tile_of(kernel):
        return "the template gluon has one tile"
    return "" if tile.group in GROUPS else f"groups of {tile.group} row tiles"


def _is_in_space(tile: Tile) -> bool:
    sides = tile.rows in SIDES and tile.columns in SIDES and tile.depth in DEPTHS
    rest = tile.warps in WARPS and tile.stages in STAGE_COUNTS
    return sides and rest and tile.group == GROUP


def _size_refusal(kernel: Kernel, tile: Tile) -> str:
    if tile.columns > fitted(kernel.columns):
        return f"{tile.columns} columns of {kernel.columns}"
    if kernel.kind == OUTER and tile.rows > fitted(kernel.depth):
        return f"{tile.rows} rows of {kernel.depth}"
    if kernel.kind == GEMM and tile.depth > fitted(kernel.depth):
        return f"{tile.depth} deep of {kernel.depth}"
    return ""


def _room_refusal(kernel: Kernel, template: str, tile: Tile) -> str:
    if template == "tma":
        if SIZES[kernel.dtype] != 2:
            return f"the copy engine's products are not of {kernel.dtype}"
        if tile.rows < LEAST_ROWS:
            return f"fewer than {LEAST_ROWS} rows"
        if kernel.parts * tile.columns > MOST_BLOCK:
            return f"more than {MOST_BLOCK} columns of all parts"
    if sums(kernel, tile) > MOST_SUMS:
        return f"{sums(kernel, tile)} registers of sums a thread, at most {MOST_SUMS}"
    needed = shared_bytes(kernel, tile, template)
    return f"{needed} bytes of shared memory, of {SHARED_BYTES}" if needed > SHARED_BYTES else ""


def fitted(size: int) -> int:
    """The longest side of a tile along an axis: what covers it, and at least 16."""
    return max(16, power_of_two(size))


def gluon_tile_of(kernel: Kernel) -> Tile:
    """The one tile of the template for Hopper, in the usual order."""
    if kernel.kind == OUTER:
        return GLUON_OUTER
    return Tile(ROWS, COLUMNS // kernel.parts, DEPTH, 4, STAGES)


def tiles(kernel: Kernel, template: str) -> Iterator[Tile]:
    """All tiles that :func:`refusal` lets through, without trying those it cannot.

    The axes are bounded by what was chosen before: columns by sums that fit into registers, stages
    by shared memory.
    """
    if template == "gluon":
        yield from (replace(gluon_tile_of(kernel), group=group) for group in GROUPS)
        return
    for warps, rows, columns in product(WARPS, SIDES, SIDES):
        if sums(kernel, Tile(rows, columns, 16, warps, 2)) > MOST_SUMS:
            continue
        for depth in DEPTHS:
            shallow = Tile(rows, columns, depth, warps, STAGE_COUNTS[0])
            if refusal(kernel, template, shallow):
                continue
            spare = SHARED_BYTES - shared_bytes(kernel, shallow, template)
            most = shallow.stages + spare // stage_bytes(kernel, shallow)
            for stages in (n for n in STAGE_COUNTS if n <= most):
                yield Tile(rows, columns, depth, warps, stages)

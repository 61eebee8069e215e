"""Which template and tile a kernel gets: simple rules, measured on an H100 for 16-bit dtypes."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.triton.facts import GROUP as GROUP
from moec.codegen.triton.facts import MOST_GROUP
from moec.codegen.triton.products import RowProduct
from moec.ir.types import SIZES

SHARED_BYTES = 232448 - 4096  # of a Hopper processor, less what barriers and the like take
FEW_ROWS = 16  # of a tile where an expert has few
UNROLLED = 16  # up to so many choices a token, loops over them are written out


@dataclass(frozen=True)
class Tile:
    """Rows, columns (of one part) and depth of a tile, and how its program runs: so many row tiles
    in a ``group`` come after one another for each tile of columns.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = GROUP

    @property
    def attribute(self) -> tuple[int, ...]:
        """The form in which a ``kern.`` op holds it: without the group if that is the usual one."""
        sizes = (self.rows, self.columns, self.depth, self.warps, self.stages)
        return sizes if self.group == GROUP else (*sizes, self.group)

    def __str__(self) -> str:
        sizes = f"{self.rows} rows, {self.columns} columns, {self.depth} deep"
        order = "" if self.group == GROUP else f", groups of {self.group} row tiles"
        return f"{sizes}, {self.warps} warps, {self.stages} stages{order}"


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def row_tile(p: RowProduct, template: str) -> Tile:
    """The tile of a product over ragged rows.

    16-bit, by descriptors: 128 rows by 256 columns (of all parts together) by 64. By pointers half
    as many columns, so that three stages fit into 100 KB, and a quarter if the epilogue reads
    matrices too, whose addresses need registers. Wider dtypes have no such tensor cores: 64 by 64.
    """
    size = SIZES[p.weights.type.dtype]
    if size == 2:
        wide = 256 if template == "tma" else 64 if p.reads else 128
        return _fit(Tile(128, wide // p.parts, 64, 8, 3), p.columns, p.depth)
    return _fit(
        Tile(64, 64 // p.parts if p.parts <= 2 else 16, 128 // size, 4, 2), p.columns, p.depth
    )


def few_tile(p: RowProduct) -> Tile:
    """The tile where an expert has few rows: what counts is that many programs read weights.

    16 rows, the least that tensor cores take; 64 columns of all parts together, as deep as fits.
    """
    size = SIZES[p.weights.type.dtype]
    columns = 64 // p.parts if p.parts <= 2 else 16
    return _fit(Tile(FEW_ROWS, columns, 256 // size, 4, 4), p.columns, p.depth)


def row_tile_reason(p: RowProduct, template: str) -> str:
    """Why :func:`row_tile` gives what it gives, in words."""
    if SIZES[p.weights.type.dtype] != 2:
        why = f"{p.weights.type.dtype} has no 16-bit tensor cores: 64 by 64"
    elif template == "tma":
        why = "128 rows, 256 columns of all parts together"
    elif p.reads:
        why = "128 rows, 64 columns of all parts together: the epilogue's addresses need registers"
    else:
        why = "128 rows, 128 columns of all parts together: three stages fit into 100 KB"
    parts = f"{p.parts} parts of " if p.parts > 1 else ""
    return f"{why}; no more than the matrices need, {parts}{p.columns} columns, {p.depth} deep"


def outer_tile_reason(dtype: str, template: str) -> str:
    """Why :func:`outer_tile` gives what it gives, in words."""
    if SIZES[dtype] != 2:
        return f"{dtype} has no 16-bit tensor cores: 64 by 64"
    return f"128 by {256 if template == 'tma' else 128}, no more than the matrices need"


def outer_tile(dtype: str, m: int, n: int, template: str) -> Tile:
    """The tile of a product over ragged depth: ``rows`` and ``columns`` are those of the result."""
    if SIZES[dtype] == 2:
        tile = Tile(128, 256 if template == "tma" else 128, 64, 8, 3)
    else:
        tile = Tile(64, 64, 128 // SIZES[dtype], 4, 2)
    fitted = _fit(tile, n, tile.depth)
    return Tile(
        min(tile.rows, max(16, power_of_two(m))),
        fitted.columns,
        tile.depth,
        fitted.warps,
        fitted.stages,
    )


def _fit(tile: Tile, columns: int, depth: int) -> Tile:
    """No wider or deeper than the matrices need; a product needs at least 16 of each."""
    return Tile(
        tile.rows,
        min(tile.columns, max(16, power_of_two(columns))),
        min(tile.depth, max(16, power_of_two(depth))),
        tile.warps,
        tile.stages,
    )


def times(text: str, by: int) -> str:
    """A product as text, unless by one."""
    return text if by == 1 else f"{text} * {by}"


def has_order(tile: Tile) -> bool:
    """Whether the order of row tiles is one that places in their list have room for."""
    return 1 <= tile.group <= MOST_GROUP


def tile_of(attribute: tuple[int, ...] | None, default: Tile) -> Tile:
    """The tile that an op's attribute asks for."""
    return Tile(*attribute) if attribute is not None and len(attribute) in (5, 6) else default

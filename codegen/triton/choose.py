"""The choice of template and tile of a ``kern.`` op: what its sizes, dtypes and body allow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.gluon.grouped_gemm import GluonGemm, gluon_tile
from moec.codegen.gluon.grouped_outer import TILE as GLUON_OUTER
from moec.codegen.gluon.grouped_outer import GluonOuter
from moec.codegen.triton.descriptor_gemm import DescriptorGemm
from moec.codegen.triton.descriptor_outer import DescriptorOuter
from moec.codegen.triton.grouped_gemm import PointerGemm
from moec.codegen.triton.grouped_outer import PointerOuter
from moec.codegen.triton.grouped_outer import analyse as analyse_outer
from moec.codegen.triton.hoist import hoist
from moec.codegen.triton.invariance import REPRO
from moec.codegen.triton.kernel import Unsupported
from moec.codegen.triton.products import analyse
from moec.codegen.triton.routing import ONE_PROGRAM, few_routing
from moec.codegen.triton.tiles import (
    Tile,
    few_tile,
    outer_tile,
    outer_tile_reason,
    row_tile,
    row_tile_reason,
)
from moec.ir.graph import Op
from moec.ir.prove import bounds
from moec.reasons import decline, fired
from moec.tuning.file import Tuning
from moec.tuning.kernels import Kernel, kernel_of
from moec.tuning.space import refusal


@dataclass(frozen=True)
class Limits:
    """What the target has, and sizes that override the rules (0: none)."""

    descriptors: bool = False
    gluon: bool = False
    few: bool = False
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    block: int = 0
    repro: bool = False
    tuning: Tuning | None = None


def attributes(op: Op, limits: Limits) -> dict[str, Any]:
    """The attributes ``template`` and ``tile`` of a kernel, and ``numerics`` where asked for."""
    return {**_choice(op, limits), **({"numerics": REPRO} if limits.repro else {})}


def _choice(op: Op, limits: Limits) -> dict[str, Any]:
    if limits.few and op.kind == "kern.routing":
        return {"template": ONE_PROGRAM, "tile": few_routing(op)}
    if op.kind not in ("kern.grouped_gemm", "kern.grouped_outer"):
        return {"tile": (limits.block,)} if limits.block else {}
    tuned = _tuned(op, limits)
    if tuned:
        return tuned
    if limits.gluon:
        problem = no_gluon(op)
        if not problem:
            tile = _gluon_tile(op)
            fired("tile", op, "{}: the tile of the template gluon", tile)
            return {"template": "gluon", "tile": tile.attribute}
        decline("template gluon", op, problem)
    op = hoist(op).op
    problem = no_descriptors(op) if limits.descriptors else "descriptors are off"
    problem = "tiles of few rows are read by pointers" if limits.few else problem
    template = "pointer" if problem else "tma"
    try:
        few = limits.few and op.kind == "kern.grouped_gemm"
        tile = few_tile(analyse(op)) if few else _default(op, template)
        tile = _overridden(tile, limits)
    except Unsupported as error:
        decline("template", op, "none takes it: {}", error)
        return {}
    if problem:
        decline("template tma", op, problem)
    fired("tile", op, "{}", _Reason(op, tile, limits, template))
    return {"template": template, "tile": tile.attribute}


def _tuned(op: Op, limits: Limits) -> dict[str, Any]:
    """What was measured to be best, where nothing else was asked for; empty if nothing was."""
    asked = limits.few or limits.repro or limits.block_m or limits.block_n or limits.block_k
    kernel = None if limits.tuning is None or asked else kernel_of(op)
    if limits.tuning is None or kernel is None:
        return {}
    ranges = op.body.ranges if op.body is not None else {}
    entry = limits.tuning.find(kernel, bounds(kernel.rows, ranges)[1])
    if entry is None:
        return {}
    problem = _is_off(entry.template, limits) or misfit(op, kernel, entry.template, entry.tile)
    if problem:
        decline("tuned tile", op, problem)
        return {}
    times = f"{entry.ms:.3f} ms where the rule's took {entry.default_ms:.3f}"
    fired("tile", op, "{}", f"{entry.tile}, template {entry.template}: measured, {times}")
    return {"template": entry.template, "tile": entry.tile.attribute}


def _is_off(template: str, limits: Limits) -> str:
    """Why a template may not be used on the target; empty if it may."""
    allowed = {"gluon": limits.gluon, "tma": limits.descriptors, "pointer": True}
    return "" if allowed.get(template) else f"the template {template} is off"


def misfit(op: Op, kernel: Kernel, template: str, tile: Tile) -> str:
    """Why a kernel cannot have a template and a tile; empty if it can."""
    problem = refusal(kernel, template, tile)
    if problem:
        return problem
    tiled = replace(op, attrs={**op.attrs, "template": template, "tile": tile.attribute})
    if template == "gluon":
        return no_gluon(tiled)
    if template == "tma":
        return no_descriptors(hoist(tiled).op)
    return _no_pointer(hoist(tiled).op)


def _no_pointer(op: Op) -> str:
    """Why the portable template cannot express a kernel; empty if it can."""
    try:
        PointerGemm(op, "trial") if op.kind == "kern.grouped_gemm" else PointerOuter(op, "trial")
    except Unsupported as error:
        return str(error)
    return ""


def _default(op: Op, template: str) -> Tile:
    if op.kind == "kern.grouped_gemm":
        return row_tile(analyse(op), template)
    result = analyse_outer(op).anchor.result.type
    return outer_tile(result.dtype, int(result.shape[1]), int(result.shape[2]), template)


def _overridden(tile: Tile, limits: Limits) -> Tile:
    return Tile(
        limits.block_m or tile.rows,
        limits.block_n or tile.columns,
        limits.block_k or tile.depth,
        tile.warps,
        tile.stages,
    )


@dataclass(frozen=True)
class _Reason:
    """Why a kernel has its tile, as text that is made only if somebody reads it."""

    op: Op
    tile: Tile
    limits: Limits
    template: str

    def __str__(self) -> str:
        given = (self.limits.block_m, self.limits.block_n, self.limits.block_k)
        why = "few rows, many programs" if self.limits.few else self._rule()
        why = "sizes given as options" if any(given) else why
        return f"{self.tile}: {why}"

    def _rule(self) -> str:
        if self.op.kind == "kern.grouped_gemm":
            return row_tile_reason(analyse(self.op), self.template)
        dtype = analyse_outer(self.op).anchor.result.type.dtype
        return outer_tile_reason(dtype, self.template)


def no_descriptors(op: Op) -> str:
    """Why the Hopper template cannot express a kernel; empty if it can."""
    try:
        DescriptorGemm(op, "trial") if op.kind == "kern.grouped_gemm" else DescriptorOuter(
            op, "trial"
        )
    except Unsupported as error:
        return str(error)
    return ""


def no_gluon(op: Op) -> str:
    """Why the Gluon template cannot express a kernel, or is not worth it; empty if it is."""
    op = hoist(replace(op, attrs={**op.attrs, "template": "gluon"})).op
    try:
        GluonGemm(op, "trial") if op.kind == "kern.grouped_gemm" else GluonOuter(op, "trial")
    except Unsupported as error:
        return str(error)
    return ""


def _gluon_tile(op: Op) -> Tile:
    return gluon_tile(analyse(op)) if op.kind == "kern.grouped_gemm" else GLUON_OUTER

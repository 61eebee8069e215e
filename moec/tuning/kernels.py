"""What the tile of a product depends on: its kind, dtype, sizes and what is read around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moec.codegen.triton.facts import Unsupported
from moec.codegen.triton.grouped_outer import analyse as analyse_outer
from moec.codegen.triton.hoist import hoist
from moec.codegen.triton.products import analyse
from moec.ir.dims import Dim
from moec.ir.graph import Op

GEMM, OUTER = "grouped_gemm", "grouped_outer"


@dataclass(frozen=True)
class Kernel:
    """One product. ``grouped_gemm`` has a matrix [depth, parts * columns] an expert and ragged
    rows; ``grouped_outer`` sums over the rows into a matrix [depth, columns]. ``gather`` names the
    sides that are gathered, ``reads`` counts the tiles that the epilogue reads. ``rows`` is how
    many rows all experts have, and no part of what identifies a kernel.
    """

    kind: str
    dtype: str
    experts: int
    depth: int
    columns: int
    parts: int = 1
    transposed: bool = False
    gather: str = ""
    reads: int = 0
    rows: Dim = field(default=0, compare=False)

    @property
    def data(self) -> dict[str, Any]:
        """As a tuning file says it."""
        return {name: value for name, value in asdict(self).items() if name != "rows"}

    def __str__(self) -> str:
        parts = f"{self.parts} x " if self.parts > 1 else ""
        words = [f"{self.kind} {self.dtype}, {self.experts} experts"]
        words.append(f"{self.depth} by {parts}{self.columns}")
        words += ["transposed"] if self.transposed else []
        words += [f"gathers {self.gather}"] if self.gather else []
        words += [f"reads {self.reads}"] if self.reads else []
        return ", ".join(words)


def kernel_of(op: Op) -> Kernel | None:
    """The product of a ``kern.`` op; ``None`` if it is none, or one that no template takes."""
    if op.kind not in (f"kern.{GEMM}", f"kern.{OUTER}"):
        return None
    try:
        op = hoist(op).op
        return _gemm(op) if op.kind == f"kern.{GEMM}" else _outer(op)
    except Unsupported:
        return None


def _gemm(op: Op) -> Kernel:
    p = analyse(op)
    return Kernel(
        GEMM,
        p.weights.type.dtype,
        int(p.weights.type.shape[0]),
        p.depth,
        p.columns,
        p.parts,
        p.transposed,
        "left" if p.gather is not None else "",
        p.reads,
        p.rows,
    )


def _outer(op: Op) -> Kernel:
    p = analyse_outer(op)
    sides = [name for side, name in enumerate(("left", "right")) if p.gather(side) is not None]
    dtype, (m, n) = p.anchor.result.type.dtype, p.sizes
    return Kernel(OUTER, dtype, p.experts, m, n, gather="+".join(sides), rows=p.rows)

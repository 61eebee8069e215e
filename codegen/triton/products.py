"""What a ``kern.grouped_gemm`` consists of, read off its body."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.triton.kernel import Unsupported, needed_ops
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Op, Value, producers
from moec.ir.types import FLOATS


@dataclass(frozen=True)
class RowProduct:
    """A product over ragged rows with the work around it."""

    op: Op
    body: Graph
    anchor: Op
    rows: Dim
    depth: int
    columns: int  # of one part
    parts: int  # into which the product's columns are split
    layout: str
    split: Op | None
    prologue: tuple[Op, ...]  # what makes the rows that are multiplied
    epilogue: tuple[Op, ...]  # what is done with a tile of the product
    finish: tuple[Op, ...]  # what is done with sums over all columns

    @property
    def weights(self) -> Value:
        """The experts' matrices."""
        return self.anchor.operands[1]

    @property
    def offsets(self) -> Value:
        """The first row of each expert."""
        return self.anchor.operands[2]

    @property
    def transposed(self) -> bool:
        """Whether a matrix is ``[depth, columns]``."""
        return bool(self.anchor.attrs.get("transposed", False))

    @property
    def gather(self) -> Op | None:
        """The gather that makes the rows, if nothing else does."""
        single = len(self.prologue) == 1 and self.prologue[0].kind == "moe.gather"
        return self.prologue[0] if single else None

    @property
    def reads(self) -> int:
        """How many tiles the epilogue reads besides the product's."""
        made = {v for op in self.body.ops for v in op.results}
        sizes: dict[tuple[Dim, ...], int] = {(self.rows, k * self.columns): k for k in range(1, 9)}
        read = {v: sizes.get(v.type.shape, 0) for op in self.epilogue for v in op.operands}
        gathers = sum(op.kind == "moe.gather" for op in self.epilogue)
        return gathers + sum(count for v, count in read.items() if v not in made)

    @property
    def dots(self) -> list[Op]:
        """The inner products of rows."""
        return [op for op in self.epilogue if op.kind == "moe.row_dot"]

    @property
    def finished(self) -> set[Value]:
        """Values that exist only after all columns are done."""
        return {v for op in (*self.dots, *self.finish) for v in op.results}


def analyse(op: Op) -> RowProduct:
    """The parts of a ``kern.grouped_gemm``; :class:`Unsupported` if no template takes it."""
    body = op.body
    anchors = [o for o in body.ops if o.kind == "moe.grouped_mm"] if body is not None else []
    if body is None or len(anchors) != 1:
        raise Unsupported(f"{len(anchors)} products in one kernel")
    anchor = anchors[0]
    made = producers(body)
    x, w, offsets = anchor.operands
    if w in made or offsets in made:
        raise Unsupported("weights that the kernel computes")
    if x.type.dtype not in FLOATS:
        raise Unsupported(f"a product of {x.type.dtype}")
    split = _split(body, anchor)
    width, parts = int(anchor.result.type.shape[1]), len(split.results) if split else 1
    prologue = tuple(needed_ops(body, [x], set()))
    rest = [o for o in needed_ops(body, body.outputs, {anchor.result}) if o is not anchor]
    finish = _after_dots(rest)
    epilogue = tuple(o for o in rest if o not in finish)
    _check(anchor, prologue, epilogue, finish)
    return RowProduct(
        op,
        body,
        anchor,
        anchor.result.type.shape[0],
        int(x.type.shape[1]),
        width // parts,
        parts,
        split.attrs.get("layout", "concat") if split else "concat",
        split,
        prologue,
        epilogue,
        tuple(finish),
    )


def is_of_rows(value: Value, rows: Dim, columns: int) -> bool:
    """Whether a value is a number a row."""
    shape = value.type.shape
    return shape == (rows,) or (shape == (rows, 1) and columns != 1)


def _split(body: Graph, anchor: Op) -> Op | None:
    found = [o for o in body.ops if o.kind == "t.split" and o.operands[0] is anchor.result]
    return found[0] if found else None


def _after_dots(ops: list[Op]) -> list[Op]:
    """The ops that need an inner product over all columns."""
    late = {v for op in ops if op.kind == "moe.row_dot" for v in op.results}
    found = []
    for op in ops:
        if any(v in late for v in op.operands):
            found.append(op)
            late.update(op.results)
    return found


def _check(
    anchor: Op, prologue: tuple[Op, ...], epilogue: tuple[Op, ...], finish: list[Op]
) -> None:
    rows = anchor.result.type.shape[0]
    for op in finish:
        if any(v.type.shape not in ((rows,), (rows, 1), ()) for v in (*op.operands, *op.results)):
            raise Unsupported("tile work that needs a sum over all columns")
    if any(op.kind in ("moe.row_dot", "moe.grouped_mm") for op in prologue):
        raise Unsupported("a sum before the product")
    if any(anchor in (op,) for op in epilogue):
        raise Unsupported("a product of its own result")

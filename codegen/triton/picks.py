"""Expert choice: the order of rows from the tokens that experts picked, in one launch."""

from __future__ import annotations

from collections.abc import Mapping

from moec.codegen.triton.context import Context, only_if, remarks, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.tiles import power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import Range, python_source
from moec.ir.graph import Op

LIBRARY = "place_picks"
BLOCK = 256  # rows a program


def ask_picks(op: Op, ranges: Mapping[str, Range]) -> Facts:
    """What the kernel needs of sizes.

    Raises:
        Unsupported: it cannot have that.
    """
    facts, (perm, _, inverse) = Facts(op, ranges), op.results
    facts.rows(perm.type.shape[0])
    facts.word(perm.type.shape[0] + BLOCK, "rows of picks are numbered in 32 bits")
    most = inverse.type.elements + perm.type.shape[0] + BLOCK  # in lanes past the last row, too
    facts.word(most, "pairs are numbered in 32 bits")
    return facts


def emit_picks(writer: Writer, op: Op, context: Context, facts: Facts) -> None:
    """Write the host lines of ``moe.dispatch_picks``."""
    (picks,) = op.operands
    context.contiguous(writer, op.operands)
    perm, offsets, inverse = op.results
    for value in (perm, offsets):
        context.allocate(writer, value)
    tokens, experts = (python_source(d) for d in inverse.type.shape)
    made = f"torch.full(({tokens}, {experts}), -1, dtype=torch.int32, device=device)"
    writer.line(f"{context.names.add(inverse)} = {made}")
    rows = python_source(perm.type.shape[0])
    remarks(writer, facts.limits)
    names = ", ".join(context.names[v] for v in (picks, *op.results))
    sizes = f"E={experts}, EP={power_of_two(int(experts) + 1)}, BLOCK={BLOCK}"
    inner = f"{names}, {rows}, {python_source(picks.type.shape[1])}, {sizes}"
    with writer.block(f"if {only_if(perm.type.shape[0])}:"):
        write(writer, f"{LIBRARY}[(triton.cdiv({rows}, {BLOCK}),)]({inner})")
    with writer.block("else:"):
        writer.line(f"{context.names[offsets]}.zero_()")

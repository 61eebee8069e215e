"""What a bisection found, as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from moec.bisect import GuiltyKernel, GuiltyPass, Rewrite
from moec.ir.graph import Graph, Op
from moec.ir.text import Names, show_op
from moec.single_ops import GuiltyOp

# Ops that are shown on either side of a rewrite.
_SHOWN = 8


def op_lines(graph: Graph, ops: Sequence[Op]) -> list[str]:
    """Ops of a graph as its text prints them, each with the model's line."""
    names = Names()
    for value in (*graph.inputs, *graph.cotangents):
        names.add(value)
    lines = {op: show_op(op, names) for op in graph.ops}
    return [f"{lines[op]}  // {op.loc}" if op.loc is not None else lines[op] for op in ops]


def rewrite_lines(rewrite: Rewrite) -> list[str]:
    """The rewrite, the ops that it took away, and those that it put in their place."""
    others = ""
    if rewrite.untested:
        others = f" (or one of the {rewrite.untested} before it, which could not be tested)"
    lines = [f"  rewrite {rewrite.number} of {rewrite.total}{others}: {rewrite.what}"]
    lines += _some("-", op_lines(rewrite.before, rewrite.removed))
    return lines + _some("+", op_lines(rewrite.after, rewrite.added))


def _some(sign: str, lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    shown = [f"  {sign} {line}" for line in lines[:_SHOWN]]
    rest = len(lines) - len(shown)
    return [*shown, f"  {sign} and {rest} more"] if rest else shown


def pass_lines(name: str, guilty: GuiltyPass, count: int) -> list[str]:
    """The first pass that is wrong, and the one rewrite in it."""
    lines = [
        f"{name}: pass {guilty.index + 1} of {count} is wrong: {guilty.call}",
        *(f"  {line.strip()}" for line in guilty.problem.splitlines()),
    ]
    if guilty.untested:
        skipped = ", ".join(map(str, guilty.untested))
        lines.append(f"  or one of the passes before it that could not be tested: {skipped}")
    if guilty.rewrite is None:
        return [*lines, "  the pass is wrong as a whole: no single rewrite makes the difference"]
    return [*lines, *rewrite_lines(guilty.rewrite)]


def kernel_lines(
    name: str, target: str, problem: str, graph: Graph, guilty: Sequence[GuiltyKernel]
) -> list[str]:
    """An emitted module that is wrong, and the kernels that are wrong alone."""
    lines = [f"{name}: the passes are right, the {target} module is not: {problem}"]
    for kernel in guilty:
        lines += [f"  kernel {op_lines(graph, [kernel.op])[0]}", f"    {kernel.problem}"]
    if not guilty:
        lines.append("  no kernel is wrong alone; moec emit prints the host part")
    return lines


def single_lines(graph: Graph, ops: Sequence[GuiltyOp]) -> list[str]:
    """Ops that are wrong by themselves."""
    lines = []
    for guilty in ops:
        lines += [f"  op {op_lines(graph, [guilty.op])[0]}", f"    alone: {guilty.problem}"]
    return lines


__all__ = ["kernel_lines", "op_lines", "pass_lines", "rewrite_lines", "single_lines"]

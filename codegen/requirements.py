"""What sizes must be for emitted code to be right: checked by ``forward`` where no proof has it.

The facts that a kernel rests on are proved for the declared ranges
(:mod:`moec.codegen.triton.facts`), so these are checked too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moec.codegen.writer import Writer
from moec.errors import CodegenError
from moec.inputs import dim_names
from moec.ir.dims import Dim, Range, dim, python_source, show_dim
from moec.ir.graph import Graph, Op
from moec.ir.prove import AtMost, bounds, prove_at_most

WORD = 2**31 - 1  # the most that 32 bits with a sign hold


@dataclass(frozen=True)
class Requirement:
    """``value <= limit``, and which op of the model asks for it, and why."""

    value: Dim
    limit: int
    asked: str

    @property
    def fact(self) -> AtMost:
        """The inequality alone."""
        return AtMost(self.value, self.limit)


def asked_by(op: Op, why: str) -> str:
    """The words for who asks for something."""
    return f"{op.kind}{f' at {op.loc}' if op.loc is not None else ''}: {why}"


def power(number: int) -> str:
    """A large number in a form that a reader takes in: ``2^31 - 1``."""
    high = 1 << max(number.bit_length(), 1)
    if number < 2**16:
        return str(number)
    if number == high >> 1:
        return f"2^{high.bit_length() - 2}"
    rest = high - number
    known = rest == 1 or (rest > 2**8 and rest & (rest - 1) == 0)
    below = "1" if rest == 1 else f"2^{rest.bit_length() - 1}"
    return f"2^{high.bit_length() - 1} - {below}" if known else str(number)


def of_ops(graph: Graph) -> list[Requirement]:
    """What ops ask for whatever runs them.

    Raises:
        CodegenError: no size in the ranges meets a requirement.
    """
    found = [
        Requirement(
            op.results[2].type.elements,
            WORD,
            asked_by(op if op.loc is not None else owner, "pairs are numbered in 32 bits"),
        )
        for owner in graph.ops
        for op in (owner, *(owner.body.ops if owner.body is not None else ()))
        if op.kind in ("moe.dispatch", "moe.dispatch_picks")
    ]
    for r in found:
        if prove_at_most(r.value, r.limit, graph.ranges) is False:
            least = bounds(r.value, graph.ranges)[0]
            raise CodegenError(
                f"@{graph.name}: {r.asked}, so {show_dim(r.value)} <= {power(r.limit)}, but it is"
                f" at least {least} in the declared ranges"
            )
    return found


def needed(found: Iterable[Requirement], ranges: Mapping[str, Range]) -> list[Requirement]:
    """The requirements that neither the ranges nor the others imply, the strictest of each size."""
    strictest: dict[Dim, Requirement] = {}
    for r in found:
        if r.value not in strictest or r.limit < strictest[r.value].limit:
            strictest[r.value] = r
    kept = [r for r in strictest.values() if not prove_at_most(r.value, r.limit, ranges)]
    for r in tuple(kept):
        others = [o.fact for o in kept if o is not r]
        if prove_at_most(r.value, r.limit, ranges, others):
            kept.remove(r)
    return kept


def emit_checks(writer: Writer, graph: Graph, found: Sequence[Requirement]) -> None:
    """Write the lines that check what was asked for; proofs rest on the declared upper bounds."""
    if not found:
        return
    kept = needed(found, from_zero(graph.ranges))
    for name in dim_names(graph):
        high = graph.ranges.get(name, (0, None))[1]
        facts = [r.fact for r in kept]
        if high is not None and not prove_at_most(dim(name), high, {}, facts):
            kept.append(Requirement(dim(name), high, "the declared range"))
    for r in kept:
        value, text = python_source(r.value), show_dim(r.value)
        writer.line(f"guards.at_most({value}, {r.limit}, {text!r}, {r.asked!r})")


def from_zero(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges without their lower bounds, which ``forward`` does not check."""
    return {name: (0, high) for name, (_, high) in ranges.items()}

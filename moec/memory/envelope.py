"""The peak as a piecewise polynomial: which moment is the largest, over ranges of a dim.

That one sum is nowhere above another is proved (:func:`moec.ir.dims.prove_at_most`); where that is
not known, the range is cut in two, so breaks are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moec.ir.dims import Dim, apply, canon
from moec.ir.prove import prove_at_most
from moec.memory.buffers import Moment
from moec.memory.polynomials import (
    Polynomial,
    Span,
    UndecidedError,
    above,
    as_dim,
    plus,
    rounded_up,
)


@dataclass(frozen=True)
class Piece:
    """From ``low`` to ``high`` the peak is at ``moment``, and ``expression`` is at least as large:
    above it by less than a granule a buffer, or by a hundredth.
    """

    low: int
    high: int
    expression: Dim
    moment: Moment


# The allocations of each moment, in bytes
Allocations = Mapping[Moment, Sequence[Dim]]


def pieces(moments: Allocations, granule: int, name: str, low: int, high: int) -> tuple[Piece, ...]:
    """The peak of moments for sizes of the dim ``name`` from ``low`` to ``high``.

    A piece that the next one bounds as well, once that is raised by less than a hundredth, is part
    of it.
    """
    found: list[_Joined] = []
    for piece in reversed(list(_cut(moments, granule, name, low, high))):
        joined = found[-1].with_piece(piece, name) if found else None
        if joined is None:
            found.append(_Joined(piece, piece.low))
        else:
            found[-1] = joined
    return tuple(one.piece for one in reversed(found))


@dataclass(frozen=True)
class _Joined:
    """A piece that also serves sizes from ``low`` on, its expression raised by ``extra``."""

    base: Piece
    low: int
    extra: int = 0

    @property
    def piece(self) -> Piece:
        """The piece that it is."""
        raised = canon(self.base.expression + self.extra)
        return replace(self.base, low=self.low, expression=raised)

    def with_piece(self, piece: Piece, name: str) -> _Joined | None:
        """The same with the piece before, if little is lost."""
        ends = {at: _value(piece.expression, name, at) for at in (piece.low, piece.high)}
        own = {at: _value(self.base.expression, name, at) for at in (*ends, self.base.low)}
        extra = max(self.extra, *(ends[at] - own[at] for at in ends))
        raised = canon(self.base.expression + extra)
        proved = prove_at_most(piece.expression, raised, {name: (piece.low, piece.high)})
        near = all(100 * (own[at] + extra) <= 101 * ends[at] for at in ends)
        if proved and near and 100 * extra <= own[self.base.low]:
            return _Joined(self.base, piece.low, extra)
        return None


def _value(expression: Dim, name: str, at: int) -> int:
    return int(apply(expression, {name: at}))


def _cut(moments: Allocations, granule: int, name: str, low: int, high: int) -> Iterator[Piece]:
    """One piece where one moment is the largest everywhere, else those of both halves."""
    span, left = (name, (low, high)), moments
    try:
        sums = _sums(moments, granule, span)
        best = max(sums, key=lambda m: _value(sums[m], name, high))
        above = [m for m in sums if not prove_at_most(sums[m], sums[best], dict([span]))]
        if not above:
            yield Piece(low, high, sums[best], best)
            return
        left = {m: moments[m] for m in (best, *above)}
    except UndecidedError:
        pass  # of two sizes either may be smaller: each half knows more
    middle = (low + high) // 2
    yield from _cut(left, granule, name, low, middle)
    yield from _cut(left, granule, name, middle + 1, high)


def _sums(moments: Allocations, granule: int, span: Span) -> dict[Moment, Dim]:
    """What each moment holds, at most."""
    known: dict[Dim, Polynomial] = {}
    return {m: as_dim(_sum(s, granule, span, known), span[0]) for m, s in moments.items()}


def _sum(
    sizes: Sequence[Dim], granule: int, span: Span, known: dict[Dim, Polynomial]
) -> Polynomial:
    """The sum of allocations; ``known`` remembers them."""
    total: Polynomial = ()
    for size in sizes:
        if size not in known:
            known[size] = rounded_up(above(size, span), granule)
        total = plus(total, known[size])
    return total


__all__ = ["Piece", "pieces"]

"""The peak as a piecewise polynomial: which moment is the largest, over ranges of a dim.

That one sum is nowhere above another is proved (:func:`moec.ir.dims.prove_at_most`); where that is
not known, the range is cut in two, so breaks are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moec.ir.dims import Dim, apply, prove_at_most
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
    """From ``low`` to ``high`` the peak is at ``moment``, and ``expression`` is at least as large
    (less than a granule a buffer above it).
    """

    low: int
    high: int
    expression: Dim
    moment: Moment


# The allocations of each moment, in bytes
Allocations = Mapping[Moment, Sequence[Dim]]


def pieces(moments: Allocations, granule: int, name: str, low: int, high: int) -> tuple[Piece, ...]:
    """The peak of moments for sizes of the dim ``name`` from ``low`` to ``high``.

    A piece that its neighbour bounds as well, to a hundredth, is part of that.
    """
    found: list[Piece] = []
    for piece in reversed(list(_cut(moments, granule, name, low, high))):
        if found and _bounds_as_well(found[-1], piece, name):
            piece = replace(found.pop(), low=piece.low)
        found.append(piece)
    return tuple(reversed(found))


def _bounds_as_well(other: Piece, piece: Piece, name: str) -> bool:
    """Whether ``other``'s expression is above that of a piece in its range, and barely so."""
    ranges = {name: (piece.low, piece.high)}
    return bool(prove_at_most(piece.expression, other.expression, ranges)) and all(
        100 * _value(other.expression, name, at) <= 101 * _value(piece.expression, name, at)
        for at in (piece.low, piece.high)
    )


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

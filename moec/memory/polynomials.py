"""Polynomials in one dim that are nowhere below a size.

A size that is rounded up, or the smaller of two, is no polynomial. A bound on memory needs one
that is at least as large; coefficients are fractions until they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from moec.errors import DimError
from moec.ir.dims import Dim, Range, canon, ceildiv, dim, floordiv
from moec.ir.prove import prove_at_most

# Coefficients, those of lower powers first
Polynomial = tuple[Fraction, ...]
# The name of the symbol, and its range
Span = tuple[str, Range]


class UndecidedError(Exception):
    """Which of two sizes is smaller depends on where in the range one is."""


def above(value: Dim, span: Span) -> Polynomial:
    """A polynomial that is at least ``value`` for every size in the range.

    Raises:
        UndecidedError: there is a better one for each of two parts of the range.
        DimError: the dim has another form than sizes have.
    """
    return _bound(value, span, True)


def rounded_up(polynomial: Polynomial, granule: int) -> Polynomial:
    """At least its values rounded up to multiples of ``granule``."""
    return plus(polynomial, (Fraction(granule - _divisor(polynomial, granule)),))


def _divisor(polynomial: Polynomial, granule: int) -> int:
    """What surely divides every value and ``granule``."""
    if any(c.denominator != 1 for c in polynomial):
        return 1
    return math.gcd(granule, *(int(c) for c in polynomial))


def plus(a: Polynomial, b: Polynomial) -> Polynomial:
    """The sum."""
    size = max(len(a), len(b))
    pairs = zip(_padded(a, size), _padded(b, size), strict=True)
    return tuple(x + y for x, y in pairs)


def _padded(a: Polynomial, size: int) -> Polynomial:
    return a + (Fraction(0),) * (size - len(a))


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    total: Polynomial = ()
    for power, coefficient in enumerate(a):
        shifted = (Fraction(0),) * power + tuple(coefficient * c for c in b)
        total = plus(total, shifted)
    return total


def as_dim(polynomial: Polynomial, name: str) -> Dim:
    """The polynomial in the dim ``name``; fractions are rounded up, since no size is negative."""
    return canon(
        sum((math.ceil(c) * dim(name) ** p for p, c in enumerate(polynomial)), 0 * dim(name))
    )


def _bound(value: Any, span: Span, is_upper: bool) -> Polynomial:
    """A polynomial above or below a dim."""
    if isinstance(value, int) or value.is_Integer:
        return (Fraction(int(value)),)
    if value.is_Symbol:
        return (Fraction(0), Fraction(1))
    if value.is_Add:
        return _folded(plus, [_bound(a, span, is_upper) for a in value.args])
    if value.is_Mul:
        return _scaled(value, span, is_upper)
    if value.is_Pow:
        return _folded(_times, [_bound(value.args[0], span, is_upper)] * int(value.args[1]))
    if value.func in (ceildiv, floordiv):
        return _quotient(value, span, is_upper)
    if value.func.__name__ in ("Min", "Max"):
        return _bound(_extreme(value, span), span, is_upper)
    raise DimError(f"no polynomial bounds the dim {value}")


def _folded(
    combine: Callable[[Polynomial, Polynomial], Polynomial], parts: Sequence[Polynomial]
) -> Polynomial:
    total, *rest = parts
    for part in rest:
        total = combine(total, part)
    return total


def _scaled(value: Any, span: Span, is_upper: bool) -> Polynomial:
    """A product: what is above a factor is below its negative."""
    number, rest = value.as_coeff_Mul()
    factors = rest.args if rest.is_Mul else (rest,)
    is_above = is_upper == (number > 0)
    product = _folded(_times, [_bound(f, span, is_above) for f in factors])
    return tuple(c * int(number) for c in product)


def _quotient(value: Any, span: Span, is_upper: bool) -> Polynomial:
    """A division by a number, rounded; the remainder may be lost or added."""
    divisor = int(value.args[1])
    inner = _bound(value.args[0], span, is_upper)
    step = _divisor(inner, divisor)
    if is_upper and value.func is ceildiv:
        inner = plus(inner, (Fraction(divisor - step),))
    if not is_upper and value.func is floordiv:
        inner = plus(inner, (Fraction(step - divisor),))
    return tuple(c / divisor for c in inner)


def _extreme(value: Any, span: Span) -> Any:
    """The argument that is smallest (largest) in the whole range."""
    ranges = dict([span])
    sign = 1 if value.func.__name__ == "Min" else -1
    for one in value.args:
        others = ((one, o) if sign > 0 else (o, one) for o in value.args if o is not one)
        if all(prove_at_most(canon(a), canon(b), ranges) for a, b in others):
            return one
    raise UndecidedError(str(value))


__all__ = ["Polynomial", "Span", "UndecidedError", "above", "as_dim", "plus", "rounded_up"]

"""What is known of symbolic sizes: bounds, and proofs of ``a <= b``, ``a == b`` and divisibility.

An answer is ``True`` (for all sizes in the ranges), ``False`` (for none), or ``None``: not known.
``None`` is not yes: a caller must mask, widen, guard or refuse. ``known`` are inequalities that
something else sees to, such as a guard of the emitted code.

Three ways to a bound of ``e``, all of them sound, the best one counts: interval arithmetic;
polynomials above or below ``e`` (a quotient lies within one of the fraction) that are seen to have
no negative coefficient once each size is counted from an end of its range; and both of these on
``e`` less a multiple of a known inequality's slack, which takes the place of Fourier and Motzkin's
elimination.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from moec.ir.dims import Dim, Range, canon, ceildiv, floordiv, show_dim

Bound: TypeAlias = int | None
Interval: TypeAlias = tuple[Bound, Bound]
Ranges: TypeAlias = tuple[tuple[str, Range], ...]

# Polynomials tried for one question; more are not looked at.
_MOST_TRIED = 16


@dataclass(frozen=True)
class AtMost:
    """``small <= large``: a fact about sizes."""

    small: Dim
    large: Dim

    def __str__(self) -> str:
        return f"{show_dim(self.small)} <= {show_dim(self.large)}"


def bounds(value: Dim, ranges: Mapping[str, Range], known: Sequence[AtMost] = ()) -> Range:
    """The least and greatest value of a dim (``None``: no upper bound known).

    Valid for sums of products with any sign; an unknown symbol has the range ``(0, None)``. A dim
    is a size: where no lower bound is found, 0 is one.
    """
    if isinstance(value, int):
        return value, value
    low, high = _interval(value, dict(_frozen(narrowed(ranges, known))))
    return (int(low) if low is not None else 0), (int(high) if high is not None else None)


def prove_at_most(
    a: Dim, b: Dim, ranges: Mapping[str, Range], known: Sequence[AtMost] = ()
) -> bool | None:
    """Whether ``a <= b``."""
    difference = _difference(b, a)
    if isinstance(difference, int):
        return difference >= 0
    frozen, facts = _frozen(narrowed(ranges, known)), tuple(known)
    if _is_never_negative(difference, frozen, facts):
        return True
    return False if _is_never_negative(canon(-difference - 1), frozen, facts) else None


def prove_equal(
    a: Dim, b: Dim, ranges: Mapping[str, Range], known: Sequence[AtMost] = ()
) -> bool | None:
    """Whether ``a == b``, where ``known`` says so if nothing else does."""
    answers = prove_at_most(a, b, ranges, known), prove_at_most(b, a, ranges, known)
    if answers == (True, True):
        return True
    return False if False in answers else None


def divisible(value: Dim, by: int) -> bool | None:
    """Whether ``value`` is a multiple of ``by``; ``False``: never, whatever the sizes."""
    if isinstance(value, int):
        return value % by == 0
    rest = [t for t in sympy.Add.make_args(value) if int(t.as_coeff_Mul()[0]) % by]
    if not rest:
        return True
    return False if all(t.is_Integer for t in rest) else None


def equal(a: Dim, b: Dim) -> tuple[AtMost, AtMost]:
    """The fact ``a == b``, in the form of ``known``."""
    return AtMost(a, b), AtMost(b, a)


def narrowed(ranges: Mapping[str, Range], known: Sequence[AtMost]) -> dict[str, Range]:
    """The ranges, cut by what is known of single sizes (``8*T <= 100`` gives ``T <= 12``)."""
    found = dict(ranges)
    for slack in _slacks(tuple(known)):
        names = list(slack.free_symbols)
        if len(names) == 1 and sympy.degree(slack, names[0]) == 1:
            _cut(found, names[0], slack)
    return found


@functools.lru_cache(maxsize=1024)
def _slacks(known: tuple[AtMost, ...]) -> tuple[Any, ...]:
    """Polynomials with whole coefficients that are not negative where the facts hold."""
    found = list[Any]()
    for fact in known:
        slack = sympy.sympify(_difference(fact.large, fact.small))
        for p in _polynomials(slack, {}, upper=True):
            found.append(sympy.expand(p * sympy.ilcm(1, *(c.q for c in _coefficients(p)))))
    return tuple(found)


def _coefficients(e: Any) -> list[Any]:
    return list(e.as_coefficients_dict().values())


def _cut(ranges: dict[str, Range], name: sympy.Symbol, slack: Any) -> None:
    """Cut the range of the one size in ``slack >= 0``, which is linear."""
    step, start = int(slack.coeff(name, 1)), int(slack.coeff(name, 0))
    low, high = ranges.get(name.name, (0, None))
    if step < 0:
        most = start // -step
        high = most if high is None else min(high, most)
    else:
        low = max(low, -(start // step))
    if high is None or low <= high:  # what contradicts the ranges proves nothing
        ranges[name.name] = low, high


def _difference(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return canon(sympy.sympify(a) - sympy.sympify(b))


def _frozen(ranges: Mapping[str, Range]) -> Ranges:
    return tuple(sorted(ranges.items()))


@functools.lru_cache(maxsize=4096)
def _is_never_negative(e: Any, ranges: Ranges, known: tuple[AtMost, ...]) -> bool:
    """Whether ``e >= 0`` is proved."""
    for remainder in _less_slack(e, known):
        low = remainder if isinstance(remainder, int) else _interval(remainder, dict(ranges))[0]
        if low is not None and low >= 0:
            return True
        if not isinstance(remainder, int) and _has_polynomial(remainder, dict(ranges)):
            return True
    return False


def _less_slack(e: Any, known: tuple[AtMost, ...]) -> Iterator[Any]:
    """``e``, and ``e`` less so much of a known slack that one of its terms is gone."""
    yield e
    for slack in _slacks(known):
        terms = slack.as_coefficients_dict()
        mine = sympy.sympify(e).as_coefficients_dict()
        shares = {mine[t] / c for t, c in terms.items() if t in mine and t != 1}
        for share in sorted(s for s in shares if s > 0):
            yield _whole(e - share * slack)


def _whole(e: Any) -> Any:
    e = sympy.expand(e)
    return int(sympy.floor(e)) if e.is_Rational else e


# Polynomials
def _has_polynomial(e: Any, ranges: Mapping[str, Range]) -> bool:
    """Whether some polynomial below ``e`` is seen to be nonnegative."""
    return any(_is_nonnegative(p, ranges) for p in _polynomials(e, ranges, upper=False))


def _is_nonnegative(p: Any, ranges: Mapping[str, Range]) -> bool:
    """Whether no coefficient is negative once each size is counted from an end of its range."""
    names = sorted(p.free_symbols, key=str)
    ends = [_ends(s, ranges.get(s.name, (0, None))) for s in names]
    for chosen in itertools.islice(itertools.product(*ends), _MOST_TRIED):
        counted = sympy.expand(p.subs(dict(zip(names, chosen, strict=True)), simultaneous=True))
        if all(c >= 0 for c in _coefficients(counted)):
            return True
    return False


def _ends(symbol: sympy.Symbol, bounds: Range) -> list[Any]:
    low, high = bounds
    return [symbol + low] if high is None else [symbol + low, high - symbol]


def _polynomials(e: Any, ranges: Mapping[str, Range], *, upper: bool) -> list[Any]:
    """Polynomials that are never below (``upper``) or never above ``e``."""
    sums: list[Any] = [sympy.Integer(0)]
    for term in sympy.Add.make_args(e):
        found = _of_term(term, ranges, upper)
        sums = [s + f for s in sums for f in found][:_MOST_TRIED]
    return sums


def _of_term(term: Any, ranges: Mapping[str, Range], upper: bool) -> list[Any]:
    """The same for a term: a number times sizes times at most one rounding or extreme."""
    coefficient, rest = term.as_coeff_Mul()
    factors = sympy.Mul.make_args(rest)
    odd = [f for f in factors if f.atoms(ceildiv, floordiv, sympy.Min, sympy.Max)]
    if not odd:
        return [term]
    if len(odd) > 1 or odd[0].is_Pow or odd[0].is_Add:
        return []
    sizes = sympy.Mul(*(f for f in factors if f is not odd[0]))
    inner = _of_function(odd[0], ranges, upper == (coefficient > 0))
    return [sympy.expand(coefficient * sizes * f) for f in inner]


def _of_function(f: Any, ranges: Mapping[str, Range], upper: bool) -> list[Any]:
    constant = _interval(f, ranges)[1 if upper else 0]
    found = [] if constant is None else [sympy.Integer(constant)]
    if f.func in (ceildiv, floordiv):
        return [*_of_quotient(f, ranges, upper), *found]
    if f.func in (sympy.Min, sympy.Max):
        if (f.func is sympy.Min) == upper:  # one argument is a bound, and any of them is
            found = [p for a in f.args for p in _polynomials(a, ranges, upper=upper)] + found
        return found
    return []


def _of_quotient(f: Any, ranges: Mapping[str, Range], upper: bool) -> list[Any]:
    top, bottom = f.args
    if not bottom.is_Integer:
        return []
    rounding = bottom - 1
    if f.func is floordiv:
        rounding = 0 if upper else -rounding
    elif not upper:
        rounding = 0
    return [(p + rounding) / bottom for p in _polynomials(top, ranges, upper=upper)]


# Intervals
def _interval(e: Any, ranges: Mapping[str, Range]) -> Interval:
    if e.is_Integer:
        return int(e), int(e)
    if e.is_Symbol:
        return ranges.get(e.name, (0, None))
    parts = [_interval(a, ranges) for a in e.args]
    lows, highs = [p[0] for p in parts], [p[1] for p in parts]
    if e.is_Add:
        return _all(sum, lows), _all(sum, highs)
    if e.is_Mul:
        return functools.reduce(_times, parts)
    if e.is_Pow:
        return functools.reduce(_times, [parts[0]] * int(e.args[1]))
    if e.func is ceildiv:
        return _quotient(parts, lambda a, b: -(-a // b))
    if e.func is floordiv:
        return _quotient(parts, lambda a, b: a // b)
    if e.func is sympy.Min:
        known = [h for h in highs if h is not None]
        return _all(min, lows), min(known) if known else None
    if e.func is sympy.Max:
        known = [low for low in lows if low is not None]
        return max(known) if known else None, _all(max, highs)
    return None, None


def _all(f: Callable[[Any], int], values: Sequence[Bound]) -> Bound:
    return None if any(v is None for v in values) else f(values)


def _times(a: Interval, b: Interval) -> Interval:
    corners = [None if x is None or y is None else x * y for x in a for y in b]
    if None not in corners:
        known = [c for c in corners if c is not None]
        return min(known), max(known)
    if (a[0] or 0) >= 0 and (b[0] or 0) >= 0 and a[0] is not None and b[0] is not None:
        high = None if a[1] is None or b[1] is None else a[1] * b[1]
        return a[0] * b[0], 0 if 0 in (a[1], b[1]) else high
    for x, y in ((a, b), (b, a)):
        if x == (-1, -1):
            return (None if y[1] is None else -y[1]), (None if y[0] is None else -y[0])
        if x[0] is not None and x[0] == x[1] and x[0] < 0:
            return (None if y[1] is None else x[0] * y[1]), (None if y[0] is None else x[0] * y[0])
    return None, None


def _quotient(parts: Sequence[Interval], f: Callable[[int, int], int]) -> Interval:
    (alo, ahi), (blo, bhi) = parts
    least = max(blo or 1, 1)  # a divisor is positive
    greatest = None if bhi is None else max(bhi, 1)
    return _rounded(alo, greatest, least, f), _rounded(ahi, least, greatest, f)


def _rounded(a: Bound, by: Bound, by_if_negative: Bound, f: Callable[[int, int], int]) -> Bound:
    """``f(a, by)``, the extreme over the divisors, which depends on the sign of ``a``."""
    if a is None:
        return None
    divisor = by if a >= 0 else by_if_negative
    return 0 if divisor is None else f(a, divisor)

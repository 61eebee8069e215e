"""A tracer's sizes as dims: sums and products, quotients, limits, and rounded fractions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
from torch.utils._sympy import functions as tracer

from moec.errors import CaptureError
from moec.ir.dims import Dim, canon, ceildiv, floordiv

# Up to here numbers of tokens times a numerator are exact in double precision.
_MAX_NUMERATOR, _MAX_DENOMINATOR = 2**20, 2**12


@dataclass(frozen=True)
class _Ratio:
    """``number / divisor``: what floating-point code computes; ``rounded`` if it may be inexact."""

    number: Dim
    divisor: int = 1
    rounded: bool = False


def dim_of_expression(expression: Any, symbols: Mapping[Any, Dim]) -> Dim:
    """The dim that an integer expression of the tracer stands for.

    A capacity such as ``int(1.25 * T / E)`` is one where floating-point arithmetic provably gives
    the whole number that exact arithmetic does: factors with few binary digits, and at most one
    division, last. Raises :class:`CaptureError` for any other expression.
    """
    return canon(_whole(expression, symbols))


def _whole(e: Any, symbols: Mapping[Any, Dim]) -> Any:
    if e.is_Integer:
        return sympy.Integer(int(e))
    if e in symbols:
        return symbols[e]
    rule = _WHOLE.get(e.func)
    if rule is not None:
        return rule(*(_whole(a, symbols) for a in e.args))
    if e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        return _whole(e.base, symbols) ** int(e.exp)
    if e.func in _ROUNDINGS:
        return _rounded(_ROUNDINGS[e.func], _ratio(e.args[0], symbols))
    raise CaptureError(f"the size {e} is no sum of products of token axes")


def _rounded(rounding: Callable[..., Any], ratio: _Ratio) -> Any:
    return rounding(ratio.number, sympy.Integer(ratio.divisor))


def _ratio(e: Any, symbols: Mapping[Any, Dim]) -> _Ratio:
    if e.is_Float or e.is_Rational:
        return _constant(float(e))
    if e.func is tracer.ToFloat:
        return _Ratio(_whole(e.args[0], symbols))
    if e.func in (tracer.FloatTrueDiv, tracer.IntTrueDiv):
        return _divided(_ratio(e.args[0], symbols), _ratio(e.args[1], symbols), e)
    if e.is_Mul:
        parts = [_ratio(a, symbols) for a in e.args]
        result = parts[0]
        for part in parts[1:]:
            result = _product(result, part, e)
        return result
    return _Ratio(_whole(e, symbols))


def _constant(value: float) -> _Ratio:
    exact = Fraction(value)
    if exact.denominator > _MAX_DENOMINATOR or abs(exact.numerator) > _MAX_NUMERATOR:
        raise CaptureError(
            f"a number of slots is {value} times a number of tokens: floating-point rounding "
            "decides it at some sizes; use a factor such as 1.25 or 1.5, or whole numbers"
        )
    return _Ratio(sympy.Integer(exact.numerator), exact.denominator)


def _product(a: _Ratio, b: _Ratio, e: Any) -> _Ratio:
    if a.rounded or b.rounded:
        raise CaptureError(f"the size {e} multiplies a rounded quotient")
    return _Ratio(canon(a.number * b.number), a.divisor * b.divisor)


def _divided(a: _Ratio, b: _Ratio, e: Any) -> _Ratio:
    """A division; by a power of two it is exact, by another number it must be the last step."""
    by = Fraction(int(b.number), b.divisor) if _is_number(b) else Fraction(0)
    if a.rounded or by <= 0:
        raise CaptureError(f"the size {e} divides by a size, or divides twice")
    divisor = a.divisor * by.numerator
    exact = by.numerator & (by.numerator - 1) == 0
    return _Ratio(canon(a.number * by.denominator), divisor, rounded=not exact)


def _is_number(ratio: _Ratio) -> bool:
    return isinstance(ratio.number, int) or bool(ratio.number.is_Integer)


def _add(*parts: Any) -> Any:
    return sympy.Add(*parts)


def _multiply(*parts: Any) -> Any:
    made = sympy.Mul(*parts)
    quotient = -made
    if quotient.func is floordiv:  # -(-a // b) is how Python code rounds up
        return ceildiv(-quotient.args[0], quotient.args[1])
    return made


_WHOLE: dict[Any, Callable[..., Any]] = {
    sympy.Add: _add,
    sympy.Mul: _multiply,
    tracer.FloorDiv: floordiv,
    tracer.CleanDiv: floordiv,
    tracer.CeilDiv: ceildiv,
    tracer.Max: lambda *parts: sympy.Max(*parts),
    tracer.Min: lambda *parts: sympy.Min(*parts),
    sympy.Max: lambda *parts: sympy.Max(*parts),
    sympy.Min: lambda *parts: sympy.Min(*parts),
}
_ROUNDINGS: dict[Any, Callable[..., Any]] = {
    tracer.TruncToInt: floordiv,
    tracer.FloorToInt: floordiv,
    tracer.CeilToInt: ceildiv,
}

__all__ = ["dim_of_expression"]

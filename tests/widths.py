"""What the integers of emitted kernels can become: intervals over the source's own expressions.

A value is what Triton makes of it: integers of 32 or 64 bits, or Python's own while compiling.
Every operation on integers of 32 bits is checked, in masked lanes as well, for all sizes that the
checks of ``forward`` let through. What tensors hold is taken from their makers
(:mod:`tests.widths_host`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any, TypeAlias

WORD = 2**31 - 1
LIMITS = {32: (-(2**31), WORD), 64: (-(2**63), 2**63 - 1)}
FULL = 2**62  # of Python's integers, which have no limit


@dataclass(frozen=True)
class Span:
    """Integers from ``low`` to ``high``, ``rest`` modulo ``step``."""

    low: int
    high: int
    step: int = 1
    rest: int = 0

    @property
    def is_one(self) -> bool:
        """Whether it is a single number."""
        return self.low == self.high

    def join(self, other: Span) -> Span:
        """Both."""
        step = gcd(self.step, other.step)
        step = 1 if (self.rest - other.rest) % max(step, 1) else max(step, 1)
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Span(low, high, step, self.rest % step)

    def inside(self, low: int, high: int) -> Span:
        """The part in other limits; a contradiction leaves the nearest number."""
        low, high = max(self.low, low), min(self.high, high)
        return replace(self, low=min(low, high), high=high)


def one(number: int) -> Span:
    """A single number."""
    return Span(number, number, 0, number)


def _corners(a: Span, b: Span, f: Callable[[int, int], int]) -> Span:
    found = [f(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Span(min(found), max(found))


def _quotient(a: Span, b: Span) -> Span:
    """Towards zero, as on a GPU; operands of emitted code are hardly ever negative."""
    divisors = [d for d in (b.low, -1, 1, b.high) if d and b.low <= d <= b.high] or [1]
    found = [int(abs(x) // abs(d)) * (1 if x * d >= 0 else -1) for x in ends(a) for d in divisors]
    return Span(min(found), max(found))


def _remainder(a: Span, b: Span) -> Span:
    most = max(abs(b.low), abs(b.high)) - 1
    low, high = (max(a.low, -most) if a.low < 0 else 0), (min(a.high, most) if a.high > 0 else 0)
    return Span(low, high)


def ends(a: Span) -> tuple[int, ...]:
    """The numbers at which a monotone function is extreme."""
    return (a.low, a.high, *((0,) if a.low < 0 < a.high else ()))


def combine(sign: str, a: Span, b: Span) -> Span:
    """The results of an operation."""
    if a.is_one and b.is_one and sign in _EXACT:
        return one(_EXACT[sign](a.low, b.low))
    if sign in "+-":
        found = _corners(a, b, _EXACT[sign])
        step = gcd(a.step, b.step)
        return replace(found, step=step, rest=_EXACT[sign](a.rest, b.rest) % max(step, 1))
    if sign == "*":
        found = _corners(a, b, operator.mul)
        number, other = (a, b) if a.is_one else (b, a)
        if not number.is_one or not number.low:
            return found
        step = abs(number.low * other.step)
        return replace(found, step=step, rest=number.low * other.rest % max(step, 1))
    if sign in ("min", "max"):
        f = min if sign == "min" else max
        return Span(f(a.low, b.low), f(a.high, b.high))
    return {"//": _quotient, "%": _remainder}[sign](a, b)


_EXACT: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "min": min,
    "max": max,
}
Axes: TypeAlias = frozenset[int]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Int:
    """An integer or a block of integers of 32 or 64 bits; 0 bits: known while compiling."""

    bits: int
    span: Span
    shape: Shape = ()
    total: int | None = None  # the most that distinct elements of it add up to
    distinct: Axes = frozenset()  # axes along which no number comes twice
    sparse: Axes = frozenset()  # axes along which at most one is not 0
    origin: tuple[Tensor, str] | None = None  # the tensor that it was loaded from, and where
    minus: tuple[Int, Int] | None = field(default=None, compare=False)  # the difference that it is


@dataclass(frozen=True)
class Bool:
    """A truth value or a block of them."""

    shape: Shape = ()
    single: Axes = frozenset()  # axes along which at most one holds


@dataclass(frozen=True)
class Other:
    """What is no integer: floats, descriptors, shared memory."""

    shape: Shape = ()


@dataclass(eq=False)
class Tensor:
    """A tensor of the host: integers with their contents by place, or of floats."""

    shape: tuple[Any, ...]
    bits: int = 0  # 0: of floats
    contents: Callable[[Span], Span] = lambda place: Span(*LIMITS[32])
    total: int | None = None
    ascending: bool = False


@dataclass(frozen=True)
class Pointer:
    """Places in a tensor, in elements."""

    tensor: Tensor
    place: Span = field(default_factory=lambda: one(0))
    shape: Shape = ()


Abstract: TypeAlias = Any  # Int, Bool, Other, Pointer, or a tuple of them, a function, a dtype


def number(value: int) -> Int:
    """A number in the source."""
    return Int(0, one(value))


def broadcast(*shapes: Shape) -> Shape:
    """The common shape."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(max(sizes) for sizes in zip(*padded, strict=True))


def join(a: Abstract, b: Abstract) -> Abstract:
    """What is either of two."""
    if a is b or a == b:
        return a
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(map(join, a, b))
    if isinstance(a, Int) and isinstance(b, Int):
        bits = max(a.bits, b.bits)
        total = None if None in (a.total, b.total) else max(a.total or 0, b.total or 0)
        return Int(bits, a.span.join(b.span), broadcast(a.shape, b.shape), total)
    if isinstance(a, Pointer) and isinstance(b, Pointer) and a.tensor is b.tensor:
        return replace(a, place=a.place.join(b.place))
    return Other(broadcast(shape_of(a), shape_of(b)))


def shape_of(value: Abstract) -> Shape:
    """The shape of a block; of anything else that of a number."""
    return value.shape if isinstance(value, Int | Bool | Other | Pointer) else ()


def inserted(value: Abstract, places: Iterable[bool]) -> Abstract:
    """``value[:, None]``: ``places`` says where an axis is new."""
    shape, moved = list[int](), dict[int, int]()
    old = iter(range(len(shape_of(value))))
    for at, is_new in enumerate(places):
        axis = None if is_new else next(old, None)
        shape.append(1 if axis is None else shape_of(value)[axis])
        if axis is not None:
            moved[axis] = at
    if isinstance(value, Int):
        distinct = frozenset(moved[a] for a in value.distinct)
        sparse = frozenset(moved[a] for a in value.sparse)
        return replace(value, shape=tuple(shape), distinct=distinct, sparse=sparse)
    if isinstance(value, Bool):
        return Bool(tuple(shape), frozenset(moved[a] for a in value.single))
    return replace(value, shape=tuple(shape)) if hasattr(value, "shape") else value


def compared(sign: str, a: Abstract, b: Abstract) -> Bool:
    """The result of a comparison; equality with distinct numbers holds at most once."""
    shape = broadcast(shape_of(a), shape_of(b))
    single: Axes = frozenset()
    if sign == "==" and isinstance(a, Int) and isinstance(b, Int):
        for x, y in ((a, b), (b, a)):
            if len(x.shape) == len(shape):
                fixed = [i for i in range(len(shape)) if (y.shape or (1,) * len(shape))[i] == 1]
                single |= x.distinct & frozenset(fixed)
    return Bool(shape, single)


def combined(sign: str, a: Int, b: Int, shape: Shape) -> Int:
    """The result of an operation on two numbers; ``b + (a - b)`` is ``a``."""
    bits = max(a.bits, b.bits)
    if sign == "+" and b.minus is not None and b.minus[1] is a:
        return Int(bits, b.minus[0].span, shape)
    found = totalled(sign, a, b, Int(bits, combine(sign, a.span, b.span), shape))
    return replace(found, minus=(a, b)) if sign == "-" else found


def totalled(sign: str, a: Int, b: Int, found: Int) -> Int:
    """What the elements of a result add up to: of a sum with a number, and of a quotient.

    An element of an ascending tensor less the one before it is no less than 0, and all of these add
    up to no more than the largest.
    """
    if sign == "-" and a.origin and b.origin and a.origin == (b.origin[0], b.origin[1] + " + 1"):
        high = max(found.span.high, 0)
        return replace(found, span=Span(0, high), total=high)
    if a.total is None or not b.span.is_one or a.span.low < 0:
        return found
    count = prod(found.shape)
    if sign in "+-" and found.span.low >= 0:
        return replace(found, total=a.total + count * combine(sign, one(0), b.span).low)
    if sign == "//" and b.span.low > 0:
        return replace(found, total=a.total // b.span.low)
    return found


def summed(value: Int, axis: int) -> Int:
    """The sum along an axis."""
    size = value.shape[axis] if value.shape else 1
    rest = tuple(s for i, s in enumerate(value.shape) if i != axis)
    low, high = value.span.low, value.span.high
    if axis in value.sparse:
        return Int(max(value.bits, 32), Span(min(low, 0), max(high, 0)), rest)
    low, high = min(low * size, low), max(high * size, high)
    if value.total is not None:
        high = min(high, value.total)
    return Int(max(value.bits, 32), Span(low, max(low, high)), rest, value.total)


def chosen(where: Abstract, a: Abstract, b: Abstract) -> Abstract:
    """``tl.where``; a choice between some numbers and 0 keeps what they add up to."""
    found = join(a, b)
    shape = broadcast(shape_of(where), shape_of(a), shape_of(b))
    if not isinstance(found, Int):
        return Other(shape)
    is_zero = isinstance(b, Int) and b.span == one(0)
    single = where.single if isinstance(where, Bool) and is_zero else frozenset()
    total = a.total if is_zero and isinstance(a, Int) else None
    return replace(found, shape=shape, total=total, sparse=single)

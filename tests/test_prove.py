"""Bounds and proofs about sizes: never wrong (brute force, z3), and as strong as code needs."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import z3
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.dims import Dim, canon, ceildiv, dim, evaluate, floordiv
from moec.ir.prove import (
    AtMost,
    bounds,
    divisible,
    equal,
    narrowed,
    prove_at_most,
    prove_equal,
)
from tests.test_dims import EXPRESSIONS, sizes

T, S, B = dim("T"), dim("S"), dim("B")
RANGE = st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(3, 6)))
MOST = 2**31 - 1


@settings(deadline=None, max_examples=150)
@given(EXPRESSIONS, EXPRESSIONS, RANGE, RANGE)
def test_proofs_and_bounds_are_never_wrong(
    a: sympy.Expr, b: sympy.Expr, t: tuple[int, int | None], s: tuple[int, int | None]
) -> None:
    ranges = {"T": t, "S": s}
    small, large = canon(a), canon(b)
    at_most, same = prove_at_most(small, large, ranges), prove_equal(small, large, ranges)
    low, high = bounds(small, ranges)
    for binding in sizes(ranges):
        value, other = evaluate(small, binding), evaluate(large, binding)
        assert at_most is None or (value <= other) == at_most
        assert same is None or (value == other) == same
        # a dim is a size: the bounds speak of the sizes at which it is one
        assert value < 0 or value >= low
        assert high is None or value <= high


@settings(deadline=None, max_examples=150)
@given(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS, st.integers(0, 12), RANGE)
def test_what_is_known_is_used_rightly(
    a: sympy.Expr, b: sympy.Expr, c: sympy.Expr, limit: int, t: tuple[int, int | None]
) -> None:
    ranges = {"T": t, "S": (0, None)}
    known = AtMost(canon(c), limit)
    at_most = prove_at_most(canon(a), canon(b), ranges, [known])
    low, high = bounds(canon(a), ranges, [known])
    for binding in sizes(ranges):
        if evaluate(known.small, binding) > limit:
            continue
        value = evaluate(canon(a), binding)
        assert at_most is None or (value <= evaluate(canon(b), binding)) == at_most
        assert value < 0 or value >= low
        assert high is None or value <= high


@given(EXPRESSIONS, st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_divisible_is_never_wrong(e: sympy.Expr, by: int) -> None:
    answer = divisible(canon(e), by)
    for binding in sizes({"T": (0, 5), "S": (0, 5)}):
        assert answer is None or (evaluate(canon(e), binding) % by == 0) == answer


def test_divisible_finds_common_factors() -> None:
    assert divisible(12 * T + 8, 4) is True
    assert divisible(12 * T + 6, 4) is False
    assert divisible(6 * T + 8, 4) is None
    assert divisible(128 * ceildiv(T, 128), 64) is True
    assert divisible(16, 8) is True


def tiles(rows: Dim, experts: int, block: int) -> Dim:
    """The most tiles that rows of so many experts can need."""
    return floordiv(rows + sympy.Min(experts, rows) * (block - 1), block)


A = 8 * T
PROVED = [
    (A, MOST, {"T": (0, 131072)}, ()),
    (tiles(A, 64, 128), A, {}, ()),  # no interval shows it: each expert's first row fills a tile
    (tiles(A, 64, 128), ceildiv(A, 128) + 64, {}, ()),
    (T, T * T, {"T": (1, None)}, ()),
    (T * S, T * S * S, {"S": (1, None)}, ()),
    (T * ceildiv(S, 128) * 128, T * S + 127 * T, {}, ()),
    (16 * tiles(A, 64, 128), MOST, {}, (AtMost(A, 2**30),)),
    (A + 127, MOST, {"T": (0, MOST)}, (AtMost(A, 2**30),)),
    (8 * B * S + 127, MOST, {}, (AtMost(8 * B * S, 2**30),)),
    (B * S, 2**27, {}, (AtMost(8 * B * S, 2**30),)),
    (T, 12, {}, (AtMost(A, 100),)),
    (A, 2**30 - 2**16, {}, (AtMost(272 * tiles(A, 64, 128), MOST),)),
]


@pytest.mark.parametrize("a, b, ranges, known", PROVED, ids=str)
def test_what_code_asks_is_proved(a: Dim, b: Dim, ranges: Any, known: Any) -> None:
    ranges = {"T": (0, None), "S": (0, None), "B": (0, None), **ranges}
    assert prove_at_most(a, b, ranges, known) is True
    assert prove_at_most(b + 1, a, ranges, known) is False


def test_not_known_is_none() -> None:
    ranges = {"T": (0, 131072)}
    assert prove_at_most(2 * T, 131072, ranges) is None
    assert prove_at_most(T + 1, T, ranges) is False
    assert prove_at_most(A, MOST, {"T": (0, MOST)}) is None
    assert prove_at_most(A, MOST, {"T": (2**28, MOST)}) is False
    assert prove_equal(A, MOST, {"T": (0, MOST)}) is None


def test_sizes_are_equal_where_something_says_so() -> None:
    assert prove_equal(T, B * S, {}) is None
    assert prove_equal(8 * T, 8 * B * S, {}, equal(T, B * S)) is True
    assert prove_equal(T + 1, B * S, {}, equal(T, B * S)) is False
    assert prove_equal(ceildiv(T, 1), T, {}) is True
    assert prove_equal(T, 5, {"T": (5, 5)}) is True


def test_facts_narrow_ranges() -> None:
    assert narrowed({"T": (0, 131072)}, [AtMost(A, 100)]) == {"T": (0, 12)}
    assert narrowed({}, [AtMost(3, 2 * T)]) == {"T": (2, None)}
    assert narrowed({}, [AtMost(B * S, 100), AtMost(T * T, 100)]) == {}
    assert bounds(A + 1, {"T": (0, MOST)}, [AtMost(A, 100)]) == (1, 97)


def to_z3(e: Any, names: dict[str, Any]) -> Any:
    """A dim as an integer expression of z3, whose division by a positive number rounds down."""
    if isinstance(e, int) or e.is_Integer:
        return z3.IntVal(int(e))
    if e.is_Symbol:
        return names.setdefault(e.name, z3.Int(e.name))
    parts = [to_z3(a, names) for a in e.args]
    if e.is_Add:
        return z3.Sum(parts)
    if e.is_Mul:
        return z3.Product(parts)
    if e.is_Pow:
        return z3.Product([parts[0]] * int(e.args[1]))
    if e.func is floordiv:
        return parts[0] / parts[1]
    if e.func is ceildiv:
        return -(-parts[0] / parts[1])
    first, *rest = parts
    for other in rest:
        first = z3.If((first <= other) == (e.func is sympy.Min), first, other)
    return first


@settings(deadline=None, max_examples=100)
@given(EXPRESSIONS, EXPRESSIONS, st.integers(0, 40), st.integers(0, 2**31))
def test_z3_finds_no_exception_to_a_proof(
    a: sympy.Expr, b: sympy.Expr, limit: int, most: int
) -> None:
    """Over ranges that cannot be enumerated, where brute force sees the first few sizes."""
    ranges, known = {"T": (0, most), "S": (1, None)}, AtMost(canon(T * S), limit)
    answer = prove_at_most(canon(a), canon(b), ranges, [known])
    if answer is None:
        return
    names: dict[str, Any] = {}
    small, large = to_z3(canon(a), names), to_z3(canon(b), names)
    t, s = names.setdefault("T", z3.Int("T")), names.setdefault("S", z3.Int("S"))
    solver = z3.Solver()
    solver.set("timeout", 300)
    solver.add(t >= 0, t <= most, s >= 1, t * s <= limit)
    solver.add(small > large if answer else small <= large)
    assert solver.check() != z3.sat, solver.model()

"""The algebra of sizes, against brute force over small sizes."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import DimError
from moec.ir import dims
from moec.ir.dims import canon, ceildiv, dim, evaluate, floordiv, parse_dim, show_dim

T, S = dim("T"), dim("S")
NUMBERS = st.integers(-9, 9)
LEAVES = st.one_of(st.sampled_from([T, S]), NUMBERS.map(sympy.Integer))


def _nodes(children: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    pair = st.tuples(children, children)
    rounded = st.tuples(children, st.integers(1, 5).map(sympy.Integer))
    return st.one_of(
        pair.map(lambda p: p[0] + p[1]),
        pair.map(lambda p: p[0] - p[1]),
        pair.map(lambda p: p[0] * p[1]),
        pair.map(lambda p: sympy.Min(*p)),
        pair.map(lambda p: sympy.Max(*p)),
        rounded.map(lambda p: ceildiv(*p)),
        rounded.map(lambda p: floordiv(*p)),
    )


EXPRESSIONS = st.recursive(LEAVES, _nodes, max_leaves=5)


def sizes(ranges: dict[str, tuple[int, int | None]]) -> list[dict[str, int]]:
    """Every binding within the ranges, and up to 9 where there is no bound."""
    spans = [range(low, (9 if high is None else high) + 1) for low, high in ranges.values()]
    return [dict(zip(ranges, p, strict=True)) for p in itertools.product(*spans)]


@settings(deadline=None, max_examples=80)
@given(EXPRESSIONS)
def test_text_source_and_canonical_form_mean_the_same(e: sympy.Expr) -> None:
    value = canon(e)
    assert canon(value) == value
    try:
        assert parse_dim(show_dim(value)) == value
    except DimError as error:
        assert "large" in str(error) or "power" in str(error) or "terms" in str(error)
    code = dims.python_source(value)
    for binding in sizes({"T": (0, 4), "S": (0, 4)}):
        expected = evaluate(value, binding)
        assert eval(code, {"min": min, "max": max}, dict(binding)) == expected
        assert int(e.subs({T: binding["T"], S: binding["S"]})) == expected


@given(st.integers(0, 40), st.integers(1, 9))
def test_rounded_quotients(a: int, b: int) -> None:
    assert ceildiv(sympy.Integer(a), sympy.Integer(b)) == -(-a // b)
    assert floordiv(sympy.Integer(a), sympy.Integer(b)) == a // b
    assert evaluate(ceildiv(T, b), {"T": a}) == -(-a // b)
    assert evaluate(floordiv(T + 1, b), {"T": a}) == (a + 1) // b


def test_quotients_simplify_only_where_they_are_whole() -> None:
    assert floordiv(6 * T, 3) == 2 * T
    assert floordiv(T * S, S) == T
    assert evaluate(floordiv(3 * T, 2), {"T": 3}) == 4
    assert ceildiv(T, 1) == T
    for quotient in (ceildiv, floordiv):
        with pytest.raises(DimError, match="division by 0"):
            quotient(T, 0)
        with pytest.raises(DimError, match="division by 0"):
            evaluate(quotient(T, S), {"T": 1, "S": 0})


@pytest.mark.parametrize(
    "text",
    [
        *("", "T +", "T / 2", "T % 2", "1.5", "T.x", "f(T)", "[T]", "'T'", "True", "lambda: 1"),
        *("__import__('os')", "T ^ 9", "T ^ -1", "T ^ S", "ceildiv(T)", "ceildiv(T, 0)"),
        *("floordiv(1, 2, 3)", "Min()", "Min(T)", "T // 0", "for", "nan", "(" * 300, "-" * 3000),
        *("9" * 200, "((9^8)^8)^8", "((T^8)^8)", "(T+S+1)^8^2", "+".join("T" * 1500)),
        *("(T+S+1)^8 * (T+S+2)^8", "+".join(["T"] * 1500), "Min(1, k=2)", "T if T else S"),
    ],
)
def test_malformed_dims_are_errors(text: str) -> None:
    with pytest.raises(DimError):
        parse_dim(text)


@pytest.mark.parametrize("name", ["", "2T", "a b", "a.b", "lambda", "true", "inf", "T\n"])
def test_names_that_are_no_dims(name: str) -> None:
    with pytest.raises(DimError):
        dim(name)


def test_unbound_and_fractional_sizes_are_errors() -> None:
    with pytest.raises(DimError, match="needs a size for S"):
        evaluate(T + S, {"T": 1})
    with pytest.raises(DimError, match="no integer"):
        evaluate(T / 2, {"T": 3})
    for value in (True, 1.5, "T"):
        with pytest.raises(DimError):
            canon(value)


def test_substitution() -> None:
    assert dims.substitute(2 * T + S, {"T": S, "S": T}) == 2 * S + T
    assert dims.substitute(7, {"T": S}) == 7

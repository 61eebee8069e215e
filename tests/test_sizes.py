"""A tracer's sizes as dims: exact where they are taken, refused where rounding could decide."""

from __future__ import annotations

import math

import pytest
import sympy
from torch.utils._sympy import functions as tracer

from moec.capture.sizes import dim_of_expression
from moec.errors import CaptureError
from moec.ir.dims import dim, evaluate

S = sympy.Symbol("s0", integer=True, positive=True)
TOKENS = {S: dim("T")}


def share(factor: float, experts: float) -> sympy.Expr:
    """What a tracer makes of ``factor * T / experts``."""
    return tracer.FloatTrueDiv(factor * tracer.ToFloat(S), sympy.Float(experts))


@pytest.mark.parametrize("factor", [1.0, 1.25, 1.5, 2.0, 0.375])
@pytest.mark.parametrize("experts", [3, 4, 7, 60])
def test_capacities_are_those_of_floating_point_code(factor: float, experts: int) -> None:
    down = dim_of_expression(tracer.TruncToInt(share(factor, experts)), TOKENS)
    up = dim_of_expression(sympy.Max(tracer.CeilToInt(share(factor, experts)), 4), TOKENS)
    for tokens in (*range(300), 10**6 - 1, 2**31 - 1):
        assert evaluate(down, {"T": tokens}) == int(factor * tokens / experts)
        assert evaluate(up, {"T": tokens}) == max(math.ceil(factor * tokens / experts), 4)


def test_a_factor_without_few_binary_digits_is_refused() -> None:
    with pytest.raises(CaptureError, match="rounding decides"):
        dim_of_expression(tracer.TruncToInt(share(1.1, 4)), TOKENS)


def test_a_rounded_quotient_that_goes_on_is_refused() -> None:
    quotient = tracer.FloatTrueDiv(tracer.ToFloat(S), sympy.Float(3.0))
    with pytest.raises(CaptureError, match="rounded quotient"):
        dim_of_expression(tracer.TruncToInt(sympy.Mul(quotient, 1.5, evaluate=False)), TOKENS)

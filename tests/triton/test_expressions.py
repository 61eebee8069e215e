"""Every pointwise op as Triton text, on numbers that matter, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moec.codegen.triton.expressions import EXPRESSIONS
from moec.ir import Builder, Type, Value, dim
from moec.ir.opdef import all_ops, opdef
from moec.ir.types import DTYPES
from moec.manager import PassManager

from .emitted import built, run

T = dim("T")
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.03, -0.5, 2.5, -3.25, 19.5, 21.0, -30.0, 1e-4, 6e4, -6e4]
SPECIAL = [float("nan"), float("inf"), float("-inf")]
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((f"t.{n}", 1, {}) for n in ("neg", "abs", "sign", "exp", "log", "log1p", "sqrt", "rsqrt")),
    *((f"t.{n}", 1, {}) for n in ("reciprocal", "erf", "sigmoid", "tanh", "relu", "silu", "floor")),
    ("t.log_sigmoid", 1, {}),
    *((f"t.{n}", 2, {}) for n in ("add", "sub", "mul", "div", "maximum", "minimum")),
    *((f"t.{n}", 1, {"other": 0.1}) for n in ("add", "sub", "mul", "div", "maximum", "minimum")),
    *((f"t.{n}", 2, {}) for n in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((f"t.{n}", 1, {"other": 0.1}) for n in ("eq", "ne", "lt", "le", "gt", "ge")),
    ("t.gelu", 1, {}),
    ("t.gelu", 1, {"approximate": "tanh"}),
    ("t.softplus", 1, {}),
    ("t.softplus", 1, {"beta": 2.0, "threshold": 5.0}),
    ("t.clamp", 1, {"min": -0.7}),
    ("t.clamp", 1, {"max": 0.7}),
    ("t.clamp", 1, {"min": -0.7, "max": 0.7}),
    *(("t.pow", 1, {"exponent": e}) for e in (0.0, 1.0, 2.0, 3.0, 4.0, 7.0, -1.0, -2.0)),
    *(("t.pow", 1, {"exponent": e}) for e in (0.5, -0.5, 1.5, 17.0, 18.0)),
    ("t.cast", 1, {"dtype": "f16"}),
    ("t.where", 3, {}),
    ("t.logical_not", 1, {}),
    ("t.logical_and", 2, {}),
    ("t.logical_or", 2, {}),
]


def test_every_pointwise_op_has_an_expression() -> None:
    pointwise = {kind for kind, definition in all_ops().items() if definition.pointwise}
    assert set(EXPRESSIONS) == pointwise == {kind for kind, _, _ in CASES}


def operand_types(kind: str, count: int, dtype: str) -> list[str]:
    """The dtypes of a kind's operands."""
    if kind.startswith("t.logical"):
        return ["bool"] * count
    return ["bool", dtype, dtype] if kind == "t.where" else [dtype] * count


def numbers(dtype: str, shift: int) -> torch.Tensor:
    """The numbers, in another order for each operand."""
    values = torch.tensor(NUMBERS + SPECIAL, dtype=torch.float64).roll(shift)
    values = values.repeat(2).reshape(2, -1)
    return values > 0 if dtype == "bool" else values.to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{list(c[2].values())}")
def test_expression(case: tuple[str, int, dict[str, Any]], dtype: str, tmp_path: Path) -> None:
    kind, count, attrs = case
    b = Builder()
    types = operand_types(kind, count, dtype)
    inputs = [Value(Type(t, (T, 17)), "x") for t in types]
    result = b(kind, *inputs, **attrs)
    result = b("t.cast", result, dtype=dtype if dtype == "f64" else "f32")
    graph = b.graph("expression", inputs, [result])
    fused = PassManager("fuse-pointwise{min-ops=1}, lower{block=16}").run(graph)
    assert [op.kind for op in fused.ops] == ["kern.pointwise"]
    data = [numbers(t, 3 * i) for i, t in enumerate(types)]
    exact = [d.double() if d.is_floating_point() else d for d in data]
    wanted = opdef(kind).eval(*exact, **attrs).double()
    (actual,) = run(built(fused, tmp_path), data)
    rtol, atol = (1e-11, 1e-14) if dtype == "f64" else (3e-5, 2e-7)
    if kind == "t.cast":  # a kernel rounds only what it stores
        rtol, atol = 1e-3, 1e-5
    wanted = wanted.to(actual.dtype).double()
    torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol, equal_nan=True)


def test_whole_numbers(tmp_path: Path) -> None:
    b, x = Builder(), Value(Type("i32", (T, 4)), "x")
    y = b("t.maximum", b("t.add", b("t.mul", x, other=3), other=-1), x)
    graph = b.graph("whole", [x], [b("t.cast", y, dtype="i64"), b("t.clamp", x, max=2)])
    fused = PassManager("fuse-pointwise{min-ops=1}").run(graph)
    data = torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4)
    first, second = run(built(fused, tmp_path), [data])
    assert torch.equal(first, torch.maximum(3 * data - 1, data).long())
    assert torch.equal(second, data.clamp(max=2))

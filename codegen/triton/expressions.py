"""How each pointwise op reads in Triton, computed in float32 (in float64 if the kernel holds f64).

NaN passes through everything that it passes through in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy

from moec.ir.graph import Op

# (op, the operands' text, "tl.float32" or "tl.float64") -> text
Expression = Callable[[Op, list[str], str], str]

DTYPES = {
    "f64": "tl.float64",
    "f32": "tl.float32",
    "bf16": "tl.bfloat16",
    "f16": "tl.float16",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "bool": "tl.int1",
}


def number(value: float, dtype: str) -> str:
    """A number as Triton source, exact in ``dtype``."""
    if isinstance(value, bool) or isinstance(value, int):
        return repr(int(value))
    if math.isnan(value) or math.isinf(value):
        return f'float("{value}")'
    if dtype == "tl.float64" and float(numpy.float32(value)) != value:
        return f"tl.full((), {value!r}, tl.float64)"  # a bare number would be rounded to float32
    return repr(value)


def _second(op: Op, a: list[str], dtype: str) -> str:
    if len(a) > 1:
        return a[1]
    other = op.attrs["other"]
    return number(float(other) if op.operands[0].type.is_float else other, dtype)


def _infix(sign: str) -> Expression:
    return lambda op, a, dtype: f"{a[0]} {sign} {_second(op, a, dtype)}"


def _format(text: str) -> Expression:
    """Text with ``{0}``, ``{1}``.. for the operands."""
    return lambda op, a, dtype: text.format(*a)


def _extreme(sign: str) -> Expression:
    """The first where it wins or is NaN; a NaN in the second loses no comparison either."""

    def expression(op: Op, a: list[str], dtype: str) -> str:
        x, y = a[0], _second(op, a, dtype)
        return f"tl.where(({x} {sign} {y}) | ({x} != {x}), {x}, {y})"

    return expression


def _clamp(op: Op, a: list[str], dtype: str) -> str:
    low, high = op.attrs.get("min"), op.attrs.get("max")
    if low is not None and high is not None:
        low = min(low, high)  # the upper bound wins
    text = a[0]
    for value, sign in ((high, ">"), (low, "<")):
        if value is not None:
            bound = number(value, dtype)
            text = f"tl.where({a[0]} {sign} {bound}, {bound}, {text})"
    return text


def _gelu(op: Op, a: list[str], dtype: str) -> str:
    x = a[0]
    if op.attrs.get("approximate", "none") == "tanh":
        root, cubic = number(math.sqrt(2 / math.pi), dtype), number(0.044715, dtype)
        return f"0.5 * {x} * (1.0 + tanh({root} * ({x} + {cubic} * {x} * {x} * {x})))"
    return f"0.5 * {x} * (1.0 + tl.erf({x} * {number(math.sqrt(0.5), dtype)}))"


def _softplus(op: Op, a: list[str], dtype: str) -> str:
    beta, threshold = op.attrs.get("beta", 1.0), op.attrs.get("threshold", 20.0)
    scaled = a[0] if beta == 1 else f"{a[0]} * {number(beta, dtype)}"
    soft = f"log1p(tl.exp({scaled}))" + ("" if beta == 1 else f" / {number(beta, dtype)}")
    return f"tl.where({scaled} > {number(threshold, dtype)}, {a[0]}, {soft})"


def _pow(op: Op, a: list[str], dtype: str) -> str:
    x, exponent = a[0], float(op.attrs["exponent"])
    if exponent == 0:
        return f"tl.where({x} == {x}, 1.0, 1.0)"
    if exponent in (0.5, -0.5):
        return f"tl.sqrt({x})" if exponent > 0 else f"tl.rsqrt({x})"
    if not exponent.is_integer():
        power = f"tl.exp({number(exponent, dtype)} * tl.log({x}))"  # NaN below 0, as in PyTorch,
        limit = number(float("inf") if exponent > 0 else 0.0, dtype)  # save at -inf
        return f'tl.where({x} == float("-inf"), {limit}, {power})'
    whole = abs(int(exponent))
    text = f"({_product(x, whole)})" if whole <= 16 else _large_power(x, whole)
    return text if exponent > 0 else f"1.0 / {text}"


def _product(x: str, count: int) -> str:
    """``x`` times itself, with few products."""
    if count <= 3:
        return " * ".join([x] * count)
    half = f"({_product(x, count // 2)})"
    return f"{half} * {half}" + (f" * {x}" if count % 2 else "")


def _large_power(x: str, exponent: int) -> str:
    size = f"tl.exp({float(exponent)} * tl.log(tl.abs({x})))"
    return size if exponent % 2 == 0 else f"tl.where({x} < 0, -{size}, {size})"


def _cast(op: Op, a: list[str], dtype: str) -> str:
    source, target = op.operands[0].type, op.result.type
    if target.is_float:
        return a[0] if source.is_float else f"{a[0]}.to({dtype})"
    if target.dtype == "bool":
        return f"{a[0]} != 0"
    return f"{a[0]}.to({DTYPES[target.dtype]})"


EXPRESSIONS: dict[str, Expression] = {
    "t.add": _infix("+"),
    "t.sub": _infix("-"),
    "t.mul": _infix("*"),
    "t.div": _infix("/"),
    "t.eq": _infix("=="),
    "t.ne": _infix("!="),
    "t.lt": _infix("<"),
    "t.le": _infix("<="),
    "t.gt": _infix(">"),
    "t.ge": _infix(">="),
    "t.maximum": _extreme(">"),
    "t.minimum": _extreme("<"),
    "t.neg": _format("-{0}"),
    "t.abs": _format("tl.abs({0})"),
    "t.sign": _format("tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))"),
    "t.exp": _format("tl.exp({0})"),
    "t.log": _format("tl.log({0})"),
    "t.log1p": _format("log1p({0})"),
    "t.sqrt": _format("tl.sqrt({0})"),
    "t.rsqrt": _format("tl.rsqrt({0})"),
    "t.reciprocal": _format("1.0 / {0}"),
    "t.erf": _format("tl.erf({0})"),
    "t.sigmoid": _format("tl.sigmoid({0})"),
    "t.log_sigmoid": _format(
        "tl.where({0} < 0, {0}, 0.0) - log1p(tl.exp(-tl.abs({0})))",
    ),
    "t.tanh": _format("tanh({0})"),
    "t.relu": _format("tl.where({0} < 0, 0.0, {0})"),
    "t.silu": _format("{0} * tl.sigmoid({0})"),
    "t.floor": _format("tl.floor({0})"),
    "t.gelu": _gelu,
    "t.softplus": _softplus,
    "t.clamp": _clamp,
    "t.pow": _pow,
    "t.cast": _cast,
    "t.where": _format("tl.where({0}, {1}, {2})"),
    "t.logical_not": _format("{0} == 0"),
    "t.logical_and": _format("{0} & {1}"),
    "t.logical_or": _format("{0} | {1}"),
}

# library functions that an expression may call
CALLED = ("tanh", "log1p")

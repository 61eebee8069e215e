"""Pointwise ops of the ``t.`` dialect, declared from two tables.

Each row is the op's name, its meaning in PyTorch and its gradient. Code generation has the matching
table of Triton expressions in ``codegen/expressions.py``; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.graph import Op, Value
from moec.ir.opdef import defop
from moec.ir.types import DTYPES, Type
from moec.ops.shapes import broadcast, reduce_to, require, same_dtype

Gradient = Callable[[Any, Op, Value], Value | None]
COMPARISONS = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}


def _x(op: Op) -> Value:
    return op.operands[0]


def _scale(b: Any, value: Value, by: float) -> Value:
    return b("t.mul", value, other=float(by))


def _one_minus(b: Any, value: Value) -> Value:
    return b("t.add", b("t.neg", value), other=1.0)


def _sigmoid_gradient(b: Any, op: Op, g: Value) -> Value:
    return b("t.mul", g, b("t.mul", op.result, _one_minus(b, op.result)))


def _tanh_gradient(b: Any, op: Op, g: Value) -> Value:
    return b("t.mul", g, _one_minus(b, b("t.mul", op.result, op.result)))


def _relu_gradient(b: Any, op: Op, g: Value) -> Value:
    return b("t.where", b("t.gt", _x(op), other=0.0), g, b.full(Type(g.type.dtype, ()), 0.0))


def _silu_gradient(b: Any, op: Op, g: Value) -> Value:
    s = b("t.sigmoid", _x(op))
    slope = b("t.add", b("t.mul", _x(op), _one_minus(b, s)), other=1.0)
    return b("t.mul", g, b("t.mul", s, slope))


def _erf_gradient(b: Any, op: Op, g: Value) -> Value:
    bell = b("t.exp", b("t.neg", b("t.mul", _x(op), _x(op))))
    return b("t.mul", g, _scale(b, bell, 2 / math.sqrt(math.pi)))


def _gelu_gradient(b: Any, op: Op, g: Value) -> Value:
    if op.attrs.get("approximate", "none") == "tanh":
        return b("t.mul", g, _gelu_tanh_slope(b, _x(op)))
    x = _x(op)
    below = _scale(b, b("t.add", b("t.erf", _scale(b, x, math.sqrt(0.5))), other=1.0), 0.5)
    bell = _scale(b, b("t.exp", _scale(b, b("t.mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return b("t.mul", g, b("t.add", below, b("t.mul", x, bell)))


def _gelu_tanh_slope(b: Any, x: Value) -> Value:
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    square = b("t.mul", x, x)
    inner = b("t.mul", x, b("t.add", _scale(b, square, root * cubic), other=root))
    t = b("t.tanh", inner)
    inner_slope = b("t.add", _scale(b, square, 3 * root * cubic), other=root)
    curved = b("t.mul", b("t.mul", x, _one_minus(b, b("t.mul", t, t))), inner_slope)
    return _scale(b, b("t.add", b("t.add", t, curved), other=1.0), 0.5)


def _rsqrt_gradient(b: Any, op: Op, g: Value) -> Value:
    cube = b("t.mul", op.result, b("t.mul", op.result, op.result))
    return b("t.mul", g, _scale(b, cube, -0.5))


def _softplus_gradient(b: Any, op: Op, g: Value) -> Value:
    beta, threshold = op.attrs.get("beta", 1.0), op.attrs.get("threshold", 20.0)
    scaled = _scale(b, _x(op), beta)
    slope = b("t.sigmoid", scaled)
    return b("t.where", b("t.gt", scaled, other=float(threshold)), g, b("t.mul", g, slope))


def _clamp_gradient(b: Any, op: Op, g: Value) -> Value:
    low, high = op.attrs.get("min"), op.attrs.get("max")
    zero = b.full(Type(g.type.dtype, ()), 0.0)
    for bound, test in ((low, "t.ge"), (high, "t.le")):
        if bound is not None:
            g = b("t.where", b(test, _x(op), other=float(bound)), g, zero)
    return g


def _pow_gradient(b: Any, op: Op, g: Value) -> Value:
    exponent = op.attrs["exponent"]
    if exponent == 0:  # x ** -1 would be infinite at 0
        return b.full(g.type, 0.0)
    inner = _x(op) if exponent == 2 else b("t.pow", _x(op), exponent=exponent - 1)
    return b("t.mul", g, _scale(b, inner, exponent))


# name: (meaning, gradient or None where the derivative is zero, documentation)
UNARY: dict[str, tuple[Callable[..., torch.Tensor], Gradient | None, str]] = {
    "neg": (torch.neg, lambda b, op, g: b("t.neg", g), "``-x``"),
    "abs": (torch.abs, lambda b, op, g: b("t.mul", g, b("t.sign", _x(op))), "``|x|``"),
    "sign": (torch.sign, None, "-1, 0 or 1"),
    "exp": (torch.exp, lambda b, op, g: b("t.mul", g, op.result), "``e ** x``"),
    "log": (torch.log, lambda b, op, g: b("t.div", g, _x(op)), "the natural logarithm"),
    "log1p": (
        torch.log1p,
        lambda b, op, g: b("t.div", g, b("t.add", _x(op), other=1.0)),
        "``log(1 + x)``",
    ),
    "sqrt": (
        torch.sqrt,
        lambda b, op, g: b("t.div", _scale(b, g, 0.5), op.result),
        "the square root",
    ),
    "rsqrt": (torch.rsqrt, _rsqrt_gradient, "``1 / sqrt(x)``"),
    "reciprocal": (
        torch.reciprocal,
        lambda b, op, g: b("t.neg", b("t.mul", g, b("t.mul", op.result, op.result))),
        "``1 / x``",
    ),
    "erf": (torch.erf, _erf_gradient, "the error function"),
    "sigmoid": (torch.sigmoid, _sigmoid_gradient, "``1 / (1 + exp(-x))``"),
    "log_sigmoid": (
        F.logsigmoid,
        lambda b, op, g: b("t.mul", g, b("t.sigmoid", b("t.neg", _x(op)))),
        "``log(sigmoid(x))``",
    ),
    "tanh": (torch.tanh, _tanh_gradient, "the hyperbolic tangent"),
    "relu": (torch.relu, _relu_gradient, "``max(x, 0)``"),
    "silu": (F.silu, _silu_gradient, "``x * sigmoid(x)``"),
    "floor": (torch.floor, None, "the largest integer that is not above ``x``"),
}


def _unary(
    name: str, meaning: Callable[..., torch.Tensor], gradient: Gradient | None, doc: str
) -> None:
    def infer(x: Type) -> Type:
        require(x.is_float, f"needs a float, got {x}")
        return x

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None]:
        return (gradient(b, op, g) if gradient is not None else None,)

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        return meaning(x)

    members = {
        "__doc__": f"{doc[0].upper()}{doc[1:]}, elementwise.",
        "infer": infer,
        "eval": evaluate,
        "vjp": vjp,
    }
    defop(f"t.{name}", pointwise=True)(type(name, (), members))


for _name, (_meaning, _gradient, _doc) in UNARY.items():
    _unary(_name, _meaning, _gradient, _doc)


def _operands(op: Op) -> tuple[Value, Value | None]:
    return op.operands[0], op.operands[1] if len(op.operands) > 1 else None


def _add_gradient(b: Any, op: Op, g: Value, sign: float = 1.0) -> list[Value | None]:
    return [g, g if sign > 0 else b("t.neg", g)]


def _mul_gradient(b: Any, op: Op, g: Value) -> list[Value | None]:
    x, y = _operands(op)
    if y is None:
        return [_scale(b, g, op.attrs["other"])]
    return [b("t.mul", g, y), b("t.mul", g, x)]


def _div_gradient(b: Any, op: Op, g: Value) -> list[Value | None]:
    _, y = _operands(op)
    if y is None:
        return [b("t.div", g, other=op.attrs["other"])]
    return [b("t.div", g, y), b("t.neg", b("t.div", b("t.mul", g, op.result), y))]


def _extreme_gradient(wins: str) -> Callable[..., list[Value | None]]:
    def gradient(b: Any, op: Op, g: Value) -> list[Value | None]:
        x, y = _operands(op)
        zero = b.full(Type(g.type.dtype, ()), 0.0)
        other: dict[str, Any] = {"other": op.attrs["other"]} if y is None else {}
        rest = () if y is None else (y,)
        tie = b("t.where", b("t.eq", x, *rest, **other), _scale(b, g, 0.5), zero)
        first = b("t.where", b(wins, x, *rest, **other), g, tie)
        return [first] if y is None else [first, b("t.where", b(wins, y, x), g, tie)]

    return gradient


# name: (meaning, gradient of both operands, documentation); each also takes a number as second
# operand
BINARY: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., list[Value | None]], str]] = {
    "add": (torch.add, _add_gradient, "sum"),
    "sub": (torch.sub, lambda b, op, g: _add_gradient(b, op, g, -1.0), "difference"),
    "mul": (torch.mul, _mul_gradient, "product"),
    "div": (torch.div, _div_gradient, "quotient"),
    "maximum": (
        torch.maximum,
        _extreme_gradient("t.gt"),
        "larger of two (at a tie both get half of the gradient)",
    ),
    "minimum": (
        torch.minimum,
        _extreme_gradient("t.lt"),
        "smaller of two (at a tie both get half of the gradient)",
    ),
}


def _binary_type(x: Type, y: Type | None, other: float | None) -> Type:
    require((y is None) != (other is None), "takes two operands, or one and the number 'other'")
    return x if y is None else Type(same_dtype(x, y), broadcast(x.shape, y.shape))


def _binary(
    name: str,
    meaning: Callable[..., torch.Tensor],
    gradient: Callable[..., list[Value | None]],
    doc: str,
) -> None:
    def infer(x: Type, y: Type | None = None, *, other: float | None = None) -> Type:
        fits = x.is_float or (name != "div" and x.dtype != "bool" and type(other) is not float)
        require(fits, f"needs floats, or integers throughout (not t.div), got {x} and {y or other}")
        return _binary_type(x, y, other)

    def evaluate(
        x: torch.Tensor, y: torch.Tensor | None = None, *, other: float | None = None
    ) -> torch.Tensor:
        if y is None and name in ("maximum", "minimum"):
            y = torch.full((), 0 if other is None else other, dtype=x.dtype, device=x.device)
        return meaning(x, other if y is None else y)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        grads = gradient(b, op, g)
        return tuple(
            None if d is None else reduce_to(b, d, v.type)
            for d, v in zip(grads, op.operands, strict=False)
        )

    members = {
        "__doc__": f"The {doc}, elementwise with broadcasting.",
        "infer": infer,
        "eval": evaluate,
        "vjp": vjp,
    }
    defop(f"t.{name}", pointwise=True)(type(name, (), members))


for _bname, (_bmeaning, _bgradient, _bdoc) in BINARY.items():
    _binary(_bname, _bmeaning, _bgradient, _bdoc)


def _comparison(name: str, meaning: Callable[..., torch.Tensor]) -> None:
    def infer(x: Type, y: Type | None = None, *, other: float | None = None) -> Type:
        return _binary_type(x, y, other).with_dtype("bool")

    def evaluate(
        x: torch.Tensor, y: torch.Tensor | None = None, *, other: float | None = None
    ) -> torch.Tensor:
        return meaning(x, other if y is None else y)

    members = {
        "__doc__": f"Whether ``x {name} y``, elementwise with broadcasting.",
        "infer": infer,
        "eval": evaluate,
    }
    defop(f"t.{name}", pointwise=True)(type(name, (), members))


for _cname, _cmeaning in COMPARISONS.items():
    _comparison(_cname, _cmeaning)


@defop("t.logical_not", pointwise=True)
class LogicalNot:
    """Negation of truth values, elementwise."""

    def infer(x: Type) -> Type:
        require(x.dtype == "bool", f"needs bool, got {x}")
        return x

    eval = torch.logical_not


def _logical(name: str, meaning: Callable[..., torch.Tensor]) -> None:
    def infer(x: Type, y: Type) -> Type:
        require(x.dtype == y.dtype == "bool", f"needs bool, got {x} and {y}")
        return Type("bool", broadcast(x.shape, y.shape))

    members = {
        "__doc__": f"Logical {name[8:]}, elementwise with broadcasting.",
        "infer": infer,
        "eval": lambda x, y: meaning(x, y),
    }
    defop(f"t.{name}", pointwise=True)(type(name, (), members))


_logical("logical_and", torch.logical_and)
_logical("logical_or", torch.logical_or)


@defop("t.gelu", pointwise=True)
class Gelu:
    """GELU, elementwise; ``approximate`` is "none" (by the error function) or "tanh"."""

    def infer(x: Type, *, approximate: str = "none") -> Type:
        require(
            x.is_float and approximate in ("none", "tanh"),
            f"needs a float and approximate none or tanh, got {x}, {approximate!r}",
        )
        return x

    def eval(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
        return F.gelu(x, approximate=approximate)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (_gelu_gradient(b, op, g),)


@defop("t.softplus", pointwise=True)
class Softplus:
    """``log(1 + exp(beta * x)) / beta``, and ``x`` itself where ``beta * x`` is above
    ``threshold``.
    """

    def infer(x: Type, *, beta: float = 1.0, threshold: float = 20.0) -> Type:
        require(x.is_float, f"needs a float, got {x}")
        return x

    def eval(x: torch.Tensor, *, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
        return F.softplus(x, beta, threshold)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (_softplus_gradient(b, op, g),)


@defop("t.clamp", pointwise=True)
class Clamp:
    """``x`` limited to ``[min, max]``, elementwise; a bound that is absent does not limit."""

    def infer(x: Type, *, min: float | None = None, max: float | None = None) -> Type:
        require(min is not None or max is not None, "needs min or max")
        whole = all(isinstance(v, int) for v in (min, max) if v is not None)
        require(x.is_float or whole, f"{x} limited by a number that is no integer")
        return x

    def eval(
        x: torch.Tensor, *, min: float | None = None, max: float | None = None
    ) -> torch.Tensor:
        return torch.clamp(x, min, max)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (_clamp_gradient(b, op, g),)


@defop("t.pow", pointwise=True)
class Pow:
    """``x ** exponent`` for a constant exponent, elementwise."""

    def infer(x: Type, *, exponent: float) -> Type:
        require(x.is_float, f"needs a float, got {x}")
        return x

    def eval(x: torch.Tensor, *, exponent: float) -> torch.Tensor:
        return torch.pow(x, exponent)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value]:
        return (_pow_gradient(b, op, g),)


@defop("t.cast", pointwise=True)
class Cast:
    """The same numbers in another dtype."""

    def infer(x: Type, *, dtype: str) -> Type:
        return x.with_dtype(dtype)

    def eval(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
        return x.to(DTYPES[dtype])

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None]:
        source = op.operands[0].type
        return (b("t.cast", g, dtype=source.dtype) if source.is_float else None,)


@defop("t.where", pointwise=True)
class Where:
    """``x`` where the condition holds, else ``y``; elementwise with broadcasting."""

    def infer(condition: Type, x: Type, y: Type) -> Type:
        require(condition.dtype == "bool", f"the condition must be bool, got {condition}")
        return Type(same_dtype(x, y), broadcast(condition.shape, x.shape, y.shape))

    def eval(condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(condition, x, y)

    def vjp(b: Any, op: Op, g: Value) -> tuple[Value | None, ...]:
        condition, x, y = op.operands
        zero = b.full(Type(g.type.dtype, ()), 0.0)
        return (
            None,
            reduce_to(b, b("t.where", condition, g, zero), x.type),
            reduce_to(b, b("t.where", condition, zero, g), y.type),
        )

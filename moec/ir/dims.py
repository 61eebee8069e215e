"""The algebra of symbolic sizes; with ``prove.py``, what is known of them, the only calls of sympy.

A dim is an ``int`` or a sympy expression over symbols made by :func:`dim`. Sizes are nonnegative
integers, so rewriting may use that; nothing else is assumed unless a range says so.
"""

from __future__ import annotations

import ast
import functools
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy

from moec.errors import DimError

Dim: TypeAlias = int | sympy.Expr
Range: TypeAlias = tuple[int, int | None]
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
# words that mean something else where IR text or emitted Python has a dim
_RESERVED = {"true", "false", "inf", "nan"}
# what a dim in a file may cost to read: an expanded product or power must stay small
MAX_TEXT, MAX_NESTING, MAX_TERMS, MAX_POWER, MAX_BITS, MAX_ARGUMENTS = 2000, 64, 64, 8, 64, 4
# what any dim may be expanded to
_MAX_EXPANDED = 1024


class _Quotient(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """What the two roundings share; a divisor that is not positive is an error."""

    nargs = 2

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative else None


def _check_divisor(b: Any) -> None:
    if b.is_Integer and b <= 0:
        raise DimError(f"division by {b}")


class ceildiv(_Quotient):
    """``ceil(a / b)`` for a positive ``b``."""

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        _check_divisor(b)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(-(-int(a) // int(b)))
        return a if b == 1 or a == 0 else None


class floordiv(_Quotient):
    """``floor(a / b)`` for a positive ``b``."""

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        _check_divisor(b)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        if b == 1 or a == 0:
            return a
        if b.is_Add:
            return None
        quotient = sympy.expand(a / b)
        return quotient if quotient.is_polynomial() and quotient.is_integer else None


def dim(name: str) -> sympy.Symbol:
    """The symbol for a size: an integer that is never negative. The only maker of symbols."""
    if not _NAME.match(name) or keyword.iskeyword(name) or name in _RESERVED:
        raise DimError(
            f"{name!r} is no name for a dim: use letters, digits and underscores, no keyword"
        )
    return sympy.Symbol(name, integer=True, nonnegative=True)


def canon(value: Any) -> Dim:
    """The canonical form: ``int`` where constant, otherwise expanded; equal dims print equally."""
    if isinstance(value, bool):
        raise DimError("a truth value is not a dim")
    if isinstance(value, int):
        return value
    if not isinstance(value, sympy.Expr):
        raise DimError(f"{value!r} is not a dim")
    if _terms(value) > _MAX_EXPANDED:
        raise DimError(f"a dim of more than {_MAX_EXPANDED} terms")
    value = sympy.expand(value)
    return int(value) if value.is_Integer else value


def _terms(value: Any) -> int:
    """At most how many terms the expanded form has."""
    if value.is_Add:
        return sum(map(_terms, value.args))
    if value.is_Mul:
        return math.prod(map(_terms, value.args))
    if value.is_Pow and value.exp.is_Integer:
        return int(_terms(value.base) ** min(abs(int(value.exp)), _MAX_EXPANDED))
    return 1


def product(dims: Sequence[Dim]) -> Dim:
    """The number of elements of a shape."""
    return canon(functools.reduce(lambda a, b: a * b, dims, sympy.Integer(1)))


def symbols(value: Any) -> frozenset[str]:
    """The names of the symbols of a dim."""
    return _symbols(value) if isinstance(value, sympy.Expr) else frozenset()


def show_dim(value: Dim) -> str:
    """Text of a dim; :func:`parse_dim` reads it back."""
    return str(value) if isinstance(value, int) else _shown(value)


# A graph has thousands of types but few different dims, and sympy prints and substitutes slowly.
@functools.lru_cache(maxsize=4096)
def _symbols(value: sympy.Expr) -> frozenset[str]:
    return frozenset(s.name for s in value.free_symbols)


@functools.lru_cache(maxsize=4096)
def _shown(value: sympy.Expr) -> str:
    return str(value).replace("**", "^")


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Pow: lambda a, b: a**b,
    ast.FloorDiv: lambda a, b: floordiv(a, b),
}
_FUNCTIONS: dict[str, Any] = {
    "ceildiv": ceildiv,
    "floordiv": floordiv,
    "Min": sympy.Min,
    "Max": sympy.Max,
}


@functools.lru_cache(maxsize=1024)
def parse_dim(text: str) -> Dim:
    """Read a dim: sums, products, small powers and the named functions, of bounded size."""
    if len(text) > MAX_TEXT:
        raise DimError(f"a dim of more than {MAX_TEXT} characters")
    try:
        tree = ast.parse(text.replace("^", "**").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DimError(f"cannot read the dim {text!r}") from error
    return canon(_build(tree, text))


def _build(node: ast.expr, text: str, depth: int = 0) -> Any:
    if depth > MAX_NESTING:
        raise DimError(f"a dim is nested more than {MAX_NESTING} deep")
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return _limited(sympy.Integer(value))
        case ast.Name(id=name):
            return dim(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, text, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            operands = _build(left, text, depth + 1), _build(right, text, depth + 1)
            _check_expansion(op, *operands)
            return _limited(sympy.expand(_BINARY[type(op)](*operands)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            most = MAX_ARGUMENTS if name in ("Min", "Max") else 2
            if not 2 <= len(args) <= most:
                raise DimError(f"{name} does not take {len(args)} arguments")
            return _limited(_FUNCTIONS[name](*(_build(a, text, depth + 1) for a in args)))
    raise DimError(f"{type(node).__name__} is not allowed in the dim {text!r}")


def _check_expansion(op: ast.operator, a: Any, b: Any) -> None:
    """Refuse a product or power before it is expanded into very many terms."""
    first, second = len(sympy.Add.make_args(a)), len(sympy.Add.make_args(b))
    if isinstance(op, ast.Pow):
        if not (b.is_Integer and 0 <= int(b) <= MAX_POWER):
            raise DimError(f"a power in a dim is not an integer from 0 to {MAX_POWER}")
        first, second = first ** int(b), 1
    if isinstance(op, ast.Mult | ast.Pow) and first * second > MAX_TERMS:
        raise DimError(f"a dim of more than {MAX_TERMS} terms")


def _limited(value: Any) -> Any:
    for term in sympy.Add.make_args(value):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer or int(coefficient).bit_length() > MAX_BITS:
            raise DimError("a number in a dim is too large")
        for factor in sympy.Mul.make_args(rest):
            if factor.is_Pow and factor.exp > MAX_POWER:
                raise DimError(f"a power in a dim is above {MAX_POWER}")
            if factor.is_Function and len(factor.args) > MAX_ARGUMENTS:
                raise DimError(f"{factor.func.__name__} of more than {MAX_ARGUMENTS} dims")
    return value


def evaluate(value: Any, binding: Mapping[str, int]) -> int:
    """The number that a dim stands for under ``binding`` (name to size)."""
    if isinstance(value, int):
        return value
    missing = sorted(symbols(value) - binding.keys())
    if missing:
        raise DimError(f"dim {show_dim(value)} needs a size for {', '.join(missing)}")
    return _evaluated(value, tuple((n, int(binding[n])) for n in sorted(symbols(value))))


@functools.lru_cache(maxsize=4096)
def _evaluated(value: sympy.Expr, sizes: tuple[tuple[str, int], ...]) -> int:
    result = value.subs({dim(n): size for n, size in sizes})
    if not result.is_Integer:
        raise DimError(f"dim {show_dim(value)} is {result}, no integer, for {dict(sizes)}")
    return int(result)


def apply(value: Any, binding: Mapping[str, Any]) -> Any:
    """A dim computed on sizes that may themselves be symbolic (``torch.SymInt``), by plain
    arithmetic.
    """
    if isinstance(value, int):
        return value
    if value.is_Integer:
        return int(value)
    if value.is_Symbol:
        return binding[value.name]
    parts = [apply(a, binding) for a in value.args]
    if value.is_Add:
        return sum(parts[1:], parts[0])
    if value.is_Mul:
        return functools.reduce(lambda a, b: a * b, parts)
    if value.is_Pow:
        return functools.reduce(lambda a, b: a * b, [parts[0]] * int(value.args[1]))
    if value.func is ceildiv:
        return -(-parts[0] // parts[1])
    if value.func is floordiv:
        return parts[0] // parts[1]
    if value.func in (sympy.Min, sympy.Max):
        import torch

        pick = torch.sym_min if value.func is sympy.Min else torch.sym_max
        return functools.reduce(pick, parts)
    raise DimError(f"no arithmetic for the dim {value}")


def substitute(value: Dim, mapping: Mapping[str, Dim]) -> Dim:
    """``value`` with symbols replaced by dims."""
    if isinstance(value, int) or not (symbols(value) & mapping.keys()):
        return value
    return canon(value.subs({dim(n): m for n, m in mapping.items()}, simultaneous=True))


@functools.lru_cache(maxsize=4096)
def python_source(value: Dim) -> str:
    """A dim as a Python expression over its symbol names, for emitted host code."""
    if isinstance(value, int):
        return str(value)
    return _python(value)


def _python(e: Any) -> str:
    if e.is_Integer:
        return str(int(e)) if int(e) >= 0 else f"({int(e)})"
    if e.is_Symbol:
        return str(e.name)
    inner = [_python(a) for a in e.args]
    if e.is_Add:
        return "(" + " + ".join(inner) + ")"
    if e.is_Mul:
        return " * ".join(inner)
    if e.is_Pow:
        return "(" + " * ".join([inner[0]] * int(e.args[1])) + ")"
    if e.func is ceildiv:
        return f"-(-({inner[0]}) // ({inner[1]}))"
    if e.func is floordiv:
        return f"(({inner[0]}) // ({inner[1]}))"
    if e.func in (sympy.Min, sympy.Max):
        return f"{e.func.__name__.lower()}({', '.join(inner)})"
    raise DimError(f"no Python form for the dim {e}")

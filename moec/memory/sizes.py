"""Sizes that host lines write out, as dims."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.errors import CodegenError
from moec.ir.dims import Dim, canon, dim, parse_dim, show_dim
from moec.ir.types import DTYPES, Type

_DTYPES = {str(dtype): name for name, dtype in DTYPES.items()}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def dtype_called(text: str) -> str:
    """The IR's name of a dtype that is written as PyTorch's."""
    return _DTYPES[text]


def number(node: ast.expr, known: Mapping[str, Dim]) -> Dim:
    """The dim that a Python expression of emitted code computes."""
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return known.get(name, dim(name))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _negated(operand, known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return canon(_ARITHMETIC[type(op)](number(left, known), number(right, known)))
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return divided("floordiv", number(left, known), number(right, known))
        case ast.Call(func=ast.Attribute(attr="cdiv"), args=[a, b]):
            return divided("ceildiv", number(a, known), number(b, known))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args):
            inner = ", ".join(show_dim(number(a, known)) for a in args)
            return parse_dim(f"{name.capitalize()}({inner})")
    raise CodegenError(f"no rule for the size {ast.unparse(node)}")


def _negated(operand: ast.expr, known: Mapping[str, Dim]) -> Dim:
    """``-(-a // b)`` is a division that rounds up."""
    match operand:
        case ast.BinOp(
            left=ast.UnaryOp(op=ast.USub(), operand=left), op=ast.FloorDiv(), right=right
        ):
            return divided("ceildiv", number(left, known), number(right, known))
    return canon(-1 * number(operand, known))


def divided(rounding: str, a: Dim, b: Dim) -> Dim:
    """``ceildiv`` or ``floordiv`` of two dims."""
    return parse_dim(f"{rounding}({show_dim(a)}, {show_dim(b)})")


def least(a: Dim, b: Dim) -> Dim:
    """The smaller of two dims."""
    return parse_dim(f"Min({show_dim(a)}, {show_dim(b)})")


# what functions of the runtime make: numbers before the tiles, and of each tile
_LISTS = {"empty_row_tiles": (2, 2), "empty_row_places": (1, 3)}


def made_by(function: str, numbers: Sequence[Dim]) -> Type:
    """The tensor that a function of :mod:`moec.runtime.launch` makes."""
    if function not in _LISTS:
        raise CodegenError(f"no rule for what launch.{function} allocates")
    (rows, experts, block), (head, each) = numbers, _LISTS[function]
    bound = divided("floordiv", canon(rows + least(experts, rows) * (block - 1)), block)
    return Type("i32", (canon(head + each * bound),))


__all__ = ["divided", "dtype_called", "least", "made_by", "number"]

"""Work along one token's scores or choices inside a kernel: sums, columns, running sums.

A value varies along tokens ``t`` and experts ``e`` or choices ``k``, or along tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moec.codegen.triton.kernel import KernelText, Term, Unsupported
from moec.ir.graph import Op, Value

SCORES, CHOSEN, TOKENS = ("t", "e"), ("t", "k"), ("t",)


class TokenKernel(Protocol):
    """A kernel whose programs hold the values of a block of tokens."""

    text: KernelText
    env: dict[Value, Term]

    def term(self, value: Value) -> Term:
        """A value: known, or loaded now."""

    def extent(self, axes: tuple[str, ...]) -> tuple[str, int, int]:
        """The index along a value's second axis, its size, and how many lanes it has."""


def along_last(op: Op) -> bool:
    """Whether an op works along the last axis of a value of rank 2."""
    rank = op.operands[0].type.rank
    dims = op.attrs.get("dims", (op.attrs.get("dim", -1),))
    return rank == 2 and tuple(d % rank for d in dims) == (1,)


def inside(kernel: TokenKernel, term: Term) -> str:
    """The condition that a lane along the second axis is a real one; empty if all are."""
    index, size, lanes = kernel.extent(term.axes)
    return f"({index} < {size})[None, :]" if size != lanes else ""


def filled(kernel: TokenKernel, term: Term, value: str) -> str:
    """The text of a value whose lanes beyond its size hold ``value``."""
    condition = inside(kernel, term)
    return f"tl.where({condition}, {term.text}, {value})" if condition else term.text


def softmax(kernel: TokenKernel, x: Term, hint: str) -> Term:
    """Softmax along the second axis."""
    t = kernel.text
    if inside(kernel, x):
        x = t.let("shifted", filled(kernel, x, 'float("-inf")'), x.axes)
    power = t.let("power", f"tl.exp({x.text} - tl.max({x.text}, 1)[:, None])", x.axes).text
    return t.let(hint, f"{power} / tl.sum({power}, 1)[:, None]", x.axes)


def column(kernel: TokenKernel, x: Term, place: int, hint: str) -> Term:
    """One column of a value, as a number a token."""
    index, _, _ = kernel.extent(x.axes)
    kept = f"tl.where(({index} == {place})[None, :], {x.text}, 0)"
    return kernel.text.let(hint, f"tl.sum({kept}, 1)", TOKENS)


def _wide(kernel: TokenKernel, op: Op) -> Term:
    term = kernel.term(op.operands[0])
    if term.axes not in (SCORES, CHOSEN) or term.literal or not along_last(op):
        raise Unsupported(f"{op.kind} that is not along a token's numbers")
    return term


def _sum(kernel: TokenKernel, op: Op) -> list[Term]:
    x = _wide(kernel, op)
    source, kind = op.operands[0].type, "" if op.result.type.is_float else ".to(tl.int64)"
    if source.dtype == "bool":
        x = Term(f"({x.text}).to(tl.int32)", x.axes)
    total = f"tl.sum({filled(kernel, x, '0')}, 1){kind}"
    return [kernel.text.let(op.result.hint, total, TOKENS)]


def _amax(kernel: TokenKernel, op: Op) -> list[Term]:
    """The largest; NaN if there is one, as in PyTorch."""
    x = _wide(kernel, op)
    if not op.operands[0].type.is_float:
        raise Unsupported("the largest of whole numbers")
    low, zero = filled(kernel, x, 'float("-inf")'), filled(kernel, x, "0.0")
    odd = f"tl.max(({zero} != {zero}).to(tl.int32), 1)"
    text = f'tl.where({odd} > 0, float("nan"), tl.max({low}, 1))'
    return [kernel.text.let(op.result.hint, text, TOKENS)]


def _cumsum(kernel: TokenKernel, op: Op) -> list[Term]:
    x = _wide(kernel, op)
    if not op.operands[0].type.is_float:
        raise Unsupported("running sums of whole numbers")
    return [kernel.text.let(op.result.hint, f"tl.cumsum({x.text}, 1)", x.axes)]


def _softmax(kernel: TokenKernel, op: Op) -> list[Term]:
    return [softmax(kernel, _wide(kernel, op), op.result.hint)]


def _activate(kernel: TokenKernel, op: Op) -> list[Term]:
    """Scores of logits."""
    x, fn, hint = kernel.term(op.operands[0]), op.attrs["fn"], op.result.hint
    if x.axes != SCORES or op.attrs.get("groups", 1) != 1:
        raise Unsupported("a softmax of groups")
    if fn == "identity":
        return [x]
    if fn == "softmax":
        return [softmax(kernel, x, hint)]
    if fn == "sigmoid":
        return [kernel.text.let(hint, f"tl.sigmoid({x.text})", SCORES)]
    soft = f"{kernel.text.use('log1p')}(tl.exp({x.text}))"
    text = f"tl.sqrt(tl.where({x.text} > 20.0, {x.text}, {soft}))"
    return [kernel.text.let(hint, text, SCORES)]


def _columns(kernel: TokenKernel, op: Op) -> list[Term]:
    """Single columns: a slice of one, or all of them apart."""
    x = _wide(kernel, op) if op.kind == "t.slice" else kernel.term(op.operands[0])
    if any(v.type.shape[1:] != (1,) for v in op.results) or x.axes not in (SCORES, CHOSEN):
        raise Unsupported("a part of a token's numbers")
    if op.operands[0].type.dtype == "bool":
        raise Unsupported("a column of truth values")
    first = int(op.attrs.get("start", 0))
    return [column(kernel, x, first + i, v.hint) for i, v in enumerate(op.results)]


def _concat(kernel: TokenKernel, op: Op) -> list[Term]:
    """Columns side by side, one for each choice."""
    terms = [kernel.term(v) for v in op.operands]
    index, size, _ = kernel.extent(CHOSEN)
    if len(terms) != size or any(t.axes not in (TOKENS, ()) for t in terms):
        raise Unsupported("values side by side that are no choices")
    parts = [t.on(CHOSEN) for t in terms]
    text = parts[-1]
    for place in reversed(range(size - 1)):
        text = f"tl.where(({index} == {place})[None, :], {parts[place]}, {text})"
    return [kernel.text.let(op.result.hint, text, CHOSEN)]


def _reshape(kernel: TokenKernel, op: Op) -> list[Term]:
    """A number a token, as a vector or as a column."""
    term = kernel.term(op.operands[0])
    flat = all(v.type.elements == op.result.type.shape[0] for v in (*op.operands, op.result))
    if not flat and op.operands[0].type.shape != op.result.type.shape:
        raise Unsupported("values in another shape")
    return [term]


def _expand(kernel: TokenKernel, op: Op) -> list[Term]:
    """A number a token, repeated."""
    x, shape = kernel.term(op.operands[0]), op.result.type.shape
    if x.axes != TOKENS or len(shape) != 2 or not op.result.type.is_float:
        raise Unsupported("values repeated in another way")
    for axes, size in ((CHOSEN, "KP"), (SCORES, "EP")):
        if kernel.extent(axes)[1] == shape[1]:
            text = f"{x.on(axes)} + tl.zeros((BT, {size}), {kernel.text.dtype})"
            return [kernel.text.let(op.result.hint, text, axes)]
    raise Unsupported("values repeated for neither choices nor experts")


def _arange(kernel: TokenKernel, op: Op) -> list[Term]:
    """The numbers of the experts."""
    index, size, _ = kernel.extent(SCORES)
    plain = op.attrs.get("start", 0) == 0 and op.attrs.get("step", 1) == 1
    if op.attrs["size"] != size or not plain:
        raise Unsupported("numbers that are no experts'")
    return [Term(index, ("e",))]


TOKEN_OPS: dict[str, Callable[[TokenKernel, Op], list[Term]]] = {
    "t.sum": _sum,
    "t.amax": _amax,
    "t.cumsum": _cumsum,
    "t.softmax": _softmax,
    "moe.activate": _activate,
    "t.slice": _columns,
    "t.split": _columns,
    "t.concat": _concat,
    "t.reshape": _reshape,
    "t.expand": _expand,
    "t.arange": _arange,
}

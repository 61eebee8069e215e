"""``einsum`` as products, broadcasts and sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.capture.importer import Importer, handles
from moec.errors import CaptureError
from moec.ir.builder import Builder
from moec.ir.dims import Dim, product
from moec.ir.graph import Value

aten = torch.ops.aten
_SPARE = "0123456789"  # labels for the axes that an ellipsis stands for


@handles(aten.einsum.default)
def einsum(i: Importer, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
    dtype = i.dtype(node)
    operands = [i.cast(i.value(a), dtype) for a in args[1]]
    inputs, output = _labels(str(args[0]), [v.type.rank for v in operands])
    value, labels = operands[0], inputs[0]
    for place, other in enumerate(operands[1:], start=1):
        needed = set(output).union(*inputs[place + 1 :])
        value, labels = _pair(i.b, value, labels, other, inputs[place], needed)
    value, labels = _summed(i.b, value, labels, set(output))
    return _ordered(i.b, value, labels, output, i.hint(node))


def _labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """One letter an axis for each operand and for the result; ellipses spelt out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    wide = max(
        (r - len(t.replace("...", "")) for t, r in zip(inputs, ranks, strict=True)), default=0
    )
    full = [
        t.replace("...", _SPARE[wide - (r - len(t.replace("...", ""))) : wide])
        for t, r in zip(inputs, ranks, strict=True)
    ]
    if not arrow:
        letters = sorted({c for t in full for c in t if "".join(full).count(c) == 1})
        output = "..." + "".join(c for c in letters if c not in _SPARE)
    output = output.replace("...", _SPARE[:wide])
    if any(len(set(t)) != len(t) for t in full):
        raise CaptureError(f"einsum {equation!r} takes a diagonal")
    return full, output


def _summed(b: Builder, value: Value, labels: str, needed: set[str]) -> tuple[Value, str]:
    """Without the axes that nothing needs."""
    gone = tuple(n for n, c in enumerate(labels) if c not in needed)
    if not gone:
        return value, labels
    return b("t.sum", value, dims=gone), "".join(c for c in labels if c in needed)


def _ordered(b: Builder, value: Value, labels: str, wanted: str, hint: str = "") -> Value:
    order = tuple(labels.index(c) for c in wanted)
    if order == tuple(range(len(labels))):
        return value
    moved: Value = b("t.permute", value, dims=order, hint=hint)
    return moved


def _pair(
    b: Builder, x: Value, x_labels: str, y: Value, y_labels: str, needed: set[str]
) -> tuple[Value, str]:
    """The product of two operands, summed over the axes that both have and nothing else needs."""
    x, x_labels = _summed(b, x, x_labels, needed | set(y_labels))
    y, y_labels = _summed(b, y, y_labels, needed | set(x_labels))
    shared = [c for c in x_labels if c in y_labels]
    inner = "".join(c for c in shared if c not in needed)
    batch = "".join(c for c in shared if c in needed)
    rows = "".join(c for c in x_labels if c not in shared)
    columns = "".join(c for c in y_labels if c not in shared)
    if not inner:
        return _outer(b, (x, x_labels), (y, y_labels), batch + rows + columns)
    sizes = {**dict(zip(x_labels, x.type.shape, strict=True))}
    sizes |= dict(zip(y_labels, y.type.shape, strict=True))
    left = _matrices(b, x, x_labels, (batch, rows, inner), sizes)
    right = _matrices(b, y, y_labels, (batch, inner, columns), sizes)
    made = b("t.matmul", left, right)
    shape = tuple(sizes[c] for c in batch + rows + columns)
    return b("t.reshape", made, shape=shape), batch + rows + columns


def _matrices(
    b: Builder, value: Value, labels: str, groups: tuple[str, str, str], sizes: Mapping[str, Dim]
) -> Value:
    """An operand as matrices: one axis for each group of labels, none for an empty batch."""
    moved = _ordered(b, value, labels, "".join(groups))
    parts = groups if groups[0] else groups[1:]
    shape = tuple(product([sizes[c] for c in group]) for group in parts)
    reshaped: Value = b("t.reshape", moved, shape=shape)
    return reshaped


def _outer(
    b: Builder, x: tuple[Value, str], y: tuple[Value, str], labels: str
) -> tuple[Value, str]:
    """A product without a sum, by broadcasting."""
    spread = []
    for value, own in (x, y):
        moved = _ordered(b, value, own, "".join(c for c in labels if c in own))
        sizes = dict(zip(own, value.type.shape, strict=True))
        shape = tuple(sizes.get(c, 1) for c in labels)
        spread.append(b("t.reshape", moved, shape=shape))
    return b("t.mul", *spread), labels

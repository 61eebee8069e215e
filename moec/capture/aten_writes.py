"""The table of ATen ops that a recording has in place of writes: columns set, values replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.capture.aten import scalar
from moec.capture.importer import Importer, handles
from moec.errors import CaptureError
from moec.ir.dims import Dim, canon
from moec.ir.graph import Value

aten = torch.ops.aten
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@handles(aten.fill.Scalar, aten.fill.Tensor)
def fill(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    dtype = i.dtype(node)
    one = i.cast(args[1], dtype) if isinstance(args[1], Value) else scalar(i, args[1], dtype)
    return i.b("t.expand", one, shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.copy.default)
def copy(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    source = i.cast(i.value(args[1]), i.dtype(node))
    return i.b("t.expand", source, shape=i.shape_of(node), hint=i.hint(node))


@handles(aten.as_strided_scatter.default)
def columns_set(i: Importer, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """A matrix with some of its columns, next to each other, written over."""
    x, source = i.value(args[0]), i.value(args[1])
    shape, strides = (tuple(map(i.dim_of, a)) for a in args[2:4])
    start, count = i.dim_of(args[4]), 1 if len(shape) == 1 else shape[-1]
    if x.type.rank != 2 or not _are_columns(x.type.shape, shape, strides):
        raise CaptureError("a write to a part of a tensor that is no columns of a matrix")
    rows, width = x.type.shape
    source = i.b("t.reshape", source, shape=(rows, count))
    stop = canon(start + count)
    before = [i.b("t.slice", x, dim=1, start=0, stop=start)] if start else []
    after = [i.b("t.slice", x, dim=1, start=stop, stop=width)] if stop != width else []
    return i.b("t.concat", *before, source, *after, dim=1, hint=i.hint(node))


def _are_columns(matrix: Sequence[Dim], shape: Sequence[Dim], strides: Sequence[Dim]) -> bool:
    """Whether a shape and strides pick one column or several of a matrix in row-major order."""
    rows, width = matrix
    column = (shape, strides) == ((rows,), (width,))
    several = shape[:-1] == (rows,) and strides == (width, 1)
    return column or several

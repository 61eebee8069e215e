"""What a tracer took for granted of the sizes of token axes: refused, or compared at some sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy

from moec.capture.requirements import SizeGuard
from moec.errors import CaptureError
from moec.ir.dims import Dim

# Sizes of token axes at which guards are tried; 1 is compared with the module itself.
_GRID = (2, 3, 4, 5, 7, 16, 33, 64, 129, 1000, 4099, 2**20)
# So many of the sizes that a guard leaves out are compared with the module.
_DOUBTFUL = 8
_SMALL = 64  # tokens
_SHORT = 2  # tokens of one axis: shares of them are one or none


class BoundToSizeError(CaptureError):
    """The tracer fixed a size that depends on the number of tokens."""


def doubtful_sizes(
    guards: Sequence[SizeGuard], symbols: Mapping[Any, Dim], names: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Sizes of the axes ``names`` to be compared with the module, since a guard leaves them out.

    ``symbols`` are the tracer's for the axes. Conditions that fail at a few sizes (of the form "is
    not"), or only where few tokens or a short axis change how small tensors lie in memory, are no
    refusal; others raise :class:`BoundToSizeError`.
    """
    left_out: set[tuple[int, ...]] = set()
    for guard in guards:
        failing = list(_failing(guard.condition, symbols, names))
        small = all(math.prod(sizes) <= _SMALL or min(sizes) <= _SHORT for sizes in failing)
        if failing and guard.condition.func is not sympy.Ne and not small:
            raise BoundToSizeError(guard.text(symbols))
        left_out.update(failing[:_DOUBTFUL])
    return tuple(sorted(left_out))


def _failing(
    guard: Any, symbols: Mapping[Any, Dim], names: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """The tried sizes of the token axes at which a guard does not hold."""
    known = {str(d): s for s, d in symbols.items()}
    if not guard.free_symbols <= set(known.values()):
        return  # numbers of rows: the importer explains them, or refuses
    for values in itertools.product(_GRID, repeat=len(names)):
        at = {known[n]: sympy.Integer(v) for n, v in zip(names, values, strict=True)}
        if guard.xreplace(at) != True:  # noqa: E712  (sympy's own truth)
            yield values


__all__ = ["BoundToSizeError", "doubtful_sizes"]

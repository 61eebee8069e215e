"""Sizes that a user names and bounds for the inputs of a model.

``{"input_ids": {0: dim("B", max=8), 1: dim("S", max=4096)}}`` says what the first two axes of an
input are. Nothing has to be declared: every size is a symbol anyway, and one compilation serves all
of its values.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moec.errors import CompileError, DimError
from moec.ir import dims
from moec.ir.dims import Range, canon, floordiv, show_dim, symbols
from moec.ir.prove import bounds

Ranges = Mapping[str, Range]
# what a user gives for each input: its axes, and their dims
Dynamic = Mapping[str, "Mapping[int, Dim | int]"]
_ANY: Range = (0, None)


@dataclass(frozen=True)
class Dim:
    """A size of a model's inputs: a name with a range, or arithmetic of such, as ``B * S``."""

    size: dims.Dim
    ranges: tuple[tuple[str, Range], ...] = ()

    def __str__(self) -> str:
        return show_dim(self.size)

    def __repr__(self) -> str:
        ranges = ", ".join(show_range(*one) for one in self.ranges)
        return f"<dim {self}{': ' if ranges else ''}{ranges}>"

    def __add__(self, other: Dim | int) -> Dim:
        return _combined(lambda a, b: a + b, self, other)

    def __radd__(self, other: int) -> Dim:
        return _combined(lambda a, b: a + b, other, self)

    def __sub__(self, other: Dim | int) -> Dim:
        return _combined(lambda a, b: a - b, self, other)

    def __mul__(self, other: Dim | int) -> Dim:
        return _combined(lambda a, b: a * b, self, other)

    def __rmul__(self, other: int) -> Dim:
        return _combined(lambda a, b: a * b, other, self)

    def __floordiv__(self, other: Dim | int) -> Dim:
        return _combined(floordiv, self, other)


def dim(name: str, *, min: int = 0, max: int | None = None) -> Dim:
    """A named size for ``moec.compile(dynamic=...)``: any number from ``min`` to ``max`` (included;
    ``None``: as large as the compiled code takes).

    The same name at several axes says that they are equal. Sums, differences, products and floor
    quotients of dims are dims: ``{"position_ids": {0: B * S}}``.

    Raises:
        DimError: for a name that is none, and a range that is empty or has negative sizes.
    """
    if not isinstance(name, str):
        raise DimError(f"the name of a dim is a text such as 'S', got {name!r}")
    symbol = dims.dim(name)
    for word, value in (("min", min), ("max", max)):
        if not _is_size(value) and not (word == "max" and value is None):
            raise DimError(f"dim {name}: {word}={value!r} is no size; sizes are 0 or more")
    if max is not None and max < min:
        raise DimError(f"dim {name}: no size lies between min={min} and max={max}")
    return Dim(symbol, ((name, (min, max)),))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def show_range(text: str, range_: Range) -> str:
    """``1 <= S <= 4096``."""
    low, high = range_
    return f"{low} <= {text}" + ("" if high is None else f" <= {high}")


def _combined(operation: Callable[[Any, Any], Any], *operands: Dim | int) -> Dim:
    if not all(isinstance(o, Dim) or type(o) is int for o in operands):
        return NotImplemented  # type: ignore[no-any-return]
    parts = [o if isinstance(o, Dim) else Dim(o) for o in operands]
    ranges: dict[str, Range] = {}
    for part in parts:
        merge(ranges, part)
    return Dim(canon(operation(*(p.size for p in parts))), tuple(sorted(ranges.items())))


def merge(known: dict[str, Range], new: Dim) -> None:
    """Add the ranges of a dim to those of others; a name without limits takes over those that it
    has elsewhere. Raises :class:`DimError` for a name with two ranges.
    """
    for name, range_ in new.ranges:
        had = known.get(name, _ANY)
        if _ANY not in (had, range_) and had != range_:
            raise DimError(
                f"dim {name} has two ranges, {show_range(name, had)} and "
                f"{show_range(name, range_)}; make it once and use it at both axes"
            )
        known[name] = range_ if had == _ANY else had


@dataclass(frozen=True)
class Axis:
    """One axis of one input and what is declared for it; ``place`` is the input's among those that
    can be given without a name.
    """

    input: str
    place: int | None
    axis: int
    size: dims.Dim

    def __str__(self) -> str:
        return f"{self.input} axis {self.axis}"


@dataclass(frozen=True)
class Declared:
    """What is declared for the inputs of a model called ``name``; ``ranges`` has every symbol."""

    name: str
    axes: tuple[Axis, ...]
    ranges: Ranges

    def __str__(self) -> str:
        inputs: dict[str, dict[int, str]] = {}
        for axis in self.axes:
            inputs.setdefault(axis.input, {})[axis.axis] = show_dim(axis.size)
        shapes = (f"{name} [{_shape(sizes)}]" for name, sizes in inputs.items())
        return ", ".join([*shapes, *(show_range(*one) for one in self.ranges.items())])


def _shape(sizes: Mapping[int, str]) -> str:
    """``B, S, ...``: ``_`` for an axis of which nothing is said."""
    return ", ".join([*(sizes.get(i, "_") for i in range(max(sizes) + 1)), "..."])


def declare(module: nn.Module, dynamic: Dynamic) -> Declared:
    """What ``dynamic`` says of the inputs of a module's forward.

    Raises:
        CompileError: where it contradicts itself or the module: an input that forward does not
            have, a dim with two ranges, an axis that no size can have.
    """
    if not isinstance(dynamic, Mapping):
        raise CompileError(
            f"dynamic is True, or a mapping such as {{'input_ids': {{1: moec.dim('S', max=4096)}}}}"
            f"; got {dynamic!r}"
        )
    places = _places(module, dynamic)
    ranges: dict[str, Range] = {}
    axes = []
    for name, number, size in _entries(dynamic):
        axis = Axis(name, places.get(name), number, size.size)
        try:
            merge(ranges, size)
        except DimError as error:
            raise CompileError(f"dynamic: {axis}: {error}") from None
        axes.append(axis)
    declared = Declared(type(module).__name__, tuple(axes), ranges)
    for axis in axes:
        _check_size(axis, ranges)
    return declared


def _entries(dynamic: Mapping[str, Any]) -> Iterator[tuple[str, int, Dim]]:
    for name, axes in dynamic.items():
        if not isinstance(axes, Mapping):
            raise CompileError(
                f"dynamic: {name} needs a mapping of axes to dims, such as "
                f"{{1: moec.dim('S')}}; got {axes!r}"
            )
        for axis, size in axes.items():
            if not _is_size(axis):
                raise CompileError(
                    f"dynamic: {name}: {axis!r} is no axis; axes are counted from the front, from 0"
                )
            yield name, axis, _as_dim(name, axis, size)


def _as_dim(name: str, axis: int, size: Any) -> Dim:
    if isinstance(size, Dim):
        return size
    if not _is_size(size):
        raise CompileError(
            f"dynamic: {name} axis {axis}: {size!r} is no dim; give moec.dim('S', max=...), or a "
            "number where the axis always has that size"
        )
    return Dim(size)


def _check_size(axis: Axis, ranges: Ranges) -> None:
    """Refuse a size that is never 0 or more."""
    _, high = bounds(axis.size, ranges)
    if high is not None and high < 0:
        known = ", ".join(show_range(n, ranges[n]) for n in sorted(symbols(axis.size)))
        raise CompileError(
            f"dynamic: {axis} is {show_dim(axis.size)}, which is less than 0 for every {known}"
        )


def _places(module: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The place of each input of a forward that can be given without a name.

    Raises :class:`CompileError` for a name that is none of its inputs.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is no Python
        return {}
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not known and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {}  # a wrapper, which hands on what it gets
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise CompileError(f"dynamic: {type(module).__name__} has no input {name!r}; {meant}")
    by_place = (
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    return {name: place for place, name in enumerate(by_place)}


__all__ = ["Axis", "Declared", "Dim", "Dynamic", "declare", "dim", "merge", "show_range"]

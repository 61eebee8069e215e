"""The sizes of a call's inputs against what was declared for them, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moec.declared import Axis, Declared, show_range
from moec.errors import CallError, CompileError
from moec.ir.dims import show_dim, symbols
from moec.ir.prove import bounds
from moec.surroundings import is_traced

if TYPE_CHECKING:
    from moec.region import Region

Found = dict[str, tuple[int, Axis]]


class CheckInputs:
    """Refuses calls of a model whose sizes are not as declared.

    ``ranks`` are those of the declared inputs at the first call: how many of their axes are of
    tokens (all of an integer tensor's, all but the last of a float tensor's).
    """

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.ranks: dict[str, int] = {}
        named = [a for a in declared.axes if show_dim(a.size) in declared.ranges]
        self._named = [(a, show_dim(a.size)) for a in named]
        self._derived = [a for a in declared.axes if a not in named]

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_traced():
            self.tell_tracer(args, kwargs)
        else:
            self.check(args, kwargs)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise :class:`CallError` unless each declared axis of the tensors that are given has a
        size in its range, and equal dims are equal.
        """
        found: Found = {}
        for axis, name in self._named:
            tensor = self._tensor(axis, args, kwargs)
            if tensor is not None:
                self._check_named(axis, name, tensor.shape[axis.axis], found)
        for axis in self._derived:
            tensor = self._tensor(axis, args, kwargs)
            if tensor is not None:
                self._check_derived(axis, tensor.shape[axis.axis], found)
        if not self.ranks:
            self._learn(args, kwargs)

    def _check_named(self, axis: Axis, name: str, size: int, found: Found) -> None:
        range_ = low, high = self.declared.ranges[name]
        if size < low or (high is not None and size > high):
            raise CallError(
                f"{self.declared.name}: {axis} has size {size}, but it is declared as {name} with "
                f"{show_range(name, range_)}"
            )
        before, other = found.setdefault(name, (size, axis))
        if before != size:
            raise CallError(
                f"{self.declared.name}: {other} has size {before} and {axis} has size {size}, but "
                f"both are declared as {name} with {show_range(name, range_)}"
            )

    def _check_derived(self, axis: Axis, size: int, found: Found) -> None:
        """Check an axis that is computed from others, those that the call has not being free."""
        known = {name: (size, size) for name, (size, _) in found.items()}
        low, high = bounds(axis.size, {**self.declared.ranges, **known})
        if low <= size and (high is None or size <= high):
            return
        ranges = {**self.declared.ranges, **known}
        here = ", ".join(_shown(name, ranges[name]) for name in sorted(symbols(axis.size)))
        raise CallError(
            f"{self.declared.name}: {axis} has size {size}, but it is declared as "
            + (f"{_shown(show_dim(axis.size), (low, high))} where {here}" if here else f"{low}")
        )

    def _tensor(
        self, axis: Axis, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """An axis's input in a call; ``None`` if the call does not have it."""
        value = _given(axis, args, kwargs)
        if value is None:
            return None
        if not isinstance(value, torch.Tensor):
            raise CallError(
                f"{self.declared.name}: {axis.input} is a {type(value).__name__}, but its axis "
                f"{axis.axis} is declared as {show_dim(axis.size)}; give a tensor"
            )
        if value.dim() <= axis.axis:
            raise CallError(
                f"{self.declared.name}: {axis.input} has shape {tuple(value.shape)}, but its axis "
                f"{axis.axis} is declared as {show_dim(axis.size)}; axes are counted from 0"
            )
        return value

    def _learn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for axis in self.declared.axes:
            tensor = self._tensor(axis, args, kwargs)
            if tensor is not None:
                self.ranks[axis.input] = tensor.dim() - int(tensor.is_floating_point())

    def tell_tracer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The same of names and numbers to a tracer, which relies on it and checks it before the
        compiled code runs.
        """
        sizes: dict[str, Any] = {}
        for name, input, place, axis, low, high, text in _rows(self):
            tensor = args[place] if place is not None and place < len(args) else kwargs.get(input)
            if not isinstance(tensor, torch.Tensor):
                continue
            size = tensor.shape[axis]
            torch._check(size >= low, lambda text=text: text)  # type: ignore[no-untyped-call]
            if high is not None:
                torch._check(size <= high, lambda text=text: text)  # type: ignore[no-untyped-call]
            if name in sizes:
                torch._check(size == sizes[name], lambda text=text: text)  # type: ignore[no-untyped-call]
            sizes[name] = size


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _rows(checker: CheckInputs) -> tuple[tuple[Any, ...], ...]:
    """What is declared, as constants: a tracer may vary the numbers that it finds in attributes."""
    declared, rows = checker.declared, []
    for axis, name in checker._named:
        range_ = declared.ranges[name]
        must = f"{show_range(name, range_)}, the same wherever {name} is declared"
        rows.append((name, axis.input, axis.place, axis.axis, *range_, must))
    for axis in checker._derived:
        if isinstance(axis.size, int):
            size = axis.size
            rows.append((str(size), axis.input, axis.place, axis.axis, size, size, str(size)))
    said = f"{declared.name}: {{}} axis {{}} must be {{}}"
    return tuple((*row[:-1], said.format(row[1], row[3], row[-1])) for row in rows)


class CheckedModel:
    """Takes the place of a region on a model that is none, so that its calls are checked."""

    kind = "inputs"

    def __init__(self, check: CheckInputs) -> None:
        self.check = check

    def bound_to(self, module: nn.Module) -> CheckedModel:
        """The same for a copy of the model."""
        return self

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``NotImplemented``: the model's own code runs."""
        return NotImplemented

    def settle(self, module: nn.Module) -> None:
        """Nothing: what the model's own code changes on the way is its own."""


def check_fixed(declared: Declared, region: Region) -> None:
    """Raise :class:`CompileError` where a name is declared for an axis of which the model, one
    block, knows one size only: the width of its tokens.
    """
    found = region.first
    if found is None or found.graph is None:
        return
    width = found.graph.inputs[0].type.shape[-1]
    last = max(mode.rank for mode, one in region.found.items() if one is found) - 1
    for axis in declared.axes:
        is_width = axis.place == 0 and axis.axis == last
        if is_width and bounds(axis.size, declared.ranges) != (width, width):
            ranges = ", ".join(
                show_range(n, declared.ranges[n]) for n in sorted(symbols(axis.size))
            )
            raise CompileError(
                f"dynamic: {axis} is declared as {show_dim(axis.size)}"
                f"{f' with {ranges}' if ranges else ''}, but {declared.name} works for {width} "
                "there only: it is the width of its weights"
            )


def _given(axis: Axis, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if axis.place is not None and axis.place < len(args):
        return args[axis.place]
    return kwargs.get(axis.input)


def _shown(name: str, range_: tuple[int, int | None]) -> str:
    low, high = range_
    return f"{name} = {low}" if low == high else show_range(name, range_)


__all__ = ["CheckInputs", "CheckedModel", "check_fixed"]

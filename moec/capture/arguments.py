"""What a block takes besides its tokens: forms of further arguments, tried until one fits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

MAX_EXTRA = 2
# Axes of an index argument; names stand for the axes of the tokens.
_AXES: dict[int, tuple[tuple[Any, ...], ...]] = {
    3: (("B",), ("B", 1, 1), ("B", 1), ("B", "S"), ("B", "S", 1)),
    2: (("T",), ("T", 1)),
}


@dataclass(frozen=True)
class Extra:
    """One argument after the tokens.

    ``kind`` is "index" (whole numbers below ``bound``, axes as in ``axes``) or "sizes" (a list of
    ``bound`` numbers of rows, which sum to the number of tokens).
    """

    kind: str
    axes: tuple[Any, ...]
    bound: int

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        """A tensor of this form for the sizes of the token axes."""
        if self.kind == "sizes":
            chosen = torch.randint(self.bound, (sizes["T"],), generator=generator)
            return torch.bincount(chosen, minlength=self.bound)
        shape = [sizes.get(a, 1) if isinstance(a, str) else a for a in self.axes]
        return torch.randint(self.bound, shape, generator=generator)

    def tensor(self, value: Any, sizes: Mapping[str, int], device: torch.device) -> Any:
        """A call's argument as a tensor, ``None`` if it does not have this form."""
        if self.kind == "sizes":
            whole = isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)
            if not whole or len(value) != self.bound or sum(value) != sizes["T"]:
                return None
            return torch.tensor(value, device=device)
        shape = tuple(sizes.get(a, 1) if isinstance(a, str) else a for a in self.axes)
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
            return None
        return value if tuple(value.shape) == shape and value.device == device else None


def axis_names(rank: int) -> tuple[str, ...]:
    """The names of the axes of tokens of a rank, the last one aside."""
    return ("B", "S") if rank == 3 else ("T",)


def token_sizes(x: torch.Tensor) -> dict[str, int]:
    """The sizes of the token axes of ``x``."""
    return dict(zip(axis_names(x.dim()), x.shape, strict=False))


def required_arguments(module: nn.Module) -> int:
    """How many arguments a module's forward cannot do without."""
    forward = inspect.unwrap(type(module).forward)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in plain and p.default is p.empty for p in parameters)


def forms(count: int, rank: int, bound: int) -> Iterator[tuple[Extra, ...]]:
    """Every combination of forms for ``count`` arguments after the tokens."""
    if count > MAX_EXTRA:
        return
    each = [Extra("index", axes, bound) for axes in _AXES[rank]]
    if rank == 2:
        each.append(Extra("sizes", (), bound))
    yield from product(each, repeat=count)


def arguments_of(
    extras: Sequence[Extra], x: torch.Tensor, values: Sequence[Any]
) -> list[torch.Tensor] | None:
    """The tensors of a call, ``None`` if they do not have the captured forms."""
    if len(values) != len(extras):
        return None
    sizes = token_sizes(x)
    if extras and set(sizes) != {"T"} and any(e.kind == "sizes" for e in extras):
        return None
    made = [e.tensor(v, sizes, x.device) for e, v in zip(extras, values, strict=True)]
    return None if any(t is None for t in made) else [x, *made]

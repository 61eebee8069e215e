"""Sizes that stay symbols while a block is traced: ``int``, ``len``, ``max``, ``min``, ``one_hot``.

Python's own turn a symbol into the number that it has in the example. While a block is traced, the
files of its classes see forms of these names that do not.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_SYMBOLS = (torch.SymInt, torch.SymFloat)
_ONE_HOT = torch.nn.functional.one_hot


@contextlib.contextmanager
def open_sizes(module: nn.Module) -> Iterator[None]:
    """Within the context, code of the module's classes keeps sizes that it computes with open."""
    files = [_globals(type(m)) for m in module.modules()]
    saved = [(names, {k: names[k] for k in _OPEN if k in names}) for names in files]
    for names in files:
        names.update({k: v for k, v in _OPEN.items() if k not in names})
    try:
        with _OneHot():
            yield
    finally:
        for names, known in saved:
            for key in _OPEN:
                if key not in known:
                    names.pop(key, None)


def _globals(cls: type) -> dict[str, Any]:
    """The names of the file that a class's forward is from; none of torch's own."""
    forward = inspect.unwrap(getattr(cls, "forward", nn.Module.forward))
    names: dict[str, Any] = getattr(forward, "__globals__", {})
    return {} if str(names.get("__name__", "torch")).startswith("torch") else names


class _AsInt(type):
    """Makes a class that stands for ``int``."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.int)

    def __call__(cls, value: Any = 0, *rest: Any) -> Any:
        if isinstance(value, _SYMBOLS):
            return torch.sym_int(value)  # type: ignore[no-untyped-call]
        return builtins.int(value, *rest)


class _Int(metaclass=_AsInt):
    """``int`` that keeps symbols."""


def _extreme(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    def call(*values: Any, **options: Any) -> Any:
        if len(values) > 1 and not options and any(isinstance(v, _SYMBOLS) for v in values):
            return functools.reduce(symbolic, values)
        return plain(*values, **options)

    return call


def _length(value: Any) -> Any:
    """``len`` that keeps symbols."""
    rows = isinstance(value, torch.Tensor) and value.dim() > 0
    return value.shape[0] if rows else builtins.len(value)


_OPEN: dict[str, Any] = {
    "int": _Int,
    "len": _length,
    "max": _extreme(builtins.max, torch.sym_max),
    "min": _extreme(builtins.min, torch.sym_min),
}


class _OneHot(TorchFunctionMode):
    """``one_hot`` with a symbol for its classes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ONE_HOT:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: torch.Tensor, num_classes: Any = -1) -> torch.Tensor:
    if isinstance(num_classes, torch.SymInt):
        count: Any = num_classes
        places = torch.arange(count, device=tensor.device)
        return (tensor.unsqueeze(-1) == places).to(torch.int64)
    made: torch.Tensor = _ONE_HOT(tensor, num_classes)
    return made


__all__ = ["open_sizes"]

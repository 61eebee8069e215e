"""When two modules are sure to compute the same function of their inputs and weights."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
_INTERNAL = set(vars(nn.Module()))


def structure_key(module: nn.Module) -> Hashable:
    """Equal keys: same code, same settings that the code reads, same shapes and dtypes of weights.

    Attributes are compared by value if plain, otherwise by identity; attributes that no method but
    ``__init__`` names (a layer number, say) do not count.
    """
    return tuple(_module_key(name, child) for name, child in module.named_modules())


def _module_key(name: str, module: nn.Module) -> Hashable:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    read = names_read(type(module))
    settings = [(k, _value_key(v)) for k, v in sorted(vars(module).items()) if k not in _INTERNAL and k in read]
    shapes = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in tensors)
    return name, type(module), module.training, shapes, tuple(settings)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return tuple(map(_value_key, value))
    return id(value)


_NAMES: dict[type, frozenset[str]] = {}


def names_read(cls: type) -> frozenset[str]:
    """Every name that the methods of a class, ``__init__`` aside, mention."""
    if cls not in _NAMES:
        _NAMES[cls] = frozenset(n for base in cls.__mro__ if base not in (nn.Module, object) for n in _names_of(base))
    return _NAMES[cls]


def _names_of(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        function = inspect.unwrap(member.fget if isinstance(member, property) and member.fget else member) if callable(member) or isinstance(member, property) else None
        code = getattr(function, "__code__", None)
        if code is not None and name != "__init__":
            yield from _names_in(code)
            yield from _names_in(getattr(member, "__code__", code))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from (c for c in code.co_consts if isinstance(c, str))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)

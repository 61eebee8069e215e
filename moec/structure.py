"""When two modules are sure to compute the same function of their inputs and weights."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
_INTERNAL = {*vars(nn.Module()), "_moec_region"}
_STATE = _INTERNAL - {"training"}
# Code with one of these may read an attribute whose name cannot be seen in it.
_ANY_ATTRIBUTE = {"getattr", "vars", "__dict__"}
# Packages whose functions read no attributes of a user's module but those in plain sight.
_TRUSTED = ("torch.", "torch")
# Methods that play no part in a call.
_NOT_CALLED = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__setstate__"}


def structure_key(module: nn.Module) -> Hashable:
    """Equal keys: same code, same settings that the code reads, same shapes and dtypes of weights.

    Attributes are compared by value if plain, otherwise by identity; attributes that no method but
    ``__init__`` names (a layer number, say) do not count.
    """
    return tuple(_module_key(name, child) for name, child in module.named_modules())


def _module_key(name: str, module: nn.Module) -> Hashable:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    settings = [(k, _value_key(v)) for k, v in settings_read(module)]
    shapes = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in tensors)
    kind = getattr(module, "_moec_original", type(module))
    return name, kind, module.training, shapes, tuple(settings)


def settings_read(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that a module's code reads, by name; ``training`` among them if it does."""
    cls: Any = getattr(module, "_moec_original", type(module))
    read = names_read(cls)
    everything = not read.isdisjoint(_ANY_ATTRIBUTE)
    return [
        (k, v)
        for k, v in sorted(vars(module).items())
        if (everything and k not in _INTERNAL) or (k in read and k not in _STATE)
    ]


class _Same:
    """Equal to itself alone; keeps the object alive, so that no other gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_value_key, value))
    return _Same(value)


@functools.cache
def names_read(cls: type) -> frozenset[str]:
    """Every name that code run by a call of the class may mention.

    That is its methods' code, and that of the plain functions outside PyTorch that they mention.
    """
    bases = (base for base in cls.__mro__ if base not in (nn.Module, object))
    pending = [function for base in bases for function in _functions_of(base)]
    seen: set[CodeType] = set()
    names: set[str] = set()
    while pending:
        function = pending.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        found = set(_names_in(function.__code__))
        names |= found
        pending += _mentioned(function, found)
    return frozenset(names)


def _functions_of(cls: type) -> Iterator[FunctionType]:
    """The functions behind the methods and properties of a class, decorators included."""
    for name, member in vars(cls).items():
        if name not in _NOT_CALLED:
            member = member.fget if isinstance(member, property) else member
            member = getattr(member, "__func__", member)  # a class method or a static one
            while isinstance(member, FunctionType):
                yield member
                member = getattr(member, "__wrapped__", None)


def _mentioned(function: FunctionType, names: set[str]) -> Iterator[FunctionType]:
    """The global functions and closed-over ones that a function may call."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    candidates = [*cells, *(function.__globals__[n] for n in names if n in function.__globals__)]
    for value in candidates:
        is_function = isinstance(value, FunctionType)
        if is_function and not (value.__module__ or "").startswith(_TRUSTED):
            yield value


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that its function has not assigned to yet
        return False


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_in(constant)

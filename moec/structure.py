"""When two modules are sure to compute the same function of their inputs and weights."""

from __future__ import annotations

import copy
import dis
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
_INTERNAL = {*vars(nn.Module()), "_moec_region", "_moec_interface"}
_STATE = _INTERNAL - {"training"}
# Code with one of these may read an attribute whose name cannot be seen in it.
_ANY_ATTRIBUTE = {"getattr", "vars", "__dict__"}
# Packages whose functions read no attributes of a user's module but those in plain sight.
_TRUSTED = ("torch.", "torch")
# Methods that play no part in a call.
_ENTRIES = ("forward", "__call__", "__getattr__", "__getattribute__")  # where a call enters
_NO_STEP = {"CACHE", "PUSH_NULL", "PRECALL", "RESUME", "EXTENDED_ARG", "NOP"}
_NOT_CALLED = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__setstate__"}


def structure_key(module: nn.Module) -> Hashable:
    """Equal keys: same code, same settings that the code reads, same shapes and dtypes of weights.

    Attributes are compared by value if plain, otherwise by identity; attributes that no method but
    ``__init__`` names (a layer number, say) do not count.
    """
    return tuple(_module_key(name, child) for name, child in module.named_modules())


def _module_key(name: str, module: nn.Module) -> Hashable:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    settings = [(k, value_key(v)) for k, v in settings_read(module)]
    shapes = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in tensors)
    kind = getattr(module, "_moec_original", type(module))
    return name, kind, module.training, shapes, tuple(settings)


def settings_read(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that a module's code reads, by name; ``training`` among them if it does."""
    cls: Any = getattr(module, "_moec_original", type(module))
    read, everything = names_read(cls), reads_by_name(cls)
    return [
        (k, v)
        for k, v in sorted(vars(module).items())
        if (everything and k not in _INTERNAL) or (k in read and k not in _STATE)
    ]


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of :func:`settings_read`, below too, that are plain values or containers of
    such, by path.
    """
    below = [(f"{path}.".lstrip("."), child) for path, child in module.named_modules()]
    found = ((path + k, v) for path, m in below for k, v in settings_read(m) if _is_plain(v))
    return {path: copy.deepcopy(value) for path, value in found}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, int | float | str | None)


class _Same:
    """Equal to itself alone; keeps the object alive, so that no other gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def value_key(value: Any) -> Hashable:
    """Equal keys: equal plain values, containers of such, or one and the same object."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(value_key, value))
    if isinstance(value, dict):
        return type(value), tuple((value_key(k), value_key(v)) for k, v in value.items())
    return _Same(value)


@functools.cache
def names_read(cls: type) -> frozenset[str]:
    """Every name that code run by a call of the class may mention.

    That is its methods' code, and that of the plain functions outside PyTorch that they mention.
    """
    methods = _methods(cls)
    called = _called([f for own in methods.values() for f in own], {})
    return frozenset(name for function in called for name in _names_in(function.__code__))


@functools.cache
def reads_by_name(cls: type) -> bool:
    """Whether code that a call reaches may read an attribute whose name cannot be seen in it."""
    methods = _methods(cls)
    entries = [f for name in _ENTRIES for f in methods.get(name, ())]
    return any(_computes_names(f.__code__) for f in _called(entries, methods))


def _called(
    entries: Sequence[FunctionType], methods: Mapping[str, Sequence[FunctionType]]
) -> list[FunctionType]:
    """The functions that a call of ``entries`` may reach, by the names in their code."""
    pending, seen = list(entries), dict[CodeType, FunctionType]()
    while pending:
        function = pending.pop()
        if function.__code__ not in seen:
            seen[function.__code__] = function
            names = set(_names_in(function.__code__))
            pending += _mentioned(function, names)
            pending += [f for name in names for f in methods.get(name, ())]
    return list(seen.values())


def _methods(cls: type) -> dict[str, list[FunctionType]]:
    """The functions behind each method and property of a class and its bases, by name."""
    found: dict[str, list[FunctionType]] = {}
    for base in cls.__mro__:
        for name, member in vars(base).items() if base not in (nn.Module, object) else ():
            if name not in _NOT_CALLED:
                found.setdefault(name, []).extend(_functions_behind(member))
    return found


def _functions_behind(member: Any) -> Iterator[FunctionType]:
    """The function of a method or a property, and those that its decorators took."""
    member = member.fget if isinstance(member, property) else member
    member = getattr(member, "__func__", member)  # a class method or a static one
    while isinstance(member, FunctionType):
        yield member
        member = getattr(member, "__wrapped__", None)


def _computes_names(code: CodeType) -> bool:
    """Whether code mentions ``getattr`` with a name that is no constant, or an object's dict."""
    inside = [c for c in code.co_consts if isinstance(c, CodeType)]
    if any(map(_computes_names, inside)):
        return True
    mentioned = _ANY_ATTRIBUTE.intersection(code.co_names)
    return bool(mentioned - {"getattr"}) or ("getattr" in mentioned and not _names_plain(code))


def _names_plain(code: CodeType) -> bool:
    """Whether each ``getattr`` is called at once, on a variable, with a constant for a name and at
    most one plain default.
    """
    steps = [i for i in dis.get_instructions(code) if i.opname not in _NO_STEP]
    names = [i.opname for i in steps]
    return all(
        names[n + 1 : n + 3] == ["LOAD_FAST", "LOAD_CONST"] and "CALL" in names[n + 3 : n + 5]
        for n, step in enumerate(steps)
        if step.argval == "getattr"
    )


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

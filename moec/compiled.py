"""Installing regions in a module tree: a subclass whose forward asks the region first."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moec.traced import call_traced

if TYPE_CHECKING:
    from moec.declared_check import CheckedModel
    from moec.model_scope import ModelScope
    from moec.region import Region


class CompiledMixin:
    """Put before a module's own class; instances carry their :class:`Region` in ``_moec_region``.

    Pickling gives the original class (a compiled form belongs to a process); ``copy.deepcopy``
    gives the copy a region of its own.
    """

    # Not the Region's own type: Hugging Face evaluates the annotations of every subclass of its
    # models.
    _moec_original: Any
    _moec_region: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Serve the call from the region, or run the module's own code."""
        if self._moec_region.check is not None:
            self._moec_region.check(args, kwargs)
        if torch.compiler.is_compiling():
            result = call_traced(self, args, kwargs, self._moec_region)  # type: ignore[arg-type]
        else:
            result = self._moec_region.call(self, args, kwargs)
        if result is not NotImplemented:
            return result
        own = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            self._moec_region.settle(self)
        return own

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = copy.copy(self)
        restore(plain)  # type: ignore[arg-type]
        function, arguments, *rest = plain.__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle takes this form only for the object's own class; this one means the same.
            function, arguments = copyreg._reconstructor, (*arguments, object, None)  # type: ignore[attr-defined]
        return (function, arguments, *rest)

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        own = {k: v for k, v in self.__dict__.items() if k != "_moec_region"}
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in own.items()})
        new.__dict__["_moec_region"] = self._moec_region.bound_to(new)
        return new


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def install(module: nn.Module, region: Region | ModelScope | CheckedModel) -> None:
    """Make ``module`` ask ``region`` first; its class keeps its name and stays a subclass of the
    original.
    """
    original = type(module)
    if original not in _CLASSES:
        members = {
            "_moec_original": original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "forward": _with_signature_of(original),
        }
        _CLASSES[original] = type(original.__name__, (CompiledMixin, original), members)
    module.__class__ = _CLASSES[original]
    module.__dict__["_moec_region"] = region


def _with_signature_of(original: type[nn.Module]) -> Any:
    """The forward of compiled modules, with the parameters of a class's own: libraries choose by
    them what to call a model with.
    """
    plain: Any = CompiledMixin.forward
    forward: Any = FunctionType(
        plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    with contextlib.suppress(TypeError, ValueError):  # a forward that is no Python has none
        forward.__signature__ = inspect.signature(original.forward)
    return forward


def restore(module: nn.Module) -> None:
    """Undo :func:`install`."""
    module.__class__ = module._moec_original  # type: ignore[assignment]
    module.__dict__.pop("_moec_region", None)


@contextlib.contextmanager
def as_original(module: nn.Module) -> Iterator[None]:
    """Within the context, ``module`` and all below it have their own classes, so that their own
    code is read.
    """
    swapped = [(m, type(m)) for m in module.modules() if isinstance(m, CompiledMixin)]
    for m, cls in swapped:
        m.__class__ = cls._moec_original
    try:
        yield
    finally:
        for m, cls in swapped:
            m.__class__ = cls


def region_of(module: nn.Module) -> Region | None:
    """The region that a module asks, if any."""
    asked = module.__dict__.get("_moec_region")
    return None if asked is None or asked.kind in ("model", "inputs") else asked


def model_scope_of(module: nn.Module) -> ModelScope | None:
    """The model scope that a whole model asks, if it was compiled with one."""
    asked = module.__dict__.get("_moec_region")
    return asked if asked is not None and asked.kind == "model" else None

"""What a captured form takes for granted of its module, checked in microseconds at every call."""

from __future__ import annotations

from typing import Any

from torch import nn

from moec.structure import settings_read


class Guard:
    """Holds while a module has the submodules and settings that it had when the guard was made."""

    def __init__(self, module: nn.Module) -> None:
        below = list(module.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in below if m._modules]
        self._settings = [(vars(m), k, v) for m in below for k, v in settings_read(m)]

    def holds(self) -> bool:
        """Whether nothing was replaced and no setting that the code reads has another value."""
        for modules, members in self._children:
            if list(modules.values()) != members:  # modules compare by identity
                return False
        return all(_same(own.get(name), value) for own, name, value in self._settings)


def _same(now: Any, then: Any) -> bool:
    plain = isinstance(then, int | float | str) and type(now) is type(then)
    return now is then or bool(plain and now == then)

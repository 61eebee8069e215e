"""What a captured form takes for granted of its module, checked in microseconds at every call."""

from __future__ import annotations

from typing import Any

from torch import nn

from moec.structure import settings_read, value_key

_CONTAINERS = (dict, list, tuple)


class Guard:
    """Holds while a module has the submodules and settings that it had when the guard was made."""

    def __init__(self, module: nn.Module) -> None:
        below = list(module.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in below if m._modules]
        settings = [(vars(m), k, v) for m in below for k, v in settings_read(m)]
        self._settings = [s for s in settings if not isinstance(s[2], _CONTAINERS)]
        # by content: an adapter is switched on and off by changes within
        contained = (s for s in settings if isinstance(s[2], _CONTAINERS))
        self._contents = [(own, name, value_key(value)) for own, name, value in contained]
        self._lists = [(modules, tuple(members)) for modules, members in self._children]

    @property
    def is_plain(self) -> bool:
        """Whether :meth:`unchanged` sees every change: nothing in it can change within."""
        return not self._contents

    def unchanged(self) -> bool:
        """As :meth:`holds`, in a microsecond; false where a setting was set anew to an equal
        value.
        """
        for own, name, value in self._settings:
            if own.get(name) is not value:
                return False
        # modules compare by identity
        return all([tuple(modules.values()) == members for modules, members in self._lists])

    def holds(self) -> bool:
        """Whether nothing was replaced and no setting that the code reads has another value."""
        for modules, members in self._children:
            if list(modules.values()) != members:  # modules compare by identity
                return False
        if not all(_same(own.get(name), value) for own, name, value in self._settings):
            return False
        return all(value_key(own.get(name)) == key for own, name, key in self._contents)


def _same(now: Any, then: Any) -> bool:
    plain = isinstance(then, int | float | str) and type(now) is type(then)
    return now is then or bool(plain and now == then)

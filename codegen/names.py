"""Names of values in emitted Python: their hints, made unique and safe."""

from __future__ import annotations

import builtins
import keyword
import re

from moec.ir.graph import Value

RESERVED = {
    *keyword.kwlist,
    *dir(builtins),
    "torch",
    "triton",
    "tl",
    "moe",
    "guards",
    "launch",
    "device",
    "F",
    "forward",
    "backward",
    "ranges",
    "region",
    "held",
    "low",
    "high",
}
_UNSAFE = re.compile(r"[^A-Za-z0-9_]")


class PythonNames:
    """One name for each value; never a keyword, a builtin or a name that emitted code uses
    itself.
    """

    def __init__(self, reserved: frozenset[str] = frozenset()) -> None:
        self._names: dict[Value, str] = {}
        self.values: dict[str, Value] = {}  # the value that a name was first given to
        self._taken = RESERVED | reserved

    def add(self, value: Value) -> str:
        """The value's name; made at the first call."""
        if value not in self._names:
            self.alias(value, self.fresh(value.hint))
        return self._names[value]

    def fresh(self, hint: str) -> str:
        """A new name close to ``hint``."""
        base = _UNSAFE.sub("_", hint).strip("_") or "value"
        base = f"v{base}" if base[0].isdigit() else base
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def alias(self, value: Value, name: str) -> None:
        """Give a value a name that is already in use for the same thing."""
        self._names[value] = name
        self.values.setdefault(name, value)

    def __getitem__(self, value: Value) -> str:
        return self._names[value]

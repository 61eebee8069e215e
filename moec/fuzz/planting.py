"""Planting a fault: one module of the compiler is loaded with a line of its source changed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """A line of a module's source and what it becomes; words that bisection must print of it.

    ``source`` is the file below the project's root; ``target`` is what must be emitted to see it.
    """

    name: str
    source: str
    old: str
    new: str
    named: tuple[str, ...]
    target: str = "aten"

    @property
    def module(self) -> str:
        """The module's name."""
        path = self.source.removesuffix(".py").removesuffix("/__init__")
        inside = path if path.startswith("moec/") else f"moec/{path}"
        return inside.replace("/", ".")

    def planted(self, text: str) -> str:
        """The module's source with the fault.

        Raises:
            ValueError: the line is not there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"fault {self.name}: its line is in {self.source} {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module's source with a fault in it, past every cache of compiled code."""

    def __init__(self, name: str, path: str, fault: Fault) -> None:
        super().__init__(name, path)
        self.fault = fault

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        path = self.get_filename(fullname)
        text = Path(path).read_text(encoding="utf-8")
        return compile(self.fault.planted(text), path, "exec")


class Planter(importlib.abc.MetaPathFinder):
    """Finds the fault's module, and nothing else."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the fault's module, with a loader that plants it."""
        if name != self.fault.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.fault)
        return spec


def plant(fault: Fault) -> None:
    """Make this process load a module with a fault; it must not have been loaded yet.

    Raises:
        RuntimeError: it was.
    """
    if fault.module in sys.modules:
        raise RuntimeError(f"{fault.module} is loaded already; plant faults first")
    sys.meta_path.insert(0, Planter(fault))


__all__ = ["ROOT", "Fault", "plant"]

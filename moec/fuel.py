"""Fuel: a budget of rewrites, so that bisection can stop a pass in the middle.

Every rewrite asks :func:`spend` first. Without a limit the answer is always yes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Fuel:
    """How many rewrites are still allowed (``None``: any number) and what was rewritten so far."""

    left: int | None = None
    spent: list[str] = field(default_factory=list)


_FUEL: ContextVar[Fuel | None] = ContextVar("moec_fuel", default=None)


def spend(what: str) -> bool:
    """Whether one more rewrite is allowed; ``what`` names it in the record."""
    fuel = _FUEL.get()
    if fuel is None:
        return True
    if fuel.left is not None:
        if fuel.left <= 0:
            return False
        fuel.left -= 1
    fuel.spent.append(what)
    return True


@contextlib.contextmanager
def limit(amount: int | None) -> Iterator[Fuel]:
    """Count the rewrites made inside, and allow no more than ``amount``."""
    fuel = Fuel(amount)
    token = _FUEL.set(fuel)
    try:
        yield fuel
    finally:
        _FUEL.reset(token)


def current() -> Fuel | None:
    """The fuel in force, if any."""
    return _FUEL.get()

"""The memory budget as users give it."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moec.budget.scope import Budget
from moec.byte_sizes import parse_bytes
from moec.errors import CompileError, PlanError

# The options that go with a budget
NAMES = ("reserve", "plan_seconds", "fuse_groups", "rates", "count_others", "gradients_of")
GRADIENTS_OF = ("loss", "all")


def read_budget(given: Any, options: dict[str, Any]) -> Budget | None:
    """The budget of a call of :func:`moec.compile`; takes its options out of ``options``.

    Raises:
        CompileError: it is no size, or an option is there without it.
    """
    taken = {name: options.pop(name, None) for name in NAMES}
    reserve, seconds, fuse, rates, others, wanted = taken.values()
    if given is None:
        for name, value in taken.items():
            if value is not None:
                raise CompileError(f"option {name!r} goes with memory_budget, which is not given")
        return None
    missing = [name for name in ("numba", "ortools") if find_spec(name) is None]
    if missing:
        raise CompileError(f"memory_budget needs {' and '.join(missing)}: pip install moec[plan]")
    if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0):
        raise CompileError(f"option 'plan_seconds' is a number of seconds, got {seconds!r}")
    for name in ("fuse_groups", "count_others"):
        if not isinstance(taken[name], bool | None):
            raise CompileError(f"option {name!r} is true or false, got {taken[name]!r}")
    if rates is not None and (not isinstance(rates, str | os.PathLike) or not str(rates)):
        raise CompileError(f"option 'rates' is the path of a file, got {rates!r}")
    if wanted not in (None, *GRADIENTS_OF):
        raise CompileError(f"option 'gradients_of' is 'loss' or 'all', got {wanted!r}")
    found = Budget(
        _bytes("memory_budget", given),
        _bytes("option 'reserve'", reserve or 0),
        fuse=fuse,
        rates=None if rates is None else str(Path(rates).absolute()),
        count_others=others is not False,
        loss_alone=wanted != "all",
    )
    return found if seconds is None else replace(found, seconds=float(seconds))


def _bytes(what: str, given: Any) -> int:
    text = given if isinstance(given, str) else None
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    try:
        if text is not None:
            return parse_bytes(text)
    except PlanError as error:
        raise CompileError(f"{what}: {error}") from error
    raise CompileError(f"{what} is bytes, or a size such as '40GiB'; got {given!r}")


__all__ = ["read_budget"]

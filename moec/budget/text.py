"""Plans of steps in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moec.errors import BudgetError
from moec.plan import Plan

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def shown_bytes(size: int) -> str:
    """A size as people read it: "512 bytes", "1.50 GiB"."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {_UNITS[unit]}" if unit else f"{size} bytes"


def plan_lines(plan: Plan, sizes: Mapping[str, int], unplanned: int) -> Iterator[str]:
    """A plan in two lines: for which sizes, its peak, and what it costs."""
    dims = ", ".join(f"{name} <= {size}" for name, size in sizes.items()) or "one size"
    yield (
        f"    {dims}: peak {shown_bytes(plan.peak)} (without a plan {shown_bytes(unplanned)}),"
        f" extra time {plan.extra:.2f}%"
    )
    bound = "the least possible" if plan.is_optimal else f"at most {plan.gap:.2f} points too much"
    repeated = len(plan.sequence) - len(set(plan.sequence))
    yield f"    {repeated} of {len(set(plan.sequence))} operations run again; {bound}"


def for_sizes(
    error: BudgetError, sizes: Mapping[str, int], relation: str, resident: int
) -> BudgetError:
    """An error of the planner with what it is for: these sizes, which routing, and the bytes that
    are there all the time.
    """
    shown = ", ".join(f"{name} {relation} {size}" for name, size in sizes.items())
    text = (
        f"{error}\nThis is for {shown or 'these sizes'} and the worst routing; parameters, inputs"
        f" and what is held in reserve are {resident} bytes of it."
    )
    return BudgetError(text, error.least_known, error.least_possible, error.sequence)


__all__ = ["for_sizes", "plan_lines", "shown_bytes"]

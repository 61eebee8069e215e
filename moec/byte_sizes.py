"""Numbers of bytes as users write them."""

from __future__ import annotations

from moec.errors import PlanError

_UNITS = {
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "": 1,
}


def split_unit(text: str) -> tuple[float, str]:
    """A number and the unit after it, in capitals; :class:`PlanError` without a number."""
    number = text.strip().upper()
    unit = number.lstrip("0123456789.")
    try:
        return float(number.removesuffix(unit) if unit else number), unit.strip()
    except ValueError:
        raise PlanError(f"{text!r} is no size: expected bytes, or a size such as 40GiB") from None


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "123", "40GiB" or "1.5GB"; :class:`PlanError` if it is none."""
    value, unit = split_unit(text)
    if unit not in _UNITS:
        raise PlanError(f"{text!r}: unknown unit {unit!r}; use one of B, KiB, MiB, GiB, TiB")
    return int(value * _UNITS[unit])


__all__ = ["parse_bytes", "split_unit"]

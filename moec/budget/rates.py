"""What a device does in a second: the rates from which the times of a step are modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Kinds of work that count floating-point operations, each with a rate for a dtype of its operands
PRODUCTS, GROUPED = "products", "grouped"
ATTENTION, ATTENTION_BACKWARD = "attention", "attention_backward"
WORK = (PRODUCTS, GROUPED, ATTENTION, ATTENTION_BACKWARD)


@dataclass(frozen=True)
class Rates:
    """The rates of a device.

    ``products``, ``grouped`` (of experts), ``attention`` and ``attention_backward``:
    floating-point operations a second by dtype ("bf16"); ``bytes``: read and written a second;
    ``launch``: seconds that one more kernel takes at least.
    """

    products: Mapping[str, float]
    grouped: Mapping[str, float]
    attention: Mapping[str, float]
    attention_backward: Mapping[str, float]
    bytes: float
    launch: float

    def of(self, work: str, dtype: str) -> float:
        """The rate of a kind of work; without one for the dtype that of products, or of the
        slowest of these.
        """
        own: Mapping[str, float] = getattr(self, work)
        return own.get(dtype) or self.products.get(dtype) or min(self.products.values())

    def seconds(self, computing: float, moved: float) -> float:
        """The time of one kernel, which waits for the slower of the two: ``computing`` seconds, or
        ``moved`` bytes.
        """
        return self.launch + max(computing, moved / self.bytes)


def _guessed(flops: Mapping[str, float], moved: float, launch: float) -> Rates:
    """One rate for all kinds of work."""
    return Rates(flops, flops, flops, flops, moved, launch)


# Guesses, until `moec calibrate` has measured: of an H100 what large products in half precision and
# copies may reach, a tenth of it where tensor cores do not help; of a CPU, of a few cores.
RATES = {
    "cuda": _guessed({"bf16": 6e14, "f16": 6e14, "f32": 6e13, "f64": 6e13}, 2.7e12, 4e-6),
    "cpu": _guessed({"bf16": 1e11, "f16": 1e11, "f32": 1e11, "f64": 5e10}, 2e10, 4e-6),
}


__all__ = [
    "ATTENTION",
    "ATTENTION_BACKWARD",
    "GROUPED",
    "PRODUCTS",
    "RATES",
    "WORK",
    "Rates",
]

"""Times of calls, measured in turns, and whether one call is slower than another beyond noise.

Calls take turns, so that what a machine does beside them (other processes, its clock) falls on all
alike. Two calls are compared turn by turn; the bound on the median of the differences comes from
their order alone (the interval of the sign test), so it needs no assumption about the noise.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

# Rounds, where no number is asked for: as many as fit into some seconds, between these two.
_LEAST_ROUNDS, _MOST_ROUNDS = 15, 61
_SECONDS = 6.0
# A change below it is not worth a name, however certain it is.
LEAST_CHANGE = 0.03
# The chance that noise alone moves the bound past zero, for one comparison.
_CHANCE = 0.005
# A sample of a call on the CPU lasts at least so long (the clock and its call cost some 0.1 us).
_SAMPLE_MS = 0.5
_MOST_CALLS = 100
_WARM_UP = 2


@dataclass(frozen=True)
class Change:
    """The times of two calls, and how they differ: milliseconds, median and its bounds."""

    before: float
    after: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """How much more time the second takes, as a share of the first's."""
        return self.increase / self.before if self.before else 0.0

    @property
    def increase(self) -> float:
        """How many milliseconds more the second takes."""
        return self.after - self.before

    @property
    def noise(self) -> float:
        """The larger distance of a bound from the median difference, as a share of the first."""
        gap = max(self.high - self.increase, self.increase - self.low, 0.0)
        return gap / self.before if self.before else 0.0

    @property
    def is_slower(self) -> bool:
        """Whether the second takes longer, beyond noise and by more than ``LEAST_CHANGE``."""
        return self.low > 0 and self.increase > LEAST_CHANGE * self.before

    def __str__(self) -> str:
        words = f"{self.before:.3f} -> {self.after:.3f} ms"
        return f"{words}, {self.ratio:+.1%} (noise {self.noise:.1%})"


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Compare samples that were taken in the same turns."""
    differences = sorted(b - a for a, b in zip(before, after, strict=True))
    place = _place(len(differences))
    middle = statistics.median(before)
    return Change(
        middle,
        middle + statistics.median(differences),
        differences[place],
        differences[len(differences) - 1 - place],
    )


def _place(count: int) -> int:
    """The order statistic below which the median lies with at most half of ``_CHANCE``."""
    total, place = 0.0, 0
    for k in range(count // 2):
        total += math.comb(count, k) / 2**count
        if total > _CHANCE / 2:
            break
        place = k
    return place


def in_turns(
    calls: Sequence[Call], device: torch.device, rounds: int | None = None
) -> list[list[float]]:
    """Milliseconds of each call, one sample a round; the calls take turns."""
    clock = _Gpu(device) if device.type == "cuda" else _Cpu()
    counts = [clock.prepare(call) for call in calls]
    turns = list(zip(calls, counts, strict=True))
    start = time.perf_counter()
    samples = [[clock.sample(call, count)] for call, count in turns]
    for _ in range((rounds or _rounds(time.perf_counter() - start)) - 1):
        for (call, count), found in zip(turns, samples, strict=True):
            found.append(clock.sample(call, count))
    return samples


def _rounds(seconds: float) -> int:
    """How many rounds to make if one takes so long."""
    return min(max(int(_SECONDS / max(seconds, 1e-6)), _LEAST_ROUNDS), _MOST_ROUNDS)


class _Cpu:
    """Time on the CPU; see :func:`cpu_seconds`."""

    def prepare(self, call: Call) -> int:
        """Warm up; how often a sample calls, so that it lasts long enough to be read."""
        for _ in range(_WARM_UP):
            took = self.sample(call, 1)
        return min(max(math.ceil(_SAMPLE_MS / max(took, 1e-6)), 1), _MOST_CALLS)

    def sample(self, call: Call, count: int) -> float:
        start = cpu_seconds()
        for _ in range(count):
            call()
        return 1e3 * (cpu_seconds() - start) / count


class _Gpu:
    """Time between two events, each call with a cold L2 cache and an idle GPU before it."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def prepare(self, call: Call) -> int:
        """Compile and warm up."""
        for _ in range(_WARM_UP):
            call()
        torch.cuda.synchronize()
        return 1

    def sample(self, call: Call, count: int) -> float:
        self.flush.zero_()
        before, after = event(), event()
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))


def cpu_seconds() -> float:
    """A clock for work on the CPU: of a single thread its own time, which other processes do not
    disturb; of several the time on the wall, since no user waits for their sum.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def event() -> Any:
    """A CUDA event that has a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


__all__ = ["LEAST_CHANGE", "Change", "change", "cpu_seconds", "event", "in_turns"]

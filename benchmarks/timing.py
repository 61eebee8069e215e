"""Median times of single calls, on the GPU by events and on the CPU by the clock."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Larger than the L2 cache of any GPU so far (H100 and H200: 50 MB; B200: 126 MB).
FLUSH_BYTES = 256 * 2**20


class Stopwatch:
    """Times calls on one device, each with a cold L2 cache."""

    def __init__(self, device: str, repeats: int, warm_up: int = 5) -> None:
        self.device = device
        self.repeats = repeats
        self.warm_up = warm_up
        size = FLUSH_BYTES if device == "cuda" else 0
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def median_ms(
        self, call: Callable[[int], object], prepare: Callable[[], object] = lambda: None
    ) -> float:
        """The median of `repeats` calls in milliseconds; `call` gets the number of its turn.

        `prepare` runs before each call, outside the time.
        """
        times = []
        for turn in range(-self.warm_up, self.repeats):
            prepare()
            elapsed = self.once(functools.partial(call, turn))
            if turn >= 0:
                times.append(elapsed)
        return statistics.median(times)

    def once(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

"""What a call really allocates on the CPU, from the events of PyTorch's own allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

_EVENT = "[memory]"


@dataclass(frozen=True)
class Tracked:
    """The allocations (above 0) and releases (below) of a call, in order, in bytes; its result."""

    changes: Sequence[int]
    result: Any

    def peak(self, granule: int = 1) -> int:
        """The most that was held at once beyond what was held before, each allocation rounded up to
        a multiple of ``granule``.
        """
        return max(accumulate(self._rounded(granule), initial=0))

    def held(self, granule: int = 1) -> int:
        """What is still held when the call has returned, its result among it."""
        return sum(self._rounded(granule))

    def _rounded(self, granule: int) -> Iterator[int]:
        for change in self.changes:
            size = -(-abs(change) // granule) * granule
            yield size if change > 0 else -size


def track(call: Callable[[], Any]) -> Tracked:
    """Run a call and note what it allocates on the CPU, inside PyTorch's kernels too.

    Tensors that were there before must be kept by the caller, or their release counts.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events: Any = profiler.profiler
    found = (e for e in events.kineto_results.events() if e.name() == _EVENT)
    return Tracked([e.nbytes() for e in found], result)


__all__ = ["Tracked", "track"]

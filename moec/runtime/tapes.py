"""The recordings of an artifact's calls, and when a call may be repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.runtime.tape import Tape, record


class Tapes:
    """The recordings of one artifact's calls, by sizes and stream; each thread has its own.

    ``varying`` are the inputs whose sizes differ between calls. With ``large``, the bytes from
    which buffers are taken anew in every call, a size is recorded when it comes a second time.
    """

    def __init__(self, varying: Sequence[int], most: int = 256, large: int | None = None) -> None:
        self.varying, self.most, self.large = tuple(varying), most, large
        self._kept, self._seen = threading.local(), threading.local()

    def call(
        self, forward: Callable[..., Any], inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs of a call on a GPU, by its recording or by one made now; ``None`` if it has
        to be made as always.
        """
        x = inputs[0]
        if not may_repeat(x):
            return None
        kept: dict[Any, Tape | None] = self._kept.__dict__
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        key = stream, *[tuple(inputs[i].shape) for i in self.varying]
        if key in kept:
            tape = kept[key]
            return None if tape is None else tape(inputs)
        if self.large is not None and self._is_new(key):
            return None
        if len(kept) >= self.most:
            kept.clear()
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            outputs, kept[key] = record(forward, inputs, self.large)
        return outputs

    def _is_new(self, key: Any) -> bool:
        """Whether sizes come for the first time."""
        seen: set[Any] = self._seen.__dict__.setdefault("sizes", set())
        if key in seen:
            seen.discard(key)
            return False
        if len(seen) >= self.most:
            seen.clear()
        seen.add(key)
        return True

    def known(self, x: torch.Tensor, size: tuple[int, ...]) -> Tape | None:
        """The recording of calls with tokens of a size alone, if there is one that may be used."""
        if not may_repeat(x):
            return None
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        kept: dict[Any, Tape | None] = self._kept.__dict__
        return kept.get((stream, size))


def may_repeat(x: torch.Tensor) -> bool:
    """Whether a call is on the current GPU, and not part of a CUDA graph: that is replayed on any
    stream, so its buffers must be its own.
    """
    return (
        x.is_cuda
        and torch._C._cuda_getDevice() == x.get_device()
        and not torch._C._cuda_isCurrentStreamCapturing()
        and torch._C._len_torch_function_stack() == 0
    )


__all__ = ["Tapes", "may_repeat"]

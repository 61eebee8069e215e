"""What token rounding changes: the share of the choices, and the rows that tiles are padded by.

with moec.token_rounding.watch() as seen:
    compiled(**batch)
print(*seen, sep="\\n")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_SEEN: ContextVar[list[Effect] | None] = ContextVar("_SEEN", default=None)


@dataclass(frozen=True)
class Effect:
    """One routing before and after: expert indices ``[T, K]``, where ``experts`` is no expert.

    ``tile`` is the number of rows that are worked on at a time, for one expert.
    """

    before: torch.Tensor
    after: torch.Tensor
    experts: int
    tile: int

    @property
    def changed(self) -> float:
        """The share of the choices that name another expert."""
        return int((self.before != self.after).sum()) / max(self.before.numel(), 1)

    @property
    def padded_before(self) -> int:
        """The rows that fill the experts' last tiles, as the router chose."""
        return self._padded(self.before)

    @property
    def padded_after(self) -> int:
        """The same after rounding."""
        return self._padded(self.after)

    def _padded(self, index: torch.Tensor) -> int:
        named = index[(index >= 0) & (index < self.experts)].long()
        counts = torch.bincount(named, minlength=self.experts)
        return int((-counts % self.tile).sum())

    def __str__(self) -> str:
        tokens, choices = self.before.shape
        return (
            f"{tokens} tokens, {choices} of {self.experts} experts each, tiles of {self.tile}: "
            f"{self.changed:.2%} of the choices changed, padded rows {self.padded_before} -> "
            f"{self.padded_after}"
        )


@contextlib.contextmanager
def watch() -> Iterator[list[Effect]]:
    """The effect of each rounding that runs inside, in order; looking at one waits for the GPU.

    Each keeps the indices before and after: two numbers a choice.
    """
    token = _SEEN.set([])
    try:
        seen = _SEEN.get()
        yield seen if seen is not None else []
    finally:
        _SEEN.reset(token)


def note(before: torch.Tensor, after: torch.Tensor, experts: int, tile: int) -> None:
    """Add a rounding to what is watched, if anything is."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append(Effect(before, after, experts, tile))


__all__ = ["Effect", "note", "watch"]

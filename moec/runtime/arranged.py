"""A recorded call as few pieces: launches together, memory taken and given back in between.

Memory is given back at the latest before more is taken, so no more is held at any time than in the
call that was recorded; until then launches stay together in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.runtime.recording import Buffer, Described, Slot, Step, bytes_of


@dataclass(frozen=True)
class Take:
    """Memory for a buffer, in bytes."""

    slot: int
    size: int


@dataclass(frozen=True)
class Give:
    """A buffer's memory, or an operation's result, that nothing needs any more."""

    slot: int


@dataclass(frozen=True)
class Make:
    """A result of the whole call, made in its turn."""

    slot: int


@dataclass(frozen=True)
class Call:
    """An operation of PyTorch; ``places`` are where its results go."""

    func: Callable[..., Any]
    given: Any
    places: Sequence[int]


@dataclass(frozen=True)
class Launches:
    """Launches, one after the other."""

    steps: Sequence[Step]


Item = Take | Give | Make | Call | Launches


@dataclass
class _Pieces:
    items: list[Item] = field(default_factory=list)
    launches: list[Step] = field(default_factory=list)
    over: list[Give] = field(default_factory=list)

    def launch(self, step: Step) -> None:
        self.launches.append(step)

    def give(self, slot: int) -> None:
        self.over.append(Give(slot))

    def make(self, item: Take | Make) -> None:
        """Ahead of the launches that are together now, unless something is over by then."""
        if self.over:
            self.close()
        self.items.append(item)

    def call(self, item: Call) -> None:
        self.close()
        self.items.append(item)

    def close(self) -> None:
        if self.launches:
            self.items.append(Launches(tuple(self.launches)))
        self.items += self.over
        self.launches, self.over = [], []


def arranged(
    steps: Sequence[Step],
    taken: Sequence[Buffer] = (),
    late: Collection[int] = (),
    dropped: Collection[int] = (),
) -> list[Item]:
    """What a call does, in order. ``taken`` are buffers with memory of their own in each call,
    ``late`` results that are made in their turn, ``dropped`` what operations make that is given up
    when nothing needs it any more.
    """
    pieces, sizes = _Pieces(), {b.slot: bytes_of(b) for b in taken}
    ends = _ends(steps, {*sizes, *dropped})
    for number, step in enumerate(steps):
        kind, what, given, more = step
        if kind == "launch":
            pieces.launch(step)
        elif kind == "call":
            pieces.call(Call(what, given, more))
        elif what in sizes:
            pieces.make(Take(what, sizes[what]))
        elif what in late:
            pieces.make(Make(what))
        for slot in ends.get(number, ()):
            pieces.give(slot)
    pieces.close()
    return pieces.items


def _ends(steps: Sequence[Step], slots: Collection[int]) -> dict[int, list[int]]:
    """Which of the slots nothing needs any more after each step."""
    last: dict[int, int] = {}
    for number, (kind, what, given, more) in enumerate(steps):
        used = {"empty": [what], "launch": _slots(more), "call": _slots(given)}[kind]
        used += more if kind == "call" else []
        last.update(dict.fromkeys(used, number))
    ends: dict[int, list[int]] = {}
    for slot, number in last.items():
        if slot in slots:
            ends.setdefault(number, []).append(slot)
    return ends


def _slots(value: Any) -> list[int]:
    """The slots in a structure of arguments."""
    if isinstance(value, Slot | Described):
        return [value.place]
    if isinstance(value, dict):
        return [slot for v in value.values() for slot in _slots(v)]
    if isinstance(value, list | tuple):
        return [slot for v in value for slot in _slots(v)]
    return []


__all__ = ["Call", "Give", "Item", "Launches", "Make", "Take", "arranged"]

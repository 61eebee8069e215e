"""What an emitted program holds: buffers, and the names that refer to them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from moec.ir.dims import Dim, canon, ceildiv
from moec.ir.graph import Op
from moec.ir.prove import divisible
from moec.ir.types import Type

# An allocation takes a multiple of so many bytes: of PyTorch's caching allocator for CUDA, and of
# its allocator for the CPU, which aligns.
GRANULES = {"triton": 512, "aten": 64}


class Layout(enum.Enum):
    """How the elements of a tensor lie in its buffer: row by row without gaps, with gaps, or in
    another order.
    """

    ROWS = 0
    GAPS = 1
    OTHER = 2


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that the program asks for at once, for a tensor of ``type``.

    ``name`` is the one in the emitted program, ``op`` the op whose lines ask for it.
    """

    name: str
    type: Type
    op: Op | None = None

    @property
    def bytes(self) -> Dim:
        """What is asked for."""
        return self.type.bytes


@dataclass(frozen=True)
class Held:
    """What a name refers to: the buffers that it keeps, and how its elements lie there."""

    buffers: frozenset[Buffer] = field(default=frozenset())
    layout: Layout = Layout.ROWS


@dataclass(frozen=True, eq=False)
class Moment:
    """What is held while one allocation of the program is made, that one included.

    ``scratch`` is what a PyTorch expression holds besides its results while it runs, in bytes.
    """

    op: Op | None
    live: frozenset[Buffer]
    scratch: Dim = 0
    is_backward: bool = False

    @property
    def sizes(self) -> list[Dim]:
        """The allocations, in bytes as asked for."""
        return [*(b.bytes for b in self.live), *([self.scratch] if self.scratch else [])]

    def with_buffers(self, buffers: Iterable[Buffer]) -> Moment:
        """The same with further buffers, held all the time."""
        return Moment(self.op, self.live | frozenset(buffers), self.scratch, self.is_backward)


def rounded(size: Dim, granule: int) -> Dim:
    """What an allocation of ``size`` bytes takes."""
    return size if divisible(size, granule) else canon(granule * ceildiv(size, granule))


__all__ = ["GRANULES", "Buffer", "Held", "Layout", "Moment", "rounded"]

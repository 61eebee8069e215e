"""What a kernel rests on: how wide an index must be, which masks it needs, what divides what.

A kernel asks here, and the answer is a proof over the declared ranges and what the kernel has asked
for so far. What it asks for and nobody can prove, :func:`moec.codegen.requirements.emit_checks`
has ``forward`` check. Every answer comes with the words of a comment for the emitted code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from moec.codegen.requirements import WORD, Requirement, asked_by, from_zero, power
from moec.ir.dims import Dim, Range, canon, floordiv, show_dim, symbols
from moec.ir.graph import Op, Value
from moec.ir.prove import AtMost, bounds, divisible, narrowed, prove_at_most
from moec.ir.types import SIZES
from moec.runtime.guards import MOST_PROCESSORS

# A row's number, the sum of two of them and a tile fit into 32 bits; the copy engine's descriptors
# of ragged rows need it, too.
MOST_ROWS = 2**30 - 2**16
MOST_STRIDE = 2**40 - 1  # bytes, in the copy engine's descriptors
SPREAD = 2048  # columns of tokens that one program copies
GROUP = 8  # row tiles that share the columns of weights they read, unless tuning says otherwise
MOST_GROUP = 64  # that it may say
MOST_ACROSS = 2**16 - 1  # programs along any but the first axis of a grid


class Unsupported(Exception):
    """A body that a template cannot express; the op's body runs as PyTorch expressions instead."""


@dataclass
class Facts:
    """The questions of one kernel, and what their answers ask of sizes."""

    op: Op
    declared: Mapping[str, Range]
    required: list[Requirement] = field(default_factory=list)
    checked: list[AtMost] = field(default_factory=list)  # of these, what the ranges do not prove
    limits: list[str] = field(default_factory=list)  # lines for the kernel's docstring

    @classmethod
    def of(cls, op: Op) -> Facts:
        """Those of the kernel of an op with a body."""
        return cls(op, op.body.ranges if op.body is not None else {})

    @property
    def ranges(self) -> Mapping[str, Range]:
        """The declared ranges as far as ``forward`` checks them."""
        return from_zero(self.declared)

    @property
    def known(self) -> Mapping[str, Range]:
        """The ranges in which the kernel runs."""
        return narrowed(self.ranges, self.checked)

    # limits
    def at_most(self, value: Dim, limit: int, why: str) -> str:
        """Require ``value <= limit``; a comment that says who sees to it.

        Raises:
            Unsupported: no size in the ranges meets it.
        """
        value = canon(value)
        proved = prove_at_most(value, limit, self.ranges, self.checked)
        if not proved and prove_at_most(value, limit, self.declared) is False:
            raise Unsupported(f"{why}: {show_dim(value)} is above {power(limit)}")
        self.required.append(Requirement(value, limit, asked_by(self.op, why)))
        fact = f"{show_dim(value)} <= {power(limit)}"
        if proved:
            return fact + self._where(value)
        self.checked.append(AtMost(value, limit))
        return f"{fact}, checked by forward"

    def limit(self, value: Dim, limit: int, why: str) -> None:
        """As :meth:`at_most`, with a line in the kernel's docstring."""
        line = f"{why}: {self.at_most(value, limit, why)}"
        if symbols(value) and line not in self.limits:
            self.limits.append(line)

    def rows(self, rows: Dim) -> None:
        """Require that there are not too many rows to number and add their numbers."""
        self.limit(rows, MOST_ROWS, "rows in 32 bits")

    def word(self, value: Dim, why: str) -> str:
        """Require that ``value`` fits into 32 bits."""
        return f"32-bit: {self.at_most(value, WORD, why)}"

    def _where(self, value: Dim) -> str:
        """The sizes for which a fact about ``value`` was proved."""
        highs = {n: self.known.get(n, (0, None))[1] for n in sorted(symbols(value))}
        return f" where {', '.join(f'{n} <= {h}' for n, h in highs.items())}" if highs else ""

    # widths
    def widened(self, text: str, most: Dim, dtype: str = "tl.int64") -> tuple[str, str]:
        """``text`` in the width that ``most``, the most that is computed from it, needs; and why
        so.
        """
        most = canon(most)
        if prove_at_most(most, WORD, self.ranges, self.checked):
            return text, self.word(most, "indices of 32 bits")
        high = bounds(most, self.known)[1]
        reach = "has no bound" if high is None else f"can reach 2^{high.bit_length() - 1}"
        return f"{text}.to({dtype})", f"64-bit: {show_dim(most)} {reach}"

    # what several kernels ask for
    def row_tiles(self, rows: Dim, experts: int, block: int, numbers: int = 2) -> None:
        """What listing the row tiles needs: 128 at a time, so many numbers of each."""
        self.rows(rows)
        tiles = tile_bound(rows, experts, block)
        self.word(rows + 129 * block, "first rows of tiles")
        past = MOST_PROCESSORS + MOST_GROUP if numbers == 3 else 0  # looked up ahead, and not read
        self.word(numbers * (tiles + 129 + past), "places in the list of row tiles")

    def pieces(self, pieces: Dim) -> None:
        """What programs need that take one piece of work after the other."""
        self.limit(pieces + MOST_PROCESSORS, WORD, "pieces of work in 32 bits")

    def programs(self, programs: Dim) -> None:
        """What a grid needs along its first axis."""
        self.limit(programs, WORD, "programs")

    def spread(self, tokens: Value) -> None:
        """What copying tokens to their rows needs."""
        self.programs(tokens.type.shape[0])
        self.columns(int(tokens.type.shape[1]), SPREAD)

    def copied(self, matrices: Value, elements: int) -> None:
        """What descriptors of one matrix an expert need."""
        size = elements * SIZES[matrices.type.dtype]
        self.at_most(size, MOST_STRIDE, "bytes from one expert's matrix to the next")
        self.word(matrices.type.shape[0] * sum(matrices.type.shape[1:]), "rows of all experts")

    def columns(self, columns: int, block: int) -> None:
        """What a grid needs whose second axis goes along columns."""
        self.at_most(-(-columns // block), MOST_ACROSS, "programs along the columns")

    # masks and alignment
    def divides(self, by: int, value: Dim) -> str:
        """A comment if a multiple of ``by`` needs no mask; empty if it needs one."""
        return f"no mask: {by} divides {show_dim(value)}" if divisible(value, by) else ""

    def aligned(self, *sizes: int) -> str:
        """The docstring's line on rows that the copy engine moves; sizes are in bytes.

        Raises:
            Unsupported: a row is not known to begin where 16 bytes do.
        """
        wrong = [s for s in sizes if not divisible(s, 16)]
        if wrong:
            raise Unsupported("rows that are no multiple of 16 bytes")
        return f"copied by the copy engine: 16 divides rows of {_listed(sizes)} bytes"


@functools.lru_cache(maxsize=1024)  # sympy is slow to make a minimum
def tile_bound(rows: Dim, experts: int, block: int) -> Dim:
    """The most tiles of ``block`` rows that the rows of all experts can need, however they fall;
    see :func:`moec.runtime.launch.row_tile_bound`.
    """
    return floordiv(rows + sympy.Min(experts, rows) * (block - 1), block)


def _listed(numbers: tuple[int, ...]) -> str:
    *head, last = map(str, sorted(set(numbers)))
    return f"{', '.join(head)} and {last}" if head else last

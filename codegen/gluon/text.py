"""Writing Gluon functions, and what their templates share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moec.codegen.names import PythonNames
from moec.codegen.triton import source
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import KernelText, Parameter
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.writer import Writer

STAGES = 4
SLOTS = 2  # results of a group on their way to memory: all that the stages leave room for
REGISTERS = 168  # a thread's, on average over the three groups of warps
MULTIPLYING, COPYING, ISSUING = 232, 40, 24  # a thread's, by what its warp does
LANES = "gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])"  # 16 bytes a thread
MATRIX = "gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
_LOCALS = frozenset(
    "acc left right ready empty slots turn work pieces tiles m n expert row end filled taken "
    "stage live lanes slot depth pair at column here inside tall narrow count c k start size "
    "next_m next_n next_expert next_row next_end next_work block_1 block_2 block_3 gl gluon tma "
    "mbarrier copy_block copy_rows store_block arrive_copied see_as fence_async_shared form".split()
)
IMPORTS = (
    "from triton.experimental import gluon",
    "from triton.experimental.gluon import language as gl",
    "from triton.experimental.gluon.language.nvidia.hopper import (",
    "    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,",
    ")",
    "",
    "from moec.runtime.gluon import arrive_copied, copy_block, copy_rows, see_as, store_block",
)


def gluon_text(dtype: str, facts: Facts, free: Sequence[str] = ()) -> KernelText:
    """A function under construction, whose values get no name that the templates use."""
    taken = (_LOCALS | source.names() | {"launch"}) - set(free)
    return KernelText(dtype, facts, PythonNames(taken))


def define(
    writer: Writer,
    name: str,
    parameters: Sequence[str],
    docs: Sequence[str],
    body: Sequence[str],
    *,
    launched: bool = False,
) -> None:
    """Write a function."""
    writer.lines("", "", *(["@launch.Kernel"] if launched else []), "@gluon.jit")
    with writer.block("\n".join(wrapped(f"def {name}({', '.join(parameters)}):", WIDTH))):
        if len(docs) == 1:
            writer.line(f'"""{docs[0]}"""')
        else:
            writer.lines(f'"""{docs[0]}', *docs[1:], '"""')
        writer.lines(*body)


def partition(writer: Writer, name: str, values: Sequence[str]) -> None:
    """One group of warps in a ``warp_specialize``: its function and arguments."""
    inner = f"({', '.join(values)})"
    if len(name) + len(inner) + 16 <= WIDTH:
        writer.line(f"({name}, {inner}),")
        return
    with writer.block("("):
        writer.line(f"{name},")
        with writer.block("("):
            writer.lines(*rows_of_items(values, WIDTH - 24))
        writer.line("),")
    writer.line("),")


def rows_of_items(values: Sequence[str], width: int) -> list[str]:
    """Items, as many on a line as fit."""
    lines = [""]
    for value in values:
        if lines[-1] and len(lines[-1]) + len(value) + 2 > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{value},"
    return lines


def used(parameters: Sequence[Parameter], lines: Sequence[str]) -> list[str]:
    """The names of the parameters that occur in the lines."""
    words = set(re.findall(r"\w+", "\n".join(lines)))
    return [q.name for q in parameters if q.name in words]

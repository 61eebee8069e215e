# mypy: ignore-errors
"""Device functions of the Gluon kernels, copied as text into the emitted modules, as those of
:mod:`moec.codegen.triton.library` are.

A *stage* is a piece of shared memory that holds the matrices of one step. ``ready`` and ``empty``
are its barriers; ``filled`` and ``taken`` count stages from the program's start, so that the count
says which stage comes next and in which phase its barriers are.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moec.codegen.triton.library import RAGGED
from moec.runtime import launch
from moec.runtime.gluon import copy_block, see_as, store_block


@launch.Kernel
@triton.jit
def list_row_places(offsets, places, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The row tiles of one expert a program: places[0] is their number, then (expert, row, end)."""
    me = tl.program_id(0)
    expert = tl.arange(0, EP)
    first = tl.load(offsets + expert, mask=expert < E, other=0)
    size = tl.load(offsets + expert + 1, mask=expert < E, other=0) - first
    count = (size + BM - 1) // BM
    before = tl.sum(tl.where(expert < me, count, 0), 0)
    mine = tl.sum(tl.where(expert == me, count, 0), 0)
    row = tl.load(offsets + me)
    end = tl.load(offsets + me + 1)
    for j in range(0, mine, 128):
        t = j + tl.arange(0, 128)
        entry = places + 3 * (before + t)
        tl.store(entry + 1, me + t * 0, mask=t < mine)
        tl.store(entry + 2, row + t * BM, mask=t < mine)
        tl.store(entry + 3, end + t * 0, mask=t < mine)
    if me == E - 1:
        tl.store(places, before + mine)


@gluon.jit
def sigmoid(x):
    """In two instructions of the special unit: what underflows there is below bf16's range too."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
        "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def row_place(places, m, live):
    """Expert, first row and end of a row tile; zeros past the list."""
    at = places + 3 * m
    expert = gl.load(at + 1, mask=live, other=0)
    return expert, gl.load(at + 2, mask=live, other=0), gl.load(at + 3, mask=live, other=0)


@gluon.jit
def barriers(ARRIVALS: gl.constexpr, STAGES: gl.constexpr):
    """A pair for each stage: ready after so many arrivals, empty after both groups' of warps."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    return ready, empty


@gluon.jit
def wait_empty(empty, filled, STAGES: gl.constexpr):
    """Wait until the next stage has been read; its number."""
    stage = filled % STAGES
    mbarrier.wait(empty.index(stage), ((filled // STAGES) & 1) ^ 1)
    return stage


@gluon.jit
def wait_ready(ready, taken, STAGES: gl.constexpr):
    """Wait until the next stage is filled; its number."""
    stage = taken % STAGES
    mbarrier.wait(ready.index(stage), (taken // STAGES) & 1)
    return stage


@gluon.jit
def free_last(empty, taken, live, STAGES: gl.constexpr):
    """Give back the stage before the next one."""
    mbarrier.arrive(empty.index((taken + STAGES - 1) % STAGES), count=1, pred=live)


@gluon.jit
def multiply(
    left, right, ready, empty, acc, taken, steps, TRANSPOSED: gl.constexpr, FIRST: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add so many stages' products of ROWS rows of the left side; one product is kept in flight."""
    for k in range(steps):
        stage = wait_ready(ready, taken, STAGES)
        b = right.index(stage) if TRANSPOSED else right.index(stage).permute((1, 0))
        acc = warpgroup_mma(left.index(stage).slice(FIRST, ROWS), b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        free_last(empty, taken, k > 0, STAGES)
        taken += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    free_last(empty, taken, True, STAGES)
    return acc, taken


@gluon.jit
def put_rows(tile, out, slots, turn, end, row, column):
    """Store rows of one expert by way of shared memory; the copy engine drops what lies past it."""
    slot = slots.index(turn % slots.shape[0])
    tma.store_wait(slots.shape[0] - 1)
    slot.reshape((slot.shape[2], slot.shape[3])).store(tile.to(out.dtype))
    fence_async_shared()
    store_block(out, [RAGGED, end, row - end + RAGGED, column], slot)


@gluon.jit
def put_matrix(tile, out, slots, expert, row, column):
    """Store a part of one expert's matrix by way of shared memory."""
    slot = slots.index(0)
    tma.store_wait(0)
    slot.reshape((slot.shape[1], slot.shape[2])).store(tile.to(out.dtype))
    fence_async_shared()
    store_block(out, [expert, row, column], slot)


@gluon.jit
def take_buffer(buffer, like):
    """The tile in a buffer, in float32, held as another tile is."""
    tile = buffer.reshape((buffer.shape[2], buffer.shape[3])).load(like.type.layout)
    return tile.to(gl.float32)


@gluon.jit
def fill_buffer(buffer, tile):
    """Put a tile into a buffer, rounded."""
    buffer.reshape((buffer.shape[2], buffer.shape[3])).store(tile.to(buffer.dtype))


@gluon.jit
def send_buffer(buffer, out, end, row, column):
    """Store the buffer's rows of one expert."""
    store_block(out, [RAGGED, end, row - end + RAGGED, column], buffer)


@gluon.jit
def stage_buffers(left, right, stage, BM: gl.constexpr, WG: gl.constexpr):
    """The three blocks of BM by 64 in a stage, of which each group of warps has half the rows."""
    form: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    rows: gl.constexpr = BM // 2
    one = see_as(left.index(stage), left.dtype, [2, 1, 1, rows, 64], form)
    both = see_as(right.index(stage), left.dtype, [4, 1, 1, rows, 64], form)
    return one.index(WG), both.index(WG), both.index(2 + WG)


@gluon.jit
def load_blocks(blocks, right, stage, row, column, ready, SECOND: gl.constexpr, BM: gl.constexpr):
    """Load rows into the second or third block of a stage."""
    form: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    both = see_as(right.index(stage), right.dtype, [2, BM, 64], form)
    copy_block(blocks, [row, column], ready.index(stage), both.index(SECOND))

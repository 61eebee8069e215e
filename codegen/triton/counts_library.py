# mypy: ignore-errors
"""Kernels for rows whose number follows from data, or from the sizes: capacity, experts' picks.

They are copied as text into emitted modules, as those of :mod:`moec.codegen.triton.library` are;
its words hold here, too.
"""

import triton
import triton.language as tl

from moec.runtime import launch


@launch.Kernel
@triton.jit(do_not_specialize=["pairs", "blocks"])
def count_choices(
    index, histogram, pairs, blocks, E: tl.constexpr, EP: tl.constexpr, G: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """histogram[e * G + g, block] = how many of the block's pairs of group g go to e.

    A pair's group is its choice (G: choices); all pairs are one group where G is 1.
    """
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    e = tl.load(index + pair, mask=pair < pairs, other=E)
    e = tl.where((e < 0) | (e > E), E, e)
    expert = tl.arange(0, EP)
    for g in range(G):
        mine = (pair < pairs) & (pair % G == g)
        hit = (e[:, None] == expert[None, :]) & mine[:, None]
        at = histogram + (expert * G + g) * (blocks + 1) + block
        tl.store(at, tl.sum(hit.to(tl.int32), 0), mask=expert < E)


@launch.Kernel
@triton.jit(do_not_specialize=["pairs", "blocks", "capacity"])
def place_limited(
    index, histogram, perm, offsets, inverse, limited, pairs, blocks, capacity,
    E: tl.constexpr, EP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """As place_pairs, where an expert takes no more than ``capacity`` pairs; limited gets E for
    what it does not take.

    Places go to one group after the other, within a group in the order of the pairs. So of group g
    an expert takes the first quota[e, g] pairs, and what it takes in all is known before any block
    is looked at. The others take the rows after all that have an expert.
    """
    block = tl.program_id(0)
    expert = tl.arange(0, EP)
    group = tl.arange(0, GP)
    known = (expert < E)[:, None] & (group < G)[None, :]
    counts = histogram + (expert[:, None] * G + group[None, :]) * (blocks + 1)
    total = tl.load(counts + blocks, mask=known, other=0)
    ahead = tl.cumsum(total, 1) - total
    quota = tl.minimum(total, tl.maximum(capacity - ahead, 0))
    taken = tl.sum(quota, 1)
    start = tl.cumsum(taken, 0) - taken
    before = tl.load(counts + block, mask=known, other=0)
    before = tl.sum(tl.minimum(before, quota), 1)
    # this block's pairs
    slot = tl.arange(0, PAIRS)
    pair = block * BLOCK + slot
    live = (slot < BLOCK) & (pair < pairs)
    e = tl.load(index + pair, mask=live, other=E)
    e = tl.where((e < 0) | (e > E), E, e).to(tl.int32)
    near = tl.minimum(e, EP - 1)
    g = pair % G
    earlier = slot[None, :] < slot[:, None]
    same = (e[:, None] == e[None, :]) & earlier
    alike = same & (g[:, None] == g[None, :])
    rank = tl.load(histogram + (e * G + g) * (blocks + 1) + block, mask=live & (e < E), other=0)
    rank += tl.sum(alike.to(tl.int32), 1)
    keeps = live & (e < E) & (rank < tl.gather(quota.reshape(EP * GP), near * GP + g, 0))
    row = tl.gather(start + before, near, 0) + tl.sum((same & keeps[None, :]).to(tl.int32), 1)
    kept = tl.sum(before, 0) + tl.sum((earlier & keeps[None, :]).to(tl.int32), 1)
    row = tl.where(keeps, row, tl.sum(taken, 0) + pair - kept)
    tl.store(perm + row, pair, mask=live)
    tl.store(inverse + pair, tl.where(keeps, row, -1), mask=live)
    tl.store(limited + pair, tl.where(keeps, e, E), mask=live)
    if block == 0:
        tl.store(offsets + expert, start, mask=expert < E)
        tl.store(offsets + E, tl.sum(taken, 0))


@launch.Kernel
@triton.jit(do_not_specialize=["rows", "count"])
def place_picks(
    picks, perm, offsets, inverse, rows, count, E: tl.constexpr, EP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """perm and inverse of the tokens that each expert picked, ``count`` each; inverse is -1 before.

    The first program writes offsets.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    pair = tl.load(picks + row, mask=live, other=0) * E + row // count
    tl.store(perm + row, pair, mask=live)
    tl.store(inverse + pair, row, mask=live)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, EP)
        tl.store(offsets + expert, expert * count, mask=expert <= E)

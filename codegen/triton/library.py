# mypy: ignore-errors
"""Device functions and kernels that do not depend on a kernel's body.

They are real code here and are copied as text into the emitted modules that use them, so that an
emitted module can be read, profiled and kept without moec's sources. Words: a *row* is a (token,
choice) pair in the order of the experts; ``perm[row]`` is its pair and ``inverse[pair]`` its row
(-1: sent to no expert); ``offsets[e]`` is the first row of expert ``e``. A row tile is ``BM`` rows
of one expert.
"""

import triton
import triton.language as tl

from moec.runtime import launch

# the row origin of a ragged descriptor: rows past the end of an expert fall outside its shape
RAGGED: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def tanh(x):
    """Without a library call; a series near 0, where the quotient would cancel."""
    square = x * x
    series = x * (1.0 - square * (0.3333333333333333 - square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(tl.abs(x) < 0.04, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def log1p(x):
    """``log(1 + x)``, corrected for the rounding of the sum."""
    total = 1.0 + x
    exact = (total == 1.0) | (total == float("inf"))
    return tl.where(exact, x, tl.log(total) * (x / tl.where(exact, 1.0, total - 1.0)))


@triton.jit
def order_of(x):
    """An integer that sorts as ``x`` does, NaN first, and is above the least of its type."""
    if x.dtype == tl.float64:
        bits = (x + 0.0).to(tl.int64, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), 0x7FFFFFFFFFFFFFFF)
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The number of which :func:`order_of` made a key."""
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(key, index, NONE: tl.constexpr):
    """The index of the largest key of each row, the lowest among equal ones."""
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], index[None, :], NONE), 1)


@triton.jit
def pick_tile(work, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column tile of a piece of work: GROUP row tiles share their columns of weights."""
    width = GROUP * tiles_n
    first = work // width * GROUP
    size = tl.maximum(tl.minimum(tiles_m - first, GROUP), 1)  # past the last one nothing divides
    return first + work % width % size, work % width // size


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a tile (no data moves: both lie in the same thread)."""
    return tile.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def load_rows(rows, start, size, row, column, BR: tl.constexpr, BC: tl.constexpr):
    """Rows [row, row + BR) of the expert that owns [start, start + size); zeros past its end."""
    return rows.load([RAGGED, start + size, row - size + RAGGED, column]).reshape(BR, BC)


@triton.jit
def load_parts(rows, start, size, row, column, BR: tl.constexpr, BC: tl.constexpr):
    """As load_rows, of a [rows, 2, columns] tensor: the same tile of both parts."""
    tile = rows.load([RAGGED, start + size, row - size + RAGGED, 0, column])
    return tile.reshape(BR, 2, BC).permute(0, 2, 1).to(tl.float32).split()


@triton.jit
def store_rows(rows, start, size, row, column, value, BR: tl.constexpr, BC: tl.constexpr):
    """Store rows of one expert; the copy engine drops what lies past its end."""
    at = [RAGGED, start + size, row - size + RAGGED, column]
    rows.store(at, value.to(rows.dtype).reshape(1, 1, BR, BC))


@triton.jit
def store_part(rows, start, size, row, part, column, value, BR: tl.constexpr, BC: tl.constexpr):
    """As store_rows, to one part of a [rows, parts, columns] tensor."""
    at = [RAGGED, start + size, row - size + RAGGED, part, column]
    rows.store(at, value.to(rows.dtype).reshape(1, 1, BR, 1, BC))


@launch.Kernel
@triton.jit
def list_row_tiles(offsets, tiles, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The row tiles of one expert a program: tiles[0] is their number, then (expert, first row)."""
    me = tl.program_id(0)
    expert = tl.arange(0, EP)
    first = tl.load(offsets + expert, mask=expert < E, other=0)
    size = tl.load(offsets + expert + 1, mask=expert < E, other=0) - first
    count = (size + BM - 1) // BM
    before = tl.sum(tl.where(expert < me, count, 0), 0)
    mine = tl.sum(tl.where(expert == me, count, 0), 0)
    row = tl.load(offsets + me)
    for j in range(0, mine, 128):
        t = j + tl.arange(0, 128)
        entry = tiles + 2 * (before + t)
        tl.store(entry + 2, me + t * 0, mask=t < mine)
        tl.store(entry + 3, row + t * BM, mask=t < mine)
    if me == E - 1:
        tl.store(tiles, before + mine)


@launch.Kernel
@triton.jit(do_not_specialize=["rows"])
def few_linear(
    x, w, bias, y, rows, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = the inner product of x[m] and w[n], and bias[n], for few rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inside = k + depth < K
        left_at = x + row[:, None] * K + (k + depth)[None, :]
        left = tl.load(left_at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        right_at = w + column[None, :] * K + (k + depth)[:, None]
        right = tl.load(right_at, mask=(column < N)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    live = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], acc, mask=live)


@launch.Kernel
@triton.jit(do_not_specialize=["rows"])
def sum_rows(
    a, b, y, rows, N: tl.constexpr, DOT: tl.constexpr, DIVISOR: tl.constexpr,
    DOUBLE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[m] = the sum of the numbers a[m], or of the products a[m] * b[m], divided by DIVISOR."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BN), tl.float64 if DOUBLE else tl.float32)
    for first in range(0, N, BN):
        column = first + tl.arange(0, BN)
        live = (row < rows)[:, None] & (column < N)[None, :]
        at = row[:, None] * N + column[None, :]
        value = tl.load(a + at, mask=live, other=0.0).to(total.dtype)
        if DOT:
            value *= tl.load(b + at, mask=live, other=0.0).to(total.dtype)
        total += value
    tl.store(y + row, tl.sum(total, 1) / DIVISOR, mask=row < rows)


@triton.jit
def place_few(
    e, pair, live, count, perm, offsets, inverse, tiles,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """All of the dispatch in one program: pair[p] goes to expert e[p], which gets count[e] pairs.

    EP, a power of two, is above E where pairs may have no expert: e is E then, and they take the
    rows after all others. The row tiles are listed as by list_row_tiles.
    """
    slot = tl.arange(0, P)
    expert = tl.arange(0, EP)
    earlier = (e[:, None] == e[None, :]) & (slot[None, :] < slot[:, None]) & live[None, :]
    start = tl.cumsum(count, 0) - count
    row = tl.gather(start, tl.minimum(e, EP - 1), 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(perm + row, pair, mask=live)
    tl.store(inverse + pair, tl.where(e < E, row, -1), mask=live)
    taken = tl.where(expert < E, count, 0)
    tl.store(offsets + expert, start, mask=expert < E)
    tl.store(offsets + E, tl.sum(taken, 0))
    mine = (taken + BM - 1) // BM
    first = tl.cumsum(mine, 0) - mine
    for j in tl.static_range((P + BM - 1) // BM):
        entry = tiles + 2 * (first + j)
        tl.store(entry + 2, expert, mask=j < mine)
        tl.store(entry + 3, start + j * BM, mask=j < mine)
    tl.store(tiles, tl.sum(mine, 0))


@launch.Kernel
@triton.jit(do_not_specialize=["pairs"])
def place_few_pairs(
    index, perm, offsets, inverse, tiles, pairs,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """As place_few, of indices that are in memory; what is no expert's number is none."""
    pair = tl.arange(0, P)
    expert = tl.arange(0, EP)
    e = tl.load(index + pair, mask=pair < pairs, other=E)
    e = tl.where((e < 0) | (e > E), E, e).to(tl.int32)
    count = tl.zeros((EP,), tl.int32)
    for first in range(0, P, 16):
        some = first + tl.arange(0, 16)
        chosen = tl.load(index + some, mask=some < pairs, other=EP)
        chosen = tl.where((chosen < 0) | (chosen > E), E, chosen)
        hit = (chosen[:, None] == expert[None, :]) & (some < pairs)[:, None]
        count += tl.sum(hit.to(tl.int32), 0)
    place_few(e, pair, pair < pairs, count, perm, offsets, inverse, tiles, E, EP, P, BM)


@launch.Kernel
@triton.jit(do_not_specialize=["pairs", "blocks"])
def count_pairs(
    index, histogram, pairs, blocks, BUCKETS: tl.constexpr, EP: tl.constexpr, PAIRS: tl.constexpr
):
    """histogram[e, block] = how many of the block's pairs go to e; the last bucket is no expert."""
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    e = tl.load(index + pair, mask=pair < pairs, other=EP)
    e = tl.where(e < 0, BUCKETS - 1, tl.minimum(e, BUCKETS - 1))
    e = tl.where(pair < pairs, e, EP)
    expert = tl.arange(0, EP)
    count = tl.sum((e[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(histogram + expert * (blocks + 1) + block, count, mask=expert < BUCKETS)


@launch.Kernel
@triton.jit(do_not_specialize=["blocks"])
def scan_counts(histogram, blocks, CHUNK: tl.constexpr):
    """Per expert: the exclusive prefix of its counts over the blocks, in place; then its total."""
    counts = histogram + tl.program_id(0) * (blocks + 1)
    carry = 0
    for first in range(0, blocks, CHUNK):
        at = first + tl.arange(0, CHUNK)
        count = tl.load(counts + at, mask=at < blocks, other=0)
        before = carry + tl.cumsum(count, 0) - count
        tl.store(counts + at, before, mask=at < blocks)
        carry += tl.sum(count, 0)
    tl.store(counts + blocks, carry)


@triton.jit
def write_row_list(
    start, rows, entries, block, blocks,
    EP: tl.constexpr, BM: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """The row tiles of all experts, sixteen at a time, which the programs share.

    As list_row_tiles writes them; with ENDS as list_row_places.
    """
    expert = tl.arange(0, EP)[None, :]
    mine = (rows + BM - 1) // BM
    first = tl.maximum(tl.cumsum(mine, 0) - mine, 0)
    count = tl.sum(mine, 0)
    for j in range(block * 16, count, blocks * 16):
        t = j + tl.arange(0, 16)
        begun = (first[None, :] <= t[:, None]) & (mine[None, :] > 0)
        owner = tl.max(tl.where(begun, expert, 0), 1)
        its = expert == owner[:, None]
        row = tl.sum(tl.where(its, start[None, :] + (t[:, None] - first[None, :]) * BM, 0), 1)
        if ENDS:
            end = tl.sum(tl.where(its, (start + rows)[None, :], 0), 1)
            tl.store(entries + 3 * t + 1, owner, mask=t < count)
            tl.store(entries + 3 * t + 2, row, mask=t < count)
            tl.store(entries + 3 * t + 3, end, mask=t < count)
        else:
            tl.store(entries + 2 * t + 2, owner, mask=t < count)
            tl.store(entries + 2 * t + 3, row, mask=t < count)
    if block == 0:
        tl.store(entries, count)


@launch.Kernel
@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_pairs(
    index, histogram, perm, offsets, inverse, tiles, places, pairs, blocks,
    E: tl.constexpr, BUCKETS: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, TILES: tl.constexpr = 0, PLACES: tl.constexpr = 0,
):  # fmt: skip
    """perm and inverse of a block's pairs, in their order; the first program writes offsets.

    BUCKETS is E + 1 where pairs may have no expert: they take the rows after all others. TILES and
    PLACES are the rows of the tiles to list, 0 for no list.
    """
    block = tl.program_id(0)
    expert = tl.arange(0, EP)
    total = tl.load(histogram + expert * (blocks + 1) + blocks, mask=expert < BUCKETS, other=0)
    start = tl.cumsum(total, 0) - total
    slot = tl.arange(0, PAIRS)
    pair = block * BLOCK + slot
    live = (slot < BLOCK) & (pair < pairs)
    e = tl.load(index + pair, mask=live, other=0)
    e = tl.where(e < 0, BUCKETS - 1, tl.minimum(e, BUCKETS - 1))
    earlier = (e[:, None] == e[None, :]) & (slot[None, :] < slot[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    before = tl.load(histogram + e * (blocks + 1) + block, mask=live, other=0)
    row = tl.gather(start, e, 0) + before + rank
    tl.store(perm + row, pair, mask=live)
    tl.store(inverse + pair, tl.where(e < E, row, -1), mask=live)
    taken = tl.where(expert < E, total, 0)
    if block == 0:
        tl.store(offsets + expert, start, mask=expert < E)
        tl.store(offsets + E, tl.sum(taken, 0))
    if TILES > 0:
        write_row_list(start, taken, tiles, block, blocks, EP, TILES, False)
    if PLACES > 0:
        write_row_list(start, taken, places, block, blocks, EP, PLACES, True)


@launch.Kernel
@triton.jit
def spread_rows(x, inverse, rows, H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr):
    """rows[inverse[t, k]] = x[t]: reads every token once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    value = tl.load(x + token * H + column, mask=column < H)
    if K <= 16:
        for k in tl.static_range(K):
            row = tl.load(inverse + token * K + k).to(tl.int64)
            tl.store(rows + row * H + column, value, mask=column < tl.where(row >= 0, H, 0))
    else:  # a place for each expert, most of them empty
        for k in range(K):
            row = tl.load(inverse + token * K + k).to(tl.int64)
            tl.store(rows + row * H + column, value, mask=column < tl.where(row >= 0, H, 0))


@launch.Kernel
@triton.jit
def sum_groups(
    x, offsets, partial, E: tl.constexpr, N: tl.constexpr, SHARES: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """partial[s, e] = the sum of share s of the rows of expert e."""
    expert = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BR, BN), partial.dtype.element_ty)
    for first in range(start + share * BR, end, SHARES * BR):
        row = first + tl.arange(0, BR)
        live = (row < end)[:, None] & (column < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        total += tl.load(x + at, mask=live, other=0.0).to(partial.dtype.element_ty)
    out = partial + (share * E + expert).to(tl.int64) * N + column
    tl.store(out, tl.sum(total, 0), mask=column < N)

"""Triton kernels of the nearest-neighbour search; imported on first use on a GPU. See knn.py.

1. Bound. Over every 16th row of base the least upper bound of the distance in each of many disjoint
   parts. The k-th least of these is above the k-th distance, as k rows lie below it.
2. Screen. One TF32 product over all of base; a bit for each pair whose lower bound is below.
3. List. The bits become lists of rows, a few hundred for each query.
4. Rescan. Listed rows in fp64, ordered by (distance, index). Nothing else can be a neighbour, so
   nothing remains to be proved; where a list overflows, all of base is compared.

Neither loop over base holds a branch that depends on data, so that Triton pipelines it. Every
kernel writes all it owns; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad
from triton.language import constexpr

from kernels.bound import FP32, TF32, TINY, lower, operands
from kernels.dispatch import device_kind, launching

PROGRAMS = 264  # two for each multiprocessor of the largest device meant
WORDS = 2**27  # int32 of bits and lists at a time
SAMPLE = 8  # one row in so many of base for the bound
EXTRA = 6  # columns of the product that hold halves of bounds and limits
NEVER, EVERY = 2.0**60, 2.0**40  # a score, and a limit, beyond all that scaled rows have


@triton.jit
def screen_kernel(
    query, base, labels, groups, out, rows, stride,
    BOUND: constexpr, MASK: constexpr, QUERIES: constexpr, ROWS: constexpr,
    WIDTH: constexpr, LOOPED: constexpr,
):  # fmt: skip
    """Of score = query . base its least in each column of the tiles, or the bits of score < 0.

    The tables (see _table) are padded to whole tiles, so that no load needs a mask. `rows` are
    those of base, a multiple of ROWS. Programs (queries, splits). With BOUND out is fp32 (queries,
    splits, ROWS), else int32 (queries, rows / 32).
    """
    WORDS: constexpr = ROWS // 32
    q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, WIDTH)
    lanes = tl.arange(0, ROWS)
    at_q = query + q.to(tl.int64)[:, None] * stride + d[None, :]
    if not LOOPED:
        a = tl.load(at_q)
    if MASK:
        label_q = tl.load(labels + q)
    if BOUND:
        least = tl.full((QUERIES, ROWS), float("inf"), tl.float32)
    else:
        bit = tl.full((ROWS,), 1, tl.int32) << (lanes % 32)
        words = out + q.to(tl.int64)[:, None] * (rows // 32) + tl.arange(0, WORDS)[None, :]
    for tile in range(tl.program_id(1), rows // ROWS, tl.num_programs(1)):
        n = tile * ROWS + lanes
        at_n = base + n.to(tl.int64)[None, :] * stride + d[:, None]
        if MASK:
            label = tl.load(groups + n)
        score = tl.zeros((QUERIES, ROWS), tl.float32)
        if LOOPED:
            for first in range(0, stride, WIDTH):
                x = tl.load(at_q + first)
                y = tl.load(at_n + first)
                score = tl.dot(x, y, score, input_precision="tf32")
        else:
            score = tl.dot(a, tl.load(at_n), score, input_precision="tf32")
        if MASK:
            score = tl.where(label_q[:, None] == label[None, :], float("inf"), score)
        if BOUND:
            least = tl.minimum(least, score)
        else:
            bits = (score.to(tl.int32, bitcast=True) >> 31) & bit[None, :]
            tl.store(words + tile * WORDS, tl.sum(tl.reshape(bits, (QUERIES, WORDS, 32)), 2))
    if BOUND:
        at = (q.to(tl.int64)[:, None] * tl.num_programs(1) + tl.program_id(1)) * ROWS
        tl.store(out + at + lanes[None, :], least)


@triton.jit
def list_kernel(bits, candidates, listed, count, CAPACITY: constexpr, BLOCK: constexpr):
    """One query's bits (count words) -> places of base in its list (CAPACITY), and how many."""
    q = tl.program_id(0).to(tl.int64)
    filled = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = tl.load(bits + q * count + place, mask=place < count, other=0)
        some = (word != 0).to(tl.int32)
        found = tl.sum(some)
        while found > 0:
            low = word & -word
            exponent = (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
            slot = filled + tl.cumsum(some, 0) - some
            at = candidates + q * CAPACITY + slot
            tl.store(at, place * 32 + exponent - 127, mask=(some != 0) & (slot < CAPACITY))
            filled += found
            word = word & (word - 1)
            some = (word != 0).to(tl.int32)
            found = tl.sum(some)
    tl.store(listed + q, filled)


@triton.jit
def _distances(
    query, base, q, index, real, width, stride, COSINE: constexpr, BLOCK: constexpr,
    WIDTH: constexpr,
):  # fmt: skip
    """fp64 distances (squared, or twice the cosine's) of a query to base[index]; inf: not real.

    Beyond `width` there are zeros up to the stride, a multiple of 16: loads need no mask.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    norm = tl.zeros((BLOCK,), tl.float64)
    own = tl.zeros((1,), tl.float64)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        a = tl.load(query + q * stride + d[None, :]).to(tl.float64)
        b = tl.load(base + index.to(tl.int64)[:, None] * stride + d[None, :]).to(tl.float64)
        if COSINE:
            total += tl.sum(a * b, 1)
            norm += tl.sum(b * b, 1)
            own += tl.sum(a * a, 1)
        else:
            total += tl.sum((a - b) * (a - b), 1)
    if COSINE:
        product = tl.sqrt(norm) * tl.sqrt(own)
        total = 2.0 - 2.0 * total / tl.where(product == 0.0, 1.0, product)
    return tl.where(real, total, float("inf"))


@triton.jit
def _first(distance, index):
    """The least by (distance, index)."""
    least = tl.min(distance)
    return least, tl.min(tl.where(distance == least, index, 2147483647))


@triton.jit
def rescan_kernel(
    query, base, labels, groups, candidates, listed, distances, indices, rows, width, stride, k,
    COSINE: constexpr, CAPACITY: constexpr, KEEP: constexpr,
    BLOCK: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """One query's k neighbours among its listed rows, or among all where the list overflowed.

    labels: each query's group, or without groups the row that it is itself. Of a block of
    candidates the least take the places of the worst of the k best so far, while they are better.
    """
    q = tl.program_id(0).to(tl.int64)
    count = tl.load(listed + q)
    all_rows = count > CAPACITY
    count = tl.where(all_rows, rows, count)
    slots = tl.arange(0, KEEP)
    best = tl.where(slots < k, float("inf"), float("-inf")).to(tl.float64)
    ids = 2147483647 - slots  # free places, told apart
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        real = i < count
        index = tl.load(candidates + q * CAPACITY + i, mask=real & (all_rows == 0), other=0)
        index = tl.where(all_rows, tl.minimum(i, rows - 1), index)
        if groups is not None:
            real = real & (tl.load(groups + index, mask=real, other=0) != tl.load(labels + q))
        elif labels is not None:
            real = real & (index != tl.load(labels + q))
        distance = _distances(query, base, q, index, real, width, stride, COSINE, BLOCK, WIDTH)
        better = start < count
        while better:
            least, chosen = _first(distance, index)
            worst = tl.max(best)
            last = tl.max(tl.where(best == worst, ids, -1))
            tie = (least == worst) & (chosen < last) & (least < float("inf"))
            better = (least < worst) | tie
            hit = (best == worst) & (ids == tl.where(better, last, -2))
            best = tl.where(hit, least, best)
            ids = tl.where(hit, chosen, ids)
            distance = tl.where(index == chosen, float("inf"), distance)
    best = tl.where(slots < k, best, float("inf"))
    for place in range(k):
        least, chosen = _first(best, ids)
        found = tl.where(least < float("inf"), chosen, -1)
        tl.store(distances + q * k + place, least)
        tl.store(indices + q * k + place, found.to(tl.int64))
        best = tl.where(ids == chosen, float("inf"), best)
        ids = tl.where(ids == chosen, 2147483647, ids)


# --- launchers -----------------------------------------------------------------------------------


def screen_config(width: int, device: str) -> dict:
    """Tile and launch parameters for a table of `width` columns on "hopper", "cuda" or "hip".

    Up to 64 columns the queries stay in registers or shared memory. Up to 128 two programs fit on a
    multiprocessor, so that one multiplies while the other compares.
    """
    looped = width > 64
    wide = {"hopper": 64 if width <= 128 else 128, "cuda": 32, "hip": 64}
    return {
        "QUERIES": 128 if device != "hip" else 64,
        "ROWS": wide[device],
        "LOOPED": looped,
        "WIDTH": 32 if looped else max(16, triton.next_power_of_2(width)),
        "num_warps": 4 if device == "hopper" and not looped else 8,
        "num_stages": 2 if device == "hip" else 3,
    }


def rescan_config(k: int) -> dict:
    """One warp to a query: its minima need no barrier, and others work while it waits."""
    keep = max(16, triton.next_power_of_2(k))
    return {
        "KEEP": keep,
        "CAPACITY": capacity(k),
        "BLOCK": 32,
        "WIDTH": 16,
        "num_warps": 1,
    }


def list_config(k: int) -> dict:
    return {"CAPACITY": capacity(k), "BLOCK": 256, "num_warps": 1}


def capacity(k: int) -> int:
    """Rows of base that a query's list can hold."""
    return 2048 if k <= 24 else 4096


def search(base, k, query, own, groups, labels, metric):
    """The operator -> squared distances, indices (Q, k), whether all of base was compared (Q,).

    own (Q,): the row of base that a query is itself, -1 for none; or None. Distances are fp64,
    those of cosine doubled.
    """
    if groups is not None:  # numbered anew, as 32 bits compare faster
        both = torch.cat((groups.long(), labels.long())).unique(return_inverse=True)[1]
        groups, own = both.int().split((len(base), len(query)))
    q, b, squares_q, squares_b, gamma = operands(base, query, metric, TF32)
    width = q.shape[1]
    config = screen_config(width + EXTRA, device_kind(base.device))
    tile = config["ROWS"]
    sparse = max(1, min(SAMPLE if k <= 24 else SAMPLE // 2, len(b) // 2048))
    ones = b.new_ones(len(b), 3)
    halves = _pieces(torch.cat((lower(squares_b, gamma), lower(squares_b, -gamma))).float())
    table = _table(tile, config, b, halves[: len(b)], ones)
    sample = _table(tile, config, b[::sparse], halves[len(b) :: sparse], ones[::sparse])
    queries = _table(config["QUERIES"], config, q * -2, q.new_ones(len(q), 3))
    queries[len(q) :] = 0
    few = None if groups is None else pad(groups[::sparse], (0, tile))
    groups = None if groups is None else pad(groups, (0, tile))
    # What a score is below where the pair's distance is below the bound: both halves of the query.
    slack = (squares_q * (4.001 * gamma) + 5 * TINY).float()
    relative = 2 * (gamma - 2.02 * TF32) + FP32  # the sum of a score holds the limit, too
    wanted = k if groups is not None or own is None else k + 1
    own = None if own is None else pad(own.int(), (0, len(queries) - len(q)))
    base, query = (pad(x, (0, -width % 16)) for x in (base, query))
    step = config["QUERIES"]
    step *= max(1, WORDS // (len(table) // 32 + capacity(k)) // step)
    found = []
    with launching(base):
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            labels = None if own is None else own[part]
            limit = _least(queries[part], sample, labels, few, wanted, config)[: len(slack[part])]
            limit += slack[part]
            limit += limit.abs() * relative
            less = _pieces(limit.clamp_(max=EVERY).neg_())
            queries[start : start + len(less), width + 3 : width + EXTRA] = less
            bits = _bits(queries[part], table, labels, groups, config)
            found.append(_rescan(query[part], base, bits, labels, groups, width, k, metric))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _pieces(x):
    """Three TF32 numbers (N, 3) that add up to x (N,): of its 24 bits 11, 11 and what is left."""
    first = (x.view(torch.int32) & -0x2000).view(torch.float32)
    rest = x - first
    second = (rest.view(torch.int32) & -0x2000).view(torch.float32)
    return torch.stack((first, second, rest - second), 1)


def _table(rows, config, *columns):
    """Columns side by side, with zeros up to a multiple of `rows` rows and of a step's columns.

    A score is -2 q.b, and in three columns each, times 1, base's half of the bound and less the
    query's limit. In rows that are added base's half is so large that nothing is below a limit.
    """
    x = torch.cat(columns, 1)
    step = config["WIDTH"]
    table = pad(x, (0, -x.shape[1] % step, 0, -len(x) % rows))
    table[len(x) :, columns[0].shape[1]] = NEVER
    return table


def _least(q, sample, labels, groups, wanted, config):
    """A score for each query (Q,) that is not below the score of any of its nearest rows.

    Parts of base are the columns of the tiles of a program: four for each row wanted, that few
    of the least lie in one. A query that is a row of base itself finds one row too many.
    """
    splits = triton.cdiv(4 * wanted, config["ROWS"])
    least = q.new_empty(len(q), splits * config["ROWS"])
    _screen(q, sample, labels, groups, least, splits, config)
    return least.topk(wanted, dim=1, largest=False).values[:, -1]


def _bits(q, table, labels, groups, config):
    """A bit for each query and row of base: int32 (Q, words)."""
    tiles = len(table) // config["ROWS"]
    bits = q.new_empty(len(q), len(table) // 32, dtype=torch.int32)
    splits = max(1, min(tiles // 4, PROGRAMS * config["QUERIES"] // len(q)))
    _screen(q, table, labels, groups, bits, splits, config)
    return bits


def _screen(q, table, labels, groups, out, splits, config):
    screen_kernel[(len(q) // config["QUERIES"], splits)](
        q, table, labels, groups, out, len(table), table.shape[1],
        BOUND=out.dtype == torch.float32, MASK=groups is not None, **config,
    )  # fmt: skip


def _rescan(query, base, bits, labels, groups, width, k, metric):
    count = len(query)
    candidates = bits.new_empty(count, capacity(k))
    listed = bits.new_empty(count)
    list_kernel[(count,)](bits, candidates, listed, bits.shape[1], **list_config(k))
    distances = bits.new_empty(count, k, dtype=torch.float64)
    indices = bits.new_empty(count, k, dtype=torch.int64)
    rescan_kernel[(count,)](
        query, base, labels, groups, candidates, listed, distances, indices,
        len(base), width, base.shape[1], k, COSINE=metric == "cosine", **rescan_config(k),
    )  # fmt: skip
    return distances, indices, listed > capacity(k)

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

from kernels.bound import TF32, TINY, lower, operands
from kernels.dispatch import launching

PROGRAMS = 264  # two for each multiprocessor of the largest device meant
WORDS = 2**26  # int32 of bits and lists at a time
SAMPLE = 16  # one row in so many of base for the bound


@triton.jit
def screen_kernel(
    query, base, half, limits, labels, groups, out, queries, rows, stride,
    BOUND: constexpr, MASK: constexpr, QUERIES: constexpr, ROWS: constexpr,
    WIDTH: constexpr, LOOPED: constexpr,
):  # fmt: skip
    """Of score = half - 2 q.b its least in each column of the tiles, or the bits of score <= limit.

    query (queries, stride) is -2 times the operand. Rows are padded with zeros to a stride that is
    a multiple of 16, so that loads are 16 bytes wide and asynchronous. Programs (queries, splits).
    With BOUND out is fp32 (queries, splits, ROWS), else int32 (queries, tiles * ROWS / 32).
    """
    WORDS: constexpr = ROWS // 32
    q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real_q = q < queries
    d = tl.arange(0, WIDTH)
    lanes = tl.arange(0, ROWS)
    at_q = query + q.to(tl.int64)[:, None] * stride
    if not LOOPED:
        a = tl.load(at_q + d[None, :], mask=real_q[:, None] & (d[None, :] < stride), other=0.0)
    if MASK:
        label_q = tl.load(labels + q, mask=real_q, other=0)
    if BOUND:
        least = tl.full((QUERIES, ROWS), float("inf"), tl.float32)
    else:
        limit = tl.load(limits + q, mask=real_q, other=float("-inf"))
        bit = tl.full((ROWS,), 1, tl.int32) << (lanes % 32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        n = tile * ROWS + lanes
        at_n = base + n.to(tl.int64)[None, :] * stride
        score = tl.zeros((QUERIES, ROWS), tl.float32)
        if LOOPED:
            for first in range(0, stride, WIDTH):
                e = first + d
                x_mask = real_q[:, None] & (e[None, :] < stride)
                x = tl.load(at_q + e[None, :], mask=x_mask, other=0.0)
                y_mask = (n[None, :] < rows) & (e[:, None] < stride)
                y = tl.load(at_n + e[:, None], mask=y_mask, other=0.0)
                score = tl.dot(x, y, score, input_precision="tf32")
        else:
            y_mask = (n[None, :] < rows) & (d[:, None] < stride)
            y = tl.load(at_n + d[:, None], mask=y_mask, other=0.0)
            score = tl.dot(a, y, score, input_precision="tf32")
        score += tl.load(half + n, mask=n < rows, other=float("inf"))[None, :]
        if MASK:
            label = tl.load(groups + n, mask=n < rows, other=0)
            score = tl.where(label_q[:, None] == label[None, :], float("inf"), score)
        if BOUND:
            least = tl.minimum(least, score)
        else:
            bits = tl.where(score <= limit[:, None], bit[None, :], 0)
            words = tl.sum(tl.reshape(bits, (QUERIES, WORDS, 32)), 2)
            at = q.to(tl.int64)[:, None] * (tl.cdiv(rows, ROWS) * WORDS) + tile * WORDS
            tl.store(out + at + tl.arange(0, WORDS)[None, :], words, mask=real_q[:, None])
    if BOUND:
        at = (q.to(tl.int64)[:, None] * tl.num_programs(1) + tl.program_id(1)) * ROWS
        tl.store(out + at + lanes[None, :], least, mask=real_q[:, None])


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
    query, base, q, index, real, width, COSINE: constexpr, BLOCK: constexpr,
    WIDTH: constexpr,
):  # fmt: skip
    """fp64 distances (squared, or twice the cosine's) of a query to base[index]; inf: not real."""
    total = tl.zeros((BLOCK,), tl.float64)
    norm = tl.zeros((BLOCK,), tl.float64)
    own = tl.zeros((1,), tl.float64)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        inside = d[None, :] < width
        a = tl.load(query + q * width + d[None, :], mask=inside, other=0.0).to(tl.float64)
        at = base + index.to(tl.int64)[:, None] * width + d[None, :]
        b = tl.load(at, mask=real[:, None] & inside, other=0.0).to(tl.float64)
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
    query, base, labels, groups, candidates, listed, distances, indices, rows, width, k,
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
        index = tl.where(all_rows, i, index)
        if groups is not None:
            real = real & (tl.load(groups + index, mask=real, other=0) != tl.load(labels + q))
        elif labels is not None:
            real = real & (index != tl.load(labels + q))
        distance = _distances(query, base, q, index, real, width, COSINE, BLOCK, WIDTH)
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
    """Tile and launch parameters on a device "hopper", "cuda" or "hip".

    Up to 64 columns the queries stay in registers or shared memory, and two programs fit on a
    multiprocessor, so that one multiplies while the other compares.
    """
    looped = width > 64
    return {
        "QUERIES": 128 if device != "hip" else 64,
        "ROWS": 32 if device == "cuda" else 64,
        "LOOPED": looped,
        "WIDTH": 32 if looped else max(16, triton.next_power_of_2(width)),
        "num_warps": 8,
        "num_stages": 2,
    }


def rescan_config(k: int) -> dict:
    """One warp to a query: its minima need no barrier, and others work while it waits."""
    keep = max(16, triton.next_power_of_2(k))
    return {
        "KEEP": keep,
        "CAPACITY": capacity(k),
        "BLOCK": 64,
        "WIDTH": 4,
        "num_warps": 1,
    }


def list_config(k: int) -> dict:
    return {"CAPACITY": capacity(k), "BLOCK": 512, "num_warps": 4}


def capacity(k: int) -> int:
    """Rows of base that a query's list can hold."""
    return 2048 if k <= 24 else 4096


def _kind(device):
    if torch.version.hip is not None:
        return "hip"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return "hopper"
    return "cuda"


def search(base, k, query, own, groups, labels, metric):
    """The operator -> squared distances, indices (Q, k), whether all of base was compared (Q,).

    own (Q,): the row of base that a query is itself, -1 for none; or None. Distances are fp64,
    those of cosine doubled.
    """
    if groups is not None:  # numbered anew, as 32 bits compare faster
        both = torch.cat((groups.long(), labels.long())).unique(return_inverse=True)[1]
        groups, own = both.int().split((len(base), len(query)))
    q, b, squares_q, squares_b, gamma = operands(base, query, metric, TF32)
    padding = (0, -base.shape[1] % 16)
    q = pad(q * -2, padding)
    b = pad(b, padding)
    lower_b = lower(squares_b, gamma).float()
    upper_b = lower(squares_b, -gamma).float()
    # What a score is below where the pair's distance is below the bound: both halves of the query.
    slack = squares_q * (4 * gamma) + 4 * TINY
    base = base.contiguous()
    query = query.contiguous()
    config = screen_config(base.shape[1], _kind(base.device))
    words = triton.cdiv(len(base), config["ROWS"]) * config["ROWS"] // 32
    step = WORDS // (words + capacity(k))
    found = []
    with launching(base):
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            own_part = None if own is None else own[part].int()
            limit = _limits(q[part], b, upper_b, slack[part], own_part, groups, k, config)
            bits = _bits(q[part], b, lower_b, limit, own_part, groups, config)
            found.append(_rescan(query[part], base, bits, own_part, groups, k, metric))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _limits(q, b, half, slack, labels, groups, k, config):
    """A score for each query (Q,) that is not below the score of any of its k nearest rows.

    Parts of base are the columns of the tiles of a program: four for each row wanted, that few
    of the least lie in one. A query that is a row of base itself finds one row too many.
    """
    wanted = k if groups is not None or labels is None else k + 1
    step = max(1, min(SAMPLE if k <= 24 else SAMPLE // 2, len(b) // 2048))
    groups = None if groups is None else groups[::step].contiguous()
    splits = triton.cdiv(4 * wanted, config["ROWS"])
    least = q.new_empty(len(q), splits * config["ROWS"])
    sample = b[::step].contiguous()
    half = half[::step].contiguous()
    _screen(q, sample, half, None, labels, groups, least, splits, config)
    bound = least.topk(wanted, dim=1, largest=False).values[:, -1]
    limit = (bound.double() + slack).float()
    above = torch.nextafter(limit, torch.full_like(limit, float("inf")))
    return above.clamp_(max=torch.finfo(torch.float32).max)


def _bits(q, b, half, limit, labels, groups, config):
    """A bit for each query and row of base: int32 (Q, words)."""
    tiles = triton.cdiv(len(b), config["ROWS"])
    bits = q.new_empty(len(q), tiles * config["ROWS"] // 32, dtype=torch.int32)
    splits = max(1, min(tiles // 4, PROGRAMS * config["QUERIES"] // len(q)))
    _screen(q, b, half, limit, labels, groups, bits, splits, config)
    return bits


def _screen(q, b, half, limit, labels, groups, out, splits, config):
    screen_kernel[(triton.cdiv(len(q), config["QUERIES"]), splits)](
        q, b, half, limit, labels, groups, out, len(q), len(b), q.shape[1],
        BOUND=limit is None, MASK=groups is not None, **config,
    )  # fmt: skip


def _rescan(query, base, bits, labels, groups, k, metric):
    count = len(query)
    candidates = bits.new_empty(count, capacity(k))
    listed = bits.new_empty(count)
    list_kernel[(count,)](bits, candidates, listed, bits.shape[1], **list_config(k))
    distances = bits.new_empty(count, k, dtype=torch.float64)
    indices = bits.new_empty(count, k, dtype=torch.int64)
    rescan_kernel[(count,)](
        query, base, labels, groups, candidates, listed, distances, indices,
        len(base), base.shape[1], k, COSINE=metric == "cosine", **rescan_config(k),
    )  # fmt: skip
    return distances, indices, listed > capacity(k)

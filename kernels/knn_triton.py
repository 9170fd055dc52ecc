"""Triton kernels of the nearest-neighbour search; imported on first use on a GPU. The method is in
knn.py.

Rows of base and queries are sorted by group, so that a tile of queries knows beforehand which tiles
of base hold no label but its own and are passed over, and which share one with it and need a mask.
Screening is one TF32 matrix product per tile with the bias as the accumulator's start, a minimum
over sets that stays within a thread, and insertion of the few minima that improve on a query's
worst. Rescan and redo take fp64 differences. Every kernel writes all it owns; no atomics.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from kernels.bound import TF32, lower, operands

SPARE = 8  # sets kept beyond k
# Two for each multiprocessor of the largest device meant; fewer queries than that split the base.
PROGRAMS = 264


@triton.jit
def screen_kernel(
    query, base, bias, query_groups, base_groups, spans, values, sets, queries, rows, stride,
    MASK: tl.constexpr, KEEP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    SET: tl.constexpr, WIDTH: tl.constexpr, LOOPED: tl.constexpr,
):  # fmt: skip
    """The KEEP sets with the least lower bounds for each query, unsorted -> values, sets (queries,
    splits, KEEP).

    query (queries, stride) is -2 times the operand; member m of set s of a tile is its row m *
    (ROWS / SET) + s. Rows are padded with zeros to a stride that is a multiple of 16, so that loads
    are 16 bytes wide and asynchronous. spans (4, query tiles): the tiles of base passed over, from
    and to, and the rows that may share a label, likewise.
    """
    SETS: tl.constexpr = ROWS // SET
    q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1)
    real_q = q < queries
    d = tl.arange(0, WIDTH)
    q_at = query + q.to(tl.int64)[:, None] * stride
    if not LOOPED:
        a = tl.load(q_at + d[None, :], mask=real_q[:, None] & (d[None, :] < stride), other=0.0)
    skip_from, skipped, near_from, near_to = 0, 0, 0, 0
    if MASK:
        labels_q = tl.load(query_groups + tl.minimum(q, queries - 1))
        at = spans + tl.program_id(0)
        skip_from, skipped = tl.load(at), tl.load(at + tl.num_programs(0)) - tl.load(at)
        near_from, near_to = (
            tl.load(at + 2 * tl.num_programs(0)),
            tl.load(at + 3 * tl.num_programs(0)),
        )
    best = tl.full((QUERIES, KEEP), float("inf"), tl.float32)
    ids = tl.full((QUERIES, KEEP), -1, tl.int32)
    slots, lanes = tl.arange(0, KEEP), tl.arange(0, SETS)
    worst = tl.full((QUERIES,), float("inf"), tl.float32)
    for step in range(split, tl.cdiv(rows, ROWS) - skipped, tl.num_programs(1)):
        tile = step + tl.where(step >= skip_from, skipped, 0)
        start = tile * ROWS
        n = start + tl.arange(0, ROWS)
        score = tl.zeros((QUERIES, ROWS), tl.float32)
        score += tl.load(bias + n, mask=n < rows, other=float("inf"))[None, :]
        n_at = base + n.to(tl.int64)[None, :] * stride
        if LOOPED:
            for first in range(0, stride, WIDTH):
                e = first + d
                x = tl.load(
                    q_at + e[None, :], mask=real_q[:, None] & (e[None, :] < stride), other=0.0
                )
                y = tl.load(
                    n_at + e[:, None], mask=(n[None, :] < rows) & (e[:, None] < stride), other=0.0
                )
                score = tl.dot(x, y, score, input_precision="tf32")
        else:
            y = tl.load(
                n_at + d[:, None], mask=(n[None, :] < rows) & (d[:, None] < stride), other=0.0
            )
            score = tl.dot(a, y, score, input_precision="tf32")
        if MASK:
            if (start < near_to) & (start + ROWS > near_from):
                labels_n = tl.load(base_groups + tl.minimum(n, rows - 1))
                score = tl.where(labels_q[:, None] == labels_n[None, :], float("inf"), score)
        least = tl.min(tl.reshape(score, (QUERIES, SET, SETS)), 1)
        more = tl.max((tl.min(least, 1) < worst).to(tl.int32), 0)
        while more > 0:
            value, lane = tl.min(least, 1, return_indices=True)
            slot = tl.argmax(best, 1)
            hit = (slots[None, :] == slot[:, None]) & (value < worst)[:, None]
            best = tl.where(hit, value[:, None], best)
            ids = tl.where(hit, (tile * SETS + lane)[:, None], ids)
            least = tl.where(lanes[None, :] == lane[:, None], float("inf"), least)
            worst = tl.max(best, 1)
            more = tl.max((tl.min(least, 1) < worst).to(tl.int32), 0)
    out = (q.to(tl.int64)[:, None] * tl.num_programs(1) + split) * KEEP + slots[None, :]
    tl.store(values + out, best, mask=real_q[:, None])
    tl.store(sets + out, ids, mask=real_q[:, None])


@triton.jit
def _distances(
    query,
    base,
    q,
    index,
    real,
    width,
    COSINE: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Squared distance (or twice the cosine distance) in fp64 of one query to base[index], infinity
    where not real."""
    total = tl.zeros((COUNT,), tl.float64)
    norm = tl.zeros((COUNT,), tl.float64)
    own = tl.zeros((1,), tl.float64)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        a = tl.load(
            query + q.to(tl.int64) * width + d[None, :], mask=d[None, :] < width, other=0.0
        ).to(tl.float64)
        b = tl.load(
            base + index.to(tl.int64)[:, None] * width + d[None, :],
            mask=real[:, None] & (d[None, :] < width),
            other=0.0,
        ).to(tl.float64)
        if COSINE:
            total += tl.sum(a * b, 1)
            norm += tl.sum(b * b, 1)
            own += tl.sum(a * a, 1)
        else:
            total += tl.sum((a - b) * (a - b), 1)
    if COSINE:
        product = tl.sqrt(norm) * tl.sqrt(own)
        total = 2.0 - 2.0 * total / tl.where(product == 0.0, 1.0, product)
        total = tl.where(total < 0.0, 0.0, total)
    return tl.where(real, total, float("inf"))


@triton.jit
def _emit(distance, index, q, distances, indices, k):
    """Write the k first by (distance, index), -1 at infinity -> the k-th squared distance."""
    last = tl.min(distance)
    for place in range(k):
        last = tl.min(distance)
        chosen = tl.min(tl.where(distance == last, index, 2147483647))
        finite = last < float("inf")
        tl.store(distances + q.to(tl.int64) * k + place, last)
        tl.store(indices + q.to(tl.int64) * k + place, tl.where(finite, chosen, -1).to(tl.int64))
        distance = tl.where((distance == last) & (index == chosen), float("inf"), distance)
    return last


@triton.jit
def rescan_kernel(
    query, base, order, bias, units, query_groups, groups, sets, dropped, distances, indices,
    redo, rows, width, k,
    MASK: tl.constexpr, COSINE: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    SET: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Members of one query's sets by fp64 differences -> its k neighbours, and whether they still
    have to be proved."""
    SETS: tl.constexpr = ROWS // SET
    q = tl.program_id(0)
    i = tl.arange(0, KEEP * SET)
    chosen = tl.load(sets + q.to(tl.int64) * KEEP + i // SET)
    place = (chosen // SETS) * ROWS + (i % SET) * SETS + chosen % SETS
    real = (chosen >= 0) & (place < rows)
    index = tl.load(order + place, mask=real, other=0)
    if MASK:
        real = real & (tl.load(groups + index, mask=real, other=0) != tl.load(query_groups + q))
    distance = _distances(query, base, q, index, real, width, COSINE, KEEP * SET, WIDTH)
    last = _emit(distance, index, q, distances, indices, k)
    least = tl.load(dropped + q)
    proved = (last * tl.load(units) < (least + tl.load(bias + q)).to(tl.float64)) | (
        least == float("inf")
    )
    tl.store(redo + q, (proved == 0).to(tl.int8))


@triton.jit
def redo_kernel(
    query, base, query_groups, groups, distances, indices, redo, rows, width, k,
    MASK: tl.constexpr, COSINE: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A query without a certificate against all of base in fp64; every other program ends at
    once."""
    q = tl.program_id(0)
    if tl.load(redo + q) != 0:
        slots = tl.arange(0, KEEP)
        best = tl.full((KEEP,), float("inf"), tl.float64)
        ids = 2147483647 - slots  # free places, told apart
        for start in range(0, rows, ROWS):
            n = start + tl.arange(0, ROWS)
            real = n < rows
            if MASK:
                real = real & (tl.load(groups + n, mask=real, other=0) != tl.load(query_groups + q))
            distance = _distances(query, base, q, n, real, width, COSINE, ROWS, WIDTH)
            worst = tl.max(best)
            value = tl.min(distance)
            while (
                value < worst
            ):  # rows come by index: a tie with the worst kept is not an improvement
                chosen = tl.min(tl.where(distance == value, n, 2147483647))
                place = tl.max(
                    tl.where(best == worst, ids, -1)
                )  # of equals the largest index leaves
                hit = (best == worst) & (ids == place)
                best = tl.where(hit, value, best)
                ids = tl.where(hit, chosen, ids)
                distance = tl.where(n == chosen, float("inf"), distance)
                worst = tl.max(best)
                value = tl.min(distance)
        _emit(best, ids, q, distances, indices, k)


# --- launchers


def screen_config(k: int, width: int, device: str) -> dict:
    """Tile and launch parameters on a device "hopper", "cuda" or "hip".

    Scores, kept sets and one operand are all in registers: what compiles without spilling decides
    the tiles, and more than 64 sets fit nowhere, so that the largest k keep 64 in each of two
    programs. On Hopper the limit on registers lets two programs share a multiprocessor, so that one
    multiplies while the other waits for its loads.
    """
    keep, looped = min(64, max(16, triton.next_power_of_2(k + SPARE))), width > 64
    config = {
        "KEEP": keep,
        "QUERIES": 64 if keep <= 32 else 16 if device == "hip" else 32,
        "ROWS": 64,
        "SET": 8,
        "LOOPED": looped,
        "WIDTH": 32 if looped else max(16, triton.next_power_of_2(width)),
        "num_warps": 8,
        "num_stages": 1 if keep == 64 else 2,
    }
    if device == "hopper" and keep <= 32 and not looped:
        config |= {"QUERIES": 128, "maxnreg": 128}
    return config


def rescan_config(k: int) -> dict:
    merged = max(16, triton.next_power_of_2(k + SPARE))
    width, warps = (8, 4) if merged <= 32 else (4, 4) if merged == 64 else (4, 8)
    return {"KEEP": merged, "SET": 8, "WIDTH": width, "num_warps": warps}


def redo_config(k: int) -> dict:
    return {"KEEP": max(16, triton.next_power_of_2(k)), "ROWS": 256, "WIDTH": 8, "num_warps": 4}


def _spans(query_groups, groups, queries, rows):
    """What screen_kernel takes as spans, from sorted labels and the sizes of its tiles."""
    least, most = query_groups[::queries], query_groups[queries - 1 :: queries]
    if len(most) < len(least):
        most = torch.cat((most, query_groups[-1:]))
    near_from, near_to = (
        torch.searchsorted(groups, least),
        torch.searchsorted(groups, most, right=True),
    )
    skip_from, skip_to = (near_from + rows - 1) // rows, near_to // rows
    skip_to = torch.where(least == most, skip_to.maximum(skip_from), skip_from)
    return torch.stack((skip_from, skip_to, near_from, near_to)).int()


def _kind(device):
    if torch.version.hip is not None:
        return "hip"
    return (
        "hopper"
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        else "cuda"
    )


def search(base, k, query, own, groups, query_groups, metric):
    """The operator -> (squared distances (Q, k) fp64, doubled for cosine, indices (Q, k), rows
    searched again (Q,)).

    own (Q,): the row of base that a query is itself, -1 for none; or None.
    """
    device, rows, count = base.device, len(base), len(query)
    distances = torch.empty(count, k, dtype=torch.float64, device=device)
    indices = torch.empty(count, k, dtype=torch.int64, device=device)
    redo = torch.empty(count, dtype=torch.int8, device=device)
    if groups is None and own is not None:  # every row is a group of its own
        groups, query_groups = torch.arange(rows, device=device), own
    mask = groups is not None
    order, order_q = torch.arange(rows, device=device), torch.arange(count, device=device)
    sorted_groups = sorted_query_groups = spans = None
    if mask:
        groups, query_groups = groups.contiguous().long(), query_groups.contiguous().long()
        sorted_groups, order = groups.sort(stable=True)
        sorted_query_groups, order_q = query_groups.sort(stable=True)
    base, query = base.contiguous(), query.contiguous()
    q, b, squares_q, squares_b, gamma, units = operands(base, query, metric, TF32)
    bias_q, bias_b = lower(squares_q, gamma), lower(squares_b, gamma)
    config, rescan = screen_config(k, base.shape[1], _kind(device)), rescan_config(k)
    tiles, tile = triton.cdiv(count, config["QUERIES"]), config["ROWS"]
    splits = max(
        rescan["KEEP"] // config["KEEP"], min(triton.cdiv(rows, 4 * tile), PROGRAMS // tiles)
    )
    if mask:
        spans = _spans(sorted_query_groups, sorted_groups, config["QUERIES"], tile)
    values = torch.empty(count, splits, config["KEEP"], dtype=torch.float32, device=device)
    sets = torch.empty(count, splits, config["KEEP"], dtype=torch.int32, device=device)
    cosine, width = metric == "cosine", base.shape[1]
    padding = (0, -width % 16)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        screen_kernel[(tiles, splits)](
            pad(q[order_q] * -2, padding),
            pad(b[order], padding),
            bias_b[order],
            sorted_query_groups,
            sorted_groups,
            spans,
            values,
            sets,
            count,
            rows,
            width + padding[1],
            MASK=mask,
            **config,
        )
        dropped = values.amax(2).amin(
            1
        )  # a program dropped no set whose bound is below its worst kept
        values, place = values.flatten(1).topk(rescan["KEEP"], dim=1, largest=False)
        dropped = torch.minimum(dropped, values.amax(1))
        back = torch.empty_like(order_q)
        back[order_q] = torch.arange(count, device=device)
        sets, dropped = sets.flatten(1).gather(1, place)[back], dropped[back]
        rescan_kernel[(count,)](
            query,
            base,
            order,
            bias_q,
            units,
            query_groups,
            groups,
            sets,
            dropped,
            distances,
            indices,
            redo,
            rows,
            width,
            k,
            MASK=mask,
            COSINE=cosine,
            ROWS=tile,
            **rescan,
        )
        redo_kernel[(count,)](
            query,
            base,
            query_groups,
            groups,
            distances,
            indices,
            redo,
            rows,
            width,
            k,
            MASK=mask,
            COSINE=cosine,
            **redo_config(k),
        )
    return distances, indices, redo.bool()

"""Exact nearest neighbours, leaving out those of the query's own group.

Every path screens with a matrix product in low precision and proves its result:

1. Screen. For every pair a lower bound of the squared distance, |q|^2 + |b|^2 - 2 q.b less a bound on all rounding. The
   rows of base are put in small sets and only each set's least bound is kept ("group-min screening"): any true
   neighbour lies in one of the k best sets, and the costly selection sees an eighth of the values.
2. Rescan. The members of the best sets by direct differences (fp64 here, fp32 on a GPU), ordered by (distance, index).
3. Certificate. A row whose k-th distance lies below every bound that was dropped is exact. Any other row (ties, mostly)
   is searched again without a screen.
"""

import numbers

import torch

from kernels.dispatch import use_triton

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def knn(
    base: torch.Tensor,
    k: int,
    query: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    query_groups: torch.Tensor | None = None,
    metric: str = "euclidean",
    return_distance: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The k nearest rows of base (N, D) for every row of query (Q, D), exactly; nearest first, ties by smaller index.

    query         without it every row of base is a query and never its own neighbour.
    groups        (N,) integers: neighbours with the query's own group are left out; with query, query_groups (Q,) too.
    metric        "euclidean", or "cosine" (1 - cosine similarity; a row of zeros has similarity 0 with everything).
    k             1 to 64; D up to 2,560.

    Returns indices (Q, k) int64, or (distances, indices) with return_distance, as scikit-learn does. Where fewer than k
    neighbours are admissible the rest are -1 at distance infinity. Inside torch.compile nobody looks for
    NaN and infinity.
    """
    _check(base, k, query, groups, query_groups, metric)
    run = (
        _search_op if torch.compiler.is_compiling() else _search
    )  # the operator's first call imports Dynamo: seconds
    query = None if query is None else query.detach()
    distance, index, _ = run(base.detach(), int(k), query, groups, query_groups, metric)
    return (distance, index) if return_distance else index


def _check(base, k, query, groups, query_groups, metric):
    for name, x in (("base", base), ("query", query)):
        if x is None and name == "query":
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected shape (N, D), got {tuple(x.shape)}")
        if x.shape[1] > 2560:
            raise ValueError(f"{name}: at most 2560 columns, got {x.shape[1]}")
        if x.device != base.device:
            raise ValueError(f"{name}: on {x.device}, but base is on {base.device}")
        if x.dtype != base.dtype or x.shape[1] != base.shape[1]:
            found, expected = (
                f"{x.dtype} with {x.shape[1]} columns",
                f"{base.dtype} with {base.shape[1]}",
            )
            raise ValueError(f"{name}: {found}, but base is {expected}")
        if not torch.compiler.is_compiling() and not x.sum().isfinite() and not x.isfinite().all():
            raise ValueError(f"{name}: contains NaN or infinity")
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 1 <= k <= 64:
        raise ValueError(f"k: expected 1 to 64, got {k}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: expected euclidean or cosine, got {metric!r}")
    if query is not None and (groups is None) != (query_groups is None):
        raise ValueError(
            "query_groups: groups and query_groups are needed together when query is given"
        )
    if query is None and query_groups is not None:
        raise ValueError(
            "query_groups: given without query; groups already says the groups of base"
        )
    for name, labels, rows in (("groups", groups, base), ("query_groups", query_groups, query)):
        if labels is None:
            continue
        if (
            not isinstance(labels, torch.Tensor)
            or labels.is_floating_point()
            or labels.is_complex()
        ):
            raise TypeError(f"{name}: expected an integer tensor")
        if labels.shape != rows.shape[:1]:
            raise ValueError(
                f"{name}: expected shape ({rows.shape[0]},), got {tuple(labels.shape)}"
            )
        if labels.device != base.device:
            raise ValueError(f"{name}: on {labels.device}, but base is on {base.device}")


# --- plain PyTorch: the reference, and what runs on a CPU -----------------------------------------------------------

SPARE = 8  # candidates beyond k: room for rows whose order the screen cannot tell
PANEL = 2048  # columns of scores at a time: with QUERIES rows their minima are taken while they are in a core's cache
QUERIES = 192
SCORES = 2**24  # values of a block of rows of scores, unless that is fewer than 32 rows
FP32, TF32 = 2.0**-24, 2.0**-11  # units of rounding
TINY = (
    2.0**-120
)  # more than a sum of 2,560 products loses to underflow; rows are scaled to values below 1
CACHED = 2**17  # fp64 values of the rescan at a time
SET = 8  # rows per set of the screen


def _rounded(x, unit):
    """x in fp32, or rounded to nearest to TF32's 11 bits where the hardware would cut (unit 2^-11)."""
    x = x.float()
    return x if unit < TF32 else (x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


def _operands(base, query, metric, unit):
    """Rows for the screen, and the halves of its lower bound: units * |q - b|^2 >= bias_q + bias_b - 2 q.b.

    The rows are fp32, scaled so that their squares are fp32 numbers, too, and centred (or, for cosine, of length 1).
    `unit` is the rounding unit of the product's operands. For any order of summation in fp32 the computed |q - b|^2 is
    off by at most gamma (|q| + |b|)^2 <= 2 gamma (|q|^2 + |b|^2), where gamma collects D fp32 additions, a few more
    roundings and the operands' own; taking 2 gamma off each half makes it a bound, and TINY covers what is lost
    below fp32's range.
    """
    gamma = (base.shape[1] + 16) * FP32 + 2.02 * unit
    if metric == "cosine":
        b = _rounded(_directions(base), unit)
        q = b if query is None else _rounded(_directions(query), unit)
        half = 1 - 2 * gamma  # |u - v|^2 = 2 - 2 u.v, which a row of zeros keeps
        return (
            q,
            b,
            q.new_full(q.shape[:1], half),
            b.new_full(b.shape[:1], half),
            b.new_ones((), dtype=torch.float64),
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    both = (base,) if query is None else (base, query)
    largest = torch.stack([side for x in both for side in x.aminmax()]).abs().amax()
    # A power of two, so exact; fp32 has none for the smallest numbers, which need no more to have a square.
    scale = torch.ldexp(
        torch.ones_like(largest, dtype=wide), -largest.to(wide).frexp()[1].clamp(-126, 126)
    )
    scaled = base.to(wide) * scale
    mean = scaled.mean(0)
    b = _rounded(scaled.sub_(mean), unit)
    q = b if query is None else _rounded((query.to(wide) * scale).sub_(mean), unit)
    bias_b = b.double().square().sum(1) * (1 - 2 * gamma) - TINY
    bias_q = bias_b if query is None else q.double().square().sum(1) * (1 - 2 * gamma) - TINY
    return q, b, bias_q.float(), bias_b.float(), scale.double().square()


def _directions(x):
    """Rows of length 1 in fp64; a row of zeros stays one."""
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length == 0, 1)


def _exact(base, query, rows, candidates, metric):
    """Squared distance, or twice the cosine distance, in fp64 of query[rows (R,)] to base[candidates (R, C)]."""
    step = max(1, CACHED // (candidates.shape[1] * base.shape[1]))
    distances = []
    for part, chosen in zip(rows.split(step), candidates.split(step), strict=True):
        a = query.index_select(0, part).double().unsqueeze(1)
        b = base.index_select(0, chosen.flatten()).double().view(*chosen.shape, base.shape[1])
        if metric == "euclidean":
            distances.append(b.sub_(a).square_().sum(-1))
        else:
            norms = a.norm(dim=-1) * b.norm(dim=-1)
            distances.append(2 - 2 * (a * b).sum(-1) / norms.masked_fill(norms == 0, 1))
    return torch.cat(distances)


def _ordered(distance, index, k):
    """The k first of each row by (distance, index); inadmissible candidates are at distance infinity."""
    index, order = index.sort(dim=1)
    distance, by_distance = distance.gather(1, order).sort(dim=1, stable=True)
    return distance[:, :k], index.gather(1, by_distance)[:, :k]


def _blocks(queries, labels, height):
    """Blocks of query rows: (rows, label that all of them have or None). Rows of large groups go together."""
    order = torch.arange(queries) if labels is None else labels.argsort(stable=True).cpu()
    plain = [(rows, None) for rows in order.split(height)]
    if labels is None:
        return plain
    values, counts = labels.unique(return_counts=True)
    grouped = [
        (rows, label)
        for label, part in zip(values.tolist(), order.split(counts.tolist()), strict=True)
        for rows in part.split(height)
    ]
    return grouped if len(grouped) <= 2 * len(plain) else plain


def _reference(base, k, query, groups, query_groups, metric):
    """The operator in PyTorch -> (distances (Q, k), indices (Q, k), rows without a certificate (Q,) bool)."""
    alone, n = query is None, base.shape[0]
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    queries = base if alone else query
    labels = groups if alone else query_groups
    distances = torch.full(
        (queries.shape[0], k), float("inf"), dtype=torch.float64, device=base.device
    )
    indices = torch.full((queries.shape[0], k), -1, dtype=torch.int64, device=base.device)
    redone = torch.zeros(queries.shape[0], dtype=torch.bool, device=base.device)
    if n == 0 or queries.shape[0] == 0:
        return distances.to(wide), indices, redone
    q, b, bias_q, bias_b, units = _operands(base, query, metric, FP32)
    # Column j of a panel of width w is a member of set j % (w / SET): vector minima find each set's least.
    panels = -(-n // PANEL)
    panel = -(-n // (panels * SET)) * SET
    padded = panels * panel
    # The half of the bound that belongs to base is one more column of the product: 1 times it is exact.
    table = torch.nn.functional.pad(b, (0, 1, 0, padded - n))
    table[:n, -1], table[n:, -1] = bias_b, float("inf")
    probe = torch.nn.functional.pad(q * -2, (0, 1), value=1.0)
    sets = panel // SET
    kept = min(k + SPARE, padded // SET)
    found = min(k, n)
    height = min(QUERIES, max(32, SCORES // padded))
    scores = table.new_empty(height, padded)
    least = table.new_empty(height, padded // SET)
    members = torch.arange(SET, device=base.device) * sets
    for rows, label in _blocks(queries.shape[0], labels, height):
        rows = rows.to(base.device)
        block, count = probe[rows], len(rows)
        if label is not None:
            table[:n, -1] = bias_b.masked_fill(groups == label, float("inf"))
        for start in range(0, padded, panel):
            part = slice(start, start + panel)
            score = scores[:count, part]
            torch.mm(block, table[part].T, out=score)
            if alone:
                inside = (rows >= start) & (rows < start + panel)
                score[inside, rows[inside] - start] = float("inf")
            if labels is not None and label is None:
                stop = min(start + panel, n)
                score[:, : stop - start].masked_fill_(
                    labels[rows, None] == groups[start:stop], float("inf")
                )
            torch.amin(
                score.unflatten(1, (SET, sets)),
                1,
                out=least[:count, start // SET : start // SET + sets],
            )
        bound, best = least[:count].topk(kept, dim=1, largest=False)
        dropped = (
            bound[:, -1].clone() if kept < padded // SET else bound.new_full((count,), float("inf"))
        )
        first = best // sets * panel + best % sets
        candidates = (first.unsqueeze(2) + members).flatten(1)
        members_kept = min(k + SPARE, candidates.shape[1])
        bound, best = scores[:count].gather(1, candidates).topk(members_kept, dim=1, largest=False)
        if members_kept < candidates.shape[1]:
            dropped = torch.minimum(dropped, bound[:, -1])
        candidates = candidates.gather(1, best)
        candidates = candidates.clamp(max=n - 1)
        exact = _exact(base, queries, rows, candidates, metric).masked_fill_(
            bound.isinf(), float("inf")
        )
        nearest, index = _ordered(exact, candidates, found)
        distances[rows, :found], indices[rows, :found] = (
            nearest,
            index.masked_fill(nearest.isinf(), -1),
        )
        redone[rows] = ~((dropped + bias_q[rows] > nearest[:, -1] * units) | dropped.isinf())
    table[:n, -1] = bias_b
    again = redone.nonzero().squeeze(1)
    for rows in again.split(max(1, 2**22 // n)) if len(again) else ():
        limit = distances[rows, found - 1] * units
        nearest, index = _redo(
            base,
            queries,
            rows,
            found,
            limit,
            alone,
            groups,
            labels,
            metric,
            lambda part: bias_q[part, None] + probe[part] @ table[:n].T,
        )
        distances[rows, :found], indices[rows, :found] = nearest, index
    if metric == "cosine":
        distances.div_(2).clamp_(min=0)
    else:
        distances.sqrt_()
    return distances.to(wide), indices, redone


def _admissible(candidates, rows, alone, groups, labels, n):
    allowed = candidates < n
    if alone:
        allowed &= candidates != rows.unsqueeze(1)
    if groups is not None:
        allowed &= groups[candidates.clamp(max=n - 1)] != labels[rows].unsqueeze(1)
    return allowed


def _redo(base, queries, rows, k, limit, alone, groups, labels, metric, lower):
    """Neighbours of `rows` among all of base whose lower bound does not exceed `limit`, a distance that k rows keep."""
    n = base.shape[0]
    every = torch.arange(n, device=base.device).expand(len(rows), n)
    possible = _admissible(every, rows, alone, groups, labels, n) & (
        lower(rows) <= limit.unsqueeze(1)
    )
    row, column = possible.nonzero(as_tuple=True)
    distance = _exact(base, queries, rows[row], column.unsqueeze(1), metric).squeeze(1)
    order = distance.argsort(stable=True)  # ties stay in the order of nonzero: by index
    order = order[row[order].argsort(stable=True)]
    row, column, distance = row[order], column[order], distance[order]
    counts = possible.sum(1)
    place = torch.arange(len(row), device=base.device) - (counts.cumsum(0) - counts)[row]
    nearest = torch.full((len(rows), k), float("inf"), dtype=torch.float64, device=base.device)
    index = torch.full((len(rows), k), -1, dtype=torch.int64, device=base.device)
    first = place < k
    nearest[row[first], place[first]], index[row[first], place[first]] = (
        distance[first],
        column[first],
    )
    return nearest, index


# --- operator -------------------------------------------------------------------------------------------------------


def _search(
    base: torch.Tensor,
    k: int,
    query: torch.Tensor | None,
    groups: torch.Tensor | None,
    query_groups: torch.Tensor | None,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> distances (Q, k), indices (Q, k), rows searched again (Q,)."""
    with torch.autocast(base.device.type, enabled=False):
        if base.dtype == torch.float64 or not use_triton(base.device):
            return _reference(base, k, query, groups, query_groups, metric)
        from kernels import knn_triton

        return knn_triton.search(base, k, query, groups, query_groups, metric)


_search_op = torch.library.custom_op("g2l::knn", _search, mutates_args=())


@_search_op.register_fake
def _(base, k, query, groups, query_groups, metric):
    rows = (base if query is None else query).shape[0]
    distances = base.new_empty(
        rows, k, dtype=torch.float64 if base.dtype == torch.float64 else torch.float32
    )
    return (
        distances,
        distances.new_empty(rows, k, dtype=torch.int64),
        distances.new_empty(rows, dtype=torch.bool),
    )

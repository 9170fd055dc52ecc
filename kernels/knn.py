"""Exact nearest neighbours, leaving out those of the query's own group.

Every path screens with a matrix product and proves its result:

0. Copies. Of equal rows of base in one group only the first k + 1 can be neighbours; the others
   are left out.
1. Screen. For every pair a lower bound of the squared distance, |q|^2 + |b|^2 - 2 q.b less a bound
   on all rounding.
2. Rescan. Where that rounding could change the order, or the digits that are returned, differences
   in fp64, ordered by (distance, index).
3. Certificate. A row whose k-th distance lies below every bound that was dropped is exact. For any
   other row all rows whose bound is not above its k-th distance are compared.

In plain PyTorch, which is what runs on a CPU, few or wide rows are screened in fp64, so that few of
them need a rescan, many narrow ones in fp32. The least bounds are found from the top down: rows are
put in sets of 8, these in sets of 8 again, and only the members of the best sets are sorted. In
Triton: knn_triton.py.
"""

import numbers
from math import ceil, inf, isfinite

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from kernels.bound import FP32, FP64, TINY, lower, operands, scaled
from kernels.dispatch import check_tensor, use_triton


def knn(
    base: Tensor,
    k: int,
    query: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    metric: str = "euclidean",
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k nearest rows of base (N, D) for every row of query (Q, D), exactly.

    Nearest first, ties by smaller index.

    query         without it every row of base is a query and never its own neighbour.
    groups        (N,) integers: neighbours with the query's own group are left out; with query,
                  query_groups (Q,) too.
    metric        "euclidean", or "cosine" (1 - cosine similarity; a row of zeros has similarity 0
                  with everything).
    k             1 to 64; D up to 2,560.

    Returns indices (Q, k) int64, or (distances, indices) with return_distance, as scikit-learn
    does. Where fewer than k neighbours are admissible the rest are -1 at distance infinity. Raises
    TypeError or ValueError that begins with the argument's name; inside torch.compile nobody looks
    for NaN and infinity.
    """
    _check_rows("base", base, base)
    if query is not None:
        _check_rows("query", query, base)
        query = query.detach()
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 1 <= k <= 64:
        raise ValueError(f"k: expected 1 to 64, got {k}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: expected euclidean or cosine, got {metric!r}")
    _check_groups(base, query, groups, query_groups)
    # The operator's first call imports Dynamo, which takes seconds.
    run = _search_op if torch.compiler.is_compiling() else _search
    inputs = (base.detach(), int(k), query, groups, query_groups, metric)
    distance, index, _ = run(*inputs)
    return (distance, index) if return_distance else index


def _check_rows(name, x, base):
    check_tensor(name, x, "base", base)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (N, D), got {tuple(x.shape)}")
    if x.shape[1] > 2560:
        raise ValueError(f"{name}: at most 2560 columns, got {x.shape[1]}")
    if x.dtype != base.dtype or x.shape[1] != base.shape[1]:
        raise ValueError(
            f"{name}: {x.dtype} with {x.shape[1]} columns, "
            f"but base is {base.dtype} with {base.shape[1]}"
        )
    if torch.compiler.is_compiling():
        return
    if len(x) and not all(map(isfinite, x.aminmax())):
        raise ValueError(f"{name}: contains NaN or infinity")


def _check_groups(base, query, groups, query_groups):
    if query is None and query_groups is not None:
        raise ValueError("query_groups: given without query; groups says the groups of base")
    if query is not None and (groups is None) != (query_groups is None):
        raise ValueError("query_groups: needed together with groups when query is given")
    for name, labels, rows in (
        ("groups", groups, base),
        ("query_groups", query_groups, query),
    ):
        if labels is None:
            continue
        if not isinstance(labels, Tensor):
            raise TypeError(f"{name}: expected an integer tensor, got {type(labels).__name__}")
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name}: expected an integer tensor, got {labels.dtype}")
        if labels.shape != rows.shape[:1]:
            found = tuple(labels.shape)
            raise ValueError(f"{name}: expected shape ({rows.shape[0]},), got {found}")
        if labels.device != base.device:
            raise ValueError(f"{name}: on {labels.device}, but base is on {base.device}")


# --- what both paths share ---------------------------------------------------------------------

FEW = 8192
UNRESOLVED = 2.0**-960  # below it squares of fp64 numbers of about 1 underflow
MIX = 0x2545F4914F6CDD1D  # odd, so that products with its powers modulo 2^64 lose no bit


def _first_copies(base, groups, copies):
    """Rows that are among the first `copies` equal ones of their group, ascending; None: all are.

    Rows are told apart by a polynomial of their bits modulo 2^64, and those with one key compared.
    """
    if base.is_cuda and len(base) <= FEW:
        return None  # copies fill a list, and then all rows are compared, which costs less
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    integers = sizes[base.element_size()]
    powers = torch.full((base.shape[1],), MIX, device=base.device).cumprod(0)
    keys = []
    for part in base.split(2**16):
        bits = (part + 0.0).view(integers)  # -0.0 becomes 0.0
        keys.append((bits * powers).sum(1))
    key = torch.cat(keys)
    if groups is not None:
        key += groups * (MIX >> 1)
    key, order = key.sort(stable=True)
    again = key[copies:] == key[:-copies]
    surplus = order[copies:][again]
    if len(surplus) == 0:
        return None
    same = key[1:] == key[:-1]
    row = order[1:][same]
    other = order[:-1][same]
    equal = (base[row] == base[other]).all()
    if groups is not None:
        alike = groups[row] == groups[other]
        equal &= alike.all()
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[surplus] = False
    return kept.nonzero().squeeze(1) if equal else None


# --- plain PyTorch: the reference, and what runs on a CPU ----------------------------------------

SPARE = 6  # candidates beyond k, half in fp64: room for rows whose order the screen cannot tell
PANEL = 2048  # columns of scores whose minima are taken while they are in a core's cache
QUERIES = 1024  # rows of a panel
SCORES = 2**24  # values of a block of rows of scores, unless that is fewer than 32 rows
CACHED = 2**17  # values of the rescan at a time
SET = 8  # members of a set of the screen
MANY, NARROW = (
    2048,
    128,
)  # rows and columns from and up to which fp32 and a rescan are faster


def _differences(base, query, rows, candidates, metric):
    """fp64 distances (squared, or twice the cosine's) of query[rows] to base[candidates (R, C)]."""
    values = candidates.shape[1] * base.shape[1]
    step = max(1, CACHED // values)
    distances = []
    parts = zip(rows.split(step), candidates.split(step), strict=True)
    for part, chosen in parts:
        a = query[part].double().unsqueeze(1)
        b = embedding(chosen, base).double()  # twice as fast as base[chosen]
        if metric == "euclidean":
            distances.append(b.sub_(a).square_().sum(-1))
        else:
            norms = a.norm(dim=-1) * b.norm(dim=-1)
            norms.masked_fill_(norms == 0, 1)
            cosines = (a * b).sum(-1) / norms
            distances.append(2 - 2 * cosines)
    return torch.cat(distances)


class _Screen:
    """Lower bounds of all distances from blocks of queries to base, less the queries' own half.

    Column j of a panel of width w is a member of set j % (w / SET), so that vector minima find
    each set's least.
    """

    def __init__(self, base, query, own, groups, labels, metric):
        self.own = own
        self.groups = groups
        self.labels = labels
        self.n = len(base)
        fast = len(base) > MANY and base.shape[1] <= NARROW
        self.spare = SPARE if fast else SPARE // 2
        found = operands(base, query, metric, FP32 if fast else FP64)
        q, b, self.squares_q, self.squares_b, self.gamma = found
        self.half_q = lower(self.squares_q, self.gamma).to(q.dtype)
        panels = ceil(self.n / PANEL)
        unit = SET**2
        self.panel = max(2, ceil(self.n / (panels * unit))) * unit
        self.width = panels * self.panel
        # base's half of the bound is one more column of the product: 1 times it is exact
        self.table = pad(b, (0, 1, 0, self.width - self.n))
        self.table[: self.n, -1] = lower(self.squares_b, self.gamma)
        self.table[self.n :, -1] = inf
        self.probe = pad(q * -2, (0, 1), value=1.0)
        self.height = min(QUERIES, len(q), max(32, SCORES // self.width))
        self.scores = self.table.new_empty(self.height, self.width)
        self.least = self.table.new_empty(self.height, self.width // SET)

    def best(self, rows, k):
        """The k rows of base and some to spare with the least bounds for each query of a slice.

        -> rows (R, k + spare), clipped to those there are, bounds in ascending order, and the
        largest errors (R, k) of the first k.
        """
        scores, least = self._block(rows)
        columns, bound = _least(scores, least, self.panel, k + self.spare)
        columns = columns.clamp(max=self.n - 1)
        squares = self.squares_q[rows, None] + self.squares_b.take(columns[:, :k])
        error = squares * (4 * self.gamma) + 4 * TINY
        return columns, bound + self.half_q[rows, None], error

    def _block(self, rows):
        """Scores (R, width) and their sets' minima (R, width / SET) of a slice of queries."""
        probe = self.probe[rows]
        scores = self.scores[: len(probe)]
        least = self.least[: len(probe)]
        for start in range(0, self.width, self.panel):
            score = scores[:, start : start + self.panel]
            part = self.table[start : start + self.panel]
            torch.mm(probe, part.T, out=score)
            self._mask(score, rows, start)
            minima = least[:, start // SET : (start + self.panel) // SET]
            torch.amin(score.unflatten(1, (SET, -1)), 1, out=minima)
        return scores, least

    def _mask(self, score, rows, start):
        """Infinity for the queries themselves and rows of their own groups in a panel."""
        if self.own is not None:
            column = self.own[rows] - start
            inside = (column >= 0) & (column < score.shape[1])
            row = inside.nonzero().squeeze(1)
            score[row, column[row]] = inf
        if self.groups is not None:
            groups = self.groups[start : start + score.shape[1]]
            same = self.labels[rows, None] == groups
            score[:, : len(groups)].masked_fill_(same, inf)

    def below(self, rows, limit):
        """Pairs (place in rows (R,), row of base) that may be nearer than limit (R,)."""
        score = self.probe[rows] @ self.table[: self.n].T
        self._mask(score, rows, 0)
        possible = score.add_(self.half_q[rows, None]) <= limit.unsqueeze(1)
        return (possible & (score < inf)).nonzero(as_tuple=True)


def _least(scores, least, panel, count):
    """Columns and values of the `count` least of each row of scores; they lie in the best sets.

    No other score is below the last value, which is lowered by what the order is blind to.
    """
    levels = [(scores, panel // SET)]
    while least.shape[1] % SET == 0 and least.shape[1] >= 2 * SET * count:
        levels.append((least, least.shape[1] // SET))
        least = least.unflatten(1, (SET, -1)).amin(1)
    bits = max(least.shape[1], SET * count).bit_length()
    columns = _smallest(least, count, bits)
    for values, sets in reversed(levels):
        step = torch.arange(0, SET * sets, sets, device=values.device)
        first = columns + columns // sets * (sets * (SET - 1))  # of the set's members
        columns = (first.unsqueeze(2) + step).flatten(1)
        members = values.gather(1, columns)
        chosen = _smallest(members, count, bits)
        columns = columns.gather(1, chosen)
    bound = members.gather(1, chosen)
    finite = bound[:, -1].abs().clamp(max=torch.finfo(bound.dtype).max)
    bound[:, -1] -= finite * 2.0 ** (bits - 49)  # the blindness of each of up to 8 levels
    return columns, bound


def _smallest(values, count, bits):
    """Places of the `count` least values of each row (all, if there are fewer), ascending.

    On a CPU the place rides in the last bits of its value, because numpy sorts bare doubles several
    times faster than topk selects pairs. fp32 leaves these bits free; of fp64 the order is blind
    to the last `bits` of 52.
    """
    if values.device.type != "cpu":
        return values.topk(min(count, values.shape[1]), dim=1, largest=False).indices
    keys = values.double().clamp(max=torch.finfo(torch.float64).max)  # no NaN when bits are set
    places = keys.view(torch.int64)
    places &= -(2**bits)
    places |= torch.arange(values.shape[1], device=values.device)
    keys.numpy().sort(axis=1)
    return places[:, :count] & (2**bits - 1)


def _reference(base, k, query, own, groups, labels, metric, exactly):
    """The operator in PyTorch -> squared distances, indices (Q, k), rows searched again (Q,).

    own (Q,): the row of base that a query is itself, -1 for none; or None. Rows are fp64 with
    squares that are numbers, and so are distances; those of cosine are doubled. `exactly`: to all
    of fp64's digits, else to fp32's.
    """
    queries = len(query)
    distances = query.new_empty(queries, k, dtype=torch.float64)
    indices = query.new_empty(queries, k, dtype=torch.int64)
    redone = query.new_empty(queries, dtype=torch.bool)
    screen = _Screen(base, query, own, groups, labels, metric)
    for start in range(0, queries, screen.height):
        rows = slice(start, start + screen.height)
        columns, bound, error = screen.best(rows, k)
        distance = bound[:, :k].double()
        index = columns[:, :k].clone()
        following = bound[:, 1 : k + 1]
        settled = (bound[:, :k] + error < following) | (following == inf)
        # fp32, which is returned, shows nothing of a 2^30th
        settled &= distance > 2.0**30 * error
        sure = settled.all(1) & (not exactly)
        again = (~sure).nonzero().squeeze(1)
        if len(again):
            exact = _differences(base, query, start + again, columns[again], metric)
            exact = exact.masked_fill_(bound[again] == inf, inf)
            columns, order = columns[again].sort(dim=1)
            exact = exact.gather(1, order)
            exact, by_distance = exact.sort(dim=1, stable=True)
            distance[again] = exact[:, :k]
            index[again] = columns.gather(1, by_distance)[:, :k]
        distances[rows] = distance
        indices[rows] = index
        dropped = bound[:, -1]
        redone[rows] = (distance[:, -1] >= dropped) & (dropped < inf)
    left = redone.nonzero().squeeze(1)
    parts = left.split(max(1, 2**22 // len(base))) if len(left) else ()
    for rows in parts:
        row, index = screen.below(rows, distances[rows, -1])
        distance = _differences(base, query, rows[row], index.unsqueeze(1), metric)
        found = _nearest_pairs(row, index, distance.squeeze(1), len(rows), k)
        distances[rows], indices[rows] = found
    indices.masked_fill_(distances == inf, -1)
    return distances, indices, redone


def _nearest_pairs(row, index, distance, rows, k):
    """The k first by (distance, index) of each row, from pairs ordered by (row, index)."""
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    index = index[order]
    distance = distance[order]
    begin = torch.searchsorted(row, row)
    place = torch.arange(len(row), device=row.device) - begin
    first = place < k
    at = row[first], place[first]
    nearest = distance.new_full((rows, k), inf)
    nearest[at] = distance[first]
    indices = index.new_full((rows, k), -1)
    indices[at] = index[first]
    return nearest, indices


# --- operator ------------------------------------------------------------------------------------


def _search(
    base: Tensor,
    k: int,
    query: Tensor | None,
    groups: Tensor | None,
    query_groups: Tensor | None,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> distances (Q, k), indices (Q, k), rows searched again (Q,)."""
    rows = base if query is None else query
    labels = groups if query is None else query_groups
    if len(base) == 0 or len(rows) == 0:
        distance = rows.new_full((len(rows), k), inf, dtype=_wide(rows))
        index = torch.full_like(distance, -1, dtype=torch.int64)
        return distance, index, index.new_zeros(len(rows), dtype=torch.bool)
    own = None
    if query is None and groups is None:
        own = torch.arange(len(base), device=base.device)
    kept = _first_copies(base, groups, k + 1)
    if kept is not None:
        base = base[kept]
        groups = None if groups is None else groups[kept]
        if own is not None:
            own = torch.full_like(own, -1)
            own[kept] = torch.arange(len(kept), device=kept.device)
    with torch.autocast(base.device.type, enabled=False):
        distance, index, redone = _distances(base, k, rows, own, groups, labels, metric)
    if kept is not None:
        index = torch.where(index < 0, -1, kept[index])
    return distance.to(_wide(rows)), index, redone


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _distances(base, k, query, own, groups, labels, metric):
    """By one of the two paths; see _search."""
    inputs = (own, groups, labels, metric)
    double = base.dtype == torch.float64
    scale = 1.0
    if not double and use_triton(base.device):
        from kernels.knn_triton import search

        squares, index, redone = search(base, k, query, *inputs)
    else:
        sides = [base] if query is base else [base, query]
        sides, scale = scaled(sides, torch.float64, metric == "cosine")
        squares, index, redone = _reference(sides[0], k, sides[-1], *inputs, double)
        if metric == "euclidean":
            _check_resolved(sides[0], sides[-1], squares, index)
    if metric == "cosine":
        return squares.div_(2).clamp_(min=0), index, redone
    return squares.sqrt_().mul_(scale), index, redone


def _check_resolved(base, query, distance, index):
    """Raise ValueError where rows that differ came out at a distance too small for fp64 squares."""
    row, place = (distance < UNRESOLVED).nonzero(as_tuple=True)
    if len(row) and (query[row] != base[index[row, place]]).any():
        raise ValueError(
            "base: holds rows that differ by less than 1e-144 of the largest number; "
            "fp64 cannot tell their distances"
        )


_search_op = torch.library.custom_op("g2l::knn", _search, mutates_args=())


@_search_op.register_fake
def _(base, k, query, groups, query_groups, metric):
    rows = base if query is None else query
    distances = rows.new_empty(len(rows), k, dtype=_wide(rows))
    indices = distances.new_empty(len(rows), k, dtype=torch.int64)
    return distances, indices, distances.new_empty(len(rows), dtype=torch.bool)

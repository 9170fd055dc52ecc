"""Exact nearest neighbours, leaving out those of the query's own group."""

import torch

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
    neighbours are admissible the rest are -1 at distance infinity.
    """
    _check(base, k, query, groups, query_groups, metric)
    distance, index = _plain(base, k, query, groups, query_groups, metric)
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
            raise ValueError(f"{name}: {x.dtype} with {x.shape[1]} columns, but base is {base.dtype} with {base.shape[1]}")
        if not torch.compiler.is_compiling() and not x.isfinite().all():
            raise ValueError(f"{name}: contains NaN or infinity")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 1 <= k <= 64:
        raise ValueError(f"k: expected 1 to 64, got {k}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: expected euclidean or cosine, got {metric!r}")
    if query is not None and (groups is None) != (query_groups is None):
        raise ValueError("query_groups: groups and query_groups are needed together when query is given")
    if query is None and query_groups is not None:
        raise ValueError("query_groups: given without query; groups already says the groups of base")
    for name, labels, rows in (("groups", groups, base), ("query_groups", query_groups, query)):
        if labels is None:
            continue
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name}: expected an integer tensor")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name}: expected shape ({rows.shape[0]},), got {tuple(labels.shape)}")
        if labels.device != base.device:
            raise ValueError(f"{name}: on {labels.device}, but base is on {base.device}")


def _plain(base, k, query, groups, query_groups, metric):
    alone = query is None
    rows, wide = base.shape[0], base.double()
    if metric == "cosine":
        wide = torch.nn.functional.normalize(wide)
    queries = wide if alone else (query.double() if metric == "euclidean" else torch.nn.functional.normalize(query.double()))
    query_groups = groups if alone else query_groups
    distances = torch.full((queries.shape[0], k), float("inf"), dtype=torch.float64, device=base.device)
    indices = torch.full((queries.shape[0], k), -1, dtype=torch.int64, device=base.device)
    step = max(1, 2**24 // max(rows, 1))
    for start in range(0, queries.shape[0], step):
        part = slice(start, start + step)
        if metric == "cosine":
            d = 1 - queries[part] @ wide.T
        else:
            d = torch.cdist(queries[part], wide, compute_mode="donot_use_mm_for_euclid_dist")
        if groups is not None:
            d.masked_fill_(query_groups[part, None] == groups, float("inf"))
        if alone:
            d[torch.arange(d.shape[0]), torch.arange(start, start + d.shape[0])] = float("inf")
        values, order = d.sort(dim=1, stable=True)
        kept = min(k, rows)
        distances[part, :kept] = values[:, :kept]
        indices[part, :kept] = order[:, :kept].masked_fill(values[:, :kept].isinf(), -1)
    exact = torch.float64 if base.dtype == torch.float64 else torch.float32
    return distances.to(exact), indices

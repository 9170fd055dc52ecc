"""Exact nearest neighbours against all distances in fp64: the plain path, then the interpreter.

TRITON_INTERPRET has to be set before Triton is imported, so the interpreted tests run in a process
of their own, which the last test starts. Memory is poisoned there: what a kernel leaves unwritten
shows as NaN or as a wrong number.
"""

import importlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.neighbors import NearestNeighbors

from kernels import bound, knn

knn_module = importlib.import_module("kernels.knn")  # `kernels.knn` itself is the function
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
plain = pytest.mark.skipif(INTERPRETED, reason="does not concern Triton")


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    if not INTERPRETED:
        return
    monkeypatch.setenv("G2L_KERNELS", "triton")
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 111)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def brute(base, k, query=None, groups=None, query_groups=None, metric="euclidean"):
    """All distances in fp64, a stable sort, the first k."""
    b, q = base.double(), (base if query is None else query).double()
    if metric == "euclidean":
        distance = ((q[:, None] - b[None]) ** 2).sum(-1).sqrt()
    else:
        norms = q.norm(dim=1)[:, None] * b.norm(dim=1)
        distance = 1 - q @ b.T / norms.masked_fill(norms == 0, 1)
    if query is None:
        distance.fill_diagonal_(math.inf)
        query_groups = groups
    if groups is not None:
        distance[query_groups[:, None] == groups] = math.inf
    distance = torch.cat((distance, torch.full((len(q), k), math.inf)), 1)
    distance, index = distance.sort(dim=1, stable=True)
    return distance[:, :k], index.masked_fill(distance.isinf(), -1)[:, :k]


def lattice(n, width):
    """Whole numbers: distances are exact in every precision and full of ties."""
    return torch.randint(-2, 3, (n, width)).float()


@pytest.mark.parametrize("panel", [128, 2048])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("labels", [None, 3, 100])
@pytest.mark.parametrize(
    ("n", "width", "k", "queries"),
    [
        (1, 3, 2, None),
        (5, 2, 7, None),
        (300, 50, 15, None),
        (700, 20, 64, 50),
        (260, 130, 20, None),
        (0, 4, 2, 3),
    ],
)
def test_knn_equals_brute_force(monkeypatch, panel, metric, labels, n, width, k, queries):
    monkeypatch.setattr(knn_module, "PANEL", panel)
    monkeypatch.setattr(knn_module, "MANY", 0 if panel == 128 else 2048)  # fp32, fp64
    monkeypatch.setattr(knn_module, "SCORES", 40 * panel)  # blocks of 32 or 40 rows
    for make in (torch.randn, lattice):
        base, query = make(n, width), None if queries is None else make(queries, width)
        groups = None if labels is None else torch.randint(labels, (n,))
        query_groups = (
            None if labels is None or query is None else torch.randint(labels, (queries,))
        )
        options = {"groups": groups, "query_groups": query_groups, "metric": metric}
        if metric == "cosine" and make is lattice:
            continue  # angles of whole numbers tie only up to rounding
        distance, index = knn(base, k, query, return_distance=True, **options)
        expected, expected_index = brute(base, k, query, **options)
        assert index.dtype == torch.int64 and distance.dtype == torch.float32
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(distance.double(), expected, atol=1e-5, rtol=1e-6)
        assert torch.equal(knn(base, k, query, **options), index)


def test_knn_far_from_the_origin_and_in_every_type():
    base = torch.randn(500, 30) * 0.1 + 100
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = base.to(dtype)
        assert torch.equal(knn(x, 10), brute(x, 10)[1])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knn_at_every_magnitude(metric, dtype):
    base, query = torch.randn(300, 10, dtype=dtype), torch.randn(20, 10, dtype=dtype)
    for size in (1e-37, 1e-23, 1e-13, 1e19, 1e37):
        for q in (None, query * size):
            distance, index = knn(base * size, 4, q, metric=metric, return_distance=True)
            expected, expected_index = brute(base * size, 4, q, metric=metric)
            assert torch.equal(index, expected_index)
            assert (distance - expected).abs().max() <= 1e-6 * expected.max()
    for size in (
        1e-30,
        1e-14,
        1e25,
    ):  # a few rows of another magnitude; among them ties up to rounding
        mixed = torch.cat((query * size, base))
        distance, index = knn(mixed, 4, metric=metric, return_distance=True)
        expected, expected_index = brute(mixed, 4, metric=metric)
        assert metric == "euclidean" or torch.equal(index, expected_index)
        assert (index >= 0).all()
        torch.testing.assert_close(
            distance.double(), expected, atol=1e-6 if metric == "cosine" else 0, rtol=1e-6
        )


def test_knn_with_every_row_twice_or_all_rows_equal():
    base = torch.randn(1000, 8)
    base[500:] = base[:500]
    _, index, redone = knn_module._search(base, 15, None, None, None, "euclidean")
    assert torch.equal(index, brute(base, 15)[1])
    assert redone.float().mean() < 0.1
    same = torch.zeros(300, 5)
    same[::2] *= -1  # -0.0 is equal to 0.0
    for groups in (None, torch.arange(300) % 3, torch.arange(300)):
        assert torch.equal(knn(same, 4, groups=groups), brute(same, 4, groups=groups)[1])


def test_knn_redoes_rows_that_the_screen_cannot_prove():
    base = torch.eye(200)  # all others are equally far
    _, index, redone = knn_module._search(base, 4, None, None, None, "euclidean")
    assert redone.all() and torch.equal(index, brute(base, 4)[1])


@pytest.mark.parametrize("step", [2.0**-44, 2.0**-50])
def test_knn_among_distances_that_differ_in_their_last_digits(step):
    radius = 1 + step * torch.randperm(600).double()
    near = torch.stack((radius, torch.zeros_like(radius)), 1)
    near[::2] *= -1
    base = torch.cat((near, torch.randn(400, 2, dtype=torch.float64) + 5))
    centre = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(knn(base, 15, centre)[0], radius.argsort()[:15])


def clusters(n, width, count, spread):
    return torch.randn(count, width)[torch.randint(count, (n,))] + spread * torch.randn(n, width)


@pytest.mark.parametrize("many", [0, 2048])
@pytest.mark.parametrize("spread", [0.1, 1e-3, 1e-5])
def test_knn_in_tight_clusters(monkeypatch, spread, many):
    monkeypatch.setattr(knn_module, "MANY", many)
    base = clusters(500, 50, 4, spread)
    _, index, redone = knn_module._search(base, 15, None, None, None, "euclidean")
    assert torch.equal(index, brute(base, 15)[1])
    assert spread < 0.1 or not redone.any()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("labels", [None, 10])
def test_knn_among_identical_rows_searches_few_again(share, value, labels):
    base = torch.randn(400, 50)
    base[torch.rand(400) < share] = value
    groups = None if labels is None else torch.randint(labels, (400,))
    _, index, redone = knn_module._search(base, 15, None, groups, None, "euclidean")
    assert torch.equal(index, brute(base, 15, groups=groups)[1])
    assert value == 0 or labels or redone.float().mean() < 0.05


def test_knn_copies_are_told_by_their_rows_not_by_their_keys(monkeypatch):
    monkeypatch.setattr(knn_module, "MIX", 0)  # every row has one key
    base = lattice(300, 3)
    assert torch.equal(knn(base, 5), brute(base, 5)[1])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_knn_is_the_same_under_every_switch(precision):
    base = clusters(300, 200, 10, 0.1)
    expected = knn(base, 10, return_distance=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = knn(base, 10, return_distance=True)
        assert torch.get_float32_matmul_precision() == precision
        with torch.autocast("cpu", torch.bfloat16):
            again = knn(base, 10, return_distance=True)
    finally:
        torch.set_float32_matmul_precision(before)
    for ours in (found, again):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_knn_in_fp64_at_every_magnitude(metric, size):
    base, query = torch.randn(2, 200, 10, dtype=torch.float64)
    for q in (None, query):
        expected, expected_index = brute(base, 4, q, metric=metric)
        q = None if q is None else q * size
        distance, index = knn(base * size, 4, q, metric=metric, return_distance=True)
        assert torch.equal(index, expected_index)
        scale = 1 if metric == "cosine" else size
        torch.testing.assert_close(distance / scale, expected, rtol=1e-12, atol=1e-14)


def test_knn_in_fp64_refuses_what_its_squares_cannot_tell():
    base = torch.randn(50, 3, dtype=torch.float64) * 1e-200
    assert torch.equal(knn(base, 3), knn(base * 1e200, 3))
    base[0] = 1e10
    with pytest.raises(ValueError, match="base: holds rows that differ"):
        knn(base, 3)
    base[1] = base[0] * 2  # parallel rows may differ
    assert (knn(base, 3, metric="cosine") >= 0).all()


def test_knn_under_another_default_device():
    base, groups = torch.randn(300, 5), torch.arange(300) % 7
    base[:100] = base[0]
    expected = knn(base, 3, groups=groups), knn(base.double(), 3)
    with torch.device("meta"):
        found = knn(base, 3, groups=groups), knn(base.double(), 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@plain
def test_the_bound_holds_for_tensor_cores_that_cut():
    base, query = torch.rand(20, 2560) + 1, torch.rand(5, 2560) + 1  # so that the scale is 1
    base[10:] -= 2  # other signs, too
    q, b, squares_q, squares_b, gamma = bound.operands(base, query, "euclidean", bound.TF32)

    def cut(x):
        return (x.view(torch.int32) & -2).view(torch.float32)  # one bit less than truncation

    score = bound.lower(squares_b, gamma).float().expand(5, 20)
    for first in range(0, 2560, 4):
        product = cut(-2 * q[:, None, first : first + 4] * b[:, first : first + 4])
        score = cut(score + product.sum(-1))
    lower = bound.lower(squares_q, gamma)[:, None] + score
    exact = torch.cdist(query.double(), base.double()).square()
    assert (lower <= exact).all()


def test_knn_equals_sklearn_on_clusters():
    base = torch.cat([torch.randn(1000, 50) + 4 * torch.randn(50) for _ in range(3)])
    distance, index = (
        NearestNeighbors(n_neighbors=16, algorithm="brute")
        .fit(base.double())
        .kneighbors(base.double())
    )
    ours, ours_index = knn(base, 15, return_distance=True)
    assert (ours_index.numpy() == index[:, 1:]).all()
    np.testing.assert_allclose(ours, distance[:, 1:], rtol=1e-5)


def test_knn_prefixes_are_the_neighbours_for_smaller_k_and_bits_repeat():
    base, groups = torch.randn(600, 20), torch.arange(600) // 7
    distance, index = knn(base, 20, groups=groups, return_distance=True)
    assert torch.equal(knn(base, 5, groups=groups), index[:, :5])
    again, _ = knn(base, 20, groups=groups, return_distance=True)
    assert torch.equal(again, distance)
    assert torch.equal(knn(base[:, ::2], 5), knn(base[:, ::2].contiguous(), 5))


def test_knn_of_a_zero_row_by_cosine():
    base = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [2.0, 0.1]])
    distance, index = knn(base, 3, metric="cosine", return_distance=True)
    assert index[0].tolist() == [1, 2, 3] and distance[0].tolist() == [1, 1, 1]
    assert index[1].tolist() == [3, 0, 2] and distance[1, 2] == 2


X, G = torch.randn(8, 4), torch.arange(8)


@pytest.mark.parametrize(
    ("error", "name", "arguments", "options"),
    [
        (TypeError, "base", ([[1.0]], 1), {}),
        (TypeError, "base", (X.long(), 1), {}),
        (ValueError, "base", (X[0], 1), {}),
        (ValueError, "base", (torch.ones(2, 2561), 1), {}),
        (ValueError, "base", (X * math.nan, 1), {}),
        (ValueError, "query", (X, 1, X / 0), {}),
        (ValueError, "query", (X, 1, X[:, :2]), {}),
        (ValueError, "query", (X, 1, X.double()), {}),
        (ValueError, "query", (X, 1, X.to("meta")), {}),
        (ValueError, "k", (X, 0), {}),
        (ValueError, "k", (X, 65), {}),
        (TypeError, "k", (X, 2.0), {}),
        (TypeError, "k", (X, True), {}),
        (ValueError, "metric", (X, 1), {"metric": "manhattan"}),
        (TypeError, "groups", (X, 1), {"groups": G.float()}),
        (ValueError, "groups", (X, 1), {"groups": G[:5]}),
        (ValueError, "query_groups", (X, 1, X), {"groups": G}),
        (ValueError, "query_groups", (X, 1, X), {"query_groups": G}),
        (ValueError, "query_groups", (X, 1), {"groups": G, "query_groups": G}),
        (ValueError, "query_groups", (X, 1, X), {"groups": G, "query_groups": G[:3]}),
    ],
)
def test_knn_names_the_bad_argument(error, name, arguments, options):
    with pytest.raises(error, match=f"^{name}:"):
        knn(*arguments, **options)


# --- Triton --------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of queries and of base, and several programs over base, with few rows."""
    from kernels import knn_triton

    config = knn_triton.screen_config
    small = {"QUERIES": 16, "ROWS": 32}
    monkeypatch.setattr(knn_triton, "screen_config", lambda *args: config(*args) | small)


def check(base, k, query=None, **options):
    distance, index = knn(base, k, query, return_distance=True, **options)
    expected, expected_index = brute(base, k, query, **options)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(distance.double(), expected, atol=1e-6, rtol=1e-6)


@interpreted
@pytest.mark.parametrize(
    ("n", "width", "k", "queries", "metric", "labels", "dtype"),
    [
        (5, 2, 7, None, "euclidean", None, torch.float32),
        (21, 7, 3, None, "euclidean", 3, torch.float32),
        (21, 7, 3, None, "euclidean", None, torch.float16),
        (21, 7, 3, None, "cosine", None, torch.float32),
        (150, 70, 10, 3, "euclidean", None, torch.float32),
        (150, 70, 10, 3, "cosine", 3, torch.float16),
        (200, 20, 64, 2, "euclidean", 3, torch.float32),
        (4200, 33, 2, 2, "euclidean", None, torch.float16),
        (4200, 33, 2, 2, "euclidean", 3, torch.float32),
    ],
)
def test_triton_equals_brute_force(n, width, k, queries, metric, labels, dtype):
    """4,200 rows are enough for a bound from every second one."""
    base = torch.randn(n, width).to(dtype)
    query = None if queries is None else torch.randn(queries, width).to(dtype)
    options = {"metric": metric}
    if labels is not None:
        options["groups"] = torch.randint(labels, (n,))
    if labels is not None and query is not None:
        options["query_groups"] = torch.randint(labels, (queries,))
    check(base, k, query, **options)


@interpreted
@pytest.mark.parametrize("labels", [None, 3])
def test_triton_among_ties_in_several_tiles(small_tiles, labels):
    groups = None if labels is None else torch.randint(labels, (34,))
    check(lattice(34, 4), 3, groups=groups)


@interpreted
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_triton_at_every_magnitude(metric):
    base, query = torch.randn(40, 5), torch.randn(4, 5)
    for b, q in (
        (base * 1e-30, query * 1e-30),
        (base * 1e30, query * 1e30),
        (torch.cat((base[:9] * 1e20, base)), query),
    ):
        distance, index = knn(b, 3, q, metric=metric, return_distance=True)
        expected, expected_index = brute(b, 3, q, metric=metric)
        assert torch.equal(index, expected_index)
        atol = 1e-6 if metric == "cosine" else 0
        torch.testing.assert_close(distance.double(), expected, atol=atol, rtol=1e-6)


@interpreted
def test_triton_compares_all_rows_where_a_list_overflows(monkeypatch):
    from kernels import knn_triton

    monkeypatch.setattr(knn_triton, "capacity", lambda k: 16)
    base = torch.eye(200)[:, :20]  # the later rows are equal, the first equally far
    base[20:] = torch.arange(180)[:, None] % 2 * 1e-4
    query, groups = torch.zeros(2, 20), torch.arange(200) % 2
    query[1] = 5
    options = {"groups": groups, "query_groups": torch.tensor([0, 2])}
    *_, overflown = knn_triton.search(base, 4, query, None, None, None, "euclidean")
    assert overflown.tolist() == [True, True]
    check(base, 4, query)
    check(base, 4, query, **options)


@interpreted
def test_triton_in_tight_clusters_and_among_identical_rows():
    base = clusters(21, 20, 3, 0.1)
    base[::3] = 0.5
    check(base, 2)
    check(base, 2, groups=torch.arange(21) % 5)


@interpreted
def test_triton_with_a_group_that_is_everything():
    base, groups = torch.randn(20, 3), torch.ones(20).int()
    distance, index = knn(base, 4, groups=groups, return_distance=True)
    assert (index == -1).all() and distance.isinf().all()


def version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.long
@pytest.mark.slow
@plain
def test_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, __file__, "-k", "test_triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout

"""The kernels' plain PyTorch paths and operators against formulas written out in fp64 and other libraries, on a CPU."""

import importlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.neighbors import NearestNeighbors

from kernels import cka, covariance, knn, log_sum_loss

knn_module = importlib.import_module("kernels.knn")  # `kernels.knn` itself is the function
cka_module = importlib.import_module("kernels.cka")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


X = torch.randn(8, 4)




# --- knn --------------------------------------------------------------------------------------------------------------


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
        (400, 130, 20, None),
        (0, 4, 2, 3),
    ],
)
def test_knn_equals_brute_force(monkeypatch, panel, metric, labels, n, width, k, queries):
    monkeypatch.setattr(knn_module, "PANEL", panel)
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


def test_knn_proves_or_redoes_every_row():
    base = torch.randn(1000, 8)
    base[500:] = base[:500]  # every row twice
    _, index, redone = knn_module._search(base, 15, None, None, None, "euclidean")
    assert torch.equal(index, brute(base, 15)[1])
    assert redone.float().mean() < 0.1
    same = torch.zeros(300, 5)
    _, index, redone = knn_module._search(same, 4, None, None, None, "euclidean")
    assert redone.all() and torch.equal(index, brute(same, 4)[1])


def test_knn_equals_sklearn_on_clusters():
    base = torch.cat([torch.randn(3000, 50) + 4 * torch.randn(50) for _ in range(3)])
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


G = torch.arange(8)


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


# --- operators and import ---------------------------------------------------------------------------------------------


def operator_samples():
    features = [torch.randn(9, 3), torch.randn(9, 5), torch.randn(9, 2)]
    return {
        "cka": (cka_module._cka_op, (features[:2], [features[2], features[0]])),
        "covariance": (cka_module._covariance_op, (features[0],)),
        "knn": (
            knn_module._search_op,
            (torch.randn(9, 3), 4, None, torch.arange(9) % 3, None, "euclidean"),
        ),
        "knn of queries": (
            knn_module._search_op,
            (torch.randn(9, 3), 4, torch.randn(2, 3), None, None, "cosine"),
        ),
    }


@pytest.mark.parametrize("name", list(operator_samples()))
def test_operator_checks(name):
    operator, arguments = operator_samples()[name]
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


class Everything(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 6))

    def forward(self, student, teacher):
        features = student @ self.weight
        loss = log_sum_loss(student, self.weight, teacher)
        loss = loss + log_sum_loss(student * 2, self.weight, teacher, reduction="row")
        index = knn(features, 3, groups=torch.arange(12) % 4)
        return loss, cka([features, student], [teacher]), index, covariance(features)


def test_compiled_whole_gives_the_eager_result():
    module = Everything()
    student, teacher = torch.randn(12, 5), torch.randn(12, 6)
    compiled = torch.compile(module, fullgraph=True)
    ours, eager = compiled(student, teacher), module(student, teacher)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [torch.autograd.grad(out[0], module.weight)[0] for out in (ours, eager)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(student, teacher)[0], module(student, teacher)[0])


def run_python(program, **env):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_and_cpu_use_need_no_triton_and_no_compiler():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
torch.set_num_threads(1)
from kernels import cka, covariance, knn, log_sum_loss
x = torch.randn(20, 4)
knn(x, 3), cka([x], [x]), covariance(x)
w = torch.randn(4, 5, requires_grad=True)
log_sum_loss(x, w, torch.randn(20, 5)).backward()
assert not any(name.startswith(("torch._dynamo", "torch._inductor", "sympy")) for name in sys.modules), "slow imports"
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("value", ["triton", "fast"])
def test_a_path_that_cannot_run_is_an_error(value, monkeypatch):
    monkeypatch.setenv("G2L_KERNELS", value)
    with pytest.raises(ValueError, match="G2L_KERNELS"):
        knn(X, 2)


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [1.0, 1.1])
def test_benchmark_prints_no_speed_up_for_a_wrong_result(ours, capsys):
    from kernels import bench

    runs, rates = {"ours": lambda: ours, "rival": lambda: 1.0}, {"fp32": 1.0, "copy": 1.0}
    rows = bench.compare(
        "k",
        "s",
        runs,
        lambda value: abs(value - 1),
        1e-6,
        1.0,
        1.0,
        "fp32",
        rates,
        torch.device("cpu"),
        0.01,
    )
    lines = capsys.readouterr().out.splitlines()
    assert [row["right"] for row in rows] == [ours == 1, True]
    assert ("WRONG" in lines[0]) == (ours != 1) and ("x |" in lines[1]) == (ours == 1)


def test_benchmark_writes_what_it_measured(tmp_path, capsys):
    from kernels import bench

    assert (
        bench.main(["cka", "--quick", "--device", "cpu", "--json", str(tmp_path / "cka.json")]) == 0
    )
    found = json.loads((tmp_path / "cka.json").read_text())
    assert found["torch"] == torch.__version__ and found["ceilings"]["fp32"] > 0
    assert {row["name"] for row in found["rows"]} >= {"ours", "numpy", "each pair anew"}
    assert all(row["right"] and row["ms_20"] <= row["ms"] <= row["ms_80"] for row in found["rows"])
    assert capsys.readouterr().out.count("| ours |") == 2

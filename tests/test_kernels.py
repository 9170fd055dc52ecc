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


# --- cka and covariance -----------------------------------------------------------------------------------------------


def gram(x, kernel, bandwidth):
    x = x.double().numpy()
    x = x - x.mean(0)  # changes no estimate, but the formulas below lose digits to large means
    if kernel == "linear":
        return x @ x.T
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    off = np.sort(squares[~np.eye(len(x), dtype=bool)])
    return np.exp(-squares / (2 * bandwidth**2 * off[(len(off) - 1) // 2]))


def hsic(k, n_l):
    """(HSIC_1 of Song et al. 2012, biased HSIC) from Gram matrices, as printed."""
    n = len(k)
    h = np.eye(n) - 1 / n
    biased = np.trace(k @ h @ n_l @ h) / (n - 1) ** 2
    k, n_l, one = k - np.diag(np.diag(k)), n_l - np.diag(np.diag(n_l)), np.ones(n)
    total = np.trace(k @ n_l) + (one @ k @ one) * (one @ n_l @ one) / ((n - 1) * (n - 2))
    return np.array([(total - 2 / (n - 2) * (one @ k @ n_l @ one)) / (n * (n - 3)), biased])


def cka_formula(xs, ys, kernel="linear", bandwidth=1.0):
    xs, ys = ([gram(x, kernel, bandwidth) for x in side] for side in (xs, ys))
    own = lambda side: [hsic(k, k) for k in side]  # noqa: E731
    table = [
        [hsic(k, m) / np.sqrt(a * b) for m, b in zip(ys, own(ys), strict=True)]
        for k, a in zip(xs, own(xs), strict=True)
    ]
    return torch.tensor(np.array(table)).permute(2, 0, 1)


def related(n, *widths, dtype=torch.float32):
    """Feature sets that share some structure, with means far from 0."""
    common = torch.randn(n, 6, dtype=torch.float64)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    return [(common @ normal(6, width) + normal(n, width) + 20).to(dtype) for width in widths]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "left", "right"),
    [
        (4, (3,), (2,)),
        (61, (7, 300), (5, 64)),
        (200, (10,), (30, 3)),
        (90, (200, 170), (150, 300, 120)),
    ],
)
def test_cka_equals_the_gram_formulas(kernel, dtype, n, left, right):
    xs, ys = related(n, *left, dtype=dtype), related(n, *right, dtype=dtype)
    xs.append(ys[0])  # the same tensor on both sides
    unbiased, biased = cka(xs, ys, estimator="both", kernel=kernel, bandwidth=0.8)
    expected = cka_formula(xs, ys, kernel, 0.8)
    assert unbiased.dtype == torch.float64 and unbiased.shape == (len(xs), len(ys))
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4 if n == 4 else 1e-5
    assert (unbiased - expected[0]).abs().max() < tolerance
    assert (biased - expected[1]).abs().max() < tolerance
    torch.testing.assert_close(cka(xs, ys, kernel=kernel, bandwidth=0.8), unbiased, rtol=0, atol=0)
    torch.testing.assert_close(
        cka(xs, ys, estimator="biased", kernel=kernel, bandwidth=0.8), biased, rtol=0, atol=0
    )


def test_cka_sides_and_chunks_agree(monkeypatch):
    xs, ys = related(150, 40, 20), related(150, 30)
    whole = torch.stack(cka(xs, ys, estimator="both"))
    monkeypatch.setattr(cka_module, "CHUNK_ROWS", 32)
    torch.testing.assert_close(torch.stack(cka(xs, ys, estimator="both")), whole, rtol=0, atol=1e-6)
    monkeypatch.setattr(cka_module, "BLOCK_BYTES", 4000)
    blocks = torch.stack(cka(xs, ys, estimator="both", kernel="rbf"))
    monkeypatch.undo()
    torch.testing.assert_close(
        torch.stack(cka(xs, ys, estimator="both", kernel="rbf")), blocks, rtol=0, atol=1e-6
    )
    monkeypatch.setattr(cka_module, "_from_features", cka_module._from_grams)
    torch.testing.assert_close(torch.stack(cka(xs, ys, estimator="both")), whole, rtol=0, atol=1e-6)


def test_cka_invariances_and_chance_level():
    x, y = torch.randn(300, 120), torch.randn(300, 80)
    turned = torch.linalg.qr(torch.randn(120, 120))[0]
    unbiased, biased = cka([x, 3 * x @ turned + 5], [x, y], estimator="both")
    torch.testing.assert_close(
        unbiased[:, 0], torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(unbiased[0], unbiased[1], atol=1e-5, rtol=0)
    assert (
        abs(unbiased[0, 1]) < 0.05 < 0.2 < biased[0, 1]
    )  # unrelated features: the biased estimator's floor
    assert cka([torch.ones(9, 2)], [torch.randn(9, 2)]).isnan().all()


def test_rbf_median_is_exact():
    x = torch.randint(-3, 4, (57, 3)).float()  # many ties
    norms = x.square().sum(1)
    off = torch.cdist(x, x).square()[~torch.eye(57, dtype=torch.bool)].round().sort().values
    assert cka_module._median(x, norms, 10) == off[(len(off) - 1) // 2]


@pytest.mark.parametrize(("n", "width"), [(2, 1), (50, 3), (700, 600), (40, 300)])
def test_covariance_equals_numpy(n, width, monkeypatch):
    x = torch.randn(n, width) * 3 + 50
    expected = np.atleast_2d(np.cov(x.double().numpy().T))
    for chunk in (16384, 64):
        monkeypatch.setattr(cka_module, "CHUNK_ROWS", chunk)
        ours = covariance(x)
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours, expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(covariance(x.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("error", "name", "arguments", "options"),
    [
        (TypeError, "xs", (X, [X]), {}),
        (ValueError, "ys", ([X], []), {}),
        (TypeError, r"xs\[1\]", ([X, X.long()], [X]), {}),
        (TypeError, r"ys\[0\]", ([X], [3]), {}),
        (ValueError, r"xs\[0\]", ([X[0]], [X]), {}),
        (ValueError, r"xs\[1\]", ([X, X[:5]], [X]), {}),
        (ValueError, r"xs\[0\]", ([torch.full((8, 2), math.nan)], [X]), {}),
        (ValueError, r"ys\[0\]", ([X], [X / 0]), {}),
        (ValueError, "ys", ([X], [X[:5]]), {}),
        (ValueError, "xs", ([X[:3]], [X[:3]]), {}),
        (ValueError, "estimator", ([X], [X]), {"estimator": "minibatch"}),
        (ValueError, "kernel", ([X], [X]), {"kernel": "cosine"}),
        (ValueError, "bandwidth", ([X], [X]), {"bandwidth": 0}),
        (TypeError, "bandwidth", ([X], [X]), {"bandwidth": "a"}),
    ],
)
def test_cka_names_the_bad_argument(error, name, arguments, options):
    with pytest.raises(error, match=f"^{name}:"):
        cka(*arguments, **options)


def test_covariance_names_the_bad_argument():
    for bad, error in (([X], TypeError), (X[:1], ValueError), (X * math.inf, ValueError)):
        with pytest.raises(error, match=r"^x"):
            covariance(bad)


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


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_does_not_depend_on_the_size_of_the_numbers(kernel):
    x, y = torch.randn(100, 8), torch.randn(100, 30)
    y[:, :8] += x
    expected = cka([x], [y], estimator="both", kernel=kernel)
    for size in (1e-30, 1e-15, 1e-12, 1e9, 1e30):
        for got, wanted in zip(
            cka([x * size, x], [y], estimator="both", kernel=kernel), expected, strict=True
        ):
            torch.testing.assert_close(got, wanted.expand(2, 1), rtol=1e-4, atol=1e-6)


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
        "cka": (cka_module._hsic_op, (features, [0, 1], [2, 0], "linear", 1.0)),
        "cka rbf": (cka_module._hsic_op, (features, [0, 1], [2, 0], "rbf", 1.0)),
        "covariance": (cka_module._scatter_op, (features[0],)),
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

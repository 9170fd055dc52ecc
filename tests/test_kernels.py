"""The kernels' PyTorch paths and operators on a CPU, against fp64 formulas and other libraries."""

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

from kernels import cka, covariance, knn, log_sum_loss

knn_module = importlib.import_module("kernels.knn")  # `kernels.knn` itself is the function
cka_module = importlib.import_module("kernels.cka")
logsum_module = importlib.import_module("kernels.logsum")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- log_sum_loss -----------------------------------------------------------------------------------------------------


def loss_formula(
    student,
    weight,
    teacher,
    alpha=4.0,
    normalize="both",
    reduction="batch",
    eps=1e-5,
    norm_eps=1e-4,
    scale=None,
    shift=None,
):
    """The loss written out with elementary operations; autograd gives its gradients."""

    def standard(x):
        return (x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + norm_eps) ** 0.5

    y = student @ weight
    y = y if normalize == "none" else standard(y)
    t = standard(teacher) if normalize == "both" else teacher
    y = y if scale is None else y * scale + shift
    powers = (y - t).abs() ** alpha
    return (
        (powers.sum() + eps).log() if reduction == "batch" else (powers.sum(1) + eps).log().mean()
    )


def loss_inputs(rows, inner, features, normalize="both", dtype=torch.float64):
    leaf = lambda *shape: torch.randn(shape, dtype=dtype).requires_grad_()  # noqa: E731
    extra = (
        {"scale": leaf(features), "shift": leaf(features)} if normalize == "student-affine" else {}
    )
    return leaf(rows, inner), leaf(inner, features), torch.randn(rows, features, dtype=dtype), extra


@pytest.mark.parametrize("normalize", logsum_module.NORMALIZE)
@pytest.mark.parametrize("reduction", logsum_module.REDUCTION)
@pytest.mark.parametrize("alpha", [4.0, 2.5, 1])
def test_loss_and_gradients_equal_the_formula(normalize, reduction, alpha):
    student, weight, teacher, extra = loss_inputs(9, 5, 6, normalize)
    options = {
        "alpha": alpha,
        "normalize": normalize,
        "reduction": reduction,
        "eps": 0.3,
        "norm_eps": 0.01,
    }
    leaves = [student, weight, *extra.values()]
    ours, formula = (
        f(student, weight, teacher, **options, **extra) for f in (log_sum_loss, loss_formula)
    )
    assert ours.dtype == torch.float64 and ours.shape == ()
    torch.testing.assert_close(ours, formula)
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(formula, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalize", logsum_module.NORMALIZE)
@pytest.mark.parametrize("reduction", logsum_module.REDUCTION)
def test_loss_gradcheck(normalize, reduction):
    student, weight, teacher, extra = loss_inputs(6, 4, 3, normalize)

    def loss(student, weight, *more):
        return log_sum_loss(
            student,
            weight,
            teacher,
            normalize=normalize,
            reduction=reduction,
            **dict(zip(("scale", "shift"), more, strict=False)),
        )

    assert torch.autograd.gradcheck(loss, (student, weight, *extra.values()))


def test_loss_equals_torch_batch_norm_and_a_bias_would_change_nothing():
    student, weight, teacher, _ = loss_inputs(32, 10, 12)
    norm = torch.nn.BatchNorm1d(12, eps=1e-4, affine=False, dtype=torch.float64)
    expected = ((norm(student @ weight + 7) - norm(teacher)).abs() ** 4).sum().add(1e-5).log()
    torch.testing.assert_close(log_sum_loss(student, weight, teacher), expected)


def test_loss_takes_any_strides_and_a_linear_layers_transposed_weight():
    layer = torch.nn.Linear(5, 7, bias=False, dtype=torch.float64)
    student, teacher = (
        torch.randn(12, 9, dtype=torch.float64)[:, ::2],
        torch.randn(7, 12, dtype=torch.float64).T,
    )
    loss = log_sum_loss(student, layer.weight.T, teacher)
    loss.backward()
    expected = torch.autograd.grad(loss_formula(student, layer.weight.T, teacher), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)


def test_loss_of_a_perfect_student_is_log_eps_with_zero_gradient():
    student, weight, _, _ = loss_inputs(8, 4, 5)
    loss = log_sum_loss(student, weight, (student @ weight).detach(), eps=1e-5)
    assert loss.item() == pytest.approx(math.log(1e-5))
    loss.backward()
    assert student.grad.abs().max() < 1e-20


def test_loss_under_autocast_rounds_operands_only():
    student, weight, teacher, _ = loss_inputs(32, 64, 48, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = log_sum_loss(student, weight, teacher)
    grads = torch.autograd.grad(loss, (student, weight))
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (student, weight)]
    expected = loss_formula(*exact, teacher.double())
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 1e-5
    for ours, formula in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - formula).norm() < 1e-5 * formula.norm()


def test_loss_keeps_gradients_where_a_rounded_projection_loses_them():
    student, weight, _, _ = loss_inputs(32, 64, 48, dtype=torch.float32)
    norm = lambda x: (x - x.mean(0)) / x.std(0, unbiased=False)  # noqa: E731
    teacher = (norm(student @ weight) + 0.03 * torch.randn(32, 48)).detach()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (student, weight)]
    truth = torch.autograd.grad(loss_formula(*exact, teacher.double()), exact)[1]
    errors = []
    for loss in (log_sum_loss, loss_formula):
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(loss(student, weight, teacher), weight)[0]
        errors.append(((got - truth).norm() / truth.norm()).item())
    assert errors[0] < 1e-4 < 0.01 < errors[1]


def test_loss_twice_in_one_graph_and_backward_twice():
    student, weight, teacher, _ = loss_inputs(8, 4, 5)
    both = log_sum_loss(student, weight, teacher) + 3 * log_sum_loss(
        student * 2, weight, teacher, normalize="none"
    )
    formula = loss_formula(student, weight, teacher) + 3 * loss_formula(
        student * 2, weight, teacher, normalize="none"
    )
    expected = torch.autograd.grad(formula, student)[0]
    for _ in range(2):
        torch.testing.assert_close(
            torch.autograd.grad(both, student, retain_graph=True)[0], expected
        )


def test_loss_without_grad_and_with_a_frozen_side():
    student, weight, teacher, _ = loss_inputs(8, 4, 5)
    with torch.no_grad():
        assert not log_sum_loss(student, weight, teacher).requires_grad
    loss = log_sum_loss(student.detach(), weight, teacher)
    loss.backward()
    expected = torch.autograd.grad(loss_formula(student, weight, teacher), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_loss_passes_nan_on_and_repeats_its_bits():
    student, weight, teacher, _ = loss_inputs(40, 30, 20, dtype=torch.float32)
    first, second = (
        torch.autograd.grad(log_sum_loss(student, weight, teacher), (student, weight))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    teacher[0, 0] = math.nan
    assert log_sum_loss(student, weight, teacher).isnan()


X, W, T = torch.randn(8, 4), torch.randn(4, 5), torch.randn(8, 5)


@pytest.mark.parametrize(
    ("error", "name", "arguments", "options"),
    [
        (TypeError, "student", ([1], W, T), {}),
        (TypeError, "weight", (X, W.long(), T), {}),
        (ValueError, "student", (X[0], W, T), {}),
        (ValueError, "student", (X[:0], W, T[:0]), {}),
        (ValueError, "student", (X[:1], W, T[:1]), {}),
        (ValueError, "weight", (X, W[:3], T), {}),
        (ValueError, "weight", (X, W.to("meta"), T), {}),
        (ValueError, "teacher", (X, W, T[:7]), {}),
        (ValueError, "teacher", (X, W, T.clone().requires_grad_()), {}),
        (ValueError, "normalize", (X, W, T), {"normalize": "layer"}),
        (ValueError, "reduction", (X, W, T), {"reduction": "mean"}),
        (ValueError, "alpha", (X, W, T), {"alpha": 0.5}),
        (ValueError, "alpha", (X, W, T), {"alpha": math.nan}),
        (TypeError, "alpha", (X, W, T), {"alpha": "4"}),
        (ValueError, "eps", (X, W, T), {"eps": -1}),
        (ValueError, "norm_eps", (X, W, T), {"norm_eps": -1}),
        (ValueError, "scale", (X, W, T), {"normalize": "student-affine"}),
        (ValueError, "shift", (X, W, T), {"shift": torch.ones(5)}),
        (
            ValueError,
            "scale",
            (X, W, T),
            {"normalize": "student-affine", "scale": torch.ones(4), "shift": torch.ones(5)},
        ),
        (TypeError, "group", (X, W, T), {"group": "world"}),
    ],
)
def test_loss_names_the_bad_argument(error, name, arguments, options):
    with pytest.raises(error, match=f"^{name}:"):
        log_sum_loss(*arguments, **options)


GROUP_PROGRAM = """
import sys, torch, torch.distributed as dist
from kernels import log_sum_loss
dist.init_process_group("gloo")
rank = dist.get_rank()
for normalize in ("both", "student", "student-affine", "none"):
    for reduction in ("batch", "row"):
        torch.manual_seed(0)
        leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64).requires_grad_()
        student, weight, teacher = leaf(10, 4), leaf(4, 5), torch.randn(10, 5, dtype=torch.float64)
        extra = {"scale": leaf(5), "shift": leaf(5)} if normalize == "student-affine" else {}
        part = slice(0, 6) if rank == 0 else slice(6, 10)
        options = dict(normalize=normalize, reduction=reduction, **extra)
        whole = log_sum_loss(student, weight, teacher, **options)
        shared = log_sum_loss(student[part], weight, teacher[part], group=dist.group.WORLD, **options)
        torch.testing.assert_close(shared, whole)
        leaves = [student, weight, *extra.values()]
        for ours, expected in zip(torch.autograd.grad(shared, leaves), torch.autograd.grad(whole, leaves)):
            dist.all_reduce(ours)
            torch.testing.assert_close(ours / dist.get_world_size(), expected)
dist.destroy_process_group()
"""


def test_loss_over_a_process_group_equals_one_process(tmp_path):
    program = tmp_path / "group.py"
    program.write_text(GROUP_PROGRAM)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        program,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_loss_refuses_a_second_derivative():
    student, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = log_sum_loss(student, weight, torch.randn(8, 6))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


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


# --- operators and import -------------------------------------------------------------------------


def operator_samples():
    student, weight, teacher, extra = loss_inputs(7, 5, 6, "student-affine", torch.float32)
    options = (4.0, "both", "batch", 1e-5, 1e-4, torch.float32, True)
    affine = (2.5, "student-affine", "row", 1e-5, 1e-4, torch.float32, True)
    grad = (
        torch.tensor(1.0),
        torch.tensor(2.0),
        torch.randn(7, 6),
        torch.empty(0, 6),
        torch.empty(0),
    )
    detached = (student.detach(), weight.detach(), teacher, None, None, 4.0, "both", torch.float32)
    features = [torch.randn(9, 3), torch.randn(9, 5), torch.randn(9, 2)]
    return {
        "loss": (logsum_module._forward_op, (student, weight, teacher, None, None, *options)),
        "loss affine": (
            logsum_module._forward_op,
            (student, weight, teacher, *extra.values(), *affine),
        ),
        "loss backward": (logsum_module._backward_op, (*grad, *detached, True, True)),
        "loss backward, frozen student": (
            logsum_module._backward_op,
            (*grad, *detached, False, True),
        ),
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
slow = ("torch._dynamo", "torch._inductor", "sympy")
assert not any(name.startswith(slow) for name in sys.modules), "slow imports"
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("value", ["triton", "fast"])
def test_a_path_that_cannot_run_is_an_error(value, monkeypatch):
    monkeypatch.setenv("G2L_KERNELS", value)
    with pytest.raises(ValueError, match="G2L_KERNELS"):
        knn(X, 2)

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


# --- cka and covariance -----------------------------------------------------------------------------------------------


def test_loss_refuses_a_second_derivative():
    student, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = log_sum_loss(student, weight, torch.randn(8, 6))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


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


# --- operators and import ---------------------------------------------------------------------------------------------


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

"""Every kernel on a GPU against fp64, and a random fuzz (`pytest -m gpu`); skipped without a GPU.

The checks take a device, so that a CPU's run of the same code shows that they themselves are right.
"""

import os
import random
import time

import pytest
import torch

from kernels import cka, covariance, knn, log_sum_loss

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FUZZ_SECONDS = float(os.environ.get("G2L_FUZZ_SECONDS", "30"))


def batch_norm(x, eps=1e-4):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt()


def loss_formula(student, weight, teacher, alpha):
    d = batch_norm(student @ weight) - batch_norm(teacher)
    return (d.abs().pow(alpha).sum() + 1e-5).log()


def check_loss(device, rows, inner, features, dtype, alpha=4.0):
    student = torch.randn(rows, inner, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(inner, features, device=device) / inner**0.5).to(dtype).requires_grad_()
    teacher = torch.randn(rows, features, device=device)
    loss = log_sum_loss(student, weight, teacher, alpha=alpha)
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # as who trains in fp16 scales losses
    grads = torch.autograd.grad(loss * scale, (student, weight))
    exact = [x.detach().double().requires_grad_() for x in (student, weight)]
    truth = loss_formula(*exact, teacher.double(), alpha)
    assert abs(loss - truth) < 1e-4 * (1 + abs(truth))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    for ours, wanted in zip(grads, torch.autograd.grad(truth * scale, exact), strict=True):
        assert (ours.double() - wanted).norm() < tolerance * wanted.norm()


def unbiased_cka(x, y):
    """Song et al. 2012 with Gram matrices in fp64."""
    n = len(x)
    grams = []
    for z in (x, y):
        z = z.double() - z.double().mean(0)
        grams.append((z @ z.T).fill_diagonal_(0))

    def hsic(k, m):
        sums = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return (k * m).sum() + sums

    k, m = grams
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def check_cka(device, n, widths, dtype, outlier=0.0):
    common = torch.randn(n, 6, device=device)
    sets = []
    for width in widths:
        x = common @ torch.randn(6, width, device=device) + torch.randn(n, width, device=device)
        x[0] += outlier * torch.randn(width, device=device)
        sets.append((x + 5).to(dtype))
    table = cka(sets, sets)
    assert (table.abs() <= 1).all()
    for i, x in enumerate(sets):
        for j, y in enumerate(sets):
            assert abs(table[i, j] - unbiased_cka(x, y)) < 1e-3
    truth = torch.cov(sets[0].double().T)
    assert (covariance(sets[0]) - truth).abs().max() <= 1e-5 * truth.abs().max()


def check_knn(device, base, k, groups=None, metric="euclidean"):
    base = base.to(device)
    distance, index = knn(base, k, groups=groups, metric=metric, return_distance=True)
    x = base.double()
    if metric == "cosine":
        x = x / x.norm(dim=1, keepdim=True)
    exact = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    exact.fill_diagonal_(float("inf"))
    exact = torch.nn.functional.pad(exact, (0, k), value=float("inf"))
    if groups is not None:
        exact[:, : len(x)][groups[:, None] == groups] = float("inf")
    truth = exact.sort(dim=1).values[:, :k]
    found = exact.gather(1, index.clamp(min=0))
    assert torch.equal(index < 0, truth.isinf())
    real = index >= 0
    # Ties up to rounding may change places; what is found is as near as what is nearest.
    torch.testing.assert_close(found[real], truth[real], rtol=1e-9, atol=1e-7)
    if metric == "euclidean":
        torch.testing.assert_close(distance[real].double(), truth[real], rtol=1e-5, atol=1e-6)


def data(kind, n, width):
    x = torch.randn(n, width)
    if kind == "clusters":
        x = torch.randn(20, width)[torch.randint(20, (n,))] + 0.1 * x
    elif kind == "identical":
        x[::3] = x[0].clone()
    elif kind == "whole numbers":
        x = torch.randint(-2, 3, (n, width)).float()
    return x


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 32, 33, 256, 257, 2048, 8192])
def test_loss_on_a_gpu(rows, dtype):
    torch.manual_seed(0)
    check_loss("cuda", rows, 1024, 1536, dtype)
    check_loss("cuda", rows, 41, 167, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("outlier", [0.0, 30.0, 1000.0])
def test_cka_on_a_gpu(dtype, outlier):
    torch.manual_seed(0)
    for n, widths in (
        (60, (300, 200)),
        (2000, (1536, 1024)),
        (4537, (77, 1024)),
        (20000, (40, 50)),
    ):
        check_cka("cuda", n, widths, dtype, outlier if dtype != torch.float16 else 0.0)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", ["Gaussian", "clusters", "identical", "whole numbers"])
@pytest.mark.parametrize(("n", "width", "k"), [(5245, 50, 15), (3000, 1536, 20), (900, 7, 64)])
def test_knn_on_a_gpu(kind, n, width, k):
    torch.manual_seed(0)
    base = data(kind, n, width)
    check_knn("cuda", base, k)
    check_knn("cuda", base, k, groups=torch.randint(10, (n,), device="cuda"))
    check_knn("cuda", base + 5, k, metric="cosine")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_switches_change_nothing_on_a_gpu(precision):
    torch.manual_seed(0)
    x, y = torch.randn(500, 300, device="cuda"), torch.randn(500, 200, device="cuda")
    weight = torch.randn(300, 200, device="cuda")

    def results():
        return cka(x, y), covariance(x), knn(x, 10), log_sum_loss(x, weight, y)

    expected = results()
    torch.set_float32_matmul_precision(precision)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@on_gpu
def test_cka_pair_is_launched_8_times_on_a_gpu():
    x, y = torch.randn(4537, 1536, device="cuda"), torch.randn(4537, 1024, device="cuda")
    cka(x, y)
    with torch.profiler.profile() as trace:
        cka(x, y)
    names = [event.name for event in trace.events() if event.device_type.name == "CUDA"]
    launches = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert len(launches) <= 8 + 2, launches  # a product split over rows adds a sum of its own
    assert sum("HtoD" in name for name in names) <= 1


def fuzz(device, seed):
    """One random configuration of every kernel."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    dtype = pick.choice([torch.float32, torch.float16, torch.bfloat16])
    rows = pick.choice([15, 16, 17, 33, 65, 130, 257, 300])
    inner, features = pick.choice([7, 16, 33, 100]), pick.choice([15, 17, 64, 129])
    check_loss(device, rows, inner, features, torch.float32, pick.choice([2.0, 4.0]))
    n = pick.choice([16, 31, 64, 127, 300, 700])
    widths = [pick.choice([2, 16, 33, 129, 300]) for _ in range(pick.randrange(1, 4))]
    check_cka(device, n, widths, dtype, pick.choice([0.0, 0.0, 20.0]))
    kind = pick.choice(["Gaussian", "clusters", "identical", "whole numbers"])
    n, width = pick.choice([5, 64, 129, 300, 2049]), pick.choice([2, 16, 50, 65, 300])
    labels = pick.choice([None, 3, 100])
    groups = None if labels is None else torch.randint(labels, (n,)).to(device)
    check_knn(device, data(kind, n, width), pick.choice([1, 8, 15, 33, 64]), groups)


@pytest.mark.gpu
@on_gpu
def test_fuzz_on_a_gpu():
    end, seed = time.monotonic() + FUZZ_SECONDS, random.randrange(2**31)
    while time.monotonic() < end:
        seed += 1
        try:
            fuzz("cuda", seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("seed", range(8))
def test_fuzz_agrees_with_the_kernels_on_a_cpu(seed):
    fuzz("cpu", seed)

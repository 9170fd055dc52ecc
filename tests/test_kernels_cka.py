"""cka and covariance against formulas written out in fp64; the Triton kernel in its interpreter.

Tests named `test_triton_...` need TRITON_INTERPRET=1 before Triton is imported, so they run in a
process of their own, which the last test starts.
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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels import cka, covariance

module = importlib.import_module("kernels.cka")  # `kernels.cka` itself is the function
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the last test")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gram(x):
    x = x.double().numpy()
    x = x - x.mean(0)  # changes no estimate, but the formulas below lose digits to large means
    return x @ x.T


def hsic(k, m):
    """(HSIC_1 of Song et al. 2012, biased HSIC) from Gram matrices, as printed."""
    n = len(k)
    h = np.eye(n) - 1 / n
    biased = np.trace(k @ h @ m @ h) / (n - 1) ** 2
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return np.array([(total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)), biased])


def formula(xs, ys):
    """(2: unbiased and biased, xs, ys)."""
    table = np.empty((2, len(xs), len(ys)))
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            k, m = gram(x), gram(y)
            table[:, i, j] = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    return torch.from_numpy(table)


def related(n, *widths, dtype=torch.float32):
    """Feature sets that share some structure, with means far from 0."""
    common = torch.randn(n, 6, dtype=torch.float64)
    sets = []
    for width in widths:
        noise = torch.randn(n, width, dtype=torch.float64)
        mixing = torch.randn(6, width, dtype=torch.float64)
        sets.append((common @ mixing + noise + 20).to(dtype))
    return sets


def both(xs, ys):
    return torch.stack(cka(xs, ys, estimator="both"))


SHAPES = [
    (4, (3,), (2,)),
    (61, (7, 300), (5, 64)),
    (200, (10,), (30, 3)),
    (90, (200, 170), (150, 300, 120)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "left", "right"), SHAPES)
def test_cka_equals_the_gram_formulas(dtype, n, left, right):
    xs, ys = related(n, *left, dtype=dtype), related(n, *right, dtype=dtype)
    xs.append(ys[0])  # the same tensor on both sides
    unbiased, biased = cka(xs, ys, estimator="both")
    expected = formula(xs, ys)
    assert unbiased.dtype == torch.float64 and unbiased.shape == (len(xs), len(ys))
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4 if n == 4 else 1e-5
    assert (unbiased - expected[0]).abs().max() < tolerance
    assert (biased - expected[1]).abs().max() < tolerance
    assert torch.equal(cka(xs, ys), unbiased)
    assert torch.equal(cka(xs, ys, estimator="biased"), biased)


def test_cka_of_two_tensors_is_a_number():
    x, y = related(50, 7, 9)
    assert cka(x, y).shape == () and cka(x, y) == cka([x], [y])[0, 0]
    unbiased, biased = cka(x, y, estimator="both")
    assert unbiased == cka(x, y) and biased == cka(x, y, estimator="biased")


def force(monkeypatch, grams, pieces):
    """Have one side of the computation taken, in one piece or in many."""
    monkeypatch.setattr(module, "_grams_are_cheaper", lambda sets, pairs: grams)
    if pieces:
        for name, value in (("CHUNK_ROWS", 32), ("TILE", 7), ("CACHED", 1), ("GRAM_ROWS", 40)):
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "BLOCK_BYTES", 0)


def test_cka_by_features_and_by_grams_agree_in_one_piece_and_in_many(monkeypatch):
    xs, ys = related(150, 40, 20), related(150, 30, 20)
    tables = []
    for grams in (False, True):
        for pieces in (False, True):
            with monkeypatch.context() as patch:
                force(patch, grams, pieces)
                tables.append(both(xs, [*ys, xs[1]]))
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=0, atol=1e-6)


def test_cka_invariances_and_chance_level():
    x, y = torch.randn(300, 120), torch.randn(300, 80)
    turned = torch.linalg.qr(torch.randn(120, 120))[0]
    unbiased, biased = cka([x, 3 * x @ turned + 5], [x, y], estimator="both")
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(unbiased[:, 0], one, atol=1e-5, rtol=0)
    torch.testing.assert_close(unbiased[0], unbiased[1], atol=1e-5, rtol=0)
    # unrelated features: near 0, and the biased estimator's floor
    assert abs(unbiased[0, 1]) < 0.05 < 0.2 < biased[0, 1]


@pytest.mark.parametrize("value", [1.0, 3.1, 3000.1])
@pytest.mark.parametrize("rows", [9, 300])
def test_cka_of_a_constant_set_is_nan(value, rows):
    constant = torch.full((rows, 2), value)
    assert both([constant], [torch.randn(rows, 2)]).isnan().all()
    assert both([constant.bfloat16()], [torch.randn(rows, 200)]).isnan().all()


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-12, 1e9, 1e30])
def test_cka_does_not_depend_on_the_size_of_the_numbers(size):
    x, y = torch.randn(100, 8), torch.randn(100, 30)
    y[:, :8] += x
    expected = both([x, x], [y])
    torch.testing.assert_close(both([x * size, x], [y]), expected, rtol=1e-4, atol=1e-6)
    wide = both([x.double() * size**8], [y.double()])
    torch.testing.assert_close(wide, expected[:, :1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "width"), [(5, 300), (50, 16), (500, 64), (600, 500)])
def test_cka_with_an_outlier_row_is_that_of_fp64(n, width):
    x = torch.randn(n, width)
    y = 0.5 * x + torch.randn(n, width)
    for size in (10, 100, 1e3, 1e4, 1e5):
        row = size * torch.randn(1, width)
        xs, ys = (
            [torch.cat((x, row))],
            [torch.cat((row, y))],
        )
        expected = formula(xs, ys)
        ours = both(xs, ys)
        assert (ours.abs() <= 1).all()
        assert (ours - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("n", "width"), [(2, 1), (50, 3), (700, 600), (40, 300)])
def test_covariance_equals_numpy(n, width, monkeypatch):
    x = torch.randn(n, width) * 3 + 50
    expected = np.atleast_2d(np.cov(x.double().numpy().T))
    for chunk in (16384, 64):
        monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
        monkeypatch.setattr(module, "TILE", chunk)
        ours = covariance(x)
        assert ours.dtype == torch.float32 and torch.equal(ours, ours.T)
        np.testing.assert_allclose(ours, expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(covariance(x.double()), expected, rtol=1e-10, atol=1e-10)


X = torch.randn(8, 4)


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
        (ValueError, r"ys\[0\]", ([X], [X[:5]]), {}),
        (ValueError, r"ys\[0\]", ([X], [X.to("meta")]), {}),
        (ValueError, "xs", ([X[:3]], [X[:3]]), {}),
        (ValueError, "estimator", ([X], [X]), {"estimator": "minibatch"}),
        (ValueError, r"ys\[0\]", (X, X[0]), {}),
    ],
)
def test_cka_names_the_bad_argument(error, name, arguments, options):
    with pytest.raises(error, match=f"^{name}:"):
        cka(*arguments, **options)


def test_covariance_names_the_bad_argument():
    for bad, error in (([X], TypeError), (X[:1], ValueError), (X * math.inf, ValueError)):
        with pytest.raises(error, match=r"^x"):
            covariance(bad)


# --- whatever the user has set --------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU, and looks at the precision of products."""

    def __init__(self):
        super().__init__()
        self.names, self.precisions = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            self.names.append(name)
        if name in ("mm", "bmm", "addmm", "addmm_"):
            self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def switches():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.mark.parametrize("switch", ["highest", "high", "medium", "allow_tf32", "fp32_precision"])
def test_precision_switches_change_no_result_and_stay_as_they_are(switch, monkeypatch):
    xs, ys = related(90, 200, 10), related(90, 150)

    def results():
        with Operations() as seen:
            out = [both(xs, ys), covariance(xs[0])]
        assert seen.precisions == {"ieee"}
        with monkeypatch.context() as patch:
            force(patch, grams=False, pieces=True)
            return [*out, both(xs, ys)]

    before, expected = switches(), results()
    try:
        if switch == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif switch == "fp32_precision":
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(switch)
        during = torch.backends.mkldnn.matmul.fp32_precision
        for ours, wanted in zip(results(), expected, strict=True):
            assert torch.equal(ours, wanted)
        assert torch.backends.mkldnn.matmul.fp32_precision == during
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before[1]
        torch.backends.mkldnn.matmul.fp32_precision = before[2]


def test_a_default_device_or_type_breaks_nothing():
    x, y = related(40, 30, 9)
    expected, scatter = both([x], [y]), covariance(x)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(both([x], [y]), expected) and torch.equal(covariance(x), scatter)
        assert both([x * 1e-20], [y]).isfinite().all()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_autocast_changes_nothing():
    x, y = related(40, 30, 9)
    expected = both([x], [y])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(both([x], [y]), expected)


# --- Triton, in its interpreter -------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The path of a GPU; launches of the kernel are counted, and done in PyTorch for speed."""
    from kernels import cka_triton

    monkeypatch.setenv("G2L_KERNELS", "triton")
    launched = []

    def column_sums(x):
        launched.append("sums")
        with _disable_current_modes():
            return x.sum(0)

    def centre(x, begin, sums, out, norms):
        launched.append("centre")
        with _disable_current_modes():
            part = x[begin : begin + len(out)]
            out[len(part) :] = 0
            out = out[: len(part)]
            torch.sub(part, sums / len(x), out=out)
            torch.linalg.vector_norm(out, dim=1, out=norms)

    monkeypatch.setattr(cka_triton, "column_sums", column_sums)
    monkeypatch.setattr(cka_triton, "centre", centre)
    return launched


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("grams", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_triton_equals_the_formulas(monkeypatch, dtype, grams, pieces):
    monkeypatch.setenv("G2L_KERNELS", "triton")
    force(monkeypatch, grams, pieces)
    xs, ys = related(45, 7, 270, dtype=dtype), related(45, 30, dtype=dtype)
    ys.append(torch.randn(9, 45).T.to(dtype))  # columns that lie together
    table = both(xs, ys)
    assert (table - formula(xs, ys)).abs().max() < 1e-3
    assert torch.equal(both(xs, ys), table)


@interpreted
def test_triton_centres_rounds_and_keeps_nan(monkeypatch):
    from kernels import cka_triton

    monkeypatch.setitem(cka_triton.SUMS, "ROWS", 16)  # a share has two blocks of rows
    x = torch.randn(310, 300) * 7 + 100
    x[:, 7] = 0.1  # a constant column is exactly 0
    out, norms = torch.empty(310, 310)[:, :300], torch.empty(310)
    cka_triton.centre(x, 0, cka_triton.column_sums(x), out, norms)
    assert (out[:, 7] == 0).all()
    exact = x.double() - x.double().mean(0)
    assert ((out - exact).abs() <= exact.abs() * 2.0**-11 + 1e-5).all()
    assert (out.contiguous().view(torch.int32) & 0x1FFF == 0).all()
    torch.testing.assert_close(norms, out.norm(dim=1))
    x.view(torch.int32)[3, 5] = 0x7FFFFFFF  # the NaN that a GPU computes
    cka_triton.centre(x, 0, torch.zeros(cka_triton.SHARES, 300), out, norms)
    assert out[3, 5].isnan() and norms[3].isnan() and norms[2].isfinite()
    later = torch.empty(210, 300)  # rows from the hundredth on, less the means of all
    cka_triton.centre(x, 100, torch.zeros(cka_triton.SHARES, 300), later, norms[100:])
    assert torch.equal(later, out[100:])


@interpreted
@pytest.mark.parametrize(("n", "widths"), [(400, (300, 200)), (60, (300, 200))])
def test_triton_pair_takes_at_most_8_launches_and_one_copy(monkeypatch, launches, n, widths):
    x, y = related(n, *widths)
    sent, to_host = [], torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: sent.append(a.nbytes) or to_host(a))
    with Operations() as seen:
        cka([x], [y], estimator="both")
    assert len(seen.names) + len(launches) <= 8, seen.names
    assert len(sent) == 1  # the answer itself


@interpreted
def test_triton_all_layers_take_at_most_300_operations(monkeypatch, launches):
    force(monkeypatch, grams=True, pieces=False)
    monkeypatch.setattr(module, "BLOCK_BYTES", 0)
    monkeypatch.setattr(module, "GRAM_ROWS", 57)  # as many blocks as 4,537 rows have of 512
    xs, ys = related(504, *[6] * 40), related(504, *[5] * 24)
    with Operations() as seen:
        cka(xs, ys)
    assert seen.names.count("triu_") == -(-4537 // 512)
    assert len(seen.names) + len(launches) <= 300


def test_blocks_of_gram_rows_are_large():
    for n, sets in ((100, 2), (300, 64), (4537, 64), (20000, 64), (3000, 2)):
        assert module._gram_rows(n, sets) >= min(n, 512)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    triton = pytest.importorskip("triton")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "test_triton"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout

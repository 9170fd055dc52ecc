"""The Triton kernels against the plain references, run by Triton's interpreter on a CPU.

TRITON_INTERPRET has to be set before Triton is imported, so the tests below run in a process of
their own, which the test at the end starts for each kernel. Types are fp32 and fp16: the
interpreter's bf16 product is wrong. Memory is poisoned: what a kernel leaves unwritten shows as NaN
or as a wrong number.
"""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that the last test starts"
)

logsum = importlib.import_module("kernels.logsum")
knn = importlib.import_module("kernels.knn")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    torch.manual_seed(0)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 111)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs))
    )


def close(ours, expected, tolerance):
    assert ours.shape == expected.shape and ours.isfinite().all()
    assert (ours.double() - expected.double()).norm() <= tolerance * expected.double().norm()


SHAPES = [  # rows, inner, features, operand, alpha, strided
    (33, 41, 167, torch.float32, 4.0, False),
    (3, 5, 2, torch.float32, 2.5, False),
    (16, 64, 32, torch.float16, 4.0, False),
    (70, 17, 40, torch.float32, 1.0, True),
    (130, 20, 18, torch.float16, 3.0, True),
]


@interpreted
@pytest.mark.parametrize(
    ("normalize", "reduction", "rows", "inner", "features", "operand", "alpha", "strided"),
    [
        (normalize, reduction, *shape)
        for normalize in logsum.NORMALIZE
        for reduction in logsum.REDUCTION
        for shape in (
            SHAPES if normalize == "both" else SHAPES[:1] if reduction == "row" else SHAPES[1::3]
        )
    ],
)
def test_logsum(monkeypatch, normalize, reduction, rows, inner, features, operand, alpha, strided):
    from kernels import logsum_triton

    monkeypatch.setattr(
        logsum_triton, "CHUNK_ROWS", 48
    )  # several chunks and slabs, the last ones ragged
    monkeypatch.setattr(logsum_triton, "SLAB_BYTES", 4 * rows * 64)
    student, weight, teacher = (
        torch.randn(rows, inner),
        torch.randn(inner, features),
        torch.randn(rows, features),
    )
    if strided:
        student, weight = torch.randn(rows, 2 * inner)[:, ::2], torch.randn(features, inner).T
        teacher = torch.randn(features, rows).T
    affine = (
        (torch.randn(features), torch.randn(features))
        if normalize == "student-affine"
        else (None, None)
    )
    options = (alpha, normalize, reduction, 1e-5, 1e-4, operand, True)
    wide = [
        None if x is None else x.double()
        for x in (student.to(operand), weight.to(operand), teacher, *affine)
    ]
    loss, factor, grad_y, sums = logsum._reference(*wide, *options[:5], torch.float64, True)
    grad = torch.tensor(1.7)
    d_student, d_weight = logsum._reference_backward(
        grad.double(), factor, grad_y, *wide[:2], torch.float64, True, True
    )
    tolerance = 1e-3 if operand == torch.float16 or rows == 3 else 1e-5
    paths = [logsum_triton.tiled_forward] + (
        [logsum_triton.fused_forward] if reduction == "batch" else []
    )
    for forward in paths:
        runs = []
        for _ in range(2):
            out = forward(student, weight, teacher, *affine, *options)
            if out[2].shape[0]:
                grads = logsum_triton.fused_backward(
                    grad, *out[1:3], student, weight, operand, True, True
                )
            else:
                grads = logsum_triton.tiled_backward(
                    grad,
                    out[1],
                    out[3],
                    out[4],
                    student,
                    weight,
                    teacher,
                    *affine,
                    alpha,
                    normalize,
                    operand,
                    True,
                    True,
                )
            runs.append((out[0], *grads, out[3][-2:] * out[1]))
        assert (
            all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            or normalize != "student-affine"
        )
        close(runs[0][0], loss, tolerance)
        close(runs[0][1], d_student, tolerance)
        close(runs[0][2], d_weight, tolerance)
        assert torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])
        if affine[0] is not None:
            close(runs[0][3], sums * factor, tolerance)


@interpreted
def test_logsum_through_the_public_function(monkeypatch):
    monkeypatch.setenv("G2L_KERNELS", "triton")
    for rows, dtype in (
        (20, torch.float32),
        (300, torch.float32),
        (300, torch.float16),
    ):  # fused, tiled
        student, weight = (
            torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((rows, 8), (8, 12))
        )
        tolerance, teacher = 1e-5 if dtype == torch.float32 else 2e-3, torch.randn(rows, 12)
        loss = logsum.log_sum_loss(student, weight, teacher)
        ours = (loss, *torch.autograd.grad(loss, (student, weight)))
        with monkeypatch.context() as plain:
            plain.setenv("G2L_KERNELS", "torch")
            loss = logsum.log_sum_loss(student, weight, teacher)
            for a, b in zip(
                ours, (loss, *torch.autograd.grad(loss, (student, weight))), strict=True
            ):
                close(a.detach(), b.detach(), tolerance)
        with torch.no_grad():
            close(logsum.log_sum_loss(student, weight, teacher), loss.detach(), 1e-5)
        frozen = logsum.log_sum_loss(student.detach(), weight, teacher)
        close(torch.autograd.grad(frozen, weight)[0], ours[2], 1e-6)


@interpreted
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("labels", [None, 3])
@pytest.mark.parametrize(
    ("n", "width", "k", "queries"),
    [(5, 2, 7, None), (21, 7, 5, None), (300, 70, 10, 4), (200, 20, 64, 3)],
)
def test_knn(metric, labels, n, width, k, queries):
    from kernels import knn_triton

    for make in (torch.randn, lambda *shape: torch.randint(-1, 2, shape).float()):
        base, query = make(n, width), None if queries is None else make(queries, width)
        groups = None if labels is None else torch.randint(labels, (n,))
        query_groups = (
            None if groups is None or query is None else torch.randint(labels, (queries,))
        )
        ours = knn_triton.search(base, k, query, groups, query_groups, metric)
        plain = knn._reference(base, k, query, groups, query_groups, metric)
        if (
            metric == "euclidean" or make is torch.randn
        ):  # angles of whole numbers tie only up to rounding
            assert torch.equal(ours[1], plain[1])
        torch.testing.assert_close(ours[0], plain[0], atol=1e-6, rtol=1e-6)
        assert ours[2].dtype == torch.bool


@interpreted
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_at_every_magnitude(metric):
    from kernels import knn_triton

    base = torch.randn(70, 5)
    for x in (base * 1e-30, base * 1e30, torch.cat((base[:9] * 1e20, base))):
        ours, plain = (
            knn_triton.search(x, 3, None, None, None, metric),
            knn._reference(x, 3, None, None, None, metric),
        )
        assert torch.equal(ours[1], plain[1])
        torch.testing.assert_close(
            ours[0], plain[0], atol=1e-6 if metric == "cosine" else 0, rtol=1e-6
        )


@interpreted
def test_knn_redoes_rows_that_the_screen_cannot_prove():
    from kernels import knn_triton

    base = torch.zeros(700, 3)  # more ties than sets kept
    query, groups = torch.zeros(3, 3), torch.arange(700) % 2
    distance, index, redone = knn_triton.search(
        base, 4, query, groups, torch.tensor([0, 1, 2]), "euclidean"
    )
    assert redone.all() and (distance == 0).all()
    assert index.tolist() == [[1, 3, 5, 7], [0, 2, 4, 6], [0, 1, 2, 3]]


@interpreted
def test_knn_with_a_group_that_is_everything():
    from kernels import knn_triton

    distance, index, _ = knn_triton.search(
        torch.randn(20, 3), 4, None, torch.ones(20).int(), None, "euclidean"
    )
    assert (index == -1).all() and distance.isinf().all()


def version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("kernel", ["logsum", "knn"])
def test_in_the_interpreter(kernel):
    triton = pytest.importorskip("triton")
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
        "-k",
        f"test_{kernel}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout

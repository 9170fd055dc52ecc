"""The Triton kernels against the plain references, run by Triton's interpreter on a CPU.

TRITON_INTERPRET has to be set before Triton is imported, so the tests below run in a process of their own, which the
test at the end starts for each kernel. Types are fp32 and fp16: the interpreter's bf16 product is wrong. Memory is
poisoned: what a kernel leaves unwritten shows as NaN or as a wrong number.
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
@pytest.mark.parametrize("kernel", ["knn"])
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

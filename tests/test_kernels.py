"""The kernels' PyTorch paths and operators on a CPU, against fp64 formulas and other libraries."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import cka, covariance, knn, log_sum_loss

knn_module = importlib.import_module("kernels.knn")  # `kernels.knn` itself is the function
cka_module = importlib.import_module("kernels.cka")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


X = torch.randn(8, 4)


# --- operators and import -------------------------------------------------------------------------


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


@pytest.mark.slow
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

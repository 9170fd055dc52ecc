"""log_sum_loss: the PyTorch path against formulas in fp64, the Triton kernels against that path.

The Triton kernels run in Triton's interpreter, in fp32 and fp16 (its bf16 product is wrong).
TRITON_INTERPRET has to be set before Triton is imported, so the tests named test_triton run in a
process of their own, which the test at the end starts; memory is poisoned there: what a kernel
leaves unwritten shows as NaN.
"""

import importlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from jobs import run_ranks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import log_sum_loss

logsum = importlib.import_module("kernels.logsum")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the last test")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize("normalize", logsum.NORMALIZE)
@pytest.mark.parametrize("reduction", logsum.REDUCTION)
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


@pytest.mark.parametrize("normalize", logsum.NORMALIZE)
@pytest.mark.parametrize("reduction", logsum.REDUCTION)
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


def share_loss() -> int:
    """A rank of two: its rows give the loss of all rows, and its share of the gradients."""
    dist.init_process_group("gloo")
    part = slice(0, 6) if dist.get_rank() == 0 else slice(6, 10)
    for normalize, reduction in itertools.product(logsum.NORMALIZE, ("batch", "row")):
        torch.manual_seed(0)
        shapes = [(10, 4), (4, 5)] + [(5,), (5,)] * (normalize == "student-affine")
        leaves = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        student, weight, *extra = leaves
        teacher = torch.randn(10, 5, dtype=torch.float64)
        options = {"normalize": normalize, "reduction": reduction}
        options |= dict(zip(("scale", "shift"), extra, strict=False))
        whole = log_sum_loss(student, weight, teacher, **options)
        world = dist.group.WORLD
        shared = log_sum_loss(student[part], weight, teacher[part], group=world, **options)
        torch.testing.assert_close(shared, whole)
        gradients = [torch.autograd.grad(loss, leaves) for loss in (shared, whole)]
        for ours, expected in zip(*gradients, strict=True):
            dist.all_reduce(ours)
            torch.testing.assert_close(ours / dist.get_world_size(), expected)
    dist.destroy_process_group()
    return 0


@pytest.mark.slow
def test_loss_over_a_process_group_equals_one_process():
    for done in run_ranks(share_loss):
        assert done.returncode == 0, done.stderr


def test_loss_refuses_a_second_derivative():
    student, weight, teacher, _ = loss_inputs(8, 4, 6)
    loss = log_sum_loss(student, weight, teacher)
    first = torch.autograd.grad(loss, student, create_graph=True)[0]
    torch.testing.assert_close(
        first, torch.autograd.grad(loss_formula(student, weight, teacher), student)[0]
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), weight)


def test_loss_in_torch_func():
    student, weight, teacher, _ = loss_inputs(8, 4, 6)
    both = torch.func.grad(log_sum_loss, argnums=(0, 1))(student.detach(), weight.detach(), teacher)
    expected = torch.autograd.grad(loss_formula(student, weight, teacher), (student, weight))
    for ours, formula in zip(both, expected, strict=True):
        torch.testing.assert_close(ours, formula)
    value = lambda w: log_sum_loss(student.detach(), w, teacher)  # noqa: E731
    torch.testing.assert_close(torch.func.grad_and_value(value)(weight.detach())[0], expected[1])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda w: torch.func.grad(value)(w).sum())(weight.detach())


SWITCHES = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "bf16 products": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "tf32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def switches():
    """The switches of precision, put back at the end."""
    yield torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_loss_is_exact_whatever_the_switches_of_precision_say(switch, switches, monkeypatch):
    student, weight, teacher, _ = loss_inputs(40, 300, 200, dtype=torch.float32)
    run = lambda: torch.autograd.grad(log_sum_loss(student, weight, teacher), (student, weight))  # noqa: E731
    expected = run()
    SWITCHES[switch]()
    seen, product = [], torch.mm

    def watched(*args):  # many CPUs have no such products: what is asked for is looked at, too
        seen.append([kind.fp32_precision for kind in switches])
        return product(*args)

    monkeypatch.setattr(torch, "mm", watched)
    before = [kind.fp32_precision for kind in switches]
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert seen == [["ieee", "ieee"]] * 3
    assert [kind.fp32_precision for kind in switches] == before


def test_loss_with_another_default_device():
    student, weight, teacher, extra = loss_inputs(8, 4, 6, "student-affine")
    leaves = (student, weight, *extra.values())
    run = lambda: log_sum_loss(student, weight, teacher, normalize="student-affine", **extra)  # noqa: E731
    expected = torch.autograd.grad(run(), leaves)
    try:
        torch.set_default_device("meta")
        ours = torch.autograd.grad(run(), leaves)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_loss_of_token_tensors_is_that_of_their_rows():
    student, weight, teacher, _ = loss_inputs(12, 5, 7)
    loss = log_sum_loss(student.view(2, 2, 3, 5), weight, teacher.view(2, 2, 3, 7))
    torch.testing.assert_close(loss, log_sum_loss(student, weight, teacher))
    shuffled = teacher.view(3, 4, 7).transpose(0, 1)
    loss = log_sum_loss(student.view(3, 4, 5).transpose(0, 1), weight, shuffled)
    torch.testing.assert_close(loss, log_sum_loss(student, weight, teacher))
    loss.backward()
    assert student.grad.shape == (12, 5)


def test_loss_names_the_layout_of_a_linear_layer():
    layer = torch.nn.Linear(4, 5, bias=False)
    with pytest.raises(ValueError, match=r"^weight: .*nn.Linear's layout: pass weight.T"):
        log_sum_loss(X, layer.weight, T)


@pytest.mark.parametrize("normalize", logsum.NORMALIZE)
def test_loss_as_a_module(normalize):
    module = logsum.LogSumLoss(4, 5, normalize=normalize, alpha=3)
    names = {"weight", "scale", "shift"} if normalize == "student-affine" else {"weight"}
    assert dict(module.named_parameters()).keys() == names
    loss = module(X.view(2, 4, 4), T.view(2, 4, 5))
    affine = {"scale": module.scale, "shift": module.shift}
    expected = log_sum_loss(X, module.weight, T, normalize=normalize, alpha=3, **affine)
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in module.parameters())
    assert module.weight.abs().max() <= 0.5


def operator_samples():
    student, weight, teacher, extra = loss_inputs(7, 5, 6, "student-affine", torch.float32)
    options = (4.0, "both", "batch", 1e-5, 1e-4, torch.float32, True)
    affine = (2.5, "student-affine", "row", 1e-5, 1e-4, torch.float32, True)
    saved = (torch.tensor(2.0), torch.randn(7, 6), torch.empty(0, 6), torch.empty(0))
    inputs = (torch.tensor(1.0), *saved, student.detach(), weight.detach(), teacher, None, None)
    return {
        "forward": (logsum._forward_op, (student, weight, teacher, None, None, *options)),
        "affine": (logsum._forward_op, (student, weight, teacher, *extra.values(), *affine)),
        "no gradient": (
            logsum._forward_op,
            (student.detach(), weight.detach(), teacher, None, None, *options[:-1], False),
        ),
        "backward": (logsum._backward_op, (*inputs, *options, True, True)),
        "backward, frozen student": (logsum._backward_op, (*inputs, *options, False, True)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(operator_samples()))
def test_operator_checks(name):
    operator, arguments = operator_samples()[name]
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("normalize", logsum.NORMALIZE)
def test_loss_compiled_whole_gives_the_eager_result(normalize):
    student, weight, teacher, extra = loss_inputs(6, 4, 5, normalize, torch.float32)
    leaves = (student, weight, *extra.values())

    def loss(student, weight, *more):
        affine = dict(zip(("scale", "shift"), more, strict=False))
        tokens = student.view(2, 3, 4), teacher.view(2, 3, 5)
        return log_sum_loss(tokens[0], weight, tokens[1], normalize=normalize, **affine)

    ours, eager = torch.compile(loss, fullgraph=True)(*leaves), loss(*leaves)
    torch.testing.assert_close(ours, eager)
    gradients = [torch.autograd.grad(out, leaves) for out in (ours, eager)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- the Triton kernels: what they cost, by counting ---------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, which do not run: this counts, at true sizes."""
    if INTERPRETED:
        pytest.skip("kernels are compiled ones here")
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    import kernels.logsum_triton  # noqa: F401

    found = []
    run = lambda kernel, *_, **options: found.append((kernel.__name__, options))  # noqa: E731
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setenv("G2L_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return found


class Vendor(TorchDispatchMode):
    """Counts PyTorch operations that would launch something: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        launches = not function.is_view and "empty" not in function.name()
        self.count += launches and isinstance(out, torch.Tensor)
        return out


def step(rows, dtype, weight_dtype, transposed=False):
    """-> peak of the bytes that a step allocates, number of operations of PyTorch."""
    student = torch.empty(rows, 1024, dtype=dtype, requires_grad=True)
    weight = torch.empty(1024, 1536, dtype=weight_dtype, requires_grad=True)
    if transposed:
        weight = torch.empty(1536, 1024, dtype=weight_dtype).T.requires_grad_()
    teacher, grad = torch.empty(rows, 1536, dtype=dtype), torch.ones(())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        with Vendor() as vendor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = log_sum_loss(student, weight, teacher)
            gradients = torch.autograd.grad(loss, (student, weight), grad)
    assert all(x.shape == y.shape for x, y in zip(gradients, (student, weight), strict=True))
    now = peak = 0
    for event in memory.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, vendor.count


TYPES = [
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, True),
]


@pytest.mark.parametrize(("dtype", "weight", "transposed"), TYPES)
def test_few_rows_take_three_launches(launches, dtype, weight, transposed):
    for rows in (2, 32, 256):
        launches.clear()
        _, vendor = step(rows, dtype, weight, transposed)
        assert len(launches) + vendor == 3
    product = next(options for name, options in launches if name == "shares_kernel")
    from kernels.logsum_triton import SHARE, shares_config

    for rows in (2, 32, 256):
        for operand in (torch.bfloat16, torch.float32):
            assert math.ceil(SHARE / shares_config(rows, operand)["STEP"]) <= 6
    assert product["STEP"] == shares_config(256, torch.bfloat16)["STEP"]


@pytest.mark.parametrize(("dtype", "weight", "transposed"), TYPES)
@pytest.mark.parametrize("rows", [257, 1024, 8192, 16448])
def test_token_rows_take_at_most_twelve_launches(launches, rows, dtype, weight, transposed):
    _, vendor = step(rows, dtype, weight, transposed)
    assert len(launches) + vendor <= 12


@pytest.mark.parametrize(("rows", "limit"), [(8192, 52), (16448, 94)])
def test_token_rows_need_little_memory(launches, rows, limit):
    """MB; torch.compile of the same takes 95 and 188, the gradients alone are 40 and 74."""
    assert step(rows, torch.float32, torch.float32)[0] < limit * 1e6


def test_statistics_of_token_rows_are_merged_side_by_side():
    pytest.importorskip("triton")
    from kernels.logsum_triton import BLOCK, tiled_config

    for operand in (torch.bfloat16, torch.float16, torch.float32):
        assert BLOCK["TILES"] * tiled_config(16448, operand, "hopper")["ROWS"] >= 16448


# --- the Triton kernels, interpreted --------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
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
    (33, 25, 70, torch.float32, 4.0, False),
    (3, 5, 2, torch.float32, 2.5, False),
    (16, 64, 32, torch.float16, 4.0, False),
    (70, 17, 40, torch.float32, 1.0, True),
    (66, 20, 18, torch.float16, 3.0, True),
]


@interpreted
@pytest.mark.parametrize("path", ["fused", "tiled"])
@pytest.mark.parametrize(
    ("normalize", "rows", "inner", "features", "operand", "alpha", "strided"),
    [
        (normalize, *shape)
        for normalize in logsum.NORMALIZE
        for shape in (SHAPES if normalize == "both" else SHAPES[1::3])
    ],
)
def test_triton(
    monkeypatch, poisoned, path, normalize, rows, inner, features, operand, alpha, strided
):
    from kernels import logsum_triton

    monkeypatch.setattr(logsum, "_path", lambda *_: path)
    monkeypatch.setattr(logsum_triton, "SHARE", 64)  # several shares
    monkeypatch.setattr(logsum_triton, "PART_ROWS", 1)  # several parts, the last one ragged
    small = {"ROWS": 16, "COLUMNS": 32, "STEP": 16}
    config = logsum_triton.tiled_config
    monkeypatch.setattr(logsum_triton, "tiled_config", lambda *args: config(*args) | small)
    monkeypatch.setitem(logsum_triton.BLOCK, "TILES", 4)  # several blocks of row tiles
    student, weight = torch.randn(rows, inner), torch.randn(inner, features)
    teacher = torch.randn(rows, features)
    if strided:
        student, weight = torch.randn(rows, 2 * inner)[:, ::2], torch.randn(features, inner).T
        teacher = torch.randn(features, rows).T
    affine = (None, None)
    if normalize == "student-affine":
        affine = torch.randn(features).requires_grad_(), torch.randn(features).requires_grad_()
    student.requires_grad_(), weight.requires_grad_()
    leaves = [x for x in (student, weight, *affine) if x is not None]
    options = (alpha, normalize, "batch", 1e-5, 1e-4, operand, True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    rounded = [x.to(operand).double() for x in exact[:2]]
    expected = loss_formula(
        *rounded, teacher.double(), alpha, normalize, "batch", 1e-5, 1e-4, *exact[2:]
    )
    expected = (expected, *torch.autograd.grad(expected, exact, torch.tensor(1.7).double()))
    runs = []
    for _ in range(2):
        loss = logsum._Eager.apply(student, weight, teacher, *affine, *options)[0]
        runs.append((loss, *torch.autograd.grad(loss, leaves, torch.tensor(1.7))))
    tolerance = 1e-3 if operand == torch.float16 or rows == 3 else 1e-5
    for ours, again, formula in zip(*runs, expected, strict=True):
        assert torch.equal(ours, again)
        close(ours.detach(), formula.detach(), tolerance)


@interpreted
def test_triton_through_the_public_function(monkeypatch, poisoned):
    monkeypatch.setenv("G2L_KERNELS", "triton")
    for rows, dtype in ((20, torch.float32), (300, torch.float32), (300, torch.float16)):
        student = torch.randn(rows, 8, dtype=dtype).requires_grad_()
        weight = torch.randn(8, 12, dtype=dtype).requires_grad_()
        tolerance, teacher = 1e-5 if dtype == torch.float32 else 2e-3, torch.randn(rows, 12)
        loss = log_sum_loss(student, weight, teacher)
        ours = (loss, *torch.autograd.grad(loss, (student, weight)))
        with monkeypatch.context() as plain:
            plain.setenv("G2L_KERNELS", "torch")
            loss = log_sum_loss(student, weight, teacher)
            expected = (loss, *torch.autograd.grad(loss, (student, weight)))
        for a, b in zip(ours, expected, strict=True):
            close(a.detach(), b.detach(), tolerance)
        with torch.no_grad():
            close(log_sum_loss(student, weight, teacher), loss.detach(), 1e-5)
        frozen = log_sum_loss(student.detach(), weight, teacher)
        close(torch.autograd.grad(frozen, weight)[0], ours[2], 1e-6)


@interpreted
@pytest.mark.parametrize("rows", [32, 257])
@pytest.mark.parametrize(("residual", "size"), [(1.0, 1e-3), (0.03, 1.0)])
def test_triton_loses_no_gradient_in_fp16(monkeypatch, rows, residual, size):
    """`size` of the projection: batch norm multiplies gradients by its inverse."""
    student = torch.randn(rows, 32).half().requires_grad_()
    weight = (torch.randn(32, 64) * size / 32**0.5).half().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (student, weight)]
    y = (exact[0] @ exact[1]).detach()
    teacher = ((y - y.mean(0)) / y.std(0) + residual * torch.randn(y.shape)).half()
    formula = loss_formula(*exact, teacher.double(), norm_eps=1e-9)
    expected = torch.autograd.grad(formula, exact)
    # as a scaler of gradients does: what fp16 outputs can hold is not the matter here
    scale = 2.0 ** -torch.cat([x.flatten() for x in expected]).abs().max().log2().ceil() * 1024
    monkeypatch.setenv("G2L_KERNELS", "triton")
    loss = log_sum_loss(student, weight, teacher, norm_eps=1e-9)
    for ours, formula in zip(
        torch.autograd.grad(loss * scale, (student, weight)), expected, strict=True
    ):
        close(ours.double() / scale, formula, 1e-3)


def version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if version(triton) < (3, 7) and version(np) >= (2, 4):
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

"""Every Triton kernel in every configuration that a launcher can choose, compiled for real GPUs.

Limits are asserted, not one compiler's exact numbers. Compiled kernels are kept for all tests here.
"""

import re

import pytest

pytest.importorskip("triton")

import aot


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def wanted(target, kernels):
    """Configurations of some kernels on a target.

    All of them for an H100. Elsewhere the code is the same but for its instructions, so of the
    loss only those that need most shared memory and registers, the largest and smallest numbers of
    rows and one between; sm_86 has less memory than sm_80.
    """
    for configuration in aot.configurations(target):
        kernel, label = configuration[:2]
        left_out = ("moments", "loss", " 32 rows", " 128 rows")
        largest = label.startswith("bf16, rows fp32") and not label.endswith(left_out)
        if kernel in kernels and (target == "sm_90" or not label or "rows" not in label or largest):
            yield configuration


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "target", [pytest.param("sm_86", marks=SLOW), "sm_90", pytest.param("gfx942", marks=SLOW)]
)
@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(("fused_forward", "shares"), marks=SLOW),
        pytest.param(("gradients", "merge", "sums"), marks=SLOW),
        pytest.param(("sweep",), marks=SLOW),
        pytest.param(("screen",), marks=SLOW),
        ("centre", "list", "rescan"),
    ],
    ids=lambda names: names[0],
)
def test_compiles_within_the_device(target, kernels):
    made = set()
    for kernel, label, function, parameters, types, cores in wanted(target, kernels):
        result = aot.compiled(target, function, parameters, types)
        where = f"{kernel}, {label}, {target}"
        assert result["shared"] <= aot.TARGETS[target][3], where
        # A few words that live outside the inner loop cost nothing, and versions of the compiler
        # differ by them; an accumulator that moves to local memory is hundreds of bytes.
        assert result["spills"] <= 64, where
        assert 0 < result["registers"] <= 512, where
        assert bool(aot.TENSOR_CORES.search(result["code"])) or not cores, where
        made.add(kernel)
    assert made == set(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["bits, D 1530", "bf16, rows bf16, weight fp32, gradient"])
def test_operands_are_loaded_16_bytes_at_a_time(label):
    found = [one for one in aot.configurations("sm_90") if one[1] == label]
    (_, _, function, parameters, types, _) = found[0]
    code = aot.compiled("sm_90", function, parameters, types)["code"]
    assert re.search(r"cp\.async\.cg[^;]*, 0x10", code)
    assert not re.search(r"cp\.async\.ca[^;]*, 0x4", code)


# name: shared memory of a multiprocessor, which has 65,536 registers
SHARED = {"sm_80": 164 * 1024, "sm_86": 100 * 1024, "sm_90": 228 * 1024}


@pytest.mark.parametrize(
    "target", [pytest.param("sm_80", marks=SLOW), pytest.param("sm_86", marks=SLOW), "sm_90"]
)
@pytest.mark.parametrize("mask", [True, pytest.param(False, marks=SLOW)])
def test_the_screen_is_pipelined_and_two_programs_fit(target, mask):
    made = 0
    for _, label, function, parameters, types, _ in wanted(target, ("screen",)):
        if "<=" not in label:
            continue
        result = aot.compiled(target, function, {**parameters, "MASK": mask}, types)
        code = result["code"]
        assert re.search(r"cp\.async\.(ca|cg|bulk)", code), label
        steps = 1 + parameters["LOOPED"]  # a wait in the loop over columns, and one at its end
        assert len(re.findall(r"wgmma\.wait_group", code)) == steps * (target == "sm_90"), label
        assert 2 * result["registers"] * result["warps"] * 32 <= 65536, label
        assert 2 * (result["shared"] + 1024) <= SHARED[target], label
        made += 1
    assert made == 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_rescan_compiles_for_half_precision(dtype):
    rows = {"query": f"*{dtype}", "base": f"*{dtype}"}
    for _, label, function, parameters, types, _ in wanted("sm_90", ("rescan",)):
        assert aot.compiled("sm_90", function, parameters, types | rows)["spills"] <= 64, label


def test_all_kernels_are_covered():
    from kernels import cka_triton, knn_triton, logsum_triton

    every = {
        name.removesuffix("_kernel")
        for module in (cka_triton, knn_triton, logsum_triton)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert every == {kernel for kernel, *_ in aot.configurations("sm_80")}

"""Every Triton kernel in every configuration that a launcher can choose, compiled for real GPUs."""

import re

import pytest

pytest.importorskip("triton")

from kernels import aot


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(
    "kernels",
    [
        ("fused_forward", "shares"),
        ("gradients", "merge", "sums"),
        ("sweep",),
        ("centre",),
        ("screen",),
        ("list", "rescan"),
    ],
    ids=lambda names: names[0],
)
def test_compiles_within_the_device(target, kernels):
    made = 0
    for kernel, label, function, parameters, types, cores in aot.configurations(target):
        if kernel not in kernels:
            continue
        result = aot.compiled(target, function, parameters, types)
        where = f"{kernel}, {label}, {target}"
        assert result["shared"] <= aot.TARGETS[target][3], where
        # A few words that live outside the inner loop cost nothing, and versions of the compiler
        # differ by them; an accumulator that moves to local memory is hundreds of bytes.
        assert result["spills"] <= 64, where
        assert 0 < result["registers"] <= 512, where
        assert bool(aot.TENSOR_CORES.search(result["code"])) or not cores, where
        made += 1
    assert made >= len(kernels)


@pytest.mark.parametrize("wanted", ["bits, D > 64", "bf16, rows bf16, weight fp32, gradient"])
def test_operands_are_loaded_16_bytes_at_a_time(wanted):
    for _, label, function, parameters, types, _ in aot.configurations("sm_90"):
        if label == wanted:
            code = aot.compiled("sm_90", function, parameters, types)["code"]
            assert re.search(r"cp\.async\.cg[^;]*, 0x10", code) and not re.search(
                r"cp\.async\.ca[^;]*, 0x4", code
            )


def test_all_kernels_are_covered():
    from kernels import cka_triton, knn_triton, logsum_triton

    every = {
        name.removesuffix("_kernel")
        for module in (cka_triton, knn_triton, logsum_triton)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert every == {kernel for kernel, *_ in aot.configurations("sm_80")}

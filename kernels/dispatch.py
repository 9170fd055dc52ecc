"""Which path runs: Triton kernels on a GPU, plain PyTorch elsewhere. Triton is imported on first need only."""

import functools
import importlib.util
import os

import torch


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether kernels on `device` run in Triton, by G2L_KERNELS (auto, triton or torch).

    `triton` on a CPU is allowed only in Triton's interpreter (TRITON_INTERPRET=1), as the tests use it.
    """
    choice = os.environ.get("G2L_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"G2L_KERNELS={choice!r}; expected auto, triton or torch")
    if choice == "torch":
        return False
    if choice == "auto":
        return device.type == "cuda" and _triton_installed()
    if not _triton_installed():
        raise ValueError(
            "G2L_KERNELS=triton, but triton is not installed; pip install triton, or use auto"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"G2L_KERNELS=triton, but the tensors are on {device}; move them to a GPU, or use auto"
        )
    return True

"""What the kernels share: checks of tensors, which path runs, and how the library multiplies.

Triton kernels run on a GPU, plain PyTorch elsewhere; Triton is imported on first need only.
"""

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x, other: str, first) -> None:
    """Raise TypeError or ValueError unless x is a tensor of floats on the device of `first`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.device != first.device:
        raise ValueError(f"{name}: on {x.device}, but {other} is on {first.device}")


def launching(x: Tensor):
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def device_kind(device: torch.device) -> str:
    """By what launch parameters are chosen: "hopper", "hip" (AMD) or "cuda"."""
    if torch.version.hip is not None:
        return "hip"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return "hopper"
    return "cuda"


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether kernels on `device` run in Triton, by G2L_KERNELS (auto, triton or torch).

    `triton` on a CPU is allowed only in Triton's interpreter (TRITON_INTERPRET=1), as the tests use
    it.
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


@contextlib.contextmanager
def pinned_products(precision: str):
    """Products of fp32 matrices in "ieee" or, on a GPU, "tf32" precision, whatever the user set.

    torch.set_float32_matmul_precision and the switches of the backends would else change results:
    with "medium" a CPU that can multiplies in bf16. The switches are the process's, not the
    thread's.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch, value in zip(switches, (precision, "ieee"), strict=True):
            switch.fp32_precision = value
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # that of torch.backends.fp32_precision
            if switch.fp32_precision != value:
                switch.fp32_precision = value

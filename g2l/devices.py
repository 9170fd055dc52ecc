"""TODO."""

from __future__ import annotations

import argparse
import os

import torch

from g2l.errors import UserError

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device named, or for "auto" this process's GPU if there is one, else the CPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):  # ROCm is cuda too
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {device}: expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"{device}: this machine has {torch.cuda.device_count()} GPUs; torchrun takes at most so "
                "many as --nproc_per_node"
            )
    return device


def default_workers(workers: int | None, device: torch.device) -> int:
    """Loading processes per rank: enough to feed a GPU; on a CPU at most one, which shares the cores with training."""
    if workers is not None:
        return workers
    cores = (os.cpu_count() or 1) // max(1, torch.cuda.device_count())
    return max(1, min(12, cores - 1)) if device.type == "cuda" else int(cores > 2)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """fp32 on a CPU; bf16 on a GPU that has it."""
    if name == "fp16":
        raise UserError(
            "--precision fp16: its range is too small for training without loss scaling; take bf16 or fp32"
        )
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else torch.float32
        )
    return PRECISIONS[name]


def describe_device(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script which loads models shares; `model_options(args)` turns them into arguments."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        metavar="[NAME=]FILE",
        help="weights by model: a safetensors or .bin file, a folder, or `random`; default: the hub's "
        "cache, or the hub",
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one"
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=list(PRECISIONS),
        help="of matrix products; auto is fp32 on CPU and the model's own half precision on a GPU; "
        "bf16 doubles the speed of recent CPUs too",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile models with torch.compile (a minute of start)",
    )


def model_options(args: argparse.Namespace) -> dict:
    """Keyword arguments for `load_model` from the flags of `add_model_arguments`."""
    return dict(
        device=pick_device(args.device), dtype=PRECISIONS[args.precision], compile=args.compile
    )

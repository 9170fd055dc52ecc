"""What a command computes on: device and precision, and the flags by which models are named.

PyTorch is imported by what needs it: a command shows its flags without.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from g2l.arguments import in_group
from g2l.errors import UserError

if TYPE_CHECKING:
    import torch

PRECISIONS = {"auto": "", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What mends an error of a model, in the words of the flags below.
MODEL_REMEDIES = {
    "weights": "give a file by --weights NAME=FILE, or random weights by --weights random",
    "device": "name another by --device",
    "no gpu": "use --device cpu",
    "table": "run tile.py again, which tiles anew what its table cannot prove",
    "one image": "use --device cpu or --precision bf16",
    "broken features": "check the weights (python -m g2l.models NAME --check FILE), or use "
    "--precision fp32",
}


def pick_device(device: str | torch.device) -> torch.device:
    """The device named, or for "auto" this process's GPU if there is one, else the CPU."""
    import torch

    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):  # ROCm is cuda too
        raise UserError(f"device {device}: expected cpu, cuda, cuda:N or auto", mend="device")
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        raise UserError(f"device {device}: PyTorch sees no GPU here", mend="no gpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if chosen.index is None else chosen.index
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"cuda:{index}: this machine has {count} GPUs, and each takes one process of torchrun",
            mend="device",
        )
    return torch.device("cuda", index)


def default_workers(workers: int | None, device: torch.device) -> int:
    """Loading processes per rank: enough to feed a GPU.

    On a CPU there is at most one, which shares the cores with training.
    """
    import torch

    if workers is not None:
        return workers
    cores = (os.cpu_count() or 1) // max(1, torch.cuda.device_count())
    return max(1, min(12, cores - 1)) if device.type == "cuda" else int(cores > 2)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Of training: fp32 on a CPU, bf16 on a GPU that has it, unless named."""
    import torch

    if name == "fp16":
        raise UserError(
            "precision fp16: its range is too small for training without loss scaling; "
            "take bf16 or fp32"
        )
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return getattr(torch, PRECISIONS[name] or ("bfloat16" if half else "float32"))


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads models; `model_options` turns them into arguments."""
    add = in_group(parser, "models")
    add(
        "--weights [NAME=]FILE",
        "weights by model: a safetensors or .bin file, a folder, or `random`; default: the hub's "
        "cache, or the hub",
        nargs="+",
        action="extend",
    )
    add("--device NAME", "cpu, cuda or cuda:1; auto takes a GPU if there is one", "auto")
    add(
        "--precision",
        "of matrix products; auto is fp32 on a CPU and the model's own half precision on a GPU; "
        "bf16 doubles the speed of recent CPUs too",
        "auto",
        choices=list(PRECISIONS),
    )
    add("--compile", "compile models with torch.compile (a minute of start)")


def model_options(args: argparse.Namespace) -> dict:
    """Keyword arguments for `load_model` from the flags of `add_model_arguments`."""
    import torch

    options = {"device": pick_device(args.device), "compile": args.compile}
    if PRECISIONS[args.precision]:
        options["dtype"] = getattr(torch, PRECISIONS[args.precision])
    return options

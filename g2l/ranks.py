"""TODO."""

from __future__ import annotations

import multiprocessing
import os
import signal

import torch

from g2l.devices import pick_device


def setup_distributed(device: str | torch.device = "auto") -> tuple[int, int, torch.device]:
    """Join the job that torchrun started; may be called again. Returns (rank, world size, this rank's device)."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    dist = torch.distributed
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def leave_distributed() -> None:
    """Leave the job, if in one: gloo's threads still hold tensors, and an exit they outlive now and then aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def agree(value, rank: int, world: int):
    """Rank 0's value, on every rank."""
    box = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flags: list[bool], world: int) -> list[bool]:
    """Each flag, true where it is true on any rank."""
    if world == 1:
        return flags
    total = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(
        total, op=torch.distributed.ReduceOp.MAX
    )  # by gloo: the GPU is not asked
    return [bool(v) for v in total.tolist()]


def gather_values(value, rank: int, world: int) -> list:
    """Every rank's value, by rank."""
    out = [value]
    if world > 1:
        out = [None] * world
        torch.distributed.all_gather_object(out, value)
    return out


def quiet_worker(_: int) -> None:
    """Loading processes leave signals to the process that trains; it ends them when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End loading processes that are left; an interpreter that exits would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()

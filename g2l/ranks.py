"""Processes and ranks: joining torchrun's job, telling one another, leaving it, loading processes.

Each function may be called in a process that is no part of a job; it is then rank 0 of 1.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import torch
import torch.distributed as dist

from g2l.devices import pick_device


def setup_distributed(device: str | torch.device = "auto") -> tuple[int, int, torch.device]:
    """Join the job that torchrun started, once: (rank, world size, this rank's device)."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return *rank_and_world(), device


def leave_distributed() -> None:
    """Leave the job, if in one: an exit that gloo's threads outlive now and then aborts."""
    if in_job():
        dist.destroy_process_group()


def in_job() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if in_job() else (0, 1)


def agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if in_job():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flags: list[bool]) -> list[bool]:
    """Each flag, true where it is true on any rank."""
    if not in_job():
        return flags
    total = torch.tensor(flags, dtype=torch.int32)  # on the host: by gloo, the GPU is not asked
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return [bool(value) for value in total.tolist()]


def gather_values(value: Any) -> list:
    """Every rank's value, by rank, on every rank."""
    if not in_job():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def quiet_worker(_: int) -> None:
    """Leave signals to the process that loads for; it ends its loaders when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End loading processes that are left; an interpreter that exits would wait for them for
    ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()

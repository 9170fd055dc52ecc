"""Processes and ranks: joining torchrun's job, telling one another, leaving it; signals; loaders.

Each function may be called in a process that is no part of a job; it is then rank 0 of 1. Nobody is
waited for without a limit: a loader for `WAIT` seconds (G2L_WAIT in the environment changes it), a
rank for six times as long, since it may be waiting for its own loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from g2l.devices import pick_device
from g2l.errors import UserError

WAIT = float(os.environ.get("G2L_WAIT", 300))
RANK_WAIT = 6 * WAIT
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def setup_distributed(
    device: str | torch.device,
) -> tuple[int, int, torch.device]:
    """Join the job that torchrun started, once: (rank, world size, this rank's device)."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if dist.is_torchelastic_launched():
            end_with_parent()
        # Longer than `_meet` waits, which can name the rank that stands still; NCCL cannot.
        limit = timedelta(seconds=RANK_WAIT + 60)
        # Its defaults hold the group of the moment of import, if there is one: imported inside the
        # job, by whatever library, it would keep the group from being left.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit)
    return *rank_and_world(), device


def leave_distributed() -> None:
    """Leave the job, if in one: an exit that gloo's threads outlive now and then aborts."""
    if in_job():
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status.

    After an error or a signal without the interpreter's own end: that waits for threads, of which
    one may ask a server that is silent for minutes; in a job it would wait for what other ranks
    will never send, and gloo's threads outlive the interpreter.
    """
    if status or in_job():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def in_job() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if in_job() else (0, 1)


def _meet() -> None:
    """Wait for all ranks, on the host. On rank 0 UserError names those that do not come."""
    start = time.monotonic()
    world: Any = dist.group.WORLD  # the function of this name takes no group that has NCCL too
    try:
        world.monitored_barrier(timedelta(seconds=RANK_WAIT), wait_all_ranks=True)
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        waited = time.monotonic() - start
        if late and waited >= RANK_WAIT:
            who = f"rank {late[1].strip(', ')}, which stands still"
            raise UserError(f"waited {waited:.0f} s for {who}") from None
        raise RuntimeError(f"connection to another rank lost: {error}") from None


def agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if in_job():
        _meet()
        dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flags: list[bool]) -> list[bool]:
    """Each flag, true where it is true on any rank."""
    if not in_job():
        return flags
    _meet()
    total = torch.tensor(flags, dtype=torch.int32)  # on the host: by gloo, the GPU is not asked
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return [bool(value) for value in total.tolist()]


def gather_values(value: Any) -> list:
    """Every rank's value, by rank, on every rank."""
    if not in_job():
        return [value]
    _meet()
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Stopped(KeyboardInterrupt):
    """A signal, `number`, asked this process to end at a moment when nothing had to be saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's --signal), from entering to leaving the context.

    They raise `Stopped` at once, until `hold` is called; then they are only remembered as `number`,
    but for the time spent in `raising`, which waits for something that may not come.
    """

    def __init__(self) -> None:
        self.number = 0
        self.held = False
        self.before: dict = {}

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._hear) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self.number = number
        if not self.held:
            raise Stopped(number)

    def hold(self) -> None:
        """From now on a signal is remembered."""
        self.held = True

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `Stopped` for a signal that has come or comes."""
        self.held = False
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self.held = True


def end_with_parent() -> None:
    """On Linux: get SIGTERM when the process that started this one ends, if by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run_child(command: list[str]) -> int:
    """The exit status of a command; a signal to this process ends it first, and waits for it."""
    with Signals(), subprocess.Popen(command, preexec_fn=end_with_parent) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()
            raise


def quiet_worker(_: int) -> None:
    """Leave signals to the process that it loads for, which ends its loaders when it has saved; end
    when that process has ended, however it did.

    PyTorch's loader sees that, too, but then waits for room in a pipe that nobody reads any more.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()


def _outlive_no_parent() -> None:
    """As `end_with_parent`, whose signal a loader leaves to its parent; on every system."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def loading(what: str, workers: int) -> Iterator[dict]:
    """Options of a DataLoader whose items come one by one, from so many processes.

    UserError where no process can be started, one fails, or none gives anything for `WAIT` seconds.
    What it loads should be sent as arrays: tensors would take shared memory, of which a container
    has little.
    """
    try:
        if workers:
            multiprocessing.Lock()  # fails where /dev/shm has not even room for that
        options = {
            "batch_size": None,
            "num_workers": workers,
            "worker_init_fn": quiet_worker,
        }
        yield options | {"timeout": WAIT if workers else 0, "collate_fn": unchanged}
    except ConnectionError:  # one was killed: `errors.explain` has words for it
        raise
    except OSError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"{what} cannot be loaded ({last})", mend="workers") from None
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise UserError(
            f"the {workers} loading processes gave nothing for {WAIT:.0f} s", mend="stuck"
        ) from None
    finally:
        end_workers()  # a loader would give each that is stuck another five seconds


def unchanged(item: Any) -> Any:
    """An item as it is: PyTorch would make tensors of arrays."""
    return item


def end_workers() -> None:
    """End loading processes that are left; an interpreter that exits would wait for them.

    Meanwhile PyTorch does not hear that they died. Afterwards it must: it installs its handler once
    a process, and by that alone the next loader learns that one of its processes was killed.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

"""Commands as processes of their own, without their start: forked, so nothing is imported again.

An interpreter that imports torch costs some four seconds of CPU before a command does anything. A
few tests start one all the same, and torchrun, to see that a real start works; the others fork.
"""

import importlib
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")

# What commands import when they come to need it: once here, and not in each child.
LATE = ["matplotlib.pyplot", "sklearn.cluster", "sklearn.linear_model", "sklearn.model_selection"]
LATE += ["timm", "torch.utils.tensorboard"]


class Forked:
    """`work` in a forked process, its output in files.

    `env` is added to its environment. `work` returns the exit status or raises SystemExit, and any
    other error ends it as it ends an interpreter.
    """

    def __init__(self, work: Callable[[], int], env: dict | None = None):
        self.files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        for name in LATE:
            importlib.import_module(name)
        self.lives, mark = os.pipe()  # at its end when this process and all below it have ended
        self.process = FORK.Process(target=self._live, args=(work, env or {}))
        self.process.start()
        os.close(mark)
        self.pid = self.process.pid

    def _live(self, work: Callable[[], int], env: dict) -> None:
        os.environ.update({name: str(value) for name, value in env.items()})
        for number, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        sys.exit(work())

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def said(self) -> list[str]:
        """What has been written to stdout and to stderr so far."""
        texts = []
        for file in self.files:
            size = os.fstat(file.fileno()).st_size
            texts.append(os.pread(file.fileno(), size, 0).decode(errors="replace"))
        return texts

    def finish(self, timeout: float = 180) -> subprocess.CompletedProcess:
        """Wait for it and what it started to end; after so many seconds it is killed."""
        if not select.select([self.lives], [], [], timeout)[0]:
            self.process.kill()
        os.close(self.lives)
        self.process.join()
        return subprocess.CompletedProcess("forked", self.returncode, *self.said())


def main_of(script: str, *args) -> Callable[[], int]:
    """A command's main, with the arguments that its process would have."""
    main = importlib.import_module(script.removesuffix(".py")).main

    def work() -> int:
        sys.argv = [script, *map(str, args)]
        return main()

    return work


def run(script: str, *args, timeout: float = 300) -> subprocess.CompletedProcess:
    """A command in a forked process, finished."""
    return Forked(main_of(script, *args)).finish(timeout)


def run_ranks(work: Callable[[], int], count: int = 2, limit: float = 200) -> list:
    """`work` in `count` processes as torchrun would start them, finished.

    A rank that is not through within `limit` seconds is killed, its status then is -9.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    ranks = []
    for rank in range(count):
        ranks.append(Forked(work, where | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}))
    deadline = time.monotonic() + limit
    return [process.finish(max(0, deadline - time.monotonic())) for process in ranks]

"""Jobs of several ranks without torchrun: forked processes, so nothing is imported again."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_ranks(work: Callable[[], int], folder: Path, count: int = 2, limit: float = 60) -> list:
    """`work` in `count` processes as torchrun would start them: (status, stderr) of each.

    A rank that is not through within `limit` seconds is killed, its status then is -9.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def life(rank: int) -> None:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in where.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with open(folder / f"rank{rank}.err", "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            try:
                status = work()
            except BaseException:
                traceback.print_exc()
                status = 70
            sys.stderr.flush()
        os._exit(status)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=life, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    found = []
    for rank, process in enumerate(ranks):
        process.join(limit)
        process.kill()
        process.join()
        found.append((process.exitcode, (folder / f"rank{rank}.err").read_text()))
    return found

"""Ranks and signals: nobody is waited for without a limit, and who was waited for is said."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from jobs import Forked, run_ranks

from g2l import ranks
from g2l.errors import exit_status


@pytest.mark.parametrize(
    "fault, said",
    [
        (lambda: time.sleep(4), "rank 0: waited 1 s for rank 1, which stands still"),
        (lambda: sys.exit(3), "another rank ended"),
        (lambda: None, ""),
    ],
    ids=["stands still", "ends", "is well"],
)
def test_a_rank_that_does_not_come_is_named_within_the_limit(monkeypatch, fault, said):
    monkeypatch.setattr(ranks, "RANK_WAIT", 1)

    def work() -> int:
        rank, world, _ = ranks.setup_distributed("cpu")
        assert ranks.any_rank([rank == 1, False]) == [True, False]
        assert ranks.agree(rank) == 0 and ranks.gather_values(rank) == list(range(world))
        if rank == 1:
            fault()
        ranks.any_rank([False])
        ranks.leave_distributed()
        return 0

    first, _ = run_ranks(lambda: exit_status(work))
    assert first.returncode == (1 if said else 0) and said in first.stderr
    assert "Traceback" not in first.stderr


def test_signals_are_given_back_and_remembered_while_work_must_not_be_cut():
    before = signal.getsignal(signal.SIGTERM)
    with ranks.Signals() as signals:
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        with pytest.raises(ranks.Stopped, match="SIGTERM"), signals.raising():
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_is_stopped_does_not_wait_for_its_threads():
    """Of which one may wait for a server that says nothing."""

    def work() -> int:
        ThreadPoolExecutor(1).submit(time.sleep, 60)
        print("stopped")
        ranks.exit_process(143)

    done = Forked(work).finish(10)
    assert (done.returncode, done.stdout) == (143, "stopped\n")


LEAVING = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from g2l import ranks

ranks.setup_distributed("cpu")
ranks.agree(1)
import torch.distributed.nn  # as timm and others do when a model is made
ranks.leave_distributed()
for thread in pathlib.Path("/proc/self/task").iterdir():
    print((thread / "comm").read_text().strip())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="lists threads by /proc")
def test_a_rank_that_left_has_no_thread_that_outlives_it():
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING.format(root=str(ROOT))],
        env={**os.environ, **job},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout

"""The stream of patches: the same whoever reads it, without held-out patients, never silent."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
from g2l import ranks
from g2l.errors import PatchError, UserError
from g2l.patches import PatchIndex
from g2l.stream import Batches, Heldout, hold_out, load


def index_of(data: Path) -> PatchIndex:
    return PatchIndex(data / "tiles" / "tiny")


def test_draws_do_not_depend_on_ranks_or_workers_and_never_touch_held_patients(data):
    index = index_of(data)
    held = hold_out(index, 0.05, 0)
    assert held.sum() == 2 and hold_out(index, 0, 0).sum() == 0
    whole = Batches(index, held, seed=3, batch_size=12, crop=48, by="slide")
    images, params, unreadable = whole[5]
    assert images.shape == (12, 3, 64, 64) and images.dtype == torch.uint8 and not unreadable
    for rank in range(3):  # three ranks of 4 share the batch of 12, in order
        part = Batches(index, held, seed=3, batch_size=4, crop=48, by="slide", rank=rank, world=3)[
            5
        ]
        assert torch.equal(part[0], images[4 * rank : 4 * rank + 4])
        assert all(
            torch.equal(a, b[4 * rank : 4 * rank + 4]) for a, b in zip(part[1], params, strict=True)
        )
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(
            whole, batch_size=None, sampler=range(4, 8), num_workers=workers
        )
        got = list(loader)
        assert torch.equal(got[1][0], images)
        assert all(torch.equal(a[0], whole[m][0]) for a, m in zip(got, range(4, 8), strict=True))
    seen = {index.locate(i)[0] for n in range(400) for i in [whole_draw(whole, n)]}
    assert seen == set(np.flatnonzero(~held))


def whole_draw(batches: Batches, n: int) -> int:
    """The patch that sample n ends up with."""
    taken = []
    original, batches.index.read = (
        batches.index.read,
        lambda i: taken.append(i) or np.zeros((64, 64, 3), np.uint8),
    )
    try:
        batches._read(n, [])
    finally:
        batches.index.read = original
    return taken[-1]


def test_unreadable_patches_are_drawn_again_and_named(data):
    index = index_of(data)
    read = index.read

    def sometimes(i):
        if i % 3 == 0:
            raise PatchError(f"slide, patch {i}")
        return read(i)

    index.read = sometimes
    batches = Batches(index, np.zeros(8, bool), seed=0, batch_size=30, crop=48, by="patch")
    images, _, unreadable = batches[0]
    assert 3 < len(unreadable) < 40 and "slide, patch" in unreadable[0]
    assert (
        images.flatten(1).float().std(1).min() > 0
    )  # every place was filled by a patch that could be read
    assert torch.equal(images, batches[0][0])


def test_held_out_patients_with_too_few_patches_say_what_to_do():
    index = SimpleNamespace(counts=np.array([2, 1, 9]), patch_size=64, ahead=list)
    index.starts = np.array([0, 2, 3])
    index.read = lambda i: np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="only 3 of 16 held-out patches") as raised:
        Heldout(index, np.array([True, True, False]), 16, 48, 0, [], 8)
    assert "--hold-out 0" in distill.REMEDIES[raised.value.mend]


def whole_stream(data: Path) -> Batches:
    return Batches(index_of(data), np.zeros(8, bool), seed=0, batch_size=4, crop=48, by="slide")


@pytest.mark.parametrize("workers", [0, 2])
def test_loaded_batches_are_those_of_the_stream_and_draw_nothing_from_the_steps(data, workers):
    batches = whole_stream(data)
    before = torch.get_rng_state()
    for number, (images, params, unreadable) in enumerate(load(batches, range(3), workers, False)):
        assert torch.equal(images, batches[number][0]) and not unreadable
        assert all(torch.equal(a, b) for a, b in zip(params, batches[number][1], strict=True))
    assert number == 2 and torch.equal(torch.get_rng_state(), before)


def test_a_batch_needs_no_shared_memory(data, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_using_filename_cpu", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", full)
    assert len(list(load(whole_stream(data), range(4), 1, False))) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files_are_no_damaged_patches(data, monkeypatch, workers):
    def read(self, i):
        raise PatchError("P0_a: cannot be read") from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(PatchIndex, "read", read)
    with pytest.raises(UserError, match="Too many open files") as raised:
        list(load(whole_stream(data), range(2), workers, False))
    assert "--workers" in distill.REMEDIES[raised.value.mend]


def test_processes_that_cannot_be_started_are_an_error_in_words(data, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)  # a full /dev/shm
    with pytest.raises(UserError, match="No space left") as raised:
        list(load(whole_stream(data), range(2), 1, False))
    assert "--shm-size" in distill.REMEDIES[raised.value.mend]


def test_a_loader_that_gives_nothing_ends_within_the_limit(data, monkeypatch):
    monkeypatch.setattr(ranks, "WAIT", 1)
    monkeypatch.setattr(PatchIndex, "read", lambda self, i: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(UserError, match="1 loading processes gave nothing for 1 s"):
        next(load(whole_stream(data), range(2), 1, False))
    assert time.monotonic() - start < 20


def test_a_signal_is_heard_while_a_loader_is_waited_for(data, monkeypatch):
    monkeypatch.setattr(PatchIndex, "read", lambda self, i: time.sleep(60))
    with ranks.Signals() as signals:
        signals.hold()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        start = time.monotonic()
        with pytest.raises(ranks.Stopped), signals.raising():
            next(load(whole_stream(data), range(2), 1, False))
        assert time.monotonic() - start < 8 and signals.number == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # now it is only remembered
        assert signals.number == signal.SIGTERM

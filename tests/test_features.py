"""Features: batches, workers, ranks, unreadable items, a kill in the middle; what is cached."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from jobs import Forked, run_ranks
from networks import batch, images, preprocess

from g2l import ranks
from g2l.errors import PatchError
from g2l.features import SAVE_SECONDS, extract_features
from g2l.models import (
    load_model,
)
from g2l.speed import fitting_batch_size


class Source:
    """Items by number; an exception in their place is raised. Counts what was read."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        if isinstance(self.items[i], BaseException):
            raise self.items[i]
        return self.items[i]


def plain(model, arrays):
    with torch.no_grad():
        return torch.cat([model(preprocess(model, batch(a))) for a in arrays]).numpy()


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 1}, {"batch_size": 5}, {"workers": 2, "batch_size": 4}]
)
def test_features_do_not_depend_on_batches_or_workers(options, vit):
    arrays = images(9) + images(4, 70, 90, seed=1)  # sizes mixed
    got = extract_features(vit, Source(arrays), **options)
    want = plain(vit, arrays)
    assert (
        got.dtype == np.float32
        and np.abs(got - want).max() < 1e-5 * np.linalg.norm(want, axis=1).min()
    )


def test_sequences_are_averaged_and_read_one_by_one(vit):
    arrays = images(7)
    lazy = Source(arrays)
    got = extract_features(vit, [arrays, np.stack(arrays[:3]), lazy, arrays[0]], batch_size=3)
    want = plain(vit, arrays)
    np.testing.assert_allclose(
        got, [want.mean(0), want[:3].mean(0), want.mean(0), want[0]], rtol=1e-4, atol=1e-5
    )
    assert lazy.read == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_items_become_nan_and_are_named(workers, vit):
    good = images(3)
    items = [
        good[0],
        OSError("truncated"),
        good[1],
        PatchError("slide s, x 1, y 2"),
        [],
        good[2][:, :, 0],
        Source([good[0], ValueError("bad patch"), good[1]]),
        Source([OSError("a"), OSError("b")]),
    ]
    errors = []
    got = extract_features(vit, Source(items), errors=errors, workers=workers)
    assert np.flatnonzero(np.isnan(got).any(1)).tolist() == [1, 3, 4, 5, 7]
    assert errors[:4] == [
        (1, "truncated"),
        (3, "slide s, x 1, y 2"),
        (4, "holds no images"),
        (5, "expected an RGB image, uint8 (H, W, 3), got uint8 (64, 64)"),
    ]
    assert errors[4:] == [(6, "bad patch"), (7, "a"), (7, "b")]
    np.testing.assert_allclose(got[6], plain(vit, good[:2]).mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ZeroDivisionError):  # a defect is no unreadable image
        extract_features(vit, Source([good[0], ZeroDivisionError()]))


def test_padding_for_a_compiled_network_changes_nothing(vit):
    arrays = images(5)
    model = load_model("timm:test_vit", "random", input_size=64)
    model.compiled = True
    shapes = []
    model.net.register_forward_pre_hook(lambda _, args: shapes.append(len(args[0])))
    got = extract_features(model, arrays, batch_size=4)
    assert shapes == [4, 4]
    np.testing.assert_allclose(got, plain(vit, arrays), rtol=1e-4, atol=1e-5)


def test_features_resume_and_notice_changes(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("g2l.features.SAVE_SECONDS", 0)
    arrays = images(8)
    broken = Source([*arrays[:5], OSError("lost"), arrays[6], RuntimeError("killed here")])
    with pytest.raises(RuntimeError):
        extract_features(vit, broken, batch_size=1, cache=tmp_path, key="data 1")
    whole, errors = Source([*arrays[:5], OSError("lost"), *arrays[6:]]), []
    got = extract_features(vit, whole, cache=tmp_path, key="data 1", errors=errors)
    assert 0 not in whole.read and 7 in whole.read and errors == [(5, "lost")]
    want = plain(vit, arrays)
    want[5] = np.nan
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    again = Source([None] * 8)  # nothing is read a second time
    np.testing.assert_array_equal(extract_features(vit, again, cache=tmp_path, key="data 1"), got)
    assert not again.read
    files = sorted(tmp_path.iterdir())  # one a row
    files[0].write_bytes(files[0].read_bytes()[:40])
    damaged = Source(arrays)
    extract_features(vit, damaged, cache=tmp_path, key="data 1")
    assert len(damaged.read) == 1
    other = Source(arrays)
    extract_features(vit, other, cache=tmp_path, key="data 2")
    assert len(other.read) == 8
    resized = Source(arrays)
    extract_features(
        load_model("timm:test_vit", "random", input_size=80),
        resized,
        cache=tmp_path,
        key="data 1",
    )
    assert len(resized.read) == 8


class Slow(Source):
    """Thirteen images, the fifth unreadable; each takes `seconds`."""

    def __init__(self, seconds):
        super().__init__(images(13))
        self.items[4] = OSError("lost")
        self.seconds = seconds

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return super().__getitem__(i)


def extract(folder, seconds):
    """A command that saves after every batch; its features in a file named by its rank."""
    rank, world, device = ranks.setup_distributed("cpu")
    assert ranks.setup_distributed("cpu") == (rank, world, device)
    errors = []
    model = load_model("timm:test_vit", "random", input_size=64)
    got = extract_features(
        model, Slow(seconds), batch_size=2, cache=folder / "cache", errors=errors
    )
    assert errors == [(4, "lost")]
    np.save(folder / f"{rank}-of-{world}.npy", got)
    ranks.leave_distributed()
    return 0


def test_features_are_the_same_in_two_ranks_and_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("g2l.features.SAVE_SECONDS", 0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    process = Forked(lambda: extract(tmp_path / "one", 0.2))
    until = time.monotonic() + 240
    while not list((tmp_path / "one").glob("cache/[!.]*.safetensors")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    assert not list((tmp_path / "one").glob("*.npy")) and list(
        (tmp_path / "one").glob("cache/[!.]*.safetensors")
    )
    monkeypatch.setattr("g2l.features.SAVE_SECONDS", SAVE_SECONDS)
    extract(tmp_path / "one", 0)
    for done in run_ranks(lambda: extract(tmp_path / "two", 0)):
        assert done.returncode == 0, done.stderr
    one, first, second = (
        np.load(tmp_path / f) for f in ("one/0-of-1.npy", "two/0-of-2.npy", "two/1-of-2.npy")
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one, rtol=1e-4, atol=1e-5)
    assert np.isnan(one[4]).all() and np.isfinite(np.delete(one, 4, 0)).all()


class Deadly(Source):
    """Kills the process that reads its third item."""

    def __getitem__(self, i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_killed_loader_is_noticed_at_once_by_a_second_extraction_too(vit):
    extract_features(vit, images(3), workers=1)
    start = time.monotonic()
    with pytest.raises((RuntimeError, ConnectionError)):
        extract_features(vit, Deadly(images(5)), workers=1, batch_size=1)
    assert time.monotonic() - start < 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_features_equal_those_of_the_cpu(tiny):
    arrays = images(10, 250, 250)
    want = extract_features(load_model(tiny, "random"), arrays)
    for dtype, tolerance in ((torch.float32, 1e-3), (None, 2e-2)):
        model = load_model(tiny, "random", device="cuda", dtype=dtype)
        got = extract_features(model, arrays, workers=2)
        assert (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max() < tolerance
    assert fitting_batch_size(model) % 8 == 0

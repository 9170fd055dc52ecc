"""Training on slides that are served: the student is that of the slides at hand, whatever happens;
the cache that stands between survives damage and kills."""

import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED
from jobs import main_of, run_ranks
from servers import serve
from training import command, fails, same, stopped_at, write_cohort

import distill
import tile
from g2l.errors import PatchError, UserError
from g2l.patches import PatchIndex
from g2l.remote import Cache
from g2l.stream import hold_out

FORK = multiprocessing.get_context("fork")
ROOM = 1 << 30
pytestmark = pytest.mark.usefixtures("signals", "impatient")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """The same slides at hand (`near`) and served (`far`), both tiled; their server."""
    near = write_cohort(tmp_path_factory.mktemp("near"))
    far = tmp_path_factory.mktemp("far")
    paths = sorted((near / "slides" / "tiny").iterdir())
    with serve({path.name: (path.name, path.read_bytes()) for path in paths}) as server:
        (far / "list.txt").write_text("".join(f"{server.url}/{path.name}\n" for path in paths))
        where = ["--cancer", "tiny", "--data", str(far), "--remote", str(far / "list.txt")]
        assert tile.main([*where, "--mpp", "0.5", "--patch-size", "64"]) == 0
        yield SimpleNamespace(near=near, far=far, server=server, folder=far / "tiles" / "tiny")


@pytest.fixture
def served(cohort):
    """The cohort without a cache and faults."""
    for path in cohort.folder.glob("cache*"):
        path.unlink()
    yield cohort
    cohort.server.harmed.clear()


@pytest.fixture(scope="module")
def unbroken(cohort, tmp_path_factory):
    """A run on the slides at hand."""
    runs = tmp_path_factory.mktemp("unbroken")
    assert distill.main(command(cohort.near, runs, "r")) == 0
    return runs / "r"


def training_slide(index):
    """A slide that is trained on."""
    return int(np.flatnonzero(~hold_out(index, 0.05, 0))[0])


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_served_slides_equals_one_on_those_at_hand(
    served, unbroken, tmp_path, capsys, workers
):
    assert distill.main(command(served.far, tmp_path, "r", "--workers", workers)) == 0
    same(unbroken, tmp_path / "r")
    told = "([0-9.]+) MB fetched; ([0-9]+)% of ([0-9]+) tiles were in the cache; .* [0-9]+% of"
    fetched, _, tiles = map(float, re.search(told, capsys.readouterr().out).groups())
    assert fetched > 0.1 and tiles > 40
    assert distill.main(command(served.far, tmp_path, "again", "--workers", workers)) == 0
    same(unbroken, tmp_path / "again")
    more, hits, _ = map(float, re.search(told, capsys.readouterr().out).groups())
    assert hits == 100, "all was kept, also what other processes fetched"
    assert more < fetched, "only what lies ahead of the last step"
    assert distill.main(command(served.near, tmp_path, "near", "--max-steps", 2)) == 0
    assert "MB fetched" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_on_one_cache_equal_two_on_slides_at_hand(served, tmp_path):
    loading = "--workers", 2

    def ranks(data, name):
        first, second = run_ranks(main_of("distill.py", *command(data, tmp_path, name, *loading)))
        for done in (first, second):
            assert done.returncode == 0, done.stdout + done.stderr
            assert "damaged" not in done.stdout + done.stderr
        return re.search("([0-9]+)% of ([0-9]+) tiles were in the cache", first.stdout)

    assert not ranks(served.near, "near")
    assert int(ranks(served.far, "far")[2]) > 80
    same(tmp_path / "near", tmp_path / "far")
    assert int(ranks(served.far, "again")[1]) == 100, "all was kept, whichever rank fetched it"
    same(tmp_path / "near", tmp_path / "again")
    sound = patches(served.folder, 0)
    assert np.array_equal(patches(served.folder), sound)
    assert [path.name for path in served.folder.glob("cache*.sqlite")] == ["cache.sqlite"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED, reason="no real slides at hand")
def test_real_slides_that_are_served_give_the_same_student(tmp_path):
    near = tmp_path / "slides" / "near"
    near.mkdir(parents=True)
    files = {}
    for path in (SHARED / "slides").glob("*.svs"):
        files[path.name] = path.name, path.read_bytes()
        (near / path.name).write_bytes(path.read_bytes())
    flags = ["--data", str(tmp_path), "--mpp", "0.42", "--assume-mpp", "0.42"]
    short = "--max-steps", 3, "--workers", 0
    with serve(files) as server:
        (tmp_path / "list.txt").write_text("".join(f"{server.url}/{name}\n" for name in files))
        for name, more in (("near", []), ("far", ["--remote", str(tmp_path / "list.txt")])):
            assert tile.main(["--cancer", name, *flags, *more]) == 0
            arguments = command(tmp_path, tmp_path, name, "--cancer", name, *short)
            assert distill.main(arguments) == 0
    same(tmp_path / "near", tmp_path / "far")
    assert len(PatchIndex(tmp_path / "tiles" / "far").slides) == 2


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["20GB", "0"])
def test_a_run_that_is_ended_and_resumed_equals_an_unbroken_one(
    served, unbroken, tmp_path, monkeypatch, cache
):
    arguments = command(served.far, tmp_path, "r", "--cache", cache, "--workers", 1)
    stopped_at(5, arguments, monkeypatch)
    assert distill.main(arguments) == 0
    same(unbroken, tmp_path / "r")
    assert (served.folder / "cache.sqlite").exists() == (cache != "0")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [404, "cut"])
def test_a_slide_that_is_not_served_is_drawn_again_counted_and_named(
    served, tmp_path, capsys, monkeypatch, fault
):
    index = PatchIndex(served.folder)
    slide = training_slide(index)
    served.server.harmed[f"{index.slides[slide]}.tif"] = fault
    many = ("--max-unreadable", 0.5)
    assert distill.main(command(served.far, tmp_path, "far", *many)) == 1
    named = (tmp_path / "far" / "unreadable.txt").read_text().splitlines()
    assert f"{len(named)} patches could not be read" in capsys.readouterr().out
    why = "the server answers 404" if fault == 404 else "no answer"
    assert named and all(index.slides[slide] in line and why in line for line in named)
    read = PatchIndex.read

    def damaged(self, i):
        if self.locate(i)[0] == slide:
            raise PatchError("damaged")
        return read(self, i)

    monkeypatch.setattr(PatchIndex, "read", damaged)
    assert distill.main(command(served.near, tmp_path, "near", *many)) == 1
    same(tmp_path / "near", tmp_path / "far")


def test_too_many_that_are_not_served_stop_the_run_in_words(served, tmp_path, capsys):
    index = PatchIndex(served.folder)
    held = hold_out(index, 0.05, 0)
    for slide in np.flatnonzero(~held)[:4]:
        served.server.harmed[f"{index.slides[slide]}.tif"] = 404
    parts = ("could not be read", "answers 404", "unreadable.txt", "--max-unreadable")
    fails(command(served.far, tmp_path, "r"), *parts, capsys=capsys)
    served.server.harmed.clear()
    arguments = command(served.far, tmp_path, "r", "--max-unreadable", 0.5)
    assert distill.main(arguments) in (0, 1), "the same command goes on"


# ---- the cache


def patches(folder, cache=ROOM):
    """Every patch, read through a new index."""
    index = PatchIndex(folder, cache=cache)
    index.ahead(range(len(index)))
    found = np.stack([index.read(i) for i in range(len(index))])
    index.close()
    return found


def flip(path):
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    rng = np.random.default_rng(0)
    data[rng.integers(0, len(data), len(data) // 50)] ^= 0xFF
    path.write_bytes(data.tobytes())


def flip_tiles(path):
    """Only beyond the first page, where tiles lie: SQLite opens it."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[4096 + 2048 :: 997] ^= 0x10
    path.write_bytes(data.tobytes())


DAMAGE = {
    "bytes flipped": flip,
    "bytes of tiles flipped": flip_tiles,
    "emptied": lambda path: path.write_bytes(b""),
    "no database": lambda path: path.write_bytes(b"no database" * 9999),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_begun_anew(served, capsys, damage):
    sound = patches(served.folder)
    DAMAGE[damage](served.folder / "cache.sqlite")
    assert np.array_equal(patches(served.folder), sound)
    assert np.array_equal(patches(served.folder), sound)
    files = list(served.folder.glob("cache*.sqlite"))
    assert len(files) == 1, "what is damaged takes no room"
    assert ("is damaged" in capsys.readouterr().out) == (files[0].name != "cache.sqlite")
    served.server.seen.clear()
    assert np.array_equal(patches(served.folder), sound) and not served.server.seen


def test_a_cache_damaged_while_it_is_used(served):
    sound = patches(served.folder, 0)
    assert np.array_equal(patches(served.folder), sound)
    index = PatchIndex(served.folder, cache=ROOM)
    assert np.array_equal(index.read(0), sound[0])
    flip(served.folder / "cache.sqlite")
    found = [index.read(i) for i in range(len(index))]
    index.close()
    assert np.array_equal(np.stack(found), sound)
    assert np.array_equal(patches(served.folder), sound)


def test_a_cache_that_cannot_be_is_an_error_in_words(tmp_path):
    (tmp_path / "cache.sqlite").mkdir()
    with pytest.raises(UserError, match=r"cache\.sqlite cannot keep tiles"):
        Cache(tmp_path / "cache.sqlite", ROOM)


def work(folder):
    """Read all patches without end, and forget now and then what was kept, to write it anew."""
    while True:
        index = PatchIndex(folder, cache=ROOM)
        for i in range(len(index)):
            index.read(i)
        index.link.store.base.execute("DELETE FROM tiles WHERE random() % 2")
        index.close()


def test_processes_share_a_cache_and_one_is_killed(served):
    sound = patches(served.folder, 0)
    luck = np.random.default_rng(0)
    for _ in range(6):
        other = FORK.Process(target=work, args=(served.folder,), daemon=True)
        other.start()
        end = time.monotonic() + luck.uniform(0.2, 0.6)
        while time.monotonic() < end:
            assert np.array_equal(patches(served.folder), sound)
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        assert np.array_equal(patches(served.folder), sound)
    assert [path.name for path in served.folder.glob("cache*.sqlite")] == ["cache.sqlite"]

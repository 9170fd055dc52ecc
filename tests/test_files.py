"""Whole files and locks."""

import errno
import os
import select
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import pytest
from conftest import ROOT
from training import descendants

from g2l.errors import UserError, explain
from g2l.files import atomic, check_room, clear_leftovers, clear_stale, locked, write_text
from g2l.results import load_predictions
from g2l.runs import read_checkpoint
from g2l.weights import read_weights, verify
from g2l.workbook import read_sheets


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    with atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert (tmp_path / "sub" / "a.txt").read_text() == "old" and len(
        list((tmp_path / "sub").iterdir())
    ) == 1


def test_who_waits_for_a_lock_is_told_who_holds_it(tmp_path):
    with locked(tmp_path / "lock") as mine:
        assert mine
        with locked(tmp_path / "lock", wait=False) as free:
            assert not free
        held = f"waited 0 s for process {os.getpid()} on .*, which holds it"
        with pytest.raises(UserError, match=held), locked(tmp_path / "lock", limit=0.1):
            pass
    with locked(tmp_path / "lock", wait=False) as free:
        assert free


def test_a_lock_ends_with_its_holder_though_what_it_forked_lives_on(tmp_path):
    lives, mark = os.pipe()  # at its end when the holder's child has ended
    holder = os.fork()
    if not holder:
        with locked(tmp_path / "lock"):
            os.close(lives)
            if not os.fork():
                time.sleep(60)
                os._exit(0)
            os.write(mark, str(os.getpid()).encode())
            time.sleep(60)
        os._exit(0)
    os.close(mark)
    assert int(os.read(lives, 10)) == holder
    (child,) = descendants(holder)
    try:
        with locked(tmp_path / "lock", wait=False) as free:
            assert not free, "its child has not let go of it"
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locked(tmp_path / "lock", wait=False) as free:
            assert free and not select.select([lives], [], [], 0)[0]
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(lives)


def test_the_file_that_lies_where_a_folder_is_to_be_is_named(tmp_path):
    file = tmp_path / "runs"
    file.touch()
    for path in (file / "x.txt", file / "name" / "x.txt"):
        with pytest.raises(OSError) as found:
            write_text(path, "")
        assert explain(found.value, {}).startswith(f"{file}: a file lies")
    with pytest.raises(OSError) as found:
        h5py.File(file / "x.h5", "w")
    assert "Not a directory" in explain(found.value, {})  # HDF5 tells no name


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        with locked(tmp_path / "lock", wait=False) as free:
            assert free
    assert capsys.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "ä" * 125 + ".csv", "b" * 229 + ".h5"])
def test_names_near_the_limit_are_written_and_cleared(tmp_path, name):
    path = tmp_path / name
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == path.suffix and temporary.name.startswith(".")
        kept = temporary.with_name(temporary.name)
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == [name]
    kept.write_text("half")
    clear_leftovers(path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_temporary_files_of_killed_runs_go_and_fresh_ones_stay(tmp_path):
    old = tmp_path / "features" / "model" / ".bench.12.0a1b2c.tmp.safetensors"
    new = tmp_path / "predictions" / ".bench.13.0a1b2d.tmp.npz"
    kept = tmp_path / "features" / "model" / "bench.safetensors"
    for path in (old, new, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for path in (old, kept):
        os.utime(path, (0, 0))
    clear_stale(tmp_path)
    assert not old.exists() and new.exists() and kept.exists()


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A zip file of a megabyte that holds 1.1 GB of zeros."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("xl/sharedStrings.xml", "w", force_zip64=True) as member:
            for _ in range(65):
                member.write(bytes(1 << 24))
    return path


@pytest.mark.parametrize("reader", [read_sheets, read_weights, verify, read_checkpoint])
def test_a_zip_bomb_is_refused_in_seconds(bomb, reader):
    begun = time.monotonic()
    with pytest.raises((UserError, zipfile.BadZipFile), match=r"would unpack to 1\.1 GB"):
        reader(bomb)
    assert time.monotonic() - begun < 3


def test_predictions_that_are_a_zip_bomb_are_made_again(bomb, capsys):
    assert load_predictions(bomb, "key") is None
    assert "would unpack to 1.1 GB" in capsys.readouterr().err


def test_a_full_disk_is_told_whoever_hides_it():
    """h5py raises RuntimeError where it cannot close a file."""
    hidden = "Can't decrement id ref count (file write failed: errno = 28, error message = "
    told = explain(RuntimeError(f"{hidden}'No space left on device')"), {})
    assert told and told.startswith("no space left on the disk; make room and run")
    assert explain(RuntimeError("shapes differ"), {}) is None


def test_a_closed_output_is_told_as_such():
    """As of `command | head -1`: no loading process was killed."""
    code = (
        "from g2l.errors import exit_status\nexit_status(lambda: [print() for _ in range(99999)])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, cwd=ROOT) as command:
        command.stdout.close()
        said = command.stderr.read().decode()
    assert said.startswith(
        "error: nobody reads what is printed here any more; run the same command"
    )
    assert said.count("\n") == 1


def test_room_is_made_sure_of_before_a_file_is_written(tmp_path, monkeypatch):
    check_room(tmp_path / "a.h5", 1000)
    asked = []
    monkeypatch.setattr("os.posix_fallocate", lambda *args: asked.append(args[1:]))
    check_room(tmp_path / "b.h5", 1000)
    assert asked == [(0, 1000 + (1 << 20))]

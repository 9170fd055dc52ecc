"""Whole files and locks."""

import errno

import pytest

from g2l.files import atomic, locked


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    with atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert (tmp_path / "sub" / "a.txt").read_text() == "old" and len(
        list((tmp_path / "sub").iterdir())
    ) == 1


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        with locked(tmp_path / "lock", wait=False) as free:
            assert free
    assert capsys.readouterr().err.count("has no locks") == 1

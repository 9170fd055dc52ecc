"""Whole files, locks, tables and texts, checksums: how anything of ours is written, and read back.

First writing (`atomic`, `locked`), then reading, then names and digests.
"""

import codecs
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import IO

from g2l.errors import UserError, warn

LOCK_WAIT = 60.0  # seconds; what is done under a lock takes a fraction of one


@contextlib.contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path in the folder of `path`; rename it onto `path` on success, remove it
    on failure.

    Its name is its own, so processes do not meet; a reader sees the old file or the new one, never
    a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{hidden_stem(path)}.{os.getpid()}.{os.urandom(3).hex()}.tmp{path.suffix}"
    )
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hidden_stem(path: Path) -> str:
    """The stem of temporary names of `path`: its own, or a hash where that would be too long."""
    return path.stem if len(os.fsencode(path.name)) < 230 else digest(path.name)


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of `path` under temporary names; the caller holds its
    lock.
    """
    stem = hidden_stem(path)
    suffix = path.suffix
    for found in path.parent.glob(f".{glob.escape(stem)}.*.tmp{suffix}"):
        middle = found.name[len(stem) + 2 : -len(f".tmp{suffix}")]
        if re.fullmatch(r"\d+\.[0-9a-f]{6}", middle):  # else of a file whose name begins alike
            found.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """See to it that a file and its name outlive a loss of power; before something is deleted for
    it.
    """
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_room(path: Path, size: int) -> None:
    """Raise OSError where the disk has no `size` bytes and a megabyte for a file to be written.

    HDF5 and PyTorch say it later, in other words or by a crash. The file is there then, for its
    writer to begin.
    """
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size + (1 << 20))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, limit: float = LOCK_WAIT):
    """Hold an advisory lock on `path`, which holds nothing but the name of who has it.

    Yields False when it is held elsewhere and `wait` is False. Raises UserError where it is not
    free within `limit` seconds. The kernel frees it when the holder dies, however it dies and
    whatever it forked lives on: there are no stale locks to clear.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    with open(path, "a") as file:
        while not _free(file, path.parent):
            if not wait:
                yield False
                return
            if time.monotonic() > end:
                who = f"{path.read_text() or 'another process'}, which holds it"
                raise UserError(f"{path}: waited {limit:.0f} s for {who}")
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # a full disk takes no name, and the lock is ours
            os.truncate(path, 0)
            os.write(
                file.fileno(),
                f"process {os.getpid()} on {socket.gethostname()}".encode(),
            )
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)


_held: set[IO] = set()  # open files of the locks of this process


def _close_copies() -> None:
    """In a forked process: a lock lives as long as any copy of its file is open."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_close_copies)


def _free(file: IO, folder: Path) -> bool:
    """Take the lock on an open file, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _no_locks(folder, str(error))
    return True


@functools.cache
def _no_locks(folder: Path, why: str) -> None:
    warn(
        f"note: {folder}: this file system has no locks ({why}), so see to it yourself that no two "
        "processes work there at once"
    )


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all; what a file name holds that is no UTF-8 stays as it is."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_table(path: Path, rows: Iterable[Iterable]) -> None:
    """Write rows, of which the first names the columns, as a CSV file."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with that mark; UserError else."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not in UTF-8 ({error}); save it as "CSV UTF-8"') from error


def separator(header: str) -> str:
    """What separates the columns of a table: comma, semicolon or tab, whichever its header has most
    of.
    """
    return max(",;\t", key=header.count)


def clear_stale(folder: Path) -> None:
    """Remove the temporary files of killed runs below a folder: those untouched for ten minutes."""
    for path in folder.rglob(".*.tmp.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 600:
                path.unlink()


def check_unpacked(path: Path) -> None:
    """Raise zipfile.BadZipFile where a zip file would become over 1 GiB and 100 times its size."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > max(1 << 30, 100 * path.stat().st_size):
        raise zipfile.BadZipFile(f"it would unpack to {size / 1e9:,.1f} GB")


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file or it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def read_table(
    path: Path, needed: Sequence[str], filled: Sequence[str] = (), why: str = ""
) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line, without blanks around names and values.

    Raises UserError naming file and line where a column of `needed` lacks or has an empty cell, or
    one of `filled`, which may lack, has one; `why` ends the text.
    """
    text = read_text(path)
    reader = csv.reader(io.StringIO(text), delimiter=separator(text.partition("\n")[0]))
    try:
        head = [name.strip() for name in next(reader, [])]
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f"{path}: no CSV file ({error})") from error
    missing = ", ".join(name for name in needed if name not in head)
    if missing:
        raise UserError(
            f"{path}: no column {missing} (found: {', '.join(head) or 'none'}); needed "
            f"are {','.join(needed)}, separated by commas{why}"
        )
    if not lines:
        raise UserError(f"{path}: holds no rows; one line per image is expected")
    rows = []
    for number, cells in lines:
        row = dict(itertools.zip_longest(head, cells[: len(head)], fillvalue=""))
        for name in (*needed, *filled):
            if row.get(name) == "":
                why = f"{name} is empty; fill it in or remove the line"
                raise UserError(f"{path}, line {number}: {why}")
        rows.append(row)
    return rows


def files_below(root: Path) -> list[Path]:
    """All files below `root` in order, through links to folders too; not macOS's `._` twins."""
    found = []
    seen = set()
    for folder, inner, names in os.walk(root, onerror=_unreadable, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back
            inner.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        found += [os.path.join(folder, name) for name in names if not name.startswith("._")]
    return [Path(name) for name in sorted(found)]  # texts are sorted faster than paths


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        warn(f"note: {error.filename}: left out, cannot be read ({error.strerror})")


def safe(name: str) -> str:
    """`name` as a file name: everything but letters, digits, dot, dash and underscore becomes an
    underscore.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.") or "_"


def digest(*parts) -> str:
    """Short hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def stamp(path: Path) -> list:
    """What changes when a file (or a folder of files) changes: names, sizes and times of
    modification.
    """
    try:
        found = os.stat(path)
    except OSError:  # a missing file is a state like any other
        return []
    if S_ISDIR(found.st_mode):
        return [line for inner in sorted(path.iterdir()) for line in stamp(inner)]
    return [[path.name, found.st_size, found.st_mtime_ns]]

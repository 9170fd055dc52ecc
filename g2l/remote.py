"""Slides at an address: ranges of bytes over HTTP or S3, asked for ahead, tried again, verified.

`Link` is what a process shares between slides: connections and the tiles kept on disk (`Cache`).
`RemoteFile` reads one slide and has the names of tiff.LocalFile. While a slide is opened its `Twin`
keeps in memory what was read, at its place in a file of holes that OpenSlide takes for the slide.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from g2l.cohort import CohortSlide, name_slides
from g2l.errors import PatchError, SkippedSlide, UserError
from g2l.files import digest, locked, read_text
from g2l.network import Client
from g2l.slides import SUFFIXES

Span = tuple[int, int]  # offset and bytes
CONNECTIONS = 16  # of one process
GAP = 1 << 14  # bytes between two spans that are fetched with them rather than asked for apart
MOST = 4 << 20  # bytes of one request
BLOCK = 1 << 16  # bytes that are fetched at least while a slide is opened


def is_remote(place: object) -> bool:
    """Whether a place is an address."""
    return re.match("(https?|s3)://", str(place)) is not None


@functools.cache
def _s3() -> Any:
    """The client that signs, with the credentials that AWS's own tools find, if there are any."""
    import botocore.config
    import botocore.session

    session = botocore.session.get_session()
    known = session.get_credentials() is not None
    version = "s3v4" if known else botocore.UNSIGNED
    config = botocore.config.Config(signature_version=version)
    return session.create_client("s3", config=config)


@functools.lru_cache(4096)
def _signed(address: str, _now: int) -> str:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    place = {"Bucket": bucket, "Key": key}
    return _s3().generate_presigned_url("get_object", place, ExpiresIn=3600)


def url_of(address: str) -> str:
    """Where an address is read: its own URL, or for S3 one that is signed anew every ten minutes,
    so that credentials that expire are asked for again."""
    if address.startswith("s3://"):
        return _signed(address, int(time.time()) // 600)
    return address


def addresses_below(address: str) -> list[str]:
    """The address itself, or what lies below an s3:// address that ends with a slash."""
    if not (address.startswith("s3://") and address.endswith("/")):
        return [address]
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [one["Key"] for page in pages for one in page.get("Contents", ())]
    return [f"s3://{bucket}/{key}" for key in keys if key.lower().endswith(SUFFIXES)]


def read_addresses(place: str) -> list[str]:
    """An address, or those in a file, one a line; UserError for what is none."""
    if not is_remote(place) and not os.path.isfile(place):
        raise UserError(f"{place}: no address, and no file of addresses")
    lines = [place] if is_remote(place) else read_text(Path(place)).splitlines()
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for line in found or [""]:
        if not is_remote(line):
            raise UserError(f"{place}: {line!r} is no http(s):// or s3:// address")
    return found


def slides_at(addresses: list[str], folder: Path, names: Collection[str] = ()) -> list[CohortSlide]:
    """The slides at addresses, to become <folder>/<hash>/<file name>; with length and ETag, if the
    server answers. Given `names`, only the files called so."""
    link = Link(addresses)
    link.connect()
    every = [one for address in addresses for one in addresses_below(address)]
    slides = {}
    for address, (size, etag) in zip(every, link.threads.map(link.version, every), strict=True):
        file = Path(unquote(urlsplit(address).path)).name
        path = folder / digest(address) / file
        if not names or file in names:
            slides[path] = CohortSlide(file, path, size=size, md5=etag, address=address)
    for name, path in name_slides(slides).items():
        slides[path].name = name
    return list(slides.values())


class Link:
    """Connections to servers and the tiles kept on disk; each process makes its own when it needs
    them.

    A redirect is followed only to a host of `addresses`. `counts`: bytes fetched, tiles asked for,
    hits of the cache among them.
    """

    def __init__(self, addresses: Iterable[str], cache: Path | None = None, bound: int = 0):
        self.hosts = {urlsplit(url_of(f"{address}_")).netloc for address in addresses}
        self.cache = cache
        self.bound = bound
        self.counts: Counter[str] = Counter()
        self.process = 0

    def __getstate__(self) -> dict[str, Any]:
        own = dict.fromkeys(("client", "threads", "store", "lock"))
        return {**self.__dict__, "process": 0, **own}

    def connect(self) -> None:
        """Make what this process has not yet."""
        if self.process == os.getpid():
            return
        if self.process:  # a fork has its parent's
            self.counts = Counter()
        self.client = Client(self.hosts, CONNECTIONS)
        self.threads = ThreadPoolExecutor(CONNECTIONS)
        self.lock = threading.Lock()  # of the counts to which threads add
        self.store = Cache(self.cache, self.bound) if self.cache and self.bound else None
        self.process = os.getpid()  # last: what failed is tried again

    def close(self) -> None:
        """Write what waits to be kept."""
        if self.process == os.getpid() and self.store:
            self.store.flush()

    def take_counts(self) -> Counter[str]:
        """What this process counted, which begins anew."""
        if self.process != os.getpid():
            return Counter()
        with self.lock:
            taken, self.counts = self.counts, Counter()
        return taken

    def fetch(self, address: str, offset: int, count: int) -> tuple[bytes, int, str]:
        """(the bytes from `offset`, fewer only at the end; length of the whole; its ETag or "").

        UserError with the reason when it cannot be had: no PatchError, which would say that the
        slide is damaged there.
        """
        self.connect()
        headers = {"Range": f"bytes={offset}-{offset + count - 1}"}
        take = functools.partial(self._checked, offset, count)
        return self.client.ask(url_of(address), headers, take)

    def _checked(self, offset: int, count: int, answer: Any) -> tuple[bytes, int, str]:
        """The content of an answer; ValueError where it is not what it should be."""
        if answer.status != 206:
            raise UserError("the server has no ranges of bytes")
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if not span or int(span[1]) != offset:
            raise ValueError("another range than was asked for")
        size = int(span[3])
        whole = min(count, size - offset)
        data = answer.read(count + 1)
        if len(data) != whole:
            raise ValueError(f"{len(data)} bytes where {whole} should be")
        answer.release_conn()
        with self.lock:
            self.counts["bytes"] += len(data)
        return data, size, answer.headers.get("ETag", "")

    def version(self, address: str) -> tuple[int, str]:
        """(length, ETag) of a slide; (0, "") where the server does not say."""
        with contextlib.suppress(UserError):
            return self.fetch(address, 0, 1)[1:]
        return 0, ""

    def open(self, address: str, size: int = 0, etag: str = "") -> RemoteFile:
        """A slide of `size` bytes, which is asked for where it is 0; UserError where that fails."""
        if not size:
            _, size, etag = self.fetch(address, 0, 1)
        return RemoteFile(self, address, size, etag)


@dataclass(eq=False)
class RemoteFile:
    """One slide at an address, read by spans. One that has changed since it was opened, or since
    it was tiled, is a UserError."""

    link: Link
    address: str
    size: int
    etag: str
    twin: Twin | None = None
    # what is fetched, from where on
    coming: dict[Span, tuple[Future, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.address.partition("?")[0]  # without what signs it
        self.facts = {"slide_bytes": self.size, "slide_etag": self.etag}

    def _fetch(self, offset: int, count: int) -> bytes:
        data, size, etag = self.link.fetch(self.address, offset, count)
        if size != self.size or (etag and self.etag and etag != self.etag):
            raise UserError(f"{self.name} changed since it was tiled; run tile.py on it again")
        if len(data) != count:
            raise PatchError("it lies beyond the end of the file, which is cut short or damaged")
        return data

    @property
    def _store(self) -> Twin | Cache | None:
        self.link.connect()
        return self.twin or self.link.store

    def _key(self, offset: int) -> str:
        return f"{self.name} {self.size} {self.etag} {offset}"

    def ahead(self, spans: Iterable[Span]) -> None:
        """Begin to fetch what is not at hand, neighbours together."""
        store = self._store
        group: list[Span] = []
        for span in sorted(set(spans) - self.coming.keys()):
            if not span[1] or (store and store.has(self._key(span[0]))):
                continue
            if group:
                (start, _), (last, length) = group[0], group[-1]
                if span[0] > last + length + GAP or sum(span) > start + MOST:
                    self._begin(group)
                    group = []
            group.append(span)
        if group:
            self._begin(group)

    def _begin(self, group: list[Span]) -> None:
        start = group[0][0]
        end = max(map(sum, group))
        future = self.link.threads.submit(self._fetch, start, end - start)
        self.coming |= dict.fromkeys(group, (future, start))

    def decoded(self, offset: int, count: int, decode: Callable[[bytes], Any]) -> Any:
        """What `decode` makes of a span, which is kept once that succeeds."""
        if not count:
            return decode(b"")
        store, key, counts = self._store, self._key(offset), self.link.counts
        counts["tiles"] += 1
        known = store.get(key) if store else None
        if known and len(known) == count:
            with contextlib.suppress(PatchError):  # a decayed one is fetched anew
                found = decode(known)
                counts["hits"] += 1
                return found
        future, first = self.coming.pop((offset, count), (None, offset))
        data = future.result() if future else self._fetch(offset, count)
        data = data[offset - first :][:count]
        found = decode(data)
        if store:
            store.put(key, data)
        return found

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`."""
        return self.decoded(offset, count, bytes)

    def open_twin(self) -> Path:
        """Fetch what says where everything lies; a path under which OpenSlide opens it.

        SkippedSlide where that is no TIFF with tiles.
        """
        import tifffile

        self.twin = Twin(self.size)
        try:
            with tifffile.TiffFile(io.BufferedReader(_Blocks(self), BLOCK)) as tiff:
                for page in (*tiff.pages, *(tiff.pages.first.pages or ())):
                    _ = page.dataoffsets, page.databytecounts, page.jpegtables
        except (tifffile.TiffFileError, ValueError, IndexError, TypeError) as error:
            raise SkippedSlide(
                f"its pixels need OpenSlide: no TIFF ({error})", mend="rest"
            ) from error
        return self.twin.path

    def close(self) -> None:
        """Forget what is being fetched and what was read."""
        self.coming.clear()
        if self.twin:
            self.twin.close()
            self.twin = None


class Twin:
    """What was read of a slide, in memory: a file of its length that is empty elsewhere."""

    def __init__(self, size: int):
        self.handle = os.memfd_create("slide")
        os.ftruncate(self.handle, size)
        self.path = Path(f"/proc/self/fd/{self.handle}")
        self.known: dict[str, int] = {}

    def has(self, key: str) -> bool:
        return key in self.known

    def get(self, key: str) -> bytes | None:
        offset = int(key.rpartition(" ")[2])
        return os.pread(self.handle, self.known[key], offset) if key in self.known else None

    def put(self, key: str, data: bytes) -> None:
        os.pwrite(self.handle, data, int(key.rpartition(" ")[2]))
        self.known[key] = len(data)

    def close(self) -> None:
        os.close(self.handle)


class _Blocks(io.RawIOBase):
    """A remote slide as a file for tifffile: whole blocks are fetched, and lie in the twin."""

    def __init__(self, file: RemoteFile):
        assert file.twin
        self.file = file
        self.twin = file.twin
        self.place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = 0, self.place, self.file.size
        self.place = base[whence] + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        end = min(self.place + len(buffer), self.file.size)
        blocks = range(self.place // BLOCK * BLOCK, end, BLOCK)
        spans = [(first, min(BLOCK, self.file.size - first)) for first in blocks]
        self.file.ahead(spans)
        for span in spans:
            self.file.read(*span)
        count = os.preadv(self.twin.handle, [buffer], self.place) if blocks else 0
        self.place += count
        return count


class Cache:
    """Tiles on disk, in one SQLite file that many processes share and a kill leaves sound.

    It grows to `bound` bytes and then stays: patches are drawn at random, so what is there is worth
    as much as what would take its place. Each tile lies there with its checksum. A damaged file is
    given up for one of the next number, which all processes then take: SQLite forbids to put a new
    one in the place of one that others have open.
    """

    def __init__(self, path: Path, bound: int):
        self.path = path
        self.bound = bound
        self.waiting: dict[str, bytes] = {}
        self.full = False
        self._connect()

    def _connect(self, damaged: Path | None = None) -> None:
        """Open the newest file, or one after that if it is the one that is damaged."""
        try:
            with locked(self.path.with_suffix(".lock")):
                self._open(damaged)
        except sqlite3.DatabaseError as error:
            if damaged or isinstance(error, sqlite3.OperationalError):
                raise UserError(f"{self.file} cannot keep tiles ({error})") from error
            self._connect(self.file)

    def _open(self, damaged: Path | None) -> None:
        stem = self.path.stem
        found = self.path.parent.glob(f"{stem}*.sqlite")
        old = sorted(found, key=lambda file: (len(file.name), file.name))
        self.file = old.pop() if old else self.path
        emptied = self.file.exists() and not self.file.stat().st_size
        if self.file == damaged or emptied:
            print(f"note: {self.file} is damaged; its tiles are fetched anew", flush=True)
            old.append(self.file)
            number = int(self.file.stem.removeprefix(stem) or 0) + 1
            self.file = self.path.with_stem(f"{stem}{number}")
        for file in old:
            for end in ("", "-wal", "-shm"):
                Path(f"{file}{end}").unlink(missing_ok=True)
        self.base = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        self.base.execute("PRAGMA journal_mode = WAL")
        self.base.execute("PRAGMA synchronous = OFF")  # a kill harms nothing, checksums verify
        self.base.execute("CREATE TABLE IF NOT EXISTS tiles (key TEXT PRIMARY KEY, data BLOB)")
        page = self.base.execute("PRAGMA page_size").fetchone()[0]
        self.base.execute(f"PRAGMA max_page_count = {max(1, self.bound // page)}")

    def _look(self, what: str, key: str) -> Any:
        """A value of a key's row, or None."""
        try:
            asked = self.base.execute(f"SELECT {what} FROM tiles WHERE key = ?", (key,))
            return (asked.fetchone() or [None])[0]
        except sqlite3.OperationalError:  # others write
            return None
        except sqlite3.DatabaseError:
            self._connect(self.file)
            return None

    def has(self, key: str) -> bool:
        return key in self.waiting or self._look("1", key) is not None

    def get(self, key: str) -> bytes | None:
        """What was kept, unless it decayed."""
        found = self._look("data", key)
        if isinstance(found, bytes) and found[-4:] == _check(key, found[:-4]):
            return found[:-4]
        return self.waiting.get(key)

    def put(self, key: str, data: bytes) -> None:
        if self.full:
            return
        self.waiting[key] = data
        if len(self.waiting) >= 32:
            self.flush()

    def flush(self) -> None:
        """Write what waits; when there is no more room, nothing is kept from then on."""
        if not self.waiting:
            return
        rows = [(key, data + _check(key, data)) for key, data in self.waiting.items()]
        self.waiting.clear()
        try:
            self.base.execute("BEGIN IMMEDIATE")
            self.base.executemany("INSERT OR REPLACE INTO tiles VALUES (?, ?)", rows)
            self.base.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if self.base.in_transaction:
                self.base.execute("ROLLBACK")
            self.full = "full" in str(error)  # else others write: these are fetched once more
        except sqlite3.DatabaseError:
            self._connect(self.file)


def _check(key: str, data: bytes) -> bytes:
    """Four bytes that tell whether a tile is still what was kept under this key."""
    return zlib.crc32(data, zlib.crc32(key.encode())).to_bytes(4, "big")

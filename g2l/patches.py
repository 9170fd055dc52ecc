"""The patch index on disk: an h5 file of coordinates per slide, shards of JPEGs, and the reader.

`write_coords` writes what CLAM and TRIDENT read too, `write_shard` the patches themselves.
`PatchIndex` reads any patch of a whole cohort at random, from many processes at once.
"""

import contextlib
import io
import math
import os
import resource
import struct
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2l.cohort import find_slides
from g2l.errors import PatchError, UserError
from g2l.files import atomic, check_room, write_text
from g2l.grid import Tiling
from g2l.readers import TILE_PX
from g2l.remote import Link, is_remote
from g2l.rows import read_rows
from g2l.slides import Slide
from g2l.tiff import Codec, LocalFile, Recent, assemble, cover, read_bytes

SLIDES = 16  # of those opened for their pixels, so many stay open,
PIXELS = 1 << 30  # and so many bytes of plain images, which are held whole
# What HDF5 and its Python library say of damaged files.
DAMAGE = (
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
)
SOURCE = "columns", "compression", "width", "height"  # attributes of `compressed`


def write_coords(
    path: Path, slide: Slide, tiling: Tiling, overlap: int, source: dict[str, Any]
) -> None:
    """The h5 file that CLAM and TRIDENT read too: dataset `coords`, with both tools' attributes.

    CLAM reads `patch_size` pixels of `patch_level`, TRIDENT `patch_size` pixels at
    `target_magnification`. Where patches are resampled the two contradict, so `patch_level` is left
    out: CLAM then stops instead of reading another field of view. Beside it lie the measures of
    each patch and, in `compressed`, `offset` and `bytes` of each patch in the shard, or of each
    tile in the slide (see tile_table), so that PatchIndex need not open it.
    """
    assert slide.mpp is not None
    native = tiling.size0 == tiling.patch_size
    target = magnification(slide.mpp) if native else round(10 / tiling.mpp, 1)
    # TRIDENT floors patch_size * level0 / target, which shall be the side at level 0.
    level0 = target * tiling.size0 / tiling.patch_size
    while tiling.patch_size * level0 // target < tiling.size0:
        level0 = math.nextafter(level0, math.inf)
    size = [slide.width, slide.height]
    density, covariance = tiling.colours.summary()
    attributes = {
        "patch_size": tiling.patch_size,
        "downsample": [1.0, 1.0],
        "name": slide.name,
        "level_dim": size,
        "downsampled_level_dim": size,
        "save_path": str(path.parent),
        "savetodir": str(path.parent.parent),
        "overlap": overlap,
        "patch_size_level0": tiling.size0,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "target_magnification": int(target) if target == int(target) else target,
        "level0_magnification": int(level0) if level0 == int(level0) else level0,
        "mpp": tiling.mpp,
        "level0_mpp": slide.mpp,
        **slide.file.facts,
        "od_mean": density,  # of its tissue, see ColourSums
        "od_covariance": covariance,
    }
    if native:
        attributes["patch_level"] = 0
    with new_h5(path, 16 << 20) as file:
        file.create_dataset("coords", data=tiling.coords).attrs.update(attributes)
        for name, values in tiling.measures.items():
            file[name] = values
        if source:
            _write_source(file.create_group("compressed"), **source)


def _write_source(group: Any, codec: Codec, columns: int, offset: Any, bytes: Any) -> None:
    group["offset"] = np.array(offset, np.int64)
    group["bytes"] = np.array(bytes, np.int64)
    group["prefix"] = np.frombuffer(codec.prefix, np.uint8)
    values = columns, codec.compression, codec.width, codec.height
    group.attrs.update(zip(SOURCE, values, strict=True))


def write_clam_list(folder: Path) -> None:
    """clam.csv: the slides that CLAM's extract_features_fp.py can take, as its --csv_path; beside
    the coordinates a link by the name that it looks for.
    """
    text = "slide_id\n"
    for name, row in read_rows(folder).items():
        if row["status"] == "done" and row["size0"] == row["patch_size"]:
            text += '"{}"\n'.format(name.replace('"', '""'))
            link = folder / "patches" / f"{name}.h5"
            if not link.exists():
                with contextlib.suppress(OSError), atomic(link) as temporary:
                    os.symlink(f"{name}_patches.h5", temporary)
    write_text(folder / "clam.csv", text)


def magnification(mpp: float) -> int:
    """The customary name of a pixel size: 0.25 µm/px is 40x."""
    return min((80, 40, 20, 10, 5, 4, 2, 1), key=lambda power: abs(math.log2(power * mpp / 10)))


def tile_table(slide: Slide, tiling: Tiling) -> dict[str, Any]:
    """Where the compressed tiles of level 0 lie in the slide's file; empty where patches are not
    pixels of theirs."""
    tiles = slide.levels[0].tiles
    if not tiles or tiling.size0 != tiling.patch_size:
        return {}
    return {
        "codec": tiles.codec,
        "columns": tiles.columns,
        "offset": tiles.offsets,
        "bytes": tiles.counts,
    }


def write_shard(
    path: Path, slide: Slide, tiling: Tiling, quality: int
) -> tuple[dict[str, Any], list[str]]:
    """A tar of JPEG patches named <slide>_<x>_<y>.jpg (WebDataset: the key has no dot).

    A patch that is a sound JPEG tile is copied, the others are encoded; unreadable ones are left
    out. Returns where the patches lie in the tar (as tile_table, a row each), and the errors with
    those known before; `tiling` keeps only the patches written.
    """
    import tarfile

    key = slide.name.replace(".", "_")
    size = tiling.patch_size
    kept = []
    offsets = []
    sizes = []
    errors = tiling.unreadable
    with (
        atomic(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for number, (x, y) in enumerate(tiling.coords.tolist()):
            try:
                data = _as_jpeg(slide, tiling, x, y, quality)
            except PatchError as error:
                errors.append(f"x={x}, y={y}: {error}")
                continue
            member = tarfile.TarInfo(f"{key}_{x:06d}_{y:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            kept.append(number)
            offsets.append(tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            sizes.append(len(data))
    tiling.take(kept)
    codec = Codec(Codec.JPEG, b"", size, size)
    return {"codec": codec, "columns": 0, "offset": offsets, "bytes": sizes}, errors


def _as_jpeg(slide: Slide, tiling: Tiling, x: int, y: int, quality: int) -> bytes:
    """One patch as a JPEG file: the slide's own tile where it is one and decodes, else encoded."""
    import simplejpeg

    tiles = slide.levels[0].tiles
    size = tiling.patch_size
    if tiles and tiles.codec.is_jpeg and tiling.size0 == size:
        if tiles.codec.holds(x, y, size, size):
            data = tiles.compressed(slide.file, y // size * tiles.columns + x // size)
            with contextlib.suppress(PatchError):  # what it refuses OpenSlide may still read
                tiles.codec.decode(data)
                if data:
                    return tiles.codec.standalone(data)
    pixels = slide.area(x, y, tiling.size0, tiling.size0, size, size)
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="444", fastdct=False)


@dataclass
class _Layout:
    """Where in a slide's h5 file its tables begin: rows are read without HDF5's millisecond."""

    version: tuple[int, int, int]  # of the file: inode, size, time
    coords: int
    slide: tuple[int, Any] | None = None  # bytes and time (or ETag) of the slide when tiled
    offset: int = 0  # of compressed patches or tiles: where, and how many bytes each
    bytes: int = 0
    codec: Codec | None = None
    columns: int = 0  # of tiles; 0: a shard, where each row is a patch


@dataclass
class _Handle:
    """What is kept open of a slide: its h5 file; the shard or slide that holds tiles; a reader."""

    table: int
    layout: _Layout = field(init=False)
    file: Any = None  # LocalFile or RemoteFile
    slide: Slide | None = None

    def numbers(self, at: int, count: int = 1) -> tuple[int, ...]:
        """So many 64-bit integers at a place in the h5 file."""
        return struct.unpack(f"<{count}q", read_bytes(self.table, at, 8 * count))

    def span(self, index: int) -> tuple[int, int]:
        """Offset and bytes of a patch of a shard or a tile of the slide."""
        (offset,) = self.numbers(self.layout.offset + 8 * index)
        (count,) = self.numbers(self.layout.bytes + 8 * index)
        return offset, count

    def decode(self, index: int) -> NDArray:
        """A patch of a shard or a tile of the slide."""
        assert self.layout.codec
        return self.file.decoded(*self.span(index), self.layout.codec.decode)

    def close(self) -> None:
        if self.table >= 0:
            os.close(self.table)
            self.table = -1
        if self.file:
            self.file.close()
            self.file = None
        self.close_slide()

    __del__ = close  # an index that is no longer used leaves no file open

    def close_slide(self) -> None:
        if self.slide:
            self.slide.close()
            self.slide = None


class PatchIndex:
    """Random access to the patches of a cohort: `folder` is data/tiles/<cancer>.

    `slides` is where slides lie if moved, `only` names those that are wanted. Of slides that are
    read at an address `cache` bytes of tiles at most are kept in the folder. Only slides.csv is
    read at first (1,000 rows for 10 million patches). Rows of coordinates are read one by one: no
    process holds them, the system's cache of the files serves all workers. The files of the last
    `handles` slides stay open, fewer where the system allows fewer; patches that are in a shard or
    are pixels of compressed tiles are read without opening the slide, others by Slide, of which 16
    stay open. Safe to pickle, to fork and to use in data-loader workers; not to be shared between
    threads.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        slides: str | os.PathLike | None = None,
        handles: int = 256,
        only: Collection[str] | None = None,
        cache: int = 0,
    ):
        self.folder = Path(folder)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.handles = max(1, min(handles, files // 4)) if files > 0 else handles
        rows = _finished_rows(self.folder)
        if only is not None:
            rows = [row for row in rows if row["slide"] in only]
        self.patch_size = int(rows[0]["patch_size"])
        self.mpp = float(rows[0]["target_mpp"])
        self.slides = [row["slide"] for row in rows]
        self.patient = [row["patient"] for row in rows]  # of each slide
        self.patients = sorted(set(self.patient))
        self.counts = np.array([int(row["patches"]) for row in rows], np.int64)
        self._ends = np.cumsum(self.counts)
        self.starts = self._ends - self.counts
        self._addresses = [row["path"] * is_remote(row["path"]) for row in rows]
        self.link = Link(filter(None, self._addresses), self.folder / "cache.sqlite", cache)
        self._paths = [Path(row["path"]) for row in rows]
        self._copied = slides is not None  # copies have another time
        if slides:
            self._paths = _moved(self._paths, Path(slides))
        self._sizes = [int(row["size0"]) for row in rows]
        self._mpps = [float(row["mpp"]) for row in rows]
        self._layouts: dict[int, _Layout] = {}
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_recent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._recent = Recent(32 << 20)  # neighbours share tiles
        _INDEXES.add(self)

    def close(self, keep: int = 0) -> None:
        """Let go of all files but those of the last `keep` slides."""
        while len(self._open) > keep:
            self._open.popitem(last=False)[1].close()
        if not keep:
            self.link.close()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the slide, row of its coordinates) of patch `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"patch {i} of {len(self)}")
        slide = int(np.searchsorted(self._ends, i, side="right"))
        return slide, int(i - self.starts[slide])

    def draw(self, seed: int, n: int, by: str = "slide") -> int:
        """The n-th patch of the endless stream `seed`.

        Uniform over slides, then a patch of it; or over all patches (`by` "patch"). A pure function
        (Philox counter n): ranks and workers differ in n only, a stream can be entered anywhere.
        """
        first, second = np.random.Philox(key=seed, counter=n).random_raw(2).tolist()
        if by == "patch":
            return first * len(self) >> 64
        slide = first * len(self.slides) >> 64
        return int(self.starts[slide]) + (second * int(self.counts[slide]) >> 64)

    def colours(self) -> tuple[NDArray, NDArray]:
        """Of each slide's tissue the mean optical density (S, 3) and its covariance (S, 3, 3).

        Of a slide without tissue they are the mean of the others'.
        """
        means = []
        covariances = []
        for name in self.slides:
            path = self.folder / "patches" / f"{name}_patches.h5"
            with open_h5(path, "r") as file:
                about = file["coords"].attrs
                if "od_mean" not in about:
                    raise UserError(f"{path}: colours are missing; remove it and run tile.py again")
                means.append(about["od_mean"])
                covariances.append(about["od_covariance"])
        mean = np.array(means)
        covariance = np.array(covariances)
        empty = np.isnan(mean).any(1)
        for values in (mean, covariance):
            values[empty] = values[~empty].mean(0)
        return mean, covariance

    def _layout(self, number: int, path: Path, table: int) -> _Layout:
        """Read from the h5 file (open as `table`) where it is new to us or was written anew."""
        status = os.fstat(table)
        version = status.st_ino, status.st_size, status.st_mtime_ns
        known = self._layouts.get(number)
        if known and known.version == version:
            return known
        try:
            with open_h5(path, "r") as file:
                self._layouts[number] = _layout_of(file, version, int(self.counts[number]))
        except DAMAGE as error:
            raise PatchError(f"{path} is damaged ({error}); run tile.py again") from error
        return self._layouts[number]

    def _handle(self, number: int) -> _Handle:
        """The slide's open handle, from those that are kept."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / "patches" / f"{self.slides[number]}_patches.h5"
        handle = _Handle(os.open(path, os.O_RDONLY))
        handle.layout = self._layout(number, path, handle.table)
        self._open[number] = handle
        if handle.layout.codec:
            # A lost shard: the slide may still be there.
            with contextlib.suppress(FileNotFoundError):
                if not handle.layout.columns:
                    path = self.folder / "shards" / f"{self.slides[number]}.tar"
                elif self._addresses[number]:
                    # It must be the one that was tiled.
                    tiled = handle.layout.slide or ()
                    handle.file = self.link.open(self._addresses[number], *tiled)
                else:
                    path = self._slide_file(number, handle.layout)
                handle.file = handle.file or LocalFile(path)
        self.close(keep=self.handles)
        return handle

    def _slide_file(self, number: int, layout: _Layout) -> Path:
        """The slide, if it is the one that was tiled."""
        path = self._paths[number]
        found = path.stat()
        if layout.slide:
            size, time = layout.slide
            moved = self._copied or found.st_mtime_ns == time
            if found.st_size != size or not moved:
                raise PatchError(f"{path} changed since it was tiled; run tile.py on it again")
        return path

    def read(self, i: int) -> NDArray:
        """(P, P, 3) uint8 of patch `i`. PatchError names slide, x and y."""
        number, row = self.locate(i)
        while True:
            place = f"row {row}"
            try:
                handle = self._handle(number)
                x, y = handle.numbers(handle.layout.coords + 16 * row, 2)
                place = f"x={x}, y={y}"
                return self._pixels(number, handle, row, x, y)
            except (PatchError, UserError, OSError) as error:
                if "Too many open files" in str(error) and self._open:
                    self.handles = max(1, len(self._open) // 2)
                    self.close(keep=len(self._open) // 2)
                    continue
                raise PatchError(
                    f"{self.slides[number]}: patch at {place} cannot be read: {error}"
                ) from error

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begin to fetch what these patches need, where their slides are at an address.

        What is wrong is for `read` to find.
        """
        spans = defaultdict(list)
        size = self.patch_size
        for i in numbers:
            number, row = self.locate(i)
            if not self._addresses[number]:
                continue
            with contextlib.suppress(PatchError, UserError, OSError):
                handle = self._handle(number)
                layout = handle.layout
                if layout.codec and layout.columns:
                    x, y = handle.numbers(layout.coords + 16 * row, 2)
                    place = x, y, size, size
                    for down, right in cover((layout.codec.width, layout.codec.height), place):
                        spans[number].append(handle.span(down * layout.columns + right))
        for number, wanted in spans.items():
            with contextlib.suppress(PatchError, UserError, OSError):
                self._handle(number).file.ahead(wanted)
        self.link.close()  # what was read before is kept

    def _pixels(self, number: int, handle: _Handle, row: int, x: int, y: int) -> NDArray:
        size = self.patch_size
        columns = handle.layout.columns
        codec = handle.layout.codec
        if codec and handle.file:
            if not columns:
                return handle.decode(row)

            def tile(row, column):
                index = row * columns + column
                return self._recent.get((number, index), lambda: handle.decode(index))

            try:
                if codec.holds(x, y, size, size):
                    return handle.decode(y // size * columns + x // size)
                return assemble(tile, (codec.width, codec.height), (x, y, size, size))
            except PatchError:  # OpenSlide decides what is damaged
                if self._addresses[number]:
                    raise
        if not handle.slide:
            handle.slide = self._open_slide(number, handle)
        size0 = self._sizes[number]
        return handle.slide.area(x, y, size0, size0, size, size)

    def slide(self, number: int) -> Slide:
        """A slide of the cohort, opened anew."""
        address = self._addresses[number]
        remote = self.link.open(address) if address else None
        return Slide(self._paths[number], self._mpps[number], remote=remote)

    def _open_slide(self, number: int, handle: _Handle) -> Slide:
        """The slide, after closing others that take too much memory or too many files."""
        with contextlib.suppress(FileNotFoundError):  # Slide says it in better words
            self._slide_file(number, handle.layout)
        slide = Slide(self._paths[number], self._mpps[number], cache=4 << 20)
        using = [other for other in self._open.values() if other.slide]
        held = sum(other.slide.memory for other in using if other.slide)
        if len(using) >= min(SLIDES, self.handles) or held + slide.memory > PIXELS:
            for other in using:
                other.close_slide()
        return slide


def _close_in_child() -> None:
    """A forked child must not read through its parent's files, nor keep them open."""
    for index in list(_INDEXES):
        index.close()


_INDEXES: weakref.WeakSet[PatchIndex] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)


def _finished_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the slides that have patches, all of one kind; UserError else."""
    rows = list(read_rows(folder).values())
    if not rows:
        raise UserError(f"{folder}/slides.csv: not found or empty; run tile.py first", mend="tile")
    rows = [row for row in rows if row["status"] == "done" and int(row["patches"])]
    if not rows:
        raise UserError(f"{folder}: no slide has patches; slides.csv gives each slide's reason")
    kinds = {(int(row["patch_size"]), float(row["target_mpp"])) for row in rows}
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: slides were tiled in different ways (patch size, µm/px): {sorted(kinds)}; "
            f"run tile.py on all of them with one setting"
        )
    return rows


def _moved(paths: list[Path], folder: Path) -> list[Path]:
    """Where slides lie below `folder` now: the one of the same folder and name, else of the name
    where only one has it, else where it was."""
    named = defaultdict(list)
    for path in find_slides(folder):
        named[path.name].append(path)
    found = []
    for path in paths:
        others = named[path.name]
        same = [other for other in others if other.parent.name == path.parent.name]
        found.append((same or (others if len(others) == 1 else [path]))[0])
    return found


def _layout_of(file: Any, version: tuple[int, int, int], count: int) -> _Layout:
    """The layout of an h5 file that should hold `count` patches; PatchError where it does not."""
    coords = file.get("coords")
    held = coords.shape[0] if coords is not None and coords.shape else 0
    if held != count:
        raise PatchError(
            f"its h5 file holds {held} patches, slides.csv says {count}; run tile.py again"
        )
    layout = _Layout(version, _start(coords, (count, 2)))
    about = coords.attrs
    places = coords[:]
    size = (about["level0_width"], about["level0_height"])
    if (places < 0).any() or (places + about["patch_size_level0"] > size).any():
        raise PatchError(f"{file.filename} holds places beyond the slide; run tile.py again")
    if "slide_bytes" in about:
        version = about.get("slide_etag")
        version = int(about["slide_mtime_ns"]) if version is None else version
        layout.slide = int(about["slide_bytes"]), version
    if group := file.get("compressed"):
        shape = group["offset"].shape
        layout.offset = _start(group["offset"], shape)
        layout.bytes = _start(group["bytes"], shape)
        layout.columns, kind, width, height = (int(group.attrs[name]) for name in SOURCE)
        if not 0 < width * height <= TILE_PX:
            raise ValueError(f"tiles of {width} x {height} px")
        layout.codec = Codec(kind, group["prefix"][:].tobytes(), width, height)
    return layout


def _start(data: Any, shape: tuple[int, ...]) -> int:
    """Where the 64-bit integers of a dataset begin in its file."""
    start = data.id.get_offset()
    if data.dtype != np.int64 or data.shape != shape or start is None:
        raise PatchError(
            f"{data.file.filename}: {data.name} is {data.dtype} {data.shape}, expected plain int64 "
            f"{shape}; run tile.py again"
        )
    return start


def open_h5(path: Path, mode: str) -> Any:
    """An HDF5 file; where the file system has no locks, HDF5 goes without."""
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "BEST_EFFORT")
    import h5py

    return h5py.File(path, mode)


@contextlib.contextmanager
def new_h5(path: Path, size: int) -> Iterator[Any]:
    """A new HDF5 file of about `size` bytes, written whole or not at all."""
    with atomic(path) as temporary:
        check_room(temporary, size)
        with open_h5(temporary, "w") as file:
            yield file

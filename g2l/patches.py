"""TODO."""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l.cohort import find_slides
from g2l.errors import PatchError, UserError
from g2l.files import atomic
from g2l.grid import Tiling
from g2l.rows import read_rows
from g2l.slides import Slide
from g2l.tiff import Codec, Recent, assemble, read_bytes


def write_coords(path: Path, slide: Slide, tiling: Tiling, overlap: int, source: dict) -> None:
    """The h5 file that CLAM and TRIDENT read too: dataset `coords`, and both tools' attributes on it.

    CLAM reads `patch_size` pixels of `patch_level`, TRIDENT `patch_size` pixels at `target_magnification`. Where
    patches are resampled the two contradict, so the attribute `patch_level` is left out: CLAM then stops instead of
    reading another field of view. Beside it lie the measures of each patch and, in `compressed`, `offset` and `bytes`
    of each patch in the shard, or of each tile in the slide (see tile_table), so that PatchIndex need not open it.
    """
    import h5py

    native = tiling.size0 == tiling.patch_size
    target = magnification(slide.mpp) if native else round(10 / tiling.mpp, 4)
    level0 = target * tiling.size0 / tiling.patch_size
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=tiling.coords)
        coords.attrs.update(
            {
                "patch_size": tiling.patch_size,
                "downsample": [1.0, 1.0],
                "name": slide.name,
                "level_dim": [slide.width, slide.height],
                "downsampled_level_dim": [slide.width, slide.height],
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
            }
        )
        if native:
            coords.attrs["patch_level"] = 0
        for name, values in tiling.measures.items():
            file.create_dataset(name, data=values)
        if source:
            group, codec = file.create_group("compressed"), source["codec"]
            for name in ("offset", "bytes"):
                group.create_dataset(name, data=np.array(source[name], np.int64))
            group.create_dataset("prefix", data=np.frombuffer(codec.prefix, np.uint8))
            group.attrs.update(
                {
                    "columns": source["columns"],
                    "width": codec.width,
                    "height": codec.height,
                    "compression": codec.compression,
                }
            )


def magnification(mpp: float) -> int:
    """The customary name of a pixel size: 0.25 µm/px is 40x."""
    return min((80, 40, 20, 10, 5, 4, 2, 1), key=lambda power: abs(math.log2(power * mpp / 10)))


def tile_table(slide: Slide, tiling: Tiling) -> dict:
    """Where the compressed tiles of level 0 lie in the slide's file, if patches are pixels of theirs; else empty."""
    tiles = slide.levels[0].tiles
    if not tiles or tiling.size0 != tiling.patch_size:
        return {}
    return {
        "codec": tiles.codec,
        "columns": tiles.columns,
        "offset": tiles.offsets,
        "bytes": tiles.counts,
    }


def write_shard(path: Path, slide: Slide, tiling: Tiling, quality: int) -> tuple[dict, list[str]]:
    """A tar of JPEG patches named <slide>_<x>_<y>.jpg (WebDataset: the key has no dot); unreadable ones are left out.

    A patch that coincides with a JPEG tile is copied, not decoded. Returns where the patches lie in the tar (as
    tile_table, a row each), and the errors; `tiling` keeps only the patches written.
    """
    import tarfile

    import simplejpeg

    key, tiles, size = slide.name.replace(".", "_"), slide.levels[0].tiles, tiling.patch_size
    copy = (
        tiles
        and tiles.codec.compression == Codec.JPEG
        and (size == tiling.size0 == tiles.codec.width == tiles.codec.height)
    )
    kept, offsets, sizes, errors = [], [], [], []
    with atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, (x, y) in enumerate(tiling.coords.tolist()):
            try:
                data = b""
                index = (
                    y // size * tiles.columns + x // size
                    if copy and x % size == y % size == 0
                    else -1
                )
                if index >= 0 and tiles.counts[index]:
                    data = tiles.codec.standalone(tiles.compressed(slide.file, index))
                if (
                    b"\xff\xd9" not in data[-16:]
                ):  # nothing to copy, or cut short: the reader decides
                    data = simplejpeg.encode_jpeg(
                        slide.area(x, y, *(tiling.size0,) * 2, size, size),
                        quality=quality,
                        colorsubsampling="444",
                        fastdct=False,
                    )
            except PatchError as error:
                errors.append(f"x={x}, y={y}: {error}")
                continue
            member = tarfile.TarInfo(f"{key}_{x:06d}_{y:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            kept.append(number)
            offsets.append(tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            sizes.append(len(data))
        if not kept:
            raise UserError(
                f"{slide.path}: none of its {len(errors)} patches can be read, first: {errors[0]}"
            )
    tiling.coords = tiling.coords[kept]
    tiling.measures = {name: values[kept] for name, values in tiling.measures.items()}
    return {
        "codec": Codec(Codec.JPEG, b"", size, size),
        "columns": 0,
        "offset": offsets,
        "bytes": sizes,
    }, errors


@dataclass
class _Layout:
    """Where in a slide's h5 file its tables begin, so that rows are read without HDF5, a millisecond a file."""

    version: tuple  # of the file: inode, size, time
    coords: int
    offset: int = 0  # of compressed patches or tiles: where, and how many bytes each
    bytes: int = 0
    codec: Codec | None = None
    columns: int = 0  # of tiles; 0: a shard, where each row is a patch


@dataclass
class _Handle:
    """What is kept open of one slide: its h5 file; the shard or slide that holds compressed patches; a reader."""

    layout: _Layout
    table: int
    file: int = -1
    slide: Slide | None = None

    def numbers(self, at: int, count: int = 1) -> tuple[int, ...]:
        """So many 64-bit integers at a place in the h5 file."""
        return struct.unpack(f"<{count}q", read_bytes(self.table, at, 8 * count))

    def decode(self, index: int) -> np.ndarray:
        """A patch of a shard or a tile of the slide."""
        (offset,), (count,) = (
            self.numbers(table + 8 * index) for table in (self.layout.offset, self.layout.bytes)
        )
        return self.layout.codec.decode(read_bytes(self.file, offset, count))

    def close(self) -> None:
        for file in (self.table, self.file):
            if file >= 0:
                os.close(file)
        if self.slide:
            self.slide.close()


class PatchIndex:
    """Random access to the patches of a cohort: `folder` is data/tiles/<cancer>, `slides` where slides lie if moved.

    Only slides.csv is read at first (1,000 rows for 10 million patches). Rows of coordinates are read one by one: no
    process holds them, the system's cache of the files serves all workers. The files of the last `handles` slides stay
    open; patches that are in a shard or are pixels of compressed tiles are read without opening the slide, others by
    Slide, of which 16 stay open. Safe to pickle, to fork and to use in data-loader workers; not to be shared between
    threads.
    """

    def __init__(
        self, folder: str | os.PathLike, slides: str | os.PathLike | None = None, handles: int = 256
    ):
        self.folder, self.handles = Path(folder), handles
        self._layouts: dict[int, _Layout] = {}
        every = read_rows(self.folder)
        if not every:
            raise UserError(
                f"{self.folder}/slides.csv: not found or empty; run tile.py --cancer {self.folder.name}"
            )
        rows = [row for row in every.values() if row["status"] == "done" and int(row["patches"])]
        if not rows:
            raise UserError(
                f"{self.folder}: no slide has patches; slides.csv there gives each slide's reason"
            )
        kinds = {(int(row["patch_size"]), float(row["target_mpp"])) for row in rows}
        if len(kinds) > 1:
            raise UserError(
                f"{self.folder}: slides were tiled in different ways (patch size, µm/px): {sorted(kinds)}; "
                f"run tile.py on all of them with one setting"
            )
        ((self.patch_size, self.mpp),) = kinds
        self.slides = [row["slide"] for row in rows]
        self.patient = [row["patient"] for row in rows]  # of each slide
        self.patients = sorted(set(self.patient))
        self.counts = np.array([int(row["patches"]) for row in rows], np.int64)
        self._ends = np.cumsum(self.counts)
        self.starts = self._ends - self.counts
        moved: dict[str, list[Path]] = {}
        for path in find_slides(Path(slides)) if slides else ():
            moved.setdefault(path.name, []).append(path)

        def where(path):  # by its folder and name, or by its name where only one slide has it
            named = moved.get(path.name, [])
            return next(
                (other for other in named if other.parent.name == path.parent.name),
                named[0] if len(named) == 1 else path,
            )

        self._rows = [
            (where(Path(row["path"])), int(row["size0"]), float(row["mpp"])) for row in rows
        ]
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._recent = Recent(32 << 20)  # neighbours share tiles
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict(), "_recent": Recent(self._recent.limit)}

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the slide, row of its coordinates) of patch `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"patch {i} of {len(self)}")
        slide = int(np.searchsorted(self._ends, i, side="right"))
        return slide, int(i - self.starts[slide])

    def draw(self, seed: int, n: int, by: str = "slide") -> int:
        """The n-th patch of the endless stream `seed`: uniform over slides, then a patch of it; or over all patches.

        A pure function (Philox counter n): ranks and workers differ in n only, a stream can be entered anywhere.
        """
        first, second = np.random.Philox(key=seed, counter=n).random_raw(2).tolist()
        if by == "patch":
            return first * len(self) >> 64
        if by != "slide":
            raise ValueError(f'by must be "slide" or "patch", not {by!r}')
        slide = first * len(self.slides) >> 64
        return int(self.starts[slide]) + (second * int(self.counts[slide]) >> 64)

    def _layout(self, number: int, table: int) -> _Layout:
        """Read from the h5 file (open as `table`) where it is new to us or was written anew."""
        status = os.fstat(table)
        version = status.st_ino, status.st_size, status.st_mtime_ns
        if number not in self._layouts or self._layouts[number].version != version:
            import h5py

            with h5py.File(
                self.folder / "patches" / f"{self.slides[number]}_patches.h5", "r"
            ) as file:
                layout, count = (
                    _Layout(version, file["coords"].id.get_offset()),
                    len(file["coords"]),
                )
                if group := file.get("compressed"):
                    layout.offset, layout.bytes = (
                        group[name].id.get_offset() for name in ("offset", "bytes")
                    )
                    layout.columns = int(group.attrs["columns"])
                    layout.codec = Codec(
                        int(group.attrs["compression"]),
                        group["prefix"][:].tobytes(),
                        int(group.attrs["width"]),
                        int(group.attrs["height"]),
                    )
            if count != self.counts[number]:
                raise PatchError(
                    f"its h5 file holds {count} patches, slides.csv says {self.counts[number]}; "
                    f"run tile.py again"
                )
            self._layouts[number] = layout
        return self._layouts[number]

    def _handle(self, number: int) -> _Handle:
        """The slide's open handle, from those that are kept."""
        if self._process != os.getpid():  # a child must not read through its parent's handles
            self._open, self._process = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        table = os.open(self.folder / "patches" / f"{self.slides[number]}_patches.h5", os.O_RDONLY)
        try:
            handle = _Handle(self._layout(number, table), table)
        except BaseException:
            os.close(table)
            raise
        if handle.layout.codec:
            shard = self.folder / "shards" / f"{self.slides[number]}.tar"
            path = self._rows[number][0] if handle.layout.columns else shard
            with contextlib.suppress(
                FileNotFoundError
            ):  # a lost shard: the slide may still be there
                handle.file = os.open(path, os.O_RDONLY)
        self._open[number] = handle
        while len(self._open) > self.handles:
            self._open.popitem(last=False)[1].close()
        return handle

    def read(self, i: int) -> np.ndarray:
        """(P, P, 3) uint8 of patch `i`. PatchError names slide, x and y."""
        number, row = self.locate(i)
        place = f"row {row}"
        try:
            handle = self._handle(number)
            layout, size = handle.layout, self.patch_size
            x, y = handle.numbers(layout.coords + 16 * row, 2)
            place = f"x={x}, y={y}"
            if handle.file >= 0 and not layout.columns:
                return handle.decode(row)
            if handle.file >= 0:
                with contextlib.suppress(
                    PatchError
                ):  # of a slide, OpenSlide decides what is damaged
                    return assemble(
                        lambda row, column: self._recent.get(
                            (number, row, column),
                            lambda: handle.decode(row * layout.columns + column),
                        ),
                        layout.codec.width,
                        layout.codec.height,
                        x,
                        y,
                        size,
                        size,
                    )
            if not handle.slide:
                using = [other for other in self._open.values() if other.slide]
                if len(using) >= 16:
                    using[0].slide.close()
                    using[0].slide = None
                handle.slide = Slide(self._rows[number][0], self._rows[number][2], cache=4 << 20)
            return handle.slide.area(x, y, *(self._rows[number][1],) * 2, *(self.patch_size,) * 2)
        except (PatchError, UserError, OSError) as error:
            raise PatchError(
                f"{self.slides[number]}: patch at {place} cannot be read: {error}"
            ) from error

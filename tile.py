#!/usr/bin/env python3
"""Stage 1: slides to tissue patches. Owns slides (`Slide`) and the patch index (writer, and reader `PatchIndex`).

    python tile.py --cancer brca                        # slides in data/slides/brca -> data/tiles/brca
    python tile.py --cancer mine --slides DIR --mpp 0.5

Every slide gets one row in data/tiles/<cancer>/slides.csv: done, skipped or failed, and why. Run the command again
at any time: it does only what is missing. Processes share a cohort by locks on single slides (the kernel frees them
when a process dies), so workers, ranks under torchrun and several commands may work on one output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import struct
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SUFFIXES = (
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".svslide",
    ".bif",
    ".vms",
    ".vmu",
    ".dcm",
    ".czi",
)
PLAIN = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
)  # images without pyramid: opened by Slide, not looked for in slide folders
MASK_PX = 8  # side of a patch in pixels of the tissue mask


class UserError(Exception):
    """A user's mistake; the text names the file or flag, what was expected, and what mends it."""


class SkippedSlide(UserError):
    """A sound slide that is not wanted as it is (no mpp, other magnification, no tissue); the text says why."""


class PatchError(Exception):
    """A region of a slide that cannot be read; the text names slide, x and y (level-0 pixels)."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path in the folder of `path`; rename it onto `path` on success, remove it on failure.

    Its name is its own, so processes do not meet; a reader sees the old file or the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(3).hex()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def slide_name(path: str | os.PathLike) -> str:
    """File name without the suffixes of slides, images and our own outputs: "a.b.ome.tif" -> "a.b"."""
    suffix = (
        r"(\.ome)?\.(svs|tiff?|ndpi|mrxs|scn|svslide|bif|vms|vmu|dcm|czi|png|jpe?g|bmp|h5|tar)$"
    )
    name = os.fsencode(Path(path).name).decode(
        "utf-8", "replace"
    )  # not every file system speaks UTF-8
    return re.sub(suffix, "", name, flags=re.IGNORECASE)


def patient_of(name: str) -> str:
    """Patient of a slide or image by its name: the first 12 characters of a TCGA barcode; else the stem up to and with
    the first of its parts between "_" that holds a digit ("P1_a" -> "P1", "case_001_HE" -> "case_001"); else the stem.
    """
    stem = slide_name(name)
    barcode = re.search(
        r"\bTCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", stem.replace("_", " "), flags=re.IGNORECASE
    )
    return barcode[0].upper() if barcode else re.match(r"\D*\d[^_]*|.*", stem, flags=re.DOTALL)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading slides
# ---------------------------------------------------------------------------------------------------------------------


class Codec:
    """Decodes compressed tiles as OpenSlide does, pixel for pixel, without its 3 ms a tile.

    `prefix` goes before a JPEG tile in place of its first two bytes: the tables it shares with the other tiles and the
    marker that names its colour space. The decoder is strict: what makes OpenSlide fail is an error here too.
    """

    JPEG, JP2K_YCBCR, JP2K_RGB = 7, 33003, 33005
    ADOBE = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"

    def __init__(self, compression: int, prefix: bytes, width: int, height: int):
        self.compression, self.prefix, self.width, self.height = compression, prefix, width, height

    def standalone(self, data: bytes) -> bytes:
        """A JPEG tile as a JPEG file that any program opens; the compressed pixels are the tile's own."""
        if not self.prefix:
            return data
        jfif = (
            2 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 0
        )  # would overrule the colours
        return self.prefix + data[2 + jfif :]

    def decode(self, data: bytes, shrink: int = 1) -> np.ndarray:
        """(height, width, 3) uint8, optionally at 1/2, 1/4, ... (see _Tiles.shrinks); white for no data.

        PatchError where the decoder complains at all.
        """
        height, width = self.height // shrink, self.width // shrink
        if not data:  # the scanner left it out
            return np.full((height, width, 3), 255, np.uint8)
        try:
            if self.compression == self.JPEG:
                import simplejpeg

                if data[:2] != b"\xff\xd8":
                    raise PatchError("no JPEG where one should be")
                image = simplejpeg.decode_jpeg(
                    self.standalone(data),
                    min_height=height,
                    min_width=width,
                    min_factor=shrink,
                    fastdct=False,
                    fastupsample=False,
                    strict=True,
                )
            elif shrink > 1:  # imagecodecs has no such choice
                picture = Image.open(io.BytesIO(data))
                picture.reduce = shrink.bit_length() - 1
                image = np.asarray(picture)
            else:
                import imagecodecs

                image = imagecodecs.jpeg2k_decode(data)
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own errors
            raise PatchError(str(error)) from error
        if image.shape != (height, width, 3):
            raise PatchError(f"compressed tile holds {image.shape}, expected {(height, width, 3)}")
        return _ycbcr_to_rgb(image) if self.compression == self.JP2K_YCBCR else image


def _ycbcr_to_rgb(image: np.ndarray) -> np.ndarray:
    """JPEG's colour conversion in libjpeg's 16-bit fixed point (jdcolor.c), which OpenSlide uses for JPEG 2000 too."""
    y, cb, cr = image.transpose(2, 0, 1).astype(np.int32)
    cb -= 128
    cr -= 128
    shifts = 91881 * cr, -22554 * cb - 46802 * cr, 116130 * cb
    return np.stack(
        [np.clip(y + (shift + 32768 >> 16), 0, 255).astype(np.uint8) for shift in shifts], axis=2
    )


class _Tiles:
    """Where the compressed tiles of one TIFF page lie, row by row."""

    def __init__(self, page):
        rgb = int(page.photometric) == 2
        tables = (page.jpegtables or b"")[2:-2]
        prefix = (
            Codec.ADOBE + (b"\x00" if rgb else b"\x01") + tables
            if int(page.compression) == Codec.JPEG
            else b""
        )
        self.codec = Codec(int(page.compression), prefix, page.tilewidth, page.tilelength)
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.offsets = np.array(page.dataoffsets, np.int64)
        self.counts = np.array(page.databytecounts, np.int64)
        self.complete = bool(self.counts.all())  # scanners leave out empty tiles

    @classmethod
    def of(cls, page) -> _Tiles | None:
        """Tiles of a page of 8-bit RGB in JPEG or JPEG 2000 tiles, None for every other."""
        usable = (
            page.is_tiled
            and page.dtype == np.uint8
            and page.samplesperpixel == 3
            and int(page.planarconfig) == 1
            and int(page.compression) in (Codec.JPEG, Codec.JP2K_YCBCR, Codec.JP2K_RGB)
            and int(page.photometric) in (2, 6)
        )
        tiles = (
            -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
            if usable
            else 0
        )
        if not usable or not len(page.dataoffsets) == len(page.databytecounts) == tiles:
            return None
        return cls(page)

    def shrinks(self, file: int) -> list[int]:
        """Scales at which tiles can be decoded small: 1/2 to 1/8 of JPEG, as far as JPEG 2000 is layered, to 1/32."""
        halvings = 3
        if self.codec.compression != Codec.JPEG:
            data = self.compressed(file, int(self.counts.argmax()))
            style = data.find(b"\xff\x52")  # marker COD
            halvings = min(data[style + 9], 5) if 0 <= style < len(data) - 9 else 0
        return [
            2**n
            for n in range(1, halvings + 1)
            if self.codec.width % 2**n == self.codec.height % 2**n == 0
        ]

    def compressed(self, file: int, index: int) -> bytes:
        """The bytes of tile `index`, none where the scanner left it out."""
        return read_bytes(file, int(self.offsets[index]), int(self.counts[index]))


class Recent:
    """The decoded tiles asked for last: as many as fit into `limit` bytes, and at least four."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.tiles = limit, 0, OrderedDict()

    def get(self, key, decode) -> np.ndarray:
        """The tile kept under `key`, else what decode() gives."""
        if key in self.tiles:
            self.tiles.move_to_end(key)
            return self.tiles[key]
        tile = self.tiles[key] = decode()
        self.bytes += tile.nbytes
        while self.bytes > self.limit and len(self.tiles) > 4:
            self.bytes -= self.tiles.popitem(last=False)[1].nbytes
        return tile


def assemble(tile, tw: int, th: int, x: int, y: int, w: int, h: int) -> np.ndarray:
    """(h, w, 3) uint8 at (x, y) of a picture in tiles of tw x th pixels, where tile(row, column) gives one."""
    out = np.empty((h, w, 3), np.uint8)
    for row in range(y // th, (y + h - 1) // th + 1):
        top, bottom = max(y, row * th), min(y + h, (row + 1) * th)
        for column in range(x // tw, (x + w - 1) // tw + 1):
            left, right = max(x, column * tw), min(x + w, (column + 1) * tw)
            out[top - y : bottom - y, left - x : right - x] = tile(row, column)[
                top - row * th : bottom - row * th, left - column * tw : right - column * tw
            ]
    return out


def read_bytes(file: int, offset: int, count: int) -> bytes:
    """`count` bytes at `offset` of an open file, whose position stays where it is (safe after a fork)."""
    data = os.pread(file, count, offset) if count < 1 << 28 else b""
    if len(data) != count:
        raise PatchError("it lies beyond the end of the file, which is cut short or damaged")
    return data


@dataclass
class _Level:
    """One pyramid level. `number` is OpenSlide's, -1 where OpenSlide does not see it. `shrink` is the scale at which
    tiles are decoded: levels that no file holds, good enough to look for tissue."""

    width: int
    height: int
    downsample: float
    number: int
    tiles: _Tiles | None = None
    shrink: int = 1


class Slide:
    """One slide, read by pixels of level 0. Close it, or use it as a context manager.

    `mpp` overrides what the file says (µm per pixel of level 0). `cache` bounds the decoded tiles kept (bytes).
    Attributes: name, path, width, height, mpp (float or None), mpp_source (str), objective (float or None), vendor,
    `damaged` (unreadable regions that a tolerant read left white). Raises UserError where the file is no slide.
    """

    def __init__(self, path: str | os.PathLike, mpp: float | None = None, cache: int = 64 << 20):
        import openslide

        self.path, self.name = Path(path), slide_name(path)
        self._recent = Recent(cache)
        self.file, self.damaged = -1, []
        self._complain_early()
        self._reopen()
        try:
            self.vendor = self._slide.properties.get("openslide.vendor", "image")
            self.width, self.height = self._slide.dimensions
            self.levels = [
                _Level(*size, self._downsample(*size), number)
                for number, size in enumerate(self._slide.level_dimensions)
            ]
            self.drafts = list(self.levels)  # what is good enough to look for tissue
            description = self._open_tiles()
            self.mpp, self.mpp_source = (
                (float(mpp), "given") if mpp else self._find_mpp(description)
            )
            power = self._slide.properties.get("openslide.objective-power", "")
        except openslide.OpenSlideError as error:
            self.close()
            raise UserError(
                f"{self.path}: opens but cannot be read ({error}); it is probably damaged"
            ) from error
        self.objective = (
            float(power) if re.fullmatch(r"\d+(\.\d+)?", power) and float(power) > 0 else None
        )

    def _complain_early(self) -> None:
        """What OpenSlide would call "unsupported or missing", in words that help."""
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file" + " (dead link)" * self.path.is_symlink())
        with open(self.path, "rb") as file:
            head = file.read(64)
        if not head:
            raise UserError(f"{self.path}: empty file; copy or download it again")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{self.path}: Git LFS pointer, not the slide itself; run `git lfs pull`"
            )
        if self.path.suffix.lower() == ".mrxs" and not self.path.with_suffix("").is_dir():
            raise UserError(
                f"{self.path}: the MIRAX data folder {self.path.stem}/ is missing beside it"
            )

    def _reopen(self) -> None:
        """Open by OpenSlide; again after a failed read, since it then answers every call with that error."""
        import openslide

        try:
            if self.path.suffix.lower() in PLAIN:
                self._slide = openslide.ImageSlide(str(self.path))
            else:
                self._slide = openslide.OpenSlide(str(self.path))
                self._slide.set_cache(openslide.OpenSlideCache(self._recent.limit))
        except (openslide.OpenSlideError, OSError, Image.DecompressionBombError) as error:
            what = str(error)
            if "nsupported or missing" in what:
                what = "not a slide format that OpenSlide knows"
                with (
                    contextlib.suppress(OSError, Image.DecompressionBombError),
                    Image.open(self.path) as picture,
                ):
                    if 322 not in getattr(
                        picture, "tag_v2", ()
                    ):  # a tiled TIFF may be a slide cut short
                        raise UserError(
                            f"{self.path}: a {picture.format} picture, no slide with tiles; make it one by "
                            f"vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
                        ) from error
            raise UserError(
                f"{self.path}: cannot be opened ({what}); cut short, damaged or no slide"
            ) from error

    def _downsample(self, width: int, height: int) -> float:
        """Downsample of a level, whole where the level's size is that of a whole one with the last pixels cut off.

        4443 -> 2221 is a factor of 2 that lost half a pixel, not 2.0005: taken literally, far corners would shift.
        """
        ratio = (self.width / width + self.height / height) / 2
        whole = round(ratio)
        exact = all(
            small in (large // whole, -(-large // whole))
            for small, large in ((width, self.width), (height, self.height))
        )
        return float(whole) if exact else ratio

    def _open_tiles(self) -> str:
        """Find the compressed tiles of an Aperio or generic TIFF; returns its description.

        They are trusted only if a tile of level 0 with much in it equals what OpenSlide makes of it.
        """
        if self.vendor not in ("aperio", "generic-tiff"):
            return ""
        import tifffile

        try:
            with tifffile.TiffFile(self.path) as tiff:
                pages = {
                    (p.imagewidth, p.imagelength): p for p in reversed(tiff.pages) if p.is_tiled
                }
                for level in self.levels:
                    page = pages.get((level.width, level.height))
                    level.tiles = page and _Tiles.of(page)
                description = tiff.pages.first.description
                for page in (
                    tiff.pages.first.pages or ()
                ):  # OME-TIFF keeps its pyramid where OpenSlide does not look
                    level = _Level(
                        page.imagewidth,
                        page.imagelength,
                        self._downsample(page.imagewidth, page.imagelength),
                        -1,
                    )
                    level.tiles = _Tiles.of(page)
                    self.levels += [level] if level.tiles and level.tiles.complete else []
        except (tifffile.TiffFileError, OSError, ValueError, IndexError, TypeError, struct.error):
            for level in self.levels:  # what tifffile cannot parse, OpenSlide may still read
                level.tiles = None
            return ""
        self.file = os.open(self.path, os.O_RDONLY)
        if not self._equals_openslide():
            self.levels = [level for level in self.levels if level.number >= 0]
            for level in self.levels:
                level.tiles = None
        for level in self.levels[
            1:
        ]:  # below a tile left out of level 0 the file holds junk; OpenSlide draws it anew
            if level.tiles and not (level.tiles.complete and self.levels[0].tiles.complete):
                level.tiles = None
        sparse = self.levels[0].tiles and (self.levels[0].tiles.counts == 0).mean() > 0.1
        self.drafts = [
            level for level in self.levels if level.tiles or not sparse
        ]  # else it would draw all of them
        for level in [level for level in self.levels if level.tiles]:
            with contextlib.suppress(PatchError):
                self.drafts += [
                    _Level(
                        -(-level.width // s),
                        -(-level.height // s),
                        level.downsample * s,
                        level.number,
                        level.tiles,
                        s,
                    )
                    for s in level.tiles.shrinks(self.file)
                ]
        return description

    def _equals_openslide(self) -> bool:
        level = self.levels[0]
        if not level.tiles:
            return False
        tw, th = level.tiles.codec.width, level.tiles.codec.height
        for index in np.argsort(-level.tiles.counts, kind="stable")[
            :3
        ].tolist():  # three, in case one is damaged
            x, y = index % level.tiles.columns * tw, index // level.tiles.columns * th
            part = x, y, min(tw, self.width - x), min(th, self.height - y)
            try:
                return np.array_equal(
                    self._from_tiles(level, *part, True), self._from_openslide(level, *part, True)
                )
            except PatchError:
                continue
        return False

    def _find_mpp(self, description: str) -> tuple[float | None, str]:
        """µm per pixel and where it came from: vendor properties, then resolution tags; implausible values refused."""
        properties, tag, refused = self._slide.properties, "TIFF resolution tags", ""

        def number(text):
            try:
                return float(text.replace(",", "."))
            except ValueError:
                return math.nan

        x, y = (number(properties.get(f"openslide.mpp-{axis}", "")) for axis in "xy")
        candidates = [
            (
                math.sqrt(x * y) if x > 0 and y > 0 else x,
                tag if self.vendor == "generic-tiff" else "openslide.mpp-x",
            ),
            (number(properties.get("aperio.MPP", "")), "aperio.MPP"),
        ]
        ome = re.search(r'PhysicalSizeX="([\d.eE+-]+)"', description)
        unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', description)
        factor = {"nm": 1e-3, "um": 1, "mm": 1e3, "cm": 1e4, "m": 1e6}.get(
            re.sub("[\u00b5\u03bc]", "u", html.unescape(unit[1])) if unit else "um", math.nan
        )
        candidates.insert(0, (number(ome[1]) * factor if ome else math.nan, "OME PhysicalSizeX"))
        per_unit = {"centimeter": 1e4, "inch": 25400.0}.get(
            properties.get("tiff.ResolutionUnit", "").lower(), math.nan
        )
        resolution = number(properties.get("tiff.XResolution", ""))
        candidates.append((per_unit / resolution if resolution > 0 else math.nan, tag))
        for value, source in candidates:
            if (
                0.02 <= value <= (10 if source == tag else 100)
            ):  # tags often hold 72 dots per inch: 352.8 µm
                return round(value, 5), source
            if not math.isnan(value):
                refused = f"{source}: {value:.4g} µm/px is implausible and refused"
        return None, refused

    def close(self) -> None:
        self._slide.close()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tile(self, level: _Level, index: int) -> np.ndarray:
        """Decoded tile from the cache or the file."""
        tiles = level.tiles
        return self._recent.get(
            (id(level), index),
            lambda: tiles.codec.decode(tiles.compressed(self.file, index), level.shrink),
        )

    def _from_tiles(
        self, level: _Level, x: int, y: int, w: int, h: int, strict: bool
    ) -> np.ndarray:
        tw, th = level.tiles.codec.width // level.shrink, level.tiles.codec.height // level.shrink

        def tile(row, column):
            try:
                return self._tile(level, row * level.tiles.columns + column)
            except PatchError as error:
                if strict:
                    raise
                self._note_damage(level, column * tw, row * th, error)
                return np.full((th, tw, 3), 255, np.uint8)

        return assemble(tile, tw, th, x, y, w, h)

    def _note_damage(self, level: _Level, x: int, y: int, error: Exception) -> None:
        self.damaged.append(
            f"x={round(x * level.downsample)}, y={round(y * level.downsample)}: {error}"
        )

    def _from_openslide(
        self, level: _Level, x: int, y: int, w: int, h: int, strict: bool
    ) -> np.ndarray:
        import openslide

        factor = self._slide.level_downsamples[level.number]
        try:
            region = np.asarray(
                self._slide.read_region(
                    (round(x * factor), round(y * factor)), level.number, (w, h)
                )
            )
        except (openslide.OpenSlideError, OSError) as error:
            self._slide.close()
            self._reopen()
            if strict:
                raise PatchError(str(error)) from error
            if w * h <= 256 * 256 or len(self.damaged) > 50:
                self._note_damage(level, x, y, error)
                return np.full((h, w, 3), 255, np.uint8)
            halves = (
                ((x, y, w // 2, h), (x + w // 2, y, w - w // 2, h))
                if w >= h
                else ((x, y, w, h // 2), (x, y + h // 2, w, h - h // 2))
            )
            return np.concatenate(
                [self._from_openslide(level, *half, False) for half in halves], axis=int(w >= h)
            )
        rgb, alpha = region[..., :3], region[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgb)
        return (255 - (255 - rgb.astype(np.uint16)) * alpha // 255).astype(
            np.uint8
        )  # transparent parts: white

    def _region(self, level: _Level, x: int, y: int, w: int, h: int, strict: bool) -> np.ndarray:
        """(h, w, 3) of pixels of one level, white beyond its edges."""
        left, top, right, bottom = (
            max(x, 0),
            max(y, 0),
            min(x + w, level.width),
            min(y + h, level.height),
        )
        if left >= right or top >= bottom:
            return np.full((h, w, 3), 255, np.uint8)
        part = None
        if level.tiles:
            try:
                part = self._from_tiles(level, left, top, right - left, bottom - top, strict)
            except PatchError:
                if level.number < 0:
                    raise
        if part is None:  # also what our decoder refuses: OpenSlide decides what is damaged
            part = self._from_openslide(level, left, top, right - left, bottom - top, strict)
        if part.shape[:2] == (h, w):
            return part
        out = np.full((h, w, 3), 255, np.uint8)
        out[top - y : bottom - y, left - x : right - x] = part
        return out

    def area(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        out_w: int,
        out_h: int,
        draft: bool = False,
        below: float = math.inf,
    ) -> np.ndarray:
        """(out_h, out_w, 3) uint8 of the level-0 rectangle, white beyond the edges, from the level nearest above.

        Resampled where need be (antialiased; `draft`: by the mean of pixels). PatchError when a part is unreadable;
        with `draft` it is taken from a finer level (a downsample `below` that one's), else left white and noted in
        `damaged`. Memory is bounded: a large source is read in pieces.
        """
        scale = min(w / out_w, h / out_h)
        level = max(
            (
                v
                for v in (self.drafts if draft else self.levels)
                if v.downsample <= scale * 1.01 and v.downsample < below
            ),
            key=lambda v: (v.downsample, -v.shrink),
            default=self.levels[0],
        )
        d = level.downsample
        if w * h / d**2 > 8e6 and max(out_w, out_h) > 64:  # halve the longer side
            parts = (
                [(0, out_h // 2), (out_h // 2, out_h)]
                if out_h >= out_w
                else [(0, out_w // 2), (out_w // 2, out_w)]
            )
            how = draft, below
            if out_h >= out_w:
                return np.concatenate(
                    [
                        self.area(x, y + a * h / out_h, w, (b - a) * h / out_h, out_w, b - a, *how)
                        for a, b in parts
                    ]
                )
            return np.concatenate(
                [
                    self.area(x + a * w / out_w, y, (b - a) * w / out_w, h, b - a, out_h, *how)
                    for a, b in parts
                ],
                axis=1,
            )
        left, top = x / d, y / d
        exact = (w / d, h / d) == (out_w, out_h) and left == int(left) and top == int(top)
        margin = 0 if draft or exact else 2 * math.ceil(max(1, scale / d))
        x0, y0 = math.floor(left) - margin, math.floor(top) - margin
        x1, y1 = math.ceil(left + w / d) + margin, math.ceil(top + h / d) + margin
        noted = len(self.damaged)
        source = self._region(level, x0, y0, x1 - x0, y1 - y0, not draft)
        if (
            len(self.damaged) > noted and d > level.shrink
        ):  # of the levels that hold it, this is not the finest
            del self.damaged[noted:]
            return self.area(x, y, w, h, out_w, out_h, draft, d / level.shrink)
        if exact:
            return source
        box = (left - x0, top - y0, left - x0 + w / d, top - y0 + h / d)
        filter = Image.Resampling.BOX if draft else Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(source).resize((out_w, out_h), filter, box))

    def read(self, x: int, y: int, size: int, out: int) -> np.ndarray:
        """(out, out, 3) uint8 of the square of `size` level-0 pixels at (x, y), white beyond the edges.

        With out == size these are the slide's own pixels; otherwise resampled (bicubic, antialiased).
        """
        try:
            return self.area(x, y, size, size, out, out)
        except PatchError as error:
            raise PatchError(
                f"{self.name}: patch at x={x}, y={y} cannot be read: {error}"
            ) from error

    def thumbnail(self, max_side: int) -> np.ndarray:
        """(h, w, 3) uint8, the longer side at most `max_side`; unreadable parts are white."""
        scale = max(1, max(self.width, self.height) / max_side)
        return self.area(
            0,
            0,
            self.width,
            self.height,
            max(1, round(self.width / scale)),
            max(1, round(self.height / scale)),
            draft=True,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tissue
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tiling:
    """What tile_slide found. Arrays have one entry per patch kept; a pixel of `mask` has `scale` level-0 pixels."""

    coords: np.ndarray  # (N, 2) int64, level-0 x, y of the top-left corner
    size0: int  # side of a patch in level-0 pixels
    patch_size: int  # side of a patch in output pixels
    mpp: float  # µm per output pixel
    measures: dict[
        str, np.ndarray
    ]  # (N,) float32 each: share of tissue, of pen, of folds; blur in patch pixels
    mask: np.ndarray  # (h, w) bool, tissue
    image: np.ndarray  # (h, w, 3) uint8
    scale: float
    summary: dict  # fractions for slides.csv
    warnings: list[str]


def choose_size(slide: Slide, mpp: float, patch_size: int, resample: bool) -> tuple[int, float]:
    """Level-0 side of a patch and the µm per output pixel that results; SkippedSlide when the slide does not fit.

    A slide within 20 % of the target is taken as it is (0.2 to 0.3 µm/px is 40x); others only with `resample`.
    """
    if slide.mpp is None:
        why = slide.mpp_source or "no µm per pixel in the file"
        raise SkippedSlide(
            f"{why}; state it with --assume-mpp, or per slide in a CSV (slide,mpp) for --manifest"
        )
    if 0.8 * mpp - 1e-9 <= slide.mpp <= 1.2 * mpp + 1e-9:
        return patch_size, slide.mpp
    if not resample:
        kind = "coarser" if slide.mpp > mpp else "finer"
        raise SkippedSlide(
            f"{slide.mpp:.4g} µm/px is {kind} than {mpp:g} (± 20 %); --resample rescales it, "
            f"--mpp {slide.mpp:.2g} takes it as it is"
        )
    return max(1, round(patch_size * mpp / slide.mpp)), mpp


def find_tissue(image: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (h, w) bool of tissue, pen and folds in a low-power (h, w, 3) uint8 image of an H&E slide.

    Tissue has colour; background has none, be it white, grey, two greys or black. Ink absorbs where neither
    haematoxylin nor eosin does (optical densities of the stains: Ruifrok and Johnston 2001). Tissue and holes in it
    smaller than `smallest` px are dropped and filled.
    """
    from scipy import ndimage

    planes = [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
    low = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    high = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    background = (low > 150) & (high - low < 24)
    white = np.float32([245, 245, 245])
    if (
        background.mean() > 0.01
    ):  # a tinted lamp is no colour of the tissue; but do not correct pale tissue away
        tint = np.median(image[background][::17], axis=0)
        white = np.clip(tint, tint.max() * 0.94, None).astype(np.float32)
    light = [np.minimum(np.arange(256, dtype=np.float32) / value, 1) for value in white]
    values = [table[plane] for table, plane in zip(light, planes, strict=True)]
    dense = [-np.log10(np.maximum(table, 1 / 255)) for table in light]
    red, green, blue = (table[plane] for table, plane in zip(dense, planes, strict=True))
    void = high < 25  # black borders
    chroma = np.maximum(np.maximum(*values[:2]), values[2]) - np.minimum(
        np.minimum(*values[:2]), values[2]
    )
    smooth = ndimage.uniform_filter(chroma, 3)

    # In any mixture of the two stains red <= 1.15 green and blue <= 0.7 green or so.
    pen = (
        (red > 1.15 * green + 0.08)
        | ((red > 0.88 * green) & (red > 0.7))  # blue, green, turquoise; dark blue
        | (blue > 1.1 * green + 0.08)  # yellow, orange
        | (
            (blue > 0.8 * green) & (red > 0.6 * green) & (green > 0.3)
        )  # black, brown, green on tissue
        | ((blue > 0.65 * green) & (red < 0.25 * green) & (green > 0.65))
    )  # red
    pen = _without_specks(_open(pen & ~void), 12)
    if pen.any():  # a stroke has weaker parts, and a pale rim
        pen = ndimage.binary_propagation(
            pen,
            mask=pen
            | ((red > 0.93 * green) & (red > 0.3))
            | ((blue > 0.6 * green) & (red < 0.3 * green) & (green > 0.4)),
        )
        pen = _grow(pen, 3)

    least = np.clip(_otsu(smooth[~(void | pen)][::5]), 0.045, 0.09)
    mask = (
        (smooth > least) & (chroma > least / 2) & ~pen
    )  # the latter keeps the smoothing from widening it
    mask &= ~_grow(void, 2)  # coloured fringe of compressed black edges
    mask = ~_grow(~_grow(mask, 1), 1)
    mask = ~_without_specks(~_without_specks(mask, smallest), smallest)
    gap = _open(low == 255)  # stitching gaps and transparent parts are pure white
    mask &= ~(void | pen | gap)

    # A fold is denser than the tissue around it in both stains alike; a crowd of nuclei is so in haematoxylin only.
    part = mask[::2, ::2]  # half the pixels are plenty for this
    near = ndimage.uniform_filter(part.astype(np.float32), 33) + 1e-6
    red, green = red[::2, ::2], green[::2, ::2]
    red0, green0 = (ndimage.uniform_filter(channel * part, 33) / near for channel in (red, green))
    red, green = (ndimage.uniform_filter(channel, 3) for channel in (red, green))
    fold = (
        part
        & (green > 1.6 * green0)
        & (red > 1.5 * red0)
        & (green > 0.3)
        & (red * green0 < green * (red0 + 0.15 * green0))
    )
    fold = (
        _without_specks(fold, 6).repeat(2, 0).repeat(2, 1)[: mask.shape[0], : mask.shape[1]] & mask
    )
    return mask, pen, fold


def _grow(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask dilated by a square of side 2 by + 1 (shifts: 15 times scipy.ndimage's speed)."""
    for _ in range(by):
        rows = np.pad(mask, 1)
        rows = rows[:-2] | rows[1:-1] | rows[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def _open(mask: np.ndarray) -> np.ndarray:
    """The mask without what is narrower than 2 pixels."""
    whole = np.pad(
        mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:], 1
    )  # squares of 2 x 2
    return whole[:-1, :-1] | whole[1:, :-1] | whole[:-1, 1:] | whole[1:, 1:]


def _without_specks(mask: np.ndarray, smallest: float) -> np.ndarray:
    """The mask without its connected areas of fewer than `smallest` pixels."""
    from scipy import ndimage

    if not mask.any():
        return mask
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= smallest
    keep[0] = False
    return keep[labels]


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold of values in [0, 1], on 256 bins: the split with the largest variance between its two sides."""
    counts = np.histogram(values, 256, (0, 1))[0].astype(float)
    below, weighted = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    apart = (weighted * below[-1] - weighted[-1] * below) ** 2 / np.maximum(below * above, 1)
    return (int(apart.argmax()) + 0.5) / 256


def mean_in_squares(values: np.ndarray, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Mean of a (h, w) array in squares of side `size` at (x, y), all in its pixels and not necessarily whole."""
    if not values.any():
        return np.zeros(len(x))
    total = np.zeros((values.shape[0] + 2, values.shape[1] + 2))
    total[1:-1, 1:-1] = values.cumsum(0, dtype=float).cumsum(1)
    total[-1], total[:, -1] = total[-2], total[:, -2]

    def integral(x, y):
        x, y = np.clip(x, 0, values.shape[1]), np.clip(y, 0, values.shape[0])
        i, j = y.astype(int), x.astype(int)
        v, u = y - i, x - j
        return (1 - v) * ((1 - u) * total[i, j] + u * total[i, j + 1]) + v * (
            (1 - u) * total[i + 1, j] + u * total[i + 1, j + 1]
        )

    return (
        integral(x + size, y + size)
        - integral(x, y + size)
        - integral(x + size, y)
        + integral(x, y)
    ) / size**2


def measure_blur(slide: Slide, coords: np.ndarray, size0: int, patch_size: int) -> np.ndarray:
    """(N,) blur of patches, as the sigma of a Gaussian in patch pixels (0 to 6), measured at a quarter of their scale.

    The ratio of the Laplacian's power between two neighbouring octaves hardly depends on what the tissue is: on H&E
    from 0.25 to 2 µm/px it was 0.4 and more when sharp, and as below after Gaussian blur of sigma 2, 3, 4 and 6.
    """
    side = max(8, patch_size // 8 * 2)  # px of a patch when measured
    factor = size0 / side
    blur = np.zeros(len(coords), np.float32)
    blocks = coords // (16 * size0)
    order = np.lexsort((blocks[:, 0], blocks[:, 1]))
    for members in np.split(order, np.flatnonzero(np.diff(blocks[order], axis=0).any(1)) + 1):
        origin = coords[members].min(0)
        places = np.round((coords[members] - origin) / factor).astype(int)
        w, h = (places.max(0) + side).tolist()
        green = slide.area(*origin.tolist(), w * factor, h * factor, w, h, draft=True)[..., 1]
        fine = np.stack([green[y : y + side, x : x + side] for x, y in places.tolist()]).astype(
            np.float32
        )
        coarse = (
            fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]
        ) / 4
        sharp = np.maximum(
            _laplacian_power(fine, 2) - 10, 0
        )  # 10: noise of compression, all that strong blur leaves
        ratio = sharp / np.maximum(_laplacian_power(coarse), 1)
        blur[members] = np.interp(ratio, (0.1, 0.16, 0.215, 0.35, 0.55), (6, 4, 3, 2, 0))
    return blur


def _laplacian_power(images: np.ndarray, step: int = 1) -> np.ndarray:
    """(n,) mean squared 4-neighbour Laplacian of (n, h, w) images, of every `step`-th row."""
    inner = 4 * images[:, 1:-1:step, 1:-1]
    for part in (
        images[:, :-2:step, 1:-1],
        images[:, 2::step, 1:-1],
        images[:, 1:-1:step, :-2],
        images[:, 1:-1:step, 2:],
    ):
        inner -= part
    return np.einsum("nij,nij->n", inner, inner) / inner[0].size


def tile_slide(
    slide: Slide,
    *,
    mpp: float = 0.25,
    patch_size: int = 256,
    min_tissue: float = 0.5,
    resample: bool = False,
    overlap: int = 0,
    max_pen: float = 0.1,
    max_blur: float = 3.5,
    max_fold: float = 1.0,
    mask: Path | None = None,
) -> Tiling:
    """Find the tissue of a slide and the grid of patches on it.

    `mpp` µm per pixel wanted, `patch_size` and `overlap` in output pixels; limits for a patch: share of tissue, pen and
    folds, blur in patch pixels; `mask`: the user's own tissue (see read_mask) instead of ours. The grid begins at level
    0's corner, where the compressed tiles do, and only whole patches are taken. Raises SkippedSlide (another
    magnification or none, no tissue) and UserError (cannot be used at all).
    """
    size0, got = choose_size(slide, mpp, patch_size, resample)
    if slide.width < size0 or slide.height < size0:
        raise SkippedSlide(
            f"smaller ({slide.width} x {slide.height} px) than one patch of {size0} px"
        )
    tiles = slide.levels[0].tiles
    if tiles:
        beyond = int((tiles.offsets + tiles.counts > slide.path.stat().st_size).sum())
        if beyond:
            raise UserError(
                f"{slide.path}: cut short: {beyond} of {len(tiles.counts)} tiles lie beyond the end of the "
                f"file; copy or download it again"
            )
    scale = max(
        min(size0 / MASK_PX, 10 / slide.mpp), math.sqrt(slide.width * slide.height / 8e6), 1
    )
    shape = math.ceil(slide.height / scale), math.ceil(slide.width / scale)
    image = slide.area(0, 0, shape[1] * scale, shape[0] * scale, shape[1], shape[0], draft=True)
    inside = image[: int(slide.height / scale), : int(slide.width / scale)]
    if inside.min() == 255:
        reason = f" ({slide.damaged[0]})" if slide.damaged else ""
        raise UserError(
            f"{slide.path}: nothing but empty pixels; its data files are missing or damaged{reason}"
        )
    if (inside.max(axis=2) < 40).mean() > 0.5 and (inside.min(axis=2) > 150).mean() < 0.02:
        raise SkippedSlide("mostly black: fluorescence or an empty scan, not bright-field")
    tissue_mask, pen_mask, fold_mask = find_tissue(image, smallest=(size0 / scale) ** 2 / 4)
    if max_pen == 1:  # a stain of the colour of ink
        tissue_mask |= pen_mask
    if mask:
        tissue_mask = read_mask(mask, shape, scale)
    step = max(1, round(size0 * (patch_size - overlap) / patch_size))
    x, y = np.meshgrid(
        np.arange(0, slide.width - size0 + 1, step), np.arange(0, slide.height - size0 + 1, step)
    )
    coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)
    x, y = coords.T / scale
    tissue = mean_in_squares(tissue_mask, x, y, size0 / scale)
    keep = tissue >= max(min_tissue, 1e-6) if min_tissue > 0 else tissue >= 0
    coords, x, y = coords[keep], x[keep], y[keep]
    if not len(coords):
        ink = ", but much that has the colour of ink (--max-pen 1 takes it)" * bool(
            pen_mask.mean() > 0.02
        )
        raise SkippedSlide(
            f"no tissue found{ink}"
            if not tissue_mask.any()
            else f"no patch has {min_tissue:.0%} of tissue (--min-tissue)"
        )
    measures = {
        "tissue": tissue[keep],
        "pen": mean_in_squares(pen_mask, x, y, size0 / scale),
        "fold": mean_in_squares(fold_mask, x, y, size0 / scale),
        "blur": measure_blur(slide, coords, size0, patch_size),
    }
    bad = {
        "pen": measures["pen"] > max_pen,
        "fold": measures["fold"] > max_fold,
        "blur": measures["blur"] > max_blur,
    }
    near = tissue_mask.sum() + (pen_mask & ~tissue_mask).sum()
    summary = {
        "tissue": tissue_mask.mean(),
        "pen": pen_mask.sum() / max(near, 1),
        "fold": measures["fold"].mean(),
        "blur": bad["blur"].mean(),
    }
    warnings = []
    if slide.objective and abs(math.log2(slide.mpp * slide.objective / 10)) > 0.5:
        warnings.append(
            f"objective {slide.objective:g}x disagrees with {slide.mpp:g} µm/px ({slide.mpp_source}), "
            f"which is used"
        )
    if slide.damaged:
        warnings.append(
            f"{len(slide.damaged)} unreadable regions left out, first: {slide.damaged[0]}"
        )
    keep = ~(bad["pen"] | bad["fold"] | bad["blur"])
    if not keep.any():
        worst = max(bad, key=lambda name: bad[name].mean())
        raise SkippedSlide(
            f"all {len(keep)} tissue patches dropped, {bad[worst].mean():.0%} for {worst} "
            f"(--max-{worst})"
        )
    if keep.mean() < 0.5:
        shares = ", ".join(
            f"{values.mean():.0%} for {name}" for name, values in bad.items() if values.any()
        )
        warnings.append(f"{1 - keep.mean():.0%} of the tissue patches dropped: {shares}")
    measures = {name: values[keep].astype(np.float32) for name, values in measures.items()}
    return Tiling(
        coords[keep], size0, patch_size, got, measures, tissue_mask, image, scale, summary, warnings
    )


def read_mask(path: Path, shape: tuple[int, int], scale: float) -> np.ndarray:
    """(h, w) bool tissue from the user's own mask of a slide; a mask pixel of the result has `scale` level-0 pixels.

    GeoJSON polygons in level-0 pixels, as QuPath exports them, or an image of any size that covers the whole slide and
    is not 0 where there is tissue.
    """
    if path.suffix.lower() not in (".geojson", ".json"):
        with Image.open(
            path
        ) as picture:  # labels as stored: neither a palette's colours nor transparency
            plain = picture.mode in ("1", "L", "P", "I", "I;16", "F")
            values = np.atleast_3d(picture if plain else picture.convert("RGB")).any(axis=2)
        return np.asarray(Image.fromarray(values).resize(shape[::-1], Image.Resampling.NEAREST))
    picture = Image.new("1", shape[::-1])
    draw = ImageDraw.Draw(picture)

    def fill(node):
        if isinstance(node, list):
            for part in node:
                fill(part)
        elif node["type"] in ("FeatureCollection", "Feature", "GeometryCollection"):
            fill(node.get("features") or node.get("geometry") or node.get("geometries") or [])
        elif node["type"] in ("Polygon", "MultiPolygon"):
            polygons = [node["coordinates"]] if node["type"] == "Polygon" else node["coordinates"]
            for polygon in polygons:
                for number, ring in enumerate(polygon):  # the outer ring, then holes
                    draw.polygon(
                        [(px / scale - 0.5, py / scale - 0.5) for px, py, *_ in ring],
                        fill=int(number == 0),
                    )

    try:
        fill(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected GeoJSON polygons in level-0 pixels ({error})") from error
    return np.asarray(picture)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


COLUMNS = (
    "slide",
    "status",
    "reason",
    "patient",
    "patches",
    "width",
    "height",
    "mpp",
    "mpp_source",
    "objective",
    "magnification",
    "size0",
    "patch_size",
    "target_mpp",
    "tissue",
    "pen",
    "blur",
    "fold",
    "unreadable",
    "warnings",
    "seconds",
    "settings",
    "bytes",
    "path",
)


def read_rows(folder: Path) -> dict[str, dict]:
    """The rows of slides.csv by slide name; empty when there is none yet."""
    try:
        with open(
            folder / "slides.csv", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            return {row["slide"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Add rows to slides.csv or replace them, under a lock, so that processes do not lose each other's rows."""
    with locked(folder / ".locks" / "slides.csv"):
        for leftover in folder.glob(
            ".slides.*.tmp.csv"
        ):  # of a process that was killed while it held the lock
            leftover.unlink()
        merged = read_rows(folder) | {row["slide"]: row for row in rows}
        with (
            atomic(folder / "slides.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(merged[name] for name in sorted(merged))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold an advisory lock on `path`; yields False when it is held elsewhere and `wait` is False.

    The kernel frees it when the holder dies, however it dies: there are no stale locks to clear.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            _no_locks(path.parent, str(error))
        yield True


@functools.cache
def _no_locks(folder: Path, why: str) -> None:
    print(
        f"note: {folder}: this file system has no locks ({why}), so see to it yourself that no two processes "
        "work there at once",
        file=sys.stderr,
        flush=True,
    )


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


def write_thumbnail(
    path: Path, slide: Slide, tiling: Tiling | None = None, max_side: int = 1600
) -> None:
    """Thumbnail; of a slide that was tiled with the tissue's outline and the grid of the patches kept."""
    if (
        tiling and len(slide.levels) == 1 and slide.width * slide.height > 1e8
    ):  # not to read all of it once more
        image = tiling.image[: int(slide.height / tiling.scale), : int(slide.width / tiling.scale)]
    else:
        image = slide.thumbnail(max_side)
    picture = Image.fromarray(image)
    if tiling:
        zoom = picture.width / slide.width
        draw, side = ImageDraw.Draw(picture, "RGBA"), tiling.size0 * zoom
        # Tinted, and apart from its neighbours: else these would draw the edges of a cell that was dropped.
        fill, edge = (
            ((0, 40, 200, 22), (0, 40, 200, 150)) if side > 12 else ((0, 40, 200, 64), None)
        )
        gap = 2 if side > 24 else side > 4
        corners = np.concatenate([tiling.coords, tiling.coords + tiling.size0], axis=1) * zoom
        for left, top, right, bottom in corners.round().astype(int).tolist():
            draw.rectangle(
                (left, top, max(left, right - 1 - gap), max(top, bottom - 1 - gap)),
                fill=fill,
                outline=edge,
            )
        for polygon in outlines(tiling.mask):
            for ring in polygon:
                draw.line(
                    [tuple(p) for p in (ring * tiling.scale * zoom).tolist()],
                    fill=(0, 140, 60, 255),
                    width=2,
                )
    with atomic(path) as temporary:
        picture.save(temporary, quality=88)


def outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Polygons of a mask in mask pixels (pixel edges are whole numbers): each the outer ring, then its holes."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask.astype(np.float32), 1)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2)
    return [
        [p[a:b] - 0.5 for a, b in itertools.pairwise(o)]
        for p, o in zip(points, offsets, strict=True)
    ]


def write_geojson(path: Path, slide: Slide, tiling: Tiling) -> None:
    """The tissue's outline in level-0 pixels, one annotation per piece, as QuPath opens it by drag and drop."""
    edge = np.array([slide.width, slide.height])
    features = [
        {
            "type": "Feature",
            "id": f"{slide.name}-{number}",
            "geometry": {
                "type": "Polygon",
                "coordinates": [
                    np.clip(np.round(ring * tiling.scale), 0, edge).astype(int).tolist()
                    for ring in polygon
                ],
            },
            "properties": {
                "objectType": "annotation",
                "name": f"tissue {number}",
                "classification": {"name": "Tissue", "color": [0, 140, 60]},
            },
        }
        for number, polygon in enumerate(outlines(tiling.mask), 1)
    ]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def write_contact_sheet(folder: Path, side: int = 128, rows: int = 12, columns: int = 10) -> None:
    """contact.jpg: random patches of up to `rows` random slides, a row each, for a look at the whole cohort."""
    index = PatchIndex(folder)
    chosen = sorted(np.random.default_rng(0).permutation(len(index.slides))[:rows].tolist())
    sheet = Image.new("RGB", (columns * (side + 4) + 4, len(chosen) * (side + 22) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for row, slide in enumerate(chosen):
        top = row * (side + 22) + 4
        count = int(index.counts[slide])
        draw.text((4, top), f"{index.slides[slide]}   {count:,} patches", fill="black")
        picks = np.random.default_rng(slide).permutation(count)[:columns].tolist()
        for column, pick in enumerate(sorted(picks)):
            with contextlib.suppress(
                PatchError
            ):  # an empty place shows it; the slide's row tells of it
                patch = Image.fromarray(index.read(int(index.starts[slide]) + pick))
                sheet.paste(
                    patch.resize((side, side), Image.Resampling.LANCZOS),
                    (column * (side + 4) + 4, top + 14),
                )
    with atomic(folder / "contact.jpg") as temporary:
        sheet.save(temporary, quality=90)


def tile_one(source: Source, folder: Path, args: argparse.Namespace) -> dict:
    """Tile one slide into `folder`; returns its row. A user's error or a broken slide becomes a row, never a raise.

    A full disk does raise: every further slide would meet it.
    """
    start, name, path = time.perf_counter(), source.name, source.path
    for leftover in folder.glob(
        f"*/.{glob.escape(name)}*.tmp*"
    ):  # of a run that was killed; the lock is ours
        leftover.unlink(missing_ok=True)
    row = {
        "slide": name,
        "patient": source.patient,
        "patches": 0,
        "path": os.path.abspath(path),
        "settings": source.settings(args),
        "patch_size": args.patch_size,
        "target_mpp": args.mpp,
    }
    try:
        mask = find_mask(args.masks, name) if args.masks else None
        row["bytes"] = size_of(path)
        with Slide(path, source.mpp) as slide:
            slide.name = name
            if slide.mpp is None and args.assume_mpp:
                slide.mpp, slide.mpp_source = args.assume_mpp, "--assume-mpp"
            row |= {
                "width": slide.width,
                "height": slide.height,
                "mpp": slide.mpp or "",
                "mpp_source": slide.mpp_source,
                "objective": slide.objective or "",
                "magnification": f"{magnification(slide.mpp)}x" if slide.mpp else "",
            }
            try:
                tiling = tile_slide(slide, mask=mask, **{key: getattr(args, key) for key in LIMITS})
            except SkippedSlide:
                if len(slide.drafts) > 1:  # another would have to be read whole
                    write_thumbnail(folder / "thumbnails" / f"{name}.jpg", slide)
                raise
            place, errors = tile_table(slide, tiling), []
            if args.save_patches:
                place, errors = write_shard(
                    folder / "shards" / f"{name}.tar", slide, tiling, args.jpeg_quality
                )
            write_thumbnail(folder / "thumbnails" / f"{name}.jpg", slide, tiling)
            write_geojson(folder / "geojson" / f"{name}.geojson", slide, tiling)
            write_coords(
                folder / "patches" / f"{name}_patches.h5", slide, tiling, args.overlap, place
            )
        if errors:
            tiling.warnings.append(f"{len(errors)} unreadable patches left out, first: {errors[0]}")
        row |= {
            "status": "done",
            "patches": len(tiling.coords),
            "size0": tiling.size0,
            "unreadable": len(errors),
            "warnings": "; ".join(tiling.warnings),
        } | {k: f"{v:.4f}" for k, v in tiling.summary.items()}
    except SkippedSlide as error:
        row |= {"status": "skipped", "reason": str(error)}
    except (UserError, PatchError, OSError, MemoryError, Image.DecompressionBombError) as error:
        if disk_full(error):
            raise
        row |= {"status": "failed", "reason": str(error) or type(error).__name__}
    row["seconds"] = f"{time.perf_counter() - start:.2f}"
    return row


LIMITS = (
    "mpp",
    "patch_size",
    "overlap",
    "resample",
    "min_tissue",
    "max_pen",
    "max_blur",
    "max_fold",
)


def disk_full(error: BaseException) -> bool:
    """Whether an error means that nothing more can be written; HDF5 hides the number in its text."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or re.search("No space left|File too large|quota", str(error)) is not None
    )


def find_mask(folder: Path, name: str) -> Path:
    """The user's mask of a slide: <slide>.geojson, .json, .png, .tif, .tiff or .jpg in the folder."""
    for suffix in (".geojson", ".json", ".png", ".tif", ".tiff", ".jpg"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise SkippedSlide(f"no mask {name}.geojson or {name}.png in {folder} (--masks)")


# ---------------------------------------------------------------------------------------------------------------------
# Reading patches back
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Cohorts: which slides, and where they come from
# ---------------------------------------------------------------------------------------------------------------------


TCGA = (
    "acc blca brca cesc chol coad dlbc esca gbm hnsc kich kirc kirp laml lgg lihc luad lusc meso ov paad pcpg prad "
    "read sarc skcm stad tgct thca thym ucec ucs uvm"
).split()


@dataclass
class Source:
    """One slide of a cohort: where it is or will be, and what the manifest says about it."""

    name: str
    path: Path
    mpp: float | None = None
    id: str = ""  # of the GDC, empty for a slide of the user's
    size: int = 0  # bytes
    md5: str = ""
    stated: str = ""  # its patient, where the manifest says

    @property
    def patient(self) -> str:
        return self.stated or patient_of(self.name)

    @property
    def patients(self) -> set[str]:
        """Whose it is, as stated, else by its name, or by the file's where another has the same: held out if any is."""
        return {self.stated} if self.stated else {patient_of(self.name), patient_of(self.path)}

    def settings(self, args: argparse.Namespace) -> str:
        """Changes when the slide's patches would: another row in slides.csv with it is out of date."""
        values = [getattr(args, key) for key in LIMITS] + [args.assume_mpp, self.mpp]
        if args.masks:
            values += [str(args.masks)]
            with contextlib.suppress(SkippedSlide):  # it has none
                mask = find_mask(args.masks, self.name).stat()
                values += [mask.st_size, mask.st_mtime_ns]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8] + (
            f"-q{args.jpeg_quality}" if args.save_patches else ""
        )


def find_slides(folder: Path) -> list[Path]:
    """Slides below a folder, flat or in folders per file id, sorted by name, dead links too; hidden files are left out.

    Of the several files of one DICOM slide only the first is listed.
    """
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found.sort(key=lambda path: (path.name, str(path)))
    dicom = [path for path in found if path.suffix.lower() == ".dcm"]
    if len({path.parent for path in dicom}) < len(dicom):
        import openslide

        seen = set()
        for path in dicom:
            with (
                contextlib.suppress(openslide.OpenSlideError),
                openslide.OpenSlide(str(path)) as slide,
            ):
                key = path.parent, slide.properties.get("openslide.quickhash-1", path)
                if key in seen:
                    found.remove(path)
                seen.add(key)
    return found


def name_slides(paths: list[Path]) -> dict[str, Path]:
    """A name for each slide: its stem; where several share it, with the folder or the suffix, until it is one's own."""
    names: dict[str, Path] = {}
    stems = [slide_name(path) for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        for name in (
            stem,
            f"{path.parent.name}_{stem}",
            path.name,
            str(path).strip("/").replace("/", "_"),
        ):
            if (name != stem or stems.count(stem) == 1) and name not in names:
                names[name] = path
                break
    return names


def read_manifest(path: Path) -> list[dict]:
    """Rows of a GDC manifest (id, filename, md5, size) or a CSV with slide[,mpp][,patient]; keys in lower case."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--manifest {path}: cannot be read ({error})") from error
    lines = text.splitlines() or [""]
    rows = [
        {key.strip().lower(): (value or "").strip() for key, value in row.items() if key}
        for row in csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    ]
    for row in rows:
        columns = ("filename", "slide", "slide_id", "wsi", "path")
        row["filename"] = next((row[column] for column in columns if row.get(column)), "")
        try:
            row["mpp"] = pixel_size(row["mpp"]) if row.get("mpp") else None
            row["size"] = int(row.get("size") or 0)
            row["patient"] = row.get("patient") or ""
            if (
                row["patient"].upper().startswith("TCGA-")
            ):  # a sample's barcode: benchmarks name patients
                row["patient"] = patient_of(row["patient"])
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(
                f"--manifest {path}: {error} in the row of {row['filename']}"
            ) from error
    if not any(row["filename"] for row in rows):
        raise UserError(
            f"--manifest {path}: expected a GDC manifest (id, filename, md5, size, state; tabs) or a CSV "
            f"with the columns slide[,mpp][,patient]"
        )
    return [row for row in rows if row["filename"]]


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def local_sources(args: argparse.Namespace, folder: Path) -> list[Source]:
    """The slides in a folder, or those of them that the manifest names."""
    paths = find_slides(folder) if folder.is_dir() else []
    if not args.manifest:
        if not folder.is_dir():
            hint = "; --download fetches them from the GDC" if args.cancer.lower() in TCGA else ""
            raise UserError(
                f"{folder}: no such folder; put slides there or name their folder with --slides{hint}"
            )
        if not paths:
            raise UserError(f"{folder}: no slides in it (looked for {', '.join(SUFFIXES)})")
        return [Source(name, path, size=size_of(path)) for name, path in name_slides(paths).items()]
    rows, there = read_manifest(args.manifest), {os.path.abspath(path): path for path in paths}
    for row in rows:  # a path, as it stands or below one of these folders
        for place in (Path(), args.manifest.parent, folder, folder / row.get("id", "")):
            if (place / row["filename"]).is_file():
                row["path"] = os.path.abspath(place / row["filename"])
                there.setdefault(row["path"], Path(row["path"]))
    named = name_slides(list(there.values()))
    names = {os.path.abspath(path): name for name, path in named.items()}
    known: dict[str, set[str]] = {}
    for name, path in named.items():
        for key in (name, path.name, slide_name(path)):
            known.setdefault(key, set()).add(name)
    sources, missing = {}, []
    for row in rows:
        given = Path(row["filename"]).name
        found = (
            {names[row["path"]]}
            if row.get("path") in names
            else known.get(given) or known.get(slide_name(given))
        )
        if not found:
            missing.append(row["filename"])
            continue
        if len(found) > 1:
            raise UserError(
                f"--manifest {args.manifest}: {row['filename']}: {len(found)} slides are called so: "
                f"{', '.join(sorted(found))}; name one of them, or its path"
            )
        (name,) = found
        sources[name] = Source(
            name,
            named[name],
            row["mpp"],
            row.get("id", ""),
            row["size"] or size_of(named[name]),
            row.get("md5", ""),
            row["patient"],
        )
    if not sources:
        raise UserError(
            f"--manifest {args.manifest}: none of its {len(missing)} slides is in {folder}, first "
            f"{missing[0]}; name their folder with --slides, or fetch them with --download"
        )
    if missing:
        print(
            f"{len(missing)} slides of {args.manifest} are not in {folder} (first: {missing[0]}); "
            f"--download fetches them",
            flush=True,
        )
    return list(sources.values())


def select(sources: list[Source], args: argparse.Namespace) -> tuple[list[Source], dict[str, str]]:
    """(slides chosen, reason of each other by name): kind of section, patients held out, then a seeded sample.

    The order is a hash of seed and name, so that a slide more or less does not change who else is drawn. Diagnostic
    slides come first.
    """
    held, reasons = set(), {}
    if args.exclude:
        held = read_patients(args.exclude, sources)
        if not any(held & source.patients for source in sources):
            print(
                f"note: --exclude {args.exclude}: none of its {len(held)} patients is in this cohort",
                flush=True,
            )
    wanted = []
    for source in sources:
        section = re.match(r"TCGA-\w\w-\w{4}-\w{3}-\w\w-([A-Z]+)", source.name)
        kind = "diagnostic" if not section or section[1].startswith("DX") else "tissue"
        if held & source.patients:
            reasons[source.name] = f"held out: its patient is in {args.exclude} (--exclude)"
        elif args.strategy not in ("both", kind):
            reasons[source.name] = f"a {kind} slide (--strategy {args.strategy})"
        else:
            order = hashlib.sha256(f"{args.seed}:{source.name}".encode()).hexdigest()
            wanted.append((kind != "diagnostic", order, source))
    wanted.sort(key=lambda item: item[:2])
    limit = args.max_slides or len(wanted)
    reasons |= {
        source.name: f"not in the sample of {limit} (--max-slides, --seed)"
        for *_, source in wanted[limit:]
    }
    chosen = [source for *_, source in wanted[:limit]]
    held_out = sum(reason.startswith("held") for reason in reasons.values())
    print(
        f"{len(sources)} slides, {held_out} held out, {len(chosen)} taken"
        + (f" (fewer than --max-slides {limit})" if len(chosen) < limit else ""),
        flush=True,
    )
    if not chosen:
        raise UserError("no slide is left to tile; see --exclude, --strategy and --manifest")
    return sorted(chosen, key=lambda source: source.name), reasons


def read_patients(path: Path, sources: list[Source]) -> set[str]:
    """Patients named in a file: one slide or patient a line, or a table with a column slide, patient or the like.

    What names one of `sources` whose patient was stated, or this patient, stands for the patient stated.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path}: cannot be read ({error})") from error
    whole = {text for source in sources for text in (source.name, source.stated, source.path.name)}

    def cut(line):  # at commas outside quotes, unless all of it is a name
        parts = [line] if line in whole else re.split(r'[,;\t](?=(?:[^"]*"[^"]*")*[^"]*$)', line)
        return [re.sub('^"(.*)"$', r"\1", part.strip()).replace('""', '"') for part in parts]

    table = [cut(line.strip(" ")) for line in lines if line.strip()]
    known = (
        "slide",
        "slide_id",
        "patient",
        "patient_id",
        "case",
        "case_id",
        "group",
        "filename",
        "image",
        "barcode",
    )
    columns = [
        number for number, cell in enumerate(table[0] if table else []) if cell.lower() in known
    ]
    cells = [
        row[column]
        for row in table[bool(columns) :]
        for column in columns or [0]
        if column < len(row)
    ]
    stated: dict[str, set[str]] = {}
    for source in sources:
        for key in {source.stated, source.name, slide_name(source.path)} if source.stated else ():
            stated.setdefault(key, set()).add(source.stated)
    return set().union(
        *(
            stated.get(cell) or stated.get(slide_name(cell)) or {patient_of(cell)}
            for cell in cells
            if cell
        )
    )


def ask_gdc(args: argparse.Namespace, names: list[str]) -> list[Source]:
    """Slides of a TCGA project as the GDC lists them (only those named, if given), to become <id>/<file name>."""
    code = args.cancer.lower().removeprefix("tcga-")
    clauses = {
        "cases.project.project_id": [f"TCGA-{code.upper()}"],
        "data_type": ["Slide Image"],
        "data_format": ["SVS"],
        "access": ["open"],
    }
    if names:
        clauses = {"file_name": names}
    elif code not in TCGA:
        raise UserError(
            f"--cancer {args.cancer}: --download knows the TCGA projects {', '.join(TCGA)}"
        )
    if args.strategy != "both" and not names:
        clauses["experimental_strategy"] = [f"{args.strategy.capitalize()} Slide"]
    query = {
        "filters": {
            "op": "and",
            "content": [
                {"op": "in", "content": {"field": field, "value": values}}
                for field, values in clauses.items()
            ],
        },
        "fields": "file_id,file_name,file_size,md5sum",
        "format": "JSON",
        "size": 2000,
        "from": 0,
    }
    hits = []
    while True:
        try:
            body = json.dumps(query).encode()
            with ask(f"{args.gdc_url}/files", {"Content-Type": "application/json"}, body) as reply:
                data = json.load(reply)["data"]
            hits += data["hits"]
            total = int(data["pagination"]["total"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{args.gdc_url}: unexpected answer ({error!r}); is it a GDC server?"
            ) from error
        if len(hits) >= total or not data["hits"]:
            break
        query["from"] = len(hits)
    sources = []
    for hit in hits:
        name, key, size, md5 = (
            str(hit.get(field)) for field in ("file_name", "file_id", "file_size", "md5sum")
        )
        # Names come from the network: they may choose a file in our folder, never another path.
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.() +-]{0,200}", name)
            or not name.lower().endswith(SUFFIXES)
            or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", key)
            or not re.fullmatch(r"[1-9]\d{0,14}", size)
            or not re.fullmatch(r"[0-9a-f]{32}", md5)
        ):
            print(
                f"note: the server names a slide {name!r} with id {key!r}, {size} bytes, md5 {md5!r}: refused",
                flush=True,
            )
            continue
        sources.append(
            Source(slide_name(name), args.slides / key / name, None, key, int(size), md5)
        )
    return sources


RETRY_SECONDS = 1.0  # first pause before another try; doubles each time


def pause(attempt: int, least: float = 0) -> None:
    """Wait before another try: 1, 2, 4 ... 60 s, or what the server asks for up to 5 minutes."""
    time.sleep(max(min(2.0**attempt, 60), min(least, 300)) * RETRY_SECONDS)


def ask(url: str, headers: dict, data: bytes | None = None, tries: int = 7):
    """Open a URL; what may pass (429, 5xx, no connection) is tried again, later each time.

    The answer to a question (`data`) is read whole, so that a broken one is asked again.
    """
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, data, headers)
    for attempt in range(tries):
        wait = ""
        try:
            answer = urllib.request.urlopen(request, timeout=60)
            return io.BytesIO(answer.read()) if data else answer
        except urllib.error.HTTPError as error:
            reason, wait = (
                f"the server answers {error.code} {error.reason}",
                error.headers.get("Retry-After", ""),
            )
            if error.code < 500 and error.code != 429:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = f"no connection ({error})"
        if attempt < tries - 1:
            pause(attempt, int(wait) if wait.isdigit() else 0)
    raise UserError(f"{url}: {reason}; the same command goes on from here later")


def downloaded_mark(path: Path) -> Path:
    """An empty file beside a slide that we fetched: only such a slide may be discarded."""
    return path.with_name(f".{path.name}.downloaded")


def download(source: Source, args: argparse.Namespace, report) -> None:
    """Fetch one slide to its path by way of a .partial file that goes on where it was; size and md5 are verified.

    `report(n)` is called with the bytes as they come. Raises UserError with the reason when it cannot be had.
    """
    import http.client

    partial = source.path.with_name(source.path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    url, failures = f"{args.gdc_url}/data/{source.id}", 0
    while failures < 6:
        have = partial.stat().st_size if partial.exists() else 0
        reason = "the connection ended early"
        if have < source.size:
            headers = {"Range": f"bytes={have}-"} if have else {}
            try:
                with ask(url, headers) as answer:
                    goes_on = have and answer.headers.get("Content-Range", "").startswith(
                        f"bytes {have}-"
                    )
                    with open(partial, "ab" if answer.status == 206 and goes_on else "wb") as file:
                        while file.tell() <= source.size and (chunk := answer.read(1 << 20)):
                            file.write(chunk)
                            report(len(chunk))
            except (OSError, http.client.HTTPException) as error:
                if disk_full(error):
                    raise
                reason = f"the connection was lost ({error})"
            except UserError as error:
                if not have or " 416 " not in str(error):
                    raise
                partial.unlink()  # what is there cannot be gone on with: from the beginning
        now = partial.stat().st_size if partial.exists() else 0
        if now >= source.size:
            with open(partial, "rb") as file:
                if (
                    now == source.size
                    and hashlib.file_digest(file, "md5").hexdigest() == source.md5
                ):
                    downloaded_mark(source.path).touch()
                    os.replace(partial, source.path)
                    return
            reason = f"size ({now} of {source.size} bytes) or md5 is not what the server states"
            partial.unlink()
        failures = (
            0 if have < now < source.size else failures + 1
        )  # progress does not count as failure
        pause(failures)
    raise UserError(
        f"{url}: not fetched after {failures} tries: {reason}; the same command goes on from here later"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def positive(text: str, what: str = "a number above 0") -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected {what}")


def pixel_size(text: str) -> float:
    return positive(text, "micrometres per pixel, such as 0.5 (20x)")


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 1")
    return value


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Of every script: the default behind the help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default == []
        return action.help if empty else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tile.py",
        description="Find the tissue on every slide of a cohort and lay a grid of patches on it. "
        "Run the same command again at any time: it does only what is missing.",
        formatter_class=Help,
    )
    group = parser.add_argument_group("cohort")
    group.add_argument(
        "--cancer",
        required=True,
        metavar="NAME",
        help="a TCGA project (brca, prad, ...) or any name; output goes to DATA/tiles/NAME",
    )
    group.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="holds slides/ and tiles/"
    )
    group.add_argument(
        "--slides",
        type=Path,
        metavar="DIR",
        help="slides, flat or in folders (default: DATA/slides/NAME)",
    )
    group.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="take only the slides named here: a GDC manifest, "
        "or a CSV with slide[,mpp][,patient]. Where it names no patient, the slide's name does: by its "
        "TCGA barcode, else by all up to and with the first of its parts between _ that holds a digit "
        "(P1 of P1_a, case_001 of case_001_HE)",
    )
    group.add_argument(
        "--strategy",
        choices=("diagnostic", "tissue", "both"),
        help="of TCGA: paraffin sections (DX), "
        "frozen ones (TS, BS, MS), or both, paraffin first (default: diagnostic for --download, both "
        "for slides at hand)",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="hold out the patients named here (slides or "
        "patients, one a line or a CSV), such as those of a benchmark",
    )
    group.add_argument(
        "--max-slides",
        type=int,
        default=1000,
        metavar="N",
        help="a random sample of so many; 0: all",
    )
    group.add_argument("--seed", type=int, default=0, help="of that sample")
    group = parser.add_argument_group("magnification")
    group.add_argument(
        "--mpp",
        type=pixel_size,
        default=0.25,
        metavar="UM",
        help="µm per pixel wanted; slides within "
        "20 %% of it are taken as they are (0.25 is 40x, 0.5 20x, 1 10x)",
    )
    group.add_argument("--patch-size", type=int, default=256, metavar="PX", help="side of a patch")
    group.add_argument(
        "--overlap", type=int, default=0, metavar="PX", help="of neighbouring patches"
    )
    group.add_argument(
        "--resample",
        action="store_true",
        help="rescale slides of another magnification instead of "
        "skipping them (a coarser slide gains no detail by it)",
    )
    group.add_argument(
        "--assume-mpp",
        type=pixel_size,
        metavar="UM",
        help="µm per pixel of slides that do not say (default: skip them)",
    )
    group = parser.add_argument_group("tissue and quality (of a patch)")
    group.add_argument(
        "--min-tissue", type=share, default=0.5, metavar="SHARE", help="least share of tissue"
    )
    group.add_argument(
        "--max-pen",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="most share of ink; 1 for stains other than H&E, whose colours look like ink",
    )
    group.add_argument(
        "--max-blur",
        type=positive,
        default=3.5,
        metavar="PX",
        help="most blur, as the sigma of a "
        "Gaussian in patch pixels (measured up to 6); 6 keeps all",
    )
    group.add_argument(
        "--max-fold", type=share, default=1.0, metavar="SHARE", help="most share of folded tissue"
    )
    group.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="your own tissue: <slide>.geojson (QuPath) or an "
        "image of the whole slide, not 0 in tissue",
    )
    group = parser.add_argument_group("patches on disk")
    group.add_argument(
        "--save-patches",
        action="store_true",
        help="write the patches as JPEG to DATA/tiles/NAME/"
        "shards too (WebDataset tars; about 10 to 40 kB a patch of 256 px)",
    )
    group.add_argument(
        "--jpeg-quality",
        type=int,
        default=90,
        choices=range(1, 101),
        metavar="Q",
        help="of patches that have to be encoded anew",
    )
    group = parser.add_argument_group("download from the GDC")
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch the slides of a TCGA project, as many at once as there are --workers",
    )
    group.add_argument("--yes", action="store_true", help="do not ask before downloading")
    group.add_argument(
        "--discard-slides",
        action="store_true",
        help="delete each slide that was downloaded here when "
        "its patches are saved or it is skipped (with --download and --save-patches)",
    )
    group.add_argument(
        "--gdc-url", default="https://api.gdc.cancer.gov", metavar="URL", help="the server"
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, up to 1 GB each (default: one per CPU, "
        "at most 16); for several machines start this script by torchrun on a shared disk",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Complain about what argparse cannot see, and fill in defaults that depend on other arguments."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.cancer):
        raise UserError(f"--cancer {args.cancer!r}: expected a plain name such as brca")
    if not 16 <= args.patch_size <= 4096:
        raise UserError(f"--patch-size {args.patch_size}: expected 16 to 4096 px")
    if not 0 <= args.overlap < args.patch_size:
        raise UserError(
            f"--overlap {args.overlap}: expected 0 to less than --patch-size {args.patch_size}"
        )
    if args.max_slides < 0 or (args.workers is not None and args.workers < 1):
        raise UserError("--max-slides: expected 0 or more; --workers: expected 1 or more")
    if args.discard_slides and not (args.download and args.save_patches):
        raise UserError(
            "--discard-slides: only with --download (your own slides are never deleted) and --save-patches "
            "(or nothing would be left)"
        )
    if args.masks and not args.masks.is_dir():
        raise UserError(f"--masks {args.masks}: no such folder")
    args.slides = args.slides or args.data / "slides" / args.cancer
    if args.slides.is_file():
        raise UserError(
            f"--slides {args.slides}: is a file; give its folder (--manifest picks slides of it)"
        )
    args.strategy = args.strategy or ("diagnostic" if args.download else "both")
    args.gdc_url = args.gdc_url.rstrip("/")


def main(argv: list[str] | None = None) -> int:
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # file names need not be valid in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        check(args)
        # Under torchrun rank 0 speaks for all.
        with contextlib.redirect_stdout(None if int(os.environ.get("RANK", 0)) else sys.stdout):
            return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        mend = "free some space" if disk_full(error) else "mend that"
        print(
            f"error: {error}: {mend} and run the same command again; it goes on where it was",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 1


def run(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = args.data / "tiles" / args.cancer
    if args.download:
        listed = (
            {Path(row["filename"]).name: row for row in read_manifest(args.manifest)}
            if args.manifest
            else {}
        )
        sources = ask_gdc(args, list(listed))
        for source in sources:
            if row := listed.get(source.path.name):
                source.mpp, source.stated = row["mpp"], row["patient"]
        if not sources:
            raise UserError(
                f"{args.gdc_url}: it has no such slides (see --cancer, --strategy, --manifest)"
            )
        if args.slides.is_dir():  # slides that are there already, wherever a client put them
            there = {path.name: path for path in find_slides(args.slides)}
            for source in sources:
                source.path = there.get(source.path.name, source.path)
    else:
        sources = local_sources(args, args.slides)
    patients = {source.name: source.patient for source in sources}
    sources, left_out = select(sources, args)
    known = read_rows(folder)
    todo = [
        source for source in sources if not is_done(source, known.get(source.name), folder, args)
    ]
    if args.download and not confirm_plan(todo, args):
        print("nothing downloaded")
        return 1
    if rank == 0:
        write_selection(folder, sources, left_out, known, patients, args)
    print(
        f"{len(sources) - len(todo)} slides are finished, {len(todo)} to do -> {folder}", flush=True
    )
    mine, others = (
        todo[rank::world],
        [source for number, source in enumerate(todo) if number % world != rank],
    )
    busy = work_through(mine + others, folder, args, wait=False)
    if rank:
        return (
            0  # a rank that ends with an error would take the others down; rank 0 reports for all
        )
    work_through(
        busy, folder, args, wait=True
    )  # what other processes hold: wait for it, or do it if they died
    return summarize(sources, folder, bool(todo))


def is_done(source: Source, row: dict | None, folder: Path, args: argparse.Namespace) -> bool:
    """Whether slides.csv and the files say that nothing is left to do for a slide; failed ones are tried again."""
    if not row or row["status"] == "failed":
        return False
    settings = source.settings(args)
    if row["settings"] != settings and (
        args.save_patches or row["settings"].split("-")[0] != settings
    ):
        return False
    if row["status"] == "skipped":
        return row["bytes"] == str(source.size)
    return (
        (not source.size or row["bytes"] == str(source.size))
        and (folder / "patches" / f"{source.name}_patches.h5").is_file()
        and (not args.save_patches or (folder / "shards" / f"{source.name}.tar").is_file())
    )


def confirm_plan(todo: list[Source], args: argparse.Namespace) -> bool:
    """Show what will be downloaded and whether it fits; True to go on."""
    missing = [source for source in todo if not source.path.is_file()]
    if not missing:
        return True
    size = sum(source.size for source in missing)
    held = sum(sorted((source.size for source in missing), reverse=True)[: worker_count(args)])
    need = held if args.discard_slides else size
    args.slides.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.slides).free
    print(
        f"to download: {len(missing)} slides, {size / 1e9:.2f} GB, to {args.slides} ({free / 1e9:.1f} GB free"
        + (f"; at most {need / 1e9:.2f} GB are kept at a time)" if args.discard_slides else ")"),
        flush=True,
    )
    if need > free:
        raise UserError(
            f"{args.slides}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; fewer slides by "
            f"--max-slides, another disk by --data, or --save-patches --discard-slides"
        )
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            "--download: add --yes to go on with this plan (there is no terminal to ask on)"
        )
    return input("go on? [yes/no] ").strip().lower() in ("y", "yes")


def write_selection(
    folder: Path,
    sources: list[Source],
    left_out: dict[str, str],
    known: dict,
    patients: dict,
    args: argparse.Namespace,
) -> None:
    """manifest.txt, the slides used, as the GDC's client reads it; rows of slides that are no longer wanted, and of
    finished ones whose patient is another now."""
    with atomic(folder / "manifest.txt") as temporary:
        lines = ["id\tfilename\tmd5\tsize\tstate"]
        lines += [
            "\t".join(
                (s.id or s.name, s.path.name, s.md5, str(s.size), "released" if s.id else "local")
            )
            for s in sources
        ]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    names = {os.path.abspath(source.path): source.name for source in sources}
    others = [
        Source(name, Path(row["path"]), stated=row["patient"])
        for name, row in known.items()
        if name not in patients
    ]
    held = read_patients(args.exclude, others) if args.exclude else set()
    gone = {
        source.name: f"held out: {args.exclude} (--exclude)"
        for source in others
        if held & {source.patient, patient_of(source.name), patient_of(source.path)}
    }
    gone |= {
        name: f"is {names[row['path']]} now, since others have its name"
        for name, row in known.items()
        if names.get(row["path"], name) != name
    }
    rows = [
        row | {"patient": patients[name]}
        for name, row in known.items()
        if row["patient"] != patients.get(name, row["patient"])
    ]
    for name, reason in (gone | left_out).items():
        row = known.get(name, {"slide": name})
        row |= {"patient": patients.get(name, row.get("patient"))}
        if row.get("reason") != reason and (name in known or not args.download):
            rows.append(row | {"status": "skipped", "reason": reason, "patches": 0, "settings": ""})
    if rows:
        write_rows(folder, rows)


def worker_count(args: argparse.Namespace) -> int:
    if args.workers:
        return args.workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def do_slide(
    source: Source, folder: Path, args: argparse.Namespace, wait: bool, report
) -> dict | None:
    """Fetch, tile and discard one slide under its lock; its row, or None when another process has it in hand."""
    with locked(folder / ".locks" / source.name, wait) as mine:
        if not mine:
            return None
        row = read_rows(folder).get(source.name)
        if is_done(source, row, folder, args):  # by another process, since we looked
            return row
        try:
            if source.id and args.download and not source.path.is_file():
                download(source, args, report)
        except UserError as error:
            row = {
                "slide": source.name,
                "status": "failed",
                "reason": str(error),
                "patient": source.patient,
                "patches": 0,
                "path": os.path.abspath(source.path),
            }
        else:
            row = tile_one(source, folder, args)
        write_rows(folder, [row])
        if (
            args.discard_slides
            and row["status"] != "failed"
            and downloaded_mark(source.path).exists()
        ):
            source.path.unlink(missing_ok=True)
            downloaded_mark(source.path).unlink()
            with contextlib.suppress(OSError):  # its folder, if it had one of its own
                source.path.parent.rmdir()
        return row


def worker(pipe, parents: list, folder: Path, args: argparse.Namespace, wait: bool) -> None:
    """One process: slides come in through the pipe, rows, downloaded bytes and fatal errors go out."""
    for end in parents:  # inherited; were they open here, nobody would notice the parent's death
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    with contextlib.suppress(
        EOFError, BrokenPipeError
    ):  # the parent is gone: so are we, the slide in hand finished
        while (source := pipe.recv()) is not None:
            try:
                answer = (
                    "row",
                    do_slide(source, folder, args, wait, lambda n: pipe.send(("bytes", n))),
                )
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                answer = "fatal", OSError(error.errno, f"{source.name}: {error}")
            pipe.send(answer)


def work_through(
    sources: list[Source], folder: Path, args: argparse.Namespace, wait: bool
) -> list[Source]:
    """Do all slides in worker processes; returns those that other processes have in hand.

    A slide whose reader takes the process down (some damaged files do) is recorded as failed, and a new process goes
    on with the rest. No slide is handed out after a fatal error; it is raised when the others are through.
    """
    queue, busy, fatal = list(reversed(sources)), [], None
    context = multiprocessing.get_context("fork")
    running: dict = {}  # pipe -> (process, slide in hand)
    progress = Progress(len(sources))

    def start():
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=worker, args=(theirs, [pipe, *running], folder, args, wait), daemon=True
        )
        process.start()
        theirs.close()
        running[pipe] = process, None
        hand_out(pipe)

    def hand_out(pipe):
        process, _ = running[pipe]
        source = queue.pop() if queue and fatal is None else None
        running[pipe] = process, source
        pipe.send(source)
        if source is None:
            del running[pipe]
            process.join()

    try:
        for _ in range(min(worker_count(args), len(queue))):
            start()
        while running:
            for pipe in multiprocessing.connection.wait(list(running)):
                process, source = running[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    reason = "its reader ended the process " + (
                        f"({signal.Signals(-process.exitcode).name}): damaged, or too little memory"
                        if process.exitcode < 0
                        else "by an error of this program, printed above"
                    )
                    row = {
                        "slide": source.name,
                        "status": "failed",
                        "patient": source.patient,
                        "patches": 0,
                        "path": os.path.abspath(source.path),
                        "settings": source.settings(args),
                        "reason": reason,
                    }
                    write_rows(folder, [row])
                    progress.slide(row)
                    del running[pipe]
                    if queue:
                        start()
                    continue
                if kind == "bytes":
                    progress.fetched(content)
                    continue
                if kind == "fatal":
                    fatal = content
                elif content is None:
                    busy.append(source)
                else:
                    progress.slide(content)
                hand_out(pipe)
    finally:
        for process, _ in running.values():
            process.terminate()
        if progress.bar is not None:
            progress.bar.close()
    if fatal:
        raise fatal
    return busy


class Progress:
    """A bar on a terminal; in a log a line per slide, and now and then one for a long download."""

    def __init__(self, total: int):
        self.total, self.done, self.bytes, self.bar = total, 0, 0, None
        self.start = self.said = time.time()
        if total and sys.stderr.isatty() and not int(os.environ.get("RANK", 0)):
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="slide", dynamic_ncols=True, smoothing=0.05)

    def slide(self, row: dict) -> None:
        self.done, self.said = self.done + 1, time.time()
        what = f"{int(row['patches']):,} patches" if row["status"] == "done" else row["reason"]
        text = f"{row['slide']}: {row['status']}, {what}" + (
            f" ({row['warnings']})" if row.get("warnings") else ""
        )
        if self.bar is not None:
            self.bar.update()
            self.bar.write(text)
        else:
            left = (self.said - self.start) / self.done * (self.total - self.done) / 60
            print(
                f"[{self.done}/{self.total}] {text}"
                + (f"; {left:.0f} min left" if left > 2 else ""),
                flush=True,
            )

    def fetched(self, n: int) -> None:
        self.bytes += n
        text = f"{self.bytes / 1e9:.2f} GB fetched, {self.bytes / 1e6 / (time.time() - self.start):.1f} MB/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif time.time() - self.said > 60:
            self.said = time.time()
            print(text, flush=True)


def summarize(sources: list[Source], folder: Path, news: bool) -> int:
    """The contact sheet, the slides that failed, and the last line; the exit status."""
    rows = read_rows(folder)
    rows = [rows[source.name] for source in sources]
    count = {
        status: sum(row["status"] == status for row in rows)
        for status in ("done", "skipped", "failed")
    }
    if count["done"] and (news or not (folder / "contact.jpg").is_file()):
        write_contact_sheet(folder)
    for row in [row for row in rows if row["status"] == "failed"][:10]:
        print(f"failed: {row['slide']}: {row['reason']}")
    warned = sum(bool(row["warnings"]) for row in rows)
    patients = len({row["patient"] for row in rows if row["status"] == "done"})
    whose = (
        f" of {patients} patients" if patients < count["done"] else ""
    )  # shows who was taken for one
    print(
        f"{count['done']} slides{whose} done{f' ({warned} with warnings)' if warned else ''}, "
        f"{count['skipped']} skipped, {count['failed']} failed; "
        f"{sum(int(row['patches']) for row in rows):,} patches; see {folder}/slides.csv"
    )
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

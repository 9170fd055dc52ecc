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
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu", ".dcm", ".czi")
PLAIN = (".png", ".jpg", ".jpeg", ".bmp")   # images without pyramid: opened by Slide, not looked for in slide folders
MASK_PX = 8                                 # side of a patch in pixels of the tissue mask


class UserError(Exception):
    """A user's mistake; the text names the file or flag, what was expected, and what mends it."""


class SkippedSlide(UserError):
    """A sound slide that is not wanted as it is (no mpp, other magnification, no tissue); the text says why."""


class PatchError(Exception):
    """A region of a slide that cannot be read; the text names slide, x and y (level-0 pixels)."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path in the folder of `path`; rename it onto `path` on success, remove it on failure.

    The process id in the name keeps two processes on one folder apart; a reader sees the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def slide_name(path: str | os.PathLike) -> str:
    """File name without the suffixes of slides, images and our own outputs: "a.b.ome.tif" -> "a.b"."""
    suffix = r"(\.ome)?\.(svs|tiff?|ndpi|mrxs|scn|svslide|bif|vms|vmu|dcm|czi|png|jpe?g|bmp|h5|tar)$"
    return re.sub(suffix, "", Path(path).name, flags=re.IGNORECASE)


def patient_of(name: str) -> str:
    """Patient of a slide or image: the first 12 characters of a TCGA barcode, else the stem up to its first "_"."""
    stem = slide_name(name)
    if re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", stem, flags=re.IGNORECASE):
        return stem[:12].upper()
    return stem.split("_", 1)[0] or stem


# ---------------------------------------------------------------------------------------------------------------------
# Reading slides
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Level:
    """One pyramid level. `number` is OpenSlide's; `tiles` are a TIFF's compressed tiles, where they can be read."""

    width: int
    height: int
    downsample: float
    number: int
    tiles: _Tiles | None = None


class _Tiles:
    """Compressed tiles of one TIFF page, decoded as OpenSlide does (libjpeg, OpenJPEG), without its 3 ms a tile."""

    JPEG, JP2K_YCBCR, JP2K_RGB = 7, 33003, 33005

    def __init__(self, page):
        self.width, self.height = page.tilewidth, page.tilelength
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        self.compression, self.tables = int(page.compression), page.jpegtables
        self.colors = "RGB" if int(page.photometric) == 2 else "YCBCR"

    @classmethod
    def of(cls, page) -> _Tiles | None:
        """Tiles of a page of 8-bit RGB in JPEG or JPEG 2000 tiles, None for every other."""
        usable = (page.is_tiled and page.dtype == np.uint8 and page.samplesperpixel == 3 and int(page.planarconfig) == 1
                  and int(page.compression) in (cls.JPEG, cls.JP2K_YCBCR, cls.JP2K_RGB)
                  and int(page.photometric) in (2, 6))
        return cls(page) if usable else None

    def compressed(self, file: int, index: int) -> bytes:
        """The bytes of tile `index`; empty for a tile that the scanner left out."""
        data = os.pread(file, self.counts[index], self.offsets[index])
        if len(data) != self.counts[index]:
            raise PatchError("the file ends before it")
        return data

    def decode(self, data: bytes) -> np.ndarray:
        """(height, width, 3) uint8 of one compressed tile; any error of the decoder becomes a PatchError."""
        import imagecodecs

        try:
            if self.compression == self.JPEG:
                image = imagecodecs.jpeg_decode(data, tables=self.tables, colorspace=self.colors, outcolorspace="RGB")
            else:
                image = imagecodecs.jpeg2k_decode(data)
        except (RuntimeError, ValueError) as error:  # imagecodecs' own errors derive from RuntimeError
            raise PatchError(str(error)) from error
        if image.shape != (self.height, self.width, 3):
            raise PatchError(f"tile of {image.shape}, expected {self.height} x {self.width}")
        return image


class Slide:
    """One slide, read by pixels of level 0. Close it, or use it as a context manager.

    `mpp` overrides what the file says (µm per pixel of level 0). `cache` bounds the decoded tiles kept (bytes).
    Attributes: name, path, width, height, mpp (float or None), mpp_source (str), objective (float or None), vendor.
    """

    def __init__(self, path: str | os.PathLike, mpp: float | None = None, cache: int = 64 << 20):
        import openslide

        self.path, self.name = Path(path), slide_name(path)
        self._cache, self._cache_bytes, self._cache_limit = OrderedDict(), 0, cache
        self._file, self._tiff = -1, None
        self.damaged: list[str] = []    # unreadable regions that a tolerant read left white
        self._complain_early()
        try:
            if self.path.suffix.lower() in PLAIN:
                self._slide = openslide.ImageSlide(str(self.path))
            else:
                self._slide = openslide.OpenSlide(str(self.path))
                self._slide.set_cache(openslide.OpenSlideCache(cache))
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{self.path}: cannot be opened as a slide ({error})") from error
        self.vendor = self._slide.properties.get("openslide.vendor", "image")
        self.width, self.height = self._slide.dimensions
        self.levels = []
        for number, (width, height) in enumerate(self._slide.level_dimensions):
            self.levels.append(_Level(width, height, self._downsample(width, height), number))
        self._open_tiles()
        self.mpp, self.mpp_source = (float(mpp), "user") if mpp else self._find_mpp()
        power = self._slide.properties.get("openslide.objective-power", "")
        self.objective = float(power) if re.fullmatch(r"\d+(\.\d+)?", power) and float(power) > 0 else None

    def _complain_early(self) -> None:
        """What OpenSlide would call "unsupported or missing", in words that help."""
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        head = self.path.open("rb").read(64)
        if not head:
            raise UserError(f"{self.path}: empty file; copy or download it again")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{self.path}: Git LFS pointer, not the slide itself; run `git lfs pull`")
        if self.path.suffix.lower() == ".mrxs" and not self.path.with_suffix("").is_dir():
            raise UserError(f"{self.path}: the MIRAX data folder {self.path.stem}/ is missing beside it")

    def _downsample(self, width: int, height: int) -> float:
        """Downsample of a level, whole where the level's size is that of a whole one with the last pixels cut off.

        4443 -> 2221 is a factor of 2 that lost half a pixel, not 2.0005: taken literally, far corners would shift.
        """
        ratio = (self.width / width + self.height / height) / 2
        whole = round(ratio)
        exact = all(small in (math.floor(large / whole), math.ceil(large / whole))
                    for small, large in ((width, self.width), (height, self.height)))
        return float(whole) if exact else ratio

    def _open_tiles(self) -> None:
        """Find the compressed tiles of an Aperio or generic TIFF, and trust them only if a tile equals OpenSlide's."""
        if self.vendor not in ("aperio", "generic-tiff"):
            return
        import tifffile

        try:
            tiff = tifffile.TiffFile(self.path)
        except (tifffile.TiffFileError, OSError, ValueError):
            return
        with tiff:
            pages = {(page.imagewidth, page.imagelength): page for page in reversed(tiff.pages) if page.is_tiled}
            self._file = os.open(self.path, os.O_RDONLY)
            for level in self.levels:
                page = pages.get((level.width, level.height))
                level.tiles = page and _Tiles.of(page)
        tiles = self.levels[0].tiles
        present = tiles and [i for i, count in enumerate(tiles.counts) if count]
        if not present:
            return
        index = present[len(present) // 2]
        row, column = divmod(index, tiles.columns)
        x, y = column * tiles.width, row * tiles.height
        w, h = min(tiles.width, self.width - x), min(tiles.height, self.height - y)
        try:
            same = np.array_equal(self._from_tiles(self.levels[0], x, y, w, h),
                                  self._from_openslide(self.levels[0], x, y, w, h))
        except PatchError:
            same = False
        if not same:
            for level in self.levels:
                level.tiles = None

    def _find_mpp(self) -> tuple[float | None, str]:
        """µm per pixel and where it came from: vendor properties, then resolution tags; implausible values refused."""
        properties, refused = self._slide.properties, ""
        tag = "TIFF resolution tags"

        def number(key):
            try:
                return float(properties.get(key, "").replace(",", "."))
            except ValueError:
                return math.nan

        per_unit = {"centimeter": 1e4, "inch": 25400.0}.get(properties.get("tiff.ResolutionUnit", "").lower(), math.nan)
        source = tag if self.vendor == "generic-tiff" else "openslide.mpp-x"
        x, y = number("openslide.mpp-x"), number("openslide.mpp-y")
        candidates = [(math.sqrt(x * y) if x > 0 and y > 0 else x, source), (number("aperio.MPP"), "aperio.MPP")]
        if number("tiff.XResolution") > 0:
            candidates.append((per_unit / number("tiff.XResolution"), tag))
        for value, source in candidates:
            if 0.02 <= value <= (10 if source == tag else 100):
                return round(value, 5), source
            if not math.isnan(value):
                refused = f"{source} say {value:.4g} µm/px, refused as implausible"
        return None, refused

    def close(self) -> None:
        self._slide.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tile(self, level: _Level, index: int) -> np.ndarray:
        """Decoded tile from the cache or the file; a tile left out by the scanner is white."""
        key = (level.number, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        data = level.tiles.compressed(self._file, index)
        tile = level.tiles.decode(data) if data else np.full((level.tiles.height, level.tiles.width, 3), 255, np.uint8)
        self._cache[key] = tile
        self._cache_bytes += tile.nbytes
        while self._cache_bytes > self._cache_limit and len(self._cache) > 4:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _from_tiles(self, level: _Level, x: int, y: int, w: int, h: int, strict: bool = True) -> np.ndarray:
        tiles = level.tiles
        tw, th = tiles.width, tiles.height
        if (x % tw, y % th, w, h) == (0, 0, tw, th):    # the fast case: nothing to assemble, nothing to keep
            index = y // th * tiles.columns + x // tw
            if tiles.counts[index] and (level.number, index) not in self._cache:
                with contextlib.suppress(*() if strict else (PatchError,)):
                    return tiles.decode(tiles.compressed(self._file, index))
        out = np.empty((h, w, 3), np.uint8)
        for row in range(y // th, (y + h - 1) // th + 1):
            top, bottom = max(y, row * th), min(y + h, (row + 1) * th)
            for column in range(x // tw, (x + w - 1) // tw + 1):
                left, right = max(x, column * tw), min(x + w, (column + 1) * tw)
                try:
                    tile = self._tile(level, row * tiles.columns + column)
                except PatchError as error:
                    if strict:
                        raise
                    self.damaged.append(f"level {level.number}, x={column * tw}, y={row * th}: {error}")
                    tile = np.full((th, tw, 3), 255, np.uint8)
                out[top - y:bottom - y, left - x:right - x] = tile[top - row * th:bottom - row * th,
                                                                   left - column * tw:right - column * tw]
        return out

    def _from_openslide(self, level: _Level, x: int, y: int, w: int, h: int, strict: bool = True) -> np.ndarray:
        import openslide

        place = (round(x * self._slide.level_downsamples[level.number]),
                 round(y * self._slide.level_downsamples[level.number]))
        try:
            region = np.asarray(self._slide.read_region(place, level.number, (w, h)))
        except (openslide.OpenSlideError, OSError) as error:
            # After an error OpenSlide answers every call with that error, so the handle must be replaced.
            self._slide.close()
            self._slide = openslide.open_slide(str(self.path))
            if strict:
                raise PatchError(str(error)) from error
            if w * h <= 512 * 512:
                self.damaged.append(f"level {level.number}, x={x}, y={y}: {error}")
                return np.full((h, w, 3), 255, np.uint8)
            half_w, half_h = (w // 2, h) if w >= h else (w, h // 2)
            first = self._from_openslide(level, x, y, half_w, half_h, strict=False)
            rest = (x + half_w, y, w - half_w, h) if w >= h else (x, y + half_h, w, h - half_h)
            return np.concatenate([first, self._from_openslide(level, *rest, strict=False)], axis=int(w >= h))
        rgb = region[..., :3]
        alpha = region[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgb)
        # Colours come unpremultiplied; over white.
        return (255 - (255 - rgb.astype(np.uint16)) * alpha // 255).astype(np.uint8)

    def _level_region(self, level: _Level, x: int, y: int, w: int, h: int, strict: bool) -> np.ndarray:
        """(h, w, 3) of pixels of one level, white beyond its edges."""
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, level.width), min(y + h, level.height)
        if left >= right or top >= bottom:
            return np.full((h, w, 3), 255, np.uint8)
        use_tiles = level.tiles is not None
        if use_tiles and level.number and not all(level.tiles.counts):
            use_tiles = False    # what a lower level lacks, OpenSlide draws from the level above
        read = self._from_tiles if use_tiles else self._from_openslide
        part = read(level, left, top, right - left, bottom - top, strict)
        if part.shape[:2] == (h, w):
            return part
        out = np.full((h, w, 3), 255, np.uint8)
        out[top - y:bottom - y, left - x:right - x] = part
        return out

    def area(self, x: float, y: float, w: float, h: float, out_w: int, out_h: int, *, strict: bool = True,
             resample: int = Image.Resampling.BOX) -> np.ndarray:
        """(out_h, out_w, 3) uint8 of the level-0 rectangle, from the smallest level that is not coarser than wanted.

        With `strict` an unreadable part raises PatchError; without, it is left white and noted in `damaged`.
        Memory is bounded: a large source is read in pieces.
        """
        scale = min(w / out_w, h / out_h)
        level = max((v for v in self.levels if v.downsample <= scale * 1.01), key=lambda v: v.downsample,
                    default=self.levels[0])
        d = level.downsample
        if w * h / d**2 > 16e6 and max(out_w, out_h) > 64:
            if h * out_w >= w * out_h and out_h > 1:
                cut = out_h // 2
                parts = [(x, y, w, h * cut / out_h, out_w, cut),
                         (x, y + h * cut / out_h, w, h - h * cut / out_h, out_w, out_h - cut)]
            else:
                cut = out_w // 2
                parts = [(x, y, w * cut / out_w, h, cut, out_h),
                         (x + w * cut / out_w, y, w - w * cut / out_w, h, out_w - cut, out_h)]
            axis = 0 if parts[0][4] == out_w else 1
            return np.concatenate([self.area(*part, strict=strict, resample=resample) for part in parts], axis=axis)
        left, top = x / d, y / d
        if (w / d, h / d) == (out_w, out_h) and left == int(left) and top == int(top):
            return self._level_region(level, int(left), int(top), out_w, out_h, strict)
        margin = 0 if resample == Image.Resampling.BOX else 2 * math.ceil(max(1, scale / d))
        x0, y0 = math.floor(left) - margin, math.floor(top) - margin
        x1, y1 = math.ceil(left + w / d) + margin, math.ceil(top + h / d) + margin
        source = Image.fromarray(self._level_region(level, x0, y0, x1 - x0, y1 - y0, strict))
        box = (left - x0, top - y0, left - x0 + w / d, top - y0 + h / d)
        return np.asarray(source.resize((out_w, out_h), resample, box=box))

    def read(self, x: int, y: int, size: int, out: int) -> np.ndarray:
        """(out, out, 3) uint8 of the square of `size` level-0 pixels at (x, y), white beyond the edges.

        With out == size these are the slide's own pixels; otherwise resampled (bicubic, antialiased).
        """
        try:
            return self.area(x, y, size, size, out, out, resample=Image.Resampling.BICUBIC)
        except PatchError as error:
            raise PatchError(f"{self.name}: patch at x={x}, y={y} cannot be read: {error}") from error

    def thumbnail(self, max_side: int) -> np.ndarray:
        """(h, w, 3) uint8, the longer side at most `max_side`; unreadable parts are white."""
        scale = max(self.width, self.height) / max_side
        scale = max(scale, 1)
        out_w, out_h = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        return self.area(0, 0, self.width, self.height, out_w, out_h, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Tissue
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tiling:
    """What tile_slide found. Arrays have one entry per patch kept; a pixel of `mask` has `scale` level-0 pixels."""

    coords: np.ndarray                  # (N, 2) int64, level-0 x, y of the top-left corner
    size0: int                          # side of a patch in level-0 pixels
    patch_size: int                     # side of a patch in output pixels
    mpp: float                          # µm per output pixel
    tissue: np.ndarray                  # (N,) share of tissue
    mask: np.ndarray                    # (h, w) bool, tissue
    image: np.ndarray                   # (h, w, 3) uint8
    scale: float
    summary: dict = field(default_factory=dict)     # fractions for slides.csv
    warnings: list[str] = field(default_factory=list)


def choose_size(slide: Slide, mpp: float, patch_size: int, resample: bool) -> tuple[int, float]:
    """Level-0 side of a patch and the µm per output pixel that results; SkippedSlide when the slide does not fit.

    A slide within 20 % of the target is taken as it is (0.2 to 0.3 µm/px is 40x); others only with `resample`.
    """
    if slide.mpp is None:
        why = slide.mpp_source or "no µm per pixel in the file"
        raise SkippedSlide(f"{why}; give it with --assume-mpp or a CSV of slide,mpp by --manifest")
    if 0.8 * mpp - 1e-9 <= slide.mpp <= 1.2 * mpp + 1e-9:
        return patch_size, slide.mpp
    if not resample:
        kind = "coarser" if slide.mpp > mpp else "finer"
        raise SkippedSlide(f"{slide.mpp:.4g} µm/px is {kind} than {mpp:g} (± 20 %); --resample rescales it, "
                           f"--mpp {slide.mpp:.2g} takes it as it is")
    return max(1, round(patch_size * mpp / slide.mpp)), mpp


def find_tissue(image: np.ndarray, smallest: float) -> np.ndarray:
    """(h, w) bool mask of stained tissue in a low-power (h, w, 3) uint8 image; areas below `smallest` px dropped."""
    from scipy import ndimage

    values = image.astype(np.float32)
    low, high = values.min(axis=2), values.max(axis=2)
    bright = (low > 150) & (high - low < 40)
    white = np.median(values[bright], axis=0) if bright.mean() > 0.001 else np.float32([245, 245, 245])
    values = np.minimum(values / white, 1)
    chroma = ndimage.uniform_filter(values.max(axis=2) - values.min(axis=2), 3)
    dark = high < 50
    mask = (chroma > np.clip(_otsu(chroma[~dark]), 0.04, 0.12)) & ~dark
    mask = ndimage.binary_closing(np.pad(mask, 4), np.ones((3, 3)), iterations=2)[4:-4, 4:-4]
    labels, count = ndimage.label(mask)
    mask = np.r_[False, np.bincount(labels.ravel(), minlength=count + 1)[1:] >= smallest][labels]
    holes, count = ndimage.label(~mask)
    mask |= np.r_[False, np.bincount(holes.ravel(), minlength=count + 1)[1:] < smallest][holes]
    return mask & ~dark


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold of values in [0, 1], on 256 bins."""
    counts = np.histogram(values, 256, (0, 1))[0].astype(float)
    below = np.cumsum(counts)
    weighted = np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    return (np.nanargmax(between) + 0.5) / 256 if np.isfinite(between).any() else 1.0


def share_in_squares(mask: np.ndarray, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Mean of `mask` in squares of side `size` at (x, y), all in mask pixels and not necessarily whole."""
    total = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2))
    total[1:-1, 1:-1] = mask.cumsum(0, dtype=float).cumsum(1)
    total[-1], total[:, -1] = total[-2], total[:, -2]

    def integral(x, y):
        x, y = np.clip(x, 0, mask.shape[1]), np.clip(y, 0, mask.shape[0])
        i, j = y.astype(int), x.astype(int)
        v, u = y - i, x - j
        return ((1 - v) * ((1 - u) * total[i, j] + u * total[i, j + 1])
                + v * ((1 - u) * total[i + 1, j] + u * total[i + 1, j + 1]))

    return (integral(x + size, y + size) - integral(x, y + size) - integral(x + size, y) + integral(x, y)) / size**2


def tile_slide(slide: Slide, *, mpp: float = 0.25, patch_size: int = 256, min_tissue: float = 0.5,
               resample: bool = False, overlap: int = 0) -> Tiling:
    """Find the tissue of a slide and the grid of patches on it.

    `mpp` µm per pixel wanted, `patch_size` and `overlap` in output pixels, `min_tissue` share of a patch that must be
    tissue. Raises SkippedSlide (no or another magnification, no tissue) and UserError (cannot be used at all).
    """
    size0, got = choose_size(slide, mpp, patch_size, resample)
    step = max(1, round(size0 * (patch_size - overlap) / patch_size))
    if slide.width < size0 or slide.height < size0:
        raise SkippedSlide(f"smaller ({slide.width} x {slide.height} px) than one patch of {size0} px")
    scale = max(size0 / MASK_PX, math.sqrt(slide.width * slide.height / 16e6), 1)
    shape = math.ceil(slide.height / scale), math.ceil(slide.width / scale)
    image = slide.area(0, 0, shape[1] * scale, shape[0] * scale, shape[1], shape[0], strict=False)
    mask = find_tissue(image, smallest=(size0 / scale) ** 2 / 4)
    x, y = np.meshgrid(np.arange(0, slide.width - size0 + 1, step), np.arange(0, slide.height - size0 + 1, step))
    x, y = x.ravel(), y.ravel()
    tissue = share_in_squares(mask, x / scale, y / scale, size0 / scale)
    keep = tissue >= max(min_tissue, 1e-6)
    coords = np.stack([x, y], 1)[keep].astype(np.int64)
    result = Tiling(coords, size0, patch_size, got, tissue[keep], mask, image, scale)
    result.summary = {"tissue": mask.mean()}
    if slide.objective and abs(math.log2(slide.mpp * slide.objective / 10)) > 0.5:
        result.warnings.append(f"objective {slide.objective:g}x disagrees with {slide.mpp:g} µm/px "
                               f"({slide.mpp_source}); the latter is used")
    if not len(result.coords):
        raise SkippedSlide("no tissue found" if not mask.any() else
                           f"no patch has {min_tissue:.0%} tissue (see --min-tissue)")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_coords(path: Path, slide: Slide, tiling: Tiling, overlap: int) -> None:
    """The h5 file that CLAM and TRIDENT read too: dataset `coords`, and both tools' attributes on it.

    CLAM reads `patch_size` pixels of `patch_level`, TRIDENT `patch_size` pixels at `target_magnification`. Where
    patches are resampled the two contradict, so the attribute `patch_level` is left out: CLAM then stops instead of
    reading another field of view.
    """
    import h5py

    target = round(10 / tiling.mpp) if tiling.size0 != tiling.patch_size else None
    level0 = (target * tiling.size0 / tiling.patch_size) if target else round(10 / slide.mpp)
    if target is None:
        level0 = target = min((80, 60, 40, 20, 10, 5), key=lambda m: abs(math.log2(m * slide.mpp / 10)))
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=tiling.coords)
        coords.attrs.update({
            "patch_size": tiling.patch_size, "downsample": [1.0, 1.0], "name": slide.name,
            "level_dim": [slide.width, slide.height], "downsampled_level_dim": [slide.width, slide.height],
            "save_path": str(path.parent), "savetodir": str(path.parent.parent), "overlap": overlap,
            "patch_size_level0": tiling.size0, "target_magnification": target,
            "level0_magnification": int(level0) if level0 == int(level0) else level0,
            "level0_width": slide.width, "level0_height": slide.height, "mpp": tiling.mpp, "level0_mpp": slide.mpp})
        if tiling.size0 == tiling.patch_size:
            coords.attrs["patch_level"] = 0
        file.create_dataset("tissue", data=tiling.tissue.astype(np.float32))


def write_thumbnail(path: Path, tiling: Tiling, max_side: int = 1600) -> None:
    """Thumbnail with the tissue's outline and the grid of the patches kept."""
    height, width = tiling.image.shape[:2]
    zoom = min(max_side / max(height, width), 4)
    picture = Image.fromarray(tiling.image).resize((max(1, round(width * zoom)), max(1, round(height * zoom))))
    draw = ImageDraw.Draw(picture, "RGBA")
    factor = zoom / tiling.scale
    side = tiling.size0 * factor
    for x, y in (tiling.coords * factor).tolist():
        draw.rectangle((x, y, x + side, y + side), outline=(0, 60, 220, 90))
    for polygon in outlines(tiling.mask):
        for ring in polygon:
            draw.line([tuple(p) for p in (ring * zoom).tolist()], fill=(0, 130, 60, 255), width=2, joint="curve")
    with atomic(path) as temporary:
        picture.save(temporary, quality=85)


def outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Polygons of a mask in mask pixels (pixel edges are whole numbers): each the outer ring, then its holes."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask.astype(np.float32), 1)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2)
    return [[p[a:b] - 0.5 for a, b in itertools.pairwise(o)]
            for p, o in zip(points, offsets, strict=True)]


COLUMNS = ("slide", "status", "reason", "patient", "patches", "width", "height", "mpp", "mpp_source", "objective",
           "size0", "patch_size", "target_mpp", "tissue", "warnings", "seconds", "settings", "bytes", "path")


def read_rows(folder: Path) -> dict[str, dict]:
    """The rows of slides.csv by slide name; empty when there is none yet."""
    try:
        with open(folder / "slides.csv", newline="", encoding="utf-8") as file:
            return {row["slide"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Add rows to slides.csv or replace them, under a lock, so that processes do not lose each other's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".slides.lock"):
        merged = read_rows(folder) | {row["slide"]: row for row in rows}
        with atomic(folder / "slides.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(merged[name] for name in sorted(merged))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold an advisory lock on `path`; yields False when it is held elsewhere and `wait` is False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def tile_one(path: Path, name: str, folder: Path, args: argparse.Namespace) -> dict:
    """Tile one slide into `folder`; returns its row. A user's error or a broken slide becomes a row, never a raise."""
    start = time.perf_counter()
    row = {"slide": name, "patient": patient_of(name), "patches": 0, "path": str(path), "settings": args.settings,
           "patch_size": args.patch_size, "target_mpp": args.mpp}
    try:
        row["bytes"] = path.stat().st_size
        with Slide(path) as slide:
            if slide.mpp is None and args.assume_mpp:
                slide.mpp, slide.mpp_source = args.assume_mpp, "--assume-mpp"
            row |= {"width": slide.width, "height": slide.height, "mpp": slide.mpp or "",
                    "mpp_source": slide.mpp_source, "objective": slide.objective or ""}
            tiling = tile_slide(slide, mpp=args.mpp, patch_size=args.patch_size, min_tissue=args.min_tissue,
                                resample=args.resample, overlap=args.overlap)
            slide.name = name
            write_thumbnail(folder / "thumbnails" / f"{name}.jpg", tiling)
            write_coords(folder / "patches" / f"{name}_patches.h5", slide, tiling, args.overlap)
        row |= {"status": "done", "patches": len(tiling.coords), "size0": tiling.size0,
                "tissue": f"{tiling.summary['tissue']:.4f}", "warnings": "; ".join(tiling.warnings)}
    except SkippedSlide as error:
        row |= {"status": "skipped", "reason": str(error)}
    except (UserError, PatchError, OSError) as error:
        row |= {"status": "failed", "reason": str(error)}
    row["seconds"] = f"{time.perf_counter() - start:.2f}"
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Reading patches back
# ---------------------------------------------------------------------------------------------------------------------


class PatchIndex:
    """Random access to the patches of a cohort: `folder` is data/tiles/<cancer>, `slides` where slides lie if moved.

    Only slides.csv is read at first; coordinates and slides are opened when a patch is wanted, and at most `handles` of
    them are kept. Safe to pickle, to fork and to use in data-loader workers; not to share between threads.
    """

    def __init__(self, folder: str | os.PathLike, slides: str | os.PathLike | None = None, handles: int = 24):
        self.folder = Path(folder)
        self.slides_folder = Path(slides) if slides else None
        self.handles = handles
        every = read_rows(self.folder)
        if not every:
            raise UserError(f"{self.folder}/slides.csv: not found or empty; run tile.py --cancer {self.folder.name}")
        rows = [row for row in every.values() if row["status"] == "done" and int(row["patches"])]
        if not rows:
            raise UserError(f"{self.folder}: no slide has patches; slides.csv there gives each slide's reason")
        kinds = {(int(row["patch_size"]), float(row["target_mpp"])) for row in rows}
        if len(kinds) > 1:
            raise UserError(f"{self.folder}: slides were tiled in different ways (patch size, µm/px): {sorted(kinds)}; "
                            f"run tile.py on them again with one setting")
        (self.patch_size, self.mpp), = kinds
        self.slides = [row["slide"] for row in rows]
        self.patients = sorted({row["patient"] for row in rows})
        self.counts = np.array([int(row["patches"]) for row in rows], np.int64)
        self._paths = [row["path"] for row in rows]
        self._size0 = [int(row["size0"]) for row in rows]
        self._mpp0 = [float(row["mpp"]) for row in rows]
        self._ends = np.cumsum(self.counts)
        self._open, self._process = OrderedDict(), os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the slide, row of its coordinates) of patch `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"patch {i} of {len(self)}")
        slide = int(np.searchsorted(self._ends, i, side="right"))
        return slide, int(i - self._ends[slide] + self.counts[slide])

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
        count = int(self.counts[slide])
        return int(self._ends[slide]) - count + (second * count >> 64)

    def _handle(self, number: int) -> tuple[Slide, np.ndarray]:
        """The open slide and its coordinates, from the few that are kept open."""
        if self._process != os.getpid():    # after a fork the parent's file positions must not be shared
            self._open, self._process = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        import h5py

        name = self.slides[number]
        with h5py.File(self.folder / "patches" / f"{name}_patches.h5", "r") as file:
            coords = file["coords"][:]
        path = Path(self._paths[number])
        if self.slides_folder:
            path = next((p for p in find_slides(self.slides_folder) if p.name == path.name), path)
        handle = Slide(path, mpp=self._mpp0[number], cache=4 << 20), coords
        self._open[number] = handle
        while len(self._open) > self.handles:
            self._open.popitem(last=False)[1][0].close()
        return handle

    def read(self, i: int) -> np.ndarray:
        """(P, P, 3) uint8 of patch `i`. PatchError names slide, x and y."""
        number, row = self.locate(i)
        try:
            slide, coords = self._handle(number)
        except (UserError, OSError) as error:
            raise PatchError(f"{self.slides[number]}: patch {row} cannot be read: {error}") from error
        x, y = coords[row].tolist()
        return slide.read(x, y, self._size0[number], self.patch_size)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def find_slides(folder: Path) -> list[Path]:
    """Slides below a folder, flat or in folders per file id, sorted by name; hidden files are left out."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(found, key=lambda path: (path.name, str(path)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tile.py", description="Find the tissue on every slide of a cohort and lay a grid of patches on it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("cohort")
    group.add_argument("--cancer", required=True, help="name of the cohort: a TCGA project code (brca, prad, ...) or "
                       "any name; output goes to DATA/tiles/CANCER")
    group.add_argument("--slides", type=Path, help="folder of slides, flat or one folder per slide "
                       "(default: DATA/slides/CANCER)")
    group.add_argument("--data", type=Path, default=Path("data"), help="folder that holds slides/ and tiles/")
    group = parser.add_argument_group("magnification")
    group.add_argument("--mpp", type=float, default=0.25, help="µm per pixel wanted; slides within 20 %% are taken as "
                       "they are (0.25: 40x, 0.5: 20x, 1: 10x)")
    group.add_argument("--patch-size", type=int, default=256, help="side of a patch in pixels")
    group.add_argument("--overlap", type=int, default=0, help="overlap of neighbouring patches in pixels")
    group.add_argument("--resample", action="store_true", help="rescale slides of another magnification instead of "
                       "skipping them (making pixels finer than the scan invents detail)")
    group.add_argument("--assume-mpp", type=float, help="µm per pixel of slides that do not say (default: skip them)")
    group = parser.add_argument_group("tissue")
    group.add_argument("--min-tissue", type=float, default=0.5, help="least share of tissue in a patch")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.cancer):
        raise UserError(f"--cancer {args.cancer!r}: expected a plain name such as brca")
    source = args.slides or args.data / "slides" / args.cancer
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; put slides there or name their folder with --slides")
    slides = find_slides(source)
    if not slides:
        raise UserError(f"{source}: no slides in it (looked for {', '.join(SUFFIXES)})")
    folder = args.data / "tiles" / args.cancer
    keys = ("mpp", "patch_size", "overlap", "resample", "assume_mpp", "min_tissue")
    args.settings = hashlib.sha256(json.dumps([getattr(args, k) for k in keys]).encode()).hexdigest()[:8]
    known = read_rows(folder)
    print(f"{len(slides)} slides in {source} -> {folder}", flush=True)
    rows = []
    for number, path in enumerate(slides, 1):
        name = slide_name(path)
        row = known.get(name, {})
        if row.get("status") != "done" or row["settings"] != args.settings:
            row = tile_one(path, name, folder, args)
            write_rows(folder, [row])
            print(f"[{number}/{len(slides)}] {name}: {row['status']}, "
                  f"{row['reason'] if row.get('reason') else str(row['patches']) + ' patches'}", flush=True)
        rows.append(row)
    count = {status: sum(row["status"] == status for row in rows) for status in ("done", "skipped", "failed")}
    print(f"{count['done']} done, {count['skipped']} skipped, {count['failed']} failed, "
          f"{sum(int(row['patches']) for row in rows)} patches; {folder / 'slides.csv'} lists every slide")
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Slide: any whole-slide image opened by its pixels of level 0, any rectangle of it at any scale.

Pixels come from the compressed tiles where those are proven to equal what the reader shows, else
from the reader (readers.py). `area` is the one way to pixels; `read` and `thumbnail` call it.
"""

import contextlib
import html
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from g2l.errors import PatchError, SkippedSlide
from g2l.readers import PLAIN, open_reader
from g2l.tiff import LocalFile, Place, Recent, Tiles, assemble, cover

KINDS = ".svs .tif .tiff .ndpi .mrxs .scn .svslide .bif .vms .vmu .dcm .czi .isyntax .qptiff .vsi"
SUFFIXES = tuple(KINDS.split())
Size = tuple[int, int]  # px
PIECE = 4e6  # source pixels that are read at once


def slide_name(path: str | os.PathLike) -> str:
    """File name without the suffixes of slides, images and our outputs: "a.b.ome.tif" -> "a.b"."""
    suffixes = "|".join(suffix[1:] for suffix in (*SUFFIXES, *PLAIN, ".h5", ".tar"))
    # Not every file system speaks UTF-8.
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    return re.sub(rf"(\.ome)?\.({suffixes})$", "", name, flags=re.IGNORECASE)


@dataclass(eq=False)
class Level:
    """One pyramid level.

    `number` is the reader's, -1 where it does not see the level. `shrink` is the scale at which
    tiles are decoded: levels that no file holds, good enough to look for tissue.
    """

    width: int
    height: int
    downsample: float
    number: int
    tiles: Tiles | None = None
    shrink: int = 1

    @property
    def side(self) -> Size:
        """(width, height) of the tiles in which it is read."""
        if not self.tiles:
            return 256, 256
        codec = self.tiles.codec
        return codec.width // self.shrink, codec.height // self.shrink

    def shrunken(self, by: int) -> Self:
        """The level as its tiles show it when they are decoded small."""
        width = -(-self.width // by)
        height = -(-self.height // by)
        return type(self)(width, height, self.downsample * by, -1, self.tiles, by)


class Slide:
    """One slide, read by pixels of level 0. Close it, or use it as a context manager.

    `mpp` overrides what the file says (µm per pixel of level 0). `cache` bounds the decoded tiles
    kept (bytes). Attributes: name, path, width, height, mpp (float or None), mpp_source (str),
    objective (float or None), vendor, `origin` (x, y of what was scanned, from which QuPath
    counts), `notes` (what is odd about the file), `damaged` (unreadable regions that a tolerant
    read left white), `memory` (bytes it may hold). Raises UserError where the file is no slide.
    `remote`, a RemoteFile, takes the file's place; SkippedSlide where OpenSlide is needed beyond
    its directory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        mpp: float | None = None,
        cache: int = 64 << 20,
        remote: Any = None,
    ):
        self.path = Path(path)
        self.name = slide_name(path)
        self._recent = Recent(cache)
        self.memory = cache
        self.remote = remote
        self.damaged: list[str] = []
        self._seen = remote.open_twin() if remote else self.path
        self._reader = open_reader(self._seen, cache)
        self.file = remote or LocalFile(self.path)
        self.vendor = self._reader.vendor
        properties = self._reader.properties
        self.width, self.height = self._reader.sizes[0]
        if self.vendor == "image":  # held whole
            self.memory = 4 * self.width * self.height
        self.notes = list(self._reader.notes)
        self.levels: list[Level] = []
        for number, size in enumerate(self._reader.sizes):
            self._add_level(size, number)
        self.drafts = list(self.levels)  # what is good enough to look for tissue
        if self.vendor in ("aperio", "generic-tiff"):
            self._open_tiles()
        if remote and not all(level.tiles for level in (*self.levels, *self.drafts)):
            self.close()
            raise SkippedSlide(f"its pixels need OpenSlide ({self.vendor})", mend="rest")
        self.mpp, self.mpp_source = (mpp, "given") if mpp else find_mpp(properties)
        x, y = (int(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
        self.origin = x, y
        power = _number(properties.get("openslide.objective-power", ""))
        self.objective = power if 0 < power < math.inf else None

    def _add_level(self, size: Size, number: int, tiles: Tiles | None = None) -> None:
        """Take a level for what its size proves, or leave it out and note that."""
        (width, height), whole = size, (self.width, self.height)
        factor = level_factor(whole, size, self._reader.tile_size(number))
        if factor:
            width = min(width, math.ceil(self.width / factor))  # without the padding
            height = min(height, math.ceil(self.height / factor))
            self.levels.append(Level(width, height, factor, number, tiles))
        else:
            self.notes.append(
                f"level {number} ({width} x {height} px) left out: not the whole slide at one scale"
            )

    def _open_tiles(self) -> None:
        """Find the compressed tiles of a TIFF.

        They are trusted only if a tile of level 0 with much in it equals what OpenSlide shows.
        """
        import tifffile

        try:
            with open(self._seen, "rb") as file, tifffile.TiffFile(file) as tiff:
                self._match_pages(tiff.pages, tiff.pages.first.pages or ())
        except (
            tifffile.TiffFileError,
            OSError,
            ValueError,
            IndexError,
            TypeError,
            struct.error,
        ):
            pass  # what tifffile cannot parse, OpenSlide may still read
        else:
            tiles = self.levels[0].tiles
            if tiles and self._equals_openslide(tiles):
                self._choose_drafts(tiles)
                return
        self.levels = [level for level in self.levels if level.number >= 0]
        for level in self.levels:
            level.tiles = None
        self.drafts = list(self.levels)

    def _match_pages(self, pages: Any, inner: Any) -> None:
        """The tiles of each level; OME-TIFF keeps its pyramid where OpenSlide does not look."""
        tiled = [page for page in pages if page.is_tiled]
        by_size = {(page.imagewidth, page.imagelength): page for page in reversed(tiled)}
        for level in self.levels:
            level.tiles = Tiles.of(by_size.get(self._reader.sizes[level.number]))
        for page in inner:
            tiles = Tiles.of(page)
            if tiles and tiles.complete:
                self._add_level((page.imagewidth, page.imagelength), -1, tiles)

    def _equals_openslide(self, tiles: Tiles) -> bool:
        fullest = np.argsort(-tiles.counts, kind="stable")
        for index in fullest[:3].tolist():  # three, in case one is damaged
            with contextlib.suppress(PatchError):
                ours = tiles.decode(self.file, index)
                theirs = self._by_reader(self.levels[0], *divmod(index, tiles.columns))
                return np.array_equal(ours[: len(theirs), : theirs.shape[1]], theirs)
        return False

    def _choose_drafts(self, bottom: Tiles) -> None:
        """Which levels show the slide at low power without much work, shrunken tiles among them."""
        for level in self.levels[1:]:
            # Below a tile left out of level 0 the file holds junk; OpenSlide draws it anew.
            if level.tiles and not (level.tiles.complete and bottom.complete):
                level.tiles = None
        sparse = (bottom.counts == 0).mean() > 0.1  # OpenSlide would draw all of a level
        self.drafts = [level for level in self.levels if level.tiles or not sparse]
        for level in self.levels:
            if level.tiles:
                with contextlib.suppress(PatchError):
                    self.drafts += map(level.shrunken, level.tiles.shrinks(self.file))

    def close(self) -> None:
        """Let go of the file; also what the end of a `with` block does."""
        self._reader.close()
        if self.file:
            self.file.close()
            self.file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tile(self, level: Level, row: int, column: int) -> NDArray:
        """A tile by our decoder or, where it refuses, as the reader shows it."""
        if level.tiles:
            try:
                index = row * level.tiles.columns + column
                return level.tiles.decode(self.file, index, level.shrink)
            except PatchError:
                if level.number < 0 or self.remote:
                    raise
        return self._by_reader(level, row, column)

    def _by_reader(self, level: Level, row: int, column: int) -> NDArray:
        """A tile, as far as the level goes, as the reader shows it."""
        w, h = level.side
        x = column * w
        y = row * h
        part = x, y, min(w, level.width - x), min(h, level.height - y)
        return self._reader.region(level.number, part)

    def _inside(self, level: Level, place: Place, strict: bool) -> NDArray:
        """(h, w, 3) of a rectangle within a level.

        What cannot be read is white and noted in `damaged`, unless `strict`.
        """
        (w, h), (x, y, *size) = level.side, place
        if not level.tiles:
            with contextlib.suppress(PatchError):  # tile by tile, some of it can be read
                return self._reader.region(level.number, place)
        elif strict and x % w == y % h == 0 and size == [w, h]:  # it is not asked for twice
            return self._tile(level, y // h, x // w)
        if self.remote:
            self._ahead(level, [place])

        def tile(row, column):
            if strict:
                key = level, row, column
                return self._recent.get(key, lambda: self._tile(*key))
            try:  # a draft asks for each once
                return self._tile(level, row, column)
            except PatchError as error:
                left, top = (round(n * level.downsample) for n in (column * w, row * h))
                self.damaged.append(f"x={left}, y={top}: {error}")
                return np.full((h, w, 3), 255, np.uint8)

        return assemble(tile, (w, h), place)

    def _ahead(self, level: Level, places: list[Place]) -> None:
        """Have the tiles of rectangles within a level of a remote slide fetched together."""
        spans = []
        assert level.tiles
        for place in places:
            for row, column in cover(level.side, place):
                spans.append(level.tiles.span(row * level.tiles.columns + column))
        self.remote.ahead(spans)

    def expect(self, places: NDArray, side: int) -> None:
        """Squares (N, 2; x, y) of `side` level-0 pixels are read next, to be fetched together."""
        if self.remote:
            self._ahead(self.levels[0], [(x, y, side, side) for x, y in places.tolist()])

    def cost(self, scale: float) -> int:
        """Bytes of the level from which a draft of `scale` level-0 pixels a pixel is taken."""
        level = self._level((0, 0, self.width, self.height), scale, True, math.inf)
        return int(level.tiles.counts.sum()) if level.tiles else self.file.size

    def _region(self, level: Level, place: Place, strict: bool) -> NDArray:
        """(h, w, 3) of pixels of one level, white beyond its edges."""
        x, y, w, h = place
        left = max(x, 0)
        top = max(y, 0)
        right = min(x + w, level.width)
        bottom = min(y + h, level.height)
        inside = left, top, right - left, bottom - top
        if inside == place:
            return self._inside(level, place, strict)
        out = np.full((h, w, 3), 255, np.uint8)
        if left < right and top < bottom:
            out[top - y : bottom - y, left - x : right - x] = self._inside(level, inside, strict)
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
    ) -> NDArray:
        """(out_h, out_w, 3) uint8 of the level-0 rectangle, white beyond the edges.

        Taken from the level nearest above and resampled where need be: by the mean of pixels where
        these are whole or `draft`, else bicubic, antialiased. PatchError when a part is unreadable;
        with `draft` it is taken from a finer level (a downsample `below` that one's), else left
        white and noted in `damaged`.
        Memory is bounded: a large source is read in pieces.
        """
        if (w, h) == (out_w, out_h) and not draft and x % 1 == y % 1 == 0:
            return self._region(self.levels[0], (int(x), int(y), out_w, out_h), True)
        scale = min(w / out_w, h / out_h)
        level = self._level((x, y, w, h), scale, draft, below)
        d = level.downsample
        if w * h / d**2 > PIECE and out_h > 1:
            cut = out_h // 2
            high = h * cut / out_h
            upper = self.area(x, y, w, high, out_w, cut, draft, below)
            lower = self.area(x, y + high, w, h - high, out_w, out_h - cut, draft, below)
            return np.concatenate([upper, lower])
        noted = len(self.damaged)
        out = self._resampled(level, (x, y, w, h), (out_w, out_h), draft)
        if len(self.damaged) > noted and d > level.shrink:  # a finer level holds the place too
            del self.damaged[noted:]
            return self.area(x, y, w, h, out_w, out_h, draft, d / level.shrink)
        return out

    def _resampled(self, level: Level, box: tuple[float, ...], size: Size, draft: bool) -> NDArray:
        """A box (x, y, width, height) of level-0 pixels out of one level (see area)."""
        d = level.downsample
        x, y, w, h = (number / d for number in box)
        zoom = min(w / size[0], h / size[1])
        aligned = _whole(1, zoom) and _whole(d, *box) and w * size[1] == h * size[0]
        mean = draft or aligned
        margin = 0 if mean else 2 * math.ceil(max(1, zoom))
        left = math.floor(x) - margin
        top = math.floor(y) - margin
        right = math.ceil(x + w) + margin
        bottom = math.ceil(y + h) + margin
        source = self._region(level, (left, top, right - left, bottom - top), not draft)
        if aligned and zoom == 1:
            return source
        kind = Image.Resampling.BOX if mean else Image.Resampling.BICUBIC
        within = x - left, y - top, x + w - left, y + h - top
        return np.asarray(Image.fromarray(source).resize(size, kind, within))

    def _level(self, box: tuple[float, ...], scale: float, draft: bool, below: float) -> Level:
        """The coarsest level that is fine enough for `scale`, level 0 where none is.

        JPEG tiles decoded small are the mean of their pixels to 0.2 grey levels (those of JPEG 2000
        to 5), so they serve beyond drafts where the box is whole pixels of theirs.
        """
        best = self.levels[0]
        for level in self.drafts if draft else (*self.levels, *self.drafts):
            d = level.downsample
            fits = d <= scale * 1.01 and d < below
            if level.tiles and level.shrink > 1 and not draft:
                fits = d == scale and level.tiles.codec.is_jpeg and _whole(d, *box)
            if fits and (d, -level.shrink) > (best.downsample, -best.shrink):
                best = level
        return best

    def read(self, x: int, y: int, size: int, out: int) -> NDArray:
        """(out, out, 3) uint8 of the square of `size` level-0 pixels at (x, y), white beyond edges.

        With out == size these are the slide's own pixels, otherwise resampled (see area).
        PatchError names the slide and the place.
        """
        try:
            return self.area(x, y, size, size, out, out)
        except PatchError as error:
            raise PatchError(
                f"{self.name}: patch at x={x}, y={y} cannot be read: {error}"
            ) from error

    def thumbnail(self, max_side: int) -> NDArray:
        """(h, w, 3) uint8, the longer side at most `max_side`; unreadable parts are white."""
        scale = max(1, max(self.width, self.height) / max_side)
        size = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        return self.area(0, 0, self.width, self.height, *size, draft=True)


def _whole(unit: float, *numbers: float) -> bool:
    return all(number % unit == 0 for number in numbers)


def level_factor(whole: Size, level: Size, tile: Size = (1, 1)) -> float | None:
    """Downsample of a level by its size and level 0's, (width, height); None if it proves none.

    Whole where the size is that of a whole factor, cut to pixels or padded to whole tiles: 4443 ->
    2221 is a factor of 2 that lost half a pixel, not 2.0005, by which far corners would shift. Of
    several such factors a power of two is believed, if it is the only one. Else it is the mean of
    both ratios, if they agree as well as rounding lets them.
    """
    large, small, side = np.array([whole, level, tile])
    ratios = large / small
    factors = np.arange(1, 2 * math.ceil(ratios.max()) + 1)[:, None]
    padded = -(-large // (factors * side)) * side
    cut = (small == large // factors) | (small == -(-large // factors))
    fits = cut.all(axis=1) | (small == padded).all(axis=1)
    whole_factors = factors[fits, 0].tolist()
    powers = [factor for factor in whole_factors if factor & (factor - 1) == 0]
    if len(powers or whole_factors) == 1:
        return float((powers or whole_factors)[0])
    agree = abs(ratios[0] / ratios[1] - 1) <= min((1 / small).sum(), 0.02)
    return float(ratios.mean()) if agree else None


def find_mpp(properties: dict[str, str]) -> tuple[float | None, str]:
    """µm per pixel and where it came from: OME's text, vendor properties, then resolution tags.

    Implausible values are refused, which the second value then says.
    """
    names = "openslide.mpp-x", "openslide.mpp-y", "aperio.MPP"
    x, y, aperio = (_number(properties.get(name, "")) for name in names)
    if x > 0 and y > 0 and abs(math.log(x / y)) > 0.02:
        return None, f"pixels are not square: {x:.4g} x {y:.4g} µm"
    units = {"centimeter": 1e4, "inch": 25400.0}
    unit = units.get(properties.get("tiff.ResolutionUnit", "").lower(), math.nan)
    resolution = _number(properties.get("tiff.XResolution", ""))
    # OpenSlide's own are those tags in a generic TIFF, and often hold 72 dots per inch: 352.8 µm.
    own = (
        math.nan if properties.get("openslide.vendor") == "generic-tiff" else math.sqrt(abs(x * y))
    )
    candidates = [
        (
            _ome_size(properties.get("tiff.ImageDescription", "")),
            "OME PhysicalSizeX",
            100,
        ),
        (own, "openslide.mpp-x", 100),
        (aperio, "aperio.MPP", 100),
        (unit / (resolution or math.nan), "TIFF resolution tags", 10),
    ]
    refused = ""
    for value, source, most in candidates:
        if 0.02 <= value <= most:
            return round(value, 5), source
        if not math.isnan(value):
            refused = f"{source}: {value:.4g} µm/px is implausible and refused"
    return None, refused


def _ome_size(description: str) -> float:
    """PhysicalSizeX in µm, NaN where it is missing or no length."""
    found = dict(re.findall(r'(PhysicalSizeX|PhysicalSizeXUnit)="([^"]+)"', description))
    unit = html.unescape(found.get("PhysicalSizeXUnit", "um"))
    factors = {
        "nm": 1e-3,
        "um": 1,
        "\u00b5m": 1,
        "\u03bcm": 1,
        "mm": 1e3,
        "cm": 1e4,
        "m": 1e6,
    }
    return _number(found.get("PhysicalSizeX", "")) * factors.get(unit, math.nan)


def _number(text: str) -> float:
    """A decimal number, with point or comma; NaN for anything else."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan

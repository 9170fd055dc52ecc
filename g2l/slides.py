"""TODO."""

from __future__ import annotations

import contextlib
import html
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from g2l.errors import PatchError, UserError
from g2l.tiff import Recent, Tiles, assemble

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


def slide_name(path: str | os.PathLike) -> str:
    """File name without the suffixes of slides, images and our own outputs: "a.b.ome.tif" -> "a.b"."""
    suffix = (
        r"(\.ome)?\.(svs|tiff?|ndpi|mrxs|scn|svslide|bif|vms|vmu|dcm|czi|png|jpe?g|bmp|h5|tar)$"
    )
    name = os.fsencode(Path(path).name).decode(
        "utf-8", "replace"
    )  # not every file system speaks UTF-8
    return re.sub(suffix, "", name, flags=re.IGNORECASE)


@dataclass
class _Level:
    """One pyramid level. `number` is OpenSlide's, -1 where OpenSlide does not see it. `shrink` is the scale at which
    tiles are decoded: levels that no file holds, good enough to look for tissue."""

    width: int
    height: int
    downsample: float
    number: int
    tiles: Tiles | None = None
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
                    level.tiles = page and Tiles.of(page)
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
                    level.tiles = Tiles.of(page)
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

"""Readers of slide files, each one class with the same few names, so that another is one more.

`open_reader` picks one: OpenSlide first, whose pixels are what this project promises; where it does
not know the format tifffile, then FastSlide (other pixels by up to 49 grey levels where both read).
"""

import contextlib
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from g2l.errors import PatchError, UserError
from g2l.tiff import Place, Recent, assemble, read_bytes

# Images without pyramid: opened by a Slide, not looked for in folders of slides.
PLAIN = (".png", ".jpg", ".jpeg", ".bmp")
MEND = "make it a slide by vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
TILE_PX = 1 << 26  # at most of a tile, which a reader holds whole


class Reader:
    """One open file: `properties` by OpenSlide's names, `sizes` (width, height) of its levels."""

    vendor: str
    properties: dict[str, str]
    sizes: Any
    notes: tuple[str, ...] = ()  # what the user should know of the file
    _slide: Any

    def __init__(self, path: Path, cache: int):
        self.path = path
        self.cache = cache
        self._open()
        largest = max(math.prod(self.tile_size(level)) for level in range(len(self.sizes)))
        if largest > TILE_PX:
            raise UserError(f"{path}: has tiles of {largest:,} px; damaged")

    def _open(self) -> None:
        raise NotImplementedError

    def region(self, level: int, place: Place) -> NDArray:
        """(h, w, 3) uint8 in pixels of a level, transparent parts white; PatchError."""
        raise NotImplementedError

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level's tiles, to whose whole number some writers pad it."""
        name = f"openslide.level[{level}].tile-"
        width, height = (self.properties.get(name + side, "1") for side in ("width", "height"))
        return int(width), int(height)

    def close(self) -> None:
        self._slide.close()


class OpenSlideReader(Reader):
    """OpenSlide, which also reads plain images (through Pillow)."""

    def _open(self) -> None:
        import openslide

        plain = self.path.suffix.lower() in PLAIN
        kind = openslide.ImageSlide if plain else openslide.OpenSlide
        self._slide = kind(str(self.path))
        if not plain:
            self._slide.set_cache(openslide.OpenSlideCache(self.cache))
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "image")
        self.sizes = self._slide.level_dimensions

    def region(self, level: int, place: Place) -> NDArray:
        import openslide

        try:
            factor, (x, y, *size) = self._slide.level_downsamples[level], place
            corner = round(x * factor), round(y * factor)
            pixels = np.asarray(self._slide.read_region(corner, level, size))
        except (openslide.OpenSlideError, OSError) as error:
            self._slide.close()
            self._open()  # after a failed read it would answer every call with that error
            raise PatchError(str(error)) from error
        return over_white(pixels)


class TiffReader(Reader):
    """TIFFs that OpenSlide leaves aside: strips, big-endian, WebP, JPEG XL; 8-bit RGB."""

    vendor = "tiff"

    def _open(self) -> None:
        import tifffile

        self._slide = tifffile.TiffFile(self.path)
        self._recent = Recent(self.cache)
        series = self._slide.series
        self._pages = [level.keyframe for level in series[0].levels]
        page = self._pages[0]
        if (page.dtype, int(page.planarconfig)) != (
            np.uint8,
            1,
        ) or page.samplesperpixel < 3:
            raise ValueError("not 8-bit RGB")
        ends = np.add(page.dataoffsets, page.databytecounts)
        if ends.max() > self._slide.filehandle.size:
            raise UserError(f"{self.path}: cut short: it ends within its pixels; copy it again")
        self.sizes = [(page.imagewidth, page.imagelength) for page in self._pages]
        self.properties = {
            "tiff.ImageDescription": page.description,
            "tiff.ResolutionUnit": page.resolutionunit.name,
            "tiff.XResolution": str(page.resolution[0]),
        }
        if len(series) > 1:
            self.notes = (f"holds {len(series)} images, of which the first is taken",)

    def region(self, level: int, place: Place) -> NDArray:
        page = self._pages[level]
        tw = page.imagewidth
        th = min(page.rowsperstrip or page.imagelength, page.imagelength)
        if page.is_tiled:
            tw = page.tilewidth
            th = page.tilelength

        def tile(row, column):
            index = row * -(-page.imagewidth // tw) + column
            return self._recent.get((level, index), lambda: self._decode(page, index, tw, th))

        return assemble(tile, (tw, th), place)

    def _decode(self, page: Any, index: int, width: int, height: int) -> NDArray:
        out = np.full((height, width, 3), 255, np.uint8)
        place = page.dataoffsets[index], page.databytecounts[index]
        data = read_bytes(self._slide.filehandle.fileno(), *place)
        if data:
            try:
                pixels = page.decode(data, index, jpegtables=page.jpegtables)[0][0]
            except (RuntimeError, ValueError, struct.error) as error:
                raise PatchError(str(error)) from error
            out[: len(pixels), : pixels.shape[1]] = over_white(pixels)
        return out


class FastSlideReader(Reader):
    """FastSlide, if installed: CZI, iSyntax, VSI, QPTIFF and what else OpenSlide does not know."""

    def _open(self) -> None:
        import fastslide

        self._slide = slide = fastslide.FastSlide.from_file_path(str(self.path))
        if not slide or not slide.level_count or slide.dtype != "uint8" or slide.num_channels < 3:
            raise ValueError("FastSlide knows no 8-bit RGB picture in it")
        self.vendor = f"fastslide {slide.format}"
        self.sizes = slide.level_dimensions
        names = "mpp-x", "mpp-y", "bounds-x", "bounds-y", "objective-power"
        power = slide.properties.get("objective_magnification", "")
        values = (*slide.mpp, *slide.bounds[0], power)
        self.properties = {f"openslide.{n}": str(v) for n, v in zip(names, values, strict=True)}
        if slide.num_images * slide.z_count * slide.t_count > 1:
            kinds = f"{slide.num_images} images, {slide.z_count} planes, {slide.t_count} times"
            self.notes = (f"holds {kinds}, of each the first is taken",)

    def region(self, level: int, place: Place) -> NDArray:
        try:
            return over_white(self._slide.read_region(place[:2], level, place[2:]).numpy())
        except RuntimeError as error:
            raise PatchError(str(error)) from error


def over_white(pixels: NDArray) -> NDArray:
    """(h, w, 3) uint8 of (h, w, 3 or 4) on white ground."""
    rgb = pixels[..., :3]
    alpha = pixels[..., 3:]
    if (alpha == 255).all():  # so too where there is none
        return np.ascontiguousarray(rgb)
    return (255 - (255 - rgb.astype(np.uint16)) * alpha // 255).astype(np.uint8)


def open_reader(path: Path, cache: int) -> Reader:
    """The reader of a slide; UserError where it cannot be opened."""
    import openslide

    _complain_early(path)
    try:
        return OpenSlideReader(path, cache)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large to be held whole ({error}); {MEND}") from error
    except (openslide.OpenSlideError, OSError) as error:
        what = str(error)
    if "nsupported" in what:
        for kind in (TiffReader, FastSlideReader):
            with contextlib.suppress(ImportError, OSError, ValueError, RuntimeError, LookupError):
                return kind(path, cache)
        _complain_of_pictures(path)
    if "nsupported or missing" in what:
        what = "not a slide format that OpenSlide knows"
    raise UserError(f"{path}: cannot be opened ({what}); cut short, damaged or no slide")


def _complain_early(path: Path) -> None:
    """What OpenSlide would call "unsupported or missing", in words that help."""
    if not path.is_file():
        raise UserError(f"{path}: no such file" + " (dead link)" * path.is_symlink())
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: empty file; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: Git LFS pointer, not the slide itself; run `git lfs pull`")
    index = path
    if path.suffix.lower() == ".mrxs":
        index = path.with_suffix("") / "Slidedat.ini"
        if not index.is_file():
            raise UserError(f"{path}: the MIRAX data folder {path.stem}/ is missing beside it")
    elif path.suffix.lower() not in (".vms", ".vmu"):
        return
    named = r"^ *(?:FILE_\d+|ImageFile[^=]*?) *= *(.+?)\s*$"
    for name in re.findall(named, index.read_text(errors="replace"), re.MULTILINE):
        part = index.parent / name
        if not part.is_file() or not part.stat().st_size:
            raise UserError(f"{path}: its data file {name} is missing or empty; copy it again")


def _complain_of_pictures(path: Path) -> None:
    """UserError for a sound picture that is no slide; nobody should search it for damage."""
    with (
        contextlib.suppress(OSError, Image.DecompressionBombError),
        Image.open(path) as picture,
    ):
        tags = getattr(picture, "tag_v2", ())
        if 322 not in tags:  # TileWidth: such a TIFF may be a slide cut short
            what = f"a {picture.format} picture, no slide with tiles"
            raise UserError(f"{path}: {what}; {MEND}")

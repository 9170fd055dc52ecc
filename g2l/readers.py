"""Readers of slide files, each one class with the same few names, so that another is one more.

A reader has `vendor`, `properties` (OpenSlide's names), `sizes` and `downsamples` of its levels,
`region(level, x, y, w, h)` in pixels of that level, and `close()`. `open_reader` picks one.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from g2l.errors import PatchError, UserError

# Images without pyramid: opened by a Slide, not looked for in folders of slides.
PLAIN = (".png", ".jpg", ".jpeg", ".bmp")


class OpenSlideReader:
    """OpenSlide, which also reads plain images (through Pillow)."""

    def __init__(self, path: Path, cache: int):
        self.path, self.cache = path, cache
        self.notes: list[str] = []  # what the user should know of the file
        self._open()
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "image")
        self.sizes = self._slide.level_dimensions
        self.downsamples = self._slide.level_downsamples

    def _open(self) -> None:
        import openslide

        plain = self.path.suffix.lower() in PLAIN
        kind = openslide.ImageSlide if plain else openslide.OpenSlide
        self._slide: Any = kind(str(self.path))
        if not plain:
            self._slide.set_cache(openslide.OpenSlideCache(self.cache))

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level's tiles, to whose whole number some writers pad it."""
        name = f"openslide.level[{level}].tile-"
        width, height = (self.properties.get(name + side, "1") for side in ("width", "height"))
        return int(width), int(height)

    def region(self, level: int, x: int, y: int, w: int, h: int) -> NDArray:
        """(h, w, 3) uint8, transparent parts white; PatchError where it cannot be read."""
        import openslide

        factor = self.downsamples[level]
        try:
            place = round(x * factor), round(y * factor)
            pixels = np.asarray(self._slide.read_region(place, level, (w, h)))
        except (openslide.OpenSlideError, OSError) as error:
            self._slide.close()
            self._open()  # after a failed read it would answer every call with that error
            raise PatchError(str(error)) from error
        return over_white(pixels)

    def close(self) -> None:
        self._slide.close()


def over_white(pixels: NDArray) -> NDArray:
    """(h, w, 3) uint8 of (h, w, 4) on white ground."""
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgb)
    return (255 - (255 - rgb.astype(np.uint16)) * alpha // 255).astype(np.uint8)


def open_reader(path: Path, cache: int) -> OpenSlideReader:
    """The reader of a slide; UserError where it cannot be opened."""
    import openslide

    _complain_early(path)
    try:
        return OpenSlideReader(path, cache)
    except (openslide.OpenSlideError, OSError, Image.DecompressionBombError) as error:
        what = str(error)
        if "nsupported or missing" in what:
            what = "not a slide format that OpenSlide knows"
            _complain_of_pictures(path)
        text = f"{path}: cannot be opened ({what}); cut short, damaged or no slide"
        raise UserError(text) from error


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
    with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(path) as picture:
        tags = getattr(picture, "tag_v2", ())
        if 322 not in tags:  # TileWidth: such a TIFF may be a slide cut short
            raise UserError(
                f"{path}: a {picture.format} picture, no slide with tiles; make it one by "
                f"vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
            )

"""Where images come from: files, squares of slides, whole slides; each read when asked for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from g2l.errors import UserError, of_the_machine
from g2l.grid import tile_slide
from g2l.slides import Slide

PATCH = 256  # px, side of the tissue patches of a slide
MPP = 0.25  # and their micrometres per pixel
REGION = 224  # px, side of the patches of a region
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


@dataclass(eq=False)
class ImageSource(Sequence[Any]):
    """Images, or stacks of patches, made when asked for: `make` of each item.

    `files`, one per item where there are any, are watched for changes; `rule` says how the images
    are cut.
    """

    items: Sequence | ndarray
    make: Callable[[Any], Any]
    files: Sequence[Path] = ()
    rule: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return self.make(self.items[i])


class Rows(ImageSource):
    """Some rows of another image source, in the given order."""

    def __init__(self, source: Sequence, rows: ndarray):
        files = getattr(source, "files", ())  # a source that is no files is known by its ids alone
        files = [files[i] for i in rows] if files else []
        super().__init__(rows, source.__getitem__, files, getattr(source, "rule", ""))


class ImageFiles(ImageSource):
    """Image files as (H, W, 3) uint8 arrays; sides below `side` px are padded to it."""

    def __init__(self, files: Sequence[Path], side: int = 1):
        super().__init__(files, functools.partial(read_image, side=side), files)


class Regions(ImageSource):
    """Images larger than a patch, as stacks (n, side, side, 3) of a centred grid without overlap.

    A side shorter than a patch is first padded to it by repeating its edge; what the grid leaves
    over is not used.
    """

    def __init__(self, files: Sequence[Path], side: int = REGION):
        super().__init__(files, functools.partial(cut_up, side=side), files, f"grid {side}")


class Squares(ImageSource):
    """Squares of `size` level-0 pixels of slides or large images at (file, x, y).

    They are read as `side` pixels. One file stays open, as neighbours in the list share it.
    """

    def __init__(
        self, squares: Sequence[tuple[Path, int, int]], size: int, side: int | None = None
    ):
        self.items = squares
        self.files = [file for file, _, _ in squares]
        self.rule = f"squares {size}"
        self.size = size
        self.side = side or size
        self.slide: Slide | None = None  # the open one

    def __getstate__(self) -> dict:
        return self.__dict__ | {"slide": None}  # open files do not travel to workers

    def __getitem__(self, i: Any) -> Any:
        file, x, y = self.items[i]
        if self.slide is None or self.slide.path != file:
            self.slide = open_slide(file)
        return self.slide.read(x, y, self.size, self.side)


class SlidePatches(ImageSource):
    """Whole slides, each as a lazy stack of its tissue patches, found as tile.py finds them."""

    def __init__(self, files: Sequence[Path]):
        super().__init__(files, tissue_of, files, f"tissue {PATCH} at {MPP}")


def tissue_of(file: Path) -> Squares:
    """The tissue patches of a slide; OSError for one without."""
    with open_slide(file) as slide:
        try:
            tiling = tile_slide(slide, mpp=MPP, patch_size=PATCH)
        except UserError as error:  # named, counted and passed over like any unreadable image
            raise OSError(f"{slide.name}: {error}") from error
    squares = [(file, int(x), int(y)) for x, y in tiling.coords]
    return Squares(squares, tiling.size0, tiling.patch_size)


def open_slide(file: Path) -> Slide:
    """The slide in a file; OSError for what cannot be opened, so that it counts as unreadable."""
    try:
        return Slide(file)
    except UserError as error:
        raise OSError(str(error)) from error


def read_image(file: Path, side: int = 1) -> ndarray:
    """An image of 8 bits a channel as (H, W, 3) uint8, transparent parts white.

    Sides below `side` px are padded to it: what is missing repeats the edge, half on each end.
    Raises OSError for anything else.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would turn nearly all of it white
                raise OSError(f"{file}: more than 8 bits a pixel; save it with 8 bits a channel")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                pixels = np.array(Image.alpha_composite(white, image.convert("RGBA")))[..., :3]
            else:
                pixels = np.array(image.convert("RGB"))
    # Pillow's other words for a bad file
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"{file}: {error}") from error
    if min(pixels.shape[:2]) >= side:
        return pixels
    lack = [max(0, side - n) for n in pixels.shape[:2]]
    return np.pad(pixels, [*((n // 2, n - n // 2) for n in lack), (0, 0)], mode="edge")


def read_mask(file: Path) -> ndarray:
    """Classes (H, W) of a mask's pixels: its values, of which 0 is no class (-1); UserError for
    what cannot be read or has more than one channel.
    """
    try:
        with Image.open(file) as image:
            mask = np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if of_the_machine(error):
            raise
        raise UserError(f"{file}: no mask ({error})") from error
    if mask.ndim != 2:
        raise UserError(f"{file}: expected one channel of class values, found shape {mask.shape}")
    return np.where(mask == 0, -1, mask)


def class_shares(classes: ndarray, side: int, values: Sequence[int]) -> ndarray:
    """Share (values, rows, columns) that each value covers of the squares of a class map (H, W)."""
    rows = classes.shape[0] // side
    columns = classes.shape[1] // side
    whole = classes[: rows * side, : columns * side]
    squares = whole.reshape(rows, side, columns, side)
    return np.stack([(squares == value).mean((1, 3)) for value in values])


def cut_up(file: Path, side: int) -> ndarray:
    """The patches (n, side, side, 3) of a centred grid over an image."""
    image = read_image(file, side)
    top, left = (n % side // 2 for n in image.shape[:2])
    windows = sliding_window_view(image, (side, side, 3))[top::side, left::side]
    return windows.reshape(-1, side, side, 3)

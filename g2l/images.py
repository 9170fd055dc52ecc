"""TODO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from g2l.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


class ImageSource(Sequence):
    """Images, or stacks of patches, made when asked for: `make` of each item.

    `files`, one per item where there are any, are watched for changes; `rule` says how the images are cut.
    """

    def __init__(self, items: Sequence, make: Callable, files: Sequence[Path] = (), rule: str = ""):
        self.items, self.make, self.files, self.rule = items, make, list(files), rule

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.make(self.items[i])


class Rows(ImageSource):
    """Some rows of another image source, in the given order."""

    def __init__(self, source: Sequence, rows: np.ndarray):
        files = getattr(source, "files", ())  # a source that is no files is known by its ids alone
        super().__init__(
            rows,
            source.__getitem__,
            [files[i] for i in rows] if files else (),
            getattr(source, "rule", ""),
        )


class ImageFiles(ImageSource):
    """Image files as (H, W, 3) uint8 arrays; sides below `side` px are padded to it."""

    def __init__(self, files: Sequence[Path], side: int = 1):
        super().__init__(files, functools.partial(read_image, side=side), files)


class Regions(ImageSource):
    """Images larger than a patch, as stacks (n, side, side, 3) of the patches of a centred grid without overlap.

    A side shorter than a patch is first padded to it by repeating its edge; what is left over by the grid is not used.
    """

    def __init__(self, files: Sequence[Path], side: int = 224):
        super().__init__(files, functools.partial(cut_up, side=side), files, f"grid {side}")


class Squares(ImageSource):
    """Squares of `size` level-0 pixels cut from slides or large images at (file, x, y), read as `side` pixels.

    One file stays open, as neighbours in the list share it.
    """

    def __init__(
        self, squares: Sequence[tuple[Path, int, int]], size: int, side: int | None = None
    ):
        self.items, self.files, self.rule = (
            squares,
            [file for file, _, _ in squares],
            f"squares {size}",
        )
        self.size, self.side, self.slide = size, side or size, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"slide": None}  # open files do not travel to workers

    def __getitem__(self, i: int) -> np.ndarray:
        file, x, y = self.items[i]
        if self.slide is None or self.slide.path != file:
            self.slide = open_slide(file)
        return self.slide.read(x, y, self.size, self.side)


class SlidePatches(ImageSource):
    """Whole slides, each as a lazy stack of its tissue patches, found as tile.py finds them."""

    def __init__(self, files: Sequence[Path], mpp: float = 0.25, patch_size: int = 256):
        super().__init__(
            files,
            functools.partial(tissue_of, mpp=mpp, patch_size=patch_size),
            files,
            f"tissue {patch_size} at {mpp}",
        )


def tissue_of(file: Path, mpp: float, patch_size: int) -> Squares:
    """The tissue patches of a slide; OSError for one without."""
    from g2l.grid import tile_slide

    with open_slide(file) as slide:
        try:
            tiling = tile_slide(slide, mpp=mpp, patch_size=patch_size)
        except (
            UserError
        ) as error:  # skipped: named, counted and passed over like any unreadable image
            raise OSError(f"{slide.name}: {error}") from error
    return Squares(
        [(file, int(x), int(y)) for x, y in tiling.coords], tiling.size0, tiling.patch_size
    )


def open_slide(file: Path):
    """tile.Slide of a file; what it cannot open raises OSError, so that it counts as an unreadable image."""
    from g2l.slides import Slide

    try:
        return Slide(file)
    except UserError as error:
        raise OSError(str(error)) from error


def read_image(file: Path, side: int = 1) -> np.ndarray:
    """An image of 8 bits a channel as (H, W, 3) uint8, transparent parts white; OSError for anything else.

    Sides below `side` px are padded to it: what is missing repeats the edge, half on each end.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(
                ("I", "F")
            ):  # Pillow would turn nearly all of it white without a word
                raise OSError(f"{file}: more than 8 bits a pixel; save it with 8 bits a channel")
            if image.has_transparency_data:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            pixels = np.array(image.convert("RGB"))
    except (
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's other words for a bad file
        raise OSError(f"{file}: {error}") from error
    lack = [max(0, side - n) for n in pixels.shape[:2]]
    return (
        np.pad(pixels, [(n // 2, n - n // 2) for n in lack] + [(0, 0)], mode="edge")
        if any(lack)
        else pixels
    )


def cut_up(file: Path, side: int) -> np.ndarray:
    """The patches (n, side, side, 3) of a centred grid over an image."""
    image = read_image(file, side)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    top, left = (image.shape[0] % side) // 2, (image.shape[1] % side) // 2
    image = image[top : top + rows * side, left : left + columns * side]
    return image.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)

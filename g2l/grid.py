"""The grid of patches on a slide: which size, where there is tissue, which are good enough.

`tile_slide` reads as its steps: look at the slide at low power, find the tissue, lay the grid,
measure each patch, drop what is inked or blurred.
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from g2l.colours import ColourSums
from g2l.errors import PatchError, SkippedSlide, UserError
from g2l.slides import Slide
from g2l.tissue import find_tissue, mean_in_squares, measure_blur, read_mask

MASK_PX = 8  # side of a patch in pixels of the tissue mask
SAMPLE = 64  # patches that are read to see whether a slide is sound
COARSE = 16  # µm, side of such a pixel at most
OVERVIEW = 8e6  # pixels that a slide at low power may have


@dataclass
class Tiling:
    """What tile_slide found. Arrays have one entry per patch kept."""

    coords: NDArray  # (N, 2) int64, level-0 x, y of the top-left corner
    size0: int  # side of a patch in level-0 pixels
    patch_size: int  # side of a patch in output pixels
    mpp: float  # µm per output pixel
    measures: dict[str, NDArray]  # (N,) float32 each: share of tissue, of pen; blur in patch px
    mask: NDArray  # (h, w) bool, tissue
    image: NDArray  # (h, w, 3) uint8
    scale: float  # level-0 pixels of a pixel of mask and image
    summary: dict[str, float]  # fractions for slides.csv
    warnings: list[str]
    unreadable: list[str]  # patches left out, where and why
    colours: ColourSums  # of a sample of the patches

    @functools.cached_property
    def outlines(self) -> list[list[NDArray]]:
        """Polygons of the mask in its pixels (edges are whole numbers): outer ring, then holes."""
        from contourpy import FillType, contour_generator

        padded = np.pad(self.mask.astype(np.float32), 1)
        generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
        polygons = []
        for corners, starts in zip(*generator.filled(0.5, 2), strict=True):
            polygons.append([corners[a:b] - 0.5 for a, b in pairwise(starts)])
        return polygons

    def take(self, kept: NDArray | list[int]) -> None:
        """Keep these patches only (a mask or numbers)."""
        self.coords = self.coords[kept]
        self.measures = {name: values[kept] for name, values in self.measures.items()}


def choose_size(
    slide: Slide, mpp: float, patch_size: int, resample: bool, enlarge: bool = False
) -> tuple[int, float]:
    """Level-0 side of a patch and the µm per output pixel that results.

    A slide within 20 % of the target is taken as it is (0.2 to 0.3 µm/px is 40x); others only with
    `resample`, and enlarged more than 1.5 times only with `enlarge` too. SkippedSlide when the
    slide does not fit.
    """
    if slide.mpp is None:
        raise SkippedSlide(slide.mpp_source or "no µm per pixel in the file", mend="mpp")
    if 0.8 * mpp - 1e-9 <= slide.mpp <= 1.2 * mpp + 1e-9:
        return patch_size, slide.mpp
    kind = "coarser" if slide.mpp > mpp else "finer"
    text = f"{slide.mpp:.4g} µm/px is {kind} than {mpp:g} (± 20 %)"
    if not resample:
        raise SkippedSlide(text, mend="magnification")
    if slide.mpp > 1.5 * mpp and not enlarge:
        text += f", and enlarging it {slide.mpp / mpp:.2g} times adds no detail"
        raise SkippedSlide(text, mend="enlarge")
    size0 = max(1, round(patch_size * mpp / slide.mpp))
    return size0, slide.mpp * size0 / patch_size


def tile_slide(
    slide: Slide,
    *,
    mpp: float = 0.25,
    patch_size: int = 256,
    min_tissue: float = 0.5,
    resample: bool = False,
    enlarge: bool = False,
    overlap: int = 0,
    max_pen: float = 0.1,
    max_blur: float = 3.5,
    mask: Path | None = None,
) -> Tiling:
    """Find the tissue of a slide and the grid of patches on it.

    `mpp` µm per pixel wanted, `patch_size` and `overlap` in output pixels; limits for a patch:
    share of tissue and of pen, blur in patch pixels; `mask`: the user's own tissue (see read_mask)
    instead of ours. The grid begins at level 0's corner, where the compressed tiles do, and only
    whole patches are taken. Raises SkippedSlide (another magnification or none, no tissue) and
    UserError (cannot be used at all).
    """
    size0, got = choose_size(slide, mpp, patch_size, resample, enlarge)
    if min(slide.width, slide.height) < size0:
        raise SkippedSlide(
            f"smaller ({slide.width} x {slide.height} px) than one patch of {size0} px"
        )
    _check_length(slide)
    image, scale = _overview(slide, size0)
    side = size0 / scale
    tissue_mask, pen_mask = find_tissue(image, smallest=side**2 / 4)
    if max_pen == 1:  # a stain of the colour of ink
        tissue_mask |= pen_mask
    if mask:
        tissue_mask = read_mask(mask, tissue_mask.shape, scale, slide.origin)

    coords = _lay_grid(slide, size0, size0 * (patch_size - overlap) / patch_size)
    tissue = mean_in_squares(tissue_mask, coords / scale, side)
    found = tissue >= (max(min_tissue, 1e-6) if min_tissue > 0 else 0)
    if not found.any():
        raise _no_tissue(tissue_mask, pen_mask, min_tissue)
    coords = coords[found]
    measures = {
        "tissue": tissue[found],
        "pen": mean_in_squares(pen_mask, coords / scale, side),
        "blur": measure_blur(slide, coords, size0, patch_size),
    }
    bad = {"pen": measures["pen"] > max_pen, "blur": measures["blur"] > max_blur}
    keep, warnings = _keep(bad)
    colours = ColourSums()
    unreadable = _unreadable(slide, coords, keep, size0, colours)
    summary = {
        "tissue": tissue_mask.mean(),
        "pen": pen_mask.sum() / max((tissue_mask | pen_mask).sum(), 1),
        "blur": bad["blur"].mean(),
    }
    measures = {name: values[keep].astype(np.float32) for name, values in measures.items()}
    seen = measures, tissue_mask, image, scale
    told = summary, _doubts(slide) + warnings, unreadable, colours
    return Tiling(coords[keep], size0, patch_size, got, *seen, *told)


def _check_length(slide: Slide) -> None:
    """UserError where tiles of level 0 lie beyond the end of the file."""
    tiles = slide.levels[0].tiles
    if not tiles:
        return
    beyond = int((tiles.offsets + tiles.counts > slide.file.size).sum())
    if beyond:
        raise UserError(
            f"{slide.path}: cut short: {beyond} of {len(tiles.counts)} tiles lie beyond the end of "
            f"the file; copy or download it again"
        )


def _overview(slide: Slide, size0: int) -> tuple[NDArray, float]:
    """(h, w, 3) uint8 of the whole slide at low power, and its level-0 pixels per pixel.

    Raises where it shows at once that there is nothing to find.
    """
    assert slide.mpp is not None
    least = math.sqrt(slide.width * slide.height / OVERVIEW)
    scale = max(min(size0 / MASK_PX, COARSE / slide.mpp), least, 1)
    h = math.ceil(slide.height / scale)
    w = math.ceil(slide.width / scale)
    image = slide.area(0, 0, w * scale, h * scale, w, h, draft=True)
    inside = image[: int(slide.height / scale), : int(slide.width / scale)]
    if inside.min() == 255:
        reason = f" ({slide.damaged[0]})" if slide.damaged else ""
        raise UserError(
            f"{slide.path}: nothing but empty pixels; its data files are missing or damaged{reason}"
        )
    step = 1 + len(inside) // 400
    sample = inside[::step, ::step]
    low = sample.min(axis=2)
    high = sample.max(axis=2)
    seen = high >= 40
    # Stained tissue lets some of every colour through, on a black ground too; dyes glow in one.
    if seen.mean() < 0.5 and not (low[seen] > 0.25 * high[seen]).mean() > 0.5:
        raise SkippedSlide("mostly black: fluorescence or an empty scan, not bright-field")
    return image, scale


def _lay_grid(slide: Slide, size0: int, step: float) -> NDArray:
    """All whole patches (N, 2)."""
    step = max(1, round(step))
    columns = np.arange(0, slide.width - size0 + 1, step)
    rows = np.arange(0, slide.height - size0 + 1, step)
    return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)


def _no_tissue(tissue: NDArray, pen: NDArray, least: float) -> SkippedSlide:
    """Why there is no patch."""
    if tissue.any():
        return SkippedSlide(f"no patch has {least:.0%} of tissue", mend="tissue")
    if pen.mean() > 0.02:
        return SkippedSlide("no tissue found, but much that has the colour of ink", mend="pen")
    return SkippedSlide("no tissue found")


def _keep(bad: dict[str, NDArray]) -> tuple[NDArray, list[str]]:
    """Which patches no measure speaks against, and a warning where few; SkippedSlide where none."""
    keep = ~np.any(list(bad.values()), axis=0)
    shares = ", ".join(f"{values.mean():.0%} for {name}" for name, values in bad.items())
    if not keep.any():
        worst = max(bad, key=lambda name: bad[name].mean())
        raise SkippedSlide(f"all {len(keep)} tissue patches dropped, {shares}", mend=worst)
    if keep.mean() >= 0.5:
        return keep, []
    return keep, [f"{1 - keep.mean():.0%} of the tissue patches dropped: {shares}"]


def _unreadable(
    slide: Slide, coords: NDArray, keep: NDArray, size0: int, colours: ColourSums
) -> list[str]:
    """Which patches cannot be read, and why; they are no longer kept. `colours` sees the others.

    A sample spread over the tissue tells, since a thumbnail shows other levels; where one of it
    fails, all are read. UserError where none is left.
    """
    numbers = np.flatnonzero(keep)
    errors = {}
    for step in (max(1, len(numbers) // SAMPLE), 1):
        slide.expect(coords[numbers[::step]], size0)
        for number in numbers[::step].tolist():
            x, y = coords[number].tolist()
            try:
                colours.add(slide.area(x, y, size0, size0, size0, size0))
            except PatchError as error:
                errors[number] = f"x={x}, y={y}: {error}"
                keep[number] = False
        if not errors:
            return []
    if not keep.any():
        raise UserError(
            f"{slide.path}: none of its {len(errors)} patches can be read, "
            f"{next(iter(errors.values()))}"
        )
    return list(errors.values())


def _doubts(slide: Slide) -> list[str]:
    """What the user should know of a slide that is taken all the same."""
    found = list(slide.notes)
    if slide.mpp and slide.objective and abs(math.log2(slide.mpp * slide.objective / 10)) > 0.5:
        found.append(
            f"objective {slide.objective:g}x disagrees with {slide.mpp:g} µm/px "
            f"({slide.mpp_source}), which is used"
        )
    if lost := slide.damaged:
        found.append(f"{len(lost)} unreadable regions left out, first: {lost[0]}")
    return found

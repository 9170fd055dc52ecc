"""TODO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l.errors import SkippedSlide, UserError
from g2l.slides import Slide
from g2l.tissue import find_tissue, mean_in_squares, measure_blur, read_mask

MASK_PX = 8  # side of a patch in pixels of the tissue mask


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

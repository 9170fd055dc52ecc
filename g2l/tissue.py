"""TODO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from g2l.errors import SkippedSlide, UserError
from g2l.slides import Slide


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


def find_mask(folder: Path, name: str) -> Path:
    """The user's mask of a slide: <slide>.geojson, .json, .png, .tif, .tiff or .jpg in the folder."""
    for suffix in (".geojson", ".json", ".png", ".tif", ".tiff", ".jpg"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise SkippedSlide(f"no mask {name}.geojson or {name}.png in {folder} (--masks)")

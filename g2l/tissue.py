"""Tissue, pen and blur of a slide at low power, and the user's own masks of tissue.

`find_tissue` takes colour relative to the glass, sorts ink out by the stains' optical densities,
and cleans what is left. `measure_blur` looks at the patches. `read_mask` takes the place of the
first where somebody has drawn the tissue.
"""

import json
import re
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from g2l.errors import SkippedSlide, UserError
from g2l.slides import Size, Slide

# Classes of annotations that are not tissue.
NOT_TISSUE = re.compile("(.*: *)?(ignore|background|exclude|art[ei]fact)", re.IGNORECASE)


# Colour, and change of light from pixel to pixel, as shares of the glass's light: less change is
# flat; tissue that is not has at least FAINT colour, flat places with less than GLOW are glass.
FLAT = 0.02
FAINT = 0.035
GLOW = 0.13

# Ratio of the Laplacian's power between octaves, and the blur in patch pixels that leaves it.
BLUR = (
    (0.1, 0.16, 0.215, 0.35, 0.55),
    (6, 4, 3, 2, 0),
)


def find_tissue(image: NDArray, smallest: float) -> tuple[NDArray, NDArray]:
    """Masks (h, w) bool of tissue and pen in a low-power (h, w, 3) uint8 image of an H&E slide.

    Tissue has colour and texture: glass has none, be it white, grey, two greys or black, and in the
    glow of eosin only colour. Tissue and holes in it smaller than `smallest` px are dropped and
    filled.
    """
    planes = [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
    low = reduce(np.minimum, planes)  # many times the speed of image.min(axis=2)
    high = reduce(np.maximum, planes)
    void = (high < 25) & (high - low < 10)  # black borders
    light, density = [], []  # relative to the glass
    for plane, white in zip(planes, _glass(planes, low, high), strict=True):
        through = np.arange(256, dtype=np.float32) / white
        through = np.minimum(through, 1)
        light.append(through.take(plane))
        dense = -np.log10(np.maximum(through, 1 / 255))
        density.append(dense.take(plane))
    # Of neighbours: of tissue 0.05 and more, of faint tissue half of that, of glass below 0.01.
    change = _around(_change(light[1]), np.add) / 9
    pen = _ink(density[0], density[1], density[2], void, change)

    chroma = reduce(np.maximum, light)
    chroma -= reduce(np.minimum, light)
    least = np.where(change > FLAT, FAINT, GLOW)
    mask = _around(chroma, np.add) / 9 > least
    most = _around(chroma, np.maximum)
    mask &= chroma > 0.4 * most  # or what is smoothed widens it
    mask &= ~pen
    mask &= ~_grow(void, 2)  # coloured fringe of compressed black edges
    mask = _grow(mask, 1)
    mask = ~_grow(~mask, 1)
    mask = areas(mask, mask, smallest)
    mask = ~areas(~mask, ~mask, smallest)
    gap = _opened(low == 255)  # stitching gaps and transparent parts are pure white
    mask &= ~(void | pen | gap)
    return mask, pen


def _change(plane: NDArray) -> NDArray:
    """Difference to the pixel above plus that to the pixel at the left."""
    change = np.zeros_like(plane)
    change[1:] = abs(np.diff(plane, axis=0))
    change[:, 1:] += abs(np.diff(plane, axis=1))
    return change


def _glass(planes: list[NDArray], low: NDArray, high: NDArray) -> list[float]:
    """Red, green, blue of the empty glass, which is flat and brighter than what lies on it.

    A tinted or dim lamp is no colour of the tissue. Pure white is no glass: it was not scanned.
    """
    green = planes[1].astype(np.int16)
    flat = (low > 60) & (low < 254)
    flat &= high - low < 64
    flat &= _change(green) <= 3
    share = flat.mean()
    if share <= 0.01:
        return [245, 245, 245]
    bright = np.percentile(green[flat], 90) - 20
    flat &= green >= bright
    tint = [float(np.median(plane[flat])) for plane in planes]
    # Where there is little of it, it may be pale tissue: not to be corrected away.
    least = 0.8 if share > 0.1 else 0.94
    least *= max(tint)
    return [max(value, least) for value in tint]


def _ink(
    red: NDArray,
    green: NDArray,
    blue: NDArray,
    void: NDArray,
    change: NDArray,
) -> NDArray:
    """Mask of pen strokes by optical densities.

    Ink absorbs where neither haematoxylin nor eosin does (their densities: Ruifrok and Johnston
    2001): in any mixture of the two stains red <= 1.15 green and blue <= 0.7 green or so.
    """
    most = np.maximum(green, 1e-6)
    red_share = red / most
    blue_share = blue / most
    pen = red > 1.15 * green + 0.08  # blue, green, turquoise
    plain = (change < FLAT) | (blue_share < 0.3)  # dense haematoxylin is neither
    dark = (red_share > 0.97) & (red > 0.7)
    pen |= dark & plain  # dark blue
    pen |= blue > 1.1 * green + 0.08  # yellow, orange
    mixed = (blue_share > 0.8) & (red_share > 0.6)  # black, brown, green on tissue
    pen |= mixed & (green > 0.3)
    pure = (blue_share > 0.65) & (red_share < 0.25)  # red
    pen |= pure & (green > 0.65)
    pen = _opened(pen & ~void)
    pen = areas(pen, pen, 12)
    # A stroke has weaker parts, and a pale rim.
    weak = (red_share > 0.93) & (red > 0.3)
    pure = (blue_share > 0.6) & (red_share < 0.3)
    weak |= pure & (green > 0.4)
    return _grow(areas(pen | weak, pen, 1), 3)


def _around(plane: NDArray, gather: np.ufunc) -> NDArray:
    """What `gather` makes of each pixel and its eight neighbours, at edges of those beside them."""
    wide = np.pad(plane, 1, "edge")
    rows = gather(wide[:-2], wide[1:-1])
    rows = gather(rows, wide[2:])
    sides = gather(rows[:, :-2], rows[:, 1:-1])
    return gather(sides, rows[:, 2:])


def _grow(mask: NDArray, by: int) -> NDArray:
    """The mask dilated by a square of side 2 by + 1."""
    for _ in range(by):
        mask = _around(mask, np.logical_or)
    return mask


def _opened(mask: NDArray) -> NDArray:
    """The squares of 2 px that lie within the mask; narrower marks are chance."""
    from scipy import ndimage

    return ndimage.binary_opening(mask, np.ones((2, 2)))


def areas(mask: NDArray, counted: NDArray, least: float) -> NDArray:
    """The connected areas of a mask (by edges) that hold at least `least` px of `counted`."""
    from scipy import ndimage

    labels, number = ndimage.label(mask)
    held = np.bincount(labels[counted], minlength=number + 1)
    return mask & (held >= least)[labels]


def mean_in_squares(mask: NDArray, places: NDArray, side: float) -> NDArray:
    """(N,) mean of an (h, w) mask in squares of `side` at `places` (N, 2; x, y).

    All in its pixels and not necessarily whole; beyond its edges it is 0.
    """
    lefts, column = np.unique(places[:, 0], return_inverse=True)
    tops, row = np.unique(places[:, 1], return_inverse=True)
    bands = _sums_of_rows(mask, tops, side)
    inside = _sums_of_rows(bands.T, lefts, side)
    return inside[column, row] / side**2


def _sums_of_rows(values: NDArray, starts: NDArray, side: float) -> NDArray:
    """(N, w) sums of the rows of (h, w) from each of N starts on, as far as `side` goes."""
    total = np.zeros((len(values) + 1, values.shape[1]))
    for above, row, line in zip(total, total[1:], values, strict=False):
        np.add(above, line, out=row)  # several times the speed of cumsum(axis=0)
    ends = np.clip([starts, starts + side], 0, len(values))
    whole = np.minimum(ends.astype(int), len(values) - 1)
    part = (ends - whole)[..., None]
    first, last = total[whole] + part * values[whole]
    return last - first


def measure_blur(slide: Slide, coords: NDArray, size0: int, patch_size: int) -> NDArray:
    """(N,) blur of patches, as the sigma of a Gaussian in patch pixels (0 to 6).

    Measured at a quarter of their scale. The ratio of the Laplacian's power between two
    neighbouring octaves hardly depends on what the tissue is: on H&E from 0.25 to 2 µm/px it was
    0.4 and more when sharp, and as below after Gaussian blur of sigma 2, 3, 4 and 6.
    """
    side = max(8, patch_size // 8 * 2)  # px of a patch when measured
    factor = size0 / side
    blur = np.zeros(len(coords), np.float32)
    _, blocks = np.unique(coords // (16 * size0), axis=0, return_inverse=True)
    for block in range(blocks.max() + 1):
        members = np.flatnonzero(blocks == block)
        origin = coords[members].min(axis=0)
        places = coords[members] - origin
        places = (places / factor).round().astype(int)
        x0, y0 = origin.tolist()
        w, h = (places.max(axis=0) + side).tolist()
        image = slide.area(x0, y0, w * factor, h * factor, w, h, draft=True)
        green = image[..., 1].astype(np.float32)
        squares = sliding_window_view(green, (side, side))
        fine = squares[places[:, 1], places[:, 0]]
        halved = fine[:, ::2] + fine[:, 1::2]
        coarse = halved[..., ::2] + halved[..., 1::2]
        # 10: noise of compression, all that strong blur leaves.
        sharp = np.maximum(_laplacian_power(fine, 2) - 10, 0)
        ratio = sharp / np.maximum(_laplacian_power(coarse / 4), 1)
        blur[members] = np.interp(ratio, *BLUR)
    return blur


def _laplacian_power(images: NDArray, step: int = 1) -> NDArray:
    """(n,) mean squared 4-neighbour Laplacian of (n, h, w) images, of every `step`-th row."""
    rows = images[:, 1:-1:step]
    above = images[:, :-2:step]
    below = images[:, 2::step]
    inner = 4 * rows[..., 1:-1]
    inner -= above[..., 1:-1]
    inner -= below[..., 1:-1]
    inner -= rows[..., :-2]
    inner -= rows[..., 2:]
    return np.einsum("nij,nij->n", inner, inner) / inner[0].size


def read_mask(path: Path, shape: Size, scale: float, origin: Size = (0, 0)) -> NDArray:
    """(h, w) bool tissue from the user's own mask; a pixel of the result has `scale` level-0 px.

    GeoJSON polygons in level-0 pixels from `origin` (Slide.origin), as QuPath exports them; those
    of a class that means "not this" are cut out. Or an image of the whole slide, of any size and
    the slide's aspect, not 0 where there is tissue (a JPEG: at least half its largest value).
    """
    if path.suffix.lower() in (".geojson", ".json"):
        return _draw_polygons(path, shape, scale, origin)
    try:
        with Image.open(path) as picture:
            # Labels as stored: neither a palette's colours nor transparency.
            plain = picture.mode in ("1", "L", "P", "I", "I;16", "F")
            labels = np.asarray(picture if plain else picture.convert("RGB"))
            lossy = picture.format == "JPEG"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a mask ({error})") from error
    values = np.atleast_3d(labels).max(axis=2)
    height, width = values.shape
    aspect = width / height * shape[0] / shape[1]
    if abs(aspect - 1) > 0.02 + 2 / min(*values.shape, *shape):
        raise UserError(
            f"{path}: {width} x {height} px, another aspect than the slide's"
            "; a mask covers the whole slide"
        )
    least = values.max() / 2 if lossy else 0
    tissue = Image.fromarray(values > least)
    return np.asarray(tissue.resize(shape[::-1], Image.Resampling.NEAREST))


def _draw_polygons(path: Path, shape: Size, scale: float, origin: Size) -> NDArray:
    """Each polygon on its own, so that a hole erases only what is its own."""
    drawn = {wanted: np.zeros(shape, bool) for wanted in (True, False)}
    try:
        features = json.loads(path.read_bytes())
        for polygon, wanted in _polygons(features):
            piece = Image.new("1", shape[::-1])
            draw = ImageDraw.Draw(piece)
            for number, ring in enumerate(polygon):  # the outer ring, then holes
                corners = np.array([point[:2] for point in ring], float)
                corners = (corners + origin) / scale - 0.5
                if not (abs(corners) < 1e6).all():  # not NaN either
                    raise ValueError("coordinates that are no numbers or lie far outside")
                draw.polygon(corners.ravel().tolist(), fill=int(number == 0))
            drawn[wanted] |= np.asarray(piece)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: expected GeoJSON polygons in level-0 pixels ({error})") from error
    return drawn[True] & ~drawn[False]


def _polygons(node, wanted=True):
    """The polygons below a GeoJSON node, each a list of rings, and whether its class is wanted."""
    if isinstance(node, list):
        for part in node:
            yield from _polygons(part, wanted)
        return
    wanted = wanted and not NOT_TISSUE.match(_class_of(node))
    if node["type"] == "Polygon":
        yield node["coordinates"], wanted
    elif node["type"] == "MultiPolygon":
        for polygon in node["coordinates"]:
            yield polygon, wanted
    else:
        below = node.get("features") or node.get("geometry") or node.get("geometries")
        yield from _polygons(below or [], wanted)


def _class_of(node: dict) -> str:
    """The name of a feature's class, as QuPath writes it, after those above it; "" for none."""
    kind = (node.get("properties") or {}).get("classification") or {}
    return ": ".join(kind.get("names") or [kind.get("name") or ""])


def find_mask(folder: Path, name: str) -> Path:
    """The user's mask of a slide: <slide>.geojson, .json, .png, .tif, .tiff or .jpg there."""
    for suffix in (".geojson", ".json", ".png", ".tif", ".tiff", ".jpg"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise SkippedSlide(f"no mask {name}.geojson or {name}.png in {folder}", mend="masks")

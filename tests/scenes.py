"""Scenes at low power whose tissue is known, since they are put together: real or drawn tissue, cut
out whole, on glass of any tint, in the glow of eosin, on black, under pen, faded or overstained.

`scenes` yields them, `score` counts patches as tile.py keeps them. `python tests/scenes.py` prints
both shares for each kind.
"""

import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import SHARED
from synthetic import stained

from g2l.slides import Slide
from g2l.tissue import find_tissue, mean_in_squares

SIDE, CANVAS = 8, 256  # px of a patch and of a scene
REAL = {  # slide: pixels of it in one of the scene, boxes that are tissue all over (left, top, ...)
    "slides/CMU-1-Small-Region.svs": (20, [(46, 50, 54, 76), (52, 35, 66, 72)]),
    "slides/TCGA-CR-7395-01A-01-TS1.svs": (12, [(40, 110, 110, 200), (270, 190, 340, 270)]),
    "odd/gcp_camelyon_jpeg.dcm": (1, [(165, 225, 240, 335), (765, 296, 815, 410)]),
}
TINTS = {
    "white": (245, 245, 245),
    "cream": (250, 243, 222),
    "yellow": (250, 240, 210),
    "pink": (245, 215, 228),
    "blue": (210, 225, 240),
    "grey": (162, 161, 163),
    "dark": (122, 121, 123),
}
INKS = [
    (50, 80, 190),
    (40, 140, 70),
    (210, 30, 40),
    (35, 35, 40),
    (30, 40, 170),
    (230, 210, 60),
]


def tissues():
    """Name and share of light let through, (h, w, 3), of tissue without holes."""
    yield "drawn", np.asarray(Image.fromarray(stained(1280, 1280)).reduce(16)) / 245.0
    for file, (zoom, boxes) in REAL.items() if SHARED else ():
        with Slide(SHARED / file) as slide:
            w, h = slide.width // zoom, slide.height // zoom
            image = slide.area(0, 0, w * zoom, h * zoom, w, h, draft=True)
        for left, top, right, bottom in boxes:
            part = image[top:bottom, left:right] / 245.0
            yield f"{Path(file).stem[:8]} {left}", np.minimum(part, 1)


def on_glass(part, tint=(245, 245, 245), fade=1.0, glow=0.0, seed=0):
    """(image, truth) of two pieces of tissue, an ellipse and a strip, with a hole in the first."""
    h, w = part.shape[:2]
    light = np.pad(part, ((0, max(0, CANVAS - h)), (0, max(0, CANVAS - w)), (0, 0)), "symmetric")
    light = light[:CANVAS, :CANVAS] ** fade
    y, x = np.mgrid[:CANVAS, :CANVAS]
    truth = np.hypot((x - 100) / 70, (y - 120) / 90) < 1
    truth &= np.hypot(x - 100, y - 110) > 22
    truth |= (abs(x - 215) < 18) & (abs(y - 128) < 100)
    for place, width in ((52, 9), (70, 12), (139, 17)):  # clefts
        truth &= (abs(x - place) > width / 2) | (abs(y - 128) > 60)
    light = np.where(truth[..., None], light, 1.0)
    if glow:  # light scattered by the stain around
        blurred = ndimage.gaussian_filter(1 - light, (10, 10, 0))
        light = np.where(truth[..., None], light, 1 - glow * blurred)
    image = np.array(tint) * light
    return image + np.random.default_rng(seed).normal(0, 0.5, image.shape), truth


def scenes(part):
    """(kind, image, truth) of everything that one piece of tissue is tried on."""
    for name, tint in TINTS.items():
        yield f"tint {name}", *on_glass(part, tint)
    for fade in (0.5, 0.3, 0.2):
        yield f"faded {fade}", *on_glass(part, (243, 243, 244), fade)
        yield "faded on cream", *on_glass(part, (250, 243, 222), fade)
    for glow in (0.3, 0.6, 0.9):
        yield f"glow {glow}", *on_glass(part, (247, 243, 246), glow=glow)
    for fade in (1.4, 1.8, 2.5):
        yield "overstained", *on_glass(part, (243, 243, 244), fade)
    yield "underexposed", *on_glass(part, (110, 110, 110))
    yield "underexposed", *on_glass(part, (73, 73, 73))
    image, truth = on_glass(part)
    image[~truth] = 0
    yield "cut out on black", image, truth
    image, truth = on_glass(part)
    image[:, :128] = 1
    yield "half black", image, truth & (np.arange(CANVAS) >= 128)
    ducts = np.hypot(*(np.mgrid[:CANVAS, :CANVAS] % 40 - 20)) < 12  # dense haematoxylin
    grain = np.random.default_rng(1).normal(1, 0.1, (CANVAS, CANVAS, 1))
    for red in (0.87, 0.92, 0.98):
        image, truth = on_glass(part)
        dense = 245 * 10 ** -(np.array([red, 0.92, 0.42]) * grain)
        image[ducts & truth] = dense[ducts & truth]
        yield f"dense ducts {red}", image, truth
    for number, ink in enumerate(INKS):
        image, truth = on_glass(part, seed=number)
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        stroke = Image.new("1", picture.size)
        for canvas, fill in ((picture, ink), (stroke, 1)):
            line = [(10, 30 + 20 * number), (120, 60 + 20 * number), (246, 20 + 20 * number)]
            ImageDraw.Draw(canvas).line(line, fill, 7)
        yield "pen", np.asarray(picture), truth & ~np.asarray(stroke)


def ihc(h, e, d):
    """A drawn stain of haematoxylin, eosin and DAB, hardly structured at low power."""
    rng = np.random.default_rng(1)
    nuclei = ndimage.gaussian_filter(rng.random((640, 640)), 4)
    nuclei = ndimage.gaussian_filter((nuclei > np.quantile(nuclei, 0.75)) * 1.0, 1)
    stroma = np.clip(
        0.3 + 0.3 * ndimage.gaussian_filter(rng.standard_normal((640, 640)), 1), 0.05, 1
    )
    density = nuclei[..., None] * (
        h * np.array([0.65, 0.70, 0.29]) + d * np.array([0.27, 0.57, 0.78])
    )
    density += stroma[..., None] * (
        e * np.array([0.07, 0.99, 0.11]) + d * 0.15 * np.array([0.27, 0.57, 0.78])
    )
    return (10**-density).reshape(20, 32, 20, 32, 3).mean((1, 3))


STAINS = {
    "IHC": (0.5, 0, 0.9),
    "IHC negative": (0.22, 0.018, 0.045),
    "haematoxylin": (1, 0, 0),
    "eosin": (0, 0.8, 0),
    "PAS": (0.3, 1.2, 0),
}


def score(image, truth):
    """(kept, kept that hold tissue, patches of tissue, those kept) of a scene."""
    buffer = np.clip(image, 0, 255).astype(np.uint8)
    mask, pen = find_tissue(buffer, SIDE**2 / 4)
    grid = np.arange(0, CANVAS, SIDE)
    places = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    tissue, ink, share = (mean_in_squares(m, places, SIDE) for m in (mask, pen, truth))
    kept, whole = (tissue >= 0.5) & (ink <= 0.1), share > 0.9
    return np.array([kept.sum(), (kept & (share > 0.1)).sum(), whole.sum(), (kept & whole).sum()])


def totals(every=1):
    """Scores by kind of scene and by tissue; over `every` so many pieces of tissue."""
    kinds, sources = defaultdict(int), defaultdict(int)
    for source, part in islice(tissues(), 0, None, every):
        for kind, image, truth in scenes(part):
            found = score(image, truth)
            if kind == "pen":  # a patch beside the stroke may go with its rim
                found[2:] = 0
            kinds[kind] += found
            sources[source] += found
    for kind, amounts in STAINS.items():
        kinds[kind] += score(*on_glass(ihc(*amounts), (243, 243, 244)))
    return kinds, sources


if __name__ == "__main__":
    for table in totals():
        whole = sum(table.values())
        for name, (kept, right, wanted, got) in (*table.items(), ("all", whole)):
            found = f"{got / wanted:7.1%} of tissue kept" if wanted else ""
            print(f"{name:24} {right / max(kept, 1):7.1%} of kept hold tissue {found}")
        print()

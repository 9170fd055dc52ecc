"""Pictures of what was tiled: thumbnails, outlines for QuPath, a contact sheet of the cohort."""

import contextlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from g2l.errors import PatchError
from g2l.files import atomic, write_text
from g2l.grid import Tiling
from g2l.patches import PatchIndex
from g2l.slides import Slide

GREEN = 0, 140, 60


def write_thumbnail(
    path: Path, slide: Slide, tiling: Tiling | None = None, max_side: int = 1600
) -> None:
    """Thumbnail; of a slide that was tiled with tissue's outline and the grid of patches kept."""
    flat = len(slide.levels) == 1 and slide.width * slide.height > 1e8
    if tiling and (flat or 2 * max(tiling.image.shape) > max_side):  # no need to read once more
        image = tiling.image[: int(slide.height / tiling.scale), : int(slide.width / tiling.scale)]
    else:
        image = slide.thumbnail(max_side)
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
    if tiling:
        _draw_grid(picture, tiling, picture.width / slide.width)
    with atomic(path) as temporary:
        picture.save(temporary, quality=88)


def _draw_grid(picture: Image.Image, tiling: Tiling, zoom: float) -> None:
    draw = ImageDraw.Draw(picture, "RGBA")
    side = tiling.size0 * zoom
    # Tinted, and apart from its neighbours: else these would draw the edges of a dropped cell.
    outlined = side > 12
    fill = 0, 40, 200, 22 if outlined else 64
    edge = (0, 40, 200, 150) if outlined else None
    gap = 2 if side > 24 else side > 4
    first = (tiling.coords * zoom).round()
    last = ((tiling.coords + tiling.size0) * zoom).round() - 1 - gap
    corners = np.concatenate([first, np.maximum(first, last)], axis=1)
    for corner in corners.tolist():
        draw.rectangle(corner, fill, edge)
    for polygon in tiling.outlines:
        for ring in polygon:
            draw.line((ring * tiling.scale * zoom).ravel().tolist(), GREEN, 2)


def write_geojson(path: Path, slide: Slide, tiling: Tiling) -> None:
    """The tissue's outline, one annotation per piece, in the frame of QuPath (Slide.origin)."""
    features = []
    for number, polygon in enumerate(tiling.outlines, 1):
        rings = []
        for ring in polygon:
            corners = np.round(ring * tiling.scale).clip(0, [slide.width, slide.height])
            rings.append((corners - slide.origin).astype(int).tolist())
        feature = {
            "type": "Feature",
            "id": f"{slide.name}-{number}",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "name": f"tissue {number}",
                "classification": {"name": "Tissue", "color": GREEN},
            },
        }
        features.append(feature)
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def write_contact_sheet(folder: Path) -> None:
    """contact.jpg: random patches of a dozen random slides, for a look at the whole cohort."""
    index = PatchIndex(folder)
    chosen = sorted(np.random.default_rng(0).permutation(len(index.slides))[:12].tolist())
    sheet = Image.new("RGB", (10 * 132 + 4, len(chosen) * 150 + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for row, slide in enumerate(chosen):
        top = row * 150 + 4
        count = int(index.counts[slide])
        draw.text((4, top), f"{index.slides[slide]}   {count:,} patches", fill="black")
        picks = np.random.default_rng(slide).permutation(count)[:10]
        numbers = np.sort(index.starts[slide] + picks).tolist()
        index.ahead(numbers)
        for column, number in enumerate(numbers):
            # An empty place shows what cannot be read; the slide's row tells of it.
            with contextlib.suppress(PatchError):
                patch = Image.fromarray(index.read(number))
                patch = patch.resize((128, 128), Image.Resampling.BOX)
                sheet.paste(patch, (column * 132 + 4, top + 14))
    with atomic(folder / "contact.jpg") as temporary:
        sheet.save(temporary, quality=90)

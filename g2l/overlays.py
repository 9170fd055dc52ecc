"""TODO."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from g2l.errors import PatchError
from g2l.files import atomic
from g2l.grid import Tiling
from g2l.patches import PatchIndex
from g2l.slides import Slide


def write_thumbnail(
    path: Path, slide: Slide, tiling: Tiling | None = None, max_side: int = 1600
) -> None:
    """Thumbnail; of a slide that was tiled with the tissue's outline and the grid of the patches kept."""
    if (
        tiling and len(slide.levels) == 1 and slide.width * slide.height > 1e8
    ):  # not to read all of it once more
        image = tiling.image[: int(slide.height / tiling.scale), : int(slide.width / tiling.scale)]
    else:
        image = slide.thumbnail(max_side)
    picture = Image.fromarray(image)
    if tiling:
        zoom = picture.width / slide.width
        draw, side = ImageDraw.Draw(picture, "RGBA"), tiling.size0 * zoom
        # Tinted, and apart from its neighbours: else these would draw the edges of a cell that was dropped.
        fill, edge = (
            ((0, 40, 200, 22), (0, 40, 200, 150)) if side > 12 else ((0, 40, 200, 64), None)
        )
        gap = 2 if side > 24 else side > 4
        corners = np.concatenate([tiling.coords, tiling.coords + tiling.size0], axis=1) * zoom
        for left, top, right, bottom in corners.round().astype(int).tolist():
            draw.rectangle(
                (left, top, max(left, right - 1 - gap), max(top, bottom - 1 - gap)),
                fill=fill,
                outline=edge,
            )
        for polygon in outlines(tiling.mask):
            for ring in polygon:
                draw.line(
                    [tuple(p) for p in (ring * tiling.scale * zoom).tolist()],
                    fill=(0, 140, 60, 255),
                    width=2,
                )
    with atomic(path) as temporary:
        picture.save(temporary, quality=88)


def outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Polygons of a mask in mask pixels (pixel edges are whole numbers): each the outer ring, then its holes."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask.astype(np.float32), 1)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2)
    return [
        [p[a:b] - 0.5 for a, b in itertools.pairwise(o)]
        for p, o in zip(points, offsets, strict=True)
    ]


def write_geojson(path: Path, slide: Slide, tiling: Tiling) -> None:
    """The tissue's outline in level-0 pixels, one annotation per piece, as QuPath opens it by drag and drop."""
    edge = np.array([slide.width, slide.height])
    features = [
        {
            "type": "Feature",
            "id": f"{slide.name}-{number}",
            "geometry": {
                "type": "Polygon",
                "coordinates": [
                    np.clip(np.round(ring * tiling.scale), 0, edge).astype(int).tolist()
                    for ring in polygon
                ],
            },
            "properties": {
                "objectType": "annotation",
                "name": f"tissue {number}",
                "classification": {"name": "Tissue", "color": [0, 140, 60]},
            },
        }
        for number, polygon in enumerate(outlines(tiling.mask), 1)
    ]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def write_contact_sheet(folder: Path, side: int = 128, rows: int = 12, columns: int = 10) -> None:
    """contact.jpg: random patches of up to `rows` random slides, a row each, for a look at the whole cohort."""
    index = PatchIndex(folder)
    chosen = sorted(np.random.default_rng(0).permutation(len(index.slides))[:rows].tolist())
    sheet = Image.new("RGB", (columns * (side + 4) + 4, len(chosen) * (side + 22) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for row, slide in enumerate(chosen):
        top = row * (side + 22) + 4
        count = int(index.counts[slide])
        draw.text((4, top), f"{index.slides[slide]}   {count:,} patches", fill="black")
        picks = np.random.default_rng(slide).permutation(count)[:columns].tolist()
        for column, pick in enumerate(sorted(picks)):
            with contextlib.suppress(
                PatchError
            ):  # an empty place shows it; the slide's row tells of it
                patch = Image.fromarray(index.read(int(index.starts[slide]) + pick))
                sheet.paste(
                    patch.resize((side, side), Image.Resampling.LANCZOS),
                    (column * (side + 4) + 4, top + 14),
                )
    with atomic(folder / "contact.jpg") as temporary:
        sheet.save(temporary, quality=90)

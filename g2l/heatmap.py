"""Features seen: on their slide as colours, and by the patches that lie nearest to one another.

`by_components`, `by_similarity` and `read_scores` turn what is known of patches into numbers,
`paint` lays these over the slide as a picture, `write_tiles` as objects for QuPath. `draw_similar`
makes a page of typical patches and their like in the whole cohort.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

import kernels
from g2l.embeddings import Coordinates, read_features
from g2l.errors import UserError
from g2l.files import read_table, write_text
from g2l.patches import PatchIndex
from g2l.pictures import canvas, draw_sheet
from g2l.slides import Slide

SAMPLE = 20000  # patches that decide on axes and on typical patches
COLORS = "coolwarm"  # has no colour so dark that it hides the tissue


def spread(count: int, most: int = SAMPLE) -> ndarray:
    """Up to `most` row numbers, evenly over `count`."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def by_components(features: ndarray) -> ndarray:
    """(N, D) -> (N, 3): the first three principal components, the bulk of each from 0.3 to 1."""
    sample = np.asarray(features[spread(len(features))], np.float32)
    centred = sample - sample.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    found = features @ axes[:, :-4:-1]
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))  # of features with fewer numbers
    low, high = np.percentile(found, (1, 99), axis=0)
    share = (found - low) / np.maximum(high - low, 1e-12)
    return 0.3 + 0.7 * share.clip(0, 1)  # nothing so dark that it hides the tissue


def by_similarity(features: ndarray, row: int) -> ndarray:
    """(N, D) -> (N,): cosine of the angle to the features of one patch."""
    features = np.asarray(features, np.float32)  # squares are too large for fp16
    lengths = np.sqrt(np.einsum("ij,ij->i", features, features))  # without a copy
    return features @ features[row] / np.maximum(lengths * lengths[row], 1e-12)


def patch_at(coords: ndarray, side: int, place: tuple[int, int]) -> int:
    """Row of the patch that holds a level-0 pixel (x, y); of several the one centred nearest."""
    away = np.abs(coords + side / 2 - place).max(1)
    row = int(away.argmin())
    if away[row] > side / 2:
        x, y = coords[row]
        raise UserError(f"no patch holds {place[0]},{place[1]}; the nearest begins at {x},{y}")
    return row


def read_scores(path: Path, slide: str) -> tuple[ndarray, ndarray]:
    """Corners (n, 2) and values (n,) of a slide's patches from a table slide,x,y,value."""
    table = []
    for row in read_table(path, ["slide", "x", "y", "value"]):
        if row["slide"] != slide:
            continue
        try:
            numbers = [float(row[name]) for name in ("x", "y", "value")]
        except ValueError as error:
            raise UserError(f"{path}, slide {slide}: {error}; x, y, value are numbers") from error
        if not np.isfinite(numbers).all():
            raise UserError(f"{path}, slide {slide}: {numbers} are no place and value; remove it")
        table.append(numbers)
    if not table:
        raise UserError(f"{path}: holds no row of slide {slide}")
    values = np.array(table)
    return values[:, :2].round().astype(int), values[:, 2]


def colored(values: ndarray) -> ndarray:
    """Colours (N, 3) in [0, 1] of values (N,), over their limits; (N, 3) stay."""
    from matplotlib import colormaps

    if values.ndim == 2:
        return values
    low, high = limits(values)
    return colormaps[COLORS]((values - low) / max(high - low, 1e-12))[:, :3]


def limits(values: ndarray) -> tuple[float, float]:
    """Between what the bulk of values lies, so that one odd patch does not take all contrast."""
    low, high = np.percentile(values, (1, 99))
    return (low, high) if low < high else (values.min(), values.max())


def paint(
    slide: Slide,
    coords: ndarray,
    side: int,
    values: ndarray,
    title: str,
    what: str,
    query: int | None,
):
    """A figure: the slide, and beside it its patches in colours through which tissue is seen.

    coords: corners (N, 2) of patches of `side` px of level 0. values: (N,), or colours (N, 3);
    `what` says which. query: row of the patch that is framed.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    image = slide.thumbnail(1400)
    scale = image.shape[1] / slide.width
    gray = image.mean(2, keepdims=True) / 255
    picture = np.repeat(0.5 + 0.5 * gray, 3, 2)
    first = (coords * scale).round().astype(int)
    last = ((coords + side) * scale).round().astype(int)
    last = np.maximum(last, first + 1)
    for (left, top), (right, bottom), color in zip(first, last, colored(values), strict=True):
        part = np.s_[top:bottom, left:right]
        picture[part] = color * (0.35 + 0.65 * gray[part])
    height, width = 7 * np.array(image.shape[:2]) / max(image.shape[:2])  # inches
    figure, axes = canvas(1, 2, max(width, 3), height + 0.5)
    for axis, shown in zip(axes[0], (image, picture), strict=True):
        axis.imshow(shown)
        axis.axis("off")
        if query is not None:
            wide = max(side * scale, 24)  # where patches are dots, a frame that is found
            corner = (coords[query] + side / 2) * scale - wide / 2
            axis.add_patch(Rectangle(corner, wide, wide, fill=False, color="lime", lw=2))
    add_scale_bar(axes[0, 0], slide, scale)
    if values.ndim == 1:
        scaled = ScalarMappable(Normalize(*limits(values)), COLORS)
        bar = figure.colorbar(scaled, ax=axes[0, 1], shrink=0.6, extend="both")
        bar.set_label(what, fontsize=12)
        bar.ax.tick_params(labelsize=11)
    else:
        title += f"\n{what}"
    figure.suptitle(title, fontsize=14)
    return figure


def add_scale_bar(axis, slide: Slide, scale: float) -> None:
    """Below a picture of a slide, `scale` of its size: a bar of a round length, in mm."""
    assert slide.mpp is not None  # the table of the cohort says it
    length = float(f"{slide.width * slide.mpp / 5000:.0e}")
    below = 1.02 * slide.height * scale
    axis.autoscale(False)  # or the picture would move
    ends = [0, 1000 * length / slide.mpp * scale]
    axis.plot(ends, [below, below], color="black", lw=3, clip_on=False)
    axis.text(0, 1.01 * below, f"{length:g} mm", va="top", fontsize=12)


def write_tiles(
    path: Path,
    slide: Slide,
    coords: ndarray,
    side: int,
    values: ndarray,
    name: str,
) -> None:
    """GeoJSON that QuPath opens: a detection for each patch, with its colour and its value."""
    features = []
    ring = side * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) - slide.origin
    colors = (255 * colored(values)).round().astype(int).tolist()
    for corner, color, value in zip(coords, colors, values, strict=True):
        square = (corner + ring).tolist()
        feature: dict[str, Any] = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [square]},
            "properties": {"objectType": "detection", "color": color},
        }
        if values.ndim == 1:
            feature["properties"]["measurements"] = {name: float(value)}
        features.append(feature)
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def typical(features: ndarray, count: int) -> ndarray:
    """Rows of up to `count` patches, each of another kind: the nearest to k-means' centres."""
    from sklearn.cluster import KMeans

    kinds = KMeans(min(count, len(features)), random_state=0, n_init=1).fit(features)
    centres = torch.from_numpy(kinds.cluster_centers_.astype(np.float32))
    nearest = kernels.knn(torch.from_numpy(features), 1, centres)
    return np.unique(nearest)


def nearest_over(
    cohort: Sequence[tuple[str, ndarray]],
    queries: ndarray,
    owners: Sequence[str],
    k: int,
) -> ndarray:
    """The k nearest patches of a cohort to queries (Q, D), by cosine, exactly.

    cohort: patient and features (n, D) of each slide, which are held one at a time. Patches of the
    query's own patient, `owners`, are left out. Returns (3, Q, k): distances, slides and rows;
    where there are no more, the distance is infinite.
    """
    asked = torch.from_numpy(queries)
    found = []
    for number, (patient, features) in enumerate(cohort):
        base = torch.from_numpy(np.asarray(features, np.float32))
        near, rows = kernels.knn(base, k, asked, metric="cosine", return_distance=True)
        near[[patient == owner for owner in owners]] = np.inf
        found.append(np.stack([near, np.full(near.shape, number), rows]))
    every = np.concatenate(found, 2)
    order = np.argsort(every[:1], axis=2, kind="stable")[:, :, :k]
    return np.take_along_axis(every, order, 2)


def draw_similar(
    index: PatchIndex,
    files: dict[int, Path],
    model: str,
    queries: int,
    k: int,
):
    """A figure: typical patches of a cohort, each with the k nearest patches of other patients.

    files: of features, by the number of the slide.
    """
    slides = list(files)
    tables = [read_features(path)[0] for path in files.values()]
    patients = [index.patient[slide] for slide in slides]

    def cell(at: int, row: int, text: str, frame: str) -> tuple:
        where = Coordinates.read(files[slides[at]])
        side = int(where.attributes["patch_size_level0"])
        with index.slide(slides[at]) as slide:
            x, y = where.coords[row].tolist()
            pixels = slide.read(x, y, side, index.patch_size)
        return pixels, f"{slide.name}\n{text}", frame

    places = []
    for at, features in enumerate(tables):
        rows = spread(len(features), max(1, SAMPLE // len(tables)))
        places += [(at, row) for row in rows]
    drawn = np.stack([tables[at][row] for at, row in places]).astype(np.float32)
    chosen = typical(drawn, queries)
    owners = [patients[places[i][0]] for i in chosen]
    cohort = list(zip(patients, tables, strict=True))
    found = nearest_over(cohort, drawn[chosen], owners, k)
    lines = []
    for query, i in enumerate(chosen):
        own, row = places[i]
        line = [cell(own, row, "query", "query")]
        for distance, at, row in found[:, query].T:
            if distance < np.inf:
                line.append(cell(int(at), int(row), f"{1 - distance:.3f}", "of another patient"))
        lines.append(line)
    frames = {"query": "black", "of another patient": "#2a9d3a"}
    wide = f"patches of {index.patch_size * index.mpp:g} µm"
    title = f"{model}: typical {wide} and their nearest, by cosine"
    return draw_sheet(title, frames, lines)

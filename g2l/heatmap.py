"""Features seen: on their slide as colours, and by the patches that lie nearest to one another.

`by_components`, `by_similarity` and `read_scores` turn what is known of patches into numbers,
`paint` lays these over the slide as a picture, `write_tiles` as objects for QuPath. `draw_similar`
makes a page of typical patches and their like in the whole cohort.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

import kernels
from g2l.embeddings import Coordinates, read_features
from g2l.errors import UserError
from g2l.files import atomic, read_table
from g2l.patches import PatchIndex
from g2l.pictures import canvas, draw_sheet
from g2l.slides import Slide

SAMPLE = 20000  # patches that decide on axes and on typical patches
BLOCK = 16384  # patches that are held at once
COLORS = "viridis"


def spread(count: int, most: int = SAMPLE) -> ndarray:
    """Up to `most` row numbers, evenly over `count`."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def by_components(features: ndarray) -> ndarray:
    """(N, D) -> (N, 3) in [0, 1]: the first three principal components, from rare to rare value."""
    from sklearn.decomposition import PCA

    sample = np.asarray(features[spread(len(features))], np.float32)
    axes = PCA(min(3, *sample.shape), random_state=0).fit(sample)
    blocks = range(0, len(features), BLOCK)
    found = np.concatenate([axes.transform(features[at : at + BLOCK]) for at in blocks])
    low, high = np.percentile(found, (1, 99), axis=0)
    found = (found - low) / np.maximum(high - low, 1e-12)
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1]))).clip(0, 1)
    return 0.15 + 0.85 * found  # nothing so dark that it hides the tissue


def by_similarity(features: ndarray, row: int) -> ndarray:
    """(N, D) -> (N,): cosine of the angle to the features of one patch."""
    query = features[row].astype(np.float32)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    return features @ query / np.maximum(lengths, 1e-12)


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
    rows = [r for r in read_table(path, ["slide", "x", "y", "value"]) if r["slide"] == slide]
    if not rows:
        raise UserError(f"{path}: holds no row of slide {slide}")
    try:
        found = np.array([[float(row[name]) for name in ("x", "y", "value")] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}, slide {slide}: {error}; x, y and value are numbers") from error
    return found[:, :2].astype(int), found[:, 2]


def colored(values: ndarray) -> ndarray:
    """Colours (N, 3) in [0, 1] of values (N,), from the least to the greatest; (N, 3) stay."""
    from matplotlib import colormaps

    if values.ndim == 2:
        return values
    low, high = values.min(), values.max()
    return colormaps[COLORS]((values - low) / max(high - low, 1e-12))[:, :3]


def paint(
    slide: Slide, coords: ndarray, side: int, values: ndarray, title: str, query: int | None = None
):
    """A figure: the slide, and beside it its patches in colours through which tissue is seen.

    coords: corners (N, 2) of patches of `side` px of level 0. values: (N,), or colours (N, 3).
    query: row of the patch that is framed.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    image = slide.thumbnail(1400)
    scale = image.shape[1] / slide.width
    gray = image.mean(2, keepdims=True) / 255
    picture = np.repeat(0.5 + 0.5 * gray, 3, 2)
    corners = np.concatenate([coords, coords + side], axis=1) * scale
    places = corners.round().astype(int).tolist()
    for (left, top, right, bottom), color in zip(places, colored(values), strict=True):
        part = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
        picture[part] = color * (0.35 + 0.65 * gray[part])
    height, width = 7 * np.array(image.shape[:2]) / max(image.shape[:2])  # inches
    figure, axes = canvas(1, 2, max(width, 3), height + 0.5)
    for axis, shown in zip(axes[0], (image, picture), strict=True):
        axis.imshow(shown)
        axis.axis("off")
        if query is not None:
            corner = coords[query] * scale
            frame = Rectangle(corner, side * scale, side * scale, fill=False, color="red", lw=1.5)
            axis.add_patch(frame)
    if values.ndim == 1:
        scaled = ScalarMappable(Normalize(values.min(), values.max()), COLORS)
        figure.colorbar(scaled, ax=axes[0, 1], shrink=0.6)
    figure.suptitle(title)
    return figure


def write_tiles(
    path: Path, slide: Slide, coords: ndarray, side: int, values: ndarray, name: str
) -> None:
    """GeoJSON that QuPath opens: a detection for each patch, with its colour and its value."""
    features = []
    ring = np.array([[0, 0], [side, 0], [side, side], [0, side], [0, 0]]) - slide.origin
    colors = (255 * colored(values)).round().astype(int).tolist()
    for corner, color, value in zip(coords, colors, values, strict=True):
        properties = {"objectType": "detection", "color": color}
        if values.ndim == 1:
            properties["measurements"] = {name: float(value)}
        square = {"type": "Polygon", "coordinates": [(corner + ring).tolist()]}
        features.append({"type": "Feature", "geometry": square, "properties": properties})
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def typical(features: ndarray, count: int) -> ndarray:
    """Rows of up to `count` patches, each of another kind: the nearest to k-means' centres."""
    from sklearn.cluster import KMeans

    sample = torch.from_numpy(np.asarray(features, np.float32))
    centres = KMeans(min(count, len(sample)), random_state=0, n_init=1).fit(sample).cluster_centers_
    return np.unique(np.asarray(kernels.knn(sample, 1, torch.from_numpy(centres).float())))


def nearest_over(
    cohort: Sequence[tuple[str, ndarray]], queries: ndarray, owners: Sequence[str], k: int
) -> tuple[ndarray, ndarray, ndarray]:
    """The k nearest patches of a cohort to queries (Q, D), by cosine, exactly.

    cohort: patient and features (n, D) of each slide, which are held one at a time. Patches of the
    query's own patient, `owners`, are left out. Returns distances, slides and rows, each (Q, k).
    """
    asked = torch.from_numpy(queries)
    best = [np.full((len(queries), k), np.inf), *np.zeros((2, len(queries), k), int)]
    for number, (patient, features) in enumerate(cohort):
        base = torch.from_numpy(features.astype(np.float32))
        found, rows = kernels.knn(base, k, asked, metric="cosine", return_distance=True)
        found[[patient == owner for owner in owners]] = np.inf
        parts = found.numpy(), np.full(rows.shape, number), rows.numpy()
        both = [np.concatenate(pair, axis=1) for pair in zip(best, parts, strict=True)]
        order = np.argsort(both[0], axis=1, kind="stable")[:, :k]
        best = [np.take_along_axis(part, order, 1) for part in both]
    return tuple(best)


def draw_similar(index: PatchIndex, files: dict[int, Path], model: str, queries: int, k: int):
    """A figure: typical patches of a cohort, each with the k nearest patches of other patients.

    files: of features, by the number of the slide.
    """
    tables = {number: read_features(path) for number, path in files.items()}
    pool, origin = [], []
    for number, (features, _) in tables.items():
        rows = spread(len(features), max(1, SAMPLE // len(tables)))
        pool.append(np.asarray(features[rows], np.float32))
        origin += [(number, row) for row in rows]
    drawn = np.concatenate(pool)
    chosen = typical(drawn, queries)
    owners = [index.patient[origin[i][0]] for i in chosen]
    numbers = list(tables)
    cohort = [(index.patient[number], features) for number, (features, _) in tables.items()]
    lines = []
    for i, *found in zip(chosen, *nearest_over(cohort, drawn[chosen], owners, k), strict=True):
        line = [(*patch(index, files, tables, *origin[i]), "query")]
        for distance, slide, row in zip(*found, strict=True):
            if distance < np.inf:
                pixels, name = patch(index, files, tables, numbers[slide], row)
                line.append((pixels, f"{name}\n{1 - distance:.3f}", "nearest of other patients"))
        lines.append(line)
    frames = {"query": "black", "nearest of other patients": "#2a9d3a"}
    return draw_sheet(f"{model}: typical patches and their nearest, by cosine", frames, lines)


def patch(
    index: PatchIndex, files: dict[int, Path], tables: dict, number: int, row: int
) -> tuple[ndarray, str]:
    """Pixels of a row of a slide's features, and the slide's name."""
    side = int(Coordinates.read(files[number]).attributes["patch_size_level0"])
    x, y = tables[number][1][row].tolist()
    with index.slide(number) as slide:
        return slide.read(x, y, side, index.patch_size), slide.name

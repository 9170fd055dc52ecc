"""Patch tokens: do they still say what the teacher's say, and which tissue they lie on?

`dense_rows` takes a seeded sample of a benchmark's images, spread over its patients. `look` gives
their patch tokens by one model, and the class of each where the benchmark has masks. `alignment` is
the CKA to the teacher's, on a common grid, `segmentation` a linear probe of the classes. Random
features go through the same code. What is held of one model is at most IMAGES * GRID^2 tokens in
half precision: 240 MB of 1,536 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from g2l.benchmarks import Benchmark
from g2l.errors import UserError
from g2l.features import data_stamp, display
from g2l.files import digest
from g2l.models import Model
from g2l.probe import linear_probe
from g2l.protocols import cka_rows, recall, split
from g2l.results import Study, record, recorded
from g2l.robust import draw_sample

VERSION = 1  # raised on purpose when the same input would give other numbers
IMAGES = 300  # of a benchmark, at most
GRID = 16  # rows and columns of tokens, at most; finer ones are resampled
PLACES = 12  # tokens of each image that are compared
BATCH = 16  # images
BLIND_DRAWS = 5
BLIND_WIDTH = 8  # of random features


def dense_rows(benchmark: Benchmark, models: Sequence[str], study: Study) -> list[dict]:
    """Rows of results on the patch tokens of each model, recorded; none for regions and slides, and
    where there is neither a teacher nor a mask.
    """
    if benchmark.level != "patch" or not (study.teacher in models or len(benchmark.masks)):
        return []
    prints = [(name, study.cards[name]["fingerprint"]) for name in models]
    about = benchmark.name, benchmark.groups, benchmark.labels.tolist(), len(benchmark.masks)
    key = digest(VERSION, prints, data_stamp(benchmark), about, study.teacher, study.seeds)
    if found := recorded(study.results, key):
        return found
    group = np.unique(benchmark.groups, return_inverse=True)[1]
    one = np.zeros_like(group)
    kept = np.isin(np.arange(len(group)), draw_sample(one, group, group, IMAGES, False, 0))
    sample = benchmark.subset(kept)
    group = group[kept]
    target: Tensor | None = None
    rows = []
    for name in sorted(models, key=lambda name: name != study.teacher):  # the teacher first
        grids, classes = look(study.load(name), sample)
        mine = []
        if classes is not None:
            mine += segmentation(grids, classes, group, study)
        if target is not None:
            mine += alignment(grids, target, group, study.device_used)
        if name == study.teacher:
            target = grids
        rows += [{"model": display(name), **row} for row in mine]
        if not any(row["model"] == "chance" for row in rows):
            rows += blind_rows(grids, classes, target, group, study)
    rows = [{"benchmark": benchmark.name, "protocol": "dense", **row} for row in rows]
    return record(study.results, rows, key=key)


def blind_rows(
    grids: Tensor, classes: ndarray | None, target: Tensor | None, group: ndarray, study: Study
) -> list[dict]:
    """Rows of random tokens in the place of `grids`."""
    rows = []
    shape = len(grids), BLIND_WIDTH, *grids.shape[2:]
    for draw in range(BLIND_DRAWS):
        blind = torch.randn(shape, generator=torch.Generator().manual_seed(draw))
        if classes is not None:
            rows += segmentation(blind, classes, group, study)
        if target is not None:
            rows += alignment(blind, target, group, study.device_used)
    return [{"model": "chance", **row} for row in rows]


def look(model: Model, sample: Benchmark) -> tuple[Tensor, ndarray | None]:
    """Patch tokens (N, C, h, w) fp16 of every image, and their classes (N, h, w), -1 for none.

    A token is of the class that covers at least half of it, as the network sees the image.
    """
    device = next(model.parameters()).device
    kept = []
    kinds = []
    for first in range(0, len(sample), BATCH):
        numbers = range(first, min(first + BATCH, len(sample)))
        images = [sample.images[i] for i in numbers]
        x = torch.cat([model.geometry(planes(image)) for image in images]).to(device)
        x = model.normalize(x)
        with torch.inference_mode(), model.autocast(x):
            cells = model.grid(model.net.forward_features(x)).float()
        size = [min(GRID, side) for side in cells.shape[2:]]
        kept.append(resized(cells, size).half().cpu())
        for i, image in zip(numbers, images, strict=True) if len(sample.masks) else ():
            mask = sample.masks[i]
            if mask.shape != image.shape[:2]:
                sizes = f"{mask.shape} px, its image {image.shape[:2]}"
                raise UserError(f"{sample.name}: the mask of {sample.ids[i]} has {sizes}")
            kinds.append(classes_of(mask, model, size))
    return torch.cat(kept), np.stack(kinds) if kinds else None


def planes(image: ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def resized(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (B, C, h, w) on another grid."""
    if list(cells.shape[2:]) == list(size):
        return cells
    return F.interpolate(cells.float(), list(size), mode="bilinear", antialias=True)


def classes_of(mask: ndarray, model: Model, size: Sequence[int]) -> ndarray:
    """Class of each token of a grid (h, w), by a map (H, W) of classes, below 0 for none."""
    found = np.full(list(size), -1)
    for kind in np.unique(mask[mask >= 0]):
        covered = np.repeat((mask == kind)[..., None], 3, 2).astype(np.uint8) * 255
        seen = model.geometry(planes(covered))[:, :1].float()
        share = F.adaptive_avg_pool2d(seen, (size[0], size[1]))[0, 0].numpy() / 255
        found[share >= 0.5] = kind
    return found


def taken(grids: Tensor, size: Sequence[int], places: Tensor) -> ndarray:
    """Tokens (N * PLACES, C) float32 at places (N, PLACES) of each image, on a grid of a size."""
    parts = []
    for cells, where in zip(grids.split(BATCH), places.split(BATCH), strict=True):
        flat = resized(cells, size).float().flatten(2).transpose(1, 2)
        parts.append(flat.take_along_dim(where[..., None], 1).flatten(0, 1))
    return torch.cat(parts).numpy()


def draw_places(lack: ndarray) -> Tensor:
    """PLACES cells of each image (N, PLACES), seeded; those that lack (N, cells) something last."""
    luck = np.random.default_rng(0).random(lack.shape)
    return torch.from_numpy((luck + lack).argsort(1)[:, :PLACES])


def alignment(grids: Tensor, target: Tensor, group: ndarray, device: str) -> list[dict]:
    """Unbiased CKA of tokens to the teacher's on the smaller of both grids, and its standard error
    over patients.
    """
    size = [min(sides) for sides in zip(grids.shape[2:], target.shape[2:], strict=True)]
    places = draw_places(np.zeros((len(grids), size[0] * size[1])))
    x = {"own": taken(grids, size, places), "teacher": taken(target, size, places)}
    groups = np.repeat(group, places.shape[1]).tolist()
    rows = []
    for row in cka_rows(x, groups, "teacher", device):
        name = {"unbiased": "CKA", "se": "CKA se"}.get(row["metric"])
        if name and row["model"] == "own":
            rows.append({"metric": name, "value": row["value"]})
    return rows


def segmentation(grids: Tensor, classes: ndarray, group: ndarray, study: Study) -> list[dict]:
    """Balanced accuracy and mean intersection over union of a linear probe of the classes of
    tokens, on 6:2:2 splits by patient; a row for each seed.
    """
    from sklearn.metrics import jaccard_score

    flat = classes.reshape(len(classes), -1)
    places = draw_places(flat < 0)
    labels = np.take_along_axis(flat, places.numpy(), 1).ravel()
    known = labels >= 0
    kinds, labels = np.unique(labels[known], return_inverse=True)
    groups = np.repeat(group, places.shape[1])[known]
    if len(kinds) < 2:
        return []
    x = taken(grids, grids.shape[2:], places)[known]
    fold = split(labels, groups.tolist(), 10)
    tried = linear_probe(x, labels, fold, len(kinds), study.seeds, study.device_used)
    rows = []
    for seed, probe in enumerate(tried):
        if probe:
            test = np.isfinite(probe[0][:, 0])
            guess = probe[0][test].argmax(1)
            truth = labels[test]
            shared = jaccard_score(truth, guess, labels=np.unique(truth), average="macro")
            measures = {"balanced accuracy": recall(guess, truth), "mean IoU": float(shared)}
            rows += [{"metric": m, "value": v, "seed": seed} for m, v in measures.items()]
    return rows

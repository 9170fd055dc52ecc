"""Patch tokens: do they still say what the teacher's say, and which tissue they lie on?

`dense_rows` takes a seeded sample of a benchmark's images (`drawn`). `look` gives
their patch tokens by one model, and the class of each where the benchmark has masks. `alignment` is
the CKA to the teacher's, on a common grid, `segmentation` a linear probe of the classes. Random
features go through the same code. What is held of one model is at most IMAGES * GRID^2 tokens in
half precision: 240 MB of 1,536 numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from g2l.benchmarks import Benchmark
from g2l.errors import UserError, warn
from g2l.features import data_stamp, display, watched
from g2l.files import digest
from g2l.models import Model, resized
from g2l.probe import linear_probe
from g2l.protocols import BLIND_DRAWS, BLIND_WIDTH, cka_rows, recall, split
from g2l.results import Study, record, recorded
from g2l.robust import draw_sample

VERSION = 2  # raised on purpose when the same input would give other numbers
IMAGES = 300  # of a benchmark, at most
GRID = 16  # rows and columns of tokens, at most; finer ones are resampled
PLACES = 12  # tokens of each image that are compared
BATCH = 16  # images


def dense_rows(benchmark: Benchmark, models: Sequence[str], study: Study) -> list[dict]:
    """Rows of results on the patch tokens of each model, recorded, and one with a "fault" where
    masks cannot be used; none for regions and slides, and where there is neither a teacher nor a
    mask, which is told.
    """
    if benchmark.level != "patch":
        return []
    if study.teacher not in models and not len(benchmark.masks):
        warn(f"{benchmark.name}: neither masks nor a teacher, so nothing is said of patch tokens")
        return []
    prints = [study.cards[name]["fingerprint"] for name in models]
    about = [
        benchmark.name,
        benchmark.groups,
        benchmark.labels.tolist(),
        watched(benchmark.masks),
        data_stamp(benchmark),
        study.teacher,
        study.seeds,
    ]
    key = digest(VERSION, models, prints, about)
    if found := recorded(study.results, key):
        return found
    sample, group = drawn(benchmark)
    target: Tensor | None = None
    rows = []
    for name in sorted(models, key=lambda name: name != study.teacher):  # the teacher first
        grids, classes, faults = look(study.load(name), sample)
        found = measures(grids, classes, target, group, study)
        rows += [{"model": display(name), **row} for row in found]
        if name == study.teacher:
            target = grids
    tell_unprobed(benchmark, rows)
    rows += lacking(sample, faults)
    shape = len(grids), BLIND_WIDTH, *grids.shape[2:]
    for draw in range(BLIND_DRAWS):
        luck = torch.Generator().manual_seed(draw)
        found = measures(torch.randn(shape, generator=luck), classes, target, group, study)
        rows += [{"model": "chance", "draw": draw, **row} for row in found]
    rows = [{"benchmark": benchmark.name, "protocol": "dense", **row} for row in rows]
    return record(study.results, rows, key=key)


def tell_unprobed(benchmark: Benchmark, rows: list[dict]) -> None:
    """Say where masks gave no probe, whose rows have a seed."""
    if len(benchmark.masks) and not any("seed" in row for row in rows):
        warn(
            f"{benchmark.name}: masks of fewer than two classes, or of too few groups for the "
            "probe's 6:2:2; nothing is said of the tissue of patch tokens"
        )


def lacking(sample: Benchmark, faults: list[str]) -> list[dict]:
    """A row that says of how many images the masks cannot be used, if there are any."""
    if not faults:
        return []
    text = (
        f"{sample.name}: {len(faults)} of {len(sample)} images are not in the probe of patch "
        f"tokens for want of a mask, first: {faults[0]}"
    )
    row = {"model": "data", "metric": "masks that lack", "value": len(faults), "fault": text}
    return [row]


def drawn(benchmark: Benchmark) -> tuple[Benchmark, ndarray]:
    """At most IMAGES of its images, seeded and spread over its groups; their groups (N,)."""
    group = np.unique(benchmark.groups, return_inverse=True)[1]
    one = np.zeros_like(group)
    kept = np.zeros(len(group), bool)
    kept[draw_sample(one, group, group, IMAGES, False, 0)] = True
    return benchmark.subset(kept), group[kept]


def measures(
    grids: Tensor,
    classes: ndarray | None,
    target: Tensor | None,
    group: ndarray,
    study: Study,
) -> list[dict]:
    """Rows of what can be measured: the probe needs masks, CKA a teacher."""
    rows = []
    if classes is not None:
        rows += segmentation(grids, classes, group, study)
    if target is not None:
        rows += alignment(grids, target, group, study.device_used)
    return rows


def look(model: Model, sample: Benchmark) -> tuple[Tensor, ndarray | None, list[str]]:
    """Patch tokens (N, C, h, w) fp16 of every image, their classes (N, h, w), -1 for none, and what
    is wrong with masks.

    A token is of the class that covers at least half of it, as the network sees the image; an image
    whose mask cannot be used has none.
    """
    kept = []
    kinds = []
    faults = []
    for numbers, images, x in batches(model, sample):
        with torch.inference_mode(), model.autocast(x):
            cells = model.grid(model.net.forward_features(x)).float()
        size = [min(GRID, side) for side in cells.shape[2:]]
        cells = resized(cells, size)
        kept.append(cells.half().cpu())
        if not len(sample.masks):
            continue
        for i, image in zip(numbers, images, strict=True):
            try:
                mask = mask_that_fits(sample, i, image)
            except UserError as error:
                faults.append(str(error))
                mask = np.full(image.shape[:2], -1)
            kinds.append(classes_of(mask, model, size))
    return torch.cat(kept), np.stack(kinds) if kinds else None, faults


def mask_that_fits(sample: Benchmark, i: int, image: ndarray) -> ndarray:
    """Classes (H, W) of image i; UserError where its mask cannot be read or is of another size."""
    mask = sample.masks[i]
    if mask.shape != image.shape[:2]:
        raise UserError(
            f"the mask of {sample.ids[i]} has {mask.shape} px, its image {image.shape[:2]}"
        )
    return mask


def batches(model: Model, sample: Benchmark) -> Iterator[tuple[range, list[ndarray], Tensor]]:
    """BATCH images at a time: their numbers, the images, and what the network gets of them."""
    for first in range(0, len(sample), BATCH):
        numbers = range(first, min(first + BATCH, len(sample)))
        images = [sample.images[i] for i in numbers]
        seen = [model.geometry(planes(image)) for image in images]
        yield numbers, images, model.normalize(torch.cat(seen).to(model.device))


def planes(image: ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def classes_of(mask: ndarray, model: Model, size: Sequence[int]) -> ndarray:
    """Class of each token of a grid (h, w), by a map (H, W) of classes, below 0 for none."""
    found = np.full(list(size), -1)
    for kind in np.unique(mask[mask >= 0]):
        covered = (mask == kind).astype(np.uint8)
        image = np.stack([255 * covered] * 3, 2)
        seen = model.geometry(planes(image)).float()
        share = resized(seen, size, "area")[0, 0] / 255
        found[share.numpy() >= 0.5] = kind
    return found


def taken(grids: Tensor, size: Sequence[int], places: Tensor) -> ndarray:
    """Tokens (N * PLACES, C) float32 at places (N, PLACES) of each image, on a grid of a size."""
    parts = []
    for cells, where in zip(grids.split(BATCH), places.split(BATCH), strict=True):
        flat = resized(cells, size).flatten(2).mT
        rows = flat.take_along_dim(where[..., None], 1)
        parts.append(rows.flatten(0, 1).float())
    return torch.cat(parts).numpy()


def draw_places(lack: ndarray) -> Tensor:
    """PLACES cells of each image (N, PLACES), seeded; those that lack (N, cells) something last."""
    luck = np.random.default_rng(0).random(lack.shape)
    order = np.argsort(luck + lack, axis=1)
    return torch.from_numpy(order[:, :PLACES])


def alignment(grids: Tensor, target: Tensor, group: ndarray, device: str) -> list[dict]:
    """Unbiased CKA of tokens to the teacher's on the smaller of both grids, and its standard error
    over patients.
    """
    pairs = zip(grids.shape[2:], target.shape[2:], strict=True)
    size = [min(sides) for sides in pairs]
    lack = np.zeros((len(grids), size[0] * size[1]))
    places = draw_places(lack)
    x = {
        "own": taken(grids, size, places),
        "teacher": taken(target, size, places),
    }
    groups = np.repeat(group, places.shape[1])
    rows = []
    for row in cka_rows(x, groups.tolist(), "teacher", device):
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
    drawn = np.take_along_axis(flat, places.numpy(), 1).ravel()
    known = drawn >= 0
    kinds, labels = np.unique(drawn[known], return_inverse=True)
    if len(kinds) < 2:
        return []
    groups = np.repeat(group, places.shape[1])[known]
    x = taken(grids, grids.shape[2:], places)[known]
    fold = split(labels, groups.tolist(), 10)
    rows = []
    tried = linear_probe(x, labels, fold, len(kinds), study.seeds, study.device_used)
    for seed, probe in enumerate(tried):
        if not probe:
            continue
        scores = probe[0]
        test = np.isfinite(scores[:, 0])
        guess = scores[test].argmax(1)
        truth = labels[test]
        present = np.unique(truth)
        if len(present) < 2:  # one class alone is no test
            continue
        shared = jaccard_score(truth, guess, labels=present, average="macro")
        base = {"seed": seed}
        rows.append(base | {"metric": "balanced accuracy", "value": recall(guess, truth)})
        rows.append(base | {"metric": "mean IoU", "value": float(shared)})
    return rows

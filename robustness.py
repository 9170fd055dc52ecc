"""Stage 4 of G2L: does a model see the tissue or the hospital it came from? Table 3, with what is needed to read it.

    python robustness.py                                                           # all models at hand, on TIGER
    python robustness.py --models h-optimus-0 runs/NAME/student --benchmark DIR    # your own patches and centres
    python robustness.py --models h-optimus-0 runs/NAME/student --cancer brca --perturb stain jpeg   # no centres needed

The robustness index (de Jong, Marcus and Teuwen, arXiv 2501.18055) looks at the k nearest neighbours of every patch:

    index = neighbours of the same class / neighbours of the same centre = (SS + SO) / (SS + OS)

with S or O for the same or another class, then for the same or another centre; counts are summed over all patches
before the ratio is taken. PathoROB (arXiv 2507.17845) bounds it to 0..1 by SO / (SO + OS). An index of 1 is no
threshold: features that know nothing already score (share of the class) / (share of the centre), about 4.2 for five
balanced classes in 21 balanced centres, and as k nears the number of patches every model ends there. So each number
stands beside the chance level of the very sample drawn, and how well kNN and a linear probe tell class and centre.
The paper's "five-fold" is read as five seeded samples, since only that shows what the choice of patches does.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import math
import re
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import evaluate
from evaluate import (
    Benchmark,
    ImageFiles,
    Source,
    check_names,
    directory,
    display,
    files_below,
    finish,
    load_folder,
    markdown,
    read_image,
    read_metrics,
    read_table,
    recall,
    safe,
    save_figure,
    tiger_source,
    whole,
)
from tile import Help, PatchIndex, UserError, share

KS = (3, 5, 10, 20)
DRAWS = 1000  # bootstrap resamples of the patients
TIGER_CLASSES = {
    1: "invasive tumour",
    3: "in-situ tumour",
    2: "tumour stroma",
    6: "inflamed stroma",
    5: "necrosis",
}

# Table 3 of arXiv 2510.11176 for k as in KS, as far as a public digest of the paper (papernotes, AAAI 2026) gives it:
# its rows for UNI and Virchow were not seen. uni2-h is the paper's UNI-v2.
PAPER = {
    "h-optimus-0": (1.0826, 1.1890, 1.3730, 1.8467),
    "uni2-h": (1.0682, 1.2433, 1.4113, 1.8548),
    "hibou-l": (0.9056, 0.9905, 1.0879, 1.1855),
    "G2L": (1.0891, 1.3002, 1.5021, 2.0316),
}

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c564b", "#7f7f7f")
KINDS = {
    (True, False): ("same tissue, other centre", "#009e73"),
    (True, True): ("same tissue, same centre", "#56b4e9"),
    (False, True): ("other tissue, same centre", "#d55e00"),
    (False, False): ("neither", "#bbbbbb"),
}


# ------------------------------------------------------------------ patches with class, patient, slide and centre

decoded = lru_cache(maxsize=2)(
    read_image
)  # patches come ordered by file, so each file is decoded once


def cut_out(patch: tuple[Path, int, int], size: int) -> np.ndarray:
    """The square of `size` px whose top-left corner is x, y of (path, x, y)."""
    path, x, y = patch
    return decoded(path)[y : y + size, x : x + size]


def tiger_origin(slide: str) -> tuple[str, str]:
    """(patient, centre) from the name of a TIGER slide: TCGA barcode, Radboudumc or Jules Bordet; else UserError."""
    if match := re.match(r"(TCGA-(\w\w)-\w{4})", slide):
        return match[1], f"TCGA-{match[2]}"  # the tissue source site
    if match := re.match(r"(TC_S01_P\d+)", slide):
        return match[1], "RUMC"
    if match := re.match(r"(\d+)[BS]", slide):  # biopsy and surgical specimen of one patient
        return f"JB-{match[1]}", "JB"
    raise UserError(
        f"{slide}: no name of a TIGER slide; expected TCGA-XX-..., TC_S01_P... or digits with B or S"
    )


def load_tiger(folder: Path, size: int, min_fraction: float) -> tuple[Benchmark, list[str]]:
    """Patches of TIGER's five tissue classes, and the slide of each, from `wsirois` as it unpacks.

    Region images are cut into a grid of `size` px (0.5 µm each); a patch belongs to the class that covers at least
    `min_fraction` of it. Regions of tissue-cells that overlap one of tissue-bcss are passed over.
    """
    from PIL import Image

    values, patches, labels, slides, boxes = np.array(list(TIGER_CLASSES)), [], [], [], {}
    passed: dict[str, list[Path]] = {
        "have no mask": [],
        "or their masks cannot be read, or differ in size": [],
        f"are smaller than {size} px (--patch-size)": [],
    }
    no_mask, unreadable, small = passed.values()
    below = {path: path.relative_to(folder).parts[-3:] for path in files_below(folder)}
    found = {
        place: path
        for path, place in below.items()
        if path.suffix.lower() == ".png"  # a copy counts once
        and place[:2] in (("tissue-bcss", "images"), ("tissue-cells", "images"))
    }
    if not found:
        raise UserError(
            f"{folder}: holds neither labels.csv, PathoROB's metadata nor TIGER's roi-level-annotations "
            f"(tissue-bcss or tissue-cells); get TIGER by {tiger_source(folder)}"
        )
    for (kind, *_), path in sorted(found.items()):
        name = re.fullmatch(r"(.+)_\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", path.stem)
        if not name:
            raise UserError(f"{path}: expected a name such as SLIDE_[xmin, ymin, xmax, ymax].png")
        box = tuple(int(value) for value in name.groups()[1:])
        mask_path = path.parent.parent / "masks" / path.name
        if any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
            for b in boxes.get(name[1], ())
        ):
            continue
        if not mask_path.is_file():
            no_mask.append(path)
            continue
        try:
            with Image.open(path) as region, Image.open(mask_path) as image:
                mask, fits = np.asarray(image), image.size == region.size
        except (OSError, SyntaxError):
            mask, fits = np.zeros((0, 0)), False
        if mask.ndim != 2:
            raise UserError(
                f"{mask_path}: expected one channel of class values 0 to 7, found shape {mask.shape}"
            )
        if not fits:
            unreadable.append(path)
            continue
        if kind == "tissue-bcss":
            boxes.setdefault(name[1], []).append(box)
        rows, columns = mask.shape[0] // size, mask.shape[1] // size
        if not rows * columns:
            small.append(path)
            continue
        cells = mask[: rows * size, : columns * size].reshape(rows, size, columns, size)
        covered = np.stack([(cells == value).mean((1, 3)) for value in values], -1)
        for row, column in np.argwhere(covered.max(-1) >= min_fraction):
            patches.append((path, int(column) * size, int(row) * size))
            labels.append(int(covered[row, column].argmax()))
            slides.append(name[1])
    for why, paths in passed.items():
        if paths:
            print(
                f"{folder}: {len(paths)} regions {why} and were passed over, first {paths[0].name}",
                file=sys.stderr,
            )
    if not patches:
        raise UserError(
            f"{folder}: no patch of {size} px is covered to {min_fraction:.0%} by one tissue class in the "
            f"{len(found)} regions of TIGER's roi-level-annotations; lower --min-fraction or --patch-size"
        )
    patients, centers = zip(*map(tiger_origin, slides), strict=True)
    images = Source(
        patches, partial(cut_out, size=size), [path for path, _, _ in patches], f"{size} px"
    )
    ids = [f"{path.stem} {x},{y} {size}px" for path, x, y in patches]
    return Benchmark(
        "tiger",
        "patch",
        images,
        ids,
        np.array(labels),
        list(TIGER_CLASSES.values()),
        list(patients),
        list(centers),
    ), slides


PATHOROB = ("slide_id", "patch_id", "biological_class", "medical_center")


def load_pathorob(folder: Path, table: Path) -> tuple[Benchmark, list[str]]:
    """PathoROB's metadata (slide_id, patch_id, biological_class, medical_center), and the slide of each patch; images
    SLIDE-PATCH, SLIDE/PATCH or PATCH with any suffix lie below the folder. A patch in several subsets counts once."""
    rows = {(row["slide_id"], row["patch_id"]): row for row in read_table(table, PATHOROB)}
    paths = [p for p in files_below(folder) if p != table]
    known = (
        {p.name: p for p in paths}
        | {p.stem: p for p in paths}
        | {f"{p.parent.name}/{p.stem}": p for p in paths}
    )
    files = [
        next(
            (known[n] for n in (f"{slide}/{patch}", f"{slide}-{patch}", patch) if n in known), None
        )
        for slide, patch in rows
    ]
    if None in files:
        raise UserError(
            f"{table}: {files.count(None)} of its {len(rows)} patches have no image below {folder}, first "
            f"{'-'.join(list(rows)[files.index(None)])}.png; save the images as SLIDE_ID-PATCH_ID.png"
        )
    slides, classes = (
        [slide for slide, _ in rows],
        sorted({row["biological_class"] for row in rows.values()}),
    )
    return Benchmark(
        folder.resolve().name,
        "patch",
        ImageFiles(files),
        ["-".join(key) for key in rows],
        np.array([classes.index(row["biological_class"]) for row in rows.values()]),
        classes,
        slides,
        [row["medical_center"] for row in rows.values()],
    ), slides


def load(
    folder: Path, size: int, min_fraction: float, bare: bool = False
) -> tuple[Benchmark, list[str]]:
    """Whichever form lies in the folder (labels.csv, PathoROB, TIGER; if `bare` also images and nothing else), and the
    slide of each patch. Without a column `slide` in labels.csv the group stands for it: that excludes more, never less.
    """
    if (folder / "labels.csv").is_file():
        benchmark = load_folder(folder)
        return benchmark, [
            row.get("slide") or row["group"]
            for row in read_table(folder / "labels.csv", ("image",))
        ]
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; --benchmark takes one with labels.csv (image,label,group,center), "
            f"PathoROB's metadata, or TIGER: {tiger_source(folder)}"
        )
    for table in sorted(folder.glob("*.csv")):
        with open(table, encoding="utf-8-sig", errors="replace") as file:
            if set(PATHOROB) <= {name.strip() for name in file.readline().split(",")}:
                return load_pathorob(folder, table)
    files = (
        [p for p in files_below(folder) if p.suffix.lower() in evaluate.IMAGE_SUFFIXES]
        if bare
        else []
    )
    if files and not any(
        part.startswith("tissue-") for p in files for part in p.relative_to(folder).parts
    ):
        names = [path.relative_to(folder).as_posix() for path in files]
        return unlabelled(folder.resolve().name, ImageFiles(files), names), names
    return load_tiger(folder, size, min_fraction)


def unlabelled(name: str, images: Sequence, ids: list[str]) -> Benchmark:
    """Images of which nothing is known, in the form that the feature cache takes."""
    return Benchmark(name, "patch", images, ids, np.zeros(len(ids), np.int64), ["patch"], ids)


# ------------------------------------------------------------------ sampling


def codes(values: Sequence) -> np.ndarray:
    """Small integers for any labels (n,), numbered in sorted order."""
    return np.unique(np.asarray(values), return_inverse=True)[1].ravel()


def alike(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For integer labels (n,): of each row the number and the size of the group of rows that agree in all `parts`."""
    _, group, counts = np.unique(np.stack(parts), axis=1, return_inverse=True, return_counts=True)
    return group.ravel(), counts[group.ravel()]


def rank_within(key: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Rank from 0 of each row's key among the rows that agree in all of `parts`."""
    group = alike(*parts)[0]
    order = np.lexsort((key, group))
    rank = np.empty(len(key), np.int64)
    rank[order] = np.arange(len(key)) - np.searchsorted(group[order], group[order])
    return rank


def draw_sample(
    labels: np.ndarray,
    centers: np.ndarray,
    slides: np.ndarray,
    count: int,
    per_center: bool,
    seed: int,
) -> np.ndarray:
    """Sorted rows of one sample: `count` patches of each class (each class and centre if `per_center`); 0 takes all.

    Centres take turns within a class, and slides within a centre, so the sample is spread as evenly as the data allow;
    a centre that has run out leaves its turns to the others.
    """
    if not count:
        return np.arange(len(labels))
    luck = np.random.default_rng(seed).random(
        len(labels)
    )  # below 1: decides between equal turns only
    turn = rank_within(rank_within(luck, labels, centers, slides) + luck, labels, centers)
    return np.flatnonzero((turn if per_center else rank_within(turn + luck, labels)) < count)


# ------------------------------------------------------------------ the index


def neighbors(
    x: np.ndarray, k: int, slides: np.ndarray | None, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances (n, k) and rows (n, k) of the nearest neighbours of each row of x (n, D), itself and its own
    slide left out (`slides` None: only itself); -1 where no candidate is left."""
    import torch

    from kernels import knn

    tensor = torch.from_numpy(np.array(x, np.float32))
    tensor = torch.nn.functional.normalize(tensor) if normalize else tensor
    distances, rows = knn(
        tensor,
        min(k, len(x) - 1),
        groups=None if slides is None else torch.from_numpy(slides),
        return_distance=True,
    )
    return distances.numpy(), rows.numpy()


def tally(rows: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Counts (4, n, k) of SS, SO, OS, OO among the first 1, 2, ... k neighbours `rows` (n, k) of each patch."""
    tissue, place = labels[rows] == labels[:, None], centers[rows] == centers[:, None]
    return (
        np.stack([tissue & place, tissue & ~place, ~tissue & place, ~tissue & ~place]) & (rows >= 0)
    ).cumsum(-1)


def candidates(labels: np.ndarray, centers: np.ndarray, slides: np.ndarray | None) -> np.ndarray:
    """How many SS, SO, OS, OO each patch can choose its neighbours from: (4, n), itself and its own slide left out."""
    slides = np.arange(len(labels)) if slides is None else slides
    left = lambda *parts: alike(*parts)[1] - alike(*parts, slides)[1]  # noqa: E731
    both, tissue, place = left(labels, centers), left(labels), left(centers)
    return np.stack(
        [both, tissue - both, place - both, left(np.zeros_like(labels)) - tissue - place + both]
    )


def chance(pool: np.ndarray, k: int) -> np.ndarray:
    """What `tally` gives in expectation when neighbours are drawn blindly from `pool` (4, n): (4, n, k)."""
    total = pool.sum(0)
    return (pool / np.maximum(total, 1))[..., None] * np.minimum(
        total[:, None], np.arange(1, k + 1)
    )


def index_of(counts: np.ndarray) -> np.ndarray:
    """Robustness index (SS + SO) / (SS + OS) of counts (4, ...); nan where no neighbour shares the centre."""
    return ratio(counts[0] + counts[1], counts[0] + counts[2])


def bounded_of(counts: np.ndarray) -> np.ndarray:
    """PathoROB's bounded index SO / (SO + OS) of counts (4, ...); nan where there is neither."""
    return ratio(counts[1], counts[1] + counts[2])


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under, nan where `under` is 0."""
    return np.where(under, over / np.where(under, under, 1), np.nan)


def probe(x: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int = 0) -> float:
    """Balanced accuracy with which a linear probe finds `target` (n,) for patients it has not seen.

    Ridge classifier on standardised features, strength by leave-one-out on the training part, five folds by patient,
    on at most 1,000 patches. Targets of a single patient cannot be tested; nan if fewer than two others remain.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    keep = np.random.default_rng(seed).permutation(np.flatnonzero(testable(target, groups)))[:1000]
    x, target, groups = x[keep], target[keep], groups[keep]
    if len(np.unique(target)) < 2:
        return math.nan
    count = min(5, len(np.unique(groups)), np.bincount(target).max())
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 5, 7)))
    with (
        warnings.catch_warnings()
    ):  # a rare centre is not in every fold: known, and it lowers the score
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return recall(cross_val_predict(model, x, target, groups=groups, cv=folds), target)


def testable(target: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Rows (n,) whose target occurs in more than one patient."""
    return np.isin(
        target, [t for t in np.unique(target) if len(np.unique(groups[target == t])) > 1]
    )


def measure(
    x: np.ndarray | None,
    labels: np.ndarray,
    centers: np.ndarray,
    slides: np.ndarray | None,
    groups: np.ndarray,
    *,
    seed: int = 0,
    normalize: bool = True,
    k_max: int = 20,
) -> tuple[np.ndarray, dict]:
    """Counts (4, n, k_max) and {(metric, k): value} of features x (n, D) on one sample; with x None what chance gives.

    kNN votes and probes are scored by balanced accuracy; the centre only where a patch has a candidate of its own.
    """
    pool = candidates(labels, centers, slides)
    found, values = pool[0] + pool[2] > 0, {}
    if x is None:
        counts = chance(pool, k_max)
    else:
        distances, rows = neighbors(x, k_max, slides, normalize)
        counts = tally(rows, labels, centers)
    for k in (k for k in KS if k <= counts.shape[-1]):
        total = counts[:, :, k - 1].sum(1)
        values["index", k], values["bounded", k] = float(index_of(total)), float(bounded_of(total))
        for metric, target, keep in (
            ("knn_class", labels, slice(None)),
            ("knn_center", centers, found),
        ):
            values[metric, k] = (
                guess(target[keep])
                if x is None
                else recall(
                    evaluate.vote(
                        np.where(rows[:, :k] < 0, -1, target[rows[:, :k]]),
                        distances[:, :k],
                        target.max() + 1,
                    )[keep],
                    target[keep],
                )
            )
    for metric, target in (("probe_class", labels), ("probe_center", centers)):
        values[metric, None] = (
            guess(target[testable(target, groups)]) if x is None else probe(x, target, groups, seed)
        )
    return counts, values


def guess(target: np.ndarray) -> float:
    """Balanced accuracy of blind guessing; nan if there is nothing to choose between."""
    kinds = len(np.unique(target))
    return 1 / kinds if kinds > 1 else math.nan


def bootstrap(counts: list[np.ndarray], groups: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """Index (DRAWS, k) of resampled patients, averaged over samples; counts (4, n, k) and patient numbers (n,) of each.

    The same seed draws the same patients, so differences between models are paired. Queries are resampled, their
    neighbours stay: a patient drawn twice has its patches counted twice.
    """
    patients = 1 + max(int(g.max()) for g in groups)
    weights = np.random.default_rng(seed).multinomial(
        patients, np.full(patients, 1 / patients), DRAWS
    )
    values = []
    for count, group in zip(counts, groups, strict=True):
        sums = np.zeros((patients, 4, count.shape[-1]))
        np.add.at(sums, group, count.transpose(1, 0, 2))
        values.append(
            index_of(
                (weights @ sums.reshape(patients, -1)).reshape(DRAWS, 4, -1).transpose(1, 0, 2)
            )
        )
    return np.mean(values, 0)


# ------------------------------------------------------------------ Table 3


def study(args: argparse.Namespace, weights: dict, options: dict) -> int:
    """Sample, measure every model, record, write table3.md and the pictures. Returns the exit status."""
    folder = args.benchmark or args.data / "benchmarks" / "tiger"
    benchmark, slides = load(folder, args.patch_size, args.min_fraction)
    if benchmark.centers is None:
        raise UserError(
            f"{folder / 'labels.csv'}: no column center; add the hospital or scanner of each image, or use "
            "--perturb, which needs none"
        )
    slide_names, slides = slides, codes(slides)
    labels, centers, groups = map(codes, (benchmark.labels, benchmark.centers, benchmark.groups))
    classes, sites = (
        [benchmark.classes[i] for i in np.unique(benchmark.labels)],
        np.unique(benchmark.centers).tolist(),
    )
    if min(labels.max(), centers.max()) < 1:
        raise UserError(
            f"{benchmark.name}: {labels.max() + 1} classes and {centers.max() + 1} centres; the index sets "
            "one against the other and needs two of each (--perturb needs neither)"
        )
    pool = np.arange(len(labels))
    if args.exclude_seen:
        seen = [
            evaluate.leaked(
                benchmark, evaluate.card(n, args.results, weights=weights[n], **options)
            )
            for n in args.models
        ]
        pool = np.flatnonzero(~np.any(seen, 0))
        if not len(pool):
            raise UserError(
                f"{benchmark.name}: --exclude-seen leaves nothing, the students saw every patient of it"
            )
    seeds = range(args.seed, args.seed + (args.samples if args.per_class else 1))
    samples = [
        pool[
            draw_sample(
                labels[pool], centers[pool], slides[pool], args.per_class, args.per_center, seed
            )
        ]
        for seed in seeds
    ]
    used = np.full(
        len(labels), isinstance(benchmark.images, ImageFiles)
    )  # those evaluate.py caches whole as well
    used[np.concatenate(samples)] = True
    own = f"{benchmark.name}-{args.per_class}{'-per-center' * args.per_center}-{args.seed}"  # features by sampling
    part = benchmark if used.all() else dataclasses.replace(benchmark.subset(used), source=own)
    gathered = gather({"": part}, args, weights, options)
    if gathered is None:
        return 0
    arrays, cards, failures = gathered
    x = {
        n: np.full((len(labels), parts[""].shape[1]), np.nan, np.float32)
        for n, parts in arrays.items()
    }
    for n in x:
        x[n][used] = arrays[n][""]
    lost = used & ~np.all([np.isfinite(array).all(1) for array in x.values()], 0)
    samples = [sample[~lost[sample]] for sample in samples]
    if any(
        len(np.unique(labels[s])) < 2 or len(np.unique(centers[s])) < 2 or len(s) <= KS[0]
        for s in samples
    ):
        raise UserError(
            f"{benchmark.name}: a sample has fewer than two classes, two centres or {KS[0] + 1} patches; "
            "raise --per-class or add patches"
        )
    if all(np.array_equal(samples[0], s) for s in samples):
        samples = samples[:1]  # each draw took everything: their spread would say nothing
    near = None if args.include_same_slide else slides
    if near is not None and any(len(np.unique(slides[s])) < 2 for s in samples):
        raise UserError(
            f"{benchmark.name}: all patches are of slide {slide_names[0]}, whose own are no neighbours; "
            "add slides (column slide, or group, of labels.csv), or --include-same-slide"
        )
    k_max = min(max(KS), min(map(len, samples)) - 1)
    kin = (
        "of the same group"
        if slide_names == benchmark.groups and (folder / "labels.csv").is_file()
        else "on the same slide"
    )
    settings = "; ".join(
        [
            f"at most {args.per_class} patches of each class{' and centre' * args.per_center}"
            if args.per_class
            else "all patches",
            f"neighbours {kin} {'included' if near is None else 'excluded'}",
            f"features {'as they are' if args.raw else 'L2-normalised'}",
            *["patients of the students left out"] * args.exclude_seen,
        ]
    )
    base = {
        "benchmark": benchmark.name,
        "protocol": "robustness",
        "settings": settings,
        "patches": evaluate.digest([benchmark.ids[i] for sample in samples for i in sample]),
    }
    found, counts = [], {n: [] for n in ["chance", *x]}
    for seed, s in zip(seeds, samples, strict=False):
        for n, about in counts.items():
            count, values = measure(
                None if n == "chance" else x[n][s],
                labels[s],
                centers[s],
                None if near is None else near[s],
                groups[s],
                seed=seed,
                normalize=not args.raw,
                k_max=k_max,
            )
            about.append(count)
            found += [
                base | {"model": n, "metric": metric, "k": k, "seed": seed, "value": value}
                for (metric, k), value in values.items()
            ]
    found += intervals(base, counts, [groups[s] for s in samples])
    k = [k for k in KS if k <= k_max][:3][-1]
    for field, target, kinds in (("class", labels, classes), ("center", centers, sites)):
        found += [
            base
            | {
                "model": n,
                "metric": f"index_by_{field}",
                field: kind,
                "k": k,
                "value": np.mean(
                    [
                        index_of(c[:, target[s] == i, k - 1].sum(1))
                        for c, s in zip(counts[n], samples, strict=True)
                    ]
                ),
            }
            for i, kind in enumerate(kinds)
            for n in counts
        ]
    for (i, kind), (j, site) in itertools.product(enumerate(classes), enumerate(sites)):
        cell = (labels == i) & (centers == j)
        found.append(
            base
            | {
                "model": "data",
                "metric": "cell",
                "class": kind,
                "center": site,
                "value": int(cell[samples[0]].sum()),
                "available": int(cell[pool].sum()),
            }
        )
    for n, about in cards.items():
        pair = about["metadata"].get("teacher"), about["metadata"].get("student")
        known = np.unique(groups[evaluate.leaked(benchmark, about)])
        found.append(
            base
            | {
                "model": n,
                "metric": "seen",
                "value": len(known),
                "patients": int(groups.max()) + 1,
                "paper": "G2L" if pair == ("h-optimus-0", "hibou-l") else n if n in PAPER else None,
            }
        )
    evaluate.record(
        args.results,
        found,
        same=(
            "model",
            "benchmark",
            "protocol",
            "settings",
            "metric",
            "seed",
            "other",
            "k",
            "class",
            "center",
        ),
    )
    lines = section([row for row in read_metrics(args.results) if base.items() <= row.items()])
    print(aligned(lines[: lines.index("### By class")]))
    out = args.results / "robustness" / safe(benchmark.name)
    if not args.no_pictures:
        draw_index(out / "index.png", benchmark.name, counts)
        drawn = np.unique(np.concatenate(samples))
        some = np.sort(np.random.default_rng(0).permutation(drawn)[:800])
        title = (
            f"{benchmark.name}: {f'{len(some)} of ' if len(some) < len(drawn) else ''}the {len(drawn)} patches "
            f"drawn in {len(samples)} sample{'s' * (len(samples) > 1)}"
        )
        draw_map(out / "map.png", title, benchmark, x, some, args.map)
        for n in x:
            rows = neighbors(
                x[n][samples[0]], 5, None if near is None else near[samples[0]], not args.raw
            )[1]
            draw_gallery(out / f"gallery-{safe(n)}.png", n, benchmark, samples[0], rows)
        print(f"pictures: {out}/index.png, map.png, gallery-*.png")
    files = (
        [] if args.no_pictures else ["index.png", "map.png", *(f"gallery-{safe(n)}.png" for n in x)]
    )
    evaluate.record(
        args.results,
        [base | {"model": "data", "metric": "pictures", "value": len(files), "files": files}],
        same=("benchmark", "protocol", "metric"),
    )  # each run draws over the last one's
    evaluate.write_text(args.results / "table3.md", table3(args.results))
    print(f"table: {args.results / 'table3.md'}")
    return finish(failures, {benchmark.name: int(lost.sum())} if lost.any() else {})


def gather(
    parts: dict, args: argparse.Namespace, weights: dict, options: dict
) -> tuple[dict, dict, list[str]] | None:
    """Features {model: {part: (n, dim)}} of benchmarks {part: Benchmark}, each model's card, and why one is missing.

    Under torchrun all ranks share the images, then one goes on alone: None on the others.
    """
    from models import leave_distributed, setup_distributed

    rank, _, _ = setup_distributed(args.device)
    check_names(args.models)
    x, cards, failures = {}, {}, []
    for name in args.models:
        try:
            x[display(name)] = {
                key: evaluate.features(
                    name,
                    part,
                    args.results,
                    weights=weights[name],
                    batch_size=args.batch_size,
                    workers=args.workers,
                    max_unreadable=args.max_unreadable,
                    **options,
                )
                for key, part in parts.items()
            }
            cards[display(name)] = evaluate.card(
                name, args.results, weights=weights[name], **options
            )
        except UserError as error:
            failures.append(str(error))
    if not x:
        raise UserError("; ".join(failures))
    leave_distributed()
    return (x, cards, failures) if rank == 0 else None


def intervals(
    base: dict, counts: dict[str, list[np.ndarray]], groups: list[np.ndarray]
) -> list[dict]:
    """95 % bootstrap intervals over patients of each model's index, and of the difference of each pair of models."""
    models, patients = [n for n in counts if n != "chance"], len(np.unique(np.concatenate(groups)))
    draws = {n: bootstrap(counts[n], groups) for n in models}
    point = {n: np.mean([index_of(c.sum(1)) for c in counts[n]], 0) for n in models}
    rows = []
    for one, other in [(n, None) for n in models] + list(itertools.combinations(models, 2)):
        for k in (k for k in KS if k <= len(point[one])):
            value, spread = (
                v[one][..., k - 1] - (v[other][..., k - 1] if other else 0) for v in (point, draws)
            )
            # not known if a resample has no ratio, nor from a handful of patients
            low, high = (
                np.percentile(spread, [2.5, 97.5])
                if patients >= evaluate.FEW
                else (math.nan, math.nan)
            )
            metric = "index_difference" if other else "index_interval"
            rows.append(
                base
                | {
                    "model": one,
                    "other": other,
                    "metric": metric,
                    "k": k,
                    "value": float(value),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return rows


def table3(results: Path) -> str:
    """table3.md from metrics.jsonl alone: a section per benchmark and way of sampling; with TIGER the paper's numbers,
    which say nothing of other patches."""
    rows = [row for row in read_metrics(results) if row["protocol"] == "robustness"]
    text = [
        "# Table 3: robustness index",
        "",
        "Neighbours of the same class / neighbours of the same centre, summed over all patches. **1 is no "
        "threshold**: *chance* is what features that know nothing score on the same sample, and where every model "
        "ends as k grows. Above chance the tissue weighs more than the centre, below it the centre.",
        "",
    ]
    for key in dict.fromkeys((row["benchmark"], row["settings"]) for row in rows):
        text += section([row for row in rows if (row["benchmark"], row["settings"]) == key])
    if not any(row["benchmark"] == "tiger" for row in rows):
        return "\n".join(text)
    paper = [[name, *(f"{value:.4f}" for value in values)] for name, values in PAPER.items()]
    return "\n".join(
        [
            *text,
            "## The paper's Table 3",
            "",
            "TIGER, 40 patches of each class, 21 centres. No chance "
            "level is given with it; with balanced centres it would be about 4.6. Taken from a public digest "
            "of the paper; its rows for UNI and Virchow were not seen.",
            "",
            markdown(["model", *(f"k = {k}" for k in KS)], paper),
        ]
    )


def section(rows: list[dict]) -> list[str]:
    """Lines of table3.md for the rows of one benchmark and way of sampling."""
    benchmark, settings = rows[0]["benchmark"], rows[0]["settings"]
    drawn = [row["patches"] for row in rows if row["model"] == "chance"][-1]
    rows = [
        row | {f: math.nan for f in ("value", "low", "high") if row.get(f, 0) is None}
        for row in rows
        if row["patches"] == drawn
    ]  # a model measured on other patches is not comparable
    pick = lambda **want: [row for row in rows if all(row.get(f) == v for f, v in want.items())]  # noqa: E731
    values = lambda n, m, k=None, **more: [r["value"] for r in pick(model=n, metric=m, k=k, **more)]  # noqa: E731
    average = lambda *which, **more: float(np.mean(values(*which, **more) or np.nan))  # noqa: E731
    models = {row["model"]: row for row in pick(metric="seen")}
    ks = sorted({row["k"] for row in pick(model="chance", metric="index")})
    middle, samples = ks[:3][-1], len(values("chance", "index", ks[0]))

    def column(k):
        means, texts = [average(n, "index", k) for n in models], []
        for n, mean in zip(models, means, strict=True):
            texts.append(
                show(mean)
                + (f" ± {np.std(values(n, 'index', k), ddof=1):.2f}" if samples > 1 else "")
            )
        if len(models) > 1:
            texts = evaluate.ranked([mean if np.isfinite(mean) else None for mean in means], texts)
        paper = [
            PAPER.get(row["paper"]) if benchmark == "tiger" else None for row in models.values()
        ]
        return [
            t + (f" (paper {p[KS.index(k)]:.2f})" if p else "")
            for t, p in zip(texts, paper, strict=True)
        ]

    seen = {n: row for n, row in models.items() if row["value"]}
    body = zip(models, *map(column, ks), strict=True)
    cells = {(row["class"], row["center"]): row for row in pick(metric="cell")}
    classes, centers = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    counts = {c: sum(row["value"] for key, row in cells.items() if key[0] == c) for c in classes}
    text = [
        f"## {benchmark}",
        "",
        f"{settings[0].upper()}{settings[1:]}. {sum(counts.values())} drawn: "
        + ", ".join(f"{c} {n}" for c, n in counts.items())
        + ". "
        + (
            f"Mean ± standard deviation of {samples} seeded samples."
            if samples > 1
            else "One sample."
        ),
        "",
        markdown(
            ["model", *(f"k = {k}" for k in ks)],
            [[n + " †" * (n in seen), *cells] for n, *cells in body]
            + [["*chance*", *(show(average("chance", "index", k)) for k in ks)]],
        ),
    ]
    if seen:
        known = ", ".join(f"{n}: {row['value']} of {row['patients']}" for n, row in seen.items())
        text += [
            f"† distilled on patients of this benchmark ({known}); --exclude-seen leaves them out.",
            "",
        ]
    blind = average("chance", "index", middle)
    behind = [
        [
            n,
            show(average(n, "index", middle) / blind),
            *(show(average(n, m, middle)) for m in ("bounded", "knn_class", "knn_center")),
            *(show(average(n, m)) for m in ("probe_class", "probe_center")),
        ]
        for n in [*models, "chance"]
    ]
    text += [
        f"### What stands behind it, k = {middle}",
        "",
        f"PathoROB's bounded index; balanced accuracy of the {middle} neighbours' vote and of a linear probe on "
        "unseen patients. The class should be found; the centre is found as far as the features hold it.",
        "",
        markdown(
            [
                "model",
                "index / chance",
                "bounded",
                "kNN class",
                "kNN centre",
                "probe class",
                "probe centre",
            ],
            behind,
        ),
    ]
    over = []
    for row in pick(metric="index_interval", k=middle) + pick(metric="index_difference", k=middle):
        rival, start = (row["other"], 0) if row["other"] else ("chance", blind)
        word = (
            "below"
            if row["high"] < start
            else "above"
            if row["low"] > start
            else "not clearly apart from"
        )
        known = np.isfinite(row["low"])
        over.append(
            [
                row["model"] + (f" − {rival}" if row["other"] else ""),
                show(row["value"]),
                f"{show(row['low'])} to {show(row['high'])}" if known else "–",
                f"{word} {rival}" if known else "too few patients to tell",
            ]
        )
    text += [
        f"### Over patients, k = {middle}",
        "",
        f"95 % interval of {DRAWS} resamples of the patients, paired; "
        f"fewer than {evaluate.FEW} allow none.",
        "",
        markdown(["model", "index", "interval", "reading"], over),
    ]
    for field, title in (("class", "class"), ("center", "centre")):
        kinds = [row[field] for row in pick(metric=f"index_by_{field}", model="chance")]
        index = lambda n, kind, f=field: show(average(n, f"index_by_{f}", middle, **{f: kind}))  # noqa: E731
        text += [
            f"### By {title}",
            "",
            f"Index of the patches of each {title}, k = {middle}.",
            "",
            markdown(
                [title, *models, "chance"],
                [[kind, *(index(n, kind) for n in [*models, "chance"])] for kind in kinds],
            ),
        ]
    shown = {
        key: f"{c['value']} of {c['available']}" if c["available"] else "–"
        for key, c in cells.items()
    }
    pictures = [
        f"![{file.removesuffix('.png')} of {benchmark}](robustness/{safe(benchmark)}/{file})\n"
        for row in pick(metric="pictures")
        for file in row["files"]
    ]
    text += ["### Pictures", "", *pictures] if pictures else []
    return [
        *text,
        "### Patches",
        "",
        "Drawn, in the first sample, of those there are; "
        f"{list(shown.values()).count('–')} of {len(cells)} cells are empty (–).",
        "",
        markdown(["centre", *classes], [[z, *(shown[c, z] for c in classes)] for z in centers]),
    ]


def show(value: float) -> str:
    """Two decimals, or a dash for what is not defined."""
    return f"{value:.2f}" if np.isfinite(value) else "–"


def aligned(lines: list[str]) -> str:
    """Markdown for a terminal: no emphasis, table columns of one width."""
    text, out = re.sub(r"</?u>|\*+|^#+ ", "", "\n".join(lines), flags=re.M), []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] if is_table else [line]
            for line in lines
        ]
        width = [max(map(len, column)) if is_table else 0 for column in zip(*rows, strict=True)]
        out += [
            "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip()
            for row in rows
            if row[-1] != "---"
        ]
    return "\n".join(out)


# ------------------------------------------------------------------ pictures


def canvas(rows: int, columns: int, width: float, height: float):
    """A figure and its axes (rows, columns), each `width` x `height` inches; nothing is shown on a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )


def draw_index(path: Path, title: str, counts: dict[str, list[np.ndarray]]) -> None:
    """Index and bounded index of each model over k = 1, 2, ...: mean and range of the samples, and the chance line."""
    figure, axes = canvas(1, 2, 5.2, 4)
    for ax, rule, label in zip(
        axes[0], (index_of, bounded_of), ("robustness index", "bounded index"), strict=True
    ):
        for (name, samples), color in zip(
            counts.items(), itertools.cycle(["black", *COLORS]), strict=False
        ):
            curves = np.array([rule(count.sum(1)) for count in samples])
            k = np.arange(1, curves.shape[1] + 1)
            ax.plot(
                k, curves.mean(0), color=color, label=name, ls="--" if name == "chance" else "-"
            )
            if name != "chance":
                ax.fill_between(k, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        ax.set(xlabel="neighbours k", ylabel=label, xticks=[1, *KS])
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{title}: tissue against centre among nearest neighbours (shaded: range of samples)",
        fontsize=10,
    )
    save_figure(figure, path)


def draw_map(
    path: Path,
    title: str,
    benchmark: Benchmark,
    x: dict[str, np.ndarray],
    rows: np.ndarray,
    method: str,
) -> None:
    """Each model's embedding of `rows` in two dimensions, coloured by class on the left, by centre on the right."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    figure, axes = canvas(len(x), 2, 5.4, 3.4)
    for (name, array), pair in zip(x.items(), axes, strict=True):
        flat = array[rows] / np.linalg.norm(array[rows], axis=1, keepdims=True).clip(1e-12)
        flat = PCA(min(50, *flat.shape), random_state=0).fit_transform(flat)
        if method == "tsne":
            flat = TSNE(
                perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0
            ).fit_transform(flat)
        for ax, by, values in (
            (pair[0], "class", np.array(benchmark.classes)[benchmark.labels[rows]]),
            (pair[1], "centre", np.array(benchmark.centers)[rows]),
        ):
            for i, value in enumerate(np.unique(values)):
                ax.scatter(
                    *flat[values == value, :2].T,
                    s=9,
                    lw=0,
                    color=COLORS[i % len(COLORS)],
                    label=value,
                    marker="osD^v"[i // len(COLORS) % 5],
                )
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, by {by}", fontsize=9)
            ax.spines[:].set_color("#bbbbbb")
            if ax in axes[0]:
                ax.legend(
                    fontsize=7,
                    markerscale=2,
                    frameon=False,
                    loc="upper left",
                    bbox_to_anchor=(1, 1),
                )
    figure.suptitle(
        f"{title}, {'t-SNE' if method == 'tsne' else 'first two PCA axes'}", fontsize=10
    )
    save_figure(figure, path)


def draw_gallery(
    path: Path, name: str, benchmark: Benchmark, sample: np.ndarray, rows: np.ndarray
) -> None:
    """The queries of a sample whose five nearest neighbours `rows` (n, 5) most often share the centre but not the
    tissue, at most one per patient."""
    labels, centers, groups = (
        codes(a)[sample] for a in (benchmark.labels, benchmark.centers, benchmark.groups)
    )
    misled = (
        (labels[rows] != labels[:, None]) & (centers[rows] == centers[:, None]) & (rows >= 0)
    ).sum(1)
    order = [i for i in np.argsort(-misled, kind="stable") if misled[i]]
    queries = [order[j] for j in np.sort(np.unique(groups[order], return_index=True)[1])][:6]
    color = lambda i, j: (
        "black" if i == j else KINDS[labels[j] == labels[i], centers[j] == centers[i]][1]
    )  # noqa: E731
    lines = [
        [
            (
                benchmark.images[int(sample[j])],
                f"{benchmark.classes[benchmark.labels[sample[j]]]}\n{benchmark.centers[sample[j]]}",
                color(i, j),
            )
            for j in (i, *rows[i])
            if j >= 0
        ]
        for i in queries
    ]
    evaluate.draw_sheet(
        path,
        f"{name}: neighbours that share the centre but not the tissue"
        if queries
        else f"{name}: no neighbour shares the centre of its query but not the tissue",
        {"query": "black"} | {text: c for text, c in KINDS.values()},
        lines,
    )


# ------------------------------------------------------------------ shifts of stain and scanner, on any patches

# What each strength means, where it changes nothing, which can be asked for, and which are tried.
SHIFTS = {
    "stain": (
        "haematoxylin × (1 + s), eosin / (1 + s)",
        0,
        (-0.9, 9),
        (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4),
    ),
    "brightness": ("intensity × (1 + s)", 0, (-1, 9), (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)),
    "blur": ("standard deviation of a Gaussian, px", 0, (0, 50), (0.5, 1, 2, 3, 4)),
    "jpeg": ("JPEG quality", 100, (1, 100), (90, 70, 50, 30, 10)),
    "scale": ("magnification", 1, (0.1, 10), (0.5, 0.71, 0.84, 1.19, 1.41, 2)),
}
# Optical densities of haematoxylin, eosin and a residual in red, green, blue (Ruifrok and Johnston 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def shift(image: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """An image (H, W, 3) uint8 with its stain, brightness, focus, compression or magnification changed; same shape."""
    from PIL import Image

    if kind == "stain":
        amounts = -np.log((image + 1.0) / 256) @ np.linalg.inv(STAINS)
        changed = 256 * np.exp(-amounts * (1 + strength, 1 / (1 + strength), 1) @ STAINS) - 1
    elif kind == "brightness":
        changed = image * (1.0 + strength)
    elif kind == "blur":
        from scipy.ndimage import gaussian_filter

        changed = gaussian_filter(image.astype(np.float32), (strength, strength, 0), mode="nearest")
    elif kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(strength))
        return np.asarray(Image.open(buffer))
    else:  # seen at another magnification: the middle enlarged, or the whole shrunk and mirrored at the edges
        height, width = image.shape[:2]
        h, w = round(height * min(1, 1 / strength)), round(width * min(1, 1 / strength))
        top, left = (height - h) // 2, (width - w) // 2
        size = (
            (width, height) if strength > 1 else (round(width * strength), round(height * strength))
        )
        changed = np.asarray(
            Image.fromarray(image[top : top + h, left : left + w]).resize(
                size, Image.Resampling.BICUBIC
            )
        )
        pad = [
            (gap // 2, gap - gap // 2)
            for gap in (height - changed.shape[0], width - changed.shape[1])
        ]
        return np.pad(changed, [*pad, (0, 0)], mode="symmetric")
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def some_patches(args: argparse.Namespace) -> Benchmark:
    """`--patches` patches, seeded, of a cohort (`--cancer`), of a benchmark, or of a folder with nothing but images."""
    if args.cancer:
        index = PatchIndex(args.data / "tiles" / args.cancer)
        rows = list(dict.fromkeys(index.draw(args.seed, n) for n in range(20 * args.patches)))[
            : args.patches
        ]
        ids = [f"{index.slides[slide]} {row}" for slide, row in map(index.locate, rows)]
        return unlabelled(args.cancer, Source(rows, index.read), ids)
    folder = args.benchmark or args.data / "benchmarks" / "tiger"
    benchmark = load(folder, args.patch_size, args.min_fraction, bare=True)[0]
    luck = np.random.default_rng(args.seed).permutation(len(benchmark))
    return benchmark.subset(luck < args.patches)


def displacement(base: np.ndarray, moved: np.ndarray) -> dict[str, float]:
    """How far features (n, D) of changed patches lie from those of the same patches unchanged.

    cosine to the unchanged patch, mean; distance to it over the median distance between two patches (L2-normalised),
    median; first: share of patches that are still nearest to themselves; rank of itself among all, median.
    """
    base, moved = (a / np.linalg.norm(a, axis=1, keepdims=True).clip(1e-12) for a in (base, moved))
    similar, own = moved @ base.T, np.einsum("nd,nd->n", moved, base)
    apart = np.sqrt(np.clip(2 - 2 * (base @ base.T), 0, None))[np.triu_indices(len(base), 1)]
    np.fill_diagonal(similar, -np.inf)
    rank = 1 + (similar >= own[:, None]).sum(1)  # a tie is no recognition
    return {
        "cosine": float(own.mean()),
        "distance": float(
            np.median(np.linalg.norm(base - moved, axis=1)) / max(np.median(apart), 1e-12)
        ),
        "first": float((rank == 1).mean()),
        "rank": float(np.median(rank)),
        "others": float(1 - np.mean(apart**2) / 2),
    }


def perturb(args: argparse.Namespace, weights: dict, options: dict) -> int:
    """Change the same patches step by step and follow every model's features; a curve and a table for each kind."""
    patches = some_patches(args)
    if len(patches) < 3:
        raise UserError(
            f"{patches.name}: {len(patches)} patches; at least 3 are needed to tell self from others"
        )
    steps = {kind: sorted(args.strengths or SHIFTS[kind][3]) for kind in args.perturb}
    source = {None: dataclasses.replace(patches, name=f"{patches.name}-unchanged")}
    for kind, s in [(kind, s) for kind, strengths in steps.items() for s in strengths]:
        images = Source(
            patches.images,
            partial(shift, kind=kind, strength=s),
            getattr(patches.images, "files", ()),
            f"{getattr(patches.images, 'rule', '')} {kind} {s:g}",
        )
        source[kind, s] = dataclasses.replace(
            patches, name=f"{patches.name}-{kind}{s:g}", images=images
        )
    gathered = gather(source, args, weights, options)
    if gathered is None:
        return 0
    x, _, failures = gathered
    fine = np.all(
        [np.isfinite(array).all(1) for parts in x.values() for array in parts.values()], 0
    )
    found = {
        (n, *step): displacement(x[n][None][fine], x[n][step][fine])
        for n in x
        for step in source
        if step
    }
    still = {
        (n, kind, SHIFTS[kind][1]): displacement(x[n][None][fine], x[n][None][fine])
        for n in x
        for kind in steps
    }
    base = {"benchmark": patches.name, "protocol": "perturb", "images": int(fine.sum())}
    evaluate.record(
        args.results,
        [
            base | {"model": n, "metric": f"{kind} {s:g} {metric}", "value": value}
            for (n, kind, s), values in found.items()
            for metric, value in values.items()
        ],
    )
    text = [
        "# Shifts of stain and scanner",
        "",
        f"{fine.sum()} patches of {patches.name}. Distance of a changed patch "
        "to itself over the median distance of two patches (1: as far as any other), and the share still nearest "
        "to themselves.",
        "",
    ]
    out = args.results / "robustness" / safe(patches.name)
    for kind, strengths in steps.items():
        rows = [
            [
                n,
                *(
                    f"{found[n, kind, s]['distance']:.2f} ({found[n, kind, s]['first']:.0%})"
                    for s in strengths
                ),
            ]
            for n in x
        ]
        text += [
            f"## {kind}: {SHIFTS[kind][0]}",
            "",
            markdown(["model", *map("{:g}".format, strengths)], rows),
        ]
        if not args.no_pictures:
            draw_shift(
                out / f"{kind}.png",
                kind,
                strengths,
                patches.images[int(fine.argmax())],
                still | found,
                list(x),
            )
    evaluate.write_text(out / "shifts.md", "\n".join(text) + "\n")
    print(
        aligned(text[2:])
        + f"\ntable: {out}/shifts.md"
        + ("" if args.no_pictures else f"   curves: {out}/*.png")
    )
    return finish(failures, {} if fine.all() else {patches.name: int((~fine).sum())})


def draw_shift(
    path: Path, kind: str, strengths: list[float], image: np.ndarray, found: dict, names: list[str]
) -> None:
    """One patch at every strength above the models' curves: cosine, relative distance, share nearest to itself."""
    meaning, nothing, *_ = SHIFTS[kind]
    steps = sorted({*strengths, nothing})
    figure, axes = canvas(1, 3, 4.2, 4.6)
    strip = figure.add_axes((0.03, 0.72, 0.94, 0.22))
    strip.imshow(
        np.concatenate(
            [
                np.pad(
                    image if s == nothing else shift(image, kind, s),
                    ((0, 0), (3, 3), (0, 0)),
                    constant_values=255,
                )
                for s in steps
            ],
            1,
        )
    )
    width = image.shape[1] + 6
    strip.set(
        xticks=[width * (i + 0.5) for i in range(len(steps))],
        xticklabels=[f"{s:g}" for s in steps],
        yticks=[],
    )
    strip.spines[:].set_visible(False)
    strip.set_title(f"{kind}: one patch, and how far the features of all go", fontsize=10)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.66), w_pad=0.1)
    labels = {
        "cosine": "cosine to itself unchanged\n(dotted: mean of two patches)",
        "distance": "distance to itself / median distance",
        "first": "share still nearest to itself",
    }
    for ax, (metric, label) in zip(axes[0], labels.items(), strict=True):
        for name, color in zip(names, itertools.cycle(COLORS), strict=False):
            ax.plot(
                steps,
                [found[name, kind, s][metric] for s in steps],
                "o-",
                ms=3,
                color=color,
                label=name,
            )
            if metric == "cosine":
                ax.axhline(found[name, kind, strengths[0]]["others"], color=color, ls=":", lw=1)
        ax.set(xlabel=meaning, ylabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 2].set_ylim(-0.02, 1.02)
    axes[0, 1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


# ------------------------------------------------------------------ command line


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    from models import add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to compare: registry names, "
        "timm:NAME, folders such as runs/NAME/student; all at hand if not given",
    )
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--benchmark",
        type=directory,
        metavar="DIR",
        help="folder with labels.csv (image,label,group,"
        "center and perhaps slide), TIGER's wsirois, or PathoROB's metadata and images; "
        "DATA/benchmarks/tiger",
    )
    where.add_argument(
        "--data", type=Path, default=Path("data"), help="its benchmarks/ and tiles/ are looked in"
    )
    draw = parser.add_argument_group("sampling")
    draw.add_argument(
        "--per-class",
        type=partial(whole, least=0),
        default=40,
        metavar="N",
        help="patches of each class; 0 takes all",
    )
    draw.add_argument(
        "--per-center", action="store_true", help="N patches of each class and centre instead"
    )
    draw.add_argument(
        "--samples", type=whole, default=5, metavar="N", help="seeded samples, for their spread"
    )
    draw.add_argument("--seed", type=partial(whole, least=0), default=0, help="of the first sample")
    draw.add_argument(
        "--exclude-seen",
        action="store_true",
        help="leave out patients that a student was distilled on; otherwise the table marks it",
    )
    draw.add_argument(
        "--patch-size",
        type=whole,
        default=224,
        metavar="PX",
        help="TIGER: side of a patch, 0.5 µm/px",
    )
    draw.add_argument(
        "--min-fraction",
        type=share,
        default=0.75,
        metavar="SHARE",
        help="TIGER: a class must cover it",
    )
    index = parser.add_argument_group("index")
    index.add_argument(
        "--include-same-slide",
        action="store_true",
        help="let neighbours come from the patch's own "
        "slide, as the paper seems to; it raises the counts of both class and centre",
    )
    index.add_argument(
        "--raw", action="store_true", help="compare features as they are instead of L2-normalised"
    )
    shifts = parser.add_argument_group("shifts of stain and scanner, instead of the index")
    shifts.add_argument(
        "--perturb",
        nargs="+",
        choices=list(SHIFTS),
        metavar="KIND",
        help="change patches and follow "
        f"the features: {', '.join(SHIFTS)}; needs no centres, any folder of images will do",
    )
    shifts.add_argument(
        "--strengths",
        nargs="+",
        type=float,
        metavar="S",
        help="of the change, a range if not given; "
        + "; ".join(f"{kind}: {meaning}" for kind, (meaning, *_) in SHIFTS.items()),
    )
    shifts.add_argument(
        "--cancer", metavar="NAME", help="patches of DATA/tiles/NAME, as tile.py made them"
    )
    shifts.add_argument(
        "--patches", type=whole, default=200, metavar="N", help="how many to follow"
    )
    run = evaluate.add_running_arguments(where, parser.add_argument_group("running"))
    run.add_argument(
        "--map", default="tsne", choices=["tsne", "pca"], help="layout of the embedding map"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.strengths:
        if len(args.perturb or ()) != 1:
            parser.error("--strengths goes with exactly one kind of --perturb")
        low, high = SHIFTS[args.perturb[0]][2]
        if min(args.strengths) < low or max(args.strengths) > high:
            parser.error(f"--strengths of {args.perturb[0]} lie between {low} and {high}")
    if args.cancer and not args.perturb:
        parser.error(
            "--cancer goes with --perturb: without it, centres and classes are needed (--benchmark DIR)"
        )
    if args.min_fraction == 0:
        parser.error(
            "--min-fraction 0: a patch is of the class that covers this share of it, so it is above 0"
        )

    def work() -> int:
        from models import model_options, parse_weights

        args.models = args.models or evaluate.models_at_hand(args)
        if not args.models:
            raise UserError(
                "--models: none named and none at hand; name one, for instance runs/NAME/student"
            )
        options = model_options(args) | ({"input_size": args.input_size} if args.input_size else {})
        return (perturb if args.perturb else study)(
            args, parse_weights(args.weights, args.models), options
        )

    return evaluate.guarded(work)


if __name__ == "__main__":
    sys.exit(main())

"""Stage 4: does a model see tissue or the hospital it came from? Table 3 of G2L, with what is needed to read it.

    python robustness.py --models h-optimus-0 hibou-l runs/brca/student            # data/benchmarks/tiger
    python robustness.py --models h-optimus-0 runs/brca/student --benchmark DIR    # your own patches and centres
    python robustness.py --models h-optimus-0 runs/brca/student --perturb stain    # no centres needed

The robustness index (de Jong, Marcus and Teuwen, arXiv 2501.18055) looks at the k nearest neighbours of every patch:

    index = neighbours of the same class / neighbours of the same centre = (SS + SO) / (SS + OS)

where S and O say whether first the class and second the centre is the same or other; counts are summed over all
patches before the ratio is taken. PathoROB (arXiv 2507.17845) bounds it to 0..1 by SO / (SO + OS). An index of 1 is no
threshold: a model that knows nothing already scores (share of the class) / (share of the centre), about 4.2 for five
balanced classes in 21 balanced centres, and every model drifts there as k grows. So each number here stands beside the
chance level of the very sample drawn, and beside how well neighbours and a linear probe tell class and centre.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

import tile
from evaluate import Benchmark, ImageFiles, card, display, features, load_folder, read_metrics, record, safe, write_text

KS = (3, 5, 10, 20)
DRAWS = 1000  # bootstrap resamples of patients

# Table 3 of G2L (TIGER, k = 3, 5, 10, 20), as given in a published summary of the paper (papernotes.org, AAAI 2026);
# its rows for UNI and Virchow were not found there and are left out.
PAPER = {"H-optimus-0": (1.0826, 1.1890, 1.3730, 1.8467), "UNI-v2": (1.0682, 1.2433, 1.4113, 1.8548),
         "Hibou-L": (0.9056, 0.9905, 1.0879, 1.1855), "G2L": (1.0891, 1.3002, 1.5021, 2.0316)}
PAPER_NAMES = {"h-optimus-0": "H-optimus-0", "uni2-h": "UNI-v2", "hibou-l": "Hibou-L"}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c564b", "#7f7f7f")
KINDS = {(True, False): ("same tissue, other centre", "#009e73"), (True, True): ("same tissue, same centre", "#56b4e9"),
         (False, True): ("other tissue, same centre", "#d55e00"), (False, False): ("neither", "#bbbbbb")}

TIGER_CLASSES = {1: "invasive tumour", 3: "in-situ tumour", 2: "tumour stroma", 6: "inflamed stroma", 5: "necrosis"}


# ---- patches with class, patient, slide and centre -------------------------------------------------------------------


class Regions:
    """Patches cut from annotated region images. Item i is (size, size, 3) uint8; the last image stays open, as neighbours
    in the list come from the same file."""

    def __init__(self, patches: list[tuple[str, int, int]], size: int):
        self.patches, self.size = patches, size
        self.files = [Path(path) for path, _, _ in patches]  # watched by the feature cache
        self.rule = f"{size} px"

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, i: int) -> np.ndarray:
        path, x, y = self.patches[i]
        return open_rgb(path)[y:y + self.size, x:x + self.size]


@lru_cache(maxsize=2)
def open_rgb(path: str) -> np.ndarray:
    """An image file as (H, W, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def tiger_origin(slide: str) -> tuple[str, str]:
    """(patient, centre) from the name of a TIGER slide; raises UserError for a name of none of the three kinds."""
    if match := re.match(r"(TCGA-(\w\w)-\w{4})", slide):
        return match[1], f"TCGA-{match[2]}"  # the tissue source site contributed the slide
    if match := re.match(r"(TC_S01_P\d+)", slide):
        return match[1], "RUMC"
    if match := re.match(r"(\d+)[BS]", slide):
        return f"JB-{match[1]}", "JB"
    raise tile.UserError(f"{slide}: not a TIGER slide name; expected TCGA-XX-..., TC_S01_P... or digits with B or S")


def load_tiger(folder: Path, size: int, min_fraction: float):
    """Patches of the five tissue classes of TIGER's `wsirois`, as it unpacks.

    A region image is cut into a grid of `size` px (0.5 µm/px); a patch belongs to the class that covers at least
    `min_fraction` of it. Regions of tissue-cells that overlap one of tissue-bcss of the same slide are passed over, so
    that no tissue is counted twice. Returns (Benchmark, slide of each patch).
    """
    from PIL import Image

    root = next((r for r in (folder, folder / "wsirois", folder / "roi-level-annotations",
                             folder / "wsirois" / "roi-level-annotations") if (r / "tissue-bcss").is_dir()
                 or (r / "tissue-cells").is_dir()), None)
    if root is None:
        raise tile.UserError(f"{folder}: no roi-level-annotations/tissue-bcss or tissue-cells in it; unpack TIGER's "
                             "wsirois there (aws s3 cp --no-sign-request --recursive s3://tiger-training/wsirois ...)")
    codes = np.array(sorted(TIGER_CLASSES))
    patches, labels, slides, small, unmasked, seen = [], [], [], 0, [], {}
    for kind in ("tissue-bcss", "tissue-cells"):
        for path in sorted((root / kind / "images").glob("*.png")):
            name = re.fullmatch(r"(.+)_\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", path.stem)
            if not name:
                raise tile.UserError(f"{path}: expected a name like SLIDE_[xmin, ymin, xmax, ymax].png")
            slide, box = name[1], tuple(map(int, name.groups()[1:]))
            if kind == "tissue-cells" and any(overlap(box, other) for other in seen.get(slide, ())):
                continue
            mask_path = root / kind / "masks" / path.name
            if not mask_path.is_file():
                unmasked.append(path.name)
                continue
            if kind == "tissue-bcss":
                seen.setdefault(slide, []).append(box)
            with Image.open(mask_path) as image:
                mask = np.asarray(image)
            if mask.ndim != 2:
                raise tile.UserError(f"{mask_path}: expected one channel of class values 0 to 7, found {mask.shape}")
            rows, columns = mask.shape[0] // size, mask.shape[1] // size
            small += rows * columns == 0
            cells = mask[:rows * size, :columns * size].reshape(rows, size, columns, size)
            share = (cells[..., None] == codes).mean((1, 3))  # (rows, columns, classes)
            for row, column in zip(*np.nonzero(share.max(-1, initial=0) >= min_fraction), strict=True):
                patches.append((str(path), int(column) * size, int(row) * size))
                labels.append(int(codes[share[row, column].argmax()]))
                slides.append(slide)
    if unmasked:
        print(f"{len(unmasked)} regions have no mask and were passed over, the first: {unmasked[0]}")
    if small:
        print(f"{small} regions are smaller than a patch of {size} px and were passed over (--patch-size)")
    if not patches:
        raise tile.UserError(f"{root}: no patch of {size} px is covered to {min_fraction:.0%} by one tissue class; "
                             "lower --min-fraction or --patch-size")
    origins = [tiger_origin(slide) for slide in slides]
    order = list(TIGER_CLASSES)
    return Benchmark(name="tiger", level="patch", images=Regions(patches, size),
                     ids=[f"{Path(p).stem} {x} {y}" for p, x, y in patches],
                     labels=np.array([order.index(label) for label in labels]), classes=list(TIGER_CLASSES.values()),
                     groups=[patient for patient, _ in origins], centers=[center for _, center in origins]), slides


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two rectangles (xmin, ymin, xmax, ymax) share area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def load_pathorob(folder: Path, table: Path):
    """PathoROB's metadata (slide_id, patch_id, biological_class, medical_center) with images named by patch, or slide
    and patch, anywhere below the folder. A patch that several subsets list counts once. Returns (Benchmark, slides)."""
    with table.open(newline="") as handle:
        rows = {(row["slide_id"], row["patch_id"]): row for row in csv.DictReader(handle)}
    files = {path.with_suffix("").relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
             if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff")}
    names = {name: path for name, path in files.items()} | {path.stem: path for path in files.values()}
    found, missing = {}, []
    for slide, patch in rows:
        path = next((names[n] for n in (f"{slide}/{patch}", f"{slide}-{patch}", f"{slide}_{patch}", patch) if n in names),
                    None)
        found[slide, patch] = path
        if path is None:
            missing.append(f"{slide}-{patch}")
    if missing:
        raise tile.UserError(f"{table}: {len(missing)} of {len(rows)} patches have no image below {folder}, the first: "
                             f"{missing[0]}.png; save each image of the data set as SLIDE_ID-PATCH_ID.png")
    classes = sorted({row["biological_class"] for row in rows.values()})
    return Benchmark(name=folder.name, level="patch", images=ImageFiles(list(found.values())),
                     ids=[f"{slide}-{patch}" for slide, patch in rows],
                     labels=np.array([classes.index(row["biological_class"]) for row in rows.values()]),
                     classes=classes, groups=[slide for slide, _ in rows],
                     centers=[row["medical_center"] for row in rows.values()]), [slide for slide, _ in rows]


def load(folder: Path, size: int, min_fraction: float):
    """Whatever of the three forms lies in `folder`: labels.csv, TIGER or PathoROB. Returns (Benchmark, slides)."""
    if not folder.is_dir():
        raise tile.UserError(f"--benchmark {folder}: no such folder; give one with labels.csv (image,label,group,center), "
                             "TIGER's wsirois, or PathoROB's metadata")
    if (folder / "labels.csv").is_file():
        benchmark = load_folder(folder)
        if benchmark.centers is None:
            raise tile.UserError(f"{folder / 'labels.csv'}: no column 'center'; add the hospital or scanner of each "
                                 "image, or use --perturb, which needs none")
        with (folder / "labels.csv").open(newline="", encoding="utf-8-sig") as handle:
            table = {row["image"]: row.get("slide") for row in csv.DictReader(handle)}
        slides = [table.get(name) or group for name, group in zip(benchmark.ids, benchmark.groups, strict=True)]
        return benchmark, slides  # without a column 'slide' the group stands for it: stricter, never laxer
    for table in sorted(folder.glob("*.csv")):
        with table.open(newline="") as handle:
            if {"slide_id", "patch_id", "biological_class", "medical_center"} <= set(next(csv.reader(handle), [])):
                return load_pathorob(folder, table)
    return load_tiger(folder, size, min_fraction)


# ---- sampling --------------------------------------------------------------------------------------------------------


def draw_sample(labels: np.ndarray, centers: np.ndarray, slides: np.ndarray, count: int, per_center: bool,
                seed: int) -> np.ndarray:
    """Rows of one seeded sample: `count` patches of each class (of each class and centre if `per_center`; 0: all).

    Centres take turns within a class and slides within a centre, so that the sample is spread as evenly as the data
    allow; a centre that has run out leaves its turns to the others. All arrays (n,); returns sorted int64 rows.
    """
    if count == 0:
        return np.arange(len(labels))
    luck = np.random.default_rng(seed).random(len(labels))
    turn = rank_within(luck, labels, centers, slides)
    turn = rank_within(turn + luck, labels, centers)  # luck < 1 only decides between equal turns
    if not per_center:
        turn = rank_within(turn + luck, labels)
    return np.nonzero(turn < count)[0]


def rank_within(key: np.ndarray, *groups: np.ndarray) -> np.ndarray:
    """Rank of each row's key, from 0, among the rows that agree in all `groups`."""
    group = np.unique(np.stack([codes(g) for g in groups]), axis=1, return_inverse=True)[1].ravel()
    order = np.lexsort((key, group))
    first = np.searchsorted(group[order], group[order])
    rank = np.empty(len(key), np.int64)
    rank[order] = np.arange(len(key)) - first
    return rank


def codes(values) -> np.ndarray:
    """Small integers for any labels, in sorted order."""
    return np.unique(np.asarray(values), return_inverse=True)[1].ravel()


# ---- the index -------------------------------------------------------------------------------------------------------


def neighbors(features: np.ndarray, k: int, slides: np.ndarray | None, normalize: bool = True):
    """The k nearest rows of each row, Euclidean, never itself nor of its own slide (`slides` None: only never itself).

    features (n, D); returns distances (n, k) float32 and indices (n, k) int64, -1 where a row has no more candidates.
    """
    import torch

    import kernels

    x = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    if normalize:
        x = torch.nn.functional.normalize(x)
    k = min(k, len(x) - 1)
    groups = None if slides is None else torch.from_numpy(codes(slides))
    distances, indices = kernels.knn(x, k, groups=groups, return_distance=True)
    return distances.numpy(), indices.numpy()


def tally(indices: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Cumulative counts (4, n, K) int64 of neighbours SS, SO, OS, OO among the first 1..K of each row."""
    valid = indices >= 0
    same_class = labels[indices] == labels[:, None]
    same_center = centers[indices] == centers[:, None]
    kinds = np.stack([same_class & same_center, same_class & ~same_center, ~same_class & same_center,
                      ~same_class & ~same_center])
    return (kinds & valid).cumsum(-1)


def candidates(labels: np.ndarray, centers: np.ndarray, slides: np.ndarray | None) -> np.ndarray:
    """How many rows SS, SO, OS, OO each row may choose its neighbours from: (4, n), itself and its slide left out."""
    slides = np.arange(len(labels)) if slides is None else slides

    def alike(*groups):
        _, inverse, counts = np.unique(np.stack([codes(g) for g in groups]), axis=1, return_inverse=True,
                                       return_counts=True)
        return counts[inverse.ravel()]

    both = alike(labels, centers) - alike(labels, centers, slides)
    one = alike(labels) - alike(labels, slides)
    other = alike(centers) - alike(centers, slides)
    return np.stack([both, one - both, other - both, len(labels) - alike(slides) - one - other + both])


def chance(pool: np.ndarray, ks) -> np.ndarray:
    """What `tally` gives in expectation when neighbours are drawn blindly from `pool` (4, n): (4, n, len(ks))."""
    total = pool.sum(0)
    return (pool / np.maximum(total, 1))[..., None] * np.minimum(total[:, None], np.asarray(ks))


def index_of(counts: np.ndarray) -> np.ndarray:
    """Robustness index (SS + SO) / (SS + OS) of summed counts (4, ...); inf where no neighbour shares the centre."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (counts[0] + counts[1]) / (counts[0] + counts[2])


def bounded_of(counts: np.ndarray) -> np.ndarray:
    """PathoROB's bounded index SO / (SO + OS) of summed counts (4, ...); nan where neither occurs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return counts[1] / (counts[1] + counts[2])


def vote(indices: np.ndarray, distances: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Majority of the neighbours' targets (n,); a tie goes to the smaller sum of distances, then the smaller class."""
    weights = np.zeros((len(indices), classes, 2))
    rows = np.repeat(np.arange(len(indices)), indices.shape[1])[indices.ravel() >= 0]
    chosen = target[indices.ravel()[indices.ravel() >= 0]]
    np.add.at(weights, (rows, chosen, 0), 1)
    np.add.at(weights, (rows, chosen, 1), distances.ravel()[indices.ravel() >= 0])
    most = weights[..., 0] == weights[..., 0].max(1, keepdims=True)
    return np.where(most, weights[..., 1], np.inf).argmin(1)


def balanced_accuracy(target: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes present of the share predicted right; blind guessing gives 1 / classes."""
    return float(np.mean([np.mean(predicted[target == c] == c) for c in np.unique(target)])) if len(target) else math.nan


def probe(features: np.ndarray, target: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """How well a linear probe finds `target` for patients it has not seen: (balanced accuracy, chance).

    Ridge classifier on standardised features, its strength chosen by leave-one-out on the training part, five folds
    grouped by patient. Classes of a single patient cannot be tested and are left out; (nan, nan) if fewer than two stay.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    testable = [c for c in np.unique(target) if len(np.unique(groups[target == c])) > 1]
    keep = np.isin(target, testable)
    if len(testable) < 2:
        return math.nan, math.nan
    features, target, groups = features[keep], target[keep], groups[keep]
    folds = StratifiedGroupKFold(min(5, len(np.unique(groups))), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 5, 7)))
    predicted = cross_val_predict(model, features, target, groups=groups, cv=folds)
    return balanced_accuracy(target, predicted), 1 / len(testable)


def bootstrap(counts: list[np.ndarray], groups: list[np.ndarray], patients: int, seed: int = 0) -> np.ndarray:
    """Index of `DRAWS` resamples of the patients, averaged over samples: (DRAWS, K).

    counts: one (4, n, K) per sample; groups: patient number of each of its rows. The same seed draws the same patients,
    so that differences between models are paired. A patient drawn twice counts its patches as queries twice.
    """
    weights = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), DRAWS)
    values = []
    for count, group in zip(counts, groups, strict=True):
        by_patient = np.zeros((4, patients, count.shape[-1]))
        np.add.at(by_patient, (slice(None), group), count)
        values.append(index_of(np.einsum("bp,cpk->cbk", weights, by_patient)))
    return np.mean(values, 0)


def measure(x: np.ndarray, labels: np.ndarray, centers: np.ndarray, slides: np.ndarray | None, groups: np.ndarray,
            seed: int, normalize: bool, k_max: int) -> tuple[np.ndarray, dict]:
    """One model on one sample: cumulative neighbour counts (4, n, k_max) and {(metric, k): value}.

    kNN accuracies are balanced; for the centre only patches count that may choose a neighbour from their own centre.
    """
    distances, indices = neighbors(x, k_max, slides, normalize)
    counts = tally(indices, labels, centers)
    pool = candidates(labels, centers, slides)
    findable = pool[0] + pool[2] > 0
    values = {}
    for k in (k for k in KS if k <= indices.shape[1]):
        total = counts[:, :, k - 1].sum(1)
        guess = [vote(indices[:, :k], distances[:, :k], t, t.max() + 1) for t in (labels, centers)]
        values |= {("index", k): index_of(total), ("bounded", k): bounded_of(total),
                   ("knn_class", k): balanced_accuracy(labels, guess[0]),
                   ("knn_center", k): balanced_accuracy(centers[findable], guess[1][findable])}
    values["probe_class", None] = probe(x, labels, groups, seed)[0]
    values["probe_center", None] = probe(x, centers, groups, seed)[0]
    return counts, values


def chance_values(labels: np.ndarray, centers: np.ndarray, slides: np.ndarray | None, groups: np.ndarray, ks) -> dict:
    """What `measure` gives for a model that knows nothing, for this very sample."""
    pool = candidates(labels, centers, slides)
    total = chance(pool, ks).sum(1)
    testable = [sum(len(np.unique(groups[t == c])) > 1 for c in np.unique(t)) for t in (labels, centers)]
    values = {("probe_class", None): 1 / testable[0] if testable[0] > 1 else math.nan,
              ("probe_center", None): 1 / testable[1] if testable[1] > 1 else math.nan}
    for i, k in enumerate(ks):
        values |= {("index", k): index_of(total[:, i]), ("bounded", k): bounded_of(total[:, i]),
                   ("knn_class", k): 1 / len(np.unique(labels)),
                   ("knn_center", k): 1 / max(1, len(np.unique(centers[pool[0] + pool[2] > 0])))}
    return values


# ---- the table -------------------------------------------------------------------------------------------------------


def study(args: argparse.Namespace, names: list[str], weights: dict, options: dict) -> int:
    """Sample, measure every model, record, and write table3.md and the pictures. Returns the exit status."""
    from models import setup_distributed

    folder = Path(args.benchmark) if args.benchmark else Path(args.data) / "benchmarks" / "tiger"
    benchmark, slides = load(folder, args.patch_size, args.min_fraction)
    labels, centers, slides, groups = benchmark.labels, *map(codes, (benchmark.centers, slides, benchmark.groups))
    if len(np.unique(labels)) < 2 or len(np.unique(centers)) < 2:
        raise tile.UserError(f"{folder}: {len(np.unique(labels))} class and {len(np.unique(centers))} centre; the index "
                             "compares classes with centres and needs two of each (--perturb needs neither)")
    cards = {name: card(name, args.results, weights=weights[name], **options) for name in names}
    seen = {name: sorted(set(cards[name]["metadata"].get("patients", ())) & set(benchmark.groups)) for name in names}
    keep = ~np.isin(benchmark.groups, [p for some in seen.values() for p in some]) if args.exclude_seen else \
        np.ones(len(labels), bool)
    pool = np.nonzero(keep)[0]
    seeds = range(args.seed, args.seed + (args.samples if args.per_class else 1))
    samples = [pool[draw_sample(labels[pool], centers[pool], slides[pool], args.per_class, args.per_center, seed)]
               for seed in seeds]
    needed = np.zeros(len(labels), bool)
    needed[np.concatenate(samples)] = True
    if (folder / "labels.csv").is_file():
        needed[:] = True  # evaluate.py computes and caches the same features
    rows = np.nonzero(needed)[0]
    part = benchmark if needed.all() else benchmark.subset(needed)
    x = {}
    for name in names:
        array = features(name, part, args.results, weights=weights[name], batch_size=args.batch_size,
                         workers=args.workers, **options)
        x[name] = np.full((len(labels), array.shape[1]), np.nan, np.float32)
        x[name][rows] = array
    if setup_distributed(args.device)[0] != 0:
        return 0  # the other ranks only share the features
    unreadable = np.zeros(len(labels), bool)
    unreadable[rows] = ~np.all([np.isfinite(x[name][rows]).all(1) for name in names], 0)
    samples = [sample[~unreadable[sample]] for sample in samples]
    if min(map(len, samples)) <= KS[0]:
        raise tile.UserError(f"{folder}: a sample of {min(map(len, samples))} patches has no {KS[0]} neighbours to offer")
    # The draws agree where the pool is no larger than a sample: their spread then says nothing.
    exhausted = len(samples) > 1 and all(np.array_equal(samples[0], sample) for sample in samples)
    samples, seeds = (samples[:1], seeds[:1]) if exhausted else (samples, seeds)

    near = None if args.include_same_slide else slides
    ks = [k for k in KS if k < min(map(len, samples))]
    settings = (f"{'all patches' if not args.per_class else f'{args.per_class} patches per class'}"
                f"{' and centre' if args.per_center and args.per_class else ''}, "
                f"{'neighbours from the same slide included' if near is None else 'no neighbours from the same slide'}, "
                f"{'raw' if args.raw else 'L2-normalised'} features{', seen patients left out' if args.exclude_seen else ''}")
    base = {"benchmark": benchmark.name, "protocol": "robustness", "settings": settings}
    found, counts, chances, blind = [], {name: [] for name in names}, [], []
    for seed, sample in zip(seeds, samples, strict=True):
        picked = labels[sample], centers[sample], None if near is None else near[sample], groups[sample]
        chances.append(chance_values(*picked, ks))
        blind.append(chance(candidates(*picked[:3]), np.arange(1, max(ks) + 1)))
        found += [base | {"model": "chance", "metric": metric, "k": k, "seed": seed, "value": number(value)}
                  for (metric, k), value in chances[-1].items()]
        for name in names:
            count, values = measure(x[name][sample], *picked, seed, not args.raw, max(ks))
            counts[name].append(count)
            found += [base | {"model": display(name), "metric": metric, "k": k, "seed": seed, "value": number(value)}
                      for (metric, k), value in values.items()]
    found += intervals(base, names, counts, [groups[s] for s in samples], ks)
    found += breakdown(base, benchmark, names, counts, samples, labels, centers, blind, ks)
    found += [base | {"model": "data", "metric": "cell", "class": c, "center": z,
                      "value": int(np.sum((labels[samples[0]] == i) & (centers[samples[0]] == j))),
                      "available": int(np.sum((labels[pool] == i) & (centers[pool] == j)))}
              for i, c in enumerate(benchmark.classes) for j, z in enumerate(sorted(set(benchmark.centers)))]
    for name in names:
        found.append(base | {"model": display(name), "metric": "card", "paper": paper_name(name, cards[name]),
                             "value": len(seen[name]), "patients": len(set(benchmark.groups))})
    record(args.results, found)
    write_text(Path(args.results) / "table3.md", table3(args.results))
    out = Path(args.results) / "robustness" / safe(benchmark.name)
    if not args.no_pictures:
        out.mkdir(parents=True, exist_ok=True)
        draw_index(out / "index.png", benchmark.name, {display(n): counts[n] for n in names}, blind)
        drawn = np.unique(np.concatenate(samples))
        drawn = np.sort(np.random.default_rng(0).permutation(drawn)[:1000])
        draw_map(out / "map.png", benchmark, {display(n): x[n] for n in names}, drawn, args.map)
        for n in names:
            near_first = neighbors(x[n][samples[0]], 5, None if near is None else near[samples[0]], not args.raw)[1]
            draw_gallery(out / f"gallery-{safe(display(n))}.png", display(n), benchmark, samples[0], near_first)
    summary(args.results, benchmark.name)
    if exhausted:
        print("each draw took every patch there is: one sample, so no spread over samples; see the interval over patients")
    print(f"table: {Path(args.results) / 'table3.md'}" + ("" if args.no_pictures else f"   pictures: {out}/"))
    if unreadable.any():
        print(f"{unreadable.sum()} patches could not be read and were left out, the first: "
              f"{benchmark.ids[int(unreadable.argmax())]}", file=sys.stderr)
    return int(unreadable.any())


def number(value: float) -> float | None:
    """A float that JSON can hold: None for infinite or not a number."""
    return float(value) if np.isfinite(value) else None


def paper_name(name: str, known: dict) -> str | None:
    """The row of the paper's Table 3 that this model stands for, if any."""
    pair = known["metadata"].get("teacher"), known["metadata"].get("student")
    return "G2L" if pair == ("h-optimus-0", "hibou-l") else PAPER_NAMES.get(name)


def intervals(base: dict, names: list[str], counts: dict, groups: list[np.ndarray], ks: list[int]) -> list[dict]:
    """95 % bootstrap intervals over patients: of each model's index, and of the difference of each pair of models."""
    patients = 1 + max(int(g.max()) for g in groups)
    draws = {name: bootstrap([c[..., [k - 1 for k in ks]] for c in counts[name]], groups, patients) for name in names}
    point = {name: np.mean([index_of(c.sum(1)) for c in counts[name]], 0)[[k - 1 for k in ks]] for name in names}
    rows = []

    def add(value, sample, **fields):
        for i, k in enumerate(ks):
            finite = sample[np.isfinite(sample[:, i]), i]
            low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (math.nan, math.nan)
            rows.append(base | fields | {"k": k, "value": number(value[i]), "low": number(low), "high": number(high)})

    for name in names:
        add(point[name], draws[name], model=display(name), metric="index_interval")
    for one, other in itertools.combinations(names, 2):
        add(point[one] - point[other], draws[one] - draws[other], model=display(one), other=display(other),
            metric="index_difference")
    return rows


def breakdown(base, benchmark, names, counts, samples, labels, centers, blind, ks) -> list[dict]:
    """The index of the queries of each class and of each centre at the third k, beside its chance level."""
    k = ks[min(2, len(ks) - 1)]
    rows = []
    for metric, field, target, values in (("index_of_class", "class", labels, benchmark.classes),
                                          ("index_of_center", "center", centers, sorted(set(benchmark.centers)))):
        for code, value in enumerate(values):
            def mean(arrays, target=target, code=code):
                return number(np.mean([index_of(a[:, target[s] == code].sum(1)) for a, s in
                                       zip(arrays, samples, strict=True)]))

            rows.append(base | {"model": "chance", "metric": metric, field: value, "k": k,
                                "value": mean([b[..., k - 1] for b in blind])})
            rows += [base | {"model": display(name), "metric": metric, field: value, "k": k,
                             "value": mean([c[..., k - 1] for c in counts[name]])} for name in names]
    return rows


def table3(results: Path) -> str:
    """table3.md, from metrics.jsonl alone: for each benchmark and way of sampling the index, what explains it, the
    differences, the breakdown and the cells; then the paper's own numbers."""
    rows = [row for row in read_metrics(results) if row["protocol"] == "robustness"]
    text = ["# Table 3: robustness index", "",
            "index = neighbours of the same class / neighbours of the same centre, from totals over all patches. "
            "**1 is no threshold**: the row *chance* is what a model that knows nothing scores on the same sample, and "
            "every model drifts there as k grows. Above chance tissue weighs more than the centre, below it the centre.",
            ""]
    for key in dict.fromkeys((row["benchmark"], row["settings"]) for row in rows):
        text += section(key, [row for row in rows if (row["benchmark"], row["settings"]) == key])
    text += ["## The paper's Table 3", "", "On TIGER, 40 patches per class, 21 centres; its chance level is not given "
             "there, and by our count would be about 4.6. From a published summary of the paper; its rows for UNI and "
             "Virchow were not at hand.", "", *markdown(["model", *(f"k = {k}" for k in KS)],
                                                      [[n, *(f"{v:.4f}" for v in values)] for n, values in PAPER.items()])]
    return "\n".join(text) + "\n"


def section(key: tuple[str, str], rows: list[dict]) -> list[str]:
    """The part of table3.md for one benchmark and way of sampling."""
    benchmark, settings = key
    pick = lambda **want: [row for row in rows if all(row.get(f) == v for f, v in want.items())]  # noqa: E731
    cards = pick(metric="card")
    names = [row["model"] for row in cards]
    ks = sorted({row["k"] for row in pick(metric="index")})
    middle = ks[min(2, len(ks) - 1)]
    samples = len({row["seed"] for row in pick(metric="index", model="chance")})
    values = lambda name, metric, k=None: [r["value"] for r in pick(model=name, metric=metric, k=k)]  # noqa: E731
    mean = {(n, m, k): average(values(n, m, k)) for n in [*names, "chance"]
            for m in ("index", "bounded", "knn_class", "knn_center", "probe_class", "probe_center")
            for k in (ks if m[:5] not in ("probe",) else [None])}

    def cell(name, k):
        value, spread = mean[name, "index", k], values(name, "index", k)
        order = sorted((mean[n, "index", k] for n in names if mean[n, "index", k] is not None), reverse=True)
        shown = show(value) + (f" ± {np.std(spread, ddof=1):.2f}" if samples > 1 and None not in spread else "")
        paper = next((row["paper"] for row in cards if row["model"] == name), None)
        beside = f" (paper {PAPER[paper][KS.index(k)]:.2f})" if paper and benchmark == "tiger" else ""
        if len(order) > 1 and value == order[0]:
            shown = f"**{shown}**"
        elif len(order) > 2 and value == order[1]:
            shown = f"<u>{shown}</u>"
        return shown + beside

    marks = {row["model"]: " †" if row["value"] else "" for row in cards}
    text = [f"## {benchmark}", "", f"{settings[0].upper()}{settings[1:]}. "
            + (f"Mean ± standard deviation over {samples} seeded samples." if samples > 1 else "One sample."), "",
            *markdown(["model", *(f"k = {k}" for k in ks)],
                      [[n + marks[n], *(cell(n, k) for k in ks)] for n in names]
                      + [["*chance*", *(show(mean["chance", "index", k]) for k in ks)]])]
    if any(marks.values()):
        seen = [f"{row['model']} ({row['value']} of {row['patients']} patients)" for row in cards if row["value"]]
        text += [f"† was distilled on patients of this benchmark: {', '.join(seen)}; --exclude-seen leaves them out.", ""]
    lift = lambda n: show(ratio(mean[n, "index", middle], mean["chance", "index", middle]))  # noqa: E731
    text += [f"### What stands behind it (k = {middle})", "",
             "Index over chance; PathoROB's bounded index SO / (SO + OS); balanced accuracy of a majority vote of the "
             f"{middle} neighbours and of a linear probe on unseen patients, for the class (higher is better) and for "
             "the centre (the more it exceeds chance, the more of the centre is in the features).", "",
             *markdown(["model", "index / chance", "bounded", "kNN class", "kNN centre", "probe class", "probe centre"],
                       [[n, lift(n), *(show(mean[n, m, middle]) for m in ("bounded", "knn_class", "knn_center")),
                         *(show(mean[n, m, None]) for m in ("probe_class", "probe_center"))]
                        for n in [*names, "chance"]])]
    pairs = [r for r in pick(metric="index_difference", k=middle) if {r["model"], r["other"]} <= set(names)]
    if pairs:
        text += [f"### Differences at k = {middle}", "", f"95 % interval from {DRAWS} paired resamples of the patients.", "",
                 *markdown(["models", "difference", "interval", "reading"],
                           [[f"{r['model']} − {r['other']}", f"{r['value']:+.2f}", f"{r['low']:+.2f} to {r['high']:+.2f}",
                             reading(r)] for r in pairs if r["value"] is not None])]
    for metric, field, title in (("index_of_class", "class", "class"), ("index_of_center", "center", "centre")):
        kinds = dict.fromkeys(row[field] for row in pick(metric=metric, model="chance"))
        text += [f"### By {title} of the patch (k = {middle})", "", *markdown(
            [title, *names, "chance"],
            [[str(kind), *(show(average([r["value"] for r in pick(metric=metric, model=n, **{field: kind})]))
                           for n in [*names, "chance"])] for kind in kinds])]
    cells = {(row["class"], row["center"]): row for row in pick(metric="cell")}
    classes, centers = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    empty = sum(row["available"] == 0 for row in cells.values())
    text += ["### Patches", "", f"Drawn (first sample) of available, {empty} of {len(cells)} cells are empty.", "",
             *markdown(["centre", *classes], [[z, *(f"{cells[c, z]['value']} of {cells[c, z]['available']}" if
                                                    cells[c, z]["available"] else "–" for c in classes)] for z in centers])]
    return text


def average(values: list) -> float | None:
    """Mean of the values, None if there are none or one is missing."""
    return None if not values or None in values else float(np.mean(values))


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known."""
    return None if a is None or not b else a / b


def show(value: float | None) -> str:
    """Two decimals, or a dash for what is not defined."""
    return "–" if value is None else f"{value:.2f}"


def reading(row: dict) -> str:
    """A difference in words."""
    if row["low"] <= 0 <= row["high"]:
        return "within the noise"
    return f"{row['model'] if row['value'] > 0 else row['other']} is higher"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in markdown, columns aligned, with a blank line after it."""
    lines = [head, *rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])])
    return ["| " + " | ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in
                              enumerate(zip(line, width, strict=True))) + " |" for line in lines] + [""]


def summary(results: Path, benchmark: str) -> None:
    """The first two tables of a benchmark, on the terminal."""
    text = (Path(results) / "table3.md").read_text(encoding="utf-8")
    part = text.split(f"\n## {benchmark}\n")[-1].split("\n### By ")[0]
    print("\n" + re.sub(r"</?u>|\*\*", "", part).strip() + "\n")


# ---- pictures --------------------------------------------------------------------------------------------------------


def canvas(rows: int, columns: int, width: float, height: float):
    """A figure without a display and its (rows, columns) axes, `width` x `height` inches each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                   layout="constrained")
    return figure, axes


def save(figure, path: Path) -> None:
    """Write the figure whole or not at all, and let go of it."""
    from matplotlib import pyplot

    with tile.atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def draw_index(path: Path, title: str, counts: dict[str, list[np.ndarray]], blind: list[np.ndarray]) -> None:
    """Index and bounded index over k = 1, 2, ... of each model, mean and range of the samples, with the chance line."""
    figure, axes = canvas(1, 2, 5.2, 4)
    for ax, measure_of, label in zip(axes[0], (index_of, bounded_of), ("robustness index", "bounded index"), strict=True):
        for name, color in zip([*counts, "chance"], itertools.cycle(COLORS), strict=False):
            curves = np.array([measure_of(c.sum(1)) for c in (counts[name] if name in counts else blind)])
            ks = np.arange(1, curves.shape[1] + 1)
            if name == "chance":
                ax.plot(ks, curves.mean(0), "k--", lw=1.2, label="chance")
            else:
                ax.plot(ks, curves.mean(0), color=color, label=name)
                ax.fill_between(ks, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        ax.set(xlabel="neighbours k", ylabel=label, xticks=[1, *KS])
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}: tissue against centre among the nearest neighbours (shaded: range over samples)", fontsize=10)
    save(figure, path)


def draw_map(path: Path, benchmark: Benchmark, x: dict[str, np.ndarray], rows: np.ndarray, method: str) -> None:
    """Each model's embedding in two dimensions, coloured by class on the left and by centre on the right."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    figure, axes = canvas(len(x), 2, 5.2, 3.6)
    for (name, array), pair in zip(x.items(), axes, strict=True):
        unit = array[rows] / np.linalg.norm(array[rows], axis=1, keepdims=True).clip(1e-12)
        flat = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
        if method == "tsne":
            flat = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0).fit_transform(flat)
        for ax, by, values in ((pair[0], "class", np.array(benchmark.classes)[benchmark.labels[rows]]),
                               (pair[1], "centre", np.array(benchmark.centers)[rows])):
            for i, value in enumerate(np.unique(values)):
                points = flat[values == value]
                ax.scatter(points[:, 0], points[:, 1], s=9, color=COLORS[i % len(COLORS)], label=value, lw=0,
                           marker="osD^v"[i // len(COLORS) % 5])
            ax.set(xticks=[], yticks=[], title=f"{name}, by {by}")
            ax.title.set_fontsize(9)
            ax.spines[:].set_color("#bbbbbb")
            if array is next(iter(x.values())):
                ax.legend(fontsize=7, markerscale=1.8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{benchmark.name}: {len(rows)} patches, {'t-SNE' if method == 'tsne' else 'first two PCA axes'}",
                    fontsize=10)
    save(figure, path)


def draw_gallery(path: Path, name: str, benchmark: Benchmark, rows: np.ndarray, indices: np.ndarray) -> None:
    """Queries whose five nearest neighbours most often share the centre but not the tissue, at most one per patient."""
    from matplotlib.patches import Patch

    labels, centers, groups = benchmark.labels[rows], codes(benchmark.centers)[rows], codes(benchmark.groups)[rows]
    near = indices[:, :5]
    misled = ((labels[near] != labels[:, None]) & (centers[near] == centers[:, None]) & (near >= 0)).sum(1)
    queries = []
    for i in np.argsort(-misled, kind="stable"):
        if misled[i] and len(queries) < 6 and groups[i] not in groups[queries]:
            queries.append(int(i))
    figure, axes = canvas(max(1, len(queries)), 1 + near.shape[1], 1.5, 1.75)
    for line, i in zip(axes, queries, strict=False):
        for ax, j in zip(line, [i, *near[i]], strict=True):
            if j < 0:
                ax.axis("off")
                continue
            ax.imshow(benchmark.images[int(rows[j])])
            color = "black" if j == i else KINDS[labels[j] == labels[i], centers[j] == centers[i]][1]
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{benchmark.classes[labels[j]]}\n{benchmark.centers[rows[j]]}", fontsize=7)
            for spine in ax.spines.values():
                spine.set(color=color, linewidth=3)
    for ax in axes.ravel() if not queries else ():
        ax.axis("off")
    figure.legend(handles=[Patch(color="black", label="query"), *(Patch(color=c, label=t) for t, c in KINDS.values())],
                  loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.suptitle(f"{name}: " + ("neighbours that share the centre but not the tissue" if queries else
                                   "no query has a neighbour of its centre with other tissue"), fontsize=10)
    save(figure, path)


# ---- command ---------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from models import add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Table 3 of G2L: table3.md",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["h-optimus-0", "hibou-l"], metavar="NAME",
                        help="models to compare: registry names, timm:NAME, runs/NAME/student")
    add_model_arguments(parser)
    data = parser.add_argument_group("patches")
    data.add_argument("--benchmark", metavar="DIR", help="folder with labels.csv (image,label,group,center[,slide]), "
                      "TIGER's wsirois, or PathoROB metadata and images; default: DATA/benchmarks/tiger")
    data.add_argument("--input-size", type=int, metavar="PX", help="side of the models' input; default: each one's own")
    data.add_argument("--data", default="data", metavar="DIR", help="where stage 1 and the benchmarks lie")
    data.add_argument("--patch-size", type=int, default=224, metavar="PX", help="TIGER: side of a patch, 0.5 µm per px")
    data.add_argument("--min-fraction", type=float, default=0.75, metavar="F",
                      help="TIGER: share of a patch that its class must cover")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--per-class", type=int, default=40, metavar="N",
                          help="patches of each class, spread over centres and slides; 0 takes all patches")
    sampling.add_argument("--per-center", action="store_true", help="N patches of each class and centre")
    sampling.add_argument("--samples", type=int, default=5, metavar="N", help="seeded samples, for their spread")
    sampling.add_argument("--seed", type=int, default=0, help="of the first sample")
    sampling.add_argument("--exclude-seen", action="store_true",
                          help="leave out patients that a student was distilled on; without it such models are marked")
    index = parser.add_argument_group("index")
    index.add_argument("--include-same-slide", action="store_true",
                       help="let a patch find neighbours on its own slide, as the paper seems to; inflates both counts")
    index.add_argument("--raw", action="store_true", help="Euclidean distance of features as they are, not L2-normalised")
    output = parser.add_argument_group("output")
    output.add_argument("--results", default="results", metavar="DIR", help="where metrics, tables and pictures go")
    output.add_argument("--map", default="tsne", choices=["tsne", "pca"], help="how the embedding map is laid out")
    output.add_argument("--no-pictures", action="store_true", help="tables only")
    output.add_argument("--batch-size", type=int, metavar="N", help="images per step; default: by device")
    output.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    from models import model_options, parse_weights

    try:
        return study(args, args.models, parse_weights(args.weights, args.models), model_options(args) | {"input_size": args.input_size})
    except tile.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

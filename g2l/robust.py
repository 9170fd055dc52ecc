"""The robustness index: which neighbours count, what chance gives, and how sure one may be.

For every patch `neighbors` finds the nearest others, `tally` counts them by class and centre (SS,
SO, OS, OO), and the indices are ratios of the totals. `chance` gives the same counts for blind
features. `measure` puts this beside kNN and linear probes for class and centre, and `intervals`
resamples patients.
"""

import itertools
import math
import warnings

import numpy as np
from numpy import ndarray

from g2l.protocols import FEW, recall, resamplings, vote

KS = (3, 5, 10, 20)
BLIND_WIDTH = 32  # of random features
DECIDING = 0.5  # share of the patches that must be able to decide, or no reading is given


def alike(*parts: ndarray) -> tuple[ndarray, ndarray]:
    """Of each row the number and the size of the group of rows that agree in all `parts`, (n,)
    ints.
    """
    _, group, counts = np.unique(np.stack(parts), axis=1, return_inverse=True, return_counts=True)
    return group.ravel(), counts[group.ravel()]


def rank_within(key: ndarray, *parts: ndarray) -> ndarray:
    """Rank from 0 of each row's key among the rows that agree in all of `parts`."""
    group = alike(*parts)[0]
    order = np.lexsort((key, group))
    rank = np.empty(len(key), np.int64)
    rank[order] = np.arange(len(key)) - np.searchsorted(group[order], group[order])
    return rank


def draw_sample(
    labels: ndarray,
    centers: ndarray,
    slides: ndarray,
    count: int,
    per_center: bool,
    seed: int,
) -> ndarray:
    """Sorted rows of a sample: `count` patches of each class, or of each class and centre; 0 takes
    all.

    Centres take turns within a class, and slides within a centre, so the sample is spread as evenly
    as the data allow; a centre that has run out leaves its turns to the others.
    """
    if not count:
        return np.arange(len(labels))
    luck = np.random.default_rng(seed).random(len(labels))  # below 1: decides between equal turns
    turn = rank_within(rank_within(luck, labels, centers, slides) + luck, labels, centers)
    return np.flatnonzero((turn if per_center else rank_within(turn + luck, labels)) < count)


def neighbors(
    x: ndarray,
    k: int,
    slides: ndarray,
    normalize: bool,
) -> tuple[ndarray, ndarray]:
    """Euclidean distances (n, k) and rows (n, k) of the nearest neighbours of each row of x (n, D).

    Itself and its own slide are left out; -1 where no candidate is left.
    """
    import torch

    from kernels import knn

    tensor = torch.from_numpy(np.array(x, np.float32))
    tensor = torch.nn.functional.normalize(tensor) if normalize else tensor
    groups = torch.from_numpy(slides)
    distances, rows = knn(tensor, min(k, len(x) - 1), groups=groups, return_distance=True)
    return distances.numpy(), rows.numpy()


def tally(
    rows: ndarray,
    labels: ndarray,
    centers: ndarray,
) -> ndarray:
    """Counts (4, n, k) of SS, SO, OS, OO among the first 1, 2, ... k neighbours `rows` (n, k)."""
    tissue = labels[rows] == labels[:, None]
    place = centers[rows] == centers[:, None]
    kinds = np.stack([tissue & place, tissue & ~place, ~tissue & place, ~tissue & ~place])
    return (kinds & (rows >= 0)).cumsum(-1)


def candidates(
    labels: ndarray,
    centers: ndarray,
    slides: ndarray,
) -> ndarray:
    """How many SS, SO, OS, OO each patch may choose from: (4, n), itself and its own slide left
    out.
    """
    both, tissue, place, every = (
        alike(*parts)[1] - alike(*parts, slides)[1]
        for parts in (
            (labels, centers),
            (labels,),
            (centers,),
            (np.zeros_like(labels),),
        )
    )
    return np.stack([both, tissue - both, place - both, every - tissue - place + both])


def deciding(
    labels: ndarray,
    centers: ndarray,
    slides: ndarray,
) -> float:
    """Share of the patches that can choose between their class elsewhere (SO) and their centre
    (OS).
    """
    pool = candidates(labels, centers, slides)
    return float((pool[1:3] > 0).all(0).mean())


def chance(pool: ndarray, k: int) -> ndarray:
    """What `tally` gives on average for neighbours drawn blindly from `pool` (4, n): (4, n, k)."""
    total = pool.sum(0)
    drawn = np.minimum(total[:, None], np.arange(1, k + 1))
    return (pool / np.maximum(total, 1))[..., None] * drawn


def index_of(counts: ndarray) -> ndarray:
    """Robustness index (SS + SO) / (SS + OS) of counts (4, ...); nan where no neighbour shares the
    centre.
    """
    return ratio(counts[0] + counts[1], counts[0] + counts[2])


def bounded_of(counts: ndarray) -> ndarray:
    """PathoROB's bounded index SO / (SO + OS) of counts (4, ...); nan where there is neither."""
    return ratio(counts[1], counts[1] + counts[2])


def ratio(over: ndarray, under: ndarray) -> ndarray:
    """over / under, nan where `under` is 0."""
    return np.where(under, over / np.where(under, under, 1), np.nan)


def ridge():
    """A linear probe: ridge classifier on standardised features, strength by leave-one-out."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 5, 7)))


def target_probe(
    x: ndarray,
    target: ndarray,
    groups: ndarray,
    seed: int = 0,
) -> float:
    """Balanced accuracy with which a linear probe finds `target` (n,) for patients it has not seen.

    Five folds by patient, on at most 1,000 patches. Targets of a single patient cannot be tested;
    nan if fewer than two others remain.
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    keep = np.random.default_rng(seed).permutation(np.flatnonzero(testable(target, groups)))[:1000]
    x = x[keep]
    target = target[keep]
    groups = groups[keep]
    if len(np.unique(target)) < 2:
        return math.nan
    count = min(5, len(np.unique(groups)), np.bincount(target).max())
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # a rare centre is not in every fold, which lowers the score
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return recall(cross_val_predict(ridge(), x, target, groups=groups, cv=folds), target)


def testable(target: ndarray, groups: ndarray) -> ndarray:
    """Rows (n,) whose target occurs in more than one patient."""
    several = [t for t in np.unique(target) if len(np.unique(groups[target == t])) > 1]
    return np.isin(target, several)


def measure(
    x: ndarray | None,
    labels: ndarray,
    centers: ndarray,
    slides: ndarray,
    groups: ndarray,
    *,
    seed: int = 0,
    normalize: bool = True,
    k_max: int = 20,
) -> tuple[ndarray, dict]:
    """Counts (4, n, k_max) and {(metric, k): value} of features x (n, D) on one sample.

    With x None the indices are those that chance gives, and kNN and probes are measured on random
    features, one draw a seed. They are scored by balanced accuracy; the centre only where a patch
    has a candidate of its own.
    """
    pool = candidates(labels, centers, slides)
    blind = np.random.default_rng(seed).normal(size=(len(labels), BLIND_WIDTH))
    features = blind if x is None else x
    distances, rows = neighbors(features, k_max, slides, normalize)
    counts = chance(pool, k_max) if x is None else tally(rows, labels, centers)
    values: dict[tuple[str, int | None], float] = {}
    everywhere = np.full(len(labels), True)
    for name, target, found in (
        ("class", labels, everywhere),
        ("center", centers, pool[0] + pool[2] > 0),
    ):
        known = np.where(rows < 0, -1, target[rows])
        for k in fitting(k_max):
            guess = vote(known[:, :k], distances[:, :k], target.max() + 1)
            values[f"knn_{name}", k] = recall(guess[found], target[found])
        values[f"probe_{name}", None] = target_probe(features, target, groups, seed)
    for k in fitting(k_max):
        total = counts[:, :, k - 1].sum(1)
        values["index", k] = float(index_of(total))
        values["bounded", k] = float(bounded_of(total))
    return counts, values


def fitting(k_max: int) -> list[int]:
    """Those of KS that a sample allows."""
    return [k for k in KS if k <= k_max]


def bootstrap(counts: list[ndarray], groups: list[ndarray]) -> ndarray:
    """Index (1 + RESAMPLES, k) of the patients as they are, then resampled; averaged over samples.

    counts (4, n, k) and groups (n,), the patients' numbers, of each sample. Queries are resampled,
    their neighbours stay: a patient drawn twice has its patches counted twice.
    """
    patients = 1 + max(int(g.max()) for g in groups)
    weights = resamplings(patients)
    values = []
    for count, group in zip(counts, groups, strict=True):
        sums = np.zeros((patients, 4, count.shape[-1]))
        np.add.at(sums, group, count.transpose(1, 0, 2))
        drawn = np.einsum("dp,pck->cdk", weights, sums, optimize=True)
        values.append(index_of(drawn))
    return np.mean(values, 0)


def intervals(
    counts: dict[str, list[ndarray]],
    groups: list[ndarray],
) -> list[dict]:
    """95 % intervals over patients of each model's index, and of the difference of each pair of
    models.

    nan where there are fewer than FEW patients, or where a resample has no ratio.
    """
    draws = {name: bootstrap(counts[name], groups) for name in counts if name != "chance"}
    enough = len(np.unique(np.concatenate(groups))) >= FEW
    rows = []
    pairs = [(name, None) for name in draws]
    for one, other in [*pairs, *itertools.combinations(draws, 2)]:
        metric = "index_interval"
        values = draws[one]
        if other:
            metric = "index_difference"
            values = values - draws[other]
        for k in fitting(values.shape[1]):
            value, *resampled = values[:, k - 1]
            low, high = np.percentile(resampled, [2.5, 97.5]) if enough else (np.nan, np.nan)
            row = {
                "model": one,
                "other": other,
                "metric": metric,
                "k": k,
                "value": float(value),
                "low": float(low),
                "high": float(high),
            }
            rows.append(row)
    return rows

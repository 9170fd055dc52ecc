"""The protocols: how folds are made, kNN, CKA, and differences between models.

`split` makes the folds that every other protocol works on. `nearest` and `vote` are kNN, `by_lot`
the neighbours of features that know nothing; `macro_auc` and `recall` are the scores of the probe
(in a room of its own); `cka_rows` compares features, `paired` predictions.
"""

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from g2l.errors import UserError

EXACT = 2**24  # features (values) below which fp64 costs little
BLIND_DRAWS = 5  # of features that know nothing, for the chance level
BLIND_WIDTH = 8
RESAMPLES = 1000  # of whole groups, for intervals
FEW = 6  # groups: with five, even one model better in each is no evidence (sign test: 2 / 2^5)


def codes(values: Sequence | ndarray) -> ndarray:
    """Small integers for any labels (n,), numbered in sorted order."""
    return np.unique(values, return_inverse=True)[1].ravel()


def split(
    labels: ndarray,
    groups: Sequence[str],
    n: int,
    seed: int = 0,
    grouped: bool = True,
) -> ndarray:
    """Fold number (N,) of every row: n stratified folds, each group whole in one of them.

    `grouped` False splits groups, too. Fewer folds when there are fewer groups than n. Raises
    UserError when no split is possible.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    group = codes(groups)
    n_groups = int(group.max()) + 1
    n = min(n, int(np.bincount(labels).max()))
    if grouped:
        n = min(n, n_groups)
    if n < 2:
        raise UserError(
            f"groups: {n_groups} group in {len(labels)} images cannot be split; the column group "
            "of labels.csv must name at least two patients"
        )
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    folds = kind(n, shuffle=True, random_state=seed)
    fold = np.full(len(labels), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class smaller than n: told in the report
        for number, (_, test) in enumerate(folds.split(labels, labels, group)):
            fold[test] = number
    # a fold may come out empty when groups differ much in size
    return codes(fold)


def centred(x: ndarray, device: str) -> Tensor:
    """Features x (N, D) less their mean, in fp64 where that costs little.

    What rounding leaves of a constant column is 0.
    """
    mean = x.mean(0, dtype=np.float64)
    farthest = np.maximum(x.max(0) - mean, mean - x.min(0))
    z = torch.from_numpy(x).to(device)
    if z.numel() < EXACT:
        z = z.double()
    z = z - torch.from_numpy(mean).to(z)
    z[:, torch.from_numpy(farthest <= 1e-6 * np.abs(mean)).to(device)] = 0
    return z


def narrow(z: Tensor) -> Tensor:
    """Rows z (N, D) in axes of their own span where D > N: same inner products, fewer columns."""
    if z.shape[1] <= len(z):
        return z
    value, vector = torch.linalg.eigh(z @ z.T)
    solid = value > value[-1] * 1e-12
    return vector[:, solid] * value[solid].sqrt()


def moments(z: Tensor) -> Tensor:
    """Second moments (D + 1, D + 1) of rows [z, 1], which add up over parts: in fp64."""
    rows = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    return rows.T @ rows


def pca_axes(moment: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and at most `dims` principal axes (D, d) of the rows with such `moments`.

    Equal to scikit-learn's PCA up to the sign of an axis.
    """
    from scipy.linalg import eigh

    count = moment[-1, -1]
    width = len(moment) - 1
    mean = moment[-1, :-1] / count
    scatter = moment[:-1, :-1] - count * torch.outer(mean, mean)
    d = max(1, min(dims, int(count) - 1, width))
    _, axes = eigh(scatter.cpu().numpy(), subset_by_index=[width - d, width - 1])
    return mean, torch.from_numpy(axes).to(mean)


def nearest(
    x: ndarray,
    fold: ndarray,
    k: int = 15,
    dims: int = 50,
    pca: str = "fold",
    device: str = "cpu",
) -> tuple[ndarray, ndarray]:
    """The k nearest rows of other folds on PCA axes: neighbours (N, k), -1 = none, and distances.

    x: features (N, D). pca="fold" fits the axes on the rows outside each fold, whose moments are
    those of all less those of the fold; "all" on everything (which leaks, as the paper may).
    """
    from kernels import knn

    z = narrow(centred(x, device))
    neighbors = np.full((len(x), k), -1)
    distances = np.full((len(x), k), np.inf)
    tests = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    inside = [moments(z[test]) for test in tests]
    total = sum(inside, torch.zeros_like(inside[0], dtype=torch.float64))
    fitted = [pca_axes(total - own if pca == "fold" else total, dims) for own in inside]
    together = z @ torch.cat([axes for _, axes in fitted], 1).to(z)
    sizes = [axes.shape[1] for _, axes in fitted]
    for test, (mean, axes), projected in zip(tests, fitted, together.split(sizes, 1), strict=True):
        rest = np.setdiff1d(np.arange(len(x)), test)
        near = min(k, len(rest))
        on_axes = (projected - (mean @ axes).to(z)).float()
        distance, index = knn(on_axes[rest], near, on_axes[test], return_distance=True)
        neighbors[test, :near] = rest[index.cpu().numpy()]
        distances[test, :near] = distance.cpu().numpy()
    return neighbors, distances


def by_lot(
    fold: ndarray,
    k: int,
    rng: np.random.Generator,
) -> tuple[ndarray, ndarray]:
    """What `nearest` finds among features that know nothing: k rows of other folds, drawn by lot.

    Each row's are different rows, every one as likely as any other.
    """
    neighbors = np.full((len(fold), k), -1)
    for f in range(fold.max() + 1):
        test = np.flatnonzero(fold == f)
        rest = rng.permutation(np.flatnonzero(fold != f))
        near = np.arange(min(k, len(rest)))
        first = rng.integers(len(rest), size=(len(test), 1))
        neighbors[test, : len(near)] = rest[(first + near) % len(rest)]
    return neighbors, rng.random(neighbors.shape)


def vote(
    neighbors: ndarray,
    distances: ndarray,
    n_classes: int,
) -> ndarray:
    """Majority class (Q,) of neighbour labels (Q, k), -1 = none.

    Ties go to the class whose voters are nearer in sum, then to the smallest class.
    """
    one_hot = neighbors[:, :, None] == np.arange(n_classes)
    count = one_hot.sum(1)
    far = np.where(one_hot, distances[:, :, None], 0).sum(1)
    most = count == count.max(1, keepdims=True)
    return np.where(most, far, np.inf).argmin(1)


def auc(
    scores: ndarray,
    positive: ndarray,
    weights: ndarray,
) -> ndarray:
    """Area under the ROC curve for scores (n,), once per row of weights (B, n).

    NaN where a side has no weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    weights = weights[:, order]
    positive = positive[order]
    up = weights * positive
    down = weights * ~positive
    if len(starts) < len(scores):  # equal scores count as one
        up = np.add.reduceat(up, starts, axis=1)
        down = np.add.reduceat(down, starts, axis=1)
    won = (up * (np.cumsum(down, 1) - down / 2)).sum(1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (up.sum(1, dtype=np.float64) * down.sum(1, dtype=np.float64))


def macro_auc(
    scores: ndarray,
    labels: ndarray,
    weights: ndarray | None = None,
) -> ndarray:
    """AUC (B,) of class 1 for two classes, else the mean of one-vs-rest over the classes present.

    The latter is scikit-learn's macro average. NaN where only one class is present.
    """
    if weights is None:
        weights = np.ones((1, len(labels)))
    several = scores.shape[1]
    columns = [1] if several == 2 else range(several)
    each = [auc(scores[:, c], labels == c, weights) for c in columns]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class can be judged: NaN says so
        return np.nanmean(each, 0)


def recall(guess: ndarray, labels: ndarray) -> float:
    """Balanced accuracy: the mean over the classes present of the share found; NaN for one class.

    One class alone is no test: whoever always says it would score 1.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    shares = [(guess[labels == c] == c).mean() for c in present]
    return float(np.mean(shares))


def hsic(sums: Tensor) -> Tensor:
    """Unbiased HSIC with the linear kernel (Song et al. 2012); not finite below four rows.

    sums (D + 2, E + 2): X^T Y summed over rows [x, |x|^2, 1] of X and [y, |y|^2, 1] of Y. Being
    sums, they say what is left without some rows.
    """
    xy = sums[:-2, :-2]
    bx, sx = sums[:-2, -2:].T
    ay, sy = sums[-2:, :-2]
    (ab, a), (b, n) = sums[-2:, -2:]
    pairs = (xy**2).sum() - ab
    ends = (sx @ sx - a) * (sy @ sy - b)
    middle = sx @ xy @ sy - sx @ bx - sy @ ay + ab
    total = pairs + ends / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)
    return total / (n * (n - 3))


def cka_to_teacher(
    x: dict[str, Tensor],
    groups: Sequence[str],
    teacher: str,
) -> dict[str, tuple[float, ndarray]]:
    """Of each model's CKA to the teacher the chance level, and the unbiased CKA without each part.

    Parts are up to ten, of whole groups. The chance level is the biased estimator's mean over all
    permutations of one side's rows: tr K tr L / ((n - 1) |K| |L|), Gram matrices K and L centred.
    """
    group = codes(groups)
    part = np.random.default_rng(0).permutation(group.max() + 1)[group] % 10
    parts = [torch.from_numpy(np.flatnonzero(part == p)) for p in np.unique(part)]
    middle = {name: rows.mean(0) for name, rows in x.items()}
    largest = {name: torch.linalg.vector_norm(rows, torch.inf) for name, rows in x.items()}

    def extended(name: str, part: Tensor) -> Tensor:
        """Rows [x, |x|^2, 1] of a part, small enough that fourth powers stay in fp32's range."""
        rows = x[name][part]
        rows -= middle[name]
        rows /= largest[name]
        norms = (rows**2).sum(1, keepdim=True)
        return torch.cat([rows, norms, torch.ones_like(norms)], 1)

    def without_each(one: str, other: str) -> tuple[Tensor, Tensor]:
        """The sums over all rows, and HSIC (parts,) without each part."""
        inside = []
        for part in parts:
            rows = extended(one, part)
            beside = rows if one == other else extended(other, part)
            inside.append(rows.T @ beside)
        total = sum(inside, torch.zeros_like(inside[0], dtype=torch.float64))
        return total, torch.stack([hsic(total - own) for own in inside])

    own = {}
    trace = {}
    for name in x:
        sums, own[name] = without_each(name, name)
        trace[name] = float(sums[-2, -1] / sums[:-2, :-2].norm())
    found = {}
    for name in x:
        if name != teacher:
            cross = without_each(name, teacher)[1]
            left_out = cross / (own[name] * own[teacher]).sqrt()
            floor = trace[name] * trace[teacher] / (len(part) - 1)
            found[name] = floor, left_out.cpu().numpy()
    return found


def jackknife(values: ndarray) -> tuple[float, int]:
    """Standard error of a measure from its values without each part, and the number of parts.

    Of fewer than two parts, as where one group is nearly everything, it is NaN.
    """
    values = values[np.isfinite(values)]
    n = len(values)
    if n < 2:
        return np.nan, n
    return float(values.std() * np.sqrt(n - 1)), n


def cka_rows(
    x: dict[str, ndarray],
    groups: Sequence[str],
    teacher: str | None,
    device: str,
    baseline: str | None = None,
) -> list[dict]:
    """CKA of every pair of models; to the teacher also its standard error, chance level, and gain.

    x: features (N, D) by model. se: jackknife over parts of whole groups. The gain is over the
    baseline, with its 95 % interval.
    """
    from scipy.stats import t

    from kernels import cka

    names = list(x)
    tensors = {name: torch.from_numpy(x[name]).to(device) for name in names}
    every = list(tensors.values())
    unbiased, biased = cka(every, every, estimator="both")
    rows = []
    for i, j in itertools.permutations(range(len(names)), 2):
        base = {"model": names[i], "other": names[j], "protocol": "cka"}
        for metric, value in ("unbiased", unbiased), ("biased", biased):
            rows.append(base | {"metric": metric, "value": float(value[i, j])})
    if teacher not in names:
        return rows
    left_out = cka_to_teacher(tensors, groups, teacher)
    to_teacher = unbiased[:, names.index(teacher)].tolist()
    whole = dict(zip(names, to_teacher, strict=True))
    for name, (floor, values) in left_out.items():
        base = {"model": name, "other": teacher, "protocol": "cka"}
        rows.append(base | {"metric": "floor", "value": floor})
        error, parts = jackknife(values)
        if parts > 1:
            rows.append(base | {"metric": "se", "value": error, "parts": parts})
        if parts > 1 and baseline in left_out and name != baseline:
            gain = whole[name] - whole[baseline]
            error, parts = jackknife(values - left_out[baseline][1])
            margin = t.ppf(0.975, parts - 1) * error
            row = {
                "model": name,
                "other": baseline,
                "protocol": "paired",
                "metric": "cka",
                "value": gain,
                "low": gain - margin,
                "high": gain + margin,
            }
            rows.append(row)
    return rows


def resamplings(n_groups: int) -> ndarray:
    """How often each group counts: once in the data as they are, then in RESAMPLES others.

    (1 + RESAMPLES, n_groups), the same for every model.
    """
    even = np.full(n_groups, 1 / n_groups)
    times = np.ones((1 + RESAMPLES, n_groups), np.float32)
    times[1:] = np.random.default_rng(0).multinomial(n_groups, even, size=RESAMPLES)
    return times


def resampled(
    predicted: dict,
    labels: ndarray,
    groups: Sequence[str],
) -> dict:
    """The figures of the table of one model's predictions, and what they are in RESAMPLES others.

    Whole groups are resampled, the same ones for every model. Returns {"knn": (values, groups,
    folds)} and, where a seed has an AUC, "probe" (..., seeds): values (1 + RESAMPLES,), as the data
    are first, and how many groups were tested in how many folds or seeds. kNN accuracy is a mean
    over folds, each counting alike, and AUC one over seeds.
    """
    group = codes(groups)
    n_groups = group.max() + 1
    times = resamplings(n_groups)
    fold = predicted["fold"]
    size = np.bincount(fold)
    weight = 1 / (len(size) * size[fold])
    right = np.bincount(group, weight * (predicted["knn"] == labels))
    found = {
        "knn": (
            times @ right / (times @ np.bincount(group, weight)),
            n_groups,
            len(size),
        )
    }
    each = []
    tested = np.zeros(0, int)
    for scores in predicted["scores"]:
        test = np.flatnonzero(np.isfinite(scores[:, 0]))
        rows = group[test]
        blocks = np.array_split(times, 1 + len(times) * len(test) // 2**23)
        areas = [macro_auc(scores[test], labels[test], block[:, rows]) for block in blocks]
        value = np.concatenate(areas)
        if np.isfinite(value[0]):  # a test part of one class has no AUC
            each.append(value)
            tested = np.union1d(tested, rows)
    if each:
        found["probe"] = np.mean(each, 0), len(tested), len(each)
    return found


def paired(
    first: dict,
    second: dict,
) -> dict[str, tuple[float, float, float, int]]:
    """Difference first - second of two models' `resampled` figures with its 95 % interval.

    Returns {"knn": (difference, low, high, folds), "probe": (..., seeds)}; what no fold or seed
    defines is left out. The interval is NaN where fewer than FEW groups were tested.
    """
    found = {}
    for name, (values, groups, defined) in first.items():
        gain = values - second[name][0]
        low = high = np.nan
        if groups >= FEW:
            low, high = np.nanpercentile(gain[1:], [2.5, 97.5]).tolist()
        found[name] = float(gain[0]), low, high, defined
    return found

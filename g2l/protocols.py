"""The protocols: how folds are made, kNN, the linear probe, CKA, and differences between models.

`split` makes the folds that every other protocol works on. `nearest` and `vote` are kNN, `by_lot`
the neighbours of features that know nothing; `linear_probe` is the probe, `macro_auc` and `recall`
its scores; `cka_rows` compares features, `paired` predictions.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from g2l.errors import UserError

STRENGTHS = 10.0 ** np.arange(-6, 3)  # of the probe: C, from strong to weak regularisation
FEW = 6  # groups: with five, even one model better in each is no evidence (sign test: 2 / 2^5)


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

    _, group = np.unique(np.asarray(groups), return_inverse=True)
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
    return np.unique(fold, return_inverse=True)[1]


def narrow(x: ndarray) -> ndarray:
    """Rows x (N, D) in axes of their own span where D > N: same inner products, fewer columns."""
    if x.shape[1] <= len(x):
        return x
    value, vector = np.linalg.eigh(x @ x.T)
    solid = value > value[-1] * 1e-12
    return vector[:, solid] * np.sqrt(value[solid])


def pca_axes(
    x: ndarray,
    parts: list[ndarray],
    dims: int = 50,
    device: str = "cpu",
) -> list[tuple[ndarray, ndarray]]:
    """For each array of row numbers: mean (D,) and principal axes (D, d) of all *other* rows.

    x (N, D) float64, its mean near 0; d <= dims. One pass over the data: scatter(others) =
    moment(all) - moment(part), less the shift of the mean. Equal to scikit-learn's PCA up to the
    sign of an axis.
    """
    from scipy.linalg import eigh

    from kernels import covariance

    def moment(rows: ndarray) -> ndarray:
        """Second moment (D, D) about the origin, a sum."""
        if len(rows) < 2:
            return rows.T @ rows
        spread = covariance(torch.from_numpy(rows).to(device)).cpu().numpy()
        mean = rows.mean(0)
        return spread * (len(rows) - 1) + len(rows) * np.outer(mean, mean)

    inside = [moment(x[part]) for part in parts]
    whole = sum(map(len, parts)) == len(x)
    total = sum(inside) if whole else moment(x)
    sums = x.sum(0)
    width = x.shape[1]
    axes = []
    for part, own in zip(parts, inside, strict=True):
        count = len(x) - len(part)
        mean = (sums - x[part].sum(0)) / count
        d = max(1, min(dims, count - 1, width))
        scatter = total - own - count * np.outer(mean, mean)
        value, vector = eigh(scatter, subset_by_index=[width - d, width - 1])
        solid = value > value[-1] * 1e-12  # axes without variance carry no distance
        solid[-1] = True
        axes.append((mean, vector[:, solid]))
    return axes


def nearest(
    x: ndarray,
    fold: ndarray,
    k: int = 15,
    dims: int = 50,
    pca: str = "fold",
    device: str = "cpu",
) -> tuple[ndarray, ndarray]:
    """The k nearest rows of other folds on PCA axes: neighbours (N, k), -1 = none, and distances.

    x: features (N, D). pca="fold" fits the axes on the rows outside each fold; "all" once on
    everything (which leaks, as the paper may).
    """
    from kernels import knn

    x = narrow(x - x.mean(0, dtype=np.float64))
    neighbors = np.full((len(x), k), -1)
    distances = np.full((len(x), k), np.inf)
    tests = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    held_out = tests if pca == "fold" else [np.empty(0, int)]
    axes = pca_axes(x, held_out, dims, device)
    for f, test in enumerate(tests):
        rest = np.flatnonzero(fold != f)
        near = min(k, len(rest))
        mean, axis = axes[f % len(axes)]
        on_axes = (x @ axis - mean @ axis).astype(np.float32)
        z = torch.from_numpy(on_axes).to(device)
        distance, index = knn(z[rest], near, z[test], return_distance=True)
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


def vote(neighbors: ndarray, distances: ndarray, n_classes: int) -> ndarray:
    """Majority class (Q,) of neighbour labels (Q, k), -1 = none.

    Ties go to the class whose voters are nearer in sum, then to the smallest class.
    """
    one_hot = neighbors[:, :, None] == np.arange(n_classes)
    count = one_hot.sum(1)
    far = np.where(one_hot, distances[:, :, None], 0).sum(1)
    most = count == count.max(1, keepdims=True)
    return np.where(most, far, np.inf).argmin(1)


def six_two_two(fold: ndarray, seed: int) -> list[ndarray] | None:
    """Masks (N,) of the training, validation and test part, each of whole folds of `split`.

    None for fewer than five folds. The seed draws which: scikit-learn's own seed leaves groups of
    different sizes where they are, so that five seeds would give one split five times.
    """
    n = fold.max() + 1
    if n < 5:
        return None
    drawn = np.random.default_rng(seed).permutation(n)[fold]
    fifth = round(n / 5)
    train, test = drawn >= 2 * fifth, drawn < fifth
    return [train, ~train & ~test, test]


def linear_probe(
    x: ndarray,
    labels: ndarray,
    fold: ndarray,
    n_classes: int,
    seed: int,
    device: str = "cpu",
) -> tuple[ndarray, float] | None:
    """Linear probe on one 6:2:2 split: scores (N, n_classes), NaN outside the test part, and C.

    L2 logistic regression on features x (N, D) standardised by the training part; C is that of
    STRENGTHS with the least log loss on the validation part (AUC would not see a model that always
    says the same class). None when the folds do not allow the split or training would see one
    class only. A class that training never saw keeps the score 0: its AUC is that of a guess.
    """
    from sklearn.metrics import log_loss

    parts = six_two_two(fold, seed)
    if parts is None or len(np.unique(labels[parts[0]])) < 2:
        return None
    train, valid, test = parts
    z = torch.from_numpy(x).to(device)
    if z.numel() < 2**24:  # of few rows fp32 would end the search before the optimum
        z = z.double()
    spread, mean = torch.std_mean(z[train], 0, correction=0)
    spread[spread <= 1e-6 * mean.abs()] = 1  # a constant column
    z = (z - mean) / spread
    seen, y = np.unique(labels[train], return_inverse=True)
    best = np.inf
    known = torch.from_numpy(y).to(device)
    for c, weights, bias in logistic_path(z[train], known):
        said = np.zeros((len(x), n_classes))
        logits = z @ weights + bias
        said[:, seen] = logits.double().softmax(1).cpu()
        loss = log_loss(labels[valid], said[valid], labels=range(n_classes))
        if loss < best:
            best, chosen, scores = loss, float(c), said
    scores[~test] = np.nan
    return scores, chosen


def logistic_path(x: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
    """L2 logistic regression for every C of STRENGTHS: (C, weights (D, K), bias (K,)).

    x: standardised features (n, D); y: classes (n,), 0 to K - 1. Minimised is the sum of log losses
    + |weights|^2 / (2 C), of two classes (whose weights are opposite) |weights|^2 / C: the optimum
    of scikit-learn. L-BFGS starts from the solution before. One eigendecomposition serves all C: in
    its axes, divided by sqrt(variance / 4 + 1 / (n C)), the curvature is near 1 in all directions,
    so some ten steps do where the plain problem takes hundreds.
    """
    n, width = x.shape
    value, basis = torch.linalg.eigh(x @ x.T if n < width else x.T @ x)
    solid = value > value[-1] * 10 * torch.finfo(x.dtype).eps
    value, basis = value[solid], basis[:, solid]
    if n < width:
        basis = x.T @ basis / value.sqrt()
    classes = int(y.max()) + 1
    weights = basis.new_zeros(len(value), classes)
    bias = x.new_zeros(classes)
    for c in STRENGTHS:
        pull = (2 if classes == 2 else 1) / (n * c)
        scale = (value[:, None] / (4 * n) + pull).sqrt()
        free = [(weights * scale).requires_grad_(), bias.clone().requires_grad_()]
        solver = torch.optim.LBFGS(
            free, max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss(scale=scale, pull=pull, free=free, solver=solver) -> Tensor:
            solver.zero_grad()
            inner = free[0] / scale
            logits = x @ (basis @ inner) + free[1]
            entropy = torch.nn.functional.cross_entropy(logits, y)
            total = entropy + pull * (inner**2).sum() / 2
            total.backward()
            return total

        solver.step(loss)
        weights = (free[0] / scale).detach()
        bias = free[1].detach()
        yield c, basis @ weights, bias


def auc(scores: ndarray, positive: ndarray, weights: ndarray) -> ndarray:
    """Area under the ROC curve for scores (n,), once per row of weights (B, n).

    NaN where a side has no weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    weights, positive = weights[:, order], positive[order]
    up = np.add.reduceat(weights * positive, starts, axis=1)
    down = np.add.reduceat(weights * ~positive, starts, axis=1)
    won = (up * (np.cumsum(down, 1) - down / 2)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (up.sum(1) * down.sum(1))


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
    x: dict[str, Tensor], groups: Sequence[str], teacher: str
) -> dict[str, tuple[float, ndarray]]:
    """Of each model's CKA to the teacher the chance level, and the unbiased CKA without each part.

    Parts are up to ten, of whole groups. The chance level is the biased estimator's mean over all
    permutations of one side's rows: tr K tr L / ((n - 1) |K| |L|), Gram matrices K and L centred.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    part = np.random.default_rng(0).permutation(group.max() + 1)[group] % 10
    parts = [torch.from_numpy(part == p) for p in np.unique(part)]
    extended = {}
    for name, rows in x.items():
        rows = rows - rows.mean(0)
        rows = rows / rows.abs().max()  # fourth powers stay in the range of fp32
        norms = (rows**2).sum(1, keepdim=True)
        extended[name] = torch.cat([rows, norms, torch.ones_like(norms)], 1)

    def without_each(one: str, other: str) -> tuple[Tensor, Tensor]:
        """The sums over all rows, and HSIC (parts,) without each part."""
        inside = []
        for p in parts:
            inside.append((extended[one][p].T @ extended[other][p]).double())
        total = torch.stack(inside).sum(0)
        return total, torch.stack([hsic(total - own) for own in inside])

    own, trace = {}, {}
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
            row = {"metric": metric, "value": float(value[i, j])}
            rows.append(base | row)
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
            row = {"model": name, "other": baseline, "protocol": "paired", "metric": "cka"}
            ends = {"low": gain - margin, "high": gain + margin}
            rows.append(row | {"value": gain} | ends)
    return rows


def paired(
    first: dict,
    second: dict,
    labels: ndarray,
    groups: Sequence[str],
    n: int = 1000,
) -> dict[str, tuple[float, float, float, int]]:
    """Difference first - second of two models' predictions with its 95 % interval.

    Whole groups are resampled n times, the same for both models. Returns {"knn": (difference, low,
    high, folds), "probe": (..., seeds)}: the difference of the very figures in the table, kNN
    accuracy as a mean over folds, AUC as one over the seeds at which both have one. The interval
    is NaN where fewer than FEW groups were tested; what no fold or seed defines is left out.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = group.max() + 1
    even = np.full(n_groups, 1 / n_groups)
    times = np.random.default_rng(0).multinomial(n_groups, even, size=n)
    times = np.concatenate([np.ones((1, n_groups)), times])  # row 0: the data as they are
    fold = first["fold"]
    size = np.bincount(fold)
    weight = 1 / (len(size) * size[fold])  # each fold counts alike
    right, other = first["knn"] == labels, second["knn"] == labels
    won = times @ np.bincount(group, weight * right - weight * other)
    gain = won / (times @ np.bincount(group, weight))
    result = {"knn": (gain, n_groups, len(size))}
    each, tested = [], np.zeros(0, int)
    for a, b in zip(first["scores"], second["scores"], strict=True):
        test = np.flatnonzero(np.isfinite(a[:, 0]))
        y, rows = labels[test], group[test]
        parts = []
        for block in np.array_split(times, 1 + len(times) * len(test) // 2**24):
            weights = block[:, rows]
            gains = macro_auc(a[test], y, weights) - macro_auc(b[test], y, weights)
            parts.append(gains)
        value = np.concatenate(parts)
        if np.isfinite(value[0]):  # a test part of one class has no AUC
            each.append(value)
            tested = np.union1d(tested, rows)
    if each:
        result["probe"] = np.mean(each, 0), len(tested), len(each)
    found = {}
    for name, (values, count, defined) in result.items():
        low = high = np.nan
        if count >= FEW:
            low, high = np.nanpercentile(values[1:], [2.5, 97.5]).tolist()
        found[name] = float(values[0]), low, high, defined
    return found

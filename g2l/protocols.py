"""The protocols: how folds are made, kNN, the linear probe, CKA, and differences between models.

`split` makes the folds that every other protocol works on. `nearest` and `vote` are kNN, `by_lot`
the neighbours of features that know nothing; `linear_probe` is the probe, `macro_auc` and `recall`
its scores; `cka_rows` compares features, `paired` predictions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from g2l.errors import UserError

STRENGTHS = 10.0 ** np.arange(-6, 3)  # of the probe: C, from strong to weak regularisation
FEW = 6  # groups: with five, even one model better in each is no evidence (sign test: 2 / 2^5)


def split(
    labels: np.ndarray, groups: Sequence[str], n: int, seed: int = 0, grouped: bool = True
) -> np.ndarray:
    """Fold number (N,) of every row: n stratified folds, each group whole in one of them.

    `grouped` False splits groups, too. Fewer folds when there are fewer groups than n. Raises
    UserError when no split is possible.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = int(group.max()) + 1
    n = min(n, int(np.bincount(labels).max()), n_groups if grouped else n)
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
    fold = np.unique(fold, return_inverse=True)[1]
    if grouped and len(set(zip(group, fold, strict=True))) != n_groups:
        raise AssertionError("a group straddles two folds")
    return fold


def narrow(x: np.ndarray) -> np.ndarray:
    """Rows x (N, D) in axes of their own span where D > N: same inner products, fewer columns."""
    if x.shape[1] <= len(x):
        return x
    value, vector = np.linalg.eigh(x @ x.T)
    solid = value > value[-1] * 1e-12
    return vector[:, solid] * np.sqrt(value[solid])


def pca_axes(
    x: np.ndarray, parts: list[np.ndarray], dims: int = 50, device: str = "cpu"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each array of row numbers: mean (D,) and principal axes (D, d) of all *other* rows.

    x (N, D) float64, its mean near 0; d <= dims. One pass over the data: scatter(others) =
    moment(all) - moment(part), less the shift of the mean. Equal to scikit-learn's PCA up to the
    sign of an axis.
    """
    from scipy.linalg import eigh

    from kernels import covariance

    def moment(rows: np.ndarray) -> np.ndarray:
        """Second moment (D, D) about the origin, a sum."""
        if len(rows) < 2:
            return rows.T @ rows
        scatter = covariance(torch.from_numpy(rows).to(device)).cpu().numpy() * (len(rows) - 1)
        return scatter + len(rows) * np.outer(rows.mean(0), rows.mean(0))

    inside = [moment(x[part]) for part in parts]
    whole = sum(map(len, parts)) == len(x)
    total = sum(inside) if whole else moment(x)
    sums, width, axes = x.sum(0), x.shape[1], []
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
    x: np.ndarray,
    fold: np.ndarray,
    k: int = 15,
    dims: int = 50,
    pca: str = "fold",
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of other folds on PCA axes: neighbours (N, k), -1 = none, and distances.

    x: features (N, D). pca="fold" fits the axes on the rows outside each fold; "all" once on
    everything (which leaks, as the paper may).
    """
    from kernels import knn

    x = narrow(x - x.mean(0, dtype=np.float64))
    neighbors, distances = np.full((len(x), k), -1), np.full((len(x), k), np.inf)
    tests = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    if pca == "all":
        axes = pca_axes(x, [np.empty(0, int)], dims, device) * len(tests)
    else:
        axes = pca_axes(x, tests, dims, device)
    for f, (test, (mean, axis)) in enumerate(zip(tests, axes, strict=True)):
        rest = np.flatnonzero(fold != f)
        z = torch.from_numpy((x @ axis - mean @ axis).astype(np.float32)).to(device)
        near = min(k, len(rest))
        distance, index = knn(z[rest], near, z[test], return_distance=True)
        neighbors[test, :near] = rest[index.cpu().numpy()]
        distances[test, :near] = distance.cpu().numpy()
    return neighbors, distances


def by_lot(fold: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What `nearest` finds among features that know nothing: k rows of other folds, drawn by lot.

    Each row's are different rows, every one as likely as any other.
    """
    neighbors, distances = np.full((len(fold), k), -1), rng.random((len(fold), k))
    for f in range(fold.max() + 1):
        rest, test = rng.permutation(np.flatnonzero(fold != f)), np.flatnonzero(fold == f)
        near = np.arange(min(k, len(rest)))
        first = rng.integers(len(rest), size=(len(test), 1))
        neighbors[test, : len(near)] = rest[(first + near) % len(rest)]
    return neighbors, distances


def vote(neighbors: np.ndarray, distances: np.ndarray, n_classes: int) -> np.ndarray:
    """Majority class (Q,) of neighbour labels (Q, k), -1 = none.

    Ties go to the class whose voters are nearer in sum, then to the smallest class.
    """
    one_hot = neighbors[:, :, None] == np.arange(n_classes)
    count = one_hot.sum(1)
    far = np.where(one_hot, distances[:, :, None], 0).sum(1)
    return np.where(count == count.max(1, keepdims=True), far, np.inf).argmin(1)


def six_two_two(fold: np.ndarray, seed: int) -> list[np.ndarray] | None:
    """Masks (N,) of the training, validation and test part, each of whole folds of `split`.

    None for fewer than five folds. The seed draws which: scikit-learn's own seed leaves groups of
    different sizes where they are, so that five seeds would give one split five times.
    """
    n = fold.max() + 1
    if n < 5:
        return None
    drawn, fifth = np.random.default_rng(seed).permutation(n)[fold], round(n / 5)
    return [drawn >= 2 * fifth, (drawn >= fifth) & (drawn < 2 * fifth), drawn < fifth]


def linear_probe(
    x: np.ndarray,
    labels: np.ndarray,
    fold: np.ndarray,
    n_classes: int,
    seed: int,
    device: str = "cpu",
) -> tuple[np.ndarray, float] | None:
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
    for c, weights, bias in logistic_path(z[train], torch.from_numpy(y).to(device)):
        said = np.zeros((len(x), n_classes))
        said[:, seen] = (z @ weights + bias).double().softmax(1).cpu()
        loss = log_loss(labels[valid], said[valid], labels=np.arange(n_classes))
        if loss < best:
            best, chosen, scores = loss, float(c), said
    scores[~test] = np.nan
    return scores, chosen


def logistic_path(
    x: torch.Tensor, y: torch.Tensor
) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
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
    weights, bias = basis.new_zeros(len(value), classes), x.new_zeros(classes)
    for c in STRENGTHS:
        pull = (2 if classes == 2 else 1) / (n * c)
        scale = (value[:, None] / (4 * n) + pull).sqrt()
        free = [(weights * scale).requires_grad_(), bias.clone().requires_grad_()]
        solver = torch.optim.LBFGS(
            free, max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss(scale=scale, pull=pull, free=free, solver=solver) -> torch.Tensor:
            solver.zero_grad()
            inner = free[0] / scale
            logits = x @ (basis @ inner) + free[1]
            total = torch.nn.functional.cross_entropy(logits, y) + pull * (inner**2).sum() / 2
            total.backward()
            return total

        solver.step(loss)
        weights, bias = (free[0] / scale).detach(), free[1].detach()
        yield c, basis @ weights, bias


def auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve for scores (n,), once per row of weights (B, n).

    NaN where a side has no weight.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    weights, positive = weights[:, order], positive[order]
    up = np.add.reduceat(weights * positive, starts, axis=1)
    down = np.add.reduceat(weights * ~positive, starts, axis=1)
    won = (up * (np.cumsum(down, 1) - down / 2)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (up.sum(1) * down.sum(1))


def macro_auc(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUC (B,) of class 1 for two classes, else the mean of one-vs-rest over the classes present.

    The latter is scikit-learn's macro average. NaN where only one class is present.
    """
    columns = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    each = np.stack([auc(scores[:, c], labels == c, weights) for c in columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class can be judged: NaN says so
        return np.nanmean(each, 0)


def recall(guess: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy: the mean over the classes present of the share found; NaN for one class.

    One class alone is no test: whoever always says it would score 1.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([(guess == c)[labels == c].mean() for c in present]))


def hsic(sums: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC with the linear kernel (Song et al. 2012); not finite below four rows.

    sums (D + 2, E + 2): X^T Y summed over rows [x, |x|^2, 1] of X and [y, |y|^2, 1] of Y. Being
    sums, they say what is left without some rows.
    """
    xy, sx, sy = sums[:-2, :-2], sums[:-2, -1], sums[-1, :-2]
    (ab, a), (b, n) = sums[-2:, -2:]
    ends = (sx @ sx - a) * (sy @ sy - b) / ((n - 1) * (n - 2))
    middle = sx @ xy @ sy - sx @ sums[:-2, -2] - sy @ sums[-2, :-2] + ab
    return ((xy**2).sum() - ab + ends - 2 * middle / (n - 2)) / (n * (n - 3))


def cka_to_teacher(
    x: dict[str, torch.Tensor], groups: Sequence[str], teacher: str
) -> dict[str, tuple[float, np.ndarray]]:
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
        extended[name] = torch.cat([rows, (rows**2).sum(1, True), torch.ones_like(rows[:, :1])], 1)

    def without_each(one: str, other: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over all rows, and HSIC (parts,) without each part."""
        inside = [(extended[one][p].T @ extended[other][p]).double() for p in parts]
        total = torch.stack(inside).sum(0)
        return total, torch.stack([hsic(total - own) for own in inside])

    own = {name: without_each(name, name) for name in x}
    trace = {name: float(sums[-2, -1] / sums[:-2, :-2].norm()) for name, (sums, _) in own.items()}
    found = {}
    for name in x:
        if name != teacher:
            cross = without_each(name, teacher)[1]
            left_out = cross / (own[name][1] * own[teacher][1]).sqrt()
            floor = trace[name] * trace[teacher] / (len(part) - 1)
            found[name] = floor, left_out.cpu().numpy()
    return found


def jackknife(values: np.ndarray) -> tuple[float, int]:
    """Standard error of a measure from its values without each part, and the number of parts.

    Of fewer than two parts, as where one group is nearly everything, it is NaN.
    """
    values = values[np.isfinite(values)]
    n = len(values)
    return (float(values.std() * np.sqrt(n - 1)), n) if n > 1 else (np.nan, n)


def cka_rows(
    x: dict[str, np.ndarray],
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
    both = cka(list(tensors.values()), list(tensors.values()), estimator="both")
    rows = []
    for i, j in np.argwhere(~np.eye(len(names), dtype=bool)):
        base = {"model": names[i], "other": names[j], "protocol": "cka"}
        for metric, value in zip(("unbiased", "biased"), both, strict=True):
            rows.append(base | {"metric": metric, "value": float(value[i, j])})
    if teacher not in names:
        return rows
    left_out = cka_to_teacher(tensors, groups, teacher)
    whole = dict(zip(names, both[0][:, names.index(teacher)].tolist(), strict=True))
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
            rows.append(row | {"value": gain, "low": gain - margin, "high": gain + margin})
    return rows


def paired(
    first: dict, second: dict, labels: np.ndarray, groups: Sequence[str], n: int = 1000
) -> dict[str, tuple[float, float, float, int]]:
    """Difference first - second of two models' predictions with its 95 % interval.

    Whole groups are resampled n times, the same for both models. Returns {"knn": (difference, low,
    high, folds), "probe": (..., seeds)}: the difference of the very figures in the table, kNN
    accuracy as a mean over folds, AUC as one over the seeds at which both have one. The interval
    is NaN where fewer than FEW groups were tested; what no fold or seed defines is left out.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = group.max() + 1
    times = np.random.default_rng(0).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)
    times = np.concatenate([np.ones((1, n_groups)), times])  # row 0: the data as they are
    size = np.bincount(first["fold"])
    weight = 1 / (len(size) * size[first["fold"]])  # each fold counts alike
    won = (first["knn"] == labels) * weight - (second["knn"] == labels) * weight
    gain = times @ np.bincount(group, won) / (times @ np.bincount(group, weight))
    result = {"knn": (gain, n_groups, len(size))}
    each, tested = [], np.zeros(0, int)
    for a, b in zip(first["scores"], second["scores"], strict=True):
        test = np.flatnonzero(np.isfinite(a[:, 0]))
        y, rows = labels[test], group[test]
        blocks = np.array_split(times, 1 + len(times) * len(test) // 2**24)
        gains = [
            macro_auc(a[test], y, w[:, rows]) - macro_auc(b[test], y, w[:, rows]) for w in blocks
        ]
        value = np.concatenate(gains)
        if np.isfinite(value[0]):  # a test part of one class has no AUC
            each.append(value)
            tested = np.union1d(tested, rows)
    if each:
        result["probe"] = np.mean(each, 0), len(tested), len(each)
    found = {}
    for name, (values, count, parts) in result.items():
        ends = np.nanpercentile(values[1:], [2.5, 97.5]) if count >= FEW else (np.nan, np.nan)
        found[name] = float(values[0]), float(ends[0]), float(ends[1]), parts
    return found

"""TODO."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from g2l.errors import UserError


def split(
    labels: np.ndarray, groups: Sequence[str], n: int, seed: int = 0, grouped: bool = True
) -> np.ndarray:
    """Fold number (N,) of every row: n stratified folds, each group whole in one of them unless `grouped` is False.

    Fewer folds when there are fewer groups than n. Raises UserError when no split is possible.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, group = np.unique(np.asarray(groups), return_inverse=True)
    largest = int(np.bincount(labels).max())
    n = min(n, largest, int(group.max()) + 1 if grouped else largest)
    if n < 2:
        raise UserError(
            f"groups: {int(group.max()) + 1} group in {len(labels)} images cannot be split; "
            "the column group of labels.csv must name at least two patients"
        )
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    fold = np.full(len(labels), -1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a class smaller than n: told in the report, see `thin`
        parts = kind(n, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, group)
        for number, (_, test) in enumerate(parts):
            fold[test] = number
    assert (fold >= 0).all()
    fold = np.unique(fold, return_inverse=True)[
        1
    ]  # a fold may come out empty when groups differ much in size
    if grouped:
        assert len(np.unique(np.stack([group, fold]), axis=1).T) == group.max() + 1, (
            "a group straddles two folds"
        )
    return fold


def pca_axes(
    x: np.ndarray, parts: list[np.ndarray], dims: int = 50, device: str = "cpu"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each array of row numbers: mean (D,) and leading principal axes (D, d) of all *other* rows, d <= dims.

    x (N, D) float64, its mean near 0. One pass over the data: scatter(others) = moment(all) - moment(part), less the
    shift of the mean. With fewer rows than columns the same axes come from the smaller Gram matrix.
    Equal to scikit-learn's PCA up to the sign of an axis.
    """
    import torch
    from scipy.linalg import eigh

    from kernels import covariance

    n, width = x.shape
    feature_side = width <= n - max(map(len, parts))
    if feature_side:
        moment = lambda y: (  # noqa: E731  (second moment about the origin)
            covariance(torch.from_numpy(y).to(device)).cpu().numpy() * (len(y) - 1)
            + len(y) * np.outer(y.mean(0), y.mean(0))
            if len(y) > 1
            else y.T @ y
        )
        inside = [moment(x[part]) for part in parts]
        total = sum(inside) if sum(map(len, parts)) == n else moment(x)
    else:
        gram = x @ x.T
    sums, axes = x.sum(0), []
    for i, part in enumerate(parts):
        count = n - len(part)
        d = min(dims, count - 1, width)
        mean = (sums - x[part].sum(0)) / count
        if feature_side:
            matrix = total - inside[i] - count * np.outer(mean, mean)
        else:
            rest = np.setdiff1d(np.arange(n), part)
            matrix = gram[np.ix_(rest, rest)]
            matrix = matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()
        value, vector = eigh(matrix, subset_by_index=[len(matrix) - d, len(matrix) - 1])
        solid = value > value[-1] * 1e-12  # axes without variance carry no distance
        vector = (
            vector[:, solid]
            if feature_side
            else (x[rest] - mean).T @ (vector[:, solid] / np.sqrt(value[solid]))
        )
        axes.append((mean, vector))
    return axes


def vote(neighbors: np.ndarray, distances: np.ndarray, n_classes: int) -> np.ndarray:
    """Majority class (Q,) of neighbour labels (Q, k), -1 = none; ties by summed distance, then by smallest class."""
    one_hot = neighbors[:, :, None] == np.arange(n_classes)
    count = one_hot.sum(1)
    far = np.where(one_hot, distances[:, :, None], 0).sum(1)
    return np.where(count == count.max(1, keepdims=True), far, np.inf).argmin(1)


def knn_predict(
    x: np.ndarray,
    labels: np.ndarray,
    fold: np.ndarray,
    n_classes: int,
    *,
    k: int = 15,
    dims: int = 50,
    pca: str = "fold",
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """kNN on PCA axes, every row predicted from the other folds: predictions (N,) and neighbours (N, k), -1 = none.

    pca="fold" fits the axes on the rows outside each fold; "all" once on everything (which leaks, as the paper may).
    """
    import torch

    from kernels import knn

    x = x - x.mean(0, dtype=np.float64)
    predicted, neighbors = np.empty(len(x), np.int64), np.full((len(x), k), -1)
    tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)).to(device)  # noqa: E731
    if pca == "all":  # one search serves all folds: neighbours of the own fold are masked
        ((mean, axis),) = pca_axes(x, [np.empty(0, int)], dims, device)
        distance, index = knn(
            tensor(x @ axis - mean @ axis),
            k,
            groups=torch.from_numpy(fold).to(device),
            return_distance=True,
        )
        neighbors[:] = index.cpu().numpy()
        return vote(
            np.where(neighbors < 0, -1, labels[neighbors]), distance.cpu().numpy(), n_classes
        ), neighbors
    tests = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    for test, (mean, axis) in zip(tests, pca_axes(x, tests, dims, device), strict=True):
        rest = np.setdiff1d(np.arange(len(x)), test)
        z = x @ axis - mean @ axis
        distance, index = knn(
            tensor(z[rest]), min(k, len(rest)), tensor(z[test]), return_distance=True
        )
        index = rest[index.cpu().numpy()]
        neighbors[test, : index.shape[1]] = index
        predicted[test] = vote(labels[index], distance.cpu().numpy(), n_classes)
    return predicted, neighbors


def six_two_two(
    labels: np.ndarray, groups: Sequence[str], seed: int, grouped: bool = True
) -> list[np.ndarray] | None:
    """Masks (N,) of the training, validation and test part, each of whole folds of `split`; None for fewer than five.

    The seed draws which folds: scikit-learn's own seed leaves groups of different sizes where they are, so that five
    seeds would give one split five times.
    """
    fold = split(labels, groups, 10, 0, grouped)
    n = fold.max() + 1
    if n < 5:
        return None
    fold, fifth = np.random.default_rng(seed).permutation(n)[fold], round(n / 5)
    return [fold >= 2 * fifth, (fold >= fifth) & (fold < 2 * fifth), fold < fifth]


def linear_probe(
    x: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    n_classes: int,
    seed: int,
    grouped: bool = True,
) -> dict | None:
    """Linear probe on one grouped 6:2:2 split: rows of the test part, their scores (n, classes), the chosen C.

    L2 logistic regression (scikit-learn, L-BFGS) on features standardised by the training part; C is chosen among
    1e-6 ... 1e2 by log loss on the validation part (AUC would not see a model that always says the same class), from
    strong to weak regularisation, stopping when two steps bring nothing. None when the groups do not allow the split
    or training would see one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    parts = six_two_two(labels, groups, seed, grouped)
    if parts is None or len(np.unique(labels[parts[0]])) < 2:
        return None
    train, valid, test = parts
    scaler = StandardScaler().fit(x[train])
    inputs = [scaler.transform(x[part].astype(np.float64)) for part in (train, valid, test)]
    if (
        train.sum() < x.shape[1]
    ):  # the solution lies in the span of the training rows: same optimum, fewer columns
        value, vector = np.linalg.eigh(inputs[0] @ inputs[0].T)
        solid = value > value[-1] * 1e-10
        span = inputs[0].T @ (vector[:, solid] / np.sqrt(value[solid]))
        inputs = [part @ span for part in inputs]
    best, stale = (np.inf, 0.0, None), 0
    model = LogisticRegression(max_iter=2000, tol=1e-6, warm_start=True)
    for c in 10.0 ** np.arange(-6, 3):
        model.set_params(C=c).fit(inputs[0], labels[train])
        loss = log_loss(
            labels[valid], _scores(model, inputs[1], n_classes), labels=np.arange(n_classes)
        )
        stale = 0 if loss < best[0] - 1e-4 else stale + 1
        if loss < best[0]:
            best = (loss, c, _scores(model, inputs[2], n_classes))
        if stale == 2:
            break
    return {"seed": seed, "test": np.flatnonzero(test), "scores": best[2], "C": best[1]}


def _scores(model, x: np.ndarray, n_classes: int) -> np.ndarray:
    scores = np.zeros(
        (len(x), n_classes)
    )  # a class that training never saw keeps 0: its AUC is that of a guess
    scores[:, model.classes_] = model.predict_proba(x)
    return scores


def auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve for scores (n,), once per row of weights (B, n); NaN where a side has no weight."""
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
    """AUC (B,) of class 1 for two classes; else the mean of one-vs-rest over the classes present (as scikit-learn)."""
    columns = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    each = np.stack([auc(scores[:, c], labels == c, weights) for c in columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class can be judged: NaN says so
        return np.nanmean(each, 0)


def cka_rows(
    x: dict[str, np.ndarray],
    groups: Sequence[str],
    teacher: str | None,
    device: str,
    baseline: str | None = None,
) -> list[dict]:
    """CKA of every pair of models; to the teacher also its standard error, chance level, and gain over the baseline.

    se: jackknife over up to ten parts made of whole groups. floor: the biased estimator, rows of one side permuted.
    """
    import torch
    from scipy.stats import t

    from kernels import cka

    names = list(x)
    tensors = {name: torch.from_numpy(x[name]).to(device) for name in names}
    both = lambda a, b, **how: cka(a, b, estimator="both", **how)  # noqa: E731
    unbiased, biased = both(list(tensors.values()), list(tensors.values()))
    rows = [
        {"model": a, "other": b, "protocol": "cka", "metric": metric, "value": float(value[i, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i != j
        for metric, value in (("unbiased", unbiased), ("biased", biased))
    ]
    if teacher in names:
        others = [n for n in names if n != teacher]
        rng = np.random.default_rng(0)
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        part = rng.permutation(group.max() + 1)[group] % 10
        parts = [p for p in np.unique(part) if (part != p).sum() >= 4]
        pick = lambda rows: [both([tensors[n][rows] for n in others], [tensors[teacher][rows]])[0]]  # noqa: E731
        left_out = np.array(
            [
                pick(torch.from_numpy(np.flatnonzero(part != p)).to(device))[0][:, 0].cpu().numpy()
                for p in parts
            ]
        )
        shuffled = [
            tensors[teacher][torch.from_numpy(rng.permutation(len(group))).to(device)]
            for _ in range(3)
        ]
        floor = both([tensors[n] for n in others], shuffled)[1].mean(1)
        error = lambda v: float(np.sqrt((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum()))  # noqa: E731
        whole = unbiased[:, names.index(teacher)].tolist()
        for i, name in enumerate(others):
            base = {"model": name, "other": teacher, "protocol": "cka"}
            rows.append(base | {"metric": "floor", "value": float(floor[i])})
            if len(parts) < 2:  # one group is nearly everything
                continue
            rows.append(
                base | {"metric": "se", "value": error(left_out[:, i]), "parts": len(parts)}
            )
            if baseline in others and name != baseline:
                gain = whole[names.index(name)] - whole[names.index(baseline)]
                margin = t.ppf(0.975, len(parts) - 1) * error(
                    left_out[:, i] - left_out[:, others.index(baseline)]
                )
                rows.append(
                    {
                        "model": name,
                        "other": baseline,
                        "protocol": "paired",
                        "metric": "cka",
                        "value": gain,
                        "low": gain - margin,
                        "high": gain + margin,
                    }
                )
    return rows


FEW = 6  # groups: with five, even one model better in each of them is no evidence at 95 % (sign test: 2 / 2^5 > 0.05)


def paired(
    first: dict, second: dict, labels: np.ndarray, groups: Sequence[str], n: int = 1000
) -> dict[str, tuple]:
    """Difference first - second of two models' predictions with its 95 % interval, by resampling whole groups n times.

    Returns {"knn": (difference, low, high), "probe": (...)}; the same resampled groups serve both models. The interval
    is NaN where fewer than FEW groups were tested, and whatever value is not defined is left out.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = group.max() + 1
    times = np.random.default_rng(0).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)
    times = np.concatenate([np.ones((1, n_groups)), times])  # row 0: the data as they are
    right = [(p["knn"] == labels).astype(float) for p in (first, second)]
    gain = times @ np.bincount(group, right[0] - right[1]) / (times @ np.bincount(group))
    result, tested = {"knn": gain}, {"knn": n_groups}
    pairs = list(zip(first["probe"], second["probe"], strict=True))
    if pairs:
        each = []
        tested["probe"] = len(np.unique(group[np.concatenate([a["test"] for a, _ in pairs])]))
        for a, b in pairs:
            y, chunk = labels[a["test"]], max(1, 2**24 // len(a["test"]))
            blocks = [
                times[i : i + chunk][:, group[a["test"]]] for i in range(0, len(times), chunk)
            ]
            each.append(
                np.concatenate(
                    [macro_auc(a["scores"], y, w) - macro_auc(b["scores"], y, w) for w in blocks]
                )
            )
        each = [v for v in each if np.isfinite(v[0])]  # a test part of one class has no AUC
        if each:
            result["probe"] = np.mean(each, 0)
    return {
        name: (
            float(v[0]),
            *(
                np.nanpercentile(v[1:], [2.5, 97.5]).tolist()
                if tested[name] >= FEW
                else [np.nan, np.nan]
            ),
        )
        for name, v in result.items()
    }


def recall(guess: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy: the mean over the classes present of the share found."""
    return float(np.mean([(guess == labels)[labels == c].mean() for c in np.unique(labels)]))

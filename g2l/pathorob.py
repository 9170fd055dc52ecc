"""PathoROB's measures beside its index: what a probe loses to the centre, and what clusters follow.

Both (Kömen et al., arXiv 2507.17845) look at `quartets`: two classes in two centres. `probes`
trains on patches whose centre tells more and more of their class and judges where it tells
nothing, `drop_of` is the average performance drop of those, and `clustering_scores` asks whether
k-means finds classes or centres.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy import ndarray

from g2l.protocols import resamplings
from g2l.robust import ridge
from g2l.shifts import unit

QUARTETS = 8  # at most
LEAST = 12  # patches of each of its four cells, of two patients; half of them for training
MOST = 100  # patches of a cell that are looked at
BIAS = (
    0,
    0.5,
    1,
    -0.5,
    -1,
)  # how far the centre tells the class in training; the first: not
CLUSTERS = 30  # at most
TRIALS = 10  # of k-means with the best number of clusters


def quartets(labels: ndarray, centers: ndarray, groups: ndarray) -> Iterator[list[ndarray]]:
    """Rows of the four cells of two classes in two centres: first class and first centre, first
    class and second centre, ...

    Of those whose cells hold LEAST patches and two patients, a seeded QUARTETS.
    """
    cells = {}
    rng = np.random.default_rng(0)
    kinds = np.unique(labels)
    sites = np.unique(centers)
    for kind, site in itertools.product(kinds, sites):
        here = (labels == kind) & (centers == site)
        rows = rng.permutation(np.flatnonzero(here))
        if len(rows) >= LEAST and len(np.unique(groups[rows])) > 1:
            cells[kind, site] = rows[:MOST]
    found = []
    pairs = itertools.combinations(kinds, 2), itertools.combinations(sites, 2)
    for two in itertools.product(*pairs):
        keys = list(itertools.product(*two))
        if cells.keys() >= set(keys):
            found.append(keys)
    for i in rng.permutation(len(found))[:QUARTETS]:
        yield [cells[key] for key in found[i]]


def probes(x: ndarray, labels: ndarray, centers: ndarray, groups: ndarray) -> ndarray:
    """Accuracies (I, 1 + RESAMPLES, BIAS) of probes on features x (n, D), of unseen patients.

    Each of I trainings takes half of the patients of a quartet and as many patches for each bias;
    the accuracy is the mean over the four cells of the other half. Patients judged are as they
    are, then resampled, the same for all models; masked where none is drawn.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    times = resamplings(groups.max() + 1)
    kept = []
    for cells in quartets(labels, centers, groups):
        rows = np.concatenate(cells)
        sizes = [len(cell) for cell in cells]
        cell = np.repeat(np.arange(4), sizes)
        halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)
        for train, test in halves.split(rows, cell, groups[rows]):
            pools = [train[cell[train] == c] for c in range(4)]
            seen = rows[test]
            few = min(map(len, pools)) < LEAST // 2
            if few or len(np.unique(cell[test])) < 4:
                continue
            accuracies = []
            for bias in BIAS:
                drawn = rows[biased(pools, bias)]
                model = ridge().fit(x[drawn], labels[drawn])
                right = model.predict(x[seen]) == labels[seen]
                accuracies.append(judged(right, cell[test], groups[seen], times))
            kept.append(np.ma.stack(accuracies, 1))
    return np.ma.array(kept)


def biased(pools: Sequence[ndarray], bias: float) -> ndarray:
    """As many rows whatever the bias: (1 + bias) / 2 of a pool where class and centre are both
    first or both second, (1 - bias) / 2 of the others.
    """
    most = min(map(len, pools)) // 2
    parts = []
    for pool, sign in zip(pools, (1, -1, -1, 1), strict=True):
        count = round(most * (1 + sign * bias))
        parts.append(pool[:count])
    return np.concatenate(parts)


def judged(right: ndarray, cell: ndarray, group: ndarray, times: ndarray) -> ndarray:
    """Mean over cells (B,) of the share of `right` (n,), with patients taken `times` (B, P)."""
    found = []
    for c in range(4):
        here = cell == c
        count = times[:, group[here]]
        found.append(np.ma.divide(count @ right[here], count.sum(1)))
    return np.ma.stack(found).mean(0)


def drop_of(accuracies: ndarray) -> ndarray:
    """Average performance drop (B,): the mean of accuracy / accuracy without bias, less 1."""
    ratio = accuracies[..., 1:] / accuracies[..., :1]
    return ratio.mean((0, 2)) - 1


def clustering_scores(
    x: ndarray, labels: ndarray, centers: ndarray, groups: ndarray
) -> list[float]:
    """Of each quartet the adjusted Rand index of clusters and classes less that of clusters and
    centres.

    k-means of L2-normalised features, as many patches of each cell; as many clusters, up to
    CLUSTERS, as give the greatest silhouette; mean over TRIALS.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    scores = []
    for cells in quartets(labels, centers, groups):
        least = min(map(len, cells))
        rows = np.concatenate([cell[:least] for cell in cells])
        near = unit(x[rows])
        means = partial(KMeans, n_init=1)
        best = 2
        most = -1.0
        for k in range(2, min(CLUSTERS, len(rows) - 1) + 1):
            found = means(k, random_state=0).fit_predict(near)
            if len(np.unique(found)) < 2:
                break
            score = silhouette_score(near, found, metric="cosine")
            if score > most:
                best = k
                most = score
        gaps = []
        for trial in range(TRIALS):
            found = means(best, random_state=trial).fit_predict(near)
            mine = adjusted_rand_score(labels[rows], found)
            other = adjusted_rand_score(centers[rows], found)
            gaps.append(mine - other)
        scores.append(float(np.mean(gaps)))
    return scores


def shortcut_rows(x: ndarray, who: Sequence[ndarray]) -> Iterator[dict]:
    """Rows of results of features x (n, D); who: class, centre and patient (n,) of each."""
    accuracies = probes(x, *who)
    if len(accuracies):
        drops = np.ma.compressed(drop_of(accuracies))
        low, high = np.percentile(drops[1:], [2.5, 97.5])
        whole = accuracies[:, 0]
        fully = np.abs(BIAS) == 1
        yield {"metric": "balanced", "value": float(whole[:, 0].mean())}
        yield {"metric": "confounded", "value": float(whole[:, fully].mean())}
        ends = {"low": float(low), "high": float(high)}
        yield {"metric": "drop", "value": float(drops[0])} | ends
    for i, score in enumerate(clustering_scores(x, *who)):
        yield {"metric": "clusters", "value": score, "quartet": i}

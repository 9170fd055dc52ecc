"""Protocols beside the paper's that users of eva, thunder and Patho-Bench look for.

Each takes what `evaluation.predict` knows of one model on one benchmark (`Given`) and gives rows of
results, a row for each draw, seed, fold or the whole. A row holds its measure of the data as they
are and of the resamplings of whole patients, from which the paired differences between models are
made. Features that know nothing go through the same code, which is their chance level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

SHOTS = (1, 2, 4, 8, 16)  # patches of each class
DRAWS = 100  # of few-shot supports
RANKS = (1, 3, 5)  # of retrieval
CURVE = (1, 3, 5, 11, 15, 25, 51)  # k
BINS = 15  # of the calibration error, each with as many images
FOLDS = 5  # of slides and patients


@dataclass
class Given:
    """One model on one benchmark."""

    x: ndarray  # features (N, D)
    labels: ndarray  # (N,)
    groups: ndarray  # (N,) numbers of the patients
    fold: ndarray  # (N,), each patient in one
    guess: ndarray  # (N,) of kNN
    votes: ndarray  # (N, k) labels of the neighbours, nearest first, -1: none
    distances: ndarray  # (N, k)
    scores: list[ndarray]  # of the probe, by seed: (N, classes), NaN outside the test part
    classes: int
    device: str
    times: ndarray  # (B, patients): how often each counts, in the data as they are first
    survival: ndarray | None = None  # (N, 2): time followed, and whether the event came
    bags: Sequence[Path | ndarray] = ()  # features of each slide's patches, or files of them


def row(protocol: str, metric: str, values: ndarray, **about: int) -> dict:
    """One row of results: a measure (B,) of the data as they are, and of their resamplings."""
    value = float(values[0])
    return {"protocol": protocol, "metric": metric, "value": value, "resampled": values, **about}


def average(given: Given, each: ndarray, rows: ndarray | None = None) -> ndarray:
    """The mean (B,) of a value of every image, or of those in `rows`."""
    group = given.groups if rows is None else given.groups[rows]
    patients = given.times.shape[1]
    total = given.times @ np.bincount(group, each, patients)
    return total / (given.times @ np.bincount(group, minlength=patients))


def confusions(given: Given, guess: ndarray, rows: ndarray | None = None) -> ndarray:
    """Confusion matrices (B, classes, classes) of guesses for every image, or for those in `rows`;
    the truth is down.
    """
    rows = np.arange(len(given.labels)) if rows is None else rows
    c = given.classes
    cell = (given.groups[rows] * c + given.labels[rows]) * c + guess
    count = np.bincount(cell, minlength=given.times.shape[1] * c * c)
    tables = given.times @ count.reshape(-1, c * c).astype(np.float32)
    return tables.reshape(-1, c, c).astype(float)


def recalls(tables: ndarray) -> ndarray:
    """Balanced accuracy (B,): see `protocols.recall`."""
    size = tables.sum(2)
    with np.errstate(invalid="ignore"):  # a class that is not there
        share = np.diagonal(tables, axis1=1, axis2=2) / size
    present = (size > 0).sum(1)
    return np.where(present > 1, np.nansum(share, 1) / np.maximum(present, 1), np.nan)


def macro_f1(tables: ndarray) -> ndarray:
    """F1 (B,), the mean over the classes that are there."""
    size = tables.sum(2)
    f1 = 2 * np.diagonal(tables, axis1=1, axis2=2) / (size + tables.sum(1))
    return np.where(size > 0, f1, 0).sum(1) / (size > 0).sum(1)


def quadratic_kappa(tables: ndarray) -> ndarray:
    """Cohen's kappa (B,) whose disagreements weigh by the squared distance of the classes."""
    order = np.arange(tables.shape[1])
    far = np.square(order[:, None] - order)
    blind = tables.sum(2)[:, :, None] * tables.sum(1)[:, None]
    total = tables.sum((1, 2))
    return 1 - total * (far * tables).sum((1, 2)) / (far * blind).sum((1, 2))


def few_shot(given: Given) -> list[dict]:
    """SimpleShot (Wang et al. 2019) by balanced accuracy: the nearest centroid of few patches.

    A draw takes half of the folds, and of them `n` patches of each class; the images of the other
    half are judged. Features are centred by the support's mean and L2-normalised.
    """
    import torch

    x = torch.from_numpy(given.x).float().to(given.device)
    folds = given.fold.max() + 1
    rows = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        support = rng.permutation(folds)[given.fold] < folds / 2
        order = rng.permutation(np.flatnonzero(support))
        mine = [order[given.labels[order] == c] for c in range(given.classes)]
        test = np.flatnonzero(~support)
        for shots in SHOTS:
            if min(map(len, mine)) < shots:
                break
            chosen = np.concatenate([numbers[:shots] for numbers in mine])
            middle = x[chosen].mean(0)
            near = torch.nn.functional.normalize(x[chosen] - middle)
            centroids = near.view(given.classes, shots, -1).mean(1)
            length = (x[test] - middle).norm(dim=1, keepdim=True).clamp(min=1e-12)
            product = ((x[test] - middle) @ centroids.T) / length
            distance = centroids.square().sum(1) - 2 * product
            guess = distance.argmin(1).cpu().numpy()
            values = recalls(confusions(given, guess, test))
            rows.append(row("few-shot", f"{shots} a class", values, draw=draw))
    return rows


def retrieval(given: Given) -> list[dict]:
    """Whether the nearest images of other patients are of the query's class, by cosine.

    top-k: any of the k nearest is. mAP@5: the mean over the five ranks of the precision up to each
    rank that hits, divided by the number of hits (0 where there is none). Queries are resampled,
    their neighbours stay.
    """
    import torch

    from kernels import knn

    x = torch.from_numpy(given.x).float().to(given.device)
    groups = torch.from_numpy(given.groups).to(given.device)
    _, rows = knn(x, max(RANKS), groups=groups, metric="cosine", return_distance=True)
    found = rows.cpu().numpy()
    hit = (given.labels[found] == given.labels[:, None]) & (found >= 0)
    measured = []
    for k in RANKS:
        measured.append(row("retrieval", f"top-{k}", average(given, hit[:, :k].any(1))))
    hits = hit.cumsum(1)
    precision = hits / np.arange(1, max(RANKS) + 1)
    each = (precision * hit).sum(1) / hits[:, -1].clip(1)
    measured.append(row("retrieval", "mAP@5", average(given, each)))
    return measured


def agreement(given: Given) -> list[dict]:
    """Macro F1 and quadratically weighted kappa of kNN and of the probe.

    Kappa takes the classes in their order, as grades are.
    """
    judged: list[tuple[str, ndarray, dict]] = [("knn", confusions(given, given.guess), {})]
    for seed, scores in enumerate(given.scores):
        test = np.flatnonzero(np.isfinite(scores[:, 0]))
        tables = confusions(given, scores[test].argmax(1), test)
        judged.append(("probe", tables, {"seed": seed}))
    rows = []
    for protocol, tables, about in judged:
        if (tables[0].sum(1) > 0).sum() > 1:
            rows.append(row(protocol, "macro F1", macro_f1(tables), **about))
            rows.append(row(protocol, "quadratic kappa", quadratic_kappa(tables), **about))
    return rows


def calibration(given: Given) -> list[dict]:
    """Whether the probe's probabilities are what they say: ECE and Brier score, less is better.

    ECE: |accuracy - confidence|, averaged over BINS of equally many images by confidence; the bins
    stay where patients are resampled. Brier: the squared distance of the probabilities to the
    truth, summed over the classes.
    """
    rows = []
    for seed, scores in enumerate(given.scores):
        test = np.flatnonzero(np.isfinite(scores[:, 0]))
        said = scores[test]
        truth = given.labels[test]
        confidence = said.max(1)
        excess = confidence - (said.argmax(1) == truth)
        error = np.zeros(len(given.times))
        for part in np.array_split(np.argsort(confidence, kind="stable"), BINS):
            inside = np.zeros(len(test))
            inside[part] = excess[part]
            error += abs(average(given, inside, test))
        brier = np.square(said - np.eye(given.classes)[truth]).sum(1)
        rows.append(row("probe", "ECE", error, seed=seed))
        rows.append(row("probe", "Brier score", average(given, brier, test), seed=seed))
    return rows


def curve(given: Given) -> list[dict]:
    """Accuracy of kNN, all folds together, over k up to the k that was asked for."""
    from g2l.protocols import vote

    rows = []
    for k in CURVE:
        if k <= given.votes.shape[1]:
            guess = vote(given.votes[:, :k], given.distances[:, :k], given.classes)
            rows.append(row("k curve", f"k = {k}", average(given, guess == given.labels)))
    return rows


def attention(given: Given) -> list[dict]:
    """AUC of gated attention over the patches of each slide, in every one of five folds."""
    from g2l.protocols import macro_auc, split

    if not given.bags:
        return []
    from g2l.slide_models import attend

    fold = split(given.labels, given.groups.astype(str).tolist(), FOLDS)
    said = attend(given.bags, given.labels, fold, given.classes, given.device)
    rows = []
    for number in range(fold.max() + 1):
        test = np.flatnonzero(fold == number)
        times = given.times[:, given.groups[test]]
        rows.append(
            row("abmil", "auc", macro_auc(said[test], given.labels[test], times), fold=number)
        )
    return rows


def cox(given: Given) -> list[dict]:
    """Concordance of Cox regression on the mean of each patient's slides."""
    from g2l.protocols import split
    from g2l.slide_models import concordance, hazards

    if given.survival is None:
        return []
    known = np.flatnonzero(np.isfinite(given.survival[:, 0]))
    patients, first, of = np.unique(given.groups[known], return_index=True, return_inverse=True)
    time, event = given.survival[known][first].T
    x = np.zeros((len(patients), given.x.shape[1]))
    np.add.at(x, of, given.x[known])
    x /= np.bincount(of)[:, None]
    fold = split(event.astype(int), patients.astype(str).tolist(), FOLDS)
    if fold.max() < 2:  # none would be left to train on
        return []
    risk = hazards(x, time, event, fold)
    values = concordance(risk, time, event, fold, given.times[:, patients])
    return [row("cox", "concordance", values)]


PROTOCOLS: dict[str, Callable[[Given], list[dict]]] = {
    "few-shot": few_shot,
    "retrieval": retrieval,
    "agreement": agreement,
    "calibration": calibration,
    "k-curve": curve,
    "abmil": attention,
    "cox": cox,
}
# What the tables show of each: a title, and protocol, metric and name of every measure.
TITLES = {
    "few-shot": (
        "Few-shot (SimpleShot): balanced accuracy, mean ± sd over draws",
        [("few-shot", f"{n} a class", f"{n} of each class") for n in SHOTS],
    ),
    "retrieval": (
        "Retrieval over other patients",
        [
            ("retrieval", "top-1", "top-1 accuracy"),
            ("retrieval", "top-3", "any of 3 is of the class"),
            ("retrieval", "top-5", "any of 5 is of the class"),
            ("retrieval", "mAP@5", "mean average precision at 5"),
        ],
    ),
    "agreement": (
        "Agreement with the labels; kappa takes the classes in their order",
        [
            ("knn", "macro F1", "kNN: macro F1"),
            ("knn", "quadratic kappa", "kNN: quadratic kappa"),
            ("probe", "macro F1", "probe: macro F1"),
            ("probe", "quadratic kappa", "probe: quadratic kappa"),
        ],
    ),
    "calibration": (
        "Calibration of the linear probe (less is better)",
        [
            ("probe", "ECE", "expected calibration error"),
            ("probe", "Brier score", "Brier score"),
        ],
    ),
    "k-curve": (
        "kNN over k: accuracy of all folds together",
        [("k curve", f"k = {k}", f"k = {k}") for k in CURVE],
    ),
    "dense": (
        "Patch tokens, on the smaller grid of model and teacher",
        [
            ("dense", "CKA", "unbiased CKA to the teacher's"),
            ("dense", "CKA se", "its standard error, by the jackknife over groups"),
            ("dense", "balanced accuracy", "balanced accuracy of a probe of the mask"),
            ("dense", "mean IoU", "mean intersection over union of that probe"),
        ],
    ),
    "layers": (
        "CKA of layers; the map of all of them is among the pictures",
        [("layers", "last layers", "unbiased CKA of the last layer to the teacher's last")],
    ),
    "abmil": (
        "Gated attention (ABMIL), mean ± sd over five folds",
        [("abmil", "auc", "AUC")],
    ),
    "cox": (
        "Cox regression on slide means",
        [("cox", "concordance", "Harrell's concordance")],
    ),
}
LESS_IS_BETTER = ("CKA se", "ECE", "Brier score")

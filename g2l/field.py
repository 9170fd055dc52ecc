"""Protocols beside the paper's that users of eva, thunder and Patho-Bench look for.

Each takes what `evaluate.predict` knows of one model on one benchmark (`Given`) and gives rows of
results, a row for each draw, seed or the whole. Features that know nothing go through the same
code, which is their chance level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

SHOTS = (1, 2, 4, 8, 16)  # patches of each class
DRAWS = 100  # of few-shot supports
RANKS = (1, 3, 5)  # of retrieval
CURVE = (1, 3, 5, 11, 15, 25, 51)  # k
BINS = 15  # of the calibration error, each with as many images


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


def few_shot(given: Given) -> list[dict]:
    """SimpleShot (Wang et al. 2019) by balanced accuracy: the nearest centroid of few patches.

    A draw takes half of the folds, and of them `n` patches of each class; the images of the other
    half are judged. Features are centred by the support's mean and L2-normalised.
    """
    import torch

    from g2l.protocols import recall

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
            value = recall(guess, given.labels[test])
            rows.append(row("few-shot", f"{shots} a class", value, draw=draw))
    return rows


def retrieval(given: Given) -> list[dict]:
    """Whether the nearest images of other patients are of the query's class, by cosine.

    top-k: any of the k nearest is. mAP@5: the mean over the five ranks of the precision up to each
    rank that hits, divided by the number of hits (0 where there is none).
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
        measured.append(row("retrieval", f"top-{k}", hit[:, :k].any(1).mean()))
    hits = hit.cumsum(1)
    precision = hits / np.arange(1, max(RANKS) + 1)
    average = (precision * hit).sum(1) / hits[:, -1].clip(1)
    measured.append(row("retrieval", "mAP@5", average.mean()))
    return measured


def agreement(given: Given) -> list[dict]:
    """Macro F1 and quadratically weighted kappa of kNN and of the probe.

    Kappa takes the classes in their order, as grades are.
    """
    from sklearn.metrics import cohen_kappa_score, f1_score

    judged: list[tuple[str, ndarray, ndarray, dict]]
    judged = [("knn", given.labels, given.guess, {})]
    for seed, scores in enumerate(given.scores):
        test = np.isfinite(scores[:, 0])
        judged.append(("probe", given.labels[test], scores[test].argmax(1), {"seed": seed}))
    rows = []
    for protocol, truth, guess, about in judged:
        if len(np.unique(truth)) > 1:
            f1 = f1_score(truth, guess, average="macro", labels=np.unique(truth), zero_division=0)
            kappa = cohen_kappa_score(truth, guess, weights="quadratic")
            rows.append(row(protocol, "macro F1", f1, **about))
            rows.append(row(protocol, "quadratic kappa", kappa, **about))
    return rows


def calibration(given: Given) -> list[dict]:
    """Whether the probe's probabilities are what they say: ECE and Brier score, less is better.

    ECE: |accuracy - confidence|, averaged over BINS of equally many images by confidence. Brier:
    the squared distance of the probabilities to the truth, summed over the classes.
    """
    rows = []
    for seed, scores in enumerate(given.scores):
        test = np.isfinite(scores[:, 0])
        said = scores[test]
        truth = given.labels[test]
        confidence = said.max(1)
        right = said.argmax(1) == truth
        gaps = []
        for part in np.array_split(np.argsort(confidence, kind="stable"), BINS):
            if len(part):
                gap = abs(right[part].mean() - confidence[part].mean())
                gaps.append(gap * len(part) / len(truth))
        brier = np.square(said - np.eye(given.classes)[truth]).sum(1).mean()
        rows.append(row("probe", "ECE", sum(gaps), seed=seed))
        rows.append(row("probe", "Brier score", brier, seed=seed))
    return rows


def curve(given: Given) -> list[dict]:
    """Accuracy of kNN, all folds together, over k up to the k that was asked for."""
    from g2l.protocols import vote

    rows = []
    for k in CURVE:
        if k <= given.votes.shape[1]:
            guess = vote(given.votes[:, :k], given.distances[:, :k], given.classes)
            rows.append(row("k curve", f"k = {k}", (guess == given.labels).mean()))
    return rows


def dense(given: Given) -> list[dict]:
    """Nothing: patch tokens are looked at in g2l/dense.py, not the embeddings that are here."""
    return []


def row(protocol: str, metric: str, value: float, **about: int) -> dict:
    """One row of results."""
    return {"protocol": protocol, "metric": metric, "value": float(value), **about}


PROTOCOLS: dict[str, Callable[[Given], list[dict]]] = {
    "few-shot": few_shot,
    "retrieval": retrieval,
    "agreement": agreement,
    "calibration": calibration,
    "k-curve": curve,
    "dense": dense,
}
# What the tables show of each: protocol and metric of its rows, and a title.
TITLES = {
    "few-shot": [
        (
            "few-shot",
            f"{n} a class",
            f"Few-shot (SimpleShot), {n} a class: balanced accuracy",
        )
        for n in SHOTS
    ],
    "retrieval": [
        ("retrieval", "top-1", "Retrieval over other patients: top-1 accuracy"),
        ("retrieval", "top-3", "Retrieval: any of 3 is of the class"),
        ("retrieval", "top-5", "Retrieval: any of 5 is of the class"),
        ("retrieval", "mAP@5", "Retrieval: mean average precision at 5"),
    ],
    "agreement": [
        ("knn", "macro F1", "kNN: macro F1"),
        ("knn", "quadratic kappa", "kNN: quadratic kappa, of classes in their order"),
        ("probe", "macro F1", "Linear probe: macro F1"),
        (
            "probe",
            "quadratic kappa",
            "Linear probe: quadratic kappa, of classes in their order",
        ),
    ],
    "calibration": [
        ("probe", "ECE", "Linear probe: expected calibration error (less is better)"),
        ("probe", "Brier score", "Linear probe: Brier score (less is better)"),
    ],
    "k-curve": [
        ("k curve", f"k = {k}", f"kNN, k = {k}: accuracy of all folds together") for k in CURVE
    ],
}
TITLES["dense"] = [
    ("dense", "CKA", "Patch tokens: unbiased CKA to the teacher's, on the smaller grid"),
    ("dense", "CKA se", "Patch tokens: standard error of that, by the jackknife over groups"),
    ("dense", "balanced accuracy", "Patch tokens: balanced accuracy of a probe of the mask"),
    ("dense", "mean IoU", "Patch tokens: mean intersection over union of that probe"),
]
LESS_IS_BETTER = ("CKA se", "ECE", "Brier score")

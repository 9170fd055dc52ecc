"""Small fixed models on slides and patients: gated attention over patches, and Cox regression.

`attend` gives every slide the probabilities of a network that has not seen its patient, `hazards`
every patient the risk by such a regression, and `concordance` judges risks.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from g2l.embeddings import read_features

PATCHES = 512  # of a slide, drawn once: 2 MB of 1,024 numbers each
WIDTH = 128  # of the attention
EPOCHS = 20
BATCH = 4  # slides
RATE = 1e-3
PENALTIES = 10.0 ** np.arange(4, -3, -1)  # of Cox regression, on |weights|^2 / 2


class GatedAttention(nn.Module):
    """ABMIL with gated attention (Ilse et al. 2018): a slide is a weighted mean of its patches."""

    def __init__(self, mean: Tensor, spread: Tensor, classes: int):
        super().__init__()
        self.mean = mean  # (D,), of the features
        self.spread = spread
        self.project = nn.Sequential(nn.Linear(len(mean), WIDTH), nn.ReLU())
        self.value = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid())
        self.weight = nn.Linear(WIDTH, 1)
        self.classify = nn.Linear(WIDTH, classes)

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Logits (B, classes) of slides' patches (P, D) each."""
        there = pad_sequence([torch.ones_like(bag[:, 0]) for bag in bags], batch_first=True)
        x = pad_sequence(bags, batch_first=True)
        h = self.project((x - self.mean) / self.spread)
        weight = self.weight(self.value(h) * self.gate(h)).squeeze(-1)
        share = weight.masked_fill(there == 0, -torch.inf).softmax(1)
        return self.classify((share[:, None] @ h).squeeze(1))


def read_bags(
    bags: Sequence[Path | ndarray],
    device: str,
) -> list[Tensor]:
    """The features of at most PATCHES patches of each slide, by a seeded draw."""
    read = []
    for number, bag in enumerate(bags):
        x = read_features(bag)[0] if isinstance(bag, Path) else bag
        drawn = np.random.default_rng(number).permutation(len(x))[:PATCHES]
        read.append(torch.from_numpy(x[np.sort(drawn)]).float().to(device))
    return read


def attend(
    given: Sequence[Path | ndarray],
    labels: ndarray,
    fold: ndarray,
    classes: int,
    device: str,
) -> ndarray:
    """Probabilities (N, classes) of each slide by a network trained on the other folds.

    given: a slide's features (P, D), or the file of embed.py that holds them.
    """
    bags = read_bags(given, device)
    mean = torch.stack([bag.mean(0) for bag in bags]).double()
    square = torch.stack([bag.double().square().mean(0) for bag in bags])
    truth = torch.from_numpy(labels).to(device)
    said = np.zeros((len(labels), classes))
    for test in range(fold.max() + 1):
        train = np.flatnonzero(fold != test)
        middle = mean[train].mean(0)
        spread = (square[train].mean(0) - middle**2).clamp(min=1e-12).sqrt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(test)
            net = GatedAttention(middle.float(), spread.float(), classes).to(device)
        fit_attention(net, bags, truth, train, np.random.default_rng(test))
        rest = np.flatnonzero(fold == test)
        with torch.inference_mode():
            for part in np.split(rest, range(BATCH, len(rest), BATCH)):
                said[part] = net([bags[i] for i in part]).softmax(1).cpu().numpy()
    return said


def fit_attention(
    net: GatedAttention,
    bags: list[Tensor],
    truth: Tensor,
    train: ndarray,
    rng: np.random.Generator,
) -> None:
    """EPOCHS over the slides `train`, by AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        order = rng.permutation(train)
        for part in np.split(order, range(BATCH, len(order), BATCH)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net([bags[i] for i in part]), truth[part])
            loss.backward()
            optimizer.step()
        schedule.step()


def hazards(
    x: ndarray,
    time: ndarray,
    event: ndarray,
    fold: ndarray,
) -> ndarray:
    """Log hazards (N,) of patients by Cox regressions that have not seen them.

    x (N, D): features. The fold after a patient's own chooses the penalty, the others train.
    """
    risk = np.zeros(len(x))
    folds = fold.max() + 1
    for test in range(folds):
        valid = fold == (test + 1) % folds
        train = (fold != test) & ~valid
        middle = x[train].mean(0, dtype=np.float64)
        spread = x[train].std(0, dtype=np.float64)
        spread[spread <= 1e-6 * abs(middle)] = np.inf  # constant: says nothing
        z = torch.from_numpy((x - middle) / spread)
        # Weights lie in the span of the patients they come from.
        _, size, axes = torch.linalg.svd(z[train], full_matrices=False)
        z = z @ axes[size > 1e-9 * size[0]].T
        least = np.inf
        weights = torch.zeros(z.shape[1], dtype=z.dtype)
        for penalty in PENALTIES:
            weights = fit_cox(z[train], time[train], event[train], penalty, weights)
            said = z @ weights
            loss = float(cox_loss(said[valid], time[valid], event[valid]))
            if loss < least:
                least = loss
                risk[fold == test] = said[fold == test]
    return risk


def cox_loss(
    risk: Tensor,
    time: ndarray,
    event: ndarray,
) -> Tensor:
    """Negative log partial likelihood an event, of log hazards (N,); ties by Breslow's method."""
    order = np.argsort(-time, kind="stable")  # those still followed come first
    total = risk[order].logcumsumexp(0)
    last = np.searchsorted(-time[order], -time[order], "right") - 1
    seen = event[order] > 0
    return (total[last] - risk[order])[seen].sum() / max(1, seen.sum())


def fit_cox(
    x: Tensor,
    time: ndarray,
    event: ndarray,
    penalty: float,
    start: Tensor,
) -> Tensor:
    """Weights (D,) that make `cox_loss` of x (N, D) + penalty |weights|^2 / 2 least."""
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = cox_loss(x @ weights, time, event) + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    search.step(loss)
    return weights.detach()


def concordance(
    risk: ndarray,
    time: ndarray,
    event: ndarray,
    fold: ndarray,
    times: ndarray,
) -> ndarray:
    """Harrell's index (B,): of the pairs of patients of one fold of whom one is known to have had
    the event first, in how many had that one the higher risk; equal risks count half.

    times (B, N): how often each patient counts.
    """
    earlier = (time[:, None] < time) | ((time[:, None] == time) & (event == 0))
    pairs = earlier & (event[:, None] > 0) & (fold[:, None] == fold)
    higher = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    right = (times @ (pairs * higher) * times).sum(1)
    return right / (times @ pairs.astype(float) * times).sum(1)

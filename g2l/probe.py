"""The linear probe: L2 logistic regression on whole groups' 6:2:2 splits, C chosen on validation.

`linear_probe` is the protocol; `logistic_path` gives the regression for every C, and `Regressions`
solves it for all seeds side by side.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from g2l.protocols import centred

STRENGTHS = 10.0 ** np.arange(-6, 3)  # of the probe: C, from strong to weak regularisation
STEPS = 200  # of a regression, at most
MEMORY = 40  # steps whose curvature is kept
# Of a regression's mean log loss: probabilities are right to some 1e-4. Rounding allows no less.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-7}


def six_two_two(
    fold: ndarray,
    seed: int,
) -> list[ndarray] | None:
    """Masks (N,) of the training, validation and test part, each of whole folds of `split`.

    None for fewer than five folds. The seed draws which: scikit-learn's own seed leaves groups of
    different sizes where they are, so that five seeds would give one split five times.
    """
    n = fold.max() + 1
    if n < 5:
        return None
    drawn = np.random.default_rng(seed).permutation(n)[fold]
    fifth = round(n / 5)
    train = drawn >= 2 * fifth
    test = drawn < fifth
    return [train, ~train & ~test, test]


def linear_probe(
    x: ndarray,
    labels: ndarray,
    fold: ndarray,
    n_classes: int,
    seeds: int,
    device: str = "cpu",
) -> list[tuple[ndarray, float] | None]:
    """Linear probe on 6:2:2 splits: scores (N, n_classes) by seed, NaN but for the test, and C.

    L2 logistic regression on features x (N, D) standardised by the training part; C is that of
    STRENGTHS with the least log loss on the validation part (AUC would not see a model that always
    says the same class). None where the folds do not allow the split or training would see one
    class only. A class that training never saw has the score 0: its AUC is that of a guess.
    """
    from sklearn.metrics import log_loss

    found: list[tuple[ndarray, float] | None] = [None] * seeds
    parts = {}
    for seed in range(seeds):
        drawn = six_two_two(fold, seed)
        if drawn is not None and len(np.unique(labels[drawn[0]])) > 1:
            parts[seed] = drawn
    if not parts:
        return found
    best = dict.fromkeys(parts, np.inf)
    z = centred(x, device)
    train = torch.from_numpy(np.stack([part[0] for part in parts.values()])).to(device)
    for c, said in logistic_path(z, torch.from_numpy(labels).to(device), train, n_classes):
        for (seed, (_, valid, test)), scores in zip(parts.items(), said, strict=True):
            loss = log_loss(labels[valid], scores[valid], labels=range(n_classes))
            if loss < best[seed]:
                best[seed] = loss
                found[seed] = np.where(test[:, None], scores, np.nan), float(c)
    return found


def logistic_path(
    x: Tensor,
    labels: Tensor,
    train: Tensor,
    n_classes: int,
) -> Iterator[tuple[float, ndarray]]:
    """L2 logistic regressions for every C of STRENGTHS: C, and probabilities (S, N, n_classes).

    x (N, D), labels (N,); train (S, N): the rows that each of S regressions is fitted on, after
    standardising by them. Minimised is the sum of log losses + |weights|^2 / (2 C), of two classes
    (whose weights are opposite) |weights|^2 / C: the optimum of scikit-learn. Each C starts from
    the solution before.
    """
    together = Regressions(x, labels, train, n_classes)
    solution = together.start
    for c in STRENGTHS:
        solution, logits = together.solve(c, solution)
        yield c, logits.double().softmax(1).mT.cpu().numpy()


class Regressions:
    """Logistic regressions of S training parts that share their features x (N, D).

    Solved side by side, as reading x takes the time. Unknowns are (S, K, 1 + R): the bias, and
    weights on the principal axes of each standardised part, where the curvature of the loss is near
    diagonal. L-BFGS starts from that curvature, and keeps what it learns from one C to the next.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        train: Tensor,
        n_classes: int,
    ):
        self.x = x
        self.truth = torch.nn.functional.one_hot(labels, n_classes).T.to(x)
        count = train.sum(1).view(-1, 1, 1)
        self.share = (train[:, None] / count).to(x)  # (S, 1, N): what each row counts
        seen = (self.share * self.truth).sum(-1, keepdim=True) > 0
        self.never = torch.where(seen, 0.0, -1e4).to(x)  # logits of classes that are not there
        self.classes = seen.sum(1, keepdim=True)
        self.strength = torch.where(self.classes == 2, 2, 1) / count
        each = [standard_axes(x[rows]) for rows in train]  # each a copy, to be written on
        variance = [own for _, own in each]
        self.axes = pad_sequence([axes for axes, _ in each], batch_first=True)
        self.variance = pad_sequence(variance, batch_first=True, padding_value=1)[:, None]
        self.learnt: deque = deque(maxlen=MEMORY)  # steps, and the change of the loss's slope
        self.enough = TOLERANCE[x.dtype]
        self.start = x.new_zeros(len(train), n_classes, self.axes.shape[1])

    def logits(self, unknowns: Tensor) -> Tensor:
        """(S, K, N), linear in the unknowns."""
        weights = (unknowns @ self.axes).flatten(0, 1)
        flat = torch.addmm(weights[:, 0], self.x, weights[:, 1:].T).T.contiguous()
        return flat.view(*unknowns.shape[:2], -1)

    def slope(self, excess: Tensor) -> Tensor:
        """Transpose of `logits`: what an excess (S, K, N) of probability says of the unknowns."""
        weights = excess.flatten(0, 1) @ self.x
        weights = weights.view(*excess.shape[:2], -1)
        return torch.cat([excess.sum(-1, keepdim=True), weights], -1) @ self.axes.mT

    def solve(
        self,
        c: float,
        at: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Solution and logits (S, K, N) for the strength c, from the solution `at`."""
        pull = (self.strength / c).to(at).repeat(1, 1, at.shape[2])
        pull[..., 0] = 0  # the bias is free
        logits = self.logits(at) + self.never
        said = logits.softmax(1)
        unsure = inner(self.share, 1 - said.square().sum(1, keepdim=True))
        curvature = (unsure / (self.classes - 1)).clamp(min=1e-6) * self.variance + pull
        before = at
        step = None
        for _ in range(STEPS):
            slope = self.slope(self.share * (said - self.truth)) + pull * at
            if step is not None:
                self.learnt.append((step, slope - before - pull * step))
            down = self.downhill(slope, curvature, pull)
            size = inner(slope, down)  # about twice what the loss is above its least
            if (size < self.enough).all():
                break
            way = torch.where(size < self.enough, 0, -down)
            along = self.logits(way)
            length, said = self.search(logits, along, inner(pull * at, way), inner(pull * way, way))
            before = slope
            step = length * way
            at = at + step
            logits = logits + length * along
        return at, logits

    def downhill(
        self,
        slope: Tensor,
        curvature: Tensor,
        pull: Tensor,
    ) -> Tensor:
        """The slope divided by the curvature, as far as it is known."""
        known = []
        for step, bend in reversed(self.learnt):
            bend = bend + pull * step
            size = inner(step, bend)
            weight = torch.where(size > 0, 1 / size, 0)
            share = weight * inner(step, slope)
            slope = slope - share * bend
            known.append((step, bend, weight, share))
        down = slope / curvature
        for step, bend, weight, share in reversed(known):
            down = down + (share - weight * inner(bend, down)) * step
        return down

    def search(
        self,
        logits: Tensor,
        along: Tensor,
        pulled: Tensor,
        pull: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """How far to go along a way, (S, 1, 1), and the probabilities (S, K, N) there.

        By Newton's method between bounds, until a tenth of the slope is left. pulled, pull: slope
        and bend (S, 1, 1) of the regularisation.
        """
        aim = (self.truth * along).sum(1, keepdim=True)
        length = near = torch.zeros_like(pull)
        far = torch.full_like(pull, torch.inf)
        first = None
        for _ in range(20):
            said = (logits + length * along).softmax(1)
            mean = (said * along).sum(1, keepdim=True)
            rise = inner(self.share, mean - aim) + pulled + length * pull
            first = rise if first is None else first
            if (rise.abs() <= 0.1 * first.abs()).all():
                break
            bend = inner(self.share, (said * (along - mean) ** 2).sum(1, keepdim=True)) + pull
            near = torch.where(rise < 0, length, near)
            far = torch.where(rise < 0, far, length)
            length = length - rise / bend
            middle = torch.where(far.isinf(), 2 * near + 1, (near + far) / 2)
            length = torch.where((near < length) & (length < far), length, middle)
        return length, said


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (S, 1, 1) of what S regressions have."""
    return (a * b).sum((1, 2), keepdim=True)


def standard_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Axes (1 + R, 1 + D): a bias, and the principal axes of rows (n, D) once standardised.

    Axes times [1, row] are coordinates; returns their second moments (1 + R,), too. Writes on rows.
    """
    n, width = rows.shape
    mean = rows.mean(0)
    rows -= mean
    spread = torch.linalg.vector_norm(rows, dim=0) / n**0.5
    spread[spread <= 1e-6 * mean.abs()] = torch.inf  # constant: says nothing
    rows = rows[:: max(1, n // (8 * width))] / spread  # enough to tell the curvature
    n = len(rows)
    value, basis = torch.linalg.eigh(rows @ rows.T if n < width else rows.T @ rows)
    solid = value > value[-1] * 10 * torch.finfo(rows.dtype).eps
    value = value[solid]
    basis = basis[:, solid]
    if n < width:
        basis = rows.T @ basis / value.sqrt()
    axes = basis.T / spread
    axes = torch.cat([-(axes @ mean)[:, None], axes], 1)
    bias = torch.eye(1, width + 1).to(axes)
    return torch.cat([bias, axes]), torch.cat([bias[0, :1], value / n])

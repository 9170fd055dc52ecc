"""Centred kernel alignment between lists of feature matrices, and the covariance that comes out of the same product."""

from collections.abc import Sequence

import torch


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Covariance (D, D) of the rows of x (N, D), divided by N - 1 as np.cov(x.T); fp64 for fp64 input, else fp32."""
    _check_features([x], "x")
    if x.shape[0] < 2:
        raise ValueError("x: a covariance needs at least 2 rows")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.to(torch.float64).mean(0)
    centred = x.to(exact) - mean.to(exact)
    return centred.T @ centred / (x.shape[0] - 1)


def cka(
    xs: Sequence[torch.Tensor],
    ys: Sequence[torch.Tensor],
    *,
    estimator: str = "unbiased",
    kernel: str = "linear",
    bandwidth: float = 1.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """CKA of every x with every y: a (len(xs), len(ys)) fp64 tensor, or (unbiased, biased) of them with estimator="both".

    xs, ys     lists of (N, D_i) tensors with the same N rows (samples) in the same order.
    estimator  "unbiased" (HSIC_1 of Song et al. 2012, near 0 for unrelated features), "biased" (Kornblith et al. 2019,
               with a floor that grows with D / N), or "both".
    kernel     "linear", or "rbf" with sigma = bandwidth times the median distance between rows (Kornblith et al. 2019).
    """
    if estimator not in ("unbiased", "biased", "both"):
        raise ValueError(f"estimator: expected unbiased, biased or both, got {estimator!r}")
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel: expected linear or rbf, got {kernel!r}")
    _check_features(xs, "xs")
    _check_features(ys, "ys")
    n = xs[0].shape[0]
    if ys[0].shape[0] != n:
        raise ValueError(f"ys: {ys[0].shape[0]} rows, but xs has {n}")
    if n < 4:
        raise ValueError(f"xs: CKA needs at least 4 rows, got {n}")
    if kernel == "rbf":
        raise NotImplementedError("kernel: rbf comes in the next commit")
    unbiased = torch.empty(len(xs), len(ys), dtype=torch.float64)
    biased = torch.empty_like(unbiased)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            (uxx, bxx), (uyy, byy), (uxy, bxy) = _hsic(x, x), _hsic(y, y), _hsic(x, y)
            unbiased[i, j] = uxy / (uxx * uyy) ** 0.5
            biased[i, j] = bxy / (bxx * byy) ** 0.5
    return {"unbiased": unbiased, "biased": biased, "both": (unbiased, biased)}[estimator]


def _check_features(features, name):
    if not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError(f"{name}: expected a non-empty list of (N, D) tensors, got {type(features).__name__}")
    for i, x in enumerate(features):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}[{i}]: expected a floating-point tensor")
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(f"{name}[{i}]: expected shape (N, D), got {tuple(x.shape)}")
        if x.shape[0] != features[0].shape[0]:
            raise ValueError(f"{name}[{i}]: {x.shape[0]} rows, but {name}[0] has {features[0].shape[0]}")
        if not x.isfinite().all():
            raise ValueError(f"{name}[{i}]: contains NaN or infinity")


def _hsic(x, y):
    n = x.shape[0]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(exact), y.to(exact)
    x, y = x - x.mean(0), y - y.mean(0)
    full = (x.T @ y).double().square().sum()
    a, b = x.double().square().sum(1), y.double().square().sum(1)
    trace = full - (a * b).sum()
    unbiased = (trace + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a * b).sum()) / (n * (n - 3))
    return unbiased, full / (n - 1) ** 2

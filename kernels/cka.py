"""Centred kernel alignment (CKA) between lists of feature matrices, and the covariance that the same product gives.

With Gram matrices K, L of two feature sets over the same n rows, CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

Linear kernel, with columns centred first (neither estimator changes, and rounding matters far less), a_i = |x_i|^2,
b_i = |y_i|^2 and F = |X^T Y|^2 (Frobenius):

    biased    F / (n - 1)^2                                                        (Kornblith et al. 2019)
    unbiased  (F - sum a_i b_i + sum a sum b / ((n-1)(n-2)) - 2/(n-2) sum a_i b_i) / (n (n-3))    (Song et al. 2012)

The second line is their HSIC_1 with the trace and row sums of the diagonal-free Gram matrices written out in features:
the row sums of a centred linear Gram are 0, so those without the diagonal are -a_i. F comes from whichever side is
cheaper: D x D products of the features, or N x N Grams in row blocks, which every pair of layers then shares.
"""

import math
import numbers
from collections.abc import Sequence

import torch

from kernels.dispatch import use_triton

BLOCK_BYTES = 2**26  # of Gram rows, of all matrices together, that are held at a time
CHUNK_ROWS = 16384  # rows whose product is added in fp32 before it joins the fp64 sum
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Covariance (D, D) of the rows of x (N, D), divided by N - 1 as np.cov(x.T); fp64 for fp64 input, else fp32."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    _check_features([x], "x")
    if x.shape[0] < 2:
        raise ValueError("x: a covariance needs at least 2 rows")
    scatter = (
        _scatter_op if torch.compiler.is_compiling() else _scatter
    )  # the operator's first call imports Dynamo
    product = scatter(x.detach())
    if not torch.compiler.is_compiling() and not product.diagonal().isfinite().all():
        _check_finite(x=[x])
    return (product / (x.shape[0] - 1)).to(_wide(x))


def cka(
    xs: Sequence[torch.Tensor],
    ys: Sequence[torch.Tensor],
    *,
    estimator: str = "unbiased",
    kernel: str = "linear",
    bandwidth: float = 1.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """CKA of every x with every y: a (len(xs), len(ys)) fp64 tensor, or two (unbiased, biased) with estimator="both".

    xs, ys     lists of (N, D_i) tensors with the same N >= 4 rows (samples) in the same order.
    estimator  "unbiased" (near 0 for unrelated features), "biased" (with a floor that grows with D / N: 0.2 for
               unrelated Gaussians with N = 4,537 and D = 1,536 and 1,024), or "both".
    kernel     "linear", or "rbf" with sigma = bandwidth times the median distance between different rows, exactly
               (Kornblith et al. 2019); its Gram matrices are computed in blocks and never kept.

    No gradient. NaN where a feature set is constant or, for the unbiased estimator, its own HSIC is not positive.
    Inside torch.compile nobody looks for NaN and infinity, nor for numbers whose fourth power is none in fp32.
    """
    if estimator not in ("unbiased", "biased", "both"):
        raise ValueError(f"estimator: expected unbiased, biased or both, got {estimator!r}")
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel: expected linear or rbf, got {kernel!r}")
    if not isinstance(bandwidth, numbers.Real):
        raise TypeError(f"bandwidth: expected a number, got {type(bandwidth).__name__}")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth: expected a positive number, got {bandwidth}")
    _check_features(xs, "xs")
    _check_features(ys, "ys")
    n = xs[0].shape[0]
    if ys[0].shape[0] != n:
        raise ValueError(f"ys: {ys[0].shape[0]} rows, but xs has {n}")
    if ys[0].device != xs[0].device:
        raise ValueError(f"ys: on {ys[0].device}, but xs is on {xs[0].device}")
    if n < 4:
        raise ValueError(f"xs: CKA needs at least 4 rows, got {n}")
    unique, places = (
        [],
        [],
    )  # a feature set named twice is worked on once; compared by `is`, which Dynamo traces
    for x in (*xs, *ys):
        found = [i for i, other in enumerate(unique) if other is x]
        places.append(found[0] if found else len(unique))
        if not found:
            unique.append(x)
    run = (
        _hsic_op if torch.compiler.is_compiling() else _hsic
    )  # the operator's first call imports Dynamo: seconds
    if (
        kernel == "rbf" and not torch.compiler.is_compiling()
    ):  # the median cannot be counted among NaN
        _check_finite(xs=xs, ys=ys)
    unique = [x.detach() for x in unique]
    hsic = run(unique, places[: len(xs)], places[len(xs) :], kernel, float(bandwidth))
    if not torch.compiler.is_compiling():
        own = hsic[1, len(xs) * len(ys) :]
        if not (
            (own > 1e-20) & (own < 1e30)
        ).all():  # NaN, a constant set, or numbers whose squares left fp32's range
            _check_finite(xs=xs, ys=ys)
            hsic = run(
                [_scaled(x) for x in unique],
                places[: len(xs)],
                places[len(xs) :],
                kernel,
                float(bandwidth),
            )
    cross, own_x, own_y = hsic.split([len(xs) * len(ys), len(xs), len(ys)], dim=1)
    unbiased, biased = (
        cross.unflatten(1, (len(xs), len(ys))) / (own_x.unsqueeze(2) * own_y.unsqueeze(1)).sqrt()
    )
    return {"unbiased": unbiased, "biased": biased, "both": (unbiased, biased)}[estimator]


def _check_features(features, name):
    if isinstance(features, torch.Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name}: expected a list of (N, D) tensors, got {type(features).__name__}")
    if len(features) == 0:
        raise ValueError(f"{name}: expected at least one (N, D) tensor, got an empty list")
    for i, x in enumerate(features):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}[{i}]: expected a floating-point tensor, got {x.dtype}")
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name}[{i}]: expected shape (N, D), got {tuple(x.shape)}")
        if x.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"{name}[{i}]: {x.shape[0]} rows, but {name}[0] has {features[0].shape[0]}"
            )
        if x.device != features[0].device:
            raise ValueError(
                f"{name}[{i}]: on {x.device}, but {name}[0] is on {features[0].device}"
            )


def _check_finite(**features):
    for name, several in features.items():
        for i, x in enumerate(several):
            if not x.isfinite().all():
                raise ValueError(f"{name}[{i}]: contains NaN or infinity")


# --- plain PyTorch: the reference, and what runs on a CPU -----------------------------------------------------------


def _wide(*xs):
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def _mean(x):
    """Column means; short sums in fp32, their sum in fp64."""
    return (
        torch.stack([part.sum(0, dtype=_wide(x)) for part in x.split(1024)]).double().sum(0)
        / x.shape[0]
    )


def _centred(x, mean, wide):
    return x if mean is None else x.to(wide) - mean.to(wide)


def _scaled(x):
    """x divided by its largest absolute value; CKA stays the same."""
    x = x.to(_wide(x))
    low, high = x.aminmax()
    largest = torch.maximum(-low, high)
    return x / torch.where(largest > 0, largest, 1)


def _own_product(x):
    """x^T x by halves, the lower left one mirrored: a quarter to a third less work than the plain product."""
    width = x.shape[1]
    if width <= 128:
        return x.T @ x
    half = width // 2
    a, b = x[:, :half], x[:, half:]
    cross = a.T @ b
    out = x.new_empty(width, width)
    out[:half, :half], out[half:, half:] = _own_product(a), _own_product(b)
    out[:half, half:], out[half:, :half] = cross, cross.T
    return out


def _product(x, mean_x, y, mean_y, wide):
    """Centred x^T y; each chunk of rows in fp32 (fp64 for fp64 features), several chunks added in fp64."""
    total = None
    for a, b in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
        a = _centred(a, mean_x, wide)
        part = _own_product(a) if x is y else a.T @ _centred(b, mean_y, wide)
        total = part if total is None else total.double().add_(part)
    return total


def _square_norms(x):
    """Squared norm of each row; their sum is the squared Frobenius norm."""
    return torch.linalg.vector_norm(x, dim=1).double().square()


def _row_norms(x, mean, wide):
    return torch.cat([_square_norms(_centred(part, mean, wide)) for part in x.split(CHUNK_ROWS)])


def _from_features(features, means, pairs, wide):
    """Squared Frobenius norm of x^T y for each pair (i, j) of feature sets."""
    return {
        (i, j): _square_norms(_product(features[i], means[i], features[j], means[j], wide)).sum()
        for i, j in pairs
    }


def _from_grams(features, means, pairs, wide):
    """The same numbers as inner products of Gram matrices, a block of their rows at a time; all pairs share a block."""
    centred = [_centred(x, mean, wide) for x, mean in zip(features, means, strict=True)]
    n = len(centred[0])
    step = max(16, BLOCK_BYTES // (4 * n * len(features)))
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=centred[0].device)
    for start in range(0, n, step):
        grams = torch.stack([(x[start : start + step] @ x.T).flatten() for x in centred])
        total += grams @ grams.T
    return {(i, j): total[i, j] for i, j in pairs}


def _linear(features, pairs):
    """(unbiased, biased) HSIC with the linear kernel for each pair."""
    n, wide = features[0].shape[0], _wide(*features)
    means = [_mean(x) for x in features]
    triton = wide == torch.float32 and use_triton(features[0].device)
    if (
        n <= CHUNK_ROWS and not triton
    ):  # centre once; many rows are centred a chunk at a time, where they are needed
        features = [_centred(x, mean, wide) for x, mean in zip(features, means, strict=True)]
        means = [None] * len(features)
    widths = [x.shape[1] for x in features]
    by_features = sum(widths[i] * widths[j] * (0.7 if i == j else 1) for i, j in pairs)
    by_grams = n * (sum(widths) + len(features) ** 2)
    if by_grams < by_features:
        full = _from_grams(features, means, pairs, wide)
    elif triton:
        from kernels import cka_triton

        full = cka_triton.square_norms(features, means, pairs)
    else:
        full = _from_features(features, means, pairs, wide)
    norms = [_row_norms(x, mean, wide) for x, mean in zip(features, means, strict=True)]
    hsic = {}
    for i, j in pairs:
        both = torch.dot(norms[i], norms[j])
        trace = (
            full[i, j]
            - both
            + norms[i].sum() * norms[j].sum() / ((n - 1) * (n - 2))
            - 2 / (n - 2) * both
        )
        hsic[i, j] = torch.stack((trace / (n * (n - 3)), full[i, j] / (n - 1) ** 2))
    return hsic


def _squared_distances(x, norms, start, step):
    """Rows start to start + step of the squared distances between the rows of x; the same bits at every call."""
    part = slice(start, start + step)
    return torch.addmm(norms, x[part], x.T, alpha=-2).add_(norms[part, None]).clamp_(min=0)


def _off_diagonal(block, start, value):
    rows = torch.arange(block.shape[0], device=block.device)
    block[rows, rows + start] = value
    return block


def _median(x, norms, step):
    """Lower median of the squared distances between different rows, exact in O(N) memory.

    Two passes of counting: non-negative fp32 values are ordered as their bits are, so the first pass finds the upper 16
    bits of the median and the second the lower.
    """
    n = len(x)
    rank, high = (n * (n - 1) - 1) // 2, None
    for _ in range(2):
        counts = torch.zeros(2**16 + 1, dtype=torch.int64, device=x.device)
        for start in range(0, n, step):
            bits = _squared_distances(x, norms, start, step).float().view(torch.int32)
            key = (
                bits >> 16
                if high is None
                else torch.where(bits >> 16 == high, bits & 0xFFFF, 2**16)
            )
            key = _off_diagonal(key, start, 2**16).flatten().long()
            counts += (
                torch.bincount(key, minlength=2**16 + 1)
                if x.device.type == "cpu"
                else counts.new_zeros(2**16 + 1).scatter_add_(0, key, torch.ones_like(key))
            )
        below = counts[:-1].cumsum(0)
        found = torch.searchsorted(below, rank, right=True)
        if high is None:
            high, rank = found, rank - (below - counts[:-1]).take(found)
    return (high << 16 | found).to(torch.int32).view(torch.float32)


def _rbf(features, pairs, bandwidth):
    """(unbiased, biased) HSIC with the Gaussian kernel for each pair, from blocks of rows of the kernel matrices.

    HSIC does not change when a constant is added to a kernel, so the kernel's value at the median distance is taken off
    first: sums of numbers around 0 lose far less to rounding.
    """
    n, wide = features[0].shape[0], _wide(*features)
    step = max(1, BLOCK_BYTES // (16 * n * len(features)))
    xs = [_scaled(_centred(x, _mean(x), wide)) for x in features]
    norms = [x.square().sum(1) for x in xs]
    sigmas = [
        _median(x, norm, step).to(wide) * bandwidth**2 for x, norm in zip(xs, norms, strict=True)
    ]
    offset = float(torch.tensor(-0.5 / bandwidth**2, dtype=torch.float64).exp())
    total = torch.zeros(len(xs), len(xs), dtype=torch.float64, device=xs[0].device)
    sums = []
    for start in range(0, n, step):
        kernels = []
        for x, norm, sigma in zip(xs, norms, sigmas, strict=True):
            block = _squared_distances(x, norm, start, step).mul_(-0.5 / sigma).exp_().sub_(offset)
            kernels.append(_off_diagonal(block, start, 0))
        sums.append(torch.stack([block.sum(1, dtype=torch.float64) for block in kernels]))
        flat = torch.stack(kernels).flatten(1)
        total += flat @ flat.T
    sums, diagonal = torch.cat(sums, 1), 1 - offset
    whole, cross = sums.sum(1), sums @ sums.T
    hsic = {}
    for i, j in pairs:
        unbiased = (
            total[i, j] + whole[i] * whole[j] / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross[i, j]
        )
        # with the diagonal back in place
        rows = cross[i, j] + diagonal * (whole[i] + whole[j]) + n * diagonal**2
        ends = (whole[i] + n * diagonal) * (whole[j] + n * diagonal)
        biased = total[i, j] + n * diagonal**2 - 2 / n * rows + ends / n**2
        hsic[i, j] = torch.stack((unbiased / (n * (n - 3)), biased / (n - 1) ** 2))
    return hsic


def _hsic(
    features: Sequence[torch.Tensor],
    left: Sequence[int],
    right: Sequence[int],
    kernel: str,
    bandwidth: float,
) -> torch.Tensor:
    """-> (unbiased, biased) x (every left with every right, every left with itself, every right with itself)."""
    wanted = [(min(i, j), max(i, j)) for i in left for j in right] + [
        (i, i) for i in (*left, *right)
    ]
    pairs = sorted(set(wanted))
    with torch.autocast(features[0].device.type, enabled=False):
        hsic = _linear(features, pairs) if kernel == "linear" else _rbf(features, pairs, bandwidth)
    return torch.stack([hsic[pair] for pair in wanted], 1)


def _scatter(x: torch.Tensor) -> torch.Tensor:
    """Sum over rows of (x - mean)(x - mean)^T -> (D, D) fp64."""
    wide, mean = _wide(x), _mean(x)
    with torch.autocast(x.device.type, enabled=False):
        if wide == torch.float32 and use_triton(x.device):
            from kernels import cka_triton

            return cka_triton.scatter(x, mean)
        return _product(x, mean, x, mean, wide).double()


# --- operators ------------------------------------------------------------------------------------------------------

_hsic_op = torch.library.custom_op("g2l::hsic", _hsic, mutates_args=())
_scatter_op = torch.library.custom_op("g2l::scatter", _scatter, mutates_args=())


@_hsic_op.register_fake
def _(features, left, right, kernel, bandwidth):
    wanted = len(left) * len(right) + len(left) + len(right)
    return torch.empty(2, wanted, dtype=torch.float64, device=features[0].device)


@_scatter_op.register_fake
def _(x):
    return torch.empty(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)

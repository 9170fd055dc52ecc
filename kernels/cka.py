"""Centred kernel alignment (CKA) between lists of feature sets, and the covariance of one.

With Gram matrices K = X X^T and L = Y Y^T of two feature sets over the same n rows, columns
centred, CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). With a_i = |x_i|^2, b_i = |y_i|^2 and O =
sum over i != j of K_ij L_ij = |X^T Y|^2 - sum a_i b_i:

    biased    (O + sum a_i b_i) / (n - 1)^2                                  (Kornblith et al. 2019)
    unbiased  (O + sum a sum b / ((n-1)(n-2)) - 2/(n-2) sum a_i b_i) / (n (n-3))  (Song et al. 2012)

The second line is their HSIC_1: row sums of a centred Gram matrix are 0, so those without the
diagonal are -a_i. Both are inner products of (differently centred) matrices, so |CKA| <= 1.

Everything costly is O. `_by_features` has it from products of features, `_by_grams` from blocks of
Gram rows that all pairs share; `_inner_products` takes the cheaper one. What is left are (sets,
sets) and (sets, n) numbers, which `_cka` brings to the host and combines there in fp64. Where
rounding may have eaten the digits that are left after the subtractions, it starts again in fp64.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.bound import scaled
from kernels.dispatch import check_tensor, pinned_products, use_triton

CHUNK_ROWS = 8192  # rows that are centred at a time where features are multiplied
CACHED = 2**21  # numbers that a CPU's caches hold
TILE = 512  # columns of one product on a CPU: what lies below a tile on the diagonal is left out
GRAM_ROWS = 512  # at least so many rows of all Gram matrices are held at a time,
BLOCK_BYTES = 2**26  # and as many as fit here
# How often the largest term may exceed the result, so that its rounding stays below 3e-4 of it:
# fp32 products are off by about 1e-6, sums within tensor cores, which cut what they add, by 3e-5.
CANCELLATION = {"ieee": 250.0, "tf32": 8.0}


def covariance(x: Tensor) -> Tensor:
    """Covariance (D, D) of the rows of x (N, D), divided by N - 1 as np.cov(x.T).

    fp64 for fp64 input, else fp32. Raises TypeError or ValueError where x is no such tensor, and
    ValueError for NaN and infinity.
    """
    _check([x], "x")
    if len(x) < 2:
        raise ValueError("x: a covariance needs at least 2 rows")
    # Only for the compiler: an operator's first call imports Dynamo, which takes seconds.
    run = _covariance_op if torch.compiler.is_compiling() else _covariance
    return run(x.detach())


def cka(
    xs: Tensor | Sequence[Tensor],
    ys: Tensor | Sequence[Tensor],
    *,
    estimator: str = "unbiased",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear CKA of every x with every y: (len(xs), len(ys)) fp64; of two tensors a scalar.

    xs, ys     (N, D) tensors, or lists of them, with the same N >= 4 rows (samples), in one order.
    estimator  "unbiased" (near 0 for unrelated features), "biased" (with a floor that grows with
               D / N: 0.2 for unrelated Gaussians with N = 4,537 and D = 1,536 and 1,024), or
               "both" of them as a pair.

    No gradient. NaN where a feature set is constant or, for the unbiased estimator, its own HSIC is
    not positive. Raises TypeError or ValueError, naming the argument, for what is no list of such
    tensors and for NaN and infinity.
    """
    if estimator not in ("unbiased", "biased", "both"):
        raise ValueError(f"estimator: expected unbiased, biased or both, got {estimator!r}")
    if isinstance(xs, Tensor) and isinstance(ys, Tensor):
        tables = cka([xs], [ys], estimator=estimator)
        if isinstance(tables, tuple):
            return tables[0][0, 0], tables[1][0, 0]
        return tables[0, 0]
    _check(xs, "xs")
    _check(ys, "ys", first=xs[0])
    if len(xs[0]) < 4:
        raise ValueError(f"xs: CKA needs at least 4 rows, got {len(xs[0])}")
    run = _cka_op if torch.compiler.is_compiling() else _cka
    left = [x.detach() for x in xs]
    right = [y.detach() for y in ys]
    unbiased, biased = run(left, right)
    if estimator == "both":
        return unbiased, biased
    return unbiased if estimator == "unbiased" else biased


def _check(features, name, first=None):
    """Every one a (N, D) tensor with the rows and the device of the first."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name}: expected a list of (N, D) tensors, got {type(features).__name__}")
    if len(features) == 0:
        raise ValueError(f"{name}: expected at least one (N, D) tensor, got an empty list")
    for i, x in enumerate(features):
        where = f"{name}[{i}]"
        first = x if first is None else first
        check_tensor(where, x, "the first set", first)
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(f"{where}: expected shape (N, D), got {tuple(x.shape)}")
        if len(x) != len(first):
            raise ValueError(f"{where}: {len(x)} rows, but the first set has {len(first)}")


def _check_finite(features, name):
    for i, x in enumerate(features):
        if not x.isfinite().all():
            raise ValueError(f"{name}[{i}]: contains NaN or infinity")


# --- sums over rows: plain PyTorch, but for the centring on a GPU ---------------------------------


def _wide(features):
    double = any(x.dtype == torch.float64 for x in features)
    return torch.float64 if double else torch.float32


def _in_triton(device, wide):
    return wide == torch.float32 and use_triton(device)


def _mean(x):
    """Column means in fp64, exact for a constant column, so that it is exactly 0 when centred."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return x.mean(0, dtype=torch.float64)
    first = x[0].float()  # fp32 sums of what differs from it are many times faster on a CPU
    sums = [(part - first).sum(0) for part in x.split(1024)]
    return torch.stack(sums).double().sum(0) / len(x) + first


def _means(sets, wide):
    """What `_centre` takes off columns: their means, for Triton the sums that they come from."""
    if not _in_triton(sets[0].device, wide):
        return [_mean(x) for x in sets]
    from kernels.cka_triton import column_sums

    return [column_sums(x) for x in sets]


def _centre(x, begin, out, norms, mean):
    """out = rows of x from `begin` less the column means, norms = lengths of its rows.

    By Triton out is rounded to TF32, and its rows beyond those of x are zeros.
    """
    if _in_triton(x.device, out.dtype):
        import kernels.cka_triton as cka_triton

        cka_triton.centre(x, begin, mean, out, norms)
        return
    torch.sub(x[begin : begin + len(out)], mean.to(out.dtype), out=out)
    torch.linalg.vector_norm(out, dim=1, out=norms)


def _centre_whole(x, out, norms):
    """The same for all rows of x, with fewer passes where PyTorch does it."""
    if _in_triton(x.device, out.dtype):
        _centre(x, 0, out, norms, _means([x], out.dtype)[0])
        return
    torch.sub(x, x[0].to(out.dtype), out=out)
    out -= out.mean(0)
    torch.linalg.vector_norm(out, dim=1, out=norms)


def _blocks(columns, pairs, tile):
    """Products to take: (set, its columns, columns that they are multiplied with), side by side.

    Columns of a set go tile by tile. Sets that follow one another go in one product; within the
    tile's own set it begins at the tile, as what lies below the diagonal is there already.
    """
    blocks = []
    for i in sorted({i for i, _ in pairs}):
        runs: list[list[int]] = []  # of partners
        for j in sorted(j for first, j in pairs if first == i):
            if runs and runs[-1][-1] == j - 1:
                runs[-1].append(j)
            else:
                runs.append([j])
        end = columns[i].stop
        for start in range(columns[i].start, end, tile):
            part = slice(start, min(start + tile, end))
            for run in runs:
                begin = start if run[0] == i else columns[run[0]].start
                blocks.append((i, part, slice(begin, columns[run[-1]].stop)))
    return blocks


def _by_features(sets, pairs, wide):
    """-> |X^T Y|^2 for each of `pairs` (i <= j), else 0, and lengths of centred rows (sets, n).

    The centred rows of all sets lie side by side, CHUNK_ROWS at a time.
    """
    n = len(sets[0])
    columns = []
    width = 0
    for x in sets:
        columns.append(slice(width, width + x.shape[1]))
        width += x.shape[1]
    means = _means(sets, wide)
    side = torch.empty(min(n, CHUNK_ROWS), width, dtype=wide, device=sets[0].device)
    blocks = _blocks(columns, pairs, TILE if side.device.type == "cpu" else width)
    products = []
    for _, part, beside in blocks:
        shape = (part.stop - part.start, beside.stop - beside.start)
        products.append(side.new_empty(shape))
    # Lengths of rows, then of the products' columns: together they come to the host in one copy.
    rows = len(sets) * n
    found = sum(product.shape[1] for product in products)
    numbers = side.new_empty(rows + found)
    lengths = numbers[:rows].view(len(sets), n)
    for begin in range(0, n, CHUNK_ROWS):
        z = side[: n - begin]
        for k, x in enumerate(sets):
            own = lengths[k, begin : begin + len(z)]
            _centre(x, begin, z[:, columns[k]], own, means[k])
        for product, (_, part, beside) in zip(products, blocks, strict=True):
            product.addmm_(z[:, part].T, z[:, beside], beta=int(begin > 0))
    end = rows
    for product in products:
        place = end
        end += product.shape[1]
        torch.linalg.vector_norm(product, dim=0, out=numbers[place:end])
    norms = _numpy(numbers)
    inner = np.zeros((len(sets), len(sets)))
    squares = np.empty(width)
    end = rows
    for i, part, beside in blocks:
        place = end
        end += beside.stop - beside.start
        squares[:] = 0
        squares[beside] = norms[place:end] ** 2
        squares[part.stop : columns[i].stop] *= 2  # and for what is below the diagonal of X^T X
        for j, own in enumerate(columns):
            inner[i, j] += squares[own].sum()
    return inner, norms[:rows].reshape(len(sets), n)


def _lots(sets):
    """Numbers of sets that share a batched product: of one width, on a CPU what its caches hold."""
    lots = []
    widths = [x.shape[1] for x in sets]
    for width in sorted(set(widths)):
        chosen = [i for i in range(len(sets)) if widths[i] == width]
        size = len(chosen)
        if sets[0].device.type == "cpu":
            size = max(1, CACHED // (len(sets[0]) * width))
        lots += [chosen[first : first + size] for first in range(0, len(chosen), size)]
    return lots


def _gram_rows(n, sets):
    """A multiple of 32, as GPUs like it, or all."""
    return min(n, max(GRAM_ROWS, BLOCK_BYTES // (4 * n * sets) // 32 * 32))


def _by_grams(sets, wide):
    """-> sum over r != s of K_rs L_rs for all pairs of sets, lengths of centred rows (sets, n).

    Blocks of rows of all Gram matrices, what is on or below the diagonal left out. Where one block
    is all, centred features are needed once, and all lots have them in the same memory.
    """
    n = len(sets[0])
    count = len(sets)
    lengths = torch.empty(count, n, dtype=wide, device=sets[0].device)
    lots = _lots(sets)
    step = _gram_rows(n, count)
    # A GPU multiplies matrices of odd sizes at a third of its speed; rows of zeros change no sum.
    height = -(-n // 32) * 32 if _in_triton(lengths.device, wide) else n
    sizes = [sum(height * sets[i].shape[1] for i in lot) for lot in lots]
    shared = lengths.new_empty(max(sizes) if step == n else 0)
    buffer = lengths.new_empty(count * step * height)
    stacks = []
    inner = lengths.new_empty(())
    for begin in range(0, n, step):
        rows = min(step, n - begin)
        grams = buffer[: count * rows * (height - begin)].view(count, rows, height - begin)
        for k, part in enumerate(grams.split([len(lot) for lot in lots])):
            if begin == 0:
                size = sizes[k]
                room = shared[:size] if step == n else lengths.new_empty(size)
                stacks.append(room.view(len(lots[k]), height, -1))
                for i, out in zip(lots[k], stacks[k], strict=True):
                    _centre_whole(sets[i], out, lengths[i])
            z = stacks[k]
            torch.bmm(z[:, begin : begin + rows], z[:, begin:].mT, out=part)
        grams[:, :, :rows].triu_(1)
        flat = grams.flatten(1)
        product = flat @ flat.T
        inner = product if begin == 0 else inner.double().add_(product)
    back = np.argsort(list(itertools.chain(*lots)))
    return 2 * _numpy(inner)[np.ix_(back, back)], _numpy(lengths)


def _numpy(x):
    return x.cpu().numpy().astype(np.float64)


def _grams_are_cheaper(sets, pairs):
    """A row costs n (sum of widths) by Grams, for all pairs together and less what is below the
    diagonal, and by features the product of two widths for each pair."""
    n = len(sets[0])
    widths = [x.shape[1] for x in sets]
    above = (1 + _gram_rows(n, len(sets)) / n) / 2
    by_grams = n * (sum(widths) + len(sets) ** 2) * above
    by_features = 0.0
    for i, j in pairs:
        share = 0.6 if i == j else 1.0
        by_features += share * widths[i] * widths[j]
    return by_grams < by_features


def _inner_products(sets, pairs, wide):
    """-> (unbiased, biased) sums of this file's head (2, sets, sets), largest terms of own ones."""
    n = len(sets[0])
    if _grams_are_cheaper(sets, pairs):
        inner, lengths = _by_grams(sets, wide)
        norms = lengths**2
        dots = norms @ norms.T
        off = inner
    else:
        inner, lengths = _by_features(sets, pairs, wide)
        norms = lengths**2
        dots = norms @ norms.T
        off = np.maximum(inner, inner.T) - dots
    sums = norms.sum(1)
    unbiased = off - 2 / (n - 2) * dots
    unbiased += np.outer(sums, sums) / ((n - 1) * (n - 2))
    return np.stack((unbiased, off + dots)), inner.diagonal()


# --- operators ------------------------------------------------------------------------------------


def _cka(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """-> (2: unbiased and biased, len(xs), len(ys)) fp64."""
    places: dict[tuple, int] = {}  # a feature set given twice is worked on once
    sets: list[Tensor] = []
    place = []
    for x in (*xs, *ys):
        name = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if name not in places:
            places[name] = len(sets)
            sets.append(x)
        place.append(places[name])
    left = place[: len(xs)]
    right = place[len(xs) :]
    pairs = {(i, i) for i in place}
    for i, j in itertools.product(left, right):
        pairs.add((min(i, j), max(i, j)))
    wide = _wide(sets)
    device = xs[0].device
    precision = "ieee" if device.type == "cpu" else "tf32"
    with torch.autocast(device.type, enabled=False), np.errstate(all="ignore"):
        with pinned_products(precision):
            tables, largest = _inner_products(sets, pairs, wide)
        own, biased = tables.diagonal(axis1=1, axis2=2)
        sure = (1e-20 < biased) & (biased < 1e30)  # in fp32's range; false for NaN
        if wide == torch.float32:
            sure &= largest < CANCELLATION[precision] * own
        if not sure.all():
            _check_finite(xs, "xs")
            _check_finite(ys, "ys")
            sets = [scaled([x], torch.float64)[0][0] for x in sets]  # CKA stays the same
            tables, _ = _inner_products(sets, pairs, torch.float64)
        own = np.sqrt(tables.diagonal(axis1=1, axis2=2))
        own = np.where(own > 0, own, np.nan)
        tables /= own[:, :, None]
        tables /= own[:, None, :]
        chosen = tables[:, left][:, :, right].clip(-1, 1)
    return torch.from_numpy(np.ascontiguousarray(chosen)).to(device)


def _covariance(x: Tensor) -> Tensor:
    wide = _wide([x])
    mean = _mean(x).to(wide)
    width = x.shape[1]
    total = x.new_zeros(width, width, dtype=wide)
    with torch.autocast(x.device.type, enabled=False), pinned_products("ieee"):
        for part in x.split(CHUNK_ROWS):
            z = part.to(wide) - mean
            for a in range(0, width, TILE):  # what lies below a tile on the diagonal is mirrored
                right = z[:, a:]
                total[a : a + TILE, a:].addmm_(right[:, :TILE].T, right)
    if not total.diagonal().isfinite().all():
        _check_finite([x], "x")
    upper = total / (len(x) - 1)
    return upper.triu() + upper.triu(1).T


_cka_op = torch.library.custom_op("g2l::cka", _cka, mutates_args=())
_covariance_op = torch.library.custom_op("g2l::covariance", _covariance, mutates_args=())


@_cka_op.register_fake
def _(xs, ys):
    return xs[0].new_empty(2, len(xs), len(ys), dtype=torch.float64)


@_covariance_op.register_fake
def _(x):
    width = x.shape[1]
    return x.new_empty(width, width, dtype=_wide([x]))

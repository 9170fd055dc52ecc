"""Triton kernels of the projector + Log-Sum loss; the mathematics is in logsum.py.

Few rows (`fused_*`): one program owns some columns of the projection and all rows, so that batch
statistics are sums in registers. Three launches: forward; the loss with shares of the student's
gradient; the gradients.

Many rows (`tiled_*`): nothing of (B, Dt) is stored but a part of the gradient, in the operands'
type. Each sweep projects again and does on every tile of it what its stage says: moments
of the columns, then the loss and the sums that batch norm's backward needs, then the gradient.
Between the sweeps a small kernel adds what the row tiles left, all of them side by side.

Every kernel writes each element of its outputs; sums over programs go through a buffer and are
added in a fixed order; no atomics. Imported on first use on a GPU.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from kernels.dispatch import device_kind, launching

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
SHARE = 384  # features that one program of few rows takes into the student's gradient
SLICE = 32  # columns of a tile that go through its epilogue at a time, to save registers
BLOCK = {
    "TILES": 256,
    "COLUMNS": 16,
    "num_warps": 4,
}  # row tiles and columns of one column sum
PARTS = 3  # into which the rows of the backward pass are cut at most
PART_ROWS = 1408  # and at least: with 1,536 columns 66 tiles, half the processors of an H100


@triton.jit
def _power(d, ALPHA: constexpr):
    """(|d|^alpha, its derivative without the factor alpha)."""
    if ALPHA == 4.0:
        square = d * d
        return square * square, square * d
    else:
        size = tl.abs(d)  # 0 and NaN stay what they are
        slope = tl.where(size > 0, tl.exp2((ALPHA - 1.0) * tl.log2(size)), size)
        return slope * size, tl.where(d < 0, -slope, slope)


@triton.jit
def _moments(x, real, rows):
    """Means, and squared deviations summed, of the columns of x over their real rows."""
    mean = tl.sum(tl.where(real, x, 0.0), 0) / rows
    centred = tl.where(real, x - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, 0)


@triton.jit
def _standardise(x, real, mean, rstd):
    return tl.where(real, (x - mean[None, :]) * rstd[None, :], 0.0)


@triton.jit
def _vector(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _difference(x, t, real, gain, shift, NORMALIZE: constexpr):
    if NORMALIZE == "student-affine":
        x = x * gain[None, :] + shift[None, :]
    return tl.where(real, x - t, 0.0)


@triton.jit
def _through_norm(g, x, mean_g, mean_gx, rstd):
    """Batch norm's backward: gradient at x, the standardised columns -> before the norm."""
    return (g - mean_g[None, :] - x * mean_gx[None, :]) * rstd[None, :]


@triton.jit
def _product(
    a, b, real_m, real_n, count, stride_am, stride_ak, stride_bk, stride_bn, unit_a, unit_b,
    OPERAND: constexpr, STEP: constexpr,
):  # fmt: skip
    """Product of the tiles that begin at a and b, over `count` common places; fp32 accumulators."""
    m = tl.arange(0, real_m.shape[0])
    n = tl.arange(0, real_n.shape[0])
    k = tl.arange(0, STEP)
    a += m[:, None] * stride_am + k[None, :] * stride_ak
    b += k[:, None] * stride_bk + n[None, :] * stride_bn
    total = tl.zeros((real_m.shape[0], real_n.shape[0]), tl.float32)
    for start in range(0, count, STEP):
        here = tl.cast(start, tl.int64)
        left = k < count - start
        x = tl.load(a + here * stride_ak, mask=real_m[:, None] & left[None, :], other=0.0)
        y = tl.load(b + here * stride_bk, mask=left[:, None] & real_n[None, :], other=0.0)
        if unit_a is not None:
            x = x * unit_a
        if unit_b is not None:
            y = y * unit_b
        total = tl.dot(x.to(OPERAND), y.to(OPERAND), total, input_precision="ieee")
    return total


@triton.jit
def _slices(y, WIDTH: constexpr):
    """Its columns as a tuple of tiles of WIDTH columns, in order."""
    if y.shape[1] <= WIDTH:
        return (y,)
    else:
        halves = tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        return _slices(left, WIDTH) + _slices(right, WIDTH)


@triton.jit
def _store(out, tile, row, column, rows, columns, add, SLICE: constexpr):
    """A tile into `out` (rows, columns), added to what is there if `add`; slice by slice."""
    r = row + tl.arange(0, tile.shape[0])
    slices = _slices(tile, SLICE)
    for i in tl.static_range(tile.shape[1] // SLICE):
        c = column + i * SLICE + tl.arange(0, SLICE)
        at = out + r.to(tl.int64)[:, None] * columns + c[None, :]
        real = (r < rows)[:, None] & (c < columns)[None, :]
        before = tl.load(at, mask=real & add, other=0.0).to(tl.float32)
        tl.store(at, before + slices[i], mask=real)


# --- few rows ------------------------------------------------------------------------------------


@triton.jit
def fused_forward_kernel(
    student, weight, teacher, scale, shift, partial, grad_y, columns,
    rows, inner, features, stride_sb, stride_wi, stride_wf, stride_tb, norm_eps,
    ALPHA: constexpr, NORMALIZE: constexpr, NEED_GRAD: constexpr, OPERAND: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr,
):  # fmt: skip
    """All rows of COLUMNS columns: product, batch norm, sum of powers, unscaled gradient."""
    r = tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    inside = c < features
    real = (r[:, None] < rows) & inside[None, :]
    # loaded first: the product hides how long that takes
    t = tl.load(teacher + r[:, None] * stride_tb + c[None, :], mask=real, other=0.0).to(tl.float32)
    gain = tl.full((COLUMNS,), 1.0, tl.float32)
    shifts = gain
    if NORMALIZE == "student-affine":
        gain = _vector(scale + c, inside)
        shifts = _vector(shift + c, inside)
    y = _product(
        student, weight + first.to(tl.int64) * stride_wf, r < rows, inside, inner,
        stride_sb, 1, stride_wi, stride_wf, None, None, OPERAND, STEP,
    )  # fmt: skip
    if NORMALIZE != "none":
        mean, squares = _moments(y, real, rows)
        rstd = 1.0 / tl.sqrt(squares / rows + norm_eps)
        y = _standardise(y, real, mean, rstd)
    if NORMALIZE == "both":
        mean, squares = _moments(t, real, rows)
        t = _standardise(t, real, mean, 1.0 / tl.sqrt(squares / rows + norm_eps))
    value, g = _power(_difference(y, t, real, gain, shifts, NORMALIZE), ALPHA)
    partial += tl.program_id(0)
    tl.store(partial, tl.sum(value))
    if NEED_GRAD:
        if NORMALIZE != "none":
            sum_g = tl.sum(g, 0)
            sum_gx = tl.sum(g * y, 0)
            if NORMALIZE == "student-affine":
                tl.store(columns + c, sum_g, mask=inside)
                tl.store(columns + features + c, sum_gx, mask=inside)
            g = _through_norm(g, y, sum_g / rows, sum_gx / rows, rstd * gain)
        tl.store(partial + tl.num_programs(0), tl.max(tl.where(real, tl.abs(g), 0.0)))
        tl.store(grad_y + r[:, None] * features + c[None, :], g, mask=real)


@triton.jit
def _finish(partial, count, eps, loss, factor, ALPHA: constexpr):
    """`count` sums of powers, then bounds of the gradient -> loss and factor; returns the unit.

    The order is fixed. The unit, kept behind the factor, brings the largest gradient at the
    projection to about 512: there fp16 holds it and all that matters beside it, which is lost below
    6e-8 and above 65504.
    """
    total = tl.zeros((1024,), tl.float32)
    largest = total
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        total += _vector(partial + i, i < count)
        largest = tl.maximum(largest, _vector(partial + count + i, i < count))
    whole = tl.sum(total) + eps
    unit = 512.0 / tl.maximum(tl.max(largest), 1e-30)
    tl.store(loss, tl.log(whole))
    tl.store(factor, ALPHA / whole)
    tl.store(factor + 1, unit)
    return unit


@triton.jit
def shares_kernel(
    partial, loss, factor, grad_y, weight, shares, count, rows, inner, features,
    stride_wi, stride_wf, eps, ALPHA: constexpr, NEED_GRAD: constexpr, SHARE: constexpr,
    OPERAND: constexpr, ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr,
):  # fmt: skip
    """Loss and factor; tiles of grad_y weight^T over SHARE features each -> shares (., B, Ds)."""
    unit = _finish(partial, count, eps, loss, factor, ALPHA)  # the same in every program
    if NEED_GRAD:
        first = tl.program_id(2) * SHARE
        row = tl.program_id(1) * ROWS
        r = row + tl.arange(0, ROWS)
        k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        out = tl.program_id(0).to(tl.int64) * COLUMNS * stride_wi
        product = _product(
            grad_y + row * features + first, weight + first.to(tl.int64) * stride_wf + out,
            r < rows, k < inner, tl.minimum(SHARE, features - first),
            features, 1, stride_wf, stride_wi,
            unit, None, OPERAND, STEP,
        )  # fmt: skip
        r += tl.program_id(2) * rows
        out = shares + r[:, None] * inner + k[None, :]
        tl.store(
            out,
            product,
            mask=(row + tl.arange(0, ROWS) < rows)[:, None] & (k < inner)[None, :],
        )


@triton.jit
def gradients_kernel(
    grad, factor, grad_y, student, weight, shares, d_student, d_weight, rows, inner, features,
    start, weight_programs, stride_sb,
    SHARES: constexpr, SLICE: constexpr, OPERAND: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr,
):  # fmt: skip
    """Tiles of student^T grad_y, then tiles of grad_y weight^T, both scaled, in one launch.

    The rows are those of the batch from `start`; d_weight holds what was before.
    SHARES of the second product are added; with none it is done here, and grad_y holds its unit.
    """
    unit = tl.load(factor + 1)
    scale = tl.load(grad).to(tl.float32) * tl.load(factor) / unit
    pid = tl.program_id(0)
    of_weight = pid < weight_programs
    blocks = tl.cdiv(tl.where(of_weight, features, inner), COLUMNS)
    pid -= tl.where(of_weight, 0, weight_programs)
    row = pid // blocks * ROWS
    column = pid % blocks * COLUMNS
    m = row + tl.arange(0, ROWS)
    n = column + tl.arange(0, COLUMNS)
    if of_weight:
        product = _product(
            student + row, grad_y + column, m < inner, n < features, rows,
            1, stride_sb, features, 1, None, unit if SHARES else None, OPERAND, STEP,
        )  # fmt: skip
        _store(d_weight, product * scale, row, column, inner, features, start > 0, SLICE)
    else:
        if SHARES:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            real = (m < rows)[:, None] & (n < inner)[None, :]
            for share in tl.static_range(SHARES):
                at = shares + (share * rows + m)[:, None] * inner + n[None, :]
                product += tl.load(at, mask=real, other=0.0)
        else:
            product = _product(
                grad_y + row.to(tl.int64) * features, weight + column.to(tl.int64) * features,
                m < rows, n < inner, features, features, 1, 1, features, None, None, OPERAND, STEP,
            )  # fmt: skip
        _store(d_student, product * scale, row, column, rows, inner, False, SLICE)


# --- many rows -----------------------------------------------------------------------------------


@triton.jit
def sweep_kernel(
    student, weight, teacher, columns, scale, shift, factor, out, partial,
    rows, inner, features, count, stride_sb, stride_tb, STAGE: constexpr,
    ALPHA: constexpr, NORMALIZE: constexpr, SLICE: constexpr, OPERAND: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr,
):  # fmt: skip
    """One tile of the projection, slice by slice -> out.

    STAGE "moments":  mean, squared deviations of y, then of teacher      (row tile, 4, Dt)
          "loss":     sums of the gradient, of gradient times y           (row tile, 2, Dt);
                      sum of |d|^alpha, bound of gradients -> partial     (2, row tile, slice)
          "gradient": the gradient at the projection times its unit       (B, Dt)
    `count`: rows of the whole batch.
    """
    blocks = tl.cdiv(features, COLUMNS)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS
    row = tile * ROWS
    r = row + tl.arange(0, ROWS)
    r64 = r.to(tl.int64)
    y = _product(
        student + row.to(tl.int64) * stride_sb, weight + column, r < rows,
        column + tl.arange(0, COLUMNS) < features, inner, stride_sb, 1, features, 1,
        None, None, OPERAND, STEP,
    )  # fmt: skip
    tiles = _slices(y, SLICE)
    for i in tl.static_range(COLUMNS // SLICE):
        x = tiles[i]
        c = column + i * SLICE + tl.arange(0, SLICE)
        inside = c < features
        real = (r < rows)[:, None] & inside[None, :]
        t = tl.load(teacher + r64[:, None] * stride_tb + c[None, :], mask=real, other=0.0)
        t = t.to(tl.float32)
        if STAGE == "moments":
            at = out + tile.to(tl.int64) * 4 * features + c
            for side in tl.static_range(2):
                mean, squares = _moments(t if side else x, real, tl.minimum(rows - row, ROWS))
                tl.store(at + 2 * side * features, mean, mask=inside)
                tl.store(at + (2 * side + 1) * features, squares, mask=inside)
        else:
            at = columns + c
            spread = tl.full((SLICE,), 1.0, tl.float32)  # what batch norm multiplies gradients by
            gain = spread
            shifts = spread
            if NORMALIZE != "none":
                spread = _vector(at + features, inside)
                x = _standardise(x, real, _vector(at, inside), spread)
            if NORMALIZE == "both":
                rstd = _vector(at + 3 * features, inside)
                t = _standardise(t, real, _vector(at + 2 * features, inside), rstd)
            if NORMALIZE == "student-affine":
                gain = _vector(scale + c, inside)
                shifts = _vector(shift + c, inside)
                spread *= gain
            value, g = _power(_difference(x, t, real, gain, shifts, NORMALIZE), ALPHA)
            if STAGE == "loss":
                slices = tl.cdiv(features, SLICE)
                place = column // SLICE + i
                at = partial + tile * slices + place
                tl.store(at, tl.sum(value), mask=place < slices)
                at += tl.cdiv(rows, ROWS) * slices
                tl.store(at, tl.max(tl.abs(g)) * tl.max(tl.abs(spread)), mask=place < slices)
                at = out + tile.to(tl.int64) * 2 * features + c
                tl.store(at, tl.sum(g, 0), mask=inside)
                tl.store(at + features, tl.sum(g * x, 0), mask=inside)
            else:
                if NORMALIZE != "none":
                    mean_g = _vector(at + 4 * features, inside) / count
                    mean_gx = _vector(at + 5 * features, inside) / count
                    g = _through_norm(g, x, mean_g, mean_gx, spread)
                g *= tl.load(factor + 1)
                tl.store(out + r64[:, None] * features + c[None, :], g, mask=real)


@triton.jit
def merge_kernel(
    moments, columns, rows, features, norm_eps,
    ROWS: constexpr, TILES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """Moments of tiles of ROWS rows -> columns: mean and 1 / deviation of y, then of teacher."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < features
    tiles = tl.cdiv(rows, ROWS)
    for side in tl.static_range(2):
        mean = tl.zeros((COLUMNS,), tl.float32)
        squares = mean
        for step in tl.static_range(2):  # the mean of all, then squared deviations from it
            for first in range(0, tiles, TILES):  # all at once up to TILES row tiles
                tile = (first + tl.arange(0, TILES))[:, None]
                real = (tile < tiles) & inside[None, :]
                count = tl.minimum(rows - tile * ROWS, ROWS)
                at = moments + (tile.to(tl.int64) * 4 + 2 * side) * features + c[None, :]
                means = tl.load(at, mask=real, other=0.0)
                if step == 0:
                    mean += tl.sum(tl.where(real, means * (count / rows), 0.0), 0)
                else:
                    between = (means - mean[None, :]) * (means - mean[None, :]) * count
                    within = tl.load(at + features, mask=real, other=0.0)
                    squares += tl.sum(tl.where(real, within + between, 0.0), 0)
        out = columns + 2 * side * features + c
        tl.store(out, mean, mask=inside)
        tl.store(out + features, 1.0 / tl.sqrt(squares / rows + norm_eps), mask=inside)


@triton.jit
def sums_kernel(
    sums, columns, partial, loss, factor, count, tiles, features, eps,
    ALPHA: constexpr, TILES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """Sums of the row tiles -> columns, after the moments; loss and factor."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < 2 * features
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = (first + tl.arange(0, TILES))[:, None]
        at = sums + tile.to(tl.int64) * 2 * features + c[None, :]
        total += tl.sum(tl.load(at, mask=(tile < tiles) & inside[None, :], other=0.0), 0)
    tl.store(columns + 4 * features + c, total, mask=inside)
    if tl.program_id(0) == 0:
        _finish(partial, count, eps, loss, factor, ALPHA)


# --- launchers -----------------------------------------------------------------------------------


def _floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _dense(x):
    """x with its rows dense, as the kernels load them."""
    return x if x.stride(1) == 1 else x.contiguous()


def _ceil(count, size):  # triton.cdiv takes much longer
    return -(-count // size)


def _tiles(rows, columns, config):
    return _ceil(rows, config["ROWS"]) * _ceil(columns, config["COLUMNS"])


@functools.cache
def fused_forward_config(rows: int, operand: torch.dtype) -> dict:
    """Tile and launch parameters of the forward kernel for a batch of `rows`."""
    padded = max(16, triton.next_power_of_2(rows))
    step = min(128, 4096 // padded)  # fp32 tiles of three steps fit into every device
    return {
        "ROWS": padded,
        "COLUMNS": 16,
        "STEP": step if operand != torch.float32 else max(16, step // 2),
        "num_warps": 4 if padded <= 128 else 8,
        "num_stages": 3,
    }


@functools.cache
def shares_config(rows: int, operand: torch.dtype) -> dict:
    most = 32 if operand == torch.float32 else 64
    padded = min(most, max(16, triton.next_power_of_2(rows)))
    warps = 8 if operand == torch.float32 else 4
    return {
        "ROWS": padded,
        "COLUMNS": 32,
        "STEP": 64,
        "num_warps": warps,
        "num_stages": 2,
    }


@functools.cache
def gradients_config(rows: int, operand: torch.dtype) -> dict:
    """Of the fused path; there the rows are what is summed over."""
    config = shares_config(rows, operand)
    return config | {"ROWS": 64, "STEP": config["ROWS"]}


@functools.cache
def tiled_config(rows: int, operand: torch.dtype, kind: str) -> dict:
    """Of the sweeps and of the gradients of many rows; up to 2,048 need small tiles, to be enough.

    On a Hopper two programs of four warps share a multiprocessor: one multiplies meanwhile.
    """
    if operand == torch.float32:
        return {"ROWS": 128, "COLUMNS": 64, "STEP": 16, "num_warps": 4, "num_stages": 3}
    if rows <= 2048:
        return {"ROWS": 64, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
    if kind == "hopper":
        return {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 128, "COLUMNS": 256, "STEP": 32, "num_warps": 8, "num_stages": 3}


def _slice(o):
    return SLICE // 2 if o.normalize == "student-affine" else SLICE  # which needs more registers


def _tiled_config(rows, o, student):
    return tiled_config(rows, o.operand, device_kind(student.device))


def fused_forward(student, weight, teacher, scale, shift, o):
    rows, features = teacher.shape
    student = _dense(student)
    teacher = _dense(teacher)
    inner = student.shape[1]
    kind = _TYPES[o.operand]
    config = fused_forward_config(rows, o.operand)
    programs = _ceil(features, config["COLUMNS"])
    split = _ceil(features, SHARE)
    loss = _floats(student)
    factor = _floats(student, 2)
    partial = _floats(student, 2, programs)
    grad_y = _floats(student, rows if o.need_grad else 0, features)
    columns = _floats(student, 2 if o.need_grad and scale is not None else 0, features)
    shares = _floats(student, split if o.need_grad else 0, rows, inner)
    with launching(student):
        fused_forward_kernel[(programs,)](
            student, weight, teacher, scale, shift, partial, grad_y, columns,
            rows, inner, features, student.stride(0), *weight.stride(), teacher.stride(0),
            o.norm_eps, o.alpha, o.normalize, o.need_grad, kind, **config,
        )  # fmt: skip
        config = shares_config(rows, o.operand)
        grid = (_ceil(inner, config["COLUMNS"]), _ceil(rows, config["ROWS"]), split)
        shares_kernel[grid if o.need_grad else (1,)](
            partial, loss, factor, grad_y, weight, shares, programs, rows, inner, features,
            *weight.stride(), o.eps, o.alpha, o.need_grad, SHARE, kind, **config,
        )  # fmt: skip
    return loss, factor, grad_y, columns, shares


def _sweep(
    stage,
    student,
    weight,
    teacher,
    columns,
    scale,
    shift,
    factor,
    out,
    partial,
    count,
    o,
):
    config = _tiled_config(count, o, student)
    rows, features = teacher.shape
    sweep_kernel[(_tiles(rows, features, config),)](
        student, weight, teacher, columns, scale, shift, factor, out, partial,
        rows, student.shape[1], features, count, student.stride(0), teacher.stride(0),
        stage, o.alpha, o.normalize, _slice(o), _TYPES[o.operand], **config,
    )  # fmt: skip


def tiled_forward(student, weight, teacher, scale, shift, o):
    rows, features = teacher.shape
    student = _dense(student)
    teacher = _dense(teacher)
    operand = weight.to(o.operand).contiguous()
    tile_rows = _tiled_config(rows, o, student)["ROWS"]
    tiles = _ceil(rows, tile_rows)
    slices = _ceil(features, _slice(o))
    columns = _floats(student, 6, features)
    loss = _floats(student)
    factor = _floats(student, 2)
    moments = _floats(student, tiles, 4, features)
    sums = _floats(student, tiles, 2, features)
    partial = _floats(student, 2, tiles, slices)
    inputs = (student, operand, teacher, columns, scale, shift, factor)
    with launching(student):
        if o.normalize != "none":
            _sweep("moments", *inputs, moments, partial, rows, o)
            merge_kernel[(_ceil(features, BLOCK["COLUMNS"]),)](
                moments, columns, rows, features, o.norm_eps, tile_rows, **BLOCK
            )
        _sweep("loss", *inputs, sums, partial, rows, o)
        sums_kernel[(_ceil(2 * features, BLOCK["COLUMNS"]),)](
            sums, columns, partial, loss, factor, tiles * slices, tiles, features, o.eps, o.alpha,
            **BLOCK,
        )  # fmt: skip
    if operand is weight:  # an operator returns no input
        operand = operand.new_empty(0)
    return loss, factor, operand, columns, _floats(student, 0)


def backward(
    grad, factor, first, second, shares, student, weight, teacher, scale, shift, o,
    need_student, need_weight,
):  # fmt: skip
    """Of both paths: few rows have shares and their whole gradient at the projection, `first`."""
    (rows, features), inner = teacher.shape, student.shape[1]
    d_student = student.new_empty(student.shape if need_student else 0)
    student = _dense(student)
    teacher = _dense(teacher)
    config = gradients_config(rows, o.operand)
    part = rows
    operand = weight
    dtype = weight.dtype
    gradient = first
    if not len(shares):
        config = _tiled_config(rows, o, student)
        dtype = torch.float32  # added up over the parts
        part = max(PART_ROWS, _ceil(rows, PARTS))
        part = _ceil(part, config["ROWS"]) * config["ROWS"]
        operand = first if first.numel() else weight
        gradient = student.new_empty(min(rows, part), features, dtype=o.operand)
    d_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    of_weight = need_weight * _tiles(inner, features, config)
    with launching(student):
        for start in range(0, rows, part):
            a, t, out = (x[start : start + part] for x in (student, teacher, d_student))
            g = gradient[: len(a)]
            if not len(shares):
                _sweep(
                    "gradient",
                    a,
                    operand,
                    t,
                    second,
                    scale,
                    shift,
                    factor,
                    g,
                    factor,
                    rows,
                    o,
                )
            of_student = need_student * _tiles(len(a), inner, config)
            if of_weight + of_student:
                gradients_kernel[(of_weight + of_student,)](
                    grad, factor, g, a, operand, shares, out, d_weight,
                    len(a), inner, features, start, of_weight, a.stride(0),
                    len(shares), SLICE, _TYPES[o.operand], **config,
                )  # fmt: skip
    return d_student, d_weight.to(weight.dtype)

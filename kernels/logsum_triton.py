"""Triton kernels of the projector + Log-Sum loss; imported on first use on a GPU. The mathematics is in logsum.py.

Few rows (`fused_*`): one program owns some columns of the projection and all rows, so that batch statistics are sums in
registers. Many rows (`tiled_*`): forward, the vendor's matrix product into one slab of columns that stays in L2, and
small kernels over tiles of it; backward, rows are projected again, in chunks, by the kernel that makes a gradient of
the projection, so that it is never stored. Every kernel writes each element of its outputs; sums over programs go
through a buffer and are added in a fixed order; no atomics.
"""

import contextlib

import torch
import triton
import triton.language as tl

BOTH, STUDENT, AFFINE, NONE = 0, 1, 2, 3
_NORMALIZE = {"both": BOTH, "student": STUDENT, "student-affine": AFFINE, "none": NONE}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILE_ROWS, TILE_COLUMNS = 64, 64
SLAB_BYTES = (
    16 * 2**20
)  # of fp32 projection held at a time: well inside the L2 of the devices meant
CHUNK_ROWS = (
    11 * 128
)  # of the gradient at the projection: with 1,536 columns one tile for each processor of an H100


@triton.jit
def _power(d, ALPHA: tl.constexpr):
    """(|d|^alpha, its derivative without the factor alpha)."""
    if ALPHA == 4.0:
        square = d * d
        return square * square, square * d
    else:
        size = tl.abs(d)
        logarithm = tl.log2(tl.where(size > 0, size, 1.0))
        value = tl.where(size > 0, tl.exp2(ALPHA * logarithm), 0.0)
        slope = tl.where(size > 0, tl.exp2((ALPHA - 1.0) * logarithm), 0.0)
        value = tl.where(size == size, value, size)
        return value, tl.where(d < 0, -slope, tl.where(size == size, slope, size))


@triton.jit
def _standardise(x, real, rows, norm_eps):
    """Columns of x with mean 0 and variance 1 over their real rows, two passes in registers -> (x, rstd)."""
    mean = tl.sum(tl.where(real, x, 0.0), 0) / rows
    centred = tl.where(real, x - mean[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / rows + norm_eps)
    return centred * rstd[None, :], rstd


@triton.jit
def _product_tile(a, b, real_m, real_n, count, stride_am, stride_ak, stride_bk, stride_bn,
                  OPERAND: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Product of the tiles that begin at a and b, over `count` common places; fp32 accumulators."""
    m, n, k = tl.arange(0, real_m.shape[0]), tl.arange(0, real_n.shape[0]), tl.arange(0, STEP)
    total = tl.zeros((real_m.shape[0], real_n.shape[0]), tl.float32)
    for start in range(0, count, STEP):
        left = tl.load(
            a
            + tl.cast(start, tl.int64) * stride_ak
            + m[:, None] * stride_am
            + k[None, :] * stride_ak,
            mask=real_m[:, None] & (k[None, :] < count - start),
            other=0.0,
        )
        right = tl.load(
            b
            + tl.cast(start, tl.int64) * stride_bk
            + k[:, None] * stride_bk
            + n[None, :] * stride_bn,
            mask=(k[:, None] < count - start) & real_n[None, :],
            other=0.0,
        )
        total = tl.dot(left.to(OPERAND), right.to(OPERAND), total, input_precision="ieee")
    return total


@triton.jit
def fused_forward_kernel(
    student, weight, teacher, scale, shift, partial, grad_y, columns,
    rows, inner, features, stride_sb, stride_sk, stride_wk, stride_wn, stride_tb, stride_tn, norm_eps,
    ALPHA: tl.constexpr, NORMALIZE: tl.constexpr, NEED_GRAD: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """All rows of COLUMNS columns: product, batch norm, loss partial and the unscaled gradient at the projection."""
    r = tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    inside = c < features
    real = (r[:, None] < rows) & inside[None, :]
    r64, c64 = r.to(tl.int64), c.to(tl.int64)
    y = _product_tile(
        student,
        weight + first.to(tl.int64) * stride_wn,
        r < rows,
        inside,
        inner,
        stride_sb,
        stride_sk,
        stride_wk,
        stride_wn,
        OPERAND,
        INNER,
    )
    t = tl.load(
        teacher + r64[:, None] * stride_tb + c64[None, :] * stride_tn, mask=real, other=0.0
    ).to(tl.float32)
    rstd = tl.full((COLUMNS,), 1.0, tl.float32)
    if NORMALIZE != 3:
        y, rstd = _standardise(y, real, rows, norm_eps)
    if NORMALIZE == 0:
        t, _ = _standardise(t, real, rows, norm_eps)
    d = y - t
    if NORMALIZE == 2:
        gain = tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
        d = (
            y * gain[None, :]
            + tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)[None, :]
            - t
        )
    value, g = _power(tl.where(real, d, 0.0), ALPHA)
    tl.store(partial + tl.program_id(0), tl.sum(value))
    if NEED_GRAD:
        if NORMALIZE != 3:
            sum_g, sum_gx = tl.sum(g, 0), tl.sum(g * y, 0)
            if NORMALIZE == 2:
                tl.store(columns + c, sum_g, mask=inside)
                tl.store(columns + features + c, sum_gx, mask=inside)
                rstd *= gain
            g = (g - (sum_g / rows)[None, :] - y * (sum_gx / rows)[None, :]) * rstd[None, :]
        tl.store(grad_y + r64[:, None] * features + c64[None, :], g, mask=real)


@triton.jit
def finish_kernel(partial, loss, factor, count, alpha, eps, BLOCK: tl.constexpr):
    """log(sum of partials + eps) and alpha / (the same sum), added in a fixed order by one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < count, other=0.0)
    total = tl.sum(total) + eps
    tl.store(loss, tl.log(total))
    tl.store(factor, alpha / total)


@triton.jit
def fused_backward_kernel(
    grad, factor, grad_y, student, weight, d_student, d_weight,
    rows, inner, features, stride_sb, stride_sk, stride_wk, stride_wn, weight_programs,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles of student^T grad_y, then tiles of grad_y weight^T, both times grad * factor, in one launch."""
    coefficient = tl.load(grad).to(tl.float32) * tl.load(factor)
    pid = tl.program_id(0)
    if pid < weight_programs:
        tiles = tl.cdiv(features, COLUMNS)
        k = (pid // tiles) * INNER + tl.arange(0, INNER)
        c = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((INNER, COLUMNS), tl.float32)
        for start in range(0, rows, ROWS):
            r = start + tl.arange(0, ROWS)
            a = tl.load(
                student + r.to(tl.int64)[None, :] * stride_sb + k.to(tl.int64)[:, None] * stride_sk,
                mask=(r[None, :] < rows) & (k[:, None] < inner),
                other=0.0,
            )
            g = tl.load(
                grad_y + r.to(tl.int64)[:, None] * features + c[None, :],
                mask=(r[:, None] < rows) & (c[None, :] < features),
                other=0.0,
            )
            total = tl.dot(
                a.to(OPERAND), (g * coefficient).to(OPERAND), total, input_precision="ieee"
            )
        tl.store(
            d_weight + k.to(tl.int64)[:, None] * features + c[None, :],
            total,
            mask=(k[:, None] < inner) & (c[None, :] < features),
        )
    else:  # other names: Triton wants one shape for a name
        place = pid - weight_programs
        blocks = tl.cdiv(inner, COLUMNS)
        row = (place // blocks) * ROWS + tl.arange(0, ROWS)
        out = (place % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, features, INNER):
            f = first + tl.arange(0, INNER)
            slope = tl.load(
                grad_y + row.to(tl.int64)[:, None] * features + f[None, :],
                mask=(row[:, None] < rows) & (f[None, :] < features),
                other=0.0,
            )
            b = tl.load(
                weight
                + out.to(tl.int64)[None, :] * stride_wk
                + f.to(tl.int64)[:, None] * stride_wn,
                mask=(out[None, :] < inner) & (f[:, None] < features),
                other=0.0,
            )
            product = tl.dot(
                (slope * coefficient).to(OPERAND), b.to(OPERAND), product, input_precision="ieee"
            )
        tl.store(
            d_student + row.to(tl.int64)[:, None] * inner + out[None, :],
            product,
            mask=(row[:, None] < rows) & (out[None, :] < inner),
        )


@triton.jit
def moments_kernel(
    y,
    teacher,
    partial,
    rows,
    width,
    stride_yb,
    stride_tb,
    stride_tn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and sum of squared deviations of each column of a tile of y and teacher -> partial (row tile, 4, width)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    real = (r[:, None] < rows) & inside[None, :]
    count = tl.minimum(rows - tl.program_id(0) * ROWS, ROWS)
    out = partial + tl.program_id(0).to(tl.int64) * 4 * width + c
    a = tl.load(y + r.to(tl.int64)[:, None] * stride_yb + c[None, :], mask=real, other=0.0)
    mean = tl.sum(a, 0) / count
    a = tl.where(real, a - mean[None, :], 0.0)
    tl.store(out, mean, mask=inside)
    tl.store(out + width, tl.sum(a * a, 0), mask=inside)
    b = tl.load(
        teacher + r.to(tl.int64)[:, None] * stride_tb + c.to(tl.int64)[None, :] * stride_tn,
        mask=real,
        other=0.0,
    ).to(tl.float32)
    mean = tl.sum(b, 0) / count
    b = tl.where(real, b - mean[None, :], 0.0)
    tl.store(out + 2 * width, mean, mask=inside)
    tl.store(out + 3 * width, tl.sum(b * b, 0), mask=inside)


@triton.jit
def merge_kernel(
    partial, columns, rows, width, stride_c, norm_eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Moments of the row tiles merged in order (Chan et al. 1979) -> columns: mean, rstd of y, then of teacher."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    for side in tl.static_range(2):
        count = 0.0
        mean = tl.zeros((COLUMNS,), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        for tile in range(tl.cdiv(rows, ROWS)):
            at = partial + (4 * tile + 2 * side) * width + c
            more = tl.minimum(rows - tile * ROWS, ROWS) * 1.0
            delta = tl.load(at, mask=inside, other=0.0) - mean
            squares += tl.load(at + width, mask=inside, other=0.0) + delta * delta * (
                count * more / (count + more)
            )
            mean += delta * (more / (count + more))
            count += more
        tl.store(columns + 2 * side * stride_c + c, mean, mask=inside)
        tl.store(
            columns + (2 * side + 1) * stride_c + c,
            1.0 / tl.sqrt(squares / rows + norm_eps),
            mask=inside,
        )


@triton.jit
def _difference(x, teacher, columns, scale, shift, r, c, rows, width, stride_tb, stride_tn, stride_c,
                NORMALIZE: tl.constexpr):  # fmt: skip
    """One tile of the projection -> (the same standardised, its difference to the teacher's), 0 outside."""
    inside = c < width
    real = (r[:, None] < rows) & inside[None, :]
    t = tl.load(
        teacher + r.to(tl.int64)[:, None] * stride_tb + c.to(tl.int64)[None, :] * stride_tn,
        mask=real,
        other=0.0,
    ).to(tl.float32)
    if NORMALIZE != 3:
        mean = tl.load(columns + c, mask=inside, other=0.0)
        rstd = tl.load(columns + stride_c + c, mask=inside, other=0.0)
        x = (x - mean[None, :]) * rstd[None, :]
    if NORMALIZE == 0:
        mean = tl.load(columns + 2 * stride_c + c, mask=inside, other=0.0)
        rstd = tl.load(columns + 3 * stride_c + c, mask=inside, other=0.0)
        t = (t - mean[None, :]) * rstd[None, :]
    d = x - t
    if NORMALIZE == 2:
        gain = tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
        d = (
            x * gain[None, :]
            + tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)[None, :]
            - t
        )
    return tl.where(real, x, 0.0), tl.where(real, d, 0.0)


@triton.jit
def loss_kernel(
    y, teacher, columns, scale, shift, weights, partial, partial_rows, partial_columns,
    rows, width, stride_yb, stride_tb, stride_tn, stride_c,
    ALPHA: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile's sum of |d|^alpha, its row sums, and column sums of the gradient and of gradient times projection."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.load(
        y + r.to(tl.int64)[:, None] * stride_yb + c[None, :],
        mask=(r[:, None] < rows) & (c[None, :] < width),
        other=0.0,
    )
    x, d = _difference(
        y,
        teacher,
        columns,
        scale,
        shift,
        r,
        c,
        rows,
        width,
        stride_tb,
        stride_tn,
        stride_c,
        NORMALIZE,
    )
    value, g = _power(d, ALPHA)
    if WEIGHTED:
        g *= tl.load(weights + r, mask=r < rows, other=0.0)[:, None]
    tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(value))
    tl.store(partial_rows + tl.program_id(1) * rows + r, tl.sum(value, 1), mask=r < rows)
    out = partial_columns + tl.program_id(0).to(tl.int64) * 2 * width + c
    tl.store(out, tl.sum(g, 0), mask=c < width)
    tl.store(out + width, tl.sum(g * x, 0), mask=c < width)


@triton.jit
def _store_gradient(
    y, teacher, columns, scale, shift, weights, grad, factor, out, r, c, rows, features, count, stride_tb, stride_tn,
    ALPHA: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """From a tile of the projection to the gradient there, times grad * factor, in the type of `out`."""
    inside = c < features
    x, d = _difference(
        y,
        teacher,
        columns,
        scale,
        shift,
        r,
        c,
        rows,
        features,
        stride_tb,
        stride_tn,
        features,
        NORMALIZE,
    )
    _, g = _power(d, ALPHA)
    if WEIGHTED:
        g *= tl.load(weights + r, mask=r < rows, other=0.0)[:, None]
    if NORMALIZE != 3:
        rstd = tl.load(columns + features + c, mask=inside, other=0.0)
        if NORMALIZE == 2:
            rstd *= tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
        mean_g = tl.load(columns + 4 * features + c, mask=inside, other=0.0) / count
        mean_gx = tl.load(columns + 5 * features + c, mask=inside, other=0.0) / count
        g = (g - mean_g[None, :] - x * mean_gx[None, :]) * rstd[None, :]
    g *= tl.load(grad).to(tl.float32) * tl.load(factor)
    tl.store(
        out + r.to(tl.int64)[:, None] * features + c[None, :],
        g,
        mask=(r[:, None] < rows) & inside[None, :],
    )


@triton.jit
def gradient_kernel(
    student, weight, teacher, columns, scale, shift, weights, grad, factor, out, rows, inner, features, count,
    stride_sb, stride_sk, stride_wk, stride_wn, stride_tb, stride_tn,
    ALPHA: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient at the projection, which is computed again; its halves in turn, to save registers."""
    blocks = tl.cdiv(features, COLUMNS)
    row, column = (tl.program_id(0) // blocks) * ROWS, (tl.program_id(0) % blocks) * COLUMNS
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS // 2)
    y = _product_tile(
        student + row.to(tl.int64) * stride_sb,
        weight + column.to(tl.int64) * stride_wn,
        r < rows,
        column + tl.arange(0, COLUMNS) < features,
        inner,
        stride_sb,
        stride_sk,
        stride_wk,
        stride_wn,
        OPERAND,
        INNER,
    )
    left, right = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    _store_gradient(
        left,
        teacher,
        columns,
        scale,
        shift,
        weights,
        grad,
        factor,
        out,
        r,
        c,
        rows,
        features,
        count,
        stride_tb,
        stride_tn,
        ALPHA,
        NORMALIZE,
        WEIGHTED,
    )
    _store_gradient(
        right,
        teacher,
        columns,
        scale,
        shift,
        weights,
        grad,
        factor,
        out,
        r,
        c + COLUMNS // 2,
        rows,
        features,
        count,
        stride_tb,
        stride_tn,
        ALPHA,
        NORMALIZE,
        WEIGHTED,
    )


@triton.jit
def weight_kernel(
    student, grad_y, d_weight, rows, inner, features, stride_sb, stride_sk,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Add one tile of student^T grad_y to d_weight."""
    blocks = tl.cdiv(features, COLUMNS)
    row, column = (tl.program_id(0) // blocks) * ROWS, (tl.program_id(0) % blocks) * COLUMNS
    k, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    product = _product_tile(
        student + row.to(tl.int64) * stride_sk,
        grad_y + column,
        k < inner,
        c < features,
        rows,
        stride_sk,
        stride_sb,
        features,
        1,
        OPERAND,
        INNER,
    )
    out = d_weight + k.to(tl.int64)[:, None] * features + c[None, :]
    real = (k[:, None] < inner) & (c[None, :] < features)
    tl.store(out, tl.load(out, mask=real, other=0.0) + product, mask=real)


# --- launchers ------------------------------------------------------------------------------------------------------


def _on(tensor):
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def fused_forward_config(rows: int, operand: torch.dtype) -> dict:
    """Tile and launch parameters for a batch of `rows`."""
    padded = max(16, triton.next_power_of_2(rows))
    inner = 128 if padded <= 64 else 64 if padded == 128 else 32
    if operand == torch.float32:
        inner = max(16, inner // 2)
    return {
        "ROWS": padded,
        "COLUMNS": 16,
        "INNER": inner,
        "num_warps": 4 if padded <= 128 else 8,
        "num_stages": 3,
    }


def fused_backward_config(rows: int, operand: torch.dtype) -> dict:
    padded = min(32 if operand == torch.float32 else 64, max(16, triton.next_power_of_2(rows)))
    warps = 8 if operand == torch.float32 else 4
    return {"ROWS": padded, "INNER": 64, "COLUMNS": 32, "num_warps": warps, "num_stages": 2}


def fused_forward(
    student, weight, teacher, scale, shift, alpha, normalize, _, eps, norm_eps, operand, need_grad
):
    rows, features = teacher.shape
    config = fused_forward_config(rows, operand)
    programs = triton.cdiv(features, config["COLUMNS"])
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=student.device)  # noqa: E731
    loss, factor, partial = empty(), empty(), empty(programs)
    grad_y = empty(rows if need_grad else 0, features)
    columns = empty(2 if need_grad and scale is not None else 0, features)
    with _on(student):
        fused_forward_kernel[(programs,)](
            student,
            weight,
            teacher,
            scale,
            shift,
            partial,
            grad_y,
            columns,
            rows,
            student.shape[1],
            features,
            *student.stride(),
            *weight.stride(),
            *teacher.stride(),
            norm_eps,
            ALPHA=alpha,
            NORMALIZE=_NORMALIZE[normalize],
            NEED_GRAD=need_grad,
            OPERAND=_TYPES[operand],
            **config,
        )
        finish_kernel[(1,)](partial, loss, factor, programs, alpha, eps, BLOCK=1024, num_warps=4)
    return loss, factor, grad_y, columns, empty(0)


def fused_backward(grad, factor, grad_y, student, weight, operand, need_student, need_weight):
    rows, features = grad_y.shape
    inner = student.shape[1]
    config = fused_backward_config(rows, operand)
    d_student = student.new_empty((rows, inner) if need_student else 0)
    d_weight = weight.new_empty((inner, features) if need_weight else 0)
    weight_programs = (
        need_weight * triton.cdiv(inner, config["INNER"]) * triton.cdiv(features, config["COLUMNS"])
    )
    student_programs = (
        need_student * triton.cdiv(rows, config["ROWS"]) * triton.cdiv(inner, config["COLUMNS"])
    )
    if weight_programs + student_programs:
        with _on(student):
            fused_backward_kernel[(weight_programs + student_programs,)](
                grad,
                factor,
                grad_y,
                student,
                weight,
                d_student,
                d_weight,
                rows,
                inner,
                features,
                *student.stride(),
                *weight.stride(),
                weight_programs,
                OPERAND=_TYPES[operand],
                **config,
            )
    return d_student, d_weight


def _product(a, b):
    """a @ b with fp32 accumulators and an fp32 result, never rounded in between."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # interpreter and ROCm: no product with a wider result


def _slabs(rows, features):
    width = max(TILE_COLUMNS, SLAB_BYTES // (4 * rows) // TILE_COLUMNS * TILE_COLUMNS)
    return [(start, min(start + width, features)) for start in range(0, features, width)]


def _slice(vector, start, stop):
    return None if vector is None else vector[start:stop]


def tiled_forward(
    student,
    weight,
    teacher,
    scale,
    shift,
    alpha,
    normalize,
    reduction,
    eps,
    norm_eps,
    operand,
    need_grad,
):
    rows, features = teacher.shape
    mode, a = _NORMALIZE[normalize], student.to(operand)
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=student.device)  # noqa: E731
    tiles = triton.cdiv(rows, TILE_ROWS)
    columns = empty(6, features)
    by_slab, by_row, weights = [], empty(0), empty(0)

    def sweep(start, stop, first):
        y = _product(a, weight[:, start:stop].to(operand))
        t, width = teacher[:, start:stop], stop - start
        grid = (tiles, triton.cdiv(width, TILE_COLUMNS))
        tile = {"ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS, "num_warps": 4}
        if first and mode != NONE:
            moments = empty(tiles, 4, width)
            moments_kernel[grid](y, t, moments, rows, width, y.stride(0), *t.stride(), **tile)
            merge_kernel[(grid[1],)](
                moments,
                columns[:, start:],
                rows,
                width,
                features,
                norm_eps,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                num_warps=2,
            )
        partial, partial_rows, partial_columns = (
            empty(*grid),
            empty(grid[1], rows),
            empty(tiles, 2, width),
        )
        loss_kernel[grid](
            y,
            t,
            columns[:, start:],
            _slice(scale, start, stop),
            _slice(shift, start, stop),
            weights,
            partial,
            partial_rows,
            partial_columns,
            rows,
            width,
            y.stride(0),
            *t.stride(),
            features,
            ALPHA=alpha,
            NORMALIZE=mode,
            WEIGHTED=not first,
            **tile,
        )
        columns[4:, start:stop] = partial_columns.sum(0)
        return partial.sum(), partial_rows.sum(0)

    with _on(student), torch.autocast(student.device.type, enabled=False):
        for start, stop in _slabs(rows, features):
            total, row_totals = sweep(start, stop, True)
            by_slab.append(total)
            by_row = row_totals if start == 0 else by_row + row_totals
        if reduction == "batch":
            total = torch.stack(by_slab).sum() + eps
            loss, factor = total.log(), alpha / total
        else:
            by_row = by_row + eps
            loss, factor = by_row.log().mean(), torch.full_like(by_row[0], alpha)
            if need_grad:
                weights = 1 / (by_row * rows)
                for start, stop in _slabs(rows, features):
                    sweep(start, stop, False)
    return loss, factor, empty(0, features), columns if need_grad else empty(0, features), weights


def tiled_backward_config(operand: torch.dtype) -> dict:
    if operand == torch.float32:
        return {"ROWS": 128, "COLUMNS": 64, "INNER": 16, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}


def tiled_backward(
    grad,
    factor,
    columns,
    weights,
    student,
    weight,
    teacher,
    scale,
    shift,
    alpha,
    normalize,
    operand,
    need_student,
    need_weight,
):
    rows, features = teacher.shape
    inner, mode, b, config = (
        student.shape[1],
        _NORMALIZE[normalize],
        weight.to(operand),
        tiled_backward_config(operand),
    )
    tiles = lambda n: triton.cdiv(n, config["ROWS"]) * triton.cdiv(features, config["COLUMNS"])  # noqa: E731
    d_student = student.new_empty(student.shape if need_student else 0)
    total = torch.zeros(
        weight.shape if need_weight else 0, dtype=torch.float32, device=weight.device
    )
    grad_y = torch.empty((min(rows, CHUNK_ROWS), features), dtype=operand, device=student.device)
    with _on(student), torch.autocast(student.device.type, enabled=False):
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, rows))
            a, t, g = student[part].to(operand), teacher[part], grad_y[: part.stop - start]
            gradient_kernel[(tiles(len(g)),)](
                a,
                b,
                t,
                columns,
                scale,
                shift,
                _slice(weights, part.start, part.stop),
                grad,
                factor,
                g,
                len(g),
                inner,
                features,
                rows,
                *a.stride(),
                *b.stride(),
                *t.stride(),
                ALPHA=alpha,
                NORMALIZE=mode,
                WEIGHTED=len(weights) > 0,
                OPERAND=_TYPES[operand],
                **config,
            )
            if need_weight:
                weight_kernel[(tiles(inner),)](
                    a,
                    g,
                    total,
                    len(g),
                    inner,
                    features,
                    *a.stride(),
                    OPERAND=_TYPES[operand],
                    **config,
                )
            if need_student and student.dtype == operand:
                torch.mm(g, b.T, out=d_student[part])
            elif need_student:
                d_student[part] = torch.mm(g, b.T)
    return d_student, total.to(weight.dtype)

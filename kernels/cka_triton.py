"""Triton kernels that prepare features for TF32 products; imported on first use on a GPU.

One pass over a feature set adds up its columns; a second takes off their means, rounds to TF32 to
nearest (where tensor cores would cut) and leaves the lengths of the rounded rows. See cka.py.
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from kernels.dispatch import launching

SHARES = 16  # of the rows, whose sums are apart
SUMS = {"ROWS": 128, "COLUMNS": 64, "num_warps": 8}
CENTRE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}


@triton.jit
def sums_kernel(
    x, sums, rows, width, stride_row, stride_column, ROWS: constexpr, COLUMNS: constexpr
):  # fmt: skip
    """sums (shares, width) of what differs from the first row; programs (columns, shares).

    So a constant column has the sum 0, and its mean is exact.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = x + column.to(tl.int64) * stride_column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        real = (row < rows)[:, None] & inside[None, :]
        z = tl.load(at[None, :] + row.to(tl.int64)[:, None] * stride_row, mask=real, other=0.0)
        total += tl.where(real, z.to(tl.float32) - first[None, :], 0.0)
    tl.store(sums + tl.program_id(1) * width + column, tl.sum(total, 0), mask=inside)


@triton.jit
def centre_kernel(
    x, first, sums, out, norms, rows, height, width, count, stride_row, stride_column, stride_out,
    SHARES: constexpr, ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """out (height, width), norms (rows,) fp32, of some rows of a set of `count`; zeros beyond.

    first, sums: the set's first row, and what sums_kernel found. A program has ROWS whole rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    far = row.to(tl.int64)[:, None]
    share = tl.arange(0, SHARES)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        real = (row[:, None] < rows) & inside[None, :]
        z = tl.load(x + far * stride_row + column[None, :] * stride_column, mask=real, other=0.0)
        at = sums + share[:, None] * width + column[None, :]
        differences = tl.sum(tl.load(at, mask=inside[None, :], other=0.0).to(tl.float64), 0)
        base = tl.load(first + column * stride_column, mask=inside, other=0.0).to(tl.float64)
        mean = (base + differences / count).to(tl.float32)
        z = tl.where(real, z.to(tl.float32) - mean[None, :], 0.0)
        bits = (z.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # The addition would make a number of the NaN that a GPU computes, 0x7fffffff.
        z = tl.where(z == z, bits.to(tl.float32, bitcast=True), z)
        there = (row[:, None] < height) & inside[None, :]
        tl.store(out + far * stride_out + column[None, :], z, mask=there)
        total += tl.sum(z * z, 1)
    tl.store(norms + row, tl.sqrt(total), mask=row < rows)


def column_sums(x):
    """(shares, width) fp32, for `centre`; x may have any strides."""
    rows, width = x.shape
    sums = torch.empty(SHARES, width, dtype=torch.float32, device=x.device)
    with launching(x):
        sums_kernel[(triton.cdiv(width, SUMS["COLUMNS"]), SHARES)](
            x, sums, rows, width, *x.stride(), **SUMS
        )  # fmt: skip
    return sums


def centre(x, begin, sums, out, norms):
    """out = rows of x from `begin` less the means of all, rounded to TF32; norms = their lengths.

    Rows of out beyond those of x become zeros.
    """
    part = x[begin : begin + len(out)]
    with launching(x):
        centre_kernel[(triton.cdiv(len(out), CENTRE["ROWS"]),)](
            part, x, sums, out, norms, len(part), len(out), x.shape[1], len(x), *x.stride(),
            out.stride(0), SHARES, **CENTRE,
        )  # fmt: skip

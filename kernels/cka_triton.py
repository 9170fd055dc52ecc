"""Triton kernel that prepares features for TF32 products; imported on first use on a GPU.

One pass over a feature set takes off the column means, rounds to TF32 to nearest (where tensor
cores would cut) and leaves the lengths of the rounded rows behind. See cka.py.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.dispatch import launching

CONFIG = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}


@triton.jit
def centre_kernel(
    x, mean, out, norms, rows, width, stride_row, stride_column, stride_out,
    ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """out (rows, width), norms (rows,) fp32; mean (width,) fp64. A program has ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    far = row.to(tl.int64)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        real = (row[:, None] < rows) & (column[None, :] < width)
        z = tl.load(x + far * stride_row + column[None, :] * stride_column, mask=real, other=0.0)
        centre = tl.load(mean + column, mask=column < width, other=0.0).to(tl.float32)
        z = tl.where(real, z.to(tl.float32) - centre[None, :], 0.0)
        bits = (z.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # The addition would make a number of the NaN that a GPU computes, 0x7fffffff.
        z = tl.where(z == z, bits.to(tl.float32, bitcast=True), z)
        tl.store(out + far * stride_out + column[None, :], z, mask=real)
        total += tl.sum(z * z, 1)
    tl.store(norms + row, tl.sqrt(total), mask=row < rows)


def centre(x, mean, out, norms):
    """out = x - mean rounded to TF32, norms = lengths of its rows; x may have any strides."""
    with launching(x):
        centre_kernel[(triton.cdiv(x.shape[0], CONFIG["ROWS"]),)](
            x, mean, out, norms, *x.shape, *x.stride(), out.stride(0), **CONFIG
        )  # fmt: skip

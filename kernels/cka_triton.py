"""Triton kernel of the centred product X^T Y for lists of features; imported on first use on a GPU. See cka.py.

One launch does all wanted tiles of all pairs. Columns of every feature set are cut into tiles; a table names, for each
program, its two column tiles, of X^T X only those on and above the diagonal. Means come off before rounding to TF32 (to
nearest, where the hardware would cut), so columns with large offsets cost nothing. For up to CHUNK_ROWS rows each tile
is squared and summed at once and never stored; more rows are split between programs, their tiles added in fp64.
"""

import contextlib

import torch
import triton
import triton.language as tl

CHUNK_ROWS = 16384  # rows that one program adds in fp32
GROUP = 512  # tiles per launch where partial tiles have to be kept
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _operand(pointer, stride, means, row, rows, column, width, ROUND: tl.constexpr):
    """(rows, columns) of one feature set, centred, 0 outside, rounded to TF32 if asked."""
    real = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(
        pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=real, other=0.0
    ).to(tl.float32)
    x = tl.where(real, x - tl.load(means + column, mask=column < width, other=0.0)[None, :], 0.0)
    if ROUND:
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        x = (bits & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def gram_kernel(
    pointers, strides, means, tiles, pairs, out, rows, chunk,
    TYPE: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """tiles: (T, 4) int64 of set, first column, columns, place in means; pairs: (P, 2) of tiles.

    STORE: out (P, splits, TILE, TILE) gets the product over this program's rows, else out (P,) its sum of squares.
    ALIGNED: rows of every set begin at multiples of 16 bytes, and widths are multiples of 16. The compiler cannot see
    through the tables, and without being told would load 4 bytes at a time.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    a, b = tl.load(pairs + 2 * pid), tl.load(pairs + 2 * pid + 1)
    source_a, first_a = tl.load(tiles + 4 * a), tl.load(tiles + 4 * a + 1)
    source_b, first_b = tl.load(tiles + 4 * b), tl.load(tiles + 4 * b + 1)
    width_a, width_b = tl.load(tiles + 4 * a + 2), tl.load(tiles + 4 * b + 2)
    means_a, means_b = means + tl.load(tiles + 4 * a + 3), means + tl.load(tiles + 4 * b + 3)
    pointer_a = tl.load(pointers + source_a).to(tl.pointer_type(TYPE)) + first_a
    pointer_b = tl.load(pointers + source_b).to(tl.pointer_type(TYPE)) + first_b
    stride_a, stride_b = tl.load(strides + source_a), tl.load(strides + source_b)
    if ALIGNED:
        pointer_a, pointer_b = tl.multiple_of(pointer_a, 16), tl.multiple_of(pointer_b, 16)
        stride_a, stride_b = tl.multiple_of(stride_a, 16), tl.multiple_of(stride_b, 16)
        width_a, width_b = tl.multiple_of(width_a, 16), tl.multiple_of(width_b, 16)
    column = tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    stop = tl.minimum(rows, (split + 1) * chunk)
    for start in range(split * chunk, stop, ROWS):
        row = start + tl.arange(0, ROWS)
        x = _operand(pointer_a, stride_a, means_a, row, stop, column, width_a, PRECISION == "tf32")
        y = _operand(pointer_b, stride_b, means_b, row, stop, column, width_b, PRECISION == "tf32")
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
    if STORE:
        at = (pid.to(tl.int64) * tl.num_programs(1) + split) * TILE * TILE
        tl.store(out + at + column[:, None] * TILE + column[None, :], total)
    else:
        tl.store(out + pid, tl.sum(total * total))


def scatter_precision(hip: bool) -> str:
    """Three TF32 products make one of nearly fp32 precision; AMD's compiler has plain fp32 matrix instructions."""
    return "ieee" if hip else "tf32x3"


def config(precision: str, hip: bool) -> dict:
    """Tile and launch parameters; three products instead of one need smaller tiles to stay within registers."""
    if precision == "tf32x3":
        return {"TILE": 64, "ROWS": 32, "num_warps": 4, "num_stages": 2}
    return {"TILE": 128, "ROWS": 16 if hip else 32, "num_warps": 8, "num_stages": 2}


def _send(values, dtype, device):
    """A table on the device, without waiting for it."""
    table = torch.tensor(values, dtype=dtype)
    return (
        table.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else table.to(device)
    )


def _tables(features, means, pairs, size):
    """-> operands of the launch, tile pairs, the pair each belongs to, and its weight (2 above the diagonal)."""
    device = features[0].device
    kinds = {x.dtype for x in features}
    common = kinds.pop() if len(kinds) == 1 else torch.float32
    features = [x.to(common) if x.stride(1) == 1 else x.to(common).contiguous() for x in features]
    tiles, of, place = [], [], 0
    for i, x in enumerate(features):
        of.append(range(len(tiles), len(tiles) + triton.cdiv(x.shape[1], size)))
        for first in range(0, x.shape[1], size):
            tiles.append((i, first, min(size, x.shape[1] - first), place + first))
        place += x.shape[1]
    chosen, owner, weight = [], [], []
    for number, (i, j) in enumerate(pairs):
        for a in of[i]:
            for b in of[j]:
                if i != j or b >= a:
                    chosen.append((a, b))
                    owner.append(number)
                    weight.append(2.0 if i == j and b > a else 1.0)
    tensor = lambda values: _send(values, torch.int64, device)  # noqa: E731
    operands = (
        tensor([x.data_ptr() for x in features]),
        tensor([x.stride(0) for x in features]),
        torch.cat(means).float(),
        tensor(tiles),
    )
    return features, operands, tensor(chosen), owner, weight


def _aligned(features):
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in features
    )


def _launch(features, operands, chosen, precision, store, splits):
    device, rows = features[0].device, features[0].shape[0]
    options = config(precision, torch.version.hip is not None)
    shape = (len(chosen), splits, options["TILE"], options["TILE"]) if store else (len(chosen),)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    step = triton.cdiv(triton.cdiv(rows, splits), options["ROWS"]) * options["ROWS"]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        gram_kernel[(len(chosen), splits)](
            *operands,
            chosen,
            out,
            rows,
            step,
            TYPE=_TYPES[features[0].dtype],
            STORE=store,
            PRECISION=precision,
            ALIGNED=_aligned(features),
            **options,
        )
    return out


def square_norms(features, means, pairs):
    """Squared Frobenius norm of the centred product of each pair (i, j) of feature sets, as fp64 scalars."""
    features, operands, chosen, owner, weight = _tables(
        features, means, pairs, config("tf32", False)["TILE"]
    )
    splits = triton.cdiv(features[0].shape[0], CHUNK_ROWS)
    if splits == 1:
        squares = _launch(features, operands, chosen, "tf32", False, 1).double()
    else:
        parts = (
            _launch(features, operands, part, "tf32", True, splits).double().sum(1)
            for part in chosen.split(max(1, GROUP // splits))
        )
        squares = torch.cat([tiles.square().sum((1, 2)) for tiles in parts])
    squares *= _send(weight, torch.float64, squares.device)
    counts = [owner.count(number) for number in range(len(pairs))]
    return {pair: part.sum() for pair, part in zip(pairs, squares.split(counts), strict=True)}


def scatter(x, mean):
    """Sum over rows of (x - mean)(x - mean)^T -> (D, D) fp64."""
    precision = scatter_precision(torch.version.hip is not None)
    width, size = x.shape[1], config(precision, torch.version.hip is not None)["TILE"]
    features, operands, chosen, _, _ = _tables([x], [mean], [(0, 0)], size)
    splits, count = triton.cdiv(x.shape[0], CHUNK_ROWS), triton.cdiv(width, size)
    full = torch.zeros(count, size, count, size, dtype=torch.float64, device=x.device)
    for part in chosen.split(max(1, GROUP // splits)):
        tiles = _launch(features, operands, part, precision, True, splits).double().sum(1)
        a, b = part.unbind(1)
        full[b, :, a, :] = tiles.transpose(1, 2)
        full[a, :, b, :] = tiles
    return full.view(count * size, count * size)[:width, :width].contiguous()

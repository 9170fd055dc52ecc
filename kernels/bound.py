"""The lower bound on distances by which `knn` leaves rows out, shared by both of its paths."""

import math

import torch

FP64, FP32, TF32 = 2.0**-53, 2.0**-24, 2.0**-11  # units of rounding
FP32_CUT = 2.0**-22  # an addition in tensor cores, which cut at sums of 4 products and before each
TINY = 2.0**-120  # more than a sum of 2,560 products of scaled rows loses to underflow


def rounded(x, unit):
    """x in fp64 or fp32, for TF32 rounded to nearest to 11 bits, where the hardware would cut."""
    if unit < TF32:
        return x.double() if unit == FP64 else x.float()
    bits = x.float().view(torch.int32) + 0x1000
    return (bits & -0x2000).view(torch.float32)


def scaled(sides, dtype, by_row=False):
    """Rows of `sides` divided by the power of two below their largest number, and that number.

    So that squares are numbers, too. `by_row`: each row by one of its own, and 1.
    """
    largest = []
    for x in sides:
        largest.append(x.abs().amax(1, keepdim=True).to(dtype))
    if not by_row:
        largest = [torch.cat(largest).amax()] * len(sides)
    scales = []
    for number in largest:
        mantissa = number.frexp()[0]
        power = number / (2 * mantissa)
        scales.append(torch.where(mantissa == 0, 1.0, power))
    rows = []
    for x, scale in zip(sides, scales, strict=True):
        rows.append(x.to(dtype) / scale)
    return rows, 1.0 if by_row else scales[0]


def operands(base, query, metric, unit):
    """Rows q and b for the screen, their |q|^2 and |b|^2 (fp64), and gamma.

    For TF32 the rows are scaled, else taken as they are; then they are centred (or, for cosine, of
    length 1). `unit` is the rounding unit of the product's operands. For any order of summation the
    computed |q - b|^2 is off by at most gamma (|q| + |b|)^2 <= 2 gamma (|q|^2 + |b|^2), and TINY
    for what is lost below fp32's range. gamma collects D additions, those of halves and limits, a
    few more roundings and the operands' own.
    """
    addition = unit if unit < TF32 else FP32_CUT
    gamma = (base.shape[1] + 24) * addition + 2.02 * unit
    sides = [base] if query is base else [base, query]
    if metric == "cosine":
        sides = [rounded(directions(x), unit) for x in sides]
        # |u - v|^2 = 2 - 2 u.v, which a row of zeros keeps
        one = torch.ones((), dtype=torch.float64, device=base.device)
        squares = [one.expand(len(x)) for x in sides]
    else:
        if unit == TF32:
            sides, _ = scaled(sides, torch.float32)
        mean = sides[0].mean(0)
        sides = [rounded(x - mean, unit) for x in sides]
        squares = []
        for x in sides:
            squares.append(torch.linalg.vector_norm(x.double(), dim=1).square())
    return sides[-1], sides[0], squares[-1], squares[0], gamma


def lower(squares, gamma):
    """A half of the lower bound: units * |q - b|^2 >= lower_q + lower_b - 2 q.b.

    With -gamma the half of an upper bound.
    """
    return squares * (1 - 2 * gamma) - math.copysign(TINY, gamma)


def directions(x):
    """Rows of length 1 in fp64; a row of zeros stays one."""
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length == 0, 1)

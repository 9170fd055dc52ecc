"""The lower bound on distances by which `knn` leaves rows out, shared by both of its paths."""

import math

import torch

FP32, TF32 = 2.0**-24, 2.0**-11  # units of rounding
TINY = 2.0**-120  # more than a sum of 2,560 products of scaled rows loses to underflow


def rounded(x, unit):
    """x in fp32, or rounded to nearest to TF32's 11 bits, where the hardware would cut."""
    x = x.float()
    return x if unit < TF32 else (x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


def operands(base, query, metric, unit):
    """Rows q and b for the screen, their |q|^2 and |b|^2 (fp64), gamma, and the scale squared.

    The rows are fp32, scaled so that their squares are fp32 numbers, too, and centred (or, for
    cosine, of length 1). `unit` is the rounding unit of the product's operands. For any order of
    summation in fp32 the computed |q - b|^2 is off by at most gamma (|q| + |b|)^2 <=
    2 gamma (|q|^2 + |b|^2), and TINY for what is lost below fp32's range. gamma collects D
    additions, a few more roundings and the operands' own; tensor cores (unit TF32) cut where
    others round, at sums of 4 products and before each, which is less than 4 units an addition.
    """
    addition = FP32 if unit < TF32 else 4 * FP32
    gamma = (base.shape[1] + 16) * addition + 2.02 * unit
    if metric == "cosine":
        b = rounded(directions(base), unit)
        q = b if query is base else rounded(directions(query), unit)
        # |u - v|^2 = 2 - 2 u.v, which a row of zeros keeps
        one = b.new_ones((), dtype=torch.float64)
        return q, b, one.expand(len(q)), one.expand(len(b)), gamma, one
    wide = torch.promote_types(base.dtype, torch.float32)
    both = (base,) if query is base else (base, query)
    largest = torch.stack([side for x in both for side in x.aminmax()]).abs().amax()
    # A power of two, so exact; fp32 has none for the smallest numbers, which need no more to have
    # a square.
    exponent = -largest.to(wide).frexp()[1].clamp(-126, 126)
    scale = torch.ldexp(torch.ones_like(largest, dtype=wide), exponent)
    scaled = base.to(wide) * scale
    mean = scaled.mean(0)
    b = rounded(scaled.sub_(mean), unit)
    q = b if query is base else rounded((query.to(wide) * scale).sub_(mean), unit)
    squares_b = b.double().square().sum(1)
    squares_q = squares_b if query is base else q.double().square().sum(1)
    return q, b, squares_q, squares_b, gamma, scale.double().square()


def lower(squares, gamma):
    """A half of the lower bound: units * |q - b|^2 >= lower_q + lower_b - 2 q.b.

    With -gamma the half of an upper bound.
    """
    return (squares * (1 - 2 * gamma) - math.copysign(TINY, gamma)).float()


def directions(x):
    """Rows of length 1 in fp64; a row of zeros stays one."""
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length == 0, 1)

"""Augmentation of batches: one random crop, flips, colour jitter and blur per patch.

`draw_params` draws what is done to each sample from its number alone, on the host; `augment` does
it where the patches are. For given parameters each operation gives the pixels of torchvision's
transform on a float image.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

JITTER = np.array([0.15, 0.15, 0.10, 0.05])  # brightness, contrast, saturation, hue: the paper's
JITTER_P = 0.5
FLIP_P = 0.5
BLUR_P = 0.1
BLUR_SIZE = 9
AUGMENT_VERSION = 1  # raised when a sample's crop would be another: teachers' rows are kept by it
BLUR_SIGMA = (0.1, 2.0)  # torchvision's default; the paper gives the kernel's size only


class Params(NamedTuple):
    """What is done to each of B patches; host tensors: the device is never asked what to do."""

    top: Tensor  # (B,) int64, pixels
    left: Tensor  # (B,) int64
    hflip: Tensor  # (B,) bool
    vflip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool
    factors: Tensor  # (B, 4) float32: brightness, contrast, saturation; hue shift in turns
    order: Tensor  # (B, 4) int64: which of the four comes first, second, ...
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32, pixels
    number: Tensor  # (B,) int64: of the sample
    pixels: Tensor  # (B,) int64: CRC-32 of the patch as it was read; -1: not known
    slide: Tensor  # (B,) int64: number of its slide; -1: not known


def draw_params(
    seed: int,
    first: int,
    count: int,
    patch_size: int,
    crop: int,
) -> Params:
    """Augmentation of samples first .. first + count - 1 of the stream `seed`.

    A pure function of the sample's number: a counter-based generator gives each sample its own 16
    numbers, whoever draws it and in whatever company.
    """
    bits = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, 0xA06], counter=4 * first)
    u = np.random.Generator(bits).random((count, 16))
    span = patch_size - crop + 1
    centre = np.array([1, 1, 1, 0])  # hue is shifted, the others are scaled
    low = centre - JITTER
    high = centre + JITTER
    factors = (low + (high - low) * u[:, 5:9]).astype(np.float32)
    low, high = BLUR_SIGMA
    sigma = (low + (high - low) * u[:, 14]).astype(np.float32)
    corners = (u[:, :2] * span).astype(np.int64)
    top, left = corners.T
    hflip, vflip = u[:, 2:4].T < FLIP_P
    jitter = u[:, 4] < JITTER_P
    blur = u[:, 13] < BLUR_P
    order = np.argsort(u[:, 9:13], axis=1)
    unknown = np.full(count, -1)
    number = first + np.arange(count)
    arrays = [top, left, hflip, vflip, jitter, factors, order, blur, sigma]
    arrays += [number, unknown, unknown]
    return Params(*map(torch.from_numpy, arrays))


def augment(images: Tensor, crop: int, params: Params) -> Tensor:
    """uint8 (B, 3, P, P) -> float32 (B, 3, crop, crop) in [0, 1], augmented by `params`.

    On a GPU groups of patches that share an operation go through it together; on a CPU patches go
    one by one, which keeps them in the cache. Raises ValueError for other images.
    """
    sides = images.shape[1:]
    if images.dtype != torch.uint8 or len(sides) != 3 or sides[0] != 3 or min(sides[1:]) < crop:
        raise ValueError(
            f"images: expected uint8 (B, 3, P, P), P >= {crop}, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    views = []
    where = zip(images, *(values.tolist() for values in params[:4]), strict=True)
    for image, top, left, hflip, vflip in where:
        view = image[:, top : top + crop, left : left + crop]
        view = view.flip(1) if vflip else view
        views.append(view.flip(2) if hflip else view)
    if images.device.type != "cpu":
        return jitter_and_blur(torch.stack(views).float().div_(255), params)
    out = torch.empty(len(images), 3, crop, crop)
    for i, view in enumerate(views):
        part = slice(i, i + 1)
        out[part].copy_(view).div_(255)
        jitter_and_blur(out[part], Params(*(values[part] for values in params)))
    return out


def jitter_and_blur(out: Tensor, params: Params) -> Tensor:
    """Jitter and blur in place those of the images (B, 3, H, W) that `params` choose.

    In as few operations as there are kinds, whatever the number of images.
    """
    kinds: tuple = (
        (params.jitter, color_jitter, (params.factors, params.order)),
        (params.blur, gaussian_blur, (params.sigma,)),
    )
    for chosen, change, how in kinds:
        rows = chosen.nonzero().flatten()
        if len(rows):
            there = _send(rows, out.device)
            out[there] = change(out[there], *(values[rows] for values in how))
    return out


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def color_jitter(
    x: Tensor,
    factors: Tensor,
    order: Tensor,
) -> Tensor:
    """float (B, 3, H, W) -> the same, the four adjustments in each patch's own order.

    `factors` (B, 4) and `order` (B, 4) as in `Params`, on the host.
    """
    there = _send(factors, x.device)
    for stage in range(4):
        for number, adjust in enumerate(ADJUSTMENTS):
            rows = (order[:, stage] == number).nonzero().flatten()
            if len(rows) == len(x):
                x = adjust(x, there[:, number])
            elif len(rows):
                rows = _send(rows, x.device)
                x[rows] = adjust(x[rows], there[rows, number])
    return x


def _gray(x: Tensor) -> Tensor:
    gray = x[:, 0:1] * 0.2989
    gray.add_(x[:, 1:2], alpha=0.587)
    return gray.add_(x[:, 2:3], alpha=0.114)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale each image (B, 3, H, W) by its factor (B,)."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from (factor > 1) or towards its mean grey."""
    return _blend(x, _gray(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from (factor > 1) or towards its own grey."""
    return _blend(x, _gray(x), factor)


def _blend(x: Tensor, gray: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    gray.mul_(1 - factor)
    out = x * factor
    return out.add_(gray).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn each image's hue by shift (B,), in turns, at equal HSV saturation and value.

    Hue in sixths of a turn is a piecewise linear function of the channels, and so is its inverse:
    each channel lies between the smallest and largest by a trapezoid of the hue, which spares the
    six-way selection of the usual form.
    """
    r, g, b = x.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # Selection by lerp with weights 0 and 1 is exact, and on a CPU ten times as fast as where.
    of_green = (b - r).add_(chroma, alpha=2)
    of_blue = (r - g).add_(chroma, alpha=4)
    is_green = (high == g).to(x.dtype)
    is_red = (high == r).to(x.dtype)
    hue = torch.lerp(of_blue, of_green, is_green)
    hue = torch.lerp(hue, g - b, is_red)
    hue.div_(chroma.clamp(min=1e-12))
    hue.add_(6 * shift.view(-1, 1, 1))
    turns = (hue / 6).floor_()
    hue.sub_(turns, alpha=6)
    out = torch.empty_like(x)
    trapezoids = ((3, 1, -1), (2, -1, 2), (4, -1, 2))  # of red, green and blue
    for channel, (centre, sign, offset) in enumerate(trapezoids):
        distance = (hue - centre).abs_()
        weight = distance.mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(low, chroma, weight, out=out[:, channel])
    return out


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image (B, 3, H, W) with its own sigma (B,), edges reflected.

    BLUR_SIZE x BLUR_SIZE taps. Shifted sums are eight times as fast as conv2d on a CPU.
    """
    offsets = torch.arange(BLUR_SIZE, dtype=torch.float32) - BLUR_SIZE // 2
    exponents = -0.5 * (offsets / sigma[:, None].float().cpu()) ** 2
    taps = torch.softmax(exponents, dim=1)  # exp, divided by its sum
    taps = _send(taps, x.device).to(x.dtype)
    weights = taps[..., None, None, None].unbind(1)
    sides = x.shape
    x = F.pad(x, (BLUR_SIZE // 2,) * 4, mode="reflect")
    for axis in (2, 3):
        source = x
        x = source.narrow(axis, 0, sides[axis]) * weights[0]
        for i in range(1, BLUR_SIZE):
            x.addcmul_(source.narrow(axis, i, sides[axis]), weights[i])
    return x

"""TODO."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

JITTER = (
    0.15,
    0.15,
    0.10,
    0.05,
)  # brightness, contrast, saturation, hue: the paper's, in torchvision's meaning


JITTER_P, FLIP_P, BLUR_P = 0.5, 0.5, 0.1


BLUR_SIZE, BLUR_SIGMA = (
    9,
    (0.1, 2.0),
)  # the paper gives the kernel only; the range is torchvision's default


class Params(NamedTuple):
    """What is done to each of B patches; host tensors, so that the device is never asked what to do."""

    top: torch.Tensor  # (B,) int64, pixels
    left: torch.Tensor  # (B,) int64
    hflip: torch.Tensor  # (B,) bool
    vflip: torch.Tensor  # (B,) bool
    jitter: torch.Tensor  # (B,) bool
    factors: (
        torch.Tensor
    )  # (B, 4) float32: brightness, contrast, saturation factors; hue shift in turns
    order: torch.Tensor  # (B, 4) int64: which of the four comes first, second, ...
    blur: torch.Tensor  # (B,) bool
    sigma: torch.Tensor  # (B,) float32, pixels


def draw_params(seed: int, first: int, count: int, patch_size: int, crop: int) -> Params:
    """Augmentation of samples first .. first + count - 1 of the stream `seed`: a pure function of the sample's number.

    A counter-based generator gives each sample its own 16 numbers, whoever draws it and in whatever company.
    """
    bits = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, 0xA06], counter=4 * first)
    u = np.random.Generator(bits).random((count, 16))
    span = patch_size - crop + 1
    factors = np.stack(
        [
            low + (high - low) * u[:, 5 + i]
            for i, (low, high) in enumerate(
                [*((1 - j, 1 + j) for j in JITTER[:3]), (-JITTER[3], JITTER[3])]
            )
        ],
        axis=1,
    )
    low, high = BLUR_SIGMA
    arrays = (
        (u[:, 0] * span).astype(np.int64),
        (u[:, 1] * span).astype(np.int64),
        u[:, 2] < FLIP_P,
        u[:, 3] < FLIP_P,
        u[:, 4] < JITTER_P,
        factors.astype(np.float32),
        np.argsort(u[:, 9:13], axis=1),
        u[:, 13] < BLUR_P,
        (low + (high - low) * u[:, 14]).astype(np.float32),
    )
    return Params(*map(torch.from_numpy, arrays))


def augment(
    images: torch.Tensor, crop: int, params: Params | torch.Generator | None = None
) -> torch.Tensor:
    """uint8 (B, 3, P, P) -> float32 (B, 3, crop, crop) in [0, 1]: crop, flips, colour jitter, blur, each per patch.

    `params` from `draw_params`, or a torch.Generator (None: torch's own) to draw them from. For given parameters each
    operation gives the pixels of torchvision's transform on a float image. On a GPU groups of patches that share an
    operation go through it together; on a CPU patches go one by one, which keeps them in the cache.
    """
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
        or min(images.shape[2:]) < crop
    ):
        raise ValueError(
            f"images: expected uint8 (B, 3, P, P), P >= {crop}, got {images.dtype} {tuple(images.shape)}"
        )
    if not isinstance(params, Params):
        seed = int(torch.randint(2**62, (), generator=params))
        params = draw_params(seed, 0, len(images), min(images.shape[2:]), crop)
    device, host = images.device, Params(*(p.numpy() for p in params))
    views = []
    for i, image in enumerate(images):
        view = image[:, host.top[i] : host.top[i] + crop, host.left[i] : host.left[i] + crop]
        flips = [d for d, flip in ((1, host.vflip[i]), (2, host.hflip[i])) if flip]
        views.append(view.flip(flips) if flips else view)
    if device.type == "cpu":
        out = torch.empty(len(images), 3, crop, crop)
        for i, view in enumerate(views):
            out[i].copy_(view).div_(255)
            one = Params(*(p[i : i + 1] for p in params))
            if host.jitter[i]:
                out[i : i + 1] = color_jitter(out[i : i + 1], one.factors, one.order)
            if host.blur[i]:
                out[i : i + 1] = gaussian_blur(out[i : i + 1], one.sigma)
        return out
    return _together(torch.stack(views).float().div_(255), params)


def _together(out: torch.Tensor, params: Params) -> torch.Tensor:
    """Jitter and blur those of the images (B, 3, H, W) that are to be, in as few operations as there are kinds."""
    device = out.device
    for chosen, operation, values in (
        (params.jitter, color_jitter, (params.factors, params.order)),
        (params.blur, gaussian_blur, (params.sigma,)),
    ):
        rows = chosen.nonzero().flatten()
        if len(rows):
            where = _send(rows, device)
            out[where] = operation(out[where], *(v[rows] for v in values))
    return out


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on the device, without waiting for the device."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def color_jitter(x: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W) -> the same, with the four adjustments in each patch's own order; host factors and order."""
    factors_there = _send(factors, x.device)
    for stage in range(4):
        for number, adjust in enumerate(
            (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        ):
            rows = (order[:, stage] == number).nonzero().flatten()
            if len(rows) == len(x):
                x = adjust(x, factors_there[:, number])
            elif len(rows):
                rows = _send(rows, x.device)
                x[rows] = adjust(x[rows], factors_there[rows, number])
    return x


def _gray(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def adjust_brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale each image (B, 3, H, W) by its factor (B,)."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move each image away from (factor > 1) or towards its mean grey."""
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(_gray(x).mean((1, 2, 3), keepdim=True) * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move each pixel away from (factor > 1) or towards its own grey."""
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(_gray(x).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn each image's hue by shift (B,), in turns, at equal HSV saturation and value.

    Hue in sixths of a turn is a piecewise linear function of the channels, and so is its inverse: each channel lies
    between the smallest and largest by a trapezoid of the hue, which spares the six-way selection of the usual form.
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # Selection by lerp with weights 0 and 1 is exact, and on a CPU ten times as fast as torch.where.
    hue = torch.lerp(
        (r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), (high == g).to(x.dtype)
    )
    hue = (
        torch.lerp(hue, g - b, (high == r).to(x.dtype))
        .div_(chroma.clamp(min=1e-12))
        .add_(6 * shift.view(-1, 1, 1))
    )
    hue.sub_((hue / 6).floor_(), alpha=6)
    out = torch.empty_like(x)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        weight = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(low, chroma, weight, out=out[:, channel])
    return out


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor, size: int = BLUR_SIZE) -> torch.Tensor:
    """Gaussian blur of each image (B, 3, H, W) with its own sigma (B,), size x size taps, edges reflected."""
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    taps = torch.softmax(
        -0.5 * (offsets / sigma[:, None].float().cpu()) ** 2, dim=1
    )  # exp, divided by its sum
    taps = _send(taps, x.device).to(x.dtype)[..., None, None, None].unbind(1)
    height, width = x.shape[2:]
    x = F.pad(x, (size // 2,) * 4, mode="reflect")
    y = (
        x[:, :, :height] * taps[0]
    )  # columns, then rows; shifted sums are eight times as fast as conv2d on a CPU
    for i in range(1, size):
        y.addcmul_(x[:, :, i : i + height], taps[i])
    out = y[..., :width] * taps[0]
    for i in range(1, size):
        out.addcmul_(y[..., i : i + width], taps[i])
    return out

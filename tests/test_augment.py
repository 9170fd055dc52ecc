"""Augmentation against torchvision, one transform at a time, and its randomness."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from g2l.augment import (
    Params,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    draw_params,
    gaussian_blur,
    jitter_and_blur,
)


@pytest.fixture(scope="module")
def images():
    """float (6, 3, 40, 48): noise, ramp, black and white, pure colours, two channels tied."""
    x = torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    x[1] = torch.linspace(0, 1, 48)
    x[2, :, :20], x[2, :, 20:] = 0, 1
    x[3] = 0
    x[3, 0, :, :16] = x[3, 1, :, 16:32] = x[3, 2, :, 32:] = 1
    x[4, 1] = x[4, 0].clone()
    x[4, :, :, :24] = x[4, 2:, :, :24]
    return x


@pytest.mark.parametrize(
    "ours, theirs, values",
    [
        (adjust_brightness, TF.adjust_brightness, [0.0, 0.85, 1.0, 1.15, 2.0, 0.5]),
        (adjust_contrast, TF.adjust_contrast, [0.0, 0.85, 1.0, 1.15, 2.0, 0.5]),
        (adjust_saturation, TF.adjust_saturation, [0.0, 0.9, 1.0, 1.1, 2.0, 0.5]),
        (adjust_hue, TF.adjust_hue, [0.0, 0.05, -0.05, 0.5, -0.5, 0.3]),
        (
            gaussian_blur,
            lambda image, sigma: TF.gaussian_blur(image, [9, 9], sigma),
            [0.1, 0.3, 0.5, 1.0, 2.0, 1.3],
        ),
    ],
)
def test_each_operation_equals_torchvision(images, ours, theirs, values):
    for turn in range(6):  # each image with each value, and neighbours with other values
        turned = values[turn:] + values[:turn]
        got = ours(images.clone(), torch.tensor(turned))
        want = torch.stack(
            [theirs(image, value) for image, value in zip(images, turned, strict=True)]
        )
        torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


def reference(image: torch.Tensor, params: Params, i: int, crop: int) -> torch.Tensor:
    """torchvision on one uint8 image with the same parameters."""
    image = TF.crop(image, int(params.top[i]), int(params.left[i]), crop, crop)
    image = TF.hflip(image) if params.hflip[i] else image
    image = TF.vflip(image) if params.vflip[i] else image
    image = TF.convert_image_dtype(image, torch.float32)
    if params.jitter[i]:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for number in params.order[i].tolist():
            image = adjust[number](image, float(params.factors[i, number]))
    return (
        TF.gaussian_blur(image, [9, 9], [float(params.sigma[i])] * 2) if params.blur[i] else image
    )


def test_whole_augmentation_equals_torchvision_in_both_ways():
    raw = torch.randint(
        0, 256, (64, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    params = draw_params(5, 1000, 64, 40, 32)
    assert params.jitter.any() and params.blur.any() and (params.jitter & params.blur).any()
    want = torch.stack([reference(raw[i], params, i, 32) for i in range(64)])
    torch.testing.assert_close(augment(raw, 32, params), want, atol=1e-5, rtol=0)
    still = params._replace(
        jitter=torch.zeros(64, dtype=torch.bool), blur=torch.zeros(64, dtype=torch.bool)
    )
    grouped = jitter_and_blur(augment(raw, 32, still), params)  # what a GPU does
    torch.testing.assert_close(grouped, want, atol=1e-5, rtol=0)
    only = jitter_and_blur(
        augment(raw[:1], 32, Params(*(p[:1] for p in still))),
        Params(*(p[:1] for p in params)),
    )  # a group of one is everything
    torch.testing.assert_close(only, want[:1], atol=1e-5, rtol=0)


def test_the_input_is_left_alone_and_bad_input_named():
    raw = torch.full((8, 3, 40, 40), 90, dtype=torch.uint8)
    raw[:, :, ::2] = 200
    before, params = raw.clone(), draw_params(0, 0, 8, 40, 32)
    augmented = augment(raw, 32, params)
    assert torch.equal(raw, before) and torch.equal(augmented, augment(raw, 32, params))
    for bad in (raw.float(), raw[:, :1], raw[:, :, :20], raw[0]):
        with pytest.raises(ValueError, match="images"):
            augment(bad, 32, params)


def test_parameters_are_a_function_of_the_sample_number():
    whole = draw_params(3, 0, 64, 256, 224)
    for first, count in ((0, 1), (5, 7), (63, 1), (32, 32)):
        part = draw_params(3, first, count, 256, 224)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[first : first + count], b)
    other = draw_params(4, 0, 64, 256, 224)
    assert not torch.equal(whole.factors, other.factors)


def test_distribution_is_the_papers():
    n = 40_000
    p = draw_params(7, 12345, n, 256, 224)
    for flags, share in ((p.hflip, 0.5), (p.vflip, 0.5), (p.jitter, 0.5), (p.blur, 0.1)):
        assert abs(flags.float().mean().item() - share) < 5 * np.sqrt(share * (1 - share) / n)
    for corner in (p.top, p.left):
        counts = np.bincount(corner.numpy(), minlength=33)
        assert (
            len(counts) == 33 and ((counts - n / 33) ** 2 / (n / 33)).sum() < 80
        )  # chi-square, 32 degrees of freedom
    ranges = [(0.85, 1.15), (0.85, 1.15), (0.9, 1.1), (-0.05, 0.05)]
    for values, (low, high) in zip([*p.factors.T, p.sigma], [*ranges, (0.1, 2.0)], strict=True):
        histogram = np.histogram(values.numpy(), 20, (low, high))[0]
        assert histogram.sum() == n and ((histogram - n / 20) ** 2 / (n / 20)).sum() < 60
    orders = np.unique(p.order.numpy(), axis=0, return_counts=True)
    assert len(orders[0]) == 24 and ((orders[1] - n / 24) ** 2 / (n / 24)).sum() < 65
    columns = np.stack(
        [p.top, p.left, p.hflip, p.vflip, p.jitter, *p.factors.T, p.blur, p.sigma]
    ).astype(float)
    assert (
        np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.03
    )  # drawn independently of one another

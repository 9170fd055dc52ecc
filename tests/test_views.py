"""Views of the student: colours of other slides, and what is the same whoever draws them."""

import numpy as np
import pytest
import torch
from training import VIT, command, fails, log, losses, same

import distill
from g2l.augment import augment
from g2l.colours import WHITE, ColourSums, optical_density
from g2l.errors import UserError
from g2l.models import load_model
from g2l.patches import PatchIndex
from g2l.stream import Batches, hold_out
from g2l.views import VIEWS, StudentView, parse_views, slide_means

pytestmark = pytest.mark.usefixtures("no_curve")


@pytest.fixture
def index(data):
    return PatchIndex(data / "tiles" / "tiny")


def batch_of(index, held, number=5, size=12, rank=0, world=1):
    batches = Batches(index, held, 3, size, 48, "slide", rank, world)
    images, params, _ = batches[number]
    return augment(images, 48, params), params


def densities(images: torch.Tensor) -> np.ndarray:
    """(pixels, 3) of float images (B, 3, H, W)."""
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    return -np.log((255 * pixels + 1) / 256)


def test_colours_are_the_mean_and_covariance_of_the_tissue():
    rng = np.random.default_rng(0)
    patches = rng.integers(40, 200, (5, 64, 64, 3)).astype(np.uint8)
    patches[:, :, 32:] = 250  # glass
    sums = ColourSums()
    for patch in patches:
        sums.add(patch)
    mean, covariance = sums.summary()
    tissue = optical_density(patches[:, ::5, :32:5].reshape(-1, 3))
    np.testing.assert_allclose(mean, tissue.mean(0))
    np.testing.assert_allclose(covariance, np.cov(tissue.T, bias=True))
    assert np.isnan(ColourSums().summary()[0]).all()


def test_tiling_keeps_each_slides_colours(index):
    mean, covariance = index.colours()
    for number in range(len(index.slides)):
        first = int(index.starts[number])
        count = int(index.counts[number])
        pixels = np.stack([index.read(first + row) for row in range(count)])
        density = optical_density(pixels.reshape(-1, 3))
        density = density[density.max(1) > WHITE]
        np.testing.assert_allclose(mean[number], density.mean(0), rtol=0.05)
        np.testing.assert_allclose(covariance[number], np.cov(density.T), atol=0.02)


def test_a_crop_takes_the_colours_of_another_slide_that_is_trained_on(index):
    held = hold_out(index, 0.3, 0)
    view = StudentView(["cohort"], 3, index, ~held)
    mean, covariance = index.colours()
    rng = np.random.default_rng(0)
    for own in np.flatnonzero(~held)[:3]:
        # Pixels of just the slide's mean and covariance come out with those of one other slide.
        root = np.linalg.cholesky(covariance[own])
        density = mean[own] + 0.3 * rng.normal(size=(48 * 48, 3)) @ root.T
        light = (256 * np.exp(-density) - 1) / 255
        assert 0 < light.min() and light.max() < 1
        crops = torch.from_numpy(light.T.reshape(1, 3, 48, 48)).float()
        _, params = batch_of(index, held, size=1)
        params = params._replace(slide=torch.tensor([own]))
        got = densities(view(crops, params))
        apart = np.abs(mean - got.mean(0)).max(1)
        other = int(apart.argmin())
        assert apart[other] < 0.05 and other != own and not held[other]
        np.testing.assert_allclose(np.cov(got.T), 0.09 * covariance[other], atol=2e-3)


@pytest.mark.parametrize("kind", VIEWS)
def test_every_view_changes_the_crop_in_bounds_and_does_not_depend_on_ranks(kind, index):
    held = hold_out(index, 0.05, 0)
    view = StudentView([kind], 3, index, ~held)
    crops, params = batch_of(index, held)
    before = crops.clone()
    whole = view(crops, params)
    assert torch.equal(crops, before) and torch.equal(view(crops, params), whole)
    assert whole.shape == crops.shape and whole.min() >= 0 and whole.max() <= 1
    changed = (whole - crops).abs().amax((1, 2, 3))
    assert (changed > 0.01).all()
    assert (whole - crops).abs().mean() < 0.25
    for rank in range(3):
        part, own = batch_of(index, held, size=4, rank=rank, world=3)
        torch.testing.assert_close(view(part, own), whole[4 * rank : 4 * rank + 4])


def test_means_of_slides_are_the_teachers_own_less_that_of_the_cohort(index):
    teacher = load_model("timm:test_vit4", "random", input_size=48)
    got = slide_means(teacher, index, 48, 0, 16)
    means = []
    for start, count in zip(index.starts, index.counts, strict=True):
        patches = [index.read(i)[8:56, 8:56] for i in range(start, start + count)]
        images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            means.append(teacher(teacher.normalize(images)).mean(0))
    wanted = torch.stack(means)
    torch.testing.assert_close(got, wanted - wanted.mean(0), atol=1e-5, rtol=1e-4)


def test_a_view_that_is_unknown_or_impossible_is_refused(index, data, tmp_path, capsys):
    assert parse_views(" cohort, focus") == ["cohort", "focus"] and parse_views("") == []
    assert parse_views("cohort focus") == ["cohort", "focus"]  # a sweep parts values by commas
    alone = np.arange(len(index.slides)) == 0
    with pytest.raises(UserError, match="there is none"):
        StudentView(["cohort"], 0, index, alone)
    fails(command(data, tmp_path, "r", "--student-view", "dye"), "'dye'", "cohort", capsys=capsys)
    more = ["--teacher-center", "slide", "--tokens", "all"]
    fails(command(data, tmp_path, "r", *more), "--tokens cls", capsys=capsys)


@pytest.mark.slow
def test_a_run_with_views_goes_on_bit_for_bit(data, tmp_path):
    short = ["--max-steps", "6", "--hold-out", "0.3"]
    flags = ["--student-view", "cohort,focus", "--teacher-center", "slide", *short]
    whole = command(data, tmp_path, "whole", *flags, pair=VIT)
    assert distill.main(whole) == 0
    plain = command(data, tmp_path, "plain", *short, pair=VIT)
    assert distill.main(plain) == 0
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")
    halves = command(data, tmp_path, "halves", *flags, "--checkpoint-steps", "3", pair=VIT)
    training = distill.Training
    original = training.save

    def stop_once(self):
        original(self)
        if self.done == 3:
            raise UserError("stopped for the test")

    training.save = stop_once
    try:
        assert distill.main(halves) == 1
    finally:
        training.save = original
    assert distill.main(halves) == 0
    assert log(tmp_path / "halves")
    same(tmp_path / "halves", tmp_path / "whole")

"""g2l.shifts: changes of stain and scanner, and how far features go."""

import numpy as np
import pytest

from g2l.shifts import SHIFTS, STAINS, displacement, shift


@pytest.fixture
def patch() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(100, 230, (8, 8, 1)) * (1, 0.7, 0.9), np.ones((8, 8, 1)))
    return np.clip(smooth + rng.normal(0, 4, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", list(SHIFTS))
def test_shift_grows_with_its_strength_and_starts_at_nothing(kind, patch):
    nothing, strengths = SHIFTS[kind]["nothing"], SHIFTS[kind]["tried"]
    change = lambda s: np.abs(shift(patch, kind, s).astype(float) - patch).mean()  # noqa: E731
    above = sorted(s for s in strengths if s > nothing)
    below = sorted((s for s in strengths if s < nothing), reverse=True)
    assert change(nothing) < 3 if kind == "jpeg" else change(nothing) == 0
    for side in (above, below):
        changes = [change(s) for s in side]
        assert all(c > 0.3 for c in changes) and changes == sorted(changes)
    out = shift(patch, kind, strengths[-1])
    assert out.shape == patch.shape and out.dtype == np.uint8


def test_stain_shift_moves_the_stain_it_names():
    """A pixel of pure haematoxylin gets darker with s, one of pure eosin lighter; white stays
    white.
    """
    pure = (256 * np.exp(-0.8 * STAINS[:2]) - 1).round().astype(np.uint8)
    image = np.stack([pure[0], pure[1], [255, 255, 255]])[None].astype(np.uint8)
    out = shift(image, "stain", 0.3)[0].astype(int)
    density = lambda pixel: -np.log((pixel + 1) / 256)  # noqa: E731
    assert density(out[0]) == pytest.approx(1.3 * density(pure[0].astype(int)), abs=0.03)
    assert density(out[1]) == pytest.approx(density(pure[1].astype(int)) / 1.3, abs=0.03)
    assert (out[2] == 255).all()


def test_scale_shows_the_middle_enlarged_or_the_whole_shrunk(patch):
    assert np.abs(shift(patch, "scale", 2)[::2, ::2].astype(int) - patch[16:48, 16:48]).mean() < 12
    half = shift(patch, "scale", 0.5)
    assert np.abs(half[16:48, 16:48].astype(int) - patch[::2, ::2]).mean() < 12
    assert (half[15, 16:48] == half[16, 16:48]).all()  # mirrored at the edge


def test_displacement():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 8))
    same = displacement(base, 3 * base)
    assert same["cosine"] == pytest.approx(1) and same["first"] == 1 and same["rank"] == 1
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    other = displacement(base, np.roll(base, 1, 0))
    assert other["first"] == 0 and other["distance"] == pytest.approx(1, abs=0.15)
    assert (
        displacement(np.ones((9, 4)), np.ones((9, 4)))["first"] == 0
    )  # all alike: nothing known again
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    similar = unit @ unit.T
    assert same["others"] == pytest.approx(similar[~np.eye(50, dtype=bool)].mean())
    ranks = [
        1 + np.sum(similar[i - 1] > similar[i - 1, i]) - 1 for i in range(50)
    ]  # itself is no rival of its image
    assert other["rank"] == pytest.approx(np.median([r + 1 for r in ranks]), abs=1)

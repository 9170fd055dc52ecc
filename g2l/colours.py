"""A slide's colours: mean and covariance of the optical densities of its tissue.

`ColourSums` gathers them while a slide is tiled; they are kept with its coordinates.
"""

import numpy as np
from numpy import ndarray

WHITE = 0.15  # optical density below which a pixel is glass (Macenko et al. 2009)
STEP = 5  # px; of so many columns and rows one is taken, wherever blocks of 8 begin


def optical_density(pixels: ndarray) -> ndarray:
    """-ln of the light let through, natural units, of RGB pixels (..., 3) uint8."""
    return -np.log(np.arange(1, 257) / 256).take(pixels)


class ColourSums:
    """Sums over the tissue pixels that were seen: their number, densities and products."""

    def __init__(self):
        self.count = 0
        self.first = np.zeros(3)
        self.second = np.zeros((3, 3))

    def add(self, patch: ndarray) -> None:
        """See a patch (H, W, 3) uint8."""
        density = optical_density(patch[::STEP, ::STEP].reshape(-1, 3))
        tissue = density[density.max(1) > WHITE]
        self.count += len(tissue)
        self.first += tissue.sum(0)
        self.second += tissue.T @ tissue

    def summary(self) -> tuple[ndarray, ndarray]:
        """Mean (3,) and covariance (3, 3); NaN where no tissue was seen."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.first / self.count
            return mean, self.second / self.count - np.outer(mean, mean)

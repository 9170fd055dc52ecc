"""Changes of stain and scanner that a patch may meet, and how far a model's features follow them.

`shift` changes an image by one kind and strength, `displacement` compares features before and
after.
"""

import io
import tomllib

import numpy as np
from numpy import ndarray
from PIL import Image
from scipy.ndimage import gaussian_filter

from g2l.colours import optical_density

# What each strength means, where it changes nothing, which can be asked for, and which are tried.
SHIFTS = tomllib.loads("""
[stain]
meaning = "haematoxylin × (1 + s), eosin / (1 + s)"
nothing = 0
range = [-0.9, 9]
tried = [-0.4, -0.2, -0.1, 0.1, 0.2, 0.4]

[brightness]
meaning = "intensity × (1 + s)"
nothing = 0
range = [-1, 9]
tried = [-0.3, -0.2, -0.1, 0.1, 0.2, 0.3]

[blur]
meaning = "standard deviation of a Gaussian, px"
nothing = 0
range = [0, 50]
tried = [0.5, 1, 2, 3, 4]

[jpeg]
meaning = "JPEG quality"
nothing = 100
range = [1, 100]
tried = [90, 70, 50, 30, 10]

[scale]
meaning = "magnification"
nothing = 1
range = [0.1, 10]
tried = [0.5, 0.71, 0.84, 1.19, 1.41, 2]
""")


# Optical densities of haematoxylin, eosin and a residual in red, green and blue, from Ruifrok and
# Johnston (2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def shift(
    image: ndarray,
    kind: str,
    strength: float,
) -> ndarray:
    """An image (H, W, 3) uint8 with its stain, brightness, focus, compression or magnification
    changed; same shape.
    """
    if kind == "stain":
        amounts = optical_density(image) @ np.linalg.inv(STAINS)
        changed = 256 * np.exp(-amounts * (1 + strength, 1 / (1 + strength), 1) @ STAINS) - 1
    elif kind == "brightness":
        changed = image * (1.0 + strength)
    elif kind == "blur":
        changed = gaussian_filter(image.astype(np.float32), (strength, strength, 0), mode="nearest")
    elif kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(strength))
        return np.asarray(Image.open(buffer))
    else:
        return rescale(image, strength)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def rescale(image: ndarray, strength: float) -> ndarray:
    """An image at another magnification: its middle enlarged, or all shrunk, mirrored around."""
    height, width = image.shape[:2]
    inner = min(1, 1 / strength)
    outer = min(1, strength)
    h = round(height * inner)
    w = round(width * inner)
    top = (height - h) // 2
    left = (width - w) // 2
    part = Image.fromarray(image[top : top + h, left : left + w])
    size = round(width * outer), round(height * outer)
    changed = np.asarray(part.resize(size, Image.Resampling.BICUBIC))
    gaps = np.subtract(image.shape, changed.shape)
    return np.pad(changed, [(gap // 2, gap - gap // 2) for gap in gaps], mode="symmetric")


def unit(x: ndarray) -> ndarray:
    """Features (n, D) of length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


def displacement(base: ndarray, moved: ndarray) -> dict[str, float]:
    """How far features (n, D) of changed patches lie from those of the same patches unchanged.

    cosine to the unchanged patch, mean; distance to it over the median distance between two patches
    (L2-normalised), median; first: share of patches that are still nearest to themselves; rank of
    itself among all, median; others: mean cosine of two patches.
    """
    base = unit(base)
    moved = unit(moved)
    own = np.einsum("nd,nd->n", moved, base)
    gone = np.linalg.norm(base - moved, axis=1)
    pairs = np.triu_indices(len(base), 1)
    apart = np.sqrt(np.clip(2 - 2 * (base @ base.T)[pairs], 0, None))
    similar = moved @ base.T
    np.fill_diagonal(similar, -np.inf)
    rank = 1 + (similar >= own[:, None]).sum(1)  # a tie is no recognition
    return {
        "cosine": float(own.mean()),
        "distance": float(np.median(gone) / max(np.median(apart), 1e-12)),
        "first": float((rank == 1).mean()),
        "rank": float(np.median(rank)),
        "others": float(1 - np.mean(apart**2) / 2),
    }

"""What the student sees in place of the teacher's view, and what it is asked to match of it.

A hospital shows in its stain and its scanner. `StudentView` shows the student each crop in the
colours of another slide, or otherwise changed, while the teacher sees it as it is, so that both
must agree on tissue; `slide_means` is what the teacher says of a slide as a whole, which can be
taken off its targets. Both are drawn or computed from the sample's number and the cohort alone.
"""

import numpy as np
import simplejpeg
import torch
from numpy import ndarray
from torch import Tensor

from g2l.augment import Params, gaussian_blur
from g2l.errors import UserError
from g2l.models import Model
from g2l.patches import PatchIndex
from g2l.ranks import gather_values, rank_and_world
from g2l.shifts import STAINS
from g2l.stream import embeddings_of, read_centres

VIEWS = {
    "cohort": "colours of another slide of the cohort",
    "stain": "more or less haematoxylin and eosin",
    "scanner": "another colour matrix and gamma",
    "focus": "blur and noise",
    "jpeg": "JPEG compression",
}
# How far each goes at most.
STAIN = 0.35  # log of a stain's amount
MATRIX = 0.08  # entries of the colour matrix
GAMMA = 0.25  # its log
BLUR = 2.0  # sigma in px
NOISE = 0.03  # of full intensity
QUALITY = 30, 95  # of JPEG
MEAN_PATCHES = 64  # of a slide, for the teacher's mean


def parse_views(text: str) -> list[str]:
    """Kinds of VIEWS from their names with commas or blanks between; UserError for another name."""
    kinds = text.replace(",", " ").split()
    for kind in kinds:
        if kind not in VIEWS:
            raise UserError(f"student view {kind!r}: expected any of {', '.join(VIEWS)}")
    return kinds


class StudentView:
    """Changes a batch of crops as the chosen `kinds` of VIEWS say, each sample in its own way."""

    def __init__(self, kinds: list[str], seed: int, index: PatchIndex, trained: ndarray):
        self.kinds = kinds
        self.seed = seed
        self.others = np.flatnonzero(trained)  # slides whose colours are borrowed
        if "cohort" in kinds:
            if len(self.others) < 2:
                raise UserError("the view cohort takes colours of other slides, and there is none")
            self.mean, covariance = index.colours()
            value, vector = np.linalg.eigh(covariance)
            turned = vector.transpose(0, 2, 1)
            spread = np.sqrt(value.clip(1e-6))[:, None]  # of a slide of one colour, too
            self.root = vector * spread @ turned
            self.inverse = vector / spread @ turned

    def __call__(self, crops: Tensor, params: Params) -> Tensor:
        """float (B, 3, S, S) in [0, 1] -> the same, changed; the crops stay as they are."""
        first = int(params.number[0])
        count = len(crops)
        bits = np.random.Philox(key=[self.seed, 0x51E7], counter=4 * first)
        u = np.random.Generator(bits).random((count, 16))  # 16 of each sample
        seen = crops
        if {"cohort", "stain"} & set(self.kinds):
            density = -torch.log((crops * 255 + 1) / 256)
            matrix, offset = self._densities(u, params.slide.numpy())
            mapped = _affine(density, matrix, offset)
            seen = (256 * torch.exp(-mapped) - 1) / 255
        if "scanner" in self.kinds:
            seen = _scanned(seen, u[:, 3:12], u[:, 12])
        if "focus" in self.kinds:
            seen = self._out_of_focus(seen, params.number, u[:, 13], u[:, 14])
        seen = seen.clamp(0, 1)
        if "jpeg" in self.kinds:
            _compress(seen, u[:, 15])
        return seen

    def _out_of_focus(self, x: Tensor, number: Tensor, blur: ndarray, noise: ndarray) -> Tensor:
        """Blur and noise by as much as two numbers (B,) in [0, 1] say."""
        sigma = torch.from_numpy(0.1 + BLUR * blur).float()
        x = gaussian_blur(x, sigma)
        for image, sample, size in zip(x, number.tolist(), noise, strict=True):
            lot = torch.Generator(x.device).manual_seed(self.seed ^ (sample << 8))
            normal = torch.empty_like(image).normal_(generator=lot)
            image.add_(normal, alpha=NOISE * size)
        return x

    def _densities(self, u: ndarray, slide: ndarray) -> tuple[ndarray, ndarray]:
        """The map of each sample's optical densities: matrix (B, 3, 3) and offset (B, 3).

        To another slide's colours: Rt Rs^-1 (d - ms) + mt, with means m and roots R of the
        covariances of the sample's slide s and the other, t.
        """
        matrix = np.tile(np.eye(3), (len(u), 1, 1))
        offset = np.zeros((len(u), 3))
        if "cohort" in self.kinds:
            count = len(self.others)
            place = np.searchsorted(self.others, slide)
            away = 1 + (u[:, 0] * (count - 1)).astype(int)
            other = self.others[(place + away) % count]
            matrix = self.root[other] @ self.inverse[slide]
            moved = _times(matrix, self.mean[slide])
            offset = self.mean[other] - moved
        if "stain" in self.kinds:
            scale = np.ones((len(u), 3))
            scale[:, :2] = np.exp(STAIN * (2 * u[:, 1:3] - 1))
            amounts = np.linalg.inv(STAINS).T
            change = STAINS.T @ (scale[:, :, None] * amounts)
            matrix = change @ matrix
            offset = _times(change, offset)
        return matrix, offset


def _times(matrix: ndarray, vector: ndarray) -> ndarray:
    """(B, 3, 3) times (B, 3)."""
    return np.einsum("bij,bj->bi", matrix, vector)


def _scanned(x: Tensor, mixing: ndarray, curve: ndarray) -> Tensor:
    """Another scanner's colour matrix and gamma, from numbers (B, 9) and (B,) in [0, 1]."""
    spread = MATRIX * (2 * mixing.reshape(-1, 3, 3) - 1)
    matrix = np.eye(3) + spread
    matrix /= matrix.sum(2, keepdims=True)  # white stays white
    gamma = np.exp(GAMMA * (2 * curve - 1))
    offset = np.zeros((len(x), 3))
    mixed = _affine(x, matrix, offset).clamp(0, 1)
    power = _send(gamma, x)
    return mixed ** power[:, None, None, None]


def _compress(x: Tensor, share: ndarray) -> None:
    """JPEG in place, its quality by numbers (B,) in [0, 1]."""
    low, high = QUALITY
    qualities = low + (high - low) * share
    for image, quality in zip(x, qualities, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0)
        array = np.ascontiguousarray(pixels.cpu().numpy())
        data = simplejpeg.encode_jpeg(array, int(quality))
        decoded = torch.from_numpy(simplejpeg.decode_jpeg(data))
        image.copy_(decoded.permute(2, 0, 1) / 255)


def _affine(x: Tensor, matrix: ndarray, offset: ndarray) -> Tensor:
    """matrix (B, 3, 3) and offset (B, 3) applied to the channels of x (B, 3, H, W)."""
    mixed = torch.einsum("bij,bjhw->bihw", _send(matrix, x), x)
    return mixed + _send(offset, x)[:, :, None, None]


def _send(values: ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)


def slide_means(teacher: Model, index: PatchIndex, crop: int, seed: int, batch: int) -> Tensor:
    """Of each slide, the teacher's mean embedding less that of the cohort: float32 (slides, dim).

    Of MEAN_PATCHES patches a slide at most, centre-cropped; ranks share the slides. Of a slide none
    of whose patches can be read it is 0.
    """
    rank, world = rank_and_world()
    own: dict[int, Tensor] = {}
    for number in range(rank, len(index.slides), world):
        lot = np.random.default_rng([seed, 0x3EA5, number])
        count = int(index.counts[number])
        rows = lot.permutation(count)[:MEAN_PATCHES]
        chosen = index.starts[number] + rows
        # What cannot be read, training says when it draws it.
        patches, _ = read_centres(index, chosen.tolist(), crop)
        if patches:
            images = torch.from_numpy(np.stack(list(patches.values()))).permute(0, 3, 1, 2)
            own[number] = embeddings_of(teacher, images, batch).mean(0).cpu()
    known: dict[int, Tensor] = {}
    for part in gather_values(own):
        known |= part
    middle = torch.stack(list(known.values())).mean(0)
    means = []
    for number in range(len(index.slides)):
        mean = known.get(number, middle)
        means.append(mean - middle)
    return torch.stack(means)

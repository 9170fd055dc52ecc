"""TODO."""

from __future__ import annotations

import numpy as np
import torch

import kernels
from g2l.augment import draw_params
from g2l.errors import PatchError, UserError
from g2l.models import Model


class Batches(torch.utils.data.Dataset):
    """Item m: this rank's share of micro-batch m as (uint8 (B, 3, P, P), Params, unreadable patches as text).

    Sample n of the run is the same patch with the same augmentation whatever the number of workers, and ranks, micro-
    batches and steps partition the sample numbers; so a run is resumed by its step alone, and N ranks see what one
    process with an N times larger batch sees. Held-out patients and unreadable patches are drawn again.
    """

    def __init__(
        self,
        index,
        held: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        crop: int,
        by: str,
        rank=0,
        world=1,
    ):
        self.index, self.held, self.seed, self.by, self.crop = index, held, seed, by, crop
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __getitem__(self, number: int):
        first = (number * self.world + self.rank) * self.batch_size
        patches, unreadable = [], []
        for n in range(first, first + self.batch_size):
            patches.append(self._read(n, unreadable))
        images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()
        return (
            images,
            draw_params(self.seed, first, self.batch_size, self.index.patch_size, self.crop),
            unreadable,
        )

    def _read(self, n: int, unreadable: list[str]) -> np.ndarray:
        failures = attempt = 0
        while failures < 20:
            i = self.index.draw(self.seed + (attempt << 32), n, by=self.by)
            attempt += 1
            if self.held[self.index.locate(i)[0]]:
                continue
            try:
                return self.index.read(i)
            except PatchError as error:
                unreadable.append(str(error))
                failures += 1
        return np.zeros(
            (self.index.patch_size,) * 2 + (3,), np.uint8
        )  # the trainer stops at this many unreadable


def hold_out(index, fraction: float, seed: int) -> np.ndarray:
    """bool (slides,): slides of a seeded `fraction` of the patients: at least 2 of 8 or more, 1 of 4, none of fewer."""
    patients = list(index.patients)
    held: set[str] = set()
    if fraction > 0 and len(patients) >= 4:
        order = np.random.default_rng([seed, 0x4E1D]).permutation(len(patients))
        held = {
            patients[i]
            for i in order[: max(1 + (len(patients) >= 8), round(fraction * len(patients)))]
        }
    return np.array([patient in held for patient in index.patient], bool)


class Heldout:
    """Fixed patches of held-out patients, centre-cropped, and what the teacher says of them: the yardstick of a run."""

    def __init__(
        self,
        index,
        held: np.ndarray,
        count: int,
        crop: int,
        seed: int,
        teacher: Model,
        batch: int,
    ):
        counts = np.asarray(index.counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        slides = np.flatnonzero((held if held.any() else ~held) & (counts > 0))
        rng = np.random.default_rng([seed, 0xE7A1])
        drawn = rng.choice(slides, 20 * count)  # a slide, then a patch of it, none twice
        chosen = list(dict.fromkeys((starts[drawn] + rng.integers(counts[drawn])).tolist()))[:count]
        patches, margin = [], (index.patch_size - crop) // 2
        problem = "their patients have no more; raise --hold-out, or take --hold-out 0"
        for i in chosen:
            try:
                patches.append(index.read(i)[margin : margin + crop, margin : margin + crop])
            except PatchError as error:
                problem = f"{error}; if the slides have moved, say where they are by --slides"
        if len(patches) < 4:
            raise UserError(
                f"--eval-patches {count}: only {len(patches)} held-out patches can be read: {problem}"
            )
        self.images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()
        self.batch, self.name = batch, "held-out CKA" if held.any() else "CKA on training slides"
        self.teacher = self.features(teacher)

    @torch.no_grad()
    def features(self, model: Model) -> torch.Tensor:
        """float32 (N, dim) embeddings in eval mode."""
        training, device = model.training, next(model.parameters()).device
        model.eval()
        parts = [part.to(device).float() / 255 for part in self.images.split(self.batch)]
        parts = [model(model.normalize(part)).float() for part in parts]
        model.train(training)
        return torch.cat(parts)

    def measure(self, student: Model) -> dict[str, float]:
        """Unbiased and biased linear CKA of the student to the teacher, and the spread of the student's features."""
        features = self.features(student)
        unbiased, biased = kernels.cka([features], [self.teacher], estimator="both")
        return {
            "cka": unbiased.item(),
            "cka_biased": biased.item(),
            "spread": feature_spread(features).item(),
        }


def feature_spread(features: torch.Tensor) -> torch.Tensor:
    """How far rows differ, relative to their size: 0 for a model that says the same of everything."""
    features = features.detach().float()
    return features.var(0).mean().sqrt() / (features.square().mean().sqrt() + 1e-12)

"""What is trained on and what is measured on: the stream of batches, and the patches held out.

`Batches` says which patches sample n of a run is, `load` reads them in processes of their own,
`hold_out` keeps patients back, and `Heldout` measures the student on their patches.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import kernels
from g2l import ranks
from g2l.augment import Params, draw_params
from g2l.cohort import hashed
from g2l.errors import PatchError, UserError, of_the_machine
from g2l.models import Model
from g2l.patches import PatchIndex

ORDERS = 20  # of which the chance of CKA is the mean
Item = tuple[Tensor, Params, list[str]]  # see Batches
ATTEMPTS = 20  # patches tried for one sample; a run stops long before so many cannot be read


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """Item m: this rank's share of micro-batch m as (uint8 (B, 3, P, P), Params, unreadable texts).

    Sample n of the run is the same patch with the same augmentation whatever the number of workers,
    and ranks, micro-batches and steps partition the sample numbers; so a run is resumed by its step
    alone, and N ranks see what one process with an N times larger batch sees. Held-out patients and
    unreadable patches are drawn again.
    """

    index: PatchIndex
    held: ndarray  # bool (slides,)
    seed: int
    batch_size: int
    crop: int
    by: str  # "slide" or "patch", see PatchIndex.draw
    rank: int = 0
    world: int = 1
    sealed: bool = False  # whether Params says of each patch which pixels it has

    def __getitem__(self, number: int) -> Item:
        first = self._first(number)
        worker = torch.utils.data.get_worker_info()
        coming = self._first(number + (worker.num_workers if worker else 1))
        for start in (first, coming):  # this batch, and the next one of this process
            samples = range(start, start + self.batch_size)
            self.index.ahead(next(self._candidates(n)) for n in samples)
        unreadable: list[str] = []
        patches = []
        drawn = []
        for n in range(first, first + self.batch_size):
            pixels, i = self._read(n, unreadable)
            patches.append(pixels)
            seal = zlib.crc32(np.ascontiguousarray(pixels).data) if self.sealed else -1
            drawn.append((seal, self.index.locate(i)[0]))
        images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()
        params = draw_params(self.seed, first, self.batch_size, self.index.patch_size, self.crop)
        seals, slide = torch.tensor(drawn).T.contiguous()
        return images, params._replace(pixels=seals, slide=slide), unreadable

    def pack(self, item: Item) -> tuple:
        """What a process sends: arrays, which go through the pipe, not tensors; and what it has
        counted since the last time (see remote.Link)."""
        images, params, unreadable = item
        self.index.link.close()
        counts = self.index.link.take_counts()
        return images.numpy(), [values.numpy() for values in params], unreadable, counts

    def _first(self, number: int) -> int:
        """The first sample of this rank's share of a micro-batch."""
        return (number * self.world + self.rank) * self.batch_size

    def _candidates(self, n: int) -> Iterator[int]:
        """The patches that are tried for sample n, one after another."""
        for attempt in itertools.count():
            i = self.index.draw(self.seed + (attempt << 32), n, by=self.by)
            if not self.held[self.index.locate(i)[0]]:
                yield i

    def _read(self, n: int, unreadable: list[str]) -> tuple[ndarray, int]:
        """The patch of sample n and its number; `unreadable` gets texts of those that were not."""
        for i in itertools.islice(self._candidates(n), ATTEMPTS):
            try:
                return self.index.read(i), i
            except PatchError as error:
                cause = error.__cause__
                if cause and of_the_machine(cause):  # another patch would only hide it
                    raise cause from None
                unreadable.append(str(error))
        return np.zeros((self.index.patch_size,) * 2 + (3,), np.uint8), i


def load(batches: Batches, numbers: range, workers: int, pin: bool) -> Iterator[Item]:
    """Items `numbers` of `batches`, read ahead by `workers` processes; `pin`: in pinned memory.

    They come through pipes, not through shared memory, of which a container has little. Raises
    UserError as `ranks.loading` says.
    """
    batches.index.link.close()  # what was measured on is kept, whatever happens
    with ranks.loading("patches", workers) as options:
        loader = torch.utils.data.DataLoader(
            batches,
            sampler=numbers,
            generator=torch.Generator(),  # the seed it draws is not of the steps' stream
            **options | {"collate_fn": batches.pack},  # of one item, as there is no batch_size
        )
        for images, params, unreadable, counts in loader:
            batches.index.link.counts.update(counts)
            images = torch.from_numpy(images)
            params = Params(*map(torch.from_numpy, params))
            yield images.pin_memory() if pin else images, params, unreadable


def hold_out(index, fraction: float, seed: int) -> ndarray:
    """bool (slides,): the slides of a seeded `fraction` of the patients.

    At least 2 patients of 8 or more, 1 of 4, none of fewer.
    """
    count = len(index.patients)
    held = 0
    if fraction > 0 and count >= 4:
        held = max(1 + (count >= 8), round(fraction * count))
    order = np.random.default_rng([seed, 0x4E1D]).permutation(count)
    return np.isin(index.patient, np.array(index.patients)[order[:held]])


def open_cohort(
    folder: Path, slides: str, fraction: float, most: int, seed: int, cache: int = 0
) -> tuple[PatchIndex, ndarray]:
    """The patches, and bool (slides,): which slides are held out (see `hold_out`).

    With `most`, training keeps so many slides; a larger number adds to those of a smaller one.
    `cache`: bytes of tiles kept of slides at an address.
    """
    index = PatchIndex(folder, slides or None, cache=cache)
    held = hold_out(index, fraction, seed)
    if most:
        names = np.array(index.slides)
        others = np.random.default_rng([seed, 0x511D]).permutation(names[~held])[:most]
        index = PatchIndex(folder, slides or None, only={*names[held], *others}, cache=cache)
        held = np.isin(index.slides, names[held])
    return index, held


def read_centres(
    index: PatchIndex, chosen: list[int], crop: int
) -> tuple[dict[int, ndarray], list[str]]:
    """The patches by number, centre-cropped to (crop, crop, 3), and texts of those that cannot be
    read."""
    margin = (index.patch_size - crop) // 2
    inside = slice(margin, margin + crop)
    patches = {}
    unreadable = []
    index.ahead(chosen)
    for i in chosen:
        try:
            patches[i] = index.read(i)[inside, inside]
        except PatchError as error:
            unreadable.append(str(error))
    return patches, unreadable


@torch.no_grad()
def embeddings_of(model: Model, images: Tensor, batch: int) -> Tensor:
    """float32 (N, dim) of uint8 images (N, 3, S, S), in eval mode, `batch` at a time."""
    training = model.training
    model.eval()
    inputs = (model.normalize(part.to(model.device)) for part in images.split(batch))
    parts = [model(x).float() for x in inputs]
    model.train(training)
    return torch.cat(parts)


class Heldout:
    """Fixed patches of held-out patients, centre-cropped, and what each teacher says of them.

    The yardstick of a run. Without held-out slides the patches are of those that are trained on.
    """

    def __init__(
        self,
        index,
        held: ndarray,
        count: int,
        crop: int,
        seed: int,
        teachers: Sequence[Model],
        batch: int,
    ):
        slides = np.flatnonzero(held if held.any() else ~held)
        rng = np.random.default_rng([seed, 0xE7A1])
        drawn = rng.choice(slides, 20 * count)  # a slide, then a patch of it, none twice
        numbers = index.starts[drawn] + rng.integers(index.counts[drawn])
        chosen = list(dict.fromkeys(numbers.tolist()))[:count]
        patches, unreadable = read_centres(index, chosen, crop)
        if len(patches) < 4:
            problem = unreadable[-1] if unreadable else "their patients have no more"
            mend = "moved" if unreadable else "held out"
            raise UserError(
                f"only {len(patches)} of {count} held-out patches can be read: {problem}", mend=mend
            )
        stacked = np.stack(list(patches.values()))
        self.images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
        self.patients = [index.patient[index.locate(i)[0]] for i in patches]
        self.batch = batch
        self.name = "held-out CKA" if held.any() else "CKA on training slides"
        kept = "that are held out" if held.any() else "that are trained on"
        self.origin = f"{len(patches)} patches of {len(set(self.patients))} patients {kept}"
        self.teachers = [self.features(teacher) for teacher in teachers]

    def features(self, model: Model) -> Tensor:
        """float32 (N, dim) embeddings of the patches."""
        return embeddings_of(model, self.images, self.batch)

    def measure(self, student: Model) -> dict[str, float]:
        """Unbiased and biased linear CKA of the student to the teacher, and `feature_spread`; of
        several teachers the mean, and each."""
        features = self.features(student)
        unbiased, biased = kernels.cka([features], self.teachers, estimator="both")
        spread = feature_spread(features)
        found = {
            "cka": unbiased.mean().item(),
            "cka_biased": biased.mean().item(),
            "spread": spread.item(),
        }
        if len(self.teachers) > 1:
            found |= {f"cka_{i}": value for i, value in enumerate(unbiased.flatten().tolist(), 1)}
        return found

    def proof(self, student: Model) -> dict:
        """Of each patient, hashed, with enough patches their number and unbiased CKA (`patients`),
        and of the student's rows in `ORDERS` random orders the mean and largest unbiased CKA and
        the mean biased one (`floor`)."""
        features = self.features(student)
        names = np.array(self.patients)
        patients = {}
        for patient in sorted(set(self.patients)):
            rows = np.flatnonzero(names == patient)
            if len(rows) >= 4:
                theirs = [part[rows] for part in self.teachers]
                own, _ = kernels.cka([features[rows]], theirs, estimator="both")
                patients[hashed(patient)] = (len(rows), own.mean().item())
        lot = torch.Generator().manual_seed(0)
        count = len(features)
        shuffled = [features[torch.randperm(count, generator=lot)] for _ in range(ORDERS)]
        unbiased, biased = kernels.cka(shuffled, self.teachers, estimator="both")
        floor = (unbiased.mean(), unbiased.max(), biased.mean())
        return {"patients": patients, "floor": [value.item() for value in floor]}


def feature_spread(features: Tensor) -> Tensor:
    """How far rows differ, relative to their size: 0 for a model that says the same of all."""
    features = features.detach().float()
    return features.var(0).mean().sqrt() / (features.square().mean().sqrt() + 1e-12)

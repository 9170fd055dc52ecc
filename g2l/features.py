"""Images through a network, once: extraction that can be killed, and the cache of its results.

`extract_features` reads (`ImageReader`, in loading processes), computes (`Forward`) and gathers,
and keeps finished rows while it works. `features` is the cache: the embeddings of one model on one
benchmark, valid for the key of weights, preprocessing and images only. `card` keeps what is known
of a model, so that a run with nothing new loads no network.
"""

import contextlib
import functools
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from g2l.benchmarks import Benchmark
from g2l.embeddings import preprocessing_of
from g2l.errors import PatchError, UserError, of_the_machine, warn
from g2l.files import atomic, digest, read_json, safe, stamp, write_text
from g2l.models import Model, load_model
from g2l.progress import Progress
from g2l.ranks import (
    agree,
    gather_values,
    in_job,
    loading,
    rank_and_world,
    setup_distributed,
)
from g2l.registry import REGISTRY
from g2l.speed import fitting_batch_size, milliseconds
from g2l.weights import WEIGHT_FILES

CARD_VERSION = 2  # raised when a model would be loaded, measured or described otherwise
AHEAD = 2  # batches that are prepared before they are needed, at most
SAVE_SECONDS = 30  # between two saves of finished features
UNREADABLE = (PatchError, OSError, ValueError)
Problems = list[str]  # what could not be read of an item
Row = tuple[ndarray, Problems]  # the embedding of an item
Embedded = dict[int, Row]  # by item
Computed = Iterator[tuple[int, Row]]  # item and row
Batch = tuple[list[int], ndarray, list[tuple[int, Problems]]]


@dataclass(eq=False)
class ImageReader(torch.utils.data.IterableDataset):
    """Reads items of a source in a loading process and yields them as batches ready for a network.

    Each yield is (items, images, ended): `images` uint8 (m, 3, S, S) of which image j belongs to
    item items[j], and `ended`, the items of which all images have now been yielded, as (item, what
    could not be read). A sequence of patches, such as a slide, is read lazily by one worker and
    never held as a whole.
    """

    source: Sequence
    todo: list[int]
    geometry: Callable
    size: int
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        mine = self.todo[worker.id :: worker.num_workers] if worker else self.todo
        none = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        items = []
        images = [none]
        ended: list[tuple[int, Problems]] = []
        for i in mine:
            problems: Problems = []
            for image in self._read(i, problems):
                items.append(i)
                images.append(image)
                if len(items) == self.batch_size:
                    yield items, torch.cat(images).numpy(), ended
                    items = []
                    images = [none]
                    ended = []
            ended.append((i, problems))
        if ended:
            yield items, torch.cat(images).numpy(), ended

    def _read(self, i: int, problems: Problems) -> Iterator[Tensor]:
        """The readable images of item i, as the network takes them; what is not goes to
        `problems`."""
        try:
            item = self.source[i]
            single = isinstance(item, ndarray) and item.ndim != 4
            images = [item] if single else item
            count = len(images)
        except UNREADABLE as error:
            _note(error, problems)
            return
        if not count:
            problems.append("holds no images")
        for j in range(count):
            try:
                yield self.geometry(_planes(images[j]))
            except UNREADABLE as error:
                _note(error, problems)


def _note(error: Exception, problems: Problems) -> None:
    """Keep why an image cannot be read; raise what is no fault of the image."""
    if of_the_machine(error) or of_the_machine(error.__cause__):
        raise error
    problems.append(str(error) or type(error).__name__)


def _planes(image: ndarray) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W); ValueError for anything else."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an RGB image, uint8 (H, W, 3), got {image.dtype} {image.shape}")
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]


@dataclass(eq=False)
class Forward:
    """Batches of uint8 images through a model; the batch size is halved where memory runs out."""

    model: Model
    batch_size: int
    device: torch.device
    used: deque[Tensor] = field(default_factory=deque)  # memory of earlier batches

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (m, 3, S, S) -> normalised (m, 3, S, S) on the device.

        It is overwritten when more than `AHEAD` others have been prepared.
        """
        again = self.used.popleft() if len(self.used) > AHEAD else None
        if again is not None and again.shape != images.shape:
            again = None
        x = self.model.normalize(images.to(self.device, non_blocking=True), again)
        self.used.append(x)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Prepared (m, 3, S, S) -> (m, dim), queued on the device."""
        parts = []
        start = 0
        while start < len(x):
            part = x[start : start + self.batch_size]
            # For a compiled network another number of images would be compiled anew.
            pad = self.batch_size - len(part) if self.model.compiled else 0
            try:
                full = nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, pad)) if pad else part
                parts.append(self.model(full)[: len(part)])
                start += len(part)
            except torch.cuda.OutOfMemoryError:
                self._halve()
        return torch.cat(parts) if parts else torch.empty(0, self.model.dim)

    def _halve(self) -> None:
        name = self.model.name
        if self.batch_size == 1:
            raise UserError(
                f"{name}: not enough memory on {self.device} for one image", mend="one image"
            ) from None
        self.batch_size = (self.batch_size + 1) // 2
        warn(f"{name}: out of memory on {self.device}, batch size now {self.batch_size}")


def extract_features(
    model: Model,
    source: Sequence,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    cache: Path | None = None,
    key: str = "",
    errors: list | None = None,
) -> ndarray:
    """Embeddings of every item of `source`, in order: float32 (N, dim), on every rank.

    source: source[i] is one RGB image, uint8 (H, W, 3), or a sequence of such (array (n, H, W, 3),
    list, or any object
        with len() and [j], read one by one), whose embeddings are averaged into one row. With
        workers > 0 it is copied into worker processes.
    batch_size: images per forward pass; None = 32 on CPU, on a GPU what fits its memory, at most
    256. Halved when the
        memory runs out all the same.
    cache: folder for finished rows, saved every half minute, from which a second call goes on. Rows
    count only if
        weights, preprocessing, N and `key` (the caller's, for the data) are the same. The caller
        deletes the folder once it has saved the result.
    errors: receives (i, message) for whatever could not be read, sorted by i. Unreadable is what
    raises
        PatchError, OSError or ValueError, or is no RGB image. Such a row is NaN; of a sequence,
        unreadable images are left out of the mean, and the row is NaN only if none is left.

    Under torchrun (after setup_distributed) ranks share the items. Batch size, workers and ranks
    change nothing but the last bits: to 1e-5 of a row's norm in fp32, 1e-2 in half precision.
    """
    rank, world = rank_and_world()
    mark = f"{model.fingerprint} {len(source)} {key}"
    rows = _kept_rows(cache, mark) if cache and rank == 0 else {}
    if rank == 0 and hasattr(source, "embedded"):  # embed.py has been here
        rows |= source.embedded(model)
    done = agree(set(rows))
    todo = [i for i in range(len(source)) if i not in done][rank::world]
    if todo:
        computed = _embed(_computed(model, source, todo, batch_size, workers), model.dim)
        with Progress(len(source), "image", len(done), shown=rank == 0) as bar:
            for i, row in _kept(computed, cache, mark):
                rows[i] = row
                bar.step(world)  # other ranks are taken to be as fast
    return _gathered(rows, len(source), model.dim, errors)


def _kept(computed: Computed, cache: Path | None, mark: str) -> Computed:
    """The same, written down now and then, if there is a folder for them."""
    fresh: Embedded = {}
    due = time.monotonic() + SAVE_SECONDS
    for i, row in computed:
        fresh[i] = row
        yield i, row
        if cache and time.monotonic() >= due:
            _keep_rows(cache, mark, fresh)
            fresh = {}
            due = time.monotonic() + SAVE_SECONDS
    if cache and fresh:
        _keep_rows(cache, mark, fresh)


def _embed(computed: Iterator, dim: int) -> Computed:
    """Every item, as its last image comes out of the network: the mean (dim,) of its images."""
    sums: dict[int, ndarray] = {}
    counts: Counter[int] = Counter()
    for items, features, ended in one_behind(computed):
        for i, row in zip(items, features.double().cpu().numpy(), strict=True):
            sums[i] = sums.get(i, 0) + row
            counts[i] += 1
        for i, problems in ended:
            nothing = np.full(dim, np.nan)  # could be read
            mean = sums.pop(i, nothing) / max(counts[i], 1)
            yield i, (mean.astype(np.float32), problems)


def _computed(
    model: Model,
    source: Sequence,
    todo: list[int],
    batch_size: int | None,
    workers: int,
) -> Iterator[tuple]:
    """The reader's batches with features, queued on the device, in place of images."""
    batch_size = batch_size or fitting_batch_size(model)
    forward = Forward(model, batch_size, model.device)
    reader = ImageReader(source, todo, model.geometry, model.input_size, min(batch_size, 4096))
    with torch.inference_mode(), loading("images", workers) as options:
        for items, batch, ended in torch.utils.data.DataLoader(reader, **options):
            images = torch.from_numpy(batch)
            images = images.pin_memory() if model.device.type == "cuda" else images
            yield items, forward(forward.prepare(images)), ended


def one_behind(items: Iterator) -> Iterator:
    """The same items, each when the next has been made: a device has it queued meanwhile."""
    held = None
    for item in items:
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


def _gathered(rows: Embedded, count: int, dim: int, errors: list | None) -> ndarray:
    """All ranks' rows as one array (count, dim), and what could not be read into `errors`."""
    out = np.zeros((count, dim), np.float32)
    found = []
    for i, (row, problems) in rows.items():
        out[i] = row
        found += [(i, problem) for problem in problems]
    parts = gather_values(found)  # a rank that stands still is named here, by a sum it is not
    if in_job():  # each row is one rank's and zero on the others, so the sum is exact
        for part in torch.from_numpy(out).split(65536):
            torch.distributed.all_reduce(part)
    if errors is not None:
        for problems in parts:
            errors.extend(problems)
        errors.sort()
    return out


def _kept_rows(folder: Path, mark: str) -> Embedded:
    """Rows that an earlier call kept; other weights' or data's and damaged ones are passed over."""
    from safetensors import SafetensorError, safe_open

    rows: Embedded = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("stamp") == mark:
                problems = dict(json.loads(about["problems"]))
                items = file.get_tensor("items").tolist()
                values = file.get_tensor("rows")
                for i, row in zip(items, values, strict=True):
                    rows[i] = (row, problems.get(i, []))
    return rows


def _keep_rows(folder: Path, mark: str, rows: Embedded) -> None:
    """Write finished rows, from which a killed extraction goes on."""
    from safetensors.numpy import save_file

    items = list(rows)
    values = np.stack([row for row, _ in rows.values()])
    problems = json.dumps([(i, found) for i, (_, found) in rows.items() if found])
    with atomic(folder / f"{digest(mark, sorted(items))}.safetensors") as path:
        arrays = {"items": np.array(items, np.int64), "rows": values}
        save_file(arrays, path, metadata={"stamp": mark, "problems": problems})


def data_stamp(benchmark: Benchmark) -> str:
    """Fingerprint of a benchmark's images: ids, and size and time of every file. Labels are not in
    it."""
    if not benchmark.stamp:
        benchmark.stamp = digest(benchmark.ids, *watched(benchmark.images))
    return benchmark.stamp


def watched(source: Sequence) -> tuple[list, str]:
    """Size and time of every file of an image source, and how it is cut."""
    files = dict.fromkeys(map(Path, getattr(source, "files", [])))
    return [stamp(file) for file in files], getattr(source, "rule", "")


# The model in use, loaded once: models come one after another, never two in memory.
loaded_model = functools.lru_cache(maxsize=1)(load_model)


def card(name: str, results: Path, *, weights: str | None = None, **options: Any) -> dict:
    """What is known of a model: fingerprint, parameters, dim, input_size, metadata, milliseconds
    per image.

    Kept in results/features/<model>/model.json. A changed weight file, option or CARD_VERSION makes
    it new. Equal networks (a student before and after distillation) are timed once: timed twice,
    the machine's noise would part them.
    """
    how = sorted(options.items(), key=str), CARD_VERSION
    key = digest(name, weights, how, [stamp(path) for path in _local_files(name, weights)])
    path = results / "features" / safe(display(name)) / "model.json"
    known = read_json(path)
    if known.get("key") == key:
        return known
    model = loaded_model(name, weights, **options)
    network = digest(repr(model.net), model.embedding, model.input_size, model.dtype, how)
    others = map(read_json, sorted(path.parents[1].glob("*/model.json")))
    timed = [other["ms_per_image"] for other in others if other.get("network") == network]
    known = {
        "key": key,
        "name": name,
        "display": model.name,
        "parameters": model.parameters_count,
        "weights": weights or ("its own" if Path(name).exists() else "hub"),
        "network": network,
        "ms_per_image": timed[0] if timed else milliseconds(model),
        "preprocessing": preprocessing_of(model),
    }
    for name in ("fingerprint", "dim", "input_size", "metadata", "embedding"):
        known[name] = getattr(model, name)
    write_text(path, json.dumps(known, indent=1, default=str))
    return known


def _local_files(name: str, weights: str | None) -> list[Path]:
    """The files on this machine that a model comes from."""
    if weights is None and name.lower() in REGISTRY:  # replaced in the hub's cache: another model
        return [path.resolve() for path in _cached(REGISTRY[name.lower()].hub)]
    return [Path(path) for path in (weights, name) if path and Path(path).exists()]


def _cached(repository: str) -> list[Path]:
    """The weight files of a hub repository that are in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, file) for file in WEIGHT_FILES]
    return [Path(path) for path in found if isinstance(path, str)]


def display(name: str) -> str:
    """A model's short name: the run's name for runs/NAME/student, NAME-projected where its
    projector was kept, else the name itself."""
    path = Path(name)
    own = path.name in ("student", "student-projected") and path.parent.name
    return path.name.replace("student", path.parent.name) if own else name


def features(
    name: str,
    benchmark: Benchmark,
    results: Path,
    *,
    weights: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    max_unreadable: float = 0.01,
    together: bool = True,
    **options: Any,
) -> ndarray:
    """Embeddings (N, dim) float32 of one model on one benchmark, extracted once and then read from
    `results`.

    `weights` and `options` (device, dtype, input_size, compile) go to load_model. Rows of
    unreadable images are NaN; more of them than the share `max_unreadable`, or NaN from the network
    itself, raise UserError. Under torchrun every rank calls this and gets the whole array;
    together=False: one rank alone reads what is there.
    """
    from safetensors.numpy import save

    rank = setup_distributed(options.get("device", "cpu"))[0] if together else 0
    about = card(name, results, weights=weights, **options)
    key = digest(about["fingerprint"], data_stamp(benchmark))  # weights, preprocessing, images
    file = f"{safe(benchmark.source or benchmark.name)}.safetensors"
    path = results / "features" / safe(display(name)) / file
    array, held = load_cached(path)
    fresh = array is not None and held.get("key") == key
    if together:  # all extract or none does, whatever each saw on disk
        fresh = all(gather_values(fresh))
    errors = held["errors"] if fresh else []
    if not fresh or array is None:
        if rank == 0:
            warn(f"{display(name)} on {benchmark.name}: {len(benchmark)} images")
        array = extract_features(
            loaded_model(name, weights, **options),
            benchmark.images,
            key=key,
            batch_size=batch_size,
            workers=workers,
            cache=path.with_suffix(".part"),
            errors=errors,
        )
    _refuse_broken(
        array, errors, display(name), benchmark, max_unreadable, told=together and rank == 0
    )
    if not fresh and rank == 0:
        held = {"errors": errors, "key": key, "fingerprint": about["fingerprint"]}
        held |= {"ids": benchmark.ids, "groups": benchmark.groups, "classes": benchmark.classes}
        names = np.frombuffer(json.dumps(held).encode(), np.uint8)
        arrays = {"features": array, "labels": benchmark.labels, "names": names}
        with atomic(path) as temporary:
            # safetensors' own save_file makes files that only their owner reads
            temporary.write_bytes(save(arrays))
        shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
    return array


def _refuse_broken(
    array: ndarray,
    errors: list,
    model: str,
    benchmark: Benchmark,
    max_unreadable: float,
    told: bool,
) -> None:
    """Say which images could not be read; UserError where they are too many or the network gave
    NaN."""
    ids = benchmark.ids
    named = dict(errors)
    lost = np.flatnonzero(~np.isfinite(array).all(1)).tolist()
    many = f"{len(lost)} of {len(array)}"
    if errors and told:
        warn(f"{benchmark.name}: {many} unreadable, {len(named) - len(lost)} partly, first:")
        for i, why in errors[:5]:
            warn(f"  {ids[i]}: {why}")
    broken = sorted(set(lost) - set(named))
    if broken:
        raise UserError(
            f"{model}: {len(broken)} of {len(array)} embeddings on {benchmark.name} are NaN or "
            f"infinite, first {ids[broken[0]]}",
            mend="broken features",
        )
    if len(lost) > max_unreadable * len(array):
        first = lost[0]
        raise UserError(
            f"{benchmark.name}: {many} images cannot be read, first {ids[first]} ({named[first]})",
            mend="unreadable",
        )


def readable_rows(x: ndarray, where: str) -> ndarray:
    """Which rows (N,) of the embeddings x (N, dim) are not those of unreadable images.

    Raises UserError where they do not differ beyond rounding: `where` names model and benchmark.
    """
    least = np.fmin.reduce(x)
    most = np.fmax.reduce(x)
    if not (most - least).max() > 1e-6 * np.maximum(-least, most).max():
        raise UserError(f"{where}: every image has the same embedding")
    return np.isfinite(x.sum(1))


def load_cached(path: Path) -> tuple[ndarray | None, dict]:
    """Features and what is written beside them; (None, {}) if there is no such file or it is
    damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        held = load_file(path)
        return held["features"], json.loads(bytes(held["names"]))
    except FileNotFoundError:
        return None, {}
    except (SafetensorError, KeyError, ValueError) as error:
        warn(f"{path}: damaged ({error}), made again")
        return None, {}


def models_at_hand(given: Sequence[str], runs: Path) -> list[str]:
    """Registry models of which weights are `given` (NAME=FILE) or cached, and the students below
    `runs`.

    Says which models lack.
    """
    named = {spec.split("=", 1)[0] for spec in given if "=" in spec}
    here = []
    missing = []
    for name, entry in REGISTRY.items():
        if name in named or _cached(entry.hub):
            here.append(name)
        else:
            missing.append(f"{name} (huggingface.co/{entry.hub})")
    if missing:
        warn(
            "models whose weights are not here (fetch, or give --weights NAME=FILE): "
            + ", ".join(missing)
        )
    students = sorted(runs.glob("*/student"))
    return here + [str(path) for path in students if (path / "model.safetensors").is_file()]


def origins_of(models: Sequence[str], found: Sequence[Benchmark] = ()) -> dict[str, str]:
    """Where each model and benchmark comes from, by the name under which its results are kept."""
    origins = {f"benchmark {safe(b.name)}": b.origin for b in found}
    for name in models:
        place = str(Path(name).resolve()) if Path(name).exists() else name
        origins[f"model {safe(display(name))}"] = place
    return origins


def check_names(models: Sequence[str]) -> None:
    """UserError if two models would be kept under one name."""
    names: dict[str, str] = {}
    for model in models:
        name = safe(display(model))
        if name in names:
            raise UserError(
                f"models {names[name]} and {model} share the name {name}; rename one of the folders"
            )
        names[name] = model


def report_failures(failures: Sequence[str], lost: dict[str, int]) -> int:
    """Say what is missing, of each benchmark how many images; the exit status."""
    for failure in failures:
        warn(f"error: {failure}")
    for name, missing in lost.items():
        if missing:
            warn(
                f"{name}: {missing} images could not be read and were left out, "
                "which the exit status tells too"
            )
    return int(bool(failures) or any(lost.values()))

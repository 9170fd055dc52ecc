"""TODO."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from g2l.benchmarks import Benchmark
from g2l.errors import PatchError, UserError
from g2l.files import atomic, digest, read_json, safe, stamp, write_text
from g2l.models import Model, fitting_batch_size
from g2l.progress import Progress
from g2l.ranks import rank_and_world

CARD_VERSION = 1  # raised when a model would be loaded, measured or described otherwise
SAVE_SECONDS = 30  # between two saves of finished features


class _Images(torch.utils.data.IterableDataset):
    """Reads items of a source in a data-loader worker and yields them as batches ready for a network.

    Each yield is (items, images, ended): `images` uint8 (m, 3, S, S) of which image j belongs to item items[j], and
    `ended`, the items of which all images have now been yielded, as (item, what could not be read).
    A sequence of patches, such as a slide, is read lazily by one worker and never held as a whole.
    """

    def __init__(self, source: Sequence, todo: list[int], geometry, size: int, batch_size: int):
        super().__init__()
        self.source, self.todo, self.geometry, self.size, self.batch_size = (
            source,
            todo,
            geometry,
            size,
            batch_size,
        )

    def __iter__(self) -> Iterator[tuple[list[int], torch.Tensor, list[tuple[int, list[str]]]]]:
        worker = torch.utils.data.get_worker_info()
        items, images, ended = (
            [],
            torch.empty(self.batch_size, 3, self.size, self.size, dtype=torch.uint8),
            [],
        )
        for i in self.todo[worker.id :: worker.num_workers] if worker else self.todo:
            problems: list[str] = []
            for image in self._read(i, problems):
                images[len(items)] = image
                items.append(i)
                if len(items) == self.batch_size:
                    yield items, images, ended
                    items, images, ended = [], torch.empty_like(images), []
            ended.append((i, problems))
        if ended:
            yield items, images[: len(items)], ended

    def _read(self, i: int, problems: list[str]) -> Iterator[torch.Tensor]:
        unreadable = (PatchError, OSError, ValueError)
        try:
            item = self.source[i]
            single = isinstance(item, np.ndarray) and item.ndim != 4
            parts = 1 if single else len(item)
        except unreadable as error:
            problems.append(str(error) or type(error).__name__)
            return
        if not parts:
            problems.append("holds no images")
        for j in range(parts):
            try:
                image = item if single else item[j]
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(
                        f"expected an RGB image, uint8 (H, W, 3), got {image.dtype} {image.shape}"
                    )
                pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(
                    2, 0, 1
                )[None]
                yield self.geometry(pixels)[0]
            except unreadable as error:
                problems.append(str(error) or type(error).__name__)


def extract_features(
    model: Model,
    source: Sequence,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    cache: Path | None = None,
    key: str = "",
    progress: str = "text",
    errors: list | None = None,
) -> np.ndarray:
    """Embeddings of every item of `source`, in order: float32 (N, dim), on every rank.

    source: source[i] is one RGB image, uint8 (H, W, 3), or a sequence of such (array (n, H, W, 3), list, or any object
        with len() and [j], read one by one), whose embeddings are averaged into one row. With workers > 0 it is
        copied into worker processes.
    batch_size: images per forward pass; None = 32 on CPU, on a GPU what fits its memory, at most 256. Halved when the
        memory runs out all the same.
    cache: folder for finished rows, saved every half minute, from which a second call goes on. Rows count only if
        weights, preprocessing, N and `key` (the caller's, for the data) are the same. The caller deletes the folder
        once it has saved the result.
    progress: "text" shows a bar on a terminal and plain lines elsewhere, on rank 0; "none" nothing.
    errors: receives (i, message) for whatever could not be read, sorted by i. Unreadable is what raises
        tile.PatchError, OSError or ValueError, or is no RGB image. Such a row is NaN; of a sequence, unreadable images
        are left out of the mean, and the row is NaN only if none is left.

    Under torchrun (after setup_distributed) ranks share the items. Batch size, workers and ranks change nothing but the
    last bits: to 1e-5 of a row's norm in fp32, 1e-2 in half precision.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    stamp = f"{model.fingerprint} {len(source)} {key}" if cache else ""
    known = _load_rows(Path(cache), stamp) if cache and rank == 0 else {}
    done = [set(known)]
    if world > 1:
        torch.distributed.broadcast_object_list(done)
    todo = [i for i in range(len(source)) if i not in done[0]][rank::world]
    rows: dict[int, tuple[np.ndarray, list[str]]] = {}
    if todo:
        batch_size = batch_size or fitting_batch_size(model)
        images = _Images(source, todo, model.geometry, model.input_size, min(batch_size, 4096))
        loader = torch.utils.data.DataLoader(
            images, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"
        )
        saved, save_at = set(), time.monotonic() + SAVE_SECONDS
        shown = rank == 0 and progress != "none"
        with Progress(len(source), "image", len(done[0]), shown=shown) as bar:
            for i, row, problems in _embed(model, loader, batch_size, device):
                rows[i] = (row, problems)
                bar.step(world)  # other ranks are taken to be as fast
                if cache and time.monotonic() >= save_at:
                    _save_rows(Path(cache), stamp, {i: rows[i] for i in rows if i not in saved})
                    saved, save_at = set(rows), time.monotonic() + SAVE_SECONDS
        if cache and len(rows) > len(saved):
            _save_rows(Path(cache), stamp, {i: rows[i] for i in rows if i not in saved})
    rows.update(known)
    out = np.zeros((len(source), model.dim), np.float32)
    for i, (row, _) in rows.items():
        out[i] = row
    found = sorted((i, problem) for i, (_, problems) in rows.items() for problem in problems)
    if world > 1:  # each row is one rank's and zero on the others, so the sum is exact
        for part in torch.from_numpy(out).split(65536):
            torch.distributed.all_reduce(part)
        lists: list = [None] * world
        torch.distributed.all_gather_object(lists, found)
        found = sorted(problem for part in lists for problem in part)
    if errors is not None:
        errors.extend(found)
    return out


def _embed(
    model: Model, loader, batch_size: int, device: torch.device
) -> Iterator[tuple[int, np.ndarray, list[str]]]:
    """(item, row, problems) for every item, as its last image comes out of the network."""
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    waiting: tuple | None = None

    def collect(items, features, ended):
        for i, row in zip(
            items, features.double().cpu().numpy(), strict=True
        ):  # waits for the device
            sums[i] = sums[i] + row if i in sums else row
            counts[i] = counts.get(i, 0) + 1
        for i, problems in ended:
            n = counts.pop(i, 0)
            yield (
                i,
                (sums.pop(i) / n).astype(np.float32)
                if n
                else np.full(model.dim, np.nan, np.float32),
                problems,
            )

    def forward(images):
        nonlocal batch_size
        parts, start = [], 0
        while start < len(images):
            part = images[start : start + batch_size]
            pad = (
                batch_size - len(part) if model.compiled else 0
            )  # another shape would be compiled anew
            try:
                x = nn.functional.pad(
                    part.to(device, non_blocking=True).float() / 255, (0, 0, 0, 0, 0, 0, 0, pad)
                )
                parts.append(model(model.normalize(x))[: len(part)])
                start += len(part)
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise UserError(
                        f"{model.name}: not enough memory on {device} for one image; use --device cpu or "
                        "--precision bf16"
                    ) from None
                batch_size = (batch_size + 1) // 2
                print(
                    f"{model.name}: out of memory on {device}, batch size now {batch_size}",
                    file=sys.stderr,
                )
        return torch.cat(parts) if parts else torch.empty(0, model.dim)

    with torch.inference_mode():
        for items, images, ended in loader:
            features = forward(images)  # queued on the GPU while the batch before is collected
            if waiting:
                yield from collect(*waiting)
            waiting = items, features, ended
        if waiting:
            yield from collect(*waiting)


def _load_rows(folder: Path, stamp: str) -> dict[int, tuple[np.ndarray, list[str]]]:
    """Finished rows from an earlier call, by item; other weights' or data's and damaged ones are passed over."""
    import safetensors

    rows = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with (
            contextlib.suppress(safetensors.SafetensorError),
            safetensors.safe_open(path, "numpy") as file,
        ):
            about = file.metadata()
            if about and about.get("stamp") == stamp:
                problems = dict(json.loads(about["problems"]))
                for i, row in zip(
                    file.get_tensor("items").tolist(), file.get_tensor("rows"), strict=True
                ):
                    rows[i] = (row, problems.get(i, []))
    return rows


def _save_rows(folder: Path, stamp: str, rows: dict[int, tuple[np.ndarray, list[str]]]) -> None:
    import safetensors.numpy

    arrays = {
        "items": np.array(list(rows), np.int64),
        "rows": np.stack([row for row, _ in rows.values()]),
    }
    problems = [(i, found) for i, (_, found) in rows.items() if found]
    name = hashlib.sha256(f"{stamp} {sorted(rows)}".encode()).hexdigest()[:16]
    with atomic(folder / f"{name}.safetensors") as path:
        safetensors.numpy.save_file(
            arrays, path, metadata={"stamp": stamp, "problems": json.dumps(problems)}
        )


def data_stamp(benchmark: Benchmark) -> str:
    """Fingerprint of a benchmark's images: ids, and size and time of every file behind them. Labels are not in it."""
    if not hasattr(benchmark, "stamp"):
        files = dict.fromkeys(map(str, getattr(benchmark.images, "files", [])))
        benchmark.stamp = digest(
            benchmark.ids, [stamp(f) for f in files], getattr(benchmark.images, "rule", "")
        )
    return benchmark.stamp


@functools.lru_cache(maxsize=1)  # models come one after another: never two in memory
def loaded_model(name: str, weights: str | None, options: tuple):
    from g2l.models import load_model

    return load_model(name, weights, **dict(options))


def card(name: str, results: Path, *, weights: str | None = None, **options) -> dict:
    """What is known of a model: fingerprint, parameters, dim, input_size, metadata, milliseconds per image.

    Kept in results/features/<model>/model.json, so that a run with nothing new loads no network. A changed weight
    file, option or CARD_VERSION makes it new. Equal networks (a student before and after distillation) are timed once:
    timed twice, the machine's noise would part them.
    """
    options = {k: v for k, v in options.items() if v is not None}
    local = [p for p in (weights, name) if p and Path(p).exists()]
    how = sorted(options.items(), key=str), CARD_VERSION
    key = digest(name, weights, how, [stamp(p) for p in local])
    path = Path(results) / "features" / safe(display(name)) / "model.json"
    known = read_json(path)
    if known.get("key") == key:
        return known
    model = loaded_model(name, weights, tuple(sorted(options.items())))
    network = digest(repr(model.net), model.embedding, model.input_size, model.dtype, how)
    others = [read_json(p) for p in sorted(path.parents[1].glob("*/model.json"))]
    timed = [o["ms_per_image"] for o in others if o.get("network") == network]
    known = {
        "key": key,
        "name": name,
        "display": model.name,
        "fingerprint": model.fingerprint,
        "dim": model.dim,
        "parameters": model.parameters_count,
        "input_size": model.input_size,
        "metadata": model.metadata,
        "embedding": model.embedding,
        "weights": weights or ("its own" if Path(name).exists() else "hub"),
        "network": network,
        "ms_per_image": timed[0] if timed else milliseconds(model),
    }
    write_text(path, json.dumps(known, indent=1, default=str))
    return known


def milliseconds(model) -> float:
    """Median time of one forward pass per image, batch 32 on a GPU and 4 on a CPU, preprocessing not counted."""
    import torch

    device = next(model.parameters()).device
    batch = 32 if device.type == "cuda" else 4
    x = torch.zeros(batch, 3, model.input_size, model.input_size, device=device)
    seconds = []
    with torch.inference_mode():
        while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < 5):
            start = time.perf_counter()
            model(x).float().sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[1:])) / batch  # the first warms up


def display(name: str) -> str:
    """A model's short name: the run's name for runs/NAME/student, else the name itself."""
    path = Path(name)
    return path.parent.name if path.name == "student" and path.parent.name else name


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
    **options,
) -> np.ndarray:
    """Embeddings (N, dim) float32 of one model on one benchmark, extracted once and then read from `results`.

    `weights` and `options` (device, dtype, input_size, compile) go to models.load_model. Rows of unreadable images are
    NaN; more of them than the share `max_unreadable`, or NaN from the network itself, raise UserError.
    Under torchrun every rank calls this and gets the whole array; together=False: one rank alone reads what is there.
    """
    from safetensors.numpy import save_file

    from g2l.ranks import setup_distributed

    rank, world, _ = setup_distributed(options.get("device", "cpu")) if together else (0, 1, None)
    about = card(name, results, weights=weights, **options)
    key = feature_key(about, benchmark)
    path = (
        Path(results)
        / "features"
        / safe(display(name))
        / f"{safe(benchmark.source or benchmark.name)}.safetensors"
    )
    array, names = load_cached(path)
    fresh = names.get("key") == key
    if world > 1:  # all extract or none does, whatever each saw on disk
        import torch.distributed as dist

        seen: list = [None] * world
        dist.all_gather_object(seen, fresh)
        fresh = all(seen)
    errors = names["errors"] if fresh else []
    if not fresh:
        print(
            f"{display(name)} on {benchmark.name}: {len(benchmark)} images", file=sys.stderr
        ) if rank == 0 else None
        array = extract_features(
            loaded_model(name, weights, tuple(sorted(options.items()))),
            benchmark.images,
            key=key,
            batch_size=batch_size,
            workers=workers,
            cache=path.with_suffix(".part"),
            errors=errors,
        )
        array = np.ascontiguousarray(array, dtype=np.float32)
    lost, named = np.flatnonzero(~np.isfinite(array).all(1)), {i for i, _ in errors}
    if errors and rank == 0:
        print(
            f"{benchmark.name}: {len(lost)} of {len(benchmark)} unreadable, {len(named) - len(lost)} partly, first:\n"
            + "\n".join(f"  {benchmark.ids[i]}: {why}" for i, why in errors[:5]),
            file=sys.stderr,
        )
    broken = sorted(set(lost) - named)
    if broken:
        raise UserError(
            f"{display(name)}: {len(broken)} of {len(array)} embeddings on {benchmark.name} are NaN or "
            f"infinite, first {benchmark.ids[broken[0]]}; check the weights (python -m g2l.models NAME --check "
            "FILE), or use --precision fp32"
        )
    if len(lost) > max_unreadable * len(array):
        raise UserError(
            f"{benchmark.name}: {len(lost)} of {len(array)} images cannot be read, first "
            f"{benchmark.ids[lost[0]]} ({dict(errors)[lost[0]]}); mend them, or allow more by "
            "--max-unreadable"
        )
    if not fresh and rank == 0:
        names = json.dumps(
            {
                "ids": benchmark.ids,
                "groups": benchmark.groups,
                "classes": benchmark.classes,
                "errors": errors,
                "key": key,
                "fingerprint": about["fingerprint"],
            }
        )
        with atomic(path) as temporary:
            save_file(
                {
                    "features": array,
                    "labels": benchmark.labels,
                    "names": np.frombuffer(names.encode(), np.uint8),
                },
                temporary,
            )
            temporary.chmod(0o644)  # save_file makes files that only their owner reads
        shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
    return array


def load_cached(path: Path) -> tuple[np.ndarray | None, dict]:
    """Features and what is written beside them; (None, {}) if there is no such file or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        held = load_file(path)
        return held["features"], json.loads(bytes(held["names"]))
    except FileNotFoundError:
        return None, {}
    except (SafetensorError, KeyError, ValueError) as error:
        print(f"{path}: damaged ({error}), made again", file=sys.stderr)
        return None, {}


def feature_key(about: dict, benchmark: Benchmark) -> str:
    """What the features of a model (its card) on a benchmark depend on: weights, preprocessing, images."""
    return digest(about["fingerprint"], data_stamp(benchmark))


def models_at_hand(args: argparse.Namespace) -> list[str]:
    """Registry models whose weights are given or in the hub's cache, and the students of --runs; says what lacks."""
    from huggingface_hub import try_to_load_from_cache

    from g2l.registry import REGISTRY
    from g2l.weights import WEIGHT_FILES

    given = {spec.split("=", 1)[0] for spec in args.weights or () if "=" in spec}
    here = [
        n
        for n, e in REGISTRY.items()
        if n in given
        or any(isinstance(try_to_load_from_cache(e.hub, f), str) for f in WEIGHT_FILES)
    ]
    missing = [f"{n} (huggingface.co/{e.hub})" for n, e in REGISTRY.items() if n not in here]
    if missing:
        print(
            "models whose weights are not here (fetch, or give --weights NAME=FILE): "
            + ", ".join(missing),
            file=sys.stderr,
        )
    return here + [
        str(p) for p in sorted(args.runs.glob("*/student")) if (p / "model.safetensors").is_file()
    ]


def check_names(models: Sequence[str]) -> None:
    """UserError if two models would be kept under one name."""
    for name in models:
        if sum(safe(display(name)) == safe(display(other)) for other in models) > 1:
            raise UserError(
                f"--models: {name} and another share the name {safe(display(name))}; rename one of the "
                "folders"
            )


def report_failures(failures: list[str], lost: dict[str, int]) -> int:
    """Say what is missing, of each benchmark how many images; the exit status."""
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    for name, missing in lost.items():
        print(
            f"{name}: {missing} images could not be read and were left out, "
            "which the exit status tells too",
            file=sys.stderr,
        )
    return int(bool(failures or lost))

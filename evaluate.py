"""Stage 3 of G2L: features of every model on every benchmark, then CKA, kNN and a linear probe: Tables 1, 2, Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...          # images and a labels.csv: image,label,group[,center]

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its majority baseline, and
features are extracted once: results/features holds them, keyed by weights, preprocessing and images.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tile import UserError, atomic

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


# ---------------------------------------------------------------------------------------------- benchmarks

@dataclass
class Benchmark:
    """Labelled images. `images[i]` is one (H, W, 3) uint8 image or a stack of patches whose features are averaged."""

    name: str
    level: str                 # "patch", "region" or "slide"
    images: Sequence           # source for models.extract_features; `images.files` (optional) are watched for changes
    ids: list[str]
    labels: np.ndarray         # (N,) int64 into `classes`
    classes: list[str]
    groups: list[str]          # patient, or the best proxy that the data set gives: never on both sides of a split
    centers: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: np.ndarray) -> Benchmark:
        """The rows where the boolean mask `keep` (N,) holds; classes stay as they are."""
        rows = np.flatnonzero(keep)
        pick = lambda values: [values[i] for i in rows]  # noqa: E731
        return Benchmark(self.name, self.level, Rows(self.images, rows), pick(self.ids), self.labels[rows],
                         self.classes, pick(self.groups), pick(self.centers) if self.centers else None)


class Rows(Sequence):
    """Some rows of another image source, in the given order."""

    def __init__(self, source: Sequence, rows: np.ndarray):
        self.source, self.rows = source, rows
        self.files = [source.files[i] for i in rows] if len(getattr(source, "files", ())) == len(source) else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.source[self.rows[i]]


class ImageFiles(Sequence):
    """Image files as (H, W, 3) uint8 arrays, each read when asked for."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        from PIL import Image
        with Image.open(self.files[i]) as image:
            return np.asarray(image.convert("RGB"))


def load_folder(folder: Path) -> Benchmark:
    """A user's own benchmark: folder/labels.csv with the columns image,label,group[,center], paths relative to it.

    group is the patient (or slide): its images stay on one side of every split. Raises UserError naming file and line.
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    if not table.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise UserError(f"{table}: not found (in {folder}: {found or 'nothing'}); a benchmark folder holds images and "
                        "a labels.csv with the columns image,label,group and, for robustness.py, center")
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [c for c in ("image", "label", "group") if c not in columns]
        if missing:
            raise UserError(f"{table}: no column {', '.join(missing)} (found: {', '.join(columns) or 'none'}); needed "
                            "are image,label,group -- group is the patient, so that none is on both sides of a split")
        rows = []
        for row in reader:
            empty = [c for c in ("image", "label", "group", *(["center"] if "center" in columns else [])) if not row[c]]
            if empty:
                raise UserError(f"{table}, line {reader.line_num}: {empty[0]} is empty; fill it in or remove the line")
            rows.append(row)
    if not rows:
        raise UserError(f"{table}: holds no rows; one line per image is expected")
    ids = [row["image"] for row in rows]
    twice = {name for name, n in zip(*np.unique(ids, return_counts=True), strict=True) if n > 1}
    if twice:
        raise UserError(f"{table}: {len(twice)} images are listed more than once, first {min(twice)}; list each once")
    files = [folder / name for name in ids]
    absent = [f for f in files if not f.is_file()]
    if len(absent) == len(files):
        raise UserError(f"{table}: none of its {len(files)} images exists, first {absent[0]}; "
                        f"paths in the column image are relative to {folder}")
    known = set(files)
    extra = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p not in known]
    if extra:
        print(f"{folder}: {len(extra)} images have no line in labels.csv and are left out, first {extra[0].name}",
              file=sys.stderr)
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows], dtype=np.int64)
    centers = [row["center"] for row in rows] if "center" in columns else None
    return Benchmark(folder.resolve().name, "patch", ImageFiles(files), ids, labels, classes,
                     [row["group"] for row in rows], centers)


# ---------------------------------------------------------------------------------------------- features, once

def safe(name: str) -> str:
    """`name` as a file name: everything but letters, digits, dot, dash and underscore becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.") or "_"


def digest(*parts) -> str:
    """Short hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def stamp(path: Path) -> list:
    """What changes when a file (or a folder of files) changes: names, sizes and times of modification."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [[str(f), s.st_size, s.st_mtime_ns] for f in files if f.is_file() for s in [f.stat()]]


def data_stamp(benchmark: Benchmark) -> str:
    """Fingerprint of a benchmark's images: ids, and size and time of every file behind them. Labels are not in it."""
    files = dict.fromkeys(map(str, getattr(benchmark.images, "files", [])))
    rule = getattr(benchmark.images, "rule", "")
    return digest(benchmark.ids, [stamp(f) for f in files], rule)


@functools.lru_cache(maxsize=1)   # models come one after another: never two in memory
def _load(name: str, weights: str | None, options: tuple):
    from models import load_model
    return load_model(name, weights, **dict(options))


def card(name: str, results: Path, *, weights: str | None = None, **options) -> dict:
    """What is known of a model: fingerprint, parameters, dim, input_size, metadata, milliseconds per image.

    Kept in results/features/<model>/model.json, so that a run with nothing new loads no network. A changed weight
    file, option or models.py makes it new.
    """
    import models
    local = [p for p in (weights, name) if p and Path(p).exists()]
    key = digest(name, weights, sorted(options.items(), key=str), [stamp(p) for p in local],
                 hashlib.sha256(Path(models.__file__).read_bytes()).hexdigest())
    path = Path(results) / "features" / safe(display(name)) / "model.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if known.get("key") == key:
            return known
    model = _load(name, weights, tuple(sorted(options.items())))
    known = {"key": key, "name": name, "display": model.name, "fingerprint": model.fingerprint, "dim": model.dim,
             "parameters": model.parameters_count, "input_size": model.input_size, "metadata": model.metadata,
             "embedding": model.embedding, "weights": weights or "hub"}
    write_text(path, json.dumps(known, indent=1, default=str))
    return known


def display(name: str) -> str:
    """A model's short name: the run's name for runs/NAME/student, else the name itself."""
    path = Path(name)
    return path.parent.name if path.name == "student" and path.parent.name else name


def features(name: str, benchmark: Benchmark, results: Path, *, weights: str | None = None,
             batch_size: int | None = None, workers: int = 0, max_unreadable: float = 0.01, **options) -> np.ndarray:
    """Embeddings (N, dim) float32 of one model on one benchmark, extracted once and then read from `results`.

    `weights` and `options` (device, dtype, input_size, compile) go to models.load_model. Rows of unreadable images are
    NaN; more of them than the share `max_unreadable`, or NaN from the network itself, raise UserError.
    Under torchrun every rank calls this and gets the whole array.
    """
    from safetensors.numpy import load_file, save_file

    from models import extract_features, setup_distributed
    rank, world, _ = setup_distributed(options.get("device", "cpu"))
    model_card = card(name, results, weights=weights, **options)
    key = digest(model_card["fingerprint"], model_card["key"], data_stamp(benchmark))
    path = Path(results) / "features" / safe(display(name)) / f"{safe(benchmark.name)}.safetensors"
    cached = load_file(path) if path.is_file() else {}
    fresh = bool(cached) and bytes(cached["fingerprint"]).decode() == key
    if world > 1:   # one answer for all ranks, whatever each saw on disk
        import torch.distributed as dist
        answer = [fresh]
        dist.broadcast_object_list(answer)
        fresh = answer[0]
    if not fresh:
        model = _load(name, weights, tuple(sorted(options.items())))
        part = path.with_name(f"{path.stem}.{key}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        array = extract_features(model, benchmark.images, batch_size=batch_size, workers=workers, cache=part)
        if rank == 0:
            names = json.dumps({"ids": benchmark.ids, "groups": benchmark.groups, "classes": benchmark.classes})
            with atomic(path) as temporary:
                save_file({"features": np.ascontiguousarray(array, dtype=np.float32), "labels": benchmark.labels,
                           "names": np.frombuffer(names.encode(), np.uint8),
                           "fingerprint": np.frombuffer(key.encode(), np.uint8)}, temporary)
    else:
        array = cached["features"]
    return array


def record(results: Path, rows: list[dict], same: Sequence[str] = ("model", "benchmark", "protocol", "metric", "fold",
                                                                   "seed", "other", "k", "class", "center")) -> None:
    """Put `rows` into results/metrics.jsonl, replacing earlier rows that agree with a new one in all fields of `same`.

    A field that a row lacks counts as None. Whole or not at all, and safe when several processes write.
    """
    results = Path(results)
    results.mkdir(parents=True, exist_ok=True)
    identity = lambda row: tuple(json.dumps(row.get(field)) for field in same)  # noqa: E731
    with open(results / ".metrics.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = {identity(row) for row in rows}
        kept = [row for row in read_metrics(results) if identity(row) not in new]
        write_text(results / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept + rows))


def read_metrics(results: Path) -> list[dict]:
    """All rows of results/metrics.jsonl, oldest first; none if there is no such file."""
    path = Path(results) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")

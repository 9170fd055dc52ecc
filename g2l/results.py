"""The one store of measurements: metrics.jsonl, a row each, and the predictions behind them.

Every row carries the key of all that it depends on. `Study` says what one run compares and how, and
holds the rows that this run measured or found under its own keys: tables and pictures are drawn
from these alone.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from g2l.benchmarks import Benchmark
from g2l.errors import UserError, warn
from g2l.files import atomic, check_unpacked, digest, locked, read_json, write_text

DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error)


@dataclass(frozen=True)
class Study:
    """One comparison of models on benchmarks: its protocols, its results and where they lie."""

    results: Path
    models: list[str]  # as named on the command line, in the order of the tables' columns
    teacher: str | None
    baseline: str | None  # the student before distillation
    cards: dict[str, dict]  # of each model, see features.card
    device_used: str
    k: int  # neighbours that vote
    pca_dims: int
    pca: str  # axes fitted on the training folds ("fold") or on everything ("all")
    folds: int
    seeds: int  # splits of the linear probe
    paper_splits: bool  # measure splits without regard to patients, too
    leaks: str  # images of patients that a student has seen: "exclude" or "mark"
    no_pictures: bool
    protocols: Sequence[str] = ()  # beside the paper's, see field.TITLES
    load: Any = None  # of a model's name the model, where tokens or layers are asked for
    found: list[Benchmark] = field(default_factory=list)  # those measured
    rows: list[dict] = field(default_factory=list)  # of metrics.jsonl, the ones of this very study


def record(
    results: Path,
    rows: list[dict],
    same: Sequence[str] = ("model", "other", "benchmark", "protocol"),
    key: str = "",
) -> list[dict]:
    """Put `rows` into results/metrics.jsonl; returns them as they will be read.

    Earlier rows that agree with a new one in all fields of `same` go: what is measured again is
    replaced as a whole. A field that a row lacks counts as None; NaN becomes null. key: of what the
    rows depend on, see `recorded`. Whole or not at all; safe when several processes write.
    """
    finite = [without_nan(row) for row in rows]
    if key:
        proof = {"key": key, "sum": digest(finite)}
        finite = [row | proof for row in finite]
    new = {tuple(map(row.get, same)) for row in rows}
    with locked(results / ".metrics.lock"):
        kept = [row for row in read_metrics(results) if tuple(map(row.get, same)) not in new]
        text = "".join(json.dumps(row) + "\n" for row in kept + finite)
        write_text(results / "metrics.jsonl", text)
    return finite


def without_nan(row: dict) -> dict:
    """A row with None, which is JSON, in the place of NaN, which is none."""
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}


def read_metrics(results: Path) -> list[dict]:
    """All rows of results/metrics.jsonl, oldest first; none if there is no such file.

    Damaged lines are left out: what they held is measured again. The file as it was is kept beside
    it, and named.
    """
    path = results / "metrics.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    rows = []
    damaged = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        row = parsed(line)
        if row is None:
            damaged.append(str(number))
        else:
            rows.append(row)
    aside = path.with_suffix(".damaged")
    if damaged and (not aside.is_file() or aside.read_bytes() != data):
        with atomic(aside) as temporary:
            temporary.write_bytes(data)
        which = f"line {', '.join(damaged[:5])}"
        warn(f"{path}: damaged in {which}; measured again ({aside.name})")
    return rows


def parsed(line: str) -> dict | None:
    """A row of metrics.jsonl, or None where the line is damaged."""
    try:
        row = json.loads(line)
        number = row["value"] is None or isinstance(row["value"], int | float)
        names = [row[name] for name in ("model", "benchmark", "protocol", "metric")]
    except (ValueError, TypeError, KeyError):
        return None
    return row if number and all(isinstance(name, str) for name in names) else None


def recorded(results: Path, key: str) -> list[dict]:
    """The rows that were recorded under a key, if all of them are there unchanged; else none."""
    rows = [row for row in read_metrics(results) if row.get("key") == key]
    measured = [{k: v for k, v in row.items() if k not in ("key", "sum")} for row in rows]
    return rows if rows and rows[0].get("sum") == digest(measured) else []


def claim(results: Path, origins: dict[str, str]) -> None:
    """Note where each model and benchmark comes from, by the name under which it is kept.

    Raises UserError where results are kept of another one of that name, which would be replaced.
    origins: name -> its folder, or a registry name. A folder that is gone may have been moved.
    """
    path = results / "names.json"
    with locked(results / ".names.lock"):
        known = read_json(path)
        for name, origin in origins.items():
            other = known.get(name, origin)
            if other != origin and (Path(other).exists() or not Path(other).is_absolute()):
                raise UserError(f"{results} holds the {name} of {other}, not {origin}", mend="name")
        write_text(path, json.dumps(known | origins, indent=1))


def save_predictions(path: Path, key: str, predictions: dict[str, np.ndarray]) -> None:
    """Predictions (see `evaluate.predict`) as one .npz file."""
    with atomic(path) as temporary:
        arrays: dict = {"key": f"{key} {sorted(predictions)}", **predictions}
        np.savez_compressed(temporary, **arrays)


def load_predictions(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What `save_predictions` wrote; None if it is not there, damaged, or of another key."""
    if not path.is_file():
        return None
    try:
        check_unpacked(path)
        with np.load(path) as data:  # whose every array has a checksum
            arrays = dict(data)
        about = str(arrays.pop("key"))
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        RuntimeError,
        *DAMAGED,
    ) as error:
        warn(f"{path}: damaged ({error}), made again")
        return None
    return arrays if about == f"{key} {sorted(arrays)}" else None

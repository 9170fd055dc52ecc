"""The one store of measurements: metrics.jsonl, a row each, and the predictions behind them.

`Study` says what one run compares and how; tables and pictures are drawn from it and the store.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g2l.benchmarks import Benchmark
from g2l.errors import UserError
from g2l.files import atomic, locked, write_text


@dataclass(frozen=True)
class Study:
    """One comparison of models on benchmarks, its protocols, and where its results lie."""

    results: Path
    models: list[str]  # as named on the command line, in the order of the tables' columns
    teacher: str | None
    baseline: str | None  # the student before distillation
    found: list[Benchmark]
    cards: dict[str, dict]  # of each model, see features.card
    device_used: str
    argv: list[str]  # the command that is printed with the tables
    k: int  # neighbours that vote
    pca_dims: int
    pca: str  # axes fitted on the training folds ("fold") or on everything ("all")
    folds: int
    seeds: int  # splits of the linear probe
    paper_splits: bool  # measure splits without regard to patients, too
    leaks: str  # images of patients that a student has seen: "exclude" or "mark"
    no_pictures: bool


def record(
    results: Path,
    rows: list[dict],
    same: Sequence[str] = (
        "model",
        "benchmark",
        "protocol",
        "metric",
        "fold",
        "seed",
        "other",
        "k",
        "class",
        "center",
    ),
) -> None:
    """Put `rows` into results/metrics.jsonl, replacing earlier rows that agree with a new one in all fields of `same`.

    A field that a row lacks counts as None; NaN becomes null. Whole or not at all; safe when several processes write.
    """
    results = Path(results)
    results.mkdir(parents=True, exist_ok=True)
    identity = lambda row: tuple(json.dumps(row.get(field)) for field in same)  # noqa: E731
    with locked(results / ".metrics.lock"):
        new = {identity(row) for row in rows}
        kept = [row for row in read_metrics(results) if identity(row) not in new]
        finite = [
            {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
            for row in rows
        ]
        write_text(
            results / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept + finite)
        )


def read_metrics(results: Path) -> list[dict]:
    """All rows of results/metrics.jsonl, oldest first; none if there is no such file."""
    path, rows = Path(results) / "metrics.jsonl", []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1
    ):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: damaged ({error}); remove the line and run again"
            ) from error
    return rows


def save_predictions(path: Path, key: str, p: dict) -> None:
    """Predictions of `predict` as one .npz file."""
    probes = {
        f"{field}_{q['seed']}": q[field] for q in p["probe"] for field in ("test", "scores", "C")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        np.savez_compressed(
            temporary, key=key, knn=p["knn"], neighbors=p["neighbors"].astype(np.int32), **probes
        )


def load_predictions(path: Path, key: str) -> dict | None:
    """What `save_predictions` wrote, or None if it is not there or depends on something else than `key`."""
    try:
        with np.load(path) as data:
            if str(data["key"]) != key:
                return None
            seeds = sorted(int(n[5:]) for n in data if n.startswith("test_"))
            probes = [
                {
                    "seed": s,
                    "C": float(data[f"C_{s}"]),
                    "test": data[f"test_{s}"],
                    "scores": data[f"scores_{s}"],
                }
                for s in seeds
            ]
            return {"knn": data["knn"], "neighbors": data["neighbors"], "probe": probes}
    except (
        FileNotFoundError,
        EOFError,
        KeyError,
        ValueError,
        zipfile.BadZipFile,
    ):  # not there, or damaged
        return None

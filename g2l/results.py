"""TODO."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from g2l.errors import UserError
from g2l.files import atomic, locked, write_text


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

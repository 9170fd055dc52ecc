#!/usr/bin/env python3
"""What evaluate.py costs once the features are there: CPU seconds of each part, and memory.

    python tests/bench_evaluate.py [--rows 80000] [--width 1536] [--models 3] [--classes 2]

Features are made up, with what those of a pathology model have: a falling spectrum, patients
(280) with an offset of their own, and classes that a linear probe tells apart with an AUC of some
0.95. Then all protocols run as `evaluate.py --no-pictures` runs them.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from g2l import evaluation, report
from g2l.benchmarks import Benchmark
from g2l.results import Study

PATIENTS = 280  # of IDC
PARTS = ["make_folds", "blind_rows", "nearest", "linear_probe", "cka_rows", "resampled"]


def make_labels(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Patients (rows,), and classes (rows,) that are not equally frequent in all of them."""
    rng = np.random.default_rng(0)
    patient = np.sort(rng.integers(PATIENTS, size=rows))
    share = rng.dirichlet(np.full(classes, 1.5), PATIENTS).cumsum(1)[patient]
    return patient, (rng.random((rows, 1)) > share[:, :-1]).sum(1)


def make_features(patient: np.ndarray, labels: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Features (rows, width) of one model; all models share the patients' and classes' offsets."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(1)
    scale = np.float32(3 + np.arange(width)) ** np.float32(-0.7)
    offsets = scale * shared.normal(0, 0.6, (PATIENTS, width)).astype(np.float32)
    ways = scale * shared.normal(0, 0.07, (labels.max() + 1, width)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
    x = np.empty((len(labels), width), np.float32)
    for start in range(0, len(labels), 8192):
        part = slice(start, start + 8192)
        own = rng.standard_normal((len(labels[part]), width), np.float32) * scale
        x[part] = (own + offsets[patient[part]] + ways[labels[part]]) @ basis
    return x


def timed(seconds: Counter, name: str, work, *args, **options):
    """What `work` returns; the time of all cores that it took goes to `seconds`, and is told."""
    start = time.process_time()
    result = work(*args, **options)
    took = time.process_time() - start
    seconds[name] += took
    print(f"{name} {took:.1f} s of CPU", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default in {"rows": 80_000, "width": 1536, "models": 3, "classes": 2}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args()
    patient, labels = make_labels(args.rows, args.classes)
    ids, groups = [f"{i}.png" for i in range(args.rows)], [f"p{p}" for p in patient]
    classes = [str(c) for c in range(args.classes)]
    benchmark = Benchmark("made-up", "patch", [], ids, labels, classes, groups)
    names = ["teacher", "student", "baseline", *map(str, range(args.models))][: args.models]
    every = np.ones(args.rows, bool)
    card = {"fingerprint": "", "metadata": {}, "parameters": 1, "ms_per_image": 1.0}
    card |= {"weights": "", "key": ""}
    seconds: Counter = Counter()
    for name in PARTS:
        work = functools.partial(timed, seconds, name, getattr(evaluation, name))
        setattr(evaluation, name, work)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            Path(folder), names, "teacher", "baseline", dict.fromkeys(names, card), "cpu",
            k=15, pca_dims=50, pca="fold", folds=10, seeds=5, paper_splits=False,
            leaks="exclude", no_pictures=True,
        )  # fmt: skip
        for seed, name in enumerate(names):  # in files, as evaluate.py has them
            np.save(f"{folder}/{name}.npy", make_features(patient, labels, args.width, seed))

        def load(name, *_, **options):
            return np.load(f"{folder}/{name}.npy")

        start, used = time.perf_counter(), time.process_time()
        study, _ = evaluation.evaluate_all(
            [benchmark], {benchmark.name: dict.fromkeys(names, every)}, load, study, []
        )
        report.write_tables(study)
        took, used = time.perf_counter() - start, time.process_time() - used
    print(report.summarize(study))
    print("\n".join(f"{name:14} {part:7.1f} s of CPU" for name, part in seconds.items()))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = args.models * args.rows * args.width * 4
    print(
        f"{args.rows} rows: {took:.1f} s, {used:.1f} s of CPU, {most * 1024 / 1e9:.2f} GB at most "
    )
    print(f"(features of all models: {size / 1e9:.2f} GB)")


if __name__ == "__main__":
    main()

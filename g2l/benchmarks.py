"""Labelled images: what a benchmark is, the user's own from a labels.csv, and who has seen it.

`load_folder` reads a user's folder, `make_benchmark` puts together what published.py finds, and
`leaked` tells which rows a student has met in training.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from g2l.cohort import patient_of
from g2l.errors import UserError
from g2l.files import files_below, read_table
from g2l.images import IMAGE_SUFFIXES, ImageFiles, Rows
from g2l.slides import slide_name


@dataclass
class Benchmark:
    """Labelled images.

    `images[i]` is one (H, W, 3) uint8 image, or a stack of patches whose features are averaged.
    """

    name: str
    level: str  # "patch", "region" or "slide"
    images: Sequence  # an ImageSource; its `files` (optional) are watched for changes
    ids: list[str]
    labels: np.ndarray  # (N,) int64 into `classes`
    classes: list[str]
    groups: list[str]  # patient, or the best proxy: never on both sides of a split
    centers: list[str] | None = None
    source: str = ""  # under which name its features are kept, where benchmarks share images
    notes: list[str] = field(default_factory=list)
    origin: str = ""  # the folder it was read from
    # Fingerprint of the images, taken at first use; a copy with other images begins without one.
    stamp: str = field(default="", init=False)

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: np.ndarray) -> Benchmark:
        """The rows where the boolean mask `keep` (N,) holds; classes stay as they are."""
        rows = np.flatnonzero(keep)
        return replace(
            self,
            images=Rows(self.images, rows),
            ids=[self.ids[i] for i in rows],
            labels=self.labels[rows],
            groups=[self.groups[i] for i in rows],
            centers=[self.centers[i] for i in rows] if self.centers else None,
        )


def inside(folder: Path) -> str:
    """The first names in a folder, for an error that tells what is there instead."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"


def load_folder(folder: Path) -> Benchmark:
    """A user's own benchmark: folder/labels.csv with the columns image,label,group[,center].

    Images are paths relative to the folder; group is the patient (or slide), whose images stay on
    one side of every split. Raises UserError naming file and line.
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    if not table.is_file():
        raise UserError(
            f"{table}: not found (in {folder}: {inside(folder)}); a benchmark folder holds images "
            "and a labels.csv with the columns image,label,group and, for robustness.py, center"
        )
    why = " -- group is the patient, so that none is on both sides of a split"
    rows = read_table(table, ("image", "label", "group"), ("center",), why)
    ids = [row["image"] for row in rows]
    classes = sorted({row["label"] for row in rows})
    return Benchmark(
        name=folder.resolve().name,
        level="patch",
        images=ImageFiles(files_of(table, ids)),
        ids=ids,
        labels=np.array([classes.index(row["label"]) for row in rows], dtype=np.int64),
        classes=classes,
        groups=[row["group"] for row in rows],
        centers=[row["center"] for row in rows] if "center" in rows[0] else None,
        origin=str(folder.resolve()),
    )


def files_of(table: Path, ids: list[str]) -> list[Path]:
    """The image files that a labels.csv lists; UserError for one listed twice, or if none exists.

    Images of the folder that it does not list are told.
    """
    folder = table.parent
    files = [Path(os.path.normpath(folder / name)) for name in ids]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        first = ids[files.index(twice[0])]
        raise UserError(
            f"{table}: {len(twice)} images are listed more than once, first {first}; list each once"
        )
    if not any(file.is_file() for file in files):
        raise UserError(
            f"{table}: none of its {len(files)} images exists, first {files[0]}; paths in the "
            f"column image are relative to {folder}"
        )
    known = set(files)
    there = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
    extra = [p for p in there if p not in known]
    if extra:
        print(
            f"{folder}: {len(extra)} images have no line in labels.csv and are left out, first "
            f"{extra[0].name}",
            file=sys.stderr,
        )
    return files


def make_benchmark(
    name: str,
    level: str,
    images: Sequence,
    rows: Sequence[tuple[str, str, str]],
    classes: list[str],
    root: Path,
    notes: Sequence[str] = (),
) -> Benchmark:
    """A Benchmark from rows (id, class, group).

    `root`/patients.csv (group,patient), if there, says which groups are one patient.
    """
    if not rows:
        found = "".join(f"; {note}" for note in notes)
        raise UserError(f"{root}: no labelled images of {name} in it{found}", mend="benchmark data")
    for image, label, _ in rows:
        if label not in classes:
            known = ", ".join(classes)
            raise UserError(f"{root}: {image} is labelled {label}; {name} knows {known}")
    groups = [group for _, _, group in rows]
    table = root / "patients.csv"
    if table.is_file():
        lines = read_table(table, ("group", "patient"))
        patient = {row["group"]: row["patient"] for row in lines}
        lost = sorted(set(groups) - set(patient))
        if lost:
            raise UserError(
                f"{table}: no patient for {len(lost)} groups, first {lost[0]}; add them"
            )
        groups = [patient[group] for group in groups]
    labels = np.array([classes.index(label) for _, label, _ in rows], np.int64)
    ids = [image for image, _, _ in rows]
    made = Benchmark(name, level, images, ids, labels, classes, groups, notes=list(notes))
    made.origin = str(root.resolve())
    return made


def cohort_of(about: dict) -> set[str]:
    """Patients and slides that a model (its card) was distilled on, in capitals."""
    names: set[str] = set()
    for kind in ("patients", "slides"):
        names.update(str(name).upper() for name in about["metadata"].get(kind) or ())
    return names - {""}


def leaked(benchmark: Benchmark, about: dict) -> np.ndarray:
    """Rows (N,) of patients or slides that were in the cohort of a student (its card).

    Compared are the group, its patient by tile.py's rule, and the names along the image's path. Of
    those only what has a letter and a digit: 12.png or tumour/a.png says nothing of a patient 12 or
    of a slide tumour.
    """
    cohort = cohort_of(about)
    starts = {name[0] for name in cohort}
    telling = re.compile(r"(?=.*[A-Z]).*\d")

    @functools.cache  # folders and groups come again and again
    def met(name: str) -> set[str]:
        # spares 300,000 names the slow way
        if name[:1].upper() not in starts and "TCGA" not in name.upper():
            return set()
        return {part.upper() for part in (name, slide_name(name), patient_of(name))} & cohort

    found = np.zeros(len(benchmark), bool)
    for i, name in enumerate(benchmark.ids):
        hits = set().union(*map(met, name.split("/")))
        found[i] = bool(met(benchmark.groups[i])) or any(map(telling.match, hits))
    return found

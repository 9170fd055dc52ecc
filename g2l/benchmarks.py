"""TODO."""

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
    """Labelled images. `images[i]` is one (H, W, 3) uint8 image or a stack of patches whose features are averaged."""

    name: str
    level: str  # "patch", "region" or "slide"
    images: Sequence  # source for models.extract_features; `images.files` (optional) are watched for changes
    ids: list[str]
    labels: np.ndarray  # (N,) int64 into `classes`
    classes: list[str]
    groups: list[
        str
    ]  # patient, or the best proxy that the data set gives: never on both sides of a split
    centers: list[str] | None = None
    source: str = ""  # under which name its features are kept, where benchmarks share images
    notes: list[str] = field(default_factory=list)
    # Fingerprint of the images, taken at first use; a copy with other images begins without one.
    stamp: str = field(default="", init=False)

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: np.ndarray) -> Benchmark:
        """The rows where the boolean mask `keep` (N,) holds; classes stay as they are."""
        rows = np.flatnonzero(keep)
        pick = lambda values: [values[i] for i in rows]  # noqa: E731
        return replace(
            self,
            images=Rows(self.images, rows),
            ids=pick(self.ids),
            labels=self.labels[rows],
            groups=pick(self.groups),
            centers=pick(self.centers) if self.centers else None,
        )


def load_folder(folder: Path) -> Benchmark:
    """A user's own benchmark: folder/labels.csv with the columns image,label,group[,center], paths relative to it.

    group is the patient (or slide): its images stay on one side of every split. Raises UserError naming file and line.
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    if not table.is_file():
        found = (
            ", ".join(sorted(p.name for p in folder.iterdir())[:5])
            if folder.is_dir()
            else "no such folder"
        )
        raise UserError(
            f"{table}: not found (in {folder}: {found or 'nothing'}); a benchmark folder holds images and "
            "a labels.csv with the columns image,label,group and, for robustness.py, center"
        )
    rows = read_table(
        table,
        ("image", "label", "group"),
        ("center",),
        " -- group is the patient, so that none is on both sides of a split",
    )
    ids = [row["image"] for row in rows]
    files = [Path(os.path.normpath(folder / name)) for name in ids]
    twice = [file for file, n in Counter(files).items() if n > 1]
    if twice:
        raise UserError(
            f"{table}: {len(twice)} images are listed more than once, first {ids[files.index(twice[0])]}; "
            "list each once"
        )
    absent = [f for f in files if not f.is_file()]
    if len(absent) == len(files):
        raise UserError(
            f"{table}: none of its {len(files)} images exists, first {absent[0]}; "
            f"paths in the column image are relative to {folder}"
        )
    known = set(files)
    extra = [
        p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES and p not in known
    ]
    if extra:
        print(
            f"{folder}: {len(extra)} images have no line in labels.csv and are left out, first {extra[0].name}",
            file=sys.stderr,
        )
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows], dtype=np.int64)
    centers = [row["center"] for row in rows] if "center" in rows[0] else None
    return Benchmark(
        folder.resolve().name,
        "patch",
        ImageFiles(files),
        ids,
        labels,
        classes,
        [row["group"] for row in rows],
        centers,
    )


def make_benchmark(
    name: str,
    level: str,
    images: Sequence,
    rows: list[tuple[str, str, str]],
    classes: Sequence[str],
    root: Path,
    notes: Sequence[str] = (),
    source: str = "",
) -> Benchmark:
    """A Benchmark from rows (id, class, group). `root`/patients.csv (group,patient), if there, refines the groups."""
    if not rows:
        raise UserError(
            f"{root}: no labelled images of {name} in it{''.join(f'; {note}' for note in notes)}; `python "
            "evaluate.py --list` says where to get it; unpack the archive below this folder as it comes"
        )
    ids, labels, groups = map(list, zip(*rows, strict=True))
    strange = [i for i, y in zip(ids, labels, strict=True) if y not in classes]
    if strange:
        raise UserError(
            f"{root}: {strange[0]} is labelled {labels[ids.index(strange[0])]}; {name} knows "
            f"{', '.join(classes)}"
        )
    if (root / "patients.csv").is_file():
        patient = {
            row["group"]: row["patient"]
            for row in read_table(root / "patients.csv", ("group", "patient"))
        }
        lost = sorted(set(groups) - set(patient))
        if lost:
            raise UserError(
                f"{root / 'patients.csv'}: no patient for {len(lost)} groups, first {lost[0]}; add them"
            )
        groups = [patient[g] for g in groups]
    return Benchmark(
        name,
        level,
        images,
        ids,
        np.array([list(classes).index(y) for y in labels], np.int64),
        list(classes),
        groups,
        None,
        source,
        list(notes),
    )


def leaked(benchmark: Benchmark, about: dict) -> np.ndarray:
    """Rows (N,) of patients or slides that were in the cohort a student was distilled on; none for other models.

    Compared are the group, its patient by tile.py's rule, and the names along the image's path. Of those only what has
    a letter and a digit: 12.png or tumour/a.png says nothing of a patient 12 or of a slide tumour.
    """
    cohort = (
        name for field in ("patients", "slides") for name in about["metadata"].get(field) or ()
    )
    known = {str(name).upper() for name in cohort} - {""}
    starts, telling = {name[0] for name in known}, re.compile(r"(?=.*[A-Z]).*\d")

    @functools.cache  # folders and groups come again and again
    def seen(name: str, of_image: bool) -> bool:
        if (
            name[:1].upper() not in starts and "TCGA" not in name.upper()
        ):  # spares 300,000 names the slow way
            return False
        hits = {part.upper() for part in (name, slide_name(name), patient_of(name))} & known
        return any(telling.match(hit) for hit in hits) if of_image else bool(hits)

    return np.array(
        [
            seen(group, False) or any(seen(part, True) for part in name.split("/"))
            for group, name in zip(benchmark.groups, benchmark.ids, strict=True)
        ],
        bool,
    )

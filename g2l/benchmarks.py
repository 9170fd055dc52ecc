"""Labelled images: what a benchmark is, the user's own from a labels.csv, and who has seen it.

`load_folder` reads a user's folder, `make_benchmark` puts together what published.py finds, and
`leaked` tells which rows a student has met in training.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.arguments import in_group
from g2l.cohort import hashed, hashed_cohort, patient_of
from g2l.errors import UserError, warn
from g2l.files import files_below, read_json, read_table
from g2l.images import IMAGE_SUFFIXES, REGION, ImageFiles, ImageSource, Rows, read_mask
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
    labels: ndarray  # (N,) int64 into `classes`
    classes: list[str]
    groups: list[str]  # patient, or the best proxy: never on both sides of a split
    centers: list[str] | None = None
    source: str = ""  # under which name its features are kept, where benchmarks share images
    masks: Sequence = ()  # of each image a map (H, W) of classes of tissue, below 0 where none
    notes: list[str] = field(default_factory=list)
    origin: str = ""  # the folder it was read from
    unit: str = ""  # what a group is: patient, slide, ...
    mpp: str = ""  # µm per pixel, where it is not the published one
    slides: Sequence = ()  # each as tile.py has cut it, where it has
    survival: ndarray | None = None  # (N, 2): time followed, and whether the event came
    # Fingerprint of the images, taken at first use; a copy with other images begins without one.
    stamp: str = field(default="", init=False)

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, keep: ndarray) -> Benchmark:
        """The rows where the boolean mask `keep` (N,) holds; classes stay as they are."""
        rows = np.flatnonzero(keep)
        return replace(
            self,
            images=Rows(self.images, rows),
            masks=Rows(self.masks, rows) if len(self.masks) else (),
            ids=[self.ids[i] for i in rows],
            labels=self.labels[rows],
            groups=[self.groups[i] for i in rows],
            centers=[self.centers[i] for i in rows] if self.centers else None,
            slides=[self.slides[int(i)] for i in rows] if self.slides else (),
            survival=None if self.survival is None else self.survival[rows],
        )


@dataclass(frozen=True)
class Choices:
    """What a user may choose of the benchmarks; defaults are the published ones."""

    data: Path = Path("data")
    cancer: Sequence[str] = ()  # cohorts of tile.py below data/tiles
    slides_table: Sequence[Path] = ()  # the user's own labels of slides
    draw: int = 0  # so many slides of a benchmark; 0: all
    seed: int = 0
    results: Path = Path("results")  # where the list of those drawn goes
    seen: Set[str] = frozenset()  # patients and slides that are not drawn
    region_size: int = REGION  # px, side of the patches of a region
    keep_13412: bool = False  # the patient of BreaKHis with two labels
    remedies: Mapping[str, str] = field(default_factory=dict)  # of the command, see errors.explain


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of Choices; `choices_of` reads them."""
    add = in_group(parser, "slides and regions of benchmarks")
    add(
        "--cancer NAME",
        "take the patches of slides, and features by embed.py, from these cohorts of tile.py",
        [],
        nargs="+",
    )
    add(
        "--slides-table FILE",
        "your own slides, in --cancer: slide_id,label[,patient] or patient,label",
        [],
        nargs="+",
    )
    add(
        "--draw N",
        "a random sample of so many slides (the paper: 511 for tp53), without the patients of "
        "students; written to RESULTS/NAME-drawn.csv, and without models nothing else is done",
        0,
    )
    add("--seed SEED", "of --draw", 0)
    add(
        "--region-size PX",
        "side of the patches that regions (bracs, breakhis) are cut into",
        REGION,
    )
    add("--keep-13412", "keep patient 13412 of breakhis, labelled DC and LC: all 7,909 images")


def choices_of(
    args: argparse.Namespace, models: Sequence[str], remedies: Mapping[str, str]
) -> Choices:
    """What the flags say; patients that students among the models have seen are not drawn."""
    flags = {name: value for name, value in vars(args).items() if hasattr(Choices, name)}
    seen = set()
    for name in models:
        seen |= cohort_of({"metadata": read_json(Path(name) / "config.json").get("g2l", {})})
    return Choices(**flags, seen=seen, remedies=remedies)


def told(count: int, what: str) -> list[str]:
    """A note on `count` things, if there are any."""
    return [f"{count} {what}"] if count else []


def inside(folder: Path) -> str:
    """The first names in a folder, for an error that tells what is there instead."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"


def load_folder(folder: Path) -> Benchmark:
    """A user's own benchmark: folder/labels.csv with the columns image,label,group[,center][,mask].

    Images and masks are paths relative to the folder; group is the patient (or slide), whose images
    stay on one side of every split. Raises UserError naming file and line.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise UserError(
            f"{table}: not found (in {folder}: {inside(folder)}); a benchmark folder holds images "
            "and a labels.csv with the columns image,label,group and, for robustness.py, center"
        )
    rows = read_table(
        table,
        ("image", "label", "group"),
        ("center", "mask"),
        " -- group is the patient, so that none is on both sides of a split",
    )
    ids = [row["image"] for row in rows]
    classes = sorted({row["label"] for row in rows})
    images = ImageFiles(files_of(table, ids, [row.get("mask", "") for row in rows]))
    labelled = [(row["image"], row["label"], row["group"]) for row in rows]
    made = make_benchmark(folder.resolve().name, "patch", images, labelled, classes, table)
    if "center" in rows[0]:
        made.centers = [row["center"] for row in rows]
    if "mask" in rows[0]:
        masks = [folder / row["mask"] for row in rows]
        made.masks = ImageSource(masks, read_mask, masks)
    made.origin = str(folder.resolve())
    return made


def files_of(table: Path, ids: list[str], masks: list[str]) -> list[Path]:
    """The image files that a labels.csv lists; UserError for one listed twice, or if none exists.

    Images of the folder that it lists neither so nor as masks are told.
    """
    folder = table.parent
    files = [Path(os.path.normpath(folder / name)) for name in ids]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(
            f"{table}: {len(twice)} images are listed more than once, first "
            f"{ids[files.index(twice[0])]}; list each once"
        )
    if not any(file.is_file() for file in files):
        raise UserError(
            f"{table}: none of its {len(files)} images exists, first {files[0]}; paths in the "
            f"column image are relative to {folder}"
        )
    known = {*files, *(Path(os.path.normpath(folder / mask)) for mask in masks)}
    there = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
    extra = [p for p in there if p not in known]
    if extra:
        warn(
            f"{folder}: {len(extra)} images have no line in labels.csv and are left out, first "
            f"{extra[0].name}"
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
    patients: Mapping[str, str] | None = None,
) -> Benchmark:
    """A Benchmark from rows (id, class, group).

    patients: of each group, where one may have several; `root`/patients.csv (group,patient) says so
    too.
    """
    if not rows:
        found = "".join(f"; {note}" for note in notes)
        raise UserError(f"{root}: no labelled images of {name} in it{found}", mend="benchmark data")
    for image, label, _ in rows:
        if label not in classes:
            known = f"{name} knows {', '.join(classes)}"
            raise UserError(f"{root}: {image} is labelled {label}; {known}")
    table = root / "patients.csv"
    if table.is_file():
        lines = read_table(table, ("group", "patient"))
        patients = {row["group"]: row["patient"] for row in lines}
    ids, kinds, groups = map(list, zip(*rows, strict=True))
    if patients:
        lost = sorted(set(groups) - set(patients))
        if lost:
            raise UserError(
                f"{root}: its table of patients has no patient for {len(lost)} groups, first "
                f"{lost[0]}; add them"
            )
        groups = [patients[group] for group in groups]
    return Benchmark(
        name,
        level,
        images,
        ids,
        np.array([classes.index(kind) for kind in kinds], np.int64),
        classes,
        groups,
        notes=list(notes),
        origin=str(root.resolve()),
        unit="patient" if patients else "",
    )


def cohort_of(about: dict) -> set[str]:
    """Patients and slides that a model (its card) was distilled on, and every student that it was
    made from, hashed.
    """
    told = about["metadata"]
    names: set[str] = set()
    for student in (told, *told.get("earlier", ())):
        names.update(hashed_cohort(student, "patients"), hashed_cohort(student, "slides"))
    return names


def leaked(benchmark: Benchmark, about: dict) -> ndarray:
    """Rows (N,) of patients or slides that were in the cohort of a student (its card).

    Compared are the group, its patient by tile.py's rule, and the names along the image's path. Of
    those only what has a letter and a digit: 12.png or tumour/a.png says nothing of a patient 12 or
    of a slide tumour.
    """
    cohort = cohort_of(about)
    if not cohort:
        return np.zeros(len(benchmark), bool)
    telling = re.compile(r"(?=.*[A-Z]).*\d")

    @functools.cache  # folders and groups come again and again
    def met(name: str) -> set[str]:
        names = {part.upper() for part in (name, slide_name(name), patient_of(name))}
        return {name for name in names if hashed(name) in cohort}

    found = np.zeros(len(benchmark), bool)
    for i, name in enumerate(benchmark.ids):
        hits = set().union(*map(met, name.split("/")))
        found[i] = bool(met(benchmark.groups[i])) or any(map(telling.match, hits))
    return found

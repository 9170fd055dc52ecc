"""Labelled slides: a table says what they are, and their patches come from one of two places.

`read_labels` reads the table. `slide_benchmark` joins it with slides: those of which tile.py has
made patches, by whatever rules (`TiledSlides`; features that embed.py has computed are taken as
they are), or slide files of 0.25 µm per pixel whose tissue is looked for when it is needed. Which
labelled slides cannot be used, and why, is told before anything is computed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from g2l.benchmarks import Benchmark, Choices, make_benchmark, told
from g2l.cohort import patient_of
from g2l.errors import SkippedSlide, UserError, explain, rank_of_torchrun, warn
from g2l.files import digest, read_table, stamp, write_table
from g2l.grid import choose_size
from g2l.images import MPP, PATCH, ImageSource, SlidePatches, open_slide
from g2l.patches import PatchIndex
from g2l.rows import read_rows
from g2l.slides import slide_name

if TYPE_CHECKING:
    from g2l.embeddings import SlideFeatures
    from g2l.models import Model


Slides = dict[str, tuple[str, Any]]  # patient and patches of each, or its file
Lost = dict[str, str]  # why others cannot be used


def short_name(name: str) -> str:
    """A slide's name as tables give it: of TCGA without the UUID of the file."""
    name = slide_name(name)
    return name.split(".")[0] if name.upper().startswith("TCGA-") else name


@dataclass
class Labels:
    """The class of each slide or, where `by` is "patient", of each patient; whose slides are."""

    by: str = "slide_id"
    classes: dict[str, str] = field(default_factory=dict)
    # how long each was followed, and whether the event came
    survival: dict[str, tuple[float, float]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)  # of slides, where the table says

    def key(self, slide: str, patient: str) -> str:
        """Under what a slide stands in `classes`, if it does."""
        return slide if self.by == "slide_id" else patient

    def followed(self, slides: Slides, names: list[str]) -> np.ndarray | None:
        """Time and event (N, 2) of slides, NaN where they are not known; None where none is."""
        if not self.survival:
            return None
        keys = [self.key(name, slides[name][0]) for name in names]
        return np.array([self.survival.get(key, (np.nan, np.nan)) for key in keys])

    def join(self, slides: Slides) -> list[tuple[str, str, str]]:
        """(slide, class, patient) of those that have a label, in the order of the table."""
        rows = []
        for slide, (patient, _) in slides.items():
            key = self.key(slide, patient)
            if key in self.classes:
                rows.append((slide, self.classes[key], self.patients.get(slide) or patient))
        order = list(self.patients)
        return sorted(rows, key=lambda row: order.index(row[0])) if order else rows


EVENTS = {0.0: "no event", 1.0: "event"}


def read_labels(table: Path, words: dict[str, str]) -> Labels:
    """Labels of a table slide_id,label[,patient], or patient,label; with or without time,event.

    words: what a label stands for, in whatever case; others are classes themselves. Without labels
    they say whether the event came. Raises UserError where the table lacks a column, or contradicts
    itself.
    """
    rows = read_table(table, (), ("slide_id", "label"))
    by = "slide_id" if "slide_id" in rows[0] else "patient"
    labels = Labels(by)
    if by not in rows[0] or not rows[0].keys() & {"label", "time"}:
        raise UserError(
            f"{table}: needed are the columns slide_id or patient, and label or time and event; "
            f"found: {', '.join(rows[0])}"
        )
    for row in rows:
        patient = row.get("patient", "")
        if patient.upper().startswith("TCGA-"):  # the barcode of a sample
            patient = patient_of(patient)
        name = patient
        if by == "slide_id":
            name = short_name(row["slide_id"])
            labels.patients[name] = patient
        label = row.get("label", "")
        if row.get("time") or "label" not in row:
            known = followed(f"{table}: {name}", row.get("time"), row.get("event"))
            label = label or EVENTS[known[1]]
            labels.survival[name] = known
        label = words.get(label.lower(), label)
        if labels.classes.setdefault(name, label) != label:
            raise UserError(f"{table}: {name} is labelled {labels.classes[name]} and {label}")
    return labels


def followed(who: str, time: object, event: object) -> tuple[float, float]:
    """Time and event as numbers; UserError where they are none."""
    with contextlib.suppress(ValueError):
        known = float(str(time)), float(str(event))
        if known[0] >= 0 and known[1] in EVENTS:
            return known
    raise UserError(f"{who} has time {time} and event {event}; a number, and 1 or 0 are expected")


@dataclass
class TiledSlide(Sequence[Any]):
    """The patches that tile.py has made of a slide, each read when asked for."""

    patches: PatchIndex
    number: int  # of the slide

    def __len__(self) -> int:
        return int(self.patches.counts[self.number])

    def __getitem__(self, j: Any) -> Any:
        start = int(self.patches.starts[self.number])
        return self.patches.read(range(start, start + len(self))[j])

    def file(self, folder: str, ending: str) -> Path:
        """What is kept of the slide in a folder of the cohort."""
        return self.patches.folder / folder / f"{self.patches.slides[self.number]}{ending}"

    def embedded(
        self, name: str, fingerprint: str, preprocessing: str, stored: str
    ) -> SlideFeatures | None:
        """What embed.py has computed from these patches by this very model, if it has."""
        from g2l.embeddings import Coordinates, Origin, SlideFeatures

        where = Coordinates.read(self.file("patches", "_patches.h5"))
        origin = Origin(name, fingerprint, preprocessing, where.key, stored)
        for folder in self.patches.folder.glob("features_*/"):
            held = SlideFeatures(folder, self.patches.slides[self.number], origin, where)
            if held.state() == "done":
                return held
        return None


class TiledSlides(ImageSource):
    """Slides as tile.py has cut them; their thumbnails stand for them in pictures."""

    def __init__(self, slides: Sequence[TiledSlide]):
        self.items = slides
        self.files = [slide.file("thumbnails", ".jpg") for slide in slides]
        tables = [stamp(slide.file("patches", "_patches.h5")) for slide in slides]
        self.rule = f"tiles {digest(tables)}"

    def __getitem__(self, i: Any) -> TiledSlide:
        return self.items[i]

    def embedded(self, model: Model) -> dict[int, tuple[np.ndarray, list[str]]]:
        """The mean (dim,) of a slide's features, by its row, where embed.py has computed them from
        these patches by this very model; and what it could not read.
        """
        from g2l.embeddings import preprocessing_of, read_features

        held = embedded(self, (model.name, model.fingerprint, preprocessing_of(model)))
        rows = {}
        for i, features in enumerate(held):
            if features:
                mean = read_features(features.path)[0].mean(0, dtype=np.float64)
                lost = told(features.unreadable(), "patches could not be read")
                rows[i] = mean.astype(np.float32), lost
        return rows


def embedded(
    slides: Sequence[TiledSlide], model: tuple[str, str, str]
) -> list[SlideFeatures | None]:
    """Of each slide what embed.py has computed in fp32 by a model (name, fingerprint and
    preprocessing), if it has; says where there is fp16 alone, which is too coarse to stand for it.
    """
    held = [slide.embedded(*model, "float32") for slide in slides]
    lacking = [slide for slide, known in zip(slides, held, strict=True) if not known]
    coarse = sum(slide.embedded(*model, "float16") is not None for slide in lacking)
    if coarse:
        warn(f"{model[0]}: the features of {coarse} slides are there in fp16, and not taken")
    return held


def bags_of(benchmark: Benchmark, about: dict) -> list[Path]:
    """The features of each slide's patches by a model (its card); none where any slide lacks
    them.
    """
    model = about["display"], about["fingerprint"], about["preprocessing"]
    held = embedded(benchmark.slides, model)
    return [found.path for found in held if found] if all(held) else []


def tiled_slides(choices: Choices) -> tuple[Slides, Lost]:
    """The slides of the cohorts of which tile.py has made patches."""
    slides: Slides = {}
    lost = {}
    for cancer in choices.cancer:
        index = PatchIndex(choices.data / "tiles" / cancer)
        for name, row in read_rows(index.folder).items():
            lost[short_name(name)] = f"tile.py says {row['reason'] or 'no patches'}"
        for number, name in enumerate(index.slides):
            slides[short_name(name)] = (
                index.patient[number],
                TiledSlide(index, number),
            )
    return slides, lost


def slide_files(files: Sequence[Path], choices: Choices) -> tuple[Slides, Lost]:
    """Slide files of the magnification wanted; what cannot be opened will count as unreadable."""
    slides: Slides = {}
    lost = {}
    for path in files:
        name = short_name(path.name)
        try:
            with open_slide(path) as slide:
                choose_size(slide, MPP, PATCH, resample=False)
        except SkippedSlide as error:
            lost[name] = explain(error, choices.remedies) or ""
            continue
        except OSError:
            pass
        slides[name] = patient_of(name), path
    return slides, lost


def slide_benchmark(
    name: str,
    labels: Labels,
    files: Sequence[Path],
    classes: list[str],
    root: Path,
    choices: Choices,
    notes: Sequence[str] = (),
) -> Benchmark:
    """A benchmark of whole slides, grouped by patient: patches of tile.py's cohorts where these
    hold any of its slides, else of `files`.
    """
    slides, lost = tiled_slides(choices)
    rows = labels.join(slides)
    tiled = bool(rows)
    if not tiled:
        slides, lost = slide_files(files, choices)
        rows = labels.join(slides)
    notes = [*notes, *what_lacks(labels, slides, lost)]
    if choices.cancer and not tiled:
        notes.append(f"none of its slides is in {', '.join(choices.cancer)}")
    if choices.draw:
        rows, note = drawn(name, rows, choices)
        notes.append(note)
    if notes and rank_of_torchrun() == 0:
        warn(f"{name}: {'; '.join(notes)}")
    items = [slides[slide][1] for slide, _, _ in rows]
    images = TiledSlides(items) if tiled else SlidePatches(items)
    benchmark = make_benchmark(name, "slide", images, rows, classes, root, notes)
    benchmark.unit = "patient"
    if tiled:
        benchmark.mpp = f"{items[0].patches.mpp:g}"
        benchmark.slides = items
    benchmark.survival = labels.followed(slides, [slide for slide, _, _ in rows])
    return benchmark


def what_lacks(labels: Labels, slides: Slides, lost: Lost) -> list[str]:
    """Notes on labels and slides without each other, and on slides that cannot be used."""
    reasons: Counter = Counter()
    unlabelled = 0
    missing = set(labels.classes)
    for slide in {**lost, **slides}:
        key = labels.key(slide, slides[slide][0] if slide in slides else patient_of(slide))
        missing.discard(key)
        if key in labels.classes and slide not in slides:
            reasons[lost[slide]] += 1
        unlabelled += key not in labels.classes
    what = "labels without a slide" if labels.by == "slide_id" else "patients without slides"
    notes = told(len(missing), what) + told(unlabelled, "slides without a label left out")
    for reason, count in reasons.most_common():
        notes += told(count, f"labelled slides left out: {reason}")
    return notes


def drawn(name: str, rows: list[tuple], choices: Choices) -> tuple[list[tuple], str]:
    """A seeded sample of rows (slide, class, patient) without patients and slides that a student
    has seen, and a note; the list is written beside the results.
    """
    free = [row for row in rows if not {row[0].upper(), row[2].upper()} & choices.seen]
    # by a hash, so that a slide more or less does not change who else is drawn
    free.sort(key=lambda row: digest(choices.seed, row[0]))
    kept = free[: choices.draw]
    path = choices.results / f"{name}-drawn.csv"
    write_table(path, [("slide_id", "label", "patient"), *sorted(kept)])
    note = (
        f"{len(kept)} of {len(rows)} slides drawn by seed {choices.seed}, {len(rows) - len(free)} "
        f"of patients that a student has seen held out: {path}"
    )
    return [row for row in rows if row in kept], note


def load_slides_table(table: Path, choices: Choices) -> Benchmark:
    """A user's own slides: a table slide_id,label[,patient] or patient,label, and cohorts of
    tile.py that hold them.
    """
    if not choices.cancer:
        raise UserError(f"{table}: in which cohort its slides are is not said", mend="cohort")
    labels = read_labels(table, {})
    classes = sorted(set(labels.classes.values()))
    made = slide_benchmark(table.stem, labels, [], classes, table, choices)
    made.notes.insert(0, f"groups are patients; µm per pixel: {made.mpp}")
    return made

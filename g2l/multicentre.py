"""TODO."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from g2l.benchmarks import Benchmark, load_folder
from g2l.errors import UserError
from g2l.files import files_below, read_table
from g2l.images import IMAGE_SUFFIXES, ImageFiles, ImageSource, read_image
from g2l.published import tiger_source

TIGER_CLASSES = {
    1: "invasive tumour",
    3: "in-situ tumour",
    2: "tumour stroma",
    6: "inflamed stroma",
    5: "necrosis",
}


decoded = lru_cache(maxsize=2)(
    read_image
)  # patches come ordered by file, so each file is decoded once


def cut_out(patch: tuple[Path, int, int], size: int) -> np.ndarray:
    """The square of `size` px whose top-left corner is x, y of (path, x, y)."""
    path, x, y = patch
    return decoded(path)[y : y + size, x : x + size]


def tiger_origin(slide: str) -> tuple[str, str]:
    """(patient, centre) from the name of a TIGER slide: TCGA barcode, Radboudumc or Jules Bordet; else UserError."""
    if match := re.match(r"(TCGA-(\w\w)-\w{4})", slide):
        return match[1], f"TCGA-{match[2]}"  # the tissue source site
    if match := re.match(r"(TC_S01_P\d+)", slide):
        return match[1], "RUMC"
    if match := re.match(r"(\d+)[BS]", slide):  # biopsy and surgical specimen of one patient
        return f"JB-{match[1]}", "JB"
    raise UserError(
        f"{slide}: no name of a TIGER slide; expected TCGA-XX-..., TC_S01_P... or digits with B or S"
    )


def load_tiger(folder: Path, size: int, min_fraction: float) -> tuple[Benchmark, list[str]]:
    """Patches of TIGER's five tissue classes, and the slide of each, from `wsirois` as it unpacks.

    Region images are cut into a grid of `size` px (0.5 µm each); a patch belongs to the class that covers at least
    `min_fraction` of it. Regions of tissue-cells that overlap one of tissue-bcss are passed over.
    """
    from PIL import Image

    values, patches, labels, slides, boxes = np.array(list(TIGER_CLASSES)), [], [], [], {}
    passed: dict[str, list[Path]] = {
        "have no mask": [],
        "or their masks cannot be read, or differ in size": [],
        f"are smaller than {size} px (--patch-size)": [],
    }
    no_mask, unreadable, small = passed.values()
    below = {path: path.relative_to(folder).parts[-3:] for path in files_below(folder)}
    found = {
        place: path
        for path, place in below.items()
        if path.suffix.lower() == ".png"  # a copy counts once
        and place[:2] in (("tissue-bcss", "images"), ("tissue-cells", "images"))
    }
    if not found:
        raise UserError(
            f"{folder}: holds neither labels.csv, PathoROB's metadata nor TIGER's roi-level-annotations "
            f"(tissue-bcss or tissue-cells); get TIGER by {tiger_source(folder)}"
        )
    for (kind, *_), path in sorted(found.items()):
        name = re.fullmatch(r"(.+)_\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", path.stem)
        if not name:
            raise UserError(f"{path}: expected a name such as SLIDE_[xmin, ymin, xmax, ymax].png")
        box = tuple(int(value) for value in name.groups()[1:])
        mask_path = path.parent.parent / "masks" / path.name
        if any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
            for b in boxes.get(name[1], ())
        ):
            continue
        if not mask_path.is_file():
            no_mask.append(path)
            continue
        try:
            with Image.open(path) as region, Image.open(mask_path) as image:
                mask, fits = np.asarray(image), image.size == region.size
        except (OSError, SyntaxError):
            mask, fits = np.zeros((0, 0)), False
        if mask.ndim != 2:
            raise UserError(
                f"{mask_path}: expected one channel of class values 0 to 7, found shape {mask.shape}"
            )
        if not fits:
            unreadable.append(path)
            continue
        if kind == "tissue-bcss":
            boxes.setdefault(name[1], []).append(box)
        rows, columns = mask.shape[0] // size, mask.shape[1] // size
        if not rows * columns:
            small.append(path)
            continue
        cells = mask[: rows * size, : columns * size].reshape(rows, size, columns, size)
        covered = np.stack([(cells == value).mean((1, 3)) for value in values], -1)
        for row, column in np.argwhere(covered.max(-1) >= min_fraction):
            patches.append((path, int(column) * size, int(row) * size))
            labels.append(int(covered[row, column].argmax()))
            slides.append(name[1])
    for why, paths in passed.items():
        if paths:
            print(
                f"{folder}: {len(paths)} regions {why} and were passed over, first {paths[0].name}",
                file=sys.stderr,
            )
    if not patches:
        raise UserError(
            f"{folder}: no patch of {size} px is covered to {min_fraction:.0%} by one tissue class in the "
            f"{len(found)} regions of TIGER's roi-level-annotations; lower --min-fraction or --patch-size"
        )
    patients, centers = zip(*map(tiger_origin, slides), strict=True)
    images = ImageSource(
        patches, partial(cut_out, size=size), [path for path, _, _ in patches], f"{size} px"
    )
    ids = [f"{path.stem} {x},{y} {size}px" for path, x, y in patches]
    return Benchmark(
        "tiger",
        "patch",
        images,
        ids,
        np.array(labels),
        list(TIGER_CLASSES.values()),
        list(patients),
        list(centers),
    ), slides


PATHOROB = ("slide_id", "patch_id", "biological_class", "medical_center")


def load_pathorob(folder: Path, table: Path) -> tuple[Benchmark, list[str]]:
    """PathoROB's metadata (slide_id, patch_id, biological_class, medical_center), and the slide of each patch; images
    SLIDE-PATCH, SLIDE/PATCH or PATCH with any suffix lie below the folder. A patch in several subsets counts once."""
    rows = {(row["slide_id"], row["patch_id"]): row for row in read_table(table, PATHOROB)}
    paths = [p for p in files_below(folder) if p != table]
    known = (
        {p.name: p for p in paths}
        | {p.stem: p for p in paths}
        | {f"{p.parent.name}/{p.stem}": p for p in paths}
    )
    files = [
        next(
            (known[n] for n in (f"{slide}/{patch}", f"{slide}-{patch}", patch) if n in known), None
        )
        for slide, patch in rows
    ]
    if None in files:
        raise UserError(
            f"{table}: {files.count(None)} of its {len(rows)} patches have no image below {folder}, first "
            f"{'-'.join(list(rows)[files.index(None)])}.png; save the images as SLIDE_ID-PATCH_ID.png"
        )
    slides, classes = (
        [slide for slide, _ in rows],
        sorted({row["biological_class"] for row in rows.values()}),
    )
    return Benchmark(
        folder.resolve().name,
        "patch",
        ImageFiles(files),
        ["-".join(key) for key in rows],
        np.array([classes.index(row["biological_class"]) for row in rows.values()]),
        classes,
        slides,
        [row["medical_center"] for row in rows.values()],
    ), slides


def load_multicentre(
    folder: Path, size: int, min_fraction: float, bare: bool = False
) -> tuple[Benchmark, list[str]]:
    """Whichever form lies in the folder (labels.csv, PathoROB, TIGER; if `bare` also images and nothing else), and the
    slide of each patch. Without a column `slide` in labels.csv the group stands for it: that excludes more, never less.
    """
    if (folder / "labels.csv").is_file():
        benchmark = load_folder(folder)
        return benchmark, [
            row.get("slide") or row["group"]
            for row in read_table(folder / "labels.csv", ("image",))
        ]
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; --benchmark takes one with labels.csv (image,label,group,center), "
            f"PathoROB's metadata, or TIGER: {tiger_source(folder)}"
        )
    for table in sorted(folder.glob("*.csv")):
        with open(table, encoding="utf-8-sig", errors="replace") as file:
            if set(PATHOROB) <= {name.strip() for name in file.readline().split(",")}:
                return load_pathorob(folder, table)
    files = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES] if bare else []
    if files and not any(
        part.startswith("tissue-") for p in files for part in p.relative_to(folder).parts
    ):
        names = [path.relative_to(folder).as_posix() for path in files]
        return unlabelled(folder.resolve().name, ImageFiles(files), names), names
    return load_tiger(folder, size, min_fraction)


def unlabelled(name: str, images: Sequence, ids: list[str]) -> Benchmark:
    """Images of which nothing is known, in the form that the feature cache takes."""
    return Benchmark(name, "patch", images, ids, np.zeros(len(ids), np.int64), ["patch"], ids)

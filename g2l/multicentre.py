"""Patches from several hospitals, in three published layouts: labels.csv, PathoROB, TIGER.

`load_multicentre` finds which lies in a folder and gives a Benchmark and the slide of each patch.
Most of the room is TIGER: regions of slides with masks of tissue classes, cut into patches here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from g2l.benchmarks import Benchmark, load_folder
from g2l.errors import UserError, warn
from g2l.files import files_below, read_table, read_text, separator
from g2l.images import IMAGE_SUFFIXES, ImageFiles, ImageSource, Squares, class_shares, read_mask

Sited = tuple[Benchmark, list[str]]  # patches, and the slide of each
TIGER_CLASSES = {
    1: "invasive tumour",
    3: "in-situ tumour",
    2: "tumour stroma",
    6: "inflamed stroma",
    5: "necrosis",
}


def tiger_origin(slide: str) -> tuple[str, str]:
    """(patient, centre) from the name of a TIGER slide: TCGA barcode, Radboudumc or Jules Bordet;
    else UserError.
    """
    if match := re.match(r"(TCGA-(\w\w)-\w{4})", slide):
        return match[1], f"TCGA-{match[2]}"  # the tissue source site
    if match := re.match(r"(TC_S01_P\d+)", slide):
        return match[1], "RUMC"
    if match := re.match(r"(\d+)[BS]", slide):  # biopsy and surgical specimen of one patient
        return f"JB-{match[1]}", "JB"
    raise UserError(
        f"{slide}: no name of a TIGER slide; expected TCGA-XX-..., TC_S01_P... or digits, B or S"
    )


def tiger_source(folder: Path | str) -> str:
    """The command that fetches TIGER, the data set of Table 3, into a folder."""
    return f"aws s3 cp --no-sign-request --recursive s3://tiger-training/wsirois {folder}/wsirois"


@dataclass
class Region:
    """An annotated rectangle of a TIGER slide: its image, and its corners in level-0 pixels."""

    path: Path
    slide: str
    box: tuple[int, ...]  # x and y of the first and of the last corner

    def overlaps(self, other: Region) -> bool:
        """Whether the two share a place of one slide."""
        (left, top, right, bottom), (x0, y0, x1, y1) = self.box, other.box
        apart = left >= x1 or x0 >= right or top >= y1 or y0 >= bottom
        return self.slide == other.slide and not apart

    def mask(self) -> ndarray | None:
        """Class values (H, W) of the region's pixels; None where image or mask cannot be used."""
        path = mask_of(self.path)
        try:
            with Image.open(self.path) as region, Image.open(path) as image:
                mask = np.asarray(image)
                fits = image.size == region.size
        except (OSError, SyntaxError):
            return None
        if mask.ndim != 2:
            raise UserError(
                f"{path}: expected one channel of class values 0 to 7, found shape {mask.shape}"
            )
        return mask if fits else None


def tiger_regions(folder: Path) -> list[Region]:
    """The regions below a folder, tissue-bcss first; a region that is there twice counts once."""
    found = {}
    for path in files_below(folder):
        place = re.search(
            r"(tissue-bcss|tissue-cells)/images/[^/]+\.png$",
            path.relative_to(folder).as_posix(),
            re.I,
        )
        if place:
            found[place[0]] = path
    regions = []
    for _, path in sorted(found.items()):
        match = re.fullmatch(r"(.+)_\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", path.stem)
        if not match:
            raise UserError(f"{path}: expected a name such as SLIDE_[xmin, ymin, xmax, ymax].png")
        slide, *box = match.groups()
        regions.append(Region(path, slide, tuple(map(int, box))))
    return regions


def load_tiger(folder: Path, size: int, min_fraction: float) -> Sited:
    """Patches of TIGER's five tissue classes, and the slide of each, from `wsirois` as it unpacks.

    Region images are cut into a grid of `size` px (0.5 µm each); a patch belongs to the class that
    covers at least `min_fraction` of it. Regions of tissue-cells that overlap one of tissue-bcss
    are passed over.
    """
    regions = tiger_regions(folder)
    if not regions:
        raise UserError(
            f"{folder}: holds neither labels.csv, PathoROB's metadata nor TIGER's roi-level-"
            f"annotations (tissue-bcss or tissue-cells); get TIGER by {tiger_source(folder)}"
        )
    used: list[Region] = []
    bad = []
    small = []
    patches = []
    labels = []
    slides = []
    for region in regions:
        if any(region.overlaps(other) for other in used):
            continue
        mask = region.mask()
        if mask is None:
            bad.append(region.path.name)
            continue
        if region.path.parts[-3] == "tissue-bcss":
            used.append(region)
        if min(mask.shape) < size:
            small.append(region.path.name)
            continue
        covered = class_shares(mask, size, list(TIGER_CLASSES))
        for row, column in np.argwhere(covered.max(0) >= min_fraction).tolist():
            patches.append((region.path, column * size, row * size))
            labels.append(covered[:, row, column].argmax())
            slides.append(region.slide)
    tell_passed(folder, bad, "have no mask that can be read and fits")
    tell_passed(folder, small, f"are smaller than {size} px")
    if not patches:
        raise UserError(
            f"{folder}: no patch of {size} px is covered to {min_fraction:.0%} by one tissue class "
            f"in the {len(regions)} regions of TIGER's roi-level-annotations",
            mend="coverage",
        )
    patients, centers = zip(*map(tiger_origin, slides), strict=True)
    ids = [f"{path.stem} {x},{y} {size}px" for path, x, y in patches]
    classes = list(TIGER_CLASSES.values())
    images = Squares(patches, size)
    kinds = np.array(labels, np.int64)
    found = Benchmark("tiger", "patch", images, ids, kinds, classes, list(patients), list(centers))
    masks = [mask_of(path) for path, _, _ in patches]
    found.masks = ImageSource(patches, partial(cut_mask, size=size), masks)
    return found, slides


def cut_mask(patch: tuple[Path, int, int], size: int) -> ndarray:
    """Classes (size, size) of a patch's pixels, -1 where nothing is annotated."""
    path, x, y = patch
    return region_classes(path)[y : y + size, x : x + size]


@lru_cache(maxsize=1)  # patches of a region follow one another
def region_classes(path: Path) -> ndarray:
    """Classes (H, W) of a region's pixels."""
    return read_mask(mask_of(path))


def mask_of(region: Path) -> Path:
    """Where the mask of a region's image lies."""
    return region.parent.parent / "masks" / region.name


def tell_passed(folder: Path, names: list[str], why: str) -> None:
    """Say which regions were passed over."""
    if names:
        warn(f"{folder}: {len(names)} regions {why} and were passed over, first {names[0]}")


PATHOROB = ("slide_id", "patch_id", "biological_class", "medical_center")


def is_pathorob(table: Path) -> bool:
    """Whether a file has the columns of PathoROB's metadata."""
    head = read_text(table, "replace").partition("\n")[0]
    return set(PATHOROB) <= {name.strip() for name in head.split(separator(head))}


def load_pathorob(folder: Path, table: Path) -> Sited:
    """Patches that PathoROB's metadata list, and the slide of each; in several subsets they count
    once.

    Images SLIDE-PATCH, SLIDE/PATCH or PATCH with any suffix lie below the folder.
    """
    rows = {(row["slide_id"], row["patch_id"]): row for row in read_table(table, PATHOROB)}
    known: dict[str, Path] = {}
    for path in files_below(folder):
        if path != table:
            known |= {
                path.name: path,
                path.stem: path,
                f"{path.parent.name}/{path.stem}": path,
            }
    files = []
    lacking = []
    for slide, patch in rows:
        names = [n for n in (f"{slide}/{patch}", f"{slide}-{patch}", patch) if n in known]
        if names:
            files.append(known[names[0]])
        else:
            lacking.append(f"{slide}-{patch}.png")
    if lacking:
        raise UserError(
            f"{table}: {len(lacking)} of its {len(rows)} patches have no image below {folder}, "
            f"first {lacking[0]}; save the images as SLIDE_ID-PATCH_ID.png"
        )
    slides = [slide for slide, _ in rows]
    kinds = [row["biological_class"] for row in rows.values()]
    centers = [row["medical_center"] for row in rows.values()]
    classes, labels = np.unique(kinds, return_inverse=True)
    ids = ["-".join(key) for key in rows]
    name = folder.resolve().name
    images = ImageFiles(files)
    found = Benchmark(name, "patch", images, ids, labels, classes.tolist(), slides, centers)
    return found, slides


def load_multicentre(folder: Path, size: int, min_fraction: float, bare: bool = False) -> Sited:
    """Whichever form lies in the folder (labels.csv, PathoROB, TIGER), and the slide of each patch.

    Without a column `slide` in labels.csv the group stands for it: that excludes more, never less.
    If `bare`, images and nothing else will do, of which nothing is known.
    """
    labels = folder / "labels.csv"
    if labels.is_file():
        rows = read_table(labels, ("image",))
        return load_folder(folder), [row.get("slide") or row["group"] for row in rows]
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected is one with labels.csv (image,label,group,center),"
            f" PathoROB's metadata, or TIGER: {tiger_source(folder)}"
        )
    for table in filter(is_pathorob, sorted(folder.glob("*.csv"))):
        return load_pathorob(folder, table)
    if bare and not any(folder.rglob("tissue-*")):
        files = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
        if files:
            names = [path.relative_to(folder).as_posix() for path in files]
            return unlabelled(folder.resolve().name, ImageFiles(files), names), names
    return load_tiger(folder, size, min_fraction)


def unlabelled(name: str, images: Sequence, ids: list[str]) -> Benchmark:
    """Images of which nothing is known, in the form that the feature cache takes."""
    return Benchmark(name, "patch", images, ids, np.zeros(len(ids), np.int64), ["patch"], ids)

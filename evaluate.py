"""Stage 3 of G2L: features of every model on every benchmark, then CKA, kNN and a linear probe: Tables 1, 2, Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...          # images and a labels.csv: image,label,group[,center]

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its majority baseline, and
features are extracted once: results/features holds them, keyed by weights, preprocessing and images.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

import numpy as np

from tile import Help, UserError, atomic, disk_full, locked, patient_of, share, slide_name

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


# ---------------------------------------------------------------------------------------------- benchmarks


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


class Source(Sequence):
    """Images, or stacks of patches, made when asked for: `make` of each item.

    `files`, one per item where there are any, are watched for changes; `rule` says how the images are cut.
    """

    def __init__(self, items: Sequence, make: Callable, files: Sequence[Path] = (), rule: str = ""):
        self.items, self.make, self.files, self.rule = items, make, list(files), rule

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.make(self.items[i])


class Rows(Source):
    """Some rows of another image source, in the given order."""

    def __init__(self, source: Sequence, rows: np.ndarray):
        files = getattr(source, "files", ())  # a source that is no files is known by its ids alone
        super().__init__(
            rows,
            source.__getitem__,
            [files[i] for i in rows] if files else (),
            getattr(source, "rule", ""),
        )


class ImageFiles(Source):
    """Image files as (H, W, 3) uint8 arrays; sides below `side` px are padded to it."""

    def __init__(self, files: Sequence[Path], side: int = 1):
        super().__init__(files, functools.partial(read_image, side=side), files)


class Regions(Source):
    """Images larger than a patch, as stacks (n, side, side, 3) of the patches of a centred grid without overlap.

    A side shorter than a patch is first padded to it by repeating its edge; what is left over by the grid is not used.
    """

    def __init__(self, files: Sequence[Path], side: int = 224):
        super().__init__(files, functools.partial(cut_up, side=side), files, f"grid {side}")


class Squares(Source):
    """Squares of `size` level-0 pixels cut from slides or large images at (file, x, y), read as `side` pixels.

    One file stays open, as neighbours in the list share it.
    """

    def __init__(
        self, squares: Sequence[tuple[Path, int, int]], size: int, side: int | None = None
    ):
        self.items, self.files, self.rule = (
            squares,
            [file for file, _, _ in squares],
            f"squares {size}",
        )
        self.size, self.side, self.slide = size, side or size, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"slide": None}  # open files do not travel to workers

    def __getitem__(self, i: int) -> np.ndarray:
        file, x, y = self.items[i]
        if self.slide is None or self.slide.path != file:
            self.slide = open_slide(file)
        return self.slide.read(x, y, self.size, self.side)


class SlidePatches(Source):
    """Whole slides, each as a lazy stack of its tissue patches, found as tile.py finds them."""

    def __init__(self, files: Sequence[Path], mpp: float = 0.25, patch_size: int = 256):
        super().__init__(
            files,
            functools.partial(tissue_of, mpp=mpp, patch_size=patch_size),
            files,
            f"tissue {patch_size} at {mpp}",
        )


def tissue_of(file: Path, mpp: float, patch_size: int) -> Squares:
    """The tissue patches of a slide; OSError for one without."""
    from tile import tile_slide

    with open_slide(file) as slide:
        try:
            tiling = tile_slide(slide, mpp=mpp, patch_size=patch_size)
        except (
            UserError
        ) as error:  # skipped: named, counted and passed over like any unreadable image
            raise OSError(f"{slide.name}: {error}") from error
    return Squares(
        [(file, int(x), int(y)) for x, y in tiling.coords], tiling.size0, tiling.patch_size
    )


def open_slide(file: Path):
    """tile.Slide of a file; what it cannot open raises OSError, so that it counts as an unreadable image."""
    from tile import Slide

    try:
        return Slide(file)
    except UserError as error:
        raise OSError(str(error)) from error


def read_image(file: Path, side: int = 1) -> np.ndarray:
    """An image of 8 bits a channel as (H, W, 3) uint8, transparent parts white; OSError for anything else.

    Sides below `side` px are padded to it: what is missing repeats the edge, half on each end.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(
                ("I", "F")
            ):  # Pillow would turn nearly all of it white without a word
                raise OSError(f"{file}: more than 8 bits a pixel; save it with 8 bits a channel")
            if image.has_transparency_data:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            pixels = np.array(image.convert("RGB"))
    except (
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's other words for a bad file
        raise OSError(f"{file}: {error}") from error
    lack = [max(0, side - n) for n in pixels.shape[:2]]
    return (
        np.pad(pixels, [(n // 2, n - n // 2) for n in lack] + [(0, 0)], mode="edge")
        if any(lack)
        else pixels
    )


def cut_up(file: Path, side: int) -> np.ndarray:
    """The patches (n, side, side, 3) of a centred grid over an image."""
    image = read_image(file, side)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    top, left = (image.shape[0] % side) // 2, (image.shape[1] % side) // 2
    image = image[top : top + rows * side, left : left + columns * side]
    return image.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


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


def read_table(
    path: Path, needed: Sequence[str], filled: Sequence[str] = (), why: str = ""
) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line, without blanks around names and values.

    Raises UserError naming file and line where a column of `needed` lacks or has an empty cell, or one of `filled`,
    which may lack, has one; `why` ends the text.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            head = [name.strip() for name in next(reader, [])]
            lines = [
                (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f'{path}: no CSV file in UTF-8 ({error}); save it as "CSV UTF-8"'
        ) from error
    missing = [name for name in needed if name not in head]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)} (found: {', '.join(head) or 'none'}); needed are "
            f"{','.join(needed)}, separated by commas{why}"
        )
    if not lines:
        raise UserError(f"{path}: holds no rows; one line per image is expected")
    rows = []
    for number, cells in lines:
        row = dict(zip(head, [*cells, *[""] * len(head)], strict=False))
        empty = [name for name in (*needed, *filled) if row.get(name) == ""]
        if empty:
            raise UserError(
                f"{path}, line {number}: {empty[0]} is empty; fill it in or remove the line"
            )
        rows.append(row)
    return rows


def files_below(root: Path) -> list[Path]:
    """All files below `root` in order, through links to folders too; not macOS's `._` twins."""
    found, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back
            inner.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        found += [os.path.join(folder, name) for name in names if not name.startswith("._")]
    return [
        Path(name) for name in sorted(found)
    ]  # half a million texts are sorted faster than paths


# ---------------------------------------------------------------------------------------------- published benchmarks


def make(
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


def find(root: Path, pattern: str, what: str) -> list[Path]:
    """Files of this name pattern, in either case, below root; UserError that says what was looked for and found."""
    hits = [p for p in files_below(root) if fnmatch(p.name.lower(), pattern.lower())]
    if not hits:
        inside = (
            ", ".join(sorted(p.name for p in root.iterdir())[:6])
            if root.is_dir()
            else "no such folder"
        )
        raise UserError(f"{root}: no {pattern} ({what}) in it; found: {inside or 'nothing'}")
    return hits


def load_tils(root: Path, cache: Path) -> list[Benchmark]:
    table = find(root, "images-tcga-tils-metadata.csv", "the table of TCGA-TILs.tar.gz")[0]
    # by study, so the folder `pancancer` of links is never entered
    rows = [
        r
        for r in read_table(table, ("study", "barcode", "label", "path"))
        if r["study"].lower() == "brca"
    ]
    known = {r["path"] for r in rows}
    stray = [
        f
        for f in files_below(table.parent / "images-tcga-tils" / "brca")
        if f.suffix.lower() == ".png" and f.relative_to(table.parent).as_posix() not in known
    ]
    notes = [f"{len(stray)} images without a line in the table left out"] if stray else []
    images = ImageFiles([table.parent / r["path"] for r in rows])
    rows = [(r["path"], r["label"], r["barcode"][:12]) for r in rows]
    return [make("tils", "patch", images, rows, ["til-negative", "til-positive"], root, notes)]


def load_tp53(root: Path, cache: Path) -> list[Benchmark]:
    tables = [
        f
        for f in find(root, "*.csv", "labels: slide_id,label[,patient], label MUT or WT")
        if f.name != "patients.csv"
    ]
    if len(tables) != 1:
        raise UserError(
            f"{root}: {len(tables)} tables of labels ({', '.join(f.name for f in tables)}); leave one"
        )
    labels = read_table(tables[0], ("slide_id", "label"))
    slides = {
        f.name.split(".")[0]: f
        for folder in (root, root.parent.parent / "slides" / "brca")
        for f in files_below(folder)
        if f.suffix.lower() == ".svs"
    }
    rows = [
        (name, r["label"], r.get("patient") or name[:12])
        for r in labels
        if (name := r["slide_id"].split(".")[0]) in slides
    ]
    notes = [f"{len(labels) - len(rows)} labels without a slide"] if len(rows) < len(labels) else []
    if len(slides) > len(rows):  # not the same as wild type: nobody sequenced them
        notes.append(f"{len(slides) - len(rows)} slides without a label left out")
    return [
        make(
            "tp53",
            "slide",
            SlidePatches([slides[i] for i, _, _ in rows]),
            rows,
            ["WT", "MUT"],
            root,
            notes,
        )
    ]


def load_idc(root: Path, cache: Path) -> list[Benchmark]:
    files: dict[str, Path] = {}
    found = find(root, "*_class[01].png", "patches named PATIENT_idx5_xX_yY_classC.png")
    for f in sorted(
        found, key=lambda p: (len(p.parts), p)
    ):  # the archive holds everything twice, one level deeper
        files.setdefault(f.name, f)
    notes = [f"{len(found) - len(files)} nested copies left out"] if len(found) > len(files) else []
    classes = ["no IDC", "IDC"]
    rows = [
        (n, classes[int(n[-5])], n.split("_")[0]) for n in files
    ]  # by file name: folders are copied by hand
    return [make("idc", "patch", ImageFiles(list(files.values()), 50), rows, classes, root, notes)]


def load_bracs(root: Path, cache: Path) -> list[Benchmark]:
    found = [
        f
        for f in find(
            root, "BRACS_*.png", "RoIs named BRACS_WSI_CLASS_N.png, in train, val and test"
        )
        if f.parents[1].name in ("train", "val", "test")
    ]
    # the server also holds previous versions of the same images
    files = {
        f"{f.parents[1].name}/{f.name}": f
        for f in sorted(found, key=lambda f: "latest_version" in f.parts)
    }
    rows = [
        (name, f.parent.name.split("_", 1)[-1], "BRACS_" + f.name.split("_")[1])
        for name, f in files.items()
    ]
    notes = [f"{len(found) - len(files)} copies left out"] if len(found) > len(files) else []
    return [
        make(
            "bracs",
            "region",
            Regions(list(files.values())),
            rows,
            ["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"],
            root,
            notes,
        )
    ]


def load_breakhis(root: Path, cache: Path) -> list[Benchmark]:
    name = re.compile(r"SOB_([BM])_([A-Z]+)-(\d+-\d+)([A-Z]*)-(\d+)-\d+\.(?i:png)")
    files = {f.name: f for f in find(root, "SOB_*.png", "SOB_B_A-14-22549CD-40-007.png and so on")}
    found = [(f, m) for f in files.values() if (m := name.fullmatch(f.name))]
    # Patient 13412 stands under DC and under LC with the same images: both labels cannot be right, so neither is used.
    kept, result = [(f, m) for f, m in found if not m[3].endswith("-13412")], []
    zooms = sorted({m[5] for _, m in kept}, key=int)
    notes = [
        f"{len(found) - len(kept)} images of patient 13412 left out (labelled DC and LC; all magnifications)"
    ]
    notes += [f"only {', '.join(zooms)}X at hand"] if len(zooms) < 4 else []
    kinds = {"B": "benign", "M": "malignant"}
    for task, classes in (
        ("binary", list(kinds.values())),
        ("subtype", "A F PT TA DC LC MC PC".split()),
    ):
        for zoom in zooms:
            part = [(f, m) for f, m in kept if m[5] == zoom]
            rows = [(f.name, kinds[m[1]] if task == "binary" else m[2], m[3]) for f, m in part]
            result.append(
                make(
                    f"breakhis-{task}-{zoom}x",
                    "region",
                    Regions([f for f, _ in part]),
                    rows,
                    classes,
                    root,
                    notes,
                    source=f"breakhis-{zoom}x",
                )
            )
    return result or [make("breakhis", "region", [], [], [], root)]


GLEASON = ["benign", "G3", "G4", "G5"]
VALUES_2019 = {
    1: 0,
    6: 0,
    3: 1,
    4: 2,
    5: 3,
}  # of Gleason2019's maps; 6 is a slip that most readers take for benign
VALUES_ZURICH = {0: 0, 1: 1, 2: 2, 3: 3}  # of Arvaniti's palette masks; 4 is ignored


def majority(maps: Sequence[np.ndarray], values: dict[int, int]) -> np.ndarray:
    """Class map (H, W) on which most of the experts who drew agree, -1 where none drew or two classes tie."""
    votes = np.zeros((4, *maps[0].shape), np.uint8)
    for drawn in maps:
        for value, c in values.items():
            votes[c] += drawn == value
    second, first = np.sort(votes, 0)[-2:]
    return np.where(first > second, votes.argmax(0), -1)


def shares_in(classes: np.ndarray, n: int, side: int) -> np.ndarray:
    """Share (n, rows, columns) of each class in every square of a class map (H, W), -1 = none."""
    h, w = classes.shape[0] // side, classes.shape[1] // side
    blocks = classes[: h * side, : w * side].reshape(h, side, w, side)
    return np.stack([(blocks == c).mean((1, 3)) for c in range(n)])


def grid(
    name: str,
    shares: Iterable[tuple[Path, np.ndarray]],
    files: Sequence[Path],
    classes: list[str],
    group: Callable[[Path], str],
    notes: list[str],
    root: Path,
    cache: Path,
    side: int = 256,
) -> Benchmark:
    """Squares of which one class covers at least half, from the class shares (C, rows, columns) of every image.

    Squares without such a class, or with two (overlapping masks), are left out. Kept in `cache` until a file changes.
    """
    path, key = Path(cache) / f"{name}.json", digest([stamp(f) for f in files], str(root), side)
    known = read_json(path)
    if known.get("key") != key:
        found = [
            (str(file), int(c) * side, int(r) * side, int(parts[:, r, c].argmax()))
            for file, parts in shares
            for r, c in np.argwhere((parts >= 0.5).sum(0) == 1)
        ]
        known = {"key": key, "rows": found, "notes": notes}
        write_text(path, json.dumps(known))
    where = [(Path(f), x, y) for f, x, y, _ in known["rows"]]
    rows = [
        (f"{f.stem}_{x}_{y}", classes[row[3]], group(f))
        for (f, x, y), row in zip(where, known["rows"], strict=True)
    ]
    return make(name, "patch", Squares(where, side), rows, classes, root, known["notes"])


def load_gleason(root: Path, cache: Path, zurich: bool = False) -> list[Benchmark]:
    """Gleason2019 (training cores: masks of the others were never public) or Arvaniti et al. 2018, grouped by TMA."""
    from PIL import Image

    images = {
        f.stem: f
        for f in (
            find(root, "ZT*.jpg", "cores named ZT111_4_A_1_1.jpg")
            if zurich
            else find(root, "slide*_core*.jpg", "cores, in `Train Imgs`")
        )
    }
    maps: dict[str, list[Path]] = {}
    for f in (
        find(root, "mask*_ZT*.png", "masks named mask_ZT111_4_A_1_1.png")
        if zurich
        else find(
            root,
            "slide*_core*_classimg_nonconvex.png",
            "maps of the experts, in Maps1_T to Maps6_T",
        )
    ):
        maps.setdefault(
            f.stem.split("_", 1)[1] if zurich else f.stem.split("_classimg")[0], []
        ).append(f)
    # of Arvaniti's two pathologists (mask1_, mask2_) the first, as its users do
    pairs = {images[c]: maps[c][: 1 if zurich else None] for c in sorted(maps) if c in images}
    notes = [f"{len(pairs)} cores with maps, {len(images) - len(pairs)} without"]

    def shares():
        for file, drawn in pairs.items():
            try:
                with Image.open(file) as image:
                    size = image.size
                masks = [Image.open(f) for f in drawn]
                for f, mask in zip(drawn, masks, strict=True):
                    if mask.size != size or len(mask.getbands()) > 1:
                        raise OSError(f"{f}: no map of one channel and the size of its core")
                classes = majority(
                    [np.asarray(mask) for mask in masks], VALUES_ZURICH if zurich else VALUES_2019
                )
                yield file, shares_in(classes, 4, 256)
            except (OSError, SyntaxError) as error:
                notes.append(f"{file.name} left out: {error}")

    files = [*pairs, *(f for drawn in pairs.values() for f in drawn)]
    return [
        grid(
            "gleason-arvaniti" if zurich else "gleason",
            shares(),
            files,
            GLEASON,
            lambda f: f.stem.split("_")[0],
            notes,
            root,
            cache,
        )
    ]


def drawn_share(mask: Path, size: tuple[int, int], side: int) -> np.ndarray:
    """Share (rows, columns) that is not 0 in every square of a TIFF mask of `size` (height, width) px.

    Its tiles or strips are read one by one: whole, a mask has gigapixels. OSError for a damaged one or another size.
    """
    import tifffile

    rows, columns = (-(-n // side) for n in size)
    count = np.zeros((rows, columns), np.int64)
    try:
        with tifffile.TiffFile(mask) as file:
            page = file.pages[0]
            if page.shape[:2] != size:
                raise OSError(
                    f"{mask}: {page.shape[1]} x {page.shape[0]} px, not the size of its slide"
                )
            for pixels, (*_, y, x, _), _ in page.segments():
                if pixels is None:  # left out by the writer: empty
                    continue
                pixels = pixels[0, : size[0] - y, : size[1] - x, 0] != 0  # a last tile hangs over
                r, first_row = np.unique(
                    (y + np.arange(pixels.shape[0])) // side, return_index=True
                )
                c, first_column = np.unique(
                    (x + np.arange(pixels.shape[1])) // side, return_index=True
                )
                inside = np.add.reduceat(
                    np.add.reduceat(pixels, first_row, 0, np.int64), first_column, 1
                )
                count[r[0] : r[-1] + 1, c[0] : c[-1] + 1] += inside
    except (
        tifffile.TiffFileError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # tifffile's words
        raise OSError(f"{mask}: damaged ({error})") from error
    return count[: size[0] // side, : size[1] // side] / side**2


def load_aggc(root: Path, cache: Path, side: int = 256) -> list[Benchmark]:
    """AGGC 2022, subsets 1 and 2 (subset 3 repeats the same tissue on six scanners), grouped by slide."""
    classes = ["Stroma", "Normal", "G3", "G4", "G5"]
    images = {
        f.stem: f for f in find(root, "Subset[12]_Train_*.tiff", "slides, in SubsetN_Train_image")
    }
    masks: dict[str, dict[str, Path]] = {name: {} for name in images}
    for f in find(root, "*_Mask.tif", "masks, in SubsetN_Train_annotation"):
        if f.parent.name in masks and f.stem.split("_")[0] in classes:
            masks[f.parent.name][f.stem.split("_")[0]] = f
    notes = [f"{sum(map(bool, masks.values()))} of {len(images)} slides with masks"]

    def shares():
        for name, file in images.items():
            try:
                with open_slide(file) as slide:
                    size = slide.height, slide.width
                parts = np.zeros((5, size[0] // side, size[1] // side))
                for c, mask in masks[name].items():  # a missing mask: the class is absent
                    parts[classes.index(c)] = drawn_share(mask, size, side)
                yield file, parts
            except OSError as error:
                notes.append(f"{name} left out: {error}")

    files = [*images.values(), *(f for m in masks.values() for f in m.values())]
    return [grid("aggc", shares(), files, classes, lambda f: f.stem, notes, root, cache)]


def load_chimera(root: Path, cache: Path) -> list[Benchmark]:
    records = {
        f.stem: str(read_json(f).get("BCR"))
        for f in find(root, "*.json", "clinical_data/PID.json")
        if f.parent.name == "clinical_data"
    }
    slides = [
        f
        for f in find(root, "*.tif", "pathology/images/PID/PID_N.tif")
        if not f.stem.endswith("_tissue")
    ]
    label = {"0.0": "no recurrence", "1.0": "recurrence", "0": "no recurrence", "1": "recurrence"}
    kept = [f for f in slides if records.get(f.parent.name) in label]
    rows = [(f.name, label[records[f.parent.name]], f.parent.name) for f in kept]
    lonely = sorted(set(records) - {f.parent.name for f in slides})
    notes = ["no recurrence may mean a short follow-up: the label is censored"]
    notes += (
        [f"{len(slides) - len(kept)} slides without a label left out"]
        if len(kept) < len(slides)
        else []
    )
    notes += [f"{len(lonely)} patients without slides"] if lonely else []
    return [
        make(
            "chimera",
            "slide",
            SlidePatches(kept),
            rows,
            ["no recurrence", "recurrence"],
            root,
            notes,
        )
    ]


class Published(NamedTuple):
    """A published benchmark: how it is read, what its authors or the paper count, where it comes from."""

    load: Callable[[Path, Path], list[Benchmark]]
    level: str
    classes: int
    count: str
    source: str
    licence: str


PUBLISHED = {
    "tils": Published(
        load_tils,
        "patch",
        2,
        "5,245 (breast)",
        "zenodo.org/records/6604094, TCGA-TILs.tar.gz",
        "see the record",
    ),
    "tp53": Published(
        load_tp53,
        "slide",
        2,
        "511 slides",
        "GDC diagnostic slides (tile.py --cancer brca --download), "
        "a table slide_id,label[,patient]",
        "TCGA open access",
    ),
    "idc": Published(
        load_idc,
        "patch",
        2,
        "277,524 (198,738 / 78,786)",
        "kaggle.com paultimothymooney/breast-histopathology-images",
        "see Kaggle",
    ),
    "bracs": Published(
        load_bracs,
        "region",
        7,
        "4,539 (paper 4,537)",
        "bracs.icar.cnr.it, BRACS_RoI after its form",
        "CC BY-NC 4.0",
    ),
    "breakhis": Published(
        load_breakhis,
        "region",
        8,
        "7,909 (2,480 / 5,429)",
        "inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz",
        "CC BY 4.0",
    ),
    "gleason": Published(
        load_gleason,
        "patch",
        4,
        "77,364 of 331 cores (244 public)",
        "gleason2019.grand-challenge.org after registration",
        "see the challenge",
    ),
    "gleason-arvaniti": Published(
        functools.partial(load_gleason, zurich=True),
        "patch",
        4,
        "886 cores",
        "doi.org/10.7910/DVN/OCYCMP",
        "CC0",
    ),
    "aggc": Published(
        load_aggc,
        "patch",
        5,
        "156,130 (142 slides with masks)",
        "aggc22.grand-challenge.org after registration",
        "CC BY-NC-SA 4.0",
    ),
    "chimera": Published(
        load_chimera,
        "slide",
        2,
        "190 slides, 95 patients",
        "s3://chimera-challenge/v2/task1, anonymous",
        "see the challenge",
    ),
}


def tiger_source(folder: Path | str) -> str:
    """The command that fetches TIGER, on which robustness.py measures Table 3, into a folder."""
    return f"aws s3 cp --no-sign-request --recursive s3://tiger-training/wsirois {folder}/wsirois"


def list_benchmarks(data: Path) -> str:
    """What `--list` prints: every published benchmark, whether it is at hand, and where to get it."""
    rows = [("name", "level", "classes", "published count", "at hand", "licence", "where from")]
    here = lambda name: "found" if at_hand(data, name) else "missing"  # noqa: E731
    rows += [
        (n, p.level, str(p.classes), p.count, here(n), p.licence, p.source)
        for n, p in PUBLISHED.items()
    ]
    rows += [
        (
            "tiger",
            "patch",
            "5",
            "195 slides (paper: 21 centres)",
            here("tiger"),
            "CC BY-NC 4.0, TCGA terms",
            f"for robustness.py only (Table 3): {tiger_source(data / 'benchmarks' / 'tiger')}",
        )
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return f"{table}\n\nUnpack each below {data}/benchmarks/NAME as it comes; your own folder: --benchmark DIR"


def at_hand(data: Path, name: str) -> bool:
    """Whether there is anything below data/benchmarks/NAME."""
    folder = Path(data) / "benchmarks" / name
    return folder.is_dir() and any(folder.iterdir())


# ---------------------------------------------------------------------------------------------- features, once


def safe(name: str) -> str:
    """`name` as a file name: everything but letters, digits, dot, dash and underscore becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.") or "_"


def digest(*parts) -> str:
    """Short hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file or it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def stamp(path: Path) -> list:
    """What changes when a file (or a folder of files) changes: names, sizes and times of modification."""
    try:
        found = os.stat(path)
    except OSError:  # a missing file is a state like any other
        return []
    if S_ISDIR(found.st_mode):
        return [line for inner in sorted(Path(path).iterdir()) for line in stamp(inner)]
    return [[Path(path).name, found.st_size, found.st_mtime_ns]]


def data_stamp(benchmark: Benchmark) -> str:
    """Fingerprint of a benchmark's images: ids, and size and time of every file behind them. Labels are not in it."""
    if not hasattr(benchmark, "stamp"):
        files = dict.fromkeys(map(str, getattr(benchmark.images, "files", [])))
        benchmark.stamp = digest(
            benchmark.ids, [stamp(f) for f in files], getattr(benchmark.images, "rule", "")
        )
    return benchmark.stamp


@functools.lru_cache(maxsize=1)  # models come one after another: never two in memory
def _load(name: str, weights: str | None, options: tuple):
    from models import load_model

    return load_model(name, weights, **dict(options))


def card(name: str, results: Path, *, weights: str | None = None, **options) -> dict:
    """What is known of a model: fingerprint, parameters, dim, input_size, metadata, milliseconds per image.

    Kept in results/features/<model>/model.json, so that a run with nothing new loads no network. A changed weight
    file, option or models.py makes it new. Equal networks (a student before and after distillation) are timed once:
    timed twice, the machine's noise would part them.
    """
    import models

    options = {k: v for k, v in options.items() if v is not None}
    local = [p for p in (weights, name) if p and Path(p).exists()]
    how = (
        sorted(options.items(), key=str),
        hashlib.sha256(Path(models.__file__).read_bytes()).hexdigest(),
    )
    key = digest(name, weights, how, [stamp(p) for p in local])
    path = Path(results) / "features" / safe(display(name)) / "model.json"
    known = read_json(path)
    if known.get("key") == key:
        return known
    model = _load(name, weights, tuple(sorted(options.items())))
    network = digest(repr(model.net), model.embedding, model.input_size, model.dtype, how)
    others = [read_json(p) for p in sorted(path.parents[1].glob("*/model.json"))]
    timed = [o["ms_per_image"] for o in others if o.get("network") == network]
    known = {
        "key": key,
        "name": name,
        "display": model.name,
        "fingerprint": model.fingerprint,
        "dim": model.dim,
        "parameters": model.parameters_count,
        "input_size": model.input_size,
        "metadata": model.metadata,
        "embedding": model.embedding,
        "weights": weights or ("its own" if Path(name).exists() else "hub"),
        "network": network,
        "ms_per_image": timed[0] if timed else milliseconds(model),
    }
    write_text(path, json.dumps(known, indent=1, default=str))
    return known


def milliseconds(model) -> float:
    """Median time of one forward pass per image, batch 32 on a GPU and 4 on a CPU, preprocessing not counted."""
    import torch

    device = next(model.parameters()).device
    batch = 32 if device.type == "cuda" else 4
    x = torch.zeros(batch, 3, model.input_size, model.input_size, device=device)
    seconds = []
    with torch.inference_mode():
        while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < 5):
            start = time.perf_counter()
            model(x).float().sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[1:])) / batch  # the first warms up


def display(name: str) -> str:
    """A model's short name: the run's name for runs/NAME/student, else the name itself."""
    path = Path(name)
    return path.parent.name if path.name == "student" and path.parent.name else name


def features(
    name: str,
    benchmark: Benchmark,
    results: Path,
    *,
    weights: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    max_unreadable: float = 0.01,
    together: bool = True,
    **options,
) -> np.ndarray:
    """Embeddings (N, dim) float32 of one model on one benchmark, extracted once and then read from `results`.

    `weights` and `options` (device, dtype, input_size, compile) go to models.load_model. Rows of unreadable images are
    NaN; more of them than the share `max_unreadable`, or NaN from the network itself, raise UserError.
    Under torchrun every rank calls this and gets the whole array; together=False: one rank alone reads what is there.
    """
    from safetensors.numpy import save_file

    from models import extract_features, setup_distributed

    rank, world, _ = setup_distributed(options.get("device", "cpu")) if together else (0, 1, None)
    about = card(name, results, weights=weights, **options)
    key = feature_key(about, benchmark)
    path = (
        Path(results)
        / "features"
        / safe(display(name))
        / f"{safe(benchmark.source or benchmark.name)}.safetensors"
    )
    array, names = load_cached(path)
    fresh = names.get("key") == key
    if world > 1:  # all extract or none does, whatever each saw on disk
        import torch.distributed as dist

        seen: list = [None] * world
        dist.all_gather_object(seen, fresh)
        fresh = all(seen)
    errors = names["errors"] if fresh else []
    if not fresh:
        print(
            f"{display(name)} on {benchmark.name}: {len(benchmark)} images", file=sys.stderr
        ) if rank == 0 else None
        array = extract_features(
            _load(name, weights, tuple(sorted(options.items()))),
            benchmark.images,
            key=key,
            batch_size=batch_size,
            workers=workers,
            cache=path.with_suffix(".part"),
            errors=errors,
        )
        array = np.ascontiguousarray(array, dtype=np.float32)
    lost, named = np.flatnonzero(~np.isfinite(array).all(1)), {i for i, _ in errors}
    if errors and rank == 0:
        print(
            f"{benchmark.name}: {len(lost)} of {len(benchmark)} unreadable, {len(named) - len(lost)} partly, first:\n"
            + "\n".join(f"  {benchmark.ids[i]}: {why}" for i, why in errors[:5]),
            file=sys.stderr,
        )
    broken = sorted(set(lost) - named)
    if broken:
        raise UserError(
            f"{display(name)}: {len(broken)} of {len(array)} embeddings on {benchmark.name} are NaN or "
            f"infinite, first {benchmark.ids[broken[0]]}; check the weights (python models.py NAME --check "
            "FILE), or use --precision fp32"
        )
    if len(lost) > max_unreadable * len(array):
        raise UserError(
            f"{benchmark.name}: {len(lost)} of {len(array)} images cannot be read, first "
            f"{benchmark.ids[lost[0]]} ({dict(errors)[lost[0]]}); mend them, or allow more by "
            "--max-unreadable"
        )
    if not fresh and rank == 0:
        names = json.dumps(
            {
                "ids": benchmark.ids,
                "groups": benchmark.groups,
                "classes": benchmark.classes,
                "errors": errors,
                "key": key,
                "fingerprint": about["fingerprint"],
            }
        )
        with atomic(path) as temporary:
            save_file(
                {
                    "features": array,
                    "labels": benchmark.labels,
                    "names": np.frombuffer(names.encode(), np.uint8),
                },
                temporary,
            )
            temporary.chmod(0o644)  # save_file makes files that only their owner reads
        shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
    return array


def load_cached(path: Path) -> tuple[np.ndarray | None, dict]:
    """Features and what is written beside them; (None, {}) if there is no such file or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        held = load_file(path)
        return held["features"], json.loads(bytes(held["names"]))
    except FileNotFoundError:
        return None, {}
    except (SafetensorError, KeyError, ValueError) as error:
        print(f"{path}: damaged ({error}), made again", file=sys.stderr)
        return None, {}


def feature_key(about: dict, benchmark: Benchmark) -> str:
    """What the features of a model (its card) on a benchmark depend on: weights, preprocessing, images."""
    return digest(about["fingerprint"], data_stamp(benchmark))


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


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- protocols


def split(
    labels: np.ndarray, groups: Sequence[str], n: int, seed: int = 0, grouped: bool = True
) -> np.ndarray:
    """Fold number (N,) of every row: n stratified folds, each group whole in one of them unless `grouped` is False.

    Fewer folds when there are fewer groups than n. Raises UserError when no split is possible.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, group = np.unique(np.asarray(groups), return_inverse=True)
    largest = int(np.bincount(labels).max())
    n = min(n, largest, int(group.max()) + 1 if grouped else largest)
    if n < 2:
        raise UserError(
            f"groups: {int(group.max()) + 1} group in {len(labels)} images cannot be split; "
            "the column group of labels.csv must name at least two patients"
        )
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    fold = np.full(len(labels), -1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a class smaller than n: told in the report, see `thin`
        parts = kind(n, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, group)
        for number, (_, test) in enumerate(parts):
            fold[test] = number
    assert (fold >= 0).all()
    fold = np.unique(fold, return_inverse=True)[
        1
    ]  # a fold may come out empty when groups differ much in size
    if grouped:
        assert len(np.unique(np.stack([group, fold]), axis=1).T) == group.max() + 1, (
            "a group straddles two folds"
        )
    return fold


def pca_axes(
    x: np.ndarray, parts: list[np.ndarray], dims: int = 50, device: str = "cpu"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each array of row numbers: mean (D,) and leading principal axes (D, d) of all *other* rows, d <= dims.

    x (N, D) float64, its mean near 0. One pass over the data: scatter(others) = moment(all) - moment(part), less the
    shift of the mean. With fewer rows than columns the same axes come from the smaller Gram matrix.
    Equal to scikit-learn's PCA up to the sign of an axis.
    """
    import torch
    from scipy.linalg import eigh

    from kernels import covariance

    n, width = x.shape
    feature_side = width <= n - max(map(len, parts))
    if feature_side:
        moment = lambda y: (  # noqa: E731  (second moment about the origin)
            covariance(torch.from_numpy(y).to(device)).cpu().numpy() * (len(y) - 1)
            + len(y) * np.outer(y.mean(0), y.mean(0))
            if len(y) > 1
            else y.T @ y
        )
        inside = [moment(x[part]) for part in parts]
        total = sum(inside) if sum(map(len, parts)) == n else moment(x)
    else:
        gram = x @ x.T
    sums, axes = x.sum(0), []
    for i, part in enumerate(parts):
        count = n - len(part)
        d = min(dims, count - 1, width)
        mean = (sums - x[part].sum(0)) / count
        if feature_side:
            matrix = total - inside[i] - count * np.outer(mean, mean)
        else:
            rest = np.setdiff1d(np.arange(n), part)
            matrix = gram[np.ix_(rest, rest)]
            matrix = matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()
        value, vector = eigh(matrix, subset_by_index=[len(matrix) - d, len(matrix) - 1])
        solid = value > value[-1] * 1e-12  # axes without variance carry no distance
        vector = (
            vector[:, solid]
            if feature_side
            else (x[rest] - mean).T @ (vector[:, solid] / np.sqrt(value[solid]))
        )
        axes.append((mean, vector))
    return axes


def vote(neighbors: np.ndarray, distances: np.ndarray, n_classes: int) -> np.ndarray:
    """Majority class (Q,) of neighbour labels (Q, k), -1 = none; ties by summed distance, then by smallest class."""
    one_hot = neighbors[:, :, None] == np.arange(n_classes)
    count = one_hot.sum(1)
    far = np.where(one_hot, distances[:, :, None], 0).sum(1)
    return np.where(count == count.max(1, keepdims=True), far, np.inf).argmin(1)


def knn_predict(
    x: np.ndarray,
    labels: np.ndarray,
    fold: np.ndarray,
    n_classes: int,
    *,
    k: int = 15,
    dims: int = 50,
    pca: str = "fold",
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """kNN on PCA axes, every row predicted from the other folds: predictions (N,) and neighbours (N, k), -1 = none.

    pca="fold" fits the axes on the rows outside each fold; "all" once on everything (which leaks, as the paper may).
    """
    import torch

    from kernels import knn

    x = x - x.mean(0, dtype=np.float64)
    predicted, neighbors = np.empty(len(x), np.int64), np.full((len(x), k), -1)
    tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)).to(device)  # noqa: E731
    if pca == "all":  # one search serves all folds: neighbours of the own fold are masked
        ((mean, axis),) = pca_axes(x, [np.empty(0, int)], dims, device)
        distance, index = knn(
            tensor(x @ axis - mean @ axis),
            k,
            groups=torch.from_numpy(fold).to(device),
            return_distance=True,
        )
        neighbors[:] = index.cpu().numpy()
        return vote(
            np.where(neighbors < 0, -1, labels[neighbors]), distance.cpu().numpy(), n_classes
        ), neighbors
    tests = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    for test, (mean, axis) in zip(tests, pca_axes(x, tests, dims, device), strict=True):
        rest = np.setdiff1d(np.arange(len(x)), test)
        z = x @ axis - mean @ axis
        distance, index = knn(
            tensor(z[rest]), min(k, len(rest)), tensor(z[test]), return_distance=True
        )
        index = rest[index.cpu().numpy()]
        neighbors[test, : index.shape[1]] = index
        predicted[test] = vote(labels[index], distance.cpu().numpy(), n_classes)
    return predicted, neighbors


def six_two_two(
    labels: np.ndarray, groups: Sequence[str], seed: int, grouped: bool = True
) -> list[np.ndarray] | None:
    """Masks (N,) of the training, validation and test part, each of whole folds of `split`; None for fewer than five.

    The seed draws which folds: scikit-learn's own seed leaves groups of different sizes where they are, so that five
    seeds would give one split five times.
    """
    fold = split(labels, groups, 10, 0, grouped)
    n = fold.max() + 1
    if n < 5:
        return None
    fold, fifth = np.random.default_rng(seed).permutation(n)[fold], round(n / 5)
    return [fold >= 2 * fifth, (fold >= fifth) & (fold < 2 * fifth), fold < fifth]


def probe(
    x: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    n_classes: int,
    seed: int,
    grouped: bool = True,
) -> dict | None:
    """Linear probe on one grouped 6:2:2 split: rows of the test part, their scores (n, classes), the chosen C.

    L2 logistic regression (scikit-learn, L-BFGS) on features standardised by the training part; C is chosen among
    1e-6 ... 1e2 by log loss on the validation part (AUC would not see a model that always says the same class), from
    strong to weak regularisation, stopping when two steps bring nothing. None when the groups do not allow the split
    or training would see one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    parts = six_two_two(labels, groups, seed, grouped)
    if parts is None or len(np.unique(labels[parts[0]])) < 2:
        return None
    train, valid, test = parts
    scaler = StandardScaler().fit(x[train])
    inputs = [scaler.transform(x[part].astype(np.float64)) for part in (train, valid, test)]
    if (
        train.sum() < x.shape[1]
    ):  # the solution lies in the span of the training rows: same optimum, fewer columns
        value, vector = np.linalg.eigh(inputs[0] @ inputs[0].T)
        solid = value > value[-1] * 1e-10
        span = inputs[0].T @ (vector[:, solid] / np.sqrt(value[solid]))
        inputs = [part @ span for part in inputs]
    best, stale = (np.inf, 0.0, None), 0
    model = LogisticRegression(max_iter=2000, tol=1e-6, warm_start=True)
    for c in 10.0 ** np.arange(-6, 3):
        model.set_params(C=c).fit(inputs[0], labels[train])
        loss = log_loss(
            labels[valid], _scores(model, inputs[1], n_classes), labels=np.arange(n_classes)
        )
        stale = 0 if loss < best[0] - 1e-4 else stale + 1
        if loss < best[0]:
            best = (loss, c, _scores(model, inputs[2], n_classes))
        if stale == 2:
            break
    return {"seed": seed, "test": np.flatnonzero(test), "scores": best[2], "C": best[1]}


def _scores(model, x: np.ndarray, n_classes: int) -> np.ndarray:
    scores = np.zeros(
        (len(x), n_classes)
    )  # a class that training never saw keeps 0: its AUC is that of a guess
    scores[:, model.classes_] = model.predict_proba(x)
    return scores


def auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve for scores (n,), once per row of weights (B, n); NaN where a side has no weight."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    weights, positive = weights[:, order], positive[order]
    up = np.add.reduceat(weights * positive, starts, axis=1)
    down = np.add.reduceat(weights * ~positive, starts, axis=1)
    won = (up * (np.cumsum(down, 1) - down / 2)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (up.sum(1) * down.sum(1))


def macro_auc(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUC (B,) of class 1 for two classes; else the mean of one-vs-rest over the classes present (as scikit-learn)."""
    columns = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    each = np.stack([auc(scores[:, c], labels == c, weights) for c in columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class can be judged: NaN says so
        return np.nanmean(each, 0)


def cka_rows(
    x: dict[str, np.ndarray],
    groups: Sequence[str],
    teacher: str | None,
    device: str,
    baseline: str | None = None,
) -> list[dict]:
    """CKA of every pair of models; to the teacher also its standard error, chance level, and gain over the baseline.

    se: jackknife over up to ten parts made of whole groups. floor: the biased estimator, rows of one side permuted.
    """
    import torch
    from scipy.stats import t

    from kernels import cka

    names = list(x)
    tensors = {name: torch.from_numpy(x[name]).to(device) for name in names}
    both = lambda a, b, **how: cka(a, b, estimator="both", **how)  # noqa: E731
    unbiased, biased = both(list(tensors.values()), list(tensors.values()))
    rows = [
        {"model": a, "other": b, "protocol": "cka", "metric": metric, "value": float(value[i, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i != j
        for metric, value in (("unbiased", unbiased), ("biased", biased))
    ]
    if teacher in names:
        others = [n for n in names if n != teacher]
        rng = np.random.default_rng(0)
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        part = rng.permutation(group.max() + 1)[group] % 10
        parts = [p for p in np.unique(part) if (part != p).sum() >= 4]
        pick = lambda rows: [both([tensors[n][rows] for n in others], [tensors[teacher][rows]])[0]]  # noqa: E731
        left_out = np.array(
            [
                pick(torch.from_numpy(np.flatnonzero(part != p)).to(device))[0][:, 0].cpu().numpy()
                for p in parts
            ]
        )
        shuffled = [
            tensors[teacher][torch.from_numpy(rng.permutation(len(group))).to(device)]
            for _ in range(3)
        ]
        floor = both([tensors[n] for n in others], shuffled)[1].mean(1)
        error = lambda v: float(np.sqrt((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum()))  # noqa: E731
        whole = unbiased[:, names.index(teacher)].tolist()
        for i, name in enumerate(others):
            base = {"model": name, "other": teacher, "protocol": "cka"}
            rows.append(base | {"metric": "floor", "value": float(floor[i])})
            if len(parts) < 2:  # one group is nearly everything
                continue
            rows.append(
                base | {"metric": "se", "value": error(left_out[:, i]), "parts": len(parts)}
            )
            if baseline in others and name != baseline:
                gain = whole[names.index(name)] - whole[names.index(baseline)]
                margin = t.ppf(0.975, len(parts) - 1) * error(
                    left_out[:, i] - left_out[:, others.index(baseline)]
                )
                rows.append(
                    {
                        "model": name,
                        "other": baseline,
                        "protocol": "paired",
                        "metric": "cka",
                        "value": gain,
                        "low": gain - margin,
                        "high": gain + margin,
                    }
                )
    return rows


FEW = 6  # groups: with five, even one model better in each of them is no evidence at 95 % (sign test: 2 / 2^5 > 0.05)


def paired(
    first: dict, second: dict, labels: np.ndarray, groups: Sequence[str], n: int = 1000
) -> dict[str, tuple]:
    """Difference first - second of two models' predictions with its 95 % interval, by resampling whole groups n times.

    Returns {"knn": (difference, low, high), "probe": (...)}; the same resampled groups serve both models. The interval
    is NaN where fewer than FEW groups were tested, and whatever value is not defined is left out.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = group.max() + 1
    times = np.random.default_rng(0).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)
    times = np.concatenate([np.ones((1, n_groups)), times])  # row 0: the data as they are
    right = [(p["knn"] == labels).astype(float) for p in (first, second)]
    gain = times @ np.bincount(group, right[0] - right[1]) / (times @ np.bincount(group))
    result, tested = {"knn": gain}, {"knn": n_groups}
    pairs = list(zip(first["probe"], second["probe"], strict=True))
    if pairs:
        each = []
        tested["probe"] = len(np.unique(group[np.concatenate([a["test"] for a, _ in pairs])]))
        for a, b in pairs:
            y, chunk = labels[a["test"]], max(1, 2**24 // len(a["test"]))
            blocks = [
                times[i : i + chunk][:, group[a["test"]]] for i in range(0, len(times), chunk)
            ]
            each.append(
                np.concatenate(
                    [macro_auc(a["scores"], y, w) - macro_auc(b["scores"], y, w) for w in blocks]
                )
            )
        each = [v for v in each if np.isfinite(v[0])]  # a test part of one class has no AUC
        if each:
            result["probe"] = np.mean(each, 0)
    return {
        name: (
            float(v[0]),
            *(
                np.nanpercentile(v[1:], [2.5, 97.5]).tolist()
                if tested[name] >= FEW
                else [np.nan, np.nan]
            ),
        )
        for name, v in result.items()
    }


# ---------------------------------------------------------------------------------------------- one benchmark


def evaluate(benchmark: Benchmark, x: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    """All protocols for all models on one benchmark into metrics.jsonl, and its pictures; what is there is kept.

    x: features by model name; rows of NaN are unreadable images.
    """
    notes, keep = list(benchmark.notes), np.all([np.isfinite(f).all(1) for f in x.values()], 0)
    if not keep.all():
        notes.append(f"{(~keep).sum()} unreadable images left out")
    marked = []
    for name in x:
        rows = leaked(benchmark, args.cards[name])
        if rows.any():
            marked += [display(name)] if args.leaks == "mark" else []
            keep &= ~rows if args.leaks == "exclude" else True
            patients = len({g for g, hit in zip(benchmark.groups, rows, strict=True) if hit})
            notes.append(
                f"{display(name)} was distilled on {patients} of its patients ({rows.sum()} images, first "
                f"{benchmark.ids[rows.argmax()]} of {benchmark.groups[rows.argmax()]}): "
                + (
                    "left out for all models"
                    if args.leaks == "exclude"
                    else "its numbers are marked ⚠"
                )
            )
        elif args.cards[name]["metadata"].get("teacher") and not (
            args.cards[name]["metadata"].get("patients")
            or args.cards[name]["metadata"].get("slides")
        ):
            notes.append(
                f"the cohort of {display(name)} is not recorded: shared patients cannot be found"
            )
    if not keep.any():
        raise UserError(
            f"{benchmark.name}: no image is left ({'; '.join(notes)}); --leaks mark keeps the patients "
            "that a student has seen"
        )
    if not keep.all():
        benchmark, x = benchmark.subset(keep), {name: f[keep] for name, f in x.items()}
    labels, groups, n_classes = benchmark.labels, benchmark.groups, len(benchmark.classes)
    present = np.bincount(labels, minlength=n_classes)
    if len(labels) < 8:
        raise UserError(
            f"{benchmark.name}: {len(labels)} images are too few to measure anything; 8 are needed"
        )
    if (present > 0).sum() < 2:
        raise UserError(
            f"{benchmark.name}: all {len(labels)} images are of class {benchmark.classes[labels[0]]}; two "
            "classes are needed to tell anything apart"
        )
    patients = [
        len({g for g, y in zip(groups, labels, strict=True) if y == c}) for c in range(n_classes)
    ]
    thin = [
        f"{benchmark.classes[c]} ({patients[c]})" for c in range(n_classes) if 0 < patients[c] < 5
    ]
    if thin:
        notes.append(
            f"classes with fewer than 5 groups, absent from some splits: {', '.join(thin)}"
        )
    if len(set(groups)) < args.folds:
        notes.append(
            f"{len(set(groups))} groups: as many folds at most"
            + ("; too few for the probe's 6:2:2" if len(set(groups)) < 5 else "")
        )
    settings = digest(
        [args.k, args.pca_dims, args.pca, args.folds, args.seeds, args.paper_splits],
        benchmark.ids,
        groups,
        labels.tolist(),
        hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    )
    base, predictions, keys, device = {"benchmark": benchmark.name}, {}, {}, str(args.device_used)
    for name in x:
        path = (
            Path(args.results) / "predictions" / safe(display(name)) / f"{safe(benchmark.name)}.npz"
        )
        keys[name] = digest(args.cards[name]["fingerprint"], data_stamp(benchmark), settings)
        predictions[name] = load_predictions(path, keys[name])
        if predictions[name] is None:
            start = time.perf_counter()
            predictions[name], new = predict(benchmark, x[name], args, device)
            record(
                args.results,
                [base | {"model": display(name)} | row for row in new],
                same=("model", "benchmark", "protocol"),
            )
            save_predictions(path, keys[name], predictions[name])
            print(
                f"{display(name)} on {benchmark.name}: kNN and linear probe, {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
            )
    key, rows = digest(sorted(keys.values()), args.teacher, args.baseline, args.leaks, notes), []
    new = not any(row.get("key") == key for row in read_metrics(args.results))
    if new:
        for row in cka_rows(x, groups, args.teacher, device, args.baseline):
            rows.append(
                base | row | {"model": display(row["model"]), "other": display(row["other"])}
            )
        ends = [n for n in (args.teacher, args.baseline) if n in x]
        for name, other in [(n, o) for n in x for o in ends if n not in (o, args.teacher)]:
            for kind, (value, low, high) in paired(
                predictions[name], predictions[other], labels, groups
            ).items():
                rows.append(
                    base
                    | {
                        "model": display(name),
                        "protocol": "paired",
                        "metric": kind,
                        "value": value,
                        "other": display(other),
                        "low": low,
                        "high": high,
                    }
                )
        rows.append(
            base
            | {
                "model": "data",
                "protocol": "data",
                "metric": "images",
                "value": len(labels),
                "key": key,
                "level": benchmark.level,
                "classes": benchmark.classes,
                "counts": present.tolist(),
                "groups": len(set(groups)),
                "class_groups": patients,
                "notes": notes,
                "marked": marked,
            }
        )
        record(args.results, rows, same=("model", "other", "benchmark", "protocol"))
    seen = Path(args.results) / "pictures" / f"confusion-{safe(benchmark.name)}.png"
    if not args.no_pictures and (new or not seen.is_file()):
        draw_benchmark(benchmark, predictions, args)


def predict(
    benchmark: Benchmark, x: np.ndarray, args: argparse.Namespace, device: str
) -> tuple[dict, list[dict]]:
    """kNN and linear probe of one model's features (N, D): predictions by row, and the rows for metrics.jsonl."""
    labels, groups, n_classes = benchmark.labels, benchmark.groups, len(benchmark.classes)
    rows, predictions, common = [], {}, np.bincount(labels).argmax()
    for grouped in (True, False) if args.paper_splits else (True,):
        tail = "" if grouped else "-ungrouped"
        fold = split(labels, groups, args.folds, 0, grouped)
        guess, neighbors = knn_predict(
            x, labels, fold, n_classes, k=args.k, dims=args.pca_dims, pca=args.pca, device=device
        )
        for f in range(fold.max() + 1):
            test = fold == f
            rows += [
                {"protocol": "knn" + tail, "metric": metric, "fold": f, "value": float(value)}
                for metric, value in (
                    ("accuracy", (guess == labels)[test].mean()),
                    ("majority", (labels[test] == common).mean()),
                )
            ]
        rows.append(
            {
                "protocol": "knn" + tail,
                "metric": "balanced accuracy",
                "value": recall(guess, labels),
            }
        )
        probes = [
            p
            for p in (probe(x, labels, groups, n_classes, s, grouped) for s in range(args.seeds))
            if p
        ]
        for p in probes:
            y = labels[p["test"]]
            rows += [
                {
                    "protocol": "probe" + tail,
                    "metric": metric,
                    "seed": p["seed"],
                    "value": value,
                    "C": p["C"],
                }
                for metric, value in (
                    ("auc", float(macro_auc(p["scores"], y)[0])),
                    ("balanced accuracy", recall(p["scores"].argmax(1), y)),
                )
            ]
        if grouped:
            predictions = {"knn": guess, "neighbors": neighbors, "probe": probes}
    return predictions, rows


def recall(guess: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy: the mean over the classes present of the share found."""
    return float(np.mean([(guess == labels)[labels == c].mean() for c in np.unique(labels)]))


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


# ---------------------------------------------------------------------------------------------- tables and pictures

# Tables 1 and 2 of arXiv 2510.11176, as far as a public digest of the paper (papernotes, AAAI 2026) gives them; where
# our reference notes hold the same figure they agree. What is not here was not seen.
PAPER = {
    protocol: {
        row.split()[0]: {
            model: float(value)
            for model, value in zip(models, row.split()[1:], strict=True)
            if value != "-"
        }
        for row in rows
    }
    for protocol, models, rows in [
        (
            "cka",
            ("hibou-l", "G2L"),
            [
                "bracs 0.7594 0.9683",
                "breakhis-40x 0.8909 0.9558",
                "breakhis-100x 0.9147 0.9686",
                "breakhis-200x 0.9230 0.9734",
                "breakhis-400x 0.8995 0.9575",
            ],
        ),
        (
            "knn",
            ("G2L", "h-optimus-0", "uni2-h", "hibou-l"),
            [
                "tils 0.9362 0.9344 0.9291 0.9214",
                "tp53 0.6904 0.6598 0.6542 0.6504",
                "idc 0.9232 0.9141 0.9165 0.9074",
                "gleason 0.8988 0.8994 0.8678 0.8124",
                "aggc 0.9243 0.9226 0.9170 0.8788",
                "chimera 0.7657 0.7663 0.7605 0.7184",
            ],
        ),
        (
            "probe",
            ("G2L", "h-optimus-0", "uni2-h", "hibou-l", "uni"),
            [
                "tils 0.9838 0.9822 0.9788 0.9827 -",
                "tp53 0.8046 0.7603 0.6795 0.7085 -",
                "idc 0.9796 0.9778 0.9756 0.9488 -",
                "gleason 0.9841 0.9846 0.9790 0.9708 -",
                "aggc 0.9958 0.9955 0.9956 0.9921 -",
                "chimera 0.852 - 0.865 - 0.857",
            ],
        ),
    ]
}


def differences(
    rows: list[dict], benchmarks: Sequence[str], args: argparse.Namespace
) -> list[dict]:
    """The paired differences between this run's models and its teacher and baseline, in their order."""
    models = [display(n) for n in args.models]
    ends = [display(n) for n in (args.teacher, args.baseline) if n in args.models]
    found = [
        r
        for r in rows
        if r["protocol"] == "paired"
        and r["benchmark"] in benchmarks
        and r["model"] in models
        and r["other"] in ends
        and not (args.teacher and r["model"] == display(args.teacher))
    ]
    return sorted(
        found,
        key=lambda r: (
            benchmarks.index(r["benchmark"]),
            models.index(r["model"]),
            models.index(r["other"]),
            list(WORDS).index(r["metric"]),
        ),
    )


def means(results: Path) -> dict[tuple, tuple[float, float, int]]:
    """(protocol, metric, model, benchmark[, other]) -> mean, standard deviation and number over folds or seeds."""
    found: dict[tuple, list[float]] = {}
    for row in read_metrics(results):
        key = (row["protocol"], row["metric"], row["model"], row["benchmark"])
        if row["value"] is not None:
            found.setdefault((*key, row["other"]) if "other" in row else key, []).append(
                row["value"]
            )
    return {
        key: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
        for key, v in found.items()
    }


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """Rows of a table: each benchmark, and before the magnifications of one (NAME-40x ...) their average."""
    rows: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"-\d+x$", "", name)
        same = [n for n in names if n != name and re.sub(r"-\d+x$", "", n) == stem]
        if stem != name and same:
            rows.setdefault(
                f"{stem} (mean of {len(same) + 1})", sorted([name, *same], key=list(names).index)
            )
        rows[name] = [name]
    return rows


def ranked(values: list[float | None], texts: list[str]) -> list[str]:
    """The best text bold, the second underlined, as the paper prints."""
    order = sorted({round(v, 4) for v in values if v is not None}, reverse=True)
    place = [order.index(round(v, 4)) if v is not None else 9 for v in values]
    return [
        f"**{t}**" if p == 0 else f"<u>{t}</u>" if p == 1 else t
        for p, t in zip(place, texts, strict=True)
    ]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [
        [cell.replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def paper_value(protocol: str, model: str, benchmark: str, about: dict) -> str:
    """The paper's own figure for this model and benchmark, or an empty string where none was found."""
    meta = about.get(model, {})
    name = (
        "G2L"
        if meta.get("teacher") == "h-optimus-0" and meta.get("student") == "hibou-l"
        else model
    )
    value = (
        PAPER.get(protocol, {}).get(benchmark.replace("breakhis-binary", "breakhis"), {}).get(name)
    )
    return f" (paper {value:.3f})" if value else ""


def write_tables(args: argparse.Namespace) -> str:
    """table1.md and table2.md from metrics.jsonl alone; returns their text."""
    rows, mean, models = (
        read_metrics(args.results),
        means(args.results),
        [display(n) for n in args.models],
    )
    about = {r["model"]: r["metadata"] for r in rows if r["protocol"] == "model"}
    data = {r["benchmark"]: r for r in rows if r["protocol"] == "data"}
    sources = {
        b.name: [o.source for o in args.found[:i] if o.source] for i, b in enumerate(args.found)
    }
    names, teacher = (
        [b.name for b in args.found],
        display(args.teacher) if args.teacher in args.models else None,
    )

    def average(members: list[str], *key: str, column: int = 0) -> float | None:
        """Mean over benchmarks of mean (column 0) or standard deviation (1); key: protocol, metric, model[, other]."""
        keys = [(*key[:3], b, *key[3:]) for b in members]
        return (
            float(np.mean([mean[k][column] for k in keys]))
            if all(k in mean for k in keys)
            else None
        )

    def lines(
        protocol: str, columns: list[str], chance: Callable, cell: Callable
    ) -> list[list[str]]:
        """A row per benchmark: name, chance, and the ranked cells (value, text) of the models."""
        table = []
        kept = [
            b.name
            for b in args.found
            if protocol != "cka" or b.source not in sources.get(b.name, ())
        ]
        for label, members in families(kept).items():
            cells = [cell(members, m) for m in columns]
            texts = [
                "–"
                if v is None
                else t
                + (paper_value(protocol, m, label, about) if len(members) == 1 else "")
                + (" ⚠" if any(m in data[b]["marked"] for b in members) else "")
                for m, (v, t) in zip(columns, cells, strict=True)
            ]
            label = (
                label.replace("-binary", "") if protocol == "cka" else label
            )  # the same images for both tasks
            table.append([label, chance(members), *ranked([v for v, _ in cells], texts)])
        return table

    def alignment(members: list[str], m: str) -> tuple[float | None, str]:
        value, se, biased, floor = (
            average(members, "cka", part, m, teacher)
            for part in ("unbiased", "se", "biased", "floor")
        )
        return value, "" if value is None else (
            f"{value:.3f}"
            + ("" if se is None else f" ± {se:.3f}")
            + f" · {biased:.3f} [{floor:.3f}]"
        )

    one, others = "", [m for m in models if m != teacher]
    if teacher and others:
        table = lines(
            "cka", others, lambda members: str(sum(data[b]["value"] for b in members)), alignment
        )
        one = (
            f"# Table 1: CKA to {teacher}\n\nUnbiased CKA ± its standard error (jackknife over up to ten parts of "
            "whole groups) · biased CKA [what is left of it with the rows of one side shuffled: its chance level]. "
            "Unrelated features have an unbiased CKA of 0. Embeddings as used downstream, before the projector. "
            "Bold: best, underlined: second.\n\n"
            + markdown(["benchmark", "images", *others], table)
        )
        write_text(Path(args.results) / "table1.md", one)

    two = [
        "# Table 2: what the embeddings tell\n\nFolds and splits keep every group (patient, or the data set's best "
        "proxy) on one side. Bold: best, underlined: second; a difference counts only where the paired comparison "
        "below says so."
        + (
            " ⚠: the student has seen some of the patients."
            if any(data[b]["marked"] for b in names)
            else ""
        )
    ]
    knn = f"kNN (PCA {args.pca_dims}, k = {args.k}, majority vote)"
    kinds = [
        ("knn", "accuracy", f"{knn}: accuracy, mean ± sd over folds"),
        ("knn", "balanced accuracy", f"{knn}: balanced accuracy of all folds together"),
        ("probe", "auc", "Linear probe (6:2:2): AUC (macro one-vs-rest), mean ± sd over seeds"),
        (
            "probe",
            "balanced accuracy",
            "Linear probe (6:2:2): balanced accuracy, mean ± sd over seeds",
        ),
    ]
    if args.paper_splits:
        kinds += [
            (
                f"{protocol}-ungrouped",
                metric,
                f"{title}, ungrouped: a patient on both sides (leaks; only to "
                "compare with published numbers)",
            )
            for protocol, metric, title in (kinds[0], kinds[2])
        ]
    for protocol, metric, title in kinds:

        def chance(members: list[str], protocol: str = protocol, metric: str = metric) -> str:
            common = (
                average(members, protocol, "majority", m) for m in models
            )  # the same for each that has it
            value = (
                next((v for v in common if v is not None), None)
                if metric == "accuracy"
                else 0.5
                if metric == "auc"
                else np.mean([1 / np.count_nonzero(data[b]["counts"]) for b in members])
            )
            return "–" if value is None else f"{value:.3f}"

        def cell(
            members: list[str], m: str, protocol: str = protocol, metric: str = metric
        ) -> tuple:
            value, sd = (average(members, protocol, metric, m, column=column) for column in (0, 1))
            return value, "" if value is None else f"{value:.3f}" + (f" ± {sd:.3f}" if sd else "")

        table = lines(protocol if metric in ("accuracy", "auc") else "", models, chance, cell)
        two.append(
            f"## {title}\n\n"
            + markdown(
                ["benchmark", "majority class" if metric == "accuracy" else "chance", *models],
                table,
            )
        )
    table = [
        [r["benchmark"], r["model"], r["other"], WORDS[r["metric"]], with_interval(r), verdict(r)]
        for r in differences(rows, names, args)
    ]
    if table:
        two.append(
            "## Paired differences\n\nModel minus other with its 95 % interval: over 1,000 resamplings of whole "
            f"groups; for CKA by the jackknife. Fewer than {FEW} groups allow none.\n\n"
            + markdown(["benchmark", "model", "other", "measure", "difference", "reading"], table)
        )
    two = "\n\n".join(two)
    write_text(Path(args.results) / "table2.md", two)
    return one + "\n\n" + two


WORDS = {
    "cka": "CKA to teacher",
    "knn": "kNN accuracy",
    "probe": "probe AUC",
}  # of paired differences


def verdict(row: dict) -> str:
    """A paired difference in a word: better, worse, or no difference that the data can show."""
    if row["low"] is None:
        return "too few groups to tell"
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "within noise"


def with_interval(row: dict) -> str:
    """A paired difference with its interval, where there is one."""
    return f"{row['value']:+.3f}" + (
        "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    )


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def role(name: str, args: argparse.Namespace) -> str:
    """What a model is in this comparison: teacher, before or after distillation, or nothing."""
    origin = args.cards[name]["metadata"].get("teacher")
    return (
        "teacher"
        if name == args.teacher
        else "before distillation"
        if name == args.baseline
        else f"distilled from {display(origin)}"
        if origin
        else ""
    )


def draw_figure1(args: argparse.Namespace) -> None:
    """figure1.png: kNN accuracy, mean of the benchmarks that every model has, against parameters and time per image."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    mean = means(args.results)
    score = lambda n, b: mean.get(("knn", "accuracy", display(n), b), (None,))[0]  # noqa: E731
    names = [b.name for b in args.found if all(score(n, b.name) is not None for n in args.models)]
    if not names:
        print(
            "figure1.png: no benchmark has all models, so there is nothing to compare",
            file=sys.stderr,
        )
        return
    points = [
        (
            n,
            np.mean([score(n, b) for b in names]),
            args.cards[n]["parameters"] / 1e6,
            args.cards[n]["ms_per_image"],
        )
        for n in args.models
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2 + 0.18 * len(points)), sharey=True)
    handles = []
    for i, (name, y, *sizes) in enumerate(points):
        part = role(name, args)
        marker = (
            "^"
            if part == "teacher"
            else "s"
            if part == "before distillation"
            else "*"
            if part
            else "o"
        )
        for axis, x in zip(axes, sizes, strict=True):
            dot = axis.scatter(
                x,
                y,
                s=210 if marker == "*" else 110,
                color=f"C{i % 10}",
                marker=marker,
                zorder=3,
                edgecolor="white",
                label=f"{display(name)}, {part}" if part else display(name),
            )
        handles.append(dot)
    for axis, label, column in zip(
        axes,
        ("parameters (millions)", f"time per image (ms, {args.device_used})"),
        (2, 3),
        strict=True,
    ):
        x = [p[column] for p in points]
        if max(x) > 5 * min(x):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(0, 1.2 * max(x))
        axis.set_xlabel(label)
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    low, high = (f(p[1] for p in points) for f in (min, max))
    gap = max(
        0.15 * (high - low), 0.05 - (high - low) / 2
    )  # a span of 0.1 at least: noise is not to look like news
    axes[0].set_ylim(low - gap, high + gap)
    axes[0].set_ylabel(
        "kNN accuracy"
        + (f", mean of {len(names)} benchmarks" if len(names) > 1 else f" on {names[0]}")
    )
    columns = 2 if len(handles) > 3 else 1
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 * -(-len(handles) // columns), 1, 1))
    save_figure(figure, Path(args.results) / "figure1.png")


def picture(benchmark: Benchmark, i: int) -> np.ndarray:
    """One (H, W, 3) picture of item i: the image, the whole region, or the slide's thumbnail."""
    if benchmark.level == "slide":
        with open_slide(benchmark.images.files[i]) as slide:
            return slide.thumbnail(256)
    return (
        read_image(benchmark.images.files[i])
        if benchmark.level == "region"
        else benchmark.images[i]
    )


def draw_benchmark(
    benchmark: Benchmark, predictions: dict[str, dict], args: argparse.Namespace
) -> None:
    """Below results/pictures: confusion matrices and CKA matrix of all models, and for each model a kNN gallery."""
    import matplotlib.pyplot as plt

    folder, classes, labels = Path(args.results) / "pictures", benchmark.classes, benchmark.labels
    names, n = list(predictions), len(benchmark.classes)
    side = max(2.6, 0.55 * n + 1.3)
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(side * len(names), side),
        squeeze=False,
        sharey=True,
        constrained_layout=True,
    )
    for axis, name in zip(axes[0], names, strict=True):
        table = np.zeros((n, n))
        np.add.at(table, (labels, predictions[name]["knn"]), 1)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.005:
                axis.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.6 else "black",
                )
        axis.set_title(display(name), fontsize=9)
        axis.set_xticks(range(n), classes, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(n), classes, fontsize=8)
        axis.set_xlabel("said")
    axes[0, 0].set_ylabel("true class")
    figure.suptitle(f"{benchmark.name}: kNN, percent of each true class", fontsize=10)
    save_figure(figure, folder / f"confusion-{safe(benchmark.name)}.png")

    pairs = {
        (r["model"], r["other"]): r["value"]
        for r in read_metrics(args.results)
        if r["protocol"] == "cka" and r["metric"] == "unbiased" and r["benchmark"] == benchmark.name
    }
    shown = [display(name) for name in names]
    if len(shown) > 1:
        matrix = np.array([[pairs.get((a, b), 1.0) for b in shown] for a in shown])
        figure, axis = plt.subplots(
            figsize=(1.1 * len(shown) + 2.4, 1.0 * len(shown) + 1.6), constrained_layout=True
        )
        axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="black" if value > 0.6 else "white",
            )
        axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set_title(f"{benchmark.name}: unbiased CKA of every pair of models", fontsize=10)
        save_figure(figure, folder / f"cka-{safe(benchmark.name)}.png")

    for name in names:
        path = folder / f"gallery-{safe(benchmark.name)}-{safe(display(name))}.png"
        draw_gallery(benchmark, name, predictions[name], path)


def draw_gallery(benchmark: Benchmark, name: str, predicted: dict, path: Path) -> None:
    """Three queries that kNN got right and three that it got wrong, each with its neighbours from other folds."""
    labels, classes, guess, neighbors = (
        benchmark.labels,
        benchmark.classes,
        predicted["knn"],
        predicted["neighbors"],
    )
    certain, rng, rows = (labels[neighbors] == guess[:, None]).mean(1), np.random.default_rng(0), []
    for hit in (
        True,
        False,
    ):  # right ones at random, wrong ones with the surest vote: they are worth looking at
        pool = np.flatnonzero((guess == labels) == hit)
        pool = rng.permutation(pool) if hit else pool[np.argsort(-certain[pool], kind="stable")]
        first = [
            pool[labels[pool] == c][:1] for c in rng.permutation(len(classes))
        ]  # differ in class
        rows += list(dict.fromkeys(np.concatenate([*first, pool]).astype(int).tolist()))[:3]
    colors, lines = {"query": "black", "the query's class": "#2a9d3a", "another": "#d62728"}, []
    for row in rows:
        said = "right" if guess[row] == labels[row] else f"said {classes[guess[row]]}"
        lines.append([(picture(benchmark, row), f"{classes[labels[row]]}\n{said}", "black")])
        lines[-1] += [
            (
                picture(benchmark, i),
                classes[labels[i]],
                colors["the query's class" if labels[i] == labels[row] else "another"],
            )
            for i in neighbors[row, :6]
            if i >= 0
        ]
    draw_sheet(
        path,
        f"{benchmark.name}, {display(name)}: a query and its nearest neighbours from other folds",
        colors,
        lines,
    )


def draw_sheet(
    path: Path,
    title: str,
    colors: dict[str, str],
    lines: list[list[tuple[np.ndarray, str, str]]],
    side: int = 112,
) -> None:
    """A picture of lines of images (pixels, caption of one or two lines, frame colour), the first one set apart.

    colors: what each frame colour means.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    small, large, cell = ImageFont.load_default(13), ImageFont.load_default(15), side + 56
    widths = [
        36 + max(map(len, lines), default=1) * (side + 12),
        24 + int(large.getlength(title)),
        12 + sum(36 + int(small.getlength(meaning)) for meaning in colors),
    ]
    sheet = Image.new("RGB", (max(widths), 64 + len(lines) * cell), "white")
    draw, x = ImageDraw.Draw(sheet), 12
    draw.text((12, 8), title, "black", large)
    for meaning, color in colors.items():
        draw.rectangle((x, 36, x + 12, 48), fill=color)
        draw.text((x + 18, 34), meaning, "#555555", small)
        x += 36 + int(small.getlength(meaning))
    for y, line in zip(range(64, 64 + len(lines) * cell, cell), lines, strict=True):
        for j, (pixels, caption, color) in enumerate(line):
            x = 12 + j * (side + 12) + (12 if j else 0)
            for row, text in enumerate(caption.split("\n")):
                while small.getlength(text) > side + 8:
                    text = text[:-2] + "…"
                draw.text((x - 4, y + 16 * row), text, "black", small)
            draw.rectangle((x - 4, y + 36, x + side + 3, y + 36 + side + 7), fill=color)
            sheet.paste(
                ImageOps.pad(Image.fromarray(pixels), (side, side), color="white"), (x, y + 40)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        sheet.save(temporary)


def write_report(args: argparse.Namespace, tables: str, failures: list[str]) -> None:
    """report.md: tables, pictures and everything that one must know to read them."""
    data = {r["benchmark"]: r for r in read_metrics(args.results) if r["protocol"] == "data"}
    names = [b.name for b in args.found if b.name in data]
    models = [
        [
            display(n),
            role(n, args),
            f"{c['parameters'] / 1e6:,.1f} M",
            str(c["dim"]),
            c["embedding"],
            str(c["input_size"]),
            f"{c['ms_per_image']:.1f}",
            str(c["weights"]),
        ]
        for n, c in args.cards.items()
    ]
    benchmarks = [
        [
            b,
            data[b]["level"],
            str(data[b]["value"]),
            str(data[b]["groups"]),
            ", ".join(
                f"{c} {n}" for c, n in zip(data[b]["classes"], data[b]["counts"], strict=True)
            ),
            "; ".join(data[b]["notes"]) or "–",
        ]
        for b in names
    ]
    pictures = [
        f"## {b}\n\n"
        + "\n\n".join(
            f"![{kind} of {b}](pictures/{kind}-{safe(b)}{tail}.png)"
            for kind, tail in [
                ("confusion", ""),
                ("cka", ""),
                *(("gallery", f"-{safe(display(n))}") for n in args.models),
            ]
            if (Path(args.results) / "pictures" / f"{kind}-{safe(b)}{tail}.png").is_file()
        )
        for b in names
    ]
    if args.no_pictures:
        pictures = []
    write_text(
        Path(args.results) / "report.md",
        "\n\n".join(
            [
                "# Evaluation",
                "Written by `"
                + " ".join(["python evaluate.py", *args.argv])
                + f"` on {args.device_used}.",
                *(["**Not evaluated:** " + "; ".join(failures)] if failures else []),
                *(
                    ["![accuracy against size and time](figure1.png)"]
                    if (Path(args.results) / "figure1.png").is_file() and not args.no_pictures
                    else []
                ),
                "## Models\n\n"
                + markdown(
                    [
                        "model",
                        "role",
                        "parameters",
                        "width",
                        "embedding",
                        "input px",
                        f"ms per image ({args.device_used})",
                        "weights",
                    ],
                    models,
                ),
                "## Benchmarks\n\n"
                + markdown(
                    ["benchmark", "level", "images", "groups", "classes", "notes"], benchmarks
                ),
                tables.replace("\n## ", "\n### ").replace("# Table", "## Table"),
                *pictures,
            ]
        ),
    )


def summarize(args: argparse.Namespace) -> str:
    """One screen: per benchmark and model CKA, kNN and probe beside chance, and what the paired comparison allows."""
    mean, rows, shown = (
        means(args.results),
        read_metrics(args.results),
        [display(n) for n in args.models],
    )
    width, teacher, lines = (
        max(map(len, shown)) + 2,
        display(args.teacher) if args.teacher else None,
        [],
    )

    def form(*key: str, spread: float | None = None) -> str:
        if key not in mean:
            return "–"
        spread = mean[key][1] if spread is None else spread
        return f"{mean[key][0]:.3f}" + (f" ± {spread:.3f}" if spread else "")

    for b, d in [
        (b.name, r)
        for b in args.found
        for r in rows
        if r["protocol"] == "data" and r["benchmark"] == b.name
    ]:
        lines += [
            "",
            f"{b}: {d['value']} images, {np.count_nonzero(d['counts'])} classes, {d['groups']} groups (never "
            "on both sides of a split)",
            f"{'':{width}}{'params':>9}{'ms/img':>8}   {'CKA to teacher':<16}{'kNN accuracy':<16}probe AUC",
        ]
        for m, about in zip(shown, args.cards.values(), strict=True):
            se = mean.get(("cka", "se", m, b, teacher), (0,))[0]
            cka = "teacher" if m == teacher else form("cka", "unbiased", m, b, teacher, spread=se)
            lines.append(
                f"{m:{width}}{about['parameters'] / 1e6:>7.1f} M{about['ms_per_image']:>8.1f}   {cka:<16}"
                f"{form('knn', 'accuracy', m, b):<16}{form('probe', 'auc', m, b)}"
            )
        common = next(
            (m for m in shown if ("knn", "majority", m, b) in mean), ""
        )  # the same for each that has it
        lines.append(
            f"{'majority class / chance':{width + 20}}{'0.000':<16}"
            f"{form('knn', 'majority', common, b, spread=0):<16}0.500"
        )
        lines += [
            f"  {r['model']} against {r['other']}: {WORDS[r['metric']]} {with_interval(r)}, {verdict(r)}"
            for r in differences(rows, [b], args)
        ]
        lines += [f"  note: {note}" for note in d["notes"]]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    from models import add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="registry names, timm:NAME, or folders such as runs/NAME/student",
    )
    what.add_argument(
        "--teacher",
        metavar="NAME",
        help="CKA is measured to it; with --all: h-optimus-0 if at hand",
    )
    what.add_argument(
        "--baseline",
        metavar="NAME",
        help="student before distillation; with --all: hibou-l if at hand",
    )
    what.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=list(PUBLISHED),
        help=f"published ones, below DATA/benchmarks/NAME: {', '.join(PUBLISHED)}",
    )
    what.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        metavar="DIR",
        type=directory,
        help="your own: folders with images and a labels.csv (image,label,group[,center])",
    )
    what.add_argument(
        "--all",
        action="store_true",
        help="every benchmark whose data, and without --models every model "
        "whose weights are at hand; says what is missing and where it is",
    )
    what.add_argument("--list", action="store_true", help="show the published benchmarks and stop")
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data",
        default=Path("data"),
        type=Path,
        help="its benchmarks/NAME hold published data sets",
    )
    add_running_arguments(where, parser.add_argument_group("running")).add_argument(
        "--json", action="store_true", help="print the metrics as JSON instead of the summary"
    )
    how = parser.add_argument_group("protocols")
    how.add_argument(
        "--k",
        type=functools.partial(whole, most=64),
        default=15,
        help="neighbours that vote, 1 to 64",
    )
    how.add_argument("--pca-dims", type=whole, default=50, help="principal axes before kNN")
    how.add_argument(
        "--pca",
        choices=["fold", "all"],
        default="fold",
        help="fit the axes on the training folds, or on everything (leaks; perhaps the paper's way)",
    )
    how.add_argument(
        "--folds",
        type=functools.partial(whole, least=2),
        default=10,
        help="folds of kNN; fewer where there are fewer groups",
    )
    how.add_argument("--seeds", type=whole, default=5, help="6:2:2 splits of the linear probe")
    how.add_argument(
        "--paper-splits",
        action="store_true",
        help="also split without regard to patients, to compare with published numbers",
    )
    how.add_argument(
        "--leaks",
        choices=["exclude", "mark"],
        default="exclude",
        help="images of patients or slides that a student was distilled on: leave out for all models, or "
        "only mark",
    )
    return parser


def add_running_arguments(where, run):
    """Add the flags that evaluate.py and robustness.py share to two argument groups; returns the second."""
    where.add_argument(
        "--runs", default=Path("runs"), type=Path, help="looked through for students"
    )
    where.add_argument(
        "--results", default=Path("results"), type=Path, help="features, metrics, tables, pictures"
    )
    run.add_argument(
        "--input-size",
        type=whole,
        metavar="PX",
        help="side of the networks' input, if not the published",
    )
    run.add_argument(
        "--batch-size",
        type=whole,
        metavar="N",
        help="images per forward pass; default by device, memory",
    )
    run.add_argument(
        "--workers",
        type=functools.partial(whole, least=0),
        default=0,
        metavar="N",
        help="processes that read images",
    )
    run.add_argument(
        "--max-unreadable",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of images, before it stops",
    )
    run.add_argument("--no-pictures", action="store_true", help="tables only")
    return run


def whole(text: str, least: int = 1, most: float = np.inf) -> int:
    """A whole number of a flag, from `least` to `most`."""
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a whole number from {least}"
            + (f" to {most}" if most < np.inf else "")
        )
    return int(text)


def directory(text: str) -> Path:
    """A folder of a flag; whether it is there is for its reader to tell."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; give its folder, {Path(text).parent}")
    return Path(text)


def models_at_hand(args: argparse.Namespace) -> list[str]:
    """Registry models whose weights are given or in the hub's cache, and the students of --runs; says what lacks."""
    from huggingface_hub import try_to_load_from_cache

    from models import REGISTRY, WEIGHT_FILES

    given = {spec.split("=", 1)[0] for spec in args.weights or () if "=" in spec}
    here = [
        n
        for n, e in REGISTRY.items()
        if n in given
        or any(isinstance(try_to_load_from_cache(e.hub, f), str) for f in WEIGHT_FILES)
    ]
    missing = [f"{n} (huggingface.co/{e.hub})" for n, e in REGISTRY.items() if n not in here]
    if missing:
        print(
            "models whose weights are not here (fetch, or give --weights NAME=FILE): "
            + ", ".join(missing),
            file=sys.stderr,
        )
    return here + [
        str(p) for p in sorted(args.runs.glob("*/student")) if (p / "model.safetensors").is_file()
    ]


def load_benchmarks(args: argparse.Namespace, failures: list[str]) -> list[Benchmark]:
    """The benchmarks asked for; one that cannot be read is told, put into `failures` and passed over."""
    found = []
    jobs = [("", functools.partial(load_folder, folder), "") for folder in args.benchmark]
    jobs += [
        (
            n,
            functools.partial(
                PUBLISHED[n].load, args.data / "benchmarks" / n, args.results / "index"
            ),
            PUBLISHED[n].count,
        )
        for n in args.benchmarks
    ]
    for name, load, published in jobs:
        try:
            loaded = load()
        except (UserError, PermissionError) as error:
            failures.append(
                f"{name}: {error}".removeprefix(": ")
            )  # a folder's errors begin with its path
            continue
        loaded = loaded if isinstance(loaded, list) else [loaded]
        if published:
            total = sum(len(b) for b in {b.source or b.name: b for b in loaded}.values())
            for b in loaded:
                b.notes.insert(0, f"{total:,} found, published {published}")
        found += loaded
    twice = [b.name for b in found if [o.name for o in found].count(b.name) > 1]
    if twice:
        raise UserError(f"--benchmark: two are called {twice[0]}; rename one of the folders")
    return found


def check_names(models: Sequence[str]) -> None:
    """UserError if two models would be kept under one name."""
    for name in models:
        if sum(safe(display(name)) == safe(display(other)) for other in models) > 1:
            raise UserError(
                f"--models: {name} and another share the name {safe(display(name))}; rename one of the "
                "folders"
            )


def run(args: argparse.Namespace) -> int:
    """Extract what is missing, measure what is new, write tables and pictures. Returns the exit status."""
    from models import leave_distributed, model_options, parse_weights, setup_distributed

    here = [n for n in PUBLISHED if at_hand(args.data, n)] if args.all else []
    args.benchmarks = list(dict.fromkeys([*args.benchmarks, *here]))
    if args.all and int(os.environ.get("RANK", 0)) == 0:
        for name in [n for n in PUBLISHED if n not in args.benchmarks]:
            print(
                f"benchmark {name} is not in {args.data}/benchmarks/{name}; from {PUBLISHED[name].source}",
                file=sys.stderr,
            )
    if args.all and not args.models:
        args.models = models_at_hand(args)
        args.teacher = args.teacher or ("h-optimus-0" if "h-optimus-0" in args.models else None)
        args.baseline = args.baseline or ("hibou-l" if "hibou-l" in args.models else None)
    args.models = list(
        dict.fromkeys([*args.models, *(n for n in (args.teacher, args.baseline) if n)])
    )
    lacks = []
    if not args.models:
        lacks.append(
            "no model: name one by --models, for instance h-optimus-0 (fetched from the hub, or --weights "
            "h-optimus-0=FILE) or runs/NAME/student (made by distill.py)"
        )
    if not args.benchmark and not args.benchmarks:
        lacks.append(
            "no benchmark: "
            + (
                f"none is below {args.data / 'benchmarks'}, and --list says where to get one; "
                "your own goes by --benchmark DIR"
                if args.all
                else "give --benchmark DIR, --benchmarks NAME (--list shows them) or --all"
            )
        )
    if lacks:
        raise UserError("; ".join(lacks))
    check_names(args.models)
    weights = parse_weights(args.weights, args.models)
    options = model_options(args) | ({"input_size": args.input_size} if args.input_size else {})
    rank, _, args.device_used = setup_distributed(args.device)
    failures: list[str] = []
    args.found, args.cards = load_benchmarks(args, failures), {}
    arrays: dict[str, list[str]] = {b.name: [] for b in args.found}
    lost: dict[str, int] = {}
    get = lambda name, benchmark, together: features(  # noqa: E731
        name,
        benchmark,
        args.results,
        weights=weights[name],
        batch_size=args.batch_size,
        workers=args.workers,
        max_unreadable=args.max_unreadable,
        together=together,
        **options,
    )
    for name in args.models:
        for benchmark in args.found:
            try:
                if missing := int(np.isnan(get(name, benchmark, True)).any(1).sum()):
                    lost[benchmark.name] = missing
                args.cards[name] = card(name, args.results, weights=weights[name], **options)
                arrays[benchmark.name].append(name)
            except UserError as error:
                failures.append(str(error))
                if name not in args.cards:
                    break  # the model itself cannot be loaded
    _load.cache_clear()
    leave_distributed()
    if rank != 0:  # the other ranks only share the images
        return 0
    args.models = [n for n in args.models if n in args.cards]
    record(
        args.results,
        [
            {
                "model": display(n),
                "benchmark": "",
                "protocol": "model",
                "metric": "parameters",
                "value": c["parameters"],
                "ms_per_image": c["ms_per_image"],
                "device": str(args.device_used),
                "weights": c["weights"],
                "metadata": {
                    k: v for k, v in c["metadata"].items() if k not in ("patients", "slides")
                },
            }
            for n, c in args.cards.items()
        ],
        same=("model", "protocol"),
    )
    done = []
    for benchmark in args.found:
        try:
            if arrays[benchmark.name]:
                evaluate(
                    benchmark, {n: get(n, benchmark, False) for n in arrays[benchmark.name]}, args
                )
                done.append(benchmark)
        except UserError as error:
            failures.append(str(error))
    args.found = done
    failures = list(dict.fromkeys(failures))
    if done:
        tables = write_tables(args)
        if not args.no_pictures:
            draw_figure1(args)
        write_report(args, tables, failures)
        if args.json:
            print(
                json.dumps(
                    [
                        r
                        for r in read_metrics(args.results)
                        if r["benchmark"] in {b.name for b in done}
                    ]
                )
            )
        else:
            print(
                summarize(args)
                + f"\n\ntables, pictures and how to read them: {args.results / 'report.md'}"
            )
    return finish(failures, lost)


def finish(failures: list[str], lost: dict[str, int]) -> int:
    """Say what is missing, of each benchmark how many images; the exit status."""
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    for name, missing in lost.items():
        print(
            f"{name}: {missing} images could not be read and were left out, which the exit status tells too",
            file=sys.stderr,
        )
    return int(bool(failures or lost))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.list:
        print(list_benchmarks(args.data))
        return 0
    return guarded(lambda: run(args))


def guarded(work: Callable[[], int]) -> int:
    """The exit status of `work`, the text of a user's mistake or of a disk that refuses instead of a traceback."""
    from safetensors import SafetensorError

    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError):  # it has no number, only a text
            if "I/O error" not in str(error):
                raise
            error = OSError(str(error))
        why = "no space left on the disk; make room" if disk_full(error) else f"{error}; mend it"
        print(f"error: {why} and run again: nothing was lost", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""TODO."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from g2l.benchmarks import Benchmark, load_folder, make_benchmark
from g2l.errors import UserError
from g2l.files import digest, files_below, read_json, read_table, stamp, write_text
from g2l.images import ImageFiles, Regions, SlidePatches, Squares, open_slide


def find_files(root: Path, pattern: str, what: str) -> list[Path]:
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
    table = find_files(root, "images-tcga-tils-metadata.csv", "the table of TCGA-TILs.tar.gz")[0]
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
    return [
        make_benchmark("tils", "patch", images, rows, ["til-negative", "til-positive"], root, notes)
    ]


def load_tp53(root: Path, cache: Path) -> list[Benchmark]:
    tables = [
        f
        for f in find_files(root, "*.csv", "labels: slide_id,label[,patient], label MUT or WT")
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
        make_benchmark(
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
    found = find_files(root, "*_class[01].png", "patches named PATIENT_idx5_xX_yY_classC.png")
    for f in sorted(
        found, key=lambda p: (len(p.parts), p)
    ):  # the archive holds everything twice, one level deeper
        files.setdefault(f.name, f)
    notes = [f"{len(found) - len(files)} nested copies left out"] if len(found) > len(files) else []
    classes = ["no IDC", "IDC"]
    rows = [
        (n, classes[int(n[-5])], n.split("_")[0]) for n in files
    ]  # by file name: folders are copied by hand
    return [
        make_benchmark(
            "idc", "patch", ImageFiles(list(files.values()), 50), rows, classes, root, notes
        )
    ]


def load_bracs(root: Path, cache: Path) -> list[Benchmark]:
    found = [
        f
        for f in find_files(
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
        make_benchmark(
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
    files = {
        f.name: f for f in find_files(root, "SOB_*.png", "SOB_B_A-14-22549CD-40-007.png and so on")
    }
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
                make_benchmark(
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
    return result or [make_benchmark("breakhis", "region", [], [], [], root)]


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


def grid_benchmark(
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
    return make_benchmark(name, "patch", Squares(where, side), rows, classes, root, known["notes"])


def load_gleason(root: Path, cache: Path, zurich: bool = False) -> list[Benchmark]:
    """Gleason2019 (training cores: masks of the others were never public) or Arvaniti et al. 2018, grouped by TMA."""
    from PIL import Image

    images = {
        f.stem: f
        for f in (
            find_files(root, "ZT*.jpg", "cores named ZT111_4_A_1_1.jpg")
            if zurich
            else find_files(root, "slide*_core*.jpg", "cores, in `Train Imgs`")
        )
    }
    maps: dict[str, list[Path]] = {}
    for f in (
        find_files(root, "mask*_ZT*.png", "masks named mask_ZT111_4_A_1_1.png")
        if zurich
        else find_files(
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
        grid_benchmark(
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
        f.stem: f
        for f in find_files(root, "Subset[12]_Train_*.tiff", "slides, in SubsetN_Train_image")
    }
    masks: dict[str, dict[str, Path]] = {name: {} for name in images}
    for f in find_files(root, "*_Mask.tif", "masks, in SubsetN_Train_annotation"):
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
    return [grid_benchmark("aggc", shares(), files, classes, lambda f: f.stem, notes, root, cache)]


def load_chimera(root: Path, cache: Path) -> list[Benchmark]:
    records = {
        f.stem: str(read_json(f).get("BCR"))
        for f in find_files(root, "*.json", "clinical_data/PID.json")
        if f.parent.name == "clinical_data"
    }
    slides = [
        f
        for f in find_files(root, "*.tif", "pathology/images/PID/PID_N.tif")
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
        make_benchmark(
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

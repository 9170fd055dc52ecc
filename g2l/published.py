"""The published benchmarks, each in the layout in which its authors give it.

A benchmark is one function, `load_NAME`, and one row of PUBLISHED at the end. The function takes
the folder and one for what it keeps (an index of labelled squares), finds the files by their names,
and gives the rows (id, class, group) to `make_benchmark`; it may return several benchmarks.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark, inside, load_folder, make_benchmark
from g2l.errors import UserError
from g2l.files import digest, files_below, read_json, read_table, stamp, write_text
from g2l.images import ImageFiles, Regions, SlidePatches, Squares, open_slide


def find_files(root: Path, pattern: str, what: str) -> list[Path]:
    """Files of this name pattern, in either case, below root; UserError that says what is there."""
    hits = [p for p in files_below(root) if fnmatch(p.name.lower(), pattern.lower())]
    if not hits:
        raise UserError(f"{root}: no {pattern} ({what}) in it; found: {inside(root)}")
    return hits


def told(count: int, what: str) -> list[str]:
    """A note on `count` things, if there are any."""
    return [f"{count} {what}"] if count else []


def load_tils(root: Path, cache: Path) -> list[Benchmark]:
    """TCGA-TILs, its breast part by the table, grouped by patient."""
    table = find_files(root, "images-tcga-tils-metadata.csv", "the table of TCGA-TILs.tar.gz")[0]
    # by study, so the folder `pancancer` of links is never entered
    lines = read_table(table, ("study", "barcode", "label", "path"))
    rows = [r for r in lines if r["study"].lower() == "brca"]
    files = [table.parent / r["path"] for r in rows]
    below = files_below(table.parent / "images-tcga-tils" / "brca")
    stray = {f for f in below if f.suffix.lower() == ".png"}.difference(files)
    notes = told(len(stray), "images without a line in the table left out")
    named = [(r["path"], r["label"], r["barcode"][:12]) for r in rows]
    classes = ["til-negative", "til-positive"]
    return [make_benchmark("tils", "patch", ImageFiles(files), named, classes, root, notes)]


def load_tp53(root: Path, cache: Path) -> list[Benchmark]:
    """Whole slides of TCGA-BRCA with the mutation of TP53, grouped by patient."""
    found = find_files(root, "*.csv", "labels: slide_id,label[,patient], label MUT or WT")
    tables = [f for f in found if f.name != "patients.csv"]
    if len(tables) != 1:
        names = ", ".join(f.name for f in tables)
        raise UserError(f"{root}: {len(tables)} tables of labels ({names}); leave one")
    slides = {}
    for folder in (root, root.parent.parent / "slides" / "brca"):
        for file in files_below(folder):
            if file.suffix.lower() == ".svs":
                slides[file.name.split(".")[0]] = file
    labels = read_table(tables[0], ("slide_id", "label"))
    rows = []
    for line in labels:
        name = line["slide_id"].split(".")[0]
        if name in slides:
            rows.append((name, line["label"], line.get("patient") or name[:12]))
    # slides without a label are not the same as wild type: nobody sequenced them
    notes = told(len(labels) - len(rows), "labels without a slide")
    notes += told(max(0, len(slides) - len(rows)), "slides without a label left out")
    images = SlidePatches([slides[name] for name, _, _ in rows])
    return [make_benchmark("tp53", "slide", images, rows, ["WT", "MUT"], root, notes)]


def load_idc(root: Path, cache: Path) -> list[Benchmark]:
    """Invasive ductal carcinoma, 50 px patches, grouped by patient."""
    files: dict[str, Path] = {}
    found = find_files(root, "*_class[01].png", "patches named PATIENT_idx5_xX_yY_classC.png")
    # the archive holds everything twice, one level deeper
    for f in sorted(found, key=lambda p: (len(p.parts), p)):
        files.setdefault(f.name, f)
    notes = told(len(found) - len(files), "nested copies left out")
    classes = ["no IDC", "IDC"]
    # by file name: folders are copied by hand
    rows = [(name, classes[int(name[-5])], name.split("_")[0]) for name in files]
    images = ImageFiles(list(files.values()), 50)
    return [make_benchmark("idc", "patch", images, rows, classes, root, notes)]


def load_bracs(root: Path, cache: Path) -> list[Benchmark]:
    """BRACS, regions of interest of seven lesions, grouped by slide."""
    what = "RoIs named BRACS_WSI_CLASS_N.png, in train, val and test"
    found = find_files(root, "BRACS_*.png", what)
    found = [f for f in found if f.parents[1].name in ("train", "val", "test")]
    # the server also holds previous versions of the same images: the latest comes last
    found.sort(key=lambda f: "latest_version" in f.parts)
    files = {f"{f.parents[1].name}/{f.name}": f for f in found}
    rows = []
    for name, f in files.items():
        rows.append((name, f.parent.name.split("_", 1)[-1], "BRACS_" + f.name.split("_")[1]))
    notes = told(len(found) - len(files), "copies left out")
    classes = ["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"]
    images = Regions(list(files.values()))
    return [make_benchmark("bracs", "region", images, rows, classes, root, notes)]


BREAKHIS_SUBTYPES = ["A", "F", "PT", "TA", "DC", "LC", "MC", "PC"]
BREAKHIS_FILE = re.compile(r"SOB_([BM])_([A-Z]+)-(\d+-\d+)([A-Z]*)-(\d+)-\d+\.(?i:png)")


def load_breakhis(root: Path, cache: Path) -> list[Benchmark]:
    """BreaKHis, two and eight classes at four magnifications, grouped by case: eight benchmarks."""
    hits = find_files(root, "SOB_*.png", "SOB_B_A-14-22549CD-40-007.png and so on")
    named = {f.name: (f, m) for f in hits if (m := BREAKHIS_FILE.fullmatch(f.name))}
    # Patient 13412 stands under DC and under LC with the same images: both labels cannot be right,
    # so neither is used.
    kept = [(f, m) for f, m in named.values() if not m[3].endswith("-13412")]
    zooms = sorted({m[5] for _, m in kept}, key=int)
    why = "left out (labelled DC and LC; all magnifications)"
    notes = [f"{len(named) - len(kept)} images of patient 13412 {why}"]
    if len(zooms) < 4:
        notes.append(f"only {', '.join(zooms)}X at hand")
    result = []
    kinds = {"B": "benign", "M": "malignant"}
    for task, classes in ("binary", ["benign", "malignant"]), ("subtype", BREAKHIS_SUBTYPES):
        for zoom in zooms:
            part = [(f, m) for f, m in kept if m[5] == zoom]
            rows = [(f.name, kinds[m[1]] if task == "binary" else m[2], m[3]) for f, m in part]
            images, name = Regions([f for f, _ in part]), f"breakhis-{task}-{zoom}x"
            result.append(make_benchmark(name, "region", images, rows, classes, root, notes))
            result[-1].source = f"breakhis-{zoom}x"  # both tasks share the images
    return result or [make_benchmark("breakhis", "region", [], [], [], root)]


SIDE = 256  # of the squares that are cut from cores and slides, px
GLEASON = ["benign", "G3", "G4", "G5"]
# Values of Gleason2019's maps by class; 6 is a slip that most readers take for benign.
VALUES_2019 = {1: 0, 6: 0, 3: 1, 4: 2, 5: 3}
VALUES_ZURICH = {0: 0, 1: 1, 2: 2, 3: 3}  # of Arvaniti's palette masks; 4 is ignored


def majority(maps: Sequence[ndarray], values: dict[int, int]) -> ndarray:
    """Class map (H, W) on which most of the experts who drew agree.

    It is -1 where none drew or two classes tie.
    """
    votes = np.zeros((4, *maps[0].shape), np.uint8)
    for drawn in maps:
        for value, c in values.items():
            votes[c] += drawn == value
    second, first = np.sort(votes, 0)[-2:]
    return np.where(first > second, votes.argmax(0), -1)


def grid_benchmark(
    name: str,
    shares_of: Callable[[Path], ndarray],
    images: dict[Path, list[Path]],
    classes: list[str],
    group: Callable[[Path], str],
    notes: list[str],
    root: Path,
    cache: Path,
) -> Benchmark:
    """Squares of SIDE px of which one class covers at least half.

    shares_of(image) gives the share (classes, rows, columns) that each class covers of the squares
    of an image; an image for which it raises OSError is left out with a note. images: each with
    the masks that belong to it. Squares without such a class, or with two (overlapping masks), are
    left out. What is found is kept in `cache` until a file changes.
    """
    files = [*images, *(mask for masks in images.values() for mask in masks)]
    path, key = cache / f"{name}.json", digest([stamp(f) for f in files], str(root), SIDE)
    known = read_json(path)
    if known.get("key") != key:
        found = []
        for file in images:
            try:
                shares = shares_of(file)
            except (OSError, SyntaxError) as error:  # the latter is Pillow's word for a damaged PNG
                notes.append(f"{file.name} left out: {error}")
                continue
            for r, c in np.argwhere((shares >= 0.5).sum(0) == 1).tolist():
                label = int(shares[:, r, c].argmax())
                found.append((str(file), c * SIDE, r * SIDE, label))
        known = {"key": key, "rows": found, "notes": notes}
        write_text(path, json.dumps(known))
    squares, rows = [], []
    for text, x, y, label in known["rows"]:
        file = Path(text)
        squares.append((file, x, y))
        rows.append((f"{file.stem}_{x}_{y}", classes[label], group(file)))
    return make_benchmark(
        name, "patch", Squares(squares, SIDE), rows, classes, root, known["notes"]
    )


def gleason_shares(core: Path, maps: dict[Path, list[Path]], values: dict[int, int]) -> ndarray:
    """Share (4, rows, columns) of each class in the squares of a core, by its experts' maps."""
    from PIL import Image

    with Image.open(core) as image:
        size = image.size
    masks = []
    for file in maps[core]:
        with Image.open(file) as mask:
            if mask.size != size or len(mask.getbands()) > 1:
                raise OSError(f"{file}: no map of one channel and the size of its core")
            masks.append(np.asarray(mask))
    classes = majority(masks, values)
    rows, columns = size[1] // SIDE, size[0] // SIDE
    whole = classes[: rows * SIDE, : columns * SIDE]
    squares = whole.reshape(rows, SIDE, columns, SIDE)
    return np.stack([(squares == c).mean((1, 3)) for c in range(4)])


def gleason_benchmark(
    name: str,
    cores: list[Path],
    maps_of: dict[str, list[Path]],
    values: dict[int, int],
    root: Path,
    cache: Path,
) -> list[Benchmark]:
    """Squares of tissue cores with Gleason's patterns, grouped by tissue microarray."""
    images = {f.stem: f for f in cores}
    maps = {images[core]: maps_of[core] for core in sorted(maps_of) if core in images}
    notes = [f"{len(maps)} cores with maps, {len(images) - len(maps)} without"]
    shares = functools.partial(gleason_shares, maps=maps, values=values)
    return [grid_benchmark(name, shares, maps, GLEASON, first_part, notes, root, cache)]


def first_part(file: Path) -> str:
    """What a file name says before its first underscore: of a core the microarray."""
    return file.stem.split("_")[0]


def load_gleason(root: Path, cache: Path) -> list[Benchmark]:
    """Gleason2019: its training cores, as the masks of the others were never public."""
    cores = find_files(root, "slide*_core*.jpg", "cores, in `Train Imgs`")
    pattern, what = "slide*_core*_classimg_nonconvex.png", "maps of the experts, in Maps1_T to"
    maps: dict[str, list[Path]] = {}
    for f in find_files(root, pattern, f"{what} Maps6_T"):
        maps.setdefault(f.stem.split("_classimg")[0], []).append(f)
    return gleason_benchmark("gleason", cores, maps, VALUES_2019, root, cache)


def load_arvaniti(root: Path, cache: Path) -> list[Benchmark]:
    """Arvaniti et al. 2018; of the two pathologists (mask1_, mask2_) the first, as its users do."""
    cores = find_files(root, "ZT*.jpg", "cores named ZT111_4_A_1_1.jpg")
    maps: dict[str, list[Path]] = {}
    for f in find_files(root, "mask*_ZT*.png", "masks named mask_ZT111_4_A_1_1.png"):
        maps.setdefault(f.stem.split("_", 1)[1], [f])
    return gleason_benchmark("gleason-arvaniti", cores, maps, VALUES_ZURICH, root, cache)


def drawn_share(mask: Path, size: tuple[int, int], side: int) -> ndarray:
    """Share (rows, columns) that is not 0 in every square of a TIFF mask of (height, width) px.

    Its tiles or strips are read one by one: whole, a mask has gigapixels. OSError for a damaged one
    or another size.
    """
    import tifffile

    rows, columns = (-(-n // side) for n in size)
    count = np.zeros((rows, columns), np.int64)
    try:
        with tifffile.TiffFile(mask) as file:
            page = file.pages[0]
            height, width = page.shape[:2]
            if (height, width) != size:
                raise OSError(f"{mask}: {width} x {height} px, not the size of its slide")
            for pixels, (*_, y, x, _), _ in page.segments():
                if pixels is None:  # left out by the writer: empty
                    continue
                pixels = pixels[0, : size[0] - y, : size[1] - x, 0] != 0  # a last tile hangs over
                r, first_row = np.unique((y + np.arange(len(pixels))) // side, return_index=True)
                c, first = np.unique((x + np.arange(pixels.shape[1])) // side, return_index=True)
                inside = np.add.reduceat(pixels, first_row, 0, np.int64)
                inside = np.add.reduceat(inside, first, 1)
                count[r[0] : r[-1] + 1, c[0] : c[-1] + 1] += inside
    # tifffile's words for a damaged file
    except (tifffile.TiffFileError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise OSError(f"{mask}: damaged ({error})") from error
    return count[: size[0] // side, : size[1] // side] / side**2


AGGC = ["Stroma", "Normal", "G3", "G4", "G5"]


def aggc_shares(slide: Path, masks: dict[Path, list[Path]]) -> ndarray:
    """Share (5, rows, columns) of each class in the squares of a slide; no mask, no such class."""
    with open_slide(slide) as opened:
        size = opened.height, opened.width
    shares = np.zeros((5, size[0] // SIDE, size[1] // SIDE))
    for mask in masks[slide]:
        shares[AGGC.index(first_part(mask))] = drawn_share(mask, size, SIDE)
    return shares


def load_aggc(root: Path, cache: Path) -> list[Benchmark]:
    """AGGC 2022, subsets 1 and 2, grouped by slide; subset 3 is the same tissue on six scanners."""
    slides = find_files(root, "Subset[12]_Train_*.tiff", "slides, in SubsetN_Train_image")
    images = {f.stem: f for f in slides}
    masks: dict[Path, list[Path]] = {f: [] for f in images.values()}
    for f in find_files(root, "*_Mask.tif", "masks, in SubsetN_Train_annotation"):
        if f.parent.name in images and first_part(f) in AGGC:
            masks[images[f.parent.name]].append(f)
    notes = [f"{sum(map(bool, masks.values()))} of {len(images)} slides with masks"]
    shares = functools.partial(aggc_shares, masks=masks)
    return [grid_benchmark("aggc", shares, masks, AGGC, lambda f: f.stem, notes, root, cache)]


def load_chimera(root: Path, cache: Path) -> list[Benchmark]:
    """CHIMERA, task 1: recurrence of prostate cancer from whole slides, grouped by patient."""
    classes = ["no recurrence", "recurrence"]
    label = {"0": classes[0], "0.0": classes[0], "1": classes[1], "1.0": classes[1]}
    records: dict[str, str] = {}
    for f in find_files(root, "*.json", "clinical_data/PID.json"):
        if f.parent.name == "clinical_data":
            records[f.stem] = str(read_json(f).get("BCR"))
    found = find_files(root, "*.tif", "pathology/images/PID/PID_N.tif")
    slides = [f for f in found if not f.stem.endswith("_tissue")]
    kept = [f for f in slides if records.get(f.parent.name) in label]
    rows = [(f.name, label[records[f.parent.name]], f.parent.name) for f in kept]
    lonely = set(records).difference(f.parent.name for f in slides)
    notes = ["no recurrence may mean a short follow-up: the label is censored"]
    notes += told(len(slides) - len(kept), "slides without a label left out")
    notes += told(len(lonely), "patients without slides")
    return [make_benchmark("chimera", "slide", SlidePatches(kept), rows, classes, root, notes)]


@dataclass(frozen=True)
class Published:
    """A published benchmark: how it is read, what its authors or the paper count, its origin."""

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
        load_arvaniti,
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
    """The command that fetches TIGER, the data set of Table 3, into a folder."""
    return f"aws s3 cp --no-sign-request --recursive s3://tiger-training/wsirois {folder}/wsirois"


def list_benchmarks(data: Path) -> str:
    """A table of every published benchmark: whether it is at hand, and where to get it."""
    rows = [("name", "level", "classes", "published count", "at hand", "licence", "where from")]
    here = {True: "found", False: "missing"}
    for name, about in PUBLISHED.items():
        state = str(about.classes), about.count, here[at_hand(data, name)]
        rows.append((name, about.level, *state, about.licence, about.source))
    state = "5", "195 slides (paper: 21 centres)", here[at_hand(data, "tiger")]
    where = f"for robustness.py only (Table 3): {tiger_source(data / 'benchmarks' / 'tiger')}"
    rows.append(("tiger", "patch", *state, "CC BY-NC 4.0, TCGA terms", where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def at_hand(data: Path, name: str) -> bool:
    """Whether there is anything below data/benchmarks/NAME."""
    folder = Path(data) / "benchmarks" / name
    return folder.is_dir() and any(folder.iterdir())


def load_published(name: str, data: Path, cache: Path) -> list[Benchmark]:
    """A published benchmark below `data`; a note says how much of it is there."""
    about = PUBLISHED[name]
    loaded = about.load(data / "benchmarks" / name, cache)
    images = {b.source or b.name: len(b) for b in loaded}  # tasks that share them count once
    for benchmark in loaded:
        count = f"{sum(images.values()):,} found, published {about.count}"
        benchmark.notes.insert(0, count)
    return loaded


def load_benchmarks(
    folders: Sequence[Path], names: Sequence[str], data: Path, cache: Path
) -> tuple[list[Benchmark], list[UserError]]:
    """The user's own benchmarks and the published ones, and an error for each that was passed over.

    data: published ones lie below its benchmarks/NAME. cache: folder for indices of squares.
    """
    jobs: list[tuple[str, Callable]] = []
    for folder in folders:
        jobs.append(("", lambda folder=folder: [load_folder(folder)]))
    for name in names:
        jobs.append((f"{name}: ", functools.partial(load_published, name, data, cache)))
    found: list[Benchmark] = []
    failed = []
    for name, load in jobs:
        try:
            found += load()
        except (UserError, PermissionError) as error:
            failed.append(UserError(f"{name}{error}", getattr(error, "mend", "")))
    named = [benchmark.name for benchmark in found]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise UserError(f"two benchmarks are called {twice[0]}", mend="benchmark names")
    return found, failed

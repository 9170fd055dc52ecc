"""The published benchmarks, each in the layout in which its authors give it.

A benchmark is one function, `load_NAME`, and a section of ABOUT. The function takes the folder
and the user's choices, finds the files by their names, and gives the rows (id, class, group) to
`make_benchmark`; it may return several benchmarks.
"""

import configparser
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from g2l.benchmarks import Benchmark, Choices, inside, make_benchmark, told
from g2l.errors import UserError
from g2l.files import aligned, digest, files_below, read_json, read_table, stamp, write_text
from g2l.images import ImageFiles, ImageSource, Regions, Squares, class_shares, open_slide
from g2l.multicentre import load_multicentre, tiger_source
from g2l.slide_tables import Labels, followed, load_slides_table, read_labels, slide_benchmark
from g2l.workbook import read_sheets

Found = list[Benchmark]
Values = dict[int, int]  # class by value of a mask
Maps = dict[str, list[Path]]  # of each image, by its stem


def find_files(root: Path, pattern: str, what: str) -> list[Path]:
    """Files of this name pattern, in either case, below root; UserError that says what is there."""
    hits = [p for p in files_below(root) if fnmatch(p.name.lower(), pattern.lower())]
    if not hits:
        raise UserError(f"{root}: no {pattern} ({what}) in it; found: {inside(root)}")
    return hits


def load_tils(root: Path, choices: Choices) -> Found:
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


TP53_WORDS = {"wt": "WT", "0": "WT", "mut": "MUT", "1": "MUT"}


def load_tp53(root: Path, choices: Choices) -> Found:
    """Whole slides of TCGA-BRCA with the mutation of TP53, grouped by patient.

    Slides without a label are not the same as wild type: nobody sequenced them.
    """
    found = find_files(root, "*.csv", "labels: slide_id,label[,patient] or patient,label")
    tables = [f for f in found if f.name != "patients.csv"]
    if len(tables) != 1:
        names = f"({', '.join(f.name for f in tables)})"
        raise UserError(f"{root}: {len(tables)} tables of labels {names}; leave one")
    below = files_below(root) + files_below(root.parent.parent / "slides" / "brca")
    files = [f for f in below if f.suffix.lower() == ".svs"]
    labels = read_labels(tables[0], TP53_WORDS)
    return [slide_benchmark("tp53", labels, files, ["WT", "MUT"], root, choices)]


def load_idc(root: Path, choices: Choices) -> Found:
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


def bracs_patients(root: Path) -> dict[str, str]:
    """The patient of each slide by the BRACS.xlsx that comes with the slides; none without it."""
    patients = {}
    for book in [f for f in files_below(root) if f.name.lower() == "bracs.xlsx"]:
        for head, *rows in filter(None, read_sheets(book)):
            column = {text.lower(): letters for letters, text in head.items()}
            slide = column.get("wsi filename")
            patient = column.get("patient id")
            for row in rows:
                if slide in row and patient in row:
                    patients[row[slide].removesuffix(".svs")] = row[patient]
        if not patients:
            raise UserError(f"{book}: no sheet has the columns WSI Filename and Patient Id")
    return patients


def load_bracs(root: Path, choices: Choices) -> Found:
    """BRACS, regions of interest of seven lesions, grouped by patient as BRACS.xlsx says, else by
    slide.
    """
    found = find_files(
        root, "BRACS_*.png", "RoIs named BRACS_WSI_CLASS_N.png, in train, val and test"
    )
    found = [f for f in found if f.parents[1].name in ("train", "val", "test")]
    # the server also holds previous versions of the same images: the latest comes last
    found.sort(key=lambda f: "latest_version" in f.parts)
    files = {f"{f.parents[1].name}/{f.name}": f for f in found}
    rows = []
    for name, f in files.items():
        rows.append((name, f.parent.name.split("_", 1)[-1], "BRACS_" + f.name.split("_")[1]))
    notes = told(len(found) - len(files), "copies left out")
    patients = bracs_patients(root)
    classes = ["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"]
    images = Regions(list(files.values()), choices.region_size)
    return [make_benchmark("bracs", "region", images, rows, classes, root, notes, patients)]


BREAKHIS_TASKS = {
    "binary": ["benign", "malignant"],
    "subtype": ["A", "F", "PT", "TA", "DC", "LC", "MC", "PC"],
}
BREAKHIS_FILE = re.compile(r"SOB_([BM])_([A-Z]+)-(\d+-\d+)([A-Z]*)-(\d+)-\d+\.(?i:png)")


def breakhis_files(root: Path) -> list[tuple[Path, re.Match]]:
    """The images, each once, with what their names say."""
    files = {}
    for f in find_files(root, "SOB_*.png", "SOB_B_A-14-22549CD-40-007.png and so on"):
        if match := BREAKHIS_FILE.fullmatch(f.name):
            files[f.name] = f, match
    return list(files.values())


def load_breakhis(root: Path, choices: Choices) -> Found:
    """BreaKHis, two and eight classes at four magnifications, grouped by case: eight benchmarks.

    Patient 13412 stands under DC and under LC with the same images: both labels cannot be right, so
    neither is used unless that is chosen.
    """
    named = breakhis_files(root)
    doubtful = [f for f, match in named if match[3].endswith("-13412")]
    if not choices.keep_13412:
        named = [(f, match) for f, match in named if f not in doubtful]
    zooms = sorted({match[5] for _, match in named}, key=int)
    fate = "kept" if choices.keep_13412 else "left out"
    notes = [
        f"{len(doubtful)} images of patient 13412 {fate} (labelled DC and LC; all magnifications)"
    ]
    if len(zooms) < 4:
        notes.append(f"only {', '.join(zooms)}X at hand")
    result = []
    for task, classes in BREAKHIS_TASKS.items():
        for zoom in zooms:
            files = []
            rows = []
            for f, match in named:
                if match[5] == zoom:
                    files.append(f)
                    rows.append((f.name, breakhis_class(task, match), match[3]))
            images = Regions(files, choices.region_size)
            name = f"breakhis-{task}-{zoom}x"
            made = make_benchmark(name, "region", images, rows, classes, root, notes)
            made.source = f"breakhis-{zoom}x"  # both tasks share the images
            result.append(made)
    return result or [make_benchmark("breakhis", "region", [], [], [], root)]


def breakhis_class(task: str, match: re.Match) -> str:
    """What the name of a file says."""
    if task == "subtype":
        return match[2]
    return "benign" if match[1] == "B" else "malignant"


SIDE = 256  # of the squares that are cut from cores and slides, px
GLEASON = ["benign", "G3", "G4", "G5"]
# Values of Gleason2019's maps by class; 6 is a slip that most readers take for benign. Value 0 is
# what an expert left open: no vote.
VALUES_2019 = {1: 0, 6: 0, 3: 1, 4: 2, 5: 3}
VALUES_ZURICH = {0: 0, 1: 1, 2: 2, 3: 3}  # of Arvaniti's palette masks; 4 is ignored


def majority(maps: Sequence[ndarray], values: Values) -> ndarray:
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
    images: Sequence[Path],
    masks: Maps,
    shares_of: Callable[[Path, list[Path]], ndarray],
    classes: list[str],
    group: Callable[[Path], str],
    notes: list[str],
    root: Path,
    choices: Choices,
) -> Found:
    """Squares of SIDE px of which one class covers at least half.

    masks: of each image, by its stem. shares_of(image, its masks) gives the share (classes, rows,
    columns) that each class covers of the squares of an image; an image for which it raises OSError
    is left out with a note. Squares without such a class, or with two (overlapping masks), are left
    out. What is found is kept until a file changes.
    """
    files = {file.stem: file for file in images}
    drawn = {file: masks[name] for name, file in files.items() if name in masks}
    notes.insert(0, f"{len(drawn)} of {len(images)} images with masks")
    watched = [*drawn, *itertools.chain(*drawn.values())]
    path = choices.results / "index" / f"{name}.json"
    key = digest([stamp(f) for f in watched], str(root), SIDE)
    known = read_json(path)
    if known.get("key") != key:
        found = []
        for file in drawn:
            try:
                shares = shares_of(file, drawn[file])
            except (OSError, SyntaxError) as error:  # the latter is Pillow's word for a damaged PNG
                notes.append(f"{file.name} left out: {error}")
                continue
            for r, c in np.argwhere((shares >= 0.5).sum(0) == 1).tolist():
                found.append((str(file), c * SIDE, r * SIDE, int(shares[:, r, c].argmax())))
        known = {"key": key, "rows": found, "notes": notes}
        write_text(path, json.dumps(known))
    squares = []
    rows = []
    for text, x, y, label in known["rows"]:
        file = Path(text)
        squares.append((file, x, y))
        rows.append((f"{file.stem}_{x}_{y}", classes[label], group(file)))
    cut = Squares(squares, SIDE)
    notes = known["notes"]
    return [make_benchmark(name, "patch", cut, rows, classes, root, notes)]


def gleason_shares(core: Path, maps: list[Path], values: Values) -> ndarray:
    """Share (4, rows, columns) of each class in the squares of a core, by its experts' maps."""
    return class_shares(gleason_map(core, maps, values), SIDE, range(4))


def gleason_map(core: Path, maps: Sequence[Path], values: Values) -> ndarray:
    """Classes (H, W) of a core by its experts' maps, -1 for none."""
    with Image.open(core) as image:
        size = image.size
    drawn = []
    for file in maps:
        with Image.open(file) as mask:
            if mask.size != size or len(mask.getbands()) > 1:
                raise OSError(f"{file}: no map of one channel and the size of its core")
            drawn.append(np.asarray(mask))
    return majority(drawn, values)


def with_masks(found: Found, maps: Maps, values: Values) -> Found:
    """The same squares of cores, each with the map of its classes."""
    squares: Any = found[0].images

    @functools.lru_cache(maxsize=1)  # squares of a core follow one another
    def whole(core: Path) -> ndarray:
        return gleason_map(core, maps[core.stem], values)

    def cut(square: tuple[Path, int, int]) -> ndarray:
        core, x, y = square
        return whole(core)[y : y + SIDE, x : x + SIDE]

    files = itertools.chain(*maps.values())
    found[0].masks = ImageSource(squares.items, cut, rule=digest([stamp(file) for file in files]))
    return found


stem = operator.attrgetter("stem")  # of a file


def first_part(file: Path) -> str:
    """What a file name says before its first underscore: of a core of 2019 the microarray."""
    return file.stem.split("_")[0]


def load_gleason(root: Path, choices: Choices) -> Found:
    """Gleason2019: its training cores, as the masks of the others were never public.

    An expert whose folder is there twice votes once.
    """
    cores = find_files(root, "slide*_core*.jpg", "cores, in `Train Imgs`")
    pattern = "slide*_core*_classimg_nonconvex.png"
    what = "maps of the experts, in Maps1_T to"
    votes: dict[tuple[str, str], Path] = {}
    found = find_files(root, pattern, f"{what} Maps6_T")
    for f in found:
        expert = re.search(r"Maps\d+_T", str(f.relative_to(root)), re.I)
        votes.setdefault((f.name, expert[0].lower() if expert else str(f.parent)), f)
    maps: Maps = {}
    for f in votes.values():
        maps.setdefault(f.stem.split("_classimg")[0], []).append(f)
    notes = ["majority of the experts who drew; value 0 of a map is no vote"]
    notes += told(len(found) - len(votes), "copies of experts' maps left out")
    shares = functools.partial(gleason_shares, values=VALUES_2019)
    about = GLEASON, first_part, notes, root, choices
    return with_masks(grid_benchmark("gleason", cores, maps, shares, *about), maps, VALUES_2019)


def load_arvaniti(root: Path, choices: Choices) -> Found:
    """Arvaniti et al. 2018, a patient a core; of the two pathologists (mask1_, mask2_) the first,
    as its users do.
    """
    cores = find_files(root, "ZT*.jpg", "cores named ZT111_4_A_1_1.jpg")
    maps: Maps = {}
    for f in find_files(root, "mask*_ZT*.png", "masks named mask_ZT111_4_A_1_1.png"):
        maps.setdefault(f.stem.split("_", 1)[1], [f])
    shares = functools.partial(gleason_shares, values=VALUES_ZURICH)
    found = grid_benchmark(
        "gleason-arvaniti", cores, maps, shares, GLEASON, stem, [], root, choices
    )
    return with_masks(found, maps, VALUES_ZURICH)


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
                pixels = pixels[0, : size[0] - y, : size[1] - x, 0]  # a last tile hangs over
                below, right = np.nonzero(pixels)
                np.add.at(count, ((y + below) // side, (x + right) // side), 1)
    # tifffile's words for a damaged file
    except (tifffile.TiffFileError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise OSError(f"{mask}: damaged ({error})") from error
    return count[: size[0] // side, : size[1] // side] / side**2


AGGC = ["Stroma", "Normal", "G3", "G4", "G5"]


def aggc_shares(slide: Path, masks: list[Path]) -> ndarray:
    """Share (5, rows, columns) of each class in the squares of a slide; no mask, no such class."""
    with open_slide(slide) as opened:
        size = opened.height, opened.width
    shares = np.zeros((5, size[0] // SIDE, size[1] // SIDE))
    for mask in masks:
        shares[AGGC.index(first_part(mask))] = drawn_share(mask, size, SIDE)
    return shares


def load_aggc(root: Path, choices: Choices) -> Found:
    """AGGC 2022, subsets 1 and 2, grouped by slide; subset 3 is the same tissue on six scanners."""
    slides = find_files(root, "Subset[12]_Train_*.tiff", "slides, in SubsetN_Train_image")
    masks: Maps = {}
    for f in find_files(root, "*_Mask.tif", "masks, in SubsetN_Train_annotation"):
        if first_part(f) in AGGC:
            masks.setdefault(f.parent.name, []).append(f)
    return grid_benchmark("aggc", slides, masks, aggc_shares, AGGC, stem, [], root, choices)


CHIMERA = {"0": "no recurrence", "1": "recurrence"}


def load_chimera(root: Path, choices: Choices) -> Found:
    """CHIMERA, task 1: recurrence of prostate cancer from whole slides, grouped by patient."""
    labels = Labels("patient")
    for f in find_files(root, "*.json", "clinical_data/PID.json"):
        about = read_json(f)
        recurrence = str(about.get("BCR")).removesuffix(".0")
        if f.parent.name == "clinical_data" and recurrence in CHIMERA:
            labels.classes[f.stem] = CHIMERA[recurrence]
            months = about.get("time_to_follow-up/BCR")
            if months is not None:
                labels.survival[f.stem] = followed(str(f), months, recurrence)
    found = find_files(root, "*.tif", "pathology/images/PID/PID_N.tif")
    slides = [f for f in found if not f.stem.endswith("_tissue")]
    notes = ["no recurrence may mean a short follow-up: the label is censored"]
    classes = list(CHIMERA.values())
    return [slide_benchmark("chimera", labels, slides, classes, root, choices, notes)]


# TIGER is for robustness.py alone (Table 3).
ABOUT = """
[tils]
level = patch
classes = 2
group = patient
µm per pixel = 0.5
published count = 5,245 (breast)
where from = zenodo.org/records/6604094, TCGA-TILs.tar.gz
licence = see the record

[tp53]
level = slide
classes = 2
group = patient
µm per pixel = 0.25
published count = 511 slides
where from = GDC diagnostic slides (tile.py --cancer brca --download),
  a table slide_id,label[,patient]
licence = TCGA open access

[idc]
level = patch
classes = 2
group = patient
µm per pixel = 0.25
published count = 277,524 (198,738 / 78,786)
where from = kaggle.com paultimothymooney/breast-histopathology-images
licence = see Kaggle

[bracs]
level = region
classes = 7
group = slide
µm per pixel = 0.25
published count = 4,539 (paper 4,537)
where from = bracs.icar.cnr.it, BRACS_RoI after its form;
  with BRACS.xlsx beside it groups are patients
licence = CC BY-NC 4.0

[breakhis]
level = region
classes = 8
group = patient
µm per pixel = 0.49 at 40X to 0.05 at 400X
published count = 7,909 (2,480 / 5,429)
where from = inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz
licence = CC BY 4.0

[gleason]
level = patch
classes = 4
group = microarray
µm per pixel = 0.25
published count = 77,364 of 331 cores (244 public)
where from = gleason2019.grand-challenge.org after registration
licence = see the challenge

[gleason-arvaniti]
level = patch
classes = 4
group = patient
µm per pixel = 0.23
published count = 886 cores
where from = doi.org/10.7910/DVN/OCYCMP
licence = CC0

[aggc]
level = patch
classes = 5
group = slide
µm per pixel = about 0.5
published count = 156,130 (142 slides with masks)
where from = aggc22.grand-challenge.org after registration
licence = CC BY-NC-SA 4.0

[chimera]
level = slide
classes = 2
group = patient
µm per pixel = 0.25
published count = 190 slides, 95 patients
where from = s3://chimera-challenge/v2/task1, anonymous
licence = see the challenge

[tiger]
level = patch
classes = 5
group = patient
µm per pixel = 0.5
published count = 195 slides (paper: 21 centres)
where from = for robustness.py only (Table 3):
licence = CC BY-NC 4.0, TCGA terms
"""
SECTIONS = configparser.ConfigParser()
SECTIONS.read_string(ABOUT)
PUBLISHED = {
    "tils": load_tils,
    "tp53": load_tp53,
    "idc": load_idc,
    "bracs": load_bracs,
    "breakhis": load_breakhis,
    "gleason": load_gleason,
    "gleason-arvaniti": load_arvaniti,
    "aggc": load_aggc,
    "chimera": load_chimera,
}


SECTIONS["tiger"]["where from"] += " " + tiger_source("DATA/benchmarks/tiger")


COLUMNS = (
    "name",
    "level",
    "classes",
    "group",
    "µm per pixel",
    "published count",
    "at hand",
    "licence",
    "where from",
)


def list_benchmarks(data: Path) -> str:
    """A table of every published benchmark: whether it is at hand, and where to get it."""
    rows: list[Sequence[str]] = [COLUMNS]
    for name in SECTIONS.sections():
        about = {"name": name, "at hand": "found" if at_hand(data, name) else "missing"}
        about |= SECTIONS[name]
        texts = [about[column] for column in COLUMNS]
        rows.append([cell.replace("DATA", str(data)).replace("\n", " ") for cell in texts])
    return aligned(rows)


def at_hand(data: Path, name: str) -> bool:
    """Whether there is anything below data/benchmarks/NAME."""
    folder = data / "benchmarks" / name
    return folder.is_dir() and any(folder.iterdir())


def load_published(name: str, choices: Choices) -> Found:
    """A published benchmark; notes say how much of it is there, and what it is."""
    about = SECTIONS[name]
    loaded = PUBLISHED[name](choices.data / "benchmarks" / name, choices)
    images = {b.source or b.name: len(b) for b in loaded}  # tasks that share them count once
    count = f"{sum(images.values()):,} found, published {about['published count']}"
    for benchmark in loaded:
        groups = f"groups are {benchmark.unit or about['group']}s"
        benchmark.notes[:0] = [
            count,
            f"{groups}; µm per pixel: {benchmark.mpp or about['µm per pixel']}",
        ]
    return loaded


def load_benchmarks(
    folders: Sequence[Path], names: Sequence[str], choices: Choices
) -> tuple[Found, list[UserError]]:
    """The user's own benchmarks and the published ones, and an error for each that was passed
    over.
    """
    found: Found = []
    failed = []
    wanted: list[Any] = [*folders, *choices.slides_table, *names]
    for what in wanted:
        try:
            if what in choices.slides_table:
                found.append(load_slides_table(what, choices))
            elif isinstance(what, Path):
                found.append(load_multicentre(what, SIDE, 0.5)[0])
            else:
                found += load_published(what, choices)
        except (UserError, PermissionError) as error:
            name = f"{what}: " if isinstance(what, str) else ""
            failed.append(UserError(f"{name}{error}", mend=getattr(error, "mend", "")))
    named = [benchmark.name for benchmark in found]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise UserError(f"two benchmarks are called {twice[0]}", mend="benchmark names")
    return found, failed

"""Which slides a cohort has, whose they are, and which of them are taken.

First a name and a patient for each slide, then the slides of a folder (`find_slides`), those that a
manifest names (`local_slides`), and last the choice: patients held out, kind of section, a seeded
sample (`select`).
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from g2l.errors import SkippedSlide, UserError
from g2l.files import files_below, read_table, read_text, separator, size_of
from g2l.rows import cells_of, one_line
from g2l.slides import SUFFIXES, slide_name

TCGA = (
    "acc blca brca cesc chol coad dlbc esca gbm hnsc kich kirc kirp laml lgg lihc luad lusc meso "
    "ov paad pcpg prad read sarc skcm stad tgct thca thym ucec ucs uvm"
).split()
Names = set[str]  # of slides or patients


def patient_of(name: str) -> str:
    """Patient of a slide or image by its name: the first 12 characters of a TCGA barcode; else the
    stem up to and with the first of its parts between "_" that holds a digit ("P1_a" -> "P1",
    "case_001_HE" -> "case_001"); else the stem.
    """
    stem = slide_name(name)
    barcode = re.search(
        r"\bTCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", stem.replace("_", " "), flags=re.IGNORECASE
    )
    if barcode:
        return barcode[0].upper()
    first = re.match(r"\D*\d[^_]*", stem)
    return first[0] if first else stem


def hashed(name: str) -> str:
    """The name of a patient or slide so that who knows it can find it, and nobody else reads it."""
    return hashlib.sha256(name.upper().encode()).hexdigest()[:16]


def hashed_cohort(metadata: Mapping, kind: str) -> list[str]:
    """The "patients" or "slides" that a student was distilled on, hashed as `kind` of its metadata
    is; older students have plain names there."""
    names = [str(name) for name in metadata.get(kind) or () if str(name)]
    return names if metadata.get("hashed") else [hashed(name) for name in names]


@dataclass
class CohortSlide:
    """One slide of a cohort: where it is or will be, and what a manifest or the GDC says about
    it.
    """

    name: str
    path: Path
    mpp: float | None = None  # µm per pixel
    id: str = ""  # of the GDC, empty for a slide of the user's
    size: int = 0  # bytes
    md5: str = ""  # or the ETag of an address
    address: str = ""  # where it can be had
    stated: str = ""  # its patient, where the manifest says
    kin: Names = field(default_factory=set)  # patients of its copies

    @property
    def patient(self) -> str:
        return self.stated or patient_of(self.name)

    @property
    def patients(self) -> Names:
        """Whose it is, as stated, else by its name, or by the file's where another has the same:
        held out if any is.
        """
        own = {self.stated} if self.stated else {patient_of(self.name), patient_of(self.path.name)}
        return own | self.kin

    def __str__(self) -> str:
        return self.name


Cohort = list[CohortSlide]


def slide_of(row: dict[str, str]) -> CohortSlide:
    """A slide of an earlier run by its row, whatever patient it was taken for."""
    path = Path(row["path"])
    kin = {patient_of(row["slide"]), patient_of(path.name)}
    return CohortSlide(row["slide"], path, stated=row["patient"], kin=kin)


def find_slides(folder: Path) -> list[Path]:
    """Slides below a folder and the folders linked there, sorted by name, dead links too; hidden
    files are left out.

    Of the several files of one DICOM slide only the first is listed.
    """
    found = []
    for path in files_below(folder):
        hidden = "/." in f"/{path.relative_to(folder)}"
        special = path.exists() and not path.is_file()  # a pipe or a socket
        if path.suffix.lower() in SUFFIXES and not hidden and not special:
            found.append(path)
    found.sort(key=lambda path: (path.name, str(path)))
    dicom = [path for path in found if path.suffix.lower() == ".dcm"]
    if len({path.parent for path in dicom}) < len(dicom):
        further = _further_files(dicom)
        found = [path for path in found if path not in further]
    return found


def _further_files(dicom: list[Path]) -> set[Path]:
    """The files whose slide has another before them."""
    import openslide

    seen = set()
    further = set()
    for path in dicom:
        with (
            contextlib.suppress(openslide.OpenSlideError),
            openslide.OpenSlide(str(path)) as slide,
        ):
            key = path.parent, slide.properties.get("openslide.quickhash-1", path)
            if key in seen:
                further.add(path)
            seen.add(key)
    return further


def name_slides(paths: Iterable[Path]) -> dict[str, Path]:
    """A name for each slide: its stem; where several share it, with the folder or the suffix, until
    it is one's own.
    """
    names = {}
    stems = Counter(slide_name(path) for path in paths)
    for path in paths:
        stem = slide_name(path)
        longer = (
            f"{path.parent.name}_{stem}",
            path.name,
            str(path).strip("/").replace("/", "_"),
        )
        for choice in (stem, *longer):
            name = one_line(choice)
            if (choice != stem or stems[stem] == 1) and name not in names:
                names[name] = path
                break
    return names


def read_manifest(path: Path) -> Cohort:
    """What a GDC manifest (id, filename, md5, size) or a CSV with slide[,mpp][,patient] names.

    The path is as it stands there. Raises UserError where the file is neither.
    """
    listed = []
    for row in read_table(path, ()):
        cells = {key.lower(): value for key, value in row.items()}
        columns = ("filename", "slide", "slide_id", "wsi", "path")
        name = next((cells[column] for column in columns if cells.get(column)), "")
        if name:
            listed.append(_listed(path, name, cells))
    if not listed:
        raise UserError(f"{path}: names no slides", mend="manifest")
    return listed


def _listed(manifest: Path, name: str, cells: dict[str, str]) -> CohortSlide:
    """One row of a manifest."""
    size = cells.get("size") or "0"
    mpp = cells.get("mpp", "").replace(",", ".")
    for text, pattern, what in (
        (size, r"\d+", "bytes"),
        (
            mpp,
            r"|(?=.*[1-9])\d*\.?\d*",
            "micrometres per pixel, such as 0.5 (20x)",
        ),  # above 0
    ):
        if not re.fullmatch(pattern, text):
            raise UserError(
                f"{manifest}: {text}: expected {what} in the row of {name}", mend="manifest"
            )
    patient = cells.get("patient", "")
    if patient.upper().startswith("TCGA-"):  # a sample's barcode: benchmarks name patients
        patient = patient_of(patient)
    return CohortSlide(
        name=name,
        path=Path(name),
        mpp=float(mpp) if mpp else None,
        id=cells.get("id", ""),
        size=int(size),
        md5=cells.get("md5", ""),
        stated=patient,
    )


def local_slides(folder: Path, manifest: Path | None = None) -> tuple[Cohort, list[str]]:
    """(the slides in a folder, or those that the manifest names; what a user should know of them).

    A link to another slide of the folder is left out; copies count as one patient's. Raises
    UserError where there is no slide, and where a name in the manifest fits several.
    """
    first: dict[str, Path] = {}
    notes = []
    for path in sorted(find_slides(folder), key=Path.is_symlink):
        taken = first.setdefault(os.path.realpath(path), path)
        if taken != path:
            notes.append(f"{path}: a link to {taken}, which is taken")
    at_hand = list(first.values())
    if manifest:
        slides, missing = _named_slides(folder, at_hand, manifest)
        if missing:
            notes.append(
                f"{len(missing)} slides of {manifest} are not in {folder} (first: {missing[0]})"
            )
    elif at_hand:
        named = name_slides(at_hand)
        slides = [CohortSlide(name, path, size=size_of(path)) for name, path in named.items()]
    elif folder.is_dir():
        raise UserError(
            f"{folder}: no slides in it (looked for {', '.join(SUFFIXES)})", mend="slides"
        )
    else:
        raise UserError(f"{folder}: no such folder", mend="slides")
    return slides, notes + join_copies(slides)


def _named_slides(folder: Path, at_hand: list[Path], manifest: Path) -> tuple[Cohort, list[str]]:
    """(slides that a manifest names, names that are not at hand)."""
    rows = read_manifest(manifest)
    places = {os.path.abspath(path): path for path in at_hand}
    for row in rows:
        parents = Path(), manifest.parent, folder, folder / row.id
        paths = [Path(os.path.abspath(parent / row.path)) for parent in parents]
        row.path = next(filter(Path.is_file, paths), row.path)
        if row.path.is_file():
            places.setdefault(str(row.path), row.path)
    named = name_slides(places.values())
    called = _calls(named)
    slides = {}
    missing = []
    for row in rows:
        keys = (os.path.abspath(row.path), row.path.name, slide_name(row.path))
        found = sorted(next((called[key] for key in keys if key in called), ()))
        if len(found) > 1:
            raise UserError(
                f"{manifest}: {row.name}: "
                f"{len(found)} slides are called so: {', '.join(found)}"
                "; name one of them, or its path"
            )
        for name in found:
            size = row.size or size_of(named[name])
            slides[name] = dataclasses.replace(row, name=name, path=named[name], size=size)
        if not found:
            missing.append(row.name)
    if not slides:
        raise UserError(
            f"{manifest}: none of its {len(missing)} slides is in {folder}, first {missing[0]}",
            mend="slides",
        )
    return list(slides.values()), missing


def _calls(named: dict[str, Path]) -> dict[str, Names]:
    """The slides, by their names, that a manifest may mean by a path, a name or a file's name."""
    called: dict[str, Names] = defaultdict(set)
    for name, path in named.items():
        for key in (os.path.abspath(path), name, path.name, slide_name(path)):
            called[key].add(name)
    return called


def join_copies(slides: Cohort) -> list[str]:
    """Make slides of the same content one patient's, so that none is held out of a set that has
    another; tells which.

    A patient that a manifest states stays.
    """
    sizes = Counter(slide.size for slide in slides)
    groups: dict[str, Cohort] = defaultdict(list)
    for slide in slides:
        if slide.size and sizes[slide.size] > 1:
            groups[_fingerprint(slide.path)].append(slide)
    notes = []
    for first, *others in groups.values():
        patient = first.patient
        kin = first.patients
        for other in others:
            kin |= other.patients
            other.stated = other.stated or patient
            notes.append(f"{other.path}: a copy of {first.path}; both count as patient {patient}'s")
        for slide in (first, *others):
            slide.kin = kin
    return notes


def _fingerprint(path: Path) -> str:
    """Of a slide's content: a hash of 16 samples of each of its files (MIRAX has its pixels in a
    folder beside it); of one that cannot be read, its path.
    """
    part = 1 << 16
    digest = hashlib.sha256()
    files = [path]
    if path.suffix.lower() == ".mrxs":
        files += sorted(path.with_suffix("").glob("*.dat"))
    try:
        for name in files:
            size = size_of(name)
            digest.update(f"{name.suffix} {size}".encode())
            with open(name, "rb") as file:
                for number in range(16):
                    file.seek(max(0, size - part) * number // 15)
                    digest.update(file.read(part))
    except OSError:
        return str(path)
    return digest.hexdigest()


def select(
    slides: Cohort,
    held: Names,
    strategy: str = "both",
    limit: int = 0,
    seed: int = 0,
) -> tuple[Cohort, dict[str, SkippedSlide]]:
    """(slides chosen, reason of each other by name): patients held out, kind of section, then a
    sample of `limit`.

    The order is a hash of seed and name, so that a slide more or less does not change who else is
    drawn. Diagnostic slides come first. A limit of 0 takes all.
    """
    reasons = {}
    wanted = []
    for slide in slides:
        section = re.match(r"TCGA-\w\w-\w{4}-\w{3}-\w\w-([A-Z]+)", slide.name)
        kind = "diagnostic" if not section or section[1].startswith("DX") else "tissue"
        if held & slide.patients:
            reasons[slide.name] = SkippedSlide("held out", mend="exclude")
        elif strategy not in ("both", kind):
            reasons[slide.name] = SkippedSlide(f"a {kind} slide", mend="strategy")
        else:
            order = hashlib.sha256(f"{seed}:{slide.name}".encode()).hexdigest()
            wanted.append((kind != "diagnostic", order, slide.name, slide))
    wanted.sort()
    limit = limit or len(wanted)
    for *_, slide in wanted[limit:]:
        reasons[slide.name] = SkippedSlide(f"not in the sample of {limit}", mend="sample")
    chosen = [slide for *_, slide in wanted[:limit]]
    return sorted(chosen, key=str), reasons


PATIENT_COLUMNS = (
    "slide slide_id patient patient_id case case_id group filename image barcode"
).split()


def read_patients(path: Path, slides: Cohort) -> Names:
    """Patients named in a file: one slide or patient a line, or a table with a column slide,
    patient or the like.

    What names one of `slides` whose patient was stated, or this patient, stands for the patient
    stated.
    """
    whole: Names = set()
    stated: dict[str, Names] = defaultdict(set)
    for slide in slides:
        whole |= {slide.name, slide.stated, slide.path.name}
        for key in (slide.stated, slide.name, slide_name(slide.path)):
            stated[key] |= {slide.stated} - {""}
    patients = set()
    for cell in _cells_of_patients(read_text(path).splitlines(), whole) - {""}:
        known = stated.get(cell) or stated.get(slide_name(cell))
        patients |= known or {patient_of(cell)}
    return patients


def _cells_of_patients(lines: list[str], whole: Names) -> Names:
    """What stands in the columns of slides and patients, or in the first where none has a heading;
    a line that is one of the names `whole` is not cut.
    """
    table = []
    for line in filter(str.strip, lines):
        cells = [line.strip(" ")]
        if cells[0] not in whole:
            cells = cells_of(line, separator(lines[0]), skipinitialspace=True)
        table.append([cell.strip() for cell in cells])
    header = table[0] if table else []
    columns = [number for number, cell in enumerate(header) if cell.lower() in PATIENT_COLUMNS]
    found = set()
    for row in table[bool(columns) :]:
        for column in columns or [0]:
            found.update(row[column : column + 1])
    return found

"""TODO."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from g2l.arguments import pixel_size
from g2l.errors import SkippedSlide, UserError
from g2l.files import atomic, locked, size_of
from g2l.slides import SUFFIXES, slide_name
from g2l.tissue import find_mask

TCGA = (
    "acc blca brca cesc chol coad dlbc esca gbm hnsc kich kirc kirp laml lgg lihc luad lusc meso ov paad pcpg prad "
    "read sarc skcm stad tgct thca thym ucec ucs uvm"
).split()


def patient_of(name: str) -> str:
    """Patient of a slide or image by its name: the first 12 characters of a TCGA barcode; else the stem up to and with
    the first of its parts between "_" that holds a digit ("P1_a" -> "P1", "case_001_HE" -> "case_001"); else the stem.
    """
    stem = slide_name(name)
    barcode = re.search(
        r"\bTCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", stem.replace("_", " "), flags=re.IGNORECASE
    )
    return barcode[0].upper() if barcode else re.match(r"\D*\d[^_]*|.*", stem, flags=re.DOTALL)[0]


COLUMNS = (
    "slide",
    "status",
    "reason",
    "patient",
    "patches",
    "width",
    "height",
    "mpp",
    "mpp_source",
    "objective",
    "magnification",
    "size0",
    "patch_size",
    "target_mpp",
    "tissue",
    "pen",
    "blur",
    "unreadable",
    "warnings",
    "seconds",
    "settings",
    "bytes",
    "path",
)


def read_rows(folder: Path) -> dict[str, dict]:
    """The rows of slides.csv by slide name; empty when there is none yet."""
    try:
        with open(
            folder / "slides.csv", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            return {row["slide"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Add rows to slides.csv or replace them, under a lock, so that processes do not lose each other's rows."""
    with locked(folder / ".locks" / "slides.csv"):
        for leftover in folder.glob(
            ".slides.*.tmp.csv"
        ):  # of a process that was killed while it held the lock
            leftover.unlink()
        merged = read_rows(folder) | {row["slide"]: row for row in rows}
        with (
            atomic(folder / "slides.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(merged[name] for name in sorted(merged))


LIMITS = (
    "mpp",
    "patch_size",
    "overlap",
    "resample",
    "enlarge",
    "min_tissue",
    "max_pen",
    "max_blur",
)


@dataclass
class CohortSlide:
    """One slide of a cohort: where it is or will be, and what the manifest says about it."""

    name: str
    path: Path
    mpp: float | None = None
    id: str = ""  # of the GDC, empty for a slide of the user's
    size: int = 0  # bytes
    md5: str = ""
    stated: str = ""  # its patient, where the manifest says

    @property
    def patient(self) -> str:
        return self.stated or patient_of(self.name)

    @property
    def patients(self) -> set[str]:
        """Whose it is, as stated, else by its name, or by the file's where another has the same: held out if any is."""
        return {self.stated} if self.stated else {patient_of(self.name), patient_of(self.path)}

    def settings(self, args: argparse.Namespace) -> str:
        """Changes when the slide's patches would: another row in slides.csv with it is out of date."""
        values = [getattr(args, key) for key in LIMITS] + [args.assume_mpp, self.mpp]
        if args.masks:
            values += [str(args.masks)]
            with contextlib.suppress(SkippedSlide):  # it has none
                mask = find_mask(args.masks, self.name).stat()
                values += [mask.st_size, mask.st_mtime_ns]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8] + (
            f"-q{args.jpeg_quality}" if args.save_patches else ""
        )


def find_slides(folder: Path) -> list[Path]:
    """Slides below a folder, flat or in folders per file id, sorted by name, dead links too; hidden files are left out.

    Of the several files of one DICOM slide only the first is listed.
    """
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found.sort(key=lambda path: (path.name, str(path)))
    dicom = [path for path in found if path.suffix.lower() == ".dcm"]
    if len({path.parent for path in dicom}) < len(dicom):
        import openslide

        seen = set()
        for path in dicom:
            with (
                contextlib.suppress(openslide.OpenSlideError),
                openslide.OpenSlide(str(path)) as slide,
            ):
                key = path.parent, slide.properties.get("openslide.quickhash-1", path)
                if key in seen:
                    found.remove(path)
                seen.add(key)
    return found


def name_slides(paths: list[Path]) -> dict[str, Path]:
    """A name for each slide: its stem; where several share it, with the folder or the suffix, until it is one's own."""
    names: dict[str, Path] = {}
    stems = [slide_name(path) for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        for name in (
            stem,
            f"{path.parent.name}_{stem}",
            path.name,
            str(path).strip("/").replace("/", "_"),
        ):
            if (name != stem or stems.count(stem) == 1) and name not in names:
                names[name] = path
                break
    return names


def read_manifest(path: Path) -> list[dict]:
    """Rows of a GDC manifest (id, filename, md5, size) or a CSV with slide[,mpp][,patient]; keys in lower case."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--manifest {path}: cannot be read ({error})") from error
    lines = text.splitlines() or [""]
    rows = [
        {key.strip().lower(): (value or "").strip() for key, value in row.items() if key}
        for row in csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    ]
    for row in rows:
        columns = ("filename", "slide", "slide_id", "wsi", "path")
        row["filename"] = next((row[column] for column in columns if row.get(column)), "")
        try:
            row["mpp"] = pixel_size(row["mpp"]) if row.get("mpp") else None
            row["size"] = int(row.get("size") or 0)
            row["patient"] = row.get("patient") or ""
            if (
                row["patient"].upper().startswith("TCGA-")
            ):  # a sample's barcode: benchmarks name patients
                row["patient"] = patient_of(row["patient"])
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(
                f"--manifest {path}: {error} in the row of {row['filename']}"
            ) from error
    if not any(row["filename"] for row in rows):
        raise UserError(
            f"--manifest {path}: expected a GDC manifest (id, filename, md5, size, state; tabs) or a CSV "
            f"with the columns slide[,mpp][,patient]"
        )
    return [row for row in rows if row["filename"]]


def local_sources(args: argparse.Namespace, folder: Path) -> list[CohortSlide]:
    """The slides in a folder, or those of them that the manifest names."""
    paths = find_slides(folder) if folder.is_dir() else []
    if not args.manifest:
        if not folder.is_dir():
            hint = "; --download fetches them from the GDC" if args.cancer.lower() in TCGA else ""
            raise UserError(
                f"{folder}: no such folder; put slides there or name their folder with --slides{hint}"
            )
        if not paths:
            raise UserError(f"{folder}: no slides in it (looked for {', '.join(SUFFIXES)})")
        return [
            CohortSlide(name, path, size=size_of(path)) for name, path in name_slides(paths).items()
        ]
    rows, there = read_manifest(args.manifest), {os.path.abspath(path): path for path in paths}
    for row in rows:  # a path, as it stands or below one of these folders
        for place in (Path(), args.manifest.parent, folder, folder / row.get("id", "")):
            if (place / row["filename"]).is_file():
                row["path"] = os.path.abspath(place / row["filename"])
                there.setdefault(row["path"], Path(row["path"]))
    named = name_slides(list(there.values()))
    names = {os.path.abspath(path): name for name, path in named.items()}
    known: dict[str, set[str]] = {}
    for name, path in named.items():
        for key in (name, path.name, slide_name(path)):
            known.setdefault(key, set()).add(name)
    sources, missing = {}, []
    for row in rows:
        given = Path(row["filename"]).name
        found = (
            {names[row["path"]]}
            if row.get("path") in names
            else known.get(given) or known.get(slide_name(given))
        )
        if not found:
            missing.append(row["filename"])
            continue
        if len(found) > 1:
            raise UserError(
                f"--manifest {args.manifest}: {row['filename']}: {len(found)} slides are called so: "
                f"{', '.join(sorted(found))}; name one of them, or its path"
            )
        (name,) = found
        sources[name] = CohortSlide(
            name,
            named[name],
            row["mpp"],
            row.get("id", ""),
            row["size"] or size_of(named[name]),
            row.get("md5", ""),
            row["patient"],
        )
    if not sources:
        raise UserError(
            f"--manifest {args.manifest}: none of its {len(missing)} slides is in {folder}, first "
            f"{missing[0]}; name their folder with --slides, or fetch them with --download"
        )
    if missing:
        print(
            f"{len(missing)} slides of {args.manifest} are not in {folder} (first: {missing[0]}); "
            f"--download fetches them",
            flush=True,
        )
    return list(sources.values())


def select(
    sources: list[CohortSlide], args: argparse.Namespace
) -> tuple[list[CohortSlide], dict[str, str]]:
    """(slides chosen, reason of each other by name): kind of section, patients held out, then a seeded sample.

    The order is a hash of seed and name, so that a slide more or less does not change who else is drawn. Diagnostic
    slides come first.
    """
    held, reasons = set(), {}
    if args.exclude:
        held = read_patients(args.exclude, sources)
        if not any(held & source.patients for source in sources):
            print(
                f"note: --exclude {args.exclude}: none of its {len(held)} patients is in this cohort",
                flush=True,
            )
    wanted = []
    for source in sources:
        section = re.match(r"TCGA-\w\w-\w{4}-\w{3}-\w\w-([A-Z]+)", source.name)
        kind = "diagnostic" if not section or section[1].startswith("DX") else "tissue"
        if held & source.patients:
            reasons[source.name] = f"held out: its patient is in {args.exclude} (--exclude)"
        elif args.strategy not in ("both", kind):
            reasons[source.name] = f"a {kind} slide (--strategy {args.strategy})"
        else:
            order = hashlib.sha256(f"{args.seed}:{source.name}".encode()).hexdigest()
            wanted.append((kind != "diagnostic", order, source))
    wanted.sort(key=lambda item: item[:2])
    limit = args.max_slides or len(wanted)
    reasons |= {
        source.name: f"not in the sample of {limit} (--max-slides, --seed)"
        for *_, source in wanted[limit:]
    }
    chosen = [source for *_, source in wanted[:limit]]
    held_out = sum(reason.startswith("held") for reason in reasons.values())
    print(
        f"{len(sources)} slides, {held_out} held out, {len(chosen)} taken"
        + (f" (fewer than --max-slides {limit})" if len(chosen) < limit else ""),
        flush=True,
    )
    if not chosen:
        raise UserError("no slide is left to tile; see --exclude, --strategy and --manifest")
    return sorted(chosen, key=lambda source: source.name), reasons


def read_patients(path: Path, sources: list[CohortSlide]) -> set[str]:
    """Patients named in a file: one slide or patient a line, or a table with a column slide, patient or the like.

    What names one of `sources` whose patient was stated, or this patient, stands for the patient stated.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path}: cannot be read ({error})") from error
    whole = {text for source in sources for text in (source.name, source.stated, source.path.name)}

    def cut(line):  # at commas outside quotes, unless all of it is a name
        parts = [line] if line in whole else re.split(r'[,;\t](?=(?:[^"]*"[^"]*")*[^"]*$)', line)
        return [re.sub('^"(.*)"$', r"\1", part.strip()).replace('""', '"') for part in parts]

    table = [cut(line.strip(" ")) for line in lines if line.strip()]
    known = (
        "slide",
        "slide_id",
        "patient",
        "patient_id",
        "case",
        "case_id",
        "group",
        "filename",
        "image",
        "barcode",
    )
    columns = [
        number for number, cell in enumerate(table[0] if table else []) if cell.lower() in known
    ]
    cells = [
        row[column]
        for row in table[bool(columns) :]
        for column in columns or [0]
        if column < len(row)
    ]
    stated: dict[str, set[str]] = {}
    for source in sources:
        for key in {source.stated, source.name, slide_name(source.path)} if source.stated else ():
            stated.setdefault(key, set()).add(source.stated)
    return set().union(
        *(
            stated.get(cell) or stated.get(slide_name(cell)) or {patient_of(cell)}
            for cell in cells
            if cell
        )
    )

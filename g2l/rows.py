"""slides.csv: one row for each slide seen, the only list of what a cohort holds and why the rest
was left out.

COLUMNS say what a row holds, `read_rows` and `write_rows` are the only ways in and out. The table
is checked when it is read back, since people open it in spreadsheets and disks decay.
"""

import csv
import re
import zlib
from pathlib import Path

from g2l.errors import UserError, one_line
from g2l.files import clear_leftovers, locked, read_text, separator, write_table

COLUMNS = (
    "slide",  # its name, and that of its files
    "status",  # done, skipped or failed
    "reason",  # why it was skipped or failed
    "patient",
    "patches",  # how many were kept
    "width",  # px of level 0
    "height",
    "mpp",  # µm per pixel of level 0
    "mpp_source",
    "objective",  # as the file states it
    "magnification",  # customary name of mpp: 40x
    "size0",  # side of a patch in px of level 0
    "patch_size",  # side of a patch in output px
    "target_mpp",  # µm per pixel wanted
    "tissue",  # share of the slide
    "pen",  # share of tissue and ink
    "blur",  # share of tissue patches dropped for it
    "unreadable",  # patches left out
    "warnings",
    "seconds",
    "settings",  # digest of all that decides on the patches
    "bytes",  # of the slide's file
    "path",  # of the slide's file
    "seals",  # by which the files of the slide are known again
    "check",  # of all that stands before it
)

Rows = dict[str, dict[str, str]]  # by slide name; values as text by column

NUMBER = r"\d+(\.\d+)?(e-\d+)?"
# What the values of a finished slide look like.
DONE = {
    "patches": r"\d+",
    "size0": r"\d+",
    "patch_size": r"\d+",
    "mpp": NUMBER,
    "target_mpp": NUMBER,
    "path": ".+",
}


def read_rows(folder: Path, damaged: list[str] | None = None) -> Rows:
    """The rows of slides.csv by slide name, all values text; empty when there is none yet.

    Reads what spreadsheets make of it, too: semicolons, tabs, UTF-16. Raises UserError for a table
    without all columns and for a damaged row; given a list `damaged`, what is damaged is left out
    and told of there.
    """
    path = folder / "slides.csv"
    try:
        lines = read_text(path, "surrogateescape").split("\n")
    except FileNotFoundError:
        return {}
    if not any(lines):
        return {}
    mark = separator(lines[0])
    header = _header(path, cells_of(lines[0], mark), damaged)
    rows = {}
    for number, line in enumerate(lines[1:], 2):
        cells = cells_of(line, mark)
        row = dict.fromkeys(COLUMNS, "") | dict(zip(header, cells, strict=False))
        fault = _fault(row) if len(cells) == len(header) else f"{len(cells)} values"
        if not fault:
            rows[row["slide"]] = {column: row[column] for column in COLUMNS}
        elif any(cells):
            if damaged is None:
                raise UserError(f"{path}, line {number}: damaged ({fault})", mend="table")
            damaged.append(f"{path}, line {number}: {fault}")
    return rows


def _header(path: Path, header: list[str], damaged: list[str] | None) -> list[str]:
    """The names of the columns, as they must be where their own line is damaged."""
    former = COLUMNS[:-2]  # of tables from before there were checksums
    wanted = former if len(header) <= len(former) else COLUMNS
    missing = [column for column in wanted if column not in header]
    if not missing:
        return header
    fault = f"{path}: no column {', '.join(missing)} in its first line"
    if damaged is None or len(header) != len(COLUMNS):
        raise UserError(fault, mend="table")
    damaged.append(fault)
    return list(COLUMNS)  # each row proves by its checksum that this is right


def cells_of(line: str, mark: str, **options) -> list[str]:
    """The values of one line, separated by `mark`; `options` are those of csv.reader.

    "'" before a sign that a spreadsheet would take for a formula is ours.
    """
    try:
        cells = next(csv.reader([line], delimiter=mark, **options), [])
    except csv.Error:
        return ["?"]
    return [cell.removeprefix("'") for cell in cells]


def _fault(row: dict[str, str]) -> str:
    """What is wrong with a row; empty for a sound one."""
    if row["status"] not in ("done", "skipped", "failed"):
        return f"status {row['status']!r}"
    if not row["slide"] or re.search("[\ud800-\udfff]", row["slide"]):
        return f"slide {row['slide']!r} is no name in UTF-8"
    for column, pattern in DONE.items() if row["status"] == "done" else ():
        if not re.fullmatch(pattern, row[column]):
            return f"{column} {row[column]!r}"
    if row["check"] not in ("", _check(row)):
        return "its checksum is another"
    return ""


def _check(row: dict[str, str]) -> str:
    """Checksum of a row, without zeros at the ends of decimals: spreadsheets drop them."""
    text = "\n".join(row.get(column, "") for column in COLUMNS[:-1])
    plain = re.sub(r"\.\d+", lambda match: match[0].rstrip("0").rstrip("."), text)
    return f"x{zlib.crc32(plain.encode('utf-8', 'backslashreplace')):08x}"


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Add rows to slides.csv or replace them, under a lock, so that processes do not lose each
    other's rows.
    """
    path = folder / "slides.csv"
    new = {}
    for given in rows:
        if unknown := given.keys() - set(COLUMNS):
            raise ValueError(f"slides.csv has no column {unknown}")
        row = {column: one_line(str(given.get(column, ""))) for column in COLUMNS}
        new[row["slide"]] = row | {"check": _check(row)}
    with locked(folder / ".locks.csv"):  # not in the folder of locks that bear slides' names
        clear_leftovers(path)
        merged = read_rows(folder, []) | new
        table = [map(_plain, merged[name].values()) for name in sorted(merged)]
        write_table(path, [COLUMNS, *table])


def _plain(text: str) -> str:
    """A value as no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "'") else text

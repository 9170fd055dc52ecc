"""The texts of an Excel workbook, by the standard library alone: a zip file of XML."""

import zipfile
from pathlib import Path
from xml.etree import ElementTree

from g2l.errors import UserError
from g2l.files import check_unpacked

Row = dict[str, str]  # text by the letters of its column


def read_sheets(path: Path) -> list[list[Row]]:
    """The rows of every sheet of an .xlsx file, without empty cells; UserError for what is none."""
    strings = []
    sheets = []
    try:
        check_unpacked(path)
        with zipfile.ZipFile(path) as book:
            for name in sorted(book.namelist()):  # sharedStrings before worksheets
                if name == "xl/sharedStrings.xml":
                    strings = [text_of(item) for item in ElementTree.fromstring(book.read(name))]
                if name.startswith("xl/worksheets/sheet"):
                    sheet = ElementTree.fromstring(book.read(name))
                    sheets.append([row_of(row, strings) for row in sheet.findall(".//{*}row")])
    except (zipfile.BadZipFile, ElementTree.ParseError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no Excel workbook ({error})") from error
    return sheets


def text_of(element: ElementTree.Element) -> str:
    """All text within an element."""
    return "".join(part.text or "" for part in element.findall(".//{*}t")).strip()


def row_of(row: ElementTree.Element, strings: list[str]) -> Row:
    """A cell holds its text, a number, or that of its text among `strings`."""
    cells = {}
    for cell in row:
        value = cell.findtext("{*}v") or text_of(cell)
        if value:
            column = cell.get("r", "").rstrip("0123456789")
            cells[column] = strings[int(value)] if cell.get("t") == "s" else value
    return cells

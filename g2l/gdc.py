"""The Genomic Data Commons: which slides it has of a TCGA project, and fetching one whole.

Its answers come from the network: names choose no path, sizes and numbers are bounded, every file
is verified.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from g2l.cohort import TCGA, CohortSlide, name_slides
from g2l.errors import UserError
from g2l.files import size_of
from g2l.network import Client, pause
from g2l.slides import SUFFIXES

MOST_SLIDES = 100_000  # the GDC has 30,000 in all
TRIES = 8  # a minute in all
MOST_BYTES = 64 << 20  # of one answer; a page of 2,000 slides is 0.4 MB


def ask_gdc(
    url: str, project: str, strategy: str, folder: Path, names: Collection[str] = ()
) -> list[CohortSlide]:
    """Slides of a TCGA project as the GDC lists them, to become <folder>/<id>/<file name>.

    `strategy`: "diagnostic", "tissue" or "both"; given `names`, only the files called so. What the
    server names in an unsafe way is refused with a note. Raises UserError where there is no such
    project, and for a wrong answer.
    """
    code = project.lower().removeprefix("tcga-")
    if names:
        clauses = {"file_name": list(names)}
    elif code in TCGA:
        clauses = {
            "cases.project.project_id": [f"TCGA-{code.upper()}"],
            "data_type": ["Slide Image"],
            "data_format": ["SVS"],
            "access": ["open"],
        }
        if strategy != "both":
            clauses["experimental_strategy"] = [f"{strategy.capitalize()} Slide"]
    else:
        raise UserError(
            f"{project}: the GDC knows the TCGA projects {', '.join(TCGA)}", mend="cancer"
        )
    every = [{"field": field, "value": values} for field, values in clauses.items()]
    content = [{"op": "in", "content": clause} for clause in every]
    query = {
        "filters": {"op": "and", "content": content},
        "fields": "file_id,file_name,file_size,md5sum",
        "format": "JSON",
        "size": 2000,
        "sort": "file_id:asc",  # else pages may overlap
    }
    try:
        hits = _all_pages(f"{url.rstrip('/')}/files", query)
        slides = {hit["file_id"]: _as_slide(hit, folder, url) for hit in hits}
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{url}: unexpected answer ({error!r}); is it a GDC server?") from error
    paths = {slide.path: slide for slide in slides.values() if slide}
    for name, path in name_slides(paths).items():  # two ids may have one file name
        paths[path].name = name
    return list(paths.values())


def _all_pages(url: str, query: dict) -> list[dict]:
    """The hits of every page. Raises ValueError, KeyError or TypeError for what is no such list."""
    client = Client()
    hits: list[dict] = []
    while True:
        body = json.dumps(query | {"from": len(hits)}).encode()
        answer = client.ask(url, {"Content-Type": "application/json"}, _whole, body, TRIES)
        data = json.loads(answer)["data"]
        hits += data["hits"]
        total = int(data["pagination"]["total"])
        if max(total, len(hits)) > MOST_SLIDES:
            raise ValueError(f"{total} slides")
        if len(hits) >= total or not data["hits"]:
            return hits


def _whole(answer: Any) -> bytes:
    """All of an answer; UserError where it is too much."""
    text = answer.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise UserError(f"the GDC: an answer of more than {MOST_BYTES >> 20} MB")
    return text


def _as_slide(hit: dict, folder: Path, url: str) -> CohortSlide | None:
    """One hit; None, with a note, unless all it says is plain."""
    patterns = {
        "file_name": r"[A-Za-z0-9][\w.() +-]{0,200}",
        "file_id": r"[A-Za-z0-9][A-Za-z0-9-]{0,63}",
        "file_size": r"[1-9]\d{0,14}",
        "md5sum": r"[0-9a-f]{32}",
    }
    values = {field: str(hit.get(field))[:300] for field in patterns}
    plain = all(re.fullmatch(pattern, values[field]) for field, pattern in patterns.items())
    name, key, size, md5 = values.values()
    if not plain or not name.lower().endswith(SUFFIXES):
        said = f"{name!r} with id {key!r}, {size!r} bytes, md5 {md5!r}"
        print(f"note: the server names a slide {said}: refused", flush=True)
        return None
    address = f"{url.rstrip('/')}/data/{key}"
    path = folder / key / name
    return CohortSlide(name, path, id=key, size=int(size), md5=md5, address=address)


def downloaded_mark(path: Path) -> Path:
    """An empty file beside a slide that we fetched: only such a slide may be discarded."""
    return path.with_name(f".{path.name}.downloaded")


def verify(source: CohortSlide, path: Path) -> bool:
    """Whether a file is what the server states."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return size_of(path) == source.size and (not source.id or found == source.md5)


def check_own(source: CohortSlide) -> None:
    """Raises UserError where a slide that was there before is not the one that the server has."""
    path = source.path
    if not downloaded_mark(path).exists() and not verify(source, path):
        raise UserError(
            f"{path}: size or md5 is not what the server states; move it away", mend="own"
        )


def download(source: CohortSlide, url: str, report: Callable[[int], None]) -> None:
    """Fetch a slide from `url` to its path, by a .partial file that goes on where it was; size
    and md5 are verified.

    `report(n)` is called with the bytes as they come. Raises UserError with the reason when it
    cannot be had.
    """
    partial = source.path.with_name(source.path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while failures < 6:
        before = size_of(partial)
        reason = _fetch(url, partial, before, source.size, report) if before < source.size else ""
        now = size_of(partial)
        if now >= source.size:
            if verify(source, partial):
                downloaded_mark(source.path).touch()
                os.replace(partial, source.path)
                return
            reason = f"size ({now} of {source.size} bytes) or md5 is not what the server states"
            partial.unlink()
        failures = 0 if before < now < source.size else failures + 1
        pause(failures)
    why = f"not fetched after {failures} tries: {reason}"
    raise UserError(f"{url.partition('?')[0]}: {why}", mend="later")


def _fetch(url: str, partial: Path, have: int, size: int, report: Callable[[int], None]) -> str:
    """Add to a .partial file of `have` bytes what the server sends; why it ended."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    save = functools.partial(_save, partial, have, size, report)
    try:
        return Client().ask(url, headers, save, tries=TRIES)
    except UserError as error:
        if not have or "answers 416" not in str(error):
            raise
        partial.unlink()  # what is there cannot be gone on with: from the beginning
    return "the connection ended early"


def _save(partial: Path, have: int, size: int, report: Callable[[int], None], answer: Any) -> str:
    """Write an answer to the .partial file as it comes; why it ended."""
    from urllib3.exceptions import HTTPError

    span = answer.headers.get("Content-Range", "")
    goes_on = answer.status == 206 and have and span.startswith(f"bytes {have}-")
    with open(partial, "ab" if goes_on else "wb") as file:
        try:
            while file.tell() <= size and (chunk := answer.read1(1 << 20)):
                file.write(chunk)
                report(len(chunk))
        except HTTPError as error:
            return f"the connection was lost ({error})"
    return "the connection ended early"

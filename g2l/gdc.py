"""TODO."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import time
from pathlib import Path

from g2l.cohort import TCGA, CohortSlide
from g2l.errors import UserError, disk_full
from g2l.slides import SUFFIXES, slide_name


def ask_gdc(args: argparse.Namespace, names: list[str]) -> list[CohortSlide]:
    """Slides of a TCGA project as the GDC lists them (only those named, if given), to become <id>/<file name>."""
    code = args.cancer.lower().removeprefix("tcga-")
    clauses = {
        "cases.project.project_id": [f"TCGA-{code.upper()}"],
        "data_type": ["Slide Image"],
        "data_format": ["SVS"],
        "access": ["open"],
    }
    if names:
        clauses = {"file_name": names}
    elif code not in TCGA:
        raise UserError(
            f"--cancer {args.cancer}: --download knows the TCGA projects {', '.join(TCGA)}"
        )
    if args.strategy != "both" and not names:
        clauses["experimental_strategy"] = [f"{args.strategy.capitalize()} Slide"]
    query = {
        "filters": {
            "op": "and",
            "content": [
                {"op": "in", "content": {"field": field, "value": values}}
                for field, values in clauses.items()
            ],
        },
        "fields": "file_id,file_name,file_size,md5sum",
        "format": "JSON",
        "size": 2000,
        "from": 0,
    }
    hits = []
    while True:
        try:
            body = json.dumps(query).encode()
            with ask(f"{args.gdc_url}/files", {"Content-Type": "application/json"}, body) as reply:
                data = json.load(reply)["data"]
            hits += data["hits"]
            total = int(data["pagination"]["total"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{args.gdc_url}: unexpected answer ({error!r}); is it a GDC server?"
            ) from error
        if len(hits) >= total or not data["hits"]:
            break
        query["from"] = len(hits)
    sources = []
    for hit in hits:
        name, key, size, md5 = (
            str(hit.get(field)) for field in ("file_name", "file_id", "file_size", "md5sum")
        )
        # Names come from the network: they may choose a file in our folder, never another path.
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.() +-]{0,200}", name)
            or not name.lower().endswith(SUFFIXES)
            or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", key)
            or not re.fullmatch(r"[1-9]\d{0,14}", size)
            or not re.fullmatch(r"[0-9a-f]{32}", md5)
        ):
            print(
                f"note: the server names a slide {name!r} with id {key!r}, {size} bytes, md5 {md5!r}: refused",
                flush=True,
            )
            continue
        sources.append(
            CohortSlide(slide_name(name), args.slides / key / name, None, key, int(size), md5)
        )
    return sources


RETRY_SECONDS = 1.0  # first pause before another try; doubles each time


def pause(attempt: int, least: float = 0) -> None:
    """Wait before another try: 1, 2, 4 ... 60 s, or what the server asks for up to 5 minutes."""
    time.sleep(max(min(2.0**attempt, 60), min(least, 300)) * RETRY_SECONDS)


def ask(url: str, headers: dict, data: bytes | None = None, tries: int = 7):
    """Open a URL; what may pass (429, 5xx, no connection) is tried again, later each time.

    The answer to a question (`data`) is read whole, so that a broken one is asked again.
    """
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, data, headers)
    for attempt in range(tries):
        wait = ""
        try:
            answer = urllib.request.urlopen(request, timeout=60)
            return io.BytesIO(answer.read()) if data else answer
        except urllib.error.HTTPError as error:
            reason, wait = (
                f"the server answers {error.code} {error.reason}",
                error.headers.get("Retry-After", ""),
            )
            if error.code < 500 and error.code != 429:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = f"no connection ({error})"
        if attempt < tries - 1:
            pause(attempt, int(wait) if wait.isdigit() else 0)
    raise UserError(f"{url}: {reason}; the same command goes on from here later")


def downloaded_mark(path: Path) -> Path:
    """An empty file beside a slide that we fetched: only such a slide may be discarded."""
    return path.with_name(f".{path.name}.downloaded")


def download(source: CohortSlide, args: argparse.Namespace, report) -> None:
    """Fetch one slide to its path by way of a .partial file that goes on where it was; size and md5 are verified.

    `report(n)` is called with the bytes as they come. Raises UserError with the reason when it cannot be had.
    """
    import http.client

    partial = source.path.with_name(source.path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    url, failures = f"{args.gdc_url}/data/{source.id}", 0
    while failures < 6:
        have = partial.stat().st_size if partial.exists() else 0
        reason = "the connection ended early"
        if have < source.size:
            headers = {"Range": f"bytes={have}-"} if have else {}
            try:
                with ask(url, headers) as answer:
                    goes_on = have and answer.headers.get("Content-Range", "").startswith(
                        f"bytes {have}-"
                    )
                    with open(partial, "ab" if answer.status == 206 and goes_on else "wb") as file:
                        while file.tell() <= source.size and (chunk := answer.read(1 << 20)):
                            file.write(chunk)
                            report(len(chunk))
            except (OSError, http.client.HTTPException) as error:
                if disk_full(error):
                    raise
                reason = f"the connection was lost ({error})"
            except UserError as error:
                if not have or " 416 " not in str(error):
                    raise
                partial.unlink()  # what is there cannot be gone on with: from the beginning
        now = partial.stat().st_size if partial.exists() else 0
        if now >= source.size:
            with open(partial, "rb") as file:
                if (
                    now == source.size
                    and hashlib.file_digest(file, "md5").hexdigest() == source.md5
                ):
                    downloaded_mark(source.path).touch()
                    os.replace(partial, source.path)
                    return
            reason = f"size ({now} of {source.size} bytes) or md5 is not what the server states"
            partial.unlink()
        failures = (
            0 if have < now < source.size else failures + 1
        )  # progress does not count as failure
        pause(failures)
    raise UserError(
        f"{url}: not fetched after {failures} tries: {reason}; the same command goes on from here later"
    )

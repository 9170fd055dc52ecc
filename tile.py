"""Stage 1: whole-slide images -> tissue patches. Owns slide reading and the patch index (writer and reader)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path


class UserError(Exception):
    """A user's mistake; the text names the file or flag, what was expected, and what mends it."""


class PatchError(Exception):
    """A region of a slide that cannot be read; the text names slide, x and y (level-0 pixels)."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike):
    """Yield a temporary path in the folder of `path`; rename it onto `path` on success, remove it on failure.

    The process id in the name keeps two processes on one folder apart; a reader sees the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def patient_of(name: str) -> str:
    """Patient of a slide or image name: the first 12 characters of a TCGA barcode, else the stem up to its first "_"."""
    stem = re.sub(r"\.(svs|tiff?|ndpi|mrxs|scn|svslide|bif|vms|vmu|dcm|czi|h5|tar|png|jpe?g)$", "", Path(name).name,
                  flags=re.IGNORECASE)
    if re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", stem, flags=re.IGNORECASE):
        return stem[:12].upper()
    return stem.split("_", 1)[0] or stem


def main(argv: list[str] | None = None) -> int:
    print("error: tile.py cannot tile yet", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""TODO."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake; the text names the file or flag, what was expected, and what mends it."""


class SkippedSlide(UserError):
    """A sound slide that is not wanted as it is (no mpp, other magnification, no tissue); the text says why."""


class PatchError(Exception):
    """A region of a slide that cannot be read; the text names slide, x and y (level-0 pixels)."""


def disk_full(error: BaseException) -> bool:
    """Whether an error means that nothing more can be written; HDF5 hides the number in its text."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or re.search("No space left|File too large|quota", str(error)) is not None
    )


def guarded(work: Callable[[], int]) -> int:
    """The exit status of `work`, the text of a user's mistake or of a disk that refuses instead of a traceback."""
    from safetensors import SafetensorError

    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError):  # it has no number, only a text
            if "I/O error" not in str(error):
                raise
            error = OSError(str(error))
        why = "no space left on the disk; make room" if disk_full(error) else f"{error}; mend it"
        print(f"error: {why} and run again: nothing was lost", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 1


def report_failures(failures: list[str], lost: dict[str, int]) -> int:
    """Say what is missing, of each benchmark how many images; the exit status."""
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    for name, missing in lost.items():
        print(
            f"{name}: {missing} images could not be read and were left out, which the exit status tells too",
            file=sys.stderr,
        )
    return int(bool(failures or lost))

"""What a user can mend, and the one way from an error to a message and an exit status.

Library code raises `UserError` with what is wrong and, as `mend`, a short key of what would mend
it. It knows no flags: each command hands `exit_status` its own remedies, texts by key, which are
added to the message.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Mapping

GO_ON = "run the same command again; it goes on where it was"
WORKERS = (
    "lower --workers (0 needs no processes and no shared memory; in Docker, --shm-size or "
    "--ipc=host give more)"
)
KILLED = (
    "a loading process was killed, by the system if memory was short: lower --workers, and run "
    "the same command again to go on"
)


class UserError(Exception):
    """A user's mistake: the text names the file or value and what was expected.

    `mend` names the kind of remedy ("weights", "device", ...) for the command to put into its own
    words.
    """

    def __init__(self, text: str, mend: str = ""):
        super().__init__(text)
        self.mend = mend


class SkippedSlide(UserError):
    """A sound slide that is not wanted as it is (no mpp, other magnification, no tissue)."""


class PatchError(Exception):
    """A region of a slide that cannot be read; the text names slide, x and y (level-0 pixels)."""


def disk_full(error: BaseException) -> bool:
    """Whether an error means that nothing more can be written; HDF5 hides the number in its
    text."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = re.search("No space left|File too large|quota", str(error))
    return getattr(error, "errno", None) in numbers or words is not None


def of_the_machine(error: BaseException | None) -> bool:
    """Whether an error says nothing of the file that was read: no handles or memory are left."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def one_line(text: str) -> str:
    """`text` with a replacement character for each control character: escapes of a terminal, ends
    of lines.
    """
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", "\ufffd", text)


def explain(error: BaseException, remedies: Mapping[str, str]) -> str | None:
    """What a user is told of an error; None where it is a fault of this program."""
    text = str(error)
    if isinstance(error, UserError):
        return "; ".join(filter(None, (text, remedies.get(error.mend))))
    if isinstance(error, BrokenPipeError):
        return f"nobody reads what is printed here any more; {GO_ON}"
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in text:
        return KILLED
    # HDF5 and safetensors hide the operating system's error in a text
    if isinstance(error, OSError) or disk_full(error) or "I/O error" in text:
        return f"{_cause(error)} and {GO_ON}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('. ')[0]}; {remedies.get('memory', 'take a smaller batch')}"
    lost = "WORLD_SIZE" in os.environ and re.search("onnection|imed out", text)
    if lost and isinstance(error, RuntimeError):
        return "another rank ended or stands still, so this one ends too; its message says why"
    return None


def _cause(error: BaseException) -> str:
    """What the system refused, and what mends it."""
    if disk_full(error):
        return "no space left on the disk; make room"
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        file = error.filename
        while not os.path.lexists(file) and os.path.dirname(file):  # one in it was to be made
            file = os.path.dirname(file)
        return f"{file}: a file lies where a folder is to be; move it or name another"
    return f"{error}; mend it"


def warn(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr)


def rank_of_torchrun() -> int:
    """This process's number among those that torchrun started; 0 speaks for all."""
    return int(os.environ.get("RANK", 0))


def say_error(text: str) -> None:
    """One line on standard error, with the rank where there are several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {rank_of_torchrun()}: " if several else ""
    lines = "\n".join(map(one_line, text.split("\n")))
    warn(f"error: {rank}{lines}")


def exit_status(work: Callable[[], int], remedies: Mapping[str, str] | None = None) -> int:
    """The status of `work`; a user's mistake, a full disk or Ctrl-C become one clear line."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid in a terminal's encoding; a log is read while it grows.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return work()
    except KeyboardInterrupt:
        warn("stopped; run the same command again to go on")
        return 130
    except Exception as error:
        text = explain(error, remedies or {})
        if text is None:
            raise
        say_error(text)
        return 1

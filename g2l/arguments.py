"""Kinds of flags, and the flags that several commands share: each checked and worded once."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Of every script: the default behind the help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in (None, [], "") or action.default is False
        return action.help if empty else super()._get_help_string(action)


class Gigabytes(float):
    """A number of GB, with or without its unit."""

    def __new__(cls, text: float | str) -> Gigabytes:
        return super().__new__(cls, str(text).upper().removesuffix("GB"))


def positive(text: str, what: str = "a number above 0") -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected {what}")


def pixel_size(text: str) -> float:
    return positive(text, "micrometres per pixel, such as 0.5 (20x)")


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 1")
    return value


def whole(text: str, least: int = 1, most: float = math.inf) -> int:
    """A whole number of a flag, from `least` to `most`."""
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a whole number from {least}"
            + (f" to {most}" if most < math.inf else "")
        )
    return int(text)


count = functools.partial(whole, least=0)
MOST_SEED = 2**31 - 1  # generators of NumPy, PyTorch and scikit-learn take it, and some above


def directory(text: str) -> Path:
    """A folder of a flag; whether it is there is for its reader to tell."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; give its folder, {Path(text).parent}")
    return Path(text)


# What a flag takes, by the word that stands for it in the help.
KINDS: dict[str, Callable[[str], Any]] = {
    "DIR": directory,
    "FILE": Path,
    "N": whole,
    "PX": whole,
    "SEED": functools.partial(whole, least=0, most=MOST_SEED),
    "SHARE": share,
    "UM": pixel_size,
}


def flag(group, usage: str, help: str, default: Any = None, **options) -> None:
    """Add a flag to a parser or group: "--mpp UM" takes a value of that kind (see KINDS; text where
    it names none), "--yes" takes none but one of `choices`. `options` are those of add_argument.
    """
    name, _, kind = usage.partition(" ")
    taken: dict[str, Any] = {"action": "store_true"}
    if kind or "choices" in options:
        taken = {"type": KINDS.get(kind), "metavar": kind or None, "default": default}
    group.add_argument(name, help=help, **taken | options)


def in_group(parser: argparse.ArgumentParser, title: str) -> Callable:
    """What adds flags to a new group of a parser; see `flag`."""
    return functools.partial(flag, parser.add_argument_group(title))


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A command's parser, described by the first paragraph of its docstring."""
    return argparse.ArgumentParser(description=doc.split("\n\n")[0], formatter_class=Help)


def add_running_arguments(where, run):
    """Add the flags that evaluate.py and robustness.py share to two argument groups; returns the
    second.
    """
    flag(where, "--runs DIR", "looked through for students", Path("runs"))
    flag(where, "--results DIR", "features, metrics, tables, pictures", Path("results"))
    flag(run, "--input-size PX", "side of the networks' input, if not the published one")
    flag(run, "--batch-size N", "images per forward pass (default: by device and memory)")
    flag(run, "--workers N", "processes that read images", 0, type=count)
    flag(
        run,
        "--max-unreadable SHARE",
        "the run stops when more than this share of images cannot be read",
        0.01,
    )
    flag(run, "--no-pictures", "write tables only")
    return run

"""Kinds of flags, and the flags that several commands share: each checked and worded once."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from pathlib import Path

import numpy as np


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Of every script: the default behind the help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in (None, [], "") or action.default is False
        return action.help if empty else super()._get_help_string(action)


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


def whole(text: str, least: int = 1, most: float = np.inf) -> int:
    """A whole number of a flag, from `least` to `most`."""
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a whole number from {least}"
            + (f" to {most}" if most < np.inf else "")
        )
    return int(text)


def directory(text: str) -> Path:
    """A folder of a flag; whether it is there is for its reader to tell."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; give its folder, {Path(text).parent}")
    return Path(text)


def add_running_arguments(where, run):
    """Add the flags that evaluate.py and robustness.py share to two argument groups; returns the
    second.
    """
    where.add_argument(
        "--runs", default=Path("runs"), type=Path, help="looked through for students"
    )
    where.add_argument(
        "--results", default=Path("results"), type=Path, help="features, metrics, tables, pictures"
    )
    run.add_argument(
        "--input-size",
        type=whole,
        metavar="PX",
        help="side of the networks' input, if not the published",
    )
    run.add_argument(
        "--batch-size",
        type=whole,
        metavar="N",
        help="images per forward pass; default by device, memory",
    )
    run.add_argument(
        "--workers",
        type=functools.partial(whole, least=0),
        default=0,
        metavar="N",
        help="processes that read images",
    )
    run.add_argument(
        "--max-unreadable",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of images, before it stops",
    )
    run.add_argument("--no-pictures", action="store_true", help="tables only")
    return run

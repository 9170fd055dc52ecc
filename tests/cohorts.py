"""Cohorts in a folder, and tile.py run on them as a user does."""

import os
import subprocess
import sys

import h5py
from conftest import ROOT

from g2l.rows import read_rows


def command(data, *args, name="mine"):
    script = str(ROOT / "tile.py")
    return [sys.executable, script, "--cancer", name, "--data", str(data), *map(str, args)]


def run(data, *args, **options):
    return subprocess.run(
        command(data, *args), capture_output=True, text=True, timeout=120, **options
    )


def rows(data, name="mine"):
    return read_rows(data / "tiles" / name)


def put(data, sound, *names):
    """Copies of a slide, of which none is the same file byte by byte; returns their folder."""
    folder = data / "slides" / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound + os.fsencode(name))
    return folder


def tree(folder):
    """What a finished cohort holds, without times: the rows and every patch's place."""
    table = {
        name: {key: row[key] for key in ("status", "patches", "settings")}
        for name, row in read_rows(folder).items()
    }
    coords = {}
    for path in sorted(folder.glob("patches/*_patches.h5")):
        with h5py.File(path) as file:
            coords[path.name] = file["coords"][:].tolist()
    return table, coords

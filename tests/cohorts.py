"""Cohorts in a folder, and tile.py run on them as a user does."""

import contextlib
import csv
import functools
import io
import os
import subprocess
import sys

import h5py
from conftest import ROOT

import tile
from g2l.rows import read_rows


def command(data, *args, name="mine"):
    script = str(ROOT / "tile.py")
    return [sys.executable, script, "--cancer", name, "--data", str(data), *map(str, args)]


def run(data, *args):
    """tile.py in this process, which has its libraries loaded; what a process would have said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = tile.main(["--cancer", "mine", "--data", str(data), *map(str, args)])
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def start(data, *args, **options):
    """tile.py as a process of its own."""
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


def held(folder):
    """All that a finished cohort holds, without what differs from run to run."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".h5":  # HDF5 writes times into its file
            with h5py.File(path) as file:
                found[name] = {}
                file.visititems(functools.partial(_add_object, found[name]))
        elif name == "slides.csv":
            found[name] = read_rows(folder)
            for row in found[name].values():
                for column in ("seconds", "seals", "check"):
                    del row[column]
        elif path.is_file() and path.suffix != ".damaged" and not name.startswith(".locks"):
            found[name] = path.read_bytes()
    return found


def _add_object(found, name, thing):
    data = thing[()].tobytes() if isinstance(thing, h5py.Dataset) else b""
    found[name] = data, sorted((key, str(value)) for key, value in thing.attrs.items())


def edit_rows(table, change):
    """Change each row (a dict) of a slides.csv by hand; it then has no checksum."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
        row["check"] = ""
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

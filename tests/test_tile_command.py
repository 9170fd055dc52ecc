"""The command: cohorts, selection, faults, resuming, processes side by side, and the GDC on a local server."""

import csv
import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from conftest import SHARED, torchrun
from PIL import Image
from scipy import ndimage
from synthetic import by_openslide, section, write_slide

import tile
from g2l.cohort import CohortSlide, patient_of, read_manifest, read_rows, select
from g2l.grid import tile_slide
from g2l.patches import PatchIndex
from g2l.slides import Slide, slide_name

ROOT = Path(tile.__file__).parent


def command(data, *args, name="mine"):
    return [
        sys.executable,
        str(ROOT / "tile.py"),
        "--cancer",
        name,
        "--data",
        str(data),
        *map(str, args),
    ]


def run(data, *args, **options):
    return subprocess.run(
        command(data, *args), capture_output=True, text=True, timeout=120, **options
    )


def rows(data, name="mine"):
    return read_rows(data / "tiles" / name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One sound slide as bytes: tests copy it under many names."""
    path = write_slide(tmp_path_factory.mktemp("sound") / "a.svs", section(1024, 1024))
    return path.read_bytes()


def put(data, sound, *names):
    folder = data / "slides" / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound)
    return folder


# What lies in slide folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, sound):
    """One folder with everything that slide folders hold in the wild, tiled once; returns (data, finished process)."""
    data = tmp_path_factory.mktemp("zoo")
    folder = put(
        data,
        sound,
        "good.svs",
        "na\u00efve \u00fc [1], (2)#%.svs",
        "d290-uuid/in-folder.svs",
        "p1/same.svs",
        "p2/same.svs",
        os.fsdecode(b"latin\xe9.svs"),
        ".hidden.svs",
        "b.svs.partial",
    )
    (folder / "dangling.svs").symlink_to("/nowhere/dangling.svs")
    (folder / "folder.svs").mkdir()
    (folder / "lfs.svs").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    )
    (folder / "empty.ndpi").touch()
    (folder / "page.svs").write_text("<html>404</html>" * 80)
    (folder / "half.svs").write_bytes(sound[: len(sound) // 2])
    (folder / "alone.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(2000))
    (folder / "notes.txt").write_text("not looked at")
    write_slide(folder / "no-mpp.svs", section(600, 600), mpp=None, objective=None)
    write_slide(
        folder / "dpi.tif",
        section(600, 600),
        aperio=False,
        resolution=(72, 72),
        resolutionunit="INCH",
    )
    write_slide(folder / "coarse.svs", section(600, 600), mpp=0.5)
    write_slide(folder / "blank.svs", np.full((600, 600, 3), 240, np.uint8))
    write_slide(folder / "white.svs", np.full((600, 600, 3), 255, np.uint8))
    write_slide(folder / "tiny.svs", section(200, 200), levels=())
    damaged = bytearray(sound)
    page = tifffile.TiffFile(folder / "good.svs").pages[0]
    damaged[page.dataoffsets[5] : page.dataoffsets[5] + page.databytecounts[5]] = bytes(
        page.databytecounts[5]
    )
    (folder / "damaged.svs").write_bytes(damaged)
    # Cut behind the directories: opens, but tiles are gone.
    tifffile.imwrite(
        folder / "cut.tif",
        section(1024, 1024),
        tile=(256, 256),
        compression="jpeg",
        photometric="rgb",
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    with open(folder / "cut.tif", "r+b") as file:
        file.truncate((folder / "cut.tif").stat().st_size * 2 // 3)
    return data, run(data, "--save-patches", "--workers", 2)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("good", "done", ""),
        ("na\u00efve \u00fc [1], (2)#%", "done", ""),
        ("in-folder", "done", ""),
        ("p1_same", "done", ""),
        ("p2_same", "done", ""),
        ("latin\ufffd", "done", ""),
        ("lfs", "failed", "git lfs pull"),
        ("empty", "failed", "empty file"),
        ("page", "failed", "not a slide format"),
        ("half", "failed", "cut short"),
        ("dangling", "failed", "no such file"),
        ("alone", "failed", "MIRAX data folder alone/ is missing"),
        ("no-mpp", "skipped", "--assume-mpp"),
        ("dpi", "skipped", "352.8 µm/px is implausible"),
        ("coarse", "skipped", "0.5 µm/px is coarser than 0.25"),
        ("blank", "skipped", "no tissue"),
        ("white", "failed", "empty pixels"),
        ("tiny", "skipped", "smaller"),
        ("damaged", "done", ""),
        ("cut", "failed", "cut short"),
    ],
)
def test_every_kind_of_file_gets_its_row(zoo, name, status, reason):
    row = rows(zoo[0])[name]
    assert row["status"] == status and reason in row["reason"], row
    if status == "done":
        assert (
            int(row["patches"]) > 0
            and (zoo[0] / "tiles" / "mine" / "thumbnails" / f"{name}.jpg").is_file()
        )


def test_faults_are_told_and_nothing_else_is_lost(zoo):
    data, done = zoo
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    table = rows(data)
    assert len(table) == 20 and ".hidden" not in table
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("7 slides done (1 with warnings), 5 skipped, 8 failed;"), last
    row = table["damaged"]
    assert int(row["unreadable"]) == 1 and "left out, first: x=256, y=256: " in row["warnings"]
    assert int(row["patches"]) == int(table["good"]["patches"]) - 1
    index = PatchIndex(data / "tiles" / "mine")
    assert len(index.slides) == 7 and all(
        index.read(i).shape == (256, 256, 3) for i in range(0, len(index), 5)
    )
    assert not list((data / "tiles" / "mine").rglob("*.tmp*"))


def test_a_second_run_does_only_what_is_missing(zoo):
    data, _ = zoo
    folder = data / "tiles" / "mine"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.h5")}
    (folder / "patches" / "good_patches.h5").unlink()
    done = run(data, "--save-patches")
    assert (
        done.returncode == 1 and "11 slides are finished, 9 to do" in done.stdout
    )  # 8 failed, 1 missing
    assert all(
        path.stat().st_mtime_ns == old
        for path, old in times.items()
        if path.name != "good_patches.h5"
    )


def test_other_settings_are_done_again(tmp_path, sound):
    put(tmp_path, sound, "a.svs")
    assert run(tmp_path).returncode == 0
    assert "1 slides are finished" in run(tmp_path).stdout
    assert "0 slides are finished" in run(tmp_path, "--min-tissue", 0.9).stdout
    write_slide(tmp_path / "slides" / "mine" / "a.svs", section(900, 1200))
    assert "0 slides are finished" in run(tmp_path, "--min-tissue", 0.9).stdout, (
        "the slide is another one now"
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--slides", "/nowhere"], "no such folder"),
        (["--patch-size", "4"], "--patch-size"),
        (["--overlap", "256"], "--overlap"),
        (["--discard-slides"], "--download"),
        (["--exclude", "/nowhere"], "--exclude"),
        (["--manifest", "/nowhere"], "--manifest"),
        (["--masks", "/nowhere"], "--masks"),
        (["--cancer", "../x"], "--cancer"),
        (["--slides", str(ROOT / "tile.py")], "is a file; give its folder"),
    ],
)
def test_mistakes_are_named_without_a_traceback(tmp_path, sound, capsys, args, text):
    put(tmp_path, sound, "a.svs")
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path), *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error


@pytest.mark.parametrize("flag", ["--mpp", "--assume-mpp"])
def test_a_magnification_where_a_pixel_size_belongs(capsys, flag):
    with pytest.raises(SystemExit):
        tile.main(["--cancer", "mine", flag, "20x"])
    assert (
        f"{flag}: 20x: expected micrometres per pixel, such as 0.5 (20x)" in capsys.readouterr().err
    )


def test_masks_and_mpp_of_the_user(tmp_path, sound):
    folder = put(tmp_path, sound, "a.svs", "b.svs")
    write_slide(folder / "c.svs", section(1024, 1024), mpp=None)
    (tmp_path / "masks").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    ring = [[256, 256], [768, 256], [768, 512], [256, 512], [256, 256]]
    shape = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        ],
    }
    (tmp_path / "masks" / "c.geojson").write_text(json.dumps(shape))
    (tmp_path / "list.csv").write_text("slide,mpp\na.svs,\nb,0.25\nc.svs,0.26\n")
    done = run(tmp_path, "--masks", tmp_path / "masks", "--manifest", tmp_path / "list.csv")
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path)
    assert table["b"]["status"] == "skipped" and "no mask b.geojson" in table["b"]["reason"]
    assert (table["c"]["mpp"], table["c"]["mpp_source"]) == ("0.26", "given")
    for name in "ac":
        with h5py.File(tmp_path / "tiles" / "mine" / "patches" / f"{name}_patches.h5") as file:
            assert file["coords"][:].tolist() == [[256, 256], [512, 256]]
    mask[32:48, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    done = run(tmp_path, "--masks", tmp_path / "masks", "--manifest", tmp_path / "list.csv")
    assert "a: done, 4 patches" in done.stdout and "c: done" not in done.stdout, (
        "a mask that was drawn anew"
    )


@pytest.mark.parametrize("mpp", ["nan", "-0.25", "0", "inf", "fast"])
def test_impossible_mpp_in_a_table(tmp_path, sound, capsys, mpp):
    put(tmp_path, sound, "a.svs")
    (tmp_path / "list.csv").write_text(f"slide,mpp\na.svs,{mpp}\n")
    args = ["--cancer", "mine", "--data", str(tmp_path), "--manifest", str(tmp_path / "list.csv")]
    assert tile.main(args) == 1
    error = capsys.readouterr().err
    assert "list.csv" in error and f"{mpp}: expected micrometres" in error and "a.svs" in error


def test_slides_of_one_name_in_a_table(tmp_path, sound):
    """Each row is its own slide, also where two differ in the folder only."""
    put(tmp_path, sound, "p1/same.svs", "p2/same.svs", "p3/same.svs")
    (tmp_path / "list.csv").write_text("slide,mpp\np1/same.svs,\np3/same.svs,0.26\n")
    assert run(tmp_path, "--manifest", tmp_path / "list.csv").returncode == 0
    assert {name: row["mpp"] for name, row in rows(tmp_path).items()} == {
        "p1_same": "0.25",
        "p3_same": "0.26",
    }
    (tmp_path / "list.csv").write_text("slide\nsame\n")
    done = run(tmp_path, "--manifest", tmp_path / "list.csv")
    assert done.returncode == 1 and "same: 3 slides" in done.stderr


def test_a_name_that_changes_leaves_no_second_copy(tmp_path, sound):
    put(tmp_path, sound, "p1/same.svs")
    assert run(tmp_path).returncode == 0
    put(tmp_path, sound, "p2/same.svs")
    assert run(tmp_path).returncode == 0
    assert PatchIndex(tmp_path / "tiles" / "mine").slides == ["p1_same", "p2_same"]


def test_a_folder_that_cannot_be_written_is_an_error_without_a_traceback(tmp_path, sound, capsys):
    put(tmp_path, sound, "a.svs")
    (tmp_path / "tiles").write_text("a file where a folder should be")
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "tiles" in error


def test_slides_without_patches_have_a_thumbnail_too(tmp_path):
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    write_slide(folder / "blank.svs", np.full((600, 700, 3), 240, np.uint8))
    write_slide(folder / "coarse.svs", section(600, 700), mpp=0.5)
    write_slide(folder / "blurred.svs", ndimage.gaussian_filter(section(600, 700), (15, 15, 0)))
    assert run(tmp_path).returncode == 0
    table = rows(tmp_path)
    assert {row["status"] for row in table.values()} == {"skipped"} and "for blur" in table[
        "blurred"
    ]["reason"]
    for name in table:
        assert Image.open(tmp_path / "tiles" / "mine" / "thumbnails" / f"{name}.jpg").size == (
            700,
            600,
        )


# Selection -----------------------------------------------------------------------------------------------------------


def tcga(number, kind="DX1"):
    return CohortSlide(
        f"TCGA-A{number % 7}-{number:04d}-01{'Z' if kind == 'DX1' else 'A'}-00-{kind}.UUID",
        Path("x"),
    )


def choose(sources, **args):
    return select(
        sources,
        Namespace(**{"exclude": None, "strategy": "both", "max_slides": 0, "seed": 0} | args),
    )


def test_sample_is_seeded_and_stable(capsys):
    sources = [tcga(n) for n in range(100)]
    chosen = [source.name for source in choose(sources, max_slides=30)[0]]
    assert len(chosen) == 30 and chosen == [s.name for s in choose(sources[::-1], max_slides=30)[0]]
    assert chosen != [s.name for s in choose(sources, max_slides=30, seed=1)[0]]
    fewer = [source.name for source in choose(sources[:-1], max_slides=30)[0]]
    assert len(set(chosen) & set(fewer)) >= 29, (
        "one slide less does not change the rest of the sample"
    )
    choose(sources, max_slides=200)
    assert "100 taken (fewer than --max-slides 200)" in capsys.readouterr().out


def test_strategy_takes_diagnostic_slides_first():
    sources = [tcga(n) for n in range(10)] + [tcga(n, "TS1") for n in range(10)]
    assert (
        len(choose(sources, strategy="diagnostic")[0])
        == len(choose(sources, strategy="tissue")[0])
        == 10
    )
    both = choose(sources, max_slides=13)[0]
    assert sum("DX1" in source.name for source in both) == 10


def test_exclusion_is_by_patient(tmp_path, capsys):
    sources = [tcga(n, kind) for n in range(20) for kind in ("DX1", "TS1")]
    (tmp_path / "a.csv").write_text(f"slide_id,patient,label\n{sources[4].name},TCGA-XX-0000,MUT\n")
    (tmp_path / "b.txt").write_text("TCGA-A3-0003\n")
    for name, patient in (("a.csv", "TCGA-A2-0002"), ("b.txt", "TCGA-A3-0003")):
        chosen, reasons = choose(sources, exclude=tmp_path / name)
        assert len(chosen) == 38 and not [s for s in chosen if s.name.startswith(patient)]
        assert sum("held out" in reason for reason in reasons.values()) == 2
    double = [CohortSlide(f"p{n}_same", Path(f"p{n}/same.svs")) for n in (1, 2)]
    (tmp_path / "d.txt").write_text("# held out\r\nsame.svs\r\n", encoding="utf-8-sig")
    assert not choose([*double, sources[0]], exclude=tmp_path / "d.txt")[0][1:], (
        "named as the file is"
    )
    named = [
        CohortSlide('a, "b" 1', Path("x")),
        CohortSlide("c", Path("y"), stated="Doe, J."),
        sources[0],
    ]
    for text in ('slide,label\n"a, ""b"" 1",x\n', 'a, "b" 1\n'):
        (tmp_path / "e.txt").write_text(text)
        assert choose(named, exclude=tmp_path / "e.txt")[0] == [sources[0], named[1]], (
            "a comma in a name"
        )
    for text in ('patient;label\n"Doe, J.";x\n', "Doe, J.\n"):
        (tmp_path / "f.txt").write_text(text)
        assert choose(named, exclude=tmp_path / "f.txt")[0] == [sources[0], named[0]]
    (tmp_path / "c.txt").write_text("somebody\n")
    choose(sources, exclude=tmp_path / "c.txt")
    assert "none of its 1 patients is in this cohort" in capsys.readouterr().out


@pytest.mark.skipif(SHARED is None, reason="needs the shared tables")
def test_real_manifest_and_benchmark_table(capsys):
    listed = read_manifest(SHARED / "tables" / "gdc_manifest.tcga-brca-diagnostic.txt")
    sources = [CohortSlide(slide_name(row["filename"]), Path(row["filename"])) for row in listed]
    held = SHARED / "tables" / "tcga-brca-tp53.csv"
    chosen, _ = choose(sources, exclude=held, strategy="diagnostic")
    patients = {line.split(",")[1] for line in held.read_text().splitlines()[1:]}
    assert len(listed) == 1134 and len(chosen) < 200
    assert not {patient_of(source.name) for source in chosen} & patients


def test_patients_held_out_later_leave_the_index(tmp_path, sound):
    put(tmp_path, sound, "p1_a.svs", "p1_b.svs", "p2_a.svs")
    assert run(tmp_path).returncode == 0
    (tmp_path / "held.txt").write_text("p1\n")
    assert run(tmp_path, "--exclude", tmp_path / "held.txt").returncode == 0
    assert PatchIndex(tmp_path / "tiles" / "mine").slides == ["p2_a"]
    manifest = (tmp_path / "tiles" / "mine" / "manifest.txt").read_text().splitlines()
    assert (
        manifest[0] == "id\tfilename\tmd5\tsize\tstate"
        and len(manifest) == 2
        and "p2_a.svs" in manifest[1]
    )
    assert run(tmp_path).returncode == 0
    assert len(PatchIndex(tmp_path / "tiles" / "mine").slides) == 3, "wanted again"


def test_the_patient_that_the_manifest_states_wins(tmp_path, sound):
    put(tmp_path, sound, "case_a.svs", "case_b.svs", "P1_a.svs", "P2_a.svs", "z_1.svs")
    folder, listed = tmp_path / "tiles" / "mine", tmp_path / "list.csv"
    done = run(tmp_path)
    assert done.stdout.splitlines()[-1].startswith("5 slides done,")
    listed.write_text(
        "slide,patient\ncase_a.svs,Ann_1_x\ncase_b.svs,Ann_1_x\nP1_a,Bea\nP2_a,\nz_1,TCGA-A8-A06N-01Z\n"
    )
    done = run(tmp_path, "--manifest", listed)
    assert "5 slides are finished, 0 to do" in done.stdout, "another patient is no other tiling"
    assert done.stdout.splitlines()[-1].startswith("5 slides of 4 patients done,")
    index = PatchIndex(folder)
    assert dict(zip(index.slides, index.patient, strict=True)) == {
        "case_a": "Ann_1_x",
        "case_b": "Ann_1_x",
        "P1_a": "Bea",
        "P2_a": "P2",
        "z_1": "TCGA-A8-A06N",
    }
    assert index.patients == ["Ann_1_x", "Bea", "P2", "TCGA-A8-A06N"]
    held = tmp_path / "held.txt"
    for text, left in (
        ("Ann_1_x", ["P1_a", "P2_a", "z_1"]),
        ("case_a.svs", ["P1_a", "P2_a", "z_1"]),
        ("P1", ["P1_a", "P2_a", "case_a", "case_b", "z_1"]),
        ("P1_a\nP2_b", ["case_a", "case_b", "z_1"]),
        ("TCGA-A8-A06N-01Z-00-DX1", ["P1_a", "P2_a", "case_a", "case_b"]),
    ):
        held.write_text(f"{text}\n")
        assert run(tmp_path, "--manifest", listed, "--exclude", held).returncode == 0
        assert PatchIndex(folder).slides == left, text
    listed.write_text("slide\nP2_a\n")
    held.write_text("Ann_1_x\n")
    assert run(tmp_path, "--manifest", listed, "--exclude", held).returncode == 0
    assert "case_a" not in PatchIndex(folder).slides, (
        "held out by what slides.csv holds of an earlier run"
    )


# Processes -----------------------------------------------------------------------------------------------------------


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


def test_two_runs_at_once_share_the_work(tmp_path, sound):
    put(tmp_path, sound, *(f"s{n}.svs" for n in range(8)))
    runs = [
        subprocess.Popen(command(tmp_path, "--workers", 1), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0]
    assert all(
        output.splitlines()[-1].startswith("8 slides done, 0 skipped, 0 failed")
        for output in outputs
    )
    assert len(rows(tmp_path)) == 8 and len(tree(tmp_path / "tiles" / "mine")[1]) == 8


def test_killed_at_any_moment_it_goes_on(tmp_path, sound):
    names = [f"s{n}.svs" for n in range(6)]
    put(tmp_path / "whole", sound, *names)
    put(tmp_path / "killed", sound, *names)
    assert run(tmp_path / "whole", "--save-patches").returncode == 0
    rng = random.Random(0)
    finished = []
    for _ in range(7):
        process = subprocess.Popen(
            command(tmp_path / "killed", "--save-patches", "--workers", 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.time() + 60
        while (
            len(rows(tmp_path / "killed")) <= len(names) * len(finished) // 8
            and process.poll() is None
        ):
            assert time.time() < deadline  # it is under way, however fast or slow the machine
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        if rng.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)  # workers and parent
        else:
            process.kill()  # the parent alone: workers must not linger
        process.wait()
        finished.append(len(rows(tmp_path / "killed")))
    assert finished == sorted(finished), "no row was lost"
    assert run(tmp_path / "killed", "--save-patches").returncode == 0
    assert tree(tmp_path / "whole" / "tiles" / "mine") == tree(
        tmp_path / "killed" / "tiles" / "mine"
    )
    for name in names:
        shard = Path("tiles", "mine", "shards", name).with_suffix(".tar")
        assert (tmp_path / "whole" / shard).stat().st_size == (
            tmp_path / "killed" / shard
        ).stat().st_size
    assert not list((tmp_path / "killed" / "tiles" / "mine").glob("*/.*.tmp*"))
    assert not list((tmp_path / "killed" / "tiles" / "mine").glob(".slides*.tmp*"))


def test_workers_end_with_their_parent(tmp_path, sound):
    put(tmp_path, sound, *(f"s{n}.svs" for n in range(200)))
    process = subprocess.Popen(command(tmp_path, "--workers", 2), stdout=subprocess.DEVNULL)
    deadline, children = time.time() + 60, []
    while len(children) < 2:
        assert process.poll() is None and time.time() < deadline, "no workers were seen"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in children
    ):
        assert time.time() < deadline, "a worker lingers"
        time.sleep(0.1)


def test_ranks_share_the_slides(tmp_path, sound):
    folder = put(tmp_path, sound, *(f"s{n}.svs" for n in range(5)))
    (folder / "bad.svs").write_text("no slide")
    done = torchrun(3, "tile.py", "--cancer", "mine", "--data", tmp_path, "--workers", 1)
    table = rows(tmp_path)
    assert (
        sum(row["status"] == "done" for row in table.values()) == 5
        and table["bad"]["status"] == "failed"
    )
    assert done.returncode == 1 and "5 slides done, 0 skipped, 1 failed" in done.stdout


def test_a_slide_that_crashes_its_reader_is_recorded(tmp_path, sound, monkeypatch, capsys):
    put(tmp_path, sound, "a.svs", "b.svs", "c.svs")
    whole = tile_slide

    def crash(slide, **options):
        if slide.name == "b":
            faulthandler.disable()  # pytest's, whose report of this death would look like a real one
            os.kill(os.getpid(), signal.SIGSEGV)
        return whole(slide, **options)

    monkeypatch.setattr("tile.tile_slide", crash)
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path), "--workers", "1"]) == 1
    table = rows(tmp_path)
    assert [table[name]["status"] for name in "abc"] == [
        "done",
        "failed",
        "done",
    ] and "SIGSEGV" in table["b"]["reason"]


def test_full_disk_stops_the_run_and_loses_nothing(tmp_path, sound):
    put(tmp_path, sound, *(f"s{n}.svs" for n in range(4)))
    assert run(tmp_path, "--max-slides", 2).returncode == 0
    before = tree(tmp_path / "tiles" / "mine")[1]

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run(tmp_path, "--workers", 2, preexec_fn=little_room)
    assert (
        done.returncode == 1 and "free some space and run the same command again" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr
    after = tree(tmp_path / "tiles" / "mine")[1]
    assert all(after[name] == coords for name, coords in before.items())
    assert run(tmp_path).returncode == 0 and len(tree(tmp_path / "tiles" / "mine")[1]) == 4


# The GDC -------------------------------------------------------------------------------------------------------------


class Gdc(BaseHTTPRequestHandler):
    """The part of the GDC's interface that is used, with faults to order: {id or "files": [fault, ...]}."""

    protocol_version = "HTTP/1.1"
    slides, faults, changes, log = {}, {}, {}, []  # set anew by the fixture

    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=(), length=None):
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def fault(self, key):
        waiting = self.faults.get(key, [])
        return waiting.pop(0) if waiting else None

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.fault("files")
        if fault == "cut":
            self.close_connection = True
            return self.reply(200, b'{"data":', length=1000)
        if fault:
            return self.reply(
                *{"html": (200, b"<html>"), "nothing": (200, b"{}")}.get(fault, (fault, b""))
            )
        hits = [
            {"file_id": key, "file_name": name, "file_size": len(body), "md5sum": md5}
            for key, (name, body, md5) in self.slides.items()
        ]
        hits = [hit | self.changes.get(hit["file_id"], {}) for hit in hits]
        for clause in query["filters"]["content"]:
            field, values = clause["content"]["field"], clause["content"]["value"]
            if field == "file_name":
                hits = [hit for hit in hits if hit["file_name"] in values]
            if field == "cases.project.project_id":
                assert values == ["TCGA-UCS"]
        page = hits[
            query["from"] : query["from"] + min(query["size"], 2)
        ]  # this server gives two a page
        self.reply(
            200, json.dumps({"data": {"hits": page, "pagination": {"total": len(hits)}}}).encode()
        )

    def do_GET(self):
        key = self.path.removeprefix("/data/")
        fault = self.fault(key)
        self.log.append((key, self.headers.get("Range"), fault))
        if key not in self.slides:
            return self.reply(404, b"")
        if isinstance(fault, int):
            return self.reply(fault, b"", [("Retry-After", "1")])
        body = self.slides[key][1]
        total, start = len(body), 0
        if self.headers.get("Range") and fault != "norange":
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers = [("Content-Disposition", 'attachment; filename="../../evil.svs"')]
        if start:
            headers.append(("Content-Range", f"bytes {start}-{total - 1}/{total}"))
        part = body[start:]
        if fault == "corrupt":
            part = bytes(len(part))
        if fault == "long":
            part += b"more"
        if fault == "short":
            part = part[: len(part) // 2]
        if fault == "cut":
            self.reply(206 if start else 200, part[: len(part) // 2], headers, len(part))
            self.close_connection = True
            return None
        return self.reply(206 if start else 200, part, headers)


@pytest.fixture
def gdc(sound, monkeypatch):
    """A server with four slides; its address."""
    md5 = hashlib.md5(sound).hexdigest()
    Gdc.slides = {f"uuid-{n}": (f"TCGA-N5-A4R{n}-01Z-00-DX1.{n}.svs", sound, md5) for n in range(4)}
    Gdc.faults, Gdc.changes, Gdc.log = {}, {}, []
    monkeypatch.setattr("g2l.gdc.RETRY_SECONDS", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gdc)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(data, gdc, *args):
    return tile.main(
        [
            "--cancer",
            "ucs",
            "--data",
            str(data),
            "--download",
            "--gdc-url",
            gdc,
            "--workers",
            "2",
            *args,
        ]
    )


def test_download_plans_first(tmp_path, gdc, capsys):
    assert download(tmp_path, gdc) == 1
    captured = capsys.readouterr()
    assert (
        "to download: 4 slides, 0.00 GB" in captured.out
        and "GB free" in captured.out
        and "--yes" in captured.err
    )
    assert not Gdc.log


@pytest.mark.parametrize(("typed", "status"), [("no", 1), ("", 1), ("yes", 0)])
def test_download_goes_on_with_a_typed_yes(tmp_path, gdc, monkeypatch, typed, status):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: typed)
    assert download(tmp_path, gdc) == status and bool(Gdc.log) == (status == 0)


def test_download_needs_room(tmp_path, gdc, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=1000))
    assert download(tmp_path, gdc, "--yes") == 1 and not Gdc.log
    assert "--save-patches --discard-slides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault", ["cut", "short", "corrupt", "long", "norange", 416, 429, 503, 500]
)
def test_download_survives(tmp_path, gdc, sound, fault):
    Gdc.faults = {
        "uuid-1": ["cut", fault] + [fault] * (fault != 416),
        "files": [503],
    }  # 416 answers a range only
    assert download(tmp_path, gdc, "--yes") == 0
    table = rows(tmp_path, "ucs")
    assert len(table) == 4 and all(row["status"] == "done" for row in table.values())
    slide = tmp_path / "slides" / "ucs" / "uuid-1" / "TCGA-N5-A4R1-01Z-00-DX1.1.svs"
    assert (
        slide.read_bytes() == sound
        and not list(tmp_path.rglob("*.partial"))
        and not list(tmp_path.rglob("evil*"))
    )
    ranges = [span for key, span, _ in Gdc.log if key == "uuid-1"]
    assert ranges[0] is None and ranges[1] == f"bytes={len(sound) // 2}-", (
        "it went on where it was cut"
    )
    requests = len(Gdc.log)
    assert download(tmp_path, gdc, "--yes") == 0 and len(Gdc.log) == requests, (
        "nothing is fetched twice"
    )


@pytest.mark.parametrize("fault", ["cut", "html", "nothing", 503])
def test_list_of_files_comes_broken(tmp_path, gdc, fault, capsys):
    """A list cut short is asked for again; an answer that is no list is an error, not a traceback."""
    Gdc.faults = {"files": [fault]}
    passes = fault in ("cut", 503)
    assert download(tmp_path, gdc, "--yes") == (0 if passes else 1)
    assert passes or "is it a GDC server?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"file_size": None}, {"file_size": 0}, {"file_size": "x"}, {"md5sum": None}]
)
def test_hostile_entries_of_the_list(tmp_path, gdc, change, capsys):
    Gdc.changes = {"uuid-1": change}
    assert download(tmp_path, gdc, "--yes") == 0
    assert len(rows(tmp_path, "ucs")) == 3 and "refused" in capsys.readouterr().out


def test_download_gives_up_on_one_slide_only(tmp_path, gdc, capsys):
    Gdc.faults = {"uuid-2": ["corrupt"] * 99, "uuid-3": [404] * 99}
    assert download(tmp_path, gdc, "--yes") == 1
    table = rows(tmp_path, "ucs")
    assert sorted(row["status"] for row in table.values()) == ["done", "done", "failed", "failed"]
    reasons = [row["reason"] for row in table.values() if row["status"] == "failed"]
    assert "md5" in reasons[0] and "404" in reasons[1]
    Gdc.faults = {}
    assert download(tmp_path, gdc, "--yes") == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.svs",
        "/etc/evil.svs",
        "a/b.svs",
        "..\\evil.svs",
        ".svs",
        "evil.sh",
        "-rf.svs",
        "a\nb.svs",
        "",
    ],
)
def test_names_from_the_network_never_choose_a_path(tmp_path, gdc, name, capsys):
    Gdc.slides["uuid-0"] = (name, *Gdc.slides["uuid-0"][1:])
    Gdc.slides["../../up"] = Gdc.slides["uuid-1"]
    assert download(tmp_path / "data", gdc, "--yes") == 0
    assert (
        len(rows(tmp_path / "data", "ucs")) == 3 and capsys.readouterr().out.count("refused") == 2
    )
    folders = sorted(path.name for path in (tmp_path / "data" / "slides" / "ucs").iterdir())
    assert folders == ["uuid-1", "uuid-2", "uuid-3"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_discarded_slides_leave_their_patches(tmp_path, gdc):
    own = tmp_path / "slides" / "ucs" / "uuid-3" / Gdc.slides["uuid-3"][0]
    own.parent.mkdir(parents=True)
    own.write_bytes(Gdc.slides["uuid-3"][1])
    assert download(tmp_path, gdc, "--yes", "--save-patches", "--discard-slides") == 0
    assert list((tmp_path / "slides").rglob("*.svs")) == [own], (
        "a slide that was there before is not ours to delete"
    )
    index = PatchIndex(tmp_path / "tiles" / "ucs")
    assert len(index.slides) == 4 and index.read(0).shape == (256, 256, 3)
    requests = len(Gdc.log)
    assert download(tmp_path, gdc, "--yes", "--save-patches", "--discard-slides") == 0
    assert len(Gdc.log) == requests, "finished slides are not fetched again"


def test_manifest_is_matched_by_name_and_slides_at_hand_are_used(tmp_path, gdc, sound):
    """Ids of before Data Release 31 are dead; names and md5 hold."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    lines += [f"dead-{n}\t{Gdc.slides[f'uuid-{n}'][0]}\tx\t1\treleased" for n in (1, 2)]
    (tmp_path / "manifest.txt").write_text("\n".join(lines))
    flat = tmp_path / "slides" / "ucs" / Gdc.slides["uuid-2"][0]
    flat.parent.mkdir(parents=True)
    flat.write_bytes(sound)
    assert download(tmp_path, gdc, "--yes", "--manifest", str(tmp_path / "manifest.txt")) == 0
    assert [key for key, *_ in Gdc.log] == ["uuid-1"] and len(rows(tmp_path, "ucs")) == 2
    (tmp_path / "own.csv").write_text(f"slide,patient\n{Gdc.slides['uuid-1'][0]},Ann\n")
    assert download(tmp_path, gdc, "--yes", "--manifest", str(tmp_path / "own.csv")) == 0
    assert [row["patient"] for row in rows(tmp_path, "ucs").values()].count("Ann") == 1


def test_only_tcga_projects_are_downloaded(tmp_path, gdc, capsys):
    assert (
        tile.main(["--cancer", "mine", "--data", str(tmp_path), "--download", "--gdc-url", gdc])
        == 1
    )
    assert "knows the TCGA projects" in capsys.readouterr().err


# Real slides ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(SHARED is None, reason="needs the shared slides")
def test_real_slides(tmp_path):
    done = run(tmp_path, "--slides", SHARED / "slides", "--mpp", 0.5, "--save-patches")
    table = rows(tmp_path)
    assert done.returncode == 0 and table["CMU-1-Small-Region"]["status"] == "done"
    assert 25 < int(table["CMU-1-Small-Region"]["patches"]) < 45
    frozen = table["TCGA-CR-7395-01A-01-TS1"]
    assert frozen["status"] == "skipped" and "no µm per pixel" in frozen["reason"]
    assert frozen["patient"] == "TCGA-CR-7395"
    for path in sorted((SHARED / "slides").glob("*.svs")):
        with Slide(path) as slide, openslide.OpenSlide(path) as reference:
            assert slide.levels[0].tiles
            for x, y in (
                np.random.default_rng(0)
                .integers(-100, (slide.width, slide.height), (25, 2))
                .tolist()
            ):
                assert np.array_equal(
                    slide.read(x, y, 256, 256), by_openslide(reference, x, y, 256, 256)
                )
    odd = run(tmp_path, "--slides", SHARED / "odd", "--mpp", 0.5)
    table = rows(tmp_path)
    assert odd.returncode == 1 and table["histolab_broken"]["status"] == "failed"
    assert "28.97 µm/px is coarser" in table["gcp_camelyon_j2k"]["reason"]


def test_unused_imports_are_not_paid_for(tmp_path, sound):
    """From start to exit for one slide: about 1 s of CPU on a quiet machine; torch alone would add 2."""
    put(tmp_path, sound, "a.svs")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(tmp_path, "--workers", 1).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5
    with open(tmp_path / "tiles" / "mine" / "slides.csv") as file:
        assert next(csv.DictReader(file))["status"] == "done"
    shutil.rmtree(tmp_path / "tiles")

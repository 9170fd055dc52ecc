"""The command tile.py: faults, resuming, proof that work is finished, processes side by side."""

import csv
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from cohorts import command, held, put, rows, run, start, tree
from conftest import SHARED
from PIL import Image
from scipy import ndimage
from synthetic import by_openslide, section, write_slide

import tile
from g2l.cohort import CohortSlide
from g2l.grid import tile_slide
from g2l.patches import PatchIndex
from g2l.pool import FORK, _serve
from g2l.rows import read_rows
from g2l.slides import Slide
from g2l.tiling import Job, Limits, Settings, is_finished

# What lies in slide folders ------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, sound):
    """One folder with everything that slide folders hold in the wild, tiled once; returns (data,
    finished process).
    """
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
    start, count = page.dataoffsets[10], page.databytecounts[10]  # at x=256, y=256
    damaged[start : start + count] = bytes(count)
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
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*_patches.h5")}
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
        (["--overlap", "256"], "--overlap"),
        (["--discard-slides"], "--download"),
        (["--exclude", "/nowhere"], "--exclude"),
        (["--manifest", "/nowhere"], "--manifest"),
        (["--masks", "/nowhere"], "--masks"),
    ],
)
def test_mistakes_are_named_without_a_traceback(tmp_path, sound, capsys, args, text):
    put(tmp_path, sound, "a.svs")
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path), *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("--mpp", "20x", "20x: expected micrometres per pixel, such as 0.5 (20x)"),
        ("--assume-mpp", "20x", "20x: expected micrometres per pixel, such as 0.5 (20x)"),
        ("--patch-size", "4", "4: expected a whole number from 16 to 4096"),
        ("--max-slides", "-1", "-1: expected a whole number from 0"),
        ("--workers", "0", "0: expected a whole number from 1"),
        ("--seed", "-1", "-1: expected a whole number from 0 to 2147483647"),
        ("--cancer", "../x", "'../x': expected a plain name such as brca"),
        ("--slides", __file__, f"{__file__} is a file; give its folder"),
    ],
)
def test_impossible_values_are_named_with_their_flag(capsys, flag, value, text):
    with pytest.raises(SystemExit):
        tile.main(["--cancer", "mine", f"{flag}={value}"])
    assert f"{flag}: {text}" in capsys.readouterr().err


def with_tags(slide, edits):
    """A little-endian TIFF with other values of some tags of its first directory."""
    data = bytearray(slide)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, at)
        if tag in edits:
            struct.pack_into("<HII", data, at + 2, 4, 1, edits[tag])
    return data


def test_hostile_files_are_refused_in_seconds(tmp_path, sound):
    folder = put(tmp_path, sound, "good.svs")
    os.mkfifo(folder / "pipe.svs")
    (folder / "link.svs").symlink_to("pipe.svs")
    for side in (1 << 14, 1 << 20, 1 << 30):
        (folder / f"side{side}.svs").write_bytes(with_tags(sound, {322: side, 323: side}))
    (folder / "high.svs").write_bytes(with_tags(sound, {257: 1 << 31}))
    empty = zlib.compress(bytes(3 * 1024**2), 9)
    with tifffile.TiffWriter(folder / "bomb.tif") as file:  # 3 GB in 3 MB
        file.write(
            (empty for _ in range(1024)),
            shape=(32768, 32768, 3),
            dtype=np.uint8,
            tile=(1024, 1024),
            compression="zlib",
            photometric="rgb",
            resolution=(40000, 40000),
            resolutionunit="CENTIMETER",
        )
    start = time.time()
    done = run(tmp_path, "--workers", 1)
    assert done.returncode == 1 and time.time() - start < 20
    table = rows(tmp_path)
    assert {name for name, row in table.items() if row["status"] == "done"} == {"good"}
    assert "are no tissue" in table["bomb"]["reason"] and "pipe" not in table
    assert all("has tiles of" in row["reason"] for name, row in table.items() if "side" in name)


def test_names_with_controls_do_not_reach_the_terminal(tmp_path, sound):
    put(tmp_path, sound, "a\n\x1b[31m.svs")
    done = run(tmp_path)
    assert (
        done.returncode == 1 and "\x1b" not in done.stdout and "control characters" in done.stdout
    )


def test_masks_and_mpp_of_the_user(tmp_path):
    image = section(1024, 1024)
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    for name, mpp in (("a", 0.25), ("b", 0.25), ("c", None)):
        write_slide(folder / f"{name}.svs", image, mpp=mpp)
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


# Finished is proven ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sound):
    """Three slides with shards, tiled: (data, what the folder holds)."""
    data = tmp_path_factory.mktemp("finished")
    put(data, sound, "a.svs", "b.svs")
    write_slide(data / "slides" / "mine" / "c.svs", section(600, 700, seed=1))
    write_slide(data / "slides" / "mine" / "blank.svs", np.full((600, 700, 3), 240, np.uint8))
    assert run(data, "--save-patches").returncode == 0
    return data, held(data / "tiles" / "mine")


def flip(data, rng):
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    return data


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def zero(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes(len(data[place : place + 512])) + data[place + 512 :]


FILES = "patches/{}_patches.h5", "shards/{}.tar", "thumbnails/{}.jpg", "geojson/{}.geojson"
HARMS = flip, cut, zero, "empty", "swap", "remove"
ROUNDS = int(os.environ.get("G2L_ROUNDS", 8))  # more of them for a night


def harm_file(path, other, harm, rng):
    """Whether it changed."""
    before = path.read_bytes()
    if harm == "remove":
        path.unlink()
        return True
    if harm == "swap":
        shutil.copy2(other, path.with_suffix(".other"))
        path.with_suffix(".other").rename(path)
    else:
        path.write_bytes(b"" if harm == "empty" else harm(bytearray(before), rng))
    return path.read_bytes() != before


@pytest.mark.parametrize("rounds", [1, pytest.param(ROUNDS, marks=pytest.mark.nightly)])
def test_harmed_files_are_named_and_made_again(finished, rounds):
    """The next run names them and equals an unbroken one."""
    data, whole = finished
    folder, rng = data / "tiles" / "mine", random.Random(rounds)
    for harm in HARMS * rounds:
        names = []
        for slide, other, kind in zip("abc", "bca", rng.sample(FILES, 3), strict=True):
            path = folder / kind.format(slide)
            if harm_file(path, folder / kind.format(other), harm, rng):
                names.append(str(path))
        done = run(data, "--save-patches", "--workers", 1)
        assert done.returncode == 0 and held(folder) == whole, (harm, names, done)
        assert all(name in done.stdout for name in names), (harm, names, done)
    index = PatchIndex(folder)
    assert all(index.read(int(start)).shape == (256, 256, 3) for start in index.starts)


@pytest.mark.parametrize("rounds", [1, pytest.param(ROUNDS, marks=pytest.mark.nightly)])
def test_a_harmed_slides_csv_is_made_again(finished, rounds):
    data, whole = finished
    table, rng = data / "tiles" / "mine" / "slides.csv", random.Random(rounds)
    for harm in (flip, cut, zero, "empty", "remove") * rounds:
        before = table.read_bytes()
        changed = harm_file(table, None, harm, rng)
        done = run(data, "--save-patches", "--workers", 1)
        if "in its first line" in done.stderr:  # no longer a table of ours: only a person can tell
            table.write_bytes(before)
            continue
        assert done.returncode == 0 and held(table.parent) == whole, (harm, done)
        if changed and harm == flip:  # lost rows leave nothing to name
            assert f"note: {table}" in done.stdout


def test_every_flipped_bit_in_an_h5_file_is_noticed(finished):
    data, _ = finished
    folder = data / "tiles" / "mine"
    path, rng = folder / "patches" / "a_patches.h5", random.Random(0)
    sound = path.read_bytes()
    settings = Settings(Limits(0.25, 256, 0, False, False, 0.5, 0.1, 3.5), jpeg_quality=90)
    job, row = Job(folder, settings, False, False), read_rows(folder)["a"]
    slide = CohortSlide("a", data / "slides" / "mine" / "a.svs")
    assert is_finished(slide, row, job)
    for _ in range(200):
        flipped = bytearray(sound)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert not is_finished(slide, row, job)
    path.write_bytes(sound)
    assert is_finished(slide, row, job)


@pytest.mark.parametrize("harm", [flip, cut])
def test_a_stale_contact_sheet_is_drawn_again(finished, harm, capsys):
    data, _ = finished
    sheet = data / "tiles" / "mine" / "contact.jpg"
    before = sheet.read_bytes()
    sheet.write_bytes(harm(bytearray(before), random.Random(0)))
    args = ["--cancer", "mine", "--data", str(data), "--save-patches"]
    assert tile.main(args) == 0 and sheet.read_bytes() == before
    assert "4 slides are finished, 0 to do" in capsys.readouterr().out
    old = time.time() - 1000
    os.utime(sheet, (old, old))
    assert tile.main(args) == 0 and sheet.stat().st_mtime > old


def test_damaged_rows_are_set_aside_and_done_anew(finished, capsys):
    data, whole = finished
    folder = data / "tiles" / "mine"
    table = folder / "slides.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].replace("done", "d\x00ne")
    table.write_text("\n".join([*lines, "gone,dome"]))  # the latter's slide is here no longer
    args = ["--cancer", "mine", "--data", str(data), "--save-patches", "--workers", "1"]
    assert tile.main(args) == 0 and held(folder) == whole
    output = capsys.readouterr().out
    assert (
        "line 3: status" in output
        and "line 6: 2 values" in output
        and "3 slides are finished, 1 to do" in output
    )
    assert (folder / "slides.csv.damaged").is_file()
    sound = table.read_bytes()
    table.write_bytes(sound.replace(b",settings,", b",sett,"))
    assert tile.main(args) == 0 and table.read_bytes() == sound
    assert "no column settings" in capsys.readouterr().out
    table.write_bytes(sound.replace(b",settings,", b","))
    assert tile.main(args) == 1
    assert "no column settings" in capsys.readouterr().err and table.is_file()
    table.write_bytes(sound)


def test_another_run_with_other_settings_is_noticed(finished, monkeypatch, capsys):
    data, _ = finished
    monkeypatch.setattr(Settings, "digest", lambda *_: "0")  # never what the rows say
    monkeypatch.setattr("tile.work_through", lambda *_: [])
    assert tile.main(["--cancer", "mine", "--data", str(data)]) == 1
    assert "otherwise meanwhile" in capsys.readouterr().err


# Processes ------------------------------------------------------------


def test_two_runs_at_once_share_the_work(tmp_path, sound):
    put(tmp_path, sound, *(f"s{n}.svs" for n in range(16)))
    runs = [
        subprocess.Popen(command(tmp_path, "--workers", 1), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0]
    assert all(
        output.splitlines()[-1].startswith("16 slides done, 0 skipped, 0 failed")
        for output in outputs
    )
    assert len(rows(tmp_path)) == 16 and len(tree(tmp_path / "tiles" / "mine")[1]) == 16


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kills"), [(0, 7), (1, 7)])
def test_killed_at_any_moment_it_goes_on(tmp_path, sound, seed, kills):
    names = [f"s{n}.svs" for n in range(12)]
    put(tmp_path / "whole", sound, *names)
    put(tmp_path / "killed", sound, *names)
    assert run(tmp_path / "whole", "--save-patches").returncode == 0
    rng = random.Random(seed)
    finished = []
    for _ in range(kills):
        process = subprocess.Popen(
            command(tmp_path / "killed", "--save-patches", "--workers", 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.time() + 60
        enough = len(names) * len(finished) // (kills + 1)
        while len(rows(tmp_path / "killed")) <= enough and process.poll() is None:
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
    whole, killed = (tmp_path / name / "tiles" / "mine" for name in ("whole", "killed"))
    assert tree(whole) == tree(killed)
    for shard in whole.glob("shards/*"):
        assert shard.stat().st_size == (killed / "shards" / shard.name).stat().st_size
    assert not list(killed.glob("*/.*.tmp*")) and not list(killed.glob(".slides*.tmp*"))


def test_leftovers_are_cleared_by_exact_name(tmp_path, sound):
    """B must not clear what another process is writing for B1 or B_2."""
    put(tmp_path, sound, "B.svs")
    folder = tmp_path / "tiles" / "mine" / "patches"
    folder.mkdir(parents=True)
    names = ".B_patches.12.0a1b2c.tmp.h5", ".B1_patches.12.0a1b2c.tmp.h5"
    others = [*names[1:], ".B_2_patches.12.0a1b2c.tmp.h5", ".B_patches.1_patches.1.0a1b2c.tmp.h5"]
    for name in (names[0], *others):
        (folder / name).touch()
    assert run(tmp_path).returncode == 0
    assert sorted(path.name for path in folder.glob(".*")) == sorted(others)


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


def test_a_worker_whose_parent_dies_ends_in_silence(capfd):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_serve, args=(theirs, [ours], lambda item, tell: tell(item)))
    process.start()
    theirs.close()
    ours.send(1)
    assert ours.poll(20)
    time.sleep(0.2)  # it waits for another item
    ours.close()
    process.join(20)
    assert process.exitcode == 0 and not capfd.readouterr().err


def test_ranks_share_the_slides(tmp_path, sound):
    folder = put(tmp_path, sound, *(f"s{n}.svs" for n in range(5)))
    (folder / "bad.svs").write_text("no slide")
    runs = []
    for rank in "012":  # as torchrun would start them, without its seconds
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        line = command(tmp_path, "--workers", 1)
        runs.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=env))
    outputs = [process.communicate(timeout=120)[0] for process in runs]
    table = rows(tmp_path)
    assert (
        sum(row["status"] == "done" for row in table.values()) == 5
        and table["bad"]["status"] == "failed"
    )
    assert [process.returncode for process in runs] == [1, 0, 0] and outputs[1:] == ["", ""]
    assert "5 slides done, 0 skipped, 1 failed" in outputs[0]


def test_a_slide_that_crashes_its_reader_is_recorded(tmp_path, sound, monkeypatch, capsys):
    put(tmp_path, sound, "a.svs", "b.svs", "c.svs")
    whole = tile_slide

    def crash(slide, **options):
        if slide.name == "b":
            faulthandler.disable()  # pytest's, whose report would look like a real one's
            os.kill(os.getpid(), signal.SIGSEGV)
        return whole(slide, **options)

    monkeypatch.setattr("g2l.tiling.tile_slide", crash)
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

    done = start(tmp_path, "--workers", 2, preexec_fn=little_room)
    assert done.returncode == 1 and "make room and run the same command again" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    after = tree(tmp_path / "tiles" / "mine")[1]
    assert all(after[name] == coords for name, coords in before.items())
    assert run(tmp_path).returncode == 0 and len(tree(tmp_path / "tiles" / "mine")[1]) == 4


# Real slides ------------------------------------------------------------


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
    """From start to exit for one slide: about 1 s of CPU on a quiet machine; torch alone would add
    2.
    """
    put(tmp_path, sound, "a.svs")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert start(tmp_path, "--workers", 1).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5
    with open(tmp_path / "tiles" / "mine" / "slides.csv") as file:
        assert next(csv.DictReader(file))["status"] == "done"
    shutil.rmtree(tmp_path / "tiles")

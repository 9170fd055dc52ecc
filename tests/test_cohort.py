"""Which slides, whose, which of them: folders, names, manifests, patients, slides.csv."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cohorts import put, rows, run
from conftest import ROOT, SHARED
from synthetic import section, write_slide

import tile
from g2l.cohort import (
    CohortSlide,
    local_slides,
    name_slides,
    patient_of,
    read_manifest,
    read_patients,
    select,
)
from g2l.errors import UserError
from g2l.patches import PatchIndex
from g2l.rows import read_rows, write_rows
from g2l.slides import slide_name


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A slide of six patches, smaller than that of other tests: which it is matters here."""
    path = write_slide(tmp_path_factory.mktemp("sound") / "a.svs", section(600, 700), levels=())
    return path.read_bytes()


def tcga(number, kind="DX1"):
    return CohortSlide(
        f"TCGA-A{number % 7}-{number:04d}-01{'Z' if kind == 'DX1' else 'A'}-00-{kind}.UUID",
        Path("x"),
    )


def choose(sources, exclude=None, **options):
    return select(sources, read_patients(exclude, sources) if exclude else set(), **options)


def test_sample_is_seeded_and_stable():
    sources = [tcga(n) for n in range(100)]
    chosen = [source.name for source in choose(sources, limit=30)[0]]
    assert len(chosen) == 30 and chosen == [s.name for s in choose(sources[::-1], limit=30)[0]]
    assert chosen != [s.name for s in choose(sources, limit=30, seed=1)[0]]
    fewer = [source.name for source in choose(sources[:-1], limit=30)[0]]
    assert len(set(chosen) & set(fewer)) >= 29, (
        "one slide less does not change the rest of the sample"
    )


def test_strategy_takes_diagnostic_slides_first():
    sources = [tcga(n) for n in range(10)] + [tcga(n, "TS1") for n in range(10)]
    assert (
        len(choose(sources, strategy="diagnostic")[0])
        == len(choose(sources, strategy="tissue")[0])
        == 10
    )
    both = choose(sources, limit=13)[0]
    assert sum("DX1" in source.name for source in both) == 10


def test_exclusion_is_by_patient(tmp_path):
    sources = [tcga(n, kind) for n in range(20) for kind in ("DX1", "TS1")]
    (tmp_path / "a.csv").write_text(f"slide_id,patient,label\n{sources[4].name},TCGA-XX-0000,MUT\n")
    (tmp_path / "b.txt").write_text("TCGA-A3-0003\n")
    for name, patient in (("a.csv", "TCGA-A2-0002"), ("b.txt", "TCGA-A3-0003")):
        chosen, reasons = choose(sources, exclude=tmp_path / name)
        assert len(chosen) == 38 and not [s for s in chosen if s.name.startswith(patient)]
        assert sum("held out" in str(reason) for reason in reasons.values()) == 2
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


@pytest.mark.skipif(SHARED is None, reason="needs the shared tables")
def test_real_manifest_and_benchmark_table():
    listed = read_manifest(SHARED / "tables" / "gdc_manifest.tcga-brca-diagnostic.txt")
    sources = [CohortSlide(slide_name(row.path), row.path) for row in listed]
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


# Links, copies, folders ----------------------------------------------------------------------


def names_of(folder, manifest=None):
    slides, notes = local_slides(folder, manifest)
    return [slide.name for slide in slides], notes


def test_slides_behind_linked_folders_are_found(tmp_path, sound):
    folder = put(tmp_path, sound, "a.svs")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "b.svs").write_bytes(sound)
    (folder / "more").symlink_to(tmp_path / "archive")
    (folder / "again").symlink_to(folder)  # a circle
    assert names_of(folder) == (["a", "b"], [])


def test_a_folder_that_cannot_be_read_is_told(tmp_path, sound, monkeypatch, capsys):
    folder = put(tmp_path, sound, "a.svs", "locked/b.svs")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):  # root may read everything, so that modes do not help
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert names_of(folder)[0] == ["a"]
    assert f"{folder / 'locked'}: left out, cannot be read" in capsys.readouterr().err


def test_a_link_is_taken_once_and_a_copy_stays_with_its_twin(tmp_path, sound):
    folder = put(tmp_path, sound, "all/case1.svs", "train/case2.svs", "z/other3.svs")
    (folder / "train" / "case1.svs").symlink_to("../all/case1.svs")
    shutil.copy(folder / "all" / "case1.svs", folder / "train" / "copy9.svs")
    slides, notes = local_slides(folder)
    assert [slide.name for slide in slides] == ["case1", "case2", "copy9", "other3"]
    assert [slide.patient for slide in slides] == ["case1", "case2", "case1", "other3"]
    assert len(notes) == 2 and "train/case1.svs: a link to" in notes[0]
    assert "copy9.svs: a copy of" in notes[1] and "case1.svs" in notes[1]
    for patient in ("case1", "copy9"):  # held out by either name
        assert [slide.name for slide in select(slides, {patient})[0]] == ["case2", "other3"]


def test_mirax_slides_of_one_preview_are_told_apart_by_their_data(tmp_path):
    for name, pixels in (("P1", b"one"), ("P2", b"two"), ("P3", b"one")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.mrxs").write_bytes(b"the same preview")
        for number in range(2):
            (tmp_path / name / f"Data{number:04d}.dat").write_bytes(pixels * (1 + number))
    slides, notes = local_slides(tmp_path)
    patients = [slide.patients for slide in slides]
    assert patients == [{"P1", "P3"}, {"P2"}, {"P1", "P3"}]
    (note,) = notes
    assert "P3.mrxs: a copy of" in note and "P1.mrxs" in note


def test_lost_slides_of_one_size_in_a_manifest_are_no_copies(tmp_path, sound):
    folder = put(tmp_path, sound, "a.svs")
    for name in "bc":
        (folder / f"{name}.svs").symlink_to(f"/nowhere/{name}")
    (tmp_path / "list.csv").write_text("slide,size\na,9\nb,9\nc,9\n")
    slides, notes = local_slides(folder, tmp_path / "list.csv")
    assert [slide.patient for slide in slides] == ["a", "b", "c"] and not notes


def test_a_link_that_was_tiled_before_leaves_the_index(tmp_path, sound):
    folder = put(tmp_path, sound, "case1.svs")
    (folder / "train").mkdir()
    (folder / "train" / "case1.svs").symlink_to("../case1.svs")
    link = done_row("train_case1", path=str(folder / "train" / "case1.svs"))
    write_rows(tmp_path / "tiles" / "mine", [link])
    assert run(tmp_path).returncode == 0
    assert PatchIndex(tmp_path / "tiles" / "mine").slides == ["case1"]
    assert rows(tmp_path)["train_case1"]["reason"] == "is case1 now"


def test_a_pipe_is_no_slide(tmp_path, sound):
    folder = put(tmp_path, sound, "a.svs")
    os.mkfifo(folder / "pipe.svs")
    assert names_of(folder)[0] == ["a"]


def test_slides_taken_away_are_named(tmp_path, sound):
    folder = put(tmp_path, sound, "keep_1.svs", "bad_2.svs", "bad_3.svs")
    assert run(tmp_path).returncode == 0
    (tmp_path / "one.csv").write_text("slide\nkeep_1\n")
    (folder / "bad_3.svs").unlink()
    for args in (["--manifest", tmp_path / "one.csv"], []):
        done = run(tmp_path, *args)
        assert done.returncode == 0 and "bad_3; --exclude takes them out" in done.stdout
        assert ("bad_2" in done.stdout) == bool(args)
    (tmp_path / "held.txt").write_text("bad_3\n")
    assert "bad_3" not in run(tmp_path, "--exclude", tmp_path / "held.txt").stdout
    assert rows(tmp_path)["bad_3"]["status"] == "skipped"


def test_two_settings_in_one_folder_are_refused(tmp_path, sound):
    put(tmp_path, sound, "a.svs", "b.svs")
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"slide\n{name}\n")
    assert run(tmp_path, "--manifest", tmp_path / "a.csv").returncode == 0
    other = run(tmp_path, "--manifest", tmp_path / "b.csv", "--patch-size", 128)
    assert other.returncode == 1 and "a of an earlier run has patches of 256 px" in other.stderr
    assert "--cancer" in other.stderr and "b" not in rows(tmp_path)
    assert run(tmp_path, "--patch-size", 128).returncode == 0, "all of them alike is no mixture"


# Tables as spreadsheets save them ------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"slide;mpp\nS1;0.25\nS2;0,5\n",
        "slide\tmpp\nS1\t0.25\nS2\t0.5\n".encode("utf-16"),
        "\ufeffslide,mpp\r\nS1,0.25\r\nS2,0.5\r\n".encode(),
        b"id\tfilename\tmd5\tsize\tmpp\n1\tS1\tx\t9\t0.25\n2\tS2\ty\t9\t0.5\n",
    ],
    ids=["semicolons", "utf-16", "mark", "gdc"],
)
def test_manifests_as_spreadsheets_save_them(tmp_path, data):
    (tmp_path / "list.csv").write_bytes(data)
    listed = read_manifest(tmp_path / "list.csv")
    assert [(row.name, row.mpp) for row in listed] == [("S1", 0.25), ("S2", 0.5)]


def done_row(name="S1", **changes):
    values = {"status": "done", "patient": "P", "patches": 16, "size0": 256, "patch_size": 256}
    return {"slide": name, **values, "mpp": 0.25, "target_mpp": 0.25, "path": "/s.svs"} | changes


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_slides_csv_as_spreadsheets_save_it(tmp_path, mark, encoding):
    write_rows(tmp_path, [done_row("Größe_3"), done_row("S2")])
    before = read_rows(tmp_path)
    table = tmp_path / "slides.csv"
    text = table.read_text(encoding="utf-8").replace(",", mark).replace("\n", "\r\n")
    table.write_text(text + "\r\n", encoding=encoding, newline="")
    assert read_rows(tmp_path) == before and list(before) == ["Größe_3", "S2"]
    write_rows(tmp_path, [done_row("S3")])
    assert list(read_rows(tmp_path)) == ["Größe_3", "S2", "S3"]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (",settings,bytes,path", "", "no column settings, bytes, path"),
        ("done", "dome", "line 2: damaged (status 'dome')"),
        (",0.25,", ',"0,25",', "line 2: damaged (mpp '0,25')"),
        (",16,", ",1b,", "line 2: damaged (patches '1b')"),
        ("/s.svs", "/s.svs,more", "line 2: damaged (26 values)"),
    ],
)
def test_a_damaged_slides_csv_is_refused_in_words(tmp_path, old, new, text):
    write_rows(tmp_path, [done_row()])
    table = tmp_path / "slides.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=re.escape(text)):
        PatchIndex(tmp_path)


def test_no_flipped_bit_in_slides_csv_gives_a_traceback(tmp_path):
    write_rows(tmp_path, [done_row(f"S{n}") for n in range(4)])
    table, rng = tmp_path / "slides.csv", random.Random(0)
    sound = table.read_bytes()
    for _ in range(500):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        table.write_bytes(data)
        with contextlib.suppress(UserError):
            assert len(read_rows(tmp_path, [])) >= 2
        with contextlib.suppress(UserError):
            PatchIndex(tmp_path)


def test_text_from_outside_stays_text(tmp_path):
    names = ["=1+1", "-2", "'quoted", "@x", "plain, with comma", '"', "a;b"]
    write_rows(tmp_path, [done_row(name, reason="one\ntwo \x1b[31m") for name in names])
    text = (tmp_path / "slides.csv").read_text()
    assert "\x1b" not in text and len(text.splitlines()) == len(names) + 1
    assert "\n'=1+1," in text and "\n=" not in text
    assert sorted(read_rows(tmp_path)) == sorted(names)


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="colour"):
        write_rows(tmp_path, [{"slide": "a", "colour": "red"}])


# Names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-A8-A06N-01Z-00-DX1.62649098-BD0B.svs", "TCGA-A8-A06N"),
        ("tcga-a8-a06n-01", "TCGA-A8-A06N"),
        ("arden-01_1.svs", "arden-01"),
        ("slide.ome.tif", "slide"),
        ("x/y/patient3_slide2_b.ndpi", "patient3"),
        ("P1_a.svs", "P1"),
        ("case_001.svs", "case_001"),
        ("case_001_HE.svs", "case_001"),
        ("BRACS_264.svs", "BRACS_264"),
        ("patient_004_node_1.tif", "patient_004"),
        ("HE_left.svs", "HE_left"),
        ("_7_b.svs", "_7"),
        ("_odd.svs", "_odd"),
        ("TCGA-A8.svs", "TCGA-A8"),
        ("d290-uuid_TCGA-A8-A06N-01Z-00-DX1.62", "TCGA-A8-A06N"),
    ],
)
def test_patient_of(name, patient):
    assert patient_of(name) == patient


def test_slides_that_share_a_name_keep_apart():
    paths = [
        Path("s/p1/slide.svs"),
        Path("s/p2/slide.svs"),
        Path("s/other.svs"),
        Path("s/other.tif"),
    ]
    names = name_slides(paths)
    assert len(names) == 4 and set(names.values()) == set(paths) and names["p1_slide"] == paths[0]


def test_import_is_light():
    code = (
        "import sys, tile; print([m for m in ('torch', 'timm', 'sklearn', 'scipy', 'matplotlib', "
        "'pandas', 'h5py', 'tifffile', 'openslide', 'urllib.request') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )

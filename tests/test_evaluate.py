"""evaluate.py as a user runs it: images and labels in, tables and pictures out, or an error."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jobs
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from jobs import Forked, main_of, run_ranks
from PIL import Image
from safetensors import torch as torch_safetensors
from safetensors.numpy import load_file

import evaluate
import g2l.evaluation
import g2l.features
import g2l.report
from g2l.benchmarks import load_folder
from g2l.errors import UserError
from g2l.features import card, loaded_model, models_at_hand
from g2l.files import atomic
from g2l.images import ImageFiles, Rows
from g2l.models import load_model, save_student
from g2l.registry import REGISTRY
from g2l.report import verdict
from g2l.results import claim, read_metrics

ONE, TWO = "timm:resnet10t", "timm:mobilenetv3_small_050"
FAST = ["--input-size", "32", "--k", "5", "--seeds", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """The chance level of one draw: test_protocols.py sees to what it is of several."""
    monkeypatch.setattr("g2l.evaluation.BLIND_DRAWS", 1)


@pytest.fixture
def folder(tmp_path):
    """36 images of three classes (stripes of different width), 12 patients, 2 centres."""
    rng, rows = np.random.default_rng(0), ["image,label,group,center"]
    (tmp_path / "mine").mkdir()
    for i in range(36):
        c, patient = i % 3, i // 3
        stripes = (np.arange(40) // (2 + 3 * c) % 2 * 90)[:, None, None] + np.array(
            [90, 60 + 30 * c, 120]
        )
        image = np.broadcast_to(stripes, (40, 40, 3)) + rng.normal(0, 12, (40, 40, 3)) + 3 * patient
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
            tmp_path / "mine" / f"{i:02d}.png"
        )
        rows.append(f"{i:02d}.png,{'abc'[c]},p{patient},{'xy'[patient % 2]}")
    (tmp_path / "mine" / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "mine"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights of ONE as a file: fast to load, and there is a file to change."""
    path = tmp_path_factory.mktemp("weights") / "one.safetensors"
    torch_safetensors.save_file(load_model(ONE, "random").net.state_dict(), path)
    return path


def go(folder, *more, names=(ONE,), w="random"):
    args = [
        "--models",
        *names,
        "--benchmark",
        str(folder),
        "--results",
        str(folder.parent / "results"),
        *FAST,
    ]
    return evaluate.main([*args, "--weights", *[f"{n}={w}" for n in names], *map(str, more)])


def rows(folder, **want):
    return [
        r
        for r in read_metrics(folder.parent / "results")
        if all(r.get(k) == v for k, v in want.items())
    ]


@pytest.mark.slow
def test_whole_run_makes_tables_pictures_and_report_and_a_second_loads_no_model(
    folder, capsys, monkeypatch
):
    student = folder.parent / "runs" / "try" / "student"
    save_student(
        load_model(TWO, "random"),
        student,
        metadata={
            "teacher": ONE,
            "student": TWO,
            "cancer": "x",
            "run": "try",
            "patients": ["p3", "q9"],
        },
    )
    args = [
        "--models",
        ONE,
        TWO,
        str(student),
        "--weights",
        f"{ONE}=random",
        f"{TWO}=random",
        "--teacher",
        ONE,
        "--baseline",
        TWO,
        "--benchmark",
        str(folder),
        "--results",
        str(folder.parent / "results"),
        *FAST,
    ]
    assert evaluate.main([*args, "--paper-splits"]) == 0
    out, results = capsys.readouterr().out, folder.parent / "results"
    for text in (
        "33 images, 3 classes, 11 groups",
        "CKA to teacher",
        "majority class",
        "against",
        "try was distilled on 1",
    ):
        assert text in out
    for name in (
        "table1.md",
        "table2.md",
        "figure1.png",
        "report.md",
        "pictures/confusion-mine.png",
        "pictures/cka-mine.png",
        "pictures/gallery-mine-try.png",
        "pictures/gallery-mine-timm_resnet10t.png",
    ):
        assert (results / name).stat().st_size > 300, name
    report = (results / "report.md").read_text()
    for text in (
        "Table 1: CKA to timm:resnet10t",
        "Paired differences",
        "ungrouped",
        "distilled from timm:resnet10t",
        "left out for all models",
        "before distillation",
    ):
        assert text in report
    for link in [part.split(")")[0] for part in report.split("](")[1:]]:
        assert (results / link).is_file(), link
    assert len(rows(folder, model="try", protocol="knn", metric="accuracy")) == 10
    assert len(rows(folder, model="try", protocol="probe", metric="auc")) == 2
    assert {r["other"] for r in rows(folder, model="try", protocol="paired")} == {ONE, TWO}
    assert (
        len({r["ms_per_image"] for r in rows(folder, protocol="model") if r["model"] != ONE}) == 1
    )
    twin = rows(folder, model="try", other=TWO, protocol="cka", metric="unbiased")
    assert twin[0]["value"] == pytest.approx(
        1, abs=1e-4
    )  # the "student" is the baseline under another name
    verdicts = {
        r["metric"]: verdict(r) for r in rows(folder, model="try", other=TWO, protocol="paired")
    }
    assert verdicts == {
        "cka": "within noise",
        "knn": "within noise",
        "probe": "too few groups to tell",
    }

    before = {p: p.stat().st_mtime_ns for p in (results / "pictures").iterdir()}
    monkeypatch.setattr(
        "g2l.models.load_model", lambda *a, **k: pytest.fail("a model was loaded again")
    )
    monkeypatch.setattr("g2l.evaluation.predict", lambda *a, **k: pytest.fail("measured again"))
    loaded_model.cache_clear()
    assert evaluate.main([*args, "--paper-splits", "--json"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (results / "pictures").iterdir()} == before
    assert len(json.loads(capsys.readouterr().out)) > 50


def test_one_network_has_one_speed(folder, monkeypatch):
    """A student before and after distillation is one network: timed twice, noise parts them."""
    student, results, clock = (
        folder.parent / "student",
        folder.parent / "results",
        iter(range(1, 99)),
    )
    save_student(load_model(TWO, "random"), student, metadata={})
    monkeypatch.setattr("g2l.features.milliseconds", lambda model: next(clock))
    speed = lambda name, **options: card(str(name), results, **options)["ms_per_image"]  # noqa: E731
    assert speed(TWO, weights="random") == speed(student) == 1
    assert speed(student, input_size=64) == speed(TWO, weights="random", input_size=64) == 2
    assert speed(student, dtype=torch.bfloat16) == 3
    assert speed(ONE, weights="random") == 4


def test_leaked_patients_can_be_kept_and_are_then_marked(folder):
    student = folder.parent / "runs" / "try" / "student"
    save_student(
        load_model(ONE, "random"),
        student,
        metadata={
            "teacher": "h-optimus-0",
            "student": "hibou-l",
            "run": "try",
            "patients": [f"p{i}" for i in range(12)],
        },
    )
    args = [
        "--models",
        str(student),
        "--benchmark",
        str(folder),
        "--results",
        str(folder.parent / "results"),
        *FAST,
        "--no-pictures",
    ]
    assert evaluate.main(args) == 1  # every patient was seen: nothing is left
    assert evaluate.main([*args, "--leaks", "mark"]) == 0
    assert "⚠" in (folder.parent / "results" / "table2.md").read_text()
    assert rows(folder, protocol="data")[0]["value"] == 36


@pytest.mark.slow
def test_changed_image_and_changed_weights_are_noticed_and_labels_cost_no_features(
    folder, weights, capsys
):
    quick = ("--no-pictures",)
    assert go(folder, *quick, w=weights) == 0
    path = folder.parent / "results" / "features" / "timm_resnet10t" / "mine.safetensors"
    first, made = load_file(path)["features"], path.stat().st_mtime_ns
    table = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(table.replace("00.png,a,", "00.png,b,"))
    accuracy = [r["value"] for r in rows(folder, metric="accuracy")]
    assert go(folder, *quick, w=weights) == 0
    assert (
        path.stat().st_mtime_ns == made
        and [r["value"] for r in rows(folder, metric="accuracy")] != accuracy
    )
    Image.new("RGB", (40, 40), "green").save(folder / "05.png")
    assert go(folder, *quick, w=weights) == 0
    second = load_file(path)["features"]
    assert not np.allclose(first[5], second[5])
    assert np.allclose(np.delete(first, 5, 0), np.delete(second, 5, 0), atol=1e-4)
    changed = weights.with_name("changed.safetensors")
    torch_safetensors.save_file(
        {
            k: v * 1.1 if v.is_floating_point() else v
            for k, v in torch_safetensors.load_file(weights).items()
        },
        changed,
    )
    assert go(folder, *quick, w=changed) == 0
    assert not np.allclose(load_file(path)["features"], second, atol=1e-3)
    assert not list(path.parent.glob("*.part"))


def figures(folder):
    """Table 2 as it stands, without the paired differences."""
    return (folder.parent / "results" / "table2.md").read_text().split("## Paired")[0]


@pytest.mark.slow
def test_corrected_labels_leave_no_figure_of_the_old_and_lost_rows_are_measured_anew(
    folder, weights
):
    assert go(folder, "--no-pictures", w=weights) == 0
    metrics = folder.parent / "results" / "metrics.jsonl"
    first, lines = figures(folder), metrics.read_text().splitlines()
    metrics.write_text("\n".join(r for r in lines if '"auc"' not in r) + "\n")
    assert go(folder, "--no-pictures", w=weights) == 0 and figures(folder) == first
    metrics.unlink()
    assert go(folder, "--no-pictures", w=weights) == 0 and figures(folder) == first
    table, rng = (folder / "labels.csv").read_text().splitlines(), np.random.default_rng(1)
    for i in range(1, len(table)):  # four patients, too few for the probe, and labels by lot
        image = table[i].split(",")[0]
        table[i] = f"{image},{'abc'[rng.integers(3)]},q{i % 4},x"
    (folder / "labels.csv").write_text("\n".join(table) + "\n")
    assert go(folder, "--no-pictures", w=weights) == 0
    kept = rows(folder, model=ONE, protocol="probe")
    assert len(kept) == 4 and all(row["value"] is None for row in kept)
    probe = [line for line in figures(folder).splitlines() if line.startswith("| mine")][2:]
    assert all(line.endswith("| – | – (0 of 2 splits) |") for line in probe)


def test_a_name_stands_for_one_model_and_one_benchmark(tmp_path):
    one, two = tmp_path / "a" / "mine", tmp_path / "b" / "mine"
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    claim(tmp_path, {"benchmark mine": str(one), "model uni": "uni"})
    claim(tmp_path, {"benchmark mine": str(one)})
    with pytest.raises(UserError, match=r"holds the benchmark mine of .*a/mine, not .*b/mine"):
        claim(tmp_path, {"benchmark mine": str(two)})
    with pytest.raises(UserError, match="holds the model uni of uni, not"):
        claim(tmp_path, {"model uni": str(two)})
    one.rmdir()  # moved, perhaps
    claim(tmp_path, {"benchmark mine": str(two)})


def test_a_model_that_gives_every_image_one_embedding_is_told_and_passed_over(
    folder, weights, capsys, monkeypatch
):
    original = g2l.features.features

    def features(name, *args, **options):
        x = original(name, *args, **options)
        return np.full_like(x, 0.5) if name == TWO else x

    monkeypatch.setattr("g2l.features.features", features)
    assert go(folder, "--no-pictures", "--teacher", TWO, names=(ONE, TWO)) == 1
    captured = capsys.readouterr()
    assert f"{TWO} on mine: every image has the same embedding" in captured.err
    assert "mine: 36 images" in captured.out


@pytest.mark.slow
def test_features_do_not_depend_on_batch_size_workers_or_ranks(folder, weights):
    b = load_folder(folder)
    one = {
        w: g2l.features.features(
            ONE,
            b,
            folder.parent / w,
            weights=str(weights),
            input_size=32,
            device="cpu",
            dtype=torch.float32,
            batch_size=n,
            workers=k,
        )
        for w, n, k in [("a", 36, 0), ("b", 5, 2)]
    }
    assert np.allclose(one["a"], one["b"], atol=1e-4 * np.abs(one["a"]).max())
    two = main_of(
        "evaluate.py",
        "--models",
        ONE,
        "--weights",
        weights,
        "--benchmark",
        folder,
        "--results",
        folder.parent / "c",
        "--no-pictures",
        *FAST,
    )
    ranks = run_ranks(two)
    assert [done.returncode for done in ranks] == [0, 0], ranks
    # rank 0 alone reports
    assert ["tables, pictures" in done.stdout for done in ranks] == [True, False]
    both = load_file(folder.parent / "c" / "features" / "timm_resnet10t" / "mine.safetensors")[
        "features"
    ]
    assert np.allclose(one["a"], both, atol=1e-4 * np.abs(one["a"]).max())


def test_a_rank_leaves_the_job_when_it_is_done(folder, one_rank):
    assert go(folder, "--no-pictures") == 0


def test_unreadable_images_are_named_counted_and_too_many_stop(folder, capsys):
    (folder / "07.png").write_bytes(b"not an image")
    (folder / "08.png").unlink()
    assert go(folder, "--no-pictures") == 1
    err = capsys.readouterr().err
    assert "2 of 36 images cannot be read, first 07.png" in err and "--max-unreadable" in err
    assert go(folder, "--no-pictures", "--max-unreadable", 0.1) == 1, (
        "what failed shows in the exit status"
    )
    captured = capsys.readouterr()
    assert (
        "07.png" in captured.err
        and "08.png" in captured.err
        and "2 unreadable images left out" in captured.out
    )
    assert rows(folder, protocol="data")[0]["value"] == 34


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("image,label", "file,label"), "no column image"),
        (lambda t: t.replace("07.png,b,p2", "07.png,,p2"), "line 9: label is empty"),
        (
            lambda t: t.replace("07.png", "06.png"),
            "1 images are listed more than once, first 06.png",
        ),
        (
            lambda t: t.replace("07.png", "./06.png"),
            "1 images are listed more than once, first 06.png",
        ),
        (lambda t: t.replace(",b,", ",drüse,").encode("latin-1"), "save it as"),
        (lambda t: t.splitlines()[0] + "\n", "no rows"),
        (lambda t: t.replace(".png", ".gif"), "none of its 36 images exists"),
        (lambda t: t.replace(",b,", ",a,").replace(",c,", ",a,"), "all 36 images are of class a"),
        (
            lambda t: "".join(
                f"{line.rsplit(',', 2)[0]},same,x\n" if i else line + "\n"
                for i, line in enumerate(t.splitlines())
            ),
            "two patients",
        ),
    ],
)
def test_a_wrong_table_is_named_with_the_remedy(folder, capsys, change, message):
    table = folder / "labels.csv"
    changed = change(table.read_text())
    table.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert go(folder, "--no-pictures") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") or "\nerror: " in err
    assert message in err and "Traceback" not in err


def test_images_without_labels_are_told_and_left_out(folder, capsys):
    Image.new("RGB", (40, 40)).save(folder / "extra.png")
    assert len(load_folder(folder)) == 36
    assert "1 images have no line in labels.csv" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"labels.csv: not found .*no such folder"):
        load_folder(folder / "nowhere")


def test_blanks_and_windows_line_ends_make_no_classes_of_their_own(folder):
    text = (
        (folder / "labels.csv")
        .read_text()
        .replace(",b,", ", b,")
        .replace("label,group", "label, group")
    )
    (folder / "labels.csv").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    b = load_folder(folder)
    assert b.classes == ["a", "b", "c"] and len(b) == 36 and b.centers[:4] == ["x", "x", "x", "y"]


def test_images_of_other_kinds_are_read_as_seen_or_refused(tmp_path):
    """Transparent parts are white, as a slide's background is; 16 bits once came out white."""
    pixels = np.full((8, 8, 3), 120, np.uint8)
    hole = np.dstack([pixels, np.repeat([[0] * 4 + [255] * 4], 8, 0)]).astype(np.uint8)
    for name, image in {
        "rgba.png": Image.fromarray(hole),
        "grey.png": Image.fromarray(pixels[..., 0]),
        "cmyk.jpg": Image.fromarray(pixels).convert("CMYK"),
        "palette.png": Image.fromarray(pixels).quantize(),
        "deep.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    }.items():
        image.save(tmp_path / name)
    read = lambda name: ImageFiles([tmp_path / name])[0]  # noqa: E731
    assert read("rgba.png")[0].tolist() == [[255] * 3] * 4 + [[120] * 3] * 4
    assert all(
        np.abs(read(n).astype(int) - 120).max() < 4 for n in ("grey.png", "cmyk.jpg", "palette.png")
    )
    with pytest.raises(OSError, match="more than 8 bits"):
        read("deep.png")


def test_an_image_too_large_to_be_one_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    with pytest.raises(OSError, match=r"bomb\.png"):
        ImageFiles([tmp_path / "bomb.png"])[0]


@pytest.mark.slow
def test_damaged_results_are_made_again_or_named(folder, weights, capsys):
    assert go(folder, "--no-pictures", w=weights) == 0
    results = folder.parent / "results"
    before = (results / "table2.md").read_text()
    for path in [
        *results.rglob("*.safetensors"),
        *results.rglob("*.npz"),
        *results.rglob("model.json"),
    ]:
        path.write_bytes(b"{junk")
    assert (
        go(folder, "--no-pictures", w=weights) == 0
        and (results / "table2.md").read_text() == before
    )
    assert "damaged" in capsys.readouterr().err
    lines = (results / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (results / "metrics.jsonl").write_text("\n".join(lines))
    assert go(folder, "--no-pictures", w=weights) == 0
    assert (results / "table2.md").read_text() == before
    assert "metrics.jsonl: damaged in line 4; measured again" in capsys.readouterr().err
    assert (results / "metrics.damaged").read_text() == "\n".join(lines)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("time.sleep(60)", "the 1 loading processes gave nothing for 2 s; is the storage"),
        ("os.kill(os.getpid(), 9)", "a loading process was killed"),
        ("raise OSError(24, 'Too many open files')", "images cannot be loaded (OSError: [Errno 24"),
    ],
    ids=["stuck", "killed", "no handles"],
)
def test_a_loader_that_fails_ends_the_run_with_words(folder, capsys, monkeypatch, fault, message):
    code = compile(fault, "fault", "exec")
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda *_: exec(code, {"os": os, "time": time}))
    monkeypatch.setattr("g2l.ranks.WAIT", 2)
    assert go(folder, "--no-pictures", "--workers", 1) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "--workers" in last


def test_names_from_outside_stay_text(folder, weights, capsys):
    table = (folder / "labels.csv").read_text()
    strange = "<b>a|b</b> *x* \x1b[31m"
    (folder / "labels.csv").write_text(table.replace(",a,", f",{strange},"))
    Image.new("RGB", (8, 8)).save(folder / "absent.png")
    assert go(folder, "--no-pictures", w=weights) == 0
    report = (folder.parent / "results" / "report.md").read_text()
    assert "\\<b>a\\|b\\</b> \\*x\\* \ufffd[31m" in report and "\x1b" not in report
    assert "\x1b" not in "".join(capsys.readouterr())


def test_results_that_cannot_be_written_are_an_error_without_a_traceback(folder, capsys):
    (folder.parent / "results").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        go(folder, "--no-pictures")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "is a file; give its folder" in last


@pytest.mark.slow
def test_report_links_nothing_that_is_not_there(folder, weights):
    """A model that fails on one of two benchmarks has no gallery there; Figure 1 leaves it out."""
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    original = g2l.features.features

    def features(name, benchmark, *args, **options):
        if (name, benchmark.name) == (TWO, "other"):
            raise UserError("not today")
        return original(name, benchmark, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("g2l.features.features", features)
        assert (
            evaluate.main(
                [
                    "--models",
                    TWO,
                    ONE,
                    "--weights",
                    f"{TWO}=random",
                    f"{ONE}={weights}",
                    "--benchmark",
                    str(folder),
                    str(other),
                    "--results",
                    str(folder.parent / "results"),
                    *FAST,
                ]
            )
            == 1
        )
    report = (folder.parent / "results" / "report.md").read_text()
    links = [part.split(")")[0] for part in report.split("](")[1:]]
    assert len(links) == 7 and all((folder.parent / "results" / link).is_file() for link in links)
    table = (folder.parent / "results" / "table2.md").read_text()
    assert "| 0.333 | – |" in next(line for line in table.splitlines() if "| other |" in line), (
        "the commonest class is told all the same"
    )


def test_features_that_are_not_a_number_name_the_model(folder, weights, capsys):
    broken = weights.with_name("broken.safetensors")
    torch_safetensors.save_file(
        {
            k: v * float("nan") if v.is_floating_point() else v
            for k, v in torch_safetensors.load_file(weights).items()
        },
        broken,
    )
    assert go(folder, "--no-pictures", w=broken) == 1
    assert "timm:resnet10t: 36 of 36 embeddings on mine are NaN" in capsys.readouterr().err


def test_one_bad_model_or_benchmark_does_not_stop_the_others(folder, capsys):
    assert (
        evaluate.main(
            [
                "--models",
                ONE,
                "no-such-model",
                "--weights",
                f"{ONE}=random",
                "--benchmark",
                str(folder),
                str(folder.parent / "absent"),
                "--results",
                str(folder.parent / "results"),
                *FAST,
            ]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert "error: no-such-model" in captured.err and "absent" in captured.err
    assert "mine: 36 images" in captured.out
    assert "Not evaluated" in (folder.parent / "results" / "report.md").read_text()


def test_full_disk_is_told_and_nothing_is_lost(folder, capsys, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr("g2l.files.atomic", full)
    monkeypatch.setattr("g2l.features.atomic", full)
    assert go(folder, "--no-pictures") == 1
    assert "no space left" in capsys.readouterr().err
    monkeypatch.setattr("g2l.files.atomic", atomic)
    monkeypatch.setattr("g2l.features.atomic", atomic)
    assert go(folder, "--no-pictures") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["features half written", "before the first predictions", "before the tables"]
)
def test_killed_at_any_moment_it_goes_on(folder, weights, moment):
    """The process kills itself at the moment named, so no clock decides when."""
    original = g2l.features.atomic

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def half(path):
        if str(path).endswith("mine.safetensors"):
            path.with_name(".half.tmp").write_bytes(b"half")
            die()
        with original(path) as temporary:
            yield temporary

    def work():
        if moment == "features half written":
            g2l.features.atomic = half
        elif moment == "before the first predictions":
            g2l.evaluation.save_predictions = die
        else:
            g2l.report.write_tables = die
        return evaluate.main(args)

    args = [
        "--models",
        ONE,
        "--weights",
        f"{ONE}={weights}",
        "--benchmark",
        str(folder),
        "--results",
        str(folder.parent / "results"),
        *FAST,
    ]
    dead = Forked(work).finish()
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (folder.parent / "results" / "report.md").exists()
    assert evaluate.main(args) == 0
    assert len(rows(folder, model=ONE, protocol="knn", metric="accuracy")) == 10
    assert (folder.parent / "results" / "report.md").is_file()


def test_two_processes_write_one_metrics_file(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom g2l.results import record\n"
        "for i in range(30):\n    record(Path(sys.argv[1]), [{'model': sys.argv[2], 'other': i, "
        "'benchmark': 'b', 'protocol': 'p', 'metric': 'm', 'value': i}])"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT)
        for name in "ab"
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert len(read_metrics(tmp_path)) == 60


def test_all_takes_what_is_there_and_says_what_is_missing(folder, capsys):
    data = folder.parent / "data" / "benchmarks" / "idc"
    rng = np.random.default_rng(0)
    for i in range(24):
        patient, c = 9000 + i // 2, i % 2
        (data / str(patient) / str(c)).mkdir(parents=True, exist_ok=True)
        noise = rng.normal(120 + 60 * c, 20, (50, 50, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(
            data / str(patient) / str(c) / f"{patient}_idx5_x{i}_y1_class{c}.png"
        )
    (folder.parent / "data" / "benchmarks" / "bracs").mkdir()
    (folder.parent / "data" / "benchmarks" / "bracs" / "x.txt").write_text("wrong")
    assert (
        evaluate.main(
            [
                "--all",
                "--models",
                ONE,
                "--weights",
                "random",
                "--data",
                str(folder.parent / "data"),
                "--results",
                str(folder.parent / "results"),
                *FAST,
                "--no-pictures",
            ]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert "benchmark tils is not in" in captured.err and "zenodo" in captured.err
    assert (
        "error: bracs" in captured.err and "BRACS_*.png" in captured.err
    )  # there, but not as it unpacks
    assert "idc: 24 images" in captured.out and "24 found, published 277,524" in captured.out


@pytest.mark.slow
def test_command_line(tmp_path):
    shown = run("evaluate.py", "--list", "--data", tmp_path)
    assert shown.returncode == 0 and "breakhis" in shown.stdout and "missing" in shown.stdout
    nothing = jobs.run("evaluate.py", "--models", ONE, "--results", tmp_path)
    assert (
        nothing.returncode == 1
        and nothing.stderr.startswith("error: ")
        and "Traceback" not in nothing.stderr
    )
    assert jobs.run("evaluate.py", "--benchmarks", "imagenet").returncode == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--folds", "1"), "--folds: 1: expected a whole number from 2"),
        (("--k", "100"), "--k: 100: expected a whole number from 1 to 64"),
        (
            ("--benchmark", "mine/labels.csv"),
            "--benchmark: mine/labels.csv is a file; give its folder, mine",
        ),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(folder, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit):
        evaluate.main(["--models", ONE, *flags])
    assert message in capsys.readouterr().err


def test_all_with_nothing_at_hand_names_both_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("g2l.features.models_at_hand", lambda given, runs: [])
    where = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / "results")]
    assert evaluate.main(["--all", *where]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "no model" in error
        and "--weights" in error
        and "no benchmark" in error
        and "--list" in error
    )
    assert "or --all" not in error
    assert evaluate.main(where) == 1
    assert "--models" in (error := capsys.readouterr().err) and "or --all" in error
    assert not (tmp_path / "results").exists()


def test_a_student_that_is_not_there_is_made_by_distill(folder, capsys):
    assert go(folder, names=("runs/x/student",)) == 1
    assert "error: runs/x/student: no such folder; distill.py makes it" in capsys.readouterr().err


def test_weights_replaced_in_the_hubs_cache_are_another_model(tmp_path, monkeypatch):
    import huggingface_hub

    loaded = [load_model(ONE, "random", input_size=32) for _ in "ab"]
    loaded[0].fingerprint = "before"
    loaded[1].fingerprint = "after"
    monkeypatch.setattr(g2l.features, "loaded_model", lambda *_, **__: loaded.pop(0))
    blob = tmp_path / "blob"
    blob.write_text("weights")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(blob))
    for _ in range(2):
        assert card("hibou-l", tmp_path)["fingerprint"] == "before"
    blob.write_text("other weights")
    assert card("hibou-l", tmp_path)["fingerprint"] == "after"


def test_models_at_hand_are_those_given_cached_or_distilled_here(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    for name, whole in (("a", True), ("b", False)):
        (tmp_path / "runs" / name / "student").mkdir(parents=True)
        if whole:
            (tmp_path / "runs" / name / "student" / "model.safetensors").touch()
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, file: "/cache/file" if repo == REGISTRY["hibou-l"].hub else None,
    )
    assert sorted(models_at_hand(["uni=some.bin"], tmp_path / "runs")) == [
        str(tmp_path / "runs" / "a" / "student"),
        "hibou-l",
        "uni",
    ]
    err = capsys.readouterr().err
    assert "h-optimus-0 (huggingface.co/bioptimus/H-optimus-0)" in err and "hibou-l" not in err


def test_rows_of_a_source_without_files_watch_no_file():
    """Such rows once watched the current folder with everything in it."""
    rows = Rows([np.full((2, 2, 3), i, np.uint8) for i in range(5)], np.array([3, 1]))
    assert len(rows) == 2 and rows[0].max() == 3 and rows.files == []


@pytest.mark.slow
def test_protocols_of_the_field_stand_beside_their_chance_level(folder, weights):
    names = ["few-shot", "retrieval", "agreement", "calibration", "k-curve"]
    more = ["--no-pictures", "--teacher", ONE, "--baseline", TWO]
    assert go(folder, *more, "--protocols", *names, names=(ONE, TWO)) == 0
    compared = {r["metric"]: r for r in rows(folder, protocol="paired")}
    for metric in ("few-shot: 1 a class", "retrieval: mAP@5", "probe: ECE", "k curve: k = 5"):
        row = compared[metric]
        assert row["low"] <= row["value"] <= row["high"]
    error = compared["probe: ECE"] | {"low": 0.1, "high": 0.2}
    assert verdict(error) == "worse" and verdict(error | {"metric": "knn"}) == "better"
    text = (folder.parent / "results" / "table2.md").read_text()
    for title in ("Few-shot", "Retrieval", "Agreement"):
        part = text[text.index(title) :].split("\n\n")[1]
        assert "| benchmark | measure | chance |" in part and " – " not in part, part
    (error,) = re.findall(r"\| expected calibration error \|.*", text)
    cells = error.split("|")[3:-1]
    values = [float(re.search(r"\d\.\d+", cell)[0]) for cell in cells]
    [best] = [value for cell, value in zip(cells, values, strict=True) if "**" in cell]
    assert best == min(values)  # less is better


def test_an_export_is_written_without_a_model_being_loaded(folder, weights, capsys):
    assert go(folder, "--export", "eva") == 1  # registry names are no students
    assert "no student of distill.py" in capsys.readouterr().err

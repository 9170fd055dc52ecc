"""robustness.py: from images to Table 3, its pictures and its honest reading; shifts; faults."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from centres import planted, write_region, write_tiger
from jobs import run_ranks
from PIL import Image
from training import write_cohort

import robustness
from g2l.benchmarks import Benchmark
from g2l.errors import UserError
from g2l.multicentre import load_multicentre
from g2l.pictures import save_figure
from g2l.protocols import codes
from g2l.report import markdown
from g2l.results import read_metrics
from g2l.robust import KS
from g2l.robust_report import draw_map, plain


@pytest.fixture
def tiger(tmp_path) -> Path:
    return write_tiger(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three tissues (stripes, dots, plain) from three centres (tints), three patients each: 108
    images of 32 px.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    lines = ["image,label,group,center"]
    for tissue, texture in (
        ("dots", rng.random((32, 32)) > 0.8),
        ("plain", np.zeros((32, 32))),
        ("stripes", np.arange(32)[None] // 4 % 2 + np.zeros((32, 1))),
    ):
        for patient in range(9):
            for i in range(4):
                tint = np.eye(3)[patient // 3] * 60 + rng.normal(0, 6, 3)
                image = (
                    150
                    + np.roll(texture, i, 1)[..., None] * 60
                    - tint
                    + rng.normal(0, 8, (32, 32, 3))
                )
                name = f"{tissue}-{patient}-{i}.png"
                Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
                    tmp_path / "mine" / name
                )
                lines.append(f"{name},{tissue},patient-{patient},centre-{patient // 3}")
    (tmp_path / "mine" / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "mine"


def call(capsys, *args) -> tuple[int, str, str]:
    """robustness.main in this process, on two samples: status, stdout, stderr."""
    status = robustness.main(["--samples", "2", *map(str, args)])
    return status, *capsys.readouterr()


MODELS = (
    "--models",
    "timm:test_resnet",
    "timm:test_vit",
    "--weights",
    "random",
    "--input-size",
    32,
    "--device",
    "cpu",
)


@pytest.mark.slow
def test_command_from_images_to_table_and_pictures(folder, capsys):
    results = folder.parent / "results"
    where = ("--benchmark", folder, "--results", results, "--map", "pca")
    arguments = (*MODELS, *where, "--per-class", 18)
    status, out, _ = call(capsys, *arguments)
    assert status == 0 and "index / chance" in out and "table3.md" in out
    text = (results / "table3.md").read_text()
    assert (
        "*chance*" in text and "6 of 12" in text and "paper" not in text
    )  # whose numbers are TIGER's
    assert (
        "neighbours of the same group excluded" in text and "same slide" not in text
    )  # no column slide
    assert "54 patches were drawn: dots 18, plain 18, stripes 18" in text
    for name in (
        "index.png",
        "map.png",
        "gallery-timm_test_resnet.png",
        "gallery-timm_test_vit.png",
    ):
        assert f"](robustness/mine/{name})" in text
        with Image.open(results / "robustness" / "mine" / name) as image:
            assert min(image.size) > 200
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert {(r["k"], r["seed"]) for r in rows if r["metric"] == "index"} == {
        (k, s) for k in KS for s in range(2)
    }
    features = next(results.rglob("mine.safetensors")).stat().st_mtime_ns
    status, _, err = call(capsys, *arguments, "--no-pictures")  # features and numbers stay
    assert status == 0 and "108 images" not in err
    other = (results / "table3.md").read_text()
    without = re.sub(r"### Pictures\n\n(!\[.*\n\n)+", "", text)
    assert other.split("Made by")[0] == without.split("Made by")[0]
    assert next(results.rglob("mine.safetensors")).stat().st_mtime_ns == features


def test_on_a_terminal_each_column_lies_below_its_head():
    drop = "-0.06 [-0.22, 0.24]"
    rows = [["*chance*", drop, "<u>0.03</u>"], ["a name of over 18 letters", "", ""]]
    told = plain("## A section\n\n" + markdown(["model", "drop", "score"], rows) + "\n*End*")
    title, _, head, first, second, _, end = told.split("\n")
    assert (title, second, end) == ("A section", "a name of over 18 letters", "End")
    assert first.startswith("chance ") and first.index(drop) == head.index("drop")
    assert first.index("0.03") == head.index("score")


def test_command_follows_shifts_without_centres(folder, capsys):
    results = folder.parent / "results"
    (folder / "labels.csv").unlink()  # images and nothing else
    status, out, err = call(
        capsys,
        *MODELS,
        "--benchmark",
        folder,
        "--results",
        results,
        "--perturb",
        "stain",
        "jpeg",
        "--patches",
        12,
    )
    assert status == 0 and "12 patches of mine" in out, err
    assert {p.name for p in (results / "robustness" / "mine").iterdir()} == {
        "stain.png",
        "jpeg.png",
        "shifts.md",
    }
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    value = {(r["model"], r["metric"]): r["value"] for r in rows}
    assert value["timm:test_vit", "jpeg 90 cosine"] > value["timm:test_vit", "jpeg 10 cosine"]
    assert 0 <= value["timm:test_vit", "stain 0.4 first"] <= 1


WEIGHTS: dict[str, str] = {}  # fingerprints of models whose weights are not the first


def test_slides_that_were_swapped_since_tiling_are_noticed(tmp_path, capsys):
    data = write_cohort(tmp_path)
    command = ("--models", "timm:test_vit", *MODELS[3:], "--cancer", "tiny", "--data", data)
    command += ("--results", tmp_path / "r", "--no-pictures", "--patches", 12)
    command += ("--perturb", "brightness", "--strengths", "0.1")
    assert call(capsys, *command)[0] == 0
    status, _, err = call(capsys, *command)  # nothing is read again
    assert status == 0 and "images" not in err
    one, other = sorted((data / "slides" / "tiny").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    status, _, err = call(capsys, *command)
    assert status == 1 and f"{one} changed since it was tiled; run tile.py" in err


@pytest.fixture
def brief(monkeypatch):
    """One draw of features that know nothing, and few of PathoROB's resamplings."""
    monkeypatch.setattr("robustness.BLIND_DRAWS", 1)
    for name, value in {"QUARTETS": 1, "CLUSTERS": 4, "TRIALS": 2}.items():
        monkeypatch.setattr(f"g2l.pathorob.{name}", value)


@pytest.fixture
def fake(brief, monkeypatch):
    """Models whose features are planted: `tissue`, `place`, and `run`, a student distilled on
    patient-0.
    """

    def features(name, benchmark, results, **_):
        by = codes(benchmark.centers if name == "place" else benchmark.labels)
        x = planted(by, 0.5, seed=len(name))
        return np.where(np.array(benchmark.ids)[:, None] == "broken", np.nan, x)

    monkeypatch.setattr("robustness.features", features)
    monkeypatch.setattr(
        "robustness.card",
        lambda name, results, **_: {
            "fingerprint": WEIGHTS.get(name, name),
            "metadata": {"teacher": "h-optimus-0", "student": "hibou-l", "patients": ["patient-0"]}
            if name == "run"
            else {},
        },
    )


@pytest.mark.slow
def test_reading_is_honest(folder, fake, capsys, monkeypatch):
    met = {"place": ["place may know these slides"]}
    monkeypatch.setattr(robustness, "pretrained_on", lambda *_: met)
    results = folder.parent / "results"
    arguments = (
        "--models",
        "tissue",
        "place",
        "run",
        "--benchmark",
        folder,
        "--results",
        results,
        "--no-pictures",
    )
    status, out, _ = call(capsys, *arguments, "--per-class", 18)
    assert status == 0
    for reading in ("above chance", "below chance", "above place", "not clearly apart from run"):
        assert reading in out
    assert "run †" in out and "run: 1 of 9" in out
    assert "place ‡" in out and "‡ place may know these slides" in out
    call(capsys, *arguments, "--per-class", 18, "--exclude-seen")
    text = (results / "table3.md").read_text()
    assert (
        text.count("## mine") == 2 and "left out" in text and "| centre-0 | 6 of 8" in text
    )  # a patient less
    rows = read_metrics(results)
    assert {r["paper"] for r in rows if r["metric"] == "seen" and r["model"] == "run"} == {"G2L"}
    call(
        capsys, "--models", "tissue", *arguments[4:], "--per-class", 18, "--seed", 7
    )  # others: drawn differently
    assert "place" not in (results / "table3.md").read_text().split("left out")[0]
    status, out, _ = call(capsys, *arguments, "--per-class", 0)
    assert (
        status == 0 and "One sample." in out and "All patches" in out and "](robustness" not in text
    )
    status, out, _ = call(capsys, *arguments, "--per-class", 40)  # there are 36
    assert status == 0
    assert (
        "At most 40 patches of each class" in out
        and "108 patches were drawn: dots 36, plain 36, stripes 36" in out
    )


@pytest.mark.slow
def test_pictures_are_linked_from_the_run_that_drew_them_only(folder, fake, capsys):
    for more, expected in (
        ((), [True]),
        (("--raw",), [False, True]),
        (("--no-pictures",), [False, False]),
    ):
        assert (
            call(
                capsys,
                "--models",
                "tissue",
                "--benchmark",
                folder,
                "--results",
                folder.parent / "r",
                "--per-class",
                9,
                "--map",
                "pca",
                *more,
            )[0]
            == 0
        )
        sections = (folder.parent / "r" / "table3.md").read_text().split("## mine")[1:]
        assert ["](robustness/mine/map.png)" in section for section in sections] == expected


def test_the_map_says_what_its_patches_are(folder, fake, monkeypatch, capsys):
    titles = []
    monkeypatch.setattr("robustness.draw_map", lambda title, *_: titles.append(title))
    for name in ("draw_index", "draw_misled", "save_figure"):
        monkeypatch.setattr(robustness, name, lambda *_: None)
    for count in (6, 0):
        call(
            capsys,
            "--models",
            "tissue",
            "--benchmark",
            folder,
            "--results",
            folder.parent / "r",
            "--per-class",
            count,
        )
    assert re.fullmatch(r"mine: the \d\d patches drawn in 2 samples", titles[0])
    assert titles[1] == "mine: the 108 patches drawn in 1 sample"


def relabel(folder: Path, old: str, new: str) -> None:
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.slow
def test_models_measured_on_other_labels_or_centres_are_not_set_side_by_side(folder, fake, capsys):
    results = folder.parent / "r"
    more = ("--benchmark", folder, "--results", results, "--no-pictures")
    call(capsys, "--models", "place", *more, "--per-class", 9)
    call(capsys, "--models", "place", *more)
    relabel(folder, ",dots,", ",plain,")  # corrected labels: what was measured on others goes
    call(capsys, "--models", "tissue", *more)
    text = (results / "table3.md").read_text()
    assert text.count("## mine") == 1 and "| tissue |" in text
    assert "place" not in text and "dots" not in text
    relabel(folder, ",centre-", ",hospital-")
    call(capsys, "--models", "tissue", *more)
    text = (results / "table3.md").read_text()
    assert "hospital-2" in text and "centre-2" not in text
    drawn = [int(n) for n in re.findall(r"(\d+) of \d+", text.split("### Patches")[1])]
    assert f"{sum(drawn)} patches were drawn" in text


def test_rows_of_other_weights_are_not_set_beside_new_ones(folder, fake, monkeypatch, capsys):
    results = folder.parent / "r"
    more = ("--benchmark", folder, "--results", results, "--no-pictures", "--per-class", 9)
    for flags in ((), ("--raw",)):
        call(capsys, "--models", "tissue", "place", *more, *flags)
    monkeypatch.setitem(WEIGHTS, "place", "trained-on")
    call(capsys, "--models", "place", *more)
    first, raw = (results / "table3.md").read_text().split("## mine")[1:]
    assert "| tissue |" in first and "| place |" in first and "| trained- |" in first
    assert "tissue − place" not in first  # the pair was of the weights before
    assert "| tissue |" in raw and "place" not in raw


def test_a_name_stands_for_one_model_and_one_benchmark(folder, fake, capsys):
    results = folder.parent / "r"
    more = ("--benchmark", folder, "--results", results, "--no-pictures", "--per-class", 9)
    for place in ("a", "b"):
        (folder.parent / place / "run" / "student").mkdir(parents=True)
    assert call(capsys, "--models", folder.parent / "a" / "run" / "student", *more)[0] == 0
    status, _, err = call(capsys, "--models", folder.parent / "b" / "run" / "student", *more)
    assert status == 1 and "holds the model run of" in err and "--results" in err
    shutil.copytree(folder, folder.parent / "c" / folder.name)
    more = ("--benchmark", folder.parent / "c" / folder.name, *more[2:])
    for flags in ((), ("--perturb", "jpeg")):
        status, _, err = call(capsys, "--models", "tissue", *more, *flags)
        assert status == 1 and "holds the benchmark mine of" in err


def test_names_stay_names(folder, fake, capsys):
    """Neither a table nor a picture takes a class's name for markup."""
    relabel(folder, ",dots,", ",<b>*a*</b> [x](http://y) $5^ =1|2\x1b[31m,")
    where = ("--benchmark", folder, "--results", folder.parent / "r", "--map", "pca")
    status, out, _ = call(capsys, "--models", "tissue", *where, "--per-class", 6)
    text = (folder.parent / "r" / "table3.md").read_text()
    assert status == 0 and "\x1b" not in text + out
    assert r"\<b>\*a\*\</b> [x]\(http://y) $5^ =1\|2" in text
    assert "<b>*a*</b> [x](http://y) $5^ =1|2" in out


def test_no_reading_where_each_centre_holds_one_class(folder, fake, capsys):
    for i, tissue in enumerate(("dots", "plain", "stripes")):
        table = (folder / "labels.csv").read_text()
        (folder / "labels.csv").write_text(
            re.sub(rf",{tissue},(patient-\d),centre-\d", rf",{tissue},\1,site-{i}", table)
        )
    more = ("--benchmark", folder, "--results", folder.parent / "r", "--no-pictures")
    status, out, _ = call(capsys, "--models", "tissue", "place", *more)
    assert status == 0 and "No reading is given. Only 0% of the patches" in out
    assert "institutions instead of TCGA's" in out and "withheld" in out
    text = (folder.parent / "r" / "table3.md").read_text()
    assert "above chance" not in text and "below chance" not in text
    assert "| **" not in text  # no best either


@pytest.mark.slow
def test_what_a_kill_left_out_is_drawn_and_what_it_left_behind_goes(folder, fake, capsys):
    out = folder.parent / "r" / "robustness" / "mine"
    where = ("--benchmark", folder, "--results", folder.parent / "r", "--map", "pca")
    command = ("--models", "tissue", *where, "--per-class", 18)
    call(capsys, *command)
    left = out / ".map.1234.abcdef.tmp.png"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    (out / "gallery-tissue.png").unlink()
    before = (out / "map.png").stat().st_mtime_ns
    call(capsys, *command)
    assert (out / "gallery-tissue.png").is_file() and not left.exists()
    assert (out / "map.png").stat().st_mtime_ns == before
    call(capsys, *command, "--per-class", 9)  # other patches: drawn again
    assert (out / "map.png").stat().st_mtime_ns != before


@pytest.mark.parametrize("kind", ["constant", "two rows", "one column"])
def test_degenerate_features_end_nothing(kind, folder, fake, capsys, monkeypatch):
    known = robustness.features

    def features(name, *others, **options):
        x = known(name, *others, **options).astype(np.float32)
        if name == "dead":
            x[:, 1:] = 0.5
            if kind != "one column":
                x[:, 0] = (kind == "two rows") * (np.arange(len(x)) % 2)
        return x

    monkeypatch.setattr("robustness.features", features)
    command = ("--models", "dead", "tissue", "--benchmark", folder, "--results", folder.parent)
    status, out, err = call(capsys, *command, "--per-class", 18)
    assert "mine" in out and "tissue" in out
    told = "error: dead on mine: every image has the same embedding" in err
    assert (status, told) == ((1, True) if kind == "constant" else (0, False))


def test_table_names_what_made_it(folder, fake, capsys):
    more = ("--benchmark", folder, "--results", folder.parent / "r", "--no-pictures")
    call(capsys, "--models", "tissue", *more, "--device", "cpu")
    last = (folder.parent / "r" / "table3.md").read_text().splitlines()[-1]
    assert last.startswith("Made by `python ") and "torch 2." in last and last.endswith("on cpu.")


@pytest.mark.parametrize(("count", "method"), [(21, "tsne"), (32, "pca")])
def test_map_stays_whole_with_many_centres(count, method, tmp_path):
    sites = [f"hospital {i % count} of somewhere" for i in range(2 * count)]
    benchmark = Benchmark(
        "many",
        "patch",
        [],
        sites,
        np.arange(len(sites)) % 5,
        ["invasive tumour", "in-situ tumour", "tumour stroma", "inflamed stroma", "necrosis"],
        sites,
        sites,
    )
    x = {"a model": np.random.default_rng(0).normal(size=(len(sites), 8))}
    figure = draw_map("many", benchmark, x, np.arange(len(sites)), method)
    figure.canvas.draw()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [axis.get_tightbbox() for axis in figure.axes]
    for i, box in enumerate(boxes):
        assert min(box.width, box.height) > 100 or i < len(figure.legends)
        for other in boxes[i + 1 :]:
            assert not (
                min(box.x1, other.x1) - max(box.x0, other.x0) > 2
                and min(box.y1, other.y1) - max(box.y0, other.y0) > 2
            )
    save_figure(figure, tmp_path / "map.png")


def test_the_slide_is_excluded_where_it_is_known(folder, fake, capsys):
    table = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text(
        "\n".join([table[0] + ",slide", *(f"{row},s{i % 50}" for i, row in enumerate(table[1:]))])
    )
    out = call(
        capsys,
        "--models",
        "tissue",
        "--benchmark",
        folder,
        "--results",
        folder.parent / "r",
        "--no-pictures",
    )[1]
    assert "neighbours on the same slide excluded" in out and "same group" not in out


def test_paper_stands_beside_tiger(tiger, fake, monkeypatch, capsys):
    """On TIGER a model of the paper has the paper's number in its cell; only patches that were
    drawn get features.
    """
    mask = np.kron(np.array([[1, 3, 5], [2, 6, 1]], np.uint8), np.ones((64, 64), np.uint8))
    for i in range(4):
        write_region(
            tiger, "tissue-bcss", f"TCGA-B{i % 2}-A00{i}-01Z-00-DX1.X_[0, 0, 192, 128]", mask
        )
    sizes, original = [], robustness.features
    monkeypatch.setattr(
        "robustness.features", lambda n, b, r, **k: sizes.append(len(b)) or original(n, b, r, **k)
    )
    results = tiger / "results"
    status, out, err = call(
        capsys,
        "--models",
        "run",
        "place",
        "--benchmark",
        tiger,
        "--results",
        results,
        "--patch-size",
        64,
        "--per-class",
        2,
        "--no-pictures",
    )
    assert status == 0, err
    text = (results / "table3.md").read_text()
    assert "(paper 1.0891 ± 0.02)" in out and "cells are empty" in text
    assert (
        "## The paper's Table 3" in text
        and "2.0316 ± 0.09" in text
        and "virchow" in text
        and "same slide excluded" in text
    )
    assert max(sizes) < len(load_multicentre(tiger, 64, 0.75)[0])


def test_unreadable_patch_is_left_out_and_told(folder, fake, capsys):
    text = (folder / "labels.csv").read_text().replace("dots-0-0.png", "broken")
    (folder / "dots-0-0.png").rename(folder / "broken")
    (folder / "labels.csv").write_text(text)
    status, out, _ = call(
        capsys,
        "--models",
        "tissue",
        "--benchmark",
        folder,
        "--results",
        folder.parent / "r",
        "--per-class",
        0,
        "--no-pictures",
    )
    assert status == 1 and "table3.md" in out
    assert "| centre-0 | 11 of 12" in (folder.parent / "r" / "table3.md").read_text()
    status, out, err = call(
        capsys,
        "--models",
        "tissue",
        "--benchmark",
        folder,
        "--results",
        folder.parent / "r",
        "--perturb",
        "brightness",
        "--no-pictures",
    )
    assert (
        status == 1 and "shifts.md" in out and f"{folder.name}: 1 images could not be read" in err
    )


def test_one_missing_model_does_not_stop_the_others(folder, fake, monkeypatch, capsys):
    original = robustness.features

    def features(name, *args, **options):
        if name == "gone":
            raise UserError("gone: no weights; pass --weights gone=FILE")
        return original(name, *args, **options)

    monkeypatch.setattr("robustness.features", features)
    arguments = (
        "--benchmark",
        folder,
        "--results",
        folder.parent / "r",
        "--per-class",
        9,
        "--no-pictures",
    )
    status, out, err = call(capsys, "--models", "tissue", "gone", "place", *arguments)
    assert status == 1 and err == "error: gone: no weights; pass --weights gone=FILE\n"
    assert "tissue − place" in out and "gone" not in out
    status, out, err = call(capsys, "--models", "gone", *arguments)
    assert status == 1 and out == "" and err.startswith("error: gone: no weights")
    none = call(capsys, *arguments, "--runs", folder)
    assert none[0] == 1 and "none is at hand; name one by --models" in none[2]
    assert "share the name tissue" in call(capsys, "--models", "tissue", "tissue", *arguments)[2]


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [
        ("image,label,group\nplain-0-0.png,a,p\n", (), "no column center"),
        (
            "image,label,group,center\nplain-0-0.png,a,p,c\nplain-0-1.png,b,p,c\n",
            (),
            "2 classes and 1 centres",
        ),
        (None, ("--per-class", 1, "--benchmark", "/nowhere"), "/nowhere: no such folder"),
        (None, ("--benchmark", "/nowhere"), "s3://tiger-training/wsirois /nowhere/wsirois"),
        (None, ("--per-class", 1), "fewer than two classes, two centres or 4 patches"),
        (
            "image,label,group,center\nplain-0-0.png,a,patient-0,c\nplain-0-1.png,b,patient-0,d\n",
            ("--models", "run", "--exclude-seen"),
            "saw every patient of it; leave out --exclude-seen",
        ),
        (
            "image,label,group,center\n"
            + "".join(f"plain-0-{i}.png,{'ab'[i % 2]},p,{'cd'[i // 2]}\n" for i in range(4)),
            (),
            "all patches are of slide p",
        ),
    ],
)
def test_user_errors(folder, fake, capsys, labels, flags, message):
    if labels:
        (folder / "labels.csv").write_text(labels)
    status, _, err = call(
        capsys,
        "--models",
        "tissue",
        "--benchmark",
        folder,
        "--results",
        folder.parent / "r",
        *flags,
    )
    assert status == 1 and err.splitlines()[-1].startswith("error: ") and message in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--strengths", "1"),
        ("--cancer", "brca"),
        ("--benchmark", __file__),
        ("--perturb", "stain", "blur", "--strengths", "1"),
        ("--samples", "0"),
        ("--min-fraction", "0"),
        ("--max-unreadable", "-1"),
        ("--workers", "x"),
        ("--perturb", "fog"),
        ("--perturb", "jpeg", "--strengths", "0"),
    ],
)
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        robustness.main(list(flags))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def numbers(results: Path) -> dict[tuple, float]:
    fields = ("model", "metric", "k", "seed", "draw", "class", "center")
    return {tuple(map(row.get, fields)): row["value"] for row in read_metrics(results)}


def test_with_two_ranks_the_numbers_are_the_same(folder, brief, capsys):
    alone, two = folder.parent / "alone", folder.parent / "two"
    command = ["--models", "timm:test_resnet", *MODELS[3:], "--benchmark", folder]
    command += ["--no-pictures", "--per-class", 9]
    assert call(capsys, *command, "--results", alone)[0] == 0

    def work() -> int:
        return robustness.main(list(map(str, ["--samples", 2, *command, "--results", two])))

    for done in run_ranks(work):
        assert done.returncode == 0, done.stderr
    one, other = numbers(alone), numbers(two)
    assert one.keys() == other.keys() and len(one) == 100
    assert [one[key] for key in one] == pytest.approx(
        [other[key] for key in one], rel=1e-3, nan_ok=True
    )


def test_a_rank_leaves_the_job_when_it_is_done(folder, brief, capsys, one_rank):
    assert (
        call(
            capsys,
            "--models",
            "timm:test_resnet",
            *MODELS[3:],
            "--benchmark",
            folder,
            "--no-pictures",
            "--per-class",
            6,
            "--results",
            folder.parent / "one",
        )[0]
        == 0
    )

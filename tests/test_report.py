"""g2l.paper, g2l.report and g2l.pictures: the paper's numbers, tables and pictures of a study."""

import itertools
import types
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import g2l.pictures
from g2l.benchmarks import Benchmark
from g2l.paper import FIGURES, paper_figure
from g2l.pictures import against, draw_benchmark, draw_figure1, is_drawn, with_margins
from g2l.report import (
    markdown,
    means,
    summarize,
    verdict,
    with_interval,
    write_report,
    write_tables,
)

G2L = {"teacher": "h-optimus-0", "student": "hibou-l"}


def rows_of(benchmark: str, model: str, value: float, **more) -> list[dict]:
    base = {"benchmark": benchmark, "model": model} | more
    kinds = [("knn", "accuracy"), ("knn", "balanced accuracy"), ("knn", "majority")]
    kinds += [("probe", "auc"), ("probe", "balanced accuracy")]
    kinds += [("knn-ungrouped", "accuracy"), ("probe-ungrouped", "auc")]
    return [
        base | {"protocol": p, "metric": m, "fold": fold, "value": value + 0.02 * fold}
        for p, m in kinds
        for fold in range(3)
    ]


@pytest.fixture
def study(tmp_path) -> types.SimpleNamespace:
    """G2L and Hibou-L on TP53, IDC and two magnifications of BreakHis."""
    names = ["idc", "tp53", *(f"breakhis-binary-{zoom}x" for zoom in (40, 100, 200, 400))]
    card = {"parameters": 3e8, "dim": 8, "embedding": "cls", "input_size": 224}
    card |= {"ms_per_image": 5.0, "weights": "hub", "metadata": {}}
    cards = {"hibou-l": card, "mine": card | {"parameters": 3e7, "metadata": G2L}}
    rows = []
    for name in names:
        for model, value in (("hibou-l", 0.6), ("mine", 0.7), ("chance", 0.4)):
            rows += rows_of(name, model, value)
        rows.append({"benchmark": name, "model": "data", "protocol": "data", "metric": "images"})
        rows[-1] |= {"value": 90, "classes": ["a", "b"], "counts": [45, 45], "groups": 9}
        rows[-1] |= {"notes": [], "marked": [], "pretrained": [], "level": "patch"}
    for name, about in cards.items():
        row = {"benchmark": "", "model": name, "protocol": "model", "metric": "parameters"}
        rows.append(row | {"value": about["parameters"], "metadata": about["metadata"]})
    found = [
        Benchmark(n, "patch", [], ["i"] * 90, np.arange(90) % 2, ["a", "b"], ["g"] * 90)
        for n in names
    ]
    return types.SimpleNamespace(
        results=tmp_path,
        rows=rows,
        found=found,
        models=list(cards),
        cards=cards,
        teacher=None,
        baseline="hibou-l",
        device_used="cpu",
        k=15,
        pca_dims=50,
        paper_splits=True,
        no_pictures=False,
        protocols=(),
    )


def test_the_papers_numbers_are_whole_and_found_by_name():
    counts = {what: sum(key[0] == what for key in FIGURES) for what, *_ in FIGURES}
    assert counts == {"cka": 10, "knn": 54, "probe": 54, "index": 24}
    assert paper_figure("knn", "idc", "mine", G2L) == " (paper 0.9232 ± 0.0001)"
    assert paper_figure("cka", "bracs", "mine", G2L) == " (paper 0.9683 ± 0.011)"
    assert paper_figure("cka", "bracs", "hibou-l", {}) == " (paper 0.7594 ± 0.014)"
    assert paper_figure("probe", "chimera", "uni", {}) == " (paper 0.8572 ± 0.079)"
    assert paper_figure("index", "20", "virchow", {}) == " (paper 1.2850 ± 0.07)"
    assert paper_figure("knn", "breakhis-binary", "uni2-h", {}) == " (paper 0.8742)"
    assert paper_figure("knn", "idc", "timm:resnet10t", {}) == ""


def test_the_paper_stands_beside_the_ungrouped_numbers_and_means_over_magnifications(study):
    text = write_tables(study)
    grouped, *loose = text.split("ungrouped")
    assert "paper 0" not in grouped and len(loose) == 2
    assert "(paper 0.6904 ± 0.050)" in loose[0] and "(paper 0.8046 ± 0.048)" in loose[1]
    lines = [line for line in text.splitlines() if "paper 0.8841" in line]
    assert len(lines) == 1 and "breakhis-binary (mean of 4)" in lines[0]


def test_every_row_has_the_score_of_features_that_know_nothing(study):
    for line in write_tables(study).splitlines():
        if line.startswith("| idc"):
            assert line.startswith("| idc | 0.420 ± 0.020 |")


def test_what_pretraining_has_seen_is_marked_in_every_table(study):
    for row in study.rows:
        if row["protocol"] == "data" and row["benchmark"] == "tp53":
            row["pretrained"] = ["mine"]
    lines = [*write_tables(study).splitlines(), *summarize(study).splitlines()]
    told = [line for line in lines if line.startswith(("| tp53", "| idc"))]
    assert told and all(("†" in line) == ("| tp53" in line) for line in told)
    assert sum(line.endswith("†") and line.startswith("mine") for line in lines) == 1


def test_a_further_protocol_has_no_line_for_data_it_cannot_take(study):
    base = {"benchmark": "idc", "protocol": "abmil", "metric": "auc", "fold": 0}
    study.rows += [base | {"model": model, "value": 0.7} for model in ("mine", "chance")]
    study.protocols = ("abmil",)
    part = write_tables(study).split("## Gated attention")[1]
    assert part.count("| AUC |") == 1 and "| idc | AUC | 0.700 | – |" in part


@pytest.mark.parametrize("sizes", [[0.3, 0.3], [303.7, 1134.8], [85.7, 1134.8, 21.7]])
def test_the_numbers_below_figure1_do_not_lie_over_each_other(study, sizes):
    figure, axis = plt.subplots(figsize=(4.5, 4))
    study.models = [f"m{i}" for i in range(len(sizes))]
    study.cards = {name: {"metadata": {}} for name in study.models}
    values = np.ones(len(sizes))
    against(axis, sizes, values, values / 9, study)
    figure.canvas.draw()
    shown = [*axis.get_xticklabels(), *axis.get_xticklabels(minor=True)]
    left, right = axis.get_xlim()
    inside = [text for text in shown if text.get_text() and left <= text.get_position()[0] <= right]
    boxes = sorted((text.get_window_extent() for text in inside), key=lambda box: box.x0)
    assert len(boxes) >= 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    plt.close("all")


def test_a_difference_that_is_printed_as_none_is_no_verdict():
    row = {"metric": "probe: ECE", "value": 2e-7, "low": 1e-7, "high": 3e-7}
    assert with_interval(row) == "+0.000 [+0.000, +0.000]" and verdict(row) == "within noise"
    assert verdict(row | {"low": 0.0006, "high": 0.002}) == "worse"


def test_every_table_names_what_made_it(study):
    tables = write_tables(study)
    write_report(study, tables, [])
    for name in ("table2.md", "report.md"):
        text = (study.results / name).read_text()
        assert "Made by `python " in text and "torch 2." in text and "on cpu." in text


def test_figure1_shows_tp53_or_the_one_named_with_intervals(study, monkeypatch):
    figures = []
    monkeypatch.setattr(g2l.pictures, "save_figure", lambda figure, *_: figures.append(figure))
    for on in ("tp53", "idc", "absent", "mean"):
        draw_figure1(study, on)
    labels = [figure.axes[0].get_ylabel() for figure in figures]
    for label, name in zip(labels, ("tp53", "idc", "idc", "mean of 6"), strict=True):
        assert f"kNN accuracy, {name}" in label and "95 % interval" in label
    assert all(len(figure.axes[0].containers) == 2 for figure in figures)  # a bar for each model
    plt.close("all")
    value, margin = with_margins(np.array([[0.5, 0.1, 10], [0.6, 0.0, 1]]))
    assert value.tolist() == [0.5, 0.6] and margin[1] == 0
    assert margin[0] == pytest.approx(2.262 * 0.1 / 10**0.5, rel=1e-3)


@pytest.mark.slow
def test_pictures_are_drawn_where_they_lack_or_show_something_else(study, tmp_path):
    benchmark = study.found[0]
    images = np.zeros((90, 8, 8, 3), np.uint8)
    benchmark.images = images
    neighbors = np.stack([(np.arange(90) + i) % 90 for i in range(1, 8)], 1)
    predictions = {n: {"knn": np.zeros(90, int), "neighbors": neighbors} for n in study.models}
    folder = Path(study.results) / "pictures"
    draw_benchmark(benchmark, predictions, study, "one")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "confusion-idc.png",
        "cka-idc.png",
        "gallery-idc-hibou-l.png",
        "gallery-idc-mine.png",
    }
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "gallery-idc-mine.png").unlink()
    draw_benchmark(benchmark, predictions, study, "one")
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path for path in before if after[path] != before[path]} == {
        folder / "gallery-idc-mine.png"
    }
    draw_benchmark(benchmark, predictions, study, "two")
    assert all(is_drawn(path, "two") for path in folder.iterdir())
    (folder / "cka-idc.png").write_bytes(b"half")
    assert not is_drawn(folder / "cka-idc.png", "two")


def test_the_curve_over_k_is_drawn_and_shown(study, monkeypatch):
    base = {"benchmark": "idc", "protocol": "k curve"}
    for model, value in (("mine", 0.7), ("hibou-l", 0.6), ("chance", 0.4)):
        study.rows += [
            base | {"model": model, "metric": f"k = {k}", "value": value + k / 100} for k in (1, 5)
        ]
    study.protocols = ("k-curve",)
    study.models = ["hibou-l", "mine"]
    figures = {}
    monkeypatch.setattr(
        g2l.pictures, "save_figure", lambda figure, path, *_: figures.update({path.stem: figure})
    )
    monkeypatch.setattr(g2l.pictures, "draw_gallery", lambda *_: None)
    predicted = {name: {"knn": np.zeros(90, int)} for name in study.models}
    draw_benchmark(study.found[0], predicted, study, "one")
    (axis,) = figures["k-curve-idc"].axes
    points = {line.get_label(): line.get_xydata() for line in axis.lines}
    drawn = {name: xy[np.isfinite(xy[:, 1])].tolist() for name, xy in points.items()}
    assert drawn["mine"] == [[1, 0.71], [5, 0.75]] and set(drawn) == {"mine", "hibou-l", "chance"}
    plt.close("all")
    (study.results / "pictures").mkdir()
    (study.results / "pictures" / "k-curve-idc.png").write_bytes(b"")
    write_report(study, write_tables(study), [])
    assert "(pictures/k-curve-idc.png)" in (study.results / "report.md").read_text()


def test_markdown_keeps_bars_in_names_apart_from_columns():
    assert markdown("a\tb", [["x|y", "1"], ["z", "2"]]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n| z | 2 |\n"
    )


def test_means_leave_out_what_is_not_defined():
    row = {"protocol": "knn", "metric": "accuracy", "model": "a", "benchmark": "b", "value": None}
    assert means([row]) == {}
    assert means([row, row | {"value": 0.5}]) == {("knn", "accuracy", "a", "b"): (0.5, 0.0, 1)}

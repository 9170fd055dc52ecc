"""robustness.py: the index by hand and against independent code; sampling, readers, shifts and the command."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import torchrun
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import g2l.features
import robustness
from g2l.errors import UserError
from g2l.multicentre import load_multicentre, tiger_origin
from g2l.results import read_metrics
from g2l.robust import (
    KS,
    bootstrap,
    bounded_of,
    candidates,
    chance,
    codes,
    draw_sample,
    index_of,
    intervals,
    measure,
    neighbors,
    tally,
    target_probe,
)
from g2l.shifts import SHIFTS, STAINS, displacement, shift


def planted(by: np.ndarray, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Features that hold `by` (n,) and nothing else but noise: (n, 16) float32."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(by.max() + 1, 16))[by] + noise * rng.normal(size=(len(by), 16))
    ).astype(np.float32)


def cohort(classes: int = 4, centers: int = 3, slides: int = 3, patches: int = 4):
    """labels, centers, slides of a balanced cohort: every slide of one centre and with all classes, (n,) each."""
    label, slide = np.meshgrid(
        np.repeat(np.arange(classes), patches), np.arange(centers * slides), indexing="ij"
    )
    return label.ravel(), slide.ravel() // slides, slide.ravel()


def by_loops(x: np.ndarray, labels, centers, slides, k: int) -> dict:
    """Index and bounded index written out in plain loops, fp64, from all pairwise distances."""
    ss = so = os = 0
    for i in range(len(x)):
        order = sorted(
            (float(np.sum((x[i].astype(float) - x[j]) ** 2)), j)
            for j in range(len(x))
            if j != i and (slides is None or slides[j] != slides[i])
        )
        for _, j in order[:k]:
            ss += labels[j] == labels[i] and centers[j] == centers[i]
            so += labels[j] == labels[i] and centers[j] != centers[i]
            os += labels[j] != labels[i] and centers[j] == centers[i]
    return {"index": (ss + so) / (ss + os), "bounded": so / (so + os)}


# ---- the index


def test_index_by_hand():
    """Five points on a line; neighbours, kinds and ratios worked out with pencil and paper."""
    x = np.array([[0.0], [1.0], [2.2], [3.6], [5.2]])
    labels, centers = np.array([0, 0, 1, 0, 1]), np.array([0, 1, 0, 0, 1])
    distances, rows = neighbors(x, 2, None, normalize=False)
    assert rows.tolist() == [[1, 2], [0, 2], [1, 3], [2, 4], [3, 2]]
    assert distances[0] == pytest.approx([1.0, 2.2])
    counts = tally(rows, labels, centers)
    # first neighbours: 0-1 SO, 1-0 SO, 2-1 OO, 3-2 OS, 4-3 OO; second: 0-2 OS, 1-2 OO, 2-3 OS, 3-4 OO, 4-2 SO
    assert counts[:, :, 0].sum(1).tolist() == [0, 2, 1, 2]
    assert counts[:, :, 1].sum(1).tolist() == [0, 3, 3, 4]
    assert index_of(counts.sum(1)).tolist() == [2.0, 1.0]
    assert bounded_of(counts.sum(1)) == pytest.approx([2 / 3, 0.5])


def test_ratio_of_totals_not_mean_of_ratios():
    """A query whose neighbours never share its centre has no ratio of its own, but its counts are in the totals."""
    counts = np.zeros((4, 2, 1), int)
    counts[1, 0], counts[2, 1] = 3, 1  # query 0: three SO; query 1: one OS
    assert index_of(counts.sum(1)) == 3
    assert np.isnan(index_of(counts)[0, 0])
    assert np.isnan(bounded_of(np.zeros((4, 1))))[0]


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_index_equals_plain_loops(exclude, normalize):
    labels, centers, slides = cohort()
    x = planted(labels, 1.5) + planted(centers, 0, seed=1)
    near = slides if exclude else None
    counts, values = measure(x, labels, centers, near, slides, normalize=normalize, k_max=10)
    scaled = x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x
    for k in (3, 5, 10):
        expected = by_loops(scaled, labels, centers, near, k)
        assert values["index", k] == pytest.approx(expected["index"], rel=1e-9)
        assert values["bounded", k] == pytest.approx(expected["bounded"], rel=1e-9)
    assert ("index", 20) not in values and counts.shape == (4, len(labels), 10)


def test_bounded_index_equals_croma():
    croma = pytest.importorskip("croma")
    import pandas as pd

    labels, centers, slides = cohort(5, 4, 3, 4)
    x = planted(labels, 1.2) + planted(centers, 0, seed=1)
    table = pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(len(x))],
            "image_path": "x",
            "label": labels.astype(str),
            "group_id": [f"slide {s}" for s in slides],
            "center": [f"centre {c}" for c in centers],
        }
    )
    curve = croma.RI.compute_curve(
        x, table, confounder_column="center", k_values=list(KS), evaluation_design="all"
    )
    values = measure(x, labels, centers, slides, slides)[1]
    assert [values["bounded", k] for k in KS] == pytest.approx([curve[k] for k in KS], rel=1e-9)


def test_neighbors_equal_scikit_learn_and_leave_out_the_slide():
    labels, _, slides = cohort()
    x = planted(labels, 1.0)
    distances, rows = neighbors(x, 12, slides, normalize=False)
    assert (slides[rows] != slides[:, None]).all()
    reference_distances, reference = NearestNeighbors(n_neighbors=len(x)).fit(x).kneighbors(x)
    for i in range(len(x)):
        keep = slides[reference[i]] != slides[i]
        assert rows[i].tolist() == reference[i][keep][:12].tolist()
        assert distances[i] == pytest.approx(reference_distances[i][keep][:12], rel=1e-4)


def test_too_few_candidates_are_not_counted():
    """One slide holds nearly everything: most patches have a single candidate, and the index uses what there is."""
    slides, labels, centers = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0]), np.array([0, 0, 0, 1])
    rows = neighbors(np.arange(4.0)[:, None] + 1, 3, slides, normalize=False)[1]
    assert (rows[:3] == [3, -1, -1]).all()
    counts = tally(rows, labels, centers)
    assert counts[:, :3].sum(0)[:, -1].tolist() == [1, 1, 1]
    assert counts[:, :, -1].sum(0).tolist() == [1, 1, 1, 3]
    blind = chance(candidates(labels, centers, slides), 3)
    assert blind.sum(0)[:, -1] == pytest.approx([1, 1, 1, 3])


# ---- chance


def test_candidates_by_brute_force():
    rng = np.random.default_rng(0)
    labels, centers, slides = rng.integers(0, 3, 40), rng.integers(0, 4, 40), rng.integers(0, 9, 40)
    for near in (slides, None):
        pool = candidates(labels, centers, near)
        for i in range(40):
            others = [j for j in range(40) if j != i and (near is None or slides[j] != slides[i])]
            kinds = [(labels[j] == labels[i], centers[j] == centers[i]) for j in others]
            expected = [
                kinds.count(kind)
                for kind in ((True, True), (True, False), (False, True), (False, False))
            ]
            assert pool[:, i].tolist() == expected


@pytest.mark.parametrize(("per_center", "expected"), [(True, 4.2), (False, 4.6)])
def test_chance_level_of_the_papers_design(per_center, expected):
    """40 per cell of 5 classes x 21 centres, and 40 per class in total, each patch a slide of its own."""
    labels = np.repeat(np.arange(5), 840 if per_center else 40)
    centers = np.arange(len(labels)) % 21
    total = chance(candidates(labels, centers, None), 20).sum(1)
    assert index_of(total) == pytest.approx(np.full(20, expected), rel=0.015)
    assert np.ptp(index_of(total)) < 1e-9  # k does not enter


def test_noise_scores_chance_and_knowledge_leaves_it():
    labels, centers, slides = cohort(5, 4, 4, 6)
    blind = measure(None, labels, centers, slides, slides)[1]
    noise = [
        measure(
            np.random.default_rng(seed).normal(size=(len(labels), 32)),
            labels,
            centers,
            slides,
            slides,
        )[1]
        for seed in range(6)
    ]
    tissue = measure(planted(labels), labels, centers, slides, slides)[1]
    place = measure(planted(centers), labels, centers, slides, slides)[1]
    for k in KS:
        assert np.mean([values["index", k] for values in noise]) == pytest.approx(
            blind["index", k], rel=0.05
        )
        assert (
            place["index", k]
            < 0.6 * blind["index", k]
            < blind["index", k]
            < 0.6 * tissue["index", k]
        )
        assert place["bounded", k] < 0.2 < 0.8 < tissue["bounded", k]
    assert tissue["knn_class", 10] > 0.95 and tissue["knn_center", 10] < 0.5
    assert place["knn_center", 10] > 0.95 and place["knn_class", 10] < 0.5
    assert blind["knn_class", 10] == 1 / 5 and blind["knn_center", 10] == 1 / 4


def test_a_centre_of_one_slide_cannot_be_found_and_is_not_asked_for():
    labels, centers, slides = cohort(4, 3, 3, 4)
    keep = (centers != 2) | (slides == 8)  # of the last centre one slide is left
    labels, centers, slides = labels[keep], centers[keep], slides[keep]
    assert measure(planted(centers), labels, centers, slides, slides)[1]["knn_center", 5] == 1
    assert measure(None, labels, centers, slides, slides)[1]["knn_center", 5] == 1 / 2


# ---- probe and bootstrap


def test_probe_finds_what_is_there_in_unseen_patients():
    labels, centers, slides = cohort(4, 3, 4, 5)
    assert target_probe(planted(centers), centers, slides) > 0.95
    assert (
        target_probe(planted(slides), centers, slides) < 0.7
    )  # a patient's own mark says nothing of another patient
    noise = np.random.default_rng(0).normal(size=(len(labels), 8))
    assert target_probe(noise, centers, slides) < 0.45


def test_probe_leaves_out_centres_of_one_patient():
    centers, groups = np.array([0] * 8 + [1] * 8 + [2] * 4), np.repeat(np.arange(5), 4)
    assert g2l.robust.testable(centers, groups).tolist() == [True] * 16 + [False] * 4
    assert target_probe(planted(centers), centers, groups) > 0.95
    assert math.isnan(
        target_probe(planted(centers)[:12], centers[:12], groups[:12])
    )  # one testable centre is no question


def test_bootstrap_is_paired_and_equals_resampling_by_hand(monkeypatch):
    monkeypatch.setattr("g2l.robust.DRAWS", 40)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 5)
    one, two = rng.integers(1, 9, (2, 4, 30, 3))
    draws = bootstrap([one], [groups])
    weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 40)
    for draw, weight in zip(draws, weights, strict=True):
        rows = np.concatenate(
            [np.flatnonzero(groups == g) for g in range(6) for _ in range(weight[g])]
        )
        assert draw == pytest.approx(index_of(one[:, rows].sum(1)))
    assert bootstrap([one, two], [groups, groups]) == pytest.approx(
        (draws + bootstrap([two], [groups])) / 2
    )
    assert (bootstrap([one], [groups]) - draws == 0).all()


def test_intervals_tell_a_real_difference_from_none():
    labels, centers, slides = cohort(5, 4, 4, 4)
    counts = {"chance": [measure(None, labels, centers, slides, slides)[0]]}
    for name, x in {
        "tissue": planted(labels),
        "also": planted(labels, seed=3),
        "place": planted(centers),
    }.items():
        counts[name] = [measure(x, labels, centers, slides, slides)[0]]
    rows = {(r["model"], r["other"], r["k"]): r for r in intervals({}, counts, [slides])}
    assert rows["tissue", "place", 10]["low"] > 0
    assert rows["tissue", "also", 10]["low"] <= 0 <= rows["tissue", "also", 10]["high"]
    assert (
        rows["tissue", None, 5]["low"]
        <= rows["tissue", None, 5]["value"]
        <= rows["tissue", None, 5]["high"]
    )


def test_a_handful_of_patients_gives_no_interval():
    """With five even a model that is better in every one of them is no evidence at 95 %."""
    labels, centers, slides = cohort(5, 4, 4, 4)
    counts = {
        n: [measure(planted(by), labels, centers, slides, slides)[0]]
        for n, by in (("tissue", labels), ("place", centers))
    }
    rows = intervals({}, counts, [slides % 5])
    assert all(math.isnan(row["low"]) and math.isnan(row["high"]) and row["value"] for row in rows)


# ---- sampling


def test_sample_spreads_over_centres_and_slides():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    centers = np.tile(np.repeat([0, 1, 2], [280, 15, 5]), 2)
    slides = centers * 10 + rng.integers(0, 4, 600)
    rows = draw_sample(labels, centers, slides, 40, False, seed=1)
    for label in (0, 1):
        picked = rows[labels[rows] == label]
        assert np.bincount(centers[picked]).tolist() == [
            20,
            15,
            5,
        ]  # who runs out leaves the rest to others
        assert np.bincount(slides[picked])[:4].tolist() == [5, 5, 5, 5]
    assert (np.diff(rows) > 0).all()
    assert (rows == draw_sample(labels, centers, slides, 40, False, seed=1)).all()
    assert not np.array_equal(rows, draw_sample(labels, centers, slides, 40, False, seed=2))


def test_sample_per_centre_and_whole():
    labels, centers = np.repeat([0, 1], 60), np.tile(np.repeat([0, 1], [50, 10]), 2)
    rows = draw_sample(labels, centers, np.arange(120), 20, True, seed=0)
    assert [np.sum((labels[rows] == i) & (centers[rows] == j)) for i in (0, 1) for j in (0, 1)] == [
        20,
        10,
        20,
        10,
    ]
    assert draw_sample(labels, centers, np.arange(120), 0, False, seed=0).tolist() == list(
        range(120)
    )


# ---- readers


def write_region(root: Path, kind: str, name: str, mask: np.ndarray) -> None:
    for folder, array in (
        ("images", np.repeat(mask[..., None] * 30, 3, -1).astype(np.uint8)),
        ("masks", mask),
    ):
        path = root / "wsirois" / "roi-level-annotations" / kind / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def tiger(tmp_path) -> Path:
    """TIGER as it unpacks, with regions of 64 px patches in the published naming."""
    mask = np.full((140, 200), 7, np.uint8)  # 2 x 3 patches of 64 px, and a rest
    mask[:64, :64], mask[:64, 64:128], mask[:64, 128:192] = 1, 3, 5
    mask[64:128, :64] = 0
    mask[64:128, 64:128] = 2
    mask[64:128, 64:80] = 7  # a quarter is rest: exactly 0.75 stroma
    mask[64:128, 128:192] = 6
    mask[64:128, 128:150] = 0  # more than a quarter not annotated: dropped at 0.75
    slide = "TCGA-A1-A0SK-01Z-00-DX1.A44D70FA-4D96-43F4-9DD7-A61535786297"
    write_region(tmp_path, "tissue-bcss", f"{slide}_[22877, 12530, 23077, 12670]", mask)
    write_region(
        tmp_path, "tissue-cells", f"{slide}_[22900, 12600, 22964, 12664]", mask[:64, :64]
    )  # inside the other
    write_region(tmp_path, "tissue-cells", f"{slide}_[1000, 1000, 1064, 1064]", mask[:64, :64])
    write_region(
        tmp_path,
        "tissue-cells",
        "TC_S01_P000054_C0001_B101_[27671, 88267, 27735, 88331]",
        mask[:64, :64],
    )
    write_region(tmp_path, "tissue-cells", "100B_[35129, 6567, 35193, 6631]", mask[:64, 64:128])
    write_region(
        tmp_path, "tissue-cells", "100S_[1, 2, 41, 42]", mask[:40, :40]
    )  # smaller than a patch
    return tmp_path


def test_tiger_as_it_unpacks(tiger, capsys):
    benchmark, slides = load_multicentre(tiger, 64, 0.75)
    found = [
        (benchmark.classes[label], center, patient)
        for label, center, patient in zip(
            benchmark.labels, benchmark.centers, benchmark.groups, strict=True
        )
    ]
    sk = ("TCGA-A1", "TCGA-A1-A0SK")
    assert found == [
        ("invasive tumour", *sk),
        ("in-situ tumour", *sk),
        ("necrosis", *sk),
        ("tumour stroma", *sk),
        ("in-situ tumour", "JB", "JB-100"),
        ("invasive tumour", *sk),
        ("invasive tumour", "RUMC", "TC_S01_P000054"),
    ]
    assert [slides[4], slides[6]] == ["100B", "TC_S01_P000054_C0001_B101"] and len(
        set(benchmark.ids)
    ) == 7
    assert "1 regions are smaller than 64 px" in capsys.readouterr().err
    patch = benchmark.images[3]
    assert (
        patch.shape == (64, 64, 3) and np.mean(patch == 60) == 0.75
    )  # cut where the mask says stroma
    for place in (tiger / "wsirois", tiger / "wsirois" / "roi-level-annotations"):
        assert len(load_multicentre(place, 64, 0.75)[0]) == 7
    assert (
        len(load_multicentre(tiger, 64, 0.6)[0]) == 8
    )  # the inflamed patch, 66 % annotated, joins


def test_tiger_faults(tiger, capsys):
    root = tiger / "wsirois" / "roi-level-annotations"
    with pytest.raises(UserError, match=r"--min-fraction"):
        load_multicentre(tiger, 64, 1.01)
    with pytest.raises(UserError, match=r"neither labels\.csv"):
        load_multicentre(root / "tissue-bcss" / "images", 64, 0.75)
    with pytest.raises(UserError, match="no name of a TIGER slide"):
        tiger_origin("slide-7")
    next(
        (root / "tissue-bcss" / "masks").glob("*.png")
    ).unlink()  # its overlapping tissue-cells region now counts
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 4
    cells = root / "tissue-cells"
    for name in ("images", "masks"):  # macOS leaves such twins
        (cells / name / "._100B_[35129, 6567, 35193, 6631].png").write_bytes(b"Mac OS X")
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 4
    (cells / "masks" / "100B_[35129, 6567, 35193, 6631].png").write_bytes(b"cut")
    Image.new("L", (32, 64), 1).save(
        cells / "masks" / "TC_S01_P000054_C0001_B101_[27671, 88267, 27735, 88331].png"
    )
    capsys.readouterr()
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 2
    assert (
        "2 regions or their masks cannot be read, or differ in size and were passed over"
        in capsys.readouterr().err
    )
    (cells / "images" / "100B.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"100B\.png: expected a name such as"):
        load_multicentre(tiger, 64, 0.75)


def test_tiger_below_further_folders_and_behind_links(tiger, tmp_path_factory):
    place = tmp_path_factory.mktemp("linked")
    (place / "download" / "tiger").mkdir(parents=True)
    (place / "download" / "tiger" / "training").symlink_to(tiger / "wsirois")
    assert len(load_multicentre(place, 64, 0.75)[0]) == 7
    (place / "copy").symlink_to(tiger)
    assert len(load_multicentre(place, 64, 0.75)[0]) == 7  # the same regions once more


def test_pathorob_metadata(tmp_path):
    rows = [
        ("a", "case_1", "p.1", "tumour", "UKK"),
        ("a", "case_1", "p.2", "normal", "UKK"),
        ("b", "case_2", "p.1", "tumour", "WNS"),
        ("b", "case_1", "p.1", "tumour", "UKK"),
    ]  # the last again
    with open(tmp_path / "esca.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("subset", "slide_id", "patch_id", "biological_class", "medical_center"), *rows]
        )
    for i, name in enumerate(("case_1-p.1.png", "sub/case_1-p.2.png", "case_2/p.1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / name)
    benchmark, slides = load_multicentre(tmp_path, 224, 0.75)
    assert slides == ["case_1", "case_1", "case_2"] and benchmark.centers == ["UKK", "UKK", "WNS"]
    assert [benchmark.classes[i] for i in benchmark.labels] == ["tumour", "normal", "tumour"]
    assert [image[0, 0, 0] for image in benchmark.images] == [0, 1, 2]
    (tmp_path / "case_2" / "p.1.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of its 3 patches have no image .* first case_2-p\.1\.png"
    ):
        load_multicentre(tmp_path, 224, 0.75)


def test_slide_column_is_optional(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("image,label,group,center\na.png,x,patient,c\n")
    assert load_multicentre(tmp_path, 1, 1)[1] == ["patient"]
    (tmp_path / "labels.csv").write_text("image,label,group,center,slide\na.png,x,patient,c,s1\n")
    assert load_multicentre(tmp_path, 1, 1)[1] == ["s1"]


# ---- shifts


@pytest.fixture
def patch() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(100, 230, (8, 8, 1)) * (1, 0.7, 0.9), np.ones((8, 8, 1)))
    return np.clip(smooth + rng.normal(0, 4, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", list(SHIFTS))
def test_shift_grows_with_its_strength_and_starts_at_nothing(kind, patch):
    _, nothing, _, strengths = SHIFTS[kind]
    change = lambda s: np.abs(shift(patch, kind, s).astype(float) - patch).mean()  # noqa: E731
    above = sorted(s for s in strengths if s > nothing)
    below = sorted((s for s in strengths if s < nothing), reverse=True)
    assert change(nothing) < 3 if kind == "jpeg" else change(nothing) == 0
    for side in (above, below):
        changes = [change(s) for s in side]
        assert all(c > 0.3 for c in changes) and changes == sorted(changes)
    out = shift(patch, kind, strengths[-1])
    assert out.shape == patch.shape and out.dtype == np.uint8


def test_stain_shift_moves_the_stain_it_names():
    """A pixel of pure haematoxylin gets darker with s, one of pure eosin lighter; white stays white."""
    pure = (256 * np.exp(-0.8 * STAINS[:2]) - 1).round().astype(np.uint8)
    image = np.stack([pure[0], pure[1], [255, 255, 255]])[None].astype(np.uint8)
    out = shift(image, "stain", 0.3)[0].astype(int)
    density = lambda pixel: -np.log((pixel + 1) / 256)  # noqa: E731
    assert density(out[0]) == pytest.approx(1.3 * density(pure[0].astype(int)), abs=0.03)
    assert density(out[1]) == pytest.approx(density(pure[1].astype(int)) / 1.3, abs=0.03)
    assert (out[2] == 255).all()


def test_scale_shows_the_middle_enlarged_or_the_whole_shrunk(patch):
    assert np.abs(shift(patch, "scale", 2)[::2, ::2].astype(int) - patch[16:48, 16:48]).mean() < 12
    half = shift(patch, "scale", 0.5)
    assert np.abs(half[16:48, 16:48].astype(int) - patch[::2, ::2]).mean() < 12
    assert (half[15, 16:48] == half[16, 16:48]).all()  # mirrored at the edge


def test_displacement():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 8))
    same = displacement(base, 3 * base)
    assert same["cosine"] == pytest.approx(1) and same["first"] == 1 and same["rank"] == 1
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    other = displacement(base, np.roll(base, 1, 0))
    assert other["first"] == 0 and other["distance"] == pytest.approx(1, abs=0.15)
    assert (
        displacement(np.ones((9, 4)), np.ones((9, 4)))["first"] == 0
    )  # all alike: nothing known again
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    similar = unit @ unit.T
    assert same["others"] == pytest.approx(similar[~np.eye(50, dtype=bool)].mean())
    ranks = [
        1 + np.sum(similar[i - 1] > similar[i - 1, i]) - 1 for i in range(50)
    ]  # itself is no rival of its image
    assert other["rank"] == pytest.approx(np.median([r + 1 for r in ranks]), abs=1)


# ---- the command


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three tissues (stripes, dots, plain) from three centres (tints), three patients each: 108 images of 32 px."""
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
    """robustness.main in this process: status, stdout, stderr."""
    status = robustness.main([str(a) for a in args])
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


def test_command_from_images_to_table_and_pictures(folder, capsys):
    results = folder.parent / "results"
    arguments = (*MODELS, "--benchmark", folder, "--results", results, "--per-class", 18)
    status, out, _ = call(capsys, *arguments)
    assert status == 0 and "index / chance" in out and "table3.md" in out
    text = (results / "table3.md").read_text()
    assert (
        "*chance*" in text and "6 of 12" in text and "paper" not in text
    )  # whose numbers are TIGER's
    assert (
        "neighbours of the same group excluded" in text and "same slide" not in text
    )  # no column slide
    assert "54 drawn: dots 18, plain 18, stripes 18" in text
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
        (k, s) for k in KS for s in range(5)
    }
    features = next(results.rglob("mine.safetensors")).stat().st_mtime_ns
    status, _, err = call(capsys, *arguments, "--no-pictures")  # features and numbers stay
    assert status == 0 and "108 images" not in err
    assert (results / "table3.md").read_text() == re.sub(r"### Pictures\n\n(!\[.*\n\n)+", "", text)
    assert next(results.rglob("mine.safetensors")).stat().st_mtime_ns == features


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


@pytest.fixture
def fake(monkeypatch):
    """Models whose features are planted: `tissue`, `place`, and `run`, a student distilled on patient-0."""

    def features(name, benchmark, results, **_):
        by = codes(benchmark.centers if name == "place" else benchmark.labels)
        x = planted(by, 0.5, seed=len(name))
        return np.where(np.array(benchmark.ids)[:, None] == "broken", np.nan, x)

    monkeypatch.setattr("robustness.features", features)
    monkeypatch.setattr(
        "robustness.card",
        lambda name, results, **_: {
            "metadata": {"teacher": "h-optimus-0", "student": "hibou-l", "patients": ["patient-0"]}
            if name == "run"
            else {}
        },
    )


def test_reading_is_honest(folder, fake, capsys):
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
        and "108 drawn: dots 36, plain 36, stripes 36" in out
    )


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
                18,
                *more,
            )[0]
            == 0
        )
        sections = (folder.parent / "r" / "table3.md").read_text().split("## mine")[1:]
        assert ["](robustness/mine/map.png)" in section for section in sections] == expected


def test_the_map_says_what_its_patches_are(folder, fake, monkeypatch, capsys):
    titles = []
    monkeypatch.setattr("robustness.draw_map", lambda path, title, *_: titles.append(title))
    for name in ("draw_index", "draw_misled"):
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
    assert re.fullmatch(r"mine: the \d\d patches drawn in 5 samples", titles[0])
    assert titles[1] == "mine: the 108 patches drawn in 1 sample"


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
    """On TIGER a model of the paper has the paper's number in its cell; only patches that were drawn get features."""
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
    assert "(paper 1.09)" in out and "cells are empty" in text
    assert "## The paper's Table 3" in text and "2.0316" in text and "same slide excluded" in text
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
    assert none[0] == 1 and "--models: none named and none at hand" in none[2]
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
            "--exclude-seen leaves nothing",
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


def test_under_torchrun_the_numbers_are_the_same(folder, capsys):
    alone, two = folder.parent / "alone", folder.parent / "two"
    arguments = (
        "--models",
        "timm:test_resnet",
        *MODELS[3:],
        "--benchmark",
        folder,
        "--no-pictures",
        "--per-class",
        18,
    )
    assert call(capsys, *arguments, "--results", alone)[0] == 0
    done = torchrun(2, "robustness.py", *arguments, "--results", two)
    assert done.returncode == 0, done.stderr
    one, other = (
        {
            (
                r["model"],
                r["metric"],
                r.get("k"),
                r.get("seed"),
                r.get("class"),
                r.get("center"),
            ): r["value"]
            for r in read_metrics(results)
        }
        for results in (alone, two)
    )
    assert one.keys() == other.keys() and len(one) > 100
    assert [one[key] for key in one] == pytest.approx(
        [other[key] for key in one], rel=1e-3, nan_ok=True
    )


def test_a_rank_leaves_the_job_when_it_is_done(folder, capsys, one_rank):
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
            18,
            "--results",
            folder.parent / "one",
        )[0]
        == 0
    )

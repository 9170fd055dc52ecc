"""g2l.robust: the index by hand and by independent code; chance, probes, bootstrap, sampling."""

import math

import numpy as np
import pytest
from centres import planted
from sklearn.neighbors import NearestNeighbors

import g2l.robust
from g2l.robust import (
    KS,
    bootstrap,
    bounded_of,
    candidates,
    chance,
    deciding,
    draw_sample,
    index_of,
    intervals,
    measure,
    neighbors,
    tally,
    target_probe,
)


def cohort(classes: int = 4, centers: int = 3, slides: int = 3, patches: int = 4):
    """labels, centers, slides of a balanced cohort: every slide of one centre and with all classes,
    (n,) each.
    """
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
            if j != i and slides[j] != slides[i]
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
    distances, rows = neighbors(x, 2, np.arange(5), normalize=False)
    assert rows.tolist() == [[1, 2], [0, 2], [1, 3], [2, 4], [3, 2]]
    assert distances[0] == pytest.approx([1.0, 2.2])
    counts = tally(rows, labels, centers)
    # first neighbours: 0-1 SO, 1-0 SO, 2-1 OO, 3-2 OS, 4-3 OO;
    # second: 0-2 OS, 1-2 OO, 2-3 OS, 3-4 OO, 4-2 SO
    assert counts[:, :, 0].sum(1).tolist() == [0, 2, 1, 2]
    assert counts[:, :, 1].sum(1).tolist() == [0, 3, 3, 4]
    assert index_of(counts.sum(1)).tolist() == [2.0, 1.0]
    assert bounded_of(counts.sum(1)) == pytest.approx([2 / 3, 0.5])


def test_ratio_of_totals_not_mean_of_ratios():
    """A query whose neighbours never share its centre has no ratio of its own, but its counts are
    in the totals.
    """
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
    near = slides if exclude else np.arange(len(labels))
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
    """One slide holds nearly everything: most patches have a single candidate, and the index uses
    what there is.
    """
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
    for near in (slides, np.arange(40)):
        pool = candidates(labels, centers, near)
        for i in range(40):
            others = [j for j in range(40) if j != i and near[j] != near[i]]
            kinds = [(labels[j] == labels[i], centers[j] == centers[i]) for j in others]
            expected = [
                kinds.count(kind)
                for kind in ((True, True), (True, False), (False, True), (False, False))
            ]
            assert pool[:, i].tolist() == expected


@pytest.mark.parametrize(("per_center", "expected"), [(True, 4.2), (False, 4.6)])
def test_chance_level_of_the_papers_design(per_center, expected):
    """40 per cell of 5 classes x 21 centres, and 40 per class in total, each patch a slide of its
    own.
    """
    labels = np.repeat(np.arange(5), 840 if per_center else 40)
    centers = np.arange(len(labels)) % 21
    total = chance(candidates(labels, centers, np.arange(len(labels))), 20).sum(1)
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


def test_a_centre_of_one_slide_cannot_be_found_and_is_not_asked_for():
    labels, centers, slides = cohort(4, 3, 3, 4)
    keep = (centers != 2) | (slides == 8)  # of the last centre one slide is left
    labels, centers, slides = labels[keep], centers[keep], slides[keep]
    assert measure(planted(centers), labels, centers, slides, slides)[1]["knn_center", 5] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patients", "per", "centres", "by_patient"),
    [(16, 12, 4, False), (8, 12, 2, False), (6, 12, 3, False), (8, 12, 2, True)],
)
def test_chance_of_votes_and_probes_is_that_of_features_that_know_nothing(
    patients, per, centres, by_patient
):
    """With the own patient left out, blind features find the centre less often than 1 in its
    number.
    """
    groups = np.repeat(np.arange(patients), per)
    centers = groups % centres
    blind, noise = [], []
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        labels = (groups // centres) % 2 if by_patient else rng.integers(0, 2, len(groups))
        x = rng.normal(size=(len(groups), 48)).astype(np.float32)
        who = (labels, centers, groups, groups)
        noise.append(measure(x, *who, seed=seed, k_max=10)[1])
        blind.append(measure(None, *who, seed=seed, k_max=10)[1])
    for key in (("knn_center", 10), ("knn_class", 10), ("probe_class", None)):
        told, found = (np.mean([values[key] for values in draws]) for draws in (blind, noise))
        assert told == pytest.approx(found, abs=0.09), key
    assert np.mean([values["knn_center", 10] for values in blind]) < 0.9 / centres


def test_share_of_patches_that_can_decide():
    labels, centers, slides = cohort(4, 3, 3, 4)
    assert deciding(labels, centers, slides) == 1
    assert deciding(centers, centers, slides) == 0  # each centre holds one class
    assert deciding(
        np.where(centers == 0, labels, 3), centers, np.arange(len(labels))
    ) == pytest.approx(1 / 12)


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
    monkeypatch.setattr("g2l.protocols.RESAMPLES", 40)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 5)
    one, two = rng.integers(1, 9, (2, 4, 30, 3))
    whole, *draws = bootstrap([one], [groups])
    assert whole == pytest.approx(index_of(one.sum(1)))
    weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 40)
    for draw, weight in zip(draws, weights, strict=True):
        rows = np.concatenate(
            [np.flatnonzero(groups == g) for g in range(6) for _ in range(weight[g])]
        )
        assert draw == pytest.approx(index_of(one[:, rows].sum(1)))
    both = bootstrap([one], [groups]) + bootstrap([two], [groups])
    assert bootstrap([one, two], [groups, groups]) == pytest.approx(both / 2)
    assert (bootstrap([one], [groups])[1:] == draws).all()


def test_intervals_tell_a_real_difference_from_none():
    labels, centers, slides = cohort(5, 4, 4, 4)
    counts = {"chance": [measure(None, labels, centers, slides, slides)[0]]}
    for name, x in {
        "tissue": planted(labels),
        "also": planted(labels, seed=3),
        "place": planted(centers),
    }.items():
        counts[name] = [measure(x, labels, centers, slides, slides)[0]]
    rows = {(r["model"], r["other"], r["k"]): r for r in intervals(counts, [slides])}
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
    rows = intervals(counts, [slides % 5])
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

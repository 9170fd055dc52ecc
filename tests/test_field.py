"""Further protocols against scikit-learn and plain numpy."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from g2l.field import DRAWS, PROTOCOLS, SHOTS, Given, agreement, calibration, curve, few_shot
from g2l.field import retrieval as retrieve
from g2l.probe import linear_probe
from g2l.protocols import nearest, split, vote


def given(n=240, classes=3, patients=30, signal=1.5, seed=0) -> Given:
    """Features with some signal for the class and some for the patient."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(patients, size=n)
    labels = rng.integers(classes, size=n)
    centres = rng.normal(size=(classes, 12)) * signal
    own = rng.normal(size=(patients, 12))
    x = (centres[labels] + own[groups] + rng.normal(size=(n, 12))).astype(np.float32)
    fold = split(labels, groups, 10)
    neighbors, distances = nearest(x, fold, 15)
    votes = np.where(neighbors < 0, -1, labels[neighbors])
    guess = vote(votes, distances, classes)
    scores = [probe[0] for probe in linear_probe(x, labels, fold, classes, 2)]
    return Given(x, labels, groups, fold, guess, votes, distances, scores, classes, "cpu")


@pytest.fixture(scope="module")
def some():
    return given()


def values(rows: list[dict], metric: str, **about) -> list[float]:
    wanted = {"metric": metric, **about}
    return [row["value"] for row in rows if wanted.items() <= row.items()]


def test_few_shot_is_the_nearest_centroid_of_scikit_learn_and_no_patient_is_on_both_sides(some):
    rows = few_shot(some)
    assert len(rows) == DRAWS * len(SHOTS)
    for draw in range(5):
        rng = np.random.default_rng(draw)
        support = rng.permutation(10)[some.fold] < 5
        assert not set(some.groups[support]) & set(some.groups[~support])
        order = rng.permutation(np.flatnonzero(support))
        for shots in SHOTS:
            chosen = np.concatenate([order[some.labels[order] == c][:shots] for c in range(3)])
            middle = some.x[chosen].mean(0)
            model = NearestCentroid().fit(normalize(some.x[chosen] - middle), some.labels[chosen])
            said = model.predict(normalize(some.x[~support] - middle))
            table = confusion_matrix(some.labels[~support], said, normalize="true")
            got = values(rows, f"{shots} a class", draw=draw)
            assert got == [pytest.approx(np.diag(table).mean(), abs=0.02)]
    means = [np.mean(values(rows, f"{shots} a class")) for shots in SHOTS]
    assert means == sorted(means) and means[-1] > 0.6


def test_retrieval_is_counted_over_other_patients(some):
    x = normalize(some.x.astype(np.float64))
    similar = x @ x.T
    similar[some.groups[:, None] == some.groups] = -np.inf
    order = np.argsort(-similar, axis=1)[:, :5]
    hit = some.labels[order] == some.labels[:, None]
    rows = retrieve(some)
    for k in (1, 3, 5):
        assert values(rows, f"top-{k}") == [pytest.approx(hit[:, :k].any(1).mean())]
    each = []
    for line in hit:
        ranks = np.flatnonzero(line) + 1
        each.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0)
    assert values(rows, "mAP@5") == [pytest.approx(np.mean(each))]


def test_agreement_follows_from_the_confusion_matrix(some):
    rows = agreement(some)
    table = confusion_matrix(some.labels, some.guess).astype(float)
    f1 = 2 * np.diag(table) / (table.sum(0) + table.sum(1))
    assert values(rows, "macro F1", protocol="knn") == [pytest.approx(f1.mean())]
    far = np.subtract.outer(np.arange(3), np.arange(3)) ** 2
    blind = np.outer(table.sum(1), table.sum(0)) / table.sum()
    kappa = 1 - (far * table).sum() / (far * blind).sum()
    assert values(rows, "quadratic kappa", protocol="knn") == [pytest.approx(kappa)]
    assert len(values(rows, "macro F1", protocol="probe")) == 2


def test_calibration_of_known_probabilities():
    rng = np.random.default_rng(0)
    n = 30_000
    sure = rng.uniform(0.5, 1, n)
    labels = (rng.random(n) < sure).astype(int)
    known = given(40, 2, 10)
    honest = np.stack([1 - sure, sure], 1)
    boastful = np.where(honest > 0.5, 1.0, 0.0)
    known.labels, known.scores, known.classes = labels, [honest, boastful], 2
    rows = calibration(known)
    assert values(rows, "ECE", seed=0)[0] < 0.02
    assert values(rows, "ECE", seed=1) == [pytest.approx(0.25, abs=0.01)]
    assert values(rows, "Brier score", seed=0) == [pytest.approx(2 * (1 / 6), abs=0.01)]
    assert values(rows, "Brier score", seed=1) == [pytest.approx(2 * 0.25, abs=0.02)]


def test_the_curve_ends_at_the_k_that_was_asked_for(some):
    rows = curve(some)
    assert [row["metric"] for row in rows] == ["k = 1", "k = 3", "k = 5", "k = 11", "k = 15"]
    assert rows[-1]["value"] == pytest.approx((some.guess == some.labels).mean())


def test_features_that_know_nothing_score_by_chance():
    blind = given(signal=0)
    blind.x = np.random.default_rng(1).normal(size=(240, 8)).astype(np.float32)
    rows = PROTOCOLS["few-shot"](blind)
    assert np.mean(values(rows, "16 a class")) == pytest.approx(1 / 3, abs=0.05)


def test_few_shots_that_the_data_do_not_allow_are_left_out():
    few = given(40, 2, 10)
    metrics = {row["metric"] for row in few_shot(few)}
    assert "1 a class" in metrics and "16 a class" not in metrics

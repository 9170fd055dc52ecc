"""PathoROB's other measures: planted shortcuts, croma's reduction, scikit-learn's clusters."""

import numpy as np
import pytest
from centres import planted

from g2l.pathorob import BIAS, LEAST, biased, clustering_scores, drop_of, probes, quartets
from g2l.pathorob import shortcut_rows as rows_of


def cohort(classes: int = 3, centers: int = 2, patients: int = 6, patches: int = 6):
    """Class, centre and patient of a cohort whose every patient has all classes, (n,) each."""
    patient = np.repeat(np.arange(centers * patients), classes * patches)
    label = np.tile(np.repeat(np.arange(classes), patches), centers * patients)
    return label, patient // patients, patient


def both(who, place: float, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """Features that hold the class, and `place` times as strongly the centre."""
    label, center, _ = who
    x = planted(label, 0, seed=seed) + place * planted(center, 0, seed=seed + 1)
    return x + noise * np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)


def values(rows, metric):
    return [row["value"] for row in rows if row["metric"] == metric]


def test_quartets_are_two_classes_in_two_centres_each_with_patients_enough():
    label, center, patient = cohort(3, 3)
    few = (label == 0) & (center == 1) & (patient != 6)  # one patient left in a cell
    found = list(quartets(label[~few], center[~few], patient[~few]))
    assert len(found) == 9 - 4  # those without that cell
    for cells in found:
        kinds = [np.unique(np.stack([label[~few][c], center[~few][c]]), axis=1) for c in cells]
        (a, u), (b, v), (c, w), (d, z) = (kind.ravel() for kind in kinds)
        assert a == b != c == d and u == w != v == z
        assert min(map(len, cells)) >= LEAST


@pytest.mark.parametrize("bias", BIAS)
def test_bias_changes_what_goes_together_and_not_how_much_there_is(bias):
    pools = [np.arange(40) + 100 * i for i in range(4)]
    rows = biased(pools, bias)
    both_first, first_second, second_first, both_second = np.bincount(rows // 100, minlength=4)
    assert len(rows) == 80 and both_first == both_second and first_second == second_first
    assert (both_first - first_second) / 40 == bias


@pytest.mark.slow
def test_a_centre_in_the_features_costs_a_probe_and_attracts_clusters():
    who = cohort()
    robust, led, blind = both(who, 0), both(who, 4), np.random.default_rng(0).normal(size=(216, 16))
    good, bad, none = ([*rows_of(x, who)] for x in (robust, led, blind))
    assert values(good, "balanced")[0] > 0.9 and values(bad, "balanced")[0] > 0.9
    assert values(good, "drop")[0] == pytest.approx(0, abs=0.03)
    assert values(bad, "drop")[0] < -0.1 and values(bad, "confounded")[0] < 0.75
    assert values(none, "balanced") + values(none, "confounded") == pytest.approx(
        [0.5] * 2, abs=0.1
    )
    assert values(none, "drop")[0] == pytest.approx(0, abs=0.15)
    assert np.mean(values(good, "clusters")) > 0.8
    assert np.mean(values(bad, "clusters")) < -0.8
    assert np.mean(values(none, "clusters")) == pytest.approx(0, abs=0.05)
    (row,) = [row for row in bad if row["metric"] == "drop"]
    assert row["low"] < row["value"] < row["high"] < 0


def test_the_drop_is_cromas():
    croma = pytest.importorskip("croma")
    accuracies = probes(both(cohort(), 4), *cohort())
    assert accuracies.shape == (6, 1001, 5)  # three quartets, two halves each
    assert drop_of(accuracies)[0] == pytest.approx(croma.apd(accuracies[:, 0].T.filled()))
    assert drop_of(accuracies)[7] == pytest.approx(croma.apd(accuracies[:, 7].T.filled()))


def test_no_patient_is_trained_on_and_judged_and_resampling_is_by_patient(monkeypatch):
    trained, judged = [], []

    class Spy:
        def fit(self, x, y):
            trained.append(set(x[:, 0]))
            return self

        def predict(self, x):
            judged.append(set(x[:, 0]))
            return (x[:, 0] % 3 > 0).astype(int)

    monkeypatch.setattr("g2l.pathorob.ridge", Spy)
    label, center, patient = cohort(2)
    accuracies = probes(patient[:, None].astype(np.float32), label, center, patient)
    assert len(trained) == 2 * len(BIAS)
    for seen, unseen in zip(trained, judged, strict=True):
        assert not seen & unseen
    times = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 1000)[4]
    side = np.array(sorted(judged[0]), int)
    mine = np.concatenate([[p] * times[p] for p in side]).astype(int)
    cells = []
    for place in (0, 1):
        here = mine[mine // 6 == place]
        cells += [np.mean(here % 3 == 0), np.mean(here % 3 > 0)]
    assert accuracies[0, 5, 0] == pytest.approx(np.mean(cells))


def test_too_few_patches_say_nothing():
    who = cohort(patches=1)
    assert not list(rows_of(both(who, 1), who))
    assert clustering_scores(both(who, 1), *who) == []

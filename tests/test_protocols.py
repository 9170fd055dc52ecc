"""The protocols of evaluate.py against independent implementations: scikit-learn, and formulas written out in fp64."""

import argparse

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import evaluate
import g2l.protocols
from g2l.benchmarks import Benchmark, leaked
from g2l.errors import UserError
from g2l.protocols import (
    auc,
    cka_rows,
    knn_predict,
    linear_probe,
    macro_auc,
    paired,
    recall,
    six_two_two,
    vote,
)
from g2l.report import families, means, ranked, verdict, with_interval
from g2l.results import load_predictions, read_metrics, record, save_predictions


def cloud(n=240, width=24, classes=3, groups=24, spread=1.6, seed=0):
    """Features, labels and groups: classes as clouds, groups with an offset of their own."""
    rng = np.random.default_rng(seed)
    group = rng.integers(groups, size=n)
    labels = rng.integers(classes, size=n)
    x = spread * rng.normal(size=(classes, width))[labels] + rng.normal(size=(groups, width))[group]
    return (x + rng.normal(size=(n, width))).astype(np.float32), labels, [f"p{g}" for g in group]


def test_split_keeps_groups_whole_and_classes_balanced():
    _, labels, groups = cloud()
    fold = g2l.protocols.split(labels, groups, 10)
    assert sorted(set(fold)) == list(range(10))
    for group in set(groups):
        assert len({f for f, g in zip(fold, groups, strict=True) if g == group}) == 1
    loose = g2l.protocols.split(labels, groups, 10, grouped=False)
    assert any(
        len({f for f, g in zip(loose, groups, strict=True) if g == group}) > 1
        for group in set(groups)
    )
    assert np.ptp(np.bincount(loose)) <= 3


def test_split_takes_fewer_folds_than_groups_and_refuses_one_group():
    labels = np.array([0, 1] * 6)
    assert g2l.protocols.split(labels, ["a"] * 4 + ["b"] * 4 + ["c"] * 4, 10).max() == 2
    with pytest.raises(UserError, match="two patients"):
        g2l.protocols.split(labels, ["a"] * 12, 10)


@pytest.mark.parametrize(
    "width", [24, 400], ids=["more rows than columns", "more columns than rows"]
)
def test_knn_equals_scikit_learn_on_the_same_folds(width):
    x, labels, groups = cloud(width=width)
    x += 30 * np.linspace(-1, 1, width, dtype=np.float32)  # far from the origin: centring matters
    fold = g2l.protocols.split(labels, groups, 6)
    predicted, neighbors = knn_predict(x, labels, fold, 3, k=15, dims=20)
    for f in range(6):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        pca = PCA(20, svd_solver="full").fit(x[train].astype(np.float64))
        model = KNeighborsClassifier(15, algorithm="brute").fit(
            pca.transform(x[train]), labels[train]
        )
        index = model.kneighbors(pca.transform(x[test]), return_distance=False)
        assert (
            np.mean(np.sort(train[index]) == np.sort(neighbors[test])) > 0.999
        )  # fp32 against fp64
        votes = (labels[train[index]][:, :, None] == np.arange(3)).sum(1)
        clear = (votes == votes.max(1, keepdims=True)).sum(
            1
        ) == 1  # scikit-learn breaks ties by label, we by distance
        assert clear.mean() > 0.7
        assert np.array_equal(model.predict(pca.transform(x[test]))[clear], predicted[test][clear])


def test_pca_on_everything_is_one_search_with_the_same_masks():
    x, labels, groups = cloud()
    fold = g2l.protocols.split(labels, groups, 5)
    predicted, neighbors = knn_predict(x, labels, fold, 3, k=9, dims=10, pca="all")
    z = PCA(10, svd_solver="full").fit_transform(x.astype(np.float64))
    for i in range(0, len(x), 17):
        d = np.where(fold == fold[i], np.inf, ((z - z[i]) ** 2).sum(1))
        assert set(np.argsort(d)[:9]) == set(neighbors[i])
    assert (fold[neighbors] != fold[:, None]).all()
    assert (predicted == labels).mean() > 0.6


def test_vote_breaks_ties_by_distance_then_by_label():
    neighbors = np.array([[2, 2, 1, 1], [1, 1, 2, 2], [0, 1, -1, -1]])
    near = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], [0.3, 0.3, np.inf, np.inf]])
    assert vote(neighbors, near, 3).tolist() == [2, 1, 0]


def test_auc_equals_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 12, 200) / 11, rng.random(200) < 0.3
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert np.allclose(auc(scores, positive, weights), expected, atol=1e-12)
    p = rng.dirichlet(np.ones(4), 300)
    y = rng.integers(4, size=300)
    assert np.isclose(
        macro_auc(p, y)[0],
        roc_auc_score(y, p, multi_class="ovr", average="macro"),
        atol=1e-12,
    )
    assert np.isclose(macro_auc(p[:, :2], y % 2)[0], roc_auc_score(y % 2, p[:, 1]), atol=1e-12)


def test_macro_auc_leaves_out_classes_that_are_not_there():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    y = np.arange(50) % 2
    expected = np.mean([roc_auc_score(y == c, p[:, c]) for c in (0, 1)])
    assert np.isclose(macro_auc(p, y)[0], expected)
    assert np.isnan(macro_auc(p, np.zeros(50, int))[0])


@pytest.mark.parametrize(
    "width", [24, 400], ids=["more rows than columns", "more columns than rows"]
)
def test_probe_is_logistic_regression_on_a_grouped_split(width):
    x, labels, groups = cloud(width=width)
    found = linear_probe(x, labels, groups, 3, seed=1)
    train, valid, test = six_two_two(labels, groups, seed=1)
    assert (
        np.array_equal(found["test"], np.flatnonzero(test))
        and (train + 2 * valid + 4 * test).max() == 4
    )
    assert not {g for g, t in zip(groups, train, strict=True) if t} & {
        groups[i] for i in found["test"]
    }
    z = (x - x[train].mean(0)) / x[train].std(0)
    plain = LogisticRegression(C=found["C"], max_iter=5000, tol=1e-6).fit(z[train], labels[train])
    assert np.allclose(plain.predict_proba(z[test]), found["scores"], atol=2e-3)
    expected = roc_auc_score(labels[test], plain.predict_proba(z[test]), multi_class="ovr")
    assert abs(macro_auc(found["scores"], labels[found["test"]])[0] - expected) < 2e-3


def test_seeds_of_the_probe_are_different_splits():
    """Of groups that differ in size scikit-learn makes nearly the same folds whatever its seed."""
    _, labels, groups = cloud(n=400, groups=20)
    parts = [six_two_two(labels, groups, seed) for seed in range(5)]
    tested = [frozenset(np.array(groups)[test]) for _, _, test in parts]
    assert len(set(tested)) == 5 and len(frozenset.union(*tested)) > 10
    for split in parts:
        assert [
            abs(p.mean() - share) < 0.1 for p, share in zip(split, (0.6, 0.2, 0.2), strict=True)
        ] == [True] * 3
        assert sum(split).tolist() == [1] * 400
        assert not frozenset(np.array(groups)[split[2]]) & frozenset(np.array(groups)[~split[2]])


def test_probe_names_classes_and_does_not_only_rank_them():
    """C chosen by AUC may rank perfectly and still call everything the majority class."""
    labels = np.arange(120) % 3 // 2  # two thirds are of class 0
    x = (4.0 * labels + np.random.default_rng(0).normal(size=(16, 120))).T.astype(np.float32)
    found = linear_probe(x, labels, [f"p{i // 3}" for i in range(120)], 2, seed=0)
    assert macro_auc(found["scores"], labels[found["test"]])[0] == 1
    assert recall(found["scores"].argmax(1), labels[found["test"]]) == 1


def test_majority_baseline_is_the_share_of_the_most_common_class():
    """Not that of the training folds: grouped folds of balanced classes would give it nothing at all."""
    x, labels, groups = cloud(n=160, classes=8, groups=8)
    labels = np.array(
        [int(g[1:]) for g in groups]
    )  # a class is a group: each fold's class is not in training
    b = Benchmark("b", "patch", [], [str(i) for i in range(160)], labels, list("abcdefgh"), groups)
    args = argparse.Namespace(k=5, pca_dims=8, pca="fold", folds=8, seeds=1, paper_splits=False)
    _, rows = evaluate.predict(b, x, args, "cpu")
    assert np.mean([r["value"] for r in rows if r["metric"] == "majority"]) == pytest.approx(1 / 8)


def test_probe_says_none_where_groups_do_not_allow_it():
    x, labels, groups = cloud(groups=4)
    assert linear_probe(x, labels, groups, 3, seed=0) is None


def hsic(k, m, unbiased):
    """HSIC of two Gram matrices written out (Song et al. 2012; Gretton et al. 2005)."""
    n = len(k)
    if not unbiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def test_cka_equals_the_formula_and_its_floor_is_chance():
    x, _, groups = cloud(width=30)
    mix = np.random.default_rng(1).normal(size=(30, 20)).astype(np.float32)
    noise = np.random.default_rng(2).normal(size=(240, 40)).astype(np.float32)
    x = {"t": x, "s": np.tanh(x @ mix / 4), "noise": noise}
    rows = cka_rows(x, groups, "t", "cpu")
    value = {(r["model"], r["other"], r["metric"]): r["value"] for r in rows}
    gram = {name: (f.astype(np.float64) - f.mean(0, dtype=np.float64)) for name, f in x.items()}
    gram = {name: f @ f.T for name, f in gram.items()}
    for a, b in [("s", "t"), ("noise", "t"), ("s", "noise")]:
        for metric in ("unbiased", "biased"):
            u = metric == "unbiased"
            expected = hsic(gram[a], gram[b], u) / np.sqrt(
                hsic(gram[a], gram[a], u) * hsic(gram[b], gram[b], u)
            )
            assert abs(value[a, b, metric] - expected) < 1e-4
    assert abs(value["noise", "t", "unbiased"]) < 0.05 < value["noise", "t", "floor"] < 0.3
    assert abs(value["noise", "t", "biased"] - value["noise", "t", "floor"]) < 0.05
    assert 0 < value["s", "t", "se"] < 0.2
    gain = [r for r in cka_rows(x, groups, "t", "cpu", "noise") if r["protocol"] == "paired"]
    assert [(r["model"], r["other"]) for r in gain] == [("s", "noise")] and gain[0]["low"] > 0
    assert gain[0]["value"] == pytest.approx(
        value["s", "t", "unbiased"] - value["noise", "t", "unbiased"]
    )


def test_cka_has_no_standard_error_where_one_group_is_nearly_everything():
    x = {
        n: np.random.default_rng(i).normal(size=(20, 6)).astype(np.float32)
        for i, n in enumerate("tsb")
    }
    rows = cka_rows(x, ["p"] * 18 + ["q"] * 2, "t", "cpu", "b")
    assert {r["metric"] for r in rows} == {"unbiased", "biased", "floor"}


def test_paired_bootstrap_sees_a_real_difference_and_no_difference():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(2, size=600), [f"p{i % 30}" for i in range(600)]
    good = np.where(rng.random(600) < 0.9, labels, 1 - labels)
    bad = np.where(rng.random(600) < 0.7, labels, 1 - labels)
    other = np.where(rng.random(600) < 0.9, labels, 1 - labels)
    score = lambda strength: [
        {
            "seed": 0,
            "test": np.arange(0, 600, 2),
            "C": 1.0,
            "scores": np.stack(  # noqa: E731
                [np.zeros(300), strength * labels[::2] + np.random.default_rng(1).normal(size=300)],
                1,
            ),
        }
    ]
    a, b, c = ({"knn": g, "probe": score(s)} for g, s in ((good, 3), (bad, 1), (other, 3)))
    clear = paired(a, b, labels, groups)
    assert clear["knn"][0] == pytest.approx((good == labels).mean() - (bad == labels).mean())
    assert 0 < clear["knn"][1] < clear["knn"][0] < clear["knn"][2]
    expected = np.subtract(
        *[roc_auc_score(labels[::2], p["probe"][0]["scores"][:, 1]) for p in (a, b)]
    )
    assert clear["probe"][0] == pytest.approx(expected) and clear["probe"][1] > 0
    low, high = paired(a, c, labels, groups)["knn"][1:]
    assert low < 0 < high
    assert verdict({"low": low, "high": high}) == "within noise"
    assert paired(a, a, labels, groups)["probe"] == (0.0, 0.0, 0.0)


def test_paired_gives_no_interval_for_a_handful_of_groups():
    """All resamplings of one tested group agree: that is no certainty."""
    labels = np.arange(40) % 2
    guess = lambda wrong: {"knn": np.where(np.arange(40) < wrong, 1 - labels, labels), "probe": []}  # noqa: E731
    for n, known in ((5, False), (10, True)):
        value, low, high = paired(guess(0), guess(12), labels, [f"p{i % n}" for i in range(40)])[
            "knn"
        ]
        assert value == pytest.approx(0.3) and np.isfinite(low) == np.isfinite(high) == known
    row = {"value": 0.3, "low": None, "high": None}
    assert verdict(row) == "too few groups to tell" and with_interval(row) == "+0.300"


def test_leaked_patients_are_found_by_group_and_by_barcode():
    b = Benchmark(
        "b",
        "patch",
        [],
        ["x/TCGA-AA-1234-01Z.png", "q.png", "r.png"],
        np.zeros(3, int),
        ["a"],
        ["slide 1", "TCGA-BB-0001-01Z-00-DX1", "p7"],
    )
    about = {"metadata": {"patients": ["TCGA-AA-1234", "TCGA-BB-0001", "p77"]}}
    assert leaked(b, about).tolist() == [True, True, False]
    assert not leaked(b, {"metadata": {}}).any()


@pytest.mark.parametrize(
    ("image", "group", "found"),
    [
        ("a.png", "case_001", True),  # the group is a slide
        ("a.png", "Case_001.svs", True),
        ("a.png", "P07_left", True),  # of a patient
        ("tiles/CASE_001.png", "x", True),  # so is the image, or its folder
        ("case_001/12.png", "x", True),
        ("p07_x12_y40.png", "x", True),
        ("a.png", "7", True),  # a group is a patient, whatever its name
        ("7.png", "x", False),  # a number of an image is not
        ("7_1.png", "x", False),
        ("tumour/tumour.png", "x", False),
        ("a.png", "case_002", False),
        ("", "", False),
    ],
)
def test_leaked_slides_are_found_by_group_and_by_name_of_the_image(image, group, found):
    b = Benchmark("b", "patch", [], [image], np.zeros(1, int), ["a"], [group])
    about = {
        "metadata": {
            "patients": ["P07", "7", ""],
            "slides": ["case_001", "P08_right", "7", "tumour", ""],
        }
    }
    assert leaked(b, about).tolist() == [found]
    assert not leaked(b, {"metadata": {"patients": [""]}}).any()


def test_record_replaces_rows_of_the_same_identity_only(tmp_path):
    row = {
        "model": "a",
        "benchmark": "b",
        "protocol": "knn",
        "metric": "accuracy",
        "fold": 0,
        "value": 1.0,
    }
    record(tmp_path, [row, row | {"fold": 1}, row | {"protocol": "cka", "other": "t"}])
    record(tmp_path, [row | {"value": 2.0}])
    assert [r["value"] for r in read_metrics(tmp_path)] == [1.0, 1.0, 2.0]
    record(tmp_path, [row | {"value": 3.0}], same=("model", "benchmark", "protocol"))
    assert [(r["protocol"], r["value"]) for r in read_metrics(tmp_path)] == [
        ("cka", 1.0),
        ("knn", 3.0),
    ]
    record(tmp_path, [row | {"value": float("nan")}])
    assert read_metrics(tmp_path)[-1]["value"] is None
    assert ("knn", "accuracy", "a", "b") not in means(tmp_path)


def test_predictions_survive_a_round_trip_and_know_their_key(tmp_path):
    p = {
        "knn": np.arange(4),
        "neighbors": np.arange(8).reshape(4, 2),
        "probe": [{"seed": 0, "test": np.array([1, 2]), "scores": np.eye(2), "C": 0.1}],
    }
    save_predictions(tmp_path / "p.npz", "k", p)
    back = load_predictions(tmp_path / "p.npz", "k")
    assert np.array_equal(back["neighbors"], p["neighbors"]) and np.array_equal(
        back["probe"][0]["scores"], np.eye(2)
    )
    assert load_predictions(tmp_path / "p.npz", "other") is None
    assert load_predictions(tmp_path / "absent.npz", "k") is None


def test_ranked_marks_best_and_second_and_families_average_magnifications():
    assert ranked([0.5, 0.9, None, 0.7], ["a", "b", "–", "c"]) == [
        "a",
        "**b**",
        "–",
        "<u>c</u>",
    ]
    names = ["idc", "breakhis-binary-40x", "breakhis-binary-100x"]
    assert families(names) == {
        "idc": ["idc"],
        "breakhis-binary (mean of 2)": names[1:],
        names[1]: [names[1]],
        names[2]: [names[2]],
    }

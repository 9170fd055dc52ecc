"""The protocols against independent implementations: scikit-learn, and formulas in fp64."""

import argparse

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import g2l.evaluation as evaluation
import g2l.protocols
from g2l.benchmarks import Benchmark, leaked
from g2l.cohort import hashed
from g2l.errors import UserError
from g2l.features import readable_rows
from g2l.probe import STRENGTHS, linear_probe, logistic_path, six_two_two
from g2l.protocols import (
    auc,
    by_lot,
    cka_rows,
    macro_auc,
    nearest,
    paired,
    recall,
    resampled,
    vote,
)
from g2l.registry import lineage
from g2l.report import families, means, ranked, verdict, with_interval
from g2l.results import load_predictions, read_metrics, record, recorded, save_predictions
from kernels import cka


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
    neighbors, distances = nearest(x, fold, k=15, dims=20)
    predicted = vote(labels[neighbors], distances, 3)
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


def test_pca_on_everything_keeps_neighbours_to_other_folds():
    x, labels, groups = cloud()
    fold = g2l.protocols.split(labels, groups, 5)
    neighbors, distances = nearest(x, fold, k=9, dims=10, pca="all")
    predicted = vote(labels[neighbors], distances, 3)
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


def tenths(labels, groups):
    return g2l.protocols.split(labels, groups, 10)


def probed(scores):
    """Rows of the probe's test part."""
    return np.flatnonzero(np.isfinite(scores[:, 0]))


@pytest.mark.parametrize(
    "width", [24, 400], ids=["more rows than columns", "more columns than rows"]
)
def test_probe_is_logistic_regression_on_a_grouped_split(width):
    x, labels, groups = cloud(width=width)
    fold = tenths(labels, groups)
    scores, c = linear_probe(x, labels, fold, 3, seeds=2)[1]
    train, valid, test = six_two_two(fold, seed=1)
    assert np.array_equal(probed(scores), np.flatnonzero(test))
    assert (train + 2 * valid + 4 * test).max() == 4
    assert not {groups[i] for i in np.flatnonzero(train)} & {groups[i] for i in probed(scores)}
    z = (x - x[train].mean(0)) / x[train].std(0)
    plain = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(z[train], labels[train])
    assert np.allclose(plain.predict_proba(z[test]), scores[test], atol=2e-3)
    expected = roc_auc_score(labels[test], plain.predict_proba(z[test]), multi_class="ovr")
    assert abs(macro_auc(scores[test], labels[test])[0] - expected) < 2e-3


@pytest.mark.parametrize("classes", [2, 3])
def test_every_strength_of_the_probe_reaches_scikit_learns_optimum(classes):
    """Of correlated columns, where plain L-BFGS takes hundreds of steps."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=300)
    x = rng.normal(size=(classes, 30))[labels] + rng.normal(size=(300, 30)) * np.logspace(0, 2, 30)
    z = x @ rng.normal(size=(30, 30)) / 30
    z = (z - z.mean(0)) / z.std(0)
    two = np.stack([np.full(300, True), np.arange(300) % 3 > 0])
    tensors = map(torch.from_numpy, (z, labels, two))
    for c, (said, other) in logistic_path(*tensors, classes):
        plain = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9).fit(z, labels)
        assert np.allclose(said, plain.predict_proba(z), atol=1e-3), c
        part = z[two[1]]
        inside, outside = ((v - part.mean(0)) / part.std(0) for v in (part, z))
        plain.fit(inside, labels[two[1]])
        assert np.allclose(other, plain.predict_proba(outside), atol=1e-3), c


def test_probe_chooses_its_strength_on_the_validation_part():
    """The test part's labels, turned round, change neither the strength nor the scores."""
    x, labels, groups = cloud(n=400, spread=0.5, classes=2)
    fold = tenths(labels, groups)
    [(scores, c)] = linear_probe(x, labels, fold, 2, seeds=1)
    _, valid, test = six_two_two(fold, seed=0)
    turned = np.where(test, 1 - labels, labels)
    [(again, same)] = linear_probe(x, turned, fold, 2, seeds=1)
    assert same == c and np.array_equal(again[test], scores[test])
    turned = np.where(valid, 1 - labels, labels)  # what misleads is to be held back
    assert linear_probe(x, turned, fold, 2, seeds=1)[0][1] == STRENGTHS[0] < c


def test_probe_looks_at_every_strength():
    """Two steps that bring nothing are no reason to stop: first the stain, then the class."""
    rng = np.random.default_rng(7)
    patient = np.repeat(np.arange(24), 12)
    labels = (rng.random(288) < rng.beta(0.6, 0.6, 24)[patient]).astype(int)
    x = rng.normal(size=(288, 96))
    x[:, :84] += (rng.normal(size=(24, 4)) @ rng.normal(size=(4, 84)))[patient]
    x[:, 84:] += 0.35 * (2 * labels[:, None] - 1)
    x = x.astype(np.float32)
    fold = tenths(labels, patient)
    train, valid, _ = six_two_two(fold, 0)
    [(_, chosen)] = linear_probe(x, labels, fold, 2, seeds=1)
    z = (x - x[train].mean(0)) / x[train].std(0)
    losses = []
    for c in STRENGTHS:
        plain = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(z[train], labels[train])
        losses.append(log_loss(labels[valid], plain.predict_proba(z[valid])))
    assert chosen == pytest.approx(STRENGTHS[np.argmin(losses)])


def test_seeds_of_the_probe_are_different_splits():
    """Of groups that differ in size scikit-learn makes nearly the same folds whatever its seed."""
    _, labels, groups = cloud(n=400, groups=20)
    fold = tenths(labels, groups)
    parts = [six_two_two(fold, seed) for seed in range(5)]
    drawn = [frozenset(np.array(groups)[test]) for _, _, test in parts]
    assert len(set(drawn)) == 5 and len(frozenset.union(*drawn)) > 10
    for split in parts:
        for part, share in zip(split, (0.6, 0.2, 0.2), strict=True):
            assert abs(part.mean() - share) < 0.1
        assert sum(split).tolist() == [1] * 400
        assert not frozenset(np.array(groups)[split[2]]) & frozenset(np.array(groups)[~split[2]])


def test_probe_names_classes_and_does_not_only_rank_them():
    """C chosen by AUC may rank perfectly and still call everything the majority class."""
    labels = np.arange(120) % 3 // 2  # two thirds are of class 0
    x = (4.0 * labels + np.random.default_rng(0).normal(size=(16, 120))).T.astype(np.float32)
    fold = tenths(labels, [f"p{i // 3}" for i in range(120)])
    [(scores, _)] = linear_probe(x, labels, fold, 2, seeds=1)
    test = probed(scores)
    assert macro_auc(scores[test], labels[test])[0] == 1
    assert recall(scores[test].argmax(1), labels[test]) == 1


def test_probe_says_none_where_groups_do_not_allow_it():
    x, labels, groups = cloud(groups=4)
    assert linear_probe(x, labels, tenths(labels, groups), 3, seeds=2) == [None, None]


def study(**more):
    """As much of a Study as the protocols need."""
    usual = {"k": 5, "pca_dims": 8, "pca": "fold", "folds": 10, "seeds": 3, "paper_splits": False}
    return argparse.Namespace(device_used="cpu", protocols=(), **usual | more)


def some(labels, groups):
    ids, classes = [str(i) for i in range(len(labels))], [str(c) for c in range(labels.max() + 1)]
    return Benchmark("b", "patch", [], ids, labels, classes, groups)


def test_majority_baseline_is_the_share_of_the_most_common_class():
    """Not that of the training folds: grouped folds of balanced classes would give it nothing."""
    x, labels, groups = cloud(n=160, classes=8, groups=8)
    labels = np.array([int(g[1:]) for g in groups])  # each fold's class is not in training
    b, s = some(labels, groups), study(folds=8)
    _, rows = evaluation.predict(b, x, evaluation.make_folds(b, s), s)
    assert np.mean([r["value"] for r in rows if r["metric"] == "majority"]) == pytest.approx(1 / 8)


def test_neighbours_by_lot_are_different_rows_of_other_folds_and_all_alike():
    fold = np.arange(60) % 3
    rng, seen = np.random.default_rng(0), np.zeros((60, 60))
    for _ in range(300):
        neighbors, _ = by_lot(fold, 5, rng)
        for i, row in enumerate(neighbors):
            assert len(set(row)) == 5
            seen[i, row] += 1
    assert not seen[fold[:, None] == fold].any()
    assert abs(seen[fold[:, None] != fold] / 300 - 5 / 40).max() < 0.1
    assert (by_lot(np.array([0, 0, 1]), 3, rng)[0] == -1).sum() == 5  # as many as there are


@pytest.mark.slow
def test_chance_is_what_blind_features_score_in_the_protocol():
    """A class that goes by patient is rarer in training than in the test: below 1/2."""
    labels = np.arange(160) // 80
    groups = [f"p{i // 20}" for i in range(160)]
    b, s = some(labels, groups), study()
    folds = evaluation.make_folds(b, s)
    chance = [r for r in evaluation.blind_rows(b, folds, s) if r["metric"] == "accuracy"]
    assert {r["draw"] for r in chance} == set(range(evaluation.BLIND_DRAWS))
    noise = []
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(160, 32)).astype(np.float32)
        rows = evaluation.predict(b, x, folds, s)[1]
        noise += [r["value"] for r in rows if r["metric"] == "accuracy"]
    found = np.mean([r["value"] for r in chance])
    assert found == pytest.approx(np.mean(noise), abs=0.04) and found < 0.47


def test_a_measure_that_is_not_defined_is_none_and_no_perfect_score():
    """Whoever says one class always is right in a test part of that class alone."""
    assert np.isnan(recall(np.zeros(5, int), np.zeros(5, int)))
    labels, groups = (np.arange(21) >= 15).astype(int), [f"p{i // 3}" for i in range(21)]
    x = np.random.default_rng(0).normal(size=(21, 6)).astype(np.float32)
    b, s = some(labels, groups), study(seeds=5)
    rows = evaluation.predict(b, x, evaluation.make_folds(b, s), s)[1]
    probe = [r for r in rows if r["protocol"] == "probe"]
    assert {r["seed"] for r in probe} == set(range(5))  # and those that no split allows
    unknown = {r["seed"] for r in probe if np.isnan(r["value"])}
    assert unknown and unknown == {r["seed"] for r in probe if r["value"] != r["value"]}
    for metric in ("auc", "balanced accuracy"):
        assert {
            r["seed"] for r in probe if r["metric"] == metric and np.isnan(r["value"])
        } == unknown


@pytest.mark.parametrize("kind", ["constant", "constant in training", "duplicates", "one column"])
def test_degenerate_features_end_nothing(kind):
    x, labels, groups = cloud(n=60, groups=12)
    if kind == "constant":
        x[:] = 1.5
    elif kind == "constant in training":
        x[:] = (np.arange(60) == 0)[:, None]
    elif kind == "duplicates":
        x[:] = x[0]
        x[30:] = x[0] + 1
    else:
        x[:, 1:] = 1e6
    b, s = some(labels, groups), study(seeds=2)
    predictions, rows = evaluation.predict(b, x, evaluation.make_folds(b, s), s)
    assert len(predictions["scores"]) == 2
    assert all(np.isfinite(r["value"]) for r in rows)
    if kind == "constant":
        with pytest.raises(UserError, match="s on b: every image has the same embedding"):
            readable_rows(x, "s on b")
    else:
        assert readable_rows(x, "s on b").all()
    good = cloud(n=60, groups=12, seed=1)[0]
    found = cka_rows({"t": good, "s": x, "b": good + x}, groups, "t", "cpu", "b")
    assert {r["model"] for r in found} == {"t", "s", "b"}


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


def test_cka_without_a_part_and_its_chance_level_are_those_of_whole_passes():
    x, _, groups = cloud(n=90, width=30)
    other = np.tanh(x[:, :20] + np.random.default_rng(0).normal(size=(90, 20)).astype(np.float32))
    tensors = {"t": torch.from_numpy(x), "s": torch.from_numpy(other + 5)}
    floor, left_out = g2l.protocols.cka_to_teacher(tensors, groups, "t")["s"]
    _, group = np.unique(groups, return_inverse=True)
    part = np.random.default_rng(0).permutation(group.max() + 1)[group] % 10
    for p, value in zip(np.unique(part), left_out, strict=True):
        rest = {n: f[torch.from_numpy(part != p)] for n, f in tensors.items()}
        assert value == pytest.approx(float(cka([rest["s"]], [rest["t"]])), abs=1e-4)
    rng, biased = np.random.default_rng(1), []
    for _ in range(300):
        mixed = tensors["t"][torch.from_numpy(rng.permutation(90))]
        biased.append(float(cka([tensors["s"]], [mixed], estimator="biased")))
    assert floor == pytest.approx(np.mean(biased), abs=4 * np.std(biased) / 300**0.5)


def test_cka_has_no_standard_error_where_one_group_is_nearly_everything():
    x = {
        n: np.random.default_rng(i).normal(size=(20, 6)).astype(np.float32)
        for i, n in enumerate("tsb")
    }
    rows = cka_rows(x, ["p"] * 18 + ["q"] * 2, "t", "cpu", "b")
    assert {r["metric"] for r in rows} == {"unbiased", "biased", "floor"}


def compared(first, second, labels, groups):
    return paired(resampled(first, labels, groups), resampled(second, labels, groups))


def test_paired_bootstrap_sees_a_real_difference_and_no_difference():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(2, size=600), [f"p{i % 30}" for i in range(600)]
    good = np.where(rng.random(600) < 0.9, labels, 1 - labels)
    bad = np.where(rng.random(600) < 0.7, labels, 1 - labels)
    other = np.where(rng.random(600) < 0.9, labels, 1 - labels)
    half = np.arange(600) % 2 == 0

    def predictions(guess, strength):
        noise = np.random.default_rng(1).normal(size=300)
        scores = np.full((1, 600, 2), np.nan)
        scores[0, half] = np.stack([np.zeros(300), strength * labels[half] + noise], 1)
        return {"knn": guess, "fold": np.arange(600) % 30 % 10, "scores": scores}

    a, b, c = predictions(good, 3), predictions(bad, 1), predictions(other, 3)
    clear = compared(a, b, labels, groups)
    assert clear["knn"][0] == pytest.approx((good == labels).mean() - (bad == labels).mean())
    assert 0 < clear["knn"][1] < clear["knn"][0] < clear["knn"][2]
    expected = np.subtract(*[roc_auc_score(labels[half], p["scores"][0, half, 1]) for p in (a, b)])
    assert clear["probe"][0] == pytest.approx(expected) and clear["probe"][1] > 0
    low, high = compared(a, c, labels, groups)["knn"][1:3]
    assert low < 0 < high
    assert verdict({"low": low, "high": high}) == "within noise"
    assert compared(a, a, labels, groups)["probe"] == (0.0, 0.0, 0.0, 1)


def test_paired_difference_is_that_of_the_figures_in_the_table():
    """kNN accuracy is a mean over folds, whatever their size, in table and difference."""
    rng = np.random.default_rng(0)
    sizes = [300] * 3 + [6] * 27
    patient = np.repeat(np.arange(30), sizes)
    labels, groups = rng.integers(2, size=len(patient)), [f"p{i}" for i in patient]
    fold = g2l.protocols.split(labels, groups, 10)
    guess, means_of = {}, {}
    for name, large, small in (("a", 0.7, 0.9), ("b", 0.9, 0.7)):
        sure = np.where(patient < 3, large, small)
        guess[name] = np.where(rng.random(len(patient)) < sure, labels, 1 - labels)
        rows = evaluation.score_knn(guess[name], labels, fold, "knn")
        means_of[name] = np.mean([r["value"] for r in rows if r["metric"] == "accuracy"])
    none = np.zeros((0, len(labels), 2))
    a, b = ({"knn": guess[n], "fold": fold, "scores": none} for n in "ab")
    value, low, high, folds = compared(a, b, labels, groups)["knn"]
    assert value == pytest.approx(means_of["a"] - means_of["b"]) and folds == 10
    assert value > 0 > (guess["a"] == labels).mean() - (guess["b"] == labels).mean()
    assert low < value < high


def test_paired_gives_no_interval_for_a_handful_of_groups():
    """All resamplings of one tested group agree: that is no certainty."""
    labels = np.arange(40) % 2
    none = np.zeros((0, 40, 2))

    def guess(wrong, n):
        said = np.where(np.arange(40) < wrong, 1 - labels, labels)
        return {"knn": said, "fold": np.arange(40) % n, "scores": none}

    for n, known in ((5, False), (10, True)):
        groups = [f"p{i % n}" for i in range(40)]
        value, low, high, _ = compared(guess(0, n), guess(12, n), labels, groups)["knn"]
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
    plain = {
        "patients": ["P07", "7", ""],
        "slides": ["case_001", "P08_right", "7", "tumour", ""],
    }
    assert leaked(b, {"metadata": plain}).tolist() == [found]  # as older students have it
    secret = {kind: [hashed(name) for name in names if name] for kind, names in plain.items()}
    assert leaked(b, {"metadata": secret | {"hashed": True}}).tolist() == [found]
    assert not leaked(b, {"metadata": {"patients": [""]}}).any()
    second = {"patients": ["Q1"], "earlier": lineage("a", plain | {"teacher": "t"})}
    assert leaked(b, {"metadata": second}).tolist() == [found]  # of a student of it too


ROW = {"model": "a", "benchmark": "b", "protocol": "knn", "metric": "accuracy", "value": 1.0}


def test_record_replaces_a_protocol_as_a_whole(tmp_path):
    record(tmp_path, [ROW, ROW | {"fold": 1}, ROW | {"protocol": "cka", "other": "t"}])
    record(tmp_path, [ROW | {"protocol": "cka", "other": "s"}])
    record(tmp_path, [ROW | {"value": 3.0}])
    found = [(r["protocol"], r["value"]) for r in read_metrics(tmp_path)]
    assert found == [("cka", 1.0), ("cka", 1.0), ("knn", 3.0)]
    rows = record(tmp_path, [ROW | {"value": float("nan")}])
    assert read_metrics(tmp_path)[-1]["value"] is None
    assert ("knn", "accuracy", "a", "b") not in means(rows)


def test_rows_are_found_under_their_key_if_all_are_there(tmp_path):
    rows = record(tmp_path, [ROW, ROW | {"fold": 1}], key="labels of today")
    assert recorded(tmp_path, "labels of today") == rows
    assert recorded(tmp_path, "labels of yesterday") == []
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # a user removed a line
    assert recorded(tmp_path, "labels of today") == []


def test_predictions_survive_a_round_trip_and_know_their_key(tmp_path):
    p = {"knn": np.arange(4), "scores": np.eye(2)[None]}
    save_predictions(tmp_path / "p.npz", "k", p)
    back = load_predictions(tmp_path / "p.npz", "k")
    assert all(np.array_equal(back[name], p[name]) for name in p)
    assert load_predictions(tmp_path / "p.npz", "other") is None
    assert load_predictions(tmp_path / "absent.npz", "k") is None


def flipped(data: bytes, seed: int) -> bytes:
    """One bit of the data turned over."""
    place, bit = np.random.default_rng(seed).integers((len(data), 8))
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_a_turned_bit_of_predictions_or_rows_is_noticed(tmp_path):
    path = tmp_path / "p.npz"
    p = {"knn": np.arange(40), "scores": np.linspace(0, 1, 30).reshape(1, 10, 3)}
    save_predictions(path, "k", p)
    whole = path.read_bytes()
    for seed in range(300):
        path.write_bytes(flipped(whole, seed))
        back = load_predictions(path, "k")
        assert back is None or all(np.array_equal(back[name], p[name]) for name in p)
    rows = [ROW | {"fold": i, "value": i / 7} for i in range(9)]
    record(tmp_path, rows, key="k")
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for seed in range(300):
        path.write_bytes(flipped(whole, seed))
        found = recorded(tmp_path, "k")
        assert [(r["fold"], r["value"]) for r in found] in ([], [(i, i / 7) for i in range(9)])
    assert record(tmp_path, rows, key="k") and recorded(tmp_path, "k")


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

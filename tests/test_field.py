"""Further protocols: against scikit-learn, scikit-survival and plain numpy, and as a user does."""

import re

import numpy as np
import pytest
import tifffile
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

import embed
import evaluate
import tile
from g2l.field import (
    DRAWS,
    PROTOCOLS,
    SHOTS,
    Given,
    agreement,
    calibration,
    cox,
    curve,
    few_shot,
)
from g2l.field import retrieval as retrieve
from g2l.probe import linear_probe
from g2l.protocols import nearest, resamplings, split, vote
from g2l.slide_models import attend, concordance, fit_cox, hazards


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("g2l.evaluation.BLIND_DRAWS", 1)


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
    times = resamplings(patients)
    return Given(x, labels, groups, fold, guess, votes, distances, scores, classes, "cpu", times)


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


def test_agreement_is_that_of_scikit_learn(some):
    rows = agreement(some)
    truth = some.labels
    assert values(rows, "macro F1", protocol="knn") == [
        pytest.approx(f1_score(truth, some.guess, average="macro"))
    ]
    assert values(rows, "quadratic kappa", protocol="knn") == [
        pytest.approx(cohen_kappa_score(truth, some.guess, weights="quadratic"))
    ]
    assert len(values(rows, "macro F1", protocol="probe")) == 2


def test_every_measure_of_resampled_patients_is_that_of_their_images():
    """A patient drawn twice counts as two; the measures of a resampling are those of its images."""
    some = given(n=120, patients=12)
    some.survival = np.stack([np.arange(12.0)[some.groups], some.groups % 2], 1)
    fixed = ["retrieval", "agreement", "k-curve"]  # the others' guesses, bins or folds would change
    rows = [row for name in fixed for row in PROTOCOLS[name](some)]
    for b in (1, 7):
        drawn = np.repeat(np.arange(12), some.times[b].astype(int))
        images = np.concatenate([np.flatnonzero(some.groups == p) for p in drawn])
        truth, guess = some.labels[images], some.guess[images]
        wanted = {
            ("knn", "macro F1"): f1_score(truth, guess, average="macro"),
            ("knn", "quadratic kappa"): cohen_kappa_score(truth, guess, weights="quadratic"),
            ("k curve", "k = 15"): np.mean(truth == guess),
        }
        for row in rows:
            key = row["protocol"], row["metric"]
            if key in wanted:
                assert row["resampled"][b] == pytest.approx(wanted.pop(key), abs=1e-6)
            assert row["resampled"].shape == (1001,) and row["resampled"][0] == row["value"]
        assert not wanted


def test_calibration_of_known_probabilities():
    rng = np.random.default_rng(0)
    n = 30_000
    sure = rng.uniform(0.5, 1, n)
    labels = (rng.random(n) < sure).astype(int)
    known = given(40, 2, 10)
    honest = np.stack([1 - sure, sure], 1)
    boastful = np.where(honest > 0.5, 1.0, 0.0)
    known.labels, known.scores, known.classes = labels, [honest, boastful], 2
    known.groups = rng.integers(10, size=n)
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
    assert np.abs(blind.times.mean(0) - 1).max() < 0.2
    blind.x = np.random.default_rng(1).normal(size=(240, 8)).astype(np.float32)
    rows = PROTOCOLS["few-shot"](blind)
    assert np.mean(values(rows, "16 a class")) == pytest.approx(1 / 3, abs=0.05)


def test_few_shots_that_the_data_do_not_allow_are_left_out():
    few = given(40, 2, 10)
    metrics = {row["metric"] for row in few_shot(few)}
    assert "1 a class" in metrics and "16 a class" not in metrics


def followed(n=90, width=5, seed=0):
    """Patients whose hazard follows two of their features; a third of them are censored, and some
    times are equal."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    time = np.ceil(20 * rng.exponential(np.exp(-x[:, 0] - x[:, 1])) + 1)
    event = (rng.random(n) < 0.7).astype(float)
    return x, time, event


def test_cox_regression_is_that_of_scikit_survival():
    linear = pytest.importorskip("sksurv.linear_model")
    x, time, event = followed()
    for penalty in (0.01, 1.0):
        mine = fit_cox(torch.from_numpy(x), time, event, penalty, torch.zeros(5).double())
        # there the penalty is on the sum over patients
        other = linear.CoxPHSurvivalAnalysis(penalty * event.sum(), ties="breslow", tol=1e-12)
        other.fit(x, np.array([*zip(event > 0, time, strict=True)], "?,f8"))
        assert np.allclose(mine, other.coef_, atol=1e-4)


def test_concordance_is_that_of_scikit_survival():
    metrics = pytest.importorskip("sksurv.metrics")
    x, time, event = followed()
    risk = np.round(x[:, 0], 1)  # some equal
    times = resamplings(90)[:5]
    got = concordance(risk, time, event, np.zeros(90), times)
    for b in range(5):
        rows = np.repeat(np.arange(90), times[b].astype(int))
        wanted = metrics.concordance_index_censored(event[rows] > 0, time[rows], risk[rows])[0]
        # patients drawn twice have the same time: events at one time are no pair
        assert got[b] == pytest.approx(wanted, abs=1e-6)


def test_cox_finds_who_is_at_risk_by_patient_and_not_more_than_there_is():
    x, time, event = followed(120, 6)
    fold = split(event.astype(int), [str(i) for i in range(120)], 5)
    once = np.ones((1, 120))
    found = concordance(hazards(x, time, event, fold), time, event, fold, once)[0]
    assert found > 0.62  # 0.71 who knows the hazards
    lot = np.random.default_rng(1).normal(size=x.shape)
    assert abs(concordance(hazards(lot, time, event, fold), time, event, fold, once)[0] - 0.5) < 0.1
    mine = given(n=240, patients=120)
    mine.groups = np.arange(240) % 120
    mine.x = np.concatenate([x, x]).astype(np.float32)
    mine.survival = np.stack([np.tile(time, 2), np.tile(event, 2)], 1)
    mine.survival[mine.groups == 3] = np.nan  # not followed
    [row] = cox(mine)
    assert row["value"] > 0.62 and len(row["resampled"]) == 1001


def bags_of(labels, rng, share=0.1, width=16):
    """Slides of 40 to 80 patches, of which a tenth say what the slide is."""
    bags = []
    for label in labels:
        bag = rng.normal(size=(rng.integers(40, 80), width)).astype(np.float32)
        bag[: max(2, int(share * len(bag))), 0] += 5 * label
        bags.append(100 + 3 * rng.permutation(bag))
    return bags


@pytest.mark.slow
def test_attention_finds_the_few_patches_that_tell_and_gives_the_same_again():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    fold = split(labels, [str(i) for i in range(60)], 5)
    bags = bags_of(labels, rng)
    said = attend(bags, labels, fold, 2, "cpu")
    assert np.allclose(said.sum(1), 1)
    assert ((said[:, 1] > 0.5) == labels).mean() > 0.85
    state = torch.random.get_rng_state()
    assert (attend(bags, labels, fold, 2, "cpu") == said).all()
    assert (torch.random.get_rng_state() == state).all()  # the caller's numbers stay as they were
    wrong = attend(bags_of(0 * labels, rng), labels, fold, 2, "cpu")
    assert abs(((wrong[:, 1] > 0.5) == labels).mean() - 0.5) < 0.2


def test_attention_does_not_depend_on_who_else_is_in_the_batch():
    from g2l.slide_models import GatedAttention

    net = GatedAttention(torch.zeros(4), torch.ones(4), 3)
    bags = [torch.randn(n, 4) for n in (3, 9, 5)]
    alone = torch.cat([net([bag]) for bag in bags])
    assert torch.allclose(net(bags), alone, atol=1e-6)


MODEL = ["--models", "timm:test_vit", "--weights", "random", "--input-size", "64"]
MODEL += ["--workers", "0", "--device", "cpu"]


def slides(folder, names, mpps):
    """Slides of noisy tissue that is redder for every second; the file tells a µm per pixel."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i, (name, mpp) in enumerate(zip(names, mpps, strict=True)):
        colour = (150 + 60 * (i % 2), 90, 160)
        image = rng.normal(colour, 35, (16, 16, 3)).repeat(16, 0).repeat(16, 1)
        image += rng.normal(0, 12, image.shape)
        tifffile.imwrite(
            folder / f"{name}.svs",
            image.clip(0, 255).astype(np.uint8),
            tile=(128, 128),
            photometric="rgb",
            compression="jpeg",
            metadata=None,
            description="Aperio Image Library v12.0\r\n256x256" + f"|MPP = {mpp}" * (mpp > 0),
        )


@pytest.mark.slow
def test_a_cohort_tiled_embedded_and_evaluated_by_every_protocol(tmp_path):
    names = [f"P{i:02d}" for i in range(12)]
    slides(tmp_path / "slides" / "tiny", names, [0.25] * 12)
    table = ["slide_id,patient,time,event"]
    table += [f"{name},{name},{10 + i + 30 * (i % 2)},{1 - i % 2}" for i, name in enumerate(names)]
    (tmp_path / "mine.csv").write_text("\n".join(table) + "\n")
    cohort = ["--cancer", "tiny", "--data", str(tmp_path)]
    grid = ["--patch-size", "64", "--min-tissue", "0", "--max-blur", "9"]
    assert tile.main([*cohort, *grid]) == 0
    assert embed.main([*cohort, *MODEL]) == 0
    where = ["--results", str(tmp_path / "out"), "--slides-table", str(tmp_path / "mine.csv")]
    assert evaluate.main([*cohort, *MODEL, *where, "--protocols", *PROTOCOLS]) == 0
    text = (tmp_path / "out" / "table2.md").read_text()
    for measure in ("AUC", "Harrell's concordance", "2 of each class", "top-1 accuracy", "k = 5"):
        (cells,) = re.findall(rf"\| mine \| {measure} \| (.+) \|\n", text)
        assert re.fullmatch(r"[01]\.\d+.* \| \**[01]\.\d+.*", cells)  # chance, and the model
    assert "†" not in text  # nothing to mark
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Gated attention (ABMIL)" in page and "<th>chance</th>" in page


def flags(parser) -> set[str]:
    return {text for action in parser._actions for text in action.option_strings}


@pytest.mark.slow
def test_slides_that_tp53_lacks_are_told_first_and_the_advice_takes_them(
    tmp_path, monkeypatch, capsys
):
    names = [f"TCGA-A1-00{i:02d}-01Z-00-DX1" for i in range(10)]
    slides(tmp_path / "slides" / "brca", names, [*[0.25] * 8, 0.5, 0])
    root = tmp_path / "benchmarks" / "tp53"
    root.mkdir(parents=True)
    rows = [f"{name},{'MUT' if i % 2 else 'WT'}\n" for i, name in enumerate(names)]
    (root / "labels.csv").write_text("slide_id,label\n" + "".join(rows))
    told = []
    extract = evaluate.extract

    def watched(models, found, *others):
        told.append((capsys.readouterr().err, [len(benchmark) for benchmark in found]))
        return extract(models, found, *others)

    monkeypatch.setattr("evaluate.extract", watched)
    where = ["--data", str(tmp_path), "--results", str(tmp_path / "out"), "--no-pictures"]
    command = [*where, "--benchmarks", "tp53", *MODEL]
    assert evaluate.main(command) == 0
    told_first, counts = told.pop()
    assert counts == [8]
    left_out = re.findall("1 labelled slides left out: ([^;]+); ([^;\n]+)", told_first)
    assert sorted(left_out) == [
        (
            "0.5 µm/px is coarser than 0.25 (± 20 %)",
            "tile.py --resample --enlarge makes patches of it, which --cancer takes",
        ),
        (
            "no µm per pixel in the file",
            "tile.py --assume-mpp or --manifest makes patches of it, which --cancer takes",
        ),
    ]
    for _, advice in left_out:
        theirs, ours = advice.split(" makes ")
        assert set(re.findall("--[a-z-]+", theirs)) <= flags(tile.build_parser())
        assert set(re.findall("--[a-z-]+", ours)) <= flags(evaluate.build_parser())
    tiled = ["--cancer", "brca", "--data", str(tmp_path), "--min-tissue", "0", "--max-blur", "9"]
    assert tile.main(tiled) == 0
    assert evaluate.main([*command, "--cancer", "brca"]) == 0
    told_first, counts = told.pop()
    assert counts == [8] and told_first.count("1 labelled slides left out: tile.py says ") == 2
    assert tile.main([*tiled, "--resample", "--enlarge", "--assume-mpp", "0.25"]) == 0
    assert evaluate.main([*command, "--cancer", "brca"]) == 0
    told_first, counts = told.pop()
    assert counts == [10] and "left out" not in told_first

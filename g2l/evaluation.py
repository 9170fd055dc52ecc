"""One benchmark, every model: what may be measured, chance, protocols, comparison, pictures.

`evaluate_all` goes through the benchmarks. `evaluate_benchmark` leaves out what may not be measured
on (`without_leaks`), says what the design allows (`describe_design`), measures each model and
chance (`measure_models`) and compares the models (`compare_models`). What is recorded under the key
of its inputs is not measured again. Features are the largest thing in memory: `Load` brings those
of one model when its turn comes.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark, cohort_of, leaked
from g2l.dense import dense_rows
from g2l.errors import UserError, warn
from g2l.features import data_stamp, display
from g2l.field import PROTOCOLS, Given
from g2l.files import digest, safe
from g2l.layers import layer_rows
from g2l.pictures import draw_benchmark
from g2l.probe import linear_probe
from g2l.protocols import (
    BLIND_DRAWS,
    BLIND_WIDTH,
    by_lot,
    cka_rows,
    codes,
    macro_auc,
    nearest,
    paired,
    recall,
    resampled,
    resamplings,
    split,
    vote,
)
from g2l.registry import pretrained_on
from g2l.results import Study, load_predictions, record, recorded, save_predictions
from g2l.slide_tables import bags_of

# Raised on purpose when a protocol would give other numbers; all is then measured anew.
PROTOCOL_VERSION = 5
BLIND_BAG = 64  # patches of a slide
# Protocols that look at images, not at the embeddings that are held; the others are in field.py.
LOOKS = {"dense": dense_rows, "layers": layer_rows}
Predictions = dict[str, dict[str, ndarray]]  # of each model, see `predict`
Folds = dict[str, tuple[ndarray, ndarray]]  # see `make_folds`
Load = Callable[[str], ndarray]  # a model's features (N, dim)


def without_leaks(
    benchmark: Benchmark, readable: dict[str, ndarray], study: Study
) -> tuple[ndarray, list[str], list[str]]:
    """The rows (N,) that every model may be measured on, notes, and the models that are marked.

    Left out are images that a model could not read, and those of patients that a student has seen;
    --leaks mark keeps the latter and marks the student.
    """
    keep = np.all(list(readable.values()), 0)
    notes = list(benchmark.notes)
    marked = []
    if not keep.all():
        notes.append(f"{(~keep).sum()} unreadable images left out")
    for name in readable:
        about = study.cards[name]
        rows = leaked(benchmark, about)
        if rows.any():
            fate = "left out for all models"
            if study.leaks == "mark":
                fate = "its numbers are marked ⚠"
                marked.append(display(name))
            else:
                keep &= ~rows
            first = rows.argmax()
            patients = len(set(np.asarray(benchmark.groups)[rows]))
            notes.append(
                f"{display(name)} was distilled on {patients} of its patients ({rows.sum()} "
                f"images, first {benchmark.ids[first]} of {benchmark.groups[first]}): {fate}"
            )
        elif about["metadata"].get("teacher") and not cohort_of(about):
            notes.append(
                f"the cohort of {display(name)} is not recorded: shared patients cannot be found"
            )
    if not keep.any():
        raise UserError(f"{benchmark.name}: no image is left ({'; '.join(notes)})", mend="leaks")
    return keep, notes, marked


def describe_design(benchmark: Benchmark, folds: int) -> tuple[dict, list[str]]:
    """What the tables say of a benchmark's images and groups, and notes on what they do not allow.

    Raises UserError for fewer than 8 images or one class.
    """
    name = benchmark.name
    labels = benchmark.labels
    classes = benchmark.classes
    counts = np.bincount(labels, minlength=len(classes))
    if len(labels) < 8:
        text = f"{name}: {len(labels)} images are too few to measure anything; 8 are needed"
        raise UserError(text)
    if (counts > 0).sum() < 2:
        raise UserError(
            f"{name}: all {len(labels)} images are of class {classes[labels[0]]}; two "
            "classes are needed to tell anything apart"
        )
    held = np.asarray(benchmark.groups)
    thin = []
    notes = []
    groups = len(set(benchmark.groups))
    for c, kind in enumerate(classes):
        count = len(set(held[labels == c]))
        if 0 < count < 5:
            thin.append(f"{kind} ({count})")
    if thin:
        few = ", ".join(thin)
        notes.append(f"classes with fewer than 5 groups, absent from some splits: {few}")
    if groups < folds:
        few = "; too few for the probe's 6:2:2" if groups < 5 else ""
        notes.append(f"{groups} groups: as many folds at most{few}")
    about = {
        "level": benchmark.level,
        "classes": classes,
        "counts": counts.tolist(),
        "groups": groups,
    }
    return about, notes


def make_folds(benchmark: Benchmark, study: Study) -> Folds:
    """Folds (N,) of kNN and of the probe by the ending of their protocol's name."""
    folds = {}
    for ending, grouped in {"": True, "-ungrouped": False}.items():
        if grouped or study.paper_splits:
            cut = functools.partial(split, benchmark.labels, benchmark.groups, grouped=grouped)
            own = cut(study.folds)
            folds[ending] = own, own if study.folds == 10 else cut(10)
    return folds


def predict(
    benchmark: Benchmark,
    x: ndarray,
    folds: Folds,
    study: Study,
    lot: np.random.Generator | None = None,
    bags: Sequence[Path | ndarray] = (),
) -> tuple[dict[str, ndarray], list[dict]]:
    """All protocols of one model's features x (N, D): its predictions, and rows of results.

    Predictions of the grouped folds: fold (N,), knn (N,), neighbors (N, k), and scores (seeds, N,
    classes), NaN outside each test part; of further protocols their measures (M,) by name, each
    resampled (M, B). lot: x knows nothing, and it draws the neighbours of kNN. bags: what is known
    of the patches of each slide.
    """
    labels = benchmark.labels
    classes = len(benchmark.classes)
    device = study.device_used
    predictions: dict[str, ndarray] = {}
    rows = []
    for ending, (fold, tenths) in folds.items():
        if lot:
            neighbors, distances = by_lot(fold, study.k, lot)
        else:
            neighbors, distances = nearest(x, fold, study.k, study.pca_dims, study.pca, device)
        votes = np.where(neighbors < 0, -1, labels[neighbors])
        guess = vote(votes, distances, classes)
        rows += score_knn(guess, labels, fold, f"knn{ending}")
        tried = linear_probe(x, labels, tenths, classes, study.seeds, device)
        rows += score_probe(tried, labels, f"probe{ending}")
        if not predictions:
            scores = np.array([probe[0] for probe in tried if probe], np.float32)
            predictions = {
                "fold": fold,
                "knn": guess,
                "neighbors": neighbors.astype(np.int32),
                "scores": scores.reshape(-1, len(labels), classes),
            }
            if study.protocols:
                group = codes(benchmark.groups)
                patients = int(group.max()) + 1
                given = Given(
                    x=x,
                    labels=labels,
                    groups=group,
                    fold=tenths,
                    guess=guess,
                    votes=votes,
                    distances=distances,
                    scores=list(predictions["scores"]),
                    classes=classes,
                    device=device,
                    times=np.ones((1, patients)) if lot else resamplings(patients),
                    survival=benchmark.survival,
                    bags=bags,
                )
                rows += further(given, study.protocols, predictions)
    return predictions, rows


def further(given: Given, protocols: Sequence[str], predictions: dict) -> list[dict]:
    """Rows of further protocols; what resamplings make of them goes to the predictions."""
    rows = []
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN says that there is no such measure
        for name in protocols:
            if name in PROTOCOLS:
                rows += PROTOCOLS[name](given)
    each: dict[str, list[ndarray]] = {}
    for row in rows:
        values = row.pop("resampled")
        if np.isfinite(row["value"]):
            each.setdefault(f"{row['protocol']}: {row['metric']}", []).append(values)
    predictions["measures"] = np.array(list(each), str)
    predictions["resampled"] = np.array([np.mean(values, 0) for values in each.values()])
    return rows


def score_knn(guess: ndarray, labels: ndarray, fold: ndarray, name: str) -> list[dict]:
    """Rows of kNN: accuracy of every fold beside its share of the commonest class, and recall."""
    common = np.bincount(labels).argmax()
    rows = [
        {
            "protocol": name,
            "metric": "balanced accuracy",
            "value": recall(guess, labels),
        }
    ]
    for metric, hits in ("accuracy", guess == labels), ("majority", labels == common):
        for f in range(fold.max() + 1):
            value = hits[fold == f].mean()
            rows.append({"protocol": name, "metric": metric, "fold": f, "value": value})
    return rows


def score_probe(tried: Sequence, labels: ndarray, name: str) -> list[dict]:
    """Rows of the probe: AUC and balanced accuracy of every seed, NaN where the groups allow no
    split."""
    rows = []
    for seed, probe in enumerate(tried):
        base = {"protocol": name, "seed": seed}
        area = balanced = np.nan
        if probe:
            scores, base["C"] = probe
            test = np.isfinite(scores[:, 0])
            area = macro_auc(scores[test], labels[test])[0]
            balanced = recall(scores[test].argmax(1), labels[test])
        rows.append(base | {"metric": "auc", "value": area})
        rows.append(base | {"metric": "balanced accuracy", "value": balanced})
    return rows


def blind_rows(benchmark: Benchmark, folds: Folds, study: Study) -> list[dict]:
    """Rows of the model "chance": what features that know nothing score by the very same code.

    One of every measure for each draw, the mean over the folds or seeds that define it.
    """
    rows = []
    for draw in range(BLIND_DRAWS):
        lot = np.random.default_rng(draw)
        x = lot.normal(size=(len(benchmark), BLIND_WIDTH)).astype(np.float32)
        found: dict[tuple, list[float]] = {}
        patches = lot.spawn(1)[0]
        bags = [patches.normal(size=(BLIND_BAG, BLIND_WIDTH)) for _ in benchmark.slides]
        for row in predict(benchmark, x, folds, study, lot, bags)[1]:
            if np.isfinite(row["value"]):
                found.setdefault((row["protocol"], row["metric"]), []).append(row["value"])
        for (protocol, metric), values in found.items():
            value = np.mean(values)
            rows.append({"protocol": protocol, "metric": metric, "draw": draw, "value": value})
    return rows


def measure_models(
    benchmark: Benchmark, models: list[str], load: Load, study: Study
) -> tuple[Predictions, dict[str, str], list[dict]]:
    """Of every model, and of chance: predictions, the key of all they depend on, and results.

    What is kept under its key is read.
    """
    about = digest(
        [
            study.k,
            study.pca_dims,
            study.pca,
            study.folds,
            study.seeds,
            study.paper_splits,
        ],
        [benchmark.name, benchmark.ids, benchmark.labels.tolist(), benchmark.classes],
        [benchmark.groups, benchmark.centers, PROTOCOL_VERSION, list(study.protocols)],
        None if benchmark.survival is None else benchmark.survival.tolist(),
    )
    keys = {"chance": about}
    bags = {}
    for name in models:
        card = study.cards[name]
        bags[name] = bags_of(benchmark, card) if "abmil" in study.protocols else []
        # the name, too: a copy under another name has rows of its own
        origin = name, card["fingerprint"], data_stamp(benchmark), len(bags[name])
        keys[name] = digest(origin, about)
    predictions: Predictions = {}
    rows = []
    folds: Folds = {}
    for name, key in keys.items():
        shown = display(name)
        path = study.results / "predictions" / safe(shown) / f"{safe(benchmark.name)}.npz"
        known = load_predictions(path, key)
        found = recorded(study.results, key)
        if known is None or not found:
            start = time.perf_counter()
            folds = folds or make_folds(benchmark, study)
            if name == "chance":
                known = {}
                new = blind_rows(benchmark, folds, study)
            else:
                known, new = predict(benchmark, load(name), folds, study, bags=bags[name])
            base = {"benchmark": benchmark.name, "model": shown}
            found = record(study.results, [base | row for row in new], key=key)
            save_predictions(path, key, known)
            what = ", ".join(["kNN", "linear probe", *study.protocols])
            took = f"{what}: {time.perf_counter() - start:.1f} s"
            warn(f"{shown} on {benchmark.name}: {took}")
        predictions[name] = known
        rows += found
    del predictions["chance"]
    return predictions, keys, rows


def compare_models(
    benchmark: Benchmark, load: Load, predictions: Predictions, study: Study
) -> list[dict]:
    """Rows of results on pairs of models: CKA of all, differences to teacher and baseline."""
    groups = benchmark.groups
    teacher = study.teacher
    x = {name: load(name) for name in predictions}
    rows = cka_rows(x, groups, teacher, study.device_used, study.baseline)
    figures = {}
    for name, known in predictions.items():
        figures[name] = resampled(known, benchmark.labels, groups)
        measures = zip(known.get("measures", ()), known.get("resampled", ()), strict=True)
        for kind, values in measures:
            figures[name][str(kind)] = values, len(set(groups)), 1
    for name, other in itertools.product(figures, (teacher, study.baseline)):
        if other in figures and name not in (other, teacher):
            base = {"model": name, "other": other, "protocol": "paired"}
            for kind, found in paired(figures[name], figures[other]).items():
                value = zip(("value", "low", "high", "parts"), found, strict=True)
                rows.append(base | {"metric": kind} | dict(value))
    for row in rows:
        row["benchmark"] = benchmark.name
        row["model"], row["other"] = display(row["model"]), display(row["other"])
    return rows


def evaluate_benchmark(
    whole: Benchmark, readable: dict[str, ndarray], load: Load, study: Study
) -> list[dict]:
    """All protocols for all models on one benchmark, recorded and drawn: its rows of results.

    readable: which images (N,) each model's features are of. What is there is kept.
    """
    keep, notes, marked = without_leaks(whole, readable, study)
    benchmark = whole if keep.all() else whole.subset(keep)

    def load_kept(name: str) -> ndarray:
        return load(name) if keep.all() else load(name)[keep]

    models = list(readable)
    about, limits = describe_design(benchmark, study.folds)
    origins = {display(name): study.cards[name]["metadata"] for name in models}
    known = pretrained_on(origins, benchmark.name, benchmark.groups)
    notes += [*limits, *itertools.chain(*known.values())]
    predictions, keys, rows = measure_models(benchmark, models, load_kept, study)
    key = digest(keys, study.teacher, study.baseline, study.leaks, notes, list(known))
    compared = recorded(study.results, key)
    if not compared:
        new = compare_models(benchmark, load_kept, predictions, study)
        data = {
            "model": "data",
            "benchmark": benchmark.name,
            "protocol": "data",
            "metric": "images",
            "value": len(benchmark),
            "notes": notes,
            "marked": marked,
            "pretrained": list(known),
        }
        compared = record(study.results, [*new, data | about], key=key)
    rows += compared
    for name in study.protocols:
        if name in LOOKS:
            rows += LOOKS[name](benchmark, models, study)
    if not study.no_pictures:
        draw_benchmark(benchmark, predictions, replace(study, rows=rows), key)
    return rows


def evaluate_all(
    found: list[Benchmark],
    readable: dict[str, dict[str, ndarray]],
    embed: Callable,
    study: Study,
    failures: list[UserError],
) -> tuple[Study, dict[str, int]]:
    """One benchmark after another: the study with what was measured, and the unreadable images.

    readable: by benchmark and model which images (N,) could be read. embed(model, benchmark,
    together=False) gives the features (N, dim); what fails goes to `failures`.
    """
    done = []
    rows = model_rows(study)
    lost = {}
    for benchmark in found:
        each = readable[benchmark.name]
        if not each:
            continue
        lost[benchmark.name] = max(int((~kept).sum()) for kept in each.values())
        load = functools.partial(embed, benchmark=benchmark, together=False)
        try:
            new = evaluate_benchmark(benchmark, each, load, study)
            rows += new
            done.append(benchmark)
            failures += without_patches(benchmark, new, list(each), study)
            failures += [UserError(row["fault"]) for row in new if "fault" in row]
        except UserError as error:
            failures.append(error)
    return replace(study, found=done, rows=rows), lost


def without_patches(
    benchmark: Benchmark, rows: list[dict], models: list[str], study: Study
) -> list[UserError]:
    """Models of whose slides the patches' features are asked for, and not there."""
    measured = {row["model"] for row in rows if row["protocol"] == "abmil"}
    if "abmil" not in study.protocols or benchmark.level != "slide":
        return []
    text = f"abmil on {benchmark.name}: no features of the patches of every slide by"
    lacking = [name for name in models if display(name) not in measured]
    return [UserError(f"{text} {display(name)}", mend="bags") for name in lacking]


def model_rows(study: Study) -> list[dict]:
    """One row for each model: what it is and what it costs."""
    rows = []
    hidden = "hashed", "patients", "slides", "earlier"
    for name, about in study.cards.items():
        told = about["metadata"].items()
        row = {
            "model": display(name),
            "benchmark": "",
            "protocol": "model",
            "metric": "parameters",
            "value": about["parameters"],
            "metadata": {k: v for k, v in told if k not in hidden},
            "ms_per_image": about["ms_per_image"],
            "device": study.device_used,
            "weights": about["weights"],
            "key": about["key"],
        }
        rows.append(row)
    return record(study.results, rows)

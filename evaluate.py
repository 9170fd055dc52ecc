"""Stage 3 of G2L: every model on every benchmark by CKA, kNN and probe: Tables 1, 2 and Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student \
        --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...   # with labels.csv: image,label,group

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its
majority baseline, and features are extracted once: results/features holds them, keyed by weights,
preprocessing and images. Beside each figure stands what features that know nothing score.

The story: `name_models` and `name_benchmarks` say what is compared, `extract` makes the features,
`evaluate_benchmark` measures one benchmark after another, `show` draws tables and pictures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.arguments import Help, add_running_arguments, directory, whole
from g2l.benchmarks import Benchmark, cohort_of, leaked
from g2l.devices import MODEL_REMEDIES, add_model_arguments, model_options
from g2l.errors import UserError, exit_status, explain
from g2l.features import (
    card,
    check_names,
    data_stamp,
    display,
    features,
    loaded_model,
    models_at_hand,
    report_failures,
)
from g2l.files import digest, safe
from g2l.pictures import draw_benchmark, draw_figure1
from g2l.protocols import (
    by_lot,
    cka_rows,
    linear_probe,
    macro_auc,
    nearest,
    paired,
    recall,
    split,
    vote,
)
from g2l.published import PUBLISHED, at_hand, list_benchmarks, load_benchmarks
from g2l.registry import tcga_notes
from g2l.report import summarize, write_report, write_tables
from g2l.results import (
    Study,
    claim,
    load_predictions,
    record,
    recorded,
    save_predictions,
)

# Raised on purpose when a protocol would give other numbers; all is then measured anew.
PROTOCOL_VERSION = 2
BLIND_DRAWS = 5  # of features that know nothing, for the chance level
BLIND_WIDTH = 8
# The flags that go to Study as they are.
STUDY_FLAGS = [
    "results",
    "k",
    "pca_dims",
    "pca",
    "folds",
    "seeds",
    "paper_splits",
    "leaks",
    "no_pictures",
]

REMEDIES = MODEL_REMEDIES | {
    "benchmark data": "`python evaluate.py --list` says where to get it; unpack the archive below "
    "this folder as it comes",
    "benchmark names": "rename one of the folders of --benchmark",
    "leaks": "--leaks mark keeps the patients that a student has seen",
    "name": "rename one of the two, or take another folder by --results",
    "unreadable": "mend them, or allow more by --max-unreadable",
}
Predictions = dict[str, dict[str, ndarray]]  # of each model, see `predict`
Folds = dict[str, tuple[ndarray, ndarray]]  # see `make_folds`


def name_models(args: argparse.Namespace) -> tuple[list[str], str | None, str | None]:
    """The models to compare, teacher and baseline among them; --all takes those at hand."""
    models, teacher, baseline = args.models, args.teacher, args.baseline
    if args.all and not models:
        models = models_at_hand(args.weights or (), args.runs)
        if "h-optimus-0" in models:
            teacher = teacher or "h-optimus-0"
        if "hibou-l" in models:
            baseline = baseline or "hibou-l"
    named = [name for name in (*models, teacher, baseline) if name]
    return list(dict.fromkeys(named)), teacher, baseline


def name_benchmarks(args: argparse.Namespace) -> list[str]:
    """The published benchmarks to measure; --all adds those at hand and says which are not."""
    names = list(args.benchmarks)
    for name, about in PUBLISHED.items() if args.all else ():
        if at_hand(args.data, name):
            names.append(name)
        elif name not in names and int(os.environ.get("RANK", 0)) == 0:
            where = args.data / "benchmarks" / name
            print(f"benchmark {name} is not in {where}; from {about.source}", file=sys.stderr)
    return list(dict.fromkeys(names))


def check_request(args: argparse.Namespace, models: list[str], published: list[str]) -> None:
    """UserError where there is no model, no benchmark, or one name for two models."""
    lacks = []
    if not models:
        lacks.append(
            "no model: name one by --models, for instance h-optimus-0 (fetched from the hub, or "
            "--weights h-optimus-0=FILE) or runs/NAME/student (made by distill.py)"
        )
    if not published and not args.benchmark and args.all:
        lacks.append(
            f"no benchmark: none is below {args.data / 'benchmarks'}, and --list says where to "
            "get one; your own goes by --benchmark DIR"
        )
    elif not published and not args.benchmark:
        lacks.append(
            "no benchmark: give --benchmark DIR, --benchmarks NAME (--list shows them) or --all"
        )
    if lacks:
        raise UserError("; ".join(lacks))
    check_names(models)


def origins_of(models: list[str], found: list[Benchmark]) -> dict[str, str]:
    """Where each model and benchmark comes from, by the name under which its results are kept."""
    origins = {f"benchmark {safe(b.name)}": b.origin for b in found}
    for name in models:
        place = str(Path(name).resolve()) if Path(name).exists() else name
        origins[f"model {safe(display(name))}"] = place
    return origins


def extract(
    models: list[str],
    found: list[Benchmark],
    embed: Callable,
    describe: Callable,
    failures: list[str],
) -> tuple[dict[str, dict], dict[str, list[str]]]:
    """Features of every model on every benchmark into the cache, by all ranks together.

    embed(model, benchmark) gives the features (N, dim), describe(model) the model's card. Returns
    the cards, and the models that each benchmark has; what failed goes to `failures`.
    """
    cards: dict[str, dict] = {}
    models_of: dict[str, list[str]] = {benchmark.name: [] for benchmark in found}
    for name in models:
        for benchmark in found:
            try:
                embed(name, benchmark)
                cards[name] = describe(name)
                models_of[benchmark.name].append(name)
            except UserError as error:
                failures.append(explain(error, REMEDIES) or "")
                if name not in cards:
                    break  # the model itself cannot be loaded
    return cards, models_of


def tells_apart(x: ndarray) -> bool:
    """Whether the embeddings x (N, dim) of readable images differ beyond rounding."""
    known = x[np.isfinite(x).all(1)]
    return len(known) > 0 and bool(np.ptp(known, 0).max() > 1e-6 * np.abs(known).max())


def without_leaks(
    benchmark: Benchmark, x: dict[str, ndarray], study: Study
) -> tuple[ndarray, list[str], list[str]]:
    """The rows (N,) that every model may be measured on, notes, and the models that are marked.

    Left out are unreadable images, and those of patients that a student has seen; --leaks mark
    keeps the latter and marks the student.
    """
    keep = np.all([np.isfinite(array).all(1) for array in x.values()], 0)
    notes, marked = list(benchmark.notes), []
    if not keep.all():
        notes.append(f"{(~keep).sum()} unreadable images left out")
    for name in x:
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
    origins = {display(name): study.cards[name]["metadata"] for name in x}
    notes += tcga_notes(origins, benchmark.name, benchmark.groups)
    if not keep.any():
        raise UserError(f"{benchmark.name}: no image is left ({'; '.join(notes)})", mend="leaks")
    return keep, notes, marked


def describe_design(benchmark: Benchmark, folds: int) -> tuple[dict, list[str]]:
    """What the tables say of a benchmark's images and groups, and notes on what they do not allow.

    Raises UserError for fewer than 8 images or one class.
    """
    name, labels, classes = benchmark.name, benchmark.labels, benchmark.classes
    counts = np.bincount(labels, minlength=len(classes))
    if len(labels) < 8:
        raise UserError(
            f"{name}: {len(labels)} images are too few to measure anything; 8 are needed"
        )
    if (counts > 0).sum() < 2:
        raise UserError(
            f"{name}: all {len(labels)} images are of class {classes[labels[0]]}; two "
            "classes are needed to tell anything apart"
        )
    held = np.asarray(benchmark.groups)
    class_groups = [len(set(held[labels == c])) for c in range(len(classes))]
    groups, notes = len(set(benchmark.groups)), []
    thin = [f"{c} ({n})" for c, n in zip(classes, class_groups, strict=True) if 0 < n < 5]
    if thin:
        notes.append(
            f"classes with fewer than 5 groups, absent from some splits: {', '.join(thin)}"
        )
    if groups < folds:
        few = "; too few for the probe's 6:2:2" if groups < 5 else ""
        notes.append(f"{groups} groups: as many folds at most{few}")
    about = {
        "level": benchmark.level,
        "classes": classes,
        "counts": counts.tolist(),
        "groups": groups,
        "class_groups": class_groups,
    }
    return about, notes


def make_folds(benchmark: Benchmark, study: Study) -> Folds:
    """Folds (N,) of kNN and of the probe by the ending of their protocol's name."""
    folds = {}
    for ending, grouped in {"": True, "-ungrouped": False}.items():
        if grouped or study.paper_splits:
            own = split(benchmark.labels, benchmark.groups, study.folds, grouped=grouped)
            tenths = own
            if study.folds != 10:
                tenths = split(benchmark.labels, benchmark.groups, 10, grouped=grouped)
            folds[ending] = own, tenths
    return folds


def predict(
    benchmark: Benchmark,
    x: ndarray,
    folds: Folds,
    study: Study,
    lot: np.random.Generator | None = None,
) -> tuple[dict[str, ndarray], list[dict]]:
    """kNN and probe of one model's features x (N, D): its predictions, and rows of results.

    Predictions of the grouped folds: fold (N,), knn (N,), neighbors (N, k), and scores (seeds, N,
    classes), NaN outside each test part. lot: x knows nothing, and it draws the neighbours of kNN.
    """
    labels, classes, device = benchmark.labels, len(benchmark.classes), study.device_used
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
        tried = [linear_probe(x, labels, tenths, classes, s, device) for s in range(study.seeds)]
        rows += score_probe(tried, labels, f"probe{ending}")
        if not predictions:
            scores = [probe[0] for probe in tried if probe]
            predictions = {"fold": fold, "knn": guess, "neighbors": neighbors.astype(np.int32)}
            predictions["scores"] = np.array(scores).reshape(-1, len(labels), classes)
    return predictions, rows


def score_knn(guess: ndarray, labels: ndarray, fold: ndarray, name: str) -> list[dict]:
    """Rows of kNN: accuracy of every fold beside its share of the commonest class, and recall."""
    common = np.bincount(labels).argmax()
    rows = [{"protocol": name, "metric": "balanced accuracy", "value": recall(guess, labels)}]
    for metric, hits in ("accuracy", guess == labels), ("majority", labels == common):
        for f in range(fold.max() + 1):
            value = hits[fold == f].mean()
            rows.append({"protocol": name, "metric": metric, "fold": f, "value": value})
    return rows


def score_probe(tried: Sequence, labels: ndarray, name: str) -> list[dict]:
    """Rows of the probe: AUC and balanced accuracy of every seed whose split the groups allow."""
    rows = []
    for seed, probe in enumerate(tried):
        if probe:
            scores, c = probe
            test = np.isfinite(scores[:, 0])
            base = {"protocol": name, "seed": seed, "C": c}
            area = macro_auc(scores[test], labels[test])[0]
            balanced = recall(scores[test].argmax(1), labels[test])
            for metric, value in ("auc", area), ("balanced accuracy", balanced):
                rows.append(base | {"metric": metric, "value": value})
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
        for row in predict(benchmark, x, folds, study, lot)[1]:
            if np.isfinite(row["value"]):
                found.setdefault((row["protocol"], row["metric"]), []).append(row["value"])
        for (protocol, metric), values in found.items():
            row = {"protocol": protocol, "metric": metric, "draw": draw}
            rows.append(row | {"value": np.mean(values)})
    return rows


def measure_models(
    benchmark: Benchmark, x: dict[str, ndarray], study: Study
) -> tuple[Predictions, dict[str, str], list[dict]]:
    """Of every model, and of chance: predictions, the key of all they depend on, and results.

    What is kept under its key is read.
    """
    about = [
        [study.k, study.pca_dims, study.pca, study.folds, study.seeds, study.paper_splits],
        [benchmark.name, benchmark.ids, benchmark.labels.tolist(), benchmark.classes],
        [benchmark.groups, benchmark.centers, PROTOCOL_VERSION],
    ]
    keys = {"chance": digest(about)}
    for name in x:
        # the name, too: a copy under another name has rows of its own
        keys[name] = digest(name, study.cards[name]["fingerprint"], data_stamp(benchmark), about)
    predictions: Predictions = {}
    rows = []
    folds: Folds = {}
    for name, key in keys.items():
        shown = display(name)
        path = study.results / "predictions" / safe(shown) / f"{safe(benchmark.name)}.npz"
        known, found = load_predictions(path, key), recorded(study.results, key)
        if known is None or not found:
            start = time.perf_counter()
            folds = folds or make_folds(benchmark, study)
            if name == "chance":
                known, new = {}, blind_rows(benchmark, folds, study)
            else:
                known, new = predict(benchmark, x[name], folds, study)
            base = {"benchmark": benchmark.name, "model": shown}
            found = record(study.results, [base | row for row in new], key=key)
            save_predictions(path, key, known)
            took = f"kNN and linear probe, {time.perf_counter() - start:.1f} s"
            print(f"{shown} on {benchmark.name}: {took}", file=sys.stderr)
        predictions[name] = known
        rows += found
    del predictions["chance"]
    return predictions, keys, rows


def compare_models(
    benchmark: Benchmark, x: dict[str, ndarray], predictions: Predictions, study: Study
) -> list[dict]:
    """Rows of results on pairs of models: CKA of all, differences to teacher and baseline."""
    labels, groups, teacher = benchmark.labels, benchmark.groups, study.teacher
    rows = cka_rows(x, groups, teacher, study.device_used, study.baseline)
    for name, other in itertools.product(x, (teacher, study.baseline)):
        if other in x and name not in (other, teacher):
            gains = paired(predictions[name], predictions[other], labels, groups)
            base = {"model": name, "other": other, "protocol": "paired"}
            for kind, found in gains.items():
                figures = zip(("value", "low", "high", "parts"), found, strict=True)
                rows.append(base | {"metric": kind} | dict(figures))
    for row in rows:
        row["benchmark"] = benchmark.name
        row["model"], row["other"] = display(row["model"]), display(row["other"])
    return rows


def evaluate_benchmark(benchmark: Benchmark, x: dict[str, ndarray], study: Study) -> list[dict]:
    """All protocols for all models on one benchmark, recorded and drawn: its rows of results.

    x: features (N, dim) by model name; rows of NaN are unreadable images. What is there is kept.
    """
    keep, notes, marked = without_leaks(benchmark, x, study)
    if not keep.all():
        benchmark, x = benchmark.subset(keep), {name: array[keep] for name, array in x.items()}
    about, limits = describe_design(benchmark, study.folds)
    notes += limits
    predictions, keys, rows = measure_models(benchmark, x, study)
    key = digest(keys, study.teacher, study.baseline, study.leaks, notes)
    compared = recorded(study.results, key)
    if not compared:
        new = compare_models(benchmark, x, predictions, study)
        data: dict = {"model": "data", "benchmark": benchmark.name, "protocol": "data"}
        data |= {"metric": "images", "value": len(benchmark), "notes": notes, "marked": marked}
        compared = record(study.results, [*new, data | about], key=key)
    rows += compared
    if not study.no_pictures:
        draw_benchmark(benchmark, predictions, replace(study, rows=rows), key)
    return rows


def evaluate_all(
    found: list[Benchmark],
    models_of: dict[str, list[str]],
    embed: Callable,
    study: Study,
    failures: list[str],
) -> tuple[Study, dict[str, int]]:
    """One benchmark after another: the study with what was measured, and the unreadable images.

    See `extract` for embed and failures.
    """
    done, rows, lost = [], model_rows(study), {}
    for benchmark in found:
        x = {}
        for name in models_of[benchmark.name]:
            array = embed(name, benchmark, False)
            missing = int(np.isnan(array).any(1).sum())
            if missing:
                lost[benchmark.name] = missing
            if tells_apart(array):
                x[name] = array
            else:
                where = f"{display(name)} on {benchmark.name}"
                failures.append(f"{where}: every image has the same embedding")
        try:
            if x:
                rows += evaluate_benchmark(benchmark, x, study)
                done.append(benchmark)
        except UserError as error:
            failures.append(explain(error, REMEDIES) or "")
    return replace(study, found=done, rows=rows), lost


def model_rows(study: Study) -> list[dict]:
    """One row for each model: what it is and what it costs."""
    rows = []
    for name, about in study.cards.items():
        meta = {k: v for k, v in about["metadata"].items() if k not in ("patients", "slides")}
        row: dict = {"model": display(name), "benchmark": "", "protocol": "model"}
        row |= {"metric": "parameters", "value": about["parameters"], "metadata": meta}
        row |= {"ms_per_image": about["ms_per_image"], "device": study.device_used}
        rows.append(row | {"weights": about["weights"], "key": about["key"]})
    return record(study.results, rows)


def show(study: Study, failures: list[str], as_json: bool, on: str) -> None:
    """Tables, figure and report of what this run measured or found, and one screen of it."""
    tables = write_tables(study)
    if not study.no_pictures:
        draw_figure1(study, on)
    write_report(study, tables, failures)
    if as_json:
        print(json.dumps([row for row in study.rows if row["benchmark"]]))
    else:
        report = study.results / "report.md"
        print(f"{summarize(study)}\n\ntables, pictures and how to read them: {report}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="registry names, timm:NAME, or folders such as runs/NAME/student",
    )
    teacher = "CKA is measured to it; with --all: h-optimus-0 if at hand"
    what.add_argument("--teacher", metavar="NAME", help=teacher)
    before = "student before distillation; with --all: hibou-l if at hand"
    what.add_argument("--baseline", metavar="NAME", help=before)
    what.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=list(PUBLISHED),
        help=f"published ones, below DATA/benchmarks/NAME: {', '.join(PUBLISHED)}",
    )
    what.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        metavar="DIR",
        type=directory,
        help="your own: folders with images and a labels.csv (image,label,group[,center])",
    )
    everything = (
        "every benchmark whose data, and without --models every model whose weights are at "
    )
    everything += "hand; says what is missing and where it is"
    what.add_argument("--all", action="store_true", help=everything)
    figure = "benchmark of Figure 1, or mean; the first measured where it is not"
    what.add_argument("--figure1", default="tp53", metavar="NAME", help=figure)
    what.add_argument("--list", action="store_true", help="show the published benchmarks and stop")
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    data = "its benchmarks/NAME hold published data sets"
    where.add_argument("--data", default=Path("data"), type=Path, help=data)
    running = add_running_arguments(where, parser.add_argument_group("running"))
    as_json = "print the metrics as JSON instead of the summary"
    running.add_argument("--json", action="store_true", help=as_json)
    add_protocol_arguments(parser.add_argument_group("protocols"))
    return parser


def add_protocol_arguments(how) -> None:
    """The flags that change numbers."""
    votes = functools.partial(whole, most=64)
    how.add_argument("--k", type=votes, default=15, help="neighbours that vote, 1 to 64")
    how.add_argument("--pca-dims", type=whole, default=50, help="principal axes before kNN")
    how.add_argument(
        "--pca",
        choices=["fold", "all"],
        default="fold",
        help="fit the axes on the training folds, or on everything (leaks; perhaps the paper's "
        "way)",
    )
    several = functools.partial(whole, least=2)
    folds = "folds of kNN; fewer where there are fewer groups"
    how.add_argument("--folds", type=several, default=10, help=folds)
    how.add_argument("--seeds", type=whole, default=5, help="6:2:2 splits of the linear probe")
    loose = "also split without regard to patients, to compare with published numbers"
    how.add_argument("--paper-splits", action="store_true", help=loose)
    how.add_argument(
        "--leaks",
        choices=["exclude", "mark"],
        default="exclude",
        help="images of patients or slides that a student was distilled on: leave out for all "
        "models, or only mark",
    )


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Extract what is missing, measure what is new, write tables and pictures: the exit status."""
    from g2l.ranks import leave_distributed, setup_distributed
    from g2l.weights import parse_weights

    published = name_benchmarks(args)
    models, teacher, baseline = name_models(args)
    check_request(args, models, published)
    weights = parse_weights(args.weights, models)
    options = model_options(args)
    if args.input_size:
        options["input_size"] = args.input_size
    rank, _, device = setup_distributed(args.device)
    found, failed = load_benchmarks(args.benchmark, published, args.data, args.results / "index")
    failures = [explain(error, REMEDIES) or "" for error in failed]

    def embed(name: str, benchmark: Benchmark, together: bool = True) -> ndarray:
        return features(
            name,
            benchmark,
            args.results,
            weights=weights[name],
            batch_size=args.batch_size,
            workers=args.workers,
            max_unreadable=args.max_unreadable,
            together=together,
            **options,
        )

    def describe(name: str) -> dict:
        return card(name, args.results, weights=weights[name], **options)

    claim(args.results, origins_of(models, found))
    cards, models_of = extract(models, found, embed, describe, failures)
    loaded_model.cache_clear()
    leave_distributed()
    if rank != 0:  # the other ranks only share the images
        return 0
    study = Study(
        **{name: getattr(args, name) for name in STUDY_FLAGS},
        models=list(cards),
        teacher=teacher,
        baseline=baseline,
        cards=cards,
        device_used=str(device),
        argv=argv,
    )
    study, lost = evaluate_all(found, models_of, embed, study, failures)
    failures = list(dict.fromkeys(failures))
    if study.found:
        show(study, failures, args.json, args.figure1)
    return report_failures(failures, lost)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.list:
        print(list_benchmarks(args.data))
        own = f"Unpack each below {args.data}/benchmarks/NAME as it comes"
        print(f"\n{own}; your own folder: --benchmark DIR")
        return 0
    command = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: run(args, command), REMEDIES)


if __name__ == "__main__":
    sys.exit(main())

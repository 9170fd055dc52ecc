"""Stage 3 of G2L: every model on every benchmark by CKA, kNN and probe: Tables 1, 2 and Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student \
        --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...   # with labels.csv: image,label,group

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its
majority baseline, and features are extracted once: results/features holds them, keyed by weights,
preprocessing and images.

The story: `name_models` and `name_benchmarks` say what is compared, `extract` makes the features,
`evaluate_benchmark` measures one benchmark after another, `show` draws tables and pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from g2l.arguments import Help, add_running_arguments, directory, whole
from g2l.benchmarks import Benchmark, cohort_of, leaked
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
from g2l.protocols import cka_rows, knn_predict, linear_probe, macro_auc, paired, recall, split
from g2l.published import PUBLISHED, at_hand, list_benchmarks, load_benchmarks
from g2l.report import summarize, write_report, write_tables
from g2l.results import Study, load_predictions, read_metrics, record, save_predictions

# Raised on purpose when a protocol would give other numbers; predictions are then made anew.
PROTOCOL_VERSION = 1

REMEDIES = {
    "benchmark data": "`python evaluate.py --list` says where to get it; unpack the archive below "
    "this folder as it comes",
    "benchmark names": "rename one of the folders of --benchmark",
    "leaks": "--leaks mark keeps the patients that a student has seen",
    "unreadable": "mend them, or allow more by --max-unreadable",
}
Predictions = dict[str, dict]  # of each model, see `predict`


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


def extract(
    models: list[str], found: list[Benchmark], embed: Callable, describe: Callable
) -> tuple[dict[str, dict], dict[str, list[str]], dict[str, int], list[str]]:
    """Features of every model on every benchmark into the cache, by all ranks together.

    embed(model, benchmark) gives the features (N, dim), describe(model) the model's card. Returns
    the cards, the models that each benchmark has, its unreadable images, and what failed.
    """
    cards: dict[str, dict] = {}
    models_of: dict[str, list[str]] = {b.name: [] for b in found}
    lost, failures = {}, []
    for name in models:
        for benchmark in found:
            try:
                missing = int(np.isnan(embed(name, benchmark)).any(1).sum())
                cards[name] = describe(name)
            except UserError as error:
                failures.append(explain(error, REMEDIES) or "")
                if name not in cards:
                    break  # the model itself cannot be loaded
            else:
                models_of[benchmark.name].append(name)
                if missing:
                    lost[benchmark.name] = missing
    return cards, models_of, lost, failures


def without_leaks(
    benchmark: Benchmark, x: dict[str, np.ndarray], study: Study
) -> tuple[np.ndarray, list[str], list[str]]:
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
    pairs = set(zip(labels.tolist(), benchmark.groups, strict=True))
    class_groups = np.bincount([c for c, _ in pairs], minlength=len(classes)).tolist()
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


def predict(
    benchmark: Benchmark, x: np.ndarray, study: Study, device: str
) -> tuple[dict, list[dict]]:
    """kNN and linear probe of one model's features (N, D): its predictions, and rows of results."""
    labels, groups, n_classes = benchmark.labels, benchmark.groups, len(benchmark.classes)
    predictions, rows = {}, []
    common = np.bincount(labels).argmax()
    for grouped in (True, False) if study.paper_splits else (True,):
        tail = "" if grouped else "-ungrouped"
        fold = split(labels, groups, study.folds, 0, grouped)
        guess, neighbors = knn_predict(
            x,
            labels,
            fold,
            n_classes,
            k=study.k,
            dims=study.pca_dims,
            pca=study.pca,
            device=device,
        )
        for f in range(fold.max() + 1):
            base = {"protocol": f"knn{tail}", "fold": f}
            accuracy = float((guess == labels)[fold == f].mean())
            majority = float((labels[fold == f] == common).mean())
            rows.append(base | {"metric": "accuracy", "value": accuracy})
            rows.append(base | {"metric": "majority", "value": majority})
        balanced = {"metric": "balanced accuracy", "value": recall(guess, labels)}
        rows.append({"protocol": f"knn{tail}"} | balanced)
        tried = [
            linear_probe(x, labels, groups, n_classes, seed, grouped) for seed in range(study.seeds)
        ]
        probes = [probe for probe in tried if probe]
        for probe in probes:
            base = {"protocol": f"probe{tail}", "seed": probe["seed"], "C": probe["C"]}
            scores, y = probe["scores"], labels[probe["test"]]
            balanced = {"metric": "balanced accuracy", "value": recall(scores.argmax(1), y)}
            rows.append(base | {"metric": "auc", "value": float(macro_auc(scores, y)[0])})
            rows.append(base | balanced)
        if grouped:
            predictions = {"knn": guess, "neighbors": neighbors, "probe": probes}
    return predictions, rows


def measure_models(
    benchmark: Benchmark, x: dict[str, np.ndarray], study: Study
) -> tuple[Predictions, dict[str, str]]:
    """Predictions of every model, and the key of what each depends on; kept ones are read."""
    settings = digest(
        [study.k, study.pca_dims, study.pca, study.folds, study.seeds, study.paper_splits],
        benchmark.ids,
        benchmark.groups,
        benchmark.labels.tolist(),
        PROTOCOL_VERSION,
    )
    predictions: Predictions = {}
    keys = {}
    for name, array in x.items():
        shown = display(name)
        path = study.results / "predictions" / safe(shown) / f"{safe(benchmark.name)}.npz"
        keys[name] = digest(study.cards[name]["fingerprint"], data_stamp(benchmark), settings)
        known = load_predictions(path, keys[name])
        if known is None:
            start = time.perf_counter()
            known, rows = predict(benchmark, array, study, study.device_used)
            base = {"benchmark": benchmark.name, "model": shown}
            same = ("model", "benchmark", "protocol")
            record(study.results, [base | row for row in rows], same=same)
            save_predictions(path, keys[name], known)
            seconds = time.perf_counter() - start
            print(
                f"{shown} on {benchmark.name}: kNN and linear probe, {seconds:.1f} s",
                file=sys.stderr,
            )
        predictions[name] = known
    return predictions, keys


def compare_models(
    benchmark: Benchmark, x: dict[str, np.ndarray], predictions: Predictions, study: Study
) -> list[dict]:
    """Rows of results on pairs of models: CKA of all, differences to teacher and baseline."""
    rows = cka_rows(x, benchmark.groups, study.teacher, study.device_used, study.baseline)
    ends = [name for name in (study.teacher, study.baseline) if name in x]
    for name, other in [(n, o) for n in x for o in ends if n not in (o, study.teacher)]:
        gains = paired(predictions[name], predictions[other], benchmark.labels, benchmark.groups)
        base = {"model": name, "other": other, "protocol": "paired"}
        for kind, (value, low, high) in gains.items():
            rows.append(base | {"metric": kind, "value": value, "low": low, "high": high})
    for row in rows:
        row["benchmark"] = benchmark.name
        row["model"], row["other"] = display(row["model"]), display(row["other"])
    return rows


def evaluate_benchmark(benchmark: Benchmark, x: dict[str, np.ndarray], study: Study) -> None:
    """All protocols for all models on one benchmark, recorded and drawn; what is there is kept.

    x: features (N, dim) by model name; rows of NaN are unreadable images.
    """
    keep, notes, marked = without_leaks(benchmark, x, study)
    if not keep.all():
        benchmark, x = benchmark.subset(keep), {name: array[keep] for name, array in x.items()}
    about, limits = describe_design(benchmark, study.folds)
    notes += limits
    predictions, keys = measure_models(benchmark, x, study)
    key = digest(sorted(keys.values()), study.teacher, study.baseline, study.leaks, notes)
    new = not any(row.get("key") == key for row in read_metrics(study.results))
    if new:
        rows = compare_models(benchmark, x, predictions, study)
        data: dict = {"model": "data", "benchmark": benchmark.name, "protocol": "data"}
        data |= {"metric": "images", "value": len(benchmark), "key": key}
        rows.append(data | about | {"notes": notes, "marked": marked})
        record(study.results, rows, same=("model", "other", "benchmark", "protocol"))
    drawn = study.results / "pictures" / f"confusion-{safe(benchmark.name)}.png"
    if not study.no_pictures and (new or not drawn.is_file()):
        draw_benchmark(benchmark, predictions, study)


def record_models(study: Study) -> None:
    """One row for each model: what it is and what it costs."""
    rows = []
    for name, about in study.cards.items():
        meta = {k: v for k, v in about["metadata"].items() if k not in ("patients", "slides")}
        row: dict = {"model": display(name), "benchmark": "", "protocol": "model"}
        row |= {"metric": "parameters", "value": about["parameters"], "metadata": meta}
        row |= {"ms_per_image": about["ms_per_image"], "device": study.device_used}
        rows.append(row | {"weights": about["weights"]})
    record(study.results, rows, same=("model", "protocol"))


def show(study: Study, failures: list[str], as_json: bool) -> None:
    """Tables, figure and report from what is recorded, and one screen of it."""
    tables = write_tables(study)
    if not study.no_pictures:
        draw_figure1(study)
    write_report(study, tables, failures)
    if as_json:
        names = {benchmark.name for benchmark in study.found}
        rows = [row for row in read_metrics(study.results) if row["benchmark"] in names]
        print(json.dumps(rows))
    else:
        report = study.results / "report.md"
        print(f"{summarize(study)}\n\ntables, pictures and how to read them: {report}")


def build_parser() -> argparse.ArgumentParser:
    from g2l.devices import add_model_arguments

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


def plan(
    args: argparse.Namespace,
    argv: list[str],
    cards: dict[str, dict],
    teacher: str | None,
    baseline: str | None,
    device: str,
) -> Study:
    """The comparison that the flags ask for, of the models that could be loaded."""
    return Study(
        results=args.results,
        models=list(cards),
        teacher=teacher,
        baseline=baseline,
        found=[],
        cards=cards,
        device_used=device,
        argv=argv,
        k=args.k,
        pca_dims=args.pca_dims,
        pca=args.pca,
        folds=args.folds,
        seeds=args.seeds,
        paper_splits=args.paper_splits,
        leaks=args.leaks,
        no_pictures=args.no_pictures,
    )


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Extract what is missing, measure what is new, write tables and pictures: the exit status."""
    from g2l.devices import model_options
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

    def embed(name: str, benchmark: Benchmark, together: bool = True) -> np.ndarray:
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

    cards, models_of, lost, broken = extract(models, found, embed, describe)
    failures += broken
    loaded_model.cache_clear()
    leave_distributed()
    if rank != 0:  # the other ranks only share the images
        return 0
    study = plan(args, argv, cards, teacher, baseline, str(device))
    record_models(study)
    done = []
    for benchmark in found:
        try:
            x = {name: embed(name, benchmark, False) for name in models_of[benchmark.name]}
            if x:
                evaluate_benchmark(benchmark, x, study)
                done.append(benchmark)
        except UserError as error:
            failures.append(explain(error, REMEDIES) or "")
    failures = list(dict.fromkeys(failures))
    if done:
        show(replace(study, found=done), failures, args.json)
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

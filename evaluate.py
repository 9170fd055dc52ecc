"""Stage 3 of G2L: features of every model on every benchmark, then CKA, kNN and a linear probe: Tables 1, 2, Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...          # images and a labels.csv: image,label,group[,center]

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its majority baseline, and
features are extracted once: results/features holds them, keyed by weights, preprocessing and images.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from g2l.arguments import Help, add_running_arguments, directory, whole
from g2l.benchmarks import Benchmark, leaked
from g2l.errors import UserError, exit_status
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
from g2l.results import load_predictions, read_metrics, record, save_predictions

PROTOCOL_VERSION = (
    1  # raised on purpose when a protocol would give other numbers; predictions are made anew
)


def evaluate_benchmark(
    benchmark: Benchmark, x: dict[str, np.ndarray], args: argparse.Namespace
) -> None:
    """All protocols for all models on one benchmark into metrics.jsonl, and its pictures; what is there is kept.

    x: features by model name; rows of NaN are unreadable images.
    """
    notes, keep = list(benchmark.notes), np.all([np.isfinite(f).all(1) for f in x.values()], 0)
    if not keep.all():
        notes.append(f"{(~keep).sum()} unreadable images left out")
    marked = []
    for name in x:
        rows = leaked(benchmark, args.cards[name])
        if rows.any():
            marked += [display(name)] if args.leaks == "mark" else []
            keep &= ~rows if args.leaks == "exclude" else True
            patients = len({g for g, hit in zip(benchmark.groups, rows, strict=True) if hit})
            notes.append(
                f"{display(name)} was distilled on {patients} of its patients ({rows.sum()} images, first "
                f"{benchmark.ids[rows.argmax()]} of {benchmark.groups[rows.argmax()]}): "
                + (
                    "left out for all models"
                    if args.leaks == "exclude"
                    else "its numbers are marked ⚠"
                )
            )
        elif args.cards[name]["metadata"].get("teacher") and not (
            args.cards[name]["metadata"].get("patients")
            or args.cards[name]["metadata"].get("slides")
        ):
            notes.append(
                f"the cohort of {display(name)} is not recorded: shared patients cannot be found"
            )
    if not keep.any():
        raise UserError(
            f"{benchmark.name}: no image is left ({'; '.join(notes)}); --leaks mark keeps the patients "
            "that a student has seen"
        )
    if not keep.all():
        benchmark, x = benchmark.subset(keep), {name: f[keep] for name, f in x.items()}
    labels, groups, n_classes = benchmark.labels, benchmark.groups, len(benchmark.classes)
    present = np.bincount(labels, minlength=n_classes)
    if len(labels) < 8:
        raise UserError(
            f"{benchmark.name}: {len(labels)} images are too few to measure anything; 8 are needed"
        )
    if (present > 0).sum() < 2:
        raise UserError(
            f"{benchmark.name}: all {len(labels)} images are of class {benchmark.classes[labels[0]]}; two "
            "classes are needed to tell anything apart"
        )
    patients = [
        len({g for g, y in zip(groups, labels, strict=True) if y == c}) for c in range(n_classes)
    ]
    thin = [
        f"{benchmark.classes[c]} ({patients[c]})" for c in range(n_classes) if 0 < patients[c] < 5
    ]
    if thin:
        notes.append(
            f"classes with fewer than 5 groups, absent from some splits: {', '.join(thin)}"
        )
    if len(set(groups)) < args.folds:
        notes.append(
            f"{len(set(groups))} groups: as many folds at most"
            + ("; too few for the probe's 6:2:2" if len(set(groups)) < 5 else "")
        )
    settings = digest(
        [args.k, args.pca_dims, args.pca, args.folds, args.seeds, args.paper_splits],
        benchmark.ids,
        groups,
        labels.tolist(),
        PROTOCOL_VERSION,
    )
    base, predictions, keys, device = {"benchmark": benchmark.name}, {}, {}, str(args.device_used)
    for name in x:
        path = (
            Path(args.results) / "predictions" / safe(display(name)) / f"{safe(benchmark.name)}.npz"
        )
        keys[name] = digest(args.cards[name]["fingerprint"], data_stamp(benchmark), settings)
        predictions[name] = load_predictions(path, keys[name])
        if predictions[name] is None:
            start = time.perf_counter()
            predictions[name], new = predict(benchmark, x[name], args, device)
            record(
                args.results,
                [base | {"model": display(name)} | row for row in new],
                same=("model", "benchmark", "protocol"),
            )
            save_predictions(path, keys[name], predictions[name])
            print(
                f"{display(name)} on {benchmark.name}: kNN and linear probe, {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
            )
    key, rows = digest(sorted(keys.values()), args.teacher, args.baseline, args.leaks, notes), []
    new = not any(row.get("key") == key for row in read_metrics(args.results))
    if new:
        for row in cka_rows(x, groups, args.teacher, device, args.baseline):
            rows.append(
                base | row | {"model": display(row["model"]), "other": display(row["other"])}
            )
        ends = [n for n in (args.teacher, args.baseline) if n in x]
        for name, other in [(n, o) for n in x for o in ends if n not in (o, args.teacher)]:
            for kind, (value, low, high) in paired(
                predictions[name], predictions[other], labels, groups
            ).items():
                rows.append(
                    base
                    | {
                        "model": display(name),
                        "protocol": "paired",
                        "metric": kind,
                        "value": value,
                        "other": display(other),
                        "low": low,
                        "high": high,
                    }
                )
        rows.append(
            base
            | {
                "model": "data",
                "protocol": "data",
                "metric": "images",
                "value": len(labels),
                "key": key,
                "level": benchmark.level,
                "classes": benchmark.classes,
                "counts": present.tolist(),
                "groups": len(set(groups)),
                "class_groups": patients,
                "notes": notes,
                "marked": marked,
            }
        )
        record(args.results, rows, same=("model", "other", "benchmark", "protocol"))
    seen = Path(args.results) / "pictures" / f"confusion-{safe(benchmark.name)}.png"
    if not args.no_pictures and (new or not seen.is_file()):
        draw_benchmark(benchmark, predictions, args)


def predict(
    benchmark: Benchmark, x: np.ndarray, args: argparse.Namespace, device: str
) -> tuple[dict, list[dict]]:
    """kNN and linear probe of one model's features (N, D): predictions by row, and the rows for metrics.jsonl."""
    labels, groups, n_classes = benchmark.labels, benchmark.groups, len(benchmark.classes)
    rows, predictions, common = [], {}, np.bincount(labels).argmax()
    for grouped in (True, False) if args.paper_splits else (True,):
        tail = "" if grouped else "-ungrouped"
        fold = split(labels, groups, args.folds, 0, grouped)
        guess, neighbors = knn_predict(
            x, labels, fold, n_classes, k=args.k, dims=args.pca_dims, pca=args.pca, device=device
        )
        for f in range(fold.max() + 1):
            test = fold == f
            rows += [
                {"protocol": "knn" + tail, "metric": metric, "fold": f, "value": float(value)}
                for metric, value in (
                    ("accuracy", (guess == labels)[test].mean()),
                    ("majority", (labels[test] == common).mean()),
                )
            ]
        rows.append(
            {
                "protocol": "knn" + tail,
                "metric": "balanced accuracy",
                "value": recall(guess, labels),
            }
        )
        probes = [
            p
            for p in (
                linear_probe(x, labels, groups, n_classes, s, grouped) for s in range(args.seeds)
            )
            if p
        ]
        for p in probes:
            y = labels[p["test"]]
            rows += [
                {
                    "protocol": "probe" + tail,
                    "metric": metric,
                    "seed": p["seed"],
                    "value": value,
                    "C": p["C"],
                }
                for metric, value in (
                    ("auc", float(macro_auc(p["scores"], y)[0])),
                    ("balanced accuracy", recall(p["scores"].argmax(1), y)),
                )
            ]
        if grouped:
            predictions = {"knn": guess, "neighbors": neighbors, "probe": probes}
    return predictions, rows


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
    what.add_argument(
        "--teacher",
        metavar="NAME",
        help="CKA is measured to it; with --all: h-optimus-0 if at hand",
    )
    what.add_argument(
        "--baseline",
        metavar="NAME",
        help="student before distillation; with --all: hibou-l if at hand",
    )
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
    what.add_argument(
        "--all",
        action="store_true",
        help="every benchmark whose data, and without --models every model "
        "whose weights are at hand; says what is missing and where it is",
    )
    what.add_argument("--list", action="store_true", help="show the published benchmarks and stop")
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data",
        default=Path("data"),
        type=Path,
        help="its benchmarks/NAME hold published data sets",
    )
    add_running_arguments(where, parser.add_argument_group("running")).add_argument(
        "--json", action="store_true", help="print the metrics as JSON instead of the summary"
    )
    how = parser.add_argument_group("protocols")
    how.add_argument(
        "--k",
        type=functools.partial(whole, most=64),
        default=15,
        help="neighbours that vote, 1 to 64",
    )
    how.add_argument("--pca-dims", type=whole, default=50, help="principal axes before kNN")
    how.add_argument(
        "--pca",
        choices=["fold", "all"],
        default="fold",
        help="fit the axes on the training folds, or on everything (leaks; perhaps the paper's way)",
    )
    how.add_argument(
        "--folds",
        type=functools.partial(whole, least=2),
        default=10,
        help="folds of kNN; fewer where there are fewer groups",
    )
    how.add_argument("--seeds", type=whole, default=5, help="6:2:2 splits of the linear probe")
    how.add_argument(
        "--paper-splits",
        action="store_true",
        help="also split without regard to patients, to compare with published numbers",
    )
    how.add_argument(
        "--leaks",
        choices=["exclude", "mark"],
        default="exclude",
        help="images of patients or slides that a student was distilled on: leave out for all models, or "
        "only mark",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Extract what is missing, measure what is new, write tables and pictures. Returns the exit status."""
    from g2l.devices import model_options
    from g2l.ranks import leave_distributed, setup_distributed
    from g2l.weights import parse_weights

    here = [n for n in PUBLISHED if at_hand(args.data, n)] if args.all else []
    args.benchmarks = list(dict.fromkeys([*args.benchmarks, *here]))
    if args.all and int(os.environ.get("RANK", 0)) == 0:
        for name in [n for n in PUBLISHED if n not in args.benchmarks]:
            print(
                f"benchmark {name} is not in {args.data}/benchmarks/{name}; from {PUBLISHED[name].source}",
                file=sys.stderr,
            )
    if args.all and not args.models:
        args.models = models_at_hand(args)
        args.teacher = args.teacher or ("h-optimus-0" if "h-optimus-0" in args.models else None)
        args.baseline = args.baseline or ("hibou-l" if "hibou-l" in args.models else None)
    args.models = list(
        dict.fromkeys([*args.models, *(n for n in (args.teacher, args.baseline) if n)])
    )
    lacks = []
    if not args.models:
        lacks.append(
            "no model: name one by --models, for instance h-optimus-0 (fetched from the hub, or --weights "
            "h-optimus-0=FILE) or runs/NAME/student (made by distill.py)"
        )
    if not args.benchmark and not args.benchmarks:
        lacks.append(
            "no benchmark: "
            + (
                f"none is below {args.data / 'benchmarks'}, and --list says where to get one; "
                "your own goes by --benchmark DIR"
                if args.all
                else "give --benchmark DIR, --benchmarks NAME (--list shows them) or --all"
            )
        )
    if lacks:
        raise UserError("; ".join(lacks))
    check_names(args.models)
    weights = parse_weights(args.weights, args.models)
    options = model_options(args) | ({"input_size": args.input_size} if args.input_size else {})
    rank, _, args.device_used = setup_distributed(args.device)
    failures: list[str] = []
    args.found, args.cards = load_benchmarks(args, failures), {}
    arrays: dict[str, list[str]] = {b.name: [] for b in args.found}
    lost: dict[str, int] = {}
    get = lambda name, benchmark, together: features(  # noqa: E731
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
    for name in args.models:
        for benchmark in args.found:
            try:
                if missing := int(np.isnan(get(name, benchmark, True)).any(1).sum()):
                    lost[benchmark.name] = missing
                args.cards[name] = card(name, args.results, weights=weights[name], **options)
                arrays[benchmark.name].append(name)
            except UserError as error:
                failures.append(str(error))
                if name not in args.cards:
                    break  # the model itself cannot be loaded
    loaded_model.cache_clear()
    leave_distributed()
    if rank != 0:  # the other ranks only share the images
        return 0
    args.models = [n for n in args.models if n in args.cards]
    record(
        args.results,
        [
            {
                "model": display(n),
                "benchmark": "",
                "protocol": "model",
                "metric": "parameters",
                "value": c["parameters"],
                "ms_per_image": c["ms_per_image"],
                "device": str(args.device_used),
                "weights": c["weights"],
                "metadata": {
                    k: v for k, v in c["metadata"].items() if k not in ("patients", "slides")
                },
            }
            for n, c in args.cards.items()
        ],
        same=("model", "protocol"),
    )
    done = []
    for benchmark in args.found:
        try:
            if arrays[benchmark.name]:
                evaluate_benchmark(
                    benchmark, {n: get(n, benchmark, False) for n in arrays[benchmark.name]}, args
                )
                done.append(benchmark)
        except UserError as error:
            failures.append(str(error))
    args.found = done
    failures = list(dict.fromkeys(failures))
    if done:
        tables = write_tables(args)
        if not args.no_pictures:
            draw_figure1(args)
        write_report(args, tables, failures)
        if args.json:
            print(
                json.dumps(
                    [
                        r
                        for r in read_metrics(args.results)
                        if r["benchmark"] in {b.name for b in done}
                    ]
                )
            )
        else:
            print(
                summarize(args)
                + f"\n\ntables, pictures and how to read them: {args.results / 'report.md'}"
            )
    return report_failures(failures, lost)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.list:
        print(list_benchmarks(args.data))
        return 0
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

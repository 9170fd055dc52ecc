"""Stage 3 of G2L: every model on every benchmark by CKA, kNN and probe: Tables 1, 2 and Figure 1.

    python evaluate.py --list
    python evaluate.py --all --models h-optimus-0 hibou-l runs/NAME/student \
        --teacher h-optimus-0 --baseline hibou-l
    python evaluate.py --benchmark MY_FOLDER --models ...   # with labels.csv: image,label,group
    python evaluate.py --slides-table MY.csv --cancer brca --models ...   # slide_id,label[,patient]

No patient (or its best proxy) is ever on both sides of a split, every number stands beside its
majority baseline, and features are extracted once: results/features holds them, keyed by weights,
preprocessing and images. Beside each figure stands what features that know nothing score.

The story: `name_models` and `name_benchmarks` say what is compared, `extract` makes the features,
`evaluate_all` measures one benchmark after another, `show` draws tables and pictures. PyTorch is
imported only by what needs it, so that the flags are checked at once.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from g2l.arguments import add_running_arguments, flag, in_group, parser_of, whole
from g2l.benchmarks import Benchmark, add_choice_arguments, choices_of
from g2l.devices import MODEL_REMEDIES, add_model_arguments, model_options
from g2l.errors import (
    GO_ON,
    WORKERS,
    UserError,
    exit_status,
    explain,
    one_line,
    rank_of_torchrun,
    warn,
)
from g2l.exports import TOOLS, export
from g2l.field import TITLES
from g2l.files import safe
from g2l.published import PUBLISHED, SECTIONS, at_hand, list_benchmarks, load_benchmarks

TILED = "tile.py {} makes patches of it, which --cancer takes"
REMEDIES = MODEL_REMEDIES | {
    "mpp": TILED.format("--assume-mpp or --manifest"),
    "magnification": TILED.format("--resample --enlarge"),
    "benchmark data": "`python evaluate.py --list` says where to get it; unpack the archive below "
    "this folder as it comes",
    "benchmark names": "rename one of the folders of --benchmark",
    "leaks": "--leaks mark keeps the patients that a student has seen",
    "name": "rename one of the two, or take another folder by --results",
    "stuck": f"is the storage of the images still there? Take other --workers, and {GO_ON}",
    "workers": f"{WORKERS}, and {GO_ON}",
    "embed": "embed.py --redo makes it anew",
    "bags": "embed.py --cancer NAME --models makes them, and --cancer NAME takes them",
    "cohort": "name the one that tile.py made of them by --cancer",
    "unreadable": "mend them, or allow more by --max-unreadable",
}


def name_models(args: argparse.Namespace) -> tuple[list[str], str | None, str | None]:
    """The models to compare, teacher and baseline among them; --all takes those at hand."""
    from g2l.features import models_at_hand

    models = args.models
    teacher = args.teacher
    baseline = args.baseline
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
    for name in PUBLISHED if args.all else ():
        if at_hand(args.data, name):
            names.append(name)
        elif name not in names and rank_of_torchrun() == 0:
            where = f"{args.data / 'benchmarks' / name}; from {SECTIONS[name]['where from']}"
            warn(f"benchmark {name} is not in {where}")
    return list(dict.fromkeys(names))


def check_request(args: argparse.Namespace, models: list[str], published: list[str]) -> None:
    """UserError where there is no model, no benchmark, or one name for two models."""
    from g2l.features import check_names

    lacks = []
    if not models:
        lacks.append(
            "no model: name one by --models, for instance h-optimus-0 (fetched from the hub, or "
            "--weights h-optimus-0=FILE) or runs/NAME/student (made by distill.py)"
        )
    own = args.benchmark or args.slides_table
    if not published and not own and args.all:
        lacks.append(
            f"no benchmark: none is below {args.data / 'benchmarks'}, and --list says where to "
            "get one; your own goes by --benchmark DIR"
        )
    elif not published and not own:
        lacks.append(
            "no benchmark: give --benchmark DIR, --benchmarks NAME (--list shows them) or --all"
        )
    if lacks:
        raise UserError("; ".join(lacks))
    check_names(models)


def extract(
    models: list[str],
    found: list[Benchmark],
    embed: Callable,
    describe: Callable,
    failures: list[UserError],
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Features of every model on every benchmark into the cache, by all ranks together.

    embed(model, benchmark) gives the features (N, dim), describe(model) the model's card. Returns
    the cards, and by benchmark and model which images (N,) could be read; what failed goes to
    `failures`.
    """
    from g2l.features import display, readable_rows

    cards = {}
    readable: dict[str, dict] = {benchmark.name: {} for benchmark in found}
    for name in models:
        for benchmark in found:
            where = f"{display(name)} on {benchmark.name}"
            try:
                cards[name] = describe(name)
                readable[benchmark.name][name] = readable_rows(embed(name, benchmark), where)
            except UserError as error:
                failures.append(error)
                if name not in cards:
                    break  # the model itself cannot be loaded
    return cards, readable


def show(study: Any, failures: list[str], as_json: bool, on: str) -> None:
    """Tables, figure and report of what this run measured or found, and one screen of it."""
    from g2l.pictures import draw_figure1
    from g2l.report import summarize, write_report, write_tables

    tables = write_tables(study)
    if not study.no_pictures:
        draw_figure1(study, on)
    write_report(study, tables, failures)
    if as_json:
        print(json.dumps([row for row in study.rows if row["benchmark"]]))
    else:
        where = f"tables, pictures and how to read them: {study.results / 'report.html'}"
        print(f"{summarize(study)}\n\n{where}")


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add = in_group(parser, "what to compare")
    registered = "registry names, timm:NAME, or folders such as runs/NAME/student"
    add("--models NAME", registered, [], nargs="+")
    add("--teacher NAME", "CKA is measured to it; with --all: h-optimus-0 if at hand")
    add("--baseline NAME", "student before distillation; with --all: hibou-l if at hand")
    add(
        "--benchmarks NAME",
        f"published ones, below DATA/benchmarks/NAME: {', '.join(PUBLISHED)}",
        [],
        nargs="+",
        choices=list(PUBLISHED),
    )
    add(
        "--benchmark DIR",
        "your own: folders with images and a labels.csv (image,label,group[,center])",
        [],
        nargs="+",
    )
    add(
        "--all",
        "every benchmark whose data, and without --models every model whose weights are at "
        "hand; says what is missing and where it is",
    )
    add(
        "--figure1 NAME",
        "benchmark of Figure 1, or mean; the first measured where it is not",
        "tp53",
    )
    add("--list", "show the published benchmarks and stop")
    add(
        "--export",
        "write what that benchmark needs to evaluate the students of --models, and stop",
        choices=list(TOOLS),
    )
    add_choice_arguments(parser)
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    flag(where, "--data DIR", "its benchmarks/NAME hold published data sets", Path("data"))
    running = add_running_arguments(where, parser.add_argument_group("running"))
    flag(running, "--json", "print the metrics as JSON instead of the summary")
    add_protocol_arguments(parser)
    return parser


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that change numbers."""
    add = in_group(parser, "protocols")
    add(
        "--protocols NAME",
        "beside the paper's; each with its chance level, in table2.md: " + ", ".join(TITLES),
        [],
        nargs="+",
        choices=list(TITLES),
    )
    votes = functools.partial(whole, most=64)
    add("--k N", "neighbours that vote, 1 to 64", 15, type=votes)
    add("--pca-dims N", "principal axes before kNN", 50)
    add(
        "--pca",
        "fit the axes on the training folds, or on everything (leaks; perhaps the paper's way)",
        "fold",
        choices=["fold", "all"],
    )
    several = functools.partial(whole, least=2)
    add("--folds N", "folds of kNN; fewer where there are fewer groups", 10, type=several)
    add("--seeds N", "6:2:2 splits of the linear probe", 5)
    add(
        "--paper-splits",
        "also split without regard to patients, to compare with published numbers",
    )
    add(
        "--leaks",
        "images of patients or slides that a student was distilled on: leave out for all "
        "models, or only mark",
        "exclude",
        choices=["exclude", "mark"],
    )


def run(args: argparse.Namespace) -> int:
    """Extract what is missing, measure what is new, write tables and pictures: the exit status."""
    from g2l.evaluation import evaluate_all
    from g2l.features import card, features, loaded_model, origins_of, report_failures
    from g2l.ranks import leave_distributed, setup_distributed
    from g2l.results import Study, claim
    from g2l.weights import parse_weights

    published = name_benchmarks(args)
    models, teacher, baseline = name_models(args)
    choices = choices_of(args, models, REMEDIES)
    if args.draw and not models:  # the list alone, for tile.py --exclude
        _, failed = load_benchmarks([], published, choices)
        return report_failures([explain(error, REMEDIES) or "" for error in failed], {})
    check_request(args, models, published)
    weights = parse_weights(args.weights, models)
    options = model_options(args)
    if args.input_size:
        options["input_size"] = args.input_size
    rank, _, device = setup_distributed(args.device)
    found, failed = load_benchmarks(args.benchmark, published, choices)
    failures = list(failed)

    def embed(name: str, benchmark: Benchmark, together: bool = True) -> Any:
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
    cards, readable = extract(models, found, embed, describe, failures)
    loaded_model.cache_clear()
    leave_distributed()
    if rank != 0:  # the other ranks only share the images
        return 0
    flags = {
        name: value for name, value in vars(args).items() if name in Study.__dataclass_fields__
    }
    flags |= {"models": list(cards), "teacher": teacher, "baseline": baseline}
    study = Study(
        **flags,
        cards=cards,
        device_used=str(device),
        load=lambda name: loaded_model(name, weights[name], **options),
    )
    study, lost = evaluate_all(found, readable, embed, study, failures)
    texts = list(dict.fromkeys(one_line(explain(e, REMEDIES) or "") for e in failures))
    if study.found:
        show(study, texts, args.json, args.figure1)
    return report_failures(texts, lost)


def export_students(args: argparse.Namespace) -> int:
    """What another benchmark needs of each student, below the results."""
    if not args.models:
        raise UserError("--export: name the students by --models, such as runs/NAME/student")
    for name in args.models:
        folder = args.results / "exports" / safe(Path(name).resolve().parent.name)
        print(export(Path(name), args.export, folder))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.list:
        print(list_benchmarks(args.data))
        own = f"Unpack each below {args.data}/benchmarks/NAME as it comes"
        print(f"\n{own}; your own folder: --benchmark DIR")
        return 0
    if args.export:
        return exit_status(lambda: export_students(args), REMEDIES)
    return exit_status(lambda: run(args), REMEDIES)


if __name__ == "__main__":
    sys.exit(main())

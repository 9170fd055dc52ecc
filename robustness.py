"""Stage 4 of G2L: does a model see the tissue or the hospital it came from? Table 3, with what is needed to read it.

    python robustness.py                                                           # all models at hand, on TIGER
    python robustness.py --models h-optimus-0 runs/NAME/student --benchmark DIR    # your own patches and centres
    python robustness.py --models h-optimus-0 runs/NAME/student --cancer brca --perturb stain jpeg   # no centres needed

The robustness index (de Jong, Marcus and Teuwen, arXiv 2501.18055) looks at the k nearest neighbours of every patch:

    index = neighbours of the same class / neighbours of the same centre = (SS + SO) / (SS + OS)

with S or O for the same or another class, then for the same or another centre; counts are summed over all patches
before the ratio is taken. PathoROB (arXiv 2507.17845) bounds it to 0..1 by SO / (SO + OS). An index of 1 is no
threshold: features that know nothing already score (share of the class) / (share of the centre), about 4.2 for five
balanced classes in 21 balanced centres, and as k nears the number of patches every model ends there. So each number
stands beside the chance level of the very sample drawn, and how well kNN and a linear probe tell class and centre.
The paper's "five-fold" is read as five seeded samples, since only that shows what the choice of patches does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np

from g2l.arguments import Help, add_running_arguments, directory, share, whole
from g2l.benchmarks import Benchmark, leaked
from g2l.errors import UserError, exit_status
from g2l.features import card, check_names, display, features, models_at_hand, report_failures
from g2l.files import digest, safe, write_text
from g2l.images import ImageFiles, ImageSource
from g2l.multicentre import load_multicentre, unlabelled
from g2l.patches import PatchIndex
from g2l.report import markdown
from g2l.results import read_metrics, record
from g2l.robust import KS, codes, draw_sample, index_of, intervals, measure, neighbors
from g2l.robust_report import (
    PAPER_TABLE3,
    aligned,
    draw_index,
    draw_map,
    draw_misled,
    draw_shift,
    section,
    table3,
)
from g2l.shifts import SHIFTS, displacement, shift


def study(args: argparse.Namespace, weights: dict, options: dict) -> int:
    """Sample, measure every model, record, write table3.md and the pictures. Returns the exit status."""
    folder = args.benchmark or args.data / "benchmarks" / "tiger"
    benchmark, slides = load_multicentre(folder, args.patch_size, args.min_fraction)
    if benchmark.centers is None:
        raise UserError(
            f"{folder / 'labels.csv'}: no column center; add the hospital or scanner of each image, or use "
            "--perturb, which needs none"
        )
    slide_names, slides = slides, codes(slides)
    labels, centers, groups = map(codes, (benchmark.labels, benchmark.centers, benchmark.groups))
    classes, sites = (
        [benchmark.classes[i] for i in np.unique(benchmark.labels)],
        np.unique(benchmark.centers).tolist(),
    )
    if min(labels.max(), centers.max()) < 1:
        raise UserError(
            f"{benchmark.name}: {labels.max() + 1} classes and {centers.max() + 1} centres; the index sets "
            "one against the other and needs two of each (--perturb needs neither)"
        )
    pool = np.arange(len(labels))
    if args.exclude_seen:
        seen = [
            leaked(benchmark, card(n, args.results, weights=weights[n], **options))
            for n in args.models
        ]
        pool = np.flatnonzero(~np.any(seen, 0))
        if not len(pool):
            raise UserError(
                f"{benchmark.name}: --exclude-seen leaves nothing, the students saw every patient of it"
            )
    seeds = range(args.seed, args.seed + (args.samples if args.per_class else 1))
    samples = [
        pool[
            draw_sample(
                labels[pool], centers[pool], slides[pool], args.per_class, args.per_center, seed
            )
        ]
        for seed in seeds
    ]
    used = np.full(
        len(labels), isinstance(benchmark.images, ImageFiles)
    )  # those evaluate.py caches whole as well
    used[np.concatenate(samples)] = True
    own = f"{benchmark.name}-{args.per_class}{'-per-center' * args.per_center}-{args.seed}"  # features by sampling
    part = benchmark if used.all() else dataclasses.replace(benchmark.subset(used), source=own)
    gathered = gather({"": part}, args, weights, options)
    if gathered is None:
        return 0
    arrays, cards, failures = gathered
    x = {
        n: np.full((len(labels), parts[""].shape[1]), np.nan, np.float32)
        for n, parts in arrays.items()
    }
    for n in x:
        x[n][used] = arrays[n][""]
    lost = used & ~np.all([np.isfinite(array).all(1) for array in x.values()], 0)
    samples = [sample[~lost[sample]] for sample in samples]
    if any(
        len(np.unique(labels[s])) < 2 or len(np.unique(centers[s])) < 2 or len(s) <= KS[0]
        for s in samples
    ):
        raise UserError(
            f"{benchmark.name}: a sample has fewer than two classes, two centres or {KS[0] + 1} patches; "
            "raise --per-class or add patches"
        )
    if all(np.array_equal(samples[0], s) for s in samples):
        samples = samples[:1]  # each draw took everything: their spread would say nothing
    near = None if args.include_same_slide else slides
    if near is not None and any(len(np.unique(slides[s])) < 2 for s in samples):
        raise UserError(
            f"{benchmark.name}: all patches are of slide {slide_names[0]}, whose own are no neighbours; "
            "add slides (column slide, or group, of labels.csv), or --include-same-slide"
        )
    k_max = min(max(KS), min(map(len, samples)) - 1)
    kin = (
        "of the same group"
        if slide_names == benchmark.groups and (folder / "labels.csv").is_file()
        else "on the same slide"
    )
    settings = "; ".join(
        [
            f"at most {args.per_class} patches of each class{' and centre' * args.per_center}"
            if args.per_class
            else "all patches",
            f"neighbours {kin} {'included' if near is None else 'excluded'}",
            f"features {'as they are' if args.raw else 'L2-normalised'}",
            *["patients of the students left out"] * args.exclude_seen,
        ]
    )
    base = {
        "benchmark": benchmark.name,
        "protocol": "robustness",
        "settings": settings,
        "patches": digest([benchmark.ids[i] for sample in samples for i in sample]),
    }
    found, counts = [], {n: [] for n in ["chance", *x]}
    for seed, s in zip(seeds, samples, strict=False):
        for n, about in counts.items():
            count, values = measure(
                None if n == "chance" else x[n][s],
                labels[s],
                centers[s],
                None if near is None else near[s],
                groups[s],
                seed=seed,
                normalize=not args.raw,
                k_max=k_max,
            )
            about.append(count)
            found += [
                base | {"model": n, "metric": metric, "k": k, "seed": seed, "value": value}
                for (metric, k), value in values.items()
            ]
    found += intervals(base, counts, [groups[s] for s in samples])
    k = [k for k in KS if k <= k_max][:3][-1]
    for field, target, kinds in (("class", labels, classes), ("center", centers, sites)):
        found += [
            base
            | {
                "model": n,
                "metric": f"index_by_{field}",
                field: kind,
                "k": k,
                "value": np.mean(
                    [
                        index_of(c[:, target[s] == i, k - 1].sum(1))
                        for c, s in zip(counts[n], samples, strict=True)
                    ]
                ),
            }
            for i, kind in enumerate(kinds)
            for n in counts
        ]
    for (i, kind), (j, site) in itertools.product(enumerate(classes), enumerate(sites)):
        cell = (labels == i) & (centers == j)
        found.append(
            base
            | {
                "model": "data",
                "metric": "cell",
                "class": kind,
                "center": site,
                "value": int(cell[samples[0]].sum()),
                "available": int(cell[pool].sum()),
            }
        )
    for n, about in cards.items():
        pair = about["metadata"].get("teacher"), about["metadata"].get("student")
        known = np.unique(groups[leaked(benchmark, about)])
        found.append(
            base
            | {
                "model": n,
                "metric": "seen",
                "value": len(known),
                "patients": int(groups.max()) + 1,
                "paper": "G2L"
                if pair == ("h-optimus-0", "hibou-l")
                else n
                if n in PAPER_TABLE3
                else None,
            }
        )
    record(
        args.results,
        found,
        same=(
            "model",
            "benchmark",
            "protocol",
            "settings",
            "metric",
            "seed",
            "other",
            "k",
            "class",
            "center",
        ),
    )
    lines = section([row for row in read_metrics(args.results) if base.items() <= row.items()])
    print(aligned(lines[: lines.index("### By class")]))
    out = args.results / "robustness" / safe(benchmark.name)
    if not args.no_pictures:
        draw_index(out / "index.png", benchmark.name, counts)
        drawn = np.unique(np.concatenate(samples))
        some = np.sort(np.random.default_rng(0).permutation(drawn)[:800])
        title = (
            f"{benchmark.name}: {f'{len(some)} of ' if len(some) < len(drawn) else ''}the {len(drawn)} patches "
            f"drawn in {len(samples)} sample{'s' * (len(samples) > 1)}"
        )
        draw_map(out / "map.png", title, benchmark, x, some, args.map)
        for n in x:
            rows = neighbors(
                x[n][samples[0]], 5, None if near is None else near[samples[0]], not args.raw
            )[1]
            draw_misled(out / f"gallery-{safe(n)}.png", n, benchmark, samples[0], rows)
        print(f"pictures: {out}/index.png, map.png, gallery-*.png")
    files = (
        [] if args.no_pictures else ["index.png", "map.png", *(f"gallery-{safe(n)}.png" for n in x)]
    )
    record(
        args.results,
        [base | {"model": "data", "metric": "pictures", "value": len(files), "files": files}],
        same=("benchmark", "protocol", "metric"),
    )  # each run draws over the last one's
    write_text(args.results / "table3.md", table3(args.results))
    print(f"table: {args.results / 'table3.md'}")
    return report_failures(failures, {benchmark.name: int(lost.sum())} if lost.any() else {})


def gather(
    parts: dict, args: argparse.Namespace, weights: dict, options: dict
) -> tuple[dict, dict, list[str]] | None:
    """Features {model: {part: (n, dim)}} of benchmarks {part: Benchmark}, each model's card, and why one is missing.

    Under torchrun all ranks share the images, then one goes on alone: None on the others.
    """
    from g2l.ranks import leave_distributed, setup_distributed

    rank, _, _ = setup_distributed(args.device)
    check_names(args.models)
    x, cards, failures = {}, {}, []
    for name in args.models:
        try:
            x[display(name)] = {
                key: features(
                    name,
                    part,
                    args.results,
                    weights=weights[name],
                    batch_size=args.batch_size,
                    workers=args.workers,
                    max_unreadable=args.max_unreadable,
                    **options,
                )
                for key, part in parts.items()
            }
            cards[display(name)] = card(name, args.results, weights=weights[name], **options)
        except UserError as error:
            failures.append(str(error))
    if not x:
        raise UserError("; ".join(failures))
    leave_distributed()
    return (x, cards, failures) if rank == 0 else None


def some_patches(args: argparse.Namespace) -> Benchmark:
    """`--patches` patches, seeded, of a cohort (`--cancer`), of a benchmark, or of a folder with nothing but images."""
    if args.cancer:
        index = PatchIndex(args.data / "tiles" / args.cancer)
        rows = list(dict.fromkeys(index.draw(args.seed, n) for n in range(20 * args.patches)))[
            : args.patches
        ]
        ids = [f"{index.slides[slide]} {row}" for slide, row in map(index.locate, rows)]
        return unlabelled(args.cancer, ImageSource(rows, index.read), ids)
    folder = args.benchmark or args.data / "benchmarks" / "tiger"
    benchmark = load_multicentre(folder, args.patch_size, args.min_fraction, bare=True)[0]
    luck = np.random.default_rng(args.seed).permutation(len(benchmark))
    return benchmark.subset(luck < args.patches)


def perturb(args: argparse.Namespace, weights: dict, options: dict) -> int:
    """Change the same patches step by step and follow every model's features; a curve and a table for each kind."""
    patches = some_patches(args)
    if len(patches) < 3:
        raise UserError(
            f"{patches.name}: {len(patches)} patches; at least 3 are needed to tell self from others"
        )
    steps = {kind: sorted(args.strengths or SHIFTS[kind][3]) for kind in args.perturb}
    source = {None: dataclasses.replace(patches, name=f"{patches.name}-unchanged")}
    for kind, s in [(kind, s) for kind, strengths in steps.items() for s in strengths]:
        images = ImageSource(
            patches.images,
            partial(shift, kind=kind, strength=s),
            getattr(patches.images, "files", ()),
            f"{getattr(patches.images, 'rule', '')} {kind} {s:g}",
        )
        source[kind, s] = dataclasses.replace(
            patches, name=f"{patches.name}-{kind}{s:g}", images=images
        )
    gathered = gather(source, args, weights, options)
    if gathered is None:
        return 0
    x, _, failures = gathered
    fine = np.all(
        [np.isfinite(array).all(1) for parts in x.values() for array in parts.values()], 0
    )
    found = {
        (n, *step): displacement(x[n][None][fine], x[n][step][fine])
        for n in x
        for step in source
        if step
    }
    still = {
        (n, kind, SHIFTS[kind][1]): displacement(x[n][None][fine], x[n][None][fine])
        for n in x
        for kind in steps
    }
    base = {"benchmark": patches.name, "protocol": "perturb", "images": int(fine.sum())}
    record(
        args.results,
        [
            base | {"model": n, "metric": f"{kind} {s:g} {metric}", "value": value}
            for (n, kind, s), values in found.items()
            for metric, value in values.items()
        ],
    )
    text = [
        "# Shifts of stain and scanner",
        "",
        f"{fine.sum()} patches of {patches.name}. Distance of a changed patch "
        "to itself over the median distance of two patches (1: as far as any other), and the share still nearest "
        "to themselves.",
        "",
    ]
    out = args.results / "robustness" / safe(patches.name)
    for kind, strengths in steps.items():
        rows = [
            [
                n,
                *(
                    f"{found[n, kind, s]['distance']:.2f} ({found[n, kind, s]['first']:.0%})"
                    for s in strengths
                ),
            ]
            for n in x
        ]
        text += [
            f"## {kind}: {SHIFTS[kind][0]}",
            "",
            markdown(["model", *map("{:g}".format, strengths)], rows),
        ]
        if not args.no_pictures:
            draw_shift(
                out / f"{kind}.png",
                kind,
                strengths,
                patches.images[int(fine.argmax())],
                still | found,
                list(x),
            )
    write_text(out / "shifts.md", "\n".join(text) + "\n")
    print(
        aligned(text[2:])
        + f"\ntable: {out}/shifts.md"
        + ("" if args.no_pictures else f"   curves: {out}/*.png")
    )
    return report_failures(failures, {} if fine.all() else {patches.name: int((~fine).sum())})


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    from g2l.devices import add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to compare: registry names, "
        "timm:NAME, folders such as runs/NAME/student; all at hand if not given",
    )
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--benchmark",
        type=directory,
        metavar="DIR",
        help="folder with labels.csv (image,label,group,"
        "center and perhaps slide), TIGER's wsirois, or PathoROB's metadata and images; "
        "DATA/benchmarks/tiger",
    )
    where.add_argument(
        "--data", type=Path, default=Path("data"), help="its benchmarks/ and tiles/ are looked in"
    )
    draw = parser.add_argument_group("sampling")
    draw.add_argument(
        "--per-class",
        type=partial(whole, least=0),
        default=40,
        metavar="N",
        help="patches of each class; 0 takes all",
    )
    draw.add_argument(
        "--per-center", action="store_true", help="N patches of each class and centre instead"
    )
    draw.add_argument(
        "--samples", type=whole, default=5, metavar="N", help="seeded samples, for their spread"
    )
    draw.add_argument("--seed", type=partial(whole, least=0), default=0, help="of the first sample")
    draw.add_argument(
        "--exclude-seen",
        action="store_true",
        help="leave out patients that a student was distilled on; otherwise the table marks it",
    )
    draw.add_argument(
        "--patch-size",
        type=whole,
        default=224,
        metavar="PX",
        help="TIGER: side of a patch, 0.5 µm/px",
    )
    draw.add_argument(
        "--min-fraction",
        type=share,
        default=0.75,
        metavar="SHARE",
        help="TIGER: a class must cover it",
    )
    index = parser.add_argument_group("index")
    index.add_argument(
        "--include-same-slide",
        action="store_true",
        help="let neighbours come from the patch's own "
        "slide, as the paper seems to; it raises the counts of both class and centre",
    )
    index.add_argument(
        "--raw", action="store_true", help="compare features as they are instead of L2-normalised"
    )
    shifts = parser.add_argument_group("shifts of stain and scanner, instead of the index")
    shifts.add_argument(
        "--perturb",
        nargs="+",
        choices=list(SHIFTS),
        metavar="KIND",
        help="change patches and follow "
        f"the features: {', '.join(SHIFTS)}; needs no centres, any folder of images will do",
    )
    shifts.add_argument(
        "--strengths",
        nargs="+",
        type=float,
        metavar="S",
        help="of the change, a range if not given; "
        + "; ".join(f"{kind}: {meaning}" for kind, (meaning, *_) in SHIFTS.items()),
    )
    shifts.add_argument(
        "--cancer", metavar="NAME", help="patches of DATA/tiles/NAME, as tile.py made them"
    )
    shifts.add_argument(
        "--patches", type=whole, default=200, metavar="N", help="how many to follow"
    )
    run = add_running_arguments(where, parser.add_argument_group("running"))
    run.add_argument(
        "--map", default="tsne", choices=["tsne", "pca"], help="layout of the embedding map"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.strengths:
        if len(args.perturb or ()) != 1:
            parser.error("--strengths goes with exactly one kind of --perturb")
        low, high = SHIFTS[args.perturb[0]][2]
        if min(args.strengths) < low or max(args.strengths) > high:
            parser.error(f"--strengths of {args.perturb[0]} lie between {low} and {high}")
    if args.cancer and not args.perturb:
        parser.error(
            "--cancer goes with --perturb: without it, centres and classes are needed (--benchmark DIR)"
        )
    if args.min_fraction == 0:
        parser.error(
            "--min-fraction 0: a patch is of the class that covers this share of it, so it is above 0"
        )

    def work() -> int:
        from g2l.devices import model_options
        from g2l.weights import parse_weights

        args.models = args.models or models_at_hand(args)
        if not args.models:
            raise UserError(
                "--models: none named and none at hand; name one, for instance runs/NAME/student"
            )
        options = model_options(args) | ({"input_size": args.input_size} if args.input_size else {})
        return (perturb if args.perturb else study)(
            args, parse_weights(args.weights, args.models), options
        )

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

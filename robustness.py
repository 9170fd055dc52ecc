"""Stage 4 of G2L: does a model see the tissue or the hospital it came from? Table 3, and what it
needs to be read.

    python robustness.py                                     # all models at hand, on TIGER
    python robustness.py --models h-optimus-0 runs/NAME/student --benchmark DIR
    python robustness.py --models h-optimus-0 runs/NAME/student --cancer brca --perturb stain jpeg

The second takes your own patches and centres, the third needs no centres. The robustness index (de
Jong, Marcus and Teuwen, arXiv 2501.18055) looks at the k nearest neighbours of every patch:

    index = neighbours of the same class / neighbours of the same centre = (SS + SO) / (SS + OS)

with S or O for the same or another class, then for the same or another centre; counts are summed
over all patches before the ratio is taken. PathoROB (arXiv 2507.17845) bounds it to 0..1 by SO /
(SO + OS). An index of 1 is no threshold: features that know nothing already score (share of the
class) / (share of the centre), about 4.2 for five balanced classes in 21 balanced centres, and as k
nears the number of patches every model ends there. So each number stands beside the chance level of
the very sample drawn, and how well kNN and a linear probe tell class and centre. The paper's
"five-fold" is read as five seeded samples, since only that shows what the choice of patches does.

`study` tells the story of the index: read the cohort, draw samples, extract features, measure,
record, show. `perturb` tells the other one: change patches step by step and see how far the
features go.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from g2l.arguments import Help, add_running_arguments, directory, share, whole
from g2l.benchmarks import Benchmark, leaked
from g2l.errors import UserError, exit_status, explain
from g2l.features import (
    card,
    check_names,
    data_stamp,
    display,
    features,
    models_at_hand,
    report_failures,
)
from g2l.files import digest, safe, write_text
from g2l.images import ImageFiles, ImageSource
from g2l.multicentre import load_multicentre, unlabelled
from g2l.paper import paper_name
from g2l.patches import PatchIndex
from g2l.pictures import is_drawn, save_figure
from g2l.results import read_metrics, record
from g2l.robust import KS, codes, deciding, draw_sample, index_of, intervals, measure, neighbors
from g2l.robust_report import (
    aligned,
    draw_index,
    draw_map,
    draw_misled,
    draw_shift,
    section,
    shift_table,
    table3,
)
from g2l.shifts import SHIFTS, displacement, shift

PROTOCOL_VERSION = 2  # raised on purpose when the same input would give other numbers
BLIND_DRAWS = 5  # of random features for each sample, whose kNN and probes are the chance levels
REMEDIES = {
    "centres": "add the hospital or scanner of each image, or use --perturb, which needs none",
    "coverage": "lower --min-fraction or --patch-size",
    "design": "--perturb needs no centres",
    "folder": "name it by --benchmark",
    "models": "name one by --models, for instance runs/NAME/student",
    "sample": "raise --per-class or add patches",
    "seen": "leave out --exclude-seen, and the table marks the students",
    "slides": "add slides (column slide, or group, of labels.csv), or --include-same-slide",
    "unreadable": "mend them, or allow more by --max-unreadable",
}


@dataclasses.dataclass
class Cohort:
    """Patches of several centres, and who is who among them: small integers (n,) for each noun."""

    benchmark: Benchmark
    slide_names: list[str]

    def __post_init__(self):
        found = self.benchmark
        self.labels, self.centers, self.groups, self.slides = map(
            codes, (found.labels, found.centers, found.groups, self.slide_names)
        )
        self.classes = [found.classes[i] for i in np.unique(found.labels)]
        self.sites = np.unique(found.centers).tolist()
        self.data = digest(
            *(PROTOCOL_VERSION, data_stamp(found), found.labels.tolist(), found.classes),
            *(found.centers, found.groups, self.slide_names),
        )


def read_cohort(args: argparse.Namespace) -> Cohort:
    """The benchmark that the command names; UserError unless it has two classes and two centres."""
    folder = folder_of(args)
    benchmark, slides = load_multicentre(folder, args.patch_size, args.min_fraction)
    if benchmark.centers is None:
        raise UserError(f"{folder / 'labels.csv'}: no column center", mend="centres")
    cohort = Cohort(benchmark, slides)
    if min(len(cohort.classes), len(cohort.sites)) < 2:
        raise UserError(
            f"{benchmark.name}: {len(cohort.classes)} classes and {len(cohort.sites)} centres; the "
            "index sets one against the other and needs two of each",
            mend="design",
        )
    return cohort


def folder_of(args: argparse.Namespace) -> Path:
    """Where the patches lie: TIGER's place unless another is named."""
    return args.benchmark or args.data / "benchmarks" / "tiger"


def draw_samples(cohort: Cohort, args: argparse.Namespace, pool: np.ndarray) -> list[np.ndarray]:
    """Rows of each seeded sample drawn from the rows `pool`; one sample where it takes all."""
    who = [values[pool] for values in (cohort.labels, cohort.centers, cohort.slides)]
    seeds = range(args.seed, args.seed + (args.samples if args.per_class else 1))
    samples = [pool[draw_sample(*who, args.per_class, args.per_center, seed)] for seed in seeds]
    if all(np.array_equal(samples[0], other) for other in samples):
        return samples[:1]  # each draw took everything: their spread would say nothing
    return samples


def check_samples(cohort: Cohort, samples: list[np.ndarray], same_slide: bool) -> None:
    """UserError where a sample leaves the index nothing to choose between."""
    name = cohort.benchmark.name
    for sample in samples:
        classes, centers, slides = (
            len(np.unique(values[sample]))
            for values in (cohort.labels, cohort.centers, cohort.slides)
        )
        if min(classes, centers) < 2 or len(sample) <= KS[0]:
            raise UserError(
                f"{name}: a sample has fewer than two classes, two centres or {KS[0] + 1} patches",
                mend="sample",
            )
        if slides < 2 and not same_slide:
            raise UserError(
                f"{name}: all patches are of slide {cohort.slide_names[sample[0]]}, whose own are no "
                "neighbours",
                mend="slides",
            )


def describe_settings(cohort: Cohort, args: argparse.Namespace) -> str:
    """How patches are drawn and compared, in words; results of one wording stand in one section."""
    by_group = cohort.slide_names == cohort.benchmark.groups
    by_group &= (folder_of(args) / "labels.csv").is_file()
    drawn = "all patches"
    if args.per_class:
        cell = "class and centre" if args.per_center else "class"
        drawn = f"at most {args.per_class} patches of each {cell}"
    kin = "of the same group" if by_group else "on the same slide"
    fate = "included" if args.include_same_slide else "excluded"
    scale = "as they are" if args.raw else "L2-normalised"
    words = [drawn, f"neighbours {kin} {fate}", f"features {scale}"]
    return "; ".join(words + ["patients of the students left out"] * args.exclude_seen)


def study(args: argparse.Namespace, models: list[str], load: dict) -> int:
    """Sample, measure every model, record, write table3.md and the pictures; the exit status."""
    cohort = read_cohort(args)
    benchmark, name = cohort.benchmark, cohort.benchmark.name
    pool = np.arange(len(benchmark))
    if args.exclude_seen:
        seen = [leaked(benchmark, card(n, args.results, **load[n])) for n in models]
        pool = np.flatnonzero(~np.any(seen, 0))
        if not len(pool):
            raise UserError(f"{name}: the students saw every patient of it", mend="seen")
    samples = draw_samples(cohort, args, pool)
    # Files get features whole, as evaluate.py keeps them too; patches of TIGER only where drawn.
    used = np.full(len(benchmark), isinstance(benchmark.images, ImageFiles))
    used[np.concatenate(samples)] = True
    own = f"{name}-{args.per_class}{'-per-center' * args.per_center}-{args.seed}"
    part = dataclasses.replace(benchmark.subset(used), source=own)
    gathered = gather({"": benchmark if used.all() else part}, args, models, load)
    if gathered is None:
        return 0
    arrays, cards, failures = gathered
    x = {}
    for model, parts in arrays.items():
        x[model] = np.full((len(benchmark), parts[""].shape[1]), np.nan, np.float32)
        x[model][used] = parts[""]
    lost = used & ~np.all([np.isfinite(array).all(1) for array in x.values()], 0)
    samples = [sample[~lost[sample]] for sample in samples]
    check_samples(cohort, samples, args.include_same_slide)
    base = {
        "benchmark": name,
        "protocol": "robustness",
        "settings": describe_settings(cohort, args),
        "data": cohort.data,
        "patches": digest([benchmark.ids[i] for sample in samples for i in sample]),
    }
    measured, counts = measure_models(cohort, x, samples, args)
    rows = [*measured, *describe_design(cohort, samples, pool, args)]
    rows += [describe_model(cohort, n, about) for n, about in cards.items()]
    names = [] if args.no_pictures else ["index", "map", *(f"gallery-{safe(n)}" for n in x)]
    files = [f"{picture}.png" for picture in names]
    rows.append({"model": "data", "metric": "pictures", "value": len(files), "files": files})
    record(
        args.results,
        [base | row for row in rows],
        same=("model", "benchmark", "protocol", "settings"),
    )
    kept = [row for row in read_metrics(args.results) if base.items() <= row.items()]
    print(aligned(section(kept).split("### By class")[0]))
    if names:
        draw_pictures(cohort, x, samples, counts, args, digest(base, list(cards.items())))
    write_text(args.results / "table3.md", table3(args.results))
    print(f"table: {args.results / 'table3.md'}")
    return report_failures(failures, {name: int(lost.sum())} if lost.any() else {})


def measure_models(
    cohort: Cohort, x: dict[str, np.ndarray], samples: list[np.ndarray], args: argparse.Namespace
) -> tuple[list[dict], dict[str, list[np.ndarray]]]:
    """Rows of results, and the counts (4, n, k) of each sample, of chance and every model."""
    k_max = min(max(KS), min(map(len, samples)) - 1)
    rows: list[dict] = []
    counts: dict[str, list[np.ndarray]] = {name: [] for name in ("chance", *x)}
    for seed, sample in enumerate(samples, args.seed):
        how = {"normalize": not args.raw, "k_max": k_max}
        who = [cohort.labels[sample], cohort.centers[sample], None, cohort.groups[sample]]
        if not args.include_same_slide:
            who[2] = cohort.slides[sample]
        found = {
            name: [measure(array[sample], *who, seed=seed, **how)] for name, array in x.items()
        }
        draws = range(BLIND_DRAWS * seed, BLIND_DRAWS * (seed + 1))
        found["chance"] = [measure(None, *who, seed=draw, **how) for draw in draws]
        for name, measured in found.items():
            counts[name].append(measured[0][0])
            for draw, (_, values) in enumerate(measured):
                base = {"model": name, "seed": seed, "draw": draw}
                rows += [base | {"metric": m, "k": k, "value": v} for (m, k), v in values.items()]
    rows += intervals({}, counts, [cohort.groups[sample] for sample in samples])
    k = [k for k in KS if k <= k_max][:3][-1]
    for field, target, kinds in (
        ("class", cohort.labels, cohort.classes),
        ("center", cohort.centers, cohort.sites),
    ):
        for (i, kind), name in itertools.product(enumerate(kinds), counts):
            totals = zip(counts[name], samples, strict=True)
            each = [index_of(c[:, target[s] == i, k - 1].sum(1)) for c, s in totals]
            row = {"model": name, "metric": f"index_by_{field}", field: kind, "k": k}
            rows.append(row | {"value": np.mean(each)})
    return rows, counts


def describe_design(
    cohort: Cohort, samples: list[np.ndarray], pool: np.ndarray, args: argparse.Namespace
) -> Iterator[dict]:
    """Rows on the patches: how many of each class and centre, and the share that can decide."""
    sites = list(enumerate(cohort.sites))
    for (i, kind), (j, site) in itertools.product(enumerate(cohort.classes), sites):
        cell = (cohort.labels == i) & (cohort.centers == j)
        drawn, there = int(cell[samples[0]].sum()), int(cell[pool].sum())
        row = {"model": "data", "metric": "cell", "class": kind, "center": site}
        yield row | {"value": drawn, "available": there}
    shares = []
    for sample in samples:
        slides = None if args.include_same_slide else cohort.slides[sample]
        shares.append(deciding(cohort.labels[sample], cohort.centers[sample], slides))
    yield {"model": "data", "metric": "deciding", "value": np.mean(shares)}


def describe_model(cohort: Cohort, name: str, about: dict) -> dict:
    """Row on a model: how many of the patients it has seen, and its name in the paper."""
    known = np.unique(cohort.groups[leaked(cohort.benchmark, about)])
    row = {"model": name, "metric": "seen", "value": len(known)}
    paper = paper_name(name, about["metadata"])
    return row | {"patients": int(cohort.groups.max()) + 1, "paper": paper}


def draw_pictures(
    cohort: Cohort,
    x: dict[str, np.ndarray],
    samples: list[np.ndarray],
    counts: dict[str, list[np.ndarray]],
    args: argparse.Namespace,
    key: str,
) -> None:
    """Index, map and galleries of the benchmark, but those that show this already."""
    out = args.results / "robustness" / safe(cohort.benchmark.name)
    drawn = np.unique(np.concatenate(samples))
    some = np.sort(np.random.default_rng(0).permutation(drawn)[:800])
    among = f"{len(some)} of " if len(some) < len(drawn) else ""
    times = f"{len(samples)} sample{'s' * (len(samples) > 1)}"
    title = f"{cohort.benchmark.name}: {among}the {len(drawn)} patches drawn in {times}"
    draws = {
        "index": partial(draw_index, cohort.benchmark.name, counts),
        "map": partial(draw_map, title, cohort.benchmark, x, some, args.map),
    }
    first = samples[0]
    slides = None if args.include_same_slide else cohort.slides[first]
    for name, array in x.items():
        rows = neighbors(array[first], 5, slides, not args.raw)[1]
        draws[f"gallery-{safe(name)}"] = partial(draw_misled, name, cohort.benchmark, first, rows)
    for picture, draw in draws.items():
        path, shows = out / f"{picture}.png", digest(key, args.map)
        if not is_drawn(path, shows):
            save_figure(draw(), path, shows)
    print(f"pictures: {out}/index.png, map.png, gallery-*.png")


def gather(
    parts: dict, args: argparse.Namespace, models: list[str], load: dict
) -> tuple[dict, dict, list[str]] | None:
    """Features {model: {part: (n, dim)}} of benchmarks {part: Benchmark}, cards, and what failed.

    Under torchrun all ranks share the images, then one goes on alone: None on the others.
    """
    from g2l.ranks import leave_distributed, setup_distributed

    rank, _, _ = setup_distributed(args.device)
    check_names(models)
    how = {
        "batch_size": args.batch_size,
        "workers": args.workers,
        "max_unreadable": args.max_unreadable,
    }
    x, cards, failures = {}, {}, []
    for name in models:
        try:
            x[display(name)] = {
                key: features(name, part, args.results, **how, **load[name])
                for key, part in parts.items()
            }
            cards[display(name)] = card(name, args.results, **load[name])
        except UserError as error:
            failures.append(explain(error, REMEDIES) or "")
    if not x:
        raise UserError("; ".join(failures))
    leave_distributed()
    return (x, cards, failures) if rank == 0 else None


def some_patches(args: argparse.Namespace) -> Benchmark:
    """`--patches` seeded patches of a cohort, of a benchmark, or of a folder with only images."""
    if args.cancer:
        index = PatchIndex(args.data / "tiles" / args.cancer)
        stream = (index.draw(args.seed, n) for n in range(20 * args.patches))
        rows = list(dict.fromkeys(stream))[: args.patches]
        places = [(index.slides[slide], row) for slide, row in map(index.locate, rows)]
        files = [index.folder / "patches" / f"{slide}_patches.h5" for slide, _ in places]
        images = ImageSource(rows, index.read, files)
        return unlabelled(args.cancer, images, [f"{slide} {row}" for slide, row in places])
    folder, size = folder_of(args), args.patch_size
    benchmark, _ = load_multicentre(folder, size, args.min_fraction, bare=True)
    luck = np.random.default_rng(args.seed).permutation(len(benchmark))
    return benchmark.subset(luck < args.patches)


def shifted(patches: Benchmark, kind: str, strength: float) -> Benchmark:
    """The same patches, each changed in one way."""
    source = patches.images
    files, rule = getattr(source, "files", ()), getattr(source, "rule", "")
    change = partial(shift, kind=kind, strength=strength)
    images = ImageSource(source, change, files, f"{rule} {kind} {strength:g}")
    return dataclasses.replace(patches, name=f"{patches.name}-{kind}{strength:g}", images=images)


def perturb(args: argparse.Namespace, models: list[str], load: dict) -> int:
    """Change the same patches step by step and follow every model's features; the exit status."""
    patches = some_patches(args)
    if len(patches) < 3:
        raise UserError(
            f"{patches.name}: {len(patches)} patches; three are needed to tell self from others"
        )
    steps = {kind: sorted(args.strengths or SHIFTS[kind][3]) for kind in args.perturb}
    parts = {"": dataclasses.replace(patches, name=f"{patches.name}-unchanged")}
    for kind, strengths in steps.items():
        parts |= {(kind, s): shifted(patches, kind, s) for s in strengths}
    gathered = gather(parts, args, models, load)
    if gathered is None:
        return 0
    x, _, failures = gathered
    fine = np.isfinite(np.concatenate([a for arrays in x.values() for a in arrays.values()], 1))
    fine = fine.all(1)
    found, rows = {}, []
    for name, arrays in x.items():
        still = arrays.pop("")[fine]
        for kind in steps:
            found[name, kind, SHIFTS[kind][1]] = displacement(still, still)
        for (kind, s), moved in arrays.items():
            found[name, kind, s] = values = displacement(still, moved[fine])
            base = {"model": name, "benchmark": patches.name, "protocol": "perturb"}
            base["images"] = int(fine.sum())
            rows += [base | {"metric": f"{kind} {s:g} {m}", "value": v} for m, v in values.items()]
    record(args.results, rows)
    text = shift_table(patches.name, int(fine.sum()), steps, found, list(x))
    out = args.results / "robustness" / safe(patches.name)
    write_text(out / "shifts.md", text)
    print(aligned(text.split("\n", 2)[2]) + f"\ntable: {out}/shifts.md")
    if not args.no_pictures:
        image = patches.images[int(fine.argmax())]
        for kind, strengths in steps.items():
            save_figure(draw_shift(kind, strengths, image, found, list(x)), out / f"{kind}.png")
        print(f"curves: {out}/*.png")
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


def run(args: argparse.Namespace) -> int:
    """Name the models, then measure the index or follow the shifts; the exit status."""
    from g2l.devices import model_options
    from g2l.weights import parse_weights

    models = args.models or models_at_hand(args.weights or (), args.runs)
    if not models:
        raise UserError("no model is named and none is at hand", mend="models")
    options = model_options(args)
    if args.input_size:
        options["input_size"] = args.input_size
    weights = parse_weights(args.weights, models)
    load = {name: {"weights": weights[name], **options} for name in models}
    return (perturb if args.perturb else study)(args, models, load)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.strengths:
        if len(args.perturb or ()) != 1:
            parser.error("--strengths goes with exactly one kind of --perturb")
        low, high = SHIFTS[args.perturb[0]][2]
        if min(args.strengths) < low or max(args.strengths) > high:
            parser.error(f"--strengths of {args.perturb[0]} lie between {low} and {high}")
    if args.cancer and not args.perturb:
        parser.error(
            "--cancer goes with --perturb: the index needs centres and classes (--benchmark DIR)"
        )
    if args.min_fraction == 0:
        parser.error("--min-fraction is the share of a patch that its class covers, so above 0")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    return exit_status(partial(run, args), REMEDIES)


if __name__ == "__main__":
    sys.exit(main())

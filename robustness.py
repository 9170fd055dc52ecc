"""Stage 4 of G2L: does a model see the tissue, or the hospital it came from? Table 3, explained.

    python robustness.py                                     # all models at hand, on TIGER
    python robustness.py --models h-optimus-0 runs/NAME/student --benchmark DIR
    python robustness.py --models h-optimus-0 runs/NAME/student --cancer brca --perturb stain jpeg
    python robustness.py --models h-optimus-0 runs/NAME/student --benchmark DIR_OF_PLISM

The second takes your own patches and centres, the third and fourth need no centres. The robustness
index (de Jong, Marcus and Teuwen, arXiv 2501.18055) looks at the k nearest neighbours of every
patch:

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
features go. `plism` takes changes that were not computed: tiles stained and scanned anew.
"""

import dataclasses
import itertools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.arguments import add_running_arguments, count, flag, in_group, parser_of
from g2l.benchmarks import Benchmark, leaked
from g2l.devices import MODEL_REMEDIES, add_model_arguments, model_options, pick_device
from g2l.errors import GO_ON, WORKERS, UserError, exit_status, explain
from g2l.features import (
    card,
    check_names,
    data_stamp,
    display,
    features,
    models_at_hand,
    origins_of,
    readable_rows,
    report_failures,
)
from g2l.files import clear_stale, digest, safe, write_text
from g2l.images import ImageFiles, ImageSource
from g2l.multicentre import load_multicentre, unlabelled
from g2l.paper import paper_name
from g2l.patches import PatchIndex
from g2l.pathorob import shortcut_rows
from g2l.pictures import is_drawn, save_figure
from g2l.plism import compare, interval, load_plism, plism_slides, plism_table, summary
from g2l.protocols import codes
from g2l.registry import pretrained_on
from g2l.report import provenance
from g2l.results import claim, record
from g2l.robust import (
    BLIND_WIDTH,
    KS,
    deciding,
    draw_sample,
    fitting,
    index_of,
    intervals,
    measure,
    neighbors,
)
from g2l.robust_report import (
    draw_index,
    draw_map,
    draw_misled,
    draw_shift,
    plain,
    proven,
    section,
    sections,
    shift_table,
    table3,
)
from g2l.rows import read_rows
from g2l.shifts import SHIFTS, displacement, shift

PROTOCOL_VERSION = 2  # raised on purpose when the same input would give other numbers
BLIND_DRAWS = 5  # of random features for each sample, whose kNN and probes are the chance levels
REMEDIES = MODEL_REMEDIES | {
    "centres": "add the hospital or scanner of each image, or use --perturb, which needs none",
    "coverage": "lower --min-fraction or --patch-size",
    "design": "--perturb needs no centres",
    "folder": "name it by --benchmark",
    "models": "name one by --models, for instance runs/NAME/student",
    "name": "rename one of the two, or take another folder by --results",
    "sample": "raise --per-class or add patches",
    "seen": "leave out --exclude-seen, and the table marks the students",
    "slides": "add slides (column slide, or group, of labels.csv), or --include-same-slide",
    "stuck": f"is the storage of the images still there? Take other --workers, and {GO_ON}",
    "unreadable": "mend them, or allow more by --max-unreadable",
    "workers": f"{WORKERS}, and {GO_ON}",
}


class IndexStudy:
    """The robustness index on one benchmark: who is who, which patches are drawn, what was counted.

    `who` (4, n) holds class, centre, slide and patient of each patch as small integers; neighbours
    of the same slide do not count. `samples` hold rows of each sample, `at` says which row of the
    features `x` is theirs.
    """

    def __init__(self, args: Namespace):
        folder = folder_of(args)
        self.args = args
        found, slides = load_multicentre(folder, args.patch_size, args.min_fraction)
        self.benchmark = found
        self.slides = slides
        if found.centers is None:
            raise UserError(f"{folder / 'labels.csv'}: no column center", mend="centres")
        names = found.labels, found.centers, slides, found.groups
        self.who = np.stack([codes(kind) for kind in names])
        self.labels, self.centers, _, self.groups = self.who
        present = [found.classes[i] for i in np.unique(found.labels)]
        self.kinds = {"class": present, "center": sorted(set(found.centers))}
        classes, centers = map(len, self.kinds.values())
        if min(classes, centers) < 2:
            raise UserError(
                f"{found.name}: {classes} classes and {centers} centres; the index sets one "
                "against the other and needs two of each",
                mend="design",
            )
        by_group = slides == found.groups and (folder / "labels.csv").is_file()
        self.kin = "of the same group" if by_group else "on the same slide"
        self.samples: list[ndarray] = []

    def settings(self) -> str:
        """How patches are drawn and compared; results of one wording stand in one section."""
        args = self.args
        drawn = "all patches"
        if args.per_class:
            cell = "class and centre" if args.per_center else "class"
            drawn = f"at most {args.per_class} patches of each {cell}"
        fate = "included" if args.include_same_slide else "excluded"
        scale = "as they are" if args.raw else "L2-normalised"
        words = [drawn, f"neighbours {self.kin} {fate}", f"features {scale}"]
        return "; ".join(words + ["patients of the students left out"] * args.exclude_seen)

    def draw(self, pool: ndarray) -> Benchmark:
        """Draw the samples from the rows `pool`; the patches that need features.

        Files get features whole, as evaluate.py keeps them too; patches of TIGER only where drawn.
        """
        args = self.args
        found = self.benchmark
        self.pool = pool
        if not len(pool):
            raise UserError(f"{found.name}: the students saw every patient of it", mend="seen")
        for seed in range(args.seed, args.seed + (args.samples if args.per_class else 1)):
            classes, centers, slides = self.who[:3, pool]
            rows = draw_sample(classes, centers, slides, args.per_class, args.per_center, seed)
            self.samples.append(pool[rows])
        if args.include_same_slide:
            self.who[2] = np.arange(len(found))
        used = np.full(len(found), isinstance(found.images, ImageFiles))
        used[np.concatenate(self.samples)] = True
        self.at = used.cumsum() - 1
        if used.all():
            return found
        return dataclasses.replace(
            found.subset(used),
            source=f"{found.name}-{args.per_class}{'-per-center' * args.per_center}-{args.seed}",
        )

    def take(self, arrays: dict[str, ndarray], fine: ndarray) -> None:
        """Take each model's features of what was drawn, and of the samples those that are `fine`.

        Raises UserError where a sample leaves the index nothing to choose between.
        """
        self.x = arrays
        self.samples = [sample[fine[self.at[sample]]] for sample in self.samples]
        for sample in self.samples:
            classes, centers, slides = (len(np.unique(kind)) for kind in self.who[:3, sample])
            if min(classes, centers) < 2 or len(sample) <= KS[0]:
                lack = f"a sample has fewer than two classes, two centres or {KS[0] + 1} patches"
                raise UserError(f"{self.benchmark.name}: {lack}", mend="sample")
            if slides < 2:
                lack = f"slide {self.slides[sample[0]]}, whose own are no neighbours"
                raise UserError(f"{self.benchmark.name}: all patches are of {lack}", mend="slides")
        if all(np.array_equal(self.samples[0], other) for other in self.samples):
            del self.samples[1:]  # each draw took everything: their spread would say nothing

    def base(self) -> dict:
        """What all rows share, with keys of what was read and of the patches drawn as proof."""
        found = self.benchmark
        settings = self.settings()
        place = found.centers, found.groups, self.slides
        read = (
            PROTOCOL_VERSION,
            data_stamp(found),
            found.labels.tolist(),
            found.classes,
            place,
        )
        drawn = [found.ids[i] for sample in self.samples for i in sample]
        proof = {
            f"data of {found.name}": digest(read),
            f"patches of {found.name}, {settings}": digest(drawn),
        }
        return {
            "benchmark": found.name,
            "protocol": "robustness",
            "settings": settings,
            "proof": proof,
        }

    def measure(self) -> Iterator[dict]:
        """Rows of results of chance and every model, sample by sample, then of each class and
        centre; `counts` keeps what they saw.
        """
        self.counts: dict[str, list[ndarray]] = {name: [] for name in ("chance", *self.x)}
        k_max = min(max(KS), min(map(len, self.samples)) - 1)
        count = partial(measure, normalize=not self.args.raw, k_max=k_max)
        for seed, sample in enumerate(self.samples, self.args.seed):
            for name, kept in self.counts.items():
                x = self.x[name][self.at[sample]] if name in self.x else None
                draws = BLIND_DRAWS if x is None else 1
                for draw in range(draws):
                    luck = draws * seed + draw
                    counts, values = count(x, *self.who[:, sample], seed=luck)
                    base = {"model": name, "seed": seed, "draw": draw}
                    for (metric, k), value in values.items():
                        yield base | {"metric": metric, "k": k, "value": value}
                kept.append(counts)
        yield from intervals(self.counts, [self.groups[sample] for sample in self.samples])
        yield from self.shortcuts()
        k = fitting(k_max)[:3][-1]
        for (field, kinds), target in zip(self.kinds.items(), self.who[:2], strict=True):
            for (i, kind), name in itertools.product(enumerate(kinds), self.counts):
                drawn = zip(self.counts[name], self.samples, strict=True)
                each = [index_of(c[:, target[s] == i, k - 1].sum(1)) for c, s in drawn]
                yield {
                    "model": name,
                    "metric": f"index_by_{field}",
                    field: kind,
                    "k": k,
                    "value": np.mean(each),
                }

    def shortcuts(self) -> Iterator[dict]:
        """Rows of PathoROB's other measures, on the patches of all samples."""
        rows = np.unique(np.concatenate(self.samples))
        who = self.labels[rows], self.centers[rows], self.groups[rows]
        draws = {name: [x[self.at[rows]]] for name, x in self.x.items()}
        lot = np.random.default_rng(self.args.seed)
        draws["chance"] = list(lot.normal(size=(BLIND_DRAWS, len(rows), BLIND_WIDTH)))
        for name, arrays in draws.items():
            for draw, x in enumerate(arrays):
                for row in shortcut_rows(x, who):
                    yield {"model": name, "draw": draw} | row

    def design(self) -> Iterator[dict]:
        """Rows on the patches: how many of each class and centre, and the share that can decide."""
        for (i, kind), (j, site) in itertools.product(*map(enumerate, self.kinds.values())):
            cell = (self.labels == i) & (self.centers == j)
            drawn = int(cell[self.samples[0]].sum())
            there = int(cell[self.pool].sum())
            yield {
                "model": "data",
                "metric": "cell",
                "class": kind,
                "center": site,
                "value": drawn,
                "available": there,
            }
        shares = [deciding(*self.who[:3, sample]) for sample in self.samples]
        yield {"model": "data", "metric": "deciding", "value": np.mean(shares)}

    def draw_pictures(self, out: Path, key: str) -> list[str]:
        """Index, map and galleries, but those that show this already; their names."""
        found = self.benchmark
        first = self.samples[0]
        drawn = np.unique(np.concatenate(self.samples))
        some = np.sort(np.random.default_rng(0).permutation(drawn)[:800])
        among = f"{len(some)} of " if len(some) < len(drawn) else ""
        times = f"{len(self.samples)} sample{'s' * (len(self.samples) > 1)}"
        title = f"{found.name}: {among}the {len(drawn)} patches drawn in {times}"
        x: dict[str, ndarray] = {}
        draws = {
            "index.png": partial(draw_index, found.name, self.counts),
            "map.png": partial(draw_map, title, found, x, some, self.args.map),
        }
        for name, array in self.x.items():
            x[name] = array[self.at[some]]
            near = array[self.at[first]]
            _, rows = neighbors(near, 5, self.who[2, first], not self.args.raw)
            draws[f"gallery-{safe(name)}.png"] = partial(draw_misled, name, found, first, rows)
        for picture, draw in draws.items():
            if not is_drawn(out / picture, key):
                save_figure(draw(), out / picture, key)
        clear_stale(self.args.results)
        print(f"pictures: {out}/index.png, map.png, gallery-*.png")
        return list(draws)


def folder_of(args: Namespace) -> Path:
    """Where the patches lie: TIGER's place unless another is named."""
    if args.cancer:
        return args.data / "tiles" / args.cancer
    return args.benchmark or args.data / "benchmarks" / "tiger"


def claim_name(benchmark: Benchmark, args: Namespace) -> None:
    """UserError where results are kept of another folder's patches by this name."""
    where = str(folder_of(args).resolve())
    claim(args.results, {f"benchmark {safe(benchmark.name)}": where})


def study(args: Namespace, load: dict) -> int:
    """Sample, measure every model, record, write table3.md and the pictures; the exit status."""
    index = IndexStudy(args)
    found = index.benchmark
    claim_name(found, args)
    unseen = np.full(len(found), True)
    for model, options in load.items() if args.exclude_seen else ():
        unseen &= ~leaked(found, card(model, args.results, **options))
    gathered = gather([index.draw(np.flatnonzero(unseen))], args, load)
    if gathered is None:
        return 0
    arrays, fine, cards, failures = gathered
    index.take({model: parts[0] for model, parts in arrays.items()}, fine)
    base = index.base()
    rows = [*index.measure(), *index.design()]
    origins = {model: about["metadata"] for model, about in cards.items()}
    known = pretrained_on(origins, found.name, found.groups)
    for model, about in cards.items():
        row = {
            "model": model,
            "metric": "seen",
            "value": len(np.unique(index.groups[leaked(found, about)])),
            "patients": len(set(found.groups)),
            "pretrained": known.get(model, []),
            "paper": paper_name(model, about["metadata"]),
            "fingerprint": about["fingerprint"],
        }
        rows.append(row)
    weights = {model: about["fingerprint"] for model, about in cards.items()}
    shown = digest(base, weights, args.map)
    files = []
    if not args.no_pictures:
        files = index.draw_pictures(args.results / "robustness" / safe(found.name), shown)
    rows.append({"model": "data", "metric": "pictures", "value": len(files), "files": files})
    for row in rows:
        row |= base
        for name in {row["model"], row.get("other")} & weights.keys():
            row["proof"] = row["proof"] | {f"weights of {name}": weights[name]}
    rows[-1]["proof"] = base["proof"] | {f"pictures of {found.name}": shown}
    record(args.results, rows, same=("model", "benchmark", "protocol", "settings"))
    held = proven(args.results)
    here = sections(held)[found.name, base["settings"]]
    print(plain(section(here).split("### By class")[0]))
    made = provenance(pick_device(args.device))
    write_text(args.results / "table3.md", table3(held) + made)
    print(f"table: {args.results / 'table3.md'}")
    return report_failures(failures, {found.name: int((~fine).sum())})


def gather(
    parts: list[Benchmark], args: Namespace, load: dict
) -> tuple[dict, ndarray, dict, list[str]] | None:
    """Features (n, dim) of each part by model, rows (n,) that all models could read in all parts,
    cards of the models, and what failed.

    Under torchrun all ranks share the images, then one goes on alone: None on the others.
    """
    from g2l.ranks import leave_distributed, setup_distributed

    rank, _, _ = setup_distributed(args.device)
    how = {name: getattr(args, name) for name in ("batch_size", "workers", "max_unreadable")}
    x = {}
    cards = {}
    failures = []
    for name, options in load.items():
        try:
            read = [features(name, part, args.results, **how, **options) for part in parts]
            readable_rows(read[0], f"{display(name)} on {parts[0].name}")
            cards[display(name)] = card(name, args.results, **options)
            x[display(name)] = read
        except UserError as error:
            failures.append(explain(error, REMEDIES) or "")
    if not x:
        raise UserError("; ".join(failures))
    leave_distributed()
    if rank:
        return None
    fine = np.all([np.isfinite(array).all(1) for read in x.values() for array in read], 0)
    return x, fine, cards, failures


def some_patches(args: Namespace) -> Benchmark:
    """`--patches` seeded patches of a cohort, of a benchmark, or of a folder with only images."""
    if args.cancer:
        index = PatchIndex(folder_of(args))
        stream = (index.draw(args.seed, n) for n in range(20 * args.patches))
        rows = list(dict.fromkeys(stream))[: args.patches]
        places = [(index.slides[slide], row) for slide, row in map(index.locate, rows)]
        files = []
        table = read_rows(index.folder)
        for slide, _ in places:  # another slide, file of coordinates or shard: other patches
            coordinates = index.folder / "patches" / f"{slide}_patches.h5"
            shard = index.folder / "shards" / f"{slide}.tar"
            files += [coordinates, Path(table[slide]["path"]), shard]
        images = ImageSource(rows, index.read, files)
        return unlabelled(args.cancer, images, [f"{slide} {row}" for slide, row in places])
    benchmark, _ = load_multicentre(folder_of(args), args.patch_size, args.min_fraction, bare=True)
    luck = np.random.default_rng(args.seed).permutation(len(benchmark))
    return benchmark.subset(luck < args.patches)


def shifted(patches: Benchmark, kind: str, strength: float) -> Benchmark:
    """The same patches, each changed in one way."""
    source = patches.images
    change = partial(shift, kind=kind, strength=strength)
    rule = f"{getattr(source, 'rule', '')} {kind} {strength:g}"
    images = ImageSource(source, change, getattr(source, "files", ()), rule)
    return dataclasses.replace(patches, name=f"{patches.name}-{kind}{strength:g}", images=images)


def perturb(args: Namespace, load: dict) -> int:
    """Change the same patches step by step and follow every model's features; the exit status."""
    patches = some_patches(args)
    name = patches.name
    claim_name(patches, args)
    if len(patches) < 3:
        raise UserError(
            f"{name}: {len(patches)} patches; three are needed to tell self from others"
        )
    steps = {kind: sorted(args.strengths or SHIFTS[kind]["tried"]) for kind in args.perturb}
    parts = [dataclasses.replace(patches, name=f"{name}-unchanged")]
    for kind, strengths in steps.items():
        parts += [shifted(patches, kind, s) for s in strengths]
    gathered = gather(parts, args, load)
    if gathered is None:
        return 0
    x, fine, _, failures = gathered
    found = follow(x, steps, fine)
    count = int(fine.sum())
    rows = []
    for (model, kind, s), values in found.items():
        base = {
            "model": model,
            "benchmark": name,
            "protocol": "perturb",
            "images": count,
        }
        rows += [base | {"metric": f"{kind} {s:g} {m}", "value": v} for m, v in values.items()]
    record(args.results, rows, same=("model", "benchmark", "protocol", "metric"))
    text = shift_table(name, count, steps, found)
    out = args.results / "robustness" / safe(name)
    write_text(out / "shifts.md", text + provenance(pick_device(args.device)))
    print(plain(text.split("\n", 2)[2]) + f"\ntable: {out}/shifts.md")
    if not args.no_pictures:
        image = patches.images[int(fine.argmax())]
        for kind, strengths in steps.items():
            save_figure(draw_shift(kind, strengths, image, found), out / f"{kind}.png")
        print(f"curves: {out}/*.png")
    return report_failures(failures, {name: int((~fine).sum())})


def follow(x: dict[str, list[ndarray]], steps: dict[str, list], fine: ndarray) -> dict:
    """`displacement` of the rows `fine` (n,) by (model, kind, strength), unchanged ones too.

    x: each model's features (n, D) of the unchanged patches, then of each kind and strength.
    """
    found = {}
    for name, (still, *moved) in x.items():
        for kind, strengths in steps.items():
            found[name, kind, SHIFTS[kind]["nothing"]] = displacement(still[fine], still[fine])
            for s in strengths:
                found[name, kind, s] = displacement(still[fine], moved.pop(0)[fine])
    return found


def plism(args: Namespace, load: dict) -> int:
    """Find tiles of PLISM again in other stainings and on other scanners; the exit status."""
    parts, kinds, blocks = load_plism(folder_of(args), args.patches, args.seed)
    gathered = gather(parts, args, load)
    if gathered is None:
        return 0
    x, fine, _, failures = gathered
    blocks = blocks[fine]
    blind = np.random.default_rng(args.seed)
    width = (len(fine), BLIND_WIDTH)
    x["chance"] = [blind.normal(size=width).astype(np.float32) for _ in parts]
    found = {}
    draws = {}
    rows = []
    for model, slides in x.items():
        values = compare([part[fine] for part in slides], str(pick_device(args.device)))
        medians, draws[model] = summary(values, kinds, blocks)
        found[model] = medians, interval(draws[model], blocks)
        base = {"model": model, "benchmark": "plism", "protocol": "plism", "images": len(blocks)}
        each = {f"{kind} {measure}": three for (kind, measure), three in medians.items()}
        for metric, (value, low, high) in (each | {"score": found[model][1]}).items():
            rows.append(base | {"metric": metric, "value": value, "low": low, "high": high})
    record(args.results, rows, same=("model", "benchmark", "protocol"))
    gains = {}
    for one, other in itertools.combinations(list(draws)[:-1], 2):
        gains[one, other] = interval(draws[one] - draws[other], blocks)
    text = plism_table(
        found,
        gains,
        f"{len(blocks)} tiles of {len(np.unique(blocks))} blocks of tissue in each of "
        f"{len(parts)} slides, "
        f"{kinds.shape[1]} pairs of slides.",
    )
    out = args.results / "robustness" / "plism.md"
    write_text(out, text + provenance(pick_device(args.device)))
    print(plain(text) + f"\ntable: {out}")
    return report_failures(failures, {"plism": int((~fine).sum())})


def add_index_arguments(parser: ArgumentParser) -> None:
    """Flags on which patches are drawn and how they are compared."""
    add = in_group(parser, "sampling")
    add("--per-class N", "patches of each class; 0 takes all", 40, type=count)
    add("--per-center", "so many of each class and centre instead")
    add("--samples N", "number of seeded samples, which show the spread", 5)
    add("--seed SEED", "seed of the first sample", 0)
    add(
        "--exclude-seen",
        "leave out patients that a student was distilled on; otherwise the table marks it",
    )
    add("--patch-size PX", "TIGER: side of a patch, px of 0.5 µm", 224)
    add("--min-fraction SHARE", "TIGER: how much of a patch its class must cover", 0.75)
    add = in_group(parser, "index")
    add(
        "--include-same-slide",
        "let neighbours come from the patch's own slide, as the paper seems to; it raises the "
        "counts of both class and centre",
    )
    add("--raw", "compare features as they are instead of L2-normalised")


def add_shift_arguments(parser: ArgumentParser) -> None:
    """Flags of the shifts of stain and scanner."""
    add = in_group(parser, "shifts of stain and scanner, instead of the index")
    add(
        "--perturb KIND",
        f"change patches and follow the features: {', '.join(SHIFTS)}; needs no centres, any "
        "folder of images will do",
        nargs="+",
        choices=list(SHIFTS),
    )
    steps = "; ".join(f"{kind}: {facts['meaning']}" for kind, facts in SHIFTS.items())
    add(
        "--strengths S",
        f"strengths of the change; a range is tried if none is given: {steps}",
        nargs="+",
        type=float,
    )
    add("--cancer NAME", "patches of DATA/tiles/CANCER, as tile.py made them")
    add("--patches N", "number of patches to follow, or of PLISM's tiles of each slide", 200)


def build_parser() -> ArgumentParser:
    """The command line of this script."""
    parser = parser_of(__doc__)
    flag(
        parser,
        "--models NAME",
        "models to compare: registry names, timm:NAME, folders such as runs/NAME/student; all at "
        "hand if not given",
        [],
        nargs="+",
    )
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    flag(
        where,
        "--benchmark DIR",
        "folder with labels.csv (image,label,group,center and perhaps slide), TIGER's wsirois, "
        "PathoROB's metadata and images, or the h5 of owkin/plism-dataset (whose tiles are found "
        "again); default: DATA/benchmarks/tiger",
    )
    flag(where, "--data DIR", "folder that holds benchmarks/ and tiles/", Path("data"))
    add_index_arguments(parser)
    add_shift_arguments(parser)
    run = add_running_arguments(where, parser.add_argument_group("running"))
    flag(run, "--map", "layout of the embedding map", "tsne", choices=["tsne", "pca"])
    return parser


def run(args: Namespace) -> int:
    """Name the models, then measure the index or follow the shifts; the exit status."""
    from g2l.weights import parse_weights

    models = args.models or models_at_hand(args.weights or (), args.runs)
    if not models:
        raise UserError("no model is named and none is at hand", mend="models")
    check_names(models)
    claim(args.results, origins_of(models))
    options = model_options(args)
    if args.input_size:
        options["input_size"] = args.input_size
    weights = parse_weights(args.weights, models)
    load = {name: options | {"weights": weights[name]} for name in models}
    if args.perturb:
        return perturb(args, load)
    return (plism if plism_slides(folder_of(args)) else study)(args, load)


def check(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.strengths:
        if len(args.perturb or ()) != 1:
            parser.error("--strengths goes with exactly one kind of --perturb")
        low, high = SHIFTS[args.perturb[0]]["range"]
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

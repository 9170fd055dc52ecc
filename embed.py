"""Stage 5 of G2L: a cohort's slides into features per slide, which every MIL tool reads.

    python embed.py --cancer brca --models runs/brca-hibou-l/student
    torchrun --nproc_per_node=4 embed.py --cancer brca --models h-optimus-0 runs/NAME/student

Every patch that tile.py found goes through each model once: one stream of patches over the whole
cohort, batches cross slides, and the device waits for nobody. data/tiles/<cancer> then holds
features_<model>/<slide>.h5, in the layout that TRIDENT and CLAM read. Features equal those of each
patch alone to 1e-5 in fp32, and those by the published transforms on PIL images to 3e-4.

The story: `missing` says what is to do, `stream` reads it, computes and writes, each in processes
or threads of its own, `report` and `export` write the table and what other tools want, and `draw`
makes the pictures.
"""

import contextlib
import functools
import time
from argparse import ArgumentParser, Namespace
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.experimental.optimization
from numpy import ndarray

from g2l import heatmap
from g2l.arguments import count, flag, in_group, parser_of, whole
from g2l.devices import (
    MODEL_REMEDIES,
    add_model_arguments,
    default_workers,
    model_options,
)
from g2l.embeddings import (
    PIECE,
    Coordinates,
    Origin,
    SlideFeatures,
    exports_of,
    preprocessing_of,
    read_features,
    write_means,
    write_stamp,
    write_tensor,
)
from g2l.errors import UserError, exit_status, warn
from g2l.features import AHEAD, Forward, check_names, display, one_behind
from g2l.files import clear_stale, read_table, safe, size_of, write_table
from g2l.models import Model, load_model
from g2l.patches import PatchIndex
from g2l.pictures import save_figure
from g2l.progress import Progress
from g2l.ranks import (
    agree,
    end_workers,
    exit_process,
    gather_values,
    leave_distributed,
    rank_and_world,
    setup_distributed,
)
from g2l.readahead import Batch, ahead, read_batches
from g2l.rows import read_rows
from g2l.speed import fitting_batch_size, milliseconds
from g2l.weights import parse_weights

REMEDIES = MODEL_REMEDIES | {
    "tile": "run tile.py --cancer NAME first",
    "embed": "--redo makes it anew",
    "redo": "--redo makes them anew",
    "stuck": "are the slides within reach? --workers 0 reads them without processes",
}
BROKEN = "the network gives NaN or infinity, or more than fp16 holds"
MOST_READERS = 4  # one feeds a GPU with 2,000 patches a second
Targets = dict[int, SlideFeatures]  # of a model, by the number of the slide
Problems = dict[Any, str]  # why a patch is lost: by slide, or by slide and folder of a model
Told = Any  # a Counter: patches, and seconds by what they went to
Block = tuple[ndarray, ndarray]  # features (n, D) float32, and which patches were readable


@dataclass(frozen=True)
class Piece:
    """Patches `first` to `last` (not included) of one slide; as many as are written together."""

    slide: int
    first: int
    last: int


def pieces_of(index: PatchIndex, todo: list[int]) -> list[Piece]:
    """All patches of the slides `todo`, in order, in pieces of at most PIECE patches."""
    pieces = []
    for slide in todo:
        count = int(index.counts[slide])
        for first in range(0, count, PIECE):
            pieces.append(Piece(slide, first, min(first + PIECE, count)))
    return pieces


def share_of(pieces: list[Piece], rank: int, world: int) -> list[Piece]:
    """This rank's contiguous run of pieces: equal numbers of patches, whatever the slides."""
    ends = np.cumsum([piece.last - piece.first for piece in pieces])
    middle = ends - np.diff(ends, prepend=0) / 2
    total = ends[-1] if len(ends) else 0
    return [p for p, at in zip(pieces, middle, strict=True) if int(at * world / total) == rank]


def numbers_of(index: PatchIndex, pieces: list[Piece]) -> ndarray:
    """The patches of pieces, one after another, by their numbers in the index."""
    spans = [np.arange(p.first, p.last) + index.starts[p.slide] for p in pieces]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def by_piece(blocks: Iterator[Block], pieces: list[Piece]) -> Iterator[tuple[Piece, *Block]]:
    """Blocks of a stream's rows, cut and put together to the pieces that it is made of."""
    held: list[Block] = []
    count = 0
    for piece in pieces:
        size = piece.last - piece.first
        while count < size:
            held.append(next(blocks))
            count += len(held[-1][0])
        features, readable = (np.concatenate(parts) for parts in zip(*held, strict=True))
        yield piece, features[:size], readable[:size]
        held = [(features[size:], readable[size:])]
        count -= size
    next(blocks, None)  # so that the stream comes to its end


def write(target: SlideFeatures, first: int, block: Block, finish: bool) -> float:
    """Write the part that begins with patch `first`, and the slide's file if that is complete.

    Returns the seconds it took.
    """
    start = time.monotonic()
    target.write_part(first, *block)
    if finish:
        target.finish()
    return time.monotonic() - start


def coordinates_of(index: PatchIndex) -> dict[int, Coordinates]:
    """Where the patches of each slide lie; slides whose coordinates cannot be read are left out."""
    places = {}
    for number, slide in enumerate(index.slides):
        with contextlib.suppress(OSError, KeyError):
            path = index.folder / "patches" / f"{slide}_patches.h5"
            places[number] = Coordinates.read(path)
    return places


def targets_of(
    index: PatchIndex,
    name: str,
    model: Model,
    places: dict[int, Coordinates],
    stored: str,
) -> Targets:
    """Where the features of each slide by a model belong, and what they must come from."""
    folder = index.folder / f"features_{name}"
    seen = preprocessing_of(model)
    targets = {}
    for number, where in places.items():
        origin = Origin(model.name, model.fingerprint, seen, where.key, stored)
        targets[number] = SlideFeatures(folder, index.slides[number], origin, where)
    return targets


def missing(targets: Targets, redo: bool) -> list[int]:
    """Slides to do, the same on every rank; UserError where features were made from something
    else."""
    # Rank 0 looks, for all: a rank that comes late would see what others have done meanwhile.
    states = agree({number: target.state(redo) for number, target in targets.items()})
    other = [targets[number].path for number, state in states.items() if state == "other"]
    if other and not redo:
        raise UserError(
            f"{other[0]}, one of {len(other)}, was made from other weights, preprocessing or "
            "patches, or is damaged",
            mend="redo",
        )
    return [number for number, state in states.items() if state != "done"]


def in_parts(piece: Piece, targets: list[Targets]) -> bool:
    """Whether an earlier run has written the features of a piece by all models."""
    return all(target[piece.slide].part(piece.first).is_file() for target in targets)


def computed(
    batches: Iterator[Batch], forwards: list[Forward], told: Told
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """The features of each batch by all models, side by side, queued on the device."""
    asked = time.monotonic()
    for inputs, batch in ahead(prepared(batches, forwards, told), AHEAD):
        told["waiting"] += time.monotonic() - asked
        parts = [forward(x).float() for forward, x in zip(forwards, inputs, strict=True)]
        yield torch.cat(parts, 1), batch
        asked = time.monotonic()


def prepared(
    batches: Iterator[Batch], forwards: list[Forward], told: Told
) -> Iterator[tuple[list[torch.Tensor], Batch]]:
    """Batches as each model takes them; this is done while the networks run."""
    device = forwards[0].device
    for batch in batches:
        start = time.monotonic()
        images = torch.from_numpy(batch.images).permute(0, 3, 1, 2)
        if device.type == "cuda":  # from other memory, copying would wait for the network
            images = images.pin_memory()
        images = images.to(device, non_blocking=True)
        inputs = [forward.prepare(forward.model.geometry(images)) for forward in forwards]
        told["preprocessing"] += time.monotonic() - start
        told["reading"] += batch.seconds
        yield inputs, batch


def rows(
    batches: Iterator[Batch],
    forwards: list[Forward],
    told: Told,
    problems: Problems,
) -> Iterator[Block]:
    """What comes out of the networks; notes what could not be read of each slide, and progress."""
    shown = rank_and_world()[0] == 0
    with Progress(told["patches"], "patch", shown=shown) as bar, torch.inference_mode():
        for features, batch in one_behind(computed(batches, forwards, told)):
            for slide, why in batch.problems.items():
                problems.setdefault(slide, why)
            told["unreadable"] += np.count_nonzero(~batch.readable)
            bar.step(len(batch.readable))
            yield features.cpu().numpy(), batch.readable


def stream(
    index: PatchIndex,
    models: list[Model],
    targets: list[Targets],
    todo: list[int],
    args: Namespace,
) -> tuple[Told, Problems]:
    """This rank's patches of the slides `todo` through the models.

    Returns what the time went to, and of each slide with unreadable patches why the first is.
    """
    every = pieces_of(index, todo)
    mine = share_of(every, *rank_and_world())
    shared = {piece.slide for piece in set(every) - set(mine)}
    pieces = [piece for piece in mine if not in_parts(piece, targets)]
    numbers = numbers_of(index, pieces)
    device = models[0].device
    size = args.batch_size or min(fitting_batch_size(model) for model in models)
    workers = default_workers(args.workers, device)
    batches = read_batches(index, numbers, size, min(workers, MOST_READERS))
    forwards = [Forward(model, size, device) for model in models]
    ends = np.cumsum([model.dim for model in models])[:-1]
    told: Told = Counter(patches=len(numbers))
    problems: Problems = {}
    jobs: deque[Future] = deque()
    start = time.monotonic()
    with ThreadPoolExecutor(1) as writer:
        blocks = rows(batches, forwards, told, problems)
        for piece, features, readable in by_piece(blocks, pieces):
            finish = piece.slide not in shared
            for target, part in zip(targets, np.split(features, ends, 1), strict=True):
                with np.errstate(over="ignore"):
                    part = part.astype(target[piece.slide].origin.stored)
                broken = readable & ~np.isfinite(part).all(1)
                if broken.any():
                    problems[piece.slide, target[piece.slide].folder] = BROKEN
                told["unreadable"] += np.count_nonzero(broken)
                block = part, readable & ~broken
                jobs.append(writer.submit(write, target[piece.slide], piece.first, block, finish))
            while len(jobs) > 3:  # memory stays bounded where the disk is slower than the network
                told["writing"] += jobs.popleft().result()
    told["writing"] += sum(job.result() for job in jobs)
    told["network"] = time.monotonic() - start - told["waiting"]
    return told, problems


def report(
    index: PatchIndex, name: str, targets: Targets, problems: Problems, args: Namespace
) -> int:
    """When all ranks have written: the table of a model's features, what other readers want, and
    pictures; patches and slides lost."""
    for features in targets.values():  # slides of several ranks, or several runs
        if features.state() != "done":
            features.finish()
    folder = index.folder / f"features_{name}"
    clear_stale(folder)
    table = folder.with_name(f"{folder.name}.csv")
    known = earlier_reasons(table)
    rows: list[list] = [["slide", "patient", "status", "patches", "unreadable", "reason"]]
    done = []
    lost = 0
    for number, slide in enumerate(index.slides):
        patient = index.patient[number]
        target = targets.get(number)
        reason = problems.get(number) or problems.get((number, folder), "")
        if target and target.state() == "done":
            unreadable = target.unreadable()
            reason = reason or known.get(slide, "") if unreadable else ""
            rows.append([slide, patient, "done", target.count - unreadable, unreadable, reason])
            done.append((target, patient))
        else:
            unreadable = 1
            reason = reason or "its coordinates cannot be read"
            rows.append([slide, patient, "failed", "", "", reason])
        lost += unreadable
    write_table(table, [*rows, *without_patches(index)])
    export(done, args)
    size = sum(size_of(target.path) for target, _ in done)
    print(f"{folder}: {len(done)} of {len(index.slides)} slides, {size / 1e9:.2f} GB")
    warn_of_strangers(folder, index.slides)
    draw(index, name, targets, args)
    return lost


def earlier_reasons(table: Path) -> dict[str, str]:
    """Why patches were lost when a model's table was written before, by slide."""
    rows = read_table(table, ["slide"]) if table.exists() else []
    return {row["slide"]: row.get("reason", "") for row in rows}


def without_patches(index: PatchIndex) -> Iterator[list]:
    """Rows of a model's table for the slides in which tile.py found nothing."""
    for slide, row in read_rows(index.folder).items():
        if slide not in index.slides:
            yield [slide, row["patient"], row["status"], 0, 0, row["reason"]]


def warn_of_strangers(folder: Path, slides: list[str]) -> None:
    """Tell of features of other slides, as of another cohort: many tools take every file."""
    strangers = {path.stem for path in folder.glob("[!.]*.h5")} - set(slides)
    if strangers:
        text = f"files are of no slide with patches in this cohort, such as {min(strangers)}.h5"
        warn(f"{folder}: {len(strangers)} {text}; MIL tools will take them for slides")


def export(done: list[tuple[SlideFeatures, str]], args: Namespace) -> None:
    """What the flags ask for beside the features of slides, given with their patients."""
    if not (args.slide or args.pt or args.format):
        return
    names = []
    means = []
    for target, patient in done:
        features, _ = read_features(target.path)
        tensor, stamp, mean = exports_of(target.path)
        names.append((target.slide, patient))
        means.append(features.mean(0, dtype=np.float64))
        if args.pt and not tensor.exists():
            write_tensor(tensor, features)
        if args.format == "stamp" and not stamp.exists():
            write_stamp(stamp, features, Coordinates.read(target.path), target.origin.model)
    if args.slide and names:
        write_means(mean, names, np.stack(means))


def draw(index: PatchIndex, name: str, targets: Targets, args) -> None:
    """The pictures that are asked for, below heatmaps/."""
    folder = index.folder / "heatmaps"
    slide = args.heatmap
    files = {number: t.path for number, t in targets.items() if t.path.exists()}
    if args.similar and files:
        path = folder / f"{name}_similar.png"
        save_figure(heatmap.draw_similar(index, files, name, args.similar, 7), path)
        print(f"picture: {path}")
    if not slide:
        return
    named = {index.slides[number]: number for number in files}
    if slide not in named:
        raise UserError(f"{slide}: no features of such a slide; there are {', '.join(named)}")
    number = named[slide]
    features, coords = read_features(files[number])
    side = int(targets[number].where.attributes["patch_size_level0"])
    row = None
    kind = "components"
    what = "three principal components of its features as red, green and blue"
    if args.scores:
        coords, values = heatmap.read_scores(args.scores, slide)
        what = kind = safe(args.scores.stem)
    elif args.query:
        row = heatmap.patch_at(coords, side, args.query)
        values = heatmap.by_similarity(features, row)
        kind = "like_{}_{}".format(*coords[row])
        what = "cosine to the patch in the frame"
    else:
        values = heatmap.by_components(features)
    path = folder / f"{slide}_{name}_{kind}.png"
    with index.slide(number) as opened:
        title = f"{slide}, {name}"
        save_figure(heatmap.paint(opened, coords, side, values, title, what, row), path)
        heatmap.write_tiles(path.with_suffix(".geojson"), opened, coords, side, values, kind)
    print(f"picture: {path}; beside it the same as .geojson for QuPath")


def tell(parts: list[Told], seconds: float) -> None:
    """Where the time went, over all ranks."""
    total: Told = sum(parts, Counter())
    if not total["patches"]:
        return
    hours = len(parts) * seconds / 3600
    waiting = total["waiting"] / len(parts) / seconds
    beside = [f"{what} {total[what]:.0f} s" for what in ("reading", "preprocessing", "writing")]
    print(
        f"{total['patches']:,} patches in {seconds:.0f} s, {total['patches'] / seconds:,.0f} a "
        f"second, {hours:.3f} device hours: network {total['network']:.0f} s, waiting for patches "
        f"{waiting:.1%} of the time; beside it {', '.join(beside)}"
    )
    if total["unreadable"]:
        print(
            f"{total['unreadable']} patches could not be read, or a network gives no number for "
            "them; they are left out"
        )


def compare(args: Namespace, patches: int) -> None:
    """What another model would cost for all patches, by its speed here; any weights do."""
    name = args.compare
    weights = weights_of(args)[name]
    if not weights and not Path(name).exists():
        weights = "random"
    model = load_model(name, weights, **model_options(args))
    each = milliseconds(model)
    print(
        f"{name}, measured here: {each:.1f} ms a patch, {each * patches / 3.6e6:.3f} device hours "
        f"for all {patches:,} patches, {4 * model.dim * patches / 1e9:.2f} GB of features"
    )


def weights_of(args: Namespace) -> dict[str, str | None]:
    """Weights by model, of those to run and of the one to compare with."""
    return parse_weights(args.weights, [*args.models, *filter(None, [args.compare])])


def load_models(args: Namespace) -> dict[str, Model]:
    """The models to run, by the names of their folders."""
    check_names(args.models)
    weights = weights_of(args)
    options = model_options(args)
    models = {}
    for name in args.models:
        model = load_model(name, weights[name], input_size=args.input_size, **options)
        models[safe(display(name))] = fold(model)
    return models


def fold(model: Model) -> Model:
    """Batch norm into the convolutions before it, where the network can be traced: a quarter faster
    on a CPU, equal to 1e-6. The fingerprint stays that of the weights as they were loaded."""
    if model.fingerprint and model.dtype == torch.float32 and not model.is_vit:
        with contextlib.suppress(torch.fx.proxy.TraceError):
            model.net = torch.fx.experimental.optimization.fuse(model.net)
    return model


def embed(
    index: PatchIndex,
    models: dict[str, Model],
    targets: dict[str, Targets],
    args: Namespace,
) -> tuple[Told, Problems]:
    """This rank's share of what each model lacks; returns what `stream` does, of all of it."""
    # Models that lack the same slides read each patch once.
    streams: dict[tuple[int, ...], list[str]] = {}
    for name in models:
        streams.setdefault(tuple(missing(targets[name], args.redo)), []).append(name)
    told: Told = Counter()
    problems: Problems = {}
    for todo, names in streams.items():
        if rank_and_world()[0] == 0:
            print(f"{', '.join(names)}: {len(todo)} of {len(index.slides)} slides to do")
        together = [models[name] for name in names]
        found = stream(index, together, [targets[name] for name in names], list(todo), args)
        told += found[0]
        problems |= found[1]
    return told, problems


def refuse_contradictions(args: Namespace) -> None:
    """UserError for flags of which one makes no sense without, or beside, another."""
    if args.pt and args.precision_out == "fp16":
        raise UserError("--pt with --precision-out fp16: CLAM, eva and TransMIL read fp32 only")
    if (args.query or args.scores) and not args.heatmap:
        raise UserError("--query and --scores say what --heatmap SLIDE shows; name the slide")


def run(args: Namespace) -> int:
    """Embed what is missing; the exit status."""
    refuse_contradictions(args)
    rank, _, _ = setup_distributed(args.device)
    stored = "float16" if args.precision_out == "fp16" else "float32"
    if rank == 0 and stored == "float16":
        print("fp16: not for TRIDENT's ABMIL tutorial, which takes features as they are stored")
    index = PatchIndex(args.data / "tiles" / args.cancer, args.slides)
    models = load_models(args)
    places = coordinates_of(index)
    targets = {}
    for name, model in models.items():
        targets[name] = targets_of(index, name, model, places, stored)
    start = time.monotonic()
    told, problems = embed(index, models, targets, args)
    parts = gather_values((told, problems))  # and so all have written their parts
    lost = 0
    if rank == 0:
        tell([part for part, _ in parts], time.monotonic() - start)
        for _, others in parts:
            problems |= others
        for name in models:
            lost += report(index, name, targets[name], problems, args)
        if args.compare:
            compare(args, len(index))
    leave_distributed()
    return int(lost > 0)


def place(text: str) -> tuple[int, int]:
    """A pixel of level 0: x,y."""
    x, _, y = text.partition(",")
    return whole(x, least=0), whole(y, least=0)


def build_parser() -> ArgumentParser:
    """Arguments of embed.py."""
    parser = parser_of(__doc__)
    add = in_group(parser, "what")
    add("--cancer NAME", "cohort: the name given to tile.py", required=True)
    add(
        "--models NAME",
        "registry names, timm:NAME, or folders such as runs/NAME/student; patches are read once",
        nargs="+",
        required=True,
    )
    add("--compare NAME", "say what this model would have cost, measured here, such as h-optimus-0")
    add("--data DIR", "folder that tile.py filled", Path("data"))
    add("--slides DIR", "folder of the slides, where they are not where tile.py found them")
    add_model_arguments(parser)
    add = in_group(parser, "what to write beside features_<model>/<slide>.h5")
    add("--pt", "pt_files/<slide>.pt too, for CLAM, eva and TransMIL")
    add("--slide", "one vector a slide too, in features_<model>_mean.h5", choices=["mean"])
    add(
        "--precision-out",
        "half the disk; TRIDENT's ABMIL tutorial and all that reads --pt need fp32",
        "fp32",
        choices=["fp32", "fp16"],
    )
    add("--format", "features_<model>_stamp/<slide>.h5 too, as STAMP reads it", choices=["stamp"])
    add(
        "--redo",
        "make features anew that came from other weights, preprocessing or patches, that are "
        "damaged or lack patches",
    )
    see = parser.add_argument_group("pictures, below heatmaps/, with GeoJSON for QuPath")
    add = functools.partial(flag, see)
    add("--heatmap SLIDE", "a slide's patches in colours: their features' principal components, or")
    kinds = see.add_mutually_exclusive_group()
    like = "how like each is to the patch at this pixel of level 0, or"
    flag(kinds, "--query X,Y", like, type=place)
    flag(kinds, "--scores FILE", "values of your own: a table slide,x,y,value")
    add(
        "--similar N",
        "so many typical patches, with their nearest in the cohort",
        nargs="?",
        const=8,
    )
    add = in_group(parser, "running")
    add("--input-size PX", "side of the network's input in pixels, if not the published one")
    add("--batch-size N", "patches a forward pass; default: by device and memory")
    add(
        "--workers N",
        "processes that read patches, per rank, up to 4; default: 4 for a GPU",
        type=count,
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return exit_status(lambda: run(args), REMEDIES)
    finally:
        end_workers()


if __name__ == "__main__":
    exit_process(main())

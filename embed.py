"""Stage 5 of G2L: a cohort's slides into features per slide, which every MIL tool reads.

    python embed.py --cancer brca --models runs/brca-hibou-l/student
    torchrun --nproc_per_node=4 embed.py --cancer brca --models h-optimus-0 runs/NAME/student

Every patch that tile.py found goes through each model once: one stream of patches over the whole
cohort, batches cross slides, and the device waits for nobody. data/tiles/<cancer> then holds
features_<model>/<slide>.h5, in the layout that TRIDENT and CLAM read.

The story: `missing` says what is to do, `Patches` reads it in loading processes, `Collector` sorts
the rows of one model into slides and writes them, `finish_shared` puts together slides that
several ranks worked on, and `report` writes the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from g2l.arguments import Help, whole
from g2l.devices import MODEL_REMEDIES, add_model_arguments, default_workers, model_options
from g2l.embeddings import (
    PIECE,
    Coordinates,
    Origin,
    SlideFeatures,
    preprocessing_of,
    read_features,
    write_means,
    write_table,
    write_tensor,
)
from g2l.errors import PatchError, UserError, exit_status
from g2l.features import Forward, check_names, display
from g2l.files import safe
from g2l.models import Model, load_model
from g2l.patches import PatchIndex
from g2l.progress import Progress
from g2l.ranks import (
    agree,
    end_workers,
    gather_values,
    leave_distributed,
    quiet_worker,
    rank_and_world,
    setup_distributed,
)
from g2l.speed import fitting_batch_size
from g2l.weights import parse_weights

REMEDIES = MODEL_REMEDIES | {
    "tile": "run tile.py --cancer NAME first",
    "redo": "--redo makes them anew",
    "moved": "say where the slides are now by --slides",
}

Tally = Counter[Any]  # patches and seconds by what they are


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


class Patches(torch.utils.data.Dataset):
    """Item m: (uint8 (b, 3, P, P), whether each could be read, problems) of batch m of a stream."""

    def __init__(self, index: PatchIndex, numbers: np.ndarray, batch: int):
        self.index, self.numbers, self.batch = index, numbers, batch

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch)

    def __getitem__(self, m: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
        numbers = self.numbers[m * self.batch : (m + 1) * self.batch]
        side = self.index.patch_size
        images = np.zeros((len(numbers), side, side, 3), np.uint8)
        readable, problems = np.ones(len(numbers), bool), []
        for place, number in enumerate(numbers.tolist()):
            try:
                images[place] = self.index.read(number)
            except PatchError as error:
                readable[place] = False
                problems.append(str(error))
        return torch.from_numpy(images).permute(0, 3, 1, 2), readable, problems


class Collector:
    """Rows of one model as they come out of the network: sorted into pieces, and written.

    A thread writes while the next batches run. `whole`: slides that are this rank's alone, which
    are finished as soon as their last piece is written.
    """

    def __init__(
        self,
        forward: Forward,
        targets: dict[int, SlideFeatures],
        pieces: list[Piece],
        whole: set[int],
    ):
        self.forward = forward
        self.targets, self.pieces, self.whole = targets, iter(pieces), whole
        self.piece = next(self.pieces, None)
        self.blocks: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.held = 0
        self.writer = ThreadPoolExecutor(1)
        self.jobs: list[Future] = []
        self.seconds = 0.0  # of writing

    def embed(self, images: torch.Tensor, readable: np.ndarray) -> None:
        """The next patches of the stream, uint8 (b, 3, P, P), and which of them are real."""
        images = images.to(self.forward.device, non_blocking=True)
        features = self.forward(self.forward.model.geometry(images))
        self.add(features.float().cpu().numpy(), readable)

    def add(self, features: np.ndarray, readable: np.ndarray) -> None:
        """The next rows of the stream: features (b, D) float32 and which of them are real."""
        while self.piece and len(features):
            size = self.piece.last - self.piece.first
            take = min(size - self.held, len(features))
            self.blocks.append(features[:take])
            self.masks.append(readable[:take])
            self.held += take
            features, readable = features[take:], readable[take:]
            if self.held == size:
                self._hand_over(self.piece)
                self.piece = next(self.pieces, None)

    def _hand_over(self, piece: Piece) -> None:
        block, mask = np.concatenate(self.blocks), np.concatenate(self.masks)
        self.blocks, self.masks, self.held = [], [], 0
        while len(self.jobs) > 2:  # memory stays bounded where the disk is slower than the network
            self.jobs.pop(0).result()
        self.jobs.append(self.writer.submit(self._write, piece, block, mask))

    def _write(self, piece: Piece, block: np.ndarray, mask: np.ndarray) -> None:
        start, target = time.monotonic(), self.targets[piece.slide]
        target.write_part(piece.first, piece.first + np.flatnonzero(mask), block[mask])
        if piece.slide in self.whole:
            target.finish()
        self.seconds += time.monotonic() - start

    def close(self) -> float:
        """Wait for the writer, and raise what it could not write; the seconds it wrote."""
        for job in self.jobs:
            job.result()
        self.writer.shutdown()
        return self.seconds


def targets_of(index: PatchIndex, name: str, model: Model) -> dict[int, SlideFeatures]:
    """Where the features of each slide by a model belong, and what they must have been made from.

    Slides whose coordinates cannot be read are left out.
    """
    targets = {}
    for number, slide in enumerate(index.slides):
        try:
            where = Coordinates.read(index.folder / "patches" / f"{slide}_patches.h5")
        except (OSError, KeyError):
            continue
        origin = Origin(model.name, model.fingerprint, preprocessing_of(model), where.key)
        targets[number] = SlideFeatures(index.folder / f"features_{name}", slide, origin, where)
    return targets


def missing(targets: dict[int, SlideFeatures], redo: bool) -> list[int]:
    """Slides to do, the same on every rank; UserError where features were made from something
    else."""
    # Rank 0 looks, for all: a rank that comes late would see what others have done meanwhile.
    states = agree({number: target.state() for number, target in targets.items()})
    other = [targets[number].path for number, state in states.items() if state == "other"]
    if other and not redo:
        raise UserError(
            f"{other[0]}, one of {len(other)}, was made from other weights, preprocessing or "
            "patches, or is damaged",
            mend="redo",
        )
    return [number for number, state in states.items() if state != "done"]


def patches_of(
    index: PatchIndex, pieces: list[Piece], batch: int, workers: int, pinned: bool
) -> torch.utils.data.DataLoader:
    """The patches of all pieces, one after another, in batches that know no slides."""
    spans = [np.arange(p.first, p.last) + index.starts[p.slide] for p in pieces]
    numbers = np.concatenate([np.zeros(0, np.int64), *spans])
    return torch.utils.data.DataLoader(
        Patches(index, numbers, batch),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        pin_memory=pinned,
    )


def stream(
    index: PatchIndex,
    models: list[Model],
    targets: list[dict[int, SlideFeatures]],
    todo: list[int],
    args: argparse.Namespace,
) -> Tally:
    """This rank's patches of the slides `todo` through the models; what there is to tell of it."""
    rank, world = rank_and_world()
    every = pieces_of(index, todo)
    mine = share_of(every, rank, world)
    whole = set(todo) - {piece.slide for piece in set(every) - set(mine)}
    pieces = [p for p in mine if not all(t[p.slide].has_part(p.first) for t in targets)]
    device = next(models[0].parameters()).device
    batch = args.batch_size or min(fitting_batch_size(model) for model in models)
    workers = default_workers(args.workers, device)
    loader = patches_of(index, pieces, batch, workers, device.type == "cuda")
    collectors = [
        Collector(Forward(model, batch, device), target, pieces, whole)
        for model, target in zip(models, targets, strict=True)
    ]
    told: Any = Tally(patches=sum(piece.last - piece.first for piece in pieces))
    asked = time.monotonic()
    with Progress(told["patches"], "patch", shown=rank == 0) as bar, torch.inference_mode():
        for images, readable, problems in loader:
            arrived = time.monotonic()
            told["waiting"] += arrived - asked
            if problems and not told["unreadable"]:
                bar.note(problems[0])
            told["unreadable"] += len(problems)
            for collector in collectors:
                collector.embed(images, readable)
            asked = time.monotonic()
            told["network"] += asked - arrived
            bar.step(len(readable))
    told["writing"] = sum(collector.close() for collector in collectors)
    return told


def finish_shared(targets: dict[int, SlideFeatures]) -> None:
    """Put together the slides that several ranks, or several runs, worked on."""
    for target in targets.values():
        if target.state() != "done":
            target.finish()


def report(name: str, index: PatchIndex, targets: dict[int, SlideFeatures], args) -> int:
    """The table of a model's features, and what other readers want; patches and slides lost."""
    folder = index.folder / f"features_{name}"
    rows, names, means, lost = [], [], [], 0
    for number, slide in enumerate(index.slides):
        row = {"slide": slide, "patient": index.patient[number], "status": "failed"}
        target = targets.get(number)
        if target is None or target.state() != "done":
            why = "no patch could be read" if target else "its coordinates cannot be read"
            rows.append(row | {"patches": "0", "reason": why})
            lost += 1
            continue
        unreadable = target.unreadable()
        lost += unreadable
        counts = {"patches": str(target.count - unreadable), "unreadable": str(unreadable)}
        rows.append(row | {"status": "done"} | counts)
        tensor = folder / "pt_files" / f"{slide}.pt"
        if args.pt or args.slide:
            features, _ = read_features(target.path)
            names.append((slide, index.patient[number]))
            means.append(features.mean(0, dtype=np.float64))
            if args.pt:
                write_tensor(tensor, features)
    write_table(folder.with_name(f"{folder.name}.csv"), rows)
    if args.slide and means:
        write_means(folder.with_name(f"{folder.name}_mean.h5"), names, np.stack(means))
    done = sum(row["status"] == "done" for row in rows)
    print(f"{name}: {done} of {len(rows)} slides; {folder}", flush=True)
    return lost


def tell(parts: list[Tally], seconds: float) -> None:
    """Where the time went, over all ranks."""
    total = sum(parts, Tally())
    if not total["patches"]:
        return
    ranks = len(parts)
    print(
        f"{total['patches']:,} patches in {seconds:.0f} s, {total['patches'] / seconds:,.0f} a "
        f"second on {ranks} ranks ({ranks * seconds / 3600:.2f} device hours): waiting for patches "
        f"{total['waiting'] / ranks / seconds:.0%}, network "
        f"{total['network'] / ranks / seconds:.0%}; writing beside it {total['writing']:.0f} s"
    )
    if total["unreadable"]:
        print(f"{total['unreadable']} patches could not be read and were left out")


def load_models(args: argparse.Namespace) -> dict[str, Model]:
    """The models to run, by the names of their folders."""
    check_names(args.models)
    weights, options = parse_weights(args.weights, args.models), model_options(args)
    options["input_size"] = args.input_size
    return {safe(display(n)): load_model(n, weights[n], **options) for n in args.models}


def run(args: argparse.Namespace) -> int:
    """Embed what is missing; the exit status."""
    rank, _, _ = setup_distributed(args.device)
    index = PatchIndex(args.data / "tiles" / args.cancer, args.slides)
    models = load_models(args)
    targets = {name: targets_of(index, name, model) for name, model in models.items()}
    # Models that lack the same slides read each patch once.
    streams: dict[tuple[int, ...], list[str]] = {}
    for name in models:
        streams.setdefault(tuple(missing(targets[name], args.redo)), []).append(name)
    told: Any = Tally()
    start = time.monotonic()
    for todo, names in streams.items():
        if rank == 0:
            print(
                f"{', '.join(names)}: {len(todo)} of {len(index.slides)} slides to do", flush=True
            )
        together = [models[name] for name in names]
        told += stream(index, together, [targets[name] for name in names], list(todo), args)
    parts = gather_values(told)  # and so all have written their parts
    lost = 0
    if rank == 0:
        for name in models:
            finish_shared(targets[name])
        tell(parts, time.monotonic() - start)
        for name in models:
            lost += report(name, index, targets[name], args)
    leave_distributed()
    return int(lost > 0)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of embed.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    what = parser.add_argument_group("what")
    what.add_argument("--cancer", required=True, help="cohort: the name given to tile.py")
    models = (
        "registry names, timm:NAME, or folders such as runs/NAME/student; patches are read once"
    )
    what.add_argument("--models", "--model", nargs="+", required=True, metavar="NAME", help=models)
    what.add_argument("--data", type=Path, default=Path("data"), help="folder that tile.py filled")
    moved = "folder of the slides, where they are not where tile.py found them"
    what.add_argument("--slides", type=Path, help=moved)
    add_model_arguments(parser)
    out = parser.add_argument_group("what to write beside features_<model>/<slide>.h5")
    pt = "pt_files/<slide>.pt too, for CLAM, eva and TransMIL"
    out.add_argument("--pt", action="store_true", help=pt)
    mean = "one vector a slide too, in features_<model>_mean.h5"
    out.add_argument("--slide", choices=["mean"], help=mean)
    redo = "make features anew that came from other weights, preprocessing or patches"
    out.add_argument("--redo", action="store_true", help=redo)
    running = parser.add_argument_group("running")
    side = "side of the network's input in pixels, if not the published one"
    running.add_argument("--input-size", type=whole, metavar="PX", help=side)
    batch = "patches a forward pass; default: by device and memory"
    running.add_argument("--batch-size", type=whole, metavar="N", help=batch)
    readers = "processes that read patches, per rank; default: up to 12 for a GPU"
    running.add_argument("--workers", type=int, metavar="N", help=readers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return exit_status(lambda: run(args), REMEDIES)
    finally:
        end_workers()


if __name__ == "__main__":
    sys.exit(main())

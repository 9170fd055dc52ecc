"""Stage 2: patches -> student. A giga-scale model is distilled into a large one on one cancer.

    torchrun --nproc_per_node=3 distill.py --cancer brca         # H-optimus-0 into Hibou-L
    python distill.py --cancer NAME --teacher A --student B --max-steps N
    python distill.py --sweep loss=logsum,mse seed=0,1,2         # runs, a table, a picture

One step: a batch of patches -> one random crop, flips, colour jitter and blur per patch -> the
frozen teacher and the student see the same crop, each in its own normalisation -> the student's
embedding goes through a linear projector to the teacher's width -> batch norm on both ->
log(sum |difference|^4). The projector is dropped afterwards: runs/NAME/student is the bare student.
Kill it at any moment and run the same command again: it goes on where it was. SIGTERM, Ctrl-C and
SIGUSR1 (SLURM's --signal; torchrun needs --signals-to-handle=SIGTERM,SIGINT,SIGUSR1) write a
checkpoint first. With torchrun's --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: new
processes else look for one another at the addresses of the old ones (pytorch issue 135712).

The file follows a run: `distill` says whether there is anything to do, opens the cohort, loads the
pair and builds the distiller; `Training` takes the steps; `finish` exports. The flags come last.
"""

import contextlib
import math
import re
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from g2l.arguments import Help
from g2l.augment import BLUR_SIZE, augment
from g2l.devices import (
    MODEL_REMEDIES,
    add_model_arguments,
    default_workers,
    describe_device,
    pick_precision,
)
from g2l.errors import GO_ON, WORKERS, UserError, exit_status
from g2l.models import Model, load_model, save_student
from g2l.patches import PatchIndex
from g2l.progress import Progress
from g2l.ranks import (
    Signals,
    Stopped,
    agree,
    any_rank,
    end_workers,
    exit_process,
    gather_values,
    leave_distributed,
    rank_and_world,
    setup_distributed,
)
from g2l.recipe import LOSSES, Step, StopRule, build, cosine
from g2l.registry import licence_note
from g2l.runs import Readings, Run, checksums, describe_setting, identify
from g2l.speed import matmul_ceiling
from g2l.stream import Batches, Heldout, load, open_cohort
from g2l.sweep import run_name, trials, write_sweep
from g2l.teacher_cache import TeacherCache, stream_key
from g2l.views import VIEWS, StudentView, parse_views, slide_means
from g2l.weights import parse_weights


def distill(args: Namespace) -> int:
    """Train, or go on training, and export the student. Returns the exit status."""
    rank, world, device = setup_distributed(args.device)
    folder = Path(args.runs) / (args.name or default_name(args))
    words = {name: flag_of(name) for name in vars(args)}
    run = Run(folder, args.keep, rank == 0, words)
    with Signals() as signals, contextlib.closing(run):
        precision = pick_precision(args.precision, device)
        torch.backends.cudnn.benchmark = True
        # What the run is, first as far as the command line says: a mistake costs no loading.
        identity = recipe_of(args)
        identity["targets"] = "fp16" if args.teacher_cache else "as computed"
        identity |= {"ranks": world, "precision": str(precision).removeprefix("torch.")}
        if done := agree(run.finished(identity) if run.main else 0):
            if run.main:
                print(f"{folder}: finished at step {done}; student: {folder / 'student'}")
            return 0

        index, held = check_cohort(args, world)
        teacher, student = load_pair(args, device, precision)
        distiller, flops = build(args, teacher, student)
        identity |= identify(index, teacher, student)
        state = run.load(identity)
        step = Step(teacher, distiller, args, device, precision, world)
        set_targets(step, index, held, identity)
        training = Training(args, run, step, identity, matmul_ceiling(device, precision) / flops)
        if state:
            training.resume(state)
        if run.main:
            training.begin(index, held)
        patches = (args.seed, args.batch_size, args.crop, args.sampling)
        stream = load(
            Batches(index, held, *patches, rank, world),
            range(training.done * args.accumulate, args.max_steps * args.accumulate),
            default_workers(args.workers, device),
            device.type == "cuda",
        )
        if training.go_on(stream, signals):
            number = signals.number or signal.SIGTERM  # of another rank, if not of this one
            return tell_stopped(number, f"at step {training.done}")
        if run.main:
            finish(training, index)
        return training.tell_unreadable()


class Training:
    """A run under way: what changes from step to step, and what is done with it.

    `peak`: steps a second that this rank would take at the matmul ceiling. A checkpoint holds
    `done`, `best`, `unreadable` and `ended` beside models, optimizer and stop rule.
    """

    def __init__(self, args: Namespace, run: Run, step: Step, identity: dict, peak: float):
        self.args, self.run, self.step = args, run, step
        self.identity, self.peak = identity, peak
        self.rank, self.world = rank_and_world()
        self.stop = StopRule(args.stop, args.stop_window, args.stop_patience, args.stop_min_steps)
        self.readings = Readings(step.device, self.world)
        self.images = self.world * args.accumulate * args.batch_size  # of a step, on all ranks
        self.done = 0  # steps
        self.best: dict = {}  # CKA: the best and its step, the one before training, the last
        self.unreadable = 0  # patches of this rank
        self.ended = ""  # why, before the last step
        self.random: dict = {}
        self.config: dict = {}
        self.progress = Progress(args.max_steps, "step", shown=False)
        self.saved = time.monotonic()

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.step.distiller.load_state_dict(state["distiller"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.stop.load_state_dict(state["stop"])
        self.done, self.best, self.ended = state["step"], state["best"], state["ended"]
        self.unreadable = state["unreadable"][self.rank]
        self.random = state["random"][self.rank]
        if self.run.main:
            print(f"going on from step {self.done} of {self.run.folder}", flush=True)

    def begin(self, index: PatchIndex, held: np.ndarray) -> None:
        """On rank 0: look at the room on the disk, write config.json, draw the patches held out."""
        args, run, distiller = self.args, self.run, self.step.distiller
        weights = sum(value.nbytes for value in distiller.state_dict().values())
        # AdamW keeps two numbers a weight; while a checkpoint is written, one more is there.
        run.check_room(3 * weights * (args.keep + 1) + weights)
        device = describe_device(self.step.device)
        cohort = {"slides": len(index.slides), "patches": len(index), "patients": index.patients}
        cohort["held out"] = [index.slides[i] for i in np.flatnonzero(held)]
        self.config = {"arguments": vars(args), "identity": self.identity, "device": device}
        self.config |= {**describe_setting(), "cohort": cohort}
        run.write_config(self.config)
        run.cut_log(self.done)
        teacher, student = self.step.teacher, distiller.student
        self.heldout = Heldout(
            index, held, args.eval_patches, args.crop, args.seed, teacher, args.batch_size
        )
        print(
            f"{run.folder}: {teacher.name} ({teacher.parameters_count / 1e6:,.1f} M) into "
            f"{student.name} ({student.parameters_count / 1e6:,.1f} M parameters); {self.images} "
            f"patches a step, {args.max_steps} steps; {self.identity['precision']} on "
            f"{device}; at the matmul ceiling {self.peak:,.3g} steps a second",
            flush=True,
        )

    @property
    def over(self) -> bool:
        """Whether the last step is taken."""
        return self.done == self.args.max_steps or bool(self.ended)

    def go_on(self, stream: Iterator, signals: Signals) -> bool:
        """Train to the end, or to a signal (True). The last thing done is a checkpoint."""
        args = self.args
        every = args.eval_every or max(1, min(500, args.max_steps // 10))
        if self.done == 0:
            self.measure()
        self.progress = Progress(args.max_steps, "step", self.done, interval=5, shown=self.run.main)
        self.seed()
        signals.hold()
        caught = False
        while not self.over:
            batches = self.fetch(stream, signals)
            due, caught = any_rank([self.is_due(), not batches])
            if caught:
                break
            self.readings.send(self.step(batches, *self.schedule(self.done)))
            self.done += 1
            self.collect(everything=due or self.done == args.max_steps)
            if self.over or self.done % every == 0:
                self.measure()
            if due and not self.over:
                self.save()
        self.save()
        self.progress.close()
        if self.run.main:
            self.run.draw_loss()
        return caught

    def is_due(self) -> bool:
        """Whether a checkpoint follows the next step, by steps or by time; rank 0 has the clock."""
        every, minutes = self.args.checkpoint_steps, (time.monotonic() - self.saved) / 60
        by_steps = every > 0 and (self.done + 1) % every == 0
        return self.run.main and (by_steps or minutes > self.args.checkpoint_minutes > 0)

    def seed(self) -> None:
        """Set the random numbers of the steps, last of all before them.

        So nothing of the start, which a resumed run repeats, draws from their stream.
        """
        torch.manual_seed(self.args.seed + self.rank)
        if self.random:
            torch.set_rng_state(self.random["cpu"])
            if self.readings.cuda and self.random["cuda"] is not None:
                torch.cuda.set_rng_state(self.random["cuda"])

    def schedule(self, step: int) -> tuple[float, float]:
        """Learning rate and weight decay of the step after `step` steps."""
        args = self.args
        return (
            cosine(args.lr, args.lr_end, step, args.max_steps),
            cosine(args.weight_decay, args.weight_decay_end, step, args.max_steps),
        )

    def fetch(self, stream: Iterator, signals: Signals) -> list:
        """The micro-batches of the next step; none where a signal came, also while waiting.

        Raises UserError where too many patches cannot be read.
        """
        batches, failures = [], []
        try:
            with signals.raising():
                for _ in range(self.args.accumulate):
                    images, params, unreadable = next(stream)
                    failures += unreadable
                    batches.append((images, params))
        except Stopped:
            return []
        if failures:
            self.note_unreadable(failures)
        if self.done == 0 and self.run.main:
            images, params = batches[0]
            crops = augment(images, self.args.crop, params)
            seen = [self.step.view(crops, params)] if self.step.view else []
            self.run.draw_sheet(images / 255, crops, *seen)
        return batches

    def note_unreadable(self, failures: list[str]) -> None:
        """Write down the patches that could not be read, and stop where they are too many."""
        path = self.run.folder / "unreadable.txt"
        with open(path, "a") as file:
            file.writelines(f"{line}\n" for line in failures)
        self.unreadable += len(failures)
        drawn = (self.done + 1) * self.args.accumulate * self.args.batch_size
        if self.unreadable > max(10, self.args.max_unreadable * drawn):
            raise UserError(
                f"{self.unreadable} of {drawn} patches could not be read, the last: "
                f"{failures[-1]}; {path} has all. Mend them or raise --max-unreadable"
            )

    def collect(self, everything: bool = False) -> None:
        """Take the numbers that have arrived: guard, ask the stop rule, log.

        Raises UserError where loss or gradient is no number.
        """
        rate, lines = self.progress.rate, []
        for loss, norm, spread in self.readings.receive(everything):
            step = self.stop.steps + 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}. The last "
                    "checkpoint is older; lower --lr, set --grad-clip 1 or take --precision fp32, "
                    "under another --name"
                )
            if self.stop.update(loss) and not self.ended:
                self.ended = f"stop rule ({self.args.stop}) at step {step}"
            lr, weight_decay = self.schedule(step - 1)
            row = {"step": step, "loss": loss, "lr": lr, "weight_decay": weight_decay}
            row |= {"grad_norm": norm, "spread": spread, "above_mean": self.stop.count}
            row["images_per_second"] = round(rate * self.images, 2)
            row["mfu"] = round(rate / self.peak, 4)
            lines.append(row)
        if self.run.main and lines:
            self.run.log(lines)
            speed = f"{rate * self.images:.1f} img/s, MFU {rate / self.peak:.0%}"
            text = f"loss {loss:.4f}, lr {lr:.2e}, {speed}"
            self.progress.step(step - self.progress.done, text)

    def measure(self) -> None:
        """On rank 0: CKA of the student to the teacher on the patches held out."""
        if not self.run.main:
            return
        result = self.heldout.measure(self.step.distiller.student)
        if result["spread"] < 1e-6:
            raise UserError(
                f"step {self.done}: the student gives the same features for every patch, so there "
                "is nothing to learn from; check --weights of the student, or lower --lr"
            )
        cka = result["cka"]
        if cka > self.best.get("cka", -math.inf):
            self.best |= {"cka": cka, "step": self.done}
        self.best.setdefault("before", cka)
        self.best["last"] = cka
        self.run.log([{"step": self.done, **result}])
        self.progress.note(f"step {self.done}: {self.heldout.name} to the teacher {cka:.4f}")

    def save(self) -> None:
        """Write a checkpoint, once all losses up to it are known to be finite."""
        self.collect(everything=True)
        cuda = torch.cuda.get_rng_state() if self.readings.cuda else None
        random = gather_values({"cpu": torch.get_rng_state(), "cuda": cuda})
        unreadable = gather_values(self.unreadable)
        self.saved = time.monotonic()
        if self.run.main:
            self.run.save(
                {
                    "step": self.done,
                    "identity": self.identity,
                    "distiller": self.step.distiller.state_dict(),
                    "optimizer": self.step.optimizer.state_dict(),
                    "stop": self.stop.state_dict(),
                    "best": self.best,
                    "random": random,
                    "unreadable": unreadable,
                    "ended": self.ended,
                }
            )

    def tell_unreadable(self) -> int:
        """The exit status: 1 where patches were replaced, which is said."""
        total = sum(gather_values(self.unreadable))
        if total and self.run.main:
            print(
                f"{total} patches could not be read and were replaced, which the exit status tells "
                f"too; they are named in {self.run.folder / 'unreadable.txt'}"
            )
        return int(total > 0)


def finish(training: Training, index: PatchIndex) -> None:
    """Export the student and say where it is."""
    args, run, best = training.args, training.run, training.best
    folder, done = run.folder / "student", training.done
    metadata = {name: getattr(args, name) for name in ("teacher", "student", "cancer", "loss")}
    metadata |= {"run": run.folder.name, "steps": done}
    metadata |= {"patients": list(index.patients), "slides": list(index.slides)}
    metadata |= {"cka_before": best["before"], "cka_after": best["last"]}
    because = training.ended or "--max-steps"
    try:
        save_student(training.step.distiller.student, folder, metadata=metadata)
        finished = {"step": done, "because": because, "best": best, "student": checksums(folder)}
        run.write_config({**training.config, "finished": finished})
    except OSError as error:
        raise UserError(f"{folder}: not written ({error})", "export") from None
    print(
        f"{training.ended or 'done'}: {training.heldout.name} to the teacher {best['before']:.4f} "
        f"before and {best['last']:.4f} after {done} steps\nloss curve: {run.folder / 'loss.png'}; "
        f"patches as the models see them: {run.folder / 'augmented.png'}\nstudent: {folder}",
        flush=True,
    )
    if best["last"] < best["before"]:
        print(
            "warning: the student is less like its teacher than before training; take more "
            "--max-steps or a lower --alpha, and a cohort of the tissue that it is to judge",
            flush=True,
        )


# ---- what a run is -----------------------------------------------------------------------


def recipe_of(args: Namespace) -> dict:
    """What is computed, as far as the command line says."""
    names = vars(add_flags(ArgumentParser(), RECIPE).parse_args([]))
    return {name: getattr(args, name) for name in names}


def default_name(args: Namespace) -> str:
    """Cancer and student, as a folder's name."""
    return re.sub(r"[^\w.-]+", "-", f"{args.cancer}-{Path(args.student).name}")


def set_targets(step: Step, index: PatchIndex, held: np.ndarray, identity: dict) -> None:
    """What the student sees and what it has to match, where that is not the paper's."""
    args, teacher = step.args, step.teacher
    if kinds := parse_views(args.student_view):
        step.view = StudentView(kinds, args.seed, index, ~held)
    if args.teacher_center == "slide":
        means = slide_means(teacher, index, args.crop, args.seed, args.batch_size)
        step.centres = means.to(step.device)
    if args.teacher_cache:
        key = agree(stream_key(identity))  # rank 0 alone knows all of the identity
        step.cache = TeacherCache(Path(args.teacher_cache), key, teacher.dim)


# ---- cohort and models -------------------------------------------------------------------


def check_cohort(args: Namespace, world: int) -> tuple[PatchIndex, np.ndarray]:
    """The patches, and bool (slides,): which slides are held out. UserError where they are few."""
    folder = Path(args.data) / "tiles" / args.cancer
    which = folder, args.slides, args.hold_out, args.max_slides, args.seed
    index, held = open_cohort(*which, int(args.cache * 1e9))
    size, available = index.patch_size, int(index.counts[~held].sum())
    wanted = args.batch_size * args.accumulate * world
    if available < wanted:
        raise UserError(
            f"{folder}: a step takes {wanted} patches (--batch-size x --accumulate x ranks) and "
            f"there are {available} to train on; tile more slides or lower one of them"
        )
    if size < args.crop:
        raise UserError(
            f"--crop {args.crop}: larger than the patches, which are {size} px; take --crop {size} "
            "or less, or tile with a larger --patch-size"
        )
    if rank_and_world()[0] == 0:
        kept = f"{int(held.sum())} slides held out to measure CKA"
        if not held.any():  # --hold-out 0, or fewer than 4 patients
            kept = "none held out, so CKA is measured on slides that are trained on"
        print(
            f"{args.cancer}: {len(index):,} patches of {size} px from {len(index.slides)} "
            f"slides of {len(index.patients)} patients; {kept}{licence_note(args.teacher)}",
            flush=True,
        )
    return index, held


def load_pair(args: Namespace, device: torch.device, precision: torch.dtype) -> tuple[Model, Model]:
    """Teacher, frozen, with weights in the precision of its products; student in fp32."""
    weights = parse_weights(args.weights, [args.teacher, args.student])
    options = {"device": device, "input_size": args.crop}
    teacher = load_model(args.teacher, weights[args.teacher], dtype=precision, **options)
    student = load_model(args.student, weights[args.student], dtype=torch.float32, **options)
    return teacher.requires_grad_(False), student.train()


# ---- the command -------------------------------------------------------------------------


# Flags that say what is computed: a run that goes on must have those it was begun with. (flag,
# default, help, choices); the type is that of the default, and False makes a switch.
NORMALIZE = ("both", "student", "student-affine", "none")
STOP = ("consecutive", "cumulative", "off")
RECIPE = {
    "what": [
        ("--cancer", "brca", "cohort: the name given to tile.py"),
        ("--teacher", "h-optimus-0", "a name that g2l.models lists, timm:NAME, or a folder"),
        ("--student", "hibou-l", "a name of the same kinds"),
        ("--max-slides", 0, "train on so many slides, drawn by --seed; 0: on all"),
    ],
    "recipe (defaults: the paper's, where it says)": [
        ("--max-steps", 10_000, "optimizer steps; the cosine schedules span them"),
        ("--batch-size", 32, "patches per process and step"),
        ("--accumulate", 1, "micro-batches a step: 3 on one GPU compute what 3 GPUs do"),
        ("--crop", 224, "side of the random crop, pixels; both models see it"),
        ("--lr", 1e-4, "learning rate at the start; random students want 1e-3"),
        ("--lr-end", 1e-6, "learning rate at the end"),
        ("--weight-decay", 0.05, "at the start"),
        ("--weight-decay-end", 0.5, "at the end"),
        ("--decay-all", False, "weight decay on 1-D parameters and tokens too"),
        ("--grad-clip", 0.0, "largest norm of the gradient, 0: no limit; 1 tames a loss of NaN"),
        ("--sampling", "slide", "a slide and then a patch of it, or any patch", ("slide", "patch")),
        ("--seed", 0, "of patches, augmentation, projector and held-out patients"),
    ],
    "loss": [
        ("--loss", "logsum", "all but logsum are there for comparison", LOSSES),
        ("--alpha", 4.0, "exponent of logsum and correlation; 2 learns faster in a short run"),
        ("--normalize", "both", "of projected student and teacher, by batch norm", NORMALIZE),
        ("--reduction", "batch", "log over the batch, or mean of a log per row", ("batch", "row")),
        ("--tokens", "cls", "compare embeddings, or patch tokens too", ("cls", "all")),
        (
            "--student-view",
            "",
            "the student sees each crop otherwise than the teacher, against marks of the hospital: "
            f"any of {', '.join(VIEWS)}, with commas between",
        ),
        (
            "--teacher-center",
            "none",
            "slide: match what the teacher says of a patch less its mean over the patch's slide",
            ("none", "slide"),
        ),
        ("--sync", False, "the loss, and on GPUs the student's batch norm, over all ranks"),
    ],
    "when to stop": [
        ("--stop", "consecutive", "how to count steps above the mean of --stop-window", STOP),
        ("--stop-window", 100, "steps"),
        ("--stop-patience", 10, "stop at more than this count"),
        ("--stop-min-steps", 1000, "never stop before this step"),
    ],
    "how CKA is measured": [
        ("--hold-out", 0.05, "fraction of patients kept for measuring CKA"),
        ("--eval-patches", 256, "fixed held-out patches for CKA to the teacher"),
    ],
}
# Flags that may differ when a run goes on, as those of add_model_arguments may.
FREE = {
    "where": [
        ("--data", "data", "folder that tile.py filled"),
        ("--slides", "", "folder of the slides, if they are not where tile.py found them"),
        ("--runs", "runs", "folder of runs"),
        ("--name", "", "name of the run; by default cancer and student"),
    ],
    "running": [
        ("--workers", None, "loading processes a rank; default: up to 12 for a GPU, else 0 or 1"),
        (
            "--teacher-cache",
            "",
            "folder that keeps what the teacher says of each sample for runs of another student or "
            "loss, but the same --seed, --crop and cohort; 3 GB for 10,000 steps of 96 patches",
        ),
        ("--cache", 20.0, "GB of tiles kept on disk of slides tiled by tile.py --remote"),
        ("--max-unreadable", 0.01, "fraction of patches (10 at least) that may be unreadable"),
        ("--eval-every", 0, "steps between CKA measurements; 0: a tenth of the run, at most 500"),
        ("--checkpoint-minutes", 10.0, "between checkpoints; 0: none by time"),
        ("--checkpoint-steps", 0, "between checkpoints; 0: none by steps"),
        ("--keep", 2, "checkpoints kept, in case the newest is damaged"),
    ],
}


def add_flags(parser: ArgumentParser, groups: dict) -> ArgumentParser:
    """Add the flags of such a table."""
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag, default, text, *choices in flags:
            how: dict = {"action": "store_true"}
            if default is not False:
                how = {"type": int if default is None else type(default)}
            if choices:
                how["choices"] = choices[0]
            group.add_argument(flag, default=default, help=text, **how)
    return parser


def build_parser() -> ArgumentParser:
    """All flags."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    add_flags(parser, RECIPE)
    add_model_arguments(parser)
    add_flags(parser, FREE)
    every = "a run for each combination of such values, then a table and a picture of them all"
    parser.add_argument("--sweep", nargs="+", default=[], metavar="NAME=A,B,...", help=every)
    return parser


# The least a number may be, where that is not 0.
LEAST = {
    "max_steps": 1,
    "batch_size": 2,
    "accumulate": 1,
    "crop": BLUR_SIZE // 2 + 1,
    "alpha": 1,
    "stop_window": 1,
    "eval_patches": 4,
    "keep": 1,
}


def flag_of(name: str) -> str:
    """An argument as it is given."""
    return f"--{name.replace('_', '-')}"


def check(args: Namespace) -> None:
    """Raise UserError for a number that cannot be."""
    for name, value in vars(args).items():
        least = LEAST.get(name, 0)
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            why = ", since batch norm needs two samples" if name == "batch_size" else ""
            text = f"{flag_of(name)} {value}: expected a number of at least {least}{why}"
            raise UserError(text)
    parse_views(args.student_view)
    if args.tokens != "cls" and (args.teacher_cache or args.teacher_center != "none"):
        text = "--teacher-cache and --teacher-center are of embeddings"
        raise UserError(f"{text}; take --tokens cls")
    if args.hold_out > 0.5:
        raise UserError(f"--hold-out {args.hold_out}: expected a fraction from 0 to 0.5")
    if args.sync and args.loss != "logsum":
        raise UserError(f"--sync: only --loss logsum is computed over all ranks, not {args.loss}")


REMEDIES = MODEL_REMEDIES | {
    "export": "make room and run the same command again, which exports from the checkpoint",
    "held out": "raise --hold-out, or take --hold-out 0",
    "memory": "lower --batch-size, and raise --accumulate for as many patches a step",
    "moved": "if the slides have moved, say where they are by --slides",
    "name": "or give another --name",
    "room": f"make room, or write elsewhere by --runs, and {GO_ON}",
    "stuck": f"is the storage of the slides still there? Take other --workers, and {GO_ON}",
    "shared": "--runs must be a folder that all machines share",
    "tokens": "take --tokens cls, or a pair with equal patch size",
    "weights": "give them as --weights [NAME=]FILE, or take --weights random",
    "workers": f"{WORKERS}, and {GO_ON}",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run_command(args, argv), REMEDIES)


def run_command(args: Namespace, argv: list[str]) -> int:
    """Check the flags, train, and leave no process behind; the exit status."""
    try:
        check(args)
        status = sweep(args, argv) if args.sweep else distill(args)
    except Stopped as stop:
        return tell_stopped(stop.number, "before the first step")
    finally:
        end_workers()  # before anything is said: the death of one is a signal that raises
    leave_distributed()  # not after an error: it would wait for what other ranks will never send
    return status


def sweep(args: Namespace, argv: list[str]) -> int:
    """A run for each combination of the values given, then what they have in common."""
    base = args.name or default_name(args)
    found = trials(args.sweep, recipe_of(args))
    plan = []
    for trial in found:
        more = [f"{flag_of(name)}={value}" for name, value in trial.items()]
        plan.append(build_parser().parse_args([*argv, *more, "--name", run_name(base, trial)]))
        check(plan[-1])
    status = 0
    for one in plan:
        status = max(status, distill(one))
        if status > 1:  # stopped
            return status
    if rank_and_world()[0] == 0:
        print(f"sweep: {write_sweep(Path(args.runs), base, found)}", flush=True)
    return status


def tell_stopped(number: int, when: str) -> int:
    """Say, once, that a signal ended the run; the exit status."""
    if rank_and_world()[0] == 0:
        name = signal.Signals(number).name
        print(f"stopped by {name} {when}; run the same command to go on", flush=True)
    return 128 + number


if __name__ == "__main__":
    exit_process(main())

"""Stage 2: patches -> student. A giga-scale model is distilled into a large one on one cancer.

    torchrun --nproc_per_node=3 distill.py --cancer brca         # H-optimus-0 into Hibou-L
    python distill.py --cancer NAME --teacher A --student B --max-steps N
    python distill.py --sweep loss=logsum,mse seed=0,1,2         # runs, a table, a picture

One step: a batch of patches -> one random crop, flips, colour jitter and blur per patch -> the
frozen teacher and the student see the same crop, each in its own normalisation -> the student's
embedding goes through a linear projector to the teacher's width -> batch norm on both ->
log(sum |difference|^4). runs/NAME/student is the bare student, without the projector.
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
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

from g2l.arguments import MOST_SEED, Gigabytes, parser_of
from g2l.augment import BLUR_SIZE
from g2l.devices import (
    MODEL_REMEDIES,
    add_model_arguments,
    default_workers,
    pick_precision,
)
from g2l.errors import GO_ON, WORKERS, UserError, exit_status
from g2l.models import Model, load_model
from g2l.patches import PatchIndex
from g2l.ranks import (
    Signals,
    Stopped,
    agree,
    end_workers,
    exit_process,
    leave_distributed,
    rank_and_world,
    setup_distributed,
)
from g2l.recipe import (
    BESIDE,
    LOSSES,
    Step,
    build,
    is_dense,
    joined,
    parse_terms,
    set_targets,
)
from g2l.runs import Run, identify
from g2l.speed import matmul_ceiling
from g2l.stream import Batches, load, open_cohort
from g2l.sweep import run_name, trials, write_sweep
from g2l.training import Training
from g2l.views import VIEWS, parse_views
from g2l.weights import parse_weights


def distill(args: Namespace) -> int:
    """Train, or go on training, and export the student. Returns the exit status."""
    rank, world, device = setup_distributed(args.device)
    folder = Path(args.runs) / (args.name or default_name(args))
    words = {name: flag_of(name) for name in vars(args)}
    words["targets"] = "what the student has to match (--teacher-cache rounds it)"
    exports = ["student", "student-projected"][: 1 + args.keep_projector]
    run = Run(folder, args.keep, rank == 0, words, exports)
    with Signals() as signals, contextlib.closing(run):
        precision = pick_precision(args.precision, device)
        torch.backends.cudnn.benchmark = True
        # What the run is, first as far as the command line says: a mistake costs no loading.
        identity = recipe_of(args)
        identity["targets"] = "fp16" if args.teacher_cache else "as computed"
        identity |= {"ranks": world, "precision": str(precision).removeprefix("torch.")}
        if done := agree(run.finished(identity) if run.main else 0):
            if run.main:
                print(f"{folder}: finished at step {done}; student: {folder / exports[-1]}")
            return 0

        index, held = check_cohort(args, world)
        teachers, student = load_models(args, device, precision)
        distiller, flops = build(args, teachers, student)
        identity |= identify(index, teachers, student)
        state = run.load(identity)
        step = Step(teachers, distiller, args, device, precision, world)
        set_targets(step, index, held, identity)
        training = Training(args, run, step, identity, matmul_ceiling(device, precision) / flops)
        if state:
            training.resume(state)
        if run.main:
            training.begin(index, held)
        patches = (args.seed, args.batch_size, args.crop, args.sampling)
        stream = load(
            Batches(index, held, *patches, rank, world, sealed=bool(args.teacher_cache)),
            range(training.done * args.accumulate, args.max_steps * args.accumulate),
            default_workers(args.workers, device),
            device.type == "cuda",
        )
        if training.go_on(stream, signals):
            number = signals.number or signal.SIGTERM  # of another rank, if not of this one
            return tell_stopped(number, f"at step {training.done}")
        if run.main:
            finish(training, index, held)
        training.tell_served(index.link)
        return training.tell_unreadable()


def finish(training: Training, index: PatchIndex, held: np.ndarray) -> None:
    """Export the student and say where it is."""
    run, best = training.run, training.best
    training.export(index, held)
    folder = run.folder / run.exports[-1]
    print(
        f"{training.ended or 'done'}: {training.heldout.name} to the teacher {best['before']:.4f} "
        f"before and {best['last']:.4f} after {training.done} steps\n"
        f"loss curve: {run.folder / 'loss.png'}; "
        f"patches as the models see them: {run.folder / 'augmented.png'}\nstudent: {folder}"
    )
    if best["last"] < best["before"]:
        print(
            "warning: the student is less like its teacher than before training; take more "
            "--max-steps or a lower --alpha, and a cohort of the tissue that it is to judge"
        )


# ---- what a run is -----------------------------------------------------------------------


def recipe_of(args: Namespace) -> dict:
    """What is computed, as far as the command line says."""
    identity = {}
    for name in vars(add_flags(ArgumentParser(), RECIPE).parse_args([])):
        value = getattr(args, name)
        identity[name] = joined(value) if isinstance(value, list) else value
    return identity


def default_name(args: Namespace) -> str:
    """Cancer and student, as a folder's name."""
    return re.sub(r"[^\w.-]+", "-", f"{args.cancer}-{Path(args.student).name}")


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
            f"slides of {len(index.patients)} patients; {kept}"
        )
    return index, held


def load_models(
    args: Namespace, device: torch.device, precision: torch.dtype
) -> tuple[list[Model], Model]:
    """Teachers, frozen, with weights in the precision of their products; student in fp32."""
    weights = parse_weights(args.weights, [*args.teacher, args.student])
    options = {"device": device, "input_size": args.crop}
    teachers = []
    for name in args.teacher:
        teacher = load_model(name, weights[name], dtype=precision, **options)
        teachers.append(teacher.requires_grad_(False))
    student = load_model(args.student, weights[args.student], dtype=torch.float32, **options)
    return teachers, student.train()


# ---- the command -------------------------------------------------------------------------


# Flags that say what is computed: a run that goes on must have those it was begun with. (flag,
# default, help, choices); the type is that of the default, False makes a switch, a list takes more.
NORMALIZE = ("both", "student", "student-affine", "none")
STOP = ("consecutive", "cumulative", "off")
RECIPE = {
    "what": [
        ("--cancer", "brca", "cohort: the name given to tile.py"),
        ("--teacher", ["h-optimus-0"], "names that g2l.models lists, timm:NAME, or folders"),
        ("--teacher-weight", [1.0], "how much each teacher's loss counts; one number: for all"),
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
        ("--warmup", 0, "steps over which the learning rate rises from 0"),
        ("--weight-decay", 0.05, "at the start"),
        ("--weight-decay-end", 0.5, "at the end"),
        ("--decay-all", False, "weight decay on 1-D parameters and tokens too"),
        ("--grad-clip", 0.0, "largest norm of the gradient, 0: no limit; 1 tames a loss of NaN"),
        ("--sampling", "slide", "a slide and then a patch of it, or any patch", ("slide", "patch")),
        ("--seed", 0, "of patches, augmentation, projector and held-out patients"),
    ],
    "loss": [
        (
            "--loss",
            ["logsum"],
            "NAME or NAME:WEIGHT, summed: logsum (others are there for comparison: "
            f"{', '.join(LOSSES[1:])}), and beside it {' and '.join(BESIDE)}",
        ),
        ("--alpha", 4.0, "exponent of logsum and correlation; 2 learns faster in a short run"),
        ("--normalize", "both", "of projected student and teacher, by batch norm", NORMALIZE),
        ("--reduction", "batch", "log over the batch, or mean of a log per row", ("batch", "row")),
        ("--tokens", "cls", "compare embeddings, patch tokens, or both", ("cls", "patch", "all")),
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
        ("--cache", Gigabytes(20), "GB of tiles kept on disk of slides tiled by tile.py --remote"),
        ("--max-unreadable", 0.01, "fraction of patches (10 at least) that may be unreadable"),
        ("--eval-every", 0, "steps between CKA measurements; 0: a tenth of the run, at most 500"),
        ("--checkpoint-minutes", 10.0, "between checkpoints; 0: none by time"),
        ("--checkpoint-steps", 0, "between checkpoints; 0: none by steps"),
        ("--keep", 2, "checkpoints kept, in case the newest is damaged"),
        (
            "--keep-projector",
            False,
            "leave NAME/student-projected too, which gives what the loss saw of the student: its "
            "embedding projected to the teacher's width, standardised",
        ),
    ],
}


def add_flags(parser: ArgumentParser, groups: dict) -> ArgumentParser:
    """Add the flags of such a table."""
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag, default, text, *choices in flags:
            how: dict = {"action": "store_true"}
            if isinstance(default, list):
                how = {"type": type(default[0]), "nargs": "+"}
            elif default is not False:
                how = {"type": int if default is None else type(default)}
            if choices:
                how["choices"] = choices[0]
            group.add_argument(flag, default=default, help=text, **how)
    return parser


def build_parser() -> ArgumentParser:
    """All flags."""
    parser = parser_of(__doc__)
    add_flags(parser, RECIPE)
    add_model_arguments(parser)
    add_flags(parser, FREE)
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="NAME=A,B,...",
        help="a run for each combination of such values, then a table and a picture of them all",
    )
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
    """Raise UserError for a number that cannot be, and for flags that do not go together."""
    for name, value in vars(args).items():
        least = LEAST.get(name, 0)
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            why = ", since batch norm needs two samples" if name == "batch_size" else ""
            raise UserError(f"{flag_of(name)} {value}: expected a number of at least {least}{why}")
    if args.seed > MOST_SEED:
        raise UserError(f"--seed {args.seed}: expected a number of at most {MOST_SEED}")
    if args.hold_out > 0.5:
        raise UserError(f"--hold-out {args.hold_out}: expected a fraction from 0 to 0.5")
    if args.warmup > args.max_steps:
        raise UserError(f"--warmup {args.warmup}: longer than --max-steps {args.max_steps}")
    weights = args.teacher_weight
    if len(weights) not in (1, len(args.teacher)) or not all(0 < w < math.inf for w in weights):
        raise UserError(f"--teacher-weight {weights}: expected a number above 0 for each teacher")
    parse_views(args.student_view)
    check_tokens(args)


def check_tokens(args: Namespace) -> None:
    """Raise UserError where what is compared does not go with other flags."""
    if args.tokens != "cls" and args.teacher_center != "none":
        raise UserError("--teacher-center is of embeddings; take --tokens cls")
    if is_dense(args) and args.teacher_cache:
        raise UserError("--teacher-cache keeps embeddings; take --tokens cls and no patch-cosine")
    if args.tokens == "patch" and args.keep_projector:
        raise UserError("--keep-projector: with --tokens patch it is not of the embedding")
    if args.sync and list(parse_terms(args.loss)) != ["logsum"]:
        raise UserError("--sync: only --loss logsum is computed over all ranks")


REMEDIES = MODEL_REMEDIES | {
    "cache": f"make room, or take another folder by --teacher-cache, and {GO_ON}",
    "constant": "check --weights of the student, or lower --lr",
    "diverged": "lower --lr, set --grad-clip 1 or take --precision fp32, under another --name",
    "export": "make room and run the same command again, which exports from the checkpoint",
    "held out": "raise --hold-out, or take --hold-out 0",
    "memory": "lower --batch-size, and raise --accumulate for as many patches a step",
    "moved": "if the slides have moved, say where they are by --slides",
    "name": "or give another --name",
    "room": f"make room, or write elsewhere by --runs, and {GO_ON}",
    "stuck": f"is the storage of the slides still there? Take other --workers, and {GO_ON}",
    "shared": "--runs must be a folder that all machines share",
    "targets": "go without --teacher-cache, under another --name",
    "tokens": "take --tokens cls or patch",
    "head": "go without --keep-projector",
    "unreadable": "mend them or raise --max-unreadable",
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
        print(f"sweep: {write_sweep(Path(args.runs), base, found)}")
    return status


def tell_stopped(number: int, when: str) -> int:
    """Say, once, that a signal ended the run; the exit status."""
    if rank_and_world()[0] == 0:
        name = signal.Signals(number).name
        print(f"stopped by {name} {when}; run the same command to go on")
    return 128 + number


if __name__ == "__main__":
    exit_process(main())

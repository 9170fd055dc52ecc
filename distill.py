"""Stage 2: patches -> student. A giga-scale foundation model is distilled into a large one on one cancer, as G2L does.

    torchrun --nproc_per_node=3 distill.py --cancer brca         # H-optimus-0 into Hibou-L, the paper's setting
    python distill.py --cancer NAME --teacher A --student B --max-steps N

One step: a batch of patches -> one random crop, flips, colour jitter and blur per patch -> the frozen teacher and the
student see the same crop, each in its own normalisation -> the student's embedding goes through a linear projector to
the teacher's width -> batch norm on both -> log(sum |difference|^4). The projector is dropped afterwards:
runs/NAME/student is the bare student. Kill it at any moment and run the same command again: it goes on where it was.
With torchrun's --max-restarts it does so by itself; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, since otherwise
the new processes look for one another at the addresses of the old ones (pytorch issue 135712).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import platform
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from g2l.arguments import Help
from g2l.augment import BLUR_SIZE, augment
from g2l.devices import add_model_arguments, default_workers, describe_device, pick_precision
from g2l.errors import UserError, exit_status
from g2l.models import Model, load_model, save_student
from g2l.patches import PatchIndex
from g2l.progress import Progress
from g2l.ranks import (
    agree,
    any_rank,
    end_workers,
    gather_values,
    leave_distributed,
    quiet_worker,
    setup_distributed,
)
from g2l.recipe import LOSSES, Distiller, StopRule, cosine, param_groups, token_rows
from g2l.runs import FREE, Readings, Run, describe_setting, refuse_changes
from g2l.speed import matmul_ceiling
from g2l.stream import Batches, Heldout, feature_spread, hold_out
from g2l.weights import parse_weights


class Step:
    """Teacher, student and optimizer, and what one optimisation step does with them without waiting for the device."""

    def __init__(
        self, teacher, distiller, args, device, precision, world=1, mark=lambda name: None
    ):
        self.teacher, self.distiller, self.args, self.device, self.mark = (
            teacher,
            distiller,
            args,
            device,
            mark,
        )
        self.autocast = precision == torch.bfloat16
        convolutional = not (teacher.num_prefix_tokens and distiller.student.num_prefix_tokens)
        self.layout = torch.channels_last if convolutional else torch.contiguous_format
        self.optimizer = torch.optim.AdamW(
            param_groups(distiller, args.decay_all), lr=args.lr, fused=True
        )
        self.module = distiller
        if world > 1:
            # A rank's own batch-norm buffers are rank 0's at every step, so that a checkpoint holds all there is.
            self.module = nn.parallel.DistributedDataParallel(
                distiller,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            if device.type == "cpu":
                self.module.register_comm_hook(None, _ordered_mean)

    def __call__(self, batches, lr: float, weight_decay: float) -> torch.Tensor:
        """`batches`: one (images, params) per accumulated micro-batch. -> device (3,): loss, gradient norm, spread."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        count, losses, spread = self.args.accumulate, [], None
        for number, (images, params) in enumerate(batches):
            last = number == count - 1
            images = images.to(self.device, non_blocking=True)
            self.mark("data")
            crops = augment(images, self.args.crop, params).contiguous(memory_format=self.layout)
            self.mark("augmentation")
            with torch.no_grad():
                target = token_rows(self.teacher, crops, self.args.tokens)
            self.mark("teacher")
            sync = (
                contextlib.nullcontext()
                if last or self.module is self.distiller
                else self.module.no_sync()
            )
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    if (
                        self.module is self.distiller
                    ):  # in two parts, so that they can be timed apart
                        student = self.distiller.features(crops)
                        self.mark("student forward")
                        loss, spread = self.distiller.loss(student, target), feature_spread(student)
                        self.mark("loss")
                    else:
                        loss, spread = self.module(crops, target)
                (loss / count if count > 1 else loss).backward()
            self.mark("backward")
            losses.append(loss.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.args.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.args.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark("optimizer")
        return torch.stack([sum(losses) / count, norm, spread])


def _ordered_mean(_, bucket):
    """Mean of a bucket over the ranks, added in the order of the ranks, so that a resumed run has the same bits.

    Gloo's ring adds in an order that depends on a gradient's place in the bucket, and DDP rearranges its buckets after
    the first step of a process.
    """
    world = torch.distributed.get_world_size()
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world)]
    torch.distributed.all_gather(parts, bucket.buffer())
    done = torch.futures.Future()
    done.set_result(sum(parts[1:], parts[0]) / world)
    return done


def train(args: argparse.Namespace) -> int:
    """Train, or go on training, and export the student. Returns the exit status."""
    rank, world, device = setup_distributed(args.device)
    run = Run(Path(args.runs) / (args.name or default_name(args)), args.keep, rank == 0)
    try:
        return _train(args, run, rank, world, device)
    finally:
        run.close()


def _train(args: argparse.Namespace, run: Run, rank: int, world: int, device: torch.device) -> int:
    main, cuda = rank == 0, device.type == "cuda"
    precision = pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True

    def say(text: str) -> None:
        if main:
            print(text, flush=True)

    # What the run is, first as far as the command line says, so that a mistake costs no loading.
    identity = {k: v for k, v in vars(args).items() if k not in FREE}
    identity |= {"ranks": world, "precision": str(precision).removeprefix("torch.")}
    flags = [k for k in vars(args)]
    earlier = run.config() if main else {}
    finished = "finished" in earlier and (run.folder / "student" / "model.safetensors").exists()
    if finished or (earlier and any(path.exists() for path in run.checkpoints)):
        refuse_changes(earlier["identity"], {**identity, "flags": flags}, run.folder)
    if agree(finished):
        if main:
            say(
                f"{run.folder}: finished at step {earlier['finished']['step']}; student: {run.folder / 'student'}"
            )
        return 0

    index = PatchIndex(
        Path(args.data) / "tiles" / args.cancer, Path(args.slides) if args.slides else None
    )
    held = hold_out(index, args.hold_out, args.seed)
    counts = np.asarray(index.counts)
    available, wanted = int(counts[~held].sum()), args.batch_size * args.accumulate * world
    if available < wanted:
        raise UserError(
            f"{args.data}/tiles/{args.cancer}: a step takes {wanted} patches (--batch-size x --accumulate "
            f"x ranks) and there are {available} to train on; tile more slides or lower one of them"
        )
    if index.patch_size < args.crop:
        raise UserError(
            f"--crop {args.crop}: larger than the patches, which are {index.patch_size} px; take --crop "
            f"{index.patch_size} or less, or tile with a larger --patch-size"
        )
    cohort = json.dumps(
        [list(index.slides), list(index.patient), counts.tolist(), index.patch_size]
    )
    say(
        f"{args.cancer}: {int(counts.sum()):,} patches of {index.patch_size} px from {len(index.slides)} slides of "
        f"{len(index.patients)} patients; "
        + (
            f"{int(held.sum())} slides held out to measure CKA"
            if held.any()
            else "none held out (--hold-out 0, or fewer than 4 patients), so CKA is measured on slides that are trained on"
        )
    )

    teacher, student = load_pair(args, device, precision)
    identity |= {"cohort": hashlib.sha256(cohort.encode()).hexdigest()[:16]}
    if main:
        identity |= {"teacher weights": teacher.fingerprint, "student weights": student.fingerprint}
    distiller, step_flops = build(args, teacher, student, device, world)
    steps = args.max_steps
    stop = StopRule(args.stop, args.stop_window, args.stop_patience, args.stop_min_steps)

    state = None
    if main:
        state = run.load()
        if state:
            refuse_changes(state["identity"], {**identity, "flags": flags}, run.folder)
    newest = agree(state["step"] if state else 0)
    if newest and not main:
        path = next((p for p in run.checkpoints if p.exists()), None)
        if path is None:
            raise UserError(
                f"{run.folder}: rank {rank} on {platform.node()} sees no checkpoint; --runs must be a "
                "folder that all machines share"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    if state:
        distiller.load_state_dict(state["distiller"])
    step_of = Step(teacher, distiller, args, device, precision, world)
    best, drawn, unreadable, first, spent, ended = {}, 0, 0, 0, 0.0, ""
    if state:
        step_of.optimizer.load_state_dict(state["optimizer"])
        stop.load_state_dict(state["stop"])
        best, first, spent, ended = state["best"], state["step"], state["seconds"], state["ended"]
        drawn, unreadable = state["drawn"], state["unreadable"][rank]
        say(f"going on from step {first} of {run.folder}")
    random = state["random"][rank] if state else None
    del state

    if main:
        config = {
            "arguments": vars(args),
            "identity": identity,
            "device": describe_device(device),
            "ranks": world,
            **describe_setting(),
            "cohort": {
                "slides": len(index.slides),
                "patches": int(counts.sum()),
                "patients": list(index.patients),
                "held out": [index.slides[i] for i in np.flatnonzero(held)],
            },
            "teacher": describe_model(teacher),
            "student": describe_model(student),
        }
        run.write_config(config)
        run.cut_log(first)
        heldout = Heldout(
            index, held, args.eval_patches, args.crop, args.seed, teacher, args.batch_size
        )

    dataset = Batches(
        index,
        held,
        seed=args.seed,
        batch_size=args.batch_size,
        crop=args.crop,
        by=args.sampling,
        rank=rank,
        world=world,
    )
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first * args.accumulate, steps * args.accumulate),
            pin_memory=cuda,
            num_workers=default_workers(args.workers, device),
            worker_init_fn=quiet_worker,
        )
    )
    ceiling = matmul_ceiling(device, precision)
    images = world * args.accumulate * args.batch_size
    say(
        f"{teacher.name} ({teacher.parameters_count / 1e6:,.1f} M) into {student.name} "
        f"({student.parameters_count / 1e6:,.1f} M parameters); {images} patches a step, {steps} steps; "
        f"{str(precision).removeprefix('torch.')} on {describe_device(device)}; {step_flops / 1e9:,.1f} GFLOP a step "
        f"and rank, matmul ceiling {ceiling / 1e12:,.2f} TFLOP/s"
    )

    every = args.eval_every or max(1, min(500, steps // 10))
    readings = Readings(device, world)
    progress = Progress(steps, "step", first, interval=5, shown=main)
    done, saved = first, time.monotonic()

    def measure(step: int) -> None:
        if not main:
            return
        result = heldout.measure(student)
        if result["spread"] < 1e-6:
            raise UserError(
                f"step {step}: the student gives the same features for every patch, so there is nothing to "
                "learn from; check --weights of the student, or lower --lr"
            )
        if result["cka"] > best.get("cka", -math.inf):
            best.update(cka=result["cka"], step=step)
        best.setdefault("before", result["cka"])
        best["last"] = result["cka"]
        run.log([{"step": step, **result}])
        progress.note(f"step {step}: {heldout.name} to the teacher {result['cka']:.4f}")

    def collect(rows: list[list[float]]) -> None:
        """Numbers that have arrived: log them, guard, and ask the stop rule."""
        nonlocal ended
        lines = []
        for loss, norm, spread in rows:
            step = stop.steps + 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}. The last checkpoint is "
                    "older; lower --lr, set --grad-clip 1 or take --precision fp32, under another --name"
                )
            if stop.update(loss) and not ended:
                ended = f"stop rule ({args.stop}) at step {step}"
            lines.append(
                {
                    "step": step,
                    "loss": loss,
                    "lr": cosine(args.lr, args.lr_end, step - 1, steps),
                    "weight_decay": cosine(
                        args.weight_decay, args.weight_decay_end, step - 1, steps
                    ),
                    "grad_norm": norm,
                    "spread": spread,
                    "above_mean": stop.count,
                    "images_per_second": round(progress.rate * images, 2),
                    "mfu": round(progress.rate * step_flops / ceiling, 4),
                }
            )
        if main and lines:
            run.log(lines)
            row = lines[-1]
            text = f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['images_per_second']:.1f} img/s, MFU {row['mfu']:.0%}"
            progress.step(row["step"] - progress.done, text)

    def save() -> None:
        nonlocal saved
        readings.send()
        collect(
            readings.receive(everything=True)
        )  # so nothing is saved that was not seen to be finite
        now = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}
        states = gather_values(now)
        failures = gather_values(unreadable)
        saved = time.monotonic()
        if not main:
            return
        problem = run.save(
            {
                "step": done,
                "identity": identity,
                "distiller": distiller.state_dict(),
                "optimizer": step_of.optimizer.state_dict(),
                "stop": stop.state_dict(),
                "best": best,
                "random": states,
                "drawn": drawn,
                "unreadable": failures,
                "seconds": spent + progress.seconds,
                "ended": "" if ended == "signal" else ended,
            }
        )
        if problem:
            progress.note(
                f"checkpoint of step {done} not written ({problem}); the one before stays, training goes on"
            )

    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda number, frame: received.append(number)
        )  # seen after a step, on all ranks at once
    if first == 0:
        measure(0)
    # Last of all, so that nothing of the start, which a resumed run repeats, draws from the stream of the steps.
    torch.manual_seed(args.seed + rank)
    if random:
        torch.set_rng_state(random["cpu"])
        if cuda and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])
    while done < steps and not ended:
        batches, due = [], False
        for _ in range(args.accumulate):
            images, params, failures = next(loader)
            drawn += args.batch_size
            if failures:
                unreadable += len(failures)
                with open(run.folder / "unreadable.txt", "a") as file:
                    file.writelines(f"{line}\n" for line in failures)
                if unreadable > max(10, args.max_unreadable * drawn):
                    raise UserError(
                        f"{unreadable} of {drawn} patches could not be read, the last: {failures[-1]}; "
                        f"{run.folder / 'unreadable.txt'} has all. Mend them or raise --max-unreadable"
                    )
            batches.append((images, params))
        if done == 0 and main:
            run.draw_sheet(batches[0][0], augment(batches[0][0], args.crop, batches[0][1]))
        readings.add(
            step_of(
                batches,
                cosine(args.lr, args.lr_end, done, steps),
                cosine(args.weight_decay, args.weight_decay_end, done, steps),
            )
        )
        done += 1
        if done % readings.block == 0 or done == steps:
            readings.send()
            collect(readings.receive())
            late = (
                args.checkpoint_minutes > 0
                and time.monotonic() - saved > 60 * args.checkpoint_minutes
            )
            due, caught = any_rank([main and late, bool(received)])
            ended = "signal" if caught else ended
        if done % every == 0 or done == steps or (ended and ended != "signal"):
            measure(done)
        if (
            (due or (args.checkpoint_steps and done % args.checkpoint_steps == 0))
            and done < steps
            and not ended
        ):
            save()
    save()
    progress.close()
    if main:
        run.draw_loss()
    if ended == "signal":
        say(
            f"stopped by {signal.Signals(received[0]).name if received else 'a signal'} at step {done}; "
            "run the same command to go on"
        )
        return 128 + (received[0] if received else signal.SIGTERM)
    if main:
        finish(args, run, teacher, student, index, done, ended, best, config, heldout.name)
    total = sum(gather_values(unreadable))
    if total:
        say(
            f"{total} patches could not be read and were replaced, which the exit status tells too; they are named in "
            f"{run.folder / 'unreadable.txt'}"
        )
    return int(total > 0)


def finish(
    args,
    run: Run,
    teacher,
    student,
    index,
    done: int,
    ended: str,
    best: dict,
    config: dict,
    cka: str,
) -> None:
    """Export the student and say where it is."""
    try:
        save_student(
            student,
            run.folder / "student",
            metadata={
                "teacher": args.teacher,
                "student": args.student,
                "cancer": args.cancer,
                "run": run.folder.name,
                "steps": done,
                "patients": list(index.patients),
                "slides": list(index.slides),
                "loss": args.loss,
                "cka_before": best["before"],
                "cka_after": best["last"],
            },
        )
        run.write_config(
            {**config, "finished": {"step": done, "because": ended or "--max-steps", "best": best}}
        )
    except OSError as error:
        raise UserError(
            f"{run.folder / 'student'}: not written ({error}); make room and run the same command again, "
            "which exports from the checkpoint"
        ) from None
    print(
        f"{ended or 'done'}: {cka} to the teacher {best['before']:.4f} before and {best['last']:.4f} after "
        f"{done} steps\nloss curve: {run.folder / 'loss.png'}; patches as the models see them: "
        f"{run.folder / 'augmented.png'}\nstudent: {run.folder / 'student'}",
        flush=True,
    )


def default_name(args: argparse.Namespace) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{args.cancer}-{Path(args.student).name}")


def describe_model(model: Model) -> dict:
    return {
        "name": model.name,
        "parameters": model.parameters_count,
        "dim": model.dim,
        "weights": model.weights,
    }


def load_pair(args: argparse.Namespace, device: torch.device, precision: torch.dtype):
    """Teacher, frozen, with weights in the precision of its matrix products; student in fp32."""
    weights = parse_weights(args.weights, [args.teacher, args.student])
    options = {"device": device, "input_size": args.crop}
    try:
        teacher = load_model(args.teacher, weights[args.teacher], dtype=precision, **options)
        student = load_model(args.student, weights[args.student], dtype=torch.float32, **options)
    except UserError as error:
        raise UserError(str(error).replace("--input-size", "--crop")) from None
    return teacher.requires_grad_(False), student.train()


def build(args, teacher, student, device, world: int) -> tuple[Distiller, float]:
    """The distiller for this pair, and the FLOPs of one step on one rank (a backward pass counted as two forward)."""
    from torch.utils.flop_counter import FlopCounterMode

    sample, shapes, flops = torch.zeros(2, 3, args.crop, args.crop, device=device), [], []
    student.eval()
    for model in (teacher, student):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            try:
                shapes.append(token_rows(model, sample, args.tokens).shape)
            except ValueError as error:
                raise UserError(f"--tokens {args.tokens}: {error}; take --tokens cls") from None
        flops.append(counter.get_total_flops() / 2)
    student.train()
    if shapes[0][0] != shapes[1][0]:
        raise UserError(
            f"--tokens all: {args.teacher} has {shapes[0][0] // 2} tokens for a crop of {args.crop} px and "
            f"{args.student} has {shapes[1][0] // 2}; take --tokens cls, or a pair with equal patch size"
        )
    group = None
    if args.sync and world > 1:
        group = torch.distributed.group.WORLD
        if device.type == "cuda":
            student.net = nn.SyncBatchNorm.convert_sync_batchnorm(student.net)
    distiller = Distiller(student, shapes[1][1], shapes[0][1], args, group).to(device)
    distiller.requires_grad_(True)
    for model in (teacher, student):
        if not (teacher.num_prefix_tokens and student.num_prefix_tokens):
            model.to(
                memory_format=torch.channels_last
            )  # a third faster for convolutions, on CPU too
        if args.compile:
            # Block by block: one short compilation serves all blocks, and DDP still overlaps with the backward pass.
            for module in getattr(model.net, "blocks", [model.net]):
                module.compile()
    return distiller, (flops[0] + 3 * flops[1]) * args.batch_size * args.accumulate


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    group = parser.add_argument_group("what")
    group.add_argument("--cancer", default="brca", help="cohort: the name given to tile.py")
    group.add_argument("--data", default="data", help="folder that tile.py filled")
    group.add_argument(
        "--slides", help="folder of the slides, where they are not where tile.py found them"
    )
    group.add_argument("--runs", default="runs", help="folder of runs")
    group.add_argument("--name", help="name of the run; by default cancer and student")
    group.add_argument(
        "--teacher",
        default="h-optimus-0",
        help="a name that g2l.models lists, timm:NAME, or a folder",
    )
    group.add_argument("--student", default="hibou-l", help="likewise")
    group = parser.add_argument_group("recipe (defaults: the paper's, where it says)")
    group.add_argument(
        "--max-steps",
        type=int,
        default=10_000,
        help="optimizer steps; the cosine schedules span them",
    )
    group.add_argument("--batch-size", type=int, default=32, help="patches per process and step")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="micro-batches per step; 3 on one GPU computes what three GPUs do with local statistics",
    )
    group.add_argument(
        "--crop", type=int, default=224, help="side of the random crop, pixels; both models see it"
    )
    group.add_argument(
        "--lr",
        type=float,
        default=1e-4,
        help="learning rate at the start; random students want 1e-3",
    )
    group.add_argument("--lr-end", type=float, default=1e-6, help="learning rate at the end")
    group.add_argument("--weight-decay", type=float, default=0.05, help="at the start")
    group.add_argument("--weight-decay-end", type=float, default=0.5, help="at the end")
    group.add_argument(
        "--decay-all", action="store_true", help="weight decay on 1-D parameters and tokens too"
    )
    group.add_argument(
        "--grad-clip",
        type=float,
        default=0.0,
        help="largest norm of the gradient, 0 for no limit; 1 tames a run whose loss turned NaN",
    )
    group.add_argument(
        "--sampling",
        choices=("slide", "patch"),
        default="slide",
        help="draw a slide uniformly and then a patch of it, or patches uniformly",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of patches, augmentation, projector and held-out patients",
    )
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss", choices=LOSSES, default="logsum", help="all but logsum are there for comparison"
    )
    group.add_argument(
        "--alpha", type=float, default=4.0, help="exponent of logsum and correlation"
    )
    group.add_argument(
        "--normalize",
        choices=("both", "student", "student-affine", "none"),
        default="both",
        help="batch norm after the projector and on the teacher",
    )
    group.add_argument(
        "--reduction",
        choices=("batch", "row"),
        default="batch",
        help="one log over the batch, or one per sample and their mean",
    )
    group.add_argument(
        "--tokens",
        choices=("cls", "all"),
        default="cls",
        help="compare embeddings, or those and all patch tokens (ViTs with equal patch size)",
    )
    group.add_argument(
        "--sync",
        action="store_true",
        help="statistics and sum of the loss over all ranks, and "
        "on GPUs the statistics of batch norm inside the student",
    )
    group = parser.add_argument_group("when to stop")
    group.add_argument(
        "--stop",
        choices=("consecutive", "cumulative", "off"),
        default="consecutive",
        help="how to count steps whose loss exceeds the mean of the last --stop-window",
    )
    group.add_argument("--stop-window", type=int, default=100, help="steps")
    group.add_argument("--stop-patience", type=int, default=10, help="stop at more than this count")
    group.add_argument(
        "--stop-min-steps", type=int, default=1000, help="never stop before this step"
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=int,
        help="loading processes per rank; default: up to 12 for a GPU, 1 on a CPU of more than 2 cores",
    )
    group.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        help="stop when more than this fraction of patches (and more than 10) cannot be read",
    )
    group.add_argument(
        "--hold-out", type=float, default=0.05, help="fraction of patients kept for measuring CKA"
    )
    group.add_argument(
        "--eval-patches",
        type=int,
        default=256,
        help="fixed held-out patches for CKA to the teacher",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        default=0,
        help="steps between measurements; 0: a tenth of the run, at most 500",
    )
    group.add_argument(
        "--checkpoint-minutes", type=float, default=10, help="between checkpoints; 0: none by time"
    )
    group.add_argument(
        "--checkpoint-steps", type=int, default=0, help="between checkpoints; 0: none by steps"
    )
    group.add_argument(
        "--keep", type=int, default=2, help="checkpoints kept, in case the newest is damaged"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a number that cannot be."""
    for name, low in (
        ("max_steps", 1),
        ("batch_size", 2),
        ("accumulate", 1),
        ("crop", BLUR_SIZE // 2 + 1),
        ("keep", 1),
        ("eval_patches", 4),
        ("stop_window", 1),
        ("seed", 0),
    ):
        if getattr(args, name) < low:
            why = ", since batch norm needs two samples" if name == "batch_size" else ""
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}{why}"
            )
    for name, low in (
        ("lr", 0),
        ("lr_end", 0),
        ("weight_decay", 0),
        ("weight_decay_end", 0),
        ("grad_clip", 0),
        ("alpha", 1),
        ("stop_patience", 0),
        ("stop_min_steps", 0),
        ("max_unreadable", 0),
        ("eval_every", 0),
        ("checkpoint_minutes", 0),
        ("checkpoint_steps", 0),
        ("workers", 0),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: expected a number of at least {low}"
            )
    if not 0 <= args.hold_out <= 0.5:
        raise UserError(f"--hold-out {args.hold_out}: expected a fraction from 0 to 0.5")
    if args.sync and args.loss != "logsum":
        raise UserError(f"--sync: only --loss logsum is computed over all ranks, not {args.loss}")


REMEDIES = {"memory": "lower --batch-size, and raise --accumulate for as many patches a step"}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run_command(args), REMEDIES)


def run_command(args: argparse.Namespace) -> int:
    """Check the flags, train, and leave no process behind; the exit status."""
    try:
        check(args)
        status = train(args)
    finally:
        end_workers()  # before anything is said: the death of one is a signal that raises
    leave_distributed()  # not after an error: it would wait for what other ranks will never send
    return status


if __name__ == "__main__":
    sys.exit(main())

"""A run under way: steps, checkpoints, measurements, and the student at the end.

`Training` is what changes from step to step and what is done with it; `go_on` takes the steps, the
methods after it are in the order in which a step calls them, and `export` writes the student.
"""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from g2l.augment import augment
from g2l.card import TOLD
from g2l.cohort import hashed
from g2l.devices import describe_device
from g2l.errors import UserError
from g2l.models import save_student
from g2l.patches import PatchIndex
from g2l.progress import Progress
from g2l.ranks import Signals, Stopped, any_rank, gather_values, rank_and_world
from g2l.recipe import Step, StopRule, cosine, joined, projected
from g2l.registry import licence_note, lineage, origins, verdict
from g2l.remote import Link
from g2l.runs import Readings, Run, checksums, column, describe_setting
from g2l.stream import Heldout


@dataclass(eq=False)
class Training:
    """A run under way: what changes from step to step, and what is done with it.

    `peak`: steps a second that this rank would take at the matmul ceiling. A checkpoint holds
    `done`, `best`, `unreadable` and `ended` beside models, optimizer and stop rule.
    """

    args: Namespace
    run: Run
    step: Step
    identity: dict
    peak: float
    done: int = 0  # steps
    best: dict = field(default_factory=dict)  # CKA: best and its step, before training, last
    unreadable: int = 0  # patches of this rank
    waited: float = 0.0  # seconds, for patches
    ended: str = ""  # why, before the last step

    def __post_init__(self) -> None:
        args = self.args
        self.rank, self.world = rank_and_world()
        self.stop = StopRule(args.stop, args.stop_window, args.stop_patience, args.stop_min_steps)
        self.readings = Readings(self.step.device, self.world)
        self.images = self.world * args.accumulate * args.batch_size  # of a step, on all ranks
        self.random: dict = {}
        self.config: dict = {}
        self.progress = Progress(args.max_steps, "step", shown=False)
        self.saved = time.monotonic()

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.step.distiller.load_state_dict(state["distiller"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.stop.load_state_dict(state["stop"])
        self.done = state["step"]
        self.best = state["best"]
        self.ended = state["ended"]
        self.unreadable = state["unreadable"][self.rank]
        self.random = state["random"][self.rank]
        if self.run.main:
            print(f"going on from step {self.done} of {self.run.folder}")

    def begin(self, index: PatchIndex, held: np.ndarray) -> None:
        """On rank 0: look at the room on the disk, write config.json, draw the patches held out."""
        args, run, distiller = self.args, self.run, self.step.distiller
        weights = sum(value.nbytes for value in distiller.state_dict().values())
        # AdamW keeps two numbers a weight; while a checkpoint is written, one more is there.
        run.check_room(3 * weights * (args.keep + 1) + weights)
        device = describe_device(self.step.device)
        cohort = {
            "slides": len(index.slides),
            "patches": len(index),
            "patients": index.patients,
            "held out": [index.slides[i] for i in np.flatnonzero(held)],
        }
        self.config = {
            "arguments": vars(args),
            "identity": self.identity,
            "device": device,
            **describe_setting(),
            "cohort": cohort,
        }
        run.write_config(self.config)
        run.cut_log(self.done)
        teachers, student = self.step.teachers, distiller.student
        earlier = lineage(args.student, student.metadata)
        for name, model in zip(args.teacher, teachers, strict=True):
            earlier += lineage(name, model.metadata)
        self.origin = {"teacher": joined(args.teacher), "student": args.student, "earlier": earlier}
        for name in origins(self.origin, "teacher"):
            if note := licence_note(name):
                print(note)
        self.heldout = Heldout(
            index,
            held,
            args.eval_patches,
            args.crop,
            args.seed,
            teachers,
            args.batch_size,
        )
        if args.keep_projector:  # what cannot be exported is said before it is trained
            projected(distiller, self.heldout.images[:4], args.batch_size)
        names = [f"{one.name} ({one.parameters_count / 1e6:,.1f} M)" for one in teachers]
        print(
            f"{run.folder}: {' and '.join(names)} into "
            f"{student.name} ({student.parameters_count / 1e6:,.1f} M parameters); {self.images} "
            f"patches a step, {args.max_steps} steps; {self.identity['precision']} on "
            f"{device}; at the matmul ceiling {self.peak:,.3g} steps a second"
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
            self.run.draw_loss(self.heldout.origin)
        return caught

    def is_due(self) -> bool:
        """Whether a checkpoint follows the next step, by steps or by time; rank 0 has the clock."""
        every, minutes = (
            self.args.checkpoint_steps,
            (time.monotonic() - self.saved) / 60,
        )
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
        warm = min(1, (step + 1) / max(1, args.warmup))
        return (
            warm * cosine(args.lr, args.lr_end, step, args.max_steps),
            cosine(args.weight_decay, args.weight_decay_end, step, args.max_steps),
        )

    def fetch(self, stream: Iterator, signals: Signals) -> list:
        """The micro-batches of the next step; none where a signal came, also while waiting.

        Raises UserError where too many patches cannot be read.
        """
        batches, failures = [], []
        start = time.monotonic()
        try:
            with signals.raising():
                for _ in range(self.args.accumulate):
                    images, params, unreadable = next(stream)
                    failures += unreadable
                    batches.append((images, params))
        except Stopped:
            return []
        self.waited += time.monotonic() - start
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
                f"{self.unreadable} of {drawn} patches could not be read, the last: {failures[-1]}"
                f"; {path} has all",
                mend="unreadable",
            )

    def collect(self, everything: bool) -> None:
        """Take the numbers that have arrived: guard, ask the stop rule, log.

        Raises UserError where loss or gradient is no number.
        """
        rate, lines = self.progress.rate, []
        for loss, norm, spread in self.readings.receive(everything):
            step = self.stop.steps + 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                text = f"step {step}: the loss is {loss} and the gradient norm {norm}"
                raise UserError(f"{text}. The last checkpoint is older", mend="diverged")
            if self.stop.update(loss) and not self.ended:
                self.ended = f"stop rule ({self.args.stop}) at step {step}"
            lr, weight_decay = self.schedule(step - 1)
            row = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "weight_decay": weight_decay,
                "grad_norm": norm,
                "spread": spread,
                "above_mean": self.stop.count,
                "images_per_second": round(rate * self.images, 2),
                "mfu": round(rate / self.peak, 4),
            }
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
                f"step {self.done}: the student gives the same features for every patch"
                ", so there is nothing to learn from",
                mend="constant",
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

    def tell_served(self, link: Link) -> None:
        """Say what was read of slides at an address, if there are any, since the command was given,
        and how long its steps waited for patches."""
        if not link.hosts:
            return
        names = "bytes", "tiles", "hits"
        found = gather_values([link.counts[name] for name in names] + [self.waited])
        read, tiles, hits, waited = np.sum(found, 0)
        if self.run.main:
            idle = waited / self.world / self.progress.seconds
            print(
                f"slides read where they are: {read / 1e6:,.1f} MB fetched; "
                f"{hits / max(1, tiles):.0%} of {tiles:,.0f} tiles were in the cache; "
                f"the steps waited for patches {idle:.0%} of their time"
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

    def export(self, index: PatchIndex, held: np.ndarray) -> None:
        """On rank 0: write the student with its model card, and beside it the one with a projector,
        where that is asked for."""
        args, run, best = self.args, self.run, self.best
        student = self.step.distiller.student
        metadata = {
            **self.origin,
            "cancer": args.cancer,
            "loss": joined(args.loss),
            "steps": self.done,
            "hashed": True,  # the student may be published, names of patients may not
            "patients": [hashed(name) for name in index.patients],
            "slides": [hashed(name) for name in index.slides],
            "cka_before": best["before"],
            "cka_after": best["last"],
        }
        facts = {
            **{name: self.config[name] for name in TOLD},
            "licences": [verdict(name) for name in origins(self.origin, "teacher")],
            "patches": len(index),
            "cohort": self.identity["cohort"],
            "tiles": self.identity["settings of tile.py"],
            "measure": self.heldout.name,
            "curve": list(zip(*column(run.folder, "cka"), strict=True)),
            **self.heldout.proof(student),
        }
        finished = {"step": self.done, "because": self.ended or "last step", "best": best}
        nets = [student]
        if args.keep_projector:
            # Standardised over patches that were trained on.
            more = 4 * args.eval_patches, args.crop, args.seed
            seen = Heldout(index, ~held, *more, [], args.batch_size)
            nets.append(projected(self.step.distiller, seen.images, args.batch_size))
        try:
            for name, net in zip(run.exports, nets, strict=True):
                about = metadata | {"run": name.replace("student", run.folder.name)}
                save_student(net, run.folder / name, metadata=about, facts=facts)
                finished[name] = checksums(run.folder / name)
            run.write_config({**self.config, "finished": finished})
        except OSError as error:
            raise UserError(f"{run.folder}: student not written ({error})", mend="export") from None

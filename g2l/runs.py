"""A run's folder: its lock, config.json, log.jsonl, checkpoints, pictures, TensorBoard.

Every file is whole or absent, and is checked when it is read back: a damaged or foreign one is
named, set aside as NAME.damaged, and made again where it can be. `Run` is the folder, `Readings`
brings the numbers of each step from the device to it; the rest says what a run was made with.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2l.errors import UserError, warn
from g2l.files import atomic, check_unpacked, digest, locked, write_text
from g2l.models import Model
from g2l.patches import PatchIndex
from g2l.ranks import agree, rank_and_world
from g2l.rows import read_rows

# Raised when a checkpoint of before can no longer be read as it is. 1 had no number in it.
VERSION = 2


@dataclass(eq=False)
class Run:
    """runs/NAME: one writer at a time.

    `keep`: checkpoints kept; `main`: whether this rank is the one that writes; `words`: how the
    command spells the names of an identity; `exports`: folders of students that it is to leave.
    Raises UserError where another process trains this run.
    """

    folder: Path
    keep: int
    main: bool
    words: Mapping[str, str]
    exports: Sequence[str]
    board: Any = None  # TensorBoard's writer

    def __post_init__(self) -> None:
        folder = self.folder
        older = [folder / f"checkpoint.{i}.pt" for i in range(1, self.keep)]
        self.checkpoints = [folder / "checkpoint.pt", *older]
        self.lock = contextlib.ExitStack()
        if not self.main:
            return
        if not self.lock.enter_context(locked(folder / ".lock", wait=False)):
            raise UserError(f"{folder}: another process trains this run; wait for it", mend="name")
        for left in folder.glob(".*.tmp.*"):  # by a process that was killed while it wrote
            left.unlink()

    def close(self) -> None:
        """Finish TensorBoard's file and let others train this run."""
        if self.board:
            self.board.close()
        # Refused before there was anything to keep: nothing is left behind.
        if self.main and [path.name for path in self.folder.glob("*")] == [".lock"]:
            (self.folder / ".lock").unlink()
            with contextlib.suppress(OSError):  # another process begins the run just now
                self.folder.rmdir()
        self.lock.close()

    def set_aside(self, path: Path, why: object) -> None:
        """Rename a damaged file to NAME.damaged, and say so."""
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        reason = str(why).splitlines()[0]
        warn(f"{path}: damaged ({reason}); set aside as {aside.name}")

    def config(self) -> dict:
        """What config.json of an earlier start says; {} if there is none that can be read."""
        path = self.folder / "config.json"
        if not path.exists():
            return {}
        try:
            config = json.loads(path.read_text())
            _ = {
                **config["identity"],
                **config.get("finished", {}),
            }  # TypeError for no mappings
            return config
        except (ValueError, LookupError, TypeError) as error:
            self.set_aside(path, error)
            return {}

    def write_config(self, config: dict) -> None:
        """Write config.json."""
        text = json.dumps(config, indent=2, default=str)
        write_text(self.folder / "config.json", text + "\n")

    def cut_log(self, step: int) -> None:
        """Drop what log.jsonl says of steps after `step`: they are about to be done again."""
        kept = [json.dumps(row) + "\n" for row in read_log(self.folder) if row["step"] <= step > 0]
        write_text(self.folder / "log.jsonl", "".join(kept))

    def log(self, rows: list[dict]) -> None:
        """Append rows to log.jsonl and TensorBoard."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=rows[0]["step"])
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])

    def check_room(self, needed: int) -> None:
        """Raise UserError where the disk lacks room for `needed` bytes.

        What is replaced counts as room.
        """
        replaced = [path.stat().st_size for path in self.checkpoints if path.exists()]
        free = shutil.disk_usage(self.folder).free + sum(replaced)
        if free < needed:
            raise UserError(
                f"{self.folder}: checkpoints and student take {needed / 1e9:,.2f} GB, "
                f"and {free / 1e9:,.2f} GB are free",
                mend="room",
            )

    def save(self, state: dict) -> None:
        """Write checkpoint.pt, the one before becoming checkpoint.1.pt and so on.

        Raises UserError where it cannot be written; the one before then stays.
        """
        try:
            with atomic(self.checkpoints[0]) as path:
                torch.save({"version": VERSION, **state}, path)
                with open(path, "rb") as file:  # for its sake the oldest is deleted
                    os.fsync(file.fileno())
                for older, newer in pairwise(reversed(self.checkpoints)):
                    if newer.exists():
                        os.replace(newer, older)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            why = str(error).splitlines()[0]
            raise UserError(
                f"{self.folder}: checkpoint of step {state['step']} not written ({why})",
                mend="room",
            ) from None

    def changes(self, old: dict, new: dict) -> str:
        """What a run was begun with and has otherwise now."""
        found = []
        for name in new.keys() & old.keys():
            if old[name] != new[name]:
                word = self.words.get(name, name)
                found.append(f"{word} was {old[name]!r} and is now {new[name]!r}")
        return "; ".join(sorted(found))

    def refuse_changes(self, old: dict, new: dict) -> None:
        """Raise UserError naming whatever differs between a run's beginning and now."""
        if changed := self.changes(old, new):
            raise UserError(
                f"{self.folder} was begun otherwise: {changed}"
                ". Give what it was begun with to go on",
                mend="name",
            )

    def finished(self, identity: dict) -> int:
        """The last step of an earlier start whose student is whole; 0 where it is to be made.

        Raises UserError where that start was told otherwise.
        """
        config = self.config()
        finished = config.get("finished", {})
        lost = []
        for name in self.exports:
            found = checksums(self.folder / name)
            if "model.safetensors" not in found or finished.get(name, found) != found:
                lost.append(str(self.folder / name))
        whole = not lost
        done = finished["step"] if finished and whole else 0
        if config and (done or any(map(Path.exists, self.checkpoints))):
            self.refuse_changes(config["identity"], identity)
        if finished and not done:
            warn(f"{', '.join(lost)}: missing or damaged; exported again")
        return done

    def load(self, identity: dict) -> dict | None:
        """The newest whole checkpoint, on all ranks; None where none was written.

        Raises UserError where none is left, or where the run was begun otherwise.
        """
        state = self._newest(identity) if self.main else None
        if agree(state is not None) and not self.main:
            path = next(filter(Path.exists, self.checkpoints), None)
            if path is None:
                raise UserError(
                    f"{self.folder}: no checkpoint seen on {platform.node()}", mend="shared"
                )
            state = read_checkpoint(path)
        return state

    def _newest(self, identity: dict) -> dict | None:
        """A checkpoint that is damaged or foreign is set aside, and the one before is tried."""
        config = self.config()
        # If config.json says otherwise too, or is lost, it is the command that differs.
        known = config and not self.changes(config["identity"], identity)
        for path in filter(Path.exists, self.checkpoints):
            try:
                state = read_checkpoint(path)
                if not known:
                    self.refuse_changes(state["identity"], identity)
                why = self.changes(state["identity"], identity)
                if not why:
                    return state
            except UserError:
                raise
            except Exception as error:  # a foreign file fails in more ways than can be listed
                why = f"{type(error).__name__}: {error}"
            self.set_aside(path, why)
        if list(self.folder.glob("checkpoint*.damaged")):
            raise UserError(
                f"{self.folder}: no whole checkpoint is left; remove the folder to begin anew",
                mend="name",
            )
        return None

    def draw_loss(self, measured: str) -> None:
        """loss.png: loss with its running mean, CKA on the patches `measured`, and the schedules,
        over steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        steps, losses = column(self.folder, "loss")
        if not steps:
            return
        window = max(1, min(100, len(steps) // 10))
        mean = np.convolve(losses, np.full(window, 1 / window), "valid")
        figure, (top, middle, bottom) = plt.subplots(
            3,
            1,
            figsize=(8, 8),
            sharex=True,
            height_ratios=(3, 2, 1),
            layout="constrained",
        )
        top.plot(steps, losses, label="loss", color="lightsteelblue", lw=0.8)
        top.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
        top.set_ylabel("loss")
        middle.plot(*column(self.folder, "cka"), marker="o")
        middle.set_ylabel("unbiased CKA to the teacher")
        middle.set_title(f"on {measured}", loc="left", fontsize="medium")
        middle.set_ylim(min(0, middle.get_ylim()[0]), 1)  # its whole range, not its noise
        bottom.plot(*column(self.folder, "lr"), label="lr")
        bottom.plot(*column(self.folder, "weight_decay"), label="weight decay")
        bottom.set_yscale("log")
        bottom.set_xlabel("step")
        for axes in (top, bottom):
            axes.legend(frameon=False)
        with atomic(self.folder / "loss.png") as path:
            figure.savefig(path, dpi=110)
        plt.close(figure)

    def draw_sheet(self, images: Tensor, *seen: Tensor) -> None:
        """augmented.png: rows of patches as read, and below each what the models see of it.

        (B, 3, P, P) and (B, 3, crop, crop), each float in [0, 1]; of two, first the teacher's view.
        """
        from torchvision.utils import save_image

        room = images.shape[-1] - seen[0].shape[-1]
        framed = [torch.nn.functional.pad(crops, (0, room, 0, room), value=1) for crops in seen]
        across = min(8, len(images))
        shown = min(24, len(images)) // across * across  # in full rows
        views = torch.stack([view[:shown] for view in (images, *framed)])
        rows = views.unflatten(1, (-1, across)).transpose(0, 1).flatten(0, 2)
        with atomic(self.folder / "augmented.png") as path:
            save_image(rows, path, nrow=across, padding=4, pad_value=1)


def read_log(folder: Path) -> list[dict]:
    """The rows of a run's log.jsonl; a line that is half or damaged is left out."""
    rows = []
    path = folder / "log.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            row["step"] = int(row["step"])
            rows.append(row)
    return rows


def column(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """One quantity of a run's log.jsonl: the steps that have it, and its values."""
    rows = [row for row in read_log(folder) if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def read_checkpoint(path: Path) -> dict:
    """A checkpoint, its checksums compared (torch.load itself does not) and its keys looked at.

    Raises UserError for one that a later version wrote, and any other exception for a damaged or
    foreign file.
    """
    check_unpacked(path)
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise ValueError(f"checksum of {broken} differs")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("version", 1) > VERSION:
        raise UserError(
            f"{path}: written by a later version of this program (checkpoint version "
            f"{state['version']}; this one reads {VERSION}); go on with that one",
            mend="name",
        )
    if not {"identity", "distiller", "optimizer"} <= state.keys():
        raise ValueError("not a checkpoint of distill.py")
    return state


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder; empty where there is no such folder."""
    found = {}
    for path in sorted(folder.glob("*")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def describe_setting() -> dict:
    """Versions, code and machine: what it takes to run a run again."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=20,
        )
        revision = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    others = {name: version(name) for name in ("timm", "torchvision", "numpy")}
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **others},
        "revision": revision,
        "machine": platform.platform(),
        "command": " ".join(sys.argv),
    }


def identify(index: PatchIndex, teachers: Sequence[Model], student: Model) -> dict:
    """The parts of a run's identity that take opening and loading: cohort and weights.

    Rank 0's only: it alone compares and writes, and a giant's fingerprint takes a while.
    """
    if rank_and_world()[0] > 0:
        return {}
    rows = read_rows(index.folder)
    return {
        "cohort": digest(index.slides, index.patient, index.counts.tolist(), index.patch_size),
        "settings of tile.py": digest([rows[name].get("settings") for name in index.slides]),
        "teacher weights": " ".join(teacher.fingerprint for teacher in teachers),
        "student weights": student.fingerprint,
    }


class Readings:
    """The numbers of each step: averaged over the ranks, and read when they have arrived.

    On a GPU the host reads them two steps late: the device always has its next step queued, and
    the host, which hears signals, is never further ahead.
    """

    def __init__(self, device: torch.device, world: int):
        self.cuda = device.type == "cuda"
        self.world = world
        self.lag = 2 if self.cuda else 0
        self.sent: deque = deque()

    def send(self, values: Tensor) -> None:
        """Start the journey of a step's numbers (device, float (n,)) to the host."""
        arrived = None
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        if self.cuda:
            values = values.to("cpu", non_blocking=True)  # in pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self.sent.append((values, arrived))

    def receive(self, everything: bool) -> list[list[float]]:
        """Rows of numbers that have arrived, oldest first; with `everything` all are waited for."""
        rows = []
        while len(self.sent) > (0 if everything else self.lag):
            values, arrived = self.sent.popleft()
            if arrived:
                arrived.synchronize()
            rows.append(values.tolist())
        return rows

"""TODO."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import torch

from g2l.errors import UserError
from g2l.files import atomic, locked

# Arguments that may differ when a run goes on; every other one would change what is computed, and is refused.
FREE = {
    "data",
    "slides",
    "runs",
    "name",
    "weights",
    "device",
    "precision",
    "compile",
    "workers",
    "max_unreadable",
    "eval_every",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep",
}


class Run:
    """runs/NAME: one writer at a time, every file whole or absent."""

    def __init__(self, folder: Path, keep: int, main: bool):
        self.folder, self.keep, self.main, self.board = folder, keep, main, None
        self.checkpoints = [
            folder / ("checkpoint.pt" if i == 0 else f"checkpoint.{i}.pt") for i in range(keep)
        ]
        if not main:
            return
        self.lock = contextlib.ExitStack()
        if not self.lock.enter_context(locked(folder / ".lock", wait=False)):
            raise UserError(
                f"{folder}: another process trains this run; wait for it or give another --name"
            )
        for left in folder.glob(".*.tmp.*"):  # by a process that was killed while it wrote
            left.unlink()

    def close(self) -> None:
        """Finish TensorBoard's file and let others train this run."""
        if self.board:
            self.board.close()
        if self.main:
            if [path.name for path in self.folder.glob("*")] == [
                ".lock"
            ]:  # refused before there was anything to keep
                (self.folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another process begins the run just now
                    self.folder.rmdir()
            self.lock.close()

    def config(self) -> dict:
        """What config.json of an earlier start says; {} if there is none."""
        try:
            return json.loads((self.folder / "config.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def write_config(self, config: dict) -> None:
        with atomic(self.folder / "config.json") as path:
            path.write_text(json.dumps(config, indent=2, default=str) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop what log.jsonl says of steps after `step`: they are about to be done again."""
        kept = []
        if step and (self.folder / "log.jsonl").exists():
            for line in (self.folder / "log.jsonl").read_text().splitlines():
                with contextlib.suppress(
                    ValueError
                ):  # the last line of a killed process may be half
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        with atomic(self.folder / "log.jsonl") as path:
            path.write_text("".join(kept))

    def log(self, rows: list[dict]) -> None:
        """Append rows to log.jsonl and TensorBoard."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=rows[0]["step"])
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, row["step"])

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def save(self, state: dict) -> str | None:
        """Write checkpoint.pt, the one before becoming checkpoint.1.pt and so on. Returns why it could not, or None."""
        try:
            with atomic(self.folder / "checkpoint.pt") as path:
                torch.save(state, path)
                for older, newer in zip(
                    self.checkpoints[:0:-1], self.checkpoints[-2::-1], strict=True
                ):
                    if newer.exists() and newer != self.checkpoints[0]:
                        os.replace(newer, older)
                    elif (
                        newer.exists()
                    ):  # the newest keeps its own name until it is replaced, so there always is one
                        older.unlink(missing_ok=True)
                        try:
                            os.link(newer, older)
                        except OSError:  # some network file systems have no links; for a moment only the older is there
                            os.replace(newer, older)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            return str(error).splitlines()[0]
        return None

    def load(self) -> dict | None:
        """The newest whole checkpoint, or None where there is none. A damaged one is set aside, saying so."""
        seen = False
        for path in self.checkpoints:
            if not path.exists():
                continue
            seen = True
            try:
                with zipfile.ZipFile(
                    path
                ) as archive:  # torch.load itself does not compare checksums
                    broken = archive.testzip()
                if broken:
                    raise zipfile.BadZipFile(f"checksum of {broken} differs")
                return torch.load(path, map_location="cpu", weights_only=True)
            except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, KeyError) as error:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                print(
                    f"{path}: damaged ({str(error).splitlines()[0]}); set aside as {aside.name}, "
                    "falling back to the one before",
                    file=sys.stderr,
                    flush=True,
                )
        if seen:
            raise UserError(
                f"{self.folder}: no whole checkpoint is left; remove the folder to begin anew, "
                "or give another --name"
            )
        return None

    def draw_loss(self) -> None:
        """loss.png: loss with its running mean, held-out CKA, and the schedules, over steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        log = self.rows()
        steps = [row for row in log if "loss" in row]
        evals = [row for row in log if "cka" in row]
        if not steps:
            return
        x, loss = [row["step"] for row in steps], np.array([row["loss"] for row in steps])
        window = max(1, min(100, len(loss) // 10))
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 2, 1), constrained_layout=True
        )
        top.plot(x, loss, color="#b8c7e0", lw=0.8, label="loss")
        top.plot(
            x[window - 1 :],
            np.convolve(loss, np.full(window, 1 / window), "valid"),
            color="#1f4e9e",
            label=f"mean of {window} steps",
        )
        top.set_ylabel("loss")
        top.legend(frameon=False)
        middle.plot(
            [row["step"] for row in evals],
            [row["cka"] for row in evals],
            "o-",
            color="#a8324a",
            ms=3,
        )
        middle.set_ylabel("CKA to the teacher\n(unbiased, fixed patches)")
        bottom.plot(x, [row["lr"] for row in steps], color="#444444", label="learning rate")
        bottom.plot(
            x, [row["weight_decay"] for row in steps], color="#999999", label="weight decay"
        )
        bottom.set_yscale("log")
        bottom.legend(frameon=False)
        bottom.set_xlabel("step")
        with atomic(self.folder / "loss.png") as path:
            figure.savefig(path, dpi=110)
        plt.close(figure)

    def draw_sheet(self, images: torch.Tensor, crops: torch.Tensor, columns: int = 8) -> None:
        """augmented.png: patches as read, and below each what both models see of it."""
        from PIL import Image, ImageDraw

        count = min(len(images), 3 * columns)
        columns, gap, side, head = min(columns, count), 4, images.shape[-1], 16
        sheet = Image.new(
            "RGB", (columns * (side + gap), head + -(-count // columns) * 2 * (side + gap)), "white"
        )
        ImageDraw.Draw(sheet).text(
            (2, 2), "patches as read; below each, what both models see of it", fill="black"
        )
        for i in range(count):
            x, y = i % columns * (side + gap), head + i // columns * 2 * (side + gap)
            for image, offset in ((images[i], 0), ((crops[i] * 255).round().byte(), side + gap)):
                sheet.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (x, y + offset))
        with atomic(self.folder / "augmented.png") as path:
            sheet.save(path)


def refuse_changes(old: dict, new: dict, folder: Path) -> None:
    """Raise UserError naming whatever differs between the run's beginning and now."""
    changed = [
        f"{'--' + k.replace('_', '-') if k in new.get('flags', ()) else k} was {old[k]!r} and is now {new[k]!r}"
        for k in new
        if k in old and k != "flags" and old[k] != new[k]
    ]
    if changed:
        raise UserError(
            f"{folder} was begun otherwise: {'; '.join(changed)}. "
            "Give what it was begun with to go on, or another --name to begin anew"
        )


def describe_setting() -> dict:
    """Versions, code and machine: what it takes to run a run again."""
    import timm
    import torchvision

    try:
        revision = (
            subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40"],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent,
                timeout=20,
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "revision": revision,
        "machine": platform.platform(),
        "command": " ".join(sys.argv),
    }


class Readings:
    """The numbers of each step: kept on the device, averaged over the ranks by blocks, read one block late.

    On a GPU a block is 20 steps and the host reads it while the next one runs; on a CPU nothing is gained by waiting.
    """

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world
        self.block, self.lag = (20, 1) if device.type == "cuda" else (1, 0)
        self.open: list[torch.Tensor] = []
        self.sent: deque = deque()

    def add(self, values: torch.Tensor) -> None:
        self.open.append(values)

    def send(self) -> None:
        """Start the journey of the block's numbers to the host."""
        if not self.open:
            return
        values, self.open = torch.stack(self.open), []
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        if self.device.type == "cuda":
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.sent.append((values, event.synchronize))
        else:
            self.sent.append((values, lambda: None))

    def receive(self, everything: bool = False) -> list[list[float]]:
        """Rows of numbers that have arrived, oldest first."""
        arrived = []
        while len(self.sent) > (0 if everything else self.lag):
            values, wait = self.sent.popleft()
            wait()
            arrived += values.tolist()
        return arrived

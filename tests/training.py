"""What tests of training share: a small cohort, distill.py's command line, and what a run left."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from jobs import Forked, main_of

import tile

VIT = ["--teacher", "timm:test_vit4", "--student", "timm:test_vit"]  # 96 wide into 64 wide
CNN = ["--teacher", "timm:test_vit4", "--student", "timm:test_resnet"]  # with batch norm: buffers


def write_cohort(folder: Path) -> Path:
    """A cohort that tile.py tiled: 8 patients, 8 slides of 384 px, 36 patches of 64 px each."""
    import tifffile

    (folder / "slides" / "tiny").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.normal((150 + 6 * i, 90, 160), 35, (24, 24, 3)).clip(0, 255)
        image = coarse.repeat(16, 0).repeat(16, 1) + rng.normal(0, 12, (384, 384, 3))
        tifffile.imwrite(
            folder / "slides" / "tiny" / f"P{i}_a.tif",
            image.clip(0, 255).astype(np.uint8),
            tile=(128, 128),
            photometric="rgb",
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    assert (
        tile.main(["--cancer", "tiny", "--data", str(folder), "--mpp", "0.5", "--patch-size", "64"])
        == 0
    )
    return folder


def command(data: Path, runs: Path, name: str, *more, pair=VIT) -> list[str]:
    """A short run: 12 steps of 8 patches; `more` flags come last, so they count."""
    where = ["--cancer", "tiny", "--data", data, "--runs", runs, "--name", name, *pair]
    short = ["--weights", "random", "--crop", 48, "--batch-size", 8, "--max-steps", 12]
    rest = ["--lr", 1e-3, "--eval-patches", 16, "--eval-every", 12, "--workers", 0]
    return list(map(str, [*where, *short, *rest, "--device", "cpu", *more]))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in log(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


def same(a: Path, b: Path) -> None:
    """The same losses and the same student, bit for bit."""
    assert losses(a) == losses(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def fails(arguments: list[str], *parts: str, capsys) -> None:
    import distill

    assert distill.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(part in error for part in parts), error


def stopped_at(step: int, arguments: list[str], monkeypatch) -> None:
    """Run, and send SIGTERM when `step` has been logged."""
    import distill
    from g2l.runs import Run

    record = Run.log

    def log_and_stop(self, lines):
        record(self, lines)
        if lines[-1]["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert distill.main(arguments) == 143


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, deepest last."""
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            out += [child, *descendants(child)]
    return out


def assert_ends(pid: int) -> None:
    """A process ends within ten seconds; one that does not is killed."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} lives on")
        time.sleep(0.02)


def start(arguments: list[str]) -> Forked:
    return Forked(main_of("distill.py", *arguments))


def start_torchrun(arguments: list[str], ranks: int, options: tuple, env: dict) -> Forked:
    from torch.distributed.run import main

    launcher = ["--standalone", f"--nproc_per_node={ranks}", *options]
    return Forked(lambda: main([*launcher, str(ROOT / "distill.py"), *arguments]), env)


def wait_for_step(process: Forked, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (
        (folder / "log.jsonl").exists() and any(row[0] >= step for row in safe_losses(folder))
    ):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.003)


def safe_losses(folder: Path) -> list[tuple]:
    try:
        return losses(folder)
    except ValueError:  # a line half written
        return []


def kill(process: Forked) -> str:
    """SIGKILL to the process and everything below it, as a machine that fails does; its output."""
    below = descendants(process.pid)
    for pid in [process.pid, *below]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    done = process.finish()
    return done.stdout + done.stderr

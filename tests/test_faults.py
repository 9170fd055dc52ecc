"""The cases of faults.py. An ordinary run takes a few kills a command, `-m nightly` a hundred.

Commands run in forked processes, so that nothing is imported again and a kill costs a second.
"""

import errno
import functools
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from cohorts import edit_rows
from conftest import ROOT
from faults import CASES, WITHIN
from jobs import FORK, LATE
from PIL import Image
from training import assert_ends, descendants, losses, weights, write_cohort
from training import command as training

import demo
import distill
import embed
import evaluate
import robustness
import tile
from g2l import ranks
from g2l.errors import UserError
from g2l.images import ImageFiles
from g2l.models import load_model, save_student
from g2l.results import read_metrics

MODEL = ["--models", "timm:test_vit", "--weights", "random", "--input-size", "32"]
MODEL += ["--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiled cohort below data/, and bench/ with patches of two tissues, two centres, six
    patients.
    """
    for name in LATE:
        importlib.import_module(name)
    folder = tmp_path_factory.mktemp("faults")
    write_cohort(folder / "data")
    (folder / "bench").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,label,group,center"]
    for i in range(36):
        pixels = rng.integers(0, 99 + 99 * (i % 2), (32, 32, 3)) + 40 * (i // 18)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "bench" / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i // 6},c{i // 18}")
    (folder / "bench" / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(name: str, place: Path, out: Path) -> list:
    """The command line of a command that writes into `out`."""
    bench = [*MODEL, "--benchmark", place / "bench", "--results", out, "--no-pictures"]
    if name == "evaluate":
        return [*bench, "--seeds", 1, "--folds", 3]
    if name == "robustness":
        return [*bench, "--per-class", 9, "--samples", 1]
    if name == "distill":
        return training(place / "data", out, "r", "--checkpoint-steps", 2)
    here = ["--cancer", "tiny", "--data", out]
    if name == "tile":
        shutil.copytree(place / "data" / "slides", out / "slides", dirs_exist_ok=True)
        return [*here, "--mpp", 0.5, "--patch-size", 64, "--workers", 1]
    if not out.exists():
        shutil.copytree(place / "data", out)
        table = out / "tiles" / "tiny" / "slides.csv"
        old = str(place / "data")
        edit_rows(table, lambda row: row.update(path=row["path"].replace(old, str(out))))
    return [*here, *MODEL, "--workers", 0]


MAINS = {
    "tile": tile.main,
    "distill": distill.main,
    "evaluate": evaluate.main,
    "robustness": robustness.main,
    "embed": embed.main,
}


def numbers(name: str, out: Path) -> dict:
    """What a finished command has found, by what it is of."""
    found: dict = {}
    if name == "distill":
        found = {row: 0.0 for row in losses(out / "r")}
        found |= {key: value.numpy().tobytes() for key, value in weights(out / "r").items()}
    elif name in ("tile", "embed"):
        inner = "patches" if name == "tile" else "features_timm_test_vit"
        for path in sorted((out / "tiles" / "tiny" / inner).glob("[!.]*.h5")):
            with h5py.File(path) as file:
                for key in {"coords", "features"} & file.keys():
                    found[path.name, key] = file[key][()].tobytes()
    else:
        for row in read_metrics(out):
            row.pop("ms_per_image", None)
            value = row.pop("value")
            found[json.dumps(row, sort_keys=True)] = value and round(value, 4)
    assert found
    return found


class Job:
    """A command in `count` forked ranks; output goes to a file, `fault` is called before it."""

    def __init__(self, name, place, out: Path, count=1, fault: Callable | None = None, more=()):
        self.log = out.with_suffix(".log")
        self.log.write_text("")
        line = list(map(str, [*arguments(name, place, out), *more]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(count):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            where["MASTER_ADDR"] = "127.0.0.1"
            job = (MAINS[name], line, where if count > 1 else {}, fault)
            self.processes.append(FORK.Process(target=self.life, args=job))
            self.processes[-1].start()

    def life(self, main: Callable, line: list, where: dict, fault: Callable | None) -> None:
        os.setsid()  # so that a kill takes its loading processes, too
        os.environ.update({key: str(value) for key, value in where.items()})
        with open(self.log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        try:
            if fault:
                fault()
            status = main(line)
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        os._exit(status)

    def end(self, seconds: float, kill: bool) -> list:
        """The statuses; what still runs after so many seconds is killed: allowed only if `kill`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = any(process.exitcode is None for process in self.processes)
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # it has not come to setsid
        for process in self.processes:
            process.join()
        assert kill or not late, f"still runs after {seconds} s\n{self.log.read_text()}"
        return [process.exitcode for process in self.processes]


@functools.cache
def unbroken(name: str, place: Path, count: int = 1) -> tuple[dict, float]:
    """The numbers of a run that nothing happens to, and its seconds."""
    out = place / f"unbroken-{name}-{count}"
    start = time.monotonic()
    job = Job(name, place, out, count)
    assert job.end(300, kill=False) == [0] * count, job.log.read_text()
    return numbers(name, out), time.monotonic() - start


# ---- kills

# In a quick run robustness stands for evaluate, whose features are the same code; tile, embed and
# distill have kills of their own.
QUICK = ("robustness", "robustness, two ranks")
KILLED = [case.command for case in CASES if case.seen == "kills"]
SOME_KILLED = [
    command if command in QUICK else pytest.param(command, marks=pytest.mark.slow)
    for command in KILLED
]


@pytest.mark.parametrize("command", SOME_KILLED)
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_goes_on(place, tmp_path, command, kills):
    kills = int(os.environ.get("G2L_KILLS", kills))
    name, count = command.split(",")[0], 1 + ("two ranks" in command)
    expected, seconds = unbroken(name, place, count)
    luck = np.random.default_rng(len(command))
    done = begun = lost = 0
    while done < kills:
        begun += 1
        out = tmp_path / str(begun)
        while done < kills:
            statuses = Job(name, place, out, count).end(luck.uniform(0, seconds), kill=True)
            if statuses == [0] * count:
                break
            ended = {0, 1, -signal.SIGKILL} if count > 1 else {0, -signal.SIGKILL}
            assert set(statuses) <= ended, out.with_suffix(".log").read_text()
            done += 1
        job = Job(name, place, out, count)
        assert job.end(300, kill=False) == [0] * count, job.log.read_text()
        lost += numbers(name, out) != expected
        shutil.rmtree(out)
    print(f"{command}: {done} kills in {begun} runs, {lost} lost")
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("name", MAINS)
def test_a_main_process_killed_alone_leaves_no_process_and_no_lock(place, tmp_path, name):
    out = tmp_path / "out"
    job = Job(name, place, out, more=["--workers", 2])
    [main] = job.processes
    while not descendants(main.pid):
        assert main.exitcode is None, "it has started no process"
        time.sleep(0.002)
    time.sleep(0.3)  # what it loads ahead fills the pipes
    main.kill()
    main.join()
    assert main.exitcode == -signal.SIGKILL, "ended too late to test anything"
    assert Job(name, place, out).end(60, kill=False) == [0], job.log.read_text()
    assert numbers(name, out) == unbroken(name, place)[0]
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(main.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a loading process lives on"
        time.sleep(0.05)


# ---- faults


def in_loader() -> bool:
    return torch.utils.data.get_worker_info() is not None


def at_reading(act: Callable) -> Callable:
    """A fault: `act` is called wherever an image is read in a loading process."""

    def fault() -> None:
        read = ImageFiles.__getitem__

        def faulty(self, i):
            if in_loader():
                act()
            return read(self, i)

        ImageFiles.__getitem__ = faulty

    return fault


def no_more_files() -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def no_process() -> None:
    def full(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    multiprocessing.process.BaseProcess.start = full


def no_shared_memory() -> None:
    def full(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    torch.UntypedStorage._new_using_filename_cpu = full
    torch.UntypedStorage._new_using_fd_cpu = full


def stand_still() -> None:
    ranks.WAIT = ranks.RANK_WAIT = 1
    at_reading(lambda: time.sleep(60))()


def rank_stands_still() -> None:
    """Rank 1 takes 5 seconds for one image, and rank 0 has only one to wait."""
    ranks.RANK_WAIT = 1
    read, slow = ImageFiles.__getitem__, [os.environ.get("RANK") == "1"]

    def faulty(self, i):
        if slow.pop() if slow else False:
            time.sleep(5)
        return read(self, i)

    ImageFiles.__getitem__ = faulty


def disk_full() -> None:
    import g2l.files

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    g2l.files.os.replace = full


# What happens, and what is then said; nothing where the command goes on.
FAULTS = {
    "loader killed": (at_reading(lambda: os.kill(os.getpid(), signal.SIGKILL)), "was killed"),
    "loader stands still": (stand_still, "gave nothing for 1 s"),
    "no file can be opened any more": (at_reading(no_more_files), "Too many open files"),
    "no process can be started": (no_process, "Resource temporarily unavailable"),
    "no space in /dev/shm": (no_shared_memory, ""),
    "a rank stands still": (rank_stands_still, "for rank 1, which stands still"),
    "disk full": (disk_full, "no space left on the disk"),
}


SOME_FAULTY = [
    pytest.param(
        case,
        id=f"{case.command}: {case.fault}",
        marks=() if case.command in QUICK else pytest.mark.slow,
    )
    for case in CASES
    if case.seen == "fault"
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME_FAULTY)
def test_a_fault_ends_in_words_and_the_next_run_ends_the_work(place, tmp_path, case):
    fault, said = FAULTS[case.fault]
    name, count = case.command.split(",")[0], 1 + ("two ranks" in case.command)
    out = tmp_path / "out"
    workers = 0 if count > 1 or case.fault == "disk full" else 1
    job = Job(name, place, out, count, fault, more=["--workers", workers])
    statuses, text = job.end(WITHIN, kill=False), job.log.read_text()
    assert "Traceback" not in text
    if said:
        assert statuses[0] == 1
        assert re.search(rf"(?m)^error: .*{re.escape(said)}", text), text
        assert Job(name, place, out, count).end(60, kill=False) == [0] * count, text
    assert statuses[0] == int(bool(said))
    assert numbers(name, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_child(tmp_path, number):
    """As demo.py starts commands: ended by a signal, it leaves nothing that works on."""
    started = tmp_path / "started"
    code = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"

    def parent() -> None:
        try:
            ranks.run_child([sys.executable, "-c", code])
        except ranks.Stopped:
            os._exit(9)

    process = FORK.Process(target=parent)
    process.start()
    deadline = time.monotonic() + 20
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    [child] = descendants(process.pid)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == (9 if number == signal.SIGTERM else -number)
    assert_ends(child)


@pytest.mark.slow
def test_what_draws_a_cohort_ends_with_its_parent(tmp_path):
    process = FORK.Process(target=demo.write_cohort, args=(tmp_path, 1))
    process.start()
    while not (drawing := descendants(process.pid)):
        time.sleep(0.02)
    process.kill()
    process.join()
    for child in drawing:
        assert_ends(child)


def test_a_flipped_bit_of_a_student_is_noticed_when_it_is_loaded(tmp_path):
    model = load_model("timm:test_vit", "random")
    save_student(model, tmp_path / "student", metadata={})
    assert load_model(str(tmp_path / "student")).fingerprint == model.fingerprint
    path = tmp_path / "student" / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in np.random.default_rng(0).integers(header, len(whole), 5):
        bad = bytearray(whole)
        bad[place] ^= 1 << int(place) % 8
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            load_model(str(tmp_path / "student"))


def test_every_promise_names_a_test_that_is_there():
    for case in CASES:
        if case.seen not in ("fault", "kills"):
            file, words = case.seen.split(": ")
            text = (ROOT / "tests" / f"test_{file}.py").read_text()
            assert re.search(rf"(?m)^def test_\w*{words}", text), case
        if case.seen == "fault":
            assert case.fault in FAULTS

"""distill.py as a user runs it: whole runs, real kills and resumption, ranks, guards."""

import dataclasses
import json
import math
import os
import random
import resource
import select
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import bench_step
import numpy as np
import pytest
import torch
from cohorts import edit_rows
from conftest import run, torchrun
from jobs import Forked, main_of, run_ranks
from training import (
    CNN,
    VIT,
    assert_ends,
    command,
    descendants,
    fails,
    kill,
    log,
    losses,
    same,
    start,
    start_torchrun,
    stopped_at,
    wait_for_step,
)

import distill
from g2l.cohort import hashed
from g2l.errors import PatchError
from g2l.models import load_model, save_student
from g2l.patches import PatchIndex
from g2l.recipe import Step
from g2l.stream import Heldout

pytestmark = pytest.mark.usefixtures("signals", "no_curve")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run of 40 steps in one go, its student with batch norm."""
    runs = tmp_path_factory.mktemp("unbroken")
    assert (
        distill.main(command(data, runs, "r", "--max-steps", 40, "--eval-every", 20, pair=CNN)) == 0
    )
    return runs / "r"


@pytest.mark.slow
def test_a_run_leaves_what_it_should(data, unbroken, capsys):
    import timm
    from PIL import Image

    for name in (
        "config.json",
        "log.jsonl",
        "checkpoint.pt",
        "loss.png",
        "augmented.png",
        "student/model.safetensors",
    ):
        assert (unbroken / name).stat().st_size > 0
    assert list(unbroken.glob("events.out.tfevents*")) and not list(unbroken.glob(".*.tmp*"))
    Image.open(unbroken / "augmented.png").load()
    config = json.loads((unbroken / "config.json").read_text())
    assert config["arguments"]["lr"] == 1e-3 and config["versions"]["torch"] == torch.__version__
    rows = log(unbroken)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41)) and [
        r["step"] for r in rows if "cka" in r
    ] == [
        0,
        20,
        40,
    ]
    assert steps[0]["loss"] == pytest.approx(math.log(12 * 8 * 96), abs=0.5)
    assert np.mean([r["loss"] for r in steps[-10:]]) < np.mean(
        [r["loss"] for r in steps[:10]]
    )  # it learns
    assert steps[0]["lr"] == pytest.approx(1e-3) and steps[-1]["lr"] == pytest.approx(1e-6)
    assert steps[0]["weight_decay"] == pytest.approx(0.05) and steps[-1][
        "weight_decay"
    ] == pytest.approx(0.5)
    ours = load_model(str(unbroken / "student"))
    assert ours.metadata["teacher"] == "timm:test_vit4" and ours.metadata["steps"] == 40
    assert ours.metadata["patients"] == [hashed(f"P{i}") for i in range(8)]
    assert ours.metadata["slides"] == [hashed(f"P{i}_a") for i in range(8)]
    for name in ("config.json", "README.md"):
        assert "P3" not in (unbroken / "student" / name).read_text()
    theirs = timm.create_model(
        f"local-dir:{unbroken / 'student'}", pretrained=True, num_classes=0
    ).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(ours(x), theirs(x))
    before = (unbroken / "checkpoint.pt").stat().st_mtime
    assert (
        distill.main(
            command(data, unbroken.parent, "r", "--max-steps", 40, "--eval-every", 20, pair=CNN)
        )
        == 0
    )
    assert (
        "finished at step 40" in capsys.readouterr().out
        and (unbroken / "checkpoint.pt").stat().st_mtime == before
    )


def long(data: Path, runs: Path, *more) -> list[str]:
    """The command of `unbroken`, under a name of its own."""
    return command(data, runs, "r", "--max-steps", 40, "--eval-every", 20, *more, pair=CNN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"])
def test_ended_at_any_moment_and_resumed_equals_unbroken(data, unbroken, tmp_path, name):
    number, folder = signal.Signals[name], tmp_path / "r"
    dies = number == signal.SIGKILL
    often = ("--checkpoint-minutes", 0, "--checkpoint-steps", 4 if dies else 0)
    arguments = long(data, tmp_path, "--workers", 1, *often)
    process = start(arguments)
    wait_for_step(process, folder, random.Random(name).randint(5, 20))
    if dies:
        os.kill(process.pid, number)
        process.process.join()  # its loading process may live on for a while
        (folder / ".checkpoint.1.abc.tmp.pt").write_bytes(b"left behind")
    else:
        for pid in [process.pid, *descendants(process.pid)]:  # as a terminal does
            os.kill(pid, number)
        done = process.finish()
        assert done.returncode == 128 + number and "Traceback" not in done.stderr, done
        assert f"stopped by {name} at step" in done.stdout
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert state["step"] == losses(folder)[-1][0] < 40
    assert not (folder / "student").exists(), "ended too late to test anything"
    assert distill.main(arguments) == 0
    same(unbroken, folder)
    assert [row["step"] for row in log(folder) if "cka" in row] == [0, 20, 40]
    assert not list(folder.glob(".*.tmp*"))
    if dies:
        assert select.select([process.lives], [], [], 10)[0], "the loading process lives on"


def test_a_signal_before_the_first_step_is_heard_at_once(data, tmp_path, monkeypatch, capsys):
    load = distill.load_model

    def load_and_hear(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*args, **options)

    monkeypatch.setattr(distill, "load_model", load_and_hear)
    assert distill.main(command(data, tmp_path, "r")) == 143
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the signals are given back"


@pytest.mark.slow
def test_a_loading_process_that_is_killed_ends_the_run_with_a_word_on_memory(data, tmp_path):
    process = start(command(data, tmp_path, "r", "--max-steps", 4000, "--workers", 1))
    wait_for_step(process, tmp_path / "r", 3)
    (worker,) = descendants(process.pid)
    os.kill(worker, signal.SIGKILL)
    done = process.finish()
    assert done.returncode == 1 and "lower --workers" in done.stderr, done
    assert "Traceback" not in done.stderr, done


@pytest.mark.slow
def test_a_student_with_stochastic_depth_resumes_with_the_same_random_numbers(
    data, tmp_path, monkeypatch
):
    folder = tmp_path / "student"
    save_student(load_model("timm:test_vit", "random"), folder, metadata={})
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= {"drop_path_rate": 0.5, "pos_drop_rate": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    pair = ["--teacher", "timm:test_vit4", "--student", str(folder)]
    assert distill.main(command(data, tmp_path, "whole", pair=pair)) == 0
    arguments = command(data, tmp_path, "parts", pair=pair)
    stopped_at(5, arguments, monkeypatch)
    assert len(losses(tmp_path / "parts")) == 5
    assert distill.main(arguments) == 0
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("ranks")
    result = torchrun(2, "distill.py", *command(data, runs, "r"))
    assert result.returncode == 0, result.stdout + result.stderr
    return runs / "r"


@pytest.mark.slow
def test_a_rank_leaves_the_job_when_it_is_done(data, tmp_path, one_rank):
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 2)) == 0


@pytest.mark.slow
def test_two_ranks_equal_two_accumulated_batches(data, two_ranks, tmp_path):
    assert distill.main(command(data, tmp_path, "r", "--accumulate", 2)) == 0
    one, two = losses(tmp_path / "r"), losses(two_ranks)
    np.testing.assert_allclose(one[:1], two[:1], rtol=1e-6)
    np.testing.assert_allclose([row[1] for row in one], [row[1] for row in two], rtol=2e-3)


@pytest.mark.slow
def test_synchronised_ranks_equal_one_process_with_the_whole_batch(data, two_ranks, tmp_path):
    for done in run_ranks(main_of("distill.py", *command(data, tmp_path, "two", "--sync"))):
        assert done.returncode == 0, done.stderr
    assert distill.main(command(data, tmp_path, "one", "--batch-size", 16)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(one[:1], two[:1], rtol=1e-6)  # loss and gradient of the same weights
    # then AdamW turns rounding of tiny gradients into steps
    np.testing.assert_allclose(one, two, rtol=2e-2)
    np.testing.assert_allclose([row[1] for row in one], [row[1] for row in two], rtol=2e-3)
    # and it is not what local statistics give
    assert abs(two[0][1] - losses(two_ranks)[0][1]) > 0.1


@pytest.mark.nightly
def test_three_ranks_of_which_one_dies_and_then_all_equal_unbroken_ones(data, tmp_path):
    """Three, since gloo adds two in whatever order to the same sum. torchrun restarts them after
    the death of one, and the command given again goes on after the death of all."""
    whole = torchrun(3, "distill.py", *command(data, tmp_path, "whole", "--max-steps", 20))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    arguments = command(data, tmp_path, "r", "--max-steps", 20, "--checkpoint-steps", 2)
    restart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = start_torchrun(arguments, 3, ("--max-restarts=1",), restart)
    wait_for_step(process, tmp_path / "r", 3)
    os.kill(random.Random(0).choice(ranks_of(process)), signal.SIGKILL)
    wait_for_step(process, tmp_path / "r", 14)
    output = kill(process)
    assert "going on from step" in output and "another rank ended" in output, output
    assert not (tmp_path / "r" / "student").exists(), "killed too late to test anything"
    done = torchrun(3, "distill.py", *arguments)
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stdout + done.stderr
    same(tmp_path / "whole", tmp_path / "r")


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_alone_save_and_end(data, tmp_path):
    forever = ("--max-steps", 10_000, "--eval-every", 10_000, "--checkpoint-minutes", 0)
    process = start_torchrun(command(data, tmp_path, "r", *forever), 2, (), {})
    wait_for_step(process, tmp_path / "r", 3)
    ranks = ranks_of(process)
    process.process.kill()
    for rank in ranks:
        assert_ends(rank)
    assert (tmp_path / "r" / "checkpoint.pt").exists()


def ranks_of(process: Forked) -> list[int]:
    """Processes below torchrun that run distill.py."""
    found = []
    for pid in descendants(process.pid):
        if b"distill.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


@pytest.mark.slow
def test_a_rank_that_an_error_leaves_in_the_job_ends_without_an_abort(data, tmp_path):
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    result = run("distill.py", *command(data, tmp_path, "r", "--lr", 1e30), env=job)
    assert result.returncode == 1 and "terminate called" not in result.stderr, result.stderr
    assert "the loss is" in result.stderr


def test_what_cannot_be_is_refused_before_anything_is_written(data, tmp_path, capsys):
    for more, parts in [
        (("--batch-size", 1), ("--batch-size 1", "batch norm")),
        (("--batch-size", 300), ("300 patches", "lower")),
        (("--crop", 80), ("--crop 80", "64 px")),
        (("--crop", 4), ("--crop 4", "at least 5")),  # the blur reaches that far
        (("--cancer", "absent"), ("absent", "tile.py")),
        (("--precision", "fp16"), ("precision fp16", "bf16")),
        (("--weights", "timm:test_vit=/nowhere/x.safetensors"), ("/nowhere/x.safetensors",)),
        (("--loss", "mse", "--sync"), ("--sync", "logsum")),
        (("--tokens", "all", "--teacher-center", "slide"), ("--tokens", "cls")),
        (("--hold-out", 0.9), ("--hold-out 0.9",)),
        (("--seed", 2**64), ("--seed", "at most 2147483647")),
    ]:
        fails(command(data, tmp_path, "r", *more), *parts, capsys=capsys)
        assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_licence_that_forbids_students_is_told_before_the_first_step(
    data, tmp_path, capsys, monkeypatch
):
    from g2l.registry import REGISTRY

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
    entry = dataclasses.replace(REGISTRY["h0-mini"], args=small, dim=32)
    monkeypatch.setitem(REGISTRY, "h0-mini", entry)
    pair = ["--teacher", "h0-mini", "--student", "timm:test_vit"]
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 2, pair=pair)) == 0
    output = capsys.readouterr().out
    note, first = "forbids models trained on its outputs", "patches a step"
    assert "huggingface.co/bioptimus/H0-mini" in output
    assert output.index(note) < output.index(first)
    assert distill.main(command(data, tmp_path, "s", "--max-steps", 2)) == 0
    assert note not in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_argument_is_refused_by_name(data, tmp_path, capsys):
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 3)) == 0
    before = (tmp_path / "r" / "config.json").read_bytes()
    fails(
        command(data, tmp_path, "r", "--max-steps", 3, "--lr", 0.5),
        "--lr was 0.001 and is now 0.5",
        "--name",
        capsys=capsys,
    )
    fails(
        command(data, tmp_path, "r", "--max-steps", 9, "--alpha", 2),
        "--max-steps",
        "--alpha",
        capsys=capsys,
    )
    assert (tmp_path / "r" / "config.json").read_bytes() == before
    (
        tmp_path / "r" / "student" / "model.safetensors"
    ).unlink()  # lost: exported again from the checkpoint
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 3)) == 0
    assert (tmp_path / "r" / "student" / "model.safetensors").exists() and len(
        losses(tmp_path / "r")
    ) == 3
    (tmp_path / "r").rename(tmp_path / "s")  # a run may get another name
    (tmp_path / "s" / "student" / "model.safetensors").unlink()
    assert distill.main(command(data, tmp_path, "s", "--max-steps", 3)) == 0
    (tmp_path / "s").rename(tmp_path / "r")
    with open(tmp_path / "r" / ".lock", "w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        fails(command(data, tmp_path, "r", "--max-steps", 3), "another process", capsys=capsys)


def test_a_loss_that_is_no_number_stops_and_leaves_no_such_checkpoint(data, tmp_path, capsys):
    fails(
        command(data, tmp_path, "r", "--lr", 1e30, "--checkpoint-steps", 1),
        "step",
        "--grad-clip",
        capsys=capsys,
    )
    for path in (tmp_path / "r").glob("checkpoint*.pt"):
        state = torch.load(path, weights_only=True)["distiller"]
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--lr", "nan"),
        ("--lr", "-1"),
        ("--alpha", "0"),
        ("--workers", "-1"),
        ("--weight-decay", "inf"),
        ("--hold-out", "0.9"),
        ("--max-steps", "0"),
    ],
)
def test_numbers_that_cannot_be_are_named(data, tmp_path, flag, value, capsys):
    fails(command(data, tmp_path, "r", flag, value), flag, "expected", capsys=capsys)


def test_a_constant_student_is_named(data, tmp_path, capsys):
    from safetensors.torch import save_file

    student = load_model("timm:test_vit", "random").net.state_dict()
    save_file(
        {
            k: torch.zeros_like(v) if k == "patch_embed.proj.weight" else v
            for k, v in student.items()
        },
        tmp_path / "w.safetensors",
    )
    fails(
        command(data, tmp_path, "r", "--weights", f"timm:test_vit={tmp_path / 'w.safetensors'}"),
        "same features",
        capsys=capsys,
    )


def test_too_little_memory_says_what_to_lower(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
        )

    monkeypatch.setattr(Step, "__call__", full)
    fails(
        command(data, tmp_path, "r"),
        "CUDA out of memory; lower --batch-size",
        "--accumulate",
        capsys=capsys,
    )


def test_too_many_unreadable_patches_stop_the_run_and_few_do_not(
    data, tmp_path, capsys, monkeypatch
):
    read = PatchIndex.read

    def broken(share):
        def read_or_not(self, i):
            if (i * 2654435761) % 1000 < 1000 * share:
                raise PatchError(f"P{i}_a: x {i}, y {i}: unreadable")
            return read(self, i)

        return read_or_not

    monkeypatch.setattr(PatchIndex, "read", broken(0.5))
    fails(
        command(data, tmp_path, "many"),
        "could not be read",
        "unreadable.txt",
        "--max-unreadable",
        capsys=capsys,
    )
    monkeypatch.setattr(PatchIndex, "read", broken(0.05))
    assert distill.main(command(data, tmp_path, "few")) == 1, "what failed shows in the exit status"
    named = (tmp_path / "few" / "unreadable.txt").read_text().splitlines()
    assert (
        f"{len(named)} patches could not be read" in capsys.readouterr().out
        and 0 < len(named) <= 10
    )
    assert (tmp_path / "few" / "student" / "model.safetensors").exists()
    assert distill.main(command(data, tmp_path, "few")) == 0, "nothing is left to do"


@pytest.mark.slow
def test_a_full_disk_loses_nothing(data, tmp_path, capsys):
    """A limit on file size fails writes as a full disk does."""
    arguments = command(data, tmp_path, "r", "--checkpoint-steps", 4)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
    try:
        fails(arguments, "checkpoint of step 4 not written", "make room", capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(losses(tmp_path / "r")) == 4, "what cannot be kept is not trained"
    assert not list((tmp_path / "r").glob("*checkpoint*"))
    assert distill.main(arguments) == 0
    assert (tmp_path / "r" / "student" / "model.safetensors").exists()


def test_room_for_checkpoints_is_looked_at_before_the_start(data, tmp_path, capsys, monkeypatch):
    little = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    fails(command(data, tmp_path, "r"), "GB are free", "make room", "--runs", capsys=capsys)
    assert not (tmp_path / "r").exists()


DAMAGE = {
    "a flipped bit": lambda file, other: flip(file),
    "cut short": lambda file, other: file.write_bytes(file.read_bytes()[:5000]),
    "emptied": lambda file, other: file.write_bytes(b""),
    "of another program": lambda file, other: torch.save({"epoch": 3, "model": {}}, file),
    "no dictionary": lambda file, other: torch.save([1, 2], file),
    "of another run": lambda file, other: shutil.copy(other / "checkpoint.pt", file),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of 12 steps in one go, and beside it `other`, with another seed."""
    runs = tmp_path_factory.mktemp("whole")
    assert distill.main(command(data, runs, "r")) == 0
    assert distill.main(command(data, runs, "other", "--seed", 1)) == 0
    return runs / "r"


@pytest.fixture(scope="module")
def part(data, tmp_path_factory):
    """The same run stopped at step 9, with checkpoints of steps 9 and 8."""
    runs = tmp_path_factory.mktemp("part")
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(9, command(data, runs, "r", "--checkpoint-steps", 4), patch)
    return runs / "r"


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_set_aside(data, whole, part, tmp_path, capsys, how):
    folder = tmp_path / "r"
    shutil.copytree(part, folder)
    DAMAGE[how](folder / "checkpoint.pt", whole.parent / "other")
    assert distill.main(command(data, tmp_path, "r")) == 0
    output = capsys.readouterr()
    assert "set aside as checkpoint.damaged" in output.err and "from step 8" in output.out
    same(whole, folder)


def test_that_no_whole_checkpoint_is_left_is_said_at_every_start(data, part, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(part, folder)
    for file in folder.glob("checkpoint*"):
        flip(file)
    for _ in range(2):
        arguments = command(data, tmp_path, "r")
        fails(arguments, "no whole checkpoint is left", "--name", capsys=capsys)
    assert len(losses(folder)) == 9, "nothing is begun anew"


@pytest.mark.slow
def test_a_checkpoint_of_a_later_version_is_refused_and_of_an_older_goes_on(
    data, whole, part, tmp_path, capsys
):
    folder = tmp_path / "r"
    shutil.copytree(part, folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"version": 99}, folder / "checkpoint.pt")
    fails(command(data, tmp_path, "r"), "version 99", "--name", capsys=capsys)
    del state["version"]
    torch.save(state, folder / "checkpoint.pt")
    assert distill.main(command(data, tmp_path, "r")) == 0
    assert "going on from step 9" in capsys.readouterr().out
    same(whole, folder)


def test_damaged_notes_of_a_run_are_made_again(data, whole, part, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(part, folder)
    (folder / "config.json").write_text('{"identity": 3}')
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(
        b'[1]\n{"step": "x"}\n\xff\xfe\n' + b"".join(lines) + b'{"st'
    )
    assert distill.main(command(data, tmp_path, "r")) == 0
    assert "config.json: damaged" in capsys.readouterr().err
    same(whole, folder)
    assert json.loads((folder / "config.json").read_text())["finished"]["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("how", ["emptied", "a flipped bit", "missing"])
def test_a_damaged_student_is_exported_again(data, whole, tmp_path, capsys, how):
    shutil.copytree(whole, tmp_path / "r")
    file = tmp_path / "r" / "student" / "model.safetensors"
    if how == "missing":
        file.unlink()
    else:
        DAMAGE[how](file, whole)
    assert distill.main(command(data, tmp_path, "r")) == 0
    assert "exported again" in capsys.readouterr().err
    same(whole, tmp_path / "r")


def test_a_cohort_that_was_tiled_anew_under_a_run_is_refused(data, part, tmp_path, capsys):
    shutil.copytree(part, tmp_path / "r")
    shutil.copytree(data, tmp_path / "data")
    table = tmp_path / "data" / "tiles" / "tiny" / "slides.csv"
    edit_rows(table, lambda row: row.update(settings="another"))
    arguments = command(tmp_path / "data", tmp_path, "r")
    fails(arguments, "begun otherwise", "settings of tile.py was", capsys=capsys)


@pytest.mark.slow
def test_file_systems_without_locks_and_links_will_do(data, tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", absent)
    monkeypatch.setattr(os, "link", absent)
    assert distill.main(command(data, tmp_path, "r", "--checkpoint-steps", 4)) == 0
    assert "has no locks" in capsys.readouterr().err
    files = [tmp_path / "r" / name for name in ("checkpoint.pt", "checkpoint.1.pt")]
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [12, 8]


@pytest.mark.slow
def test_the_stop_rule_ends_a_run(data, tmp_path, capsys):
    arguments = command(
        data,
        tmp_path,
        "r",
        "--max-steps",
        60,
        "--lr",
        0,
        "--lr-end",
        0,
        "--stop",
        "cumulative",
        "--stop-window",
        5,
        "--stop-patience",
        4,
        "--stop-min-steps",
        8,
    )
    assert distill.main(arguments) == 0
    rows = losses(tmp_path / "r")
    above = [
        i for i in range(5, len(rows)) if rows[i][1] > np.mean([r[1] for r in rows[i - 5 : i]])
    ]
    assert 8 <= len(rows) < 60 and len(above) >= 5
    assert f"stop rule (cumulative) at step {len(rows)}" in capsys.readouterr().out
    assert load_model(str(tmp_path / "r" / "student")).metadata["steps"] == len(rows)


@pytest.mark.slow
def test_every_other_way_of_training_runs(data, tmp_path):
    for number, more in enumerate(
        (
            ("--tokens", "all"),
            ("--normalize", "student-affine", "--reduction", "row"),
            ("--loss", "correlation", "--normalize", "student"),
            ("--grad-clip", 0.5, "--decay-all"),
            ("--sampling", "patch", "--precision", "bf16"),
        )
    ):
        assert distill.main(command(data, tmp_path, f"r{number}", "--max-steps", 2, *more)) == 0
        values = losses(tmp_path / f"r{number}")
        assert len(values) == 2 and all(math.isfinite(v) for row in values for v in row)
    tokens = losses(tmp_path / "r0")[0][1]
    assert tokens == pytest.approx(
        math.log(12 * 8 * (1 + 9) * 96), abs=1
    )  # one class and nine patch tokens an image


def test_profile_tells_where_the_time_goes(capsys):
    assert (
        bench_step.main(
            [
                "--plain",
                *VIT,
                "--crop",
                "48",
                "--batch-size",
                "4",
                "--steps",
                "2",
                "--workers",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    for part in (
        "data",
        "augmentation",
        "teacher",
        "student forward",
        "loss",
        "backward",
        "optimizer",
        "MFU",
        "GFLOP an image",
        "images/s",
        "times as fast as the plain one",
    ):
        assert part in output
    assert load_model("timm:test_vit", "random").net.blocks[0].attn.fused_attn, (
        "the plain way stays its own"
    )


def test_a_student_that_became_less_like_its_teacher_is_warned_of(
    data, tmp_path, capsys, monkeypatch
):
    found = iter([{"cka": 0.5, "spread": 1.0}, {"cka": 0.4, "spread": 1.0}])
    monkeypatch.setattr(Heldout, "measure", lambda self, student: next(found))
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 2)) == 0
    output = capsys.readouterr().out
    assert "warning: the student is less like its teacher" in output and "cohort" in output

"""distill.py as a user runs it: the recipe's parts, whole runs, real kills and resumption, ranks, guards."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench_step
import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun

import distill
import tile
from g2l.errors import PatchError, UserError
from g2l.models import load_model, save_student
from g2l.patches import PatchIndex
from g2l.recipe import LOSSES, Distiller, StopRule, cosine, param_groups, token_rows
from g2l.runs import Run
from g2l.stream import Batches, Heldout, hold_out

VIT = [
    "--teacher",
    "timm:test_vit4",
    "--student",
    "timm:test_vit",
]  # 96 wide into 64 wide, no batch norm inside
CNN = [
    "--teacher",
    "timm:test_vit4",
    "--student",
    "timm:test_resnet",
]  # with batch norm, so with buffers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A cohort that tile.py tiled: 8 patients, 8 slides of 384 px, 36 patches of 64 px each."""
    import tifffile

    folder = tmp_path_factory.mktemp("data")
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


@pytest.fixture(autouse=True)
def signals():
    """Training installs handlers; give pytest its own back."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(data: Path, runs: Path, name: str, *more, pair=VIT) -> list[str]:
    return list(
        map(
            str,
            [
                "--cancer",
                "tiny",
                "--data",
                data,
                "--runs",
                runs,
                "--name",
                name,
                *pair,
                "--weights",
                "random",
                "--crop",
                48,
                "--batch-size",
                8,
                "--max-steps",
                12,
                "--lr",
                "1e-3",
                "--eval-patches",
                16,
                "--eval-every",
                12,
                "--workers",
                0,
                "--device",
                "cpu",
                *more,
            ],
        )
    )


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
    assert distill.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(part in error for part in parts), error


# ---- parts ------------------------------------------------------------------------------------------------------


def test_schedules_reach_their_ends():
    assert cosine(1e-4, 1e-6, 0, 100) == pytest.approx(1e-4)
    assert cosine(1e-4, 1e-6, 99, 100) == pytest.approx(1e-6)
    assert cosine(0.05, 0.5, 50, 101) == pytest.approx(0.275)
    assert cosine(1.0, 0.0, 0, 1) == 1.0


@pytest.mark.parametrize("kind", ["consecutive", "cumulative", "off"])
def test_stop_rule_is_the_papers_sentence(kind):
    rng = np.random.default_rng(1)
    sequence = (
        10
        + np.exp(-np.arange(900) / 60)
        + rng.normal(0, 0.02, 900)
        + 0.002 * np.maximum(0, np.arange(900) - 500)
    )
    rule, fired = StopRule(kind, window=100, patience=10, minimum=150), None
    for i, loss in enumerate(sequence.tolist()):
        if rule.update(loss):
            fired = i
            break
        if i == 444:  # a resumed rule goes on as it was
            state = json.loads(json.dumps(rule.state_dict()))
            rule = StopRule(kind, window=100, patience=10, minimum=150)
            rule.load_state_dict(state)
    above = [i >= 100 and sequence[i] > sequence[i - 100 : i].mean() for i in range(900)]
    runs, total, expected = 0, 0, None
    for i, high in enumerate(above):
        runs, total = (runs + 1 if high else 0), total + high
        if (runs if kind == "consecutive" else total) > 10 and i + 1 >= 150 and kind != "off":
            expected = i
            break
    assert fired == expected and (kind == "off") == (fired is None)
    if kind == "consecutive":
        assert fired > 500


def test_weight_decay_spares_vectors_and_tokens():
    student = load_model("timm:test_vit", "random")
    args = distill.build_parser().parse_args([])
    distiller = Distiller(student, 64, 96, args)
    names = {id(p): n for n, p in distiller.named_parameters()}
    decay, spared = (
        {names[id(p)] for p in group["params"]} for group in param_groups(distiller, False)
    )
    assert decay | spared == set(names.values()) and not decay & spared
    assert {
        "projector",
        "student.net.patch_embed.proj.weight",
        "student.net.blocks.0.attn.qkv.weight",
    } <= decay
    assert {
        "student.net.cls_token",
        "student.net.pos_embed",
        "student.net.norm.weight",
        "student.net.blocks.0.mlp.fc1.bias",
    } <= spared
    assert not param_groups(distiller, True)[1]["params"]


def test_losses_are_what_their_names_say():
    random_ = torch.Generator().manual_seed(0)
    s, t = torch.randn(32, 64, generator=random_), torch.randn(32, 96, generator=random_)
    values = {}
    for kind in LOSSES:
        args = distill.build_parser().parse_args(["--loss", kind])
        distiller = Distiller(load_model("timm:test_vit", "random"), 64, 96, args)
        values[kind] = distiller.loss(s, t)
        values[kind].backward()
        assert distiller.projector.grad.abs().max() > 0
    y = (s.double() @ distiller.projector.detach().double()).numpy()
    a, b = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-4) for v in (y, t.double().numpy()))
    d = a - b
    soft = [np.exp(v - v.max(1, keepdims=True)) for v in (a, b)]
    p, q = (v / v.sum(1, keepdims=True) for v in soft)
    wanted = {
        "logsum": math.log((d**4).sum()),
        "mse": (d**2).mean(),
        "cosine": 1 - ((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))).mean(),
        "smooth-l1": np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5).mean(),
        "kl": (q * np.log(q / p)).sum(1).mean(),
        "correlation": math.log((((a * b).mean(0) - 1) ** 4).sum() + 1e-5),
    }
    for kind, value in wanted.items():
        assert values[kind].item() == pytest.approx(value, rel=1e-4), kind
    assert values["logsum"].item() == pytest.approx(
        math.log(12 * 32 * 96), abs=0.25
    )  # independent features: E d^4 = 12


def index_of(data: Path) -> PatchIndex:
    return PatchIndex(data / "tiles" / "tiny")


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3"]
)  # class token; register and mean; and pooling
def test_all_tokens_are_the_embedding_and_the_patches(name):
    model, x = load_model(f"timm:{name}", "random"), torch.rand(2, 3, 160, 160)
    found, tokens = (
        token_rows(model, x, "all").unflatten(0, (2, -1)),
        model.tokens(model.normalize(x)),
    )
    assert torch.equal(found[:, 0], model(model.normalize(x)))
    assert torch.equal(found[:, 1:], tokens[:, model.num_prefix_tokens :]) and found.shape[1] == 101
    found.sum().backward()  # several ranks wait for the gradient of every parameter
    assert all(p.grad is not None for p in model.parameters())


def test_draws_do_not_depend_on_ranks_or_workers_and_never_touch_held_patients(data):
    index = index_of(data)
    held = hold_out(index, 0.05, 0)
    assert held.sum() == 2 and hold_out(index, 0, 0).sum() == 0
    whole = Batches(index, held, seed=3, batch_size=12, crop=48, by="slide")
    images, params, unreadable = whole[5]
    assert images.shape == (12, 3, 64, 64) and images.dtype == torch.uint8 and not unreadable
    for rank in range(3):  # three ranks of 4 share the batch of 12, in order
        part = Batches(index, held, seed=3, batch_size=4, crop=48, by="slide", rank=rank, world=3)[
            5
        ]
        assert torch.equal(part[0], images[4 * rank : 4 * rank + 4])
        assert all(
            torch.equal(a, b[4 * rank : 4 * rank + 4]) for a, b in zip(part[1], params, strict=True)
        )
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(
            whole, batch_size=None, sampler=range(4, 8), num_workers=workers
        )
        got = list(loader)
        assert torch.equal(got[1][0], images)
        assert all(torch.equal(a[0], whole[m][0]) for a, m in zip(got, range(4, 8), strict=True))
    seen = {index.locate(i)[0] for n in range(400) for i in [whole_draw(whole, n)]}
    assert seen == set(np.flatnonzero(~held))


def whole_draw(batches: Batches, n: int) -> int:
    """The patch that sample n ends up with."""
    taken = []
    original, batches.index.read = (
        batches.index.read,
        lambda i: taken.append(i) or np.zeros((64, 64, 3), np.uint8),
    )
    try:
        batches._read(n, [])
    finally:
        batches.index.read = original
    return taken[-1]


def test_unreadable_patches_are_drawn_again_and_named(data):
    index = index_of(data)
    read = index.read

    def sometimes(i):
        if i % 3 == 0:
            raise PatchError(f"slide, patch {i}")
        return read(i)

    index.read = sometimes
    batches = Batches(index, np.zeros(8, bool), seed=0, batch_size=30, crop=48, by="patch")
    images, _, unreadable = batches[0]
    assert 3 < len(unreadable) < 40 and "slide, patch" in unreadable[0]
    assert (
        images.flatten(1).float().std(1).min() > 0
    )  # every place was filled by a patch that could be read
    assert torch.equal(images, batches[0][0])


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run of 60 steps in one go, its student with batch norm."""
    runs = tmp_path_factory.mktemp("unbroken")
    assert (
        distill.main(command(data, runs, "r", "--max-steps", 60, "--eval-every", 30, pair=CNN)) == 0
    )
    return runs / "r"


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
    assert [row["step"] for row in steps] == list(range(1, 61)) and [
        r["step"] for r in rows if "cka" in r
    ] == [
        0,
        30,
        60,
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
    assert ours.metadata["teacher"] == "timm:test_vit4" and ours.metadata["steps"] == 60
    assert ours.metadata["patients"] == [f"P{i}" for i in range(8)]
    assert ours.metadata["slides"] == [f"P{i}_a" for i in range(8)]
    theirs = timm.create_model(
        f"local-dir:{unbroken / 'student'}", pretrained=True, num_classes=0
    ).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(ours(x), theirs(x))
    before = (unbroken / "checkpoint.pt").stat().st_mtime
    assert (
        distill.main(
            command(data, unbroken.parent, "r", "--max-steps", 60, "--eval-every", 30, pair=CNN)
        )
        == 0
    )
    assert (
        "finished at step 60" in capsys.readouterr().out
        and (unbroken / "checkpoint.pt").stat().st_mtime == before
    )


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, deepest last."""
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            out += [child, *descendants(child)]
    return out


def start(
    arguments: list[str], ranks: int = 1, options: tuple = (), env: dict | None = None
) -> subprocess.Popen:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "distill.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (
        (folder / "log.jsonl").exists() and any(row[0] >= step for row in safe_losses(folder))
    ):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.003)


def safe_losses(folder: Path) -> list[tuple]:
    try:
        return losses(folder)
    except ValueError:  # a line half written
        return []


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and everything below it, as a machine that fails does."""
    below = descendants(process.pid)
    for pid in [process.pid, *below]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def test_killed_at_a_random_moment_and_resumed_equals_unbroken(data, unbroken, tmp_path):
    arguments = command(
        data,
        tmp_path,
        "r",
        "--max-steps",
        60,
        "--eval-every",
        30,
        "--checkpoint-steps",
        4,
        "--workers",
        1,
        pair=CNN,
    )
    process = start(arguments)
    wait_for_step(process, tmp_path / "r", random.randint(5, 40))
    kill(process)
    assert not (tmp_path / "r" / "student").exists(), "killed too late to test anything"
    (tmp_path / "r" / ".checkpoint.1.abc.tmp.pt").write_bytes(b"left behind")
    assert distill.main(arguments) == 0
    same(unbroken, tmp_path / "r")
    assert [row["step"] for row in log(tmp_path / "r") if "cka" in row] == [0, 30, 60]
    assert not list((tmp_path / "r").glob(".*.tmp*"))


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(data, unbroken, tmp_path):
    arguments = command(
        data,
        tmp_path,
        "r",
        "--max-steps",
        60,
        "--eval-every",
        30,
        "--checkpoint-minutes",
        0,
        "--workers",
        1,
        pair=CNN,
    )
    process = start(arguments)
    wait_for_step(process, tmp_path / "r", 7)
    for pid in [process.pid, *descendants(process.pid)]:  # a terminal sends it to all of them
        os.kill(pid, signal.SIGINT)
    output = process.communicate(timeout=180)[0]
    assert (
        process.returncode == 130
        and "stopped by SIGINT at step" in output
        and "Traceback" not in output
    ), output
    assert (
        torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"]
        == losses(tmp_path / "r")[-1][0]
        < 60
    )
    assert distill.main(arguments) == 0
    same(unbroken, tmp_path / "r")


def test_a_loading_process_that_is_killed_ends_the_run_with_a_word_on_memory(data, tmp_path):
    process = start(command(data, tmp_path, "r", "--max-steps", 4000, "--workers", 1))
    wait_for_step(process, tmp_path / "r", 3)
    (worker,) = (
        pid
        for pid in descendants(process.pid)
        if b"distill.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 1 and "lower --workers" in output and "Traceback" not in output, (
        output
    )


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(data, unbroken, tmp_path):
    arguments = command(
        data,
        tmp_path,
        "r",
        "--max-steps",
        60,
        "--eval-every",
        30,
        "--checkpoint-minutes",
        0,
        pair=CNN,
    )
    process = start(arguments)
    wait_for_step(process, tmp_path / "r", 7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 143 and "stopped by SIGTERM at step" in output, output
    assert (
        torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["step"]
        == losses(tmp_path / "r")[-1][0]
        < 60
    )
    damaged = tmp_path / "r" / "checkpoint.pt"
    shutil.copy(damaged, tmp_path / "r" / "checkpoint.1.pt")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one bit-flipped byte, as a bad disk leaves it
    damaged.write_bytes(content)
    process = start(arguments)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0 and "damaged" in output and "falling back" in output, output
    same(unbroken, tmp_path / "r")


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
    record = Run.log

    def stop_at_five(self, lines):
        record(self, lines)
        if lines[-1]["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", stop_at_five)
    assert distill.main(command(data, tmp_path, "parts", pair=pair)) == 143
    assert len(losses(tmp_path / "parts")) < 8
    monkeypatch.setattr(Run, "log", record)
    assert distill.main(command(data, tmp_path, "parts", pair=pair)) == 0
    same(tmp_path / "whole", tmp_path / "parts")


# ---- ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_ranks(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("ranks")
    result = torchrun(3, "distill.py", *command(data, runs, "r", "--max-steps", 40))
    assert result.returncode == 0, result.stdout + result.stderr
    return runs / "r"


def test_a_rank_leaves_the_job_when_it_is_done(data, tmp_path, one_rank):
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 2)) == 0


def test_three_ranks_equal_three_accumulated_batches(data, three_ranks, tmp_path):
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 40, "--accumulate", 3)) == 0
    one, two = losses(tmp_path / "r"), losses(three_ranks)
    np.testing.assert_allclose(one[:1], two[:1], rtol=1e-6)
    np.testing.assert_allclose(
        [row[1] for row in one[:12]], [row[1] for row in two[:12]], rtol=2e-3
    )


def test_synchronised_ranks_equal_one_process_with_the_whole_batch(data, three_ranks, tmp_path):
    result = torchrun(2, "distill.py", *command(data, tmp_path, "two", "--sync"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert distill.main(command(data, tmp_path, "one", "--batch-size", 16)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(one[:1], two[:1], rtol=1e-6)  # loss and gradient of the same weights
    np.testing.assert_allclose(
        one, two, rtol=2e-2
    )  # then AdamW turns rounding of tiny gradients into steps
    np.testing.assert_allclose([row[1] for row in one], [row[1] for row in two], rtol=2e-3)
    assert (
        abs(two[0][1] - losses(three_ranks)[0][1]) > 0.1
    )  # and it is not what local statistics give


def test_three_ranks_killed_and_resumed_equal_unbroken(data, three_ranks, tmp_path):
    arguments = command(data, tmp_path, "r", "--max-steps", 40, "--checkpoint-steps", 3)
    process = start(arguments, ranks=3)
    wait_for_step(process, tmp_path / "r", random.randint(4, 25))
    kill(process)
    assert not (tmp_path / "r" / "student").exists(), "killed too late to test anything"
    result = torchrun(3, "distill.py", *arguments)
    assert result.returncode == 0 and "going on from step" in result.stdout, (
        result.stdout + result.stderr
    )
    same(three_ranks, tmp_path / "r")


def test_a_rank_that_dies_is_restarted_by_torchrun_and_goes_on(data, three_ranks, tmp_path):
    arguments = command(data, tmp_path, "r", "--max-steps", 40, "--checkpoint-steps", 3)
    process = start(
        arguments,
        ranks=3,
        options=("--max-restarts=1",),
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    wait_for_step(process, tmp_path / "r", 5)
    ranks = [
        pid
        for pid in descendants(process.pid)
        if b"distill.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(random.choice(ranks[:3]), signal.SIGKILL)
    output = process.communicate(timeout=180)[0]
    assert (
        process.returncode == 0
        and "going on from step" in output
        and "another rank ended" in output
    ), output
    same(three_ranks, tmp_path / "r")


# ---- guards -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_written(data, tmp_path, capsys):
    for more, parts in [
        (("--batch-size", 1), ("--batch-size 1", "batch norm")),
        (("--batch-size", 300), ("300 patches", "lower")),
        (("--crop", 80), ("--crop 80", "64 px")),
        (("--crop", 4), ("--crop 4", "at least 5")),  # the blur reaches that far
        (("--cancer", "absent"), ("absent", "tile.py")),
        (("--precision", "fp16"), ("--precision fp16", "bf16")),
        (("--weights", "timm:test_vit=/nowhere/x.safetensors"), ("/nowhere/x.safetensors",)),
        (("--loss", "mse", "--sync"), ("--sync", "logsum")),
        (("--student", "timm:test_resnet", "--tokens", "all"), ("--tokens", "cls")),
        (("--hold-out", 0.9), ("--hold-out 0.9",)),
    ]:
        fails(command(data, tmp_path, "r", *more), *parts, capsys=capsys)
        assert not (tmp_path / "r").exists()


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

    monkeypatch.setattr(distill.Step, "__call__", full)
    fails(
        command(data, tmp_path, "r"),
        "CUDA out of memory: lower --batch-size",
        "--accumulate",
        capsys=capsys,
    )


def test_held_out_patients_with_too_few_patches_say_what_to_do():
    index = SimpleNamespace(
        counts=[2, 1, 9], patch_size=64, read=lambda i: np.zeros((64, 64, 3), np.uint8)
    )
    with pytest.raises(UserError, match=r"only 3 held-out patches.*--hold-out 0"):
        Heldout(index, np.array([True, True, False]), 16, 48, 0, None, 8)


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


def test_a_full_disk_loses_nothing(data, tmp_path):
    """A limit on file size fails writes as a full disk does."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "import distill; sys.exit(distill.main(sys.argv[1:]))"
    )
    arguments = command(data, tmp_path, "r", "--checkpoint-steps", 4)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1 and "checkpoint of step 4 not written" in result.stdout, (
        result.stdout + result.stderr
    )
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    assert not list((tmp_path / "r").glob("checkpoint*")) and not list(
        (tmp_path / "r").glob(".*.tmp*")
    )
    assert len(losses(tmp_path / "r")) == 12
    assert (
        distill.main(arguments) == 0 and (tmp_path / "r" / "student" / "model.safetensors").exists()
    )


def test_file_systems_without_locks_and_links_will_do(data, tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", absent)
    monkeypatch.setattr(os, "link", absent)
    assert distill.main(command(data, tmp_path, "r", "--checkpoint-steps", 4)) == 0
    assert "has no locks" in capsys.readouterr().err
    files = [tmp_path / "r" / name for name in ("checkpoint.pt", "checkpoint.1.pt")]
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [12, 8]


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
        assert distill.main(command(data, tmp_path, f"r{number}", "--max-steps", 4, *more)) == 0
        values = losses(tmp_path / f"r{number}")
        assert len(values) == 4 and all(math.isfinite(v) for row in values for v in row)
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

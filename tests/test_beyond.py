"""What a run may do beyond the paper: kept projectors, terms beside the loss, several teachers, and
the model card that a student carries."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import main_of, run_ranks
from training import (
    CNN,
    VIT,
    command,
    fails,
    kill,
    log,
    losses,
    same,
    start,
    wait_for_step,
)

import distill
from g2l import models
from g2l.cohort import hashed
from g2l.models import load_model
from g2l.patches import PatchIndex
from g2l.recipe import Distiller, Said, look, parse_terms, relation
from g2l.registry import REGISTRY
from g2l.stream import Heldout, hold_out
from g2l.weights import tensors_digest

TWO = ["--teacher", "timm:test_vit4", "timm:test_vit2", "--student", "timm:test_vit"]
MIXED = ["--loss", "logsum:1", "patch-cosine:0.25", "relation:0.25"]


pytestmark = pytest.mark.usefixtures("no_curve")


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """A finished run that kept its projector."""
    runs = tmp_path_factory.mktemp("kept")
    assert distill.main(command(data, runs, "r", "--keep-projector")) == 0
    return runs / "r"


@pytest.mark.parametrize("pair", [VIT, CNN], ids=["vit", "cnn"])
def test_a_kept_projector_gives_the_projected_and_standardised_features(data, tmp_path, pair):
    import timm

    short = ["--keep-projector", "--max-steps", 4]
    assert distill.main(command(data, tmp_path, "r", *short, pair=pair)) == 0
    plain = load_model(str(tmp_path / "r" / "student"))
    model = load_model(str(tmp_path / "r" / "student-projected"))
    assert (plain.name, model.name, model.dim) == ("r", "r-projected", 96)
    assert plain.dim == plain.net.num_features and model.metadata["run"] == "r-projected"
    path = f"local-dir:{tmp_path / 'r' / 'student-projected'}"
    net = timm.create_model(path, pretrained=True).eval()
    state = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["distiller"]
    # By numpy, from the patches that were trained on.
    index = PatchIndex(data / "tiles" / "tiny")
    held = hold_out(index, 0.05, 0)
    seen = Heldout(index, ~held, 64, 48, 0, [], 8)
    rows = seen.features(plain).double().numpy() @ state["projector"].double().numpy()
    x = torch.rand(5, 3, 48, 48)
    with torch.no_grad():
        own = plain(plain.normalize(x)).double().numpy() @ state["projector"].double().numpy()
        wanted = (own - rows.mean(0)) / rows.std(0)
        got = model(model.normalize(x))
        assert torch.equal(got, net(model.normalize(x)))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_a_projector_is_kept_afterwards_too_and_a_lost_one_made_again(data, kept, tmp_path, capsys):
    assert distill.main(command(data, tmp_path, "r")) == 0
    assert not (tmp_path / "r" / "student-projected").exists()
    for _ in range(2):
        assert distill.main(command(data, tmp_path, "r", "--keep-projector")) == 0
    assert "finished at step 12" in capsys.readouterr().out
    name = "student-projected/model.safetensors"
    assert tensors_digest(tmp_path / "r" / name) == tensors_digest(kept / name)
    (tmp_path / "r" / name).unlink()
    assert distill.main(command(data, tmp_path, "r", "--keep-projector")) == 0
    assert "exported again" in capsys.readouterr().err
    assert tensors_digest(tmp_path / "r" / name) == tensors_digest(kept / name)


def test_terms_are_read_from_their_names():
    assert parse_terms(["logsum"]) == {"logsum": 1}
    assert parse_terms(["logsum:2 relation:0.5"]) == {"logsum": 2, "relation": 0.5}
    for words in (["log"], ["logsum:x"], ["logsum:0"], ["mse", "mse"], ["relation"]):
        with pytest.raises(Exception, match=r"loss .*(expected|beside)"):
            parse_terms(words)


@pytest.mark.parametrize("student", ["timm:test_vit", "timm:test_resnet"])
def test_terms_are_what_their_formulas_say(student):
    args = distill.build_parser().parse_args([*MIXED, "--teacher-weight", "1", "3"])
    lot = torch.Generator().manual_seed(0)
    pair = Said(torch.randn(8, 64, generator=lot), torch.randn(8, 9, 64, generator=lot))
    first = Said(torch.randn(8, 96, generator=lot), torch.randn(8, 9, 96, generator=lot))
    second = Said(torch.randn(8, 32, generator=lot), torch.randn(8, 9, 32, generator=lot))
    distiller = Distiller(load_model(student, "random"), 64, [96, 32], args, [64, 96, 32])
    total = distiller.loss(pair, [first, second])
    wanted = 0.0
    start = 0
    for weight, said in ((1, first), (3, second)):
        columns = slice(start, start + said.whole.shape[1])
        start = columns.stop
        y = pair.whole.double() @ distiller.projector[:, columns].detach().double()
        a, b = (
            (v - v.mean(0)) / (v.var(0, correction=0) + 1e-4).sqrt()
            for v in (y, said.whole.double())
        )
        logsum = ((a - b) ** 4).sum().log().item()
        y = pair.patches.double() @ distiller.patch_projector[:, columns].detach().double()
        cosine = 1 - F.cosine_similarity(y, said.patches.double(), dim=-1).mean().item()
        apart = []
        for rows in (pair.whole, said.whole):
            x = rows.double().numpy()
            d = np.array([np.linalg.norm(x[i] - x[j]) for i in range(8) for j in range(i)])
            apart.append(d / d.mean())
        d = np.abs(apart[0] - apart[1])
        huber = np.where(d < 1, d**2 / 2, d - 0.5).mean()
        assert relation(pair.whole, said.whole).item() == pytest.approx(huber, rel=1e-4)
        wanted += weight * (logsum + 0.25 * cosine + 0.25 * huber)
    assert total.item() == pytest.approx(wanted, rel=1e-4)


def test_patches_of_unlike_grids_lie_where_they_are_in_the_image():
    teacher = load_model("timm:test_vit4", "random", input_size=96)  # 16 px a patch: 6 x 6
    student = load_model("timm:test_resnet", "random", input_size=96)
    args = distill.build_parser().parse_args(["--tokens", "patch"])
    with torch.no_grad():
        x = torch.rand(2, 3, 96, 96)
        own = look(student, x, args)
        cells = student.net.forward_features(student.normalize(x))
        assert torch.equal(own.patches, cells.flatten(2).transpose(1, 2))
        said = look(teacher, x, args, (3, 3))
        fine = teacher.tokens(teacher.normalize(x))[:, teacher.num_prefix_tokens :]
        fine = fine.transpose(1, 2).unflatten(2, (6, 6))
        wanted = F.interpolate(fine, (3, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(said.patches, wanted.flatten(2).transpose(1, 2))
    assert (
        said.rows("patch").shape == (18, 96)
        and own.rows("patch").shape[0] == 2 * cells[0, 0].numel()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, pair",
    [
        pytest.param(["--tokens", "patch"], CNN, marks=pytest.mark.nightly),
        pytest.param(["--tokens", "all"], CNN, marks=pytest.mark.nightly),
        ([*MIXED, "--warmup", "4"], CNN),
        ([*MIXED, "--tokens", "all", "--teacher-weight", "0.5", "0.5"], TWO),
    ],
)
def test_runs_with_more_terms_and_teachers_go_on_bit_for_bit(data, tmp_path, more, pair):
    assert distill.main(command(data, tmp_path, "whole", *more, pair=pair)) == 0
    often = ("--checkpoint-steps", 2, "--workers", 0)
    arguments = command(data, tmp_path, "halves", *more, *often, pair=pair)
    process = start(arguments)
    wait_for_step(process, tmp_path / "halves", 4)
    kill(process)
    assert not (tmp_path / "halves" / "student").exists(), "killed too late to test anything"
    assert distill.main(arguments) == 0
    same(tmp_path / "halves", tmp_path / "whole")
    if "--warmup" in more:
        rates = [row["lr"] for row in log(tmp_path / "whole") if "lr" in row]
        assert rates[:3] == sorted(rates[:3]) and rates[3] == max(rates)
        assert rates[0] == pytest.approx(1e-3 / 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, pair",
    [
        pytest.param((), TWO, marks=pytest.mark.nightly),
        pytest.param(("--tokens", "patch"), CNN, marks=pytest.mark.nightly),
        ((*MIXED, "--tokens", "patch"), VIT),
    ],
)
def test_two_ranks_equal_two_accumulated_batches(data, tmp_path, more, pair):
    two = command(data, tmp_path, "two", *more, pair=pair)
    for done in run_ranks(main_of("distill.py", *two)):
        assert done.returncode == 0, done.stderr
    assert distill.main(command(data, tmp_path, "one", "--accumulate", 2, *more, pair=pair)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(one[:1], two[:1], rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_of_several_is_paid_once_and_alone_counts_as_it_did(data, tmp_path, monkeypatch):
    kept = ["--teacher-cache", tmp_path / "kept", "--max-steps", 4]
    assert distill.main(command(data, tmp_path, "alone", *kept)) == 0
    assert distill.main(command(data, tmp_path, "first", *kept, pair=TWO)) == 0
    asked = []

    def counting(model, images, *how):
        asked.append((model.training, model.name))
        return look(model, images, *how)

    monkeypatch.setattr("g2l.recipe.look", counting)
    assert distill.main(command(data, tmp_path, "again", *kept, pair=TWO)) == 0
    steps = asked[3:]  # after the widths were asked for
    assert not [name for training, name in steps if not training]
    same(tmp_path / "first", tmp_path / "again")
    assert len(list((tmp_path / "kept").glob("*.rows"))) == 2, "the first teacher's rows are shared"
    rows = [row for row in log(tmp_path / "first") if "cka" in row]
    for row in rows:
        assert row["cka"] == pytest.approx((row["cka_1"] + row["cka_2"]) / 2)
    model = load_model(str(tmp_path / "first" / "student"))
    assert model.metadata["teacher"] == "timm:test_vit4 + timm:test_vit2"
    # One teacher that has all the weight is that teacher alone.
    one = load_model("timm:test_vit", "random")
    args = distill.build_parser().parse_args(["--teacher-weight", "1"])
    alone = Distiller(one, 64, [96], args)
    s, t = torch.randn(8, 64), torch.randn(8, 96)
    both = Distiller(one, 64, [96, 32], args)
    with torch.no_grad():
        both.projector[:, :96] = alone.projector
    other = both._term("logsum", Said(s), Said(t), 0)
    assert other.item() == pytest.approx(alone.loss(Said(s), [Said(t)]).item(), rel=1e-6)


def test_licences_are_told_for_each_teacher(data, tmp_path, capsys, monkeypatch):
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
    entry = dataclasses.replace(REGISTRY["h0-mini"], args=small, dim=32)
    monkeypatch.setitem(REGISTRY, "h0-mini", entry)
    pair = ["--teacher", "timm:test_vit4", "h0-mini", "--student", "timm:test_vit"]
    assert distill.main(command(data, tmp_path, "r", "--max-steps", 2, pair=pair)) == 0
    assert "the licence of h0-mini" in capsys.readouterr().out
    card = (tmp_path / "r" / "student" / "README.md").read_text()
    assert "forbids models trained on its outputs" in card and 'license: "other"' in card
    assert "timm:test_vit4 is not in the registry" in card and "bioptimus/H0-mini" in card
    first = str(tmp_path / "r" / "student")  # what is made of it comes from the same teachers
    for name, pair in (
        ("taught", ["--teacher", first, "--student", "timm:test_vit"]),
        ("begun", ["--teacher", "timm:test_vit4", "--student", first]),
    ):
        assert distill.main(command(data, tmp_path, name, "--max-steps", 2, pair=pair)) == 0
        assert "note: the licence of h0-mini" in capsys.readouterr().out
        (made,) = load_model(str(tmp_path / name / "student")).metadata["earlier"]
        assert hashed("P3") in made["patients"]
        card = (tmp_path / name / "student" / "README.md").read_text()
        assert "forbids models trained on its outputs" in card and 'license: "other"' in card


def test_a_projector_that_cannot_be_kept_is_refused_before_training(
    data, kept, tmp_path, capsys, monkeypatch
):
    teacher = ["--teacher", "timm:test_vit4", "--student"]
    pair = [*teacher, str(kept / "student-projected")]
    parts = "a projector of its own", "student beside it"
    fails(command(data, tmp_path, "r", pair=pair), *parts, capsys=capsys)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
    more = {"args": small, "dim": 64, "embedding": "cls+mean"}
    monkeypatch.setitem(REGISTRY, "h0-mini", dataclasses.replace(REGISTRY["h0-mini"], **more))
    flags = "--keep-projector", "--tokens", "all"
    arguments = command(data, tmp_path, "m", *flags, pair=[*teacher, "h0-mini"])
    fails(arguments, "does not take its embedding", capsys=capsys)


def test_what_cannot_be_is_refused(data, tmp_path, capsys):
    for more, parts in [
        ((*MIXED, "--teacher-cache", tmp_path / "c"), ("--teacher-cache", "patch-cosine")),
        (("--tokens", "patch", "--keep-projector"), ("--keep-projector",)),
        (("--teacher-weight", 1, 2), ("--teacher-weight", "each teacher")),
        (("--loss", "relation"), ("beside",)),
        ((*MIXED, "--sync"), ("--sync",)),
        (("--warmup", 13), ("--warmup 13", "--max-steps 12")),
    ]:
        fails(command(data, tmp_path, "r", *more), *parts, capsys=capsys)
    assert not (tmp_path / "r").exists()


def test_the_card_tells_what_the_run_was(kept, capsys):
    import yaml

    folder = kept / "student"
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(header)
    assert (
        told["library_name"] == "timm"
        and told["license"] == "other"
        and "pathology" in told["tags"]
    )
    config = json.loads((kept / "config.json").read_text())
    assert hashed("P3") in body and "P3\n" not in body
    for part in (config["revision"], config["device"], config["command"], "By chance"):
        assert part in body
    curve = [row for row in log(kept) if "cka" in row]
    assert all(f"| {row['step']} | {row['cka']:.4f} |" in body for row in curve)
    held = [name.split("_")[0] for name in config["cohort"]["held out"]]
    assert held and all(f"| {hashed(patient)} |" in body for patient in held)
    for name in ("student", "student-projected"):
        assert models.main(["--check", str(kept / name)]) == 0
    assert "fits r-projected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what",
    [
        "card",
        "weights",
        "config",
        "preprocessing",
        "other weights",
        "no card",
        "no config",
        "half a config",
        "teacher",
        "no text",
    ],
)
def test_a_student_whose_parts_do_not_agree_is_named(kept, tmp_path, what, capsys):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(kept / "student", folder)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nA word of the user's.\n")
    assert models.main(["--check", str(folder)]) == 0
    if what == "card":
        readme.write_text(readme.read_text().replace("in 12 steps", "in 12000 steps"))
    elif what == "no card":
        readme.unlink()
    elif what == "config":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"steps": 12', '"steps": 13'))
    elif what == "teacher":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"timm:test_vit4"', "null"))
    elif what == "preprocessing":
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "half a config":
        (folder / "config.json").write_text('{"architecture": ')
    elif what == "no text":
        readme.write_bytes(readme.read_bytes().replace(b"in 12 steps", b"in 12 st\xe9ps"))
    elif what == "other weights":
        shutil.copy(kept / "student-projected" / "model.safetensors", folder)
    else:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-9] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    assert models.main(["--check", str(folder)]) == 1
    error = capsys.readouterr().err
    if what in ("weights", "other weights"):
        assert "model.safetensors" in error
    elif what in ("no config", "half a config", "teacher"):
        assert "config.json" in error
    else:
        assert "README.md" in error and "config.json does not" not in error

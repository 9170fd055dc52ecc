"""Patch tokens: CKA on a common grid, the probe of masks, and evaluate.py's protocol of them."""

import errno

import numpy as np
import pytest
import torch
from centres import write_tiger
from PIL import Image

import evaluate
import g2l.dense
from g2l.benchmarks import load_folder
from g2l.dense import alignment, classes_of, dense_rows, look, resized, segmentation
from g2l.errors import UserError
from g2l.images import read_mask
from g2l.models import load_model
from g2l.multicentre import load_multicentre
from g2l.protocols import cka_rows
from g2l.results import Study, read_metrics

SIDE = 64


@pytest.fixture
def folder(tmp_path):
    """Twelve patients, four images each: left half smooth (class 3), right half rough (class 5)."""
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    lines = ["image,label,group,mask"]
    for i in range(48):
        turn = i % 4 > 1
        image = rng.normal(170, 8, (SIDE, SIDE, 3))
        rough = rng.normal(0, 60, (SIDE, SIDE // 2, 3))
        mask = np.full((SIDE, SIDE), 3, np.uint8)
        part = slice(SIDE // 2, None) if turn else slice(None, SIDE // 2)
        image[:, part] += rough
        mask[:, part] = 5
        mask[: SIDE // 8] = 0
        for name, array in ((f"{i}.png", image), (f"m{i}.png", mask)):
            Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).save(tmp_path / "mine" / name)
        lines.append(f"{i}.png,{'right' if turn else 'left'},patient-{i // 4},m{i}.png")
    (tmp_path / "mine" / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "mine"


def study(tmp_path, **more) -> Study:
    fields = dict.fromkeys(Study.__dataclass_fields__) | {"results": tmp_path, "seeds": 2}
    return Study(**fields | {"device_used": "cpu"} | more)


def test_alignment_is_the_cka_of_the_tokens_of_a_common_grid(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(20, 8, 6, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    turned = torch.einsum("ncij,cd->ndij", resized(target, (4, 4)), turn)
    group = np.arange(20) // 2
    same = {row["metric"]: row["value"] for row in alignment(turned, target, group, "cpu")}
    assert same["CKA"] == pytest.approx(1, abs=1e-5) and same["CKA se"] < 1e-4
    monkeypatch.setattr(g2l.dense, "PLACES", 16)  # all cells of the smaller grid
    own = torch.randn(20, 5, 4, 4, generator=generator) + turned[:, :5]
    got = {row["metric"]: row["value"] for row in alignment(own, target, group, "cpu")}
    x = {
        "own": own.flatten(2).transpose(1, 2).flatten(0, 1).numpy(),
        "teacher": turned.flatten(2).transpose(1, 2).flatten(0, 1).numpy(),
    }
    rows = cka_rows(x, np.repeat(group, 16).tolist(), "teacher", "cpu")
    (wanted,) = [r["value"] for r in rows if r["model"] == "own" and r["metric"] == "unbiased"]
    assert got["CKA"] == pytest.approx(wanted, abs=1e-5) and 0.1 < wanted < 0.9
    blind = torch.randn(20, 8, 6, 6, generator=generator)
    assert alignment(blind, target, group, "cpu")[0]["value"] == pytest.approx(0, abs=0.06)


def test_a_token_has_the_class_that_covers_half_of_it_as_the_network_sees_it():
    model = load_model("timm:test_vit", "random", input_size=32)
    mask = np.full((64, 64), -1)
    mask[:, :32] = 2
    mask[:32, 32:48] = 7
    assert classes_of(mask, model, [2, 2]).tolist() == [[2, 7], [2, -1]]
    wide = np.full((64, 128), 4)  # the middle is seen
    wide[:, 32:96] = 1
    assert (classes_of(wide, model, [2, 2]) == 1).all()


def test_the_probe_finds_what_tokens_hold_in_unseen_patients_and_nothing_in_noise(tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.integers(-1, 3, (60, 4, 4))
    group = np.arange(60) // 3
    told = torch.from_numpy(np.eye(4)[classes].transpose(0, 3, 1, 2)).float()
    noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(1))
    rows = segmentation(told + 0.3 * noise, classes, group, study(tmp_path))
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert min(row["value"] for row in rows) > 0.9
    blind = segmentation(noise, classes, group, study(tmp_path))
    assert np.mean([r["value"] for r in blind if r["metric"] == "balanced accuracy"]) < 0.45
    assert not segmentation(noise, np.full((60, 4, 4), 2), group, study(tmp_path))


def test_a_test_part_of_one_class_is_no_test(tmp_path):
    classes = np.full((12, 4, 4), 3)
    classes[:2, :2] = 5  # in the first patient alone
    told = torch.from_numpy(np.eye(6)[classes].transpose(0, 3, 1, 2)).float()
    rows = segmentation(told, classes, np.arange(12) // 2, study(tmp_path, seeds=6))
    assert not rows


def random_model(name: str):
    return load_model(name, "random", input_size=SIDE)


def measured(folder) -> dict:
    """Rows of one model without a teacher, by model, metric and seed."""
    name = "timm:test_vit"
    how = study(folder.parent, cards={name: {"fingerprint": "f"}}, load=random_model)
    found = load_multicentre(folder, 1, 1)[0]
    rows = dense_rows(found, [name], how)
    return {(row["model"], row["metric"], row["seed"]): row["value"] for row in rows}


def test_masks_that_are_changed_are_measured_anew(folder):
    before = measured(folder)
    assert before and measured(folder) == before
    for path in folder.glob("m*.png"):
        mask = np.array(Image.open(path))
        mask[: SIDE // 2] = 3
        mask[SIDE // 2 :] = 5  # now it says nothing of smooth and rough
        Image.fromarray(mask).save(path)
    after = measured(folder)
    name = "timm:test_vit", "balanced accuracy", 0
    assert after[name] < before[name]


def test_what_cannot_be_measured_of_patch_tokens_is_told(folder, capsys):
    table = folder / "labels.csv"
    for path in folder.glob("m*.png"):
        Image.new("L", (SIDE, SIDE), 3).save(path)
    assert not measured(folder)
    assert "mine: masks of fewer than two classes" in capsys.readouterr().err
    table.write_text("\n".join(line.rpartition(",")[0] for line in table.read_text().split()))
    assert not measured(folder)
    assert "mine: neither masks nor a teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_the_protocol_by_the_command(folder, capsys):
    command = ["--benchmark", folder, "--models", "timm:test_vit", "timm:test_resnet"]
    command += ["--teacher", "timm:test_vit", "--weights", "random", "--device", "cpu"]
    command += ["--input-size", SIDE, "--protocols", "dense", "--no-pictures", "--seeds", 2]
    command += ["--results", folder.parent / "r"]
    assert evaluate.main(list(map(str, command))) == 0, capsys.readouterr().err
    rows = [row for row in read_metrics(folder.parent / "r") if row["protocol"] == "dense"]
    value = {(row["model"], row["metric"]): row["value"] for row in rows}
    assert 0.8 < value["timm:test_vit", "balanced accuracy"] <= 1
    assert value["chance", "balanced accuracy"] == pytest.approx(0.5, abs=0.15)
    assert abs(value["chance", "CKA"]) < 0.1 and ("timm:test_vit", "CKA") not in value
    assert 0 < value["timm:test_resnet", "CKA"] < 1 and value["timm:test_resnet", "CKA se"] > 0
    text = (folder.parent / "r" / "table2.md").read_text()
    assert "| mean intersection over union" in text and "on the smaller grid" in text
    kept = [row["key"] for row in rows]
    assert evaluate.main(list(map(str, command))) == 0
    again = [row for row in read_metrics(folder.parent / "r") if row["protocol"] == "dense"]
    assert [row["key"] for row in again] == kept
    (folder / "m9.png").unlink()
    capsys.readouterr()
    for _ in range(2):  # the second time what was measured is found
        assert evaluate.main(list(map(str, command))) == 1
        assert (
            capsys.readouterr().err.count("error: mine: 1 of 48 images are not in the probe") == 1
        )


def test_tokens_lie_where_they_are_in_the_image(folder):
    found = load_multicentre(folder, 1, 1)[0]
    for name in ("timm:test_vit", "timm:test_resnet"):
        grids, classes, _ = look(load_model(name, "random", input_size=SIDE), found)
        assert grids.shape[2:] == classes.shape[1:] and len(grids) == 48
        middle = grids.shape[3] // 2
        spread = grids.float().std((1, 2, 3))
        assert (spread > 0).all() and set(np.unique(classes)) <= {-1, 3, 5}
        left, right = classes[:, :, :middle], classes[:, :, middle:]
        assert set(np.unique(left[0])) <= {-1, 5} and set(np.unique(right[0])) <= {-1, 3}


def test_masks_that_the_table_names_are_no_images_left_out(folder, capsys):
    assert len(load_folder(folder).masks) == 48 and "labels.csv" not in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(folder / "extra.png")
    load_folder(folder)
    assert "1 images have no line in labels.csv" in capsys.readouterr().err


def test_masks_of_tiger_and_faults_of_masks(tmp_path, folder):
    found, _ = load_multicentre(write_tiger(tmp_path), 64, 0.75)
    assert [np.bincount(found.masks[i].ravel() + 1).argmax() - 1 for i in range(4)] == [1, 3, 5, 2]
    assert found.masks[3].shape == found.images[3].shape[:2]
    Image.new("L", (5, 5)).save(folder / "m7.png")
    (folder / "m9.png").unlink()
    Image.new("RGB", (SIDE, SIDE)).save(folder / "m11.png")
    bad = load_multicentre(folder, 1, 1)[0]
    _, classes, faults = look(load_model("timm:test_vit", "random", input_size=SIDE), bad)
    assert [i for i in range(48) if (classes[i] == -1).all()] == [7, 9, 11]
    assert faults[0] == "the mask of 7.png has (5, 5) px, its image (64, 64)" and len(faults) == 3
    Image.new("RGB", (5, 5)).save(folder / "m7.png")
    with pytest.raises(UserError, match="one channel of class values"):
        read_mask(folder / "m7.png")
    good = (folder / "m8.png").read_bytes()
    (folder / "short.png").write_bytes(good[:8] + b"\0\0\0\1" + good[12:])  # a header of one byte
    Image.new("1", (20_000, 18_000)).save(folder / "huge.png")
    for name in ("gone.png", "short.png", "huge.png"):
        with pytest.raises(UserError, match="no mask"):
            read_mask(folder / name)


def test_a_machine_without_file_handles_is_no_fault_of_a_mask(folder, monkeypatch):
    def open_file(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("g2l.images.Image.open", open_file)
    with pytest.raises(OSError, match="Too many open files"):
        read_mask(folder / "m8.png")

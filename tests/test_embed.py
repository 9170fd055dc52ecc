"""embed.py as a user runs it: a cohort into features per slide, read as MIL tools read them."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, torchrun

import embed
import tile
from g2l.embeddings import read_features
from g2l.errors import UserError
from g2l.models import load_model
from g2l.patches import PatchIndex

MODEL = "timm:test_vit"


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """Six slides of as many patients, 16 to 36 patches of 64 px each."""
    data = tmp_path_factory.mktemp("tiled")
    (data / "slides" / "tiny").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        side = 256 + 64 * (i % 3)
        coarse = rng.normal((150 + 6 * i, 90, 160), 35, (side // 16, side // 16, 3)).clip(0, 255)
        image = coarse.repeat(16, 0).repeat(16, 1) + rng.normal(0, 12, (side, side, 3))
        tifffile.imwrite(
            data / "slides" / "tiny" / f"P{i}_a.tif",
            image.clip(0, 255).astype(np.uint8),
            tile=(128, 128),
            photometric="rgb",
            compression="jpeg",
            resolution=(40000, 40000),
            resolutionunit="CENTIMETER",
        )
    command = ["--cancer", "tiny", "--data", str(data), "--patch-size", "64", "--min-tissue", "0"]
    assert tile.main([*command, "--max-blur", "9"]) == 0
    return data


@pytest.fixture
def data(tiled, tmp_path):
    """A cohort of one's own, as it was tiled."""
    copy = tmp_path / "data"
    shutil.copytree(tiled, copy)
    rows = copy / "tiles" / "tiny" / "slides.csv"
    rows.write_text(rows.read_text().replace(str(tiled), str(copy)))
    return copy


def command(data, *more, models=(MODEL,)):
    names = ["--models", *models, "--weights", "random"]
    size = ["--input-size", "64", "--batch-size", "32", "--workers", "0", "--device", "cpu"]
    return ["--cancer", "tiny", "--data", str(data), *names, *size, *map(str, more)]


def folder(data, model="timm_test_vit"):
    return data / "tiles" / "tiny" / f"features_{model}"


def table(data, model="timm_test_vit"):
    with open(data / "tiles" / "tiny" / f"features_{model}.csv", newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def test_features_are_those_of_each_patch_alone(data):
    assert embed.main(command(data)) == 0
    index = PatchIndex(data / "tiles" / "tiny")
    model = load_model(MODEL, "random", input_size=64)
    for number, slide in enumerate(index.slides):
        features, coords = read_features(folder(data) / f"{slide}.h5")
        with h5py.File(data / "tiles" / "tiny" / "patches" / f"{slide}_patches.h5") as file:
            np.testing.assert_array_equal(coords, file["coords"][:])
        for row in (0, len(features) - 1):
            patch = torch.from_numpy(index.read(int(index.starts[number]) + row))
            image = model.geometry(patch.permute(2, 0, 1)[None]).float() / 255
            with torch.inference_mode():
                alone = model(model.normalize(image))[0].numpy()
            np.testing.assert_allclose(features[row], alone, rtol=1e-5, atol=1e-5)


def test_the_file_is_what_other_tools_read(data):
    """TRIDENT and Patho-Bench: features, coords and patch_size_level0; CLAM: pt_files, fp32."""
    assert embed.main(command(data, "--pt", "--slide", "mean")) == 0
    assert len(list(folder(data).glob("*.h5"))) == 6
    means = {}
    for path in folder(data).glob("*.h5"):
        with h5py.File(path) as file:
            features, coords = file["features"], file["coords"]
            assert features.dtype == np.float32 and features.chunks is None
            assert len(features) == len(coords) and int(coords.attrs["patch_size_level0"]) == 64
            tensor = torch.load(folder(data) / "pt_files" / f"{path.stem}.pt", weights_only=True)
            np.testing.assert_array_equal(tensor.numpy(), features[:])
            means[path.stem] = features[:].mean(0)
    with h5py.File(folder(data).with_name("features_timm_test_vit_mean.h5")) as file:
        names = [name.decode() for name in file["slides"][:]]
        assert [name.decode() for name in file["patients"][:]] == [n.split("_")[0] for n in names]
        want = np.stack([means[name] for name in names])
        np.testing.assert_allclose(file["features"][:], want, atol=1e-6)


def test_a_second_run_does_what_is_missing(data, capsys):
    assert embed.main(command(data)) == 0
    kept = {path: path.stat().st_mtime_ns for path in folder(data).glob("*.h5")}
    gone = folder(data) / "P2_a.h5"
    before = read_features(gone)[0]
    gone.unlink()
    capsys.readouterr()
    assert embed.main(command(data)) == 0
    assert "1 of 6 slides to do" in capsys.readouterr().out
    np.testing.assert_array_equal(read_features(gone)[0], before)
    for path, then in kept.items():
        assert path == gone or path.stat().st_mtime_ns == then


def test_other_weights_or_patches_are_refused_or_redone(data, capsys, tmp_path):
    assert embed.main(command(data)) == 0
    state = load_model(MODEL, "random", input_size=64).net.state_dict()
    other = {name: value + 0.01 for name, value in state.items()}
    torch.save(other, tmp_path / "other.bin")
    changed = command(data)
    changed[changed.index("random")] = str(tmp_path / "other.bin")
    assert embed.main(changed) == 1
    message = capsys.readouterr().err
    assert "other weights, preprocessing or patches" in message and "--redo" in message
    before = read_features(folder(data) / "P0_a.h5")[0]
    assert embed.main([*changed, "--redo"]) == 0
    assert not np.allclose(read_features(folder(data) / "P0_a.h5")[0], before)


def test_a_flipped_bit_is_noticed_when_features_are_read(data):
    assert embed.main(command(data)) == 0
    path = folder(data) / "P0_a.h5"
    with h5py.File(path) as file:
        place = file["features"].id.get_offset() + 1000
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        read_features(path)


def test_unreadable_patches_are_left_out_and_listed(data, capsys):
    """A slide that vanished is a row with its reason; one cut short loses what lies behind."""
    (data / "slides" / "tiny" / "P1_a.tif").unlink()
    assert embed.main(command(data)) == 1
    rows = table(data)
    assert rows["P1_a"]["status"] == "failed" and rows["P1_a"]["reason"]
    assert not (folder(data) / "P1_a.h5").exists()
    assert rows["P0_a"]["status"] == "done" and rows["P0_a"]["unreadable"] == "0"
    assert "could not be read" in capsys.readouterr().out


def test_several_models_read_each_patch_once(data, monkeypatch):
    reads = []
    right = PatchIndex.read
    monkeypatch.setattr(PatchIndex, "read", lambda self, i: reads.append(i) or right(self, i))
    assert embed.main(command(data, models=(MODEL, "timm:test_resnet"))) == 0
    assert len(reads) == len(set(reads)) == len(PatchIndex(data / "tiles" / "tiny"))
    assert len(table(data, "timm_test_resnet")) == 6


def test_ranks_share_even_one_slide(data, monkeypatch, tmp_path):
    assert embed.main(command(data)) == 0
    want = {path.name: read_features(path)[0] for path in folder(data).glob("*.h5")}
    shutil.rmtree(folder(data))
    # Small pieces, so that slides are shared between ranks.
    script = tmp_path / "small.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import embed, g2l.embeddings\nembed.PIECE = g2l.embeddings.PIECE = 7\n"
        "sys.exit(embed.main(sys.argv[1:]))\n"
    )
    done = torchrun(2, script, *command(data))
    assert done.returncode == 0, done.stdout + done.stderr
    for name, features in want.items():
        got = read_features(folder(data) / name)[0]
        np.testing.assert_allclose(got, features, rtol=1e-5, atol=1e-5)
    assert not list((folder(data) / ".parts").iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(data):
    assert embed.main(command(data)) == 0
    want = {path.name: path.read_bytes() for path in folder(data).glob("*.h5")}
    shutil.rmtree(folder(data))
    line = [sys.executable, str(ROOT / "embed.py"), *command(data)]
    for wait in (3.0, 4.0, 5.0):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, content in want.items():
        assert (folder(data) / name).read_bytes() == content

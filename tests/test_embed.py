"""embed.py as a user runs it: a cohort into features per slide, read as MIL tools read them."""

import csv
import errno
import json
import os
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import tifffile
import torch
from cohorts import edit_rows
from jobs import Forked, main_of, run_ranks
from PIL import Image

import embed
import tile
from g2l import heatmap
from g2l.embeddings import read_features
from g2l.errors import PatchError, UserError
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
    edit_rows(rows, lambda row: row.update(path=row["path"].replace(str(tiled), str(copy))))
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


def test_features_are_those_of_the_published_transform(data):
    """timm's transform on PIL images, which round after each pass: within 3e-4."""
    from timm.data import create_transform

    model = load_model("timm:test_resnet", "random", input_size=48)
    options = {"mean": model.mean, "std": model.std, "interpolation": model.interpolation}
    published = create_transform((3, 48, 48), crop_pct=48 / model.resize, **options)
    index = PatchIndex(data / "tiles" / "tiny")
    for i in range(0, len(index), 20):
        pixels = index.read(i)
        patch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.inference_mode():
            ours = model(model.normalize(model.geometry(patch)))
            theirs = model(published(Image.fromarray(pixels))[None])
        assert (ours - theirs).norm() < 3e-4 * theirs.norm()


def test_folded_batch_norm_changes_nothing():
    model = load_model("timm:test_resnet", "random", input_size=64)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, name = model(x), model.fingerprint
        folded = embed.fold(model)
        torch.testing.assert_close(folded(x), before, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.net.modules())
    assert folded.fingerprint == name


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


@pytest.mark.slow
def test_ranks_share_even_one_slide(data, monkeypatch):
    assert embed.main(command(data)) == 0
    want = {path.name: read_features(path)[0] for path in folder(data).glob("*.h5")}
    shutil.rmtree(folder(data))
    # Small pieces, so that slides are shared between ranks.
    monkeypatch.setattr("embed.PIECE", 7)
    monkeypatch.setattr("g2l.embeddings.PIECE", 7)
    for done in run_ranks(main_of("embed.py", *command(data))):
        assert done.returncode == 0, done.stderr
    for name, features in want.items():
        got = read_features(folder(data) / name)[0]
        np.testing.assert_allclose(got, features, rtol=1e-5, atol=1e-5)
    assert not list((folder(data) / ".parts").iterdir())


def test_half_precision_and_stamp_are_what_they_say(data, capsys):
    """STAMP 2 takes `feats`, coordinates in micrometres and these attributes of the file."""
    assert embed.main(command(data)) == 0
    want, coords = read_features(folder(data) / "P0_a.h5")
    half = command(data, "--precision-out", "fp16", "--format", "stamp")
    assert embed.main(half) == 1  # what is there is of another precision
    assert embed.main([*half, "--redo"]) == 0
    got, _ = read_features(folder(data) / "P0_a.h5")
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    with h5py.File(folder(data, "timm_test_vit_stamp") / "P0_a.h5") as file:
        np.testing.assert_array_equal(file["feats"][:], got)
        np.testing.assert_allclose(file["coords"][:], coords * 0.25)
        assert file.attrs["unit"] == "um" and file.attrs["tile_size"] == 16
        assert file.attrs["feat_type"] == "tile" and file.attrs["stamp_version"] == "2.0.0"
    capsys.readouterr()
    assert embed.main([*half, "--pt"]) == 1
    assert "read fp32 only" in capsys.readouterr().err


def test_a_slide_that_kills_its_reader_is_a_row(data, monkeypatch):
    assert embed.main(command(data, "--workers", "1")) == 0
    want = read_features(folder(data) / "P5_a.h5")[0]
    shutil.rmtree(folder(data))
    right = PatchIndex.read

    def read(self, i):
        if self.locate(i)[0] == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return right(self, i)

    monkeypatch.setattr(PatchIndex, "read", read)
    assert embed.main(command(data, "--workers", "1")) == 1
    rows = table(data)
    assert [slide for slide, row in rows.items() if row["status"] == "failed"] == ["P3_a"]
    assert "killed the reader" in rows["P3_a"]["reason"]
    np.testing.assert_array_equal(read_features(folder(data) / "P5_a.h5")[0], want)
    monkeypatch.setattr(PatchIndex, "read", right)  # mended: it is tried again
    assert embed.main(command(data)) == 0
    assert table(data)["P3_a"]["status"] == "done"


def test_a_patch_that_cannot_be_read_is_left_out_and_listed(data, monkeypatch):
    right = PatchIndex.read

    def read(self, i):
        if i == 5:
            raise PatchError("P0_a: patch at x=64, y=64 cannot be read: torn")
        return right(self, i)

    monkeypatch.setattr(PatchIndex, "read", read)
    assert embed.main(command(data)) == 1
    row = table(data)["P0_a"]
    assert (row["status"], row["unreadable"], row["patches"]) == ("done", "1", "15")
    assert "x=64, y=64" in row["reason"]
    features, coords = read_features(folder(data) / "P0_a.h5")
    assert np.isfinite(features).all() and len(features) == len(coords) == 15
    with h5py.File(folder(data) / "P0_a.h5") as file:
        lost = file["unreadable"][:]
    with h5py.File(data / "tiles" / "tiny" / "patches" / "P0_a_patches.h5") as file:
        np.testing.assert_array_equal(lost, file["coords"][5:6])


def test_a_full_disk_stops_it_and_it_goes_on(data, monkeypatch, capsys):
    right, calls = np.savez, []

    def full(*args, **arrays):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(*args, **arrays)

    monkeypatch.setattr("numpy.savez", full)
    assert embed.main(command(data)) == 1
    assert "no space left" in capsys.readouterr().err
    monkeypatch.setattr("numpy.savez", right)
    assert embed.main(command(data)) == 0
    assert "4 of 6 slides to do" in capsys.readouterr().out
    assert len(list(folder(data).glob("*.h5"))) == 6


def test_heatmaps_of_components_likeness_and_scores(data, tmp_path, capsys):
    """PNGs, and GeoJSON as QuPath reads it: a polygon for each patch, with colour and value."""
    scores = tmp_path / "risk.csv"
    scores.write_text("slide,x,y,value\nP0_a,0,0,0.5\nP0_a,64,64,2\nP1_a,0,0,9\n")
    wanted = {
        "components": [],
        "like_64_128": ["--query", "100,130"],
        "risk": ["--scores", scores],
    }
    pictures = data / "tiles" / "tiny" / "heatmaps"
    for kind, more in wanted.items():
        assert embed.main(command(data, "--heatmap", "P0_a", *more)) == 0
        path = pictures / f"P0_a_timm_test_vit_{kind}.png"
        with Image.open(path) as picture:
            assert min(picture.size) > 200
        tiles = json.loads(path.with_suffix(".geojson").read_text())["features"]
        assert len(tiles) == (2 if kind == "risk" else 16)
        assert tiles[0]["properties"]["objectType"] == "detection"
        assert len(tiles[0]["properties"]["color"]) == 3
        assert tiles[0]["geometry"]["coordinates"][0][0] == [0, 0]
        assert tiles[0]["geometry"]["coordinates"][0][2] == [64, 64]
    assert tiles[1]["properties"]["measurements"] == {"risk": 2}
    like = json.loads((pictures / "P0_a_timm_test_vit_like_64_128.geojson").read_text())
    found = [tile["properties"]["measurements"]["like_64_128"] for tile in like["features"]]
    features, coords = read_features(folder(data) / "P0_a.h5")
    row = np.flatnonzero((coords == (64, 128)).all(1))[0]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit @ unit[row], atol=1e-5)
    capsys.readouterr()
    assert embed.main(command(data, "--heatmap", "P0_a", "--query", "5000,5000")) == 1
    assert "no patch holds 5000,5000" in capsys.readouterr().err
    assert embed.main(command(data, "--heatmap", "P9")) == 1
    assert "P0_a" in capsys.readouterr().err


def test_the_nearest_of_a_cohort_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    slides = [rng.normal(size=(n, 8)).astype(np.float32) for n in (40, 5, 60)]
    owners = ["a", "b", "c"]
    queries = np.stack([slides[0][3], slides[2][7]])
    found = heatmap.nearest_over(list(zip(owners, slides, strict=True)), queries, ["a", "c"], 6)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (*slides, queries)]
    for i, own in enumerate((0, 2)):
        away = [
            (1 - unit[s][row] @ unit[3][i], s, row)
            for s in range(3)
            for row in range(len(slides[s]))
            if s != own
        ]
        want = sorted(away)[:6]
        assert [(s, row) for _, s, row in want] == [tuple(pair) for pair in found[1:, i].T]
        np.testing.assert_allclose(found[0][i], [d for d, _, _ in want], atol=1e-5)


@pytest.mark.slow
def test_a_page_of_patches_alike_and_what_another_model_would_cost(data, capsys):
    compared = ["--compare", "timm:test_resnet"]
    assert embed.main(command(data, "--similar", "3", *compared)) == 0
    with Image.open(data / "tiles" / "tiny" / "heatmaps" / "timm_test_vit_similar.png") as picture:
        assert min(picture.size) > 300
    assert "timm:test_resnet, measured here" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(data):
    assert embed.main(command(data)) == 0
    want = {path.name: path.read_bytes() for path in folder(data).glob("*.h5")}
    shutil.rmtree(folder(data))
    for enough in (0, 2, 4):
        process = Forked(main_of("embed.py", *command(data)))
        while len(list(folder(data).glob("[!.]*.h5"))) < enough and process.poll() is None:
            time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.finish()
    assert len(list(folder(data).glob("[!.]*.h5"))) < 6, "killed too late to test anything"
    assert embed.main(command(data)) == 0
    for name, content in want.items():
        assert (folder(data) / name).read_bytes() == content

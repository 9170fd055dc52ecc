"""embed.py as a user runs it: a cohort into features per slide, read as MIL tools read them."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import time
import tracemalloc

import h5py
import numpy as np
import pytest
import tifffile
import torch
from cohorts import edit_rows
from jobs import Forked, main_of, run_ranks
from matplotlib.text import Text
from mirax import write_mirax
from PIL import Image

import embed
import tile
from g2l import heatmap
from g2l.embeddings import Coordinates, Origin, SlideFeatures, exports_of, read_features
from g2l.errors import PatchError, UserError
from g2l.models import load_model
from g2l.patches import PatchIndex
from g2l.ranks import exit_process
from g2l.readahead import Reader
from g2l.slides import Slide
from g2l.tissue import read_mask

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
    told_by_model = command(data)
    told_by_model[told_by_model.index("--models")] = "--model"  # both will do
    assert embed.main(told_by_model) == 0
    kept = {path: path.stat().st_mtime_ns for path in folder(data).glob("*.h5")}
    gone = folder(data) / "P2_a.h5"
    before = read_features(gone)[0]
    gone.unlink()
    capsys.readouterr()
    assert embed.main(command(data)) == 0
    out = capsys.readouterr().out
    assert "1 of 6 slides to do" in out and "6 of 6 slides, 0.00 GB" in out
    assert re.search(r"36 patches in \d+ s, [\d,]+ a second, 0.000 device hours: network", out)
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
        assert file.attrs["tile_size_um"] / file.attrs["tile_size_px"] == 0.25  # its µm per pixel
        assert file.attrs["extractor"] == MODEL
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
    assert embed.main(command(data)) == 1 and table(data)["P0_a"] == row  # a second run keeps it
    features, coords = read_features(folder(data) / "P0_a.h5")
    assert np.isfinite(features).all() and len(features) == len(coords) == 15
    with h5py.File(folder(data) / "P0_a.h5") as file:
        lost = file["unreadable"][:]
    with h5py.File(data / "tiles" / "tiny" / "patches" / "P0_a_patches.h5") as file:
        np.testing.assert_array_equal(lost, file["coords"][5:6])
    monkeypatch.setattr(PatchIndex, "read", right)
    assert embed.main(command(data, "--redo")) == 0  # the disk was at fault, say
    row = table(data)["P0_a"]
    assert (row["unreadable"], row["patches"], row["reason"]) == ("0", "16", "")


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


@pytest.mark.parametrize("ending", [".h5", ".pt"])
def test_a_disk_full_for_what_hdf5_or_torch_writes(data, ending, monkeypatch, capsys):
    """Both fail badly on a full disk (HDF5 by a crash at the end), so room is made first."""
    right = os.posix_fallocate

    def full(handle, start, size):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(ending):
            raise OSError(errno.ENOSPC, "No space left on device")
        right(handle, start, size)

    monkeypatch.setattr("os.posix_fallocate", full)
    assert embed.main(command(data, "--pt")) == 1
    assert "no space left on the disk; make room" in capsys.readouterr().err
    assert not list(folder(data).rglob(f"*{ending}"))
    monkeypatch.setattr("os.posix_fallocate", right)
    assert embed.main(command(data, "--pt")) == 0
    assert len(list(folder(data).rglob("*.pt"))) == 6


def test_what_was_made_of_earlier_features_is_not_left_beside_new_ones(data):
    wanted = ["--pt", "--slide", "mean", "--format", "stamp"]
    assert embed.main(command(data, *wanted)) == 0
    tensor, stamp, mean = exports_of(folder(data) / "P0_a.h5")
    kept = tensor.stat().st_mtime_ns, stamp.stat().st_mtime_ns
    assert embed.main(command(data, *wanted)) == 0  # a second run writes nothing
    assert (tensor.stat().st_mtime_ns, stamp.stat().st_mtime_ns) == kept
    (folder(data) / "P0_a.h5").unlink()
    assert embed.main(command(data)) == 0
    assert not (tensor.exists() or stamp.exists() or mean.exists())
    assert len(list(folder(data).rglob("*.pt"))) == 5
    assert embed.main(command(data, *wanted)) == 0
    assert tensor.exists() and stamp.exists() and mean.exists()


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


def test_what_a_network_does_not_give_is_left_out_and_listed(data, monkeypatch):
    """NaN for a patch, as fp16 gives where a number grows too large; the next run tries again."""
    right = embed.Forward.__call__
    calls = []

    def broken(self, x):
        out = right(self, x)
        if not calls and self.model.name == "timm:test_resnet":
            out[3, 0] = float("nan")
            calls.append(1)
        return out

    monkeypatch.setattr(embed.Forward, "__call__", broken)
    assert embed.main(command(data, models=(MODEL, "timm:test_resnet"))) == 1
    rows = table(data, "timm_test_resnet")
    assert rows["P0_a"]["unreadable"] == "1" and "NaN" in rows["P0_a"]["reason"]
    assert rows["P1_a"]["unreadable"] == "0" and not rows["P1_a"]["reason"]
    assert np.isfinite(read_features(folder(data, "timm_test_resnet") / "P0_a.h5")[0]).all()
    other = table(data)["P0_a"]  # of the model beside it
    assert other["unreadable"] == "0" and not other["reason"]


def test_numbers_too_large_for_half_precision_are_left_out(data, monkeypatch):
    right = embed.Forward.__call__

    def large(self, x):
        out = right(self, x)
        out[5] *= 1e9
        return out

    monkeypatch.setattr(embed.Forward, "__call__", large)
    assert embed.main(command(data, "--precision-out", "fp16")) == 1
    assert table(data)["P0_a"]["unreadable"] == "1" and "fp16" in table(data)["P0_a"]["reason"]
    features, _ = read_features(folder(data) / "P0_a.h5")
    assert features.dtype == np.float16 and np.isfinite(features).all()
    assert embed.main(command(data, "--redo")) == 0  # fp32 holds them


def test_redo_mends_features_of_which_a_bit_flipped(data, capsys):
    assert embed.main(command(data)) == 0
    path = folder(data) / "P0_a.h5"
    sound = path.read_bytes()
    with h5py.File(path) as file:
        place = file["features"].id.get_offset() + 1000
    path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
    assert embed.main(command(data, "--heatmap", "P0_a")) == 1
    assert "checksum" in (told := capsys.readouterr().err) and "--redo makes it anew" in told
    kept = (folder(data) / "P1_a.h5").stat().st_mtime_ns
    assert embed.main(command(data, "--heatmap", "P0_a", "--redo")) == 0
    assert path.read_bytes() == sound and (folder(data) / "P1_a.h5").stat().st_mtime_ns == kept


@pytest.mark.parametrize("attribute", ["level0_mpp", "slide_bytes"])
def test_another_slide_or_size_of_pixels_at_the_same_places_is_noticed(data, attribute, capsys):
    assert embed.main(command(data)) == 0
    with h5py.File(data / "tiles" / "tiny" / "patches" / "P2_a_patches.h5", "a") as file:
        file["coords"].attrs[attribute] = 2 * file["coords"].attrs[attribute]
    if attribute == "slide_bytes":  # so that it is read all the same
        with open(data / "slides" / "tiny" / "P2_a.tif", "ab") as slide:
            slide.write(bytes(slide.tell()))
    assert embed.main(command(data)) == 1
    assert "P2_a.h5, one of 1, was made from other" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "text", "earlier"])
def test_a_damaged_or_older_file_is_refused_and_made_anew(data, damage, capsys):
    assert embed.main(command(data)) == 0
    path = folder(data) / "P0_a.h5"
    sound = path.read_bytes()
    if damage == "earlier":
        with h5py.File(path, "a") as file:
            del file.attrs["preprocessing"], file["unreadable"]
    else:
        path.write_bytes(sound[: len(sound) // 2] if damage == "cut" else b"not HDF5")
    assert embed.main(command(data)) == 1
    assert "--redo" in capsys.readouterr().err
    assert embed.main(command(data, "--redo")) == 0
    assert path.read_bytes() == sound


def test_a_folder_of_another_cohort_is_noticed(data, capsys):
    """Features copied beside a cohort of slides of the same names but other sizes."""
    assert embed.main(command(data)) == 0
    names = {"P0_a": "P1_a", "P1_a": "P2_a", "P2_a": "P0_a"}
    held = {old: (folder(data) / f"{old}.h5").read_bytes() for old in names}
    for old, new in names.items():
        (folder(data) / f"{new}.h5").write_bytes(held[old])
    assert embed.main(command(data)) == 1
    assert "one of 3, was made from other" in capsys.readouterr().err
    (folder(data) / "Q_1.h5").write_bytes(held["P0_a"])
    assert embed.main(command(data, "--redo")) == 0
    assert "1 files are of no slide" in (told := capsys.readouterr().err) and "Q_1.h5" in told


def test_patches_cut_anew_are_noticed(data, capsys):
    """At another µm per pixel, of the same slides."""
    assert embed.main(command(data)) == 0
    grid = ["--patch-size", "64", "--min-tissue", "0", "--max-blur", "9"]
    cohort = ["--cancer", "tiny", "--data", str(data)]
    assert tile.main([*cohort, *grid, "--mpp", "0.5", "--resample"]) == 0
    assert embed.main(command(data)) == 1
    assert "P0_a.h5, one of 6, was made from other" in capsys.readouterr().err
    assert embed.main(command(data, "--redo", "--format", "stamp")) == 0
    with h5py.File(folder(data, "timm_test_vit_stamp") / "P0_a.h5") as file:
        coords = file["coords"][:]
        assert file.attrs["tile_size_um"] == 32 and file.attrs["tile_size_px"] == 64
        assert set(np.diff(np.unique(coords[:, 0]))) == {32}


def test_slides_of_one_name_of_one_patch_and_of_none(tmp_path, capsys):
    data = tmp_path / "data"
    rng = np.random.default_rng(3)
    for place, side in (("a/S_1", 128), ("b/S_1", 128), ("T_1", 64), ("U_1", 64)):
        path = data / "slides" / "tiny" / f"{place}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(60, 200, (side, side, 3)).astype(np.uint8)
        if place == "U_1":
            image[:] = 255
        resolution = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", **resolution)
    tiling = ["--cancer", "tiny", "--data", str(data), "--patch-size", "64", "--max-blur", "9"]
    tile.main(tiling)
    line = command(data, "--heatmap", "T_1", "--slide", "mean", "--pt", "--similar", "2")
    capsys.readouterr()
    assert embed.main(line) == 0, capsys.readouterr()
    rows = table(data)
    assert sorted(rows) == ["T_1", "U_1", "a_S_1", "b_S_1"] and rows["T_1"]["patches"] == "1"
    assert rows["U_1"]["status"] != "done" and rows["U_1"]["reason"]
    assert {path.stem for path in folder(data).glob("*.h5")} == rows.keys() - {"U_1"}
    assert torch.load(folder(data) / "pt_files" / "T_1.pt", weights_only=True).shape[0] == 1


def test_features_of_one_number_have_three_colours():
    for shape in ((5, 1), (1, 1), (7, 2), (1, 8)):
        colours = heatmap.by_components(np.random.default_rng(0).normal(size=shape))
        assert colours.shape == (shape[0], 3) and (colours >= 0).all() and (colours <= 1).all()


def test_likeness_of_features_too_large_for_half_precision():
    x = np.random.default_rng(0).normal(size=(9, 64)) * 100
    want = x @ x[2] / np.linalg.norm(x, axis=1) / np.linalg.norm(x[2])
    np.testing.assert_allclose(heatmap.by_similarity(x.astype(np.float16), 2), want, atol=1e-3)


def test_tiles_of_a_slide_with_bounds_lie_where_tile_py_reads_them(tmp_path):
    """QuPath counts from the corner of what was scanned; so does the reader of masks."""
    write_mirax(tmp_path / "M.mrxs")
    coords = np.array([[2304, 1536], [2560, 1536], [2816, 2048]])
    path = tmp_path / "M.geojson"
    with Slide(tmp_path / "M.mrxs") as slide:
        assert slide.origin != (0, 0)
        heatmap.write_tiles(path, slide, coords, 256, np.array([0.5, 1, 2]), "risk")
        shape = slide.height // 64, slide.width // 64
        mask = read_mask(path, shape, 64, slide.origin)
        figure = heatmap.paint(slide, coords, 256, np.array([0.5, 1, 2]), "M", "risk", 1)
    inner, outer = np.zeros((2, *shape), bool)  # edges go to one pixel or the other
    for x, y in coords // 64:
        inner[y : y + 4, x : x + 4] = True
        outer[y - 1 : y + 5, x - 1 : x + 5] = True
    assert mask[inner].all() and not mask[~outer].any()
    shown = figure.axes[1].images[0].get_array()  # and there they are painted
    scale = shown.shape[1] / 4096
    colourful = np.argwhere(np.ptp(shown, axis=2) > 0.2)
    np.testing.assert_allclose(colourful.min(0), coords[0][::-1] * scale, atol=1)
    np.testing.assert_allclose(colourful.max(0) + 1, (coords[2][::-1] + 256) * scale, atol=1)
    assert [text.get_text() for text in figure.findobj(Text) if " mm" in text.get_text()]


def test_what_a_heatmap_shows_is_one_thing_of_a_named_slide(data, capsys):
    assert embed.main(command(data, "--query", "1,1")) == 1
    assert "name the slide" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        embed.main(command(data, "--heatmap", "P0_a", "--query", "1,1", "--scores", "x.csv"))


def test_scores_are_numbers(tmp_path):
    table = tmp_path / "risk.csv"
    table.write_text("slide,x,y,value\nP0_a,0.0,64.0,0.5\n")
    assert heatmap.read_scores(table, "P0_a")[0].tolist() == [[0, 64]]
    for wrong in ("nan", "inf", "high"):
        table.write_text(f"slide,x,y,value\nP0_a,0,64,0.5\nP0_a,0,64,{wrong}\n")
        with pytest.raises(UserError, match=wrong):
            heatmap.read_scores(table, "P0_a")


@pytest.mark.slow
def test_more_ranks_than_slides(data):
    rows = data / "tiles" / "tiny" / "slides.csv"
    edit_rows(rows, lambda row: row["slide"] == "P0_a" or row.update(patches=0, status="skipped"))
    for done in run_ranks(main_of("embed.py", *command(data)), 3):
        assert done.returncode == 0, done.stderr
    assert [path.name for path in folder(data).glob("*.h5")] == ["P0_a.h5"]


@pytest.mark.slow
def test_two_at_once_and_ctrl_c(data, monkeypatch, signals):
    for _ in range(4):
        both = [Forked(main_of("embed.py", *command(data))) for _ in range(2)]
        for process in both:
            done = process.finish()
            assert done.returncode == 0, done.stderr
        assert len(list(folder(data).glob("*.h5"))) == 6
        shutil.rmtree(folder(data))
    read = PatchIndex.read

    def slowly(self, number):
        time.sleep(0.02)
        return read(self, number)

    monkeypatch.setattr(PatchIndex, "read", slowly)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run behind a shell
    process = Forked(main_of("embed.py", *command(data, "--workers", "1", "--batch-size", "8")))
    while not list(folder(data).glob("[!.]*.h5")) and process.poll() is None:
        time.sleep(0.003)
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(20)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    monkeypatch.setattr(PatchIndex, "read", read)
    assert embed.main(command(data)) == 0
    assert len(list(folder(data).glob("*.h5"))) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_does_not_wait_for_patches_that_do_not_come(data, monkeypatch, signals, workers):
    def never(self, number):
        (data / "begun").touch()
        time.sleep(60)

    monkeypatch.setattr(PatchIndex, "read", never)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = main_of("embed.py", *command(data, "--workers", workers, "--batch-size", 8))
    process = Forked(lambda: exit_process(main()))
    while not (data / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # so that the network waits for patches
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(20)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr


def test_a_reader_that_nobody_listens_to_ends_in_silence(data, capfd):
    reader = Reader(PatchIndex(data / "tiles" / "tiny"), list(np.arange(40).reshape(5, 8)), 8)
    assert reader.pipe.poll(20)
    time.sleep(0.3)  # it has read ahead all that it may
    reader.pipe.close()
    reader.process.join(20)
    assert reader.process.exitcode == 0 and not capfd.readouterr().err


def test_one_model_named_twice_is_refused(data, capsys):
    assert embed.main(command(data, models=(MODEL, MODEL))) == 1
    assert MODEL in capsys.readouterr().err


def test_similar_without_any_features(data, capsys):
    shutil.rmtree(data / "slides")
    assert embed.main(command(data, "--similar", "2")) == 1
    assert "Traceback" not in (told := capsys.readouterr().err), told


def test_memory_is_bounded_whatever_the_slide(tmp_path, monkeypatch):
    """A slide in parts of 400 rows: the file is written a part at a time."""
    monkeypatch.setattr("g2l.embeddings.PIECE", 400)
    coords = np.stack([np.arange(20000), np.zeros(20000, int)], 1)
    where = Coordinates(coords, {"patch_size": 64, "patch_size_level0": 64})
    origin = Origin("m", "f", "{}", where.key, "float32")
    target = SlideFeatures(tmp_path, "S", origin, where)
    rng = np.random.default_rng(0)
    for first in range(0, 20000, 400):
        block = rng.random((400, 512), np.float32)
        target.write_part(first, block, np.ones(400, bool))
    tracemalloc.start()
    target.finish()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target.state() == "done" and most < 6e6  # of 41 MB; a part has 0.8


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

"""The patch index: what is written for other tools, and reading any patch of a cohort."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from synthetic import section, stained, write_slide

import tile
from g2l.errors import PatchError, UserError
from g2l.grid import tile_slide
from g2l.overlays import write_geojson, write_thumbnail
from g2l.patches import PatchIndex, write_coords
from g2l.rows import write_rows
from g2l.slides import Slide
from g2l.tissue import read_mask

ROOT = Path(tile.__file__).parent
# Peak memory in MB of a process started by a test; getrusage tells the runner's if it is higher.
PEAK = (
    "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    " // 1024"
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three slides tiled by the command: tiles of 256 at 40x, of 240, and 20x, resampled."""
    data = tmp_path_factory.mktemp("data")
    folder = data / "slides" / "mine"
    folder.mkdir(parents=True)
    write_slide(folder / "a.svs", section(1536, 1536))
    write_slide(folder / "b.svs", section(1400, 1000, 1), tile_size=240, codec="rgb")
    write_slide(folder / "c.svs", section(900, 1000, 2), mpp=0.5, objective=20)
    assert (
        tile.main(
            ["--cancer", "mine", "--data", str(data), "--resample", "--enlarge", "--workers", "1"]
        )
        == 0
    )
    return data / "tiles" / "mine"


def test_h5_as_clam_reads_it(cohort):
    """The reads of CLAM's Whole_Slide_Bag_FP, attribute by attribute."""
    with h5py.File(cohort / "patches" / "a_patches.h5", "r") as file:
        dset = file["coords"]
        assert dset.attrs["patch_level"] == 0 and dset.attrs["patch_size"] == 256
        assert dset.dtype == np.int64 and dset.shape[1] == 2 and len(dset[0]) == 2
        assert dset.attrs["downsample"].tolist() == [1, 1] and dset.attrs["level_dim"].tolist() == [
            1536,
            1536,
        ]
        assert dset.attrs["name"] == "a" and dset.attrs["save_path"].endswith("patches")
    with h5py.File(cohort / "patches" / "c_patches.h5", "r") as file, pytest.raises(KeyError):
        file["coords"].attrs["patch_level"]  # resampled: CLAM would read another field of view


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_h5_as_trident_reads_it(cohort, name):
    with h5py.File(cohort / "patches" / f"{name}_patches.h5", "r") as file:
        attrs = file["coords"].attrs
        size, level0, target = (
            attrs["patch_size"],
            attrs["level0_magnification"],
            attrs["target_magnification"],
        )
        assert (
            size * level0 // target == attrs["patch_size_level0"] == (128 if name == "c" else 256)
        )
        assert (target, level0) == ((40, 20) if name == "c" else (40, 40))
        assert attrs["overlap"] == 0 and attrs["level0_width"] > 0 and attrs["level0_height"] > 0
        assert attrs["name"] == name and "savetodir" in attrs
        assert {len(file[key]) for key in ("tissue", "pen", "blur")} == {len(file["coords"])}


def test_geojson_and_mask_round_trip(cohort, tmp_path):
    with Slide(cohort.parents[1] / "slides" / "mine" / "a.svs") as slide:
        tiling = tile_slide(slide)
        mask = tiling.mask
        mask[40:44, 30:40] = False  # a hole
        path = tmp_path / "a.geojson"
        write_geojson(path, slide, tiling)
        again = read_mask(path, mask.shape, tiling.scale)
        Image.fromarray(mask).resize((500, 500)).save(tmp_path / "a.png")
        image = read_mask(tmp_path / "a.png", mask.shape, tiling.scale)
    for other in (again, image):
        assert (mask & other).sum() / (mask | other).sum() > 0.93
    assert not again[41:43, 32:38].any()
    features = json.loads(path.read_text())["features"]
    assert all(feature["properties"]["objectType"] == "annotation" for feature in features)
    ring = np.array(features[0]["geometry"]["coordinates"][0])
    assert (ring[0] == ring[-1]).all() and ring.min() >= 0 and ring.max() <= 1536
    (tmp_path / "b.geojson").write_text('{"type": "Polygon", "coordinates": [[["x", 1]]]}')
    with pytest.raises(UserError, match=r"b\.geojson: expected GeoJSON"):
        read_mask(tmp_path / "b.geojson", (10, 10), 1)


def test_pictures(cohort):
    thumbnail = np.asarray(Image.open(cohort / "thumbnails" / "a.jpg")).astype(int)
    assert thumbnail.shape == (1536, 1536, 3)
    red, green, blue = thumbnail.transpose(2, 0, 1)
    assert ((green > red + 60) & (green > blue + 40)).sum() > 1000, "the outline"
    assert ((blue > red + 60) & (blue > green + 40)).sum() > 1000, "the grid"
    sheet = Image.open(cohort / "contact.jpg")
    assert sheet.width > 1000 and 3 * 128 < sheet.height < 600


@pytest.mark.parametrize("side", [256, 20, 6, 3])
def test_a_dropped_patch_inside_tissue_is_bare(tmp_path, side):
    """With 6 px a patch, as on a slide of 68,000 px, too."""
    with Slide(write_slide(tmp_path / "a.svs", section(1280, 1280))) as slide:
        tiling = tile_slide(slide, min_tissue=0)
        tiling.mask[:] = False  # no outline
        tiling.coords = tiling.coords[(tiling.coords != (512, 512)).any(axis=1)]
        write_thumbnail(tmp_path / "a.png", slide, tiling, 5 * side)
        bare = slide.thumbnail(5 * side).astype(int)
    tint = np.abs(np.asarray(Image.open(tmp_path / "a.png")) - bare).sum(axis=2)

    def cell(column, row):
        return tint[row * side : (row + 1) * side, column * side : (column + 1) * side]

    assert not cell(2, 2).any(), "neighbours do not draw its edges"
    for column, row in ((1, 2), (3, 2), (2, 1), (2, 3)):
        assert (cell(column, row) > 15).mean() > 0.5


def test_index_reads_what_the_slide_shows(cohort):
    index = PatchIndex(cohort)
    assert (
        index.slides == ["a", "b", "c"]
        and len(index) == index.counts.sum()
        and index.patch_size == 256
    )
    assert index.patients == ["a", "b", "c"] and index.mpp == 0.25
    for number, name in enumerate(index.slides):
        with (
            Slide(cohort.parents[1] / "slides" / "mine" / f"{name}.svs") as slide,
            h5py.File(cohort / "patches" / f"{name}_patches.h5") as file,
        ):
            for row in (0, len(file["coords"]) // 2, len(file["coords"]) - 1):
                i = int(index.starts[number]) + row
                assert index.locate(i) == (number, row)
                x, y = file["coords"][row].tolist()
                assert np.array_equal(
                    index.read(i), slide.read(x, y, 128 if name == "c" else 256, 256)
                )
    with pytest.raises(IndexError):
        index.locate(len(index))


@pytest.mark.slow
def test_draw_is_a_pure_function_and_uniform(cohort):
    index = PatchIndex(cohort)
    draws = [index.draw(5, n) for n in range(3000)]
    assert draws == [PatchIndex(cohort).draw(5, n) for n in range(3000)]
    assert draws != [index.draw(6, n) for n in range(3000)]
    slides = np.bincount([index.locate(i)[0] for i in draws], minlength=3)
    assert (np.abs(slides / 3000 - 1 / 3) < 0.04).all()
    patches = np.bincount([index.draw(5, n, by="patch") for n in range(6000)], minlength=len(index))
    assert len(patches) == len(index) and (patches > 0).all()
    assert ((patches - 6000 / len(index)) ** 2 / (6000 / len(index))).sum() < 1.8 * len(index)


def read_some(index):
    return [int(index.read(i).sum()) for i in range(0, len(index), 3)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_index_in_worker_processes(cohort, method):
    """Handles opened before the fork must not be shared: workers and parent read at once."""
    index = PatchIndex(cohort)
    expected = read_some(index)
    pickle.loads(pickle.dumps(index))
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(read_some, (index,)) for _ in range(4)]
        assert read_some(index) == expected
        assert all(result.get(60) == expected for result in results)


def test_index_bounds_its_handles(cohort):
    index = PatchIndex(cohort, handles=2)
    for n in range(40):
        index.read(index.draw(0, n))
        assert len(index._open) <= 2
    before = len(os.listdir("/proc/self/fd"))
    for n in range(40):
        index.read(index.draw(1, n))
    assert abs(len(os.listdir("/proc/self/fd")) - before) <= 4


def test_index_opens_each_h5_once(cohort, monkeypatch):
    """Draws jump from slide to slide; each would cost a look into HDF5 otherwise."""
    index, opened, right = PatchIndex(cohort, handles=1), [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, *args: opened.append(path) or right(path, *args))
    order = [index.draw(0, n) for n in range(40)]
    sums = [int(index.read(i).sum()) for i in order]
    assert len({index.locate(i)[0] for i in order}) == 3 and len(opened) == 3
    assert [int(PatchIndex(cohort).read(i).sum()) for i in order] == sums


@pytest.mark.parametrize("codec", ["rgb", "j2k"])
def test_index_reads_tiles_of_any_size_without_opening_slides(tmp_path, monkeypatch, codec):
    """Opening one takes as long as a dozen patches, and draws rarely meet the same slide again."""
    (tmp_path / "slides").mkdir()
    path = write_slide(
        tmp_path / "slides" / "a.svs",
        section(1300, 1100),
        tile_size=240,
        codec=codec,
        missing=(7, 13),
    )
    options = ["--min-tissue", "0.1", "--overlap", "100"]
    assert (
        tile.main(
            ["--cancer", "a", "--data", str(tmp_path), "--slides", str(path.parent), *options]
        )
        == 0
    )
    index = PatchIndex(tmp_path / "tiles" / "a")
    with (
        h5py.File(tmp_path / "tiles" / "a" / "patches" / "a_patches.h5") as file,
        Slide(path) as slide,
    ):
        expected = [slide.read(x, y, 256, 256) for x, y in file["coords"][:].tolist()]
    monkeypatch.setattr("g2l.slides.Slide", None)
    assert len(expected) > 20 and all(
        np.array_equal(index.read(i), patch) for i, patch in enumerate(expected)
    )


def test_index_follows_an_h5_that_was_written_anew(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "mine")
    index = PatchIndex(tmp_path / "mine", handles=1)
    first, i = index.read(0), int(index.starts[1])
    index.read(i)  # the first slide's handle is closed
    with h5py.File(tmp_path / "mine" / "patches" / "a_patches.h5", "r+") as file:
        file["coords"][0] = file["coords"][5]
        file.create_dataset("more", data=np.zeros(100))
    assert np.array_equal(index.read(0), index.read(5)) and not np.array_equal(index.read(0), first)


def test_moved_slides_that_share_a_name(tmp_path):
    for n in (1, 2):
        (tmp_path / "slides" / f"p{n}").mkdir(parents=True)
        write_slide(tmp_path / "slides" / f"p{n}" / "same.svs", section(900, 900, n))
    assert (
        tile.main(
            ["--cancer", "mine", "--data", str(tmp_path), "--slides", str(tmp_path / "slides")]
        )
        == 0
    )
    before = PatchIndex(tmp_path / "tiles" / "mine")
    patches = [before.read(int(start)) for start in before.starts]
    (tmp_path / "slides").rename(tmp_path / "elsewhere")
    after = PatchIndex(tmp_path / "tiles" / "mine", slides=tmp_path / "elsewhere")
    assert len(patches) == 2 and not np.array_equal(*patches)
    assert all(
        np.array_equal(after.read(int(start)), patch)
        for start, patch in zip(after.starts, patches, strict=True)
    )


def test_index_names_what_cannot_be_read(cohort, tmp_path):
    rows = list(csv.DictReader(open(cohort / "slides.csv")))
    (tmp_path / "patches").mkdir()
    for row in rows:
        row["path"] = "/nowhere/" + Path(row["path"]).name
        name = f"{row['slide']}_patches.h5"
        (tmp_path / "patches" / name).symlink_to(cohort / "patches" / name)
    write_rows(tmp_path, rows)
    index = PatchIndex(tmp_path)
    with pytest.raises(
        PatchError, match=r"a: patch at x=\d+, y=\d+ cannot be read: .*no such file"
    ):
        index.read(0)
    moved = PatchIndex(tmp_path, slides=cohort.parents[1] / "slides")
    assert np.array_equal(moved.read(0), PatchIndex(cohort).read(0))
    with pytest.raises(UserError, match=r"run tile\.py"):
        PatchIndex(tmp_path / "patches")


def test_index_at_the_size_of_tcga(tmp_path):
    """1,000 slides and 10 million patches open within 3 s and 400 MB."""
    rows = [
        {
            "slide": f"TCGA-AA-{n:04d}-01Z-00-DX1",
            "status": "done",
            "patient": f"TCGA-AA-{n:04d}",
            "patches": 10000,
            "patch_size": 256,
            "target_mpp": 0.25,
            "size0": 256,
            "mpp": 0.25,
            "path": f"/slides/{n}.svs",
        }
        for n in range(1000)
    ]
    write_rows(tmp_path, rows)
    code = (
        "import sys, time; from g2l.patches import PatchIndex; t = time.time(); "
        "i = PatchIndex(sys.argv[1]); "
        "d = [i.locate(i.draw(0, n)) for n in range(1000)]; "
        f"print(len(i), time.time() - t, {PEAK})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    patches, seconds, megabytes = map(float, done.stdout.split())
    assert patches == 10_000_000 and seconds < 3 and megabytes < 400
    assert len(pickle.dumps(PatchIndex(tmp_path))) < 1_000_000


def test_shards_hold_the_tiles_themselves(cohort, tmp_path):
    slides = cohort.parents[1] / "slides" / "mine"
    args = [
        "--cancer",
        "mine",
        "--slides",
        str(slides),
        "--data",
        str(tmp_path),
        "--resample",
        "--enlarge",
        "--save-patches",
    ]
    assert tile.main([*args, "--workers", "1"]) == 0
    folder = tmp_path / "tiles" / "mine"
    saved, live = PatchIndex(folder), PatchIndex(cohort)
    page = tifffile.TiffFile(slides / "a.svs").pages[0]
    data = (slides / "a.svs").read_bytes()
    scans = [data[o : o + c] for o, c in zip(page.dataoffsets, page.databytecounts, strict=True)]
    with tarfile.open(folder / "shards" / "a.tar") as tar:
        members = tar.getmembers()
        assert len(members) == saved.counts[0]
        for member in members[:5]:
            key, x, y = member.name.removesuffix(".jpg").rsplit("_", 2)
            assert key == "a"
            jpeg = tar.extractfile(member).read()
            scan = scans[int(y) // 256 * 6 + int(x) // 256]
            assert scan[scan.index(b"\xff\xda") :] in jpeg, "copied, not encoded anew"
            with Slide(slides / "a.svs") as slide:
                assert np.array_equal(
                    np.asarray(Image.open(io.BytesIO(jpeg))), slide.read(int(x), int(y), 256, 256)
                )
    assert len(saved) == len(live)
    for i in range(0, len(live), 4):
        difference = np.abs(saved.read(i).astype(int) - live.read(i))
        assert difference.mean() < (0.01 if saved.slides[saved.locate(i)[0]] == "a" else 4)
    assert (
        tile.main([*args[:-1], "--workers", "1"]) == 0
    )  # without --save-patches nothing has to be done again


# A cohort that is not what it was ------------------------------------------------------------


@pytest.mark.parametrize("resampled", [False, True])
def test_a_slide_that_was_replaced_is_not_read_at_old_places(cohort, tmp_path, resampled):
    """Other pixels at the same coordinates would go unnoticed."""
    name = "c" if resampled else "a"
    slides = tmp_path / "slides" / "mine"
    shutil.copytree(cohort.parents[1], tmp_path, dirs_exist_ok=True)
    rows = list(csv.DictReader(open(cohort / "slides.csv")))
    for row in rows:
        row["path"] = str(slides / Path(row["path"]).name)
    write_rows(tmp_path / "tiles" / "mine", rows)
    index = PatchIndex(tmp_path / "tiles" / "mine")
    first = int(index.starts[index.slides.index(name)])
    sound = index.read(first)
    index.close()
    times = (slides / f"{name}.svs").stat()
    size = (900, 1000) if resampled else (1536, 1536)
    write_slide(slides / f"{name}.svs", section(*size, 9), mpp=0.5 if resampled else 0.25)
    os.utime(slides / f"{name}.svs", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(PatchError, match="changed since it was tiled"):
        index.read(first)
    shutil.copyfile(cohort.parents[1] / "slides" / "mine" / f"{name}.svs", slides / f"{name}.svs")
    with pytest.raises(PatchError, match="changed since it was tiled"):
        index.read(first)  # the size is right, the time is not
    moved = PatchIndex(tmp_path / "tiles" / "mine", slides=slides)
    assert np.array_equal(moved.read(first), sound), "a copy has another time"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda coords: coords.astype(np.int32), "expected plain int64"),
        (lambda coords: coords + 100_000, "beyond the slide"),
        (lambda coords: coords - 5000, "beyond the slide"),
        (lambda coords: coords[:, :1], "expected plain int64"),
        (lambda coords: coords[:-1], "slides.csv says"),
        (None, "holds 0 patches"),
    ],
)
def test_an_h5_file_that_is_not_ours_is_refused(cohort, tmp_path, change, reason):
    shutil.copytree(cohort, tmp_path / "mine")
    with h5py.File(tmp_path / "mine" / "patches" / "a_patches.h5", "r+") as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
        del file["coords"]
        if change:
            file.create_dataset("coords", data=change(coords)).attrs.update(attributes)
    index = PatchIndex(tmp_path / "mine")
    with pytest.raises(PatchError, match=reason):
        index.read(0)
    index.read(int(index.starts[1]))


def test_a_damaged_h5_file_is_no_traceback(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "mine")
    path, rng = tmp_path / "mine" / "patches" / "a_patches.h5", random.Random(0)
    sound, refused = path.read_bytes(), 0
    for number in range(100):
        data = bytearray(sound)
        for _ in range(number % 4):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.randrange(len(data))] if number % 4 == 0 else data)
        try:
            PatchIndex(tmp_path / "mine").read(0)
        except PatchError:
            refused += 1
    assert refused > 25


@pytest.mark.slow
def test_few_file_handles_are_no_fault_of_the_patches(tmp_path):
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    write_slide(folder / "s00.svs", section(512, 512), mpp=0.125, levels=())
    for n in range(1, 40):
        shutil.copy(folder / "s00.svs", folder / f"s{n:02d}.svs")
    options = ["--resample", "--enlarge", "--min-tissue", "0.1", "--max-blur", "6"]
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path), *options]) == 0
    code = (
        "import resource, sys; from g2l.patches import PatchIndex; "
        "import openslide, simplejpeg, h5py, scipy.ndimage, tifffile; "
        "index = PatchIndex(sys.argv[1]); index.handles = 256; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30)); "
        "print(sum(index.read(i).any() for i in range(len(index))), len(index), "
        "PatchIndex(sys.argv[1]).handles)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "tiles" / "mine"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["40", "40", "7"], done.stderr[-500:]


def test_a_forked_child_keeps_no_file_of_its_parent_open(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "mine")
    index = PatchIndex(tmp_path / "mine")
    for start in index.starts:
        index.read(int(start))
    assert any(path.startswith(str(tmp_path)) for path in open_files())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = pool.apply(open_files)
    assert not any(path.startswith(str(tmp_path)) for path in theirs)


def open_files():
    places = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return [os.readlink(place) for place in places if os.path.exists(place)]


@pytest.mark.slow
def test_plain_images_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    """They are held whole: 16 of 92 Mpx would take 5.6 GB."""
    (tmp_path / "a").mkdir()
    rows = []
    for n in range(5):
        Image.fromarray(stained(600, 600, n)).save(tmp_path / f"{n}.png")
        rows.append(
            {
                "slide": str(n),
                "patches": 4,
                "path": tmp_path / f"{n}.png",
                "size0": 256,
                "patch_size": 256,
                "target_mpp": 0.25,
                "mpp": 0.25,
                "status": "done",
            }
        )
        with Slide(tmp_path / f"{n}.png", mpp=0.25) as slide:
            tiling = tile_slide(slide)
            write_coords(tmp_path / "a" / "patches" / f"{n}_patches.h5", slide, tiling, 0, {})
    write_rows(tmp_path / "a", rows)
    monkeypatch.setattr("g2l.patches.PIXELS", 3_500_000)  # two of 600 x 600 x 4 bytes
    index = PatchIndex(tmp_path / "a")
    for start in index.starts:
        index.read(int(start))
        assert sum(handle.slide is not None for handle in index._open.values()) <= 2


def test_rotten_tiles_are_not_copied_into_shards(tmp_path):
    """A tile with a hole in its middle still ends as a JPEG should."""
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    path = write_slide(folder / "a.svs", stained(1536, 1536))
    page, data = tifffile.TiffFile(path).pages[0], bytearray(path.read_bytes())
    rotten = {7, 14, 15}
    for index in rotten:
        start, count = page.dataoffsets[index], page.databytecounts[index]
        for place in range(start + count // 3, start + count - 4, 97):
            data[place] ^= 0x5A
    path.write_bytes(data)
    with openslide.OpenSlide(path) as reference:
        lost = set()
        for index in rotten:
            try:
                reference.read_region((index % 6 * 256, index // 6 * 256), 0, (256, 256))
            except openslide.OpenSlideError:
                lost.add(index)
                reference = openslide.OpenSlide(path)
    assert lost
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path), "--save-patches"]) == 0
    index = PatchIndex(tmp_path / "tiles" / "mine")
    assert len(index) == 36 - len(lost)
    for i in range(len(index)):
        index.read(i)
    (row,) = csv.DictReader(open(tmp_path / "tiles" / "mine" / "slides.csv"))
    assert row["unreadable"] == str(len(lost)) and "unreadable patches" in row["warnings"]


def test_clam_finds_the_coordinates_by_its_own_names(cohort):
    """The reads of CLAM's extract_features_fp.py: a list of slides, patches/<slide_id>.h5."""
    rows = list(csv.DictReader(open(cohort / "clam.csv")))
    assert [row["slide_id"] for row in rows] == ["a", "b"], "c is resampled, which CLAM cannot do"
    for row in rows:
        name = row["slide_id"].split(".svs")[0]
        with h5py.File(cohort / "patches" / f"{name}.h5", "r") as file:
            assert file["coords"].attrs["patch_level"] == 0
            assert len(file["coords"]) > 0 and file["coords"].attrs["patch_size"] == 256
    assert not (cohort / "patches" / "c.h5").exists()


def test_names_as_long_as_a_file_system_takes(tmp_path, sound):
    """255 bytes: what is written beside is longer, so such a slide fails by name, and alone."""
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    for length in (255, 220):
        (folder / f"{'n' * (length - 4)}.svs").write_bytes(sound)
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path)]) == 1
    rows = csv.DictReader(open(tmp_path / "tiles" / "mine" / "slides.csv"))
    found = {len(row["slide"]): (row["status"], row["reason"]) for row in rows}
    assert found[216] == ("done", "") and found[251][0] == "failed"
    assert "File name too long" in found[251][1]
    assert len(PatchIndex(tmp_path / "tiles" / "mine").read(0)) == 256


def test_a_slide_called_as_the_table_is(tmp_path, sound):
    folder = tmp_path / "slides" / "mine"
    folder.mkdir(parents=True)
    (folder / "slides.csv.svs").write_bytes(sound)
    assert tile.main(["--cancer", "mine", "--data", str(tmp_path)]) == 0
    assert PatchIndex(tmp_path / "tiles" / "mine").slides == ["slides.csv"]

"""tile.py: reading pixel for pixel what OpenSlide gives, tissue and quality, magnification, files, the patch index."""

import csv
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from synthetic import BACKGROUND, by_openslide, section, stained, write_slide

import tile
from g2l.cohort import name_slides, patient_of
from g2l.errors import PatchError, SkippedSlide, UserError
from g2l.files import atomic, locked
from g2l.grid import choose_size, tile_slide
from g2l.overlays import write_geojson, write_thumbnail
from g2l.patches import PatchIndex
from g2l.rows import write_rows
from g2l.slides import Slide
from g2l.tiff import Codec, Tiles
from g2l.tissue import find_tissue, measure_blur, read_mask

ROOT = Path(tile.__file__).parent
# Peak memory in MB of a process started by a test; getrusage would tell that of the test runner if it was higher.
PEAK = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) // 1024"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One sound slide of 1100 x 1300 px at 0.25 µm/px."""
    return write_slide(tmp_path_factory.mktemp("plain") / "plain.svs", section(1300, 1100))


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "tile_size", "options"),
    [
        ("ycbcr", 256, {}),
        ("ycbcr", 240, {}),
        ("rgb", 240, {}),
        ("rgb", 256, {"aperio": False}),
        ("444", 256, {}),
        ("j2k", 256, {}),
        ("j2k-ycbcr", 256, {}),
        ("ycbcr", 512, {"aperio": False, "bigtiff": True}),
        ("ycbcr", 256, {"missing": (0, 6)}),
        ("rgb", 240, {"missing": (7,), "aperio": False}),
    ],
)
def test_raw_tiles_give_openslides_pixels(tmp_path, codec, tile_size, options):
    options.pop("bigtiff", None)
    path = write_slide(
        tmp_path / "slide.svs", section(700, 901), tile_size=tile_size, codec=codec, **options
    )
    with Slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.levels[0].tiles, "the fast path should be in use"
        if not codec.startswith("j2k"):
            assert tifffile.TiffFile(path).pages[0].photometric == (2 if codec == "rgb" else 6)
        assert slide.levels[0].tiles.complete == ("missing" not in options)
        rng = np.random.default_rng(0)
        places = [
            *rng.integers(-150, 900, (25, 2)).tolist(),
            [0, 0],
            [256, 256],
            [240, 240],
            [768, 512],
            [900, 690],
        ]
        for x, y in places:
            assert np.array_equal(
                slide.read(x, y, 256, 256), by_openslide(reference, x, y, 256, 256)
            ), (x, y)
        for number, level in enumerate(slide.levels[1:], 1):
            ours = slide.area(
                0,
                0,
                level.width * level.downsample,
                level.height * level.downsample,
                level.width,
                level.height,
            )
            assert np.array_equal(
                ours, by_openslide(reference, 0, 0, level.width, level.height, number)
            )


def test_other_compressions_go_through_openslide(tmp_path):
    image = section(500, 600)
    tifffile.imwrite(
        tmp_path / "a.tif", image, tile=(256, 256), compression="deflate", photometric="rgb"
    )
    with Slide(tmp_path / "a.tif") as slide:
        assert not slide.levels[0].tiles
        assert np.array_equal(slide.read(100, 100, 200, 200), image[100:300, 100:300])
        assert (slide.read(500, 400, 256, 256)[100:, 100:] == 255).all(), (
            "beyond the edges it is white"
        )


def test_tiles_that_differ_from_openslide_are_not_trusted(plain, monkeypatch):
    right = Codec.decode
    monkeypatch.setattr(Codec, "decode", lambda *args: right(*args)[..., ::-1])
    with Slide(plain) as slide, openslide.OpenSlide(plain) as reference:
        assert not slide.levels[0].tiles and slide.drafts == slide.levels
        assert np.array_equal(
            slide.read(300, 300, 256, 256), by_openslide(reference, 300, 300, 256, 256)
        )


@pytest.mark.parametrize("codec", ["ycbcr", "j2k"])
def test_damaged_tiles_fail_where_openslide_fails(tmp_path, codec):
    path = write_slide(tmp_path / "slide.svs", section(600, 600), codec=codec, levels=())
    page = tifffile.TiffFile(path).pages[0]
    offset, count = page.dataoffsets[4], page.databytecounts[4]  # the middle one of 3 x 3
    sound, rng, outcomes = path.read_bytes(), np.random.default_rng(3), set()
    for trial in range(25):
        length = int(rng.integers(1, 150))
        place = offset + int(rng.integers(0, count - length))
        junk = (rng.bytes(length), bytes(length), b"\xff\xd9")[trial % 3]
        if trial == 24:
            place, junk = offset, bytes(count)
        path.write_bytes(sound[:place] + junk + sound[place + len(junk) :])
        try:
            with openslide.OpenSlide(path) as reference:
                expected = by_openslide(reference, 256, 256, 256, 256)
        except openslide.OpenSlideError:
            expected = None
        with Slide(path) as slide:
            assert slide.levels[0].tiles
            if expected is None:
                with pytest.raises(
                    PatchError, match=r"slide: patch at x=256, y=256 cannot be read"
                ):
                    slide.read(256, 256, 256, 256)
                assert slide.read(0, 0, 256, 256).shape == (256, 256, 3), "the rest stays readable"
                slide.thumbnail(300)
                assert slide.damaged
            else:
                assert np.array_equal(slide.read(256, 256, 256, 256), expected)
            outcomes.add(expected is None)
    assert outcomes == {True, False}


def test_openslide_recovers_after_a_damaged_region(tmp_path):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, section(1500, 1500), tile=(256, 256), compression="deflate", photometric="rgb"
    )
    page = tifffile.TiffFile(path).pages[0]
    data = bytearray(path.read_bytes())
    data[page.dataoffsets[14] : page.dataoffsets[14] + 400] = bytes(400)  # x=512, y=512
    path.write_bytes(data)
    with Slide(path) as slide:
        with pytest.raises(PatchError, match="x=600, y=600"):
            slide.read(600, 600, 64, 64)
        assert slide.read(0, 0, 64, 64).min() > 200
        image = slide.thumbnail(1500)
        assert (
            slide.damaged
            and (image[600:700, 600:700] == 255).all()
            and image[1250, 750].min() < 240
        )


@pytest.mark.parametrize("options", [{}, {"codec": "j2k"}, {"compression": "deflate"}])
def test_damage_in_a_coarse_level_loses_no_patch(tmp_path, options):
    path = tmp_path / "slide.svs"
    if "compression" in options:
        with tifffile.TiffWriter(path) as file:
            for shrink in (1, 8):
                file.write(
                    stained(2048, 2048)[::shrink, ::shrink],
                    tile=(256, 256),
                    photometric="rgb",
                    metadata=None,
                    subfiletype=int(shrink > 1),
                    **options,
                )
    else:
        write_slide(path, stained(2048, 2048), levels=(8,), **options)
    page, data = tifffile.TiffFile(path).pages[1], bytearray(path.read_bytes())
    data[page.dataoffsets[0] : page.dataoffsets[0] + 400] = bytes(400)
    path.write_bytes(data)
    with Slide(path, mpp=0.25) as slide:
        assert len(tile_slide(slide).coords) == 64
        assert not slide.damaged and not (slide.thumbnail(256) == 255).all(axis=2).any()


def test_resampled_reading_matches_level_0_to_the_far_corner(tmp_path):
    """Levels of 1301 x 1103 px have sizes cut to whole pixels; taken as ratios they would shift by up to a pixel."""
    image = section(1301, 1103)
    path = write_slide(tmp_path / "slide.svs", image, levels=(2, 4, 16))
    with Slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 16]
        level0 = slide.area(0, 0, 1103, 1301, 1103, 1301)
        for x, y, size in ((0, 0, 512), (400, 517, 512), (583, 781, 520), (333, 777, 400)):
            ours = slide.read(x, y, size, 128).astype(float)
            want = np.asarray(
                Image.fromarray(level0[y : y + size, x : x + size]).resize((128, 128), 3)
            ).astype(float)
            shifts = {
                (dx, dy): np.abs(
                    ours[4:-4, 4:-4] - np.roll(want, (dy, dx), (0, 1))[4:-4, 4:-4]
                ).mean()
                for dx in (-1, 0, 1)
                for dy in (-1, 0, 1)
            }
            assert min(shifts, key=shifts.get) == (0, 0) and shifts[0, 0] < 8


@pytest.mark.parametrize(
    ("codec", "missing"), [("j2k", ()), ("j2k-ycbcr", ()), ("ycbcr", ()), ("j2k", (0, 5))]
)
def test_drafts_are_decoded_small(tmp_path, monkeypatch, codec, missing):
    """A thumbnail of a flat slide needs no tile in full: JPEG and JPEG 2000 hold smaller versions of themselves."""
    path = write_slide(
        tmp_path / "slide.svs", section(1024, 1024), codec=codec, levels=(), missing=missing
    )
    shrinks, right = set(), Codec.decode
    monkeypatch.setattr(
        Codec,
        "decode",
        lambda codec, data, shrink=1: shrinks.add(shrink) or right(codec, data, shrink),
    )
    with Slide(path) as slide:
        shrinks.clear()
        small = slide.thumbnail(128).astype(int)
        assert shrinks == {8}
        full = np.asarray(
            Image.fromarray(slide.area(0, 0, 1024, 1024, 1024, 1024)).resize((128, 128), 4)
        ).astype(int)
    assert np.abs(small - full).mean() < 9 and np.abs((small - full).mean((0, 1))).max() < 1.5


def test_mostly_empty_slides_are_not_drawn_by_openslide(tmp_path, monkeypatch):
    """OpenSlide makes a level's missing tiles from all of level 0: minutes for a slide of 100,000 px."""
    path = write_slide(
        tmp_path / "slide.svs", stained(2048, 2048), missing=[n for n in range(64) if n % 8 > 2]
    )
    with Slide(path) as slide:
        slow = slide.thumbnail(512).astype(int)
        monkeypatch.setattr(slide, "_from_openslide", lambda *_: pytest.fail("drawn by OpenSlide"))
        assert np.abs(slide.thumbnail(512).astype(int) - slow).mean() < 4
        tiling = tile_slide(slide)
    assert set(tiling.coords[:, 0].tolist()) == {0, 256, 512}
    with openslide.OpenSlide(path) as reference, Slide(path) as slide:
        level = slide.levels[1]
        assert np.array_equal(
            slide.area(0, 0, 2048, 2048, level.width, level.height),
            by_openslide(reference, 0, 0, level.width, level.height, 1),
        )


def test_a_page_with_too_few_tiles_is_left_to_openslide(plain):
    page = tifffile.TiffFile(plain).pages[0]
    assert Tiles.of(page)
    page.dataoffsets = page.dataoffsets[:-1]
    assert Tiles.of(page) is None
    page = tifffile.TiffFile(plain).pages[0]
    page.databytecounts += (1 << 20,)
    assert Tiles.of(page) is None


def test_ome_tiff_pyramid_in_sub_images_is_used(tmp_path):
    image = section(1024, 1024)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        options = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb"}
        file.write(
            image,
            subifds=1,
            metadata={
                "axes": "YXS",
                "PhysicalSizeX": 250,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 250,
                "PhysicalSizeYUnit": "nm",
            },
            **options,
        )
        file.write(image[::4, ::4], subfiletype=1, **options)
    with Slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.mpp, slide.mpp_source, slide.name) == (0.25, "OME PhysicalSizeX", "a")
        assert [level.downsample for level in slide.levels] == [1, 4]
        assert np.abs(slide.thumbnail(256).astype(int) - image[::4, ::4]).mean() < 12


def test_memory_stays_bounded_on_one_level(tmp_path):
    """Segmentation of a flat 10,000 x 10,000 slide (300 MB of pixels) must not hold it in memory."""
    tiles = [
        imagecodecs.jpeg_encode(np.ascontiguousarray(stained(256, 256, k)), level=80)
        for k in range(3)
    ]
    tifffile.imwrite(
        tmp_path / "flat.tif",
        (tiles[n % 3] for n in range(1600)),
        shape=(10240, 10240, 3),
        dtype=np.uint8,
        tile=(256, 256),
        compression="jpeg",
        photometric="ycbcr",
        subsampling=(2, 2),
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    code = (
        "import sys; from g2l.grid import tile_slide; from g2l.slides import Slide; "
        "s = Slide(sys.argv[1]); t = tile_slide(s); "
        f"print(len(t.coords), {PEAK})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "flat.tif"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    patches, megabytes = map(int, done.stdout.split())
    assert patches > 1500 and megabytes < 300


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            lambda path, image: tifffile.imwrite(
                path, image, photometric="rgb", compression="deflate"
            ),
            "TIFF picture",
        ),
        (lambda path, image: Image.fromarray(image).save(path, "png"), "PNG picture"),
        (lambda path, image: Image.fromarray(image).save(path, "jpeg"), "JPEG picture"),
    ],
)
def test_pictures_that_are_no_slides_are_called_so(tmp_path, write, reason):
    """Strips instead of tiles, or a renamed picture: sound, so nobody should search for damage."""
    write(tmp_path / "a.svs", section(300, 300))
    with pytest.raises(UserError, match=f"{reason}.*vips tiffsave"):
        Slide(tmp_path / "a.svs")


def test_a_compression_that_openslide_does_not_read_is_named(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        section(600, 600),
        tile=(256, 256),
        photometric="rgb",
        compression="webp",
    )
    with pytest.raises(UserError, match="Unsupported TIFF compression"):
        Slide(tmp_path / "a.tif")


# Magnification -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        ({"mpp": 0.2325}, 0.2325, "openslide.mpp-x"),
        ({"mpp": None}, None, ""),
        (
            {"aperio": False, "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"},
            0.5,
            "TIFF resolution tags",
        ),
        (
            {"aperio": False, "resolution": (50800, 50800), "resolutionunit": "INCH"},
            0.5,
            "TIFF resolution tags",
        ),
        (
            {"aperio": False, "resolution": (72, 72), "resolutionunit": "INCH"},
            None,
            "TIFF resolution tags: 352.8 µm/px is implausible and refused",
        ),
        ({"aperio": False}, None, ""),
    ],
)
def test_mpp_and_its_origin(tmp_path, options, mpp, source):
    with Slide(
        write_slide(tmp_path / "slide.tif", section(300, 300), levels=(), **options)
    ) as slide:
        assert (slide.mpp, slide.mpp_source) == (mpp, source)
        if mpp is None:
            with pytest.raises(SkippedSlide, match="--assume-mpp"):
                tile_slide(slide)


@pytest.mark.parametrize(
    ("unit", "size", "mpp"),
    [
        ("µm", 0.25, 0.25),
        ("nm", 250, 0.25),
        ("mm", 0.00025, 0.25),
        ("pixel", 0.25, None),
        ("reference frame", 0.25, None),
    ],
)
def test_units_of_ome_tiff(tmp_path, unit, size, mpp):
    """A unit that is no length says nothing about µm."""
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        section(300, 300),
        tile=(256, 256),
        compression="jpeg",
        photometric="rgb",
        metadata={"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit},
    )
    with Slide(tmp_path / "a.ome.tif") as slide:
        assert slide.mpp == mpp


@pytest.mark.parametrize(
    ("mpp", "resample", "size0"),
    [
        (0.2, False, 256),
        (0.3, False, 256),
        (0.25, True, 256),
        (0.19, False, None),
        (0.31, False, None),
        (0.5, False, None),
        (0.5, True, 128),
        (0.125, True, 512),
        (1.0, True, 64),
    ],
)
def test_which_magnifications_are_taken(mpp, resample, size0):
    slide = Namespace(mpp=mpp, mpp_source="x")
    if size0 is None:
        with pytest.raises(SkippedSlide, match="--resample"):
            choose_size(slide, 0.25, 256, resample)
    else:
        assert choose_size(slide, 0.25, 256, resample)[0] == size0


def test_objective_is_a_cross_check_only(tmp_path):
    path = write_slide(tmp_path / "slide.svs", section(1000, 1000), mpp=0.2325, objective=20)
    with Slide(path) as slide:
        tiling = tile_slide(slide)
    assert (
        slide.objective == 20
        and "20x disagrees with 0.2325" in tiling.warnings[0]
        and tiling.size0 == 256
    )


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 2.5])
def test_slides_of_every_magnification(tmp_path, mpp):
    """40x, 20x, 10x and 4x at their own scale: the whole ellipse is found and nothing sound is dropped as blurred."""
    path = write_slide(tmp_path / "slide.svs", section(2048, 2048), mpp=mpp, objective=10 / mpp)
    with Slide(path) as slide:
        tiling = tile_slide(slide, mpp=mpp)
    assert tiling.summary["tissue"] == pytest.approx(math.pi * 0.42**2, rel=0.06)
    assert len(tiling.coords) > 30 and tiling.measures["blur"].max() < 2 and not tiling.warnings


# Tissue and quality --------------------------------------------------------------------------------------------------


def low_power(canvas=200):
    """A low-power picture: two greys of background, black border, a piece of tissue in the middle, a stitching gap."""
    image = np.full((canvas, canvas, 3), 238, np.uint8)
    image[:, : canvas // 2] = (208, 207, 209)
    image[60:140, 60:140] = Image.fromarray(stained(1280, 1280)).resize(
        (80, 80), Image.Resampling.BOX
    )
    image[98:102] = 255
    image[:8] = image[-8:] = 2
    return image


def test_tissue_is_told_from_greys_black_borders_and_gaps():
    mask, pen, fold = find_tissue(low_power(), 16)
    truth = np.zeros_like(mask)
    truth[60:140, 60:140] = True
    truth[98:102] = False
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93
    assert (
        not mask[:40].any()
        and not mask[160:].any()
        and not pen[10:-10].any()
        and fold.mean() < 0.01
    )


@pytest.mark.parametrize(
    "tint", [(250, 246, 236), (236, 240, 248), (190, 190, 190), (245, 238, 243)]
)
def test_pale_tissue_on_a_tinted_background(tint):
    image = np.full((200, 200, 3), tint, np.uint8)
    image[50:150, 50:150] = np.array(tint) * np.array([0.97, 0.88, 0.95])
    mask, _, _ = find_tissue(image, 16)
    assert mask[55:145, 55:145].mean() > 0.98 and mask[:45].sum() == 0


@pytest.mark.parametrize(
    "color",
    [
        (50, 80, 190),
        (40, 140, 70),
        (210, 30, 40),
        (35, 35, 40),
        (35, 35, 110),
        (230, 210, 60),
        (40, 150, 160),
        (235, 120, 40),
        (120, 70, 30),
    ],
)
def test_pen_of_any_color_beside_and_on_tissue(color):
    image = low_power()
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).line([(20, 150), (180, 90)], fill=color, width=10)
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=80)
    mask, pen, _ = find_tissue(np.asarray(Image.open(buffer)), 16)
    stroke = np.zeros(mask.shape, np.uint8)
    drawn = Image.fromarray(stroke)
    ImageDraw.Draw(drawn).line([(20, 150), (180, 90)], fill=1, width=8)
    drawn = np.asarray(drawn) > 0
    assert pen[drawn].mean() > 0.95 and not mask[drawn].mean() > 0.05
    assert pen.sum() < 3 * drawn.sum(), "only the stroke and its rim"


@pytest.mark.parametrize(
    "color", [(200, 30, 50), (30, 130, 70), (25, 25, 30), (235, 215, 60), (30, 40, 170)]
)
def test_a_thin_stroke_of_pen(tmp_path, color):
    """90 px of a slide, less than three pixels of the mask: the patches it crosses go."""
    picture = Image.fromarray(section(1536, 1536))
    ImageDraw.Draw(picture).line([(100, 1300), (1400, 300)], fill=color, width=90)
    with Slide(write_slide(tmp_path / "a.svs", np.asarray(picture))) as slide:
        tiling = tile_slide(slide)
    kept = tiling.coords.tolist()
    assert not [place for place in ([512, 768], [768, 512], [1024, 512]) if place in kept]
    assert [256, 256] in kept and [512, 256] in kept and [768, 1024] in kept


def test_stained_tissue_is_not_pen_and_nuclei_are_no_folds():
    """Plausible mixtures of haematoxylin and eosin, pale to dark, of several stain vectors."""
    for h, e in (
        ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11)),
        ((0.74, 0.62, 0.22), (0.06, 0.72, 0.42)),
        ((0.50, 0.78, 0.46), (0.18, 0.98, 0.16)),
    ):
        amounts = np.stack(np.meshgrid(np.linspace(0, 0.5, 60), np.linspace(0.05, 0.5, 60)), -1)
        density = amounts[..., :1] * np.array(h) + amounts[..., 1:] * np.array(e)
        image = np.full((120, 120, 3), 240, np.uint8)
        image[30:90, 30:90] = 240 * 10**-density
        _, pen, _ = find_tissue(image, 16)
        assert pen.mean() < 0.005
    image = low_power()
    image[80:95, 75:125] = (110, 75, 150)  # a crowd of lymphocytes
    assert find_tissue(image, 16)[2].mean() < 0.004


def test_folds_are_found():
    image = low_power()
    band = image[60:140, 85:93].astype(float)
    image[60:140, 85:93] = np.clip(band * (band / 240) ** 1.2, 0, 255)
    fold = find_tissue(image, 16)[2]
    assert fold[65:95, 86:92].mean() > 0.6 and fold.sum() < 1500


def test_blur_is_measured_in_patch_pixels(tmp_path):
    image = stained(1024, 1280)
    measured = []
    for sigma in (0, 2, 3, 4, 6, 9, 14, 20):
        picture = (
            Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
            if sigma
            else Image.fromarray(image)
        )
        with Slide(write_slide(tmp_path / f"{sigma}.svs", np.asarray(picture))) as slide:
            coords = np.array([(x, y) for y in range(0, 1024, 256) for x in range(0, 1280, 256)])
            measured.append(float(np.median(measure_blur(slide, coords, 256, 256))))
    assert measured[:4] == pytest.approx([0, 2, 3, 4], abs=0.6)
    assert min(measured[4:]) > 5, "what is out of focus altogether has no sharper noise"


def test_blurred_and_inked_patches_are_dropped_by_their_flags(tmp_path):
    image = stained(1280, 1280)
    image[:, :512] = np.asarray(Image.fromarray(image[:, :512]).filter(ImageFilter.GaussianBlur(6)))
    image[:, -256:] = (40, 140, 70)
    with Slide(write_slide(tmp_path / "a.svs", image)) as slide:
        kept = tile_slide(slide)
        every = tile_slide(slide, max_pen=1, max_blur=6)
    assert set(kept.coords[:, 0].tolist()) == {512}  # the rim of ink counts as ink
    assert {0, 256, 512, 768} <= set(every.coords[:, 0].tolist())
    assert kept.summary["blur"] == pytest.approx(0.5, abs=0.1)
    assert kept.summary["pen"] == pytest.approx(0.27, abs=0.04)
    assert "for blur" in kept.warnings[0]


def test_brown_stain_is_tissue_when_ink_is_allowed(tmp_path):
    image = np.full((1024, 1024, 3), BACKGROUND, np.uint8)
    image[256:768, 256:768] = (stained(512, 512) * [0.6, 0.5, 0.25]).astype(np.uint8)
    with Slide(write_slide(tmp_path / "a.svs", image)) as slide:
        with pytest.raises(SkippedSlide, match=r"no tissue found.*--max-pen 1"):
            tile_slide(slide)
        assert tile_slide(slide, max_pen=1, max_blur=6).coords.tolist() == [
            [256, 256],
            [512, 256],
            [256, 512],
            [512, 512],
        ]


def test_min_tissue_and_overlap(plain):
    with Slide(plain) as slide:
        most = tile_slide(slide, min_tissue=0.9)
        some = tile_slide(slide, min_tissue=0.1)
        dense = tile_slide(slide, overlap=128)
    assert most.measures["tissue"].min() >= 0.9 and len(most.coords) < len(some.coords) < len(
        dense.coords
    )
    assert set(np.unique(dense.coords % 128)) == {0} and (some.coords + 256 <= (1100, 1300)).all()


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (np.full((600, 600, 3), 240, np.uint8), SkippedSlide, "no tissue"),
        (np.full((600, 600, 3), 255, np.uint8), UserError, "empty pixels"),
        (np.full((200, 600, 3), 200, np.uint8), SkippedSlide, "smaller"),
        (
            np.where(np.indices((600, 600, 3))[0] % 60 < 9, (10, 20, 190), 3).astype(np.uint8),
            SkippedSlide,
            "fluorescence",
        ),
    ],
)
def test_slides_without_usable_tissue(tmp_path, image, error, text):
    path = write_slide(tmp_path / "a.svs", image, levels=())
    with Slide(path) as slide, pytest.raises(error, match=text) as info:
        tile_slide(slide)
    assert type(info.value) is error


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three slides tiled by the command: one at 40x with tiles of 256, one with tiles of 240, one at 20x, resampled."""
    data = tmp_path_factory.mktemp("data")
    folder = data / "slides" / "mine"
    folder.mkdir(parents=True)
    write_slide(folder / "a.svs", section(1536, 1536))
    write_slide(folder / "b.svs", section(1400, 1000, 1), tile_size=240, codec="rgb")
    write_slide(folder / "c.svs", section(900, 1000, 2), mpp=0.5, objective=20)
    assert tile.main(["--cancer", "mine", "--data", str(data), "--resample", "--workers", "1"]) == 0
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
        assert {len(file[key]) for key in ("tissue", "pen", "fold", "blur")} == {
            len(file["coords"])
        }


def test_geojson_and_mask_round_trip(cohort, tmp_path):
    with Slide(cohort.parents[1] / "slides" / "mine" / "a.svs") as slide:
        mask = tile_slide(slide).mask
        mask[40:44, 30:40] = False  # a hole
        path = tmp_path / "a.geojson"
        tiling = Namespace(mask=mask, scale=1536 / mask.shape[1])
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


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "F", "RGB", "RGBA"])
def test_masks_of_every_kind_of_picture(tmp_path, mode):
    """Labels 0 and 1, however they are stored: a palette may show label 1 in black."""
    values = np.zeros((40, 60), np.uint8)
    values[10:30, 15:45] = 1
    if mode == "P":
        picture = Image.fromarray(values, "P")
        picture.putpalette([0, 0, 0, 0, 0, 0, 255, 255, 255])
    elif mode in ("RGB", "RGBA"):
        picture = Image.fromarray(
            np.dstack([values * 0, values * 0, values] + [values * 0 + 255] * (mode == "RGBA"))
        )
    else:
        picture = Image.fromarray(
            values > 0 if mode == "1" else values.astype(np.uint16 if mode == "I;16" else "f4")
        )
    assert picture.mode == mode
    picture.save(tmp_path / "a.tif")
    mask = read_mask(tmp_path / "a.tif", (20, 30), 32)
    assert mask.dtype == bool and mask.sum() == 150 and mask[5:15, 8:22].all()


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


# The index -----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="by must be"):
        index.draw(0, 0, by="patient")


def read_some(index):
    return [int(index.read(i).sum()) for i in range(0, len(index), 3)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_index_in_worker_processes(cohort, method):
    """Handles opened before the fork must not be shared: all workers and the parent read at once."""
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
    """Draws jump from slide to slide; with more slides than handles, each would cost a look into HDF5 otherwise."""
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
    """1,000 slides and 10 million patches open within 3 s and 400 MB, and reading a patch needs one slide only."""
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


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-A8-A06N-01Z-00-DX1.62649098-BD0B.svs", "TCGA-A8-A06N"),
        ("tcga-a8-a06n-01", "TCGA-A8-A06N"),
        ("arden-01_1.svs", "arden-01"),
        ("slide.ome.tif", "slide"),
        ("x/y/patient3_slide2_b.ndpi", "patient3"),
        ("P1_a.svs", "P1"),
        ("case_001.svs", "case_001"),
        ("case_001_HE.svs", "case_001"),
        ("BRACS_264.svs", "BRACS_264"),
        ("patient_004_node_1.tif", "patient_004"),
        ("HE_left.svs", "HE_left"),
        ("_7_b.svs", "_7"),
        ("_odd.svs", "_odd"),
        ("TCGA-A8.svs", "TCGA-A8"),
        ("d290-uuid_TCGA-A8-A06N-01Z-00-DX1.62", "TCGA-A8-A06N"),
    ],
)
def test_patient_of(name, patient):
    assert patient_of(name) == patient


def test_slides_that_share_a_name_keep_apart():
    paths = [
        Path("s/p1/slide.svs"),
        Path("s/p2/slide.svs"),
        Path("s/other.svs"),
        Path("s/other.tif"),
    ]
    names = name_slides(paths)
    assert len(names) == 4 and set(names.values()) == set(paths) and names["p1_slide"] == paths[0]


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    with atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert (tmp_path / "sub" / "a.txt").read_text() == "old" and len(
        list((tmp_path / "sub").iterdir())
    ) == 1


def test_import_is_light():
    code = (
        "import sys, tile; print([m for m in ('torch', 'timm', 'sklearn', 'scipy', 'matplotlib', 'pandas', 'h5py', "
        "'tifffile', 'openslide', 'urllib.request') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        with locked(tmp_path / "lock", wait=False) as free:
            assert free
    assert capsys.readouterr().err.count("has no locks") == 1

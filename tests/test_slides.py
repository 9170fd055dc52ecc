"""Slides: pixel for pixel what OpenSlide gives, levels proven, damage, pixel sizes."""

import os
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from mirax import write_mirax
from PIL import Image
from synthetic import BACKGROUND, by_openslide, section, stained, write_slide

import tile
from g2l.errors import PatchError, SkippedSlide, UserError
from g2l.grid import tile_slide
from g2l.readers import FastSlideReader
from g2l.slides import Slide, level_factor
from g2l.tiff import Codec, Tiles

ROOT = Path(tile.__file__).parent
# Peak memory in MB of a process started by a test; getrusage tells the runner's if it is higher.
PEAK = (
    "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    " // 1024"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One sound slide of 1100 x 1300 px at 0.25 µm/px."""
    return write_slide(tmp_path_factory.mktemp("plain") / "plain.svs", section(1300, 1100))


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
                    stained(1024, 1024)[::shrink, ::shrink],
                    tile=(256, 256),
                    photometric="rgb",
                    metadata=None,
                    subfiletype=int(shrink > 1),
                    **options,
                )
    else:
        write_slide(path, stained(1024, 1024), levels=(8,), **options)
    page, data = tifffile.TiffFile(path).pages[1], bytearray(path.read_bytes())
    data[page.dataoffsets[0] : page.dataoffsets[0] + 400] = bytes(400)
    path.write_bytes(data)
    with Slide(path, mpp=0.25) as slide:
        assert len(tile_slide(slide).coords) == 16
        assert not slide.damaged and not (slide.thumbnail(256) == 255).all(axis=2).any()


def test_resampled_reading_matches_level_0_to_the_far_corner(tmp_path):
    """Levels of 1301 x 1103 px have sizes cut to whole pixels; as ratios they would shift."""
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
    """A thumbnail needs no tile in full: JPEG and JPEG 2000 hold smaller ones of themselves."""
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
    """OpenSlide makes a level's missing tiles from all of level 0, which takes minutes."""
    path = write_slide(
        tmp_path / "slide.svs", stained(2048, 2048), missing=[n for n in range(64) if n % 8 > 2]
    )
    with Slide(path) as slide:
        slow = slide.thumbnail(512).astype(int)
        monkeypatch.setattr(slide._reader, "region", lambda *_: pytest.fail("drawn by it"))
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
    """Segmentation of a flat 10,000 x 10,000 slide (300 MB of pixels) does not hold it."""
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


def test_a_picture_too_large_to_be_held_is_told_so(tmp_path, monkeypatch):
    """Pillow's limit is 179 Mpx: such a picture is sound, and no slide cut short."""
    Image.fromarray(stained(300, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UserError, match=r"too large .*120000 pixels.*vips tiffsave") as info:
        Slide(tmp_path / "a.png")
    assert "damaged" not in str(info.value)
    monkeypatch.undo()
    with Slide(tmp_path / "a.png") as slide:
        assert slide.memory == 4 * 300 * 400


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_that_are_no_slides_are_called_so(tmp_path, kind):
    """A renamed picture is sound: nobody should search it for damage."""
    Image.fromarray(section(300, 300)).save(tmp_path / "a.svs", kind)
    with pytest.raises(UserError, match=f"{kind.upper()} picture.*vips tiffsave"):
        Slide(tmp_path / "a.svs")


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
            with pytest.raises(SkippedSlide) as info:
                tile_slide(slide)
            assert info.value.mend == "mpp"


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


# Levels --------------------------------------------------------------------------------------


def pyramid(path, image, pages, tile_size=256, **options):
    """A tiled TIFF at 0.25 µm/px of an image and further pages."""
    with tifffile.TiffWriter(path) as file:
        for number, page in enumerate((image, *pages)):
            file.write(
                page,
                tile=(tile_size, tile_size),
                photometric="rgb",
                compression="jpeg",
                metadata=None,
                subfiletype=int(number > 0),
                resolution=(40000, 40000),
                resolutionunit="CENTIMETER",
                **options,
            )
    return path


def corners(height, width):
    """Two blocks of tissue, one at the far corner."""
    image = np.full((height, width, 3), BACKGROUND, np.uint8)
    image[300:1324, 300:1324] = image[-1200:-176, -1200:-176] = stained(1024, 1024)
    return image


def test_levels_padded_to_whole_tiles_show_nothing_shifted(tmp_path):
    image, pages = corners(2600, 4650), []
    for n in (2, 4, 8):
        level = np.asarray(Image.fromarray(image).reduce(n))[: 2600 // n, : 4650 // n]
        lack = [(0, -side % 512) for side in level.shape[:2]]
        pages.append(np.pad(level, [*lack, (0, 0)], constant_values=255))
    padded = pyramid(tmp_path / "padded.tif", image, pages, tile_size=512)
    exact = pyramid(tmp_path / "exact.tif", image, [image[::4, ::4]], tile_size=512)
    with Slide(padded) as slide, Slide(exact) as other:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
        assert not slide.notes
        assert tile_slide(slide).coords.tolist() == tile_slide(other).coords.tolist()
        small = slide.area(3450, 1400, 1024, 1024, 128, 128).astype(int)
        large = np.asarray(
            Image.fromarray(slide.area(3450, 1400, 1024, 1024, 1024, 1024)).reduce(8)
        )
        assert np.abs(small - large).mean() < 9


def test_a_picture_of_the_glass_is_no_level(tmp_path):
    image, macro = np.full((1024, 3072, 3), BACKGROUND, np.uint8), stained(240, 640)
    image[256:768, 256:768] = stained(512, 512)
    path = pyramid(tmp_path / "a.tif", image, [image[::4, ::4], macro])
    with openslide.OpenSlide(path) as reference, Slide(path) as slide:
        assert len(reference.level_dimensions) == 3
        assert [level.downsample for level in slide.levels] == [1, 4]
        tiling = tile_slide(slide)
    assert len(tiling.coords) == 4 and "(640 x 240 px) left out" in tiling.warnings[0]


@pytest.mark.parametrize(
    ("level", "tile", "factor"),
    [
        ((2500, 1250), (1, 1), 4),
        ((2501, 1250), (1, 1), 4),
        ((3000, 1500), (1, 1), 3.3335),
        ((2560, 1280), (256, 256), 4),
        ((1500, 1250), (250, 250), None),
        ((1250, 2500), (1, 1), None),
        ((1250, 768), (256, 256), None),  # cut in width to an eighth, padded in height: chance
    ],
)
def test_level_factors(level, tile, factor):
    assert level_factor((10001, 5000), level, tile) == (factor and pytest.approx(factor, abs=1e-3))


def test_pixels_that_are_not_square_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        section(600, 600),
        tile=(256, 256),
        compression="jpeg",
        photometric="rgb",
        resolution=(40000, 20000),
        resolutionunit="CENTIMETER",
    )
    with Slide(path) as slide, pytest.raises(SkippedSlide, match="not square") as info:
        tile_slide(slide)
    assert info.value.mend == "mpp"


# Health --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["none", "lost", "empty", "cut"])
def test_a_slide_is_sound_where_its_patches_are_read(tmp_path, damage):
    """The thumbnail of a MIRAX slide comes from another data file than half of its patches."""
    write_mirax(tmp_path / "a.mrxs")
    part = tmp_path / "a" / "Data0001.dat"
    if damage == "lost":
        part.unlink()
    elif damage != "none":
        os.truncate(part, part.stat().st_size // 2 if damage == "cut" else 0)
    if damage in ("lost", "empty"):
        with pytest.raises(UserError, match=r"data file Data0001\.dat is missing or empty"):
            Slide(tmp_path / "a.mrxs")
        return
    with Slide(tmp_path / "a.mrxs") as slide:
        tiling = tile_slide(slide)
        for x, y in tiling.coords.tolist():
            slide.read(x, y, 256, 256)
    assert len(tiling.coords) + len(tiling.unreadable) == 36
    assert len(tiling.unreadable) == (9 if damage == "cut" else 0)


@pytest.mark.parametrize("codec", ["444", "ycbcr", "j2k"])
def test_a_resampled_patch_decodes_only_the_tiles_it_covers(tmp_path, monkeypatch, codec):
    """40x to 20x on a slide without a level for it: four tiles, of JPEG at half their size."""
    path = write_slide(tmp_path / "a.svs", section(1024, 1024), codec=codec, levels=())
    shrinks, right = [], Codec.decode
    with Slide(path) as slide:
        full = slide.area(256, 256, 512, 512, 512, 512)
    with Slide(path) as slide:
        monkeypatch.setattr(
            Codec,
            "decode",
            lambda codec, data, shrink=1: shrinks.append(shrink) or right(codec, data, shrink),
        )
        ours = slide.read(256, 256, 512, 256).astype(int)
        assert shrinks == [1 if codec == "j2k" else 2] * 4
    mean = np.asarray(Image.fromarray(full).reduce(2)).astype(int)
    difference = ours - mean
    assert np.abs(difference).mean() < 3 and np.abs(difference.mean((0, 1))).max() < 0.6


# Other readers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 64, "compression": "deflate"},
        {"rowsperstrip": 64, "compression": "lzw", "predictor": True, "byteorder": ">"},
        {"tile": (128, 128), "compression": "webp", "compressionargs": {"lossless": True}},
        {"tile": (128, 128), "compression": "jpegxl", "compressionargs": {"lossless": True}},
    ],
)
def test_tiffs_that_openslide_leaves_aside(tmp_path, options):
    image, path = section(700, 901), tmp_path / "a.tif"
    about = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, photometric="rgb", metadata=None, **about, **options)
    with Slide(path) as slide:
        assert slide.vendor in ("tiff", "generic-tiff") and slide.mpp == 0.25
        assert np.array_equal(slide.read(300, 200, 256, 256), image[200:456, 300:556])
        assert len(tile_slide(slide).coords) == 5
        assert (slide.read(800, 600, 256, 256)[100:, 101:] == 255).all()


def test_fastslide_reads_what_openslide_does_not(tmp_path):
    fastslide = pytest.importorskip("fastslide")
    path = write_slide(tmp_path / "a.svs", section(700, 901))
    reader = FastSlideReader(path, 1 << 20)
    assert reader.sizes[0] == (901, 700) and reader.properties["openslide.mpp-x"] == "0.25"
    assert len(reader.sizes) == 2 and fastslide.__version__
    with Slide(path) as slide:
        ours = slide.area(300, 200, 200, 100, 200, 100).astype(int)
    assert np.abs(reader.region(0, (300, 200, 200, 100)) - ours).mean() < 2
    reader.close()

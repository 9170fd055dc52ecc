"""Tissue, pen, blur and masks, and the grid of patches that is laid on them."""

import io
import json
import math
import os
from argparse import Namespace

import numpy as np
import pytest
import scenes
from mirax import write_mirax
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from synthetic import BACKGROUND, section, stained, write_slide

from g2l.errors import SkippedSlide, UserError
from g2l.grid import choose_size, tile_slide
from g2l.overlays import write_geojson
from g2l.slides import Slide
from g2l.tissue import find_tissue, mean_in_squares, measure_blur, read_mask


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One sound slide of 1100 x 1300 px at 0.25 µm/px."""
    return write_slide(tmp_path_factory.mktemp("plain") / "plain.svs", section(1300, 1100))


@pytest.mark.parametrize(
    ("mpp", "resample", "size0"),
    [
        (0.2, False, 256),
        (0.3, False, 256),
        (0.25, True, 256),
        (0.19, False, None),
        (0.31, False, None),
        (0.5, False, None),
        (0.5, True, None),
        (0.37, True, 173),
        (0.125, True, 512),
    ],
)
def test_which_magnifications_are_taken(mpp, resample, size0):
    slide = Namespace(mpp=mpp, mpp_source="x")
    if size0 is None:
        with pytest.raises(SkippedSlide) as info:
            choose_size(slide, 0.25, 256, resample)
        assert info.value.mend == ("enlarge" if resample else "magnification")
    else:
        assert choose_size(slide, 0.25, 256, resample)[0] == size0


def test_the_size_of_a_pixel_that_results_is_told():
    slide = Namespace(mpp=0.37, mpp_source="x")
    assert choose_size(slide, 0.25, 256, True) == (173, pytest.approx(0.37 * 173 / 256))
    slide.mpp = 1.0
    assert choose_size(slide, 0.25, 256, True, enlarge=True) == (64, 0.25)


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
    """40x, 20x, 10x and 4x at their own scale: all is found, nothing sound is called blurred."""
    path = write_slide(tmp_path / "slide.svs", section(2048, 2048), mpp=mpp, objective=10 / mpp)
    with Slide(path) as slide:
        tiling = tile_slide(slide, mpp=mpp)
    assert tiling.summary["tissue"] == pytest.approx(math.pi * 0.42**2, rel=0.06)
    assert len(tiling.coords) > 30 and tiling.measures["blur"].max() < 2 and not tiling.warnings


def low_power(canvas=200):
    """Low power: two greys of background, black border, tissue in the middle, a stitching gap."""
    image = np.full((canvas, canvas, 3), 238, np.uint8)
    image[:, : canvas // 2] = (208, 207, 209)
    image[60:140, 60:140] = Image.fromarray(stained(1280, 1280)).resize(
        (80, 80), Image.Resampling.BOX
    )
    image[98:102] = 255
    image[:8] = image[-8:] = 2
    return image


def test_tissue_is_told_from_greys_black_borders_and_gaps():
    mask, pen = find_tissue(low_power(), 16)
    truth = np.zeros_like(mask)
    truth[60:140, 60:140] = True
    truth[98:102] = False
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93
    assert not mask[:40].any() and not mask[160:].any() and not pen[10:-10].any()


def test_means_in_squares_are_scipys():
    rng = np.random.default_rng(0)
    mask = rng.random((50, 70)) < 0.5
    places = rng.random((200, 2)) * (70, 50)
    total = np.pad(mask.cumsum(axis=0, dtype=float).cumsum(axis=1), ((1, 0), (1, 0)))
    for side in (8, 7.3, 90):

        def at(right, below, side=side):
            corner = np.add(places, (right * side, below * side)).T[::-1]
            return ndimage.map_coordinates(total, corner, order=1, mode="nearest")

        means = (at(1, 1) - at(0, 1) - at(1, 0) + at(0, 0)) / side**2
        np.testing.assert_allclose(mean_in_squares(mask, places, side), means, atol=1e-9)


@pytest.mark.parametrize(
    "tint", [(250, 246, 236), (236, 240, 248), (190, 190, 190), (245, 238, 243)]
)
def test_pale_tissue_on_a_tinted_background(tint):
    """It has the glass's tint over its own, and the structure that glass has not."""
    image = np.full((200, 200, 3), tint, float)
    grain = np.random.default_rng(0).normal(1, 0.25, (100, 100, 1))
    image[50:150, 50:150] *= 1 - grain * [0.03, 0.12, 0.05]
    mask, _ = find_tissue(image.astype(np.uint8), 16)
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
    mask, pen = find_tissue(np.asarray(Image.open(buffer)), 16)
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


def test_stained_tissue_is_not_pen():
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
        _, pen = find_tissue(image, 16)
        assert pen.mean() < 0.005


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
        with pytest.raises(SkippedSlide, match=r"no tissue found.*colour of ink") as info:
            tile_slide(slide)
        assert info.value.mend == "pen"
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


# Other programs' annotations -----------------------------------------------------------------


def feature(*rings, name=None):
    kind = {"classification": {"name": name}} if name else {}
    geometry = {"type": "Polygon", "coordinates": [square(*ring) for ring in rings]}
    return {"type": "Feature", "geometry": geometry, "properties": kind}


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def drawn(tmp_path, *features, **options):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return read_mask(path, (64, 64), 32, **options)


def test_a_hole_erases_only_its_own_polygon(tmp_path):
    ring, island = feature((0, 0, 2048), (512, 512, 1024)), feature((768, 768, 512))
    first, last = drawn(tmp_path, island, ring), drawn(tmp_path, ring, island)
    assert np.array_equal(first, last) and first[32, 32] and not first[20, 20] and first[4, 4]


@pytest.mark.parametrize("name", ["Ignore*", "Background", "ignore"])
def test_classes_that_mean_not_this_are_cut_out(tmp_path, name):
    tissue, other = feature((0, 0, 2048), name="Tumor"), feature((0, 0, 1024), name=name)
    for order in ((tissue, other), (other, tissue)):
        mask = drawn(tmp_path, *order)
        assert mask[50, 50] and not mask[10, 10]


def test_a_class_below_another_is_cut_out(tmp_path):
    """QuPath writes the names of derived classes one by one, or joined by colons."""
    tissue, other = (
        feature((0, 0, 2048), name="Tumor"),
        feature((0, 0, 1024), name="Tumor: Ignore*"),
    )
    assert not drawn(tmp_path, tissue, other)[10, 10]
    other["properties"]["classification"] = {"names": ["Tumor", "Ignore*"]}
    assert not drawn(tmp_path, tissue, other)[10, 10]


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16"])
def test_outlines_in_other_encodings(tmp_path, code):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(feature((0, 0, 1024))), encoding=code)
    assert read_mask(path, (64, 64), 32).sum() == 32**2


@pytest.mark.parametrize("place", [float("nan"), 1e12])
def test_coordinates_that_are_none_are_told(tmp_path, place):
    with pytest.raises(UserError, match="no numbers or lie far outside"):
        drawn(tmp_path, feature((place, 0, 100)))


def test_qupath_counts_from_what_was_scanned(tmp_path):
    """In MIRAX slides the scanned box begins far from the corner of level 0."""
    picture = write_mirax(tmp_path / "a.mrxs")
    (tmp_path / "a.geojson").write_text(json.dumps(feature((205, 205, 1638))))
    with Slide(tmp_path / "a.mrxs") as slide:
        assert slide.origin == (1280, 1024) and picture.shape == (4096, 4096, 3)
        ours = tile_slide(slide)
        theirs = tile_slide(slide, mask=tmp_path / "a.geojson")
        assert theirs.coords.tolist() == ours.coords.tolist() and len(ours.coords) == 36
        write_geojson(tmp_path / "b.geojson", slide, ours)
        again = tile_slide(slide, mask=tmp_path / "b.geojson")
        assert again.coords.tolist() == ours.coords.tolist()


def test_a_lossy_mask_is_cut_at_the_middle(tmp_path):
    values = np.zeros((400, 600), np.uint8)
    values[100:300, 150:450] = 255
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=50)
    mask = read_mask(tmp_path / "a.jpg", (400, 600), 32)
    assert np.array_equal(mask, values > 0)


def hostile(path):
    """Masks that cannot be read, by their names."""
    noise = np.random.default_rng(0).integers(0, 255, (100, 100), np.uint8)
    Image.fromarray(noise).save(path / "cut.png")
    os.truncate(path / "cut.png", 3000)
    (path / "text.png").write_text("hello")
    Image.new("1", (20000, 20000)).save(path / "vast.png")
    (path / "deep.geojson").write_text("[" * 100_000 + "]" * 100_000)
    return "cut.png", "text.png", "vast.png", "deep.geojson"


def test_masks_that_cannot_be_read_are_named(tmp_path):
    for name in hostile(tmp_path):
        with pytest.raises(UserError, match=name):
            read_mask(tmp_path / name, (100, 100), 32)


def test_a_mask_of_another_aspect_is_refused(tmp_path):
    Image.fromarray(np.ones((300, 300), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="another aspect"):
        read_mask(tmp_path / "a.png", (400, 600), 32)


# Thresholds without a cliff ------------------------------------------------------------------


def sharing(tint, fade=1.0):
    """Tissue on glass of a tint, in low power, and where it is."""
    image = np.full((1536, 1536, 3), tint, np.float32)
    tissue = (stained(768, 768) / 245.0) ** fade
    image[384:1152, 384:1152] *= tissue
    noise = np.random.default_rng(0).normal(size=image.shape)
    picture = Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).reduce(16)
    truth = np.zeros((96, 96), bool)
    truth[24:72, 24:72] = True
    return np.asarray(picture), truth


@pytest.mark.parametrize(
    "tint",
    [
        (245, 245, 245),
        (250, 245, 230),
        (250, 243, 222),
        (250, 240, 210),
        (245, 215, 228),
        (210, 225, 240),
        (162, 161, 163),
        (122, 121, 123),
        (80, 80, 82),
    ],
)
@pytest.mark.parametrize("fade", [1, 0.3])
def test_no_tint_of_the_glass_is_tissue(tint, fade):
    image, truth = sharing(tint, fade)
    mask, pen = find_tissue(image, 16)
    assert mask[truth].mean() > 0.97 and mask[~truth].mean() < 0.02 and pen.mean() < 0.01


def test_tissue_cut_out_on_black_is_no_fluorescence(tmp_path):
    image = np.zeros((2048, 2048, 3), np.uint8)
    image[768:1280, 768:1280] = stained(512, 512)
    with Slide(write_slide(tmp_path / "a.svs", image)) as slide:
        assert len(tile_slide(slide).coords) == 4


def test_dense_haematoxylin_is_no_ink():
    image = low_power()
    image[70:90, 70:110] = 245 * 10 ** -np.array([0.84, 0.92, 0.4])
    mask, pen = find_tissue(image, 16)
    assert not pen[68:92, 68:112].any() and mask[70:90, 70:110].all()


def test_patches_kept_hold_tissue_and_tissue_is_kept():
    """On any tint, in the glow of eosin, on black, under pen, faded, overstained, by other stains:
    99.6 % and 99.1 % as measured by `python tests/scenes.py`.
    """
    kinds, _ = scenes.totals(every=4)
    kept, right, wanted, got = sum(kinds.values())
    assert right / kept > 0.985 and got / wanted > 0.985
    for kind in ("dense ducts 0.98", "IHC negative", "cut out on black", "half black", "tint pink"):
        kept, right, wanted, got = kinds[kind]
        assert right / kept > 0.98 and got / wanted > 0.98, kind

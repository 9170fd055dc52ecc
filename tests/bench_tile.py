#!/usr/bin/env python3
"""How fast tile.py is on a slide of yours, beside OpenSlide and FastSlide in the same run.

    python tests/bench_tile.py SLIDE... [--patches 400] [--mpp UM]

For each slide: CPU seconds and memory of segmentation and grid; patches per CPU second by
`Slide.read`, by OpenSlide's read_region with its conversion to RGB (and Pillow), and by FastSlide
where that is installed: native where patches are whole tiles, on the grid of patches in scan and in
random order, off the grid, and resampled to half the scale. Whole JPEG tiles also by simplejpeg
from memory, which nothing that decodes them can outrun. All readers take turns over the same
patches; rates and their ratios are medians over the turns. Off the grid what counts is how many
patches share a tile: few of a large slide share none. Native patches are compared pixel by pixel
with OpenSlide's first; no rate is printed for pixels that differ. At the end the whole command,
from start to exit, and `PatchIndex.read`. Run it on a machine that does nothing else.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openslide
import simplejpeg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from g2l.grid import tile_slide
from g2l.patches import PatchIndex
from g2l.slides import Slide

try:
    import fastslide
except ImportError:
    fastslide = None


def rates(places, *readers, turns: int = 9) -> np.ndarray:
    """(readers, turns) patches per CPU second, with empty caches at the start of each turn."""
    found = np.empty((len(readers), turns))
    for turn in range(turns):
        for number, opened in enumerate(readers):
            read = opened()
            start = time.process_time()
            for place in places:
                read(place)
            found[number, turn] = len(places) / (time.process_time() - start)
    return found


def compare(name: str, path: Path, places: list, side: int, out: int, raw=None) -> None:
    """Prints patches per CPU second of all readers: squares of `side` px resampled to `out`.

    `raw` holds the JPEG files of the patches, where they are tiles.
    """

    def resized(pixels):
        return pixels if side == out else np.asarray(Image.fromarray(pixels).resize((out, out), 3))

    def by_openslide():
        slide = openslide.OpenSlide(str(path))
        return lambda place: resized(
            np.asarray(slide.read_region(place, 0, (side, side)).convert("RGB"))
        )

    def by_fastslide():
        slide = fastslide.FastSlide.from_file_path(str(path))
        return lambda place: resized(slide.read_region(tuple(place), 0, (side, side)).numpy())

    def by_simplejpeg():
        return lambda place: simplejpeg.decode_jpeg(
            raw[tuple(place)], fastdct=False, fastupsample=False
        )

    def ours():
        slide = Slide(path)
        return lambda place: slide.read(*place, side, out)

    readers = {"Slide.read": ours, "OpenSlide": by_openslide}
    if fastslide:
        readers["FastSlide"] = by_fastslide
    if raw:
        readers["simplejpeg alone"] = by_simplejpeg
    found = rates(places, *readers.values())
    text = f"  {name:15} Slide.read {np.median(found[0]):6.0f} patches/s"
    for other, theirs in zip(list(readers)[1:], found[1:], strict=True):
        text += f", {other} {np.median(theirs):6.0f} ({np.median(found[0] / theirs):.2f}x)"
    print(text, flush=True)


def bench(path: Path, patches: int, mpp: float | None) -> None:
    start = time.process_time()
    with Slide(path, mpp=mpp) as slide:
        opened = time.process_time() - start
        mpp = slide.mpp or 0.25
        slide.mpp = mpp
        import scipy.ndimage  # noqa: F401  (paid once a process, counted by the whole command below)

        start = time.process_time()
        tiling = tile_slide(slide, mpp=mpp)
        seconds = time.process_time() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kind = "raw tiles" if slide.levels[0].tiles else "OpenSlide"
        print(
            f"\n{path.name}: {slide.width} x {slide.height}, {len(slide.levels)} levels, read by "
            f"{kind}\n  open {opened * 1e3:.0f} ms; segmentation, grid and blur of "
            f"{len(tiling.coords)} patches: {seconds:.2f} s CPU, {memory:.0f} MB"
        )

        places = tiling.coords[:patches]
        chosen = np.random.default_rng(0).permutation(len(tiling.coords))[:patches]
        size = tiling.size0
        reference = openslide.OpenSlide(str(path))
        for x, y in tiling.coords[chosen[:50]].tolist():
            theirs = np.asarray(reference.read_region((x, y), 0, (size, size)).convert("RGB"))
            if not np.array_equal(theirs, slide.read(x, y, size, size)):
                print("  patches differ from OpenSlide's (transparent pixels?): no rates")
                return
        tiles = slide.levels[0].tiles
        if tiles and tiles.codec.is_jpeg:
            side, raw = tiles.codec.width, {}
            for x, y in np.unique(places // side, axis=0).tolist():
                data = tiles.compressed(slide.file, y * tiles.columns + x)
                raw[x * side, y * side] = tiles.codec.standalone(data)
            compare(f"tiles of {side}", path, list(raw), side, side, raw)
    orders = {
        "scan": (places, size, size),
        "random": (tiling.coords[chosen], size, size),
        "off grid": (tiling.coords[chosen] + 100, size, size),
        "1/2 scale": (np.unique(places // (2 * size), axis=0) * 2 * size, 2 * size, size),
    }
    for name, (where, side, out) in orders.items():
        compare(name, path, where.tolist(), side, out)

    with tempfile.TemporaryDirectory() as folder:
        slides = Path(folder) / "slides"
        slides.mkdir()
        (slides / path.name).symlink_to(path.resolve())
        command = [
            sys.executable,
            str(Path(__file__).resolve().parent.parent / "tile.py"),
            "--cancer",
            "bench",
            "--slides",
            str(slides),
            "--data",
            folder,
            "--mpp",
            str(mpp),
            "--assume-mpp",
            str(mpp),
            "--workers",
            "1",
        ]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"  whole command: {wall:.2f} s from start to exit, "
            f"{after.ru_utime - before.ru_utime:.2f} s CPU, {after.ru_maxrss / 1024:.0f} MB"
        )

        def opened():
            return PatchIndex(Path(folder) / "tiles" / "bench").read

        index = PatchIndex(Path(folder) / "tiles" / "bench")
        order = np.random.default_rng(0).permutation(len(index))[:patches].tolist()
        scan = np.median(rates(range(min(patches, len(index))), opened))
        scattered = np.median(rates(order, opened))
        print(f"  PatchIndex.read: scan {scan:.0f}, random {scattered:.0f} patches/s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--patches", type=int, default=400, help="how many to read for each rate")
    parser.add_argument("--mpp", type=float, help="µm per pixel of slides that do not say")
    args = parser.parse_args()
    for path in args.slides:
        bench(path, args.patches, args.mpp)
    return 0


if __name__ == "__main__":
    sys.exit(main())

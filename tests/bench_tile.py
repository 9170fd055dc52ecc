#!/usr/bin/env python3
"""How fast tile.py is on a slide of yours, beside OpenSlide in the same run.

    python tests/bench_tile.py SLIDE... [--patches 400] [--mpp UM]

For each slide: CPU seconds and memory of segmentation and grid; patches per CPU second in scan
order and in random order, by `Slide.read`, by `PatchIndex.read`, and by OpenSlide's read_region
with its conversion to RGB. Patches are compared pixel by pixel first; no rate is printed for pixels
that differ. At the end the whole command, from start to exit, on the first slide. Run it on a
machine that does nothing else.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from g2l.grid import tile_slide
from g2l.patches import PatchIndex
from g2l.slides import Slide


def rates(places, *readers, repeats: int = 5) -> list[float]:
    """Median patches per CPU second of each reader over `repeats` passes in turn, each with empty
    caches."""
    seconds = [[] for _ in readers]
    for _ in range(repeats):
        for opened, taken in zip(readers, seconds, strict=True):
            read = opened()
            start = time.process_time()
            for place in places:
                read(place)
            taken.append(time.process_time() - start)
    return [len(places) / sorted(taken)[repeats // 2] for taken in seconds]


def bench(path: Path, patches: int, mpp: float | None) -> None:
    import openslide

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
            f"\n{path.name}: {slide.width} x {slide.height}, {len(slide.levels)} levels, read by {kind}"
            f"\n  open {opened * 1e3:.0f} ms; segmentation, grid and blur of {len(tiling.coords)} patches: "
            f"{seconds:.2f} s CPU, {memory:.0f} MB"
        )

        size = tiling.size0

        def plain():
            reference = openslide.OpenSlide(str(path))
            return lambda place: np.asarray(
                reference.read_region(place, 0, (size, size)).convert("RGB")
            )

        def ours():
            opened = Slide(path)
            return lambda place: opened.read(*place, size, size)

        scan = [tuple(place) for place in tiling.coords[:patches].tolist()]
        chosen = np.random.default_rng(0).permutation(len(tiling.coords))[:patches]
        scattered = [tuple(place) for place in tiling.coords[chosen].tolist()]
        if not all(
            np.array_equal(plain()(place), slide.read(*place, size, size))
            for place in scattered[:50]
        ):
            print("  patches differ from OpenSlide's (transparent pixels?): no rates")
            return
        for order, places in (("scan", scan), ("random", scattered)):
            slow, fast = rates(places, plain, ours)
            print(
                f"  {order:6} order: OpenSlide {slow:6.0f} patches/s, Slide.read {fast:6.0f} ({fast / slow:.1f}x)"
            )

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
            f"  whole command: {wall:.2f} s from start to exit, {after.ru_utime - before.ru_utime:.2f} s CPU, "
            f"{after.ru_maxrss / 1024:.0f} MB"
        )

        def opened():
            return PatchIndex(Path(folder) / "tiles" / "bench").read

        index = PatchIndex(Path(folder) / "tiles" / "bench")
        order = np.random.default_rng(0).permutation(len(index))[:patches].tolist()
        (scan,), (scattered,) = rates(range(min(patches, len(index))), opened), rates(order, opened)
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

#!/usr/bin/env python3
"""Where the time of a training step goes, on synthetic patches and random weights.

    python tests/bench_step.py [--plain] [--compile] [--teacher NAME --student NAME]

The parts of distill.py's step first, the device waited for after each; then whole steps, undisturbed. `--plain` times
the same step written plainly too (eager, autocast over fp32 weights, unfused attention and optimizer, torchvision's
transforms), and prints the ratio. All other flags are those of distill.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distill
from distill import Step, build, load_pair
from g2l.arguments import whole
from g2l.augment import BLUR_P, BLUR_SIGMA, BLUR_SIZE, FLIP_P, JITTER, JITTER_P
from g2l.devices import default_workers, describe_device, pick_precision
from g2l.errors import UserError
from g2l.ranks import end_workers, quiet_worker, setup_distributed
from g2l.recipe import Distiller
from g2l.speed import matmul_ceiling
from g2l.stream import Batches


class Synthetic:
    """A patch index of noise, so that speed can be measured without a cohort."""

    slides, patients = ("noise",), ("noise",)

    def __init__(self, patch_size: int):
        self.patch_size, self.counts = patch_size, np.array([1 << 20])
        self.patches = np.random.default_rng(0).integers(
            0, 256, (8, patch_size, patch_size, 3), np.uint8
        )

    def draw(self, seed: int, n: int, by: str = "slide") -> int:
        return n % (1 << 20)

    def locate(self, i: int) -> tuple[int, int]:
        return 0, i

    def read(self, i: int) -> np.ndarray:
        return self.patches[i % 8]


class Plain(torch.utils.data.Dataset):
    """The same patches through torchvision's transforms, one image at a time in the loading processes."""

    def __init__(self, index, crop: int):
        from torchvision.transforms import v2

        self.index = index
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(crop),
                v2.RandomHorizontalFlip(FLIP_P),
                v2.RandomVerticalFlip(FLIP_P),
                v2.RandomApply([v2.ColorJitter(*JITTER)], JITTER_P),
                v2.RandomApply([v2.GaussianBlur(BLUR_SIZE, BLUR_SIGMA)], BLUR_P),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.index.read(i))


def profile(args: argparse.Namespace) -> int:
    """Print where the time of a step goes. Returns the exit status."""
    _, world, device = setup_distributed(args.device)
    if world > 1:
        raise UserError("tests/bench_step.py measures one process; run it without torchrun")
    precision, cuda = pick_precision(args.precision, device), device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    args.weights = args.weights or ["random"]
    index = Synthetic(args.crop * 8 // 7)
    workers = default_workers(args.workers, device)
    images, ceiling = args.batch_size * args.accumulate, matmul_ceiling(device, precision)
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {str(precision).removeprefix('torch.')}; measured "
        f"matmul ceiling {ceiling / 1e12:,.2f} TFLOP/s; {workers} loading processes, batch {args.batch_size}"
        f"{f' x {args.accumulate}' if args.accumulate > 1 else ''}, crop {args.crop}",
        flush=True,
    )

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def report(name: str, parts: dict[str, list[float]], step: float, flops: float) -> None:
        print(
            f"\n{name}: {1000 * step:,.1f} ms a step, {images / step:,.1f} images/s, "
            f"{flops / images / 1e9:,.2f} GFLOP an image, MFU {flops / step / ceiling:.1%} of the ceiling"
            + (
                f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:,.1f} GiB"
                if cuda
                else ""
            )
        )
        total = sum(statistics.median(times) for times in parts.values())
        for part, times in parts.items():
            print(
                f"  {part:16s} {1000 * statistics.median(times):9.2f} ms {statistics.median(times) / total:6.1%}"
            )

    def measure(step, marks: dict[str, list[float]]) -> float:
        """Seconds a step takes: first in parts, with the device waited for after each, then whole and undisturbed."""
        for _ in range(3):
            step(lambda name: None)
        for _ in range(args.steps):
            last, sums = clock(), {}

            def mark(name: str, sums=sums) -> None:
                nonlocal last
                now = clock()
                sums[name], last = sums.get(name, 0.0) + now - last, now

            step(mark)
            for name, seconds in sums.items():
                marks.setdefault(name, []).append(seconds)
        start = clock()
        for _ in range(args.steps):
            step(lambda name: None)
        return (clock() - start) / args.steps

    teacher, student = load_pair(args, device, precision)
    distiller, flops = build(args, teacher, student, device, 1)
    print(
        f"{args.teacher} ({teacher.parameters_count / 1e6:,.1f} M) into {args.student} "
        f"({student.parameters_count / 1e6:,.1f} M)",
        flush=True,
    )
    one = Step(teacher, distiller, args, device, precision)
    dataset = Batches(
        index,
        np.zeros(1, bool),
        seed=args.seed,
        batch_size=args.batch_size,
        crop=args.crop,
        by="slide",
    )
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(1 << 20),
            num_workers=workers,
            pin_memory=cuda,
            worker_init_fn=quiet_worker,
        )
    )

    def ours(mark) -> None:
        one.mark = mark
        one([next(loader)[:2] for _ in range(args.accumulate)], args.lr, args.weight_decay)

    parts: dict[str, list[float]] = {}
    seconds = measure(ours, parts)
    report("this step" + (", compiled" if args.compile else ""), parts, seconds, flops)
    if not args.plain:
        return 0

    from timm.layers import set_fused_attn, use_fused_attn

    one = loader = teacher = student = distiller = None  # room for the other
    end_workers()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    args.compile, before = False, use_fused_attn()
    set_fused_attn(False)  # read by layers as they are built
    teacher, student = load_pair(args, device, torch.float32)
    set_fused_attn(before)
    for model in (teacher, student):
        model.to(memory_format=torch.contiguous_format)
    distiller = Distiller(student, student.dim, teacher.dim, args).to(device)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.lr, foreach=False, fused=False)
    stream = iter(
        torch.utils.data.DataLoader(
            Plain(index, args.crop),
            batch_size=args.batch_size,
            num_workers=workers,
            shuffle=False,
            pin_memory=cuda,
            worker_init_fn=quiet_worker,
        )
    )

    def plain(mark) -> None:
        optimizer.zero_grad()
        for _ in range(args.accumulate):
            crops = next(stream).to(device)
            mark("data, augmented")
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                with torch.no_grad():
                    target = teacher(teacher.normalize(crops))
                mark("teacher")
                features = student(student.normalize(crops))
                mark("student forward")
                s, t = (
                    F.batch_norm(x.float(), None, None, training=True, eps=1e-4)
                    for x in (features @ distiller.projector, target)
                )
                loss = ((s - t).abs() ** args.alpha).sum().log() / args.accumulate
                mark("loss")
            loss.backward()
            mark("backward")
        optimizer.step()
        loss.item()
        mark("optimizer")

    parts = {}
    plain_seconds = measure(plain, parts)
    report(
        "the same step written plainly (eager, autocast over fp32 weights, unfused attention, optimizer and loss, "
        "torchvision's transforms)",
        parts,
        plain_seconds,
        flops,
    )
    print(f"\nthis step is {plain_seconds / seconds:.2f} times as fast as the plain one")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse distill.py's flags and two more; returns the exit status."""
    parser = distill.build_parser()
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument(
        "--plain", action="store_true", help="time the same step written plainly too"
    )
    parser.add_argument("--steps", type=whole, default=10, help="steps timed")
    args = parser.parse_args(argv)
    try:
        return profile(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        end_workers()


if __name__ == "__main__":
    sys.exit(main())

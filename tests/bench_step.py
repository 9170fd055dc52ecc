#!/usr/bin/env python3
"""Where the time of a training step goes, on synthetic patches and random weights.

    python tests/bench_step.py [--plain] [--compile] [--teacher NAME --student NAME]

The parts of distill.py's step first, the device waited for after each; then whole steps,
undisturbed. `--plain` times the same step written plainly too (eager, autocast over fp32 weights,
unfused attention and optimizer, torchvision's transforms), and prints the ratio. All other flags
are those of distill.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distill
from distill import load_models
from g2l import recipe
from g2l.arguments import whole
from g2l.augment import BLUR_P, BLUR_SIGMA, BLUR_SIZE, FLIP_P, JITTER, JITTER_P
from g2l.devices import default_workers, describe_device, pick_precision
from g2l.errors import UserError
from g2l.ranks import end_workers, quiet_worker, setup_distributed
from g2l.recipe import Distiller, Step, build
from g2l.remote import Link
from g2l.speed import matmul_ceiling
from g2l.stream import Batches, load

Mark = Callable[[str], object]


class Synthetic:
    """A patch index of noise, so that speed can be measured without a cohort."""

    slides, patients = ("noise",), ("noise",)

    def __init__(self, patch_size: int):
        self.patch_size, self.counts = patch_size, np.array([1 << 20])
        self.link = Link(())
        shape = (8, patch_size, patch_size, 3)
        self.patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def ahead(self, chosen) -> None:
        """Nothing is fetched."""

    def draw(self, seed: int, n: int, by: str = "slide") -> int:
        return n % (1 << 20)

    def locate(self, i: int) -> tuple[int, int]:
        return 0, i

    def read(self, i: int) -> np.ndarray:
        return self.patches[i % 8]


class PlainPatches(torch.utils.data.Dataset):
    """The same patches through torchvision's transforms, one at a time in the loading processes."""

    def __init__(self, index: Synthetic, crop: int):
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


class OurStep:
    """One step as distill.py takes it."""

    def __init__(self, args: Namespace, device: torch.device, precision: torch.dtype):
        self.args = args
        teachers, student = load_models(args, device, precision)
        distiller, self.flops = build(args, teachers, student)
        self.step = Step(teachers, distiller, args, device, precision)
        batches = Batches(
            Synthetic(args.crop * 8 // 7),
            np.zeros(1, bool),
            seed=args.seed,
            batch_size=args.batch_size,
            crop=args.crop,
            by="slide",
        )
        workers = default_workers(args.workers, device)
        self.stream = load(batches, range(1 << 20), workers, device.type == "cuda")
        self.mark: Mark = str
        self._watch(distiller)

    def _watch(self, distiller: Distiller) -> None:
        """Mark the parts of a step from outside: after each function that does one of them."""
        augment, rows = recipe.augment, recipe.look

        def augment_marked(*args):
            self.mark("data")
            crops = augment(*args)
            self.mark("augmentation")
            return crops

        def rows_marked(model, *args):
            found = rows(model, *args)
            self.mark("student forward" if model is distiller.student else "teacher")
            return found

        recipe.augment, recipe.look = augment_marked, rows_marked
        loss = distiller.loss

        def loss_marked(*args):
            value = loss(*args)
            self.mark("loss")
            return value

        distiller.loss = loss_marked  # type: ignore[method-assign]

        def backward_ended(*_) -> None:
            self.mark("backward")

        def step_ended(*_) -> None:
            self.mark("optimizer")

        self.step.optimizer.register_step_pre_hook(backward_ended)
        self.step.optimizer.register_step_post_hook(step_ended)

    def __call__(self, mark: Mark) -> None:
        self.mark = mark
        batches = [next(self.stream)[:2] for _ in range(self.args.accumulate)]
        self.step(batches, self.args.lr, self.args.weight_decay)


class PlainStep:
    """The same step as one would write it first."""

    def __init__(self, args: Namespace, device: torch.device, precision: torch.dtype):
        from timm.layers import set_fused_attn, use_fused_attn

        self.args, self.device = args, device
        self.autocast = precision == torch.bfloat16
        before = use_fused_attn()
        set_fused_attn(False)  # read by layers as they are built
        (self.teacher,), self.student = load_models(args, device, torch.float32)
        set_fused_attn(before)
        for model in (self.teacher, self.student):
            model.to(memory_format=torch.contiguous_format)
        self.distiller = Distiller(self.student, self.student.dim, [self.teacher.dim], args)
        self.distiller.to(device)
        self.optimizer = torch.optim.AdamW(
            self.distiller.parameters(), lr=args.lr, foreach=False, fused=False
        )
        loader = torch.utils.data.DataLoader(
            PlainPatches(Synthetic(args.crop * 8 // 7), args.crop),
            batch_size=args.batch_size,
            num_workers=default_workers(args.workers, device),
            pin_memory=device.type == "cuda",
            worker_init_fn=quiet_worker,
        )
        self.stream = iter(loader)

    def __call__(self, mark: Mark) -> None:
        self.optimizer.zero_grad()
        for _ in range(self.args.accumulate):
            crops = next(self.stream).to(self.device)
            mark("data, augmented")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self._loss(crops, mark) / self.args.accumulate
            loss.backward()
            mark("backward")
        self.optimizer.step()
        loss.item()
        mark("optimizer")

    def _loss(self, crops: torch.Tensor, mark: Mark) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(self.teacher.normalize(crops))
        mark("teacher")
        features = self.student(self.student.normalize(crops)) @ self.distiller.projector
        mark("student forward")
        s, t = (
            F.batch_norm(x.float(), None, None, training=True, eps=1e-4) for x in (features, target)
        )
        loss = ((s - t).abs() ** self.args.alpha).sum().log()
        mark("loss")
        return loss


class Stopwatch:
    """Seconds between marks, the device waited for at each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, name: str) -> None:
        now = self.now()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now


def measure(step: Callable[[Mark], None], device: torch.device, steps: int):
    """(median seconds of each part of a step, seconds of a whole step undisturbed)."""
    for _ in range(3):
        step(str)
    watches = []
    for _ in range(steps):
        watches.append(Stopwatch(device))
        step(watches[-1].mark)
    names = watches[0].parts
    parts = {name: statistics.median(watch.parts[name] for watch in watches) for name in names}
    watch = Stopwatch(device)
    for _ in range(steps):
        step(str)
    watch.mark("all")
    return parts, watch.parts["all"] / steps


def report(name: str, parts: dict, seconds: float, args: Namespace, flops: float, ceiling: float):
    """Print one way of taking a step."""
    images = args.batch_size * args.accumulate
    text = (
        f"\n{name}: {1000 * seconds:,.1f} ms a step, {images / seconds:,.1f} images/s, "
        f"{flops / images / 1e9:,.2f} GFLOP an image, MFU {flops / seconds / ceiling:.1%} of the "
        "ceiling"
    )
    if torch.cuda.is_initialized():
        text += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:,.1f} GiB"
    print(text)
    total = sum(parts.values())
    for part, median in parts.items():
        print(f"  {part:16s} {1000 * median:9.2f} ms {median / total:6.1%}")


def profile(args: Namespace) -> int:
    """Print where the time of a step goes. Returns the exit status."""
    _, world, device = setup_distributed(args.device)
    if world > 1:
        raise UserError("tests/bench_step.py measures one process; run it without torchrun")
    precision = pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True
    ceiling = matmul_ceiling(device, precision)
    print(
        f"{describe_device(device)}, torch {torch.__version__}, "
        f"{str(precision).removeprefix('torch.')}; measured matmul ceiling "
        f"{ceiling / 1e12:,.2f} TFLOP/s; {default_workers(args.workers, device)} loading "
        f"processes, batch {args.batch_size} x {args.accumulate}, crop {args.crop}\n"
        f"{args.teacher[0]} into {args.student}",
        flush=True,
    )
    ours = OurStep(args, device, precision)
    flops = ours.flops
    parts, seconds = measure(ours, device, args.steps)
    how = "this step" + (", compiled" if args.compile else "")
    report(how, parts, seconds, args, flops, ceiling)
    if not args.plain:
        return 0
    del ours  # room for the other
    end_workers()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    parts, plain_seconds = measure(PlainStep(args, device, precision), device, args.steps)
    how = (
        "the same step written plainly (eager, autocast over fp32 weights, unfused attention, "
        "optimizer and loss, torchvision's transforms)"
    )
    report(how, parts, plain_seconds, args, flops, ceiling)
    print(f"\nthis step is {plain_seconds / seconds:.2f} times as fast as the plain one")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse distill.py's flags and two more; returns the exit status."""
    parser = distill.build_parser()
    parser.description = __doc__.split("\n\n")[0]
    parser.set_defaults(weights=["random"])
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

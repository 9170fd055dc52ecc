"""TODO."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator


class SlideProgress:
    """A bar on a terminal; in a log a line per slide, and now and then one for a long download."""

    def __init__(self, total: int):
        self.total, self.done, self.bytes, self.bar = total, 0, 0, None
        self.start = self.said = time.time()
        if total and sys.stderr.isatty() and not int(os.environ.get("RANK", 0)):
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="slide", dynamic_ncols=True, smoothing=0.05)

    def slide(self, row: dict) -> None:
        self.done, self.said = self.done + 1, time.time()
        what = f"{int(row['patches']):,} patches" if row["status"] == "done" else row["reason"]
        text = f"{row['slide']}: {row['status']}, {what}" + (
            f" ({row['warnings']})" if row.get("warnings") else ""
        )
        if self.bar is not None:
            self.bar.update()
            self.bar.write(text)
        else:
            left = (self.said - self.start) / self.done * (self.total - self.done) / 60
            print(
                f"[{self.done}/{self.total}] {text}"
                + (f"; {left:.0f} min left" if left > 2 else ""),
                flush=True,
            )

    def fetched(self, n: int) -> None:
        self.bytes += n
        text = f"{self.bytes / 1e9:.2f} GB fetched, {self.bytes / 1e6 / (time.time() - self.start):.1f} MB/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif time.time() - self.said > 60:
            self.said = time.time()
            print(text, flush=True)


@contextlib.contextmanager
def image_progress(total: int, done: int, world: int, kind: str) -> Iterator:
    """Yields a function to call once per item of this rank; other ranks are taken to be as fast."""
    if kind == "none":
        yield lambda: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, unit="image", smoothing=0.05) as bar:
            yield lambda: bar.update(min(world, total - bar.n))
    else:
        count, start, shown = 0, time.monotonic(), time.monotonic()

        def tick():
            nonlocal count, shown
            count += 1
            now, at = time.monotonic(), min(total, done + count * world)
            if now - shown > 15 or count * world >= total - done > (count - 1) * world:
                shown = now
                rate = count * world / (now - start)
                print(
                    f"features: {at:,} of {total:,}, {rate:.1f} a second, {(total - at) / rate:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield tick


class StepProgress:
    """One line of progress: rewritten on a terminal, repeated now and then in a log."""

    def __init__(self, steps: int, first: int, flops: float, ceiling: float, images: int):
        self.steps, self.flops, self.ceiling, self.images = steps, flops, ceiling, images
        self.start = self.shown = time.monotonic()
        self.times = deque([(self.start, first)], maxlen=50)
        self.rate = self.mfu = 0.0
        self.terminal = sys.stdout.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def show(self, row: dict) -> None:
        now, step = time.monotonic(), row["step"]
        self.times.append((now, step))
        (then, before) = self.times[0]
        pace = (step - before) / max(1e-9, now - then)
        self.rate, self.mfu = (
            round(pace * self.images, 2),
            round(pace * self.flops / self.ceiling, 4),
        )
        if now - self.shown < (0.2 if self.terminal else 5) and step < self.steps:
            return
        self.shown = now
        left = int((self.steps - step) / pace) if pace else 0
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.1f}"
        line = (
            f"step {step}/{self.steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  {rate} img/s  "
            f"MFU {self.mfu:.0%}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        print(
            f"\r{line}\033[K" if self.terminal else line,
            end="" if self.terminal else "\n",
            flush=True,
        )

    def note(self, text: str) -> None:
        print(f"\r{text}\033[K" if self.terminal else text, flush=True)

    def end(self) -> None:
        if self.terminal:
            print(flush=True)

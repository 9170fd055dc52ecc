"""The one progress line: a bar on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Progress:
    """How far a long piece of work is: count, rate, time left, and a text of the caller's.

    `total` units of work called `unit`, `done` of them before this run; `interval`: seconds between
    lines in a log; `shown`: False on all ranks but the one that speaks. Use it as a context
    manager, or close it.
    """

    total: int
    unit: str
    done: int = 0
    interval: float = 15
    shown: bool = True

    def __post_init__(self) -> None:
        self.bar = None
        self.start = self.said = time.monotonic()
        self.recent = deque([(self.start, self.done)], maxlen=50)
        if self.shown and self.total > self.done and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total,
                initial=self.done,
                unit=self.unit,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    @property
    def seconds(self) -> float:
        """Since this run began."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Units a second over the last fifty steps."""
        (then, before), (now, done) = self.recent[0], self.recent[-1]
        return (done - before) / (now - then) if now > then else 0.0

    @property
    def left(self) -> str:
        """Time to the end at this rate, as h:mm:ss."""
        seconds = int((self.total - self.done) / self.rate) if self.rate else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def step(self, count: int = 1, text: str = "") -> None:
        """`count` more units are done."""
        now = time.monotonic()
        self.done = min(self.done + count, self.total)
        self.recent.append((now, self.done))
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)
            self.bar.set_postfix_str(text, refresh=False)
        elif self.shown and (now - self.said > self.interval or self.done == self.total):
            self.said = now
            rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
            line = f"{self.unit} {self.done:,} of {self.total:,}, {rate} a second, {self.left} left"
            print(f"{line}; {text}" if text else line, file=sys.stderr)

    def note(self, text: str) -> None:
        """A line of its own, on standard output, without breaking the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.shown:
            print(text)

    def close(self) -> None:
        """Leave the terminal's line as it stands."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

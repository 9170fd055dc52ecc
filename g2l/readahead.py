"""Patches read ahead of the network, by processes of their own, into memory that both sides share.

Process w of W reads batches w, w + W, ... of the stream, each into the next of its few places, and
tells through a pipe when one is there; it is told when the place is free again. Nothing but these
messages goes through the pipe, and no space in /dev/shm is asked for. `ahead` does the rest beside
the network: a thread takes the batches and prepares them.
"""

import contextlib
import mmap
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy import ndarray

from g2l import ranks
from g2l.errors import PatchError, UserError
from g2l.patches import PatchIndex

FORK = multiprocessing.get_context("fork")
PLACES = 3  # batches that one process reads ahead


@dataclass
class Batch:
    """Patches of a stream; `images` are valid until the next batch is asked for."""

    images: ndarray  # uint8 (b, P, P, 3)
    readable: ndarray  # bool (b,)
    problems: dict[int, str]  # by slide: the first patch that could not be read, and why
    seconds: float  # of reading


def read_batches(index: PatchIndex, numbers: ndarray, size: int, workers: int) -> Iterator[Batch]:
    """The patches `numbers` of an index in their order, `size` at a time, by so many processes.

    The processes are started at once, before there are threads; without any, patches are read when
    asked for. A slide whose file kills its reader is given up, the others go on.
    """
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    readers = [Reader(index, parts[w::workers], size) for w in range(min(workers, len(parts)))]
    if readers:
        return (readers[m % workers].next() for m in range(len(parts)))
    images = np.empty((size, index.patch_size, index.patch_size, 3), np.uint8)
    hand = np.zeros(1, np.int64)
    return (read(index, part, images[: len(part)], set(), hand) for part in parts)


def read(
    index: PatchIndex, numbers: ndarray, images: ndarray, lost: set[int], hand: ndarray
) -> Batch:
    """Patches into `images`; those of the slides `lost` are left out. `hand`: which one is read."""
    start = time.monotonic()
    problems: dict[int, str] = {}
    readable = np.ones(len(numbers), bool)
    for place, number in enumerate(numbers.tolist()):
        hand[0] = number
        slide, _ = index.locate(number)
        try:
            if slide in lost:
                raise PatchError(f"{index.slides[slide]}: reading it killed the reader")
            images[place] = index.read(number)
        except PatchError as error:
            images[place] = 0
            readable[place] = False
            problems.setdefault(slide, str(error))
    return Batch(images, readable, problems, time.monotonic() - start)


class Reader:
    """A process that reads batches ahead. `next` gives the next one, and frees the one before."""

    def __init__(self, index: PatchIndex, parts: list[ndarray], size: int):
        self.index = index
        self.parts = parts
        shape = PLACES, size, index.patch_size, index.patch_size, 3
        memory = mmap.mmap(-1, 8 + int(np.prod(shape)))
        self.hand = np.frombuffer(memory, np.int64, 1)
        self.images = np.frombuffer(memory, np.uint8, offset=8).reshape(shape)
        self.lost: set[int] = set()
        self.given = 0
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process: Any = FORK.Process(target=self._work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def _work(self, pipe: Connection) -> None:
        """The process's life: from the first batch that has not been given to the last."""
        self.pipe.close()
        ranks.quiet_worker(0)
        with contextlib.suppress(EOFError, ConnectionError):  # nobody wants more
            for m in range(self.given, len(self.parts)):
                if m - self.given >= PLACES:
                    pipe.recv()
                part = self.parts[m]
                images = self.images[m % PLACES]
                for coming in self.parts[m : m + 2]:
                    self.index.ahead(coming.tolist())
                found = read(self.index, part, images[: len(part)], self.lost, self.hand)
                pipe.send((found.readable, found.problems, found.seconds))

    def next(self) -> Batch:
        """The next batch; UserError where the process stands still or was killed."""
        if self.given:
            with contextlib.suppress(BrokenPipeError):
                self.pipe.send(None)
        while True:
            try:
                if not self.pipe.poll(ranks.WAIT):
                    text = f"the process that reads patches gave nothing for {ranks.WAIT:.0f} s"
                    raise UserError(text, mend="stuck")
                found = self.pipe.recv()
                break
            except (EOFError, ConnectionResetError):
                self._bury()
        part = self.parts[self.given]
        images = self.images[self.given % PLACES]
        self.given += 1
        return Batch(images[: len(part)], *found)

    def _bury(self) -> None:
        """The process died: go on without the slide that it was reading."""
        self.process.join()
        if self.process.exitcode == -signal.SIGKILL:
            raise ConnectionError("a reader was killed")
        self.lost.add(self.index.locate(int(self.hand[0]))[0])
        self._start()


def ahead(items: Iterator, count: int) -> Iterator:
    """The items of an iterator, which a thread makes up to `count` ahead."""
    maker = ThreadPoolExecutor(1)
    waiting = deque(maker.submit(next, items, None) for _ in range(count))
    try:
        while (item := waiting.popleft().result()) is not None:
            waiting.append(maker.submit(next, items, None))
            yield item
    finally:
        readers = multiprocessing.active_children()
        for reader in readers:
            reader.kill()  # the thread would wait for one that is stuck
        maker.shutdown(wait=bool(readers), cancel_futures=True)  # or itself be stuck

"""Worker processes that take items one by one. A death costs the item in hand, never the run.

`Pool` forks its workers, hands each one item at a time through a pipe, and yields what comes back.
A worker whose parent dies finishes its item and ends; a parent that leaves the `with` block ends
its workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

FORK = multiprocessing.get_context("fork")


class Pool:
    """`count` processes that call `work(item, tell)`; what `tell` is given reaches the parent at
    once.

    An OSError out of `work` means that nothing more can be done (a full disk): no further item is
    handed out, and it is raised when the items in hand are through.
    """

    def __init__(self, work: Callable[[Any, Callable[[Any], None]], Any], count: int):
        self.work = work
        self.count = count
        self.waiting: deque = deque()
        self.running: dict[Connection, tuple[Any, Any]] = {}  # pipe: (process, item in hand)
        self.fatal: OSError | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for process, _item in self.running.values():
            process.terminate()

    def each(self, items: Iterable) -> Iterator[tuple[Any, str, Any]]:
        """Yields (item, "told", what), (item, "answer", what `work` returned), (item, "died", exit
        code).
        """
        self.waiting.extend(items)
        for _ in range(min(self.count, len(self.waiting))):
            self._start()
        while self.running:
            for pipe in multiprocessing.connection.wait(list(self.running)):
                event = self._receive(pipe)
                if event[1] != "fatal":
                    yield event
        if self.fatal:
            raise self.fatal

    def _start(self) -> None:
        ours, theirs = FORK.Pipe()
        inherited = [ours, *self.running]
        process = FORK.Process(target=_serve, args=(theirs, inherited, self.work), daemon=True)
        process.start()
        theirs.close()
        self._hand_out(ours, process)

    def _hand_out(self, pipe: Connection, process: Any) -> None:
        """The next item to a worker, or None, which ends it."""
        item = self.waiting.popleft() if self.waiting else None
        self.running[pipe] = process, item
        with contextlib.suppress(BrokenPipeError):  # dead already: the next receive tells
            pipe.send(item)
        if item is None:
            del self.running[pipe]
            process.join()

    def _receive(self, pipe: Any) -> tuple[Any, str, Any]:
        process, item = self.running[pipe]
        try:
            kind, content = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            del self.running[pipe]
            if self.waiting:
                self._start()
            return item, "died", process.exitcode
        if kind == "fatal":
            self.fatal = content
            self.waiting.clear()
        if kind != "told":
            self._hand_out(pipe, process)
        return item, kind, content


def _serve(pipe: Connection, inherited: list[Connection], work: Callable) -> None:
    """A worker's life."""
    for end in inherited:  # were they open here, nobody would notice the parent's death
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us

    def tell(what: Any) -> None:
        pipe.send(("told", what))

    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone: so are we
        while (item := pipe.recv()) is not None:
            try:
                answer = "answer", work(item, tell)
            except BrokenPipeError:
                raise
            except OSError as error:
                answer = "fatal", OSError(error.errno, f"{item}: {error}")
            pipe.send(answer)

#!/usr/bin/env python3
"""How fast patches come from slides that are served: distill.py's loader over a simulated link.

    python tests/bench_remote.py [--slides 48] [--workers 8] [--batches 900] [--data DIR]

A server on this machine answers each request after 50 ms and sends 400 Mbit/s in all, to every
connection its share. Slides are drawn (JPEG tiles of 256 px), tiled by `tile.py --remote`, and
read by `stream.load` in the order of distill.py: without a cache, into an empty one, out of the
full one, and the same patches from the slides on disk, long enough that the start of the loading
processes counts for little. Prints patches a second, bytes read, hits, the share of the loaders'
time that they waited for the link, and CPU time of the loaders and of the server, which shares
their cores. Given a folder, slides and coordinates are kept there for the next time.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from synthetic import cut_out, stained, write_slide

import tile
from g2l import remote
from g2l.patches import PatchIndex
from g2l.remote import RemoteFile
from g2l.stream import Batches, load


class Link:
    """Latency and one rate for all connections, which take turns."""

    def __init__(self, folder, latency, rate):
        self.folder, self.latency, self.rate = folder, latency, rate
        self.free = 0.0

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1].rpartition("/")[2]
                span = head.lower().partition("range: bytes=")[2].splitlines()[0]
                first, last = map(int, span.split("-"))
                with open(self.folder / path, "rb") as file:
                    size = file.seek(0, 2)
                    file.seek(first)
                    data = file.read(last + 1 - first)
                now = time.monotonic()
                self.free = max(self.free, now) + len(data) / self.rate
                await asyncio.sleep(self.latency + self.free - now)
                head = (
                    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(data)}\r\n"
                    f'ETag: "1"\r\nContent-Range: bytes {first}-{last}/{size}\r\n\r\n'
                )
                writer.write(head.encode() + data)
        writer.close()


async def serve(folder, latency, rate, port):
    link = Link(folder, latency, rate)
    server = await asyncio.start_server(link.serve, "127.0.0.1", port, backlog=500)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Timed:
    """The time that the thread which reads patches waits for the link, and its requests."""

    def __init__(self):
        self.waited, self.requests = 0.0, 0
        result, fetch, inner = Future.result, RemoteFile._fetch, remote.Link.fetch
        Future.result = lambda *args: self.wait(result, *args)
        RemoteFile._fetch = lambda *args: self.wait(fetch, *args)
        remote.Link.fetch = lambda *args: self.count(inner, *args)

    def wait(self, work, *args):
        if threading.current_thread() is not threading.main_thread():
            return work(*args)
        start = time.monotonic()
        try:
            return work(*args)
        finally:
            self.waited += time.monotonic() - start

    def count(self, work, *args):
        self.requests += 1
        return work(*args)


class Counted(Batches):
    """Batches whose list of unreadable patches ends with what the link counted."""

    timed = None

    def __getitem__(self, number):
        Counted.timed = Counted.timed or Timed()  # in this process
        start, waited, requests = time.monotonic(), self.timed.waited, self.timed.requests
        images, params, unreadable = super().__getitem__(number)
        counts = dict(self.index.link.counts) | {"seconds": time.monotonic() - start}
        counts["waited"] = self.timed.waited - waited
        counts["requests"] = self.timed.requests - requests
        self.index.link.counts.clear()
        return images, params, [*unreadable, json.dumps(counts)]


def cpu_of(server):
    """CPU seconds of (this process and the loaders that have ended, the server)."""
    ours = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        ours += used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return np.array([ours, sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")])


def measure(name, folder, args, server, cache=0):
    index = PatchIndex(folder, cache=cache)
    batches = Counted(index, np.zeros(len(index.slides), bool), 0, 32, 224, "slide")
    total, problems, drawn = {}, 0, set()
    start, used = time.monotonic(), cpu_of(server)
    for _, params, (*unreadable, counts) in load(batches, range(args.batches), args.workers, False):
        problems += len(unreadable)
        drawn.update(params.pixels.tolist())
        for key, value in json.loads(counts).items():
            total[key] = total.get(key, 0) + value
    seconds = time.monotonic() - start
    used = cpu_of(server) - used
    count = args.batches * 32
    text = f"{name:26} {count / seconds:6.0f} patches/s"
    if tiles := total.get("tiles"):
        text += (
            f", {total.get('bytes', 0) / 1e6:.1f} MB in {total.get('requests', 0):.0f} requests, "
            f"{total.get('hits', 0) / tiles:.0%} hits, "
            f"{total.get('waited', 0) / total['seconds']:.0%} of loaders' time waited"
        )
    text += (
        f"; CPU ms a patch: loaders {1e3 * used[0] / count:.2f}, server {1e3 * used[1] / count:.2f}"
    )
    print(f"{text}; {1 - len(drawn) / count:.0%} drawn again, {problems} unreadable", flush=True)


def draw_slides(folder, args):
    """Slides of one picture, which differ in name alone: nobody looks further."""
    folder.mkdir(parents=True)
    part = stained(args.side // 4, args.side // 4)
    first = write_slide(folder / "0.svs", cut_out(np.tile(part, (4, 4, 1))))
    for number in range(1, args.slides):
        os.link(first, folder / f"{number}.svs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--slides", type=int, default=48)
    parser.add_argument("--side", type=int, default=12288, help="px of a slide")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=900, help="of 32 patches")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--rate", type=float, default=400, help="Mbit/s")
    parser.add_argument("--data", type=Path, help="folder in which all is kept")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        folder, latency, rate, port = args.serve
        return asyncio.run(serve(Path(folder), float(latency), float(rate), int(port)))
    with tempfile.TemporaryDirectory() as place:
        bench(args.data or Path(place), args)
    return 0


def bench(data, args):
    folder = data / "slides" / "disk"
    if not folder.exists():
        draw_slides(folder, args)
    addresses = data / "list.txt"  # its port is taken again
    port = (
        addresses.read_text().partition("/0.svs")[0].rpartition(":")[2] if addresses.exists() else 0
    )
    # No child of multiprocessing: a loader that ends takes those with it.
    link = map(str, (folder, args.latency, args.rate * 125_000, port))
    command = [sys.executable, __file__, "--serve", *link]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        addresses.write_text("".join(f"{url}/{path.name}\n" for path in sorted(folder.iterdir())))
        for name, more in (("disk", []), ("link", ["--remote", str(addresses)])):
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                status = tile.main(["--cancer", name, "--data", str(data), "--workers", "2", *more])
            assert status == 0
            print(f"tile.py, {name}: {time.monotonic() - start:.1f} s", flush=True)
        for path in (data / "tiles" / "link").glob("cache*"):
            path.unlink()
        for name, cache in (("no cache", 0), ("empty cache", 1 << 30), ("full cache", 1 << 30)):
            measure(f"served, {name}", data / "tiles" / "link", args, server, cache)
        measure("from disk", data / "tiles" / "disk", args, server)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())

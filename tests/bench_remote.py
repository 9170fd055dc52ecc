#!/usr/bin/env python3
"""How fast patches come from slides that are served: distill.py's loader over a simulated link.

    python tests/bench_remote.py [--slides 12] [--workers 8] [--batches 120]

A server on this machine answers each request after 50 ms and sends 400 Mbit/s in all, to every
connection its share. Slides are drawn (JPEG tiles of 256 px), tiled by `tile.py --remote`, and read
by `stream.load` in the order of distill.py: a first run with an empty cache, a second that finds
all there, and the same patches from the slides on disk. Prints patches a second, bytes read, hits,
and the share of the loaders' time that they waited for the link.
"""

import argparse
import asyncio
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from synthetic import section, write_slide

import tile
from g2l.patches import PatchIndex
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


async def serve(folder, latency, rate):
    link = Link(folder, latency, rate)
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0, backlog=500)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Counted(Batches):
    """Batches whose list of unreadable patches ends with what the link counted."""

    def __getitem__(self, number):
        start = time.monotonic()
        images, params, unreadable = super().__getitem__(number)
        counts = dict(self.index.link.counts) | {"seconds": time.monotonic() - start}
        self.index.link.counts.clear()
        return images, params, [*unreadable, json.dumps(counts)]


def measure(name, folder, args, cache=0):
    index = PatchIndex(folder, cache=cache)
    batches = Counted(index, np.zeros(len(index.slides), bool), 0, 32, 224, "slide")
    total, problems, start = {}, 0, time.monotonic()
    for _, _, (*unreadable, counts) in load(batches, range(args.batches), args.workers, False):
        problems += len(unreadable)
        for key, value in json.loads(counts).items():
            total[key] = total.get(key, 0) + value
    seconds = time.monotonic() - start
    text = f"{name:22} {args.batches * 32 / seconds:6.0f} patches/s"
    if tiles := total.get("tiles"):
        text += (
            f", {total.get('bytes', 0) / 1e6:.1f} MB in {total.get('requests', 0):.0f} requests, "
            f"{total.get('hits', 0) / tiles:.0%} hits, "
            f"{total.get('waited', 0) / total['seconds']:.0%} of loaders' time waited"
        )
    print(text + f", {problems} unreadable", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--side", type=int, default=6144, help="px of a slide")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=120, help="of 32 patches")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--rate", type=float, default=400, help="Mbit/s")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        folder, latency, rate = args.serve
        return asyncio.run(serve(Path(folder), float(latency), float(rate)))
    with tempfile.TemporaryDirectory() as place:
        data = Path(place)
        folder = data / "slides" / "disk"
        folder.mkdir(parents=True)
        first = write_slide(folder / "0.svs", section(args.side, args.side)).read_bytes()
        for number in range(1, args.slides):
            (folder / f"{number}.svs").write_bytes(first + bytes([number]))
        # No child of multiprocessing: a loader that ends takes those with it.
        link = map(str, (folder, args.latency, args.rate * 125_000))
        command = [sys.executable, __file__, "--serve", *link]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        addresses = "".join(f"{url}/{path.name}\n" for path in sorted(folder.iterdir()))
        (data / "list.txt").write_text(addresses)
        for name, more in (("disk", []), ("link", ["--remote", str(data / "list.txt")])):
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                status = tile.main(["--cancer", name, "--data", str(data), "--workers", "2", *more])
            assert status == 0
            print(f"tile.py, {name}: {time.monotonic() - start:.1f} s", flush=True)
        measure("served, first run", data / "tiles" / "link", args, 1 << 30)
        measure("served, second run", data / "tiles" / "link", args, 1 << 30)
        measure("from disk", data / "tiles" / "disk", args)
        server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())

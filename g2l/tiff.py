"""Compressed tiles of TIFF files, found once and decoded without a library's way around them.

`Tiles` knows where the tiles of a page lie, `Codec` turns one into pixels as OpenSlide would,
`assemble` cuts a rectangle out of them, `Recent` keeps those that neighbours share.
"""

import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from g2l.errors import PatchError


@dataclass(frozen=True)
class Codec:
    """Decodes compressed tiles as OpenSlide does, pixel for pixel, without its 3 ms a tile.

    `prefix` goes before a JPEG tile in place of its first two bytes: the tables it shares with the
    other tiles and the marker that names its colour space. The decoder is strict: what makes
    OpenSlide fail is an error here too.
    """

    JPEG: ClassVar = 7
    JP2K_YCBCR: ClassVar = 33003
    JP2K_RGB: ClassVar = 33005
    ADOBE: ClassVar = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"

    compression: int
    prefix: bytes
    width: int
    height: int

    @property
    def is_jpeg(self) -> bool:
        return self.compression == self.JPEG

    def holds(self, x: int, y: int, w: int, h: int) -> bool:
        """Whether a rectangle is one whole tile, which then need not be cut out of anything."""
        return x % w == y % h == 0 and (w, h) == (self.width, self.height)

    def standalone(self, data: bytes) -> bytes:
        """A JPEG tile as a JPEG file that any program opens; the compressed pixels stay as is."""
        if not self.prefix:
            return data
        start = 2
        if data[2:4] == b"\xff\xe0":  # a JFIF marker would overrule the colours
            start += 2 + int.from_bytes(data[4:6], "big")
        return self.prefix + data[start:]

    def decode(self, data: bytes, shrink: int = 1) -> NDArray:
        """(height, width, 3) uint8, or 1/2, 1/4, ... of it (see Tiles.shrinks); white for no data.

        PatchError where the decoder complains at all.
        """
        shape = self.height // shrink, self.width // shrink, 3
        if not data:  # the scanner left it out
            return np.full(shape, 255, np.uint8)
        try:
            if not self.is_jpeg:
                image = _jpeg2000(data, shrink)
            elif data[:2] == b"\xff\xd8":
                data = self.standalone(data)
                image = simplejpeg.decode_jpeg(data, "RGB", False, False, *shape[:2], shrink)
            else:
                raise ValueError("no JPEG where one should be")
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own errors
            raise PatchError(str(error)) from error
        if image.shape != shape:
            raise PatchError(f"compressed tile holds {image.shape}, expected {shape}")
        return _ycbcr_to_rgb(image) if self.compression == self.JP2K_YCBCR else image


def _jpeg2000(data: bytes, shrink: int) -> NDArray:
    if shrink == 1:
        import imagecodecs

        return imagecodecs.jpeg2k_decode(data)
    picture: Any = Image.open(io.BytesIO(data))  # imagecodecs cannot leave resolutions out
    picture.reduce = shrink.bit_length() - 1
    return np.asarray(picture)


def _ycbcr_to_rgb(image: NDArray) -> NDArray:
    """JPEG's colour conversion in libjpeg's 16-bit fixed point (jdcolor.c).

    OpenSlide uses it for JPEG 2000 too.
    """
    y, cb, cr = image.transpose(2, 0, 1).astype(np.int32)
    cb -= 128
    cr -= 128
    shifts = np.stack([91881 * cr, -22554 * cb - 46802 * cr, 116130 * cb], axis=2)
    return np.clip(y[..., None] + (shifts + 32768 >> 16), 0, 255).astype(np.uint8)


@dataclass(eq=False)
class Tiles:
    """Where the compressed tiles of one TIFF page lie, row by row."""

    codec: Codec
    columns: int
    offsets: NDArray
    counts: NDArray  # bytes of each

    @classmethod
    def of(cls, page: Any) -> Self | None:
        """Tiles of a page of 8-bit RGB in JPEG or JPEG 2000 tiles, None for every other."""
        if not page or not page.is_tiled or page.dtype != np.uint8:
            return None
        layout = int(page.planarconfig), page.samplesperpixel
        photometric = int(page.photometric)
        compression = int(page.compression)
        if layout != (1, 3) or photometric not in (2, 6):  # RGB, YCbCr
            return None
        rows = -(-page.imagelength // page.tilelength)
        columns = -(-page.imagewidth // page.tilewidth)
        if not len(page.dataoffsets) == len(page.databytecounts) == rows * columns:
            return None
        prefix = b""
        if compression == Codec.JPEG:
            colours = b"\x00" if photometric == 2 else b"\x01"
            prefix = Codec.ADOBE + colours + (page.jpegtables or b"")[2:-2]
        elif compression not in (Codec.JP2K_YCBCR, Codec.JP2K_RGB):
            return None
        codec = Codec(compression, prefix, page.tilewidth, page.tilelength)
        places = np.array([page.dataoffsets, page.databytecounts], np.int64)
        return cls(codec, columns, *places)

    @property
    def complete(self) -> bool:
        """Whether there are all; scanners leave out empty ones."""
        return bool(self.counts.all())

    def shrinks(self, file: Any) -> list[int]:
        """Scales at which tiles can be decoded small: 1/2 to 1/8 of JPEG, to 1/32 of JPEG 2000,
        as far as it is layered."""
        halvings = 3
        if not self.codec.is_jpeg:
            data = self.compressed(file, int(self.counts.argmax()))
            style = data.find(b"\xff\x52")  # marker COD
            halvings = min(data[style + 9], 5) if 0 <= style < len(data) - 9 else 0
        scales = [2**n for n in range(1, halvings + 1)]
        return [n for n in scales if self.codec.width % n == self.codec.height % n == 0]

    def span(self, index: int) -> tuple[int, int]:
        """Offset and bytes of tile `index`, none where the scanner left it out."""
        return int(self.offsets[index]), int(self.counts[index])

    def compressed(self, file: Any, index: int) -> bytes:
        """The bytes of tile `index` of a LocalFile or a RemoteFile."""
        return file.read(*self.span(index))

    def decode(self, file: Any, index: int, shrink: int = 1) -> NDArray:
        """The pixels of tile `index` (see Codec.decode)."""
        return file.decoded(*self.span(index), lambda data: self.codec.decode(data, shrink))


@dataclass(eq=False)
class Recent:
    """The decoded tiles asked for last: as many as fit into `limit` bytes, and at least four."""

    limit: int
    bytes: int = 0
    tiles: OrderedDict[Hashable, NDArray] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, decode: Callable[[], NDArray]) -> NDArray:
        """The tile kept under `key`, else what decode() gives."""
        if key in self.tiles:
            self.tiles.move_to_end(key)
            return self.tiles[key]
        tile = self.tiles[key] = decode()
        self.bytes += tile.nbytes
        while self.bytes > self.limit and len(self.tiles) > 4:
            self.bytes -= self.tiles.popitem(last=False)[1].nbytes
        return tile


Place = tuple[int, int, int, int]  # x, y, width, height in pixels of a level


def cover(side: Any, place: Place) -> Iterator[tuple[int, int]]:
    """(row, column) of each tile of `side` (width, height) that a rectangle touches."""
    (tw, th), (x, y, w, h) = side, place
    rows = range(y // th, (y + h - 1) // th + 1)
    return itertools.product(rows, range(x // tw, (x + w - 1) // tw + 1))


def assemble(tile: Callable[[int, int], NDArray], side: Any, place: Place) -> NDArray:
    """(h, w, 3) uint8 of a picture in tiles of `side` (width, height), by tile(row, column)."""
    (tw, th), (x, y, w, h) = side, place
    out = np.empty((h, w, 3), np.uint8)
    for row, column in cover(side, place):
        top = row * th - y
        left = column * tw - x
        part = tile(row, column)[max(-top, 0) : h - top, max(-left, 0) : w - left]
        rows = out[max(top, 0) : top + th]
        rows[:, max(left, 0) : left + tw] = part
    return out


def read_bytes(file: int, offset: int, count: int) -> bytes:
    """`count` bytes at `offset` of an open file; its position stays (safe after a fork)."""
    data = os.pread(file, count, offset) if count < 1 << 28 else b""
    if len(data) != count:
        raise PatchError("it lies beyond the end of the file, which is cut short or damaged")
    return data


class LocalFile:
    """An open slide or shard, read by spans; remote.RemoteFile has the same names."""

    def __init__(self, path: Path):
        self.handle = os.open(path, os.O_RDONLY)
        found = os.fstat(self.handle)
        self.size = found.st_size
        self.facts = {"slide_bytes": found.st_size, "slide_mtime_ns": found.st_mtime_ns}

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`; PatchError where the file ends before."""
        return read_bytes(self.handle, offset, count)

    def decoded(self, offset: int, count: int, decode: Callable[[bytes], NDArray]) -> NDArray:
        """What `decode` makes of a span."""
        return decode(read_bytes(self.handle, offset, count))

    def close(self) -> None:
        os.close(self.handle)

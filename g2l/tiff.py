"""Compressed tiles of TIFF files, found once and decoded without a library's way around them.

`Tiles` knows where the tiles of a page lie, `Codec` turns one into pixels as OpenSlide would,
`assemble` cuts a rectangle out of them, `Recent` keeps those that neighbours share.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
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
        return x % self.width == y % self.height == 0 and (w, h) == (self.width, self.height)

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
            if self.is_jpeg:
                image = self._jpeg(data, shape, shrink)
            else:
                image = _jpeg2000(data, shrink)
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own errors
            raise PatchError(str(error)) from error
        if image.shape != shape:
            raise PatchError(f"compressed tile holds {image.shape}, expected {shape}")
        return _ycbcr_to_rgb(image) if self.compression == self.JP2K_YCBCR else image

    def _jpeg(self, data: bytes, shape: tuple[int, int, int], shrink: int) -> NDArray:
        import simplejpeg

        if data[:2] != b"\xff\xd8":
            raise PatchError("no JPEG where one should be")
        return simplejpeg.decode_jpeg(
            self.standalone(data),
            min_height=shape[0],
            min_width=shape[1],
            min_factor=shrink,
            fastdct=False,
            fastupsample=False,
            strict=True,
        )


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


class Tiles:
    """Where the compressed tiles of one TIFF page lie, row by row."""

    def __init__(self, page: Any):
        compression, prefix = int(page.compression), b""
        if compression == Codec.JPEG:
            colours = b"\x00" if int(page.photometric) == 2 else b"\x01"
            prefix = Codec.ADOBE + colours + (page.jpegtables or b"")[2:-2]
        self.codec = Codec(compression, prefix, page.tilewidth, page.tilelength)
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.offsets = np.array(page.dataoffsets, np.int64)
        self.counts = np.array(page.databytecounts, np.int64)
        self.complete = bool(self.counts.all())  # scanners leave out empty tiles

    @classmethod
    def of(cls, page: Any) -> Tiles | None:
        """Tiles of a page of 8-bit RGB in JPEG or JPEG 2000 tiles, None for every other."""
        if not page or not page.is_tiled or page.dtype != np.uint8:
            return None
        layout = int(page.planarconfig), int(page.photometric), page.samplesperpixel
        if layout not in ((1, 2, 3), (1, 6, 3)):
            return None
        if int(page.compression) not in (Codec.JPEG, Codec.JP2K_YCBCR, Codec.JP2K_RGB):
            return None
        rows = -(-page.imagelength // page.tilelength)
        count = rows * -(-page.imagewidth // page.tilewidth)
        sound = len(page.dataoffsets) == len(page.databytecounts) == count
        return cls(page) if sound else None

    def shrinks(self, file: int) -> list[int]:
        """Scales at which tiles can be decoded small: 1/2 to 1/8 of JPEG, to 1/32 of JPEG 2000,
        as far as it is layered."""
        halvings = 3
        if not self.codec.is_jpeg:
            data = self.compressed(file, int(self.counts.argmax()))
            style = data.find(b"\xff\x52")  # marker COD
            halvings = min(data[style + 9], 5) if 0 <= style < len(data) - 9 else 0
        scales = [2**n for n in range(1, halvings + 1)]
        return [n for n in scales if self.codec.width % n == self.codec.height % n == 0]

    def compressed(self, file: int, index: int) -> bytes:
        """The bytes of tile `index`, none where the scanner left it out."""
        return read_bytes(file, int(self.offsets[index]), int(self.counts[index]))


class Recent:
    """The decoded tiles asked for last: as many as fit into `limit` bytes, and at least four."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.tiles: OrderedDict[Hashable, NDArray] = OrderedDict()

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


TileReader = Callable[[int, int], NDArray]  # row, column


def assemble(tile: TileReader, tw: int, th: int, x: int, y: int, w: int, h: int) -> NDArray:
    """(h, w, 3) uint8 at (x, y) of a picture in tiles of tw x th px; by tile(row, column)."""
    out = np.empty((h, w, 3), np.uint8)
    for row in range(y // th, (y + h - 1) // th + 1):
        top, bottom = max(y, row * th), min(y + h, (row + 1) * th)
        for column in range(x // tw, (x + w - 1) // tw + 1):
            left, right = max(x, column * tw), min(x + w, (column + 1) * tw)
            part = tile(row, column)[top - row * th : bottom - row * th]
            part = part[:, left - column * tw : right - column * tw]
            out[top - y : bottom - y, left - x : right - x] = part
    return out


def read_bytes(file: int, offset: int, count: int) -> bytes:
    """`count` bytes at `offset` of an open file; its position stays (safe after a fork)."""
    data = os.pread(file, count, offset) if count < 1 << 28 else b""
    if len(data) != count:
        raise PatchError("it lies beyond the end of the file, which is cut short or damaged")
    return data

"""TODO."""

from __future__ import annotations

import io
import os
from collections import OrderedDict

import numpy as np
from PIL import Image

from g2l.errors import PatchError


class Codec:
    """Decodes compressed tiles as OpenSlide does, pixel for pixel, without its 3 ms a tile.

    `prefix` goes before a JPEG tile in place of its first two bytes: the tables it shares with the other tiles and the
    marker that names its colour space. The decoder is strict: what makes OpenSlide fail is an error here too.
    """

    JPEG, JP2K_YCBCR, JP2K_RGB = 7, 33003, 33005
    ADOBE = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"

    def __init__(self, compression: int, prefix: bytes, width: int, height: int):
        self.compression, self.prefix, self.width, self.height = compression, prefix, width, height

    def standalone(self, data: bytes) -> bytes:
        """A JPEG tile as a JPEG file that any program opens; the compressed pixels are the tile's own."""
        if not self.prefix:
            return data
        jfif = (
            2 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 0
        )  # would overrule the colours
        return self.prefix + data[2 + jfif :]

    def decode(self, data: bytes, shrink: int = 1) -> np.ndarray:
        """(height, width, 3) uint8, optionally at 1/2, 1/4, ... (see _Tiles.shrinks); white for no data.

        PatchError where the decoder complains at all.
        """
        height, width = self.height // shrink, self.width // shrink
        if not data:  # the scanner left it out
            return np.full((height, width, 3), 255, np.uint8)
        try:
            if self.compression == self.JPEG:
                import simplejpeg

                if data[:2] != b"\xff\xd8":
                    raise PatchError("no JPEG where one should be")
                image = simplejpeg.decode_jpeg(
                    self.standalone(data),
                    min_height=height,
                    min_width=width,
                    min_factor=shrink,
                    fastdct=False,
                    fastupsample=False,
                    strict=True,
                )
            elif shrink > 1:  # imagecodecs has no such choice
                picture = Image.open(io.BytesIO(data))
                picture.reduce = shrink.bit_length() - 1
                image = np.asarray(picture)
            else:
                import imagecodecs

                image = imagecodecs.jpeg2k_decode(data)
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own errors
            raise PatchError(str(error)) from error
        if image.shape != (height, width, 3):
            raise PatchError(f"compressed tile holds {image.shape}, expected {(height, width, 3)}")
        return _ycbcr_to_rgb(image) if self.compression == self.JP2K_YCBCR else image


def _ycbcr_to_rgb(image: np.ndarray) -> np.ndarray:
    """JPEG's colour conversion in libjpeg's 16-bit fixed point (jdcolor.c), which OpenSlide uses for JPEG 2000 too."""
    y, cb, cr = image.transpose(2, 0, 1).astype(np.int32)
    cb -= 128
    cr -= 128
    shifts = 91881 * cr, -22554 * cb - 46802 * cr, 116130 * cb
    return np.stack(
        [np.clip(y + (shift + 32768 >> 16), 0, 255).astype(np.uint8) for shift in shifts], axis=2
    )


class Tiles:
    """Where the compressed tiles of one TIFF page lie, row by row."""

    def __init__(self, page):
        rgb = int(page.photometric) == 2
        tables = (page.jpegtables or b"")[2:-2]
        prefix = (
            Codec.ADOBE + (b"\x00" if rgb else b"\x01") + tables
            if int(page.compression) == Codec.JPEG
            else b""
        )
        self.codec = Codec(int(page.compression), prefix, page.tilewidth, page.tilelength)
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.offsets = np.array(page.dataoffsets, np.int64)
        self.counts = np.array(page.databytecounts, np.int64)
        self.complete = bool(self.counts.all())  # scanners leave out empty tiles

    @classmethod
    def of(cls, page) -> Tiles | None:
        """Tiles of a page of 8-bit RGB in JPEG or JPEG 2000 tiles, None for every other."""
        usable = (
            page.is_tiled
            and page.dtype == np.uint8
            and page.samplesperpixel == 3
            and int(page.planarconfig) == 1
            and int(page.compression) in (Codec.JPEG, Codec.JP2K_YCBCR, Codec.JP2K_RGB)
            and int(page.photometric) in (2, 6)
        )
        tiles = (
            -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
            if usable
            else 0
        )
        if not usable or not len(page.dataoffsets) == len(page.databytecounts) == tiles:
            return None
        return cls(page)

    def shrinks(self, file: int) -> list[int]:
        """Scales at which tiles can be decoded small: 1/2 to 1/8 of JPEG, as far as JPEG 2000 is layered, to 1/32."""
        halvings = 3
        if self.codec.compression != Codec.JPEG:
            data = self.compressed(file, int(self.counts.argmax()))
            style = data.find(b"\xff\x52")  # marker COD
            halvings = min(data[style + 9], 5) if 0 <= style < len(data) - 9 else 0
        return [
            2**n
            for n in range(1, halvings + 1)
            if self.codec.width % 2**n == self.codec.height % 2**n == 0
        ]

    def compressed(self, file: int, index: int) -> bytes:
        """The bytes of tile `index`, none where the scanner left it out."""
        return read_bytes(file, int(self.offsets[index]), int(self.counts[index]))


class Recent:
    """The decoded tiles asked for last: as many as fit into `limit` bytes, and at least four."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.tiles = limit, 0, OrderedDict()

    def get(self, key, decode) -> np.ndarray:
        """The tile kept under `key`, else what decode() gives."""
        if key in self.tiles:
            self.tiles.move_to_end(key)
            return self.tiles[key]
        tile = self.tiles[key] = decode()
        self.bytes += tile.nbytes
        while self.bytes > self.limit and len(self.tiles) > 4:
            self.bytes -= self.tiles.popitem(last=False)[1].nbytes
        return tile


def assemble(tile, tw: int, th: int, x: int, y: int, w: int, h: int) -> np.ndarray:
    """(h, w, 3) uint8 at (x, y) of a picture in tiles of tw x th pixels, where tile(row, column) gives one."""
    out = np.empty((h, w, 3), np.uint8)
    for row in range(y // th, (y + h - 1) // th + 1):
        top, bottom = max(y, row * th), min(y + h, (row + 1) * th)
        for column in range(x // tw, (x + w - 1) // tw + 1):
            left, right = max(x, column * tw), min(x + w, (column + 1) * tw)
            out[top - y : bottom - y, left - x : right - x] = tile(row, column)[
                top - row * th : bottom - row * th, left - column * tw : right - column * tw
            ]
    return out


def read_bytes(file: int, offset: int, count: int) -> bytes:
    """`count` bytes at `offset` of an open file, whose position stays where it is (safe after a fork)."""
    data = os.pread(file, count, offset) if count < 1 << 28 else b""
    if len(data) != count:
        raise PatchError("it lies beyond the end of the file, which is cut short or damaged")
    return data

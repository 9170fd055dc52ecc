"""A small MIRAX slide for tests: camera images of 256 px in two data files, inside a box."""

import io
import struct

import numpy as np
from PIL import Image
from synthetic import stained

ID = b"0123456789ABCDEF0123456789ABCDEF"
SIDE = 256


def write_mirax(path, box=(5, 13, 4, 12), images=16, levels=3):
    """Writes `path` (.mrxs) and its folder; `box` is x0, x1, y0, y1 in images. Returns level 0.

    The right half of level 0 lies in Data0001.dat, all else in Data0000.dat.
    """
    x0, x1, y0, y1 = box
    picture = np.full((images * SIDE, images * SIDE, 3), 255, np.uint8)
    inside = picture[y0 * SIDE : y1 * SIDE, x0 * SIDE : x1 * SIDE]
    inside[:] = 243
    inside[205:-205, 205:-205] = stained(*(side - 410 for side in inside.shape[:2]))
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    Image.fromarray(picture[::16, ::16]).save(path, "JPEG")
    data = [bytearray(b"01.02" + ID + bytes(259)) for _ in range(2)]
    index = bytearray(b"01.02" + ID)
    index += struct.pack("<ii", len(index) + 8, 0) + bytes(4 * levels)
    for level in range(levels):
        rows = encode_level(Image.fromarray(picture).reduce(2**level), level, box, images, data)
        struct.pack_into("<i", index, len(ID) + 13 + 4 * level, len(index))
        index += struct.pack("<6i", 0, len(index) + 8, 0, len(index) + 16, len(rows), 0)
        for row in rows:
            index += struct.pack("<4i", *row)
    struct.pack_into("<i", index, len(ID) + 9, len(index))
    (folder / "Index.dat").write_bytes(index + bytes(4))
    for number, content in enumerate(data):
        (folder / f"Data{number:04d}.dat").write_bytes(content)
    (folder / "Slidedat.ini").write_text(describe(images, levels))
    return picture


def encode_level(picture, level, box, images, data):
    """Adds a level's images to the data files; rows of image number, offset, bytes, file."""
    step, rows = 2**level, []
    for y in range(0, images, step):
        for x in range(0, images, step):
            if not (box[0] < x + step and x < box[1] and box[2] < y + step and y < box[3]):
                continue
            left, top = x // step * SIDE, y // step * SIDE
            buffer = io.BytesIO()
            picture.crop((left, top, left + SIDE, top + SIDE)).save(buffer, "JPEG", quality=85)
            file = int(level == 0 and 2 * x >= box[0] + box[1])
            rows.append((y * images + x, len(data[file]), len(buffer.getvalue()), file))
            data[file] += buffer.getvalue()
    return rows


def describe(images, levels, mpp=0.25):
    lines = f"""[GENERAL]
SLIDE_VERSION = 01.02
SLIDE_ID = {ID.decode()}
IMAGENUMBER_X = {images}
IMAGENUMBER_Y = {images}
OBJECTIVE_MAGNIFICATION = 40
CURRENT_SLIDE_VERSION = 1.9
CameraImageDivisionsPerSide = 1
[HIERARCHICAL]
INDEXFILE = Index.dat
HIER_COUNT = 1
NONHIER_COUNT = 0
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = {levels}
""".splitlines()
    lines += [f"HIER_0_VAL_{n}_SECTION = L{n}" for n in range(levels)]
    lines += ["[DATAFILE]", "FILE_COUNT = 2", "FILE_0 = Data0000.dat", "FILE_1 = Data0001.dat"]
    for n in range(levels):
        lines += [f"[L{n}]", "OVERLAP_X = 0", "OVERLAP_Y = 0", "IMAGE_FORMAT = JPEG"]
        lines += [f"MICROMETER_PER_PIXEL_{axis} = {mpp * 2**n}" for axis in "XY"]
        lines += ["IMAGE_FILL_COLOR_BGR = 16777215", f"DIGITIZER_WIDTH = {SIDE}"]
        lines += [f"DIGITIZER_HEIGHT = {SIDE}", f"IMAGE_CONCAT_FACTOR = {int(n > 0)}"]
    return "\r\n".join(lines) + "\r\n"

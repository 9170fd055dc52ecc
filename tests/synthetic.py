"""Slides drawn for tests: stained tissue on bright ground, written as TIFFs of every kind."""

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage

BACKGROUND = (242, 240, 243)


def stained(height, width, seed=0):
    """(h, w, 3) uint8 that has the colours and the texture of an H&E section, everywhere."""
    rng = np.random.default_rng(seed)
    fibres = ndimage.gaussian_filter(rng.normal(size=(height, width)).astype(np.float32), 1) * 12
    nuclei = (
        ndimage.gaussian_filter(rng.normal(size=(height, width)).astype(np.float32), 3) * 11 > 1.1
    )
    image = np.array([222, 150, 190], np.float32) + fibres[..., None] * np.array(
        [1, 1.6, 1.0], np.float32
    )
    image[nuclei] = np.array([96, 62, 138], np.float32) + fibres[nuclei][:, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def section(height, width, seed=0):
    """A stained ellipse on a bright background."""
    return cut_out(stained(height, width, seed))


def cut_out(image):
    """An image that is left as an ellipse on a bright background."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    outside = ((x - width / 2) / (0.42 * width)) ** 2 + (
        (y - height / 2) / (0.42 * height)
    ) ** 2 > 1
    image[outside] = BACKGROUND
    return image


def write_slide(
    path,
    image,
    *,
    tile_size=256,
    codec="ycbcr",
    mpp=0.25,
    objective=40,
    levels=(4,),
    aperio=True,
    missing=(),
    **options,
):
    """A pyramidal tiled TIFF as scanners write it: JPEG (YCbCr or RGB) or JPEG 2000 tiles, Aperio's
    description."""
    height, width = image.shape[:2]
    options = {"tile": (tile_size, tile_size), "metadata": None} | options
    with tifffile.TiffWriter(path) as file:
        for shrink in (1, *levels):
            h, w = height // shrink, width // shrink
            level = (
                image
                if shrink == 1
                else np.asarray(
                    Image.fromarray(image).resize(
                        (w, h), Image.Resampling.BOX, (0, 0, w * shrink, h * shrink)
                    )
                )
            )
            if aperio:
                power = f"|AppMag = {objective}" if objective else ""
                size = f"|MPP = {mpp}" if mpp else ""
                options["description"] = (
                    f"Aperio Image Library v12\r\n{width}x{height} -> {w}x{h}{power}{size}"
                )
            options["subfiletype"] = int(shrink > 1)

            def tiles(level=level, shrink=shrink):
                padded = np.pad(level, ((0, tile_size), (0, tile_size), (0, 0)), mode="edge")
                for number, (y, x) in enumerate(
                    (y, x)
                    for y in range(0, level.shape[0], tile_size)
                    for x in range(0, level.shape[1], tile_size)
                ):
                    part = np.ascontiguousarray(padded[y : y + tile_size, x : x + tile_size])
                    if shrink == 1 and number in missing:
                        yield b""
                    elif codec == "j2k":
                        yield imagecodecs.jpeg2k_encode(part, codecformat="J2K", level=40)
                    elif codec == "j2k-ycbcr":
                        part = np.asarray(Image.fromarray(part).convert("YCbCr"))
                        yield imagecodecs.jpeg2k_encode(
                            part, codecformat="J2K", level=40, mct=False
                        )
                    else:
                        color = {"ycbcr": "YCBCR", "444": "YCBCR", "rgb": "RGB"}[codec]
                        yield imagecodecs.jpeg_encode(
                            part,
                            level=85,
                            colorspace="RGB",
                            outcolorspace=color,
                            subsampling=(2, 2) if codec == "ycbcr" else (1, 1),
                        )

            compression, photometric, extra = {
                "j2k": (33005, "rgb", {}),
                "j2k-ycbcr": (33003, "rgb", {}),
                "rgb": ("jpeg", "rgb", {"compressionargs": {"outcolorspace": "rgb"}}),
                "ycbcr": ("jpeg", "ycbcr", {"subsampling": (2, 2)}),
                "444": ("jpeg", "ycbcr", {"subsampling": (1, 1)}),
            }[codec]
            file.write(
                tiles(),
                shape=level.shape,
                dtype=np.uint8,
                photometric=photometric,
                compression=compression,
                **extra,
                **options,
            )
    return path


def by_openslide(slide, x, y, w, h, level=0):
    """What OpenSlide shows there, over white; the level is read at level-0 coordinates."""
    region = np.asarray(slide.read_region((x, y), level, (w, h))).astype(int)
    return 255 - (255 - region[..., :3]) * region[..., 3:] // 255

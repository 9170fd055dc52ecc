"""Features per slide on disk: one h5 file a slide, in the layout that MIL tools read.

While a slide is in hand its rows lie in parts, each written whole; `finish` turns the parts into
the file, bounded in memory whatever the slide. What a file was computed from stands in its
attributes, so that another model, other weights or another tiling are noticed. `read_features`
reads a file back; the rest writes what other tools want.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.errors import UserError
from g2l.files import atomic, check_room, digest, flush, locked
from g2l.models import Model
from g2l.patches import new_h5, open_h5

PIECE = 16384  # patches of a part at most: 100 MB of 1,536 numbers
SAME = "level0_mpp", "slide_bytes"  # attributes that differ where equal places are other tissue


@dataclass(frozen=True)
class Origin:
    """What the features of a slide depend on."""

    model: str
    fingerprint: str
    preprocessing: str  # as JSON
    tiling: str  # of the coordinates
    stored: str  # as float32 or float16


def preprocessing_of(model: Model) -> str:
    """How a model sees a patch, as JSON."""
    fields = "input_size", "resize", "mean", "std", "interpolation", "embedding"
    about = {field: getattr(model, field) for field in fields}
    return json.dumps(about | {"precision": str(model.dtype).removeprefix("torch.")})


@dataclass
class Coordinates:
    """Where the patches of a slide lie, as tile.py wrote it."""

    coords: ndarray  # (N, 2) int64, level-0 x, y of the top-left
    attributes: dict  # those that CLAM and TRIDENT read

    @classmethod
    def read(cls, path: Path) -> Coordinates:
        """Of a slide's <slide>_patches.h5, or of its file of features."""
        with open_h5(path, "r") as file:
            return cls(file["coords"][:], dict(file["coords"].attrs))

    @functools.cached_property
    def key(self) -> str:
        """Changes when the patches would."""
        sides = [int(self.attributes.get(f"patch_size{end}", 0)) for end in ("", "_level0")]
        pixels = hashlib.sha256(np.ascontiguousarray(self.coords).data).hexdigest()
        return digest(pixels, sides)


@dataclass(eq=False)
class SlideFeatures:
    """The features of one slide by one model: parts first, then `folder`/<slide>.h5."""

    folder: Path
    slide: str
    origin: Origin
    where: Coordinates

    def __post_init__(self) -> None:
        self.count = len(self.where.coords)
        self.path = self.folder / f"{self.slide}.h5"
        self.name = str(self.folder / ".parts" / f"{self.slide}.{digest(asdict(self.origin))}")

    def state(self, thorough: bool = False) -> str:
        """ "done", "missing" or "other" (made from something else, or damaged).

        thorough: the features are read, too, must have their checksum, and lack no patch.
        """
        if not self.path.exists():
            return "missing"
        try:
            with open_h5(self.path, "r") as file:
                held = {name: str(file.attrs[name]) for name in asdict(self.origin)}
                lost = len(file["unreadable"])
                whole = len(file["features"]) + lost == self.count and not (thorough and lost)
                about = file["coords"].attrs
                same = all(about.get(key) == self.where.attributes.get(key) for key in SAME)
            if thorough:
                read_features(self.path)
        except (OSError, KeyError, UserError):
            return "other"
        return "done" if held == asdict(self.origin) and whole and same else "other"

    def unreadable(self) -> int:
        """Patches that were left out of the file."""
        with open_h5(self.path, "r") as file:
            return len(file["unreadable"])

    def part(self, first: int) -> Path:
        """The file of the part that begins with patch `first`."""
        return Path(f"{self.name}.{first:08d}.npz")

    def write_part(self, first: int, features: ndarray, readable: ndarray) -> None:
        """Keep features (n, D) float32 of the patches from `first` on that were readable (n,)."""
        rows = first + np.flatnonzero(readable)
        with atomic(self.part(first)) as temporary:
            np.savez(temporary, rows=rows, features=features[readable])

    def finish(self) -> None:
        """Write the file, if all parts are there and any patch could be read.

        Patches that could not are listed in its dataset `unreadable` (M, 2). The parts are deleted
        when the file is whole and on the disk.
        """
        parts = [self.part(first) for first in range(0, self.count, PIECE)]
        with locked(self.folder / ".lock", limit=3600):  # another run may be at it, too
            if not all(part.is_file() for part in parts):
                return
            rows = np.concatenate([np.load(part)["rows"] for part in parts])
            if len(rows):
                self._write(parts, rows)
            for part in parts:  # without a row, too: the slide may be readable next time
                part.unlink()

    def _write(self, parts: list[Path], rows: ndarray) -> None:
        width = np.load(parts[0])["features"].shape[1]
        checksum = hashlib.sha256()
        start = 0
        for made in exports_of(self.path):  # of earlier features
            made.unlink(missing_ok=True)
        with new_h5(self.path, len(rows) * (4 * width + 32)) as file:
            # Contiguous: read ten times as fast as TRIDENT's chunks.
            features = file.create_dataset("features", (len(rows), width), self.origin.stored)
            for part in parts:
                block = np.load(part)["features"].astype(self.origin.stored)
                features[start : start + len(block)] = block
                checksum.update(block.data)
                start += len(block)
            features.attrs.update(name=self.slide, savetodir=str(self.path.parent))
            coords = file.create_dataset("coords", data=self.where.coords[rows])
            coords.attrs.update(self.where.attributes)
            file["unreadable"] = np.delete(self.where.coords, rows, 0)
            file.attrs.update(asdict(self.origin), sha256=checksum.hexdigest())
        flush(self.path)


def read_features(path: Path) -> tuple[ndarray, ndarray]:
    """(features (N, D) as stored, coords (N, 2)) of a slide's file; UserError where it is damaged.

    The features are mapped, not held: a slide larger than the memory can be read.
    """
    try:
        with open_h5(path, "r") as file:
            data = file["features"]
            coords = file["coords"][:]
            checksum = file.attrs["sha256"]
            place = data.id.get_offset()
            # Changes stay in memory, so PyTorch may take the array for its own.
            features = np.memmap(path, data.dtype, "c", place, data.shape)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: no features of a slide ({error})", mend="embed") from error
    if hashlib.sha256(features.data).hexdigest() != checksum:
        raise UserError(f"{path}: damaged: its checksum is another", mend="embed")
    return features, coords


def exports_of(path: Path) -> tuple[Path, Path, Path]:
    """What may be made of a slide's features for other tools: `write_tensor`, `write_stamp` and,
    of all slides, `write_means`."""
    folder = path.parent
    tensor = folder / "pt_files" / f"{path.stem}.pt"
    stamp = folder.with_name(f"{folder.name}_stamp") / path.name
    return tensor, stamp, folder.with_name(f"{folder.name}_mean.h5")


def write_tensor(path: Path, features: ndarray) -> None:
    """pt_files/<slide>.pt, one fp32 tensor (N, D), as CLAM, eva and TransMIL read it."""
    import torch

    with atomic(path) as temporary:
        check_room(temporary, features.nbytes)
        torch.save(torch.from_numpy(features), temporary)


def write_stamp(path: Path, features: ndarray, where: Coordinates, model: str) -> None:
    """<slide>.h5 as STAMP 2 reads it: `feats`, and `coords` in micrometres."""
    about = where.attributes
    mpp = float(about["level0_mpp"])
    side = mpp * int(about["patch_size_level0"])
    with new_h5(path, features.nbytes + where.coords.nbytes) as file:
        file["feats"] = features
        file["coords"] = where.coords * mpp
        file.attrs.update(unit="um", tile_size=side, tile_size_um=side, feat_type="tile")
        file.attrs.update(tile_size_px=int(about["patch_size"]), extractor=model)
        file.attrs["stamp_version"] = "2.0.0"  # the first with this layout: no reader is older


def write_means(path: Path, names: list[tuple[str, str]], means: ndarray) -> None:
    """One vector a slide: h5 with `features` (S, D), and `slides` and `patients` by `names`."""
    slides, patients = zip(*names, strict=True)
    with new_h5(path, means.nbytes) as file:
        file["features"] = means.astype(np.float32)
        file["slides"], file["patients"] = slides, patients

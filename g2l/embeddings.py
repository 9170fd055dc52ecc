"""Features per slide on disk: one h5 file a slide, in the layout that MIL tools read.

While a slide is in hand its rows lie in parts, each written whole; `finish` turns the parts into
the file, bounded in memory whatever the slide. What a file was computed from stands in its
attributes, so that another model, other weights or another tiling are noticed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from g2l.errors import UserError
from g2l.files import atomic, digest, flush, write_text
from g2l.models import Model

PIECE = 16384  # patches of a part at most: 100 MB of 1,536 numbers


@dataclass(frozen=True)
class Origin:
    """What the features of a slide depend on."""

    model: str
    fingerprint: str
    preprocessing: str  # as JSON
    tiling: str  # of the coordinates


def preprocessing_of(model: Model) -> str:
    """How a model sees a patch, as JSON."""
    about = {
        "input_size": model.input_size,
        "resize": model.resize,
        "mean": model.mean,
        "std": model.std,
        "interpolation": model.interpolation,
        "embedding": model.embedding,
        "precision": str(model.dtype).removeprefix("torch."),
    }
    return json.dumps(about)


@dataclass
class Coordinates:
    """Where the patches of a slide lie, as tile.py wrote it."""

    coords: np.ndarray  # (N, 2) int64, level-0 x, y of the top-left
    attributes: dict  # those that CLAM and TRIDENT read

    @classmethod
    def read(cls, path: Path) -> Coordinates:
        """Of a slide's <slide>_patches.h5."""
        import h5py

        with h5py.File(path, "r") as file:
            return cls(file["coords"][:], dict(file["coords"].attrs))

    @property
    def key(self) -> str:
        """Changes when the patches would."""
        size = self.attributes.get("patch_size"), self.attributes.get("patch_size_level0")
        pixels = hashlib.sha256(np.ascontiguousarray(self.coords).tobytes()).hexdigest()
        return digest(pixels, [int(value or 0) for value in size])


class SlideFeatures:
    """The features of one slide by one model: parts first, then `folder`/<slide>.h5."""

    def __init__(self, folder: Path, slide: str, origin: Origin, where: Coordinates):
        self.slide, self.origin, self.where = slide, origin, where
        self.count = len(where.coords)
        self.path = folder / f"{slide}.h5"
        self.parts = folder / ".parts"

    def state(self) -> str:
        """ "done", "missing" or "other" (made from something else, or damaged)."""
        import h5py

        if not self.path.exists():
            return "missing"
        try:
            with h5py.File(self.path, "r") as file:
                held = {name: str(file.attrs[name]) for name in asdict(self.origin)}
                whole = len(file["features"]) + int(file.attrs["unreadable"]) == self.count
        except (OSError, KeyError):
            return "other"
        return "done" if held == asdict(self.origin) and whole else "other"

    def unreadable(self) -> int:
        """Patches that were left out of the file."""
        import h5py

        with h5py.File(self.path, "r") as file:
            return int(file.attrs["unreadable"])

    def _part(self, first: int) -> Path:
        key = digest(asdict(self.origin))
        return self.parts / f"{self.slide}.{key}.{first:08d}.npz"

    def has_part(self, first: int) -> bool:
        """Whether an earlier run has written the part that begins with patch `first`."""
        return self._part(first).is_file()

    def write_part(self, first: int, rows: np.ndarray, features: np.ndarray) -> None:
        """Keep features (n, D) float32 of the patches `rows` (n,), the readable ones of a part."""
        with atomic(self._part(first)) as temporary:
            np.savez(temporary, rows=rows, features=features)

    def finish(self) -> None:
        """Write the file, if all parts are there and any patch could be read.

        The parts are deleted when the file is whole and on the disk.
        """
        import h5py

        parts = [self._part(first) for first in range(0, self.count, PIECE)]
        if not all(part.is_file() for part in parts):
            return
        rows = np.concatenate([np.load(part)["rows"] for part in parts])
        width = np.load(parts[0])["features"].shape[1]
        if not len(rows):
            return
        checksum, start = hashlib.sha256(), 0
        with atomic(self.path) as temporary:
            with h5py.File(temporary, "w") as file:
                features = file.create_dataset("features", (len(rows), width), np.float32)
                for part in parts:
                    block = np.load(part)["features"]
                    features[start : start + len(block)] = block
                    checksum.update(block.tobytes())
                    start += len(block)
                features.attrs["name"] = self.slide
                features.attrs["savetodir"] = str(self.path.parent)
                coords = file.create_dataset("coords", data=self.where.coords[rows])
                for name, value in self.where.attributes.items():
                    coords.attrs[name] = value
                for name, value in asdict(self.origin).items():
                    file.attrs[name] = value
                file.attrs["sha256"] = checksum.hexdigest()
                file.attrs["unreadable"] = self.count - len(rows)
            flush(temporary)
        for part in parts:
            part.unlink()


def read_features(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D) float32, coords (N, 2)) of a slide's file; UserError where it is damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            features, coords = file["features"][:], file["coords"][:]
            checksum = str(file.attrs["sha256"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: no features of a slide ({error})", "embed") from error
    if hashlib.sha256(features.tobytes()).hexdigest() != checksum:
        raise UserError(f"{path}: damaged: its checksum is another", "embed")
    return features, coords


def write_tensor(path: Path, features: np.ndarray) -> None:
    """pt_files/<slide>.pt, one fp32 tensor (N, D), as CLAM, eva and TransMIL read it."""
    import torch

    with atomic(path) as temporary:
        torch.save(torch.from_numpy(features), temporary)


def write_means(path: Path, names: list[tuple[str, str]], means: np.ndarray) -> None:
    """One vector a slide: h5 with `features` (S, D), and `slides` and `patients` by `names`."""
    import h5py

    slides, patients = zip(*names, strict=True)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=means.astype(np.float32))
        file.create_dataset("slides", data=slides, dtype=h5py.string_dtype())
        file.create_dataset("patients", data=patients, dtype=h5py.string_dtype())


def write_table(path: Path, rows: list[dict]) -> None:
    """A row a slide: what was made of it, or why nothing was."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["slide", "patient", "status", "patches", "unreadable", "reason"])
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())

"""What the teacher says of each sample of a stream, kept for other runs over the same stream.

Sample n of a run is the same crop whatever the student or the loss. Rows lie by sample number in
one file, their checksums in another; ranks and runs write at the same time, each row for itself.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from g2l.augment import AUGMENT_VERSION, Params
from g2l.errors import UserError
from g2l.files import digest


def stream_key(identity: Mapping[str, object]) -> str:
    """Of all that a sample's crop and the teacher's answer depend on, from the run's identity."""
    names = ["cohort", "settings of tile.py", "teacher weights", "precision"]
    names += ["seed", "crop", "sampling", "hold_out"]
    return digest(AUGMENT_VERSION, [identity.get(name) for name in names])


class TeacherCache:
    """Rows (dim,) of fp16 by sample number; `key` says what they were computed from."""

    def __init__(self, folder: Path, key: str, dim: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.width = 2 * dim
        self.rows = os.open(folder / f"{key}.rows", os.O_RDWR | os.O_CREAT, 0o644)
        self.sums = os.open(folder / f"{key}.crc32", os.O_RDWR | os.O_CREAT, 0o644)

    def get(self, params: Params) -> Tensor | None:
        """fp16 (B, dim) of samples in a row; None where not all are there and whole."""
        first = int(params.number[0])
        count = len(params.number)
        data = os.pread(self.rows, count * self.width, first * self.width)
        sums = os.pread(self.sums, 4 * count, 4 * first)
        if len(data) < count * self.width or len(sums) < 4 * count:
            return None
        if sums != self._checksums(data, params):
            return None
        return torch.from_numpy(np.frombuffer(data, np.float16).reshape(count, -1).copy())

    def put(self, params: Params, rows: Tensor) -> None:
        """Keep fp16 rows (B, dim), first themselves and then their checksums.

        UserError where they are not finite, or cannot be written.
        """
        if not rows.isfinite().all():
            raise UserError(
                f"{self.folder}: the teacher's answer is not finite in fp16", mend="targets"
            )
        first = int(params.number[0])
        data = rows.cpu().numpy().tobytes()
        try:
            os.pwrite(self.rows, data, first * self.width)
            os.pwrite(self.sums, self._checksums(data, params), 4 * first)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}", mend="cache") from None

    def _checksums(self, data: bytes, params: Params) -> bytes:
        """CRC-32 of each row, begun with that of its patch: other pixels are noticed."""
        sums = []
        for number, patch in enumerate(params.pixels.tolist()):
            row = data[number * self.width : (number + 1) * self.width]
            sums.append(zlib.crc32(row, patch & 0xFFFFFFFF))
        return np.array(sums, np.uint32).tobytes()

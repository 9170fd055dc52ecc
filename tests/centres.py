"""Patches of several centres for tests: planted features, and TIGER as it unpacks."""

from pathlib import Path

import numpy as np
from PIL import Image


def planted(by: np.ndarray, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Features that hold `by` (n,) and nothing else but noise: (n, 16) float32."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(by.max() + 1, 16))[by] + noise * rng.normal(size=(len(by), 16))
    ).astype(np.float32)


def write_region(root: Path, kind: str, name: str, mask: np.ndarray) -> None:
    for folder, array in (
        ("images", np.repeat(mask[..., None] * 30, 3, -1).astype(np.uint8)),
        ("masks", mask),
    ):
        path = root / "wsirois" / "roi-level-annotations" / kind / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def write_tiger(root: Path) -> Path:
    """TIGER as it unpacks, with regions of 64 px patches in the published naming."""
    mask = np.full((140, 200), 7, np.uint8)  # 2 x 3 patches of 64 px, and a rest
    mask[:64, :64], mask[:64, 64:128], mask[:64, 128:192] = 1, 3, 5
    mask[64:128, :64] = 0
    mask[64:128, 64:128] = 2
    mask[64:128, 64:80] = 7  # a quarter is rest: exactly 0.75 stroma
    mask[64:128, 128:192] = 6
    mask[64:128, 128:150] = 0  # more than a quarter not annotated: dropped at 0.75
    slide = "TCGA-A1-A0SK-01Z-00-DX1.A44D70FA-4D96-43F4-9DD7-A61535786297"
    write_region(root, "tissue-bcss", f"{slide}_[22877, 12530, 23077, 12670]", mask)
    write_region(
        root, "tissue-cells", f"{slide}_[22900, 12600, 22964, 12664]", mask[:64, :64]
    )  # inside the other
    write_region(root, "tissue-cells", f"{slide}_[1000, 1000, 1064, 1064]", mask[:64, :64])
    write_region(
        root,
        "tissue-cells",
        "TC_S01_P000054_C0001_B101_[27671, 88267, 27735, 88331]",
        mask[:64, :64],
    )
    write_region(root, "tissue-cells", "100B_[35129, 6567, 35193, 6631]", mask[:64, 64:128])
    write_region(
        root, "tissue-cells", "100S_[1, 2, 41, 42]", mask[:40, :40]
    )  # smaller than a patch
    return root

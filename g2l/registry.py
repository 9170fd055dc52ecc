"""The published models: how each is built in timm, sees an image, and what its licence allows.

A new model is one entry of REGISTRY; `python -m g2l.models NAME` then fetches, checks and
describes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))

# timm's DINOv2 giant is a ViT with packed SwiGLU and 4 registers without position; the SwiGLU
# models differ from it only in numbers, so every entry is plain JSON, and an exported student needs
# no Python class to be built again.
SWIGLU = "vit_giant_patch14_reg4_dinov2"
VIT_L16 = "vit_large_patch16_224"


@dataclass(frozen=True)
class Entry:
    """One published model."""

    hub: str  # repository on the Hugging Face hub
    timm: str  # architecture
    args: dict  # of timm's constructor, beside those of `constructor`
    parameters: int
    prefix: int  # tokens before the patch tokens: CLS and registers
    dim: int  # width of the embedding
    norm: tuple  # mean, std
    licence: str
    # "gated": to be asked for on the model's page; "log in": sources disagree, some had to accept
    access: str
    # "cls", or "cls+mean": CLS beside the mean of the patch tokens, registers left out
    embedding: str = "cls"
    # of matrix products on a GPU: as published, bf16 where nothing is known
    precision: torch.dtype = torch.float16
    resize: int = 224  # the shorter side is resized to this, then the middle 224 x 224 is taken
    interpolation: str = "bilinear"

    @property
    def width(self) -> int:
        """Of the network's tokens."""
        return self.args.get("embed_dim", 1536 if self.timm == SWIGLU else 1024)


def constructor(entry: Entry) -> dict:
    """timm's constructor arguments of an entry."""
    return dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)


NC_ND = "CC-BY-NC-ND-4.0"
BF16 = torch.bfloat16
B14 = dict(embed_dim=768, depth=12, num_heads=12)
L14 = dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=5.34375)
H14 = dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375, no_embed_class=False)
G16 = dict(patch_size=16, mlp_ratio=5.33334, reg_tokens=0, no_embed_class=False)
REGISTRY: dict[str, Entry] = {
    "h-optimus-0": Entry(
        "bioptimus/H-optimus-0",
        SWIGLU,
        {},
        1_134_774_272,
        5,
        1536,
        H_OPTIMUS,
        "Apache-2.0",
        "log in",
    ),
    "h-optimus-1": Entry(
        "bioptimus/H-optimus-1", SWIGLU, {}, 1_134_774_272, 5, 1536, H_OPTIMUS, NC_ND, "gated"
    ),
    "h0-mini": Entry(
        "bioptimus/H0-mini", SWIGLU, B14, 85_739_520, 5, 768, H_OPTIMUS, NC_ND, "gated"
    ),
    "hibou-l": Entry(
        "histai/hibou-L",
        SWIGLU,
        L14,
        303_657_216,
        5,
        1024,
        HIBOU,
        "Apache-2.0",
        "log in",
        precision=BF16,
        interpolation="bicubic",
    ),
    "hibou-b": Entry(
        "histai/hibou-b",
        SWIGLU,
        B14,
        85_739_520,
        5,
        768,
        HIBOU,
        "Apache-2.0",
        "log in",
        precision=BF16,
        interpolation="bicubic",
    ),
    "uni": Entry("MahmoodLab/UNI", VIT_L16, {}, 303_350_784, 1, 1024, IMAGENET, NC_ND, "gated"),
    "uni2-h": Entry(
        "MahmoodLab/UNI2-h",
        SWIGLU,
        dict(depth=24, reg_tokens=8),
        681_394_176,
        9,
        1536,
        IMAGENET,
        NC_ND,
        "gated",
        precision=BF16,
    ),
    "virchow": Entry(
        "paige-ai/Virchow",
        SWIGLU,
        dict(H14, reg_tokens=0),
        631_229_184,
        1,
        2560,
        IMAGENET,
        "Apache-2.0",
        "gated",
        "cls+mean",
        interpolation="bicubic",
    ),
    "virchow2": Entry(
        "paige-ai/Virchow2",
        SWIGLU,
        H14,
        631_239_424,
        5,
        2560,
        IMAGENET,
        NC_ND,
        "gated",
        "cls+mean",
        interpolation="bicubic",
    ),
    "prov-gigapath": Entry(
        "prov-gigapath/prov-gigapath",
        SWIGLU,
        G16,
        1_134_953_984,
        1,
        1536,
        IMAGENET,
        "Apache-2.0, research use",
        "gated",
        resize=256,
        interpolation="bicubic",
    ),
    "phikon-v2": Entry(
        "owkin/phikon-v2",
        VIT_L16,
        {},
        303_350_784,
        1,
        1024,
        IMAGENET,
        "Owkin non-commercial",
        "gated",
        precision=BF16,
    ),
}

NOTES = """
All take 224 x 224 RGB. prefix: tokens before the patch tokens (class token, registers). cls+mean:
class token beside the mean of the patch tokens, registers left out. log in: sources disagree
whether terms must be accepted. H-optimus-1, H0-mini, Virchow2, UNI and UNI2-h forbid models trained
on their outputs; H-optimus-0 and Hibou are Apache-2.0. H-optimus-0 was trained at 0.5 µm/px, G2L
distils it at 0.25. Weights: the hub's cache and token, or --weights [NAME=]FILE, FOLDER, random."""


def table() -> str:
    """The registry as text."""
    rows = [["name", "parameters", "embedding", "dim", "prefix", "licence", "access", "hub"]]
    for name, e in REGISTRY.items():
        numbers = [f"{e.parameters:,}", e.embedding, str(e.dim), str(e.prefix)]
        rows.append([name, *numbers, e.licence, e.access, e.hub])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for column in (1, 3, 4):  # numbers
            cells[column] = row[column].rjust(widths[column])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

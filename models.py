"""Every foundation model of the paper, loaded as its authors meant, as a timm network and without remote code.

    python models.py                              the registry as a table
    python models.py hibou-l --check FILE         do these weights fit?
    python models.py --speed h-optimus-0 hibou-l  images per second, FLOPs and MFU on the device at hand

Other stages use `load_model(name, weights)`, which gives a `Model`: a timm network with its own preprocessing and its
own definition of the embedding, and `extract_features(model, images)`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import os
import pickle
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tile import Help, PatchError, UserError, atomic

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))

# timm's DINOv2 giant is a ViT with packed SwiGLU and 4 registers without position; the SwiGLU models differ from it
# only in numbers, so every line below is plain JSON and an exported student needs no Python class to be built again.
SWIGLU = "vit_giant_patch14_reg4_dinov2"
VIT_L16 = "vit_large_patch16_224"


@dataclass(frozen=True)
class Entry:
    """One published model. `args` are timm's constructor arguments beside img_size=224 and init_values=1e-5."""

    hub: str  # repository on the Hugging Face hub
    timm: str  # architecture
    args: dict
    parameters: int
    prefix: int  # tokens before the patch tokens: CLS and registers
    dim: int  # width of the embedding
    norm: tuple  # mean, std
    licence: str
    access: str  # "gated": to be asked for on the model's page; "log in": sources disagree, some had to accept terms
    embedding: str = (
        "cls"  # "cls", or "cls+mean": CLS beside the mean of the patch tokens, registers left out
    )
    precision: torch.dtype = (
        torch.float16
    )  # of matrix products on a GPU: as published, bf16 where nothing is known
    resize: int = 224  # the shorter side is resized to this, then the middle 224 x 224 is taken
    interpolation: str = "bilinear"


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
All take 224 x 224 RGB. prefix: tokens before the patch tokens (class token, registers). cls+mean: class token
beside the mean of the patch tokens, registers left out. log in: sources disagree whether terms must be accepted.
UNI and UNI2-h forbid models trained on their outputs; H-optimus-0 and Hibou are Apache-2.0. H-optimus-0 was trained
at 0.5 µm/px, G2L distils it at 0.25. Weights: the hub's cache and token, or --weights [NAME=]FILE, FOLDER, random."""
SAVE_SECONDS = 30  # between two saves of finished features
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Model(nn.Module):
    """A timm network with the preprocessing and the embedding its authors meant. Made by `load_model`.

    With a half-precision `dtype` the weights of linear and convolution layers are stored in it and the network runs
    under autocast, so that norms and the residual stream stay fp32. Such a model is for inference; load a network that
    is to be trained with dtype=torch.float32.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        embedding: str,
        dtype: torch.dtype,
        weights: str,
        metadata: dict | None = None,
    ):
        super().__init__()
        cfg = net.pretrained_cfg
        self.net, self.name, self.embedding, self.dtype, self.weights = (
            net,
            name,
            embedding,
            dtype,
            weights,
        )
        self.metadata, self.compiled = metadata or {}, False
        self.input_size = int(cfg["input_size"][-1])
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.resize = int(self.input_size / cfg["crop_pct"] + 1e-6)
        self.interpolation, self.crop_mode = cfg["interpolation"], cfg.get("crop_mode", "center")
        self.tokens_dim = net.num_features
        self.is_vit = hasattr(net, "num_prefix_tokens")
        self.num_prefix_tokens = getattr(net, "num_prefix_tokens", 0)
        width = getattr(net, "head_hidden_size", None) or net.num_features
        self.dim = 2 * net.num_features if embedding == "cls+mean" else width
        self.parameters_count = sum(p.numel() for p in net.parameters())
        self.register_buffer("_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        if dtype != torch.float32:
            for module in net.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)

    @property
    def geometry(self):
        """This model's `resize_and_crop`: a function that can be sent to a worker process, as the model need not be."""
        return functools.partial(
            resize_and_crop,
            size=self.input_size,
            resize=self.resize,
            interpolation=self.interpolation,
            squash=self.crop_mode == "squash",
        )

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """float (B, 3, S, S) in [0, 1] -> float32 of the same shape, with this model's mean and standard deviation.

        For a convolutional network the result lies in memory channels-last, in which it runs 1.2 to 1.4 times as fast
        on CPU (measured); for a ViT that makes no difference.
        """
        x = (images - self._mean.to(images.device)) / self._std.to(images.device)
        return x if self.is_vit else x.contiguous(memory_format=torch.channels_last)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, S, S), the transform this model was published with."""
        return self.normalize(self.geometry(images).float() / 255)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, S, S) -> all tokens (B, T, C) after the final norm, prefix tokens first. ViTs only."""
        if not self.is_vit:
            raise ValueError(
                f"{self.name} is no vision transformer: it has no tokens, only the embedding of forward()"
            )
        with self.autocast(x):
            return self.net.forward_features(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, S, S) -> embedding (B, dim)."""
        if self.embedding != "cls+mean":
            with self.autocast(x):
                return self.net(x)
        tokens = Model.tokens(self, x)
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(1)], dim=-1)

    def autocast(self, x: torch.Tensor):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()  # an autocast of the caller's stays in force
        return torch.autocast(x.device.type, self.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits over weights (as held, so with their precision), architecture, preprocessing and embedding.

        The same weights give the same fingerprint from whatever kind of file they came. Taken at first use.
        """

        def digest(item):
            name, tensor = item
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return (
                f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
                + hashlib.sha256(data).digest()
            )

        total = hashlib.sha256(
            json.dumps(
                [
                    self.net.pretrained_cfg["architecture"],
                    self.input_size,
                    self.resize,
                    self.mean,
                    self.std,
                    self.interpolation,
                    self.crop_mode,
                    self.embedding,
                    str(self.dtype),
                ]
            ).encode()
        )
        with ThreadPoolExecutor(
            min(16, os.cpu_count() or 1)
        ) as pool:  # hashlib releases the interpreter lock
            for part in pool.map(digest, sorted(self.net.state_dict().items())):
                total.update(part)
        return total.hexdigest()[:32]


def resize_and_crop(
    images: torch.Tensor, *, size: int, resize: int, interpolation: str, squash: bool = False
) -> torch.Tensor:
    """uint8 (B, 3, H, W) of any size -> uint8 (B, 3, size, size).

    The shorter side becomes `resize` with antialias, smaller images are enlarged, and the middle is taken (squash: both
    sides become `resize` whatever the aspect, as some of timm's models want). Rounded to whole grey levels after
    resizing, as the published transforms on PIL images do.
    """
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
        or not images.numel()
    ):
        raise ValueError(
            f"images: expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    height, width = images.shape[2:]
    short = min(height, width)
    target = (
        [resize, resize] if squash else [int(resize * height / short), int(resize * width / short)]
    )
    # PIL rounds between the horizontal and the vertical pass, and so does PyTorch on CPU; a GPU has to be made to.
    for step in [target] if images.device.type == "cpu" else [[height, target[1]], target]:
        images = F.resize(
            images, step, antialias=True, interpolation=InterpolationMode(interpolation)
        )
    return F.center_crop(images, [size, size])


# ---- loading ----------------------------------------------------------------------------------------------------


def load_model(
    name: str,
    weights: str | None = None,
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
    input_size: int | None = None,
    compile: bool = False,
) -> Model:
    """Build a model, give it its weights, and put it on a device in eval mode.

    name: of REGISTRY, "timm:NAME", a folder in timm's format (such as runs/NAME/student), or a weight file in one.
    weights: None for the hub (a folder's own for a folder), "random", or a file or folder; then no network is touched.
    dtype: of weights and matrix products; None = fp32 on CPU, the model's own half precision on a GPU.
    input_size: side in pixels if not the published one. Position embeddings of a ViT are resampled to it once (timm's
        bicubic with antialias), so it must be a multiple of the patch size.
    Raises UserError for whatever a user can mend.
    """
    device = torch.device(device)
    entry, metadata, cfg, args, embedding, loaded = (
        REGISTRY.get(name.lower()),
        {},
        {},
        {},
        None,
        False,
    )
    if entry:
        name, architecture, embedding = name.lower(), entry.timm, entry.embedding
        cfg = dict(
            input_size=(3, 224, 224),
            mean=entry.norm[0],
            std=entry.norm[1],
            crop_pct=224 / entry.resize,
            interpolation=entry.interpolation,
            crop_mode="center",
        )
        args = dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)
    elif name.startswith("timm:"):
        architecture, loaded = (
            name[5:],
            weights is None,
        )  # from the hub, timm finds and converts its own weights best
    elif Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        weights = weights or name
        architecture, args, cfg, embedding, metadata = read_config(folder)
        folder = folder.resolve()
        name = str(
            metadata.get("run") or (folder.parent if folder.name == "student" else folder).name
        )
    elif Path(name).name == "student":
        raise UserError(f"{name}: no such folder; distill.py makes it at the end of its run")
    else:
        close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.5)
        raise UserError(
            f"{name}: no such model or folder{f'; did you mean {close[0]}?' if close else '.'} "
            f"Known are {', '.join(REGISTRY)}, timm:NAME, and folders such as runs/NAME/student"
        )
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else entry.precision if entry else BF16

    net = _build(
        architecture,
        args,
        name,
        empty=not loaded and (entry is not None or weights != "random"),
        hub=loaded,
    )
    net.pretrained_cfg = {**net.pretrained_cfg, **cfg}
    if weights == "random" and entry:
        _randomize(net, name)
    elif weights != "random" and not loaded:
        path = hub_file(name) if weights is None else weight_file(weights)
        _fill(net, read_weights(path), f"{path}: not the weights of {name}")
    if input_size and input_size != net.pretrained_cfg["input_size"][-1]:
        _resize_input(net, args, name, input_size)
    net._model_args = args
    if net.pretrained_cfg.get("crop_mode", "center") not in ("center", "squash"):
        raise UserError(
            f"{name}: its crop mode {net.pretrained_cfg['crop_mode']!r} is not supported"
        )
    if embedding is None:
        embedding = "cls" if getattr(net, "global_pool", None) == "token" else "pool"
    model = Model(
        net,
        name=name,
        embedding=embedding,
        dtype=dtype,
        weights=str(weights or "hub"),
        metadata=metadata,
    )
    model = model.to(device).eval()
    if compile:
        model.forward, model.tokens = (
            torch.compile(model.forward),
            torch.compile(model.tokens),
        )  # each at first use
        model.compiled = True
    return model


def _build(
    architecture: str, args: dict, name: str, *, empty: bool, hub: bool = False
) -> nn.Module:
    """The timm network without its classifier.

    Its weights are random and depend on the name alone, or timm's own from the hub, or, if `empty` is allowed and the
    network permits it, have no storage yet.
    """
    import timm

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UserError(
            f"{name}: timm {timm.__version__} has no architecture {architecture!r}"
            f"{'; near it are ' + ', '.join(close) if close else ''}"
        )
    # Drawing random numbers for a billion weights that are then replaced takes half a minute. timm's plain ViTs hold no
    # buffers beside their weights, so they can be built without storage; other networks are built in full.
    empty = (
        empty
        and timm.models.model_entrypoint(architecture).__module__
        == "timm.models.vision_transformer"
    )
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta") if empty else contextlib.nullcontext(),
    ):
        torch.manual_seed(zlib.crc32(name.encode()))
        page = f"https://huggingface.co/{getattr(timm.get_pretrained_cfg(architecture), 'hf_hub_id', '')}"
        with _explained(name, page) if hub else contextlib.nullcontext():
            try:
                return timm.create_model(architecture, pretrained=hub, num_classes=0, **args)
            except TypeError as error:
                raise UserError(
                    f"{name}: timm {timm.__version__} cannot build {architecture} with {args}: "
                    f"{error}"
                ) from None


def _randomize(net: nn.Module, name: str) -> None:
    """Give a registry ViT built without storage random weights: always the same bits for one name."""
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02, generator=generator)
            else:
                p.fill_(0 if key.endswith("bias") else 1e-5 if key.endswith("gamma") else 1)


def _fill(net: nn.Module, state: dict, blame: str) -> None:
    """Load `state` (in any layout that `to_timm` knows) strictly, or say what differs."""
    state = to_timm(state)
    classifier = net.pretrained_cfg.get("classifier") or ()
    for prefix in [classifier] if isinstance(classifier, str) else classifier:
        state = {
            k: v for k, v in state.items() if not k.startswith(prefix + ".")
        }  # an embedding needs no classifier
    if wrong := differences(state, net.state_dict()):
        fits = identify(state)
        raise UserError(f"{blame}: {wrong}" + (f". They fit {' and '.join(fits)}" if fits else ""))
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    net.load_state_dict(state, strict=False, assign=any(p.is_meta for p in net.parameters()))


def differences(state: dict, expected: dict) -> str:
    """What keeps `state` from being loaded where `expected` is expected, with the first names; "" if nothing does."""
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected]
    shape = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    kinds = (("tensors missing", missing), ("not expected", extra), ("of another shape", shape))
    return "; ".join(
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in kinds
        if found
    )


def identify(state: dict) -> list[str]:
    """Names of the registry's models whose architecture these weights (any known layout) fit exactly."""
    state, fits = to_timm(state), []
    width = state["pos_embed"].shape[-1] if "pos_embed" in state else 0
    for name, entry in REGISTRY.items():
        if width == entry.args.get(
            "embed_dim", 1536 if entry.timm == SWIGLU else 1024
        ):  # building takes half a second
            args = dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)
            if not differences(state, _build(entry.timm, args, name, empty=True).state_dict()):
                fits.append(name)
    return fits


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights published in the layout of transformers' DINOv2 or of the original DINOv2 into timm's names.

    timm keeps one position embedding less where registers are present: its class token has none, so the class slot of
    the position embedding is added into the class token.
    """
    if any(
        k.startswith("backbone.") for k in state
    ):  # a training checkpoint: backbone beside its heads
        state = {k: v for k, v in state.items() if k.startswith("backbone.")}
    for prefix in ("module.", "backbone.", "model.", "dinov2."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    if "embeddings.cls_token" in state:
        names = {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.register_tokens": "register_tokens",
            "embeddings.mask_token": "mask_token",
        }
        parts = (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("mlp.weights_in", "mlp.w12"),
            ("mlp.weights_out", "mlp.w3"),
            ("layernorm.", "norm."),
        )
        out, state = {}, dict(state)
        for key in [k for k in state if ".attention.attention.query." in k]:
            block = [state.pop(key.replace("query", x), None) for x in ("query", "key", "value")]
            if all(part is not None for part in block):  # else it will be missed
                new = key.replace("encoder.layer.", "blocks.").replace(
                    "attention.attention.query", "attn.qkv"
                )
                out[new] = torch.cat(block)
        for key, value in state.items():
            new = names.get(key, key)
            for old, short in parts:
                new = new.replace(old, short)
            out[new] = value
        state = out
    state = {
        k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v
        for k, v in state.items()
        if k != "mask_token"
    }
    if {"register_tokens", "cls_token", "pos_embed"} <= set(state):
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def weight_file(path: str | Path) -> Path:
    """The weight file at `path`, or in the folder `path`."""
    path = Path(path)
    if path.is_dir():
        found = [path / f for f in WEIGHT_FILES if (path / f).is_file()]
        if not found:
            raise UserError(
                f"{path}: no weights in this folder; expected {' or '.join(WEIGHT_FILES)}"
            )
        return found[0]
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give weights as --weights [NAME=]FILE, or --weights random"
        )
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file or of a PyTorch file (weights only: nothing in it is executed)."""
    import safetensors.torch

    size, remedy = path.stat().st_size, "delete it and fetch it again"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
        )
    try:
        if head[8:9] == b"{":  # by content: files in the hub's cache are named by their hash
            return safetensors.torch.load_file(path)
        if path.suffix == ".safetensors":
            raise UserError(
                f"{path}: no safetensors file ({size:,} bytes, begins with {head[:12]!r}); {remedy}"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message begins with how to load the file all the same; what follows is the reason
        lines = [
            line.strip()
            for line in str(error).split("WeightsUnpickler error:")[-1].splitlines()
            if line.strip()
        ]
        reason = next(
            (line for line in lines if "weights_only" not in line), "no tensors could be read"
        )
        raise UserError(
            f"{path}: refused. Expected tensors only (safetensors, or a state dict saved by PyTorch); this "
            f"is no such file, or it holds Python objects, which could run code: {reason}"
        ) from None
    except (
        safetensors.SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged or cut short ({size:,} bytes); {remedy} ({reason})"
        ) from None
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    ):
        inside = f" of {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else ""
        raise UserError(
            f"{path}: expected a state dict (names and tensors), found {type(state).__name__}{inside}"
        )
    return state


def read_config(folder: Path) -> tuple[str, dict, dict, str | None, dict]:
    """Architecture, its arguments, preprocessing, embedding and G2L metadata from a timm folder's config.json."""
    path = folder / "config.json"
    if (folder / "student" / "config.json").is_file():
        raise UserError(f"{folder}: a folder with a student in it; name that: {folder / 'student'}")
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder in timm's format, such as runs/NAME/student"
        )
    try:
        config = json.loads(path.read_text())
        if "model_type" in config and "architecture" not in config:
            raise UserError(
                f"{path}: in transformers' format, not timm's; name the model and give this folder as its "
                f"weights: --weights NAME={folder}"
            )
        args, found = (
            dict(config.get("model_args") or {}),
            {**config, **(config.get("pretrained_cfg") or {})},
        )
        keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "classifier")
        cfg = {k: found[k] for k in keep if found.get(k) is not None}
        for k, kind in (("input_size", int), ("mean", float), ("std", float)):
            if k in cfg and (len(cfg[k]) != 3 or not all(kind(v) > 0 for v in cfg[k])):
                raise ValueError(f"{k} is {cfg[k]}")
        if bad := sorted(k for k in args if k.startswith(("pretrained", "checkpoint", "cache"))):
            raise UserError(
                f"{path}: model_args may not hold {', '.join(bad)}, which make timm read other files"
            )
        return (
            str(config["architecture"]),
            args,
            cfg,
            config.get("embedding"),
            dict(config.get("g2l") or {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a timm configuration ({type(error).__name__}: {error})"
        ) from None


def hub_file(name: str) -> Path:
    """The weight file of a registry model: from the hub's cache, or fetched into it with the hub's token."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, absent, cut_off = REGISTRY[name].hub, EntryNotFoundError(name), False
    with _explained(name, f"https://huggingface.co/{repository}"):
        for file in WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repository, file, local_files_only=cut_off))
            except (
                EntryNotFoundError
            ) as error:  # not there, or neither in the cache nor to be reached
                absent, cut_off = error, isinstance(error, LocalEntryNotFoundError)
        raise absent


def verify(path: Path) -> None:
    """Raise UserError if checksums say that a file is damaged.

    Large files in the hub's cache are named by their SHA-256; PyTorch's own files have CRCs, which it does not compare.
    """
    blob, wrong = path.resolve(), ""
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                wrong = "its SHA-256 is not that of its name"
    elif zipfile.is_zipfile(blob):
        with zipfile.ZipFile(blob) as archive:
            if part := archive.testzip():
                wrong = f"checksum of {part} differs"
    if wrong:
        raise UserError(f"{blob}: damaged, {wrong}; delete it and fetch it again")


@contextlib.contextmanager
def _explained(name: str, page: str) -> Iterator[None]:
    """Turn the hub's errors into one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    own = f"or give a file: --weights {name}=FILE"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{name}: gated; ask for access on {page}, then `hf auth login` or set HF_TOKEN, {own}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: {page} does not exist or is hidden without a token; ask for access there, then "
            f"`hf auth login` or set HF_TOKEN, {own}"
        ) from None
    except LocalEntryNotFoundError:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(
            f"{name}: not in the cache {constants.HF_HUB_CACHE}, and {state}; fetch it once from {page} "
            f"with a network, {own}"
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{name}: {page} holds none of {', '.join(WEIGHT_FILES)}; {own}") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name}: not fetched from {page}: {str(error).splitlines()[0]}; try again, {own}"
        ) from None
    except RuntimeError as error:
        if not name.startswith("timm:"):
            raise
        raise UserError(
            f"{name}: timm has no weights to load: {str(error).splitlines()[0]}; {own}"
        ) from None


def _resize_input(net: nn.Module, args: dict, name: str, size: int) -> None:
    """Change the side of the input from the published one, where the network allows it."""
    published = net.pretrained_cfg["input_size"][-1]
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    if patch and size % patch:
        below = max(1, size // patch) * patch
        raise UserError(
            f"--input-size {size}: {name} takes multiples of its patch size {patch}, such as "
            f"{below} or {below + patch}"
        )
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=size)
        args["img_size"] = size
        windows = [
            m.window_size
            for m in net.modules()
            if isinstance(getattr(m, "window_size", None), tuple)
        ]
        if (
            windows and "window_size" in inspect.signature(type(net)).parameters
        ):  # Swin's grow with the image
            args["window_size"] = windows[0][0]
    elif net.pretrained_cfg.get("fixed_input_size"):
        raise UserError(f"--input-size {size}: {name} takes {published} only")
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, size, size)}


def parse_weights(specs: Sequence[str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Read `--weights [NAME=]FILE|random ...` for the models named on the command line.

    Without NAME a value is for the only model; `random` without NAME is for every model that is no folder.
    """
    weights: dict[str, str | None] = dict.fromkeys(names)
    for spec in specs or ():
        name = next((n for n in weights if spec.startswith(n + "=")), None)
        if name:
            weights[name] = spec[len(name) + 1 :]
        elif spec == "random":
            weights.update(
                {n: "random" for n in names if not Path(n).exists() and weights[n] is None}
            )
        elif len(weights) == 1 and ("=" not in spec or Path(spec).exists()):
            weights[names[0]] = spec
        else:
            raise UserError(
                f"--weights {spec}: for which model? Write NAME=FILE with NAME one of {', '.join(names)}"
            )
    return weights


PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script which loads models shares; `model_options(args)` turns them into arguments."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        metavar="[NAME=]FILE",
        help="weights by model: a safetensors or .bin file, a folder, or `random`; default: the hub's "
        "cache, or the hub",
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one"
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=list(PRECISIONS),
        help="of matrix products; auto is fp32 on CPU and the model's own half precision on a GPU; "
        "bf16 doubles the speed of recent CPUs too",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile models with torch.compile (a minute of start)",
    )


def model_options(args: argparse.Namespace) -> dict:
    """Keyword arguments for `load_model` from the flags of `add_model_arguments`."""
    return dict(
        device=pick_device(args.device), dtype=PRECISIONS[args.precision], compile=args.compile
    )


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device named, or for "auto" this process's GPU if there is one, else the CPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):  # ROCm is cuda too
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {device}: expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"{device}: this machine has {torch.cuda.device_count()} GPUs; torchrun takes at most so "
                "many as --nproc_per_node"
            )
    return device


def setup_distributed(device: str | torch.device = "auto") -> tuple[int, int, torch.device]:
    """Join the job that torchrun started; may be called again. Returns (rank, world size, this rank's device)."""
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    dist = torch.distributed
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def leave_distributed() -> None:
    """Leave the job, if in one: gloo's threads still hold tensors, and an exit they outlive now and then aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save_student(model: nn.Module, folder: str | Path, *, metadata: dict) -> None:
    """Write `model` (a Model or its timm network) as a folder that timm and `load_model` read.

    metadata is kept in config.json under "g2l" and comes back as `load_model(folder).metadata`.
    """
    import safetensors.torch

    net, folder = getattr(model, "net", model), Path(folder)
    cfg = net.pretrained_cfg
    keep = (
        "input_size",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
        "crop_mode",
        "fixed_input_size",
        "first_conv",
        "classifier",
    )
    config = {
        "architecture": cfg["architecture"],
        "num_classes": 0,
        "num_features": net.num_features,
        "model_args": net._model_args,
        "pretrained_cfg": {k: cfg[k] for k in keep if cfg.get(k) is not None},
        "embedding": getattr(model, "embedding", None),
        "g2l": metadata,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.float() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    with atomic(folder / "model.safetensors") as path:
        state = {k: v.cpu().contiguous() for k, v in state.items()}
        path.write_bytes(
            safetensors.torch.save(state, {"format": "pt"})
        )  # save_file makes files only the owner reads
    with atomic(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2))


# ---- features ---------------------------------------------------------------------------------------------------


class _Images(torch.utils.data.IterableDataset):
    """Reads items of a source in a data-loader worker and yields them as batches ready for a network.

    Each yield is (items, images, ended): `images` uint8 (m, 3, S, S) of which image j belongs to item items[j], and
    `ended`, the items of which all images have now been yielded, as (item, what could not be read).
    A sequence of patches, such as a slide, is read lazily by one worker and never held as a whole.
    """

    def __init__(self, source: Sequence, todo: list[int], geometry, size: int, batch_size: int):
        super().__init__()
        self.source, self.todo, self.geometry, self.size, self.batch_size = (
            source,
            todo,
            geometry,
            size,
            batch_size,
        )

    def __iter__(self) -> Iterator[tuple[list[int], torch.Tensor, list[tuple[int, list[str]]]]]:
        worker = torch.utils.data.get_worker_info()
        items, images, ended = (
            [],
            torch.empty(self.batch_size, 3, self.size, self.size, dtype=torch.uint8),
            [],
        )
        for i in self.todo[worker.id :: worker.num_workers] if worker else self.todo:
            problems: list[str] = []
            for image in self._read(i, problems):
                images[len(items)] = image
                items.append(i)
                if len(items) == self.batch_size:
                    yield items, images, ended
                    items, images, ended = [], torch.empty_like(images), []
            ended.append((i, problems))
        if ended:
            yield items, images[: len(items)], ended

    def _read(self, i: int, problems: list[str]) -> Iterator[torch.Tensor]:
        unreadable = (PatchError, OSError, ValueError)
        try:
            item = self.source[i]
            single = isinstance(item, np.ndarray) and item.ndim != 4
            parts = 1 if single else len(item)
        except unreadable as error:
            problems.append(str(error) or type(error).__name__)
            return
        if not parts:
            problems.append("holds no images")
        for j in range(parts):
            try:
                image = item if single else item[j]
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(
                        f"expected an RGB image, uint8 (H, W, 3), got {image.dtype} {image.shape}"
                    )
                pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(
                    2, 0, 1
                )[None]
                yield self.geometry(pixels)[0]
            except unreadable as error:
                problems.append(str(error) or type(error).__name__)


def extract_features(
    model: Model,
    source: Sequence,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    cache: Path | None = None,
    key: str = "",
    progress: str = "text",
    errors: list | None = None,
) -> np.ndarray:
    """Embeddings of every item of `source`, in order: float32 (N, dim), on every rank.

    source: source[i] is one RGB image, uint8 (H, W, 3), or a sequence of such (array (n, H, W, 3), list, or any object
        with len() and [j], read one by one), whose embeddings are averaged into one row. With workers > 0 it is
        copied into worker processes.
    batch_size: images per forward pass; None = 32 on CPU, on a GPU what fits its memory, at most 256. Halved when the
        memory runs out all the same.
    cache: folder for finished rows, saved every half minute, from which a second call goes on. Rows count only if
        weights, preprocessing, N and `key` (the caller's, for the data) are the same. The caller deletes the folder
        once it has saved the result.
    progress: "text" shows a bar on a terminal and plain lines elsewhere, on rank 0; "none" nothing.
    errors: receives (i, message) for whatever could not be read, sorted by i. Unreadable is what raises
        tile.PatchError, OSError or ValueError, or is no RGB image. Such a row is NaN; of a sequence, unreadable images
        are left out of the mean, and the row is NaN only if none is left.

    Under torchrun (after setup_distributed) ranks share the items. Batch size, workers and ranks change nothing but the
    last bits: to 1e-5 of a row's norm in fp32, 1e-2 in half precision.
    """
    rank, world = _rank()
    device = next(model.parameters()).device
    stamp = f"{model.fingerprint} {len(source)} {key}" if cache else ""
    known = _load_rows(Path(cache), stamp) if cache and rank == 0 else {}
    done = [set(known)]
    if world > 1:
        torch.distributed.broadcast_object_list(done)
    todo = [i for i in range(len(source)) if i not in done[0]][rank::world]
    rows: dict[int, tuple[np.ndarray, list[str]]] = {}
    if todo:
        batch_size = batch_size or _batch_size(model)
        images = _Images(source, todo, model.geometry, model.input_size, min(batch_size, 4096))
        loader = torch.utils.data.DataLoader(
            images, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"
        )
        saved, save_at = set(), time.monotonic() + SAVE_SECONDS
        with _progress(len(source), len(done[0]), world, progress if rank == 0 else "none") as tick:
            for i, row, problems in _embed(model, loader, batch_size, device):
                rows[i] = (row, problems)
                tick()
                if cache and time.monotonic() >= save_at:
                    _save_rows(Path(cache), stamp, {i: rows[i] for i in rows if i not in saved})
                    saved, save_at = set(rows), time.monotonic() + SAVE_SECONDS
        if cache and len(rows) > len(saved):
            _save_rows(Path(cache), stamp, {i: rows[i] for i in rows if i not in saved})
    rows.update(known)
    out = np.zeros((len(source), model.dim), np.float32)
    for i, (row, _) in rows.items():
        out[i] = row
    found = sorted((i, problem) for i, (_, problems) in rows.items() for problem in problems)
    if world > 1:  # each row is one rank's and zero on the others, so the sum is exact
        for part in torch.from_numpy(out).split(65536):
            torch.distributed.all_reduce(part)
        lists: list = [None] * world
        torch.distributed.all_gather_object(lists, found)
        found = sorted(problem for part in lists for problem in part)
    if errors is not None:
        errors.extend(found)
    return out


def _embed(
    model: Model, loader, batch_size: int, device: torch.device
) -> Iterator[tuple[int, np.ndarray, list[str]]]:
    """(item, row, problems) for every item, as its last image comes out of the network."""
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    waiting: tuple | None = None

    def collect(items, features, ended):
        for i, row in zip(
            items, features.double().cpu().numpy(), strict=True
        ):  # waits for the device
            sums[i] = sums[i] + row if i in sums else row
            counts[i] = counts.get(i, 0) + 1
        for i, problems in ended:
            n = counts.pop(i, 0)
            yield (
                i,
                (sums.pop(i) / n).astype(np.float32)
                if n
                else np.full(model.dim, np.nan, np.float32),
                problems,
            )

    def forward(images):
        nonlocal batch_size
        parts, start = [], 0
        while start < len(images):
            part = images[start : start + batch_size]
            pad = (
                batch_size - len(part) if model.compiled else 0
            )  # another shape would be compiled anew
            try:
                x = nn.functional.pad(
                    part.to(device, non_blocking=True).float() / 255, (0, 0, 0, 0, 0, 0, 0, pad)
                )
                parts.append(model(model.normalize(x))[: len(part)])
                start += len(part)
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise UserError(
                        f"{model.name}: not enough memory on {device} for one image; use --device cpu or "
                        "--precision bf16"
                    ) from None
                batch_size = (batch_size + 1) // 2
                print(
                    f"{model.name}: out of memory on {device}, batch size now {batch_size}",
                    file=sys.stderr,
                )
        return torch.cat(parts) if parts else torch.empty(0, model.dim)

    with torch.inference_mode():
        for items, images, ended in loader:
            features = forward(images)  # queued on the GPU while the batch before is collected
            if waiting:
                yield from collect(*waiting)
            waiting = items, features, ended
        if waiting:
            yield from collect(*waiting)


def _batch_size(model: Model) -> int:
    """Images per forward pass: 32 on CPU; on a GPU a multiple of 8 that fills 80 % of its free memory, at most 256."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 32
    x = torch.zeros(8, 3, model.input_size, model.input_size, device=device)
    with torch.inference_mode():
        for _ in range(2):  # the first call also loads libraries
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            Model.forward(model, x)  # never the compiled one: this shape is of no use later
    each = (torch.cuda.max_memory_allocated(device) - before) / len(x)
    torch.cuda.empty_cache()
    return int(np.clip(0.8 * torch.cuda.mem_get_info(device)[0] / each // 8 * 8, 8, 256))


def _load_rows(folder: Path, stamp: str) -> dict[int, tuple[np.ndarray, list[str]]]:
    """Finished rows from an earlier call, by item; other weights' or data's and damaged ones are passed over."""
    import safetensors

    rows = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with (
            contextlib.suppress(safetensors.SafetensorError),
            safetensors.safe_open(path, "numpy") as file,
        ):
            about = file.metadata()
            if about and about.get("stamp") == stamp:
                problems = dict(json.loads(about["problems"]))
                for i, row in zip(
                    file.get_tensor("items").tolist(), file.get_tensor("rows"), strict=True
                ):
                    rows[i] = (row, problems.get(i, []))
    return rows


def _save_rows(folder: Path, stamp: str, rows: dict[int, tuple[np.ndarray, list[str]]]) -> None:
    import safetensors.numpy

    arrays = {
        "items": np.array(list(rows), np.int64),
        "rows": np.stack([row for row, _ in rows.values()]),
    }
    problems = [(i, found) for i, (_, found) in rows.items() if found]
    name = hashlib.sha256(f"{stamp} {sorted(rows)}".encode()).hexdigest()[:16]
    with atomic(folder / f"{name}.safetensors") as path:
        safetensors.numpy.save_file(
            arrays, path, metadata={"stamp": stamp, "problems": json.dumps(problems)}
        )


@contextlib.contextmanager
def _progress(total: int, done: int, world: int, kind: str) -> Iterator:
    """Yields a function to call once per item of this rank; other ranks are taken to be as fast."""
    if kind == "none":
        yield lambda: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, unit="image", smoothing=0.05) as bar:
            yield lambda: bar.update(min(world, total - bar.n))
    else:
        count, start, shown = 0, time.monotonic(), time.monotonic()

        def tick():
            nonlocal count, shown
            count += 1
            now, at = time.monotonic(), min(total, done + count * world)
            if now - shown > 15 or count * world >= total - done > (count - 1) * world:
                shown = now
                rate = count * world / (now - start)
                print(
                    f"features: {at:,} of {total:,}, {rate:.1f} a second, {(total - at) / rate:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield tick


def _rank() -> tuple[int, int]:
    dist = torch.distributed
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


# ---- speed ------------------------------------------------------------------------------------------------------


def flops_per_image(model: Model) -> float:
    """Floating-point operations of one forward pass of one image, counted: multiply and add are two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(
        1, 3, model.input_size, model.input_size, device=next(model.parameters()).device
    )
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        Model.forward(model, x)
    return float(counter.get_total_flops())


@functools.lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large square matrix product on random numbers: what a network can reach at best."""
    n = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # a training run's random numbers stay its own
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    return 2 * n**3 / min(_seconds(lambda: a @ b, device))


def _seconds(call, device: torch.device, budget: float = 3.0) -> list[float]:
    """Times of up to 20 runs of `call`, or as many as fit into `budget` seconds (at least 2), after a warm-up."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3 if device.type == "cuda" else 1):  # allocation, compilation, clocks
        call()
    wait()
    times: list[float] = []
    while len(times) < 2 or (len(times) < 20 and sum(times) < budget):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times


def speed(model: Model, batch_size: int | None = None) -> dict:
    """Throughput of one model on its device: the row that `python models.py --speed` prints."""
    device = next(model.parameters()).device
    batch_size = batch_size or (_batch_size(model) if device.type == "cuda" else 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, model.input_size, model.input_size, generator=generator).to(
        device
    )
    x, flops, ceiling = (
        model.normalize(x),
        flops_per_image(model),
        matmul_ceiling(device, model.dtype),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        seconds = float(np.median(_seconds(lambda: model(x), device)))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "model": model.name,
        "parameters": model.parameters_count,
        "precision": str(model.dtype).split(".")[-1],
        "input": model.input_size,
        "batch": batch_size,
        "gflops": flops / 1e9,
        "ms": 1e3 * seconds / batch_size,
        "rate": batch_size / seconds,
        "tflops": flops * batch_size / seconds / 1e12,
        "mfu": flops * batch_size / seconds / ceiling,
        "ceiling": ceiling / 1e12,
        "peak": peak,
    }


def show_speed(names: Sequence[str], args: argparse.Namespace) -> None:
    """Print one line per model as it is measured. Weights are random unless given: they do not change the time."""
    weights, options = parse_weights(args.weights, names), model_options(args)
    where = (
        torch.cuda.get_device_name(options["device"])
        if options["device"].type == "cuda"
        else "CPU, " + f"{torch.get_num_threads()} threads"
    )
    print(f"{where}; torch {torch.__version__}{'; compiled' if args.compile else ''}")
    for n, name in enumerate(names):
        default = None if Path(name).exists() else "random"
        row = speed(
            load_model(name, weights[name] or default, input_size=args.input_size, **options),
            args.batch_size,
        )
        cells = {
            "parameters": f"{row['parameters'] / 1e6:,.1f} M",
            "precision": row["precision"],
            "input": str(row["input"]),
            "batch": str(row["batch"]),
            "GFLOP/image": f"{row['gflops']:,.1f}",
            "ms/image": f"{row['ms']:.2f}",
            "images/s": f"{row['rate']:,.1f}",
            "TFLOP/s": f"{row['tflops']:.3g}",
            "MFU": f"{row['mfu']:.0%}",
            "memory": f"{row['peak'] / 2**30:.1f} GiB" if row["peak"] else "-",
        }
        width = max(len(name) for name in (*names, row["model"]))
        if n == 0:
            print("model".ljust(width), *(title.rjust(9) for title in cells))
        print(
            row["model"].ljust(width),
            *(cell.rjust(max(9, len(title))) for title, cell in cells.items()),
            flush=True,
        )
    print(
        f"MFU: share of the {row['ceiling']:.3g} TFLOP/s measured for a large matrix product in the same precision; "
        "preprocessing and reading are not counted"
    )


# ---- command line -----------------------------------------------------------------------------------------------


def table() -> str:
    """The registry as text."""
    rows = [("name", "parameters", "embedding", "dim", "prefix", "licence", "access", "hub")]
    rows += [
        (
            name,
            f"{e.parameters:,}",
            e.embedding,
            str(e.dim),
            str(e.prefix),
            e.licence,
            e.access,
            e.hub,
        )
        for name, e in REGISTRY.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in (1, 3, 4) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def check(name: str | None, path: str | None, args: argparse.Namespace) -> None:
    """Say that a weight file (without one, the hub's) is whole and fits, or raise UserError that says why not.

    Without a name, say which models it fits.
    """
    if name is None:
        fits = identify(read_weights(weight_file(path)))
        if not fits:
            raise UserError(
                f"{path}: readable, but fits no model of the registry (python models.py lists it)"
            )
        print(f"{path}: fits {' and '.join(fits)}")
        return
    start = time.perf_counter()
    if path is None and name.lower() in REGISTRY:
        path = str(hub_file(name.lower()))
    if path not in (None, "random"):
        verify(weight_file(path))
    model = load_model(name, path, input_size=args.input_size, **model_options(args))
    flat = [k for k, p in model.net.named_parameters() if not torch.isfinite(p).all()]
    if flat:
        raise UserError(
            f"{path or name}: {len(flat)} tensors hold NaN or infinity ({', '.join(flat[:3])})"
        )
    print(
        f"{path or name}: fits {model.name}; {model.parameters_count:,} parameters, embedding {model.dim} "
        f"({model.embedding}), fingerprint {model.fingerprint} ({time.perf_counter() - start:.1f} s)"
    )


def build_parser() -> argparse.ArgumentParser:
    """Arguments of `python models.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of the registry, timm:NAME, or runs/NAME/student"
    )
    act = parser.add_argument_group("what to do; without names and flags, the registry is printed")
    act.add_argument(
        "--check",
        metavar="WEIGHTS",
        help="does this file or folder hold the weights of NAME? Without "
        "NAME: of which models does it?",
    )
    act.add_argument(
        "--speed", nargs="*", metavar="NAME", help="measure images per second, FLOPs and MFU"
    )
    act.add_argument(
        "--input-size", type=int, metavar="PX", help="side of the input, if not the published one"
    )
    act.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="for --speed; default: 4 on CPU, on a GPU the most",
    )
    add_model_arguments(parser)
    return parser


class _Help(Help, argparse.RawDescriptionHelpFormatter):
    """Shared help, with the docstring's own lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python models.py`; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        for flag, value in (("--input-size", args.input_size), ("--batch-size", args.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{flag} {value}: expected at least 1")
        if args.speed is not None:
            show_speed(args.speed + args.names or list(REGISTRY), args)
        elif args.check:
            for name in args.names or [None]:
                check(name, args.check, args)
        elif args.names:
            for name in args.names:
                check(name, parse_weights(args.weights, args.names)[name], args)
        elif args.weights:
            raise UserError(
                f"--weights {' '.join(args.weights)}: of which model? python models.py NAME --weights ..."
            )
        else:
            print(table() + "\n" + NOTES)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

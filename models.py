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
import json
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tile import PatchError, UserError, atomic

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
    dim: int  # width of the embedding
    prefix: int  # tokens before the patch tokens: CLS and registers
    norm: tuple  # mean, std
    licence: str
    gated: bool  # access must be asked for on the model's page
    embedding: str = "cls"  # "cls", or "cls+mean": CLS beside the mean of the patch tokens, registers left out
    precision: torch.dtype = torch.float16  # of matrix products on a GPU
    resize: int = 224  # the shorter side is resized to this, then the middle 224 x 224 is taken
    interpolation: str = "bicubic"


NC_ND = "CC-BY-NC-ND-4.0"
REGISTRY: dict[str, Entry] = {
    "h-optimus-0": Entry("bioptimus/H-optimus-0", SWIGLU, {}, 1_134_774_272, 1536, 5, H_OPTIMUS, "Apache-2.0", False),
    "h-optimus-1": Entry("bioptimus/H-optimus-1", SWIGLU, {}, 1_134_774_272, 1536, 5, H_OPTIMUS, NC_ND, True),
    "h0-mini": Entry("bioptimus/H0-mini", SWIGLU, dict(embed_dim=768, depth=12, num_heads=12), 85_739_520, 768, 5,
                     H_OPTIMUS, NC_ND, True),
    "hibou-l": Entry("histai/hibou-L", SWIGLU, dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=5.34375),
                     303_657_216, 1024, 5, HIBOU, "Apache-2.0", False, precision=torch.bfloat16),
    "hibou-b": Entry("histai/hibou-b", SWIGLU, dict(embed_dim=768, depth=12, num_heads=12), 85_739_520, 768, 5, HIBOU,
                     "Apache-2.0", False, precision=torch.bfloat16),
    "uni": Entry("MahmoodLab/UNI", VIT_L16, {}, 303_350_784, 1024, 1, IMAGENET, NC_ND, True, interpolation="bilinear"),
    "uni2-h": Entry("MahmoodLab/UNI2-h", SWIGLU, dict(depth=24, reg_tokens=8), 681_394_176, 1536, 9, IMAGENET, NC_ND,
                    True, precision=torch.bfloat16, interpolation="bilinear"),
    "virchow": Entry("paige-ai/Virchow", SWIGLU, dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375,
                     reg_tokens=0, no_embed_class=False), 631_229_184, 2560, 1, IMAGENET, "Apache-2.0", True,
                     "cls+mean"),
    "virchow2": Entry("paige-ai/Virchow2", SWIGLU, dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375,
                      no_embed_class=False), 631_239_424, 2560, 5, IMAGENET, NC_ND, True, "cls+mean"),
    "prov-gigapath": Entry("prov-gigapath/prov-gigapath", SWIGLU, dict(patch_size=16, mlp_ratio=5.33334, reg_tokens=0,
                           no_embed_class=False), 1_134_953_984, 1536, 1, IMAGENET, "Apache-2.0, research use", True,
                           resize=256),
    "phikon-v2": Entry("owkin/phikon-v2", VIT_L16, {}, 303_350_784, 1024, 1, IMAGENET, "Owkin non-commercial", True,
                       precision=torch.bfloat16),
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Model(nn.Module):
    """A timm network with the preprocessing and the embedding its authors meant. Made by `load_model`.

    With a half-precision `dtype` the weights of linear and convolution layers are stored in it and the network runs
    under autocast, so that norms and the residual stream stay fp32. Such a model is for inference; load a network that
    is to be trained with dtype=torch.float32.
    """

    def __init__(self, net: nn.Module, *, name: str, embedding: str, dtype: torch.dtype, weights: str,
                 metadata: dict | None = None):
        super().__init__()
        cfg = net.pretrained_cfg
        self.net, self.name, self.embedding, self.dtype, self.weights = net, name, embedding, dtype, weights
        self.metadata = metadata or {}
        self.input_size = int(cfg["input_size"][-1])
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.resize = int(self.input_size / cfg["crop_pct"] + 1e-6)
        self.interpolation, self.crop_mode = cfg["interpolation"], cfg.get("crop_mode", "center")
        self.tokens_dim = net.num_features
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

    def geometry(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) of any size -> uint8 (B, 3, S, S): shorter side resized with antialias, centre cropped."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F
        size = [self.resize, self.resize] if self.crop_mode == "squash" else [self.resize]
        images = F.resize(images, size, interpolation=InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(images, [self.input_size, self.input_size])

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """float (B, 3, S, S) in [0, 1] -> the same shape with this model's mean and standard deviation."""
        return (images - self._mean.to(images.device)) / self._std.to(images.device)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, S, S), the transform this model was published with."""
        return self.normalize(self.geometry(images).float() / 255)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, S, S) -> all tokens (B, T, C) after the final norm, prefix tokens first. ViTs only."""
        if not self.num_prefix_tokens:
            raise ValueError(f"{self.name} has no class token, so no token features")
        with self._autocast(x):
            return self.net.forward_features(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, S, S) -> embedding (B, dim)."""
        if self.embedding != "cls+mean":
            with self._autocast(x):
                return self.net(x)
        tokens = self.tokens(x)
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens:].mean(1)], dim=-1)

    def _autocast(self, x: torch.Tensor):
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
            return f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(data).digest()

        total = hashlib.sha256(json.dumps([self.net.pretrained_cfg["architecture"], self.input_size, self.resize,
            self.mean, self.std, self.interpolation, self.crop_mode, self.embedding, str(self.dtype)]).encode())
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashlib releases the interpreter lock
            for part in pool.map(digest, sorted(self.net.state_dict().items())):
                total.update(part)
        return total.hexdigest()[:32]


# ---- loading ----------------------------------------------------------------------------------------------------


def load_model(name: str, weights: str | None = None, *, device="cpu", dtype: torch.dtype | None = None,
               input_size: int | None = None, compile: bool = False) -> Model:
    """Build a model, give it its weights, and put it on a device in eval mode.

    name: of REGISTRY, "timm:NAME", a folder in timm's format (such as runs/NAME/student), or a weight file in one.
    weights: None for the hub (a folder's own for a folder), "random", or a file or folder; then no network is touched.
    dtype: of weights and matrix products; None = fp32 on CPU, the model's own half precision on a GPU.
    input_size: side in pixels if not the published one. Position embeddings of a ViT are resampled to it once (timm's
        bicubic with antialias), so it must be a multiple of the patch size.
    Raises UserError for whatever a user can mend.
    """
    device = torch.device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    entry = REGISTRY.get(name.lower())
    if entry:
        name, metadata, embedding = name.lower(), {}, entry.embedding
        cfg = dict(input_size=(3, 224, 224), mean=entry.norm[0], std=entry.norm[1], crop_pct=224 / entry.resize,
                   interpolation=entry.interpolation, crop_mode="center", hf_hub_id=entry.hub)
        args = dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)
        architecture, dtype = entry.timm, dtype or entry.precision
    elif name.startswith("timm:"):
        architecture, args, cfg, metadata, embedding = name[5:], {}, {}, {}, None
    elif Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        weights = weights or name
        architecture, args, cfg, metadata = read_config(folder)
        embedding, dtype = metadata.get("embedding"), dtype or torch.bfloat16
        name = metadata.get("run") or folder.resolve().name
    else:
        close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.5)
        raise UserError(f"{name}: no such model or folder{f'; did you mean {close[0]}?' if close else ''} "
                        f"Known are {', '.join(REGISTRY)}, timm:NAME, and folders such as runs/NAME/student")
    dtype = dtype or torch.bfloat16

    net = _build(architecture, args, name, meta=weights != "random")
    net.pretrained_cfg = {**net.pretrained_cfg, **cfg, "architecture": architecture}
    if weights != "random":
        path = _hub_file(name, net.pretrained_cfg) if weights is None else weight_file(weights)
        _fill(net, read_weights(path), f"{path}: these are not the weights of {name}")
    if input_size and input_size != net.pretrained_cfg["input_size"][-1]:
        _resize_input(net, args, name, input_size)
    net._model_args = args
    if embedding is None:
        embedding = "cls" if getattr(net, "global_pool", None) == "token" else "pool"
    model = Model(net, name=name, embedding=embedding, dtype=dtype, weights=str(weights or "hub"), metadata=metadata)
    model = model.to(device).eval()
    if compile:
        model.forward = torch.compile(model.forward)
    return model


def _build(architecture: str, args: dict, name: str, meta: bool) -> nn.Module:
    """The timm network, with random weights that depend on the name alone, or without (on the meta device) if asked."""
    import timm
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UserError(f"{name}: timm {timm.__version__} has no architecture {architecture!r}"
                        f"{'; near it are ' + ', '.join(close) if close else ''}")
    # Drawing random numbers for a billion weights that a file then replaces takes half a minute. timm's plain ViTs hold
    # no buffers outside their weights, so they can be built without storage; others are built in full.
    meta = meta and timm.models.model_entrypoint(architecture).__module__ == "timm.models.vision_transformer"
    with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else contextlib.nullcontext():
        torch.manual_seed(zlib.crc32(name.encode()))
        return timm.create_model(architecture, pretrained=False, num_classes=0, **args)


def _fill(net: nn.Module, state: dict, blame: str) -> None:
    """Load `state` (any layout that `to_timm` knows) strictly, or say what differs."""
    state = to_timm(state)
    classifier = net.pretrained_cfg.get("classifier") or ()
    for prefix in [classifier] if isinstance(classifier, str) else classifier:
        state = {k: v for k, v in state.items() if not k.startswith(prefix + ".")}  # the embedding needs no classifier
    expected = net.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected]
    wrong = [f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}" for k, v in expected.items()
             if k in state and state[k].shape != v.shape]
    if missing or extra or wrong:
        parts = [f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})" for what, found in
                 (("tensors missing", missing), ("not expected", extra), ("of another shape", wrong)) if found]
        raise UserError(f"{blame}: {'; '.join(parts)}")
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    net.load_state_dict(state, strict=False, assign=any(p.is_meta for p in net.parameters()))
    for p in net.parameters():
        p.requires_grad_(True)


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights published in the layout of transformers' DINOv2 or of the original DINOv2 into timm's names.

    timm keeps one position embedding less where registers are present: its class token has none, so the class slot of
    the position embedding is added into the class token.
    """
    if "embeddings.cls_token" in state:
        names = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
                 "embeddings.register_tokens": "register_tokens", "embeddings.mask_token": "mask_token"}
        parts = (("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("encoder.layer.", "blocks."),
                 ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                 ("layer_scale2.lambda1", "ls2.gamma"), ("mlp.weights_in", "mlp.w12"), ("mlp.weights_out", "mlp.w3"),
                 ("layernorm.", "norm."))
        out, state = {}, dict(state)
        for key in [k for k in state if ".attention.attention.query." in k]:
            block = [state.pop(key.replace("query", x)) for x in ("query", "key", "value")]
            new = key.replace("encoder.layer.", "blocks.").replace("attention.attention.query", "attn.qkv")
            out[new] = torch.cat(block)
        for key, value in state.items():
            new = names.get(key, key)
            for old, short in parts:
                new = new.replace(old, short)
            out[new] = value
        state = out
    state = {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in state.items()
             if k != "mask_token"}
    if "register_tokens" in state:
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
            raise UserError(f"{path}: no weights in this folder; expected {' or '.join(WEIGHT_FILES)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file; give weights as --weights [NAME=]FILE, or --weights random")
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file or of a PyTorch file (weights only: nothing in it is executed)."""
    import pickle

    import safetensors
    import safetensors.torch
    size = path.stat().st_size
    head = path.open("rb").read(16)
    if head.startswith(b"version https://"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`")
    try:
        if head[8:9] == b"{":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, because it holds Python objects that could run code, or is no weight file; "
                        f"expected tensors only (safetensors or a state dict): {str(error).splitlines()[0]}") from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or cut short ({size:,} bytes): {str(error).splitlines()[0]}; "
                        "fetch it again") from None
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(state).__name__}")
    return state


def read_config(folder: Path) -> tuple[str, dict, dict, dict]:
    """Architecture, constructor arguments, preprocessing and G2L metadata from a timm folder's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a folder in timm's format, such as runs/NAME/student")
    try:
        config = json.loads(path.read_text())
        architecture, args = config["architecture"], dict(config.get("model_args") or {})
        cfg = dict(config.get("pretrained_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a timm configuration ({type(error).__name__}: {error})") from None
    hostile = {"checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"} & set(args)
    if hostile:
        raise UserError(f"{path}: model_args may not hold {', '.join(sorted(hostile))}")
    keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "classifier")
    return architecture, args, {k: cfg[k] for k in keep if k in cfg}, config.get("g2l") or {}


def _hub_file(name: str, cfg: dict) -> Path:
    """The weight file in the hub's cache, fetched if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    repository = cfg.get("hf_hub_id")
    if not repository:
        raise UserError(f"{name}: timm knows no weights for it on the hub; give --weights {name}=FILE or random")
    for file in WEIGHT_FILES:
        try:
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{name}: weights not fetched from https://huggingface.co/{repository}: "
                            f"{str(error).splitlines()[0]}") from None
    raise UserError(f"{name}: https://huggingface.co/{repository} has none of {', '.join(WEIGHT_FILES)}, or it is not "
                    f"in the cache and there is no network; give --weights {name}=FILE")


def _resize_input(net: nn.Module, args: dict, name: str, size: int) -> None:
    """Change the side of the input from the published one; only where the network allows it."""
    if hasattr(net, "patch_embed"):
        patch = net.patch_embed.patch_size[0]
        if size % patch:
            raise UserError(f"--input-size {size}: {name} takes multiples of its patch size, {patch}; "
                            f"nearest are {size // patch * patch} and {(size // patch + 1) * patch}")
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=size)
        args["img_size"] = size
    elif net.pretrained_cfg.get("fixed_input_size"):
        raise UserError(f"--input-size {size}: {name} only takes {net.pretrained_cfg['input_size'][-1]}")
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, size, size)}


def parse_weights(specs: Sequence[str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Read `--weights [NAME=]FILE|random ...` for the models named on the command line.

    Without NAME a value is for the only model; `random` without NAME is for every model that is no folder.
    """
    weights: dict[str, str | None] = dict.fromkeys(names)
    for spec in specs or ():
        name, equals, value = spec.partition("=")
        if equals and name in weights:
            weights[name] = value
        elif spec == "random":
            weights.update({n: "random" for n in names if not Path(n).exists() and weights[n] is None})
        elif len(weights) == 1 and (not equals or Path(spec).exists()):
            weights[names[0]] = spec
        else:
            raise UserError(f"--weights {spec}: for which model? Write NAME=FILE with NAME one of {', '.join(names)}")
    return weights


PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script which loads models shares; `model_options(args)` turns them into arguments."""
    group = parser.add_argument_group("models")
    group.add_argument("--weights", nargs="+", action="extend", metavar="[NAME=]FILE",
                       help="weights by model: a safetensors or .bin file, a folder, or `random`; default: the hub's "
                       "cache, or the hub")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    group.add_argument("--precision", default="auto", choices=list(PRECISIONS),
                       help="of matrix products; auto is fp32 on CPU and the model's own half precision on a GPU")
    group.add_argument("--compile", action="store_true", help="compile models with torch.compile (a minute of start)")


def model_options(args: argparse.Namespace) -> dict:
    """Keyword arguments for `load_model` from the flags of `add_model_arguments`."""
    return dict(device=pick_device(args.device), dtype=PRECISIONS[args.precision], compile=args.compile)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device named, or for "auto" this process's GPU if there is one, else the CPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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


def save_student(model: nn.Module, folder: str | Path, *, metadata: dict) -> None:
    """Write `model` (a Model or its timm network) as a folder that timm and `load_model` read.

    metadata is kept in config.json under "g2l" and comes back as `load_model(folder).metadata`.
    """
    import safetensors.torch
    net, folder = getattr(model, "net", model), Path(folder)
    cfg = net.pretrained_cfg
    keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "fixed_input_size", "first_conv",
            "classifier")
    config = {"architecture": cfg["architecture"], "num_classes": 0, "num_features": net.num_features,
              "model_args": net._model_args, "pretrained_cfg": {k: cfg[k] for k in keep if cfg.get(k) is not None},
              "g2l": {**metadata, "embedding": getattr(model, "embedding", None)}}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "model.safetensors") as path:
        safetensors.torch.save_file({k: v.detach().float().cpu().contiguous() if v.is_floating_point() else v.cpu()
                                     for k, v in net.state_dict().items()}, path, metadata={"format": "pt"})
    with atomic(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2))


# ---- features ---------------------------------------------------------------------------------------------------


def extract_features(model: Model, source: Sequence, *, batch_size: int | None = None, workers: int = 0,
                     cache: Path | None = None, key: str = "", progress: str = "text",
                     errors: list | None = None) -> np.ndarray:
    """Embeddings of every item of `source`, in order: float32 (N, dim).

    source[i] is one RGB image, uint8 (H, W, 3), or a sequence of them, whose embeddings are averaged into one row.
    An item whose reading raises tile.PatchError, OSError or ValueError becomes a row of NaN, and (i, message) is
    appended to `errors`; of a sequence only the unreadable images are left out, and the row is NaN if none can be read.
    """
    rank, world = _rank()
    out = np.zeros((len(source), model.dim), np.float32)
    failed: list[tuple[int, str]] = []
    device = next(model.parameters()).device
    mine = range(rank, len(source), world)
    batch_size = batch_size or (16 if device.type == "cpu" else 128)
    sums, counts = {}, {}
    images, owners = [], []

    def flush():
        if not images:
            return
        with torch.inference_mode():
            batch = torch.stack(images).to(device)
            features = model(model.normalize(batch.float() / 255)).double().cpu().numpy()
        for owner, row in zip(owners, features, strict=True):
            sums[owner] = sums.get(owner, 0) + row
            counts[owner] = counts.get(owner, 0) + 1
        images.clear()
        owners.clear()

    for i in mine:
        try:
            item = source[i]
            for image in [item] if getattr(item, "ndim", 4) == 3 else item:
                images.append(model.geometry(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])[0])
                owners.append(i)
                if len(images) == batch_size:
                    flush()
        except (PatchError, OSError, ValueError) as error:
            failed.append((i, f"{type(error).__name__}: {error}"))
    flush()
    for i in mine:
        out[i] = sums[i] / counts[i] if i in sums else np.nan
    if world > 1:
        total = torch.from_numpy(out)
        torch.distributed.all_reduce(total)
        lists = [None] * world
        torch.distributed.all_gather_object(lists, failed)
        failed = sorted(f for part in lists for f in part)
    if errors is not None:
        errors.extend(failed)
    return out


def _rank() -> tuple[int, int]:
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


# ---- command line -----------------------------------------------------------------------------------------------


def table() -> str:
    """The registry as text."""
    rows = [("name", "parameters", "embedding", "dim", "prefix", "input", "licence", "access", "hub")]
    rows += [(name, f"{e.parameters / 1e6:,.1f} M", e.embedding, str(e.dim), str(e.prefix), "224", e.licence,
              "gated" if e.gated else "open", e.hub) for name, e in REGISTRY.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models")
    parser.add_argument("--check", metavar="WEIGHTS", help="say whether this file or folder holds the weights of NAME")
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if not args.names:
            print(table())
            return 0
        for name in args.names:
            start = time.perf_counter()
            model = load_model(name, args.check or parse_weights(args.weights, args.names)[name], **model_options(args))
            print(f"{name}: fits; {model.parameters_count:,} parameters, embedding {model.dim} ({model.embedding}), "
                  f"fingerprint {model.fingerprint}, {time.perf_counter() - start:.1f} s")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

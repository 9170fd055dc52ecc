"""Every foundation model of the paper, loaded as its authors meant, as a timm network and without remote code.

    python -m g2l.models                              the registry as a table
    python -m g2l.models hibou-l --check FILE         do these weights fit?
    python -m g2l.models --speed h-optimus-0 hibou-l  images per second, FLOPs and MFU on the device at hand

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
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from g2l.arguments import Help
from g2l.devices import add_model_arguments, model_options
from g2l.errors import UserError
from g2l.files import atomic
from g2l.registry import BF16, NOTES, REGISTRY, SWIGLU, table
from g2l.weights import (
    explained,
    hub_file,
    misfits,
    parse_weights,
    read_config,
    read_weights,
    to_timm,
    verify,
    weight_file,
)


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
        with explained(name, page) if hub else contextlib.nullcontext():
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
    if wrong := misfits(state, net.state_dict()):
        fits = identify(state)
        raise UserError(f"{blame}: {wrong}" + (f". They fit {' and '.join(fits)}" if fits else ""))
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    net.load_state_dict(state, strict=False, assign=any(p.is_meta for p in net.parameters()))


def identify(state: dict) -> list[str]:
    """Names of the registry's models whose architecture these weights (any known layout) fit exactly."""
    state, fits = to_timm(state), []
    width = state["pos_embed"].shape[-1] if "pos_embed" in state else 0
    for name, entry in REGISTRY.items():
        if width == entry.args.get(
            "embed_dim", 1536 if entry.timm == SWIGLU else 1024
        ):  # building takes half a second
            args = dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)
            if not misfits(state, _build(entry.timm, args, name, empty=True).state_dict()):
                fits.append(name)
    return fits


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


def fitting_batch_size(model: Model) -> int:
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
    """Throughput of one model on its device: the row that `python -m g2l.models --speed` prints."""
    device = next(model.parameters()).device
    batch_size = batch_size or (fitting_batch_size(model) if device.type == "cuda" else 4)
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


def check_weights(name: str | None, path: str | None, args: argparse.Namespace) -> None:
    """Say that a weight file (without one, the hub's) is whole and fits, or raise UserError that says why not.

    Without a name, say which models it fits.
    """
    if name is None:
        fits = identify(read_weights(weight_file(path)))
        if not fits:
            raise UserError(
                f"{path}: readable, but fits no model of the registry (python -m g2l.models lists it)"
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
    """Arguments of `python -m g2l.models`."""
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
    """Run `python -m g2l.models`; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        for flag, value in (("--input-size", args.input_size), ("--batch-size", args.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{flag} {value}: expected at least 1")
        if args.speed is not None:
            show_speed(args.speed + args.names or list(REGISTRY), args)
        elif args.check:
            for name in args.names or [None]:
                check_weights(name, args.check, args)
        elif args.names:
            for name in args.names:
                check_weights(name, parse_weights(args.weights, args.names)[name], args)
        elif args.weights:
            raise UserError(
                f"--weights {' '.join(args.weights)}: of which model? python -m g2l.models NAME --weights ..."
            )
        else:
            print(table() + "\n" + NOTES)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

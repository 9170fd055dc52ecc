"""Every foundation model of the paper as a timm network, loaded as its authors meant.

    python -m g2l.models                              the registry as a table
    python -m g2l.models hibou-l --check FILE         do these weights fit?
    python -m g2l.models --speed h-optimus-0 hibou-l  images per second, FLOPs and MFU

`load_model(name, weights)` finds out what a name stands for (`blueprint`), builds the timm network,
fills it with weights, and gives a `Model`: that network with its own preprocessing and its own
definition of the embedding. `save_student` writes one as a folder that timm and `load_model` read.
"""

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import math
import sys
import time
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from g2l.arguments import Help, flag
from g2l.card import card, check_card
from g2l.devices import (
    MODEL_REMEDIES,
    add_model_arguments,
    describe_device,
    model_options,
)
from g2l.errors import UserError, exit_status
from g2l.files import atomic, read_json, write_text
from g2l.registry import NOTES, REGISTRY, find, table
from g2l.speed import COLUMNS, speed
from g2l.weights import (
    State,
    explained,
    hub_file,
    misfits,
    parse_weights,
    read_config,
    read_weights,
    tensors_digest,
    to_timm,
    verify,
    weight_file,
)

Network = Any  # a timm network (nn.Module), whose attributes no type checker knows


class Model(nn.Module):
    """A timm network with the preprocessing and the embedding its authors meant. Made by
    `load_model`.

    With a half-precision `dtype` the weights of linear and convolution layers are stored in it and
    the network runs under autocast, so that norms and the residual stream stay fp32. Such a model
    is for inference; load a network that is to be trained with dtype=torch.float32.
    """

    def __init__(
        self,
        net: Network,
        *,
        name: str,
        embedding: str,
        dtype: torch.dtype,
        weights: str,
        metadata: dict | None = None,
    ):
        super().__init__()
        cfg = net.pretrained_cfg
        self.net: Network = net
        self.name = name
        self.embedding = embedding
        self.dtype = dtype
        self.weights = weights
        self.metadata = metadata or {}
        self.compiled = False
        self.input_size = int(cfg["input_size"][-1])
        self.mean = tuple(cfg["mean"])
        self.std = tuple(cfg["std"])
        self.resize = int(self.input_size / cfg["crop_pct"] + 1e-6)
        self.interpolation = cfg["interpolation"]
        self.crop_mode = cfg.get("crop_mode", "center")
        self.is_vit = hasattr(net, "num_prefix_tokens")
        self.num_prefix_tokens = getattr(net, "num_prefix_tokens", 0)
        width = getattr(net, "head_hidden_size", None) or net.num_features
        width = net.num_classes or width  # of a kept projector
        self.dim = 2 * net.num_features if embedding == "cls+mean" else width
        self.parameters_count = sum(p.numel() for p in net.parameters())
        self._mean: Tensor
        self._std: Tensor
        for key, values in ("_mean", self.mean), ("_std", self.std):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        for module in net.modules():
            if dtype != torch.float32 and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def geometry(self) -> Callable[[Tensor], Tensor]:
        """This model's `resize_and_crop`, which can be sent to a worker process as the model need
        not be."""
        return functools.partial(
            resize_and_crop,
            size=self.input_size,
            resize=self.resize,
            interpolation=self.interpolation,
            squash=self.crop_mode == "squash",
        )

    def normalize(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8, or float in [0, 1], (B, 3, S, S) -> float32 of the same shape, by this model's
        mean and standard deviation.

        `out` is an earlier result whose memory is used again: new memory costs more than the sums.
        For a convolutional network the result lies in memory channels-last, in which it runs 1.2 to
        1.4 times as fast on CPU (measured); for a ViT that makes no difference.
        """
        mean = self._mean.to(images.device)
        std = self._std.to(images.device)
        if out is None:
            layout = torch.contiguous_format if self.is_vit else torch.channels_last
            out = torch.empty(images.shape, device=images.device, memory_format=layout)
        if not self.is_vit:  # whole rows, since a loop over three channels is slow
            width = images.shape[-1]
            mean = mean.flatten().repeat(width)
            std = std.flatten().repeat(width)
        each = 1 if images.device.type == "cpu" else len(images)  # one stays in a CPU's cache
        for x, part in zip(out.split(each), images.split(each), strict=True):
            x.copy_(part)
            if not self.is_vit:
                x = x.permute(0, 2, 3, 1).view(-1, len(mean))
            if part.dtype == torch.uint8:
                x /= 255
            x -= mean
            x /= std
        return out

    def tokens(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) -> all tokens (B, T, C) after the final norm, prefix tokens
        first. ViTs only."""
        if not self.is_vit:
            raise ValueError(f"{self.name} is no vision transformer: it has no tokens")
        with self.autocast(x):
            return self.net.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) -> embedding (B, dim)."""
        if self.embedding != "cls+mean":
            with self.autocast(x):
                return self.net(x)
        return self.embed(self.tokens(x))

    def embed(self, features: Tensor) -> Tensor:
        """What the network's `forward_features` gives -> embedding (B, dim)."""
        if self.embedding == "cls+mean":
            means = features[:, self.num_prefix_tokens :].mean(1)
            return torch.cat([features[:, 0], means], dim=-1)
        with self.autocast(features):
            return self.net.forward_head(features)

    def grid(self, features: Tensor) -> Tensor:
        """What the network's `forward_features` gives -> its patch tokens, or the cells of a
        convolutional network's last map, where they lie in the image: (B, C, h, w)."""
        if features.ndim == 3:
            patches = features[:, self.num_prefix_tokens :].transpose(1, 2)
            return patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))
        last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if last else features

    def autocast(self, x: Tensor) -> contextlib.AbstractContextManager:
        """This model's precision; with fp32 an autocast of the caller's stays in force."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, self.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits over weights (as held), architecture, preprocessing and embedding.

        The same weights give the same fingerprint from whatever kind of file they came. Taken at
        first use.
        """
        about = [
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
        total = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(self.net.state_dict().items()):
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            total.update(hashlib.sha256(data.data).digest())
        return total.hexdigest()[:32]


def resize_and_crop(
    images: Tensor, *, size: int, resize: int, interpolation: str, squash: bool = False
) -> Tensor:
    """uint8 (B, 3, H, W) of any size -> uint8 (B, 3, size, size).

    The shorter side becomes `resize` with antialias, smaller images are enlarged, and the middle is
    taken (squash: both sides become `resize` whatever the aspect, as some of timm's models want).
    Rounded to whole grey levels after resizing, as the published transforms on PIL images do.
    """
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"images: expected uint8 (B, 3, H, W), got {images.dtype} {shape}")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    height, width = shape[2:]
    short = min(height, width)
    target = [int(resize * height / short), int(resize * width / short)]
    if squash:
        target = [resize, resize]
    # PIL rounds between the horizontal and the vertical pass, and so does PyTorch on CPU; a GPU has
    # to be made to.
    steps = [target] if images.device.type == "cpu" else [[height, target[1]], target]
    for step in steps:
        mode = InterpolationMode(interpolation)
        images = F.resize(images, step, antialias=True, interpolation=mode)
    return F.center_crop(images, [size, size])


def resized(cells: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Tokens (B, C, h, w) on another grid."""
    if list(cells.shape[2:]) == list(size):
        return cells
    smooth = mode == "bilinear"
    return nn.functional.interpolate(cells.float(), list(size), mode=mode, antialias=smooth)


@dataclass
class Blueprint:
    """What a name stands for: which network, how it sees images, where its weights are."""

    name: str
    architecture: str
    args: dict = field(default_factory=dict)  # of timm's constructor
    preprocessing: dict = field(default_factory=dict)  # what differs from timm's pretrained_cfg
    embedding: str | None = None
    metadata: dict = field(default_factory=dict)
    precision: str = "bfloat16"  # on a GPU
    repository: str = ""  # on the hub
    weights: str | None = None  # a file or folder, or "random"; None: the hub's
    published: bool = False  # in the registry


def blueprint(name: str, weights: str | None = None) -> Blueprint:
    """What `load_model` is to build; UserError where the name stands for nothing."""
    if known := find(name):
        entry = REGISTRY[known]
        seen = {
            "input_size": (3, 224, 224),
            "mean": entry.norm[0],
            "std": entry.norm[1],
            "crop_pct": 224 / entry.resize,
            "interpolation": entry.interpolation,
            "crop_mode": "center",
        }
        return Blueprint(
            known,
            entry.timm,
            {"img_size": 224, "global_pool": "token", **entry.args},
            seen,
            entry.embedding,
            precision=entry.precision,
            repository=entry.hub,
            weights=weights,
            published=True,
        )
    if name.startswith("timm:"):
        return Blueprint(name, name.removeprefix("timm:"), weights=weights)
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        config = read_config(hub_file(repository, ["config.json"]).parent)
        return Blueprint(name, **config, repository=repository, weights=weights)
    if Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        config = read_config(folder)
        folder = folder.resolve()
        own = folder.parent.name if folder.name.startswith("student") else folder.name
        run = str(config["metadata"].get("run") or own)
        return Blueprint(run, **config, weights=weights or name)
    if Path(name).name.startswith("student"):
        raise UserError(f"{name}: no such folder; distill.py makes it at the end of its run")
    close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.5)
    near = f"; did you mean {close[0]}?" if close else "."
    forms = "timm:NAME, hf-hub:OWNER/NAME, and folders such as runs/NAME/student"
    known = f"Known are {', '.join(REGISTRY)}, {forms}"
    raise UserError(f"{name}: no such model or folder{near} {known}")


def load_model(
    name: str,
    weights: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    input_size: int | None = None,
    compile: bool = False,
) -> Model:
    """Build a model, give it its weights, and put it on a device in eval mode.

    name: of REGISTRY or its hub repository, "timm:NAME", "hf-hub:OWNER/NAME", a folder in timm's
    format (such as runs/NAME/student), or a weight file in one.
    weights: None for the hub (a folder's own for a folder), "random", or a file or folder; then no
    network is touched. dtype: of weights and matrix products; None = fp32 on CPU, the model's own
    half precision on a GPU. input_size: side in pixels if not the published one. Position
    embeddings of a ViT are resampled to it once (timm's
        bicubic with antialias), so it must be a multiple of the patch size.
    Raises UserError for whatever a user can mend.
    """
    device = torch.device(device)
    plan = blueprint(name, weights)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, plan.precision)
    net = _network(plan)
    if input_size and input_size != net.pretrained_cfg["input_size"][-1]:
        _resize_input(net, plan, input_size)
    net._model_args = plan.args
    pooled = "cls" if getattr(net, "global_pool", None) == "token" else "pool"
    model = Model(
        net,
        name=plan.name,
        embedding=plan.embedding or pooled,
        dtype=dtype,
        weights=plan.weights or "hub",
        metadata=plan.metadata,
    )
    if model.crop_mode not in ("center", "squash"):
        raise UserError(f"{plan.name}: its crop mode {model.crop_mode!r} is not supported")
    model = model.to(device).eval()
    if compile:  # at first use
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        model.compiled = True
    return model


def _network(plan: Blueprint) -> Network:
    """The timm network with its weights and preprocessing."""
    random = plan.weights == "random"
    own = not plan.repository and plan.weights is None  # timm finds and converts its own best
    net = build(plan, empty=not own and (plan.published or not random), hub=own)
    net.pretrained_cfg = {**net.pretrained_cfg, **plan.preprocessing}
    if random and plan.published:
        _randomize(net, plan.name)
    elif not random and not own:
        path = weight_file(plan.weights) if plan.weights else hub_file(plan.repository)
        _fill(net, read_weights(path), f"{path}: not the weights of {plan.name}")
    return net


def build(plan: Blueprint, *, empty: bool, hub: bool = False) -> Network:
    """The timm network without its classifier, but with the projector that a student has kept.

    Its weights are random and depend on the name alone, or timm's own from the hub, or, if `empty`
    is allowed and the network permits it, have no storage yet.
    """
    import timm

    version = timm.__version__
    architecture = plan.architecture
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        near = f"; near it are {', '.join(close)}" if close else ""
        raise UserError(f"{plan.name}: timm {version} has no architecture {architecture!r}{near}")
    # Drawing random numbers for a billion weights that are then replaced takes half a minute.
    # timm's plain ViTs hold no buffers beside their weights, so they can be built without storage;
    # other networks are built in full.
    module = timm.models.model_entrypoint(architecture).__module__
    bare = empty and module == "timm.models.vision_transformer"
    place = torch.device("meta") if bare else contextlib.nullcontext()
    repository = getattr(timm.get_pretrained_cfg(architecture), "hf_hub_id", "") or plan.name
    with torch.random.fork_rng(devices=[]), place, explained(repository):
        torch.manual_seed(zlib.crc32(plan.name.encode()))
        try:
            args = {"num_classes": 0, **plan.args}
            if bare:  # without storage, drawing them takes as long as building the rest
                args["weight_init"] = "skip"
            return timm.create_model(architecture, pretrained=hub, **args)
        except TypeError as error:
            how = f"timm {version} cannot build {architecture} with {plan.args}"
            raise UserError(f"{plan.name}: {how}: {error}") from None
        except RuntimeError as error:
            if not hub:
                raise
            text = f"{plan.name}: timm has no weights to load: {str(error).splitlines()[0]}"
            raise UserError(text, mend="weights") from None


def _randomize(net: Network, name: str) -> None:
    """Random weights for a network built without storage: always the same bits for one name."""
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    constant = {"bias": 0, "gamma": 1e-5}
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02, generator=generator)
            else:
                p.fill_(constant.get(key.rpartition(".")[2], 1))


def _fill(net: Network, state: State, blame: str) -> None:
    """Load `state` (in any layout that `to_timm` knows) strictly, or say what differs."""
    state = _resampled(net, to_timm(state))
    classifier = () if net.num_classes else net.pretrained_cfg.get("classifier") or ()
    for prefix in [classifier] if isinstance(classifier, str) else classifier:
        # an embedding needs no classifier
        state = {k: v for k, v in state.items() if not k.startswith(prefix + ".")}
    if wrong := misfits(state, net.state_dict()):
        fits = identify(state)
        raise UserError(f"{blame}: {wrong}" + (f". They fit {' and '.join(fits)}" if fits else ""))
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    net.load_state_dict(state, strict=False, assign=any(p.is_meta for p in net.parameters()))


def _resampled(net: Network, state: State) -> State:
    """Weights of the same ViT at another input size, their position embeddings resampled to this
    one's grid."""
    from timm.layers import resample_abs_pos_embed

    held = state.get("pos_embed")
    own = getattr(net, "pos_embed", None)
    if held is None or own is None or held.shape == own.shape or held.shape[::2] != own.shape[::2]:
        return state
    grid = list(net.patch_embed.grid_size)
    prefix = own.shape[1] - grid[0] * grid[1]
    cells = held.shape[1] - prefix
    if cells < 1 or math.isqrt(cells) ** 2 != cells:  # no square image
        return state
    resized = resample_abs_pos_embed(held.float(), grid, num_prefix_tokens=prefix)
    return state | {"pos_embed": resized}


def identify(state: State) -> list[str]:
    """Names of the registry's models whose architecture these weights (any known layout) fit
    exactly."""
    state = to_timm(state)
    fits = []
    width = state["pos_embed"].shape[-1] if "pos_embed" in state else 0
    for name, entry in REGISTRY.items():
        # Building takes half a second; NAME+mean is the same network.
        if width == entry.width and "+" not in name:
            expected = build(blueprint(name), empty=True).state_dict()
            if not misfits(state, expected):
                fits.append(name)
    return fits


def _resize_input(net: Network, plan: Blueprint, size: int) -> None:
    """Change the side of the input from the published one, where the network allows it."""
    published = net.pretrained_cfg["input_size"][-1]
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    if patch and size % patch:
        below = max(1, size // patch) * patch
        text = f"takes multiples of its patch size {patch}, such as {below} or {below + patch}"
        raise UserError(f"input size {size}: {plan.name} {text}")
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=size)
        plan.args["img_size"] = size
        windows: list[tuple] = []
        for module in net.modules():
            if isinstance(getattr(module, "window_size", None), tuple):
                windows.append(module.window_size)
        # Swin's windows grow with the image
        if windows and "window_size" in inspect.signature(type(net)).parameters:
            plan.args["window_size"] = windows[0][0]
    elif net.pretrained_cfg.get("fixed_input_size"):
        raise UserError(f"input size {size}: {plan.name} takes {published} only")
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, size, size)}


KEPT = "input_size mean std interpolation crop_pct crop_mode fixed_input_size first_conv classifier"


def save_student(
    model: nn.Module, folder: str | Path, *, metadata: dict, facts: dict | None = None
) -> None:
    """Write `model` (a Model or its timm network) as a folder that timm and `load_model` read.

    metadata is kept in config.json under "g2l" and comes back as `load_model(folder).metadata`;
    facts, for the model card (see g2l/card.py), are kept there under "card".
    """
    import safetensors.torch

    net: Network = getattr(model, "net", model)
    folder = Path(folder)
    cfg = net.pretrained_cfg
    config = {
        "architecture": cfg["architecture"],
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "model_args": net._model_args,
        "pretrained_cfg": {key: cfg[key] for key in KEPT.split() if cfg.get(key) is not None},
        "embedding": getattr(model, "embedding", None),
        "g2l": metadata,
    }
    state = {}
    for key, value in net.state_dict().items():
        value = value.float() if value.is_floating_point() else value
        state[key] = value.cpu().contiguous()
    with atomic(folder / "model.safetensors") as path:
        # safetensors' own save_file makes files that only their owner reads
        path.write_bytes(safetensors.torch.save(state))
        config["sha256"] = tensors_digest(path)
        about = {"format": "pt", "sha256": config["sha256"]}  # checked when it is loaded
        path.write_bytes(safetensors.torch.save(state, about))
    if facts:
        config["card"] = facts
        write_text(folder / "README.md", card(config))
    write_text(folder / "config.json", json.dumps(config, indent=2))


def show_speed(names: Sequence[str], args: Namespace) -> None:
    """Print one line per model as it is measured. Weights are random unless given: they do not
    change the time."""
    weights = parse_weights(args.weights, names)
    options = model_options(args)
    compiled = "; compiled" if args.compile else ""
    print(f"{describe_device(options['device'])}; torch {torch.__version__}{compiled}")
    width = max(len(name) for name in names)
    print("model".ljust(width), *(title.rjust(11) for title in COLUMNS))
    for name in names:
        given = weights[name] or (None if Path(name).exists() else "random")
        model = load_model(name, given, input_size=args.input_size, **options)
        cells = speed(model, args.batch_size)
        print(name.ljust(width), *(cell.rjust(11) for cell in cells))
    print(
        "MFU: share of the ceiling, the TFLOP/s measured for a large matrix product in the same "
        "precision; preprocessing and reading are not counted"
    )


def check_nameless(path: str, args: Namespace) -> None:
    """Say which models a weight file fits; of a student's folder, that its parts agree."""
    if Path(path).is_dir() and "g2l" in read_json(Path(path) / "config.json"):
        check_card(Path(path))
        check_weights(path, None, args)
        return
    fits = identify(read_weights(weight_file(path)))
    if not fits:
        if Path(path).is_dir():
            read_config(Path(path))  # a student whose config.json is lost or damaged: it says so
        raise UserError(f"{path}: readable, but fits no model of the registry", mend="registry")
    print(f"{path}: fits {' and '.join(fits)}")


def check_weights(name: str, path: str | None, args: Namespace) -> None:
    """Say that a weight file (without one, the hub's) is whole and fits; UserError says why not."""
    start = time.perf_counter()
    if path is None and (known := find(name)):
        path = str(hub_file(REGISTRY[known].hub))
    if path and path != "random":
        verify(weight_file(path))
    model = load_model(name, path, input_size=args.input_size, **model_options(args))
    wrong = [key for key, p in model.net.named_parameters() if not torch.isfinite(p).all()]
    if wrong:
        first = ", ".join(wrong[:3])
        raise UserError(f"{path or name}: {len(wrong)} tensors hold NaN or infinity ({first})")
    print(
        f"{path or name}: fits {model.name}; {model.parameters_count:,} parameters, embedding "
        f"{model.dim} ({model.embedding}), fingerprint {model.fingerprint} "
        f"({time.perf_counter() - start:.1f} s)"
    )


class _Help(Help, RawDescriptionHelpFormatter):
    """Shared help, with the docstring's own lines."""


def build_parser() -> ArgumentParser:
    """Arguments of `python -m g2l.models`."""
    parser = ArgumentParser(prog="python -m g2l.models", description=__doc__, formatter_class=_Help)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a name of the registry, timm:NAME, hf-hub:OWNER/NAME, or runs/NAME/student",
    )
    act = parser.add_argument_group("what to do; without names and flags, the registry is printed")
    flag(
        act,
        "--check WEIGHTS",
        "does this file or folder hold the weights of NAME? Without NAME: of which models? "
        "Of a student's folder: do its model card, weights and config.json agree?",
    )
    flag(act, "--speed NAME", "measure images a second and MFU", nargs="*")
    flag(act, "--input-size PX", "side of the input in pixels, if not the published one")
    flag(
        act,
        "--batch-size N",
        "images a forward pass of --speed; default: 4 on a CPU, on a GPU as many as fit",
    )
    add_model_arguments(parser)
    return parser


REMEDIES = MODEL_REMEDIES | {"registry": "`python -m g2l.models` lists it"}


def run(args: Namespace) -> int:
    """Measure, check, or print the registry; the exit status."""
    if args.speed is not None:
        show_speed(args.speed + args.names or list(REGISTRY), args)
        return 0
    if args.weights and not args.names:
        raise UserError(f"--weights {args.weights[0]}: of which model? Name it before")
    given = parse_weights(args.weights, args.names)
    if args.check and not args.names:
        check_nameless(args.check, args)
    for name in args.names:
        check_weights(name, args.check or given[name], args)
    if not args.names and not args.check:
        print(table() + "\n" + NOTES)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m g2l.models`; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args), REMEDIES)


if __name__ == "__main__":
    sys.exit(main())

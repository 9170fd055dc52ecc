"""TODO."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from g2l.errors import UserError
from g2l.registry import REGISTRY

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


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
    with explained(name, f"https://huggingface.co/{repository}"):
        for file in WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repository, file, local_files_only=cut_off))
            except (
                EntryNotFoundError
            ) as error:  # not there, or neither in the cache nor to be reached
                absent, cut_off = error, isinstance(error, LocalEntryNotFoundError)
        raise absent


@contextlib.contextmanager
def explained(name: str, page: str) -> Iterator[None]:
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


def misfits(state: dict, expected: dict) -> str:
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

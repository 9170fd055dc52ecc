"""Weight files: where they come from, whether they are whole, and every published layout turned
into timm's.

In order of use: which file (`parse_weights`, `weight_file`, `hub_file`), its tensors
(`read_weights`, `read_config`), their names in timm (`to_timm`), and what still does not fit
(`misfits`). Nothing in a file is ever executed.
"""

import contextlib
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from g2l.errors import UserError
from g2l.files import check_unpacked
from g2l.registry import origins

INDEX = "model.safetensors.index.json"  # of a model in several files
WEIGHT_FILES = (
    "model.safetensors",
    INDEX,
    "pytorch_model.bin",
    "GPFM.pth",
    "teacher_checkpoint_load.pt",  # OpenMidnight's
)
State = dict[str, Tensor]


def parse_weights(specs: Sequence[str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Read `[NAME=]FILE` or `random`, once or more, for the models `names`.

    Without NAME a value is for the only model; `random` without NAME is for every model that is no
    folder.
    """
    weights = dict.fromkeys(names)
    for spec in specs or ():
        name = next((n for n in weights if spec.startswith(n + "=")), None)
        if name:
            weights[name] = spec[len(name) + 1 :]
        elif spec == "random":
            unset = [n for n in names if not Path(n).exists() and weights[n] is None]
            weights.update(dict.fromkeys(unset, "random"))
        elif len(weights) == 1 and ("=" not in spec or Path(spec).exists()):
            weights[names[0]] = spec
        else:
            raise UserError(
                f"weights {spec}: "
                "for which model? Write NAME=FILE with NAME one of"
                f" {', '.join(names)}"
            )
    return weights


def weight_file(path: str | Path) -> Path:
    """The weight file at `path`, or in the folder `path`; of a model in several files, their
    index."""
    path = Path(path).expanduser()
    index = path.parent / INDEX
    if path.is_dir():
        found = [path / file for file in WEIGHT_FILES if (path / file).is_file()]
        if not found:
            raise UserError(
                f"{path}: no weights in this folder; expected {' or '.join(WEIGHT_FILES)}"
            )
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file", mend="weights")
    part = re.search(r"-\d+-of-\d+\.safetensors$", path.name)
    return index if part and index.is_file() else path


def read_weights(path: Path) -> State:
    """Tensors of a safetensors file, of several with an index, or of a PyTorch file (weights
    only)."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
        )
    return _state_dict(_unpack(path, head), path)


def _read_shards(index: Path) -> State:
    """All tensors of the files that an index names, each in the index's own folder."""
    state: State = {}
    for file in _shards(index):
        shard = index.parent / Path(file).name  # beside the index, wherever it says
        if not shard.is_file():
            raise UserError(f"{shard}: no such file; {index.name} names it", mend="weights")
        state |= read_weights(shard)
    return state


def tensors_digest(path: Path) -> str:
    """SHA-256 of the bytes of all tensors in a safetensors file."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))  # behind the header
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(path: Path) -> State:
    """The tensors of a safetensors file, held against the checksum that a student of ours has."""
    import safetensors.torch

    with safetensors.safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get("sha256")
    if told and told != tensors_digest(path):
        raise UserError(f"{path}: damaged, its tensors are not those written; make it again")
    return safetensors.torch.load_file(path)


def _unpack(path: Path, head: bytes) -> object:
    """What the file holds, by its content: files in the hub's cache are named by their hash."""
    import safetensors.torch

    size = f"{path.stat().st_size:,} bytes"
    remedy = "delete it and fetch it again"
    damage = (
        safetensors.SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
    )
    try:
        if head[8:9] == b"{":
            return _checked(path)
        if path.suffix == ".safetensors" and not zipfile.is_zipfile(path):
            raise UserError(f"{path}: no safetensors file ({size}, begins {head[:12]!r}); {remedy}")
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        with path.open("rb") as file:  # a name would decide how it is read
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's text begins with how to load the file all the same; the reason comes after that.
        lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
        reasons = [line.strip() for line in lines if line.strip() and "weights_only" not in line]
        raise UserError(
            f"{path}: refused. Expected tensors only (safetensors, or a state dict saved by "
            f"PyTorch); this is no such file, or it holds Python objects, which could run code: "
            f"{(reasons or ['no tensors could be read'])[0]}"
        ) from None
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or cut short ({size}); {remedy} ({reason})") from None


def _state_dict(content: object, path: Path) -> State:
    """The state dict inside a checkpoint's wrappers."""
    wrappers = (
        "distiller",
        "teacher",
        "state_dict_ema",
        "model",
        "model_state_dict",
        "state_dict",
    )
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    items = list(content.items()) if isinstance(content, dict) else []
    if not items or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        inside = f" of {', '.join(str(key) for key, _ in items[:3])}" if items else ""
        found = f"{type(content).__name__}{inside}"
        raise UserError(f"{path}: expected a state dict (names and tensors), found {found}")
    return dict(items)


def read_config(folder: Path) -> dict:
    """What folder/config.json says, as the fields of a Blueprint of these names.

    Raises UserError where it is none in timm's format.
    """
    path = folder / "config.json"
    if (folder / "student" / "config.json").is_file():
        raise UserError(f"{folder}: a folder with a student in it; name that: {folder / 'student'}")
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json; expected a folder in timm's format (runs/NAME/student)"
        )
    try:
        config = json.loads(path.read_text())
        if "model_type" in config and "architecture" not in config:
            raise UserError(
                f"{path}: in transformers' format, not timm's; name the model and give this "
                "folder as its weights",
                mend="weights",
            )
        args = dict(config.get("model_args") or {})
        if bad := sorted(k for k in args if k.startswith(("pretrained", "checkpoint", "cache"))):
            raise UserError(
                f"{path}: model_args may not hold {', '.join(bad)}, which name other files"
            )
        if "g2l" in config and config.get("num_classes"):  # a student's projector
            args["num_classes"] = int(config["num_classes"])
        metadata = dict(config.get("g2l") or {})
        origins(metadata, "teacher")  # read here, where what it cannot be is named
        return {
            "architecture": str(config["architecture"]),
            "args": args,
            "preprocessing": _preprocessing(config),
            "embedding": config.get("embedding"),
            "metadata": metadata,
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a timm configuration ({type(error).__name__}: {error})"
        ) from None


def _preprocessing(config: dict) -> dict:
    """timm's fields of preprocessing, checked; ValueError names a bad one."""
    found = {**config, **(config.get("pretrained_cfg") or {})}
    keep = (
        "input_size",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
        "crop_mode",
        "classifier",
    )
    kept = {key: found[key] for key in keep if found.get(key) is not None}
    for key, kind in (("input_size", int), ("mean", float), ("std", float)):
        values = kept.get(key, (1, 1, 1))
        if len(values) != 3 or not all(kind(value) > 0 for value in values):
            raise ValueError(f"{key} is {values}")
    return kept


def hub_file(repository: str, files: Sequence[str] = WEIGHT_FILES) -> Path:
    """The first of `files` that a hub repository holds: from the cache, else fetched with the hub's
    token.

    Of a model in several files all are fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    absent = EntryNotFoundError(repository)
    with explained(repository):
        for cached in (True, False):  # the cache first, whatever the hub would answer
            for file in files:
                try:
                    path = Path(hf_hub_download(repository, file, local_files_only=cached))
                    for shard in _shards(path) if file == INDEX else ():
                        hf_hub_download(repository, shard)
                    return path
                except EntryNotFoundError as error:
                    absent = error
                    if not cached and isinstance(error, LocalEntryNotFoundError):
                        raise  # the hub cannot be reached, so no other file will be
        raise absent


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists."""
    try:
        return sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of weight files ({error!r})") from None


@contextlib.contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn the hub's errors into one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{repository}"
    sign_in = "then `hf auth login` or set HF_TOKEN"
    try:
        yield
    except hub.GatedRepoError:
        why = f"gated; ask for access on {page}, {sign_in}"
    except hub.RepositoryNotFoundError:
        why = f"{page} does not exist or is hidden without a token; ask for access there, {sign_in}"
    except hub.LocalEntryNotFoundError:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        cache = f"not in the cache {constants.HF_HUB_CACHE}, and {state}"
        why = f"{cache}; fetch it once from {page} with a network"
    except hub.EntryNotFoundError:
        why = f"{page} holds none of {', '.join(WEIGHT_FILES)}"
    except (hub.HfHubHTTPError, OSError) as error:
        why = f"not fetched from {page}: {str(error).splitlines()[0]}; try again"
    else:
        return
    raise UserError(f"{repository}: {why}", mend="weights") from None


def verify(path: Path) -> None:
    """Raise UserError if checksums say that a file is damaged.

    Large files in the hub's cache are named by their SHA-256; PyTorch's own files have CRCs, which
    it does not compare.
    """
    blob = path.resolve()
    wrong = ""
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                wrong = "its SHA-256 is not that of its name"
    elif zipfile.is_zipfile(blob):
        try:
            check_unpacked(blob)
            with zipfile.ZipFile(blob) as archive:
                if part := archive.testzip():
                    wrong = f"checksum of {part} differs"
        except zipfile.BadZipFile as error:
            wrong = str(error)
    if wrong:
        raise UserError(f"{blob}: damaged, {wrong}; delete it and fetch it again")


def to_timm(state: State) -> State:
    """Weights in the layout of transformers' or the original DINOv2 under timm's names.

    timm keeps one position embedding less where registers are present: its class token has none, so
    the class slot of the position embedding is added into the class token.
    """
    state = _from_transformers(_backbone(state))
    named: State = {}
    for key, value in state.items():
        if "pos_embed" in state:  # DINOv2 may keep its blocks in chunks; convnets number theirs so
            key = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if key != "mask_token" and not key.startswith("pooler."):
            named[key] = value
    if {"register_tokens", "cls_token", "pos_embed"} <= set(named):
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def _backbone(state: State) -> State:
    """The backbone of a training checkpoint, without what wrappers put before every name."""
    beside_others = ("teacher.", "ema.", "student.", "backbone.")  # the best first
    before_all = ("module.", "_orig_mod.", "model.", "net.", "encoder.", "dinov2.")
    found = True
    while found:
        found = False
        for prefix in (*beside_others, *before_all):
            inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if inside and (prefix in beside_others or len(inside) == len(state)):
                state = inside
                found = True
    return state


TRANSFORMERS = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "attention.attention.query": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",  # of their plain ViT, whose layers are named otherwise
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layernorm.": "norm.",
}


def _from_transformers(state: State) -> State:
    """Names of transformers' DINOv2 in those of the original; query, key and value become one
    tensor."""
    if "embeddings.cls_token" not in state:
        return state
    rest = dict(state)
    renamed = {}
    for query in [key for key in state if ".attention.attention.query." in key]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        parts = [rest.pop(name) for name in names if name in rest]
        if len(parts) == 3:  # else it will be missed
            rest[query] = torch.cat(parts)
    for key, value in rest.items():
        for theirs, ours in TRANSFORMERS.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def misfits(state: State, expected: State) -> str:
    """What keeps `state` from being loaded as `expected`, with the first names; "" if nothing
    does."""
    other = []
    for key in state.keys() & expected.keys():
        held, wanted = (tuple(part[key].shape) for part in (state, expected))
        if held != wanted:
            other.append(f"{key} {held} instead of {wanted}")
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    found = []
    kinds = {
        "tensors missing": expected.keys() - state.keys() - optional,
        "not expected": state.keys() - expected.keys(),
        "of another shape": other,
    }
    for kind, names in kinds.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            found.append(f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{more})")
    return "; ".join(found)
